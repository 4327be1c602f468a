"""What each training technique costs: steps of the plain run and of each technique, in turns.

    python -m bench.cost data/cifar10-64-kept --teacher bench.efficientnet:load --batch 128

Prints the median time of a step and its share of the plain one's. Of REPA's, most is the teacher.
"""
import pathlib
import statistics
import sys
import tempfile
import time

import torch

from ablations import join, load
from lib.flags import Parser, number, training_args
from lib.run import program, say
from model import SIZES, TARGETS
from train import PRESETS, Run

WAYS = {"plain": (), "contrastive": ("contrastive",), "tread": ("tread",), "repa": ("repa",),
        "repa and tread": ("repa", "tread")}


def opened(args, others, names, folder):
    """A Run, ready to step."""
    technique = join(*map(load, names)) if names else None
    words = ["--latents", args.cache, "--model", args.model, "--patch", args.patch, "--batch",
             args.batch, "--out", folder, "--sample-every", 0, *others]
    if "repa" in names:
        words += ["--teacher", args.teacher, "--hidden", args.hidden]
    given = training_args(list(map(str, words)), PRESETS, TARGETS, SIZES, technique)
    run = Run(given, technique)
    run.open_data()
    run.build()
    run.resume()
    run.start()
    return run


def step_time(run):
    """Seconds of one step, data at hand."""
    start = time.perf_counter()
    run.train_step()
    if run.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@program
def main(argv=None):
    parser = Parser("Time a step of each technique against a plain one.")
    add = parser.add_argument
    add("cache", type=pathlib.Path, help="made by vae.py --keep-images")
    add("--teacher", help="of REPA; without it that is left out")
    add("--hidden", type=number(int, 1), default=2048, help="width of REPA's projector")
    add("--model", choices=SIZES, default="T", help="size")
    add("--patch", type=number(int, 1), default=1, help="as in train.py")
    add("--batch", type=number(int, 1), default=128, help="images a step")
    add("--turns", type=number(int, 2), default=15, help="steps of each that are timed")
    args, others = parser.parse_known_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: opened(args, others, names, pathlib.Path(folder, name))
                for name, names in WAYS.items() if args.teacher or "repa" not in names}
        times = {name: [] for name in runs}
        for _ in range(args.turns + 2):  # the first two warm up
            for name, run in runs.items():
                times[name].append(step_time(run))
        medians = {name: statistics.median(seconds[2:]) for name, seconds in times.items()}
        for name, seconds in medians.items():
            say(f"{name:<16}{1000 * seconds:8.1f} ms a step, {seconds / medians['plain']:.3f} of "
                "the plain one's")
        for run in runs.values():
            run.batches.close()
            run.lock.close()


if __name__ == "__main__":
    sys.exit(main())
