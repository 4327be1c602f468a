"""Representation alignment: early tokens learn to resemble a teacher's of the clean image.

    python vae.py --images FOLDER --out CACHE --keep-images
    python -m ablations.repa --teacher dinov2_vitb14.pth --latents CACHE [flags of train.py]
    python -m ablations.repa --teacher FILE --conv --gamma 0.6 --weight 1          iREPA
    python -m ablations.repa --teacher FILE --until 100000                         stopped early

REPA (arXiv 2410.06940): a small network projects the tokens after a third of the blocks; the loss
gets - weight * their mean cosine with the teacher's patch tokens. iREPA (arXiv 2512.10794) projects
by one convolution, and normalises the teacher's tokens over space, which leaves where things are
and takes out what all patches share. Alignment helps early and can harm late, so it may be dropped
at a step (HASTE, arXiv 2505.16792).
"""
import hashlib
import importlib
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from ablations import Ablation, main
from ablations.tread import gather
from lib.flags import number
from lib.run import BadInput, say
from lib.vit import load_vit
from train import draws, stream


def spatial_norm(tokens, gamma):
    """Tokens (B, T, D) less gamma of their mean over the image's T tokens, over their deviation."""
    mean, std = tokens.mean(1, keepdim=True), tokens.std(1, keepdim=True)
    return (tokens - gamma * mean) / (std + 1e-6)


def alignment(student, teacher) -> torch.Tensor:
    """The mean cosine over all tokens (B, T, D) of both, a scalar."""
    return F.cosine_similarity(student, teacher, dim=-1).mean()


def on_grid(tokens, count):
    """Square grids of tokens (B, T, D) averaged onto one of `count` tokens."""
    side = math.isqrt(tokens.shape[1])
    grid = tokens.transpose(1, 2).unflatten(2, (side, side))            # (B, D, side, side)
    return F.adaptive_avg_pool2d(grid, math.isqrt(count)).flatten(2).transpose(1, 2)


class ConvProjector(nn.Module):
    """A 3x3 convolution over the grid of tokens (B, T, D)."""

    def __init__(self, width, out):
        super().__init__()
        self.conv = nn.Conv2d(width, out, 3, padding=1)

    def forward(self, tokens):
        side = math.isqrt(tokens.shape[1])
        grid = tokens.transpose(1, 2).unflatten(2, (side, side))
        return self.conv(grid).flatten(2).transpose(1, 2)


def mlp_projector(width, hidden, out):
    return nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(),
                         nn.Linear(hidden, out))


class Repa(Ablation):
    """Representation alignment, REPA and iREPA."""
    name = "repa"
    options = {
        "teacher": dict(help="weights of DINOv2 or CLIP, or MODULE:FUNCTION, which returns a "
                             "module from uint8 images to (embedding, tokens (B, T, D))"),
        "weight": dict(type=number(float, 0), default=0.5, help="of the mean cosine"),
        "after": dict(type=number(int, 1), help="blocks (default: a third, at most 8)"),
        "hidden": dict(type=number(int, 1), default=2048, help="width of the projector"),
        "conv": dict(action="store_true", help="project by a convolution, as iREPA does"),
        "gamma": dict(type=number(float, 0), help="normalise the teacher's tokens over space, as "
                                                  "iREPA does with 0.6 (default: do not)"),
        "until": dict(type=number(int, 1), help="step at which it ends (default: never)"),
    }

    def prepare(self, run):
        super().prepare(run)
        if not self.repa_teacher:
            raise BadInput("--teacher is needed: a weight file of DINOv2, or MODULE:FUNCTION")
        if not run.data.pictured:
            raise BadInput(f"{run.args.latents} holds no images for the teacher: make it with "
                           "vae.py --keep-images")
        if self.repa_conv and hasattr(self, "kept"):
            raise BadInput("--conv needs all tokens: it does not go with tread")
        teacher = load_teacher(self.repa_teacher, run.data.size).to(run.device).eval()
        self.teacher = [teacher]  # in a list: no part of this module, neither trained nor stored
        run.settings["ablation"]["repa"]["teacher"] = name = module_hash(teacher)  # not its path
        images = torch.zeros(1, 3, run.data.size, run.data.size, dtype=torch.uint8)
        with torch.no_grad():
            _, tokens = teacher(images.to(run.device))
        self.make_projector(tokens.shape[-1])
        depth = len(run.net.blocks)
        after = self.repa_after or min(8, depth // 3)
        if after > depth:
            raise BadInput(f"--after {after}: there are {depth} blocks")
        run.net.blocks[after - 1].register_forward_hook(self.tap)
        say(f"teacher {name}: {tokens.shape[1]} tokens of {tokens.shape[2]}, seen after block "
            f"{after} of {depth}")

    def make_projector(self, out):
        width = self.run.net.final_layer.linear.in_features
        with torch.random.fork_rng(devices=[]):  # a generator of its own: the run draws as without
            torch.manual_seed(self.run.args.seed + 1)
            make = mlp_projector(width, self.repa_hidden, out)
            if self.repa_conv:
                make = ConvProjector(width, out)
            for p in make.parameters():
                if p.ndim > 1:
                    nn.init.xavier_uniform_(p)
                else:
                    nn.init.zeros_(p)
        self.projector = make.to(self.run.device)

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
        ends = self.repa_until and step >= self.repa_until
        ends = ends and any(p.requires_grad for p in self.projector.parameters())
        if ends:
            self.projector.requires_grad_(False)
        return super().freezes(step) or ends

    def forward(self, x, y, t, e, drop=None, images=None, **more):
        loss = super().forward(x, y, t, e, drop, **more)
        if images is None:
            return loss
        student = self.projector(self.tapped).float()                   # (B, N or kept, D)
        with torch.no_grad():
            _, tokens = self.teacher[0](images)                         # (B, T, D)
            tokens = on_grid(tokens.float(), self.run.net.rotary_cos.shape[0])
            if self.repa_gamma is not None:
                tokens = spatial_norm(tokens, self.repa_gamma)
            kept = more.get("kept", getattr(self, "kept", None))
            if student.shape[1] < tokens.shape[1]:  # joined with tread: on the tokens kept
                tokens = gather(tokens, kept)
        return loss - self.repa_weight * alignment(student, tokens)


def load_teacher(name, size):
    """The module of a weight file, or what MODULE:FUNCTION returns. Raises BadInput."""
    if ":" not in name:
        return load_vit(name, 224 * max(1, size // 256))
    module, function = name.split(":")
    try:
        return getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError) as error:
        raise BadInput(f"--teacher {name}: {error}") from None


def module_hash(module):
    digest = hashlib.sha256()
    for key, tensor in module.state_dict().items():
        digest.update(key.encode() + tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


if __name__ == "__main__":
    raise SystemExit(main(Repa))
