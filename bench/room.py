"""When does the target matter? Where a token holds more numbers than the network has channels.

    python -m bench.room data/cifar10-64:1 data/cifar10-64:2
    python -m bench.room data/cifar10-64:1 data/cifar10-64:2 data/cifar10:8 --out assets/room.png

For each cache and patch size (unseen images: CACHE-test, beside it) and each width, x and v are
trained for 1,000 steps. Printed and drawn is how much larger v's error of the velocity is than x's,
on unseen images. Room, the axis, is channels for each number of a token, width / (patch² C), or the
bottleneck's where it is narrower. Lines are the same of the best linear prediction that passes so
many numbers a token (bench/spectrum.py), at training's times. What is done is not done again.
"""
import argparse
import itertools
import pathlib

import torch

from ablations.logbook import scores, train_row
from ablations.studies import RECIPE, Row
from bench.chart import picture, pyplot, save
from bench.spectrum import spectrum, squeezed, token_statistics
from lib.flags import Parser, number
from lib.run import program, say
from model import SIZES
from train import OBJECTIVE
from vae import LatentDataset

LINE = "{:<14}{:>6}{:>9}{:>7}{:>11}{:>8}{:>9}{:>9}{:>10}{:>9}"


def place(text):
    """An argparse type: CACHE:PATCH."""
    cache, _, patch = text.rpartition(":")
    if not cache or not patch.isdigit() or patch == "0":
        raise argparse.ArgumentTypeError(f"{text}: expected CACHE:PATCH, as data/cifar10-64:2")
    return pathlib.Path(cache), int(patch)


def theory(values, width, parts=32):
    """(error of x, of v) of the best linear prediction through `width` numbers a token, at times
    as training draws them."""
    normal = torch.special.ndtri((torch.arange(parts, dtype=torch.float64) + 0.5) / parts)
    times = torch.sigmoid(OBJECTIVE["P_mean"] + OBJECTIVE["P_std"] * normal)
    errors = [squeezed(values, float(t), width) for t in times]
    return [sum(row[target] for row in errors) / parts for target in "xv"]


def trained(args, cache, patch, width, bottleneck, target):
    """The error on unseen images of a network, which is trained where it is not yet."""
    model = f"room-{width}-{bottleneck}"
    SIZES[model] = dict(hidden_size=width, depth=6, num_heads=max(1, width // 32),
                        bottleneck=bottleneck)
    run = args.runs / f"{cache.name}-{patch}-{width}-{bottleneck}-{target}"
    if scores(run).get("step") != str(args.steps):
        recipe = RECIPE | dict(model=model, patch=patch, steps=args.steps, ema=0.99)
        recipe |= dict(latents=cache, val=cache.with_name(f"{cache.name}-test"))
        row = Row(run.name, f"--target {target} --compile")
        if code := train_row(argparse.Namespace(**recipe), [], row, run):
            raise SystemExit(code)
    return scores(run)["val"]


def draw(path, rows):
    figure, panel = pyplot().subplots(figsize=(8, 5))
    kinds = list(dict.fromkeys((row["cache"], row["patch"]) for row in rows))
    for kind, colour in zip(kinds, ("tab:blue", "tab:cyan", "tab:red", "tab:orange")):
        some = [row for row in rows if (row["cache"], row["patch"]) == kind]
        for name, look in (("networks", "o-"), ("theory", ":")):
            points = sorted((row["room"], 100 * row[name]) for row in some)
            label = f"{kind[0]}, patch {kind[1]}: {name}"
            panel.plot(*zip(*points), look, color=colour, label=label)
    panel.set(xscale="log", xlabel="room: the network's channels for each number of a token",
              ylabel="v's error above x's, %", title="dots: networks, dotted: linear theory")
    panel.set_yscale("symlog", linthresh=1)  # theory has 0 where all numbers pass
    panel.set_ylim(-0.1, 2 * max(100 * row["networks"] for row in rows))
    save(figure, path)


@program
def main(argv=None):
    parser = Parser("The gap between v and x against the room that a network has for a token.")
    add, path = parser.add_argument, pathlib.Path
    add("places", metavar="CACHE:PATCH", type=place, nargs="+", help="CACHE-test beside it")
    add("--widths", type=number(int, 32), nargs="+", default=[32, 64, 128, 256],
        help="channels, multiples of 32")
    add("--bottlenecks", type=number(int, 1), nargs="+", help="(default: the width)")
    add("--steps", type=number(int, 10), default=1000, help="of training")
    add("--runs", type=path, default="out/room", help="folder of the runs")
    add("--out", type=picture, help="the picture, NAME.png")
    args = parser.parse_args(argv)
    rows = []
    for cache, patch in args.places:
        values, _ = spectrum(token_statistics(LatentDataset(cache), patch, 10_000)[1])
        for width, chosen in itertools.product(args.widths, args.bottlenecks or [None]):
            bottleneck = chosen or width
            x, v = (trained(args, cache, patch, width, bottleneck, target) for target in "xv")
            narrowest = min(width, bottleneck)
            linear_x, linear_v = theory(values, narrowest)
            rows.append(dict(
                cache=cache.name, patch=patch, numbers=len(values), width=width,
                bottleneck=bottleneck, room=narrowest / len(values), x=x, v=v,
                networks=v / x - 1, theory=linear_v / linear_x - 1))
    say(LINE.format(*rows[0]))
    for row in rows:
        say(LINE.format(*(f"{v:.3f}" if isinstance(v, float) else v for v in row.values())))
    if args.out:
        draw(args.out, rows)


if __name__ == "__main__":
    raise SystemExit(main())
