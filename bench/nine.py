"""All nine combinations of prediction and loss, alike in everything else: the table that people keep asking for.

    python -m bench.nine data/cifar10
    python -m bench.nine data/cifar10 --ref cifar10.npz --inception FILE --fid-n 2048      FID as well
    python -m bench.nine data/cifar10-taef2 --patch 1 --pairs x:v eps:v v:v                      the paper's loss alone

PREDICTION:LOSS names a combination. x:x and v:v are trained from a second seed as well: how far two seeds lie apart
says how much of a difference between combinations means anything. A flag that this file does not know (--val, --vae,
--precision ...) goes to train.py as it is, after CACHE. What is finished is not done again, what was interrupted
continues.

At the end, a table in Markdown. Its `fit` is the squared error of the velocity whatever the run's loss was, on images
of the training data, at the same times and noise for all runs (train.py logs it): `fit` with times as training draws
them, which is the paper's loss, `fit, even t` with times spread evenly, where the last moments weigh most (why:
bench/curves.py). `val` is the same on images that training never saw.
"""
import pathlib
import signal
import sys

import fid
import train
from bench.curves import read_log
from lib.flags import Parser, number
from lib.run import BadInput, program, say
from lib.table import read_rows
from model import SIZES

# Those of the paper's loss first: they are what one wants to see should time run out.
PAIRS = [f"{target}:{loss}" for loss in ("v", "x", "eps") for target in ("x", "v", "eps")]
TWICE = ("x:x", "v:v")
# How fid.py samples unless told otherwise
USUAL = {"weights": "ema", "interval": "0.1,1", "nfe": "99", "t_eps": "0.05", "classes": "all", "seed": "0"}


def finish(program_main, argv):
    """Run a program's main in this process and put the signal handlers back afterwards. Returns its exit code."""
    handlers = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        return program_main([str(word) for word in argv])
    finally:
        for name, handler in handlers.items():
            signal.signal(name, handler)


def scores(run):
    """What a run came to: {"step": ..., "fit": ..., "val": ..., "FID-2048, cfg 1": ...}, those that there are."""
    found = {}
    for column in ("fit", "val"):
        try:
            step, (mean, bins) = max(read_log(run, column).items())
        except BadInput:
            continue  # trained without --val
        found |= {"step": step, column: mean, f"{column}, even t": sum(bins.values()) / len(bins)}
    for row in read_rows(run / "fid.csv", fid.COLUMNS):
        unusual = [f", {name} {row[name]}" for name, usual in USUAL.items() if row[name] not in (usual, "-")]
        found[f"FID-{row['n']}, cfg {row['cfg']}{''.join(unusual)}"] = float(row["fid"])
    return found


def markdown(rows, columns):
    """A table in Markdown of {column: value}; a value that is missing leaves a blank."""
    text = lambda value: f"{value:.4g}" if isinstance(value, float) else str(value)
    lines = [columns, ["---"] * len(columns), *([text(row.get(name, "")) for name in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


@program
def main(argv=None):
    parser = Parser("Train and compare the nine combinations of prediction and loss.")
    parser.add_argument("cache", metavar="CACHE", type=pathlib.Path, help="latents written by vae.py")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/nine"), help="folder of the runs")
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=PAIRS, metavar="PREDICTION:LOSS", help="which")
    parser.add_argument("--seeds", type=number(int, 0), nargs="+", default=[0, 1], help="of all; then of x:x, v:v")
    parser.add_argument("--table", action="store_true", help="only print the table of the runs that are there")
    how = parser.add_argument_group("recipe, the same for all")
    how.add_argument("--model", choices=SIZES, default="T", help="size")
    how.add_argument("--patch", type=number(int, 1), default=8, help="patch size, in latent pixels")
    how.add_argument("--batch", type=number(int, 1), default=128, help="images a step")
    how.add_argument("--lr", type=number(float, 0), default=1e-3, help="learning rate")
    how.add_argument("--steps", type=number(int, 1), default=2000, help="optimizer steps")
    how.add_argument("--warmup", type=number(float, 0), default=0.25, help="linear warm-up, in epochs")
    how.add_argument("--decay", type=number(float, 0, 1), default=0.3, help="share of the run over which the lr falls")
    how.add_argument("--ema", type=number(float, 0, 1), default=0.99, help="decay of the average of the weights")
    score = parser.add_argument_group("FID of each run")
    score.add_argument("--ref", type=pathlib.Path, help="reference statistics, npz; without it no FID is measured")
    score.add_argument("--inception", type=pathlib.Path, help="Inception's weights (default: as fid.py)")
    score.add_argument("--fid-n", type=number(int, 2), default=2048, help="images scored")
    score.add_argument("--cfg", type=number(float, 0, 1000), default=1.0, help="guidance scale, 1 = none")
    args, others = parser.parse_known_args(argv)
    often, detail = (str(max(1, args.steps // parts)) for parts in (8, 40))
    recipe = ["--latents", args.cache, "--model", args.model, "--patch", args.patch, "--batch", args.batch,
              "--lr", args.lr, "--steps", args.steps, "--warmup", args.warmup, "--decay", args.decay, "--ema", args.ema,
              "--log-every", detail, "--sample-every", often, "--save-every", often, *others]
    scoring = ["--ref", args.ref, "--n", args.fid_n, "--cfg", args.cfg]
    scoring += ["--inception", args.inception] * bool(args.inception)
    rows = []
    for pair, seed in ((pair, seed) for place, seed in enumerate(args.seeds) for pair in args.pairs
                       if place == 0 or pair in TWICE):
        target, loss = pair.split(":")
        run = args.out / f"{target}-{loss}loss-seed{seed}"
        if not args.table:
            code = finish(train.main, ["--target", target, "--loss", loss, "--seed", seed, "--out", run, *recipe])
            if args.ref and not code:
                code = finish(fid.main, ["--ckpt", run / "ema.safetensors", *scoring])
            if code:
                return code  # stopped by a signal, or by an error that has been told
        if (run / "log.csv").exists():
            rows.append({"predicts": target, "loss in": loss, "seed": seed} | scores(run))
    if not rows:
        raise BadInput(f"{args.out}: no runs there yet; leave --table out to train them")
    say(f"\n{args.cache.name}, {args.model}/{args.patch}, {args.steps} steps of {args.batch}, lr {args.lr:g}\n")
    say(markdown(rows, list(dict.fromkeys(name for row in rows for name in row))))


if __name__ == "__main__":
    sys.exit(main())
