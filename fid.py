"""How good samples are: FID, Inception Score and MMDs, measured in memory and on all ranks.

    python fid.py --images FOLDER --size 256 --save-ref ref.npz     statistics of real images
    torchrun --nproc_per_node=8 fid.py --ckpt out/RUN/last.safetensors --ref ref.npz \\
        --cfg 1 2 2.9 --weights ema model                           a sweep, one row per setting
    python fid.py --npz samples.npz --ref VIRTUAL_imagenet256_labeled.npz       ADM's files
    python fid.py --images FOLDER --size 256 --ref ref.npz --vae flux2          the codec alone

FID compares two sets of images by the mean and covariance of 2048 features, which one particular
network (lib/inception.py) computes for each image. Two FIDs are comparable only if that network's
weights, the resize, the precision, the number of images and the reference are the same. Here they
follow torch-fidelity, as in the paper, and a score is stored with everything it depends on.
"""
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import sys
import time
import zipfile

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from lib.checkpoint import load_denoiser, weights_hash
from lib.features import load_features
from lib.files import atomic
from lib.flags import Parser, interval, number, path
from lib.images import folder_images, subset
from lib.inception import CLASSES, FEATURES, load_inception
from lib.log import append_row, read_table
from lib.run import BadInput, compile_net, from_rank_0, gather_objects, log, pick_device
from lib.run import program, rank, rank_batches, use_bf16, warn, world_size
from sample import Sampling, describe_classes, evaluations, generate, pick_classes
from sample import sampling_flags, with_floor
from vae import from_uint8, load_vae, open_vae, to_uint8

METRICS = ("fid", "mmd", "cmmd", "dino")
CLIP = "openai/clip-vit-large-patch14-336"       # for cmmd
DINO = "facebook/dinov2-with-registers-large"    # for dino


# -------------------------------------------------------------------------------------------------
# FID, Inception Score and MMD

