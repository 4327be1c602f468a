"""What each target asks of a network, for any cache of latents, before anything is trained.

    python -m bench.spectrum data/cifar10 --patch 8 --t 0.3 --width 128

A token, one patch of a latent, holds D = patch² * C numbers. Its covariance has D eigenvectors, the
directions, with eigenvalues λ. If tokens were Gaussian, then along a direction z = t x + (1-t) e
would have variance s = t² λ + (1-t)², the best prediction of any target would be a multiple of z,
and these would be:

                                                    x             v                  eps
    variance     of the target                      λ             λ + 1              1
    coefficient  of the best prediction, on z       t λ / s       (t λ - (1-t)) / s  (1-t) / s
    asked        variance of the best prediction:
                 coefficient² * s                   t² λ² / s     (t λ - (1-t))² / s (1-t)² / s
    asked in v   the same in units of v:
                 asked / slope², slope =            1-t           1                  -t
    ambiguity    variance of the target given z:
                 nobody can predict it              (1-t)² λ / s  λ / s              t² λ / s

Asked and ambiguity add up to the variance. What is asked has to pass through the network, while a
direction of which nothing is asked can be left out at no cost. Targets differ in scale, so compare
them in units of v, the space of the loss. This does not decide which target wins, because latents
are not Gaussian and a wide network can carry all of it.

In units of v every target is v plus a multiple of z. The family edm, ((1-t) x - k t e)/n with n² =
(1-t)² + k t², runs through such multiples: k = 0 is x, k = 1 minus the v of variance-preserving
diffusion. The k that asks least in all is the mean eigenvalue at every t, because the sum of "asked
in v" is (1-t)² / t² times that of s/q² - 2/q + 1/s, with q = n², and least where q is the mean of
s. With --width the k is printed that loses least through a layer of that width.
"""
import math
import statistics
from functools import partial

import numpy as np
import torch

from lib.flags import Parser, number, path
from lib.run import BadInput, log, program
from model import TARGETS, coefficients, edm
from vae import LatentDataset

# 32 times that training draws equally often: logit-normal quantiles.
TIMES = torch.sigmoid(torch.special.ndtri((torch.arange(32) + 0.5) / 32) * 0.8 - 0.8).tolist()


def tokens(x, patch):
    """Latents (B, C, H, W) as float64 tokens (B * H/patch * W/patch, patch² * C)."""
    x = x.double().unfold(2, patch, patch).unfold(3, patch, patch)      # (B, C, rows, cols, p, p)
    return x.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(0, 2)


def evenly_spread(count, n):
    """Up to n of the indices 0 ... count-1, in arrays of at most 64. They are spread over the whole
    cache, which is sorted by class."""
    indices = np.linspace(0, count - 1, min(n, count)).astype(np.int64)
    return np.array_split(indices, math.ceil(len(indices) / 64))


def token_statistics(data, patch):
    """(mean (D,), covariance (D, D)) of the tokens of up to 10,000 latents of a cache, float64.
    Raises BadInput where the patch size does not divide the latents."""
    if data.shape[1] % patch or data.shape[2] % patch:
        raise BadInput(f"--patch {patch} does not divide latents of {data.shape}")
    count, total, outer = 0, 0, 0
    for indices in evenly_spread(len(data), 10_000):
        x = tokens(data.batch(indices)[0], patch)                       # (tokens, D)
        count, total, outer = count + len(x), total + x.sum(0), outer + x.T @ x
    mean = total / count
    return mean, outer / count - torch.outer(mean, mean)


def spectrum(covariance):
    """The eigenvalues (D,) of a covariance (D, D), largest first, and its eigenvectors (D, D), one
    per column."""
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    eigenvalues[eigenvalues < 1e-12 * eigenvalues[-1]] = 0  # rounding makes some negative
    return eigenvalues.flip(0), vectors.flip(1)


def best_prediction(target, eigenvalues, t):
    """The rows of the table above, {name: (D,)}, for eigenvalues (D,) at a time 0 < t < 1. target:
    a name in TARGETS, or a function of t that returns (a, b)."""
    a, b = target(t) if callable(target) else coefficients(target, t)
    s = t ** 2 * eigenvalues + (1 - t) ** 2                             # Var(z): (D,)
    coefficient = (a * t * eigenvalues + b * (1 - t)) / s               # Cov(target, z) / Var(z)
    asked = coefficient ** 2 * s
    slope = a * (1 - t) - b * t  # by which the target moves at fixed z when v moves by one
    return {"variance": a ** 2 * eigenvalues + b ** 2, "coefficient": coefficient, "asked": asked,
            "asked in v": asked / slope ** 2, "ambiguity": slope ** 2 * eigenvalues / s}


