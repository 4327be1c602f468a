"""The judge of the demo: which share of a checkpoint's digits can be read as the digit asked for?

    python -m bench.digits --ckpt out/demo-T8-x/ema.safetensors out/demo-T8-v/ema.safetensors

A small network learns to read digits, drawn anew, and then reads samples. Beside the share that it
reads as asked stands the Frechet distance between samples and drawn digits, made as FID is, of the
reader's 64 features, in units of the drawn digits' own variance.
"""
import math
import pathlib
import tempfile

import torch
import torch.nn as nn
import torch.nn.functional as F

from fid import frechet_distance
from lib.checkpoint import load_denoiser
from lib.device import pick_device
from lib.flags import Parser, number
from lib.images import draw_digits, list_images, read_picture
from lib.run import BadInput, image_batches, program, say
from sample import Sampling, balanced_labels, generate, progress
from vae import from_uint8, open_vae


def drawn(per_class, seed):
    """Drawn digits, uint8 (10 * per_class, 3, 32, 32), and their labels. The demo's have seed 0."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = draw_digits(f"{scratch}/digits", per_class, seed)
        _, items = list_images(folder)
        images = [read_picture(folder / path)[0] for path, _ in items]
    return torch.stack(images), torch.tensor([label for _, label in items])


class Reader(nn.Module):
    """uint8 images (B, 3, 32, 32) -> (features (B, 64), logits (B, 10))."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 5, stride=2, padding=2), nn.ReLU(),        # (B, 16, 16, 16)
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),       # (B, 32, 8, 8)
            nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(),       # (B, 64, 4, 4)
            nn.Flatten(), nn.Linear(64 * 4 * 4, 64), nn.ReLU())         # (B, 64)
        self.out = nn.Linear(64, 10)

    def forward(self, images):
        features = self.body(from_uint8(images))
        return features, self.out(features)


def train_reader(images, labels, epochs=6, seed=0):
    torch.manual_seed(seed)
    reader = Reader()
    optimizer = torch.optim.Adam(reader.parameters(), lr=2e-3)
    for _ in range(epochs):
        for indices in torch.randperm(len(images)).split(64):
            _, logits = reader(images[indices])
            F.cross_entropy(logits, labels[indices]).backward()
            optimizer.step()
            optimizer.zero_grad()
    return reader


@torch.inference_mode()
def read(reader, images, labels):
    """(features (n, 64) of images (n, 3, 32, 32), the share that is read as its label)."""
    features, logits = reader(images)
    return features, (logits.argmax(1) == labels).double().mean().item()


def statistics(features):
    """Mean and covariance, in float64, of features (n, 64)."""
    return features.double().mean(0), features.double().T.cov()


@program
def main(argv=None):
    parser = Parser("How many of a checkpoint's digits can be read, how far are they from drawn?")
    add = parser.add_argument
    add("--ckpt", type=pathlib.Path, nargs="+", required=True, help="checkpoints of demo runs")
    add("--n", type=number(int, 100), default=1000, help="samples a checkpoint")
    add("--cfg", type=number(float, 0, 1000), default=1.5, help="guidance scale")
    add("--steps", type=number(int, 1), default=50, help="ODE steps")
    args = parser.parse_args(argv)
    n, sampling, device = args.n, Sampling(cfg=args.cfg, steps=args.steps), pick_device()
    reader = train_reader(*drawn(300, seed=1001))
    images, labels = drawn(2 * math.ceil(n / 10), seed=1002)  # two sets of n that it never saw
    features, share = read(reader, images, labels)
    unit = features.var(0).sum().sqrt()
    real, other = statistics(features[0::2] / unit), statistics(features[1::2] / unit)
    say(f"reader: right on {share:.2%} of {len(images)} drawings it never saw; their halves are "
        f"{frechet_distance(*real, *other):.4f} apart")
    for path in args.ckpt:
        denoiser = load_denoiser(path, device=device)
        settings, net = denoiser.settings, denoiser.net
        vae = open_vae(settings, net.in_channels, device=device)
        if net.num_classes != 10 or net.input_size * vae.stride != 32:
            raise BadInput(f"{path}: expected 10 classes, 32 pixels wide, as the demo's")
        images = [generate(denoiser, vae, indices, range(10), sampling).cpu()
                  for indices in progress(image_batches(n, 128))]
        features, share = read(reader, torch.cat(images), balanced_labels(range(10), range(n)))
        distance = frechet_distance(*statistics(features / unit), *real)
        say(f"{path}: {denoiser.target}-prediction, step {settings['step']}, cfg {args.cfg:g}: "
            f"{share:.1%} of {n} read as asked, distance {distance:.4f}")


if __name__ == "__main__":
    raise SystemExit(main())
