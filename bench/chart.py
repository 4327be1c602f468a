"""What the charts share: a colour for each target, and picture files that are written whole.

matplotlib draws them. It is no requirement of the project, and only this folder uses it: pip install matplotlib
"""
import argparse
import pathlib

from lib.checkpoint import read_checkpoint
from lib.run import BadInput, atomic

COLOURS = {"x": "tab:blue", "eps": "tab:red", "v": "tab:orange"}
MEANING = {"x": "x, the clean latent", "eps": "eps, the noise", "v": "v = x - e, the velocity"}


def pyplot():
    """matplotlib.pyplot, drawing to files alone."""
    try:
        import matplotlib
    except ImportError:
        raise BadInput("charts need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot
    return matplotlib.pyplot


def picture(text):
    """An argparse type: where a picture is to be written, NAME.png in a folder that exists."""
    path = pathlib.Path(text)
    if path.suffix.lower() != ".png" or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: expected NAME.png in a folder that exists")
    return path


def save(figure, path):
    """Write a figure of matplotlib as PNG."""
    figure.tight_layout()
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png", bbox_inches="tight")


def settings_of(run):
    """The settings of a run's folder, as its export has them; {} where there is none yet, or it is not ours."""
    path = pathlib.Path(run) / "ema.safetensors"
    return path.exists() and read_checkpoint(path)[1] or {}


def styles(targets, what="linestyle", kinds=("-", "--", ":", "-.")):
    """How runs are drawn: in the colour of their target, and in a kind of line or marker that tells those of one
    target apart."""
    return [{"color": COLOURS.get(target, "gray"), what: kinds[targets[:place].count(target) % len(kinds)]}
            for place, target in enumerate(targets)]
