"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): orthogonal steps for the matrices.

    python -m ablations.muon --muon-lr 1e-3 [flags of train.py]

AdamW scales every number of a gradient by itself. Muon treats a matrix as a whole: it averages the
gradient and replaces the singular values of the average by numbers near 1, so that directions with
small gradients are learned as fast as those with large ones. Only the matrices of the blocks are
trained this way. The embeddings, the final layer, norms and biases stay with AdamW.

An orthogonal m×n matrix has entries of root mean square 1/sqrt(max(m, n)). Steps are scaled to a
root mean square of 0.2, about that of AdamW's (arXiv 2502.16982), so that one learning rate can
serve both.
"""
import torch

import train
from ablations import Ablation
from lib.flags import number

MOMENTUM = 0.95


def orthogonalize(matrices) -> torch.Tensor:
    """U V^T, approximately, for each U S V^T of a stack (L, m, n), in its dtype.

    Five steps of x <- a x + b (x x^T) x + c (x x^T)² x, which act on each singular value by itself.
    Jordan chose a, b and c so that small values grow fast. Those above 0.01 of the matrix's norm
    end between 0.68 and 1.14, which serves as well as 1. On CUDA it computes in bf16, whatever the
    precision of the network.
    """
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    if tall := x.shape[-2] > x.shape[-1]:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT                                                 # (L, m, m)
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon for the matrices and AdamW for the others, with one state, which is saved as usual."""

    def __init__(self, others, matrices, lr, muon_lr):
        self.adam = train.make_optimizer(others, lr)
        super().__init__([*self.adam.param_groups, {"params": matrices, "lr": muon_lr}], {})

    @torch.no_grad()
    def step(self):
        self.adam.param_groups, self.adam.state = self.param_groups[:1], self.state
        self.adam.step()
        group, shapes = self.param_groups[1], {}
        for p in group["params"]:
            state = self.state[p]
            if not state:
                state["momentum"] = torch.zeros_like(p)
            state["momentum"].lerp_(p.grad, 1 - MOMENTUM)
            ahead = p.grad.lerp(state["momentum"], MOMENTUM)  # Nesterov's momentum
            shapes.setdefault(p.shape, []).append((p, ahead))
        for shape, pairs in shapes.items():  # matrices of one shape are orthogonalised together
            matrices, updates = zip(*pairs)
            steps = orthogonalize(torch.stack(updates)).unbind()
            torch._foreach_add_(matrices, steps, alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)


class Muon(Ablation):
    name = "muon"
    flags = ("muon_lr",)

    @staticmethod
    def add_flags(parser):
        parser.add_argument_group("Muon").add_argument(
            "--muon-lr", type=number(float, 0),
            help="learning rate of the blocks' matrices (default: that of --lr)")

    def make_optimizer(self, args):
        muon_lr = args.lr if args.muon_lr is None else args.muon_lr
        matrices = [p for p in self.net.blocks.parameters() if p.ndim == 2]
        chosen = set(matrices)
        others = [p for p in self.parameters() if p not in chosen]
        return MuonAndAdamW(others, matrices, args.lr, muon_lr)


if __name__ == "__main__":
    raise SystemExit(train.main(ablation=Muon))
