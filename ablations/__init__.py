"""Training techniques that others have added to flow matching: a file each, off by default.

    python -m ablations.contrastive --demo                        its flags, then those of train.py
    torchrun --nproc_per_node=8 -m ablations.tread --share 0.5
    python -m ablations.repa --teacher FILE --with contrastive --contrastive-weight 0.1    two

A technique is a subclass of `Denoiser` that changes the loss, and whose methods call those of
super(), so that two of them can be joined. It keeps the promises of a run: whatever it draws is a
function of (seed, step, place in the global batch), and what it trains beside the network continues
exactly. Averages, pictures and scores know nothing of it.
"""
import importlib

import train
from lib.flags import Parser
from lib.run import program
from model import Denoiser

NAMES = ("contrastive", "repa", "tread")


class Ablation(Denoiser):
    """What every technique has, and what it may say more about: its `name`, which is its module's,
    its `options` {flag: what argparse wants to know}, and the methods below. An option `weight` of
    the technique `repa` is self.repa_weight."""
    name, options = "", {}

    @classmethod
    def techniques(cls):
        """The techniques that are joined in this class, the outermost first."""
        return [base for base in cls.__mro__ if vars(base).get("options")]

    @classmethod
    def flags(cls, add):
        """Add the options to argparse: --weight, but for a joined one --contrastive-weight."""
        for i, one in enumerate(cls.techniques()):
            for option, details in one.options.items():
                flag = f"--{one.name}-{option}" if i else f"--{option}"
                if "action" not in details:
                    details = details | {"metavar": option.upper()}
                add(flag, dest=f"{one.name}_{option}", **details)

    @classmethod
    def constants(cls, args):
        """{technique: {option: value}}: with another value it is another run."""
        return {one.name: {option: getattr(args, f"{one.name}_{option}") for option in one.options}
                for one in cls.techniques()}

    def prepare(self, run):
        """Called once, with train.py's Run, before the optimizer is made. The parameters that self
        has by then, those of `.net` and others, are trained and stored. Raises BadInput."""
        self.run = run
        for name, options in run.settings["ablation"].items():
            for option, value in options.items():
                setattr(self, f"{name}_{option}", value)

    def more(self, step, places):
        """What forward needs besides for these places (int64) of a step's global batch, as
        {argument: tensor}. Called by threads, ahead of time."""
        return {}

    def freezes(self, step):
        """Whether it freezes, from this step on, what it has trained beside the network."""
        return False


def load(name):
    """The technique of the module ablations.NAME."""
    return getattr(importlib.import_module(f"ablations.{name}"), name.capitalize())


def join(*techniques):
    """One class of several, the first outermost."""
    name = "-".join(one.name for one in techniques)
    return type(name, techniques, {"name": name})


@program
def main(technique, argv=None):
    """Train with a technique: the program of each file here."""
    parser = Parser("", add_help=False)  # train.py's parser has the rest
    others = [name for name in NAMES if name != technique.name]
    parser.add_argument("--with", nargs="+", choices=others, default=[], dest="others")
    given, rest = parser.parse_known_args(argv)
    joined = join(technique, *map(load, given.others)) if given.others else technique
    return train.main(rest, ablation=joined)
