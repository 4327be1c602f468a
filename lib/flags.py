"""Command-line flags whose errors are one line that says what was expected."""
import argparse
import math
import os
import pathlib
import shlex

from lib.run import BadInput


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Adds each default to its help text, unless there is none or the text names it already."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False or "(default" in action.help:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse without a page of usage at every slip; --help shows the defaults."""

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
        raise argparse.ArgumentTypeError(f"{text}: expected LOW,HIGH, 0 <= LOW <= HIGH <= 1")
    return low, high


def path(text):
    """An argparse type: a path, with ~ expanded also where the shell leaves it (--out=~/runs)."""
    if not text:  # usually a variable of the shell that is not set
        raise argparse.ArgumentTypeError("expected a path, not an empty text")
    expanded = os.path.expanduser(text)  # before pathlib, which would take ./~/x for ~/x
    if expanded.startswith("~"):  # ~NAME, where there is no such user
        raise argparse.ArgumentTypeError(f"{text}: there is no such home folder")
    return pathlib.Path(expanded)


def quoted(name):
    """A path as it has to be typed, for messages that show a command."""
    return shlex.quote(str(name))
