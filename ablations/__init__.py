"""Training techniques that others have added to flow matching: one file each, off by default.

    python -m ablations.contrastive --demo                          its flags and those of train.py
    torchrun --nproc_per_node=8 -m ablations.tread --share 0.5

A technique is a subclass of `Denoiser` that train.py trains instead of the plain one. It keeps the
promises of a run: whatever it draws is a function of (seed, step, position in the global batch),
and what it trains besides the network resumes exactly. Sampling knows nothing of it. Combinations
are subclasses of two techniques, in files of their own.
"""
import torch

import train
from model import JLT, Denoiser


class Ablation(Denoiser):
    """What train.py asks of a technique; here, all of it is that of a plain run."""

    name = "plain"
    flags: tuple[str, ...] = ()        # the arguments that make it this run, stored in its settings
    network = JLT                      # the class of the network
    logged: dict[str, torch.Tensor] = {}  # scalars of the last forward, for log.csv

    @staticmethod
    def add_flags(parser):
        """Add the technique's flags to train.py's parser."""

    def prepare(self, args, data, device):
        """Called once, before the optimizer is made. Parameters that self has outside of `.net` by
        then are trained and stored with the run, but not in the EMA. Raises BadInput."""
        self.args, self.data, self.device = args, data, device

    def make_optimizer(self, args):
        return train.make_optimizer(self.parameters(), args.lr)

    def extra_inputs(self, step, positions) -> dict[str, torch.Tensor]:
        """Further arguments of `forward` for these positions (int64) of a step's global batch.
        Called by threads, ahead of time."""
        return {}
