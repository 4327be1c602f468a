"""What each target asks of a network, for any cache of latents, before anything is trained.

    python -m bench.spectrum data/imagenet256-flux2 --png spectrum.png
    python -m bench.spectrum data/cifar10 --patch 8 --t 0.3 --width 128

A token is what the network sees as one: a patch of --patch x --patch latent pixels, D = patch² * C numbers. The
covariance of tokens, pooled over images and positions, has eigenvalues l, one for each of D directions. Suppose that
tokens were Gaussian. Then, at time t, z = t x + (1-t) e has the variance s = t² l + (1-t)² in such a direction, the
best prediction of a target is a multiple of z, and each target asks, direction by direction:

                                                            x                 v                    eps
    variance     of the target                              l                 l + 1                1
    coefficient  on z, of the best (Bayes) prediction       t l / s           (t l - (1-t)) / s    (1-t) / s
    ambiguity    Var(target | z): what nobody can know      (1-t)² l / s      l / s                t² l / s
    noise        share of the target's variance that is e   0                 1 / (l + 1)          1
    carried      Var(E[e | z]): the noise that z reveals    0                 (1-t)² / s           (1-t)² / s

`carried` is the part of the noise's variance that can be told from z, so that a network whose target holds noise has
to carry it through to its output; between 0 and 1; for x it is nothing. Its sum over directions says how many of a
token's D numbers are noise to be handed on: compare it with the network's narrowest layer. Where the data has no
variance (l -> 0), x asks for nothing at all, v and eps ask for the noise itself, whole.

With --width, also the velocity's error by the best *linear* prediction through so many numbers a token: what few
channels give up.

This says what each target asks. It does not promise who wins: latents are not Gaussian, a network sees all tokens at
once, and a wide one may carry noise with ease.
"""
import pathlib
import sys

import numpy as np
import torch

from bench.chart import COLOURS, MEANING, picture, pyplot, save
from lib.flags import Parser, number
from lib.run import BadInput, program, say
from vae import LatentDataset

LONG = ("variance", "coefficient", "ambiguity")  # columns for all three targets


def tokens(x, patch):
    """Latents (B, C, H, W) -> tokens (B * H/patch * W/patch, patch² * C), in float64."""
    x = x.double().unfold(2, patch, patch).unfold(3, patch, patch)                         # (B, C, rows, cols, p, p)
    return x.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(0, 2)


