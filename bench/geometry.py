"""The geometry of the targets: theory as lines, trained networks as dots.

    python -m bench.geometry data/demo-pixels --ckpt out/demo-T8-x/ema.safetensors \\
        out/demo-T8-eps/ema.safetensors out/demo-T8-v/ema.safetensors --out assets/geometry.png

The directions are the eigenvectors of the covariance of the data's tokens, by falling variance.
Lines are what a Gaussian of that covariance would have (formulas: bench/spectrum.py). Dots are
measured, of networks that see the same images and noise. They may lie below the lines: data is not
Gaussian, and a network sees all tokens. Above, it falls short of even a linear prediction.
"""
import pathlib

import torch

from bench.chart import picture, pyplot, save, styles
from bench.spectrum import asks, spectrum, spread, token_statistics, tokens
from lib.checkpoint import load_denoiser
from lib.device import pick_device
from lib.flags import Parser, number
from lib.run import BadInput, program, say
from model import TARGETS
from sample import image_noise
from vae import LatentDataset

PANELS = {
    "variance of the target": ("variance", None),
    "coefficient of the prediction on z": ("coefficient", "coefficient"),
    "squared error, in each target's own space": ("ambiguity", "own"),
    "squared error, in v space, where the lines are one": ("v", "v"),
}


@torch.inference_mode()
def measure(denoiser, data, vectors, t, n, seed=0):
    """Of a network at time t, on n images, in directions (D, D), a column each: the prediction's
    "coefficient" on z, by least squares, its squared error in its "own" and in "v" space."""
    net, device = denoiser.net, next(denoiser.parameters()).device
    a, b = TARGETS[denoiser.target]
    parts = []
    for rows in spread(len(data), n):
        x, y = data.batch(rows)
        x, y = x.to(device).float(), y.to(device)
        e = image_noise(seed, rows, data.shape).to(device)
        z = t * x + (1 - t) * e
        prediction = net(z, torch.full((len(x),), t, device=device), y).float()
        error = prediction - (a * x + b * e)
        v_error = denoiser.to_velocity(prediction, z, t) - (x - e)
        parts.append([tokens(value.cpu(), net.patch_size) @ vectors
                      for value in (prediction, z, error, v_error)])    # each (tokens, D)
    prediction, z, error, v_error = map(torch.cat, zip(*parts))
    prediction, z = prediction - prediction.mean(0), z - z.mean(0)
    coefficient = (prediction * z).mean(0) / z.square().mean(0)
    return {"coefficient": coefficient, "own": error.square().mean(0),
            "v": v_error.square().mean(0)}


def grouped(values, groups):
    """Means of `values` (D,) over up to `groups` runs of neighbouring directions."""
    values = torch.as_tensor(values, dtype=torch.float64)
    return [float(part.mean()) for part in torch.tensor_split(values, groups)]


def draw(path, title, panels, theory, measured=()):
    """panels: {title: (what lines show, what dots show)}; theory: as `asks` returns it; measured:
    [(target, what was measured of a network)]."""
    directions = torch.arange(1, len(theory["x"]["variance"]) + 1)
    groups = min(len(directions), 48)
    places = grouped(directions, groups)
    figure, parts = pyplot().subplots(2, 2, figsize=(12, 8))
    figure.suptitle(title)
    for panel, (head, (line, dots)) in zip(parts.flat, panels.items()):
        panel.set(title=head, xlabel="direction, by falling variance of the data")
        for (target, row), look in zip(theory.items(), styles(list(theory))):
            panel.plot(places, grouped(row[line], groups), label=target, **look)
        looks = styles([target for target, _ in measured], "marker", "ox^s")
        for (_, found), look in zip(measured, looks):
            if dots:
                panel.scatter(places, grouped(found[dots], groups), 14, **look)
        if line in ("variance", "ambiguity", "v"):
            panel.set_yscale("log")
            panel.set_ylim(bottom=max(panel.get_ylim()[0], 1e-6))  # some variances are 0
    save(figure, path)


@program
def main(argv=None):
    parser = Parser("The geometry of the targets: theory as lines, trained networks as dots.")
    add, path = parser.add_argument, pathlib.Path
    add("cache", metavar="CACHE", type=path, help="the latents that the networks learned from")
    add("--ckpt", type=path, nargs="+", required=True, help="checkpoints, of x, eps and v runs")
    add("--t", type=number(float, 0.05, 0.95), default=0.3, help="time")
    add("--n", type=number(int, 2), default=512, help="images on which networks are measured")
    add("--out", type=picture, default="assets/geometry.png", help="the picture, NAME.png")
    args = parser.parse_args(argv)
    data, t = LatentDataset(args.cache), args.t
    networks = [load_denoiser(path, device=pick_device()) for path in args.ckpt]
    patch, measured = networks[0].net.patch_size, []
    _, covariance = token_statistics(data, patch, 10_000)
    values, vectors = spectrum(covariance)
    theory = asks(values, t)
    for row in theory.values():
        row["v"] = theory["v"]["ambiguity"]
    for path, denoiser in zip(args.ckpt, networks):
        net, target = denoiser.net, denoiser.target
        if (net.patch_size, net.in_channels, net.input_size) != (patch, *data.shape[:2]):
            raise BadInput(f"{path}: expected patch {patch}, as the first, latents {data.shape}")
        found, line = measure(denoiser, data, vectors, t, args.n), theory[target]
        measured.append((target, found))
        say(f"{path}: predicts {target}, t = {t:g}: error in its own space "
            f"{found['own'].mean():.4f} (line {line['ambiguity'].mean():.4f}), in v space "
            f"{found['v'].mean():.4f} (line {line['v'].mean():.4f})")
    title = f"{args.cache.name}, patch {patch}, t = {t:g}: lines are theory, dots are networks"
    draw(args.out, title, PANELS, theory, measured)


if __name__ == "__main__":
    raise SystemExit(main())
