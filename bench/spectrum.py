"""What each target asks of a network, for any cache of latents, before anything is trained.

    python -m bench.spectrum data/cifar10 --patch 8 --t 0.3 --width 128 --png spectrum.png

A token, what the network sees as one, has D = patch² * C numbers, and its covariance an eigenvalue
λ in each of D directions. If tokens were Gaussian, z = t x + (1-t) e would have the variance s =
t² λ + (1-t)² there, the best prediction would be a multiple of z, and this is what targets ask:

                                                      x             v                  eps
    variance     of the target                        λ             λ + 1              1
    coefficient  on z, of the best prediction         t λ / s       (t λ - (1-t)) / s  (1-t) / s
    ambiguity    Var(target | z): nobody can know it  (1-t)² λ / s  λ / s              t² λ / s
    noise        share of the variance that is e's    0             1 / (λ + 1)        1
    carried      Var(E[e | z]): what z tells of e     0             (1-t)² / s         (1-t)² / s

A network whose target holds noise has to carry through to its output what z tells of that noise.
The sum of `carried` says how many of a token's D numbers that takes: compare it with the narrowest
layer. It does not promise who wins: latents are not Gaussian, and a wide network may carry it all.
"""
import math
import pathlib

import numpy as np
import torch

from bench.chart import picture
from lib.flags import Parser, number
from lib.run import BadInput, program, say
from model import TARGETS, slope
from vae import LatentDataset


def tokens(x, patch):
    """Latents (B, C, H, W) -> tokens (B * H/patch * W/patch, patch² * C), in float64."""
    x = x.double().unfold(2, patch, patch).unfold(3, patch, patch)      # (B, C, rows, cols, p, p)
    return x.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(0, 2)


def spread(count, n):
    """Up to n of `count` rows, from all over a cache (it is sorted by class), in parts of 64."""
    rows = np.linspace(0, count - 1, min(n, count)).astype(np.int64)
    return np.array_split(rows, math.ceil(len(rows) / 64))


def token_statistics(data, patch, n):
    """(mean (D,), covariance (D, D)) of tokens, in float64, of up to n images of a cache."""
    if data.shape[1] % patch or data.shape[2] % patch:
        raise BadInput(f"--patch {patch} does not divide latents of {data.shape}")
    count, total, outer = 0, 0, 0
    for rows in spread(len(data), n):
        x = tokens(data.batch(rows)[0], patch)                          # (tokens, D)
        count, total, outer = count + len(x), total + x.sum(0), outer + x.T @ x
    mean = total / count
    return mean, outer / count - torch.outer(mean, mean)


def spectrum(covariance):
    """Eigenvalues (D,), falling, and eigenvectors (D, D), a column each."""
    values, vectors = torch.linalg.eigh(covariance)
    values[values < 1e-12 * values[-1]] = 0  # zero up to rounding
    return values.flip(0), vectors.flip(1)


def asks(values, t):
    """{target: {what it asks: (D,)}}, of any target a x + b e, for eigenvalues (D,), 0 < t < 1."""
    t = torch.as_tensor(t, dtype=values.dtype)
    s = t ** 2 * values + (1 - t) ** 2
    table = {}
    for target, (a, b) in TARGETS.items():
        variance = a ** 2 * values + b ** 2
        covariance = a * t * values + b * (1 - t)  # of the target and z
        noise = carried = torch.zeros_like(s)
        if b:  # else the variance may be 0
            noise, carried = b ** 2 / variance, (1 - t) ** 2 / s
        # At fixed z the target moves by `slope` when v moves by one, and Var(v | z) is λ / s.
        ambiguity = slope(target, t) ** 2 * values / s
        table[target] = {"variance": variance, "coefficient": covariance / s,
                         "ambiguity": ambiguity, "noise": noise, "carried": carried}
    return table


def squeezed(values, t, width):
    """{target: squared error of the velocity, per number}, by the best linear prediction of the
    target from z that passes only `width` numbers a token."""
    t, errors = torch.as_tensor(t, dtype=values.dtype), {}
    s = t ** 2 * values + (1 - t) ** 2
    for target, row in asks(values, t).items():
        # The directions in which the prediction varies least are those that do not pass.
        varies = (row["coefficient"] ** 2 * s).sort().values
        lost = row["ambiguity"].sum() + varies[:max(0, len(s) - width)].sum()
        errors[target] = float(lost / slope(target, t) ** 2 / len(s))  # an error of v
    return errors


def effective_dimension(values):
    """(sum λ)² / sum λ²: D where all directions vary alike, 1 where a single one does."""
    return float(values.sum() ** 2 / values.square().sum())


def directions_for(values, share):
    """How many of the first directions hold this share of the variance."""
    short = values.cumsum(0) < share * values.sum()
    return min(int(short.sum()) + 1, len(values))


def show(table, D):
    """Print the table, at a few of D directions."""
    places = [round(share * (D - 1)) for share in (0, 0.1, 0.25, 0.5, 0.75, 0.9, 1)]
    heads = [place + 1 for place in places] + ["mean", "sum"]
    say(f"{'direction':<18}" + "".join(f"{head:>10}" for head in heads))
    for target, row in table.items():
        for what, values in row.items():
            numbers = [*values[places], values.mean(), values.sum()]
            say(f"{target:<6}{what:<12}" + "".join(f"{number:>10.4g}" for number in numbers))


@program
def main(argv=None):
    parser = Parser("The spectrum of a cache's tokens, and what each target asks there.")
    add = parser.add_argument
    add("cache", metavar="CACHE", type=pathlib.Path, help="latents written by vae.py")
    add("--patch", type=number(int, 1), default=1, help="patch size, in latent pixels")
    add("--t", type=number(float, 0.001, 0.999), default=0.3, help="time; training's median: 0.31")
    add("--width", type=number(int, 1), help="numbers a token in the network's narrowest layer")
    add("--n", type=number(int, 1), default=10_000, help="images read, at most")
    add("--png", type=picture, help="draw it, to NAME.png")
    args = parser.parse_args(argv)
    data, t = LatentDataset(args.cache), args.t
    mean, covariance = token_statistics(data, args.patch, args.n)
    values, _ = spectrum(covariance)
    table, D = asks(values, t), len(values)
    name = f"{args.cache.name}, patch {args.patch}, t = {t:g}: tokens of {D} numbers"
    say(f"{name}\nmean {mean.mean():.3f}, standard deviation {values.mean().sqrt():.3f}, effective "
        f"dimension {effective_dimension(values):.1f} of {D}; directions for half of the variance: "
        f"{directions_for(values, 0.5)}, for 99% of it: {directions_for(values, 0.99)}\n")
    show(table, D)
    if args.width:
        say(f"velocity error of the best linear prediction through {args.width} numbers a token:")
        for target, error in squeezed(values, t, args.width).items():
            say(f"{target:<6}{error:.3f}")
    if args.png:
        from bench.geometry import draw  # which needs this file
        panels = {what: (what, None) for what in ("variance", "coefficient", "noise", "carried")}
        draw(args.png, name, panels, table)


if __name__ == "__main__":
    raise SystemExit(main())
