"""From noise to pictures: the ODE, guidance, image number i, and the program that draws.

    python sample.py --cfg 1.5                                the newest run -> samples.png, a grid
    python sample.py --ckpt checkpoint-last.pth --cfg 2.9     the published weights
    torchrun --nproc_per_node=8 sample.py --num-samples 50000 --out 50k.npz
                                                              ADM's file; NAME alone: PNG files

Top to bottom: all that a picture depends on; integrate dz/dt = velocity(z, t) from t = 0 (noise) to
t = 1 (data); what velocity is, with guidance; which noise and label image number i gets; what is
written; the program. (How a weight file becomes a denoiser: lib/checkpoint.py.)
"""
import concurrent.futures
import copy
import dataclasses
import math
import os
import pathlib
import sys
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from lib.checkpoint import load_denoiser, newest_checkpoint, warn_if_young, weights_hash
from lib.device import compile_net, pick_device, use_bf16
from lib.files import atomic, flush_folder
from lib.flags import Parser, interval, number, sampling_flags
from lib.images import picture_grid
from lib.npz import write_npz
from lib.run import BadInput, barrier, connect, image_batches, program, rank, rank_batches, say
from model import TARGETS, Denoiser, slope
from vae import Codec, open_vae, to_uint8

METHODS = ("heun", "euler", "ab2")


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How images are drawn: all that they depend on besides the network, the codec, the class and
    their number. The defaults are the paper's, but for its guidance scale."""
    cfg: float = 1.0                            # guidance scale; 1 is none
    interval: tuple[float, float] = (0.1, 1.0)  # the times t that are guided
    steps: int = 50
    method: str = "heun"
    t_eps: float | None = None                  # floor of 1-t or t; None: the checkpoint's
    precision: str = "auto"                     # of the network: fp32, bf16; auto: bf16 on CUDA
    seed: int = 0
    shift: float = 1.0                          # of the grid of times: 1 is even (time_grid)
    contrast: float = 0.0                       # velocities drawn towards the mean latent

    def breaks(self):
        """Times at which the solver starts anew: where guidance sets in or ends. (The paper's Heun
        steps over them.)"""
        guided = self.method == "ab2" and self.cfg != 1
        return tuple(t for t in self.interval if guided and 0 < t < 1)

    def solver(self):
        """The method, and what else bends its way where it is not the paper's."""
        other = {"shift": (self.shift, 1), "contrast": (self.contrast, 0)}
        changed = (f" {name} {value:g}" for name, (value, usual) in other.items() if value != usual)
        return self.method + "".join(changed)

    def __str__(self):
        low, high = self.interval
        guided = f" in {low:g}<t<{high:g}" if self.cfg != 1 else ""
        return f"cfg {self.cfg:g}{guided}, {self.steps} {self.solver()} steps, seed {self.seed}"


# -------------------------------------------------------------------------------------------------
# The ODE and guidance

def time_grid(steps: int, breaks=(), shift=1.0) -> list[list[float]]:
    """Times from 0 to 1, a list for each piece between break points. The pieces share `steps` by
    their length in u, where t = u / (u + shift (1-u)), at least one each; times are even in u.
    shift 1 gives i/steps, less is denser towards the data."""
    def time(u):
        return u / (u + shift * (1 - u))  # u + (1 - u) is 1 exactly

    pieces, left, low, u_low = [], steps, 0.0, 0.0
    for high in (*sorted(breaks), 1.0):
        u_high = shift * high / (1 - high + shift * high)  # the inverse of `time`
        n = left if high == 1 else max(1, round(steps * (u_high - u_low)))
        # Python floats: as a float32, 5/50 is above an interval's 0.1 and would be guided.
        inner = [time(u_low + (u_high - u_low) * k / n) for k in range(1, n)]
        pieces.append([low, *inner, high])
        low, u_low, left = high, u_high, max(1, left - n)
    return pieces


