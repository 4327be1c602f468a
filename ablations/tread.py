"""Token routing, TREAD (arXiv 2501.04765): in training, half of the tokens skip the middle blocks.

    python -m ablations.tread --share 0.5 [flags of train.py]

Before block depth//6 a random share of each image's tokens is set aside. The others go on, with the
rotary rows of their own positions, and after block 2*depth//3 all tokens are together again (with
12 blocks, routing spans blocks 2 to 8). There are no new parameters, and a step costs less.
Sampling routes nothing.
"""
import numpy as np
import torch

import train
from ablations import Ablation
from lib.flags import number
from model import JLT


def keep(seed, step, positions, tokens, share) -> torch.Tensor:
    """Which of an image's tokens go on: (B, tokens - round(share * tokens)) int64, sorted, a
    function of the arguments alone. positions: B positions of the step's global batch."""
    count = tokens - round(share * tokens)
    rows = []
    for position in positions:  # 3: train.py uses the random streams 0, 1 and 2
        order = np.random.default_rng([seed, 3, step, int(position)]).permutation(tokens)
        rows.append(np.sort(order[:count]))
    return torch.from_numpy(np.stack(rows))


class RoutedJLT(JLT):
    """A JLT whose middle blocks process only the tokens `kept` (B, K), where these are given."""

    def forward(self, z, t, y, kept=None):
        self.kept = kept
        return super().forward(z, t, y)

    def run_blocks(self, x, c, cos, sin):
        if self.kept is None:
            return super().run_blocks(x, c, cos, sin)
        first, last = len(self.blocks) // 6, 2 * len(self.blocks) // 3
        for block in self.blocks[:first]:
            x = block(x, c, cos, sin)                                   # (B, N, dim)
        kept = self.kept[..., None].expand(-1, -1, x.shape[-1])         # (B, K, dim)
        routed = x.gather(1, kept)                                      # (B, K, dim)
        for block in self.blocks[first:last + 1]:
            routed = block(routed, c, cos[self.kept], sin[self.kept])   # rotary: (B, K, 1, d)
        x = x.to(routed.dtype).scatter(1, kept, routed)                 # (B, N, dim)
        for block in self.blocks[last + 1:]:
            x = block(x, c, cos, sin)                                   # (B, N, dim)
        return x


class Tread(Ablation):
    name = "tread"
    flags = ("share",)
    network = RoutedJLT

    @staticmethod
    def add_flags(parser):
        parser.add_argument_group("TREAD").add_argument(
            "--share", type=number(float, 0, 0.95), default=0.5,
            help="share of the tokens that skip the middle blocks")

    def extra_inputs(self, step, positions):
        tokens = (self.net.input_size // self.net.patch_size) ** 2
        return {"kept": keep(self.args.seed, step, positions, tokens, self.args.share)}

    def forward(self, x, y, t, e, drop=None, kept=None):
        z, y = self.noised(x, t, e), self.with_dropped(y, drop)
        return self.loss(self.net(z, t, y, kept).float(), x, t, e)


if __name__ == "__main__":
    raise SystemExit(train.main(ablation=Tread))
