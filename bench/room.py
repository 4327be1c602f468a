"""When does the target matter? Where a token holds more numbers than the network has channels.

    python -m bench.room data/cifar10-64:1 data/cifar10-64:2
    python -m bench.room data/cifar10-64:1 data/cifar10-64:2 data/cifar10:8 --out assets/room.png

For each cache and patch size and for each width, a network is trained for 1,000 steps to predict x
and another to predict v. Printed and drawn is how much larger v's velocity error is than x's, on
unseen images (the cache CACHE-test). The horizontal axis, room, is the number of channels for each
number in a token: width / (patch² C), or the bottleneck's channels where there are fewer. The
dotted lines are the same ratio for the best linear prediction through that many numbers, averaged
over training's times (bench/spectrum.py).

The same command continues where it was interrupted.
"""
import argparse
import itertools

import torch

import train
from bench.figures import image_path, pyplot, save_figure
from bench.spectrum import TIMES, linear_error, spectrum, token_statistics
from lib.flags import Parser, number, path
from lib.log import read_table
from lib.run import log, program
from model import SIZES
from vae import LatentDataset

RECIPE = ("--batch 128 --lr 1e-3 --warmup 0.25 --decay 0.3 --ema 0.99 --compile --log-every 100 "
          "--save-every 500")
LINE = "{:<14}{:>6}{:>9}{:>7}{:>11}{:>8}{:>9}{:>9}{:>10}{:>9}"


def cache_and_patch(text):
    """An argparse type: CACHE:PATCH."""
    cache, _, patch = text.rpartition(":")
    if not cache or not patch.isdigit() or patch == "0":
        raise argparse.ArgumentTypeError(f"{text}: expected CACHE:PATCH, as data/cifar10-64:2")
    return path(cache), int(patch)


def trained_error(cache, patch, width, bottleneck, target, steps):
    """The velocity error on unseen images of a network, which is trained unless it is there."""
    SIZES["room"] = dict(hidden_size=width, depth=6, num_heads=width // 32, bottleneck=bottleneck)
    run = f"out/room/{cache.name}-{patch}-{width}-{bottleneck}-{target}-{steps}"
    torch.compiler.reset()  # otherwise the graphs of all runs count against one limit
    code = train.main([
        *RECIPE.split(), "--model", "room", "--patch", str(patch), "--target", target,
        "--latents", str(cache), "--val", str(cache.with_name(f"{cache.name}-test")),
        "--steps", str(steps), "--sample-every", str(steps), "--out", run])
    if code:  # interrupted, or refused with a message
        raise SystemExit(code)
    return float(read_table(f"{run}/log.csv")[1][-1]["val"])


def draw(file, rows):
    figure, panel = pyplot().subplots(figsize=(8, 5))
    kinds = dict.fromkeys((row["cache"], row["patch"]) for row in rows)
    for (cache, patch), color in zip(kinds, ("tab:blue", "tab:cyan", "tab:red", "tab:orange")):
        for name, style in (("networks", "o-"), ("theory", ":")):
            points = sorted((row["room"], 100 * row[name]) for row in rows
                            if (row["cache"], row["patch"]) == (cache, patch))
            panel.plot(*zip(*points), style, color=color, label=f"{cache}, patch {patch}: {name}")
    panel.set(xscale="log", xlabel="room: the network's channels for each number in a token",
              ylabel="v's error above x's, %", title="dots: networks, dotted lines: theory")
    panel.set_yscale("symlog", linthresh=1)  # the theory is 0 where everything fits
    panel.set_ylim(-0.1, 2 * panel.get_ylim()[1])
    save_figure(figure, file)


@program
def main(argv=None):
    parser = Parser("The gap between v and x against the room that a network has for a token.")
    add = parser.add_argument
    add("caches", metavar="CACHE:PATCH", type=cache_and_patch, nargs="+",
        help="cache and patch size; CACHE-test beside it holds unseen images")
    add("--widths", type=number(int, 32), nargs="+", default=[32, 64, 128, 256],
        help="channels, multiples of 32")
    add("--bottlenecks", type=number(int, 1), nargs="+", help="(default: the width)")
    add("--steps", type=number(int, 10), default=1000, help="of training")
    add("--out", type=image_path, help="the figure, NAME.png")
    args = parser.parse_args(argv)
    rows = []
    for cache, patch in args.caches:
        _, covariance = token_statistics(LatentDataset(cache), patch)
        eigenvalues, _ = spectrum(covariance)
        for width, chosen in itertools.product(args.widths, args.bottlenecks or [None]):
            bottleneck = chosen or width
            x, v = (trained_error(cache, patch, width, bottleneck, target, args.steps)
                    for target in "xv")
            narrowest = min(width, bottleneck)
            linear_x, linear_v = (
                sum(linear_error(target, eigenvalues, narrowest, TIMES)) for target in "xv")
            rows.append(dict(
                cache=cache.name, patch=patch, numbers=len(eigenvalues), width=width,
                bottleneck=bottleneck, room=narrowest / len(eigenvalues), x=x, v=v,
                networks=v / x - 1, theory=linear_v / linear_x - 1))
    log(LINE.format(*rows[0]))
    for row in rows:
        log(LINE.format(*(f"{value:.3f}" if isinstance(value, float) else value
                          for value in row.values())))
    if args.out:
        draw(args.out, rows)


if __name__ == "__main__":
    raise SystemExit(main())
