"""Contrastive flow matching (arXiv 2506.05350): move the prediction away from another's target.

    python -m ablations.contrastive --negative-weight 0.05 [flags of train.py]

The loss becomes |pred - target|² - weight * |pred - other target|². The other image is the one at
the next position of the global batch, with its own noise. Its target is what its velocity v' would
mean at our z and t: for x that is z + (1-t) v', not x'.

Its effect has a closed form. With m = E[v'], the mean latent, the best prediction of the velocity
is (E[v | z] - weight m) / (1 - weight), where plain flow matching learns E[v | z]. Normalised
latents have m near 0, so weight 0.05 is an overshoot of the velocity by 5%, which a sampler could
apply to a plain network. docs/techniques.md compares the two.
"""
import numpy as np
import torch

import train
from ablations import Ablation
from lib.flags import number
from train import read_batch, step_noise


def contrastive_loss(denoiser, x, y, t, e, x_other, e_other, weight, drop=None):
    """The contrastive loss, a scalar, of a Denoiser. x, e, x_other, e_other: (B, C, H, W);
    y, drop: (B,); t: (B,). Row i is pushed away from the target of the pair x_other[i], e_other[i].
    """
    z = denoiser.noised(x, t, e)
    pred = denoiser.net(z, t, denoiser.with_dropped(y, drop)).float()
    # The image and the noise that the other velocity would mean at our z and t.
    t4, v_other = t[:, None, None, None], x_other - e_other
    negative = denoiser.loss(pred, z + (1 - t4) * v_other, t, z - t4 * v_other)
    return denoiser.loss(pred, x, t, e) - weight * negative


class Contrastive(Ablation):
    name = "contrastive"
    flags = ("negative_weight",)

    @staticmethod
    def add_flags(parser):
        parser.add_argument_group("contrastive flow matching").add_argument(
            "--negative-weight", type=number(float, 0, 0.99), default=0.05,
            help="weight of the error against another image's target")

    def extra_inputs(self, step, positions):
        """The image and noise that follow the last position; the others follow within the batch."""
        args = self.args
        after = int(positions[-1] + 1) % args.batch
        x_next = read_batch(self.data, args.seed, step, args.batch, np.array([after]))[0]
        e_next = step_noise(args.seed, step, after, 1, self.data.shape, self.device)
        return {"x_next": x_next, "e_next": e_next}

    def forward(self, x, y, t, e, drop=None, x_next=None, e_next=None):
        x_other = torch.cat([x[1:], x_next.float()])                    # (B, C, H, W)
        e_other = torch.cat([e[1:], e_next])                            # (B, C, H, W)
        return contrastive_loss(self, x, y, t, e, x_other, e_other, self.args.negative_weight, drop)


if __name__ == "__main__":
    raise SystemExit(train.main(ablation=Contrastive))
