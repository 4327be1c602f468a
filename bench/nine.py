"""All nine combinations of prediction and loss, alike in everything else, in one table.

    python -m bench.nine data/cifar10 --ref cifar10.npz --fid-n 2048     without --ref no FID
    python -m bench.nine data/cifar10 --pairs x:v eps:v v:v              the paper's loss alone

Two seeds of x:x and v:v say which differences mean anything. Flags that are unknown here (--val,
for example) go to train.py. What is finished is not done again. In the table, `fit` is the error of
the velocity on training images at training's times, `even t` at even ones, `val` on --val's images.
"""
import contextlib
import itertools
import pathlib
import signal

import fid
import train
from bench.curves import read_log
from lib.flags import Parser, number
from lib.log import read_scores
from lib.run import BadInput, program, say

# Those of the paper's loss first: they are what one wants to see should time run out.
PAIRS = [f"{target}:{loss}" for loss in ("v", "x", "eps") for target in ("x", "v", "eps")]
TWICE = ("x:x", "v:v")
RECIPE = {"model": "T", "patch": 8, "batch": 128, "lr": 1e-3, "steps": 2000, "warmup": 0.25,
          "decay": 0.3, "ema": 0.99}


def scores(run):
    """What a run came to: {"step": ..., "fit": ..., "val": ..., "FID-2048, cfg 1": ...}."""
    found = {}
    for column in ("fit", "val"):
        with contextlib.suppress(BadInput):  # trained without --val
            log = read_log(run, column)
            step = max(log)
            mean, errors = log[step]
            even = sum(errors.values()) / len(errors)
            found |= {"step": step, column: mean, f"{column}, even t": even}
    for row in read_scores(run / "fid.csv", fid.COLUMNS):
        # Of several (another floor, another interval ...) the first.
        found.setdefault(f"FID-{row['n']}, cfg {row['cfg']}", float(row["fid"]))
    return found


def markdown(rows, columns):
    """A table in Markdown of {column: value}; a value that is missing leaves a blank."""
    lines = [columns, ["---"] * len(columns)]
    for row in rows:
        values = [row.get(name, "") for name in columns]
        lines.append([f"{v:.4g}" if isinstance(v, float) else str(v) for v in values])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def run_both(args, others, target, loss, seed, run):
    """Train one combination, and score it where there is a reference. Returns an exit code."""
    often, detail = max(1, args.steps // 8), max(1, args.steps // 40)
    words = ["--target", target, "--loss", loss, "--seed", seed, "--out", run,
             "--latents", args.cache, "--log-every", detail, "--sample-every", often,
             "--save-every", often]
    for name in RECIPE:
        words += [f"--{name}", vars(args)[name]]
    code = train.main(list(map(str, words + others)))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # train.py has caught them
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if code or not args.ref:
        return code
    words = ["--ckpt", run / "ema.safetensors", "--ref", args.ref, "--num-samples", args.fid_n,
             "--cfg", args.cfg]
    if args.inception:
        words += ["--inception", args.inception]
    return fid.main(list(map(str, words)))


@program
def main(argv=None):
    parser, path = Parser("Train and compare nine combinations of prediction, loss."), pathlib.Path
    add = parser.add_argument
    add("cache", metavar="CACHE", type=path, help="latents written by vae.py")
    add("--out", type=path, default=path("out/nine"), help="folder of the runs")
    add("--pairs", nargs="+", choices=PAIRS, default=PAIRS, metavar="PREDICTION:LOSS", help="which")
    add("--seeds", type=number(int, 0), nargs="+", default=[0, 1], help="of all; then of x:x, v:v")
    for name, value in RECIPE.items():
        add(f"--{name}", type=type(value), default=value, help="as in train.py, the same for all")
    add("--ref", type=path, help="reference statistics, npz; without it no FID is measured")
    add("--inception", type=path, help="Inception's weights (default: as fid.py)")
    add("--fid-n", type=number(int, 2), default=2048, help="images scored")
    add("--cfg", type=number(float, 0, 1000), default=1.0, help="guidance scale of those, 1 = none")
    args, others = parser.parse_known_args(argv)
    rows = []
    for seed, pair in itertools.product(args.seeds, args.pairs):
        if seed == args.seeds[0] or pair in TWICE:
            target, loss = pair.split(":")
            run = args.out / f"{target}-{loss}loss-seed{seed}"
            code = run_both(args, others, target, loss, seed, run)
            if code:
                return code  # stopped by a signal, or by an error that has been told
            rows.append({"predicts": target, "loss in": loss, "seed": seed} | scores(run))
    columns = list(dict.fromkeys(name for row in rows for name in row))
    say(f"\n{args.cache.name}, {args.model}/{args.patch}, {args.steps} steps of {args.batch}, "
        f"lr {args.lr:g}\n\n{markdown(rows, columns)}")


if __name__ == "__main__":
    raise SystemExit(main())
