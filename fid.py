"""How good samples are: FID and Inception Score, measured in memory, on all ranks, and swept.

    python fid.py --images FOLDER --size 256 --save-ref ref.npz     statistics of real images
    torchrun --nproc_per_node=8 fid.py --ckpt out/RUN/last.safetensors --ref ref.npz \\
        --cfg 1 2 2.9 --weights ema model                           a network, a row a setting
    python fid.py --npz samples.npz --ref VIRTUAL_imagenet256_labeled.npz       ADM's files
    python fid.py --images FOLDER --size 256 --ref ref.npz --vae flux2          what a codec costs

FID compares two sets of images by mean and covariance of the 2048 features that one certain network
(lib/inception.py) gives each of them. Two FIDs compare only where its weights, the resize, the
precision, the number of images and the reference are alike. Here they follow torch-fidelity, as the
paper's do, and a number is printed with all that it depends on.
"""
import itertools
import os
import pathlib
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from lib.checkpoint import load_denoiser, warn_if_young, weights_hash
from lib.device import compile_net, pick_device, use_bf16
from lib.flags import Parser, interval, number, sampling_flags
from lib.images import folder_images
from lib.inception import CLASSES, FEATURES
from lib.judges import METRICS, gathered, judge_flags, judge_names, load_judges, spread
from lib.log import append_score, read_scores
from lib.npz import Reference, npz_images, read_statistics, write_statistics
from lib.run import BadInput, connect, from_rank_0, program, rank, rank_batches, say, world_size
from model import TARGETS
from sample import METHODS, Sampling, evaluations, generate, pick_classes, with_floor
from vae import from_uint8, load_vae, open_vae, to_uint8

# -------------------------------------------------------------------------------------------------
# Statistics, FID, IS and MMD

