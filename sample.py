"""From noise to images: the ODE, guidance, image number i, and the program that draws.

    python sample.py --cfg 1.5                                the newest run -> samples.png, a grid
    python sample.py --ckpt checkpoint-last.pth --cfg 2.9     the published weights
    torchrun --nproc_per_node=8 sample.py --num-samples 50000 --out 50k.npz
                                                              ADM's file; NAME alone: PNG files

From top to bottom: the settings that an image depends on; integrating dz/dt = velocity(z, t) from
t = 0 (noise) to t = 1 (data); the velocity, with guidance; the noise and label of image number i;
what is written; the program. (lib/checkpoint.py turns a weight file into a denoiser.)
"""
import concurrent.futures
import copy
import dataclasses
import math
import os
import pathlib
import secrets
import sys
import zipfile
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from lib.checkpoint import load_denoiser, newest_checkpoint, weights_hash
from lib.files import atomic, check_disk, flush_folder
from lib.flags import Parser, interval, number, path
from lib.images import image_files, image_grid
from lib.run import BadInput, barrier, compile_net, from_rank_0, image_batches, log, pick_device
from lib.run import program, rank, rank_batches, use_bf16
from model import TARGETS, Denoiser, slope
from vae import Codec, open_vae, to_uint8

METHODS = ("heun", "euler", "ab2")


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How images are drawn: what they depend on besides the network, the codec, the class and their
    number. The defaults are the paper's, except that the paper guides with 2.9."""
    cfg: float = 1.0                            # guidance scale; 1 is none
    interval: tuple[float, float] = (0.1, 1.0)  # the times t that are guided
    steps: int = 50
    method: str = "heun"
    t_eps: float | None = None                  # floor of the slope; None: the checkpoint's
    precision: str = "auto"                     # of the network: fp32, bf16; auto: bf16 on CUDA
    seed: int = 0

    def breaks(self):
        """Times at which ab2 starts anew, because guidance sets in or ends there. (The paper's Heun
        steps over them.)"""
        guided = self.method == "ab2" and self.cfg != 1
        return tuple(t for t in self.interval if guided and 0 < t < 1)

    def __str__(self):
        low, high = self.interval
        guided = f" in {low:g}<t<{high:g}" if self.cfg != 1 else ""
        return f"cfg {self.cfg:g}{guided}, {self.steps} {self.method} steps, seed {self.seed}"


# -------------------------------------------------------------------------------------------------
# The ODE and guidance

def time_grid(steps: int, breaks=()) -> list[list[float]]:
    """Evenly spaced times from 0 to 1, one list for each piece between break points. The pieces
    share `steps` by their length, at least one each."""
    pieces, left, low = [], steps, 0.0
    for high in (*sorted(breaks), 1.0):
        n = left if high == 1 else max(1, round(steps * (high - low)))
        # Python floats: as a float32, 5/50 is above an interval's 0.1 and would be guided.
        inner = [low + (high - low) * k / n for k in range(1, n)]
        pieces.append([low, *inner, high])
        low, left = high, max(1, left - n)
    return pieces


