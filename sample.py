"""From noise to pictures: the ODE, guidance, checkpoint files, and the program that draws.

    python sample.py --cfg 1.5                                     the newest run -> samples.png, a captioned grid
    python sample.py --ckpt checkpoint-last.pth --cfg 2.9          the published weights
    torchrun --nproc_per_node=8 -- sample.py --n 50000 --out 50k.npz   for evaluators (ADM); or a folder of PNG files

Top to bottom: integrate dz/dt = velocity(z, t) from t = 0 (noise) to t = 1 (data); what velocity is, with guidance;
which noise and label image number i gets; how a checkpoint file becomes a denoiser; the program.
"""
import importlib.util
import pathlib
import sys
import zipfile

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from lib.checkpoint import read_weights
from lib.flags import Parser, interval, number, sampling_flags
from lib.log import picture_grid
from lib.run import BadInput, atomic, join_ranks, pick_device, program, rank, say, watched, world_size
from model import JLT, Denoiser, rotary_table
from vae import load_vae, to_uint8


# ---------------------------------------------------------------------------------------------------------------------
# The ODE and guidance

def ode_sample(velocity, z, steps, method="heun"):
    """Integrate dz/dt = velocity(z, t) from noise z at t = 0 to data at t = 1, in `steps` equal steps.

    velocity: a function of z and a Python float t. method: "euler" (1 evaluation a step, error ~ 1/steps) or "heun"
    (2, error ~ 1/steps²; the last step is Euler's, since nothing is to be asked at t = 1: 99 evaluations in 50 steps).
    """
    for i in range(steps):
        t, t_next = i / steps, (i + 1) / steps  # Python floats: in float32, 5/50 would lie above an interval's 0.1
        v = velocity(z, t)
        if method == "heun" and i < steps - 1:
            v = (v + velocity(z + (t_next - t) * v, t_next)) / 2  # the mean slope of both ends
        z = z + (t_next - t) * v
    return z


def guided_velocity(denoiser, y, cfg=1.0, interval=(0.1, 1.0)):
    """velocity(z, t) for labels y (B,), with classifier-free guidance v_u + cfg (v_c - v_u) inside the time interval.

    Inside it, one pass of a doubled batch gives the conditional and the unconditional velocity; outside, and at cfg 1,
    one plain conditional pass is enough. low < t < high is asked of each evaluation's own t; low = 0 includes t = 0.
    Guidance: arXiv 2207.12598; its interval: arXiv 2404.07724.
    """
    low, high = interval
    doubled = torch.cat([y, torch.full_like(y, denoiser.net.num_classes)])

    def velocity(z, t):
        if cfg == 1 or not (low < t < high or t == low == 0):
            return denoiser.velocity(z, t, y)
        v_c, v_u = denoiser.velocity(torch.cat([z, z]), t, doubled).chunk(2)
        return v_u + cfg * (v_c - v_u)
    return velocity


# ---------------------------------------------------------------------------------------------------------------------
# Image number i: its noise, its label, its pixels. None of it depends on batch size or on the number of ranks.

def image_noise(seed, indices, shape):
    """Noise, fp32 on the CPU, (len(indices), *shape): a function of (seed, index) alone, the same bits everywhere."""
    rows = [np.random.default_rng([seed, int(i)]).standard_normal(shape, dtype=np.float32) for i in indices]
    return torch.from_numpy(np.stack(rows))


def balanced_labels(classes, indices):
    """Labels (len(indices),) int64: image i shows classes[i % len(classes)]."""
    return torch.tensor([classes[int(i) % len(classes)] for i in indices])


def rank_batches(n, batch):
    """This rank's share of the images 0 ... n-1, as ranges of at most `batch`: every world_size-th of them."""
    return [range(first, min(first + batch, n)) for first in range(0, n, batch)][rank()::world_size()]


@torch.inference_mode()
def generate(denoiser, vae, indices, classes, seed=0, cfg=1.0, interval=(0.1, 1.0), steps=50, method="heun",
             precision="auto"):
    """Draw the images with these indices: uint8 (B, 3, H, W) on the denoiser's device.

    precision: "fp32", "bf16" (of the network; z and the velocity stay fp32), or "auto": bf16 on CUDA.
    """
    net = denoiser.net
    device = next(net.parameters()).device
    z = image_noise(seed, indices, (net.in_channels, net.input_size, net.input_size)).to(device)
    y = balanced_labels(classes, indices).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=use_bf16(precision, device)):
        z = ode_sample(guided_velocity(denoiser, y, cfg, interval), z, steps, method)
    return to_uint8(vae.decode(z))


