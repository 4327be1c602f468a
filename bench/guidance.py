"""FID against guidance, from the table that fid.py writes.

    python fid.py --ckpt out/RUN/ema.safetensors --ref ref.npz --cfg 1 1.5 2 2.9 4 --interval 0.1,1 0,1
    python -m bench.guidance out/RUN/fid.csv --out assets/guidance.png

A line for each network, set of weights and interval (and whatever else differs between rows), its best scale circled;
a lone score is a diamond. At cfg 1 there is no guidance, so that one row serves all intervals. --real draws the FID of
real images against real ones, of as many (python fid.py --images FOLDER --ref REF --n N): no generator can be expected
below it.
"""
import pathlib
import sys

import fid
from bench.chart import picture, pyplot, save, styles
from lib.flags import Parser, number
from lib.run import BadInput, program, say
from lib.table import read_rows

# What sets one line apart from another, the interval last: all settings, except the scale (the axis), the evaluations
# (they follow from steps and method), N and the reference (where they differ, FIDs do not compare).
SHARED = ("cfg", "nfe", "n", "reference")
APART = ("table", *(name for name in fid.SETTINGS if name not in (*SHARED, "interval")), "interval")


def read_lines(paths):
    """({label: (target, [(cfg, FID), ...])}, N) from tables of fid.py; a label says what differs. Raises BadInput."""
    rows = [{"table": path.absolute().parent.name} | row for path in paths for row in read_rows(path, fid.COLUMNS)]
    if not rows:
        raise BadInput(f"{' '.join(map(str, paths))}: no scores: python fid.py --ckpt FILE --ref FILE --cfg 1 2 4")
    for name in ("n", "reference"):
        values = {row[name] for row in rows}
        if len(values) > 1:
            raise BadInput(f"FIDs of different {name} do not compare ({', '.join(sorted(values))}): give tables of one")
    lines = {}
    for row in sorted(rows, key=lambda row: row["interval"] == "-"):  # those without guidance come last
        key = tuple(row[name] for name in APART)
        beside = [line for line in lines if row["interval"] == "-" and line[:-1] == key[:-1]]
        for line in beside or [key]:
            lines.setdefault(line, []).append((float(row["cfg"]), float(row["fid"])))
    # A label has what differs between lines; a hash of the weights, and the target, only where nothing else says it.
    differ = [place for place in range(len(APART)) if len({line[place] for line in lines}) > 1]
    for name in ("network", "target"):
        fewer = [place for place in differ if APART[place] != name]
        if len({tuple(line[place] for place in fewer) for line in lines}) == len(lines):
            differ = fewer
    said = lambda line, place: line[place] if APART[place] in ("table", "target") else f"{APART[place]} {line[place]}"
    label = lambda line: ", ".join(said(line, place) for place in differ if line[place] != "-") or line[0]
    tables = [path.absolute().parent.name for path in paths]
    ordered = sorted(lines.items(), key=lambda item: (tables.index(item[0][0]), -len(item[1])))
    return {label(line): (line[APART.index("target")], sorted(points)) for line, points in ordered}, rows[0]["n"]


@program
def main(argv=None):
    parser = Parser("FID against guidance.")
    parser.add_argument("tables", metavar="FID.csv", type=pathlib.Path, nargs="+", help="tables written by fid.py")
    parser.add_argument("--real", type=number(float, 0), help="FID of real against real images")
    parser.add_argument("--out", type=picture, default="assets/guidance.png", help="the picture, NAME.png")
    args = parser.parse_args(argv)
    lines, n = read_lines(args.tables)
    figure, panel = pyplot().subplots(figsize=(7, 4.4 + 0.2 * len(lines)))
    for (label, (_, points)), look in zip(lines.items(), styles([target for target, _ in lines.values()])):
        best = min(points, key=lambda point: point[1])
        if len(points) == 1:
            panel.plot(*best, "D", color=look["color"], markerfacecolor="none", label=label)
        else:
            panel.plot(*zip(*points), marker=".", label=label, **look)
            panel.plot(*best, "o", color=look["color"], markerfacecolor="none", markersize=12)
        say(f"{label}: best FID-{n} {best[1]:.3f} at cfg {best[0]:g}")
    if args.real is not None:
        panel.axhline(args.real, color="gray", linewidth=1)
        panel.text(0.99, args.real, "real against real", ha="right", va="bottom", color="gray", fontsize=9,
                   transform=panel.get_yaxis_transform())
    panel.set(xlabel="guidance scale (1: none)", ylabel=f"FID-{n}", title="FID by guidance scale, the best circled")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)
    save(figure, args.out)
    say(f"-> {args.out}")


if __name__ == "__main__":
    sys.exit(main())