def ode_sample(velocity: Callable, z, steps: int, method="heun", breaks=()):
    """Integrate dz/dt = velocity(z, t) from noise z at t = 0 to data at t = 1.

    velocity: a function of z and a Python float t. method:
        "euler"  1 evaluation per step, error ~ 1/steps
        "heun"   2 evaluations per step, error ~ 1/steps². The last step is Euler's, since there is
                 nothing to evaluate at t = 1: 99 evaluations in 50 steps, the paper's sampler.
        "ab2"    1 evaluation per step, error ~ 1/steps²: the two-step Adams-Bashforth method, which
                 extrapolates from the previous evaluation. A piece starts with a Heun step.
    breaks: times at which the velocity may jump. Each piece between them is integrated separately,
    and evaluates the velocity only inside it.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r}: expected {' or '.join(METHODS)}")
    for times in time_grid(steps, breaks):
        # The ends of a piece are evaluated just inside it, because the other side of a jump starts
        # there. Only t = 0 stays as it is.
        inside = [math.nextafter(times[0], 1) if times[0] else 0.0, *times[1:-1],
                  math.nextafter(times[-1], 0)]
        v_before, h_before = None, None
        for i in range(len(times) - 1):
            h = times[i + 1] - times[i]
            v = velocity(z, inside[i])
            if method == "ab2" and i > 0:  # the line through both evaluations, at mid-step
                v_mean = v + h / (2 * h_before) * (v - v_before)
            elif method == "euler" or times[i + 1] == 1:
                v_mean = v
            else:  # Heun: the mean of the velocities at both ends
                v_mean = (v + velocity(z + h * v, inside[i + 1])) / 2
            z = z + h * v_mean
            v_before, h_before = v, h
    return z


def guided_velocity(denoiser: Denoiser, y, cfg=1.0, interval=(0.1, 1.0)) -> Callable:
    """velocity(z, t) for labels y (B,), with classifier-free guidance v_u + cfg (v_c - v_u) where t
    lies in the interval (arXiv 2207.12598; the interval: arXiv 2404.07724).

    Inside it, one pass of a doubled batch gives the conditional and the unconditional velocity.
    Outside, and at cfg 1, one conditional pass is enough. Each evaluation is judged by its own t.
    The ends are excluded, except for t = 0.
    """
    low, high = interval
    no_class = torch.full_like(y, denoiser.net.num_classes)             # (B,)

    def velocity(z, t):
        guided = low < t < high or t == low == 0
        if cfg == 1 or not guided:
            return denoiser.velocity(z, t, y)
        both = denoiser.velocity(torch.cat([z, z]), t, torch.cat([y, no_class]))
        v_c, v_u = both.chunk(2)                                        # each (B, C, H, W)
        return v_u + cfg * (v_c - v_u)
    return velocity


# -------------------------------------------------------------------------------------------------
# Image number i. Its noise and label depend neither on the batch size nor on the number of ranks,
# and so its pixels only by the rounding of the arithmetic.

def image_noise(seed: int, indices, shape) -> torch.Tensor:
    """Noise (len(indices), *shape), fp32 on the CPU, a function of (seed, index) alone."""
    rows = [np.random.default_rng([seed, int(i)]).standard_normal(shape, dtype=np.float32)
            for i in indices]
    return torch.from_numpy(np.stack(rows))                             # (B, C, H, W)


def balanced_labels(classes, indices) -> torch.Tensor:
    """Labels (len(indices),) int64: image i shows classes[i % len(classes)]."""
    return torch.tensor([classes[int(i) % len(classes)] for i in indices])


def noise_and_labels(net, indices, classes=None, seed=0):
    """What the images with these indices start from: noise (B, C, H, W) and labels (B,), on the
    network's device. classes: the label ids that take turns; None: all."""
    device = next(net.parameters()).device
    z = image_noise(seed, indices, (net.in_channels, net.input_size, net.input_size))
    y = balanced_labels(classes or range(net.num_classes), indices)
    return z.to(device), y.to(device)


def describe_classes(classes, num_classes, n) -> str:
    """Which classes n images show: "all" where every class is drawn equally often. Warns where some
    are drawn more often than others, since a score of such images is not one of the data set."""
    rounds, extra = divmod(n, len(classes))
    if extra:
        log(f"warning: {n} images do not divide evenly among {len(classes)} classes: the first "
            f"{extra} are drawn {rounds + 1} times, the others {rounds} times")
    every = list(classes) == list(range(num_classes))
    text = "all" if every else " ".join(map(str, classes))
    return f"{text}, the first {extra} once more than {rounds}" if extra else text


def with_floor(denoiser: Denoiser, t_eps: float | None) -> Denoiser:
    """The denoiser with another floor of the slope; None keeps its own. Raises BadInput where the
    velocity would be divided by zero."""
    denoiser = copy.copy(denoiser)  # the network is shared
    denoiser.t_eps = denoiser.t_eps if t_eps is None else t_eps
    if denoiser.t_eps == 0 and slope(denoiser.target, 0.0) == 0:
        raise BadInput(f"--t-eps 0 divides by zero at t = 0 for target {denoiser.target}: try "
                       "1/steps")
    return denoiser


@torch.inference_mode()
def generate(denoiser: Denoiser, vae: Codec, indices, classes, sampling=Sampling()):
    """Draw the images with these indices: uint8 (B, 3, H, W) on the denoiser's device. classes: the
    label ids that take turns. z and the velocity are fp32 whatever the network computes in."""
    denoiser, net = with_floor(denoiser, sampling.t_eps), denoiser.net
    z, y = noise_and_labels(net, indices, classes, sampling.seed)
    velocity = guided_velocity(denoiser, y, sampling.cfg, sampling.interval)
    bf16 = use_bf16(sampling.precision, z.device)
    with torch.autocast(z.device.type, torch.bfloat16, enabled=bf16):
        z = ode_sample(velocity, z, sampling.steps, sampling.method, sampling.breaks())
    return to_uint8(vae.decode(z))                                      # (B, 3, H, W)


def evaluations(sampling) -> int:
    """How often the velocity is evaluated per image (nfe); a guided evaluation counts once."""
    times = []

    def velocity(z, t):
        times.append(t)
        return 0.0  # its value does not matter
    ode_sample(velocity, 0.0, sampling.steps, sampling.method, sampling.breaks())
    return len(times)