def compile_net(net, device):
    """torch.compile on CUDA, where Triton is at hand. In place: the state dict keeps its names."""
    if device.type == "cuda" and importlib.util.find_spec("triton"):
        net.compile()
    elif device.type == "cuda":
        say("without torch.compile: Triton is not installed")


def use_bf16(precision, device):
    return precision == "bf16" or (precision == "auto" and device.type == "cuda")


# ---------------------------------------------------------------------------------------------------------------------
# From a checkpoint file to a denoiser (the files themselves: lib/checkpoint.py)

def build_net(weights, path, input_size):
    """The network that fits these tensors: all sizes but the latent grid's are read off their shapes. Raises BadInput,
    naming the tensor, where one is missing, unknown or of another shape."""
    try:
        weights = {name.removeprefix("module.").removeprefix("net."): tensor for name, tensor in weights.items()}
        weights.pop("mask_token", None)  # in the release's files; the paper's model does not use it
        patch = weights.get("x_embedder.proj1.weight", weights.get("x_embedder.proj.weight"))
        bottleneck = len(patch) if "x_embedder.proj1.weight" in weights else 0
        width, head_dim = len(weights["t_embedder.mlp.2.bias"]), len(weights["blocks.0.attn.q_norm.weight"])
        with torch.device("meta"):  # no memory until every shape is known to be right
            net = JLT(input_size, patch.shape[-1], patch.shape[1], width, num_heads=width // head_dim,
                      depth=len({name.split(".")[1] for name in weights if name.startswith("blocks.")}),
                      num_classes=len(weights["y_embedder.embedding_table.weight"]) - 1, bottleneck=bottleneck)
    except (KeyError, AttributeError, IndexError, TypeError, ValueError, ZeroDivisionError, RuntimeError) as error:
        raise BadInput(f"{path}: not the weights of a JLT ({type(error).__name__}: {error})") from None
    expected = net.state_dict()
    for name in sorted(expected.keys() | weights.keys()):
        if name not in weights or name not in expected:
            raise BadInput(f"{path}: tensor {name} is {'missing' if name in expected else 'unknown to this network'}")
        if not hasattr(weights[name], "shape") or weights[name].shape != expected[name].shape:
            raise BadInput(f"{path}: tensor {name} does not have the shape {tuple(expected[name].shape)}")
    net.load_state_dict({name: tensor.to(torch.float32, copy=True) for name, tensor in weights.items()}, assign=True)
    net.rotary_cos, net.rotary_sin = rotary_table(input_size // patch.shape[-1], width // net.blocks[0].attn.num_heads)
    return net


def load_init(path, net, target):
    """The network in `path`, to start from, where it is of the kind of `net`. Raises BadInput otherwise."""
    sets, settings = read_weights(path)
    start = build_net(sets.get("ema") or sets["model"], path, net.input_size)
    if settings.get("target") not in (None, target):
        raise BadInput(f"--init {path}: that network predicts {settings['target']}: give --target {settings['target']}")

    def shapes(net):  # the patch embedding may differ (with or without a bottleneck), and so may the label table
        tensors = {name: tuple(value.shape) for name, value in net.state_dict().items() if name[:2] not in ("x_", "y_")}
        return {"patch size": net.patch_size, "channels": net.in_channels} | tensors
    ours, theirs = shapes(net), shapes(start)
    for name in ours | theirs:
        if ours.get(name) != theirs.get(name):
            raise BadInput(f"--init {path}: {name} is {theirs.get(name)} there, {ours.get(name)} here: mind the flags")
    if start.num_classes != net.num_classes:
        say(f"--init {path}: {start.num_classes} classes there, {net.num_classes} here: the label table starts anew")
        start.y_embedder, start.num_classes = net.y_embedder, net.num_classes
    return start


def load_denoiser(path, weights="ema", device="cpu", target=None, input_size=None):
    """A Denoiser in eval mode with its `.settings`, from a checkpoint, an export or a published file.

    weights: "model", "ema" or "ema2". target and input_size (the latent's height) are for files that do not say them.
    Raises BadInput, naming what is wrong.
    """
    sets, settings = read_weights(path)
    if weights not in sets:
        raise BadInput(f"{path} holds no weights {weights!r}: expected --weights {' or '.join(sorted(sets))}")
    try:
        target = target or settings["target"]
        if target is None:
            raise BadInput(f"{path} does not say what its network predicts: give --target x, eps or v")
        input_size = input_size or settings.get("input_size") or settings["size"] // 16  # FLUX.2: 16× smaller
        if not 1 <= input_size <= 512:
            raise ValueError(f"latent size {input_size}")
        known = {"P_mean", "P_std", "t_eps", "label_drop"} & settings.keys()
        denoiser = Denoiser(build_net(sets[weights], path, input_size), target, settings.get("loss", "v"),
                            **{name: float(settings[name]) for name in known})
        low, high = settings.get("interval", (0.1, 1))
        settings |= {"cfg": float(settings.get("cfg", 1)), "interval": (float(low), float(high))}
        if settings.get("class_names") and len(settings["class_names"]) != denoiser.net.num_classes:
            raise ValueError(f"{len(settings['class_names'])} class names for {denoiser.net.num_classes} classes")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{path}: settings that make no sense ({error})") from None
    denoiser.settings = settings
    return denoiser.to(device).eval().requires_grad_(False)


def newest_checkpoint(weights="ema", folder="out"):
    """The newest run's file with these weights: the light export where it is enough, else the whole checkpoint."""
    files = [f for name in ("ema", "last", "previous") for f in pathlib.Path(folder).glob(f"*/{name}.safetensors")]
    if not files:
        raise BadInput(f"no checkpoint in {folder}/: train one (python train.py --demo: minutes) or give --ckpt FILE")
    run = max(files, key=lambda f: f.stat().st_mtime).parent
    wanted = ("ema", "last", "previous") if weights != "model" else ("last", "previous", "ema")
    return next(run / f"{name}.safetensors" for name in wanted if run / f"{name}.safetensors" in files)


def warn_if_young(settings, weights):
    """An average over 1/(1-decay) steps means little after fewer than about three times as many."""
    decays, place = settings.get("ema") or [], {"ema": 0, "ema2": 1}.get(weights, 9)
    if place < len(decays) and settings["step"] * (1 - decays[place]) < 3:
        say(f"warning: {settings['step']} steps are few for an EMA of {decays[place]}: it still remembers the start; "
            "compare with --weights model")


def open_vae(settings, override=None, device="cpu"):
    """The codec that decodes a checkpoint's latents: the one asked for, else the local one they were made with, where
    that still exists, else the published one."""
    known, hint = settings.get("vae") or {}, settings.get("hint")
    name = override or (hint if hint and pathlib.Path(hint).exists() else None) or known.get("id")
    if not name:
        raise BadInput("the latents do not say which codec made them: give --vae (flux2, taef2, pixels or a folder)")
    return load_vae(name, device)


# ---------------------------------------------------------------------------------------------------------------------
# The program

SHOWN = (88, 207, 279, 360, 387, 417, 933, 979)  # of ImageNet: macaw, retriever, arctic fox, otter, red panda ...


def pick_classes(wanted, names, num_classes):
    """Class ids of what the user typed, names or numbers; with nothing typed, all classes."""
    ids = []
    for text in wanted or range(num_classes):
        text = str(text)
        found = names.index(text) if names and text in names else int(text) if text.isdecimal() else -1
        if not 0 <= found < num_classes:
            raise BadInput(f"class {text!r}: expected 0 to {num_classes - 1}" + " or a class name" * bool(names))
        ids.append(found)
    return ids


def set_floor(denoiser, t_eps):
    """Override the floor of the sampler's denominators; None keeps the checkpoint's."""
    if t_eps is not None:
        denoiser.t_eps = t_eps
    if denoiser.t_eps == 0 and denoiser.target == "eps":
        raise BadInput("--t-eps 0 divides by zero for target eps, whose velocity is (z - e)/t, at t = 0: try 1/steps")


def write_npz(path, n, size, batches):
    """ADM's sample file: `arr_0`, uint8 (N, H, W, 3), filled in place by all ranks; nothing is held in memory."""
    rows = path.with_name(f".tmp-{path.name}.npy")
    if rank() == 0:
        np.lib.format.open_memmap(rows, "w+", np.uint8, (n, size, size, 3)).flush()
    meet()
    array = np.lib.format.open_memmap(rows, "r+")
    for indices, images in batches:
        array[indices.start:indices.stop] = images.permute(0, 2, 3, 1).cpu().numpy()
    array.flush()
    meet()
    if rank() == 0:
        with atomic(path) as temporary, zipfile.ZipFile(temporary, "w", allowZip64=True) as file:
            file.write(rows, "arr_0.npy")
        rows.unlink()


def meet():
    """Wait until all ranks are here."""
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(1))


