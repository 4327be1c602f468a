"""TAEF2, a tiny codec for FLUX.2's latents. It also serves as the example of a codec of your own.

    image (B, 3, H, W) in [0, 1]  --encoder-->  (B, 32, H/8, W/8)  --decoder-->  image

Plain 3x3 convolutions of width 64, distilled from FLUX.2's VAE and published as madebyollin/taef2
(MIT licence). Both halves are Sequentials whose indices are the key names in the published files.
It was trained on normalised latents, so only the space-to-depth remains to be done.
"""
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from lib.checkpoint import find_file

WIDTH = 64


def conv(n_in, n_out, size=3, **options):
    return nn.Conv2d(n_in, n_out, size, padding=size // 2, **options)


class Block(nn.Module):
    """ReLU(x + three convolutions of x). At the coarsest level a wide branch of 1x1 convolutions
    ("pool") is added to x first."""

    def __init__(self, pool=False):
        super().__init__()
        self.conv = nn.Sequential(conv(WIDTH, WIDTH), nn.ReLU(), conv(WIDTH, WIDTH), nn.ReLU(),
                                  conv(WIDTH, WIDTH))
        self.pool = nn.Sequential(
            conv(WIDTH, 4 * WIDTH, 1, bias=False), nn.GroupNorm(4, 4 * WIDTH), nn.ReLU(),
            conv(4 * WIDTH, WIDTH, 1, bias=False)) if pool else None

    def forward(self, x):
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(self.conv(x) + x)


class Clamp(nn.Module):
    def forward(self, z):
        return 3 * torch.tanh(z / 3)  # a soft limit on generated latents


def down(pool=False):
    halve = conv(WIDTH, WIDTH, stride=2, bias=False)
    return [halve, Block(pool), Block(pool), Block(pool)]


def up(pool=False):
    double = nn.Upsample(scale_factor=2), conv(WIDTH, WIDTH, bias=False)
    return [Block(pool), Block(pool), Block(pool), *double]


class Taef2(nn.Module):
    kind, channels, stride = "taef2", 128, 16

    def __init__(self, source=None):
        """source: a local folder or a Hugging Face id; None for random weights."""
        super().__init__()
        self.encoder = nn.Sequential(
            conv(3, WIDTH), Block(), *down(), *down(), *down(pool=True), conv(WIDTH, 32))
        self.decoder = nn.Sequential(
            Clamp(), conv(32, WIDTH), nn.ReLU(), *up(pool=True), *up(), *up(), Block(),
            conv(WIDTH, 3))
        for stem in ("encoder", "decoder") if source else ():
            path = find_file(source, f"taef2_{stem}.safetensors", f"taef2_{stem}.pth")
            if path.suffix == ".safetensors":
                weights = load_file(path)
            else:
                weights = torch.load(path, "cpu", weights_only=True)
            getattr(self, stem).load_state_dict(weights)

    def encode(self, images):                                           # (B, 3, H, W) in [-1, 1]
        images = images.to(self.encoder[0].weight.dtype)
        return F.pixel_unshuffle(self.encoder((images + 1) / 2), 2)     # (B, 128, H/16, W/16)

    def decode(self, latents):
        latents = latents.to(self.encoder[0].weight.dtype)
        return self.decoder(F.pixel_shuffle(latents, 2)) * 2 - 1
