"""Command-line flags whose errors are one line that says what was expected."""
import argparse
import math

from lib.run import BadInput


class Parser(argparse.ArgumentParser):
    """argparse without its page of usage at every slip; --help shows the defaults."""

    def __init__(self, description):
        style = argparse.ArgumentDefaultsHelpFormatter
        super().__init__(description=description, formatter_class=style, allow_abbrev=False)

    def error(self, message):
        raise BadInput(f"{message} (see --help)")


def number(kind, low, high=math.inf):
    """An argparse type: an int or a finite float within [low, high]."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high or math.isinf(value):
            top = f", {high} or less" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text}: expected {low} or more{top}")
        return value
    parse.__name__ = kind.__name__  # argparse names it when `kind` raises a ValueError
    return parse


def interval(text):
    """An argparse type: LOW,HIGH, two times t."""
    low, high = (float(part) for part in text.split(","))
    if not 0 <= low <= high <= 1:
        raise argparse.ArgumentTypeError(f"{text}: expected LOW,HIGH with 0 <= LOW <= HIGH <= 1")
    return low, high