def write_folder(folder, batches, draw, facts):
    """One PNG file an image, 000000.png, 000001.png ... Continues what was interrupted; refuses a folder of other images,
    which its file facts.txt tells apart."""
    folder.mkdir(exist_ok=True)
    note = folder / "facts.txt"
    if any(folder.glob("*.png")) and (not note.exists() or note.read_text(encoding="utf-8") != facts):
        raise BadInput(f"--out {folder}: holds images drawn with other settings (see its facts.txt): take another")
    note.write_text(facts, encoding="utf-8")
    missing = [indices for indices in batches if not all((folder / f"{i:06d}.png").exists() for i in indices)]
    for indices, images in draw(missing):
        for i, image in zip(indices, images.permute(0, 2, 3, 1).cpu().numpy()):
            with atomic(folder / f"{i:06d}.png") as temporary:
                Image.fromarray(image).save(temporary, "png")


def parse(argv):
    parser = Parser("Draw pictures from a checkpoint.")
    what = parser.add_argument_group("what is drawn")
    what.add_argument("--ckpt", type=pathlib.Path, help="checkpoint or published file (default: newest in out/)")
    what.add_argument("--weights", choices=("ema", "ema2", "model"), default="ema", help="which of its weights")
    what.add_argument("--cfg", type=number(float, 0, 1000), help="guidance scale, 1 = none (default: the checkpoint's)")
    what.add_argument("--interval", type=interval, metavar="LOW,HIGH", help="times guided (default: the checkpoint's)")
    what.add_argument("--n", type=number(int, 1), help="images in all, classes taking turns (default: 2 a class)")
    what.add_argument("--out", type=pathlib.Path, default=pathlib.Path("samples.png"),
                      help="NAME.png: a grid; NAME.npz: ADM's sample file; anything else: a folder of PNG files")
    sampling_flags(parser)
    return parser.parse_args(argv)


