"""REPA and TREAD together (repa.py, tread.py): alignment of the tokens that were kept.

    python -m ablations.repa_tread --teacher facebook/dinov2-base --latents CACHE --share 0.5
"""
import train
from ablations.repa import Repa
from ablations.tread import Tread
from lib.run import BadInput


class RepaTread(Repa, Tread):
    name = "repa-tread"
    flags = Repa.flags + Tread.flags
    network = Tread.network

    @staticmethod
    def add_flags(parser):
        Repa.add_flags(parser)
        Tread.add_flags(parser)

    def prepare(self, args, data, device):
        if args.conv:
            raise BadInput("--conv needs all tokens, and TREAD drops some: leave it out")
        super().prepare(args, data, device)
        depth = len(self.net.blocks)
        first, last = depth // 6, 2 * depth // 3
        self.is_routed = first < args.after <= last + 1  # whether the tapped block is

    def extra_inputs(self, step, positions):
        return Repa.extra_inputs(self, step, positions) | Tread.extra_inputs(self, step, positions)

    def forward(self, x, y, t, e, drop=None, images=None, kept=None):
        loss = Tread.forward(self, x, y, t, e, drop, kept)
        aligned = self.aligned(images, kept if self.is_routed else None)
        return loss - self.args.align_weight * aligned


if __name__ == "__main__":
    raise SystemExit(train.main(ablation=RepaTread))
