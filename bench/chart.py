"""What the charts share. matplotlib draws them: pip install matplotlib"""
import argparse
import pathlib

from lib.checkpoint import read_checkpoint
from lib.files import atomic
from lib.run import BadInput, say

COLOURS = {"x": "tab:blue", "eps": "tab:red", "v": "tab:orange"}
OTHER = "tab:green"  # of a target that is new here


def styles(targets, what="linestyle", kinds=("-", "--", ":", "-.")):
    """How runs are drawn: in their target's colour, in another kind of line where it is taken."""
    looks = []
    for place, target in enumerate(targets):
        kind = kinds[targets[:place].count(target) % len(kinds)]
        looks.append({"color": COLOURS.get(target, OTHER), what: kind})
    return looks


def settings_of(run):
    """The settings of a run's folder, as its export has them; {} where there is none yet."""
    path = pathlib.Path(run) / "ema.safetensors"
    return read_checkpoint(path)[1] if path.exists() else {}


def pyplot():
    """matplotlib.pyplot, drawing to files alone."""
    try:
        import matplotlib.pyplot
    except ImportError:
        raise BadInput("charts need matplotlib: pip install matplotlib") from None
    matplotlib.pyplot.switch_backend("Agg")
    return matplotlib.pyplot


def picture(text):
    """An argparse type: where a picture is to be written, NAME.png in a folder that exists."""
    path = pathlib.Path(text)
    if path.suffix.lower() != ".png" or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: expected NAME.png in a folder that exists")
    return path


def save(figure, path):
    """Give all panels a grid and a legend, and write the figure."""
    for panel in figure.axes:
        panel.grid(alpha=0.3, which="both")
        panel.legend(fontsize=8)
    figure.tight_layout()
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    say(f"-> {path}")
