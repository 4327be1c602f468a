"""Print a table of runs: the error of v after the last step, scores, speed.

    python -m ablations.table out/targets/*/

fit and val are the squared error of the velocity on training images and on those of --val, averaged
over training's times. A score is named by the number of images, the guidance scale and, where they
are not the paper's sampler, the solver and the floor of the slope.
"""
import pathlib
import sys

from lib.flags import Parser, path
from lib.log import read_table
from lib.run import log, program


def last_value(rows, column):
    """The last value in a column of a table, or None."""
    values = [row[column] for row in rows if row.get(column)]
    return float(values[-1]) if values else None


def describe(run: pathlib.Path) -> dict:
    """{column: value} of a run's folder."""
    _, rows = read_table(run / "log.csv")
    table = {"run": run.name, "step": rows[-1]["step"] if rows else None}
    table |= {name: last_value(rows, name) for name in ("fit", "val")}
    for row in read_table(run / "fid.csv")[1]:
        usual = (row["method"], row["nfe"], row["t_eps"]) == ("heun", "99", "0.05")
        how = "" if usual else f", {row['method']} {row['nfe']}, floor {row['t_eps']}"
        for metric, name in (("fid", "FID"), ("mmd", "MMD")):
            if row.get(metric):
                table[f"{name}-{row['n']}, cfg {row['cfg']}{how}"] = float(row[metric])
    speeds = sorted(float(row["images_per_s"]) for row in rows if row.get("images_per_s"))
    table["images/s"] = speeds[len(speeds) // 2] if speeds else None
    return table


def markdown(tables) -> str:
    columns = list(dict.fromkeys(name for table in tables for name in table))
    lines = [columns, ["---"] * len(columns)]
    for table in tables:
        values = [table.get(name) for name in columns]
        lines.append(["" if value is None else f"{value:.4g}" if isinstance(value, float)
                      else str(value) for value in values])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@program
def main(argv=None):
    parser = Parser("Print a table of runs.")
    parser.add_argument("runs", nargs="+", type=path, metavar="RUN", help="folders of runs")
    args = parser.parse_args(argv)
    log(markdown([describe(run) for run in args.runs]))


if __name__ == "__main__":
    sys.exit(main())
