"""Representation alignment: early tokens learn to resemble a teacher's of the clean image.

    python vae.py --images FOLDER --out CACHE --keep-images
    python -m ablations.repa --teacher dinov2_vitb14.pth --latents CACHE [flags of train.py]

REPA (arXiv 2410.06940): a small network projects the tokens after a third of the blocks, and the
loss gets - weight * their mean cosine with the teacher's patch tokens. iREPA (arXiv 2512.10794;
--conv --gamma 0.6 --weight 1): the projector is a convolution, and what all patches share is taken
out of the teacher's tokens. Alignment helps early and may harm late: --until ends it at a step
(HASTE, arXiv 2505.16792).
"""
import importlib

import torch
import torch.nn as nn
import torch.nn.functional as F

from ablations import Ablation, main
from ablations.tread import gather
from lib.checkpoint import weights_hash
from lib.flags import number
from lib.run import BadInput, say
from lib.vit import load_vit
from train import draws, stream


def spatial_norm(tokens, gamma):
    """Tokens (B, T, D) less gamma of their mean over the image's T tokens, over their deviation."""
    std, mean = torch.std_mean(tokens, 1, correction=0, keepdim=True)  # of one token: 0
    return (tokens - gamma * mean) / (std + 1e-6)


def alignment(student, teacher) -> torch.Tensor:
    """The mean cosine over all tokens (B, T, D) of both, a scalar."""
    return F.cosine_similarity(student, teacher, dim=-1).mean()


def on_grid(tokens, count):
    """Square grids of tokens (B, T, D) averaged onto one of `count` tokens."""
    grid = F.adaptive_avg_pool2d(as_grid(tokens), int(count ** 0.5))    # (B, D, side, side)
    return grid.flatten(2).transpose(1, 2)


def as_grid(tokens):
    """Tokens (B, T, D), row by row, as an image (B, D, side, side)."""
    side = int(tokens.shape[1] ** 0.5)
    return tokens.transpose(1, 2).unflatten(2, (side, side))


def projector(width, hidden, out, conv):
    """From tokens of the network to tokens like the teacher's."""
    if conv:
        return nn.Conv2d(width, out, 3, padding=1)  # on the grid of tokens
    return nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(),
                         nn.Linear(hidden, out))


class Repa(Ablation):
    """Representation alignment, REPA and iREPA."""
    name = "repa"
    options = {
        "teacher": dict(required=True, help="weights of DINOv2, or MODULE:FUNCTION"),
        "weight": dict(type=number(float, 0), default=0.5, help="of the mean cosine"),
        "after": dict(type=number(int, 1), help="blocks (default: a third, at most 8)"),
        "hidden": dict(type=number(int, 1), default=2048, help="width of the projector"),
        "conv": dict(action="store_true", help="project by a convolution, as iREPA does"),
        "gamma": dict(type=number(float, 0), help="of spatial_norm, iREPA's 0.6 (default: none)"),
        "until": dict(type=number(int, 1), help="step at which it ends (default: never)")}

    def prepare(self, run):
        super().prepare(run)
        if not run.data.pictured:
            raise BadInput(f"{run.args.latents} holds no images for the teacher: make it with "
                           "vae.py --keep-images")
        if self.repa_conv and "tread" in run.settings["ablation"]:
            raise BadInput("--conv needs all tokens: it does not go with tread")
        teacher = load_teacher(self.repa_teacher, run.data.size).to(run.device).eval()
        self.teacher = [teacher]  # in a list: no part of this module, neither trained nor stored
        run.settings["ablation"]["repa"]["teacher"] = name = weights_hash(teacher)
        with torch.no_grad():
            image = run.data.pictures([0], [False])                     # (1, 3, size, size)
            _, tokens = teacher(image.to(run.device))                   # (1, T, D)
        self.make_projector(tokens.shape[-1])
        after = self.repa_after or min(8, len(run.net.blocks) // 3)
        if after > len(run.net.blocks):
            raise BadInput(f"--after {after}: there are {len(run.net.blocks)} blocks")
        run.net.blocks[after - 1].register_forward_hook(self.tap)
        say(f"teacher {name}: {tokens.shape[1]} tokens of {tokens.shape[2]}, after block {after}")

    def make_projector(self, out):
        width = self.run.net.final_layer.linear.in_features
        with torch.random.fork_rng(devices=[]):  # a generator of its own: the run draws as without
            torch.manual_seed(self.run.args.seed + 1)
            new = projector(width, self.repa_hidden, out, self.repa_conv)
            for p in new.parameters():
                nn.init.xavier_uniform_(p) if p.ndim > 1 else nn.init.zeros_(p)
        self.projector, self.is_learning = new.to(self.run.device), True

    def project(self, tokens):                                          # (B, N, dim)
        if not self.repa_conv:
            return self.projector(tokens).float()                       # (B, N, D)
        return self.projector(as_grid(tokens)).flatten(2).transpose(1, 2).float()

    def tap(self, block, inputs, tokens):
        self.tapped = tokens                                            # (B, N, dim)

    def more(self, step, places):
        more = super().more(step, places)
        if not self.repa_until or step < self.repa_until:
            data, args = self.run.data, self.run.args
            flip = draws(args.seed, step, args.batch)[2][places] < 0.5  # as train.py mirrors
            rows = stream(args.seed, step * args.batch + places, len(data))
            more["images"] = data.pictures(rows, flip)                  # (B, 3, size, size) uint8
        return more

    def freezes(self, step):
        ends = self.is_learning and self.repa_until is not None and step >= self.repa_until
        self.is_learning &= not ends
        self.projector.requires_grad_(self.is_learning)
        return super().freezes(step) or ends

    def forward(self, x, y, t, e, drop=None, images=None, **more):
        loss = super().forward(x, y, t, e, drop, **more)
        if images is None:
            return loss
        student = self.project(self.tapped)                             # (B, N or kept, D)
        with torch.no_grad():
            _, tokens = self.teacher[0](images)                         # (B, T, D)
            tokens = on_grid(tokens.float(), self.run.net.rotary_cos.shape[0])
            if self.repa_gamma is not None:
                tokens = spatial_norm(tokens, self.repa_gamma)
            if student.shape[1] < tokens.shape[1]:  # joined with tread: on the tokens kept
                tokens = gather(tokens, more.get("kept", getattr(self, "kept", None)))
        return loss - self.repa_weight * alignment(student, tokens)


def load_teacher(name, size):
    """A module from uint8 images (B, 3, H, W) to (embedding (B, E), tokens (B, T, D)): of a weight
    file, or what MODULE:FUNCTION returns. Raises BadInput."""
    if ":" not in name:
        return load_vit(name, 224 * max(1, size // 256))
    module, function = name.split(":")
    try:
        return getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError) as error:
        raise BadInput(f"--teacher {name}: {error}") from None


if __name__ == "__main__":
    raise SystemExit(main(Repa))
