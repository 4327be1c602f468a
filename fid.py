"""How good the samples are: FID and Inception Score, measured in memory, on all ranks, and swept over guidance.

    python fid.py --images FOLDER --size 256 --save-ref ref.npz              statistics of real images, to compare with
    torchrun --nproc_per_node=8 fid.py --ckpt out/RUN/last.safetensors --ref ref.npz --cfg 1 2 2.9 --weights ema model
    python fid.py --npz samples.npz --ref VIRTUAL_imagenet256_labeled.npz    ADM's sample file against ADM's statistics

FID compares two sets of images by mean and covariance of the 2048 features that one certain network (lib/inception.py)
gives each of them. Two FIDs compare only where all else is alike: that network's weights, the resize, the precision,
the number of images, the reference. Here they follow torch-fidelity, which the paper used, and a number is printed with
all that it depends on. Each rank scores what it draws, as it draws it: no image goes to disk.

Top to bottom: statistics, FID and IS; the reference; images to score; the score of a network; the program.
"""
import hashlib
import itertools
import os
import pathlib
import sys
import time
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from lib.flags import Parser, interval, number, sampling_flags
from lib.images import SUFFIXES, open_image
from lib.inception import CLASSES, FEATURES, load_inception
from lib.npz import image_rows, image_shape, read_statistics, write_statistics
from lib.prefetch import prefetched
from lib.run import BadInput, meet, pick_device, program, rank, say, world_size
from lib.table import append_rows, read_rows
from model import TARGETS
from sample import (compile_net, generate, load_denoiser, open_vae, pick_classes, rank_batches, set_floor, use_bf16,
                    warn_if_young)
from vae import center_crop, image_tensor

# ---------------------------------------------------------------------------------------------------------------------
# Statistics, FID and IS