@program
def main(argv=None):
    args = parse(argv)
    path = args.ckpt or newest_checkpoint(args.weights)
    device = pick_device()
    denoiser = load_denoiser(path, args.weights, device, args.target, args.input_size)
    set_floor(denoiser, args.t_eps)
    settings, grid = denoiser.settings, args.out.suffix.lower() == ".png"
    warn_if_young(settings, args.weights)
    vae = open_vae(settings, args.vae, device)
    if vae.channels != denoiser.net.in_channels:
        raise BadInput(f"--vae {vae.kind} has {vae.channels} channels, the network {denoiser.net.in_channels}")
    cfg = settings["cfg"] if args.cfg is None else args.cfg
    interval = args.interval or settings["interval"]
    names, total = settings.get("class_names"), denoiser.net.num_classes
    some = args.classes or (SHOWN if total == 1000 else range(min(total, 10))) if grid else args.classes
    classes = pick_classes(some, names, total)
    n = args.n or 2 * len(classes)
    if not args.out.absolute().parent.is_dir():
        raise BadInput(f"--out {args.out}: its folder does not exist")

    def draw(batches):
        from tqdm import tqdm
        with tqdm(total=n // (1 if grid else world_size()), unit="image", disable=not watched()) as bar:
            for indices in batches:
                yield indices, generate(denoiser, vae, indices, classes, args.seed, cfg, interval, args.steps,
                                        args.method, args.precision)
                bar.update(len(indices))
    facts = (f"{denoiser.target}-prediction, step {settings.get('step', '?')}, {args.weights}, cfg {cfg:g} in "
             f"{interval[0]:g}<t<{interval[1]:g}, {args.steps} {args.method} steps, seed {args.seed}")
    if grid and rank() == 0:
        parts = [range(i, min(n, i + args.batch)) for i in range(0, n, args.batch)]
        images = torch.cat([images.cpu() for _, images in draw(parts)])
        captions = [names[c] if names else c for c in classes]
        with atomic(args.out) as temporary:
            picture_grid(images, len(classes), captions, facts).save(temporary, "png")
    elif not grid:
        join_ranks()
        if n >= 1000:  # compiling takes a minute or two
            compile_net(denoiser.net, device)
        batches = rank_batches(n, args.batch)
        if args.out.suffix == ".npz":
            write_npz(args.out, n, denoiser.net.input_size * vae.stride, draw(batches))
        else:
            write_folder(args.out, batches, draw, f"{facts}, classes {classes}, {denoiser.t_eps=}, {path.name}")
    say(f"{path}: {facts}\n{n} images -> {args.out}")


if __name__ == "__main__":
    sys.exit(main())