class Statistics:
    """Sums over images 0 ... n-1 in float64, from which FID and the Inception Score follow. Neither
    images nor features nor logits are kept."""

    def __init__(self, n, device="cpu", features=FEATURES, classes=CLASSES):
        if torch.device(device).type == "mps":  # Apple's GPUs have no float64
            device = "cpu"
        double = dict(dtype=torch.float64, device=device)
        self.sum = torch.zeros(features, **double)                      # for FID
        self.outer = torch.zeros(features, features, **double)
        self.p = torch.zeros(10, classes, **double)                     # for IS, per split
        self.plogp = torch.zeros(10, **double)
        # IS is a mean over 10 splits of the images, which torch-fidelity shuffles beforehand with
        # RandomState(2020). That permutation is known, and so is the split of every image.
        self.n, self.split = n, torch.empty(n, dtype=torch.int64)
        shuffled = np.random.RandomState(2020).permutation(n)
        for i in range(10):
            self.split[shuffled[i * n // 10:(i + 1) * n // 10]] = i
        self.count = self.split.bincount(minlength=10).to(self.sum)     # (10,)

    def update(self, features, logits, indices):
        """Add features (B, 2048) and logits (B, 1008) of the images with these indices (B ints)."""
        features = features.to(self.sum.device).double()                # (B, 2048)
        log_p = logits.to(self.sum.device).double().log_softmax(1)      # (B, 1008)
        p = log_p.exp()
        self.sum += features.sum(0)
        self.outer += features.T @ features                             # (2048, 2048)
        member = F.one_hot(self.split[list(indices)], 10).T.to(p)       # (10, B)
        self.p += member @ p                                            # (10, 1008)
        self.plogp += member @ torch.xlogy(p, p).sum(1)                 # (10,)

    def all_reduce(self):
        """Add up the sums of all ranks, by way of the CPU, so that no GPU waits for another."""
        if dist.is_initialized():
            for tensor in (self.sum, self.outer, self.p, self.plogp):
                total = tensor.cpu()
                dist.all_reduce(total)
                tensor.copy_(total)

    def mean_and_covariance(self):
        """The mean (2048,) and the unbiased covariance (2048, 2048), float64 on the CPU."""
        mu = self.sum.cpu() / self.n
        return mu, (self.outer.cpu() - self.n * torch.outer(mu, mu)) / (self.n - 1)

    def inception_score(self) -> float:
        """exp(mean KL(p(class | image) || p(class))), averaged over the splits (arXiv 1606.03498).
        """
        p = self.p / self.count[:, None]                                # (10, 1008)
        kl = self.plogp / self.count - torch.xlogy(p, p).sum(1)         # (10,)
        return float(kl.exp().mean())


def inception_score(logits: torch.Tensor) -> float:
    """The Inception Score of logits (N, classes), N >= 10, in the order of the images."""
    n, classes = logits.shape
    statistics = Statistics(n, features=0, classes=classes)
    statistics.update(torch.zeros(n, 0), torch.as_tensor(logits), range(n))
    return statistics.inception_score()


def frechet_distance(mu1, sigma1, mu2, sigma2) -> float:
    """|mu1 - mu2|² + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^½), the Fréchet distance between two
    Gaussians (arXiv 1706.08500), in float64."""
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(part, dtype=torch.float64)
                                for part in (mu1, sigma1, mu2, sigma2))
    # With sigma2 = R Rᵀ, the nonzero eigenvalues of sigma1 sigma2 are those of Rᵀ sigma1 R. That is
    # symmetric, so no general matrix root is needed, and singular covariances are no problem.
    values, vectors = torch.linalg.eigh((sigma2 + sigma2.T) / 2)
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    root = vectors[:, kept] * values[kept].sqrt()                       # R (d, rank)
    product = root.T @ sigma1 @ root                                    # (rank, rank)
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    return float((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross)


def mmd(a, b) -> float:
    """1000 times the squared maximum mean discrepancy between embeddings (N, D) and (M, D), as CMMD
    (arXiv 2401.09603) defines it: mean k(a, a) + mean k(b, b) - 2 mean k(a, b), where the means
    include the pairs of an embedding with itself. k is a Gaussian kernel of width 10, and all
    embeddings are first scaled to length 1."""
    a, b = (F.normalize(torch.as_tensor(rows).double(), dim=1) for rows in (a, b))

    def mean_kernel(p, q):  # exp(-|p - q|² / (2 * 10²)), and |p - q|² = 2 - 2 p·q
        sums = [torch.exp((part @ q.T - 1) / 100).sum() for part in p.split(1000)]
        return sum(sums) / (len(p) * len(q))

    return float(1000 * (mean_kernel(a, a) + mean_kernel(b, b) - 2 * mean_kernel(a, b)))


# -------------------------------------------------------------------------------------------------
# Reference statistics and ADM's sample files, both npz

@contextlib.contextmanager
def one_line_errors(file):
    """Whatever is wrong with an npz file from elsewhere becomes a BadInput."""
    try:
        yield
    except Exception as error:  # a damaged zip raises errors of many kinds
        raise BadInput(f"{file}: not a whole npz file with the arrays expected "
                       f"({str(error)[:150]})") from None


@dataclasses.dataclass
class Reference:
    """What scores are measured against."""
    mu: torch.Tensor     # (2048,) float64
    sigma: torch.Tensor  # (2048, 2048) float64
    hash: str            # its name in tables
    embeddings: dict     # {metric: (N, E) fp16} for "mmd", "cmmd", "dino", as far as they are known
    about: dict          # what is known of its images (size, count, crop) and extractors

    def __str__(self):
        facts = (f"{name} {self.about.get(name, 'unknown')}" for name in ("size", "count", "crop"))
        return f"reference {self.hash} ({', '.join(facts)})"

    def check_size(self, size):
        """Raises BadInput where this is known to be of images of another size ("WIDTHxHEIGHT")."""
        if self.about.get("size", size) != size:
            raise BadInput(f"--ref is of {self.about['size']} images, those to score are {size}")


def sha256(tensors):
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()


def load_reference(file, metrics=("fid",)) -> Reference:
    """Read any npz with `mu` and `sigma`: ADM's, JiT's, or one of --save-ref, which may hold
    embeddings for other metrics. Raises BadInput where something the metrics need is missing."""
    with one_line_errors(file), np.load(file, allow_pickle=False) as arrays:
        mu, sigma = (torch.from_numpy(np.ascontiguousarray(arrays[name], np.float64))
                     for name in ("mu", "sigma"))
        if mu.shape != (FEATURES,) or sigma.shape != (FEATURES, FEATURES):
            raise ValueError(f"mu {tuple(mu.shape)}, sigma {tuple(sigma.shape)}, expected "
                             f"{FEATURES} features")
        if not (mu.isfinite().all() and sigma.isfinite().all()):
            raise ValueError("values that are not finite")
        embeddings = {name: torch.from_numpy(arrays[name]) for name in METRICS if name in arrays}
        about = json.loads(str(arrays["meta"])) if "meta" in arrays else {}  # only ours have it
    missing = [name for name in metrics if name not in ("fid", *embeddings)]
    if missing:
        raise BadInput(f"--ref {file}: no embeddings for {' '.join(missing)}: make it again with "
                       f"--images FOLDER --save-ref and --metrics fid {' '.join(missing)}")
    # Embeddings of CLIP and DINOv2 add a second part, since mu and sigma do not depend on those.
    others = [rows for name, rows in sorted(embeddings.items()) if name in ("cmmd", "dino")]
    name = sha256([mu, sigma])[:12] + (f"-{sha256(others)[:6]}" if others else "")
    return Reference(mu, sigma, name, embeddings, about)


def save_reference(file, mu, sigma, embeddings=None, **about) -> Reference:
    """Write what load_reference reads, and read it; `about` goes into the array `meta` as JSON."""
    arrays = {"mu": mu, "sigma": sigma} | (embeddings or {})
    with atomic(file) as temporary, open(temporary, "wb") as stream:
        np.savez(stream, meta=json.dumps(about, sort_keys=True),
                 **{name: np.asarray(array) for name, array in arrays.items()})
    return load_reference(file)


def npz_images(file, n, batch):
    """Read ADM's sample file, `arr_0` uint8 (N, H, W, 3), image by image: 50,000 of 256² are 10 GB.
    n: how many, spread over the file; None for all. Returns what lib.images.folder_images does.
    Raises BadInput."""
    with one_line_errors(file):
        stream = zipfile.ZipFile(file).open("arr_0.npy")
        np.lib.format.read_magic(stream)
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(stream)
        if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8 or is_fortran:
            raise ValueError(f"arr_0 is {dtype} {shape}, expected uint8 (N, H, W, 3) row by row")
    count, height, width, _ = shape
    start, rows = stream.tell(), subset(file, count, n)

    def read_batches():
        for indices in rank_batches(len(rows), batch):
            images = torch.empty(len(indices), height, width, 3, dtype=torch.uint8)
            with one_line_errors(file):
                for image, i in zip(images.numpy(), indices):
                    stream.seek(start + rows[i] * image.nbytes)
                    image.flat = np.frombuffer(stream.read(image.nbytes), np.uint8, image.size)
            yield indices, images.permute(0, 3, 1, 2)                   # (B, 3, H, W)
    return len(rows), f"{width}x{height}", read_batches()


# -------------------------------------------------------------------------------------------------
# Feature extractors, and what they make of images

def load_extractors(metrics, inception=None, clip=CLIP, dino=DINO, device="cpu"):
    """{metric: network}, where fid and mmd share Inception. inception: its weight file, by default
    downloaded. clip, dino: Hugging Face ids or folders. Raises BadInput where weights are missing
    or cannot be used."""
    extractors = {}
    if "fid" in metrics or "mmd" in metrics:
        network = load_inception(inception, device)
        extractors = {metric: network for metric in ("fid", "mmd") if metric in metrics}
    for metric, name in (("cmmd", clip), ("dino", dino)):
        if metric in metrics:
            extractors[metric] = load_features(name, device=device)
    return extractors


def score(batches, n, extractors):
    """Embed images 0 ... n-1, on all ranks together.

    batches: this rank's (indices, uint8 images (B, 3, H, W)). extractors: see load_extractors.
    Returns {"fid": Statistics, any other metric: embeddings (at most 10,000, E) fp16}.
    """
    device = next(next(iter(extractors.values())).parameters()).device
    results, embeddings = {}, {metric: {} for metric in extractors if metric != "fid"}
    if "fid" in extractors:
        classes, features = extractors["fid"].fc.weight.shape
        results["fid"] = Statistics(n, device, features, classes)
    chosen = set(subset("samples", n, min(n, 10_000)))  # the images that MMDs are computed from
    with tqdm(total=n, unit="image", disable=rank() > 0 or None) as bar:
        for indices, images in batches:
            images = images.to(device)
            # Metrics may share a network, which then sees the images once.
            outputs = {network: network(images) for network in set(extractors.values())}
            if "fid" in extractors:
                results["fid"].update(*outputs[extractors["fid"]], indices)
            for metric, rows in embeddings.items():
                embedded = outputs[extractors[metric]][0].half().cpu()  # (B, E)
                # Cloned, because a view would keep its whole batch in memory.
                rows |= {i: row.clone() for i, row in zip(indices, embedded) if i in chosen}
            bar.update(min(len(indices) * world_size(), n - bar.n))
    if "fid" in extractors:
        results["fid"].all_reduce()
    for metric, rows in embeddings.items():
        all_rows = {i: row for part in gather_objects(rows) for i, row in part.items()}
        results[metric] = torch.stack([all_rows[i] for i in sorted(chosen)])
    return results


def compare(results, extractors, reference):
    """{name of the score: float} from what `score` returned. The Inception Score is None for fewer
    than 10 images, and where Inception's weight file lacks the classifier, as some do."""
    scores = {}
    if "fid" in results:
        statistics = results["fid"]
        scores["fid"] = frechet_distance(
            *statistics.mean_and_covariance(), reference.mu, reference.sigma)
        possible = statistics.n >= 10 and extractors["fid"].fc.weight.any()
        scores["inception_score"] = statistics.inception_score() if possible else None
    return scores | {metric: mmd(rows, reference.embeddings[metric])
                     for metric, rows in results.items() if metric != "fid"}


# -------------------------------------------------------------------------------------------------
# The scores of a network: one dict, and one row of a table

def evaluate(denoiser, vae, extractors, reference, n, sampling=Sampling(), batch=64, classes=None,
             weights="ema", step=None, known=()) -> dict:
    """Draw n images and score them, on all ranks together. Returns one row of a table: as texts,
    the settings that scores depend on, and the scores, which are floats or None.

    classes: ids that take turns, by default all. weights and step are only recorded. known: earlier
    rows; if one has the same settings and these metrics, it is returned and nothing is drawn.
    """
    start, net = time.monotonic(), denoiser.net
    classes = classes or range(net.num_classes)
    low, high = sampling.interval
    settings = dict(
        network=weights_hash(net), target=denoiser.target, weights=weights,
        step="" if step is None else step, cfg=f"{sampling.cfg:g}",
        interval="-" if sampling.cfg == 1 else f"{low:g},{high:g}", steps=sampling.steps,
        method=sampling.method, nfe=evaluations(sampling),  # of the velocity, per image
        t_eps=f"{with_floor(denoiser, sampling.t_eps).t_eps:g}",
        classes=describe_classes(classes, net.num_classes, n), vae=vae.id, seed=sampling.seed,
        precision="bf16" if use_bf16(sampling.precision, next(net.parameters()).device) else "fp32",
        n=n, reference=reference.hash)
    settings = {name: str(value) for name, value in settings.items()}
    for row in known:
        if settings.items() <= row.items() and all(row.get(metric) for metric in extractors):
            return row
    batches = ((indices, generate(denoiser, vae, indices, classes, sampling))
               for indices in rank_batches(n, batch))
    scores = compare(score(batches, n, extractors), extractors, reference)
    return settings | scores | {"seconds": round(time.monotonic() - start)}


def as_texts(row):
    """A row as it stands in a table."""
    return {name: "n/a" if value is None else f"{value:.6f}" if isinstance(value, float)
            else str(value) for name, value in row.items()}


def log_row(row):
    """Log a row of texts: the scores, then what they depend on."""
    titles = {"fid": f"FID-{row['n']}", "inception_score": "IS", "mmd": "MMD", "cmmd": "CMMD",
              "dino": "DINO-MMD"}
    scores = [f"{title} {row[name]}" for name, title in titles.items() if row.get(name)]
    facts = [f"{name} {text}" for name, text in row.items() if name not in titles and text]
    log(f"{'  '.join(scores)}  ({', '.join(facts)})")


# -------------------------------------------------------------------------------------------------
# The program

def parse(argv):
    parser = Parser("FID and Inception Score of a checkpoint's samples, a folder or an npz file.")
    add = parser.add_mutually_exclusive_group(required=True).add_argument  # what is scored
    add("--ckpt", type=path, help="checkpoint, export or published file to draw samples from")
    add("--images", type=path, help="folder of images, subfolders included")
    add("--npz", type=path, help="ADM's sample file: arr_0, uint8 (N, H, W, 3)")

    add = parser.add_argument_group("how it is scored").add_argument
    add("--ref", type=path, help="npz with mu and sigma: ADM's, JiT's or one of --save-ref")
    add("--save-ref", type=path, metavar="OUT.npz", help="write statistics of --images or --npz")
    add("--num-samples", type=number(int, 2, 10**7),
        help="how many images (default: 50000 for --ckpt, else all)")
    add("--size", type=number(int, 1, 4096), help="center-crop --images to this many pixels")
    add("--metrics", nargs="+", choices=METRICS, default=["fid"],
        help="fid: FID and IS; mmd: of Inception's features; cmmd, dino: of CLIP's, of DINOv2's")
    add("--inception", type=path, help="Inception's weights (default: torch's cache or a download)")
    add("--clip", default=CLIP, help="the network for cmmd: a Hugging Face id or a folder")
    add("--dino", default=DINO, help="the network for dino: a Hugging Face id or a folder")

    add = parser.add_argument_group("what is drawn from --ckpt; lists make a sweep").add_argument
    add("--weights", nargs="+", choices=("ema", "ema2", "model"), default=["ema"],
        help="which of its weights")
    add("--cfg", nargs="+", type=number(float, 0, 1000),
        help="guidance scales, 1 = none (default: the checkpoint's)")
    add("--interval", nargs="+", type=interval, metavar="LOW,HIGH",
        help="guide only at times t in this interval (default: the checkpoint's)")
    add("--csv", type=path, help="table of scores (default: fid.csv beside the checkpoint)")
    sampling_flags(parser)
    return parser.parse_args(argv)


def warn_about_count(n, metrics):
    if n != 50000 and "fid" in metrics and rank() == 0:
        warn(f"FID-{n} is not comparable with FID-50K: fewer images give a higher FID")


def score_files(args, extractors, reference, backbones, device):
    """Score a folder or an npz file, or make it a reference."""
    start, crop = time.monotonic(), "center" if args.images and args.size else "none"
    if args.images:
        n, size, batches = folder_images(args.images, args.size, args.num_samples, args.batch)
    else:
        n, size, batches = npz_images(args.npz, args.num_samples, args.batch)
    vae = load_vae(args.vae, device) if args.vae else None
    if vae:  # encode and decode the images, which tells what the codec alone costs
        if any(int(side) % vae.stride for side in size.split("x")):
            raise BadInput(f"--vae: {size} pixels, expected multiples of {vae.stride}")
        batches = ((indices, to_uint8(vae.decode(vae.encode(from_uint8(images)))))
                   for indices, images in batches)
    if reference:
        reference.check_size(size)
        warn_about_count(n, args.metrics)
    results = score(batches, n, extractors)
    if args.save_ref and rank() == 0:
        embeddings = {metric: rows for metric, rows in results.items() if metric != "fid"}
        saved = save_reference(args.save_ref, *results["fid"].mean_and_covariance(), embeddings,
                               size=size, count=n, crop=crop, extractors=backbones)
        log(f"{saved} -> {args.save_ref}")
    if reference:
        row = dict(source=args.images or args.npz, size=size, crop=crop, n=n,
                   vae=vae.id if vae else "", reference=reference.hash)
        row |= compare(results, extractors, reference)
        log_row(as_texts(row | {"seconds": round(time.monotonic() - start)}))


def score_checkpoint(args, extractors, reference, device):
    """Score every combination of --weights, --cfg and --interval that is not in the table yet."""
    n, table = args.num_samples or 50000, args.csv or args.ckpt.with_name("fid.csv")
    denoisers = {weights: load_denoiser(args.ckpt, weights, device, args.target, args.input_size)
                 for weights in args.weights}
    first = denoisers[args.weights[0]]  # the others differ from it only in the weights' values
    net, settings = first.net, first.settings
    vae = open_vae(settings, net.in_channels, args.vae, device)
    side = net.input_size * vae.stride
    reference.check_size(f"{side}x{side}")
    classes = pick_classes(args.classes, settings.get("class_names"), net.num_classes)
    columns, _ = read_table(table)  # if it cannot be used, fail now and not after the first score
    if columns and not {"network", "reference"} <= set(columns):
        raise BadInput(f"{table}: not a table of these scores: choose another --csv")
    if not os.access(table.absolute().parent, os.W_OK):
        raise BadInput(f"{table}: its folder does not exist or cannot be written to")
    warn_about_count(n, args.metrics)
    if n >= 1000:  # compiling takes up to a minute or two
        for denoiser in denoisers.values():
            compile_net(denoiser.net, device)
    scales = args.cfg or [settings["cfg"]]
    intervals = args.interval or [tuple(settings["interval"])]
    for weights, cfg, times in itertools.product(args.weights, scales, intervals):
        sampling = Sampling(cfg=cfg, interval=times, steps=args.steps, method=args.method,
                            t_eps=args.t_eps, precision=args.precision, seed=args.seed)
        # An earlier run of the same command may have been interrupted after this row.
        known = from_rank_0(read_table(table)[1])
        row = as_texts(evaluate(denoisers[weights], vae, extractors, reference, n, sampling,
                                args.batch, classes, weights, settings.get("step"), known))
        if row not in known:
            append_row(table, row)
        log_row(row)


@program
def main(argv=None):
    args = parse(argv)
    out = args.save_ref
    if not args.ref and (args.ckpt or not out):
        raise BadInput("nothing to compare with: give --ref (--images with --save-ref makes one)")
    for name in ("cfg", "interval", "classes", "t_eps", "target", "csv"):
        if not args.ckpt and getattr(args, name) is not None:
            raise BadInput(f"--{name.replace('_', '-')} is for samples: it needs --ckpt")
    if out and (args.ckpt or args.vae or "fid" not in args.metrics):
        raise BadInput("--save-ref: expected --images or --npz as they are, without --vae, and fid "
                       "among --metrics")
    if out and (out.suffix != ".npz" or not os.access(out.absolute().parent, os.W_OK)):
        raise BadInput(f"--save-ref {out}: expected NAME.npz in a folder that can be written to")
    device = pick_device()
    reference = load_reference(args.ref, args.metrics) if args.ref else None
    backbones = {"cmmd": pathlib.Path(args.clip).name, "dino": pathlib.Path(args.dino).name}
    if reference:
        log(reference)
        for metric, made_with in reference.about.get("extractors", {}).items():
            if metric in args.metrics and made_with != backbones[metric]:
                raise BadInput(f"the {metric} of --ref was made with {made_with}, "
                               f"not with {backbones[metric]}")
    extractors = load_extractors(args.metrics, args.inception, args.clip, args.dino, device)
    if args.ckpt:
        score_checkpoint(args, extractors, reference, device)
    else:
        score_files(args, extractors, reference, backbones, device)


if __name__ == "__main__":
    sys.exit(main())