def progress(batches):
    """Iterate over batches of indices, with a progress bar where there is a terminal."""
    with tqdm(total=sum(map(len, batches)), unit="image", disable=rank() > 0 or None) as bar:
        for indices in batches:
            yield indices
            bar.update(len(indices))


# -------------------------------------------------------------------------------------------------
# What is written

def draw_grid(denoiser, vae, n, classes, names, sampling, title, batch=64):
    """n samples as one captioned Pillow image, with a column for each class."""
    images = [generate(denoiser, vae, indices, classes, sampling).cpu()
              for indices in progress(image_batches(n, batch))]
    captions = [names[c] if names else c for c in classes]
    title = f"{denoiser.target}-prediction, {title}, {sampling}"
    return image_grid(torch.cat(images), len(classes), captions, title)


def write_folder(folder, n, batches, draw, facts):
    """Write one PNG file per image: 000000.png, 000001.png ... Continues an interrupted folder.
    Raises BadInput for a folder that holds other images, which fid.py would score as well."""
    facts_file = folder / "facts.txt"
    if rank() == 0:
        folder.mkdir(exist_ok=True)
        names, there = {f"{i:06d}.png" for i in range(n)}, image_files(folder)[0]
        others = [image for image in there if str(image.relative_to(folder)) not in names]
        if others:
            raise BadInput(f"--out {folder}: holds {len(others)} images besides the {n} asked for, "
                           f"such as {others[0].relative_to(folder)}: choose another folder")
        if there and (not facts_file.exists() or facts_file.read_text() != facts):
            raise BadInput(f"--out {folder}: holds images drawn with other settings (facts.txt)")
        facts_file.write_text(facts)
    barrier()

    unique = secrets.token_hex(4)  # process ids repeat across containers and nodes

    def save(i, pixels):  # a crash leaves a whole file, or an empty one that is drawn again
        temporary = folder / f".tmp-{i:06d}-{unique}.png"
        Image.fromarray(pixels).save(temporary)
        os.replace(temporary, folder / f"{i:06d}.png")

    def exists(i):
        file = folder / f"{i:06d}.png"
        return file.exists() and file.stat().st_size > 0

    missing = [indices for indices in batches if not all(map(exists, indices))]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for indices, images in draw(missing):
            list(pool.map(save, indices, images.permute(0, 2, 3, 1).cpu().numpy()))
            flush_folder(folder)  # once per batch: once per file would take longer than drawing


def write_npz(file, n, size, batches):
    """Write ADM's sample file: `arr_0`, uint8 (N, H, W, 3). All ranks fill one temporary file in
    place, so that 50,000 images (10 GB at 256²) never have to fit into memory."""
    shape = n, size, size, 3
    check_disk(file.parent, 2 * math.prod(shape))
    rows_file = from_rank_0(file.with_name(f".tmp-{secrets.token_hex(4)}-{file.name[-60:]}.npy"))
    try:
        if rank() == 0:
            np.lib.format.open_memmap(rows_file, "w+", np.uint8, shape)
        barrier()
        table = np.lib.format.open_memmap(rows_file, "r+")
        for indices, images in batches:
            table[indices.start:indices.stop] = images.permute(0, 2, 3, 1).cpu().numpy()
        table.flush()
        barrier()
        if rank() == 0:
            with atomic(file) as temporary, zipfile.ZipFile(temporary, "w") as archive:
                archive.write(rows_file, "arr_0.npy")
    finally:
        if rank() == 0:
            rows_file.unlink(missing_ok=True)


# -------------------------------------------------------------------------------------------------
# The program

SHOWN = (88, 207, 279, 360, 387, 417, 933, 979)  # of ImageNet: macaw, retriever, arctic fox ...
OTHER_FORMATS = {
    ".npy", ".zip", ".tar", ".gz", ".7z", ".svg", ".heic", ".jxl", ".exr", ".mp4", ".txt", ".csv",
    ".json", ".safetensors", ".pt", ".pth", *Image.registered_extensions()} - {".png"}


def pick_classes(wanted, names, num_classes):
    """Class ids of what the user typed, names or numbers; all classes where nothing was typed.
    Raises BadInput."""
    if not wanted:
        return list(range(num_classes))
    ids = {str(i): i for i in range(num_classes)}
    ids |= {name: i for i, name in enumerate(names or [])}  # a name wins over a number
    for text in wanted:
        if text not in ids:
            also = " or a class name" if names else ""
            raise BadInput(f"class {text!r}: expected 0 to {num_classes - 1}{also}")
    return [ids[text] for text in wanted]


