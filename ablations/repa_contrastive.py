"""REPA and contrastive flow matching together (repa.py, contrastive.py).

    python -m ablations.repa_contrastive --teacher facebook/dinov2-base --latents CACHE
"""
import train
from ablations.contrastive import Contrastive
from ablations.repa import Repa


class RepaContrastive(Repa, Contrastive):
    name = "repa-contrastive"
    flags = Repa.flags + Contrastive.flags

    @staticmethod
    def add_flags(parser):
        Repa.add_flags(parser)
        Contrastive.add_flags(parser)

    def extra_inputs(self, step, positions):
        return (Repa.extra_inputs(self, step, positions)
                | Contrastive.extra_inputs(self, step, positions))

    def forward(self, x, y, t, e, drop=None, images=None, x_next=None, e_next=None):
        loss = Contrastive.forward(self, x, y, t, e, drop, x_next, e_next)
        return loss - self.args.align_weight * self.aligned(images)


if __name__ == "__main__":
    raise SystemExit(train.main(ablation=RepaContrastive))
