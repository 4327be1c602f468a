"""The geometry of the three targets: theory as lines, trained networks as dots.

    python -m bench.geometry data/demo-pixels --ckpt out/demo-T8-x/ema.safetensors out/demo-T8-eps/ema.safetensors \\
        out/demo-T8-v/ema.safetensors --t 0.3 --out assets/geometry.png

The directions are the eigenvectors of the covariance of the data's tokens (bench/spectrum.py, which has the formulas),
by falling variance. Lines are what a Gaussian with that covariance would have. Dots are measured: each network sees
z = t x + (1-t) e of the same images with the same noise, and its prediction is taken apart into the same directions.

    top left      what is asked: the variance of each target; that of x is the spectrum of the data itself
    top right     coefficient on z: of the best linear prediction; dots: of the network, by least squares
    bottom left   squared error of the prediction, in the network's own target space; line: Var(target | z)
    bottom right  the same in the common space of v, where the three lines are one and networks compare

Dots may lie below the lines: data is not Gaussian, and a network sees all tokens and the label at once. Where they lie
above, the network falls short of even the linear prediction from the token alone. Where there are many directions,
lines and dots are means over groups of neighbours. A logarithmic axis ends at 1e-6, which stands for less as well.
"""
import pathlib
import sys

import numpy as np
import torch

from bench.chart import COLOURS, MEANING, picture, pyplot, save, styles
from bench.spectrum import asks, spectrum, spread, token_statistics, tokens
from lib.flags import Parser, number
from lib.run import BadInput, pick_device, program, say
from sample import load_denoiser
from vae import LatentDataset

FLOOR = 1e-6  # of the logarithmic axes


@torch.inference_mode()
def measure(denoiser, data, vectors, t, n, seed=0):
    """{"coefficient", "own", "v"}, each (D,): a network's predictions at time t, on n images of a cache, in
    the directions `vectors` (D, D), a column each. The coefficient of the prediction on z, by least squares; its mean
    squared error in the network's own target space; the same in v space."""
    net, device = denoiser.net, next(denoiser.parameters()).device
    count, sums = 0, {name: 0 for name in ("p", "z", "pz", "zz", "own", "v")}
    for part in spread(len(data), n):
        x, y = data.batch(part, False)
        rows = [np.random.default_rng([seed, int(i)]).standard_normal(data.shape, dtype=np.float32) for i in part]
        x, e, y = x.to(device).float(), torch.from_numpy(np.stack(rows)).to(device), y.to(device)
        z = t * x + (1 - t) * e
        prediction = net(z, torch.full((len(x),), t, device=device), y).float()
        target = {"x": x, "eps": e, "v": x - e}[denoiser.target]
        error, velocity_error = prediction - target, denoiser.to_velocity(prediction, z, t) - (x - e)
        # Each of the four: (tokens, D)
        p, z, own, v = (tokens(a.cpu(), net.patch_size) @ vectors for a in (prediction, z, error, velocity_error))
        for name, value in dict(p=p, z=z, pz=p * z, zz=z * z, own=own * own, v=v * v).items():
            sums[name] = sums[name] + value.sum(0)
        count += len(z)
    average = {name: value / count for name, value in sums.items()}
    slope = (average["pz"] - average["p"] * average["z"]) / (average["zz"] - average["z"] ** 2)
    return {"coefficient": slope, "own": average["own"], "v": average["v"]}


def grouped(values, groups):
    """Means of `values` (D,) over up to `groups` runs of neighbouring directions, as even as can be."""
    return [float(part.mean()) for part in torch.tensor_split(torch.as_tensor(values, dtype=torch.float64), groups)]


@program
def main(argv=None):
    parser = Parser("The geometry of the targets: theory as lines, trained networks as dots.")
    parser.add_argument("cache", metavar="CACHE", type=pathlib.Path, help="the latents that the networks learned from")
    parser.add_argument("--ckpt", type=pathlib.Path, nargs="+", required=True, help="checkpoints, of x, eps and v runs")
    parser.add_argument("--weights", choices=("ema", "ema2", "model"), default="ema", help="which of their weights")
    parser.add_argument("--t", type=number(float, 0.05, 0.95), default=0.3, help="time")
    parser.add_argument("--n", type=number(int, 2), default=512, help="images on which networks are measured")
    parser.add_argument("--groups", type=number(int, 1), default=48, help="dots a network, at most")
    parser.add_argument("--out", type=picture, default="assets/geometry.png", help="the picture, NAME.png")
    args = parser.parse_args(argv)
    data, device = LatentDataset(args.cache), pick_device()
    networks = [load_denoiser(path, args.weights, device) for path in args.ckpt]
    patch = networks[0].net.patch_size
    for path, denoiser in zip(args.ckpt, networks):
        net = denoiser.net
        shape = (net.in_channels, net.input_size, net.input_size)
        if shape != tuple(data.shape) or net.patch_size != patch:
            raise BadInput(f"{path}: patch {net.patch_size}, latents {shape}; expected {patch}, as the first has,"
                           f" and latents {tuple(data.shape)}, as in {args.cache}")
    _, covariance = token_statistics(data, patch, 10_000)
    l, vectors = spectrum(covariance)
    theory, groups = asks(l, args.t), min(args.groups, len(l))
    places = grouped(torch.arange(1, len(l) + 1), groups)
    shown = lambda values: [max(value, FLOOR) for value in grouped(values, groups)]
    figure, ((top, coefficient), (own, common)) = pyplot().subplots(2, 2, figsize=(12, 8))
    for target, row in theory.items():
        top.plot(places, shown(row["variance"]), color=COLOURS[target], label=MEANING[target])
        coefficient.plot(places, grouped(row["coefficient"], groups), color=COLOURS[target])
        own.plot(places, shown(row["ambiguity"]), color=COLOURS[target])
    common.plot(places, shown(theory["v"]["ambiguity"]), color="gray", label="a Gaussian's, from one token")
    kinds = [denoiser.target for denoiser in networks]
    for path, denoiser, look in zip(args.ckpt, networks, styles(kinds, "marker", "ox^s")):
        found, look = measure(denoiser, data, vectors, args.t, args.n), look | {"s": 14}
        who = f"network that predicts {denoiser.target}" + f" ({path.parent.name})" * (kinds.count(denoiser.target) > 1)
        coefficient.scatter(places, grouped(found["coefficient"], groups), **look)
        own.scatter(places, shown(found["own"]), **look)
        common.scatter(places, shown(found["v"]), **look, label=who)
        say(f"{path}: predicts {denoiser.target}, t = {args.t:g}: error in its own space {found['own'].mean():.4f} "
            f"(line {theory[denoiser.target]['ambiguity'].mean():.4f}), in v space {found['v'].mean():.4f} "
            f"(line {theory['v']['ambiguity'].mean():.4f})")
    top.set(title="variance of the target (theory alone)", yscale="log")
    coefficient.set(title=f"coefficient of the prediction on z, t = {args.t:g}")
    own.set(title="squared error, in each target's own space", yscale="log")
    common.set(title="squared error, in v space", yscale="log")
    for panel in (top, coefficient, own, common):
        panel.set_xlabel("direction, by falling variance of the data")
        panel.grid(alpha=0.3)
    for panel in (top, common):
        panel.legend(fontsize=8)
    each = f" (means over {len(l) / groups:.3g} neighbouring directions)" * (groups < len(l))
    figure.suptitle(f"{args.cache.name}, patch {patch}: lines are theory, dots are networks{each}")
    save(figure, args.out)
    say(f"-> {args.out}")


if __name__ == "__main__":
    sys.exit(main())