class Statistics:
    """Sums over the images 0 ... n-1, in float64, that FID and IS follow from; no image, feature or logit is kept.

    IS is a mean over 10 parts of the images, shuffled by numpy's RandomState(2020). That shuffle is known beforehand,
    and so is the part of each image.
    """

    def __init__(self, n, device="cpu", features=FEATURES, classes=CLASSES):
        device = "cpu" if torch.device(device).type == "mps" else device  # Apple's GPUs have no float64
        zeros = lambda *shape: torch.zeros(*shape, dtype=torch.float64, device=device)
        self.sum, self.outer = zeros(features), zeros(features, features)
        self.count, self.p, self.plogp = zeros(10), zeros(10, classes), zeros(10)            # by part
        self.n, self.part = n, torch.empty(n, dtype=torch.int8)
        shuffled = np.random.RandomState(2020).permutation(n)
        for i in range(10):
            self.part[shuffled[i * n // 10:(i + 1) * n // 10]] = i

    def update(self, features, logits, indices):
        """Add features (B, 2048) and logits (B, 1008) of the images with these indices, a sequence of B ints."""
        features, logits = (x.to(self.sum.device).double() for x in (features, logits))
        self.sum += features.sum(0)
        self.outer += features.T @ features
        log_p = logits.log_softmax(1)
        member = F.one_hot(self.part[list(indices)].long(), 10).T.to(log_p)                  # (10, B)
        self.count += member.sum(1)
        self.p += member @ log_p.exp()
        self.plogp += member @ torch.xlogy(log_p.exp(), log_p.exp()).sum(1)

    def all_reduce(self):
        """Add up the sums of all ranks, by way of the CPU: no GPU waits for another."""
        if dist.is_initialized():
            for tensor in (self.sum, self.outer, self.count, self.p, self.plogp):
                total = tensor.cpu()
                dist.all_reduce(total)
                tensor.copy_(total)

    def mean_and_covariance(self):
        """mu (2048,) and the unbiased sigma (2048, 2048), float64, on the CPU."""
        mu = self.sum.cpu() / self.n
        return mu, (self.outer.cpu() - self.n * torch.outer(mu, mu)) / (self.n - 1)

    def fid(self, reference):
        return frechet_distance(*self.mean_and_covariance(), reference.mu, reference.sigma, reference.root)

    def inception_score(self):
        """exp(mean of KL(p(class | image) || p(class))), averaged over the parts (arXiv 1606.03498); nan if n < 10."""
        p = self.p / self.count[:, None]
        return float((self.plogp / self.count - torch.xlogy(p, p).sum(1)).exp().mean())


def inception_score(logits):
    """Inception Score of logits (N, classes), N >= 10, in the order of the images: torch-fidelity's mean."""
    logits = torch.as_tensor(logits)
    statistics = Statistics(len(logits), logits.device, 0, logits.shape[1])
    statistics.update(logits.new_zeros(len(logits), 0), logits, range(len(logits)))
    return statistics.inception_score()


def covariance_root(sigma):
    """R (d, rank) with R Rᵀ = sigma (d, d). Directions without variance, up to rounding, are left out."""
    values, vectors = torch.linalg.eigh(sigma)
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] * values[kept].sqrt()


def frechet_distance(mu1, sigma1, mu2, sigma2, root2=None):
    """|mu1 - mu2|² + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^½), between two Gaussians (arXiv 1706.08500), in float64.

    sigma1 sigma2 = sigma1 R2 R2ᵀ is not symmetric; R2ᵀ sigma1 R2 is, with the same eigenvalues but for 0. So no
    general matrix root is needed, and singular covariances need no care. root2: R2, where known beforehand.
    """
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(x, dtype=torch.float64) for x in (mu1, sigma1, mu2, sigma2))
    root2 = covariance_root(sigma2) if root2 is None else root2
    product = root2.T @ sigma1 @ root2
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    return float((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross)


# ---------------------------------------------------------------------------------------------------------------------
# The reference: mean and covariance of the features of real images

class Reference(NamedTuple):
    mu: torch.Tensor      # (2048,) float64
    sigma: torch.Tensor   # (2048, 2048) float64
    root: torch.Tensor    # covariance_root(sigma)
    hash: str             # of mu and sigma: it names the reference wherever a score is written
    about: dict           # what the file says of its images, as texts: size ("256x256"), count, crop

    def __str__(self):
        about = (f"{name} {self.about.get(name, 'unknown')}" for name in ("size", "count", "crop"))
        return f"reference {self.hash} ({', '.join(about)})"


def load_reference(path):
    """The Reference in any npz with `mu` and `sigma`: ADM's, JiT's or one of --save-ref. Raises BadInput."""
    mu, sigma, about = read_statistics(path, FEATURES)
    mu, sigma = torch.from_numpy(mu), torch.from_numpy(sigma)
    return Reference(mu, sigma, covariance_root(sigma), about.pop("hash"), about)


def check_size(reference, size, force=False):
    """Raises BadInput where the reference is known to be of another image size ("256x256") than what is scored."""
    known = reference.about.get("size", size)
    if known != size and not force:
        raise BadInput(f"--ref is of {known} images, those to score are {size}: make another (--save-ref), or --force")


# ---------------------------------------------------------------------------------------------------------------------
# Images to score: (how many, "WIDTHxHEIGHT", this rank's batches of indices and uint8 images (B, 3, H, W))

def spread(path, count, n):
    """Which n of `count` images: evenly spaced, since the first n of sorted class folders would cover few classes."""
    if not 2 <= (n or count) <= count:
        raise BadInput(f"{path}: {count} images found, {n or 2} needed")
    return [i * count // (n or count) for i in range(n or count)]


def batched(n, batch, read):
    """Batches of this rank's share of the images 0 ... n-1, from read(indices), which yields them in order."""
    batches = rank_batches(n, batch)
    images = read(itertools.chain(*batches))
    for indices in batches:
        yield indices, torch.stack(list(itertools.islice(images, len(indices))))


def folder_images(folder, size, n, batch):
    """All images below a folder, center-cropped to `size` where given; else all must be of one size."""
    hidden = lambda path: any(part.startswith(".") for part in path.relative_to(folder).parts)
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file() and not hidden(p))
    paths = [paths[i] for i in spread(folder, len(paths), n)]

    def read(i, shape=None):
        try:
            image = image_tensor(center_crop(open_image(paths[i]), size) if size else open_image(paths[i]))
        except Exception as error:  # a damaged image fails in any way it likes
            raise BadInput(f"{paths[i]}: cannot be read as an image ({error})") from None
        if shape and image.shape != shape:
            raise BadInput(f"{paths[i]}: its size is not that of {paths[0]}: crop all alike with --size")
        return image
    shape = read(0).shape
    batches = batched(len(paths), batch, lambda mine: prefetched(lambda i: read(i, shape), mine, 8, 2 * batch))
    return len(paths), f"{shape[2]}x{shape[1]}", batches


def npz_images(path, n, batch):
    """ADM's `arr_0`, uint8 (N, H, W, 3), read as a stream."""
    count, height, width = image_shape(path)
    rows = spread(path, count, n)
    batches = batched(len(rows), batch, lambda mine: image_rows(path, (rows[i] for i in mine)))
    return len(rows), f"{width}x{height}", ((indices, images.permute(0, 3, 1, 2)) for indices, images in batches)


def score(batches, n, inception):
    """The Statistics of images 0 ... n-1, all ranks' together, from this rank's batches of them."""
    device = inception.fc.weight.device
    statistics = Statistics(n, device)
    with tqdm(total=n, unit="image", disable=rank() > 0 or None) as bar:
        for indices, images in batches:
            statistics.update(*inception(images.to(device)), indices)
            bar.update(min(len(indices) * world_size(), n - bar.n))
    statistics.all_reduce()
    return statistics


# ---------------------------------------------------------------------------------------------------------------------
# The score of a network, one row of a table

SETTINGS = ("network", "target", "weights", "step", "cfg", "interval", "steps", "method", "nfe", "t_eps", "classes",
            "vae", "seed", "precision", "n", "reference")
COLUMNS = (*SETTINGS, "fid", "inception_score", "seconds")


def describe(denoiser, vae, reference, n, seed=0, cfg=1.0, interval=(0.1, 1.0), steps=50, method="heun",
             precision="auto", classes=None, weights="ema", step=None):
    """All that a network's score depends on: the SETTINGS of its row, as texts. `network` is a hash of the weights."""
    state = denoiser.net.state_dict()
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(state[name].float().cpu().numpy().tobytes())
    return {"network": digest.hexdigest()[:8], "target": denoiser.target, "weights": weights,
            "step": "" if step is None else str(step), "cfg": f"{cfg:g}",
            "interval": "-" if cfg == 1 else f"{interval[0]:g},{interval[1]:g}",  # without guidance it means nothing
            "steps": str(steps), "method": method, "nfe": str(2 * steps - 1 if method == "heun" else steps),
            "t_eps": f"{denoiser.t_eps:g}", "classes": " ".join(map(str, classes)) if classes else "all", "vae": vae.id,
            "seed": str(seed), "n": str(n),
            "precision": "bf16" if use_bf16(precision, next(denoiser.parameters()).device) else "fp32",
            "reference": reference.hash}


def results(statistics, inception, reference, start):
    known = statistics.n >= 10 and bool(inception.fc.weight.any())  # some weight files come without the classifier
    return {"fid": f"{statistics.fid(reference):.6f}", "seconds": f"{time.monotonic() - start:.1f}",
            "inception_score": f"{statistics.inception_score():.6f}" if known else "n/a"}


def evaluate(denoiser, vae, inception, reference, n, seed=0, cfg=1.0, interval=(0.1, 1.0), steps=50, method="heun",
             batch=64, precision="auto", classes=None, weights="ema", step=None):
    """Draw n images and score them. Returns a row of the table, {column: text}. To be called by all ranks alike.

    classes: image i is of class classes[i % len(classes)]; None takes all. weights, step: only to be noted in the row.
    """
    start = time.monotonic()
    row = describe(denoiser, vae, reference, n, seed, cfg, interval, steps, method, precision, classes, weights, step)
    labels = classes or range(denoiser.net.num_classes)
    batches = ((indices, generate(denoiser, vae, indices, labels, seed, cfg, interval, steps, method, precision))
               for indices in rank_batches(n, batch))
    return row | results(score(batches, n, inception), inception, reference, start)


def result_line(row):
    settings = ", ".join(f"{name} {text}" for name, text in row.items() if name not in ("n", "fid", "inception_score"))
    return f"FID-{row['n']} {row['fid']}  IS {row['inception_score']}  ({settings})"


def warn_about(n):
    if n != 50000:
        say(f"warning: FID-{n} is not comparable with FID-50K: fewer images give a higher FID")
    if n <= FEATURES:
        say(f"warning: {n} images for {FEATURES} features: the covariance is singular, the FID rough")


# ---------------------------------------------------------------------------------------------------------------------
# The program

def parse(argv):
    parser = Parser("FID and Inception Score of a checkpoint's samples, of a folder or of an npz file.")
    what = parser.add_argument_group("what is scored").add_mutually_exclusive_group(required=True)
    what.add_argument("--ckpt", type=pathlib.Path, help="checkpoint, export or published file: samples drawn from it")
    what.add_argument("--images", type=pathlib.Path, help="folder of images, also in folders inside it")
    what.add_argument("--npz", type=pathlib.Path, help="ADM's sample file: arr_0, uint8 (N, H, W, 3)")
    how = parser.add_argument_group("against what")
    how.add_argument("--ref", type=pathlib.Path, help="npz with mu and sigma: ADM's, JiT's or one of --save-ref")
    how.add_argument("--save-ref", type=pathlib.Path, metavar="OUT.npz", help="write statistics of --images or --npz")
    how.add_argument("--n", type=number(int, 2, 10**7), help="images (default: 50000 for --ckpt, else all)")
    how.add_argument("--size", type=number(int, 1, 4096), help="center-crop --images to this many pixels")
    how.add_argument("--force", action="store_true", help="compare images of different sizes")
    how.add_argument("--inception", type=pathlib.Path, help="Inception's weights (default: torch's cache, or download)")
    draw = parser.add_argument_group("what is drawn from --ckpt; lists make a sweep")
    draw.add_argument("--weights", nargs="+", choices=("ema", "ema2", "model"), default=["ema"], help="which weights")
    draw.add_argument("--cfg", nargs="+", type=number(float, 0, 1000), help="guidance scales, 1 = none")
    draw.add_argument("--interval", nargs="+", type=interval, metavar="LOW,HIGH", help="times t that are guided")
    draw.add_argument("--csv", type=pathlib.Path, help="table of scores (default: fid.csv beside the checkpoint)")
    sampling_flags(parser, TARGETS)
    return parser.parse_args(argv)


@program
def main(argv=None):
    args = parse(argv)
    out = args.save_ref
    if not args.ref and (args.ckpt or not out):
        raise BadInput("nothing to compare with: give --ref FILE; --images or --npz with --save-ref OUT.npz makes one")
    if out and (args.ckpt or out.suffix != ".npz" or not os.access(out.absolute().parent, os.W_OK)):
        raise BadInput(f"--save-ref {out}: expected NAME.npz, in a folder that exists; beside --images or --npz")
    meet()
    device = pick_device()
    inception = load_inception(args.inception, device)
    if args.ref:
        reference = load_reference(args.ref)
        say(reference)
    if not args.ckpt:
        start, crop = time.monotonic(), "center" if args.images and args.size else "none"
        n, size, batches = (folder_images(args.images, args.size, args.n, args.batch) if args.images else
                            npz_images(args.npz, args.n, args.batch))
        if args.ref:
            check_size(reference, size, args.force)
        statistics = score(batches, n, inception)
        if out and rank() == 0:
            digest = write_statistics(out, *statistics.mean_and_covariance(), size=size, count=n, crop=crop)
            say(f"reference {digest} (size {size}, count {n}, crop {crop}) -> {out}")
        if args.ref:
            warn_about(n)
            row = {"source": str(args.images or args.npz), "size": size, "crop": crop, "n": str(n)}
            say(result_line(row | {"reference": reference.hash} | results(statistics, inception, reference, start)))
        return
    n, table, vae = args.n or 50000, args.csv or args.ckpt.with_name("fid.csv"), None
    warn_about(n)
    denoisers = {name: load_denoiser(args.ckpt, name, device, args.target, args.input_size) for name in args.weights}
    for weights, denoiser in denoisers.items():
        settings, net = denoiser.settings, denoiser.net
        set_floor(denoiser, args.t_eps)
        warn_if_young(settings, weights)
        vae = vae or open_vae(settings, net.in_channels, args.vae, device)
        check_size(reference, "x".join([str(net.input_size * vae.stride)] * 2), args.force)
        classes = pick_classes(args.classes, settings.get("class_names"), net.num_classes) if args.classes else None
        if n >= 1000:  # compiling takes up to a minute or two
            compile_net(net, device)
        known = read_rows(table, COLUMNS)  # before any rank can have added to it
        append_rows(table, COLUMNS, [])    # fails here, if it has to
        cells = itertools.product(args.cfg or [settings["cfg"]], args.interval or [settings["interval"]])
        for cfg, times in dict.fromkeys((cfg, (0.0, 1.0) if cfg == 1 else times) for cfg, times in cells):
            how = dict(n=n, seed=args.seed, cfg=cfg, interval=times, steps=args.steps, method=args.method,
                       precision=args.precision, classes=classes, weights=weights, step=settings.get("step"))
            wanted = describe(denoiser, vae, reference, **how)
            row = next((row for row in known if wanted.items() <= row.items()), None)
            if row is None:
                row = evaluate(denoiser, vae, inception, reference, batch=args.batch, **how)
                append_rows(table, COLUMNS, [row])
            say(result_line(row))


if __name__ == "__main__":
    sys.exit(main())