def spread(count, n):
    """Up to n of `count` rows, from all over a cache (it is sorted by class), in parts of at most 64."""
    picks = np.unique(np.linspace(0, count - 1, min(n, count)).astype(np.int64))
    return np.array_split(picks, -(-len(picks) // 64))


def token_statistics(data, patch, n):
    """(mean (D,), covariance (D, D)) of tokens, in float64, over up to n images from all over a cache."""
    if data.shape[1] % patch or data.shape[2] % patch:
        raise BadInput(f"--patch {patch} does not divide the latents' {data.shape[1]}x{data.shape[2]} grid")
    count, total, outer = 0, 0, 0
    for part in spread(len(data), n):
        x = tokens(data.batch(part, False)[0], patch)                                      # (tokens, D)
        count, total, outer = count + len(x), total + x.sum(0), outer + x.T @ x
    mean = total / count
    return mean, outer / count - torch.outer(mean, mean)


def spectrum(covariance):
    """Eigenvalues l (D,), falling, and eigenvectors (D, D), a column each. What is zero up to rounding is made zero."""
    l, vectors = torch.linalg.eigh(covariance)
    return torch.where(l > 1e-12 * l[-1], l, 0).flip(0), vectors.flip(1)


def asks(l, t):
    """{target: {what it asks: values}} for eigenvalues l (D,), by the table above. 0 < t < 1."""
    s = t * t * l + (1 - t) ** 2
    nothing, one, carried = torch.zeros_like(l), torch.ones_like(l), (1 - t) ** 2 / s
    table = {
        "x": (l, t * l / s, (1 - t) ** 2 * l / s, nothing, nothing),
        "v": (l + 1, (t * l - (1 - t)) / s, l / s, 1 / (l + 1), carried),
        "eps": (one, (1 - t) / s, t * t * l / s, one, carried),
    }
    return {target: dict(zip(("variance", "coefficient", "ambiguity", "noise", "carried"), row))
            for target, row in table.items()}


def squeezed(l, t, width):
    """{target: squared error of the velocity, per number}, by the best linear prediction of the target from z that
    passes only `width` numbers a token: the directions in which it varies least are lost."""
    s, to_v = t * t * l + (1 - t) ** 2, {"x": 1 / (1 - t) ** 2, "v": 1, "eps": 1 / t ** 2}
    errors = {}
    for target, row in asks(l, t).items():
        varies = (row["coefficient"] ** 2 * s).sort().values
        lost = row["ambiguity"].sum() + varies[:max(0, len(l) - width)].sum()
        errors[target] = float(to_v[target] * lost / len(l))
    return errors


def effective_dimension(l):
    """(sum l)² / sum l²: D where all directions vary alike, 1 where a single one does."""
    return float(l.sum() ** 2 / l.square().sum())


def directions_for(l, share):
    """How many of the first directions hold this share of the variance."""
    return min(int((l.cumsum(0) < share * l.sum()).sum()) + 1, len(l))


def draw(path, l, t, name):
    figure, panels = pyplot().subplots(1, 3, figsize=(13, 4.2))
    table, places = asks(l, t), range(1, len(l) + 1)
    for panel, what, title in zip(panels, ("variance", "coefficient", "noise"), (
            "variance of the target", f"best coefficient on z, t = {t:g}", "share of noise; dotted: carried")):
        for target, row in table.items():
            panel.plot(places, row[what], color=COLOURS[target], label=MEANING[target])
        panel.set(xlabel="direction, by falling variance of the data", title=title)
        panel.grid(alpha=0.3)
    carried = table["v"]["carried"]
    panels[2].plot(places, carried, color="black", linestyle=":",
                   label=f"carried through by v and eps, t = {t:g}:\n{carried.sum():.1f} of {len(l)} numbers a token")
    panels[0].set_yscale("log")
    panels[0].set_ylim(bottom=max(float(l.min()) / 2, 1e-5))  # directions without variance fall out of the picture
    for panel in panels[::2]:
        panel.legend(fontsize=8)
    figure.suptitle(name)
    save(figure, path)


@program
def main(argv=None):
    parser = Parser("The spectrum of a cache's tokens, and what each target asks of a network there.")
    parser.add_argument("cache", metavar="CACHE", type=pathlib.Path, help="latents written by vae.py")
    parser.add_argument("--patch", type=number(int, 1), default=1, help="patch size, in latent pixels")
    parser.add_argument("--t", type=number(float, 0.001, 0.999), default=0.3, help="time; training's median is 0.31")
    parser.add_argument("--width", type=number(int, 1), help="numbers a token that pass a network's narrowest layer")
    parser.add_argument("--n", type=number(int, 1), default=10_000, help="images read, at most")
    parser.add_argument("--png", type=picture, help="draw it, to NAME.png")
    args = parser.parse_args(argv)
    data = LatentDataset(args.cache)
    mean, covariance = token_statistics(data, args.patch, args.n)
    l, _ = spectrum(covariance)
    table, D = asks(l, args.t), len(l)
    name = f"{args.cache.name}, patch {args.patch}: tokens of {D} numbers"
    say(f"{name}, {min(args.n, len(data)):,} images of {data.shape[0]}x{data.shape[1]}x{data.shape[2]}")
    say(f"mean {mean.mean():.3f} (spread {mean.std(correction=0):.3f} over the {D} numbers), standard deviation "
        f"{l.mean().sqrt():.3f}\neffective dimension {effective_dimension(l):.1f} of {D}; directions for half of the "
        f"variance: {directions_for(l, 0.5)}, for 99% of it: {directions_for(l, 0.99)}\n")
    columns = [(what, target) for what in LONG for target in table]
    columns += [("noise", "v"), ("carried", "v")]
    rows, line = [table[target][what] for what, target in columns], "{:<12}" + "{:>9}" * len(columns)
    heads = ("" if what in LONG and target != "x" else what.replace("icient", ".") for what, target in columns)
    say(line.format(f"t = {args.t:g}", *heads))
    say(line.format("direction", *(target for _, target in columns)))
    for share in (0, 0.1, 0.25, 0.5, 0.75, 0.9, 1):
        place = round(share * (D - 1))
        say(line.format(f"{place + 1} of {D}", *(f"{row[place]:.3g}" for row in rows)))
    say(line.format("mean of all", *(f"{row.mean():.3g}" for row in rows)))
    say(f"(noise: of x 0, of eps 1; carried: by x 0, by eps as by v)\n\nnoise to carry through at t = {args.t:g}: "
        f"x 0, v and eps {table['v']['carried'].sum():.1f} of a token's {D} numbers")
    if args.width:
        errors = (f"{target} {error:.3f}" for target, error in squeezed(l, args.t, args.width).items())
        say(f"velocity error of the best linear prediction through {args.width} numbers a token: {', '.join(errors)}")
    if args.png:
        draw(args.png, l, args.t, name)
        say(f"-> {args.png}")


if __name__ == "__main__":
    sys.exit(main())
