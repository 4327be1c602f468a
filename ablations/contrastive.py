"""Contrastive flow matching (arXiv 2506.05350): away from what another image would have moved by.

    python -m ablations.contrastive --weight 0.05 [flags of train.py]
    python sample.py --ckpt FILE --contrast 0.05        takes the effect out again

The loss becomes |pred - target|² - weight * |pred - other target|². The other image is the next
place of the global batch, with its own noise. Its target is what its velocity v' would mean at our
z and t: for x, it is z + (1-t) v', not x'.

What it does can be written down. With u the velocity and m = E[v'] = the mean latent, the best
prediction is (E[u | z] - weight m) / (1 - weight), while plain flow matching learns E[u | z]: the
same velocity, drawn out from the mean. Sampling with v <- (1-C) v + C m undoes it at C = weight; a
*plain* network at C = -weight / (1-weight) is the control that any gain has to be compared with.
"""
import torch

from ablations import Ablation, main
from lib.flags import number
from train import read_micro, step_noise


class Contrastive(Ablation):
    """Contrastive flow matching."""
    name = "contrastive"
    options = {"weight": dict(type=number(float, 0, 0.99), default=0.05,
                              help="of the error against another image")}

    def more(self, step, places):
        run, args = self.run, self.run.args
        last = (places[-1:] + 1) % args.batch  # the other of the last; all else is at hand
        x_next = read_micro(run.data, args.seed, step, args.batch, last)[0]
        e_next = step_noise(args.seed, step, int(last[0]), 1, run.data.shape, run.device)
        return super().more(step, places) | {"x_next": x_next, "e_next": e_next}

    def forward(self, x, y, t, e, drop=None, x_next=None, e_next=None, **more):
        x_other = torch.cat([x[1:], x_next.float()])                    # (B, C, H, W)
        e_other = torch.cat([e[1:], e_next])                            # (B, C, H, W)
        self.v_other = x_other - e_other
        return super().forward(x, y, t, e, drop, **more)

    def loss(self, pred, x, t, e):
        t4 = t[:, None, None, None]                                     # (B, 1, 1, 1)
        z = t4 * x + (1 - t4) * e
        # The pair of image and noise that the velocity v' would mean at z and t.
        x_away, e_away = z + (1 - t4) * self.v_other, z - t4 * self.v_other
        away = super().loss(pred, x_away, t, e_away)
        return super().loss(pred, x, t, e) - self.contrastive_weight * away


if __name__ == "__main__":
    raise SystemExit(main(Contrastive))
