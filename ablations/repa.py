"""Representation alignment: early tokens learn to resemble a teacher's tokens of the clean image.

    python vae.py --images FOLDER --out CACHE --keep-images
    python -m ablations.repa --teacher facebook/dinov2-base --latents CACHE [flags of train.py]

REPA (arXiv 2410.06940): a small network projects the tokens after a third of the blocks, and the
loss gets - weight * their mean cosine similarity with the teacher's patch tokens. iREPA (arXiv
2512.10794; --conv --gamma 0.6 --align-weight 1): the projector is a convolution, and what all of an
image's tokens share is taken out of the teacher's. Alignment helps early and may harm late, so
--until ends it at a step (HASTE, arXiv 2505.16792).
"""
import importlib

import torch
import torch.nn as nn
import torch.nn.functional as F

import train
from ablations import Ablation
from lib.checkpoint import weights_hash
from lib.features import load_features
from lib.flags import number
from lib.run import BadInput, log
from train import draws, stream


def spatial_norm(tokens, gamma):
    """Tokens (B, T, D) minus gamma times their mean over the image's T tokens, divided by their
    standard deviation over them."""
    std, mean = torch.std_mean(tokens, 1, correction=0, keepdim=True)  # 0 for a single token
    return (tokens - gamma * mean) / (std + 1e-6)


def alignment(student, teacher) -> torch.Tensor:
    """The mean cosine similarity of two sets of tokens (B, T, D), a scalar."""
    return F.cosine_similarity(student, teacher, dim=-1).mean()


def as_grid(tokens):
    """Tokens (B, T, D), row by row, as an image (B, D, side, side)."""
    side = int(tokens.shape[1] ** 0.5)
    return tokens.transpose(1, 2).unflatten(2, (side, side))


def on_grid(tokens, count):
    """Tokens (B, T, D) of a square grid, averaged onto a square grid of `count` tokens."""
    grid = F.adaptive_avg_pool2d(as_grid(tokens), int(count ** 0.5))    # (B, D, side, side)
    return grid.flatten(2).transpose(1, 2)


def make_projector(width, hidden, out, conv):
    """From tokens of the network to tokens like the teacher's."""
    if conv:
        projector = nn.Conv2d(width, out, 3, padding=1)  # on the grid of tokens
    else:
        projector = nn.Sequential(
            nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(),
            nn.Linear(hidden, out))
    for p in projector.parameters():
        nn.init.xavier_uniform_(p) if p.ndim > 1 else nn.init.zeros_(p)
    return projector


class Repa(Ablation):
    name = "repa"
    flags = ("teacher_hash", "align_weight", "after", "hidden", "conv", "gamma", "until")

    @staticmethod
    def add_flags(parser):
        add = parser.add_argument_group("REPA").add_argument
        add("--teacher", required=True,
            help="a vision backbone of transformers, by Hugging Face id or folder, or "
            "MODULE:FUNCTION, which returns a module")
        add("--align-weight", type=number(float, 0), default=0.5, help="of the mean cosine")
        add("--after", type=number(int, 1), help="blocks (default: a third, at most 8)")
        add("--hidden", type=number(int, 1), default=2048, help="width of the projector")
        add("--conv", action="store_true", help="project by a convolution, as iREPA does")
        add("--gamma", type=number(float, 0), help="of spatial_norm, iREPA's 0.6 (default: off)")
        add("--until", type=number(int, 1), help="step at which alignment ends (default: never)")

    def prepare(self, args, data, device):
        super().prepare(args, data, device)
        if not data.has_images:
            raise BadInput(f"{args.latents} holds no images for the teacher: write it with vae.py "
                           "--keep-images")
        teacher = load_teacher(args.teacher, data.size, device)
        self.teacher = [teacher]  # in a list: no part of this module, neither trained nor stored
        args.teacher_hash = weights_hash(teacher)
        blocks = self.net.blocks
        args.after = args.after or min(8, len(blocks) // 3)
        if args.after > len(blocks):
            raise BadInput(f"--after {args.after}: there are {len(blocks)} blocks")
        blocks[args.after - 1].register_forward_hook(self.tap)
        with torch.no_grad():
            _, tokens = teacher(data.images([0], [False]).to(device))   # (1, T, D)
        width = self.net.final_layer.linear.in_features
        with torch.random.fork_rng(devices=[]):  # the run's own random numbers stay as they are
            torch.manual_seed(args.seed + 1)
            projector = make_projector(width, args.hidden, tokens.shape[-1], args.conv)
        self.projector = projector.to(device)
        log(f"teacher {args.teacher_hash}: {tokens.shape[1]} tokens of {tokens.shape[2]}, aligned "
            f"after block {args.after}")

    def tap(self, block, inputs, tokens):
        self.tapped = tokens                                            # (B, N, dim)

    def extra_inputs(self, step, positions):
        if self.args.until and step >= self.args.until:
            return {}
        flip = draws(self.args.seed, step, self.args.batch)[2][positions] < 0.5
        rows = stream(self.args.seed, step * self.args.batch + positions, len(self.data))
        return {"images": self.data.images(rows, flip)}                 # (B, 3, size, size) uint8

    def forward(self, x, y, t, e, drop=None, images=None):
        loss = super().forward(x, y, t, e, drop)
        return loss - self.args.align_weight * self.aligned(images)

    def aligned(self, images, kept=None):
        """The alignment of the tapped tokens with the teacher's of these images, a scalar, and 0
        without images. kept: (B, K), the tokens that a routed network kept."""
        self.logged = {}
        if images is None:  # alignment has ended; DDP still wants a gradient of every parameter
            return 0 * sum(p.sum() for p in self.projector.parameters())
        with torch.no_grad():
            _, teacher = self.teacher[0](images)                        # (B, T, D)
            teacher = on_grid(teacher.float(), self.net.rotary_cos.shape[0])
            if self.args.gamma is not None:
                teacher = spatial_norm(teacher, self.args.gamma)
            if kept is not None:
                teacher = teacher.gather(1, kept[..., None].expand(-1, -1, teacher.shape[-1]))
        if self.args.conv:
            student = self.projector(as_grid(self.tapped)).flatten(2).transpose(1, 2)
        else:
            student = self.projector(self.tapped)                       # (B, N or K, D)
        value = alignment(student.float(), teacher)
        self.logged = {"alignment": value.detach()}
        return value


def load_teacher(name, size, device):
    """A module from uint8 images (B, 3, H, W) to (embedding (B, E), tokens (B, T, D)), in eval mode
    on the device. REPA shows DINOv2 a 256² image at 224². Raises BadInput."""
    if ":" not in name:
        return load_features(name, 224 * max(1, size // 256), device)
    module, function = name.split(":")
    try:
        teacher = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError) as error:
        raise BadInput(f"--teacher {name}: {error}") from None
    return teacher.to(device).eval()


if __name__ == "__main__":
    raise SystemExit(train.main(ablation=Repa))
