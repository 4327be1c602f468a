"""Command-line flags whose errors are one line that says what was expected."""
import argparse
import math

from lib.run import BadInput


class Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):  # adds the default, unless there is none or the text names it
        plain = action.default in (None, False) or "(default" in (action.help or "")
        return action.help if plain else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse without its page of usage at every slip; --help shows the defaults."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=Help, allow_abbrev=False)

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
        raise argparse.ArgumentTypeError(f"{text}: expected LOW,HIGH with 0 <= LOW <= HIGH <= 1")
    return low, high


def sampling_flags(parser, targets):
    """The flags of everything that draws from a checkpoint."""
    group = parser.add_argument_group("how samples are drawn")
    group.add_argument("--steps", type=number(int, 1, 100_000), default=50, help="ODE steps")
    group.add_argument("--method", choices=("heun", "euler"), default="heun", help="ODE solver")
    group.add_argument("--t-eps", type=number(float, 0, 1), help="floor of 1-t or t (default: the checkpoint's)")
    group.add_argument("--seed", type=number(int, 0), default=0, help="image i depends on seed and i alone")
    group.add_argument("--classes", nargs="+", metavar="CLASS", help="names or numbers, taking turns (default: all)")
    group.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="auto: bf16 on CUDA")
    group.add_argument("--batch", type=number(int, 1, 10**5), default=64, help="images at a time and device")
    group.add_argument("--vae", help="flux2, taef2, pixels, a Hugging Face id or a folder (default: the latents')")
    group.add_argument("--target", choices=targets, help="for a file that does not say what it predicts")
    group.add_argument("--input-size", type=number(int, 1, 512), help="latent height, for a file that does not say it")
