"""Token routing, TREAD (arXiv 2501.04765): in training, half of the tokens skip the middle blocks.

    python -m ablations.tread --share 0.5 [flags of train.py]

Before block depth//6 a random share of each image's tokens is set aside; the others go on, with the
rotary rows of their own places; after block 2*depth//3 (12 blocks: 2 to 8, both inclusive) all are
together again. There are no new parameters, and a step costs less. Sampling routes nothing.
"""
import numpy as np
import torch

from ablations import Ablation, main
from lib.flags import number


def keep(seed, step, places, tokens, share) -> torch.Tensor:
    """Which tokens are kept: (B, tokens - round(share * tokens)) int64, sorted, a function of the
    arguments alone. places: B places of the step's global batch."""
    count = tokens - round(share * tokens)
    rows = []
    for place in places:  # 3: the streams 0, 1 and 2 are train.py's
        order = np.random.default_rng([seed, 3, step, int(place)]).permutation(tokens)
        rows.append(np.sort(order[:count]))
    return torch.from_numpy(np.stack(rows))


class Tread(Ablation):
    """Token routing, TREAD."""
    name = "tread"
    options = {"share": dict(type=number(float, 0, 0.95), default=0.5,
                             help="of the tokens that skip the middle blocks")}

    def prepare(self, run):
        super().prepare(run)
        self.route(self.net)

    def route(self, net):
        """Hook the routing into a network. It is at work while self.kept is set."""
        self.kept = None  # (B, kept) indices of tokens
        first, last = len(net.blocks) // 6, 2 * len(net.blocks) // 3
        for i in range(first, last + 1):
            net.blocks[i].register_forward_pre_hook(self.before)
        net.blocks[first].register_forward_pre_hook(self.set_aside)
        net.blocks[last].register_forward_hook(self.bring_together)

    def set_aside(self, block, inputs):
        """Before the first of the middle blocks: only the kept tokens go on."""
        if self.kept is None:
            return None
        x, *rest = inputs                                               # (B, N, dim)
        self.all_tokens = x
        return gather(x, self.kept), *rest                              # (B, kept, dim)

    def before(self, block, inputs):
        """Before each middle block: the rotary rows of the kept tokens."""
        if self.kept is None:
            return None
        x, c, cos, sin = inputs                                         # cos, sin: (N, 1, d)
        return x, c, cos[self.kept], sin[self.kept]                     # (B, kept, 1, d)

    def bring_together(self, block, inputs, x):
        """After the last: the kept tokens return to their places among those set aside."""
        if self.kept is None:
            return None
        index = self.kept[..., None].expand_as(x)                       # (B, kept, dim)
        return self.all_tokens.to(x.dtype).scatter(1, index, x)         # (B, N, dim)

    def more(self, step, places):
        args, net = self.run.args, self.net
        tokens = (net.input_size // net.patch_size) ** 2
        kept = keep(args.seed, step, places, tokens, self.tread_share)
        return super().more(step, places) | {"kept": kept}

    def forward(self, x, y, t, e, drop=None, kept=None, **more):
        self.kept = kept
        loss = super().forward(x, y, t, e, drop, **more)
        self.kept, self.all_tokens = None, None
        return loss


def gather(tokens, kept):
    """The tokens (B, N, D) with these indices (B, kept), in their order: (B, kept, D)."""
    return tokens.gather(1, kept[..., None].expand(-1, -1, tokens.shape[-1]))


if __name__ == "__main__":
    raise SystemExit(main(Tread))
