"""From noise to pictures: the ODE, guidance, checkpoint files, and the program that draws.

    python sample.py --cfg 1.5                                     the newest run -> samples.png, a captioned grid
    python sample.py --ckpt checkpoint-last.pth --cfg 2.9          the published weights
    torchrun --nproc_per_node=8 -- sample.py --n 50000 --out 50k.npz   for evaluators (ADM); or a folder of PNG files

Top to bottom: integrate dz/dt = velocity(z, t) from t = 0 (noise) to t = 1 (data); what velocity is, with guidance;
which noise and label image number i gets; how a checkpoint file becomes a denoiser; the program.
"""
import importlib.util
import pathlib
import shutil
import sys
import zlib

import numpy as np
import torch

from lib.checkpoint import newest_checkpoint, plain, read_weights
from lib.flags import Parser, interval, number, sampling_flags
from lib.log import picture_grid
from lib.samples import check_out, saving, write_folder, write_npz
from lib.run import BadInput, atomic, meet, pick_device, program, rank, say, world_size
from model import JLT, TARGETS, Denoiser, rotary_table
from vae import load_vae, to_uint8


# ---------------------------------------------------------------------------------------------------------------------
# The ODE and guidance

def ode_sample(velocity, z, steps, method="heun"):
    """Integrate dz/dt = velocity(z, t) from noise z at t = 0 to data at t = 1, in `steps` equal steps.

    velocity: a function of z and a Python float t. method: "euler" (1 evaluation a step, error ~ 1/steps) or "heun"
    (2, error ~ 1/steps²; the last step is Euler's, since nothing is to be asked at t = 1: 99 evaluations in 50 steps).
    """
    if method not in ("euler", "heun"):
        raise ValueError(f"method {method!r}: expected euler or heun")
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

    classes: ids that take turns, see balanced_labels.
    precision: "fp32", "bf16" (of the network; z and the velocity stay fp32), or "auto": bf16 where CUDA has it.
    """
    net = denoiser.net
    device = next(net.parameters()).device
    z = image_noise(seed, indices, (net.in_channels, net.input_size, net.input_size)).to(device)
    y = balanced_labels(classes, indices).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=use_bf16(precision, device)):
        z = ode_sample(guided_velocity(denoiser, y, cfg, interval), z, steps, method)
    return to_uint8(vae.decode(z))


def compile_net(net, device):
    """torch.compile, in place: the state dict keeps its names. Where it cannot work, says so, and returns None."""
    if not {"cuda": importlib.util.find_spec("triton"), "cpu": shutil.which("g++")}.get(device.type):
        return say("without torch.compile: it wants Triton on CUDA, g++ on a CPU")
    torch._dynamo.config.suppress_errors = True  # where it fails nevertheless, it warns and goes on without
    net.compile()
    return True


def use_bf16(precision, device):
    able = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)  # Turing, say, is not
    return precision == "bf16" or (precision == "auto" and able)


# ---------------------------------------------------------------------------------------------------------------------
# From a checkpoint file to a denoiser (the files themselves: lib/checkpoint.py)

def build_net(weights, path, input_size):
    """The network that fits these tensors: all sizes but the latent grid's are read off their shapes (mlp_ratio is
    always 4). Raises BadInput, naming the tensor, where one is missing, unknown or of another shape."""
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
        if not plain(weights[name]) or weights[name].shape != expected[name].shape:
            raise BadInput(f"{path}: tensor {name} does not have the shape {tuple(expected[name].shape)}")
        if not weights[name].isfinite().all():
            raise BadInput(f"{path}: tensor {name} holds values that are not finite numbers")
    net.load_state_dict({name: tensor.to(torch.float32, copy=True) for name, tensor in weights.items()}, assign=True)
    # The tables are no weights, so they are still without memory:
    net.rotary_cos, net.rotary_sin = rotary_table(input_size // patch.shape[-1], width // net.blocks[0].attn.num_heads)
    return net


def load_init(path, net, target, class_names=None):
    """The network in `path`, to start from, where it is of the kind of `net`. Where the classes are others, by number
    or by name, the label table is that of `net`. Raises BadInput where the networks differ otherwise."""
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
    known = settings.get("class_names") or class_names  # a file, or a cache, that does not name its classes is believed
    if start.num_classes != net.num_classes or (class_names and known != class_names):
        say(f"--init {path}: its {start.num_classes} classes are not the {net.num_classes} here: a new label table")
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
        for name, given in {"target": target, "input_size": input_size}.items():
            if given and settings.get(name) not in (None, given):
                raise BadInput(f"{path}: the {name} of that network is {settings[name]}, not {given}")
        target = target or settings["target"]
        if target is None:
            raise BadInput(f"{path} does not say what its network predicts: give --target x, eps or v")
        input_size = input_size or settings.get("input_size") or settings["size"] // 16  # where nothing is said: FLUX.2
        if not 1 <= input_size <= 512:
            raise ValueError(f"latent size {input_size}")
        known = {"P_mean", "P_std", "t_eps", "label_drop"} & settings.keys()
        denoiser = Denoiser(build_net(sets[weights], path, input_size), target, settings.get("loss", "v"),
                            **{name: float(settings[name]) for name in known})
        low, high = settings.get("interval", (0.1, 1))
        settings |= {"cfg": float(settings.get("cfg", 1)), "interval": (float(low), float(high))}
        if settings.get("class_names") and len(settings["class_names"]) != denoiser.net.num_classes:
            raise ValueError(f"{len(settings['class_names'])} class names for {denoiser.net.num_classes} classes")
    except BadInput:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise BadInput(f"{path}: settings that make no sense ({error})") from None
    denoiser.settings = settings
    return denoiser.to(device).eval().requires_grad_(False)


def is_young(step, decay):
    """Whether an average over about 1/(1-decay) steps still remembers the start: before three times as many."""
    return step * (1 - decay) < 3


def warn_if_young(settings, weights):
    decays, place = settings.get("ema") or [], {"ema": 0, "ema2": 1}.get(weights, 9)
    if place < len(decays) and is_young(settings["step"], decays[place]):
        say(f"warning: {settings['step']} steps are few for an EMA of {decays[place]}: it still remembers the start; "
            "compare with --weights model of the run's last.safetensors")


def open_vae(settings, channels, override=None, device="cpu"):
    """The codec that decodes a checkpoint's latents, of so many channels: the one asked for, else the local one that
    made them, where that still exists, else the one that their settings name. Raises BadInput."""
    known, hint = settings.get("vae") or {}, settings.get("hint")
    name = override or (hint if hint and pathlib.Path(hint).exists() else None) or known.get("id")
    if not name:
        raise BadInput("the latents do not say which codec made them: give --vae (flux2, taef2, pixels or a folder)")
    vae = load_vae(name, device)
    if vae.channels != channels:
        raise BadInput(f"--vae {name}: its latents have {vae.channels} channels, the network's {channels}")
    if not override and vae.id != known.get("id"):
        say(f"warning: {name} is not the codec that made the latents ({known.get('id')}): colours may be wrong")
    return vae


# ---------------------------------------------------------------------------------------------------------------------
# The program

SHOWN = (88, 207, 279, 360, 387, 417, 933, 979)  # of ImageNet, sorted by WordNet id: macaw, retriever, arctic fox ...


def pick_classes(wanted, names, num_classes):
    """Class ids of what the user typed, names or numbers; with nothing typed, all classes."""
    if not wanted:
        return list(range(num_classes))
    ids = []
    for text in wanted:
        known = names and text in names
        found = names.index(text) if known else int(text) if text.isdecimal() and len(text) < 9 else -1
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


def parse(argv):
    parser = Parser("Draw pictures from a checkpoint.")
    what = parser.add_argument_group("what is drawn")
    what.add_argument("--ckpt", type=pathlib.Path, help="checkpoint or published file (default: newest in out/)")
    what.add_argument("--weights", choices=("ema", "ema2", "model"), default="ema", help="which of its weights")
    what.add_argument("--cfg", type=number(float, 0, 1000), help="guidance scale, 1 = none (default: the checkpoint's)")
    what.add_argument("--interval", type=interval, metavar="LOW,HIGH", help="times guided (default: the checkpoint's)")
    what.add_argument("--n", type=number(int, 1, 10**7), help="images, classes taking turns (default: 2 a class)")
    what.add_argument("--out", type=pathlib.Path, default=pathlib.Path("samples.png"),
                      help="NAME.png: a grid; NAME.npz: ADM's sample file; anything else: a folder of PNG files")
    sampling_flags(parser, TARGETS)
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
    vae = open_vae(settings, denoiser.net.in_channels, args.vae, device)
    cfg = settings["cfg"] if args.cfg is None else args.cfg
    interval = args.interval or settings["interval"]
    names, total = settings.get("class_names"), denoiser.net.num_classes
    classes = pick_classes(args.classes, names, total)
    if grid and not args.classes:  # a column each: some are enough
        classes = list(SHOWN) if total == 1000 else classes[:10]
    n = args.n or 2 * len(classes)
    check_out(args.out)

    def draw(batches):
        from tqdm import tqdm
        with tqdm(total=n // (1 if grid else world_size()), unit="image", disable=rank() > 0 or None) as bar:
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
        with saving(args.out), atomic(args.out) as temporary:
            picture_grid(images, len(classes), captions, facts).save(temporary, "png")
    elif not grid:
        meet()
        if n >= 1000:  # compiling takes up to a minute or two
            compile_net(denoiser.net, device)
        batches = rank_batches(n, args.batch)
        if args.out.suffix.lower() == ".npz":
            write_npz(args.out, n, denoiser.net.input_size * vae.stride, draw(batches))
        else:
            network = zlib.crc32(denoiser.net.final_layer.linear.weight.cpu().numpy().tobytes())
            facts += f", floor {denoiser.t_eps}, {args.precision}, codec {vae.id}, network {network:08x}"
            write_folder(args.out, batches, draw, f"{facts}, classes {classes}")
    say(f"{path}: {facts}\n{n} images -> {args.out}")


if __name__ == "__main__":
    sys.exit(main())
