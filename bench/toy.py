"""Half a minute on two cores: when does it matter what a network predicts?

    python -m bench.toy --out assets/toy.png

The data: a spiral in a plane, turned at random into D dimensions. It stays a curve. Only the space
around it grows. The network: one MLP of 128 channels, whatever D is. It is trained twice, to
predict x and to predict v, by the same `Denoiser`, loss (the squared error of the velocity), noise
and budget, then drawn from with the same sampler. What is printed: the mean distance of samples
from the curve, whose own size is about 2. (JiT, arXiv 2511.13720, has a figure of this kind.)
"""
import pathlib
import sys

import torch
import torch.nn as nn

from bench.chart import COLOURS, picture, pyplot, save
from lib.flags import Parser, number
from lib.run import program, say
from model import Denoiser
from sample import guided_velocity, ode_sample

DIMENSIONS = (2, 8, 32, 128, 512)
WIDTH = 128


class MLP(nn.Module):
    """(z (B, D, 1, 1), t (B,), y) -> a prediction of z's shape; y is ignored."""
    num_classes = 1

    def __init__(self, dimensions):
        super().__init__()
        sizes = [dimensions + 2, WIDTH, WIDTH, WIDTH]
        layers = [part for a, b in zip(sizes, sizes[1:]) for part in (nn.Linear(a, b), nn.SiLU())]
        self.layers = nn.Sequential(*layers, nn.Linear(WIDTH, dimensions))

    def forward(self, z, t, y):
        clock = torch.stack([t, torch.cos(torch.pi * t)], dim=1)
        return self.layers(torch.cat([z.flatten(1), clock], dim=1))[..., None, None]


def spiral(n, generator):
    """n points (n, 2) of a spiral of one and a half turns, its spread about 1."""
    angle = 3 * torch.pi * (0.15 + 0.85 * torch.rand(n, generator=generator).sqrt())
    return torch.stack([angle * angle.cos(), angle * angle.sin()], dim=1) / 4.7


def draw_both(dimensions, steps, batch=256):
    """{target: samples in the plane (1000, 2), how far they are from the curve}."""
    torch.set_num_threads(1)  # such small products are not worth a second one
    generator = torch.Generator().manual_seed(0)
    axes, _ = torch.linalg.qr(torch.randn(dimensions, 2, generator=generator))  # (D, 2): the plane
    curve = spiral(4000, generator)
    found = {}
    for target in ("x", "v"):
        torch.manual_seed(0)
        denoiser = Denoiser(MLP(dimensions), target, label_drop=0.0)
        optimizer = torch.optim.AdamW(denoiser.parameters(), lr=2e-3, weight_decay=0.0)
        rng = torch.Generator().manual_seed(1)
        y = torch.zeros(batch, dtype=torch.int64)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 2e-3 * min(1, 2 * (1 - step / steps))
            x = (spiral(batch, rng) @ axes.T)[..., None, None]          # (B, D, 1, 1)
            e = torch.randn(x.shape, generator=rng)
            t = denoiser.times(torch.randn(batch, generator=rng))
            optimizer.zero_grad()
            denoiser(x, y, t, e).backward()
            optimizer.step()
        z = torch.randn(1000, dimensions, 1, 1, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            velocity = guided_velocity(denoiser, torch.zeros(1000, dtype=torch.int64))
            drawn = ode_sample(velocity, z, 50).flatten(1)              # (1000, D)
        plane = drawn @ axes                                            # (1000, 2)
        beside = (drawn - plane @ axes.T).square().sum(1)               # squared, off the plane
        within = torch.cdist(plane, curve).amin(1).square()
        found[target] = plane, (within + beside).sqrt().mean().item()
    return found


@program
def main(argv=None):
    parser = Parser("A curve in more and more dimensions, predicted as x and as v.")
    parser.add_argument("--out", type=picture, default=pathlib.Path("toy.png"), help="the picture")
    parser.add_argument("--steps", type=number(int, 1), default=1500, help="of training, each")
    args = parser.parse_args(argv)
    figure, panels = pyplot().subplots(
        2, len(DIMENSIONS), figsize=(12, 5), sharex=True, sharey=True)
    say("D     distance from the curve: x      v")
    for column, dimensions in enumerate(DIMENSIONS):
        found = draw_both(dimensions, args.steps)
        say(f"{dimensions:<5} {found['x'][1]:24.3f} {found['v'][1]:8.3f}")
        for panel, (target, (plane, distance)) in zip(panels[:, column], found.items()):
            panel.scatter(*plane.T, s=2, color=COLOURS[target], label=f"{target}: {distance:.2f}")
            panel.set_title(f"predicts {target}, D = {dimensions}", fontsize=9)
            panel.set(xlim=(-3, 3), ylim=(-3, 3), aspect="equal")
    save(figure, args.out)


if __name__ == "__main__":
    sys.exit(main())