def ode_sample(velocity: Callable, z, steps: int, method="heun", breaks=(), shift=1.0):
    """Integrate dz/dt = velocity(z, t) from noise z at t = 0 to data at t = 1.

    velocity: a function of z and a Python float t. method:
        "euler"  1 evaluation a step, error ~ 1/steps
        "heun"   2 evaluations, error ~ 1/steps²; the last step is Euler's, since nothing is to be
                 asked at t = 1: 99 evaluations in 50 steps, the paper's sampler
        "ab2"    1 evaluation, error ~ 1/steps²: the two-step Adams-Bashforth method, which
                 extrapolates from the evaluation before; the first step of a piece is Heun's
    breaks: times at which the velocity may jump. Each piece between them is integrated apart, and
    asks for velocities inside it alone. shift: see time_grid.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r}: expected {' or '.join(METHODS)}")
    for times in time_grid(steps, breaks, shift):
        first, last = times[0], times[-1]
        # A piece asks at its ends a hair inside: there a jump is on the other side.
        asked = [first and math.nextafter(first, 1), *times[1:-1], math.nextafter(last, 0)]
        v_before, h_before = None, None
        for i in range(len(times) - 1):
            h = times[i + 1] - times[i]
            v = velocity(z, asked[i])
            if method == "ab2" and i > 0:  # the line through both, at the middle of the step
                v_mean = v + h / (2 * h_before) * (v - v_before)
            elif method == "euler" or times[i + 1] == 1:
                v_mean = v
            else:  # Heun: the mean of both ends
                v_mean = (v + velocity(z + h * v, asked[i + 1])) / 2
            z = z + h * v_mean
            v_before, h_before = v, h
    return z


def guided_velocity(denoiser: Denoiser, y, cfg=Sampling.cfg, interval=Sampling.interval,
                    contrast=Sampling.contrast) -> Callable:
    """velocity(z, t) for labels y (B,), with classifier-free guidance v_u + cfg (v_c - v_u) where t
    lies in the interval (arXiv 2207.12598; the interval: arXiv 2404.07724).

    There, one pass of a doubled batch gives the conditional and the unconditional velocity.
    Elsewhere, and at cfg 1, one plain conditional pass is enough. Each evaluation is judged by its
    own t; the ends are excluded, but for t = 0. contrast C, before guidance: every velocity becomes
    (1-C) v + C m, m the mean latent of the data (what for: ablations/contrastive.py).
    """
    low, high = interval
    no_class = torch.full_like(y, denoiser.net.num_classes)             # (B,)

    def contrasted(z, t, y):
        v = denoiser.velocity(z, t, y)
        return (1 - contrast) * v + contrast * denoiser.mean_latent if contrast else v

    def velocity(z, t):
        guided = low < t < high or t == low == 0
        if cfg == 1 or not guided:
            return contrasted(z, t, y)
        both = contrasted(torch.cat([z, z]), t, torch.cat([y, no_class]))
        v_c, v_u = both.chunk(2)                                        # each (B, C, H, W)
        return v_u + cfg * (v_c - v_u)
    return velocity


# -------------------------------------------------------------------------------------------------
# Image number i. Its noise and label do not depend on batch size or on the number of ranks, its
# pixels only by the rounding of the arithmetic.

def image_noise(seed: int, indices, shape) -> torch.Tensor:
    """Noise, fp32 on the CPU, (len(indices), *shape): a function of (seed, index) alone, the same
    bits everywhere."""
    rows = [np.random.default_rng([seed, int(i)]).standard_normal(shape, dtype=np.float32)
            for i in indices]
    return torch.from_numpy(np.stack(rows))                             # (B, C, H, W)


def balanced_labels(classes, indices) -> torch.Tensor:
    """Labels (len(indices),) int64: image i shows classes[i % len(classes)]."""
    return torch.tensor([classes[int(i) % len(classes)] for i in indices])


def with_floor(denoiser: Denoiser, t_eps: float | None, contrast=0.0) -> Denoiser:
    """The denoiser with another floor of the slope; None keeps its own. Raises BadInput where it
    cannot be drawn from so."""
    denoiser = copy.copy(denoiser)  # the network is shared
    if contrast and denoiser.mean_latent is None:
        raise BadInput(f"--contrast {contrast:g}: the file does not hold the mean latent of its "
                       "data, as those of a newer train.py do")
    denoiser.t_eps = denoiser.t_eps if t_eps is None else t_eps
    if denoiser.t_eps == 0 and slope(denoiser.target, 0.0) == 0:
        raise BadInput(f"--t-eps 0 divides by zero at t = 0 for target {denoiser.target}: try "
                       "1/steps")
    return denoiser


@torch.inference_mode()
def generate(denoiser: Denoiser, vae: Codec, indices, classes, sampling=Sampling()):
    """Draw the images with these indices: uint8 (B, 3, H, W) on the denoiser's device. classes: ids
    that take turns (balanced_labels). z and the velocity are fp32 whatever the network computes in.
    """
    denoiser, net = with_floor(denoiser, sampling.t_eps, sampling.contrast), denoiser.net
    device = next(net.parameters()).device
    shape = net.in_channels, net.input_size, net.input_size
    z = image_noise(sampling.seed, indices, shape).to(device)           # (B, C, H, W)
    y = balanced_labels(classes, indices).to(device)                    # (B,)
    velocity = guided_velocity(denoiser, y, sampling.cfg, sampling.interval, sampling.contrast)
    bf16 = use_bf16(sampling.precision, device)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        z = ode_sample(velocity, z, sampling.steps, sampling.method, sampling.breaks(),
                       sampling.shift)
    return to_uint8(vae.decode(z))                                      # (B, 3, H, W)


def progress(batches):
    """Go through batches of images, with a bar where there is a terminal to see it."""
    with tqdm(total=sum(map(len, batches)), unit="image", disable=rank() > 0 or None) as bar:
        for indices in batches:
            yield indices
            bar.update(len(indices))


# -------------------------------------------------------------------------------------------------
# What is written

def draw_grid(denoiser, vae, n, classes, names, sampling, title, batch=64):
    """One captioned Pillow image of n samples, a column for each class; the classes take turns."""
    images = [generate(denoiser, vae, indices, classes, sampling).cpu()
              for indices in progress(image_batches(n, batch))]
    captions = [names[c] if names else c for c in classes]  # numbers, where they have no names
    title = f"{denoiser.target}-prediction, {title}, {sampling}"
    return picture_grid(torch.cat(images), len(classes), captions, title)


def check_out(path):
    """Raises BadInput where samples cannot be written to `path`: NAME.png, NAME.npz or a folder."""
    is_file = path.suffix.lower() in (".png", ".npz")
    if not os.access(path.absolute().parent, os.W_OK):
        raise BadInput(f"--out {path}: its folder does not exist or cannot be written to")
    if path.exists() and path.is_file() != is_file:
        raise BadInput(f"--out {path}: there is something else of that name: choose another")


def write_folder(folder, batches, draw, facts):
    """One PNG file an image, 000000.png, 000001.png ... Continues what was interrupted; refuses a
    folder of other images, which its file facts.txt tells apart."""
    path = folder / "facts.txt"
    if rank() == 0:
        folder.mkdir(exist_ok=True)
        if any(folder.glob("*.png")) and (not path.exists() or path.read_text() != facts):
            raise BadInput(f"--out {folder}: holds images drawn with other settings (facts.txt)")
        path.write_text(facts)
    barrier()

    def save(i, pixels):  # a crash leaves a whole file, or an empty one that is drawn again
        temporary = folder / f".tmp-{i:06d}.png"
        Image.fromarray(pixels).save(temporary)
        os.replace(temporary, folder / f"{i:06d}.png")

    def is_there(i):
        path = folder / f"{i:06d}.png"
        return path.exists() and path.stat().st_size > 0

    # What an interrupted run has drawn stays.
    missing = [indices for indices in batches if not all(map(is_there, indices))]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for indices, images in draw(missing):
            list(pool.map(save, indices, images.permute(0, 2, 3, 1).cpu().numpy()))
            flush_folder(folder)  # once a batch: for each file it would take longer than drawing


# -------------------------------------------------------------------------------------------------
# The program

SHOWN = (88, 207, 279, 360, 387, 417, 933, 979)  # of ImageNet: macaw, retriever, arctic fox ...


def pick_classes(wanted, names, num_classes):
    """Class ids of what the user typed, names or numbers; with nothing typed, all classes."""
    if not wanted:
        return list(range(num_classes))
    known = {str(i): i for i in range(num_classes)}
    known |= {name: i for i, name in enumerate(names or [])}  # a name wins over a number
    for text in wanted:
        if text not in known:
            also = " or a class name" if names else ""
            raise BadInput(f"class {text!r}: expected 0 to {num_classes - 1}{also}")
    return [known[text] for text in wanted]


def evaluations(sampling):
    """How often the velocity is evaluated for an image; a guided evaluation counts once."""
    times = []

    def velocity(z, t):
        times.append(t)
        return 0.0  # what it is does not matter
    ode_sample(velocity, 0.0, sampling.steps, sampling.method, sampling.breaks(), sampling.shift)
    return len(times)


def parse(argv):
    parser = Parser("Draw pictures from a checkpoint.")
    add = parser.add_argument_group("what is drawn").add_argument
    add("--ckpt", type=pathlib.Path, help="checkpoint or published file (default: newest in out/)")
    add("--weights", choices=("ema", "ema2", "model"), default="ema", help="which of its weights")
    add("--cfg", type=number(float, 0, 1000),
        help="guidance scale, 1 = none (default: the checkpoint's)")
    add("--interval", type=interval, metavar="LOW,HIGH",
        help="times that are guided (default: the checkpoint's)")
    add("--num-samples", type=number(int, 1, 10**7),
        help="images, classes taking turns (default: 2 a class)")
    add("--out", type=pathlib.Path, default=pathlib.Path("samples.png"),
        help="NAME.png: a grid; NAME.npz: ADM's sample file; anything else: a folder of PNG files")
    sampling_flags(parser, Sampling(), METHODS, TARGETS)
    return parser.parse_args(argv)


@program
def main(argv=None):
    args = parse(argv)
    path = args.ckpt or newest_checkpoint(args.weights)
    connect()
    device = pick_device()
    denoiser = load_denoiser(path, args.weights, device, args.target, args.input_size)
    net, settings = denoiser.net, denoiser.settings
    denoiser = with_floor(denoiser, args.t_eps, args.contrast)
    warn_if_young(settings, args.weights)
    vae = open_vae(settings, net.in_channels, args.vae, device)
    sampling = Sampling(
        cfg=settings["cfg"] if args.cfg is None else args.cfg,
        interval=tuple(args.interval or settings["interval"]),
        steps=args.steps, method=args.method, t_eps=denoiser.t_eps, precision=args.precision,
        seed=args.seed, shift=args.shift, contrast=args.contrast)
    names = settings.get("class_names")
    classes = pick_classes(args.classes, names, net.num_classes)
    is_grid = args.out.suffix.lower() == ".png"
    if is_grid and not args.classes:  # a column each: some are enough
        classes = list(SHOWN) if net.num_classes == 1000 else classes[:10]
    n = args.num_samples or 2 * len(classes)
    check_out(args.out)

    def draw(batches):
        for indices in progress(batches):
            yield indices, generate(denoiser, vae, indices, classes, sampling)

    who = f"step {settings.get('step', '?')}, {args.weights}"
    if n >= 1000:  # compiling takes up to a minute or two
        compile_net(net, device)
    batches = rank_batches(n, args.batch)
    if args.out.suffix.lower() == ".npz":
        write_npz(args.out, n, net.input_size * vae.stride, draw(batches))
    elif not is_grid:
        facts = f"{sampling!r}, {who}, network {weights_hash(net)}, {vae.id}, classes {classes}"
        write_folder(args.out, batches, draw, facts)
    elif rank() == 0:  # a grid is small: one rank draws all of it
        grid = draw_grid(denoiser, vae, n, classes, names, sampling, who, args.batch)
        with atomic(args.out) as temporary:
            grid.save(temporary, "png")
    say(f"{path}: {denoiser.target}-prediction, {who}, {sampling}\n{n} images -> {args.out}")


if __name__ == "__main__":
    sys.exit(main())