class Statistics:
    """Sums over the images 0 ... n-1, in float64, that FID and IS follow from; no image, feature or
    logit is kept."""

    def __init__(self, n, device="cpu", features=FEATURES, classes=CLASSES):
        if torch.device(device).type == "mps":  # Apple's GPUs have no float64
            device = "cpu"
        double = dict(dtype=torch.float64, device=device)
        self.sum = torch.zeros(features, **double)                      # for FID
        self.outer = torch.zeros(features, features, **double)
        self.count = torch.zeros(10, **double)                          # for IS, of each part
        self.p = torch.zeros(10, classes, **double)
        self.plogp = torch.zeros(10, **double)
        # IS is a mean over 10 parts of the images, shuffled by RandomState(2020), as torch-fidelity
        # does it. That shuffle is known beforehand, and so is the part of each image.
        self.n, self.part = n, torch.empty(n, dtype=torch.int64)
        shuffled = np.random.RandomState(2020).permutation(n)
        for i in range(10):
            self.part[shuffled[i * n // 10:(i + 1) * n // 10]] = i

    def update(self, features, logits, indices):
        """Add features (B, 2048) and logits (B, 1008) of the images with these indices (B ints)."""
        features = features.to(self.sum.device).double()                # (B, 2048)
        log_p = logits.to(self.sum.device).double().log_softmax(1)      # (B, 1008)
        p = log_p.exp()
        self.sum += features.sum(0)
        self.outer += features.T @ features                             # (2048, 2048)
        member = F.one_hot(self.part[list(indices)], 10).T.to(p)        # (10, B)
        self.count += member.sum(1)
        self.p += member @ p                                            # (10, 1008)
        self.plogp += member @ torch.xlogy(p, p).sum(1)                 # (10,)

    def all_reduce(self):
        """Add up the sums of all ranks."""
        if dist.is_initialized():
            for tensor in (self.sum, self.outer, self.count, self.p, self.plogp):
                total = tensor.cpu()  # by way of the CPU: no GPU waits for another
                dist.all_reduce(total)
                tensor.copy_(total)

    def mean_and_covariance(self):
        """mu (2048,) and the unbiased sigma (2048, 2048), float64, on the CPU."""
        mu = self.sum.cpu() / self.n
        return mu, (self.outer.cpu() - self.n * torch.outer(mu, mu)) / (self.n - 1)

    def fid(self, reference):
        mu, sigma = reference.mu, reference.sigma
        return frechet_distance(*self.mean_and_covariance(), mu, sigma, reference.root)

    def inception_score(self):
        """exp(mean KL(p(class | image) || p(class))), averaged over parts (arXiv 1606.03498)."""
        p = self.p / self.count[:, None]                                # (10, 1008)
        kl = self.plogp / self.count - torch.xlogy(p, p).sum(1)         # (10,)
        return float(kl.exp().mean())


def mmd(a, b) -> float:
    """1000 times the squared maximum mean discrepancy of two sets of embeddings (N, D) and (M, D),
    brought to length 1, by a Gaussian kernel of width 10, as CMMD has it (arXiv 2401.09603): mean
    k(a, a) + mean k(b, b) - 2 mean k(a, b), pairs of one with itself included."""
    a, b = (F.normalize(torch.as_tensor(rows).double(), dim=1) for rows in (a, b))

    def mean_kernel(p, q):  # exp(-|p - q|² / (2 * 10²)), and |p - q|² = 2 - 2 p·q
        sums = [torch.exp((part @ q.T - 1) / 100).sum() for part in p.split(1000)]
        return sum(sums) / (len(p) * len(q))

    return float(1000 * (mean_kernel(a, a) + mean_kernel(b, b) - 2 * mean_kernel(a, b)))


def inception_score(logits: torch.Tensor) -> float:
    """Inception Score of logits (N, classes), N >= 10, in the order of the images."""
    n, classes = logits.shape
    statistics = Statistics(n, features=0, classes=classes)
    statistics.update(torch.zeros(n, 0), torch.as_tensor(logits), range(n))
    return statistics.inception_score()


def covariance_root(sigma: torch.Tensor) -> torch.Tensor:
    """R (d, rank) with R Rᵀ = sigma (d, d), without directions that have no variance."""
    values, vectors = torch.linalg.eigh(sigma)
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] * values[kept].sqrt()


def frechet_distance(mu1, sigma1, mu2, sigma2, root2=None) -> float:
    """|mu1 - mu2|² + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^½), between two Gaussians (arXiv
    1706.08500), in float64. root2: covariance_root(sigma2), where known beforehand."""
    mu1, mu2 = (torch.as_tensor(mu, dtype=torch.float64) for mu in (mu1, mu2))
    sigma1, sigma2 = (torch.as_tensor(s, dtype=torch.float64) for s in (sigma1, sigma2))
    root2 = covariance_root(sigma2) if root2 is None else root2         # (d, rank)
    # With sigma2 = R Rᵀ, sigma1 sigma2 has the eigenvalues of Rᵀ sigma1 R, but for zeros. That
    # is symmetric: no general matrix root is needed, and singular covariances need no care.
    product = root2.T @ sigma1 @ root2                                  # (rank, rank)
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    return float((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross)


def load_reference(path, metrics=("fid",)) -> Reference:
    """The Reference in any npz with mu and sigma: ADM's, JiT's, --save-ref's. Raises BadInput where
    it does not hold what these metrics need."""
    reference = read_statistics(path, FEATURES, metrics)
    reference.root = covariance_root(reference.sigma)
    return reference


# -------------------------------------------------------------------------------------------------
# Images are judged

def score(batches, n, judges):
    """What images 0 ... n-1 come to, all ranks' together, from this rank's batches of (indices,
    uint8 images). judges: {metric: network}. Returns {metric: Statistics of "fid", else embeddings
    (up to 10,000, E) fp16}."""
    device = next(next(iter(judges.values())).parameters()).device
    statistics, few = Statistics(n, device), set(spread(n))
    kept = {name: {} for name in judges if name != "fid"}
    with tqdm(total=n, unit="image", disable=rank() > 0 or None) as bar:
        for indices, images in batches:
            images = images.to(device)
            # Metrics may share a network, which then sees the images once.
            seen = {judge: judge(images) for judge in set(judges.values())}
            for name, judge in judges.items():
                embeddings, logits = seen[judge]
                if name == "fid":
                    statistics.update(embeddings, logits, indices)
                    continue
                for i, row in zip(indices, embeddings.half().cpu()):
                    if i in few:
                        kept[name][i] = row.clone()  # a view would keep its whole batch
            bar.update(min(len(indices) * world_size(), n - bar.n))
    found = {name: gathered(rows, spread(n)) for name, rows in kept.items()}
    if "fid" in judges:
        statistics.all_reduce()
        found["fid"] = statistics
    return found


# -------------------------------------------------------------------------------------------------
# The score of a network, one row of a table

# All that a score depends on, and what came out. nfe: evaluations of the velocity an image.
SETTINGS = ("network", "target", "weights", "step", "cfg", "interval", "steps", "method", "nfe",
            "t_eps", "classes", "vae", "seed", "precision", "n", "reference")
COLUMNS = (*SETTINGS, "fid", "inception_score", *METRICS[1:], "seconds")


def describe(denoiser, vae, reference, n, sampling, classes=None, weights="ema", step=None):
    """The SETTINGS of a network's row, as texts."""
    bf16 = use_bf16(sampling.precision, next(denoiser.parameters()).device)
    low, high = sampling.interval
    row = dict(
        network=weights_hash(denoiser.net), target=denoiser.target, weights=weights,
        step="" if step is None else step, cfg=f"{sampling.cfg:g}",
        interval="-" if sampling.cfg == 1 else f"{low:g},{high:g}", steps=sampling.steps,
        method=sampling.solver(), nfe=evaluations(sampling), t_eps=f"{denoiser.t_eps:g}",
        classes=" ".join(map(str, classes)) if classes else "all", vae=vae.id,
        seed=sampling.seed, precision="bf16" if bf16 else "fp32", n=n, reference=reference.hash)
    return {name: str(value) for name, value in row.items()}


def results(found, judges, reference, start):
    """The rest of a row, as texts, from what `score` found."""
    row = {}
    for name, what in found.items():
        if name != "fid":
            row[name] = f"{mmd(what, reference.embeddings[name]):.6f}"
            continue
        row["fid"] = f"{what.fid(reference):.6f}"
        known = what.n >= 10 and judges["fid"].fc.weight.any()  # some files lack the classifier
        row["inception_score"] = f"{what.inception_score():.6f}" if known else "n/a"
    row["seconds"] = f"{time.monotonic() - start:.1f}"
    return row


def evaluate(denoiser, vae, judges, reference, n, sampling=Sampling(), batch=64, classes=None,
             weights="ema", step=None) -> dict[str, str]:
    """Draw n images and score them, by all ranks alike. Returns a row, {column: text}. classes: ids
    that take turns, all by default. weights, step: only to be noted there."""
    start = time.monotonic()
    row = describe(denoiser, vae, reference, n, sampling, classes, weights, step)
    labels = classes or range(denoiser.net.num_classes)
    batches = ((indices, generate(denoiser, vae, indices, labels, sampling))
               for indices in rank_batches(n, batch))
    return row | results(score(batches, n, judges), judges, reference, start)


def result_line(row):
    scores = {name: text for name, text in row.items() if name in COLUMNS[len(SETTINGS):-1]}
    facts = {name: text for name, text in row.items() if name not in scores}
    names = {"fid": f"FID-{row['n']}", "inception_score": "IS"}
    found = "  ".join(f"{names.get(name, name)} {text}" for name, text in scores.items())
    return f"{found}  {facts}"


def warn_about(n):
    if n != 50000:
        say(f"warning: FID-{n} does not compare with FID-50K: fewer images give a higher FID")


# -------------------------------------------------------------------------------------------------
# The program

def parse(argv):
    path = pathlib.Path
    parser = Parser("FID and Inception Score of a checkpoint's samples, a folder or an npz file.")
    add = parser.add_mutually_exclusive_group(required=True).add_argument  # what is scored
    add("--ckpt", type=path, help="checkpoint, export or published file: samples drawn from it")
    add("--images", type=path, help="folder of images, also in folders inside it")
    add("--npz", type=path, help="ADM's sample file: arr_0, uint8 (N, H, W, 3)")
    add = parser.add_argument_group("against what").add_argument
    add("--ref", type=path, help="npz with mu and sigma: ADM's, JiT's or one of --save-ref")
    add("--save-ref", type=path, metavar="OUT.npz", help="write statistics of --images or --npz")
    add("--num-samples", type=number(int, 2, 10**7), help="(default: 50000 for --ckpt, else all)")
    add("--size", type=number(int, 1, 4096), help="center-crop --images to this many pixels")
    judge_flags(add)
    add = parser.add_argument_group("what is drawn from --ckpt; lists make a sweep").add_argument
    add("--weights", nargs="+", choices=("ema", "ema2", "model"), default=["ema"], help="which")
    add("--cfg", nargs="+", type=number(float, 0, 1000), help="guidance scales, 1 = none")
    add("--interval", nargs="+", type=interval, metavar="LOW,HIGH", help="times t that are guided")
    add("--csv", type=path, help="table of scores (default: fid.csv beside the checkpoint)")
    sampling_flags(parser, Sampling(), METHODS, TARGETS)
    return parser.parse_args(argv)


def score_files(args, judges, reference, device):
    start, n = time.monotonic(), args.num_samples
    crop = "center" if args.images and args.size else "none"
    if args.images:
        n, size, batches = folder_images(args.images, args.size, n, args.batch)
    else:
        n, size, batches = npz_images(args.npz, n, args.batch)
    if reference:
        reference.check_size(size)
    vae = load_vae(args.vae, device) if args.vae else None
    if vae:  # encoded and decoded again: what the codec alone costs
        if any(int(side) % vae.stride for side in size.split("x")):
            raise BadInput(f"--vae: {size} pixels, expected multiples of {vae.stride}")
        batches = ((indices, to_uint8(vae.decode(vae.encode(from_uint8(images)))))
                   for indices, images in batches)
    found = score(batches, n, judges)
    if args.save_ref and rank() == 0:
        others = {name: rows for name, rows in found.items() if name != "fid"}
        about = dict(size=size, count=n, crop=crop, judges=judge_names(judges))
        made = write_statistics(args.save_ref, *found["fid"].mean_and_covariance(), others, **about)
        say(f"{made} -> {args.save_ref}")
    if reference:
        warn_about(n)
        row = dict(source=args.images or args.npz, size=size, crop=crop, n=n, vae=vae and vae.id)
        say(result_line(row | results(found, judges, reference, start)))


def score_checkpoint(args, judges, reference, device):
    n, table = args.num_samples or 50000, args.csv or args.ckpt.with_name("fid.csv")
    warn_about(n)
    denoisers = {weights: load_denoiser(args.ckpt, weights, device, args.target, args.input_size)
                 for weights in args.weights}
    read_scores(table, COLUMNS)  # fails here, if it has to, like the weights
    for weights, denoiser in denoisers.items():
        settings, net = denoiser.settings, denoiser.net
        denoiser = with_floor(denoiser, args.t_eps, args.contrast)
        warn_if_young(settings, weights)
        vae = open_vae(settings, net.in_channels, args.vae, device)
        side = net.input_size * vae.stride
        reference.check_size(f"{side}x{side}")
        classes = args.classes and pick_classes(args.classes, settings.get("class_names"),
                                                net.num_classes)
        if n >= 1000:  # compiling takes up to a minute or two
            compile_net(net, device)
        known = from_rank_0(read_scores(table, COLUMNS))  # an interrupted sweep goes on
        cells = itertools.product(args.cfg or [settings["cfg"]],
                                  args.interval or [tuple(settings["interval"])])
        for cfg, times in cells:
            sampling = Sampling(cfg, times, args.steps, args.method, denoiser.t_eps,
                                args.precision, args.seed, args.shift, args.contrast)
            facts = classes, weights, settings.get("step")
            wanted = describe(denoiser, vae, reference, n, sampling, *facts)
            row = next((row for row in known if wanted.items() <= row.items()
                        and all(row[metric] for metric in args.metrics)), None)
            if row is None:  # else it has been measured before
                row = evaluate(denoiser, vae, judges, reference, n, sampling, args.batch, *facts)
                known.append(row)
                append_score(table, COLUMNS, row)
            say(result_line(row))


@program
def main(argv=None):
    args = parse(argv)
    out = args.save_ref
    if not args.ref and (args.ckpt or not out):
        raise BadInput("nothing to compare with: give --ref (--images with --save-ref makes one)")
    if out and "fid" not in args.metrics:
        raise BadInput("--save-ref: the statistics of FID belong to it: --metrics fid and others")
    if out and (args.ckpt or args.vae):
        raise BadInput("--save-ref: expected --images or --npz as they are, without --vae")
    if out and (out.suffix != ".npz" or not os.access(out.absolute().parent, os.W_OK)):
        raise BadInput(f"--save-ref {out}: expected NAME.npz in a folder that can be written to")
    connect()
    device = pick_device()
    reference = load_reference(args.ref, args.metrics) if args.ref else None
    judges = load_judges(args.metrics, args.inception, args.clip, args.dino, device, reference)
    say(reference or "no reference: statistics alone")
    if args.ckpt:
        score_checkpoint(args, judges, reference, device)
    else:
        score_files(args, judges, reference, device)


if __name__ == "__main__":
    sys.exit(main())