def left_out(target, eigenvalues, width):
    """The directions (D - width,) that do not pass a layer of so many numbers per token: the same
    ones at all times, because the narrowest layer of a network does not depend on t, and those of
    which least is asked in the mean of training's times."""
    asked = sum(best_prediction(target, eigenvalues, t)["asked in v"] for t in TIMES)
    return asked.argsort(descending=True)[width:]


def linear_error(target, eigenvalues, width, times):
    """The squared error of the velocity, per number, at each of `times`, of the best linear
    prediction of the target from z through `width` numbers per token (reduced-rank regression)."""
    lost, errors = left_out(target, eigenvalues, width), []
    for t in times:
        ambiguity = best_prediction("v", eigenvalues, t)["ambiguity"].sum()
        asked = best_prediction(target, eigenvalues, t)["asked in v"]   # (D,)
        errors.append(float((ambiguity + asked[lost].sum()) / len(eigenvalues)))
    return errors


def ranges(directions):
    """[1, 2, 3, 7] as "1-3, 7-7"."""
    directions = sorted(directions)
    starts = [i for i in directions if i - 1 not in directions]
    ends = [i for i in directions if i + 1 not in directions]
    return ", ".join(f"{start}-{end}" for start, end in zip(starts, ends))


def print_table(eigenvalues, t):
    last = len(eigenvalues) - 1
    directions = [round(share * last) for share in (0, 0.1, 0.25, 0.5, 0.75, 0.9, 1)]
    heads = [*(direction + 1 for direction in directions), "mean", "sum"]
    log(f"{'direction':<18}" + "".join(f"{head:>10}" for head in heads))
    for target in TARGETS:
        for name, row in best_prediction(target, eigenvalues, t).items():
            numbers = [*row[directions], row.mean(), row.sum()]
            log(f"{target:<6}{name:<12}" + "".join(f"{number:>10.4g}" for number in numbers))


def print_linear_errors(eigenvalues, width, t):
    """Of each target, and of the member of the family with the least mean error."""
    def mean(target):
        return statistics.mean(linear_error(target, eigenvalues, width, TIMES))

    targets = {name: name for name in TARGETS}
    if width < len(eigenvalues):  # otherwise the error is the same for all targets
        k = min(np.linspace(0, 2, 41).tolist(), key=lambda k: mean(partial(edm, k=k)))
        targets[f"edm, k = {k:.2f}"] = partial(edm, k=k)
    times = [t, *((i + 0.5) / 10 for i in range(10))]
    log(f"\nvelocity error of the best linear prediction through {width} numbers per token, mean "
        "over training's times and by t")
    log(f"{'':<18}{'mean':>10}" + "".join(f"{t:>10.4g}" for t in times) + "  directions kept")
    for name, target in targets.items():
        errors = [mean(target), *linear_error(target, eigenvalues, width, times)]
        lost = set((left_out(target, eigenvalues, width) + 1).tolist())
        kept = ranges({*range(1, len(eigenvalues) + 1)} - lost)
        log(f"{name:<18}" + "".join(f"{error:>10.4g}" for error in errors) + f"  {kept}")


@program
def main(argv=None):
    parser = Parser("The spectrum of a cache's tokens, and what each target asks there.")
    add = parser.add_argument
    add("cache", metavar="CACHE", type=path, help="latents written by vae.py")
    add("--patch", type=number(int, 1), default=1, help="patch size, in latent pixels")
    add("--t", type=number(float, 0.001, 0.999), default=0.3, help="time; training's median: 0.31")
    add("--width", type=number(int, 1), help="numbers per token in the network's narrowest layer")
    args = parser.parse_args(argv)
    mean, covariance = token_statistics(LatentDataset(args.cache), args.patch)
    eigenvalues, _ = spectrum(covariance)
    # D where all directions vary alike, 1 where only one varies.
    effective_dimension = eigenvalues.sum() ** 2 / eigenvalues.square().sum()
    below = eigenvalues.cumsum(0) < 0.99 * eigenvalues.sum()
    log(f"{args.cache.name}, patch {args.patch}, t = {args.t:g}: tokens of {len(mean)} numbers")
    log(f"mean {mean.mean():.3f}, standard deviation {eigenvalues.mean().sqrt():.3f}, effective "
        f"dimension {effective_dimension:.1f}; directions for 99% of the variance: "
        f"{below.sum() + 1}\n")
    print_table(eigenvalues, args.t)
    k = eigenvalues.mean()
    least = best_prediction(partial(edm, k=k), eigenvalues, args.t)["asked in v"].sum()
    log(f"edm with k = {k:.3f}, the mean eigenvalue: {least:.4g} asked in v, the least")
    if args.width:
        print_linear_errors(eigenvalues, args.width, args.t)


if __name__ == "__main__":
    raise SystemExit(main())
