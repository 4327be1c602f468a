"""FID against guidance, from the table that fid.py writes.

    python fid.py --ckpt out/RUN/ema.safetensors --ref ref.npz --cfg 1 1.5 2 3 --interval 0.1,1 0,1
    python -m bench.guidance out/RUN/fid.csv --out assets/guidance.png

A line for each run, set of weights, interval and so on, its best scale circled. The unguided row
serves all intervals. --real: FID of as many real images against the same reference.
"""
import pathlib

import fid
from bench.chart import picture, pyplot, save, styles
from lib.flags import Parser, number
from lib.log import read_scores
from lib.run import BadInput, program, say

# What sets one line apart from another, the interval last.
APART = ("network", "target", "run", "weights", "step", "steps", "method", "t_eps", "classes",
         "vae", "seed", "precision", "interval")


def read_lines(paths):
    """({label: (target, [(cfg, FID), ...])}, N) from tables of fid.py. Raises BadInput."""
    rows = [row | {"run": path.absolute().parent.name}
            for path in paths for row in read_scores(path, fid.COLUMNS)]
    if len({(row["n"], row["reference"]) for row in rows}) != 1:
        raise BadInput("no scores, or FIDs that do not compare: n or the reference differ")
    lines = {}
    for row in sorted(rows, key=lambda row: row["interval"] == "-"):  # unguided ones come last
        key = tuple(row[name] for name in APART)
        keys = [key]
        if row["interval"] == "-":  # it belongs to the lines of all intervals
            keys = [line for line in lines if line[:-1] == key[:-1]] or [key]
        for line in keys:
            lines.setdefault(line, []).append((float(row["cfg"]), float(row["fid"])))
    differ = [i for i in range(2, len(APART)) if len({line[i] for line in lines}) > 1]
    named = {}
    for line, points in lines.items():
        label = ", ".join(f"{APART[i]} {line[i]}" for i in differ) or line[2]
        if label in named:
            label += f", network {line[0]}"
        named[label] = line[1], sorted(points)
    return named, rows[0]["n"]


@program
def main(argv=None):
    parser = Parser("FID against guidance.")
    add = parser.add_argument
    add("tables", metavar="FID.csv", type=pathlib.Path, nargs="+", help="written by fid.py")
    add("--real", type=number(float, 0), help="FID of real against real images")
    add("--out", type=picture, default="assets/guidance.png", help="the picture, NAME.png")
    args = parser.parse_args(argv)
    lines, n = read_lines(args.tables)
    figure, panel = pyplot().subplots(figsize=(7, 5))
    looks = styles([target for target, _ in lines.values()])
    for (label, (_, points)), look in zip(lines.items(), looks):
        cfg, best = min(points, key=lambda point: point[1])
        panel.plot(*zip(*points), marker=".", label=label, **look)
        panel.plot(cfg, best, "o", color=look["color"], markerfacecolor="none", markersize=12)
        say(f"{label}: best FID-{n} {best:.3f} at cfg {cfg:g}")
    if args.real is not None:
        panel.axhline(args.real, color="gray", linewidth=1, label="real against real")
    panel.set(xlabel="guidance scale (1: none)", ylabel=f"FID-{n}, the best circled")
    save(figure, args.out)


if __name__ == "__main__":
    raise SystemExit(main())