def check_out(out):
    """Raises BadInput where samples cannot be written to `out`: NAME.png, NAME.npz or a folder."""
    suffix = out.suffix.lower()
    if suffix in OTHER_FORMATS and not out.is_dir():
        raise BadInput(f"--out {out}: expected NAME.png (a grid), NAME.npz or the name of a folder")
    if not os.access(out.absolute().parent, os.W_OK):
        raise BadInput(f"--out {out}: its folder does not exist or cannot be written to")
    if out.exists() and out.is_file() != (suffix in (".png", ".npz")):
        raise BadInput(f"--out {out}: something else has that name already: choose another")


def sampling_flags(parser):
    """The flags of every program that draws from a checkpoint."""
    add = parser.add_argument_group("how samples are drawn").add_argument
    add("--steps", type=number(int, 1, 100_000), default=Sampling.steps, help="ODE steps")
    add("--method", choices=METHODS, default=Sampling.method, help="ODE solver")
    add("--t-eps", type=number(float, 0, 1),
        help="floor of the target's slope (default: the checkpoint's)")
    add("--seed", type=number(int, 0), default=Sampling.seed,
        help="image i depends on seed and i alone")
    add("--classes", nargs="+", metavar="CLASS",
        help="names or numbers, taking turns (default: all)")
    add("--precision", choices=("auto", "bf16", "fp32"), default=Sampling.precision,
        help="auto: bf16 on CUDA")
    add("--batch", type=number(int, 1, 10**5), default=64, help="images per pass and device")
    add("--vae", help="flux2, taef2, pixels, a Hugging Face id or a folder (default: the one that "
        "made the latents)")
    add("--target", choices=TARGETS, help="for a file that does not say what it predicts")
    add("--input-size", type=number(int, 1, 512),
        help="latent height, for a file that does not say it")


def parse(argv):
    parser = Parser("Draw images from a checkpoint.")
    add = parser.add_argument_group("what is drawn").add_argument
    add("--ckpt", type=path, help="checkpoint or published file (default: the newest in out/)")
    add("--weights", choices=("ema", "ema2", "model"), default="ema", help="which of its weights")
    add("--cfg", type=number(float, 0, 1000),
        help="guidance scale, 1 = none (default: the checkpoint's)")
    add("--interval", type=interval, metavar="LOW,HIGH",
        help="times that are guided (default: the checkpoint's)")
    add("--num-samples", type=number(int, 1, 10**7),
        help="images, classes taking turns (default: 2 per class)")
    add("--out", type=path, default=pathlib.Path("samples.png"),
        help="NAME.png: a grid; NAME.npz: ADM's sample file; otherwise a folder of PNG files")
    sampling_flags(parser)
    return parser.parse_args(argv)


@program
def main(argv=None):
    args = parse(argv)
    check_out(args.out)
    ckpt, device = args.ckpt or newest_checkpoint(args.weights), pick_device()
    denoiser = load_denoiser(ckpt, args.weights, device, args.target, args.input_size)
    net, settings = denoiser.net, denoiser.settings
    denoiser = with_floor(denoiser, args.t_eps)  # here already, to fail early
    vae = open_vae(settings, net.in_channels, args.vae, device)
    sampling = Sampling(
        cfg=settings["cfg"] if args.cfg is None else args.cfg,
        interval=tuple(args.interval or settings["interval"]), steps=args.steps,
        method=args.method, t_eps=denoiser.t_eps, precision=args.precision, seed=args.seed)
    names = settings.get("class_names")
    classes = pick_classes(args.classes, names, net.num_classes)
    suffix = args.out.suffix.lower()
    if suffix == ".png" and not args.classes:  # a grid has a column per class: show some
        classes = list(SHOWN) if net.num_classes == 1000 else classes[:10]
    n = args.num_samples or 2 * len(classes)
    source = f"step {settings.get('step', '?')}, {args.weights}"

    def draw(batches):
        for indices in progress(batches):
            yield indices, generate(denoiser, vae, indices, classes, sampling)

    if n >= 1000:  # compiling takes a minute or two
        compile_net(net, device)
    batches = rank_batches(n, args.batch)
    if suffix == ".png":
        if rank() == 0:  # a grid is small: one rank draws all of it
            grid = draw_grid(denoiser, vae, n, classes, names, sampling, source, args.batch)
            with atomic(args.out) as temporary:
                grid.save(temporary, "png")
    else:
        drawn = describe_classes(classes, net.num_classes, n)
        if suffix == ".npz":
            write_npz(args.out, n, net.input_size * vae.stride, draw(batches))
        else:
            facts = (f"{sampling!r}, {source}, network {weights_hash(net)}, {vae.id}, "
                     f"classes {classes}")
            write_folder(args.out, n, batches, draw, facts)
        log(f"classes: {drawn}")
    log(f"{ckpt}: {denoiser.target}-prediction, {source}, {sampling}\n{n} images -> {args.out}")


if __name__ == "__main__":
    sys.exit(main())
