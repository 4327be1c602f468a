"""Command-line flags whose errors are one line that says what was expected."""
import argparse
import math
import pathlib
import sys

from lib.run import BadInput


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Adds each default to its help, unless there is none or the text names it."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False or "(default" in action.help:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse without its page of usage at every slip; --help shows the defaults."""

    def __init__(self, description, **options):
        super().__init__(
            description=description, formatter_class=Help, allow_abbrev=False, **options)

    def error(self, message):
        raise BadInput(f"{message[:300]} (see --help)")


def number(kind, low, high=math.inf):
    """An argparse type: an int or a finite float within [low, high]."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high or math.isinf(value):
            top = f", {high} or less" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text[:40]}: expected {low} or more{top}")
        return value
    parse.__name__ = kind.__name__  # argparse names it when `kind` raises a ValueError
    return parse


def interval(text):
    """An argparse type: LOW,HIGH, two times t."""
    low, high = (float(part) for part in text.split(","))
    if not 0 <= low <= high <= 1:
        raise argparse.ArgumentTypeError(f"{text}: expected LOW,HIGH, 0 <= LOW <= HIGH <= 1")
    return low, high


def sampling_flags(parser, defaults, methods, targets):
    """The flags of everything that draws from a checkpoint."""
    group = parser.add_argument_group("how samples are drawn")
    add = group.add_argument
    add("--steps", type=number(int, 1, 100_000), default=defaults.steps, help="ODE steps")
    add("--method", choices=methods, default=defaults.method, help="ODE solver")
    add("--shift", type=number(float, 0.01, 100), default=defaults.shift,
        help="of the grid of times: 1 is even, less is denser towards the data")
    add("--contrast", type=number(float, -10, 1), default=defaults.contrast,
        help="draw each velocity towards the mean latent by this share")
    add("--t-eps", type=number(float, 0, 1), help="floor of 1-t or t (default: the checkpoint's)")
    add("--seed", type=number(int, 0), default=defaults.seed,
        help="image i depends on seed and i alone")
    add("--classes", nargs="+", metavar="CLASS",
        help="names or numbers, taking turns (default: all)")
    add("--precision", choices=("auto", "bf16", "fp32"), default=defaults.precision,
        help="auto: bf16 on CUDA")
    add("--batch", type=number(int, 1, 10**5), default=64, help="images at a time and device")
    add("--vae", help="flux2, taef2, pixels, a Hugging Face id or a folder (default: the latents')")
    add("--target", choices=targets, help="for a file that does not say what it predicts")
    add("--input-size", type=number(int, 1, 512),
        help="latent height, for a file that does not say it")


def training_flags(parser, targets, sizes):
    """The flags of train.py; where no default stands here, the preset has it."""
    path = pathlib.Path
    add = parser.add_argument_group("what is trained").add_argument
    add("--demo", action="store_true",
        help="small digits in minutes on a CPU; any other flag beside it wins over this preset")
    add("--target", choices=targets, default="x", help="what the network predicts")
    add("--loss", choices=targets, default="v", help="the space of the squared error")
    add("--model", choices=sizes, help="size")
    add("--patch", type=number(int, 1), help="patch size, in latent pixels")
    add("--init", type=path, help="start from these weights (fine-tuning)")

    add = parser.add_argument_group("data").add_argument
    add("--latents", type=path, help="cache written by vae.py")
    add("--val", type=path, help="cache of images that training never sees")
    add("--vae", help="codec for pictures (default: the one that made the cache)")
    add("--out", type=path, help="the run's folder (default: out/PRESET-MODEL+PATCH-TARGET)")

    add = parser.add_argument_group("recipe").add_argument
    add("--steps", type=number(int, 1, 10**9), help="optimizer steps in all")
    add("--batch", type=number(int, 1, 10**6), help="images a step, over all GPUs")
    add("--micro", type=number(int, 1),
        help="images a forward pass and GPU, at most (default: 256 on CUDA, else 64)")
    add("--lr", type=number(float, 0),
        help="learning rate (default: 5e-5 * batch/256, except --demo)")
    add("--warmup", dest="warmup_epochs", type=number(float, 0), metavar="EPOCHS",
        help="linear warm-up")
    add("--decay", type=number(float, 0, 1),
        help="share of the run, its last, in which the learning rate falls to 0")
    add("--ema", type=number(float, 0, 1), nargs="+",
        help="decay of one or two averages of the weights")
    add("--precision", choices=("auto", "bf16", "fp32"), default="auto",
        help="auto: bf16 on CUDA")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0,
        help="of weights, data order, times, noise")
    add("--compile", action=argparse.BooleanOptionalAction,
        help="torch.compile (default: on CUDA)")

    add = parser.add_argument_group("once in a while, in steps").add_argument
    add("--log-every", type=number(int, 1), help="a line, and a row of log.csv")
    add("--save-every", type=number(int, 1), help="a checkpoint")
    add("--sample-every", type=number(int, 0),
        help="a grid of pictures, and the loss by time; 0 = never")
    add("--keep-every", type=number(int, 0), default=0,
        help="an export of the averages that is kept; 0 = never")
    add("--eval-every", type=number(int, 0), default=0, help="FID against --ref; 0 = never")
    add("--ref", type=path, help="reference statistics, npz")
    add("--eval-n", type=number(int, 2), default=10_000, help="images scored each time")
    add("--inception", type=path, help="the FID network (default: torch's cache, or download)")


def training_args(argv, presets, targets, sizes, ablation=None):
    """What train.py was given, and an ablation."""
    preset = "demo" if "--demo" in (sys.argv if argv is None else argv) else "imagenet"
    parser = Parser("Train a JLT.")
    training_flags(parser, targets, sizes)
    if ablation:
        title = f"the technique {ablation.name} (--with NAME joins another)"
        ablation.flags(parser.add_argument_group(title).add_argument)
    parser.set_defaults(**presets[preset])
    args = parser.parse_args(argv)
    if args.lr is None:
        args.lr = 5e-5 * args.batch / 256
    if len(args.ema) > 2:
        raise BadInput("--ema takes at most two decays")
    if args.eval_every and not args.ref:
        raise BadInput("--eval-every needs --ref FILE (fid.py --images FOLDER --save-ref FILE)")
    if args.out is None:
        loss = "" if args.loss == "v" else f"-{args.loss}loss"
        name = f"-{ablation.name}" if ablation else ""
        args.out = pathlib.Path(f"out/{preset}-{args.model}{args.patch}-{args.target}{loss}{name}")
    return args
