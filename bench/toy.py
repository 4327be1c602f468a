"""When does it matter what a network predicts? A toy that takes a minute on two cores.

    python -m bench.toy --out toy.png

The data is a spiral in a plane, rotated at random into D dimensions. It stays a curve; only the
space around it grows. The network is one MLP with 128 channels, whatever D is. It is trained twice,
to predict x and to predict v, with the same Denoiser, loss (squared error of the velocity), noise
and budget, and sampled with the same ODE solver. Printed is the mean distance of the samples from
the curve, which is about 2 in size. (JiT, arXiv 2511.13720, has a figure of this kind.)

Where D > 128, the network's output stays in the span of the 128 columns of its last layer's weight,
plus the bias. A velocity predicted as v is zero (up to the bias) outside that span, so there a
sample keeps the noise it started from, about sqrt(D - 128) in length. A network that predicts x
leaves it to the sampler to remove the noise: v = (x - z) / (1-t). The last column shows that.
"""
import torch
import torch.nn as nn

from bench.figures import COLORS, image_path, pyplot, save_figure
from lib.flags import Parser
from lib.run import log, program
from model import Denoiser
from sample import ode_sample

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
        time = torch.stack([t, torch.cos(torch.pi * t)], dim=1)         # (B, 2)
        return self.layers(torch.cat([z.flatten(1), time], dim=1))[..., None, None]


def spiral(n, generator):
    """n points (n, 2) of a spiral, whose standard deviation is about 1."""
    angle = 3 * torch.pi * (0.15 + 0.85 * torch.rand(n, generator=generator).sqrt())
    return torch.stack([angle * angle.cos(), angle * angle.sin()], dim=1) / 4.7


def train(target, axes, steps):
    """A Denoiser trained on spirals in the plane of axes (D, 2)."""
    torch.manual_seed(0)
    denoiser = Denoiser(MLP(len(axes)), target, label_drop=0.0)
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=2e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(1)
    y = torch.zeros(256, dtype=torch.int64)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, 2 * (1 - step / steps))
        x = (spiral(256, generator) @ axes.T)[..., None, None]          # (B, D, 1, 1)
        e = torch.randn(x.shape, generator=generator)
        t = denoiser.times(torch.randn(256, generator=generator))
        optimizer.zero_grad()
        denoiser(x, y, t, e).backward()
        optimizer.step()
    return denoiser


@torch.no_grad()
def sample(denoiser, dimensions, n=1000):
    """n samples (n, D), by 50 steps of Heun's method."""
    # The sampler never evaluates at t = 1, so x needs no floor of 1-t. With the paper's floor of
    # 0.05 it would leave 1.7% of the noise, which is most of x's distance in many dimensions.
    denoiser.t_eps = 0.0
    z = torch.randn(n, dimensions, 1, 1, generator=torch.Generator().manual_seed(2))
    y = torch.zeros(n, dtype=torch.int64)
    return ode_sample(lambda z, t: denoiser.velocity(z, t, y), z, 50, "heun").flatten(1)


def distance(samples, axes, curve):
    """Distances (n,) of samples (n, D) from the curve (points, 2) in the plane of axes (D, 2)."""
    plane = samples @ axes                                              # (n, 2)
    off_plane = (samples - plane @ axes.T).square().sum(1)
    return (torch.cdist(plane, curve).amin(1).square() + off_plane).sqrt()


@torch.no_grad()
def outside_span(samples, denoiser):
    """Lengths (n,) of the parts of samples (n, D) outside the span of the last layer's columns."""
    span, _ = torch.linalg.qr(denoiser.net.layers[-1].weight)           # (D, 128)
    return (samples - samples @ span @ span.T).norm(dim=1)


@program
def main(argv=None):
    parser = Parser("A curve in more and more dimensions, predicted as x and as v.")
    parser.add_argument("--out", type=image_path, default="toy.png", help="the figure, NAME.png")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # products this small gain nothing from a second thread
    figure, panels = pyplot().subplots(
        2, len(DIMENSIONS), figsize=(12, 5), sharex=True, sharey=True)
    log("D    predicts  distance from the curve  outside the last layer's span")
    for dimensions, column in zip(DIMENSIONS, panels.T):
        generator = torch.Generator().manual_seed(0)
        axes, _ = torch.linalg.qr(torch.randn(dimensions, 2, generator=generator))  # (D, 2)
        curve = spiral(4000, generator)
        for target, panel in zip(("x", "v"), column):
            denoiser = train(target, axes, steps=1500)
            samples = sample(denoiser, dimensions)
            mean = distance(samples, axes, curve).mean()
            rest = ""
            if dimensions > WIDTH:
                rest = f"{outside_span(samples, denoiser).mean():31.3f}"
            log(f"{dimensions:<5}{target:<10}{mean:23.3f}{rest}")
            panel.scatter(*curve.T, s=1, color="lightgrey")
            panel.scatter(*(samples @ axes).T, s=2, color=COLORS[target],
                          label=f"distance {mean:.2f}")
            panel.set_title(f"predicts {target}, D = {dimensions}", fontsize=9)
            panel.set(xlim=(-3, 3), ylim=(-3, 3), aspect="equal")
    save_figure(figure, args.out)


if __name__ == "__main__":
    raise SystemExit(main())
