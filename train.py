"""Train a JLT: the recipe, from a cache of latents to a checkpoint.

    torchrun --nproc_per_node=8 train.py --target x --patch 1     the ImageNet run, as in the paper
    python train.py --target x --patch 1                          the same on one device
    python train.py --demo                                        digits on a laptop, in minutes

Three rules shape this file. (1) What a run trains on follows from its settings and seed alone: each
image, its time, noise, mirroring and dropped label are functions of (seed, step, position in the
global batch), whatever the number of GPUs, the micro-batch or the interruptions. (2) Everything
that a run will need is opened before step 0. (3) Between two log lines nothing waits for the GPU.

A signal (SIGTERM, Ctrl-C, SIGHUP, SIGUSR1) is looked at after each step, never within one: the step
is finished, `last` and `ema` are saved, and the program exits with 128 + signal. The same command
continues.

Other training techniques enter by main's argument `ablation`: a subclass of Denoiser (see
ablations/__init__.py) that is built in place of it and brings its own flags, network, optimizer and
extra inputs.
"""
import argparse
import copy
import functools
import itertools
import math
import pathlib
import sys
import time

import numpy as np
import torch

import fid
import vae
from lib.cache import LatentDataset, check_latents
from lib.checkpoint import FORMAT, check_same_run, export_tensors, load_init, restore
from lib.checkpoint import resume_point, run_tensors, save_checkpoint
from lib.files import atomic, check_disk, lock_folder, prefetched
from lib.flags import Parser, number, path, quoted
from lib.images import draw_digits
from lib.log import Log, error_by_time
from lib.run import BadInput, RunFailed, StopSignal, compile_net, compiled_graphs, data_parallel
from lib.run import gather_objects, log, mean_over_ranks, peak_memory, pick_device, pinned, program
from lib.run import rank, split_batch, to_device, uncompiled, use_bf16, world_size
from model import JLT, SIZES, TARGETS, Denoiser
from sample import Sampling, draw_grid

# The defaults of the paper's run and of --demo. A flag that is given wins.
PRESETS = {
    "imagenet": dict(
        latents="data/imagenet256-flux2", model="B", patch=1, steps=250_000, batch=1024,
        warmup=5, decay=0.0, ema=[0.9999], log_every=100, sample_every=5000, save_every=5000,
        cfg=2.9),
    "demo": dict(
        latents="data/demo-pixels", model="T", patch=8, steps=1800, batch=64, lr=2e-3,
        warmup=1, decay=0.3, ema=[0.99], log_every=100, sample_every=600, save_every=600,
        cfg=1.5),
}
OBJECTIVE = dict(P_mean=-0.8, P_std=0.8, t_eps=0.05, label_drop=0.1)  # the same for every target
MAX_NORM = 1.0    # of the gradient, which is clipped; not in the paper (its release added it)
PATIENCE = 5      # a run fails after so many consecutive non-finite gradients (seen when logging)
NOISE_BLOCK = 16  # positions whose noise is drawn together, however the batch is divided


# -------------------------------------------------------------------------------------------------
# What a run trains on: functions of the seed, the step and the position in the global batch

@functools.lru_cache(maxsize=4)
def permutation(seed, epoch, n):
    # The second number of a key separates the random streams of this file: 0 here, 1 and 2 below.
    return np.random.default_rng([seed, 0, epoch]).permutation(n)


def stream(seed: int, places: np.ndarray, n: int) -> np.ndarray:
    """Which of n images stands at these places (int64) of the endless training stream. Every image
    appears once per epoch, in a new order each time. Position p of step s is place s * batch + p.
    """
    images = np.empty_like(places)
    for epoch in np.unique(places // n):
        inside = places // n == epoch
        images[inside] = permutation(seed, int(epoch), n)[places[inside] % n]
    return images


def draws(seed, step, batch):
    """Of a step's global batch, each (batch,): normals that become times, uniforms that decide
    which labels are dropped, and uniforms that decide which images are mirrored."""
    rng = np.random.default_rng([seed, 1, step])
    return rng.standard_normal(batch, dtype=np.float32), rng.random(batch), rng.random(batch)


def step_noise(seed, step, first, count, shape, device) -> torch.Tensor:
    """Noise (count, *shape) of positions first ... first+count-1 of a step's global batch, drawn on
    the device in blocks that do not depend on how the batch is divided."""
    blocks = []
    for block in range(first // NOISE_BLOCK, math.ceil((first + count) / NOISE_BLOCK)):
        key = np.random.SeedSequence([seed, 2, step, block]).generate_state(1, np.uint64)[0]
        generator = torch.Generator(device).manual_seed(int(key))
        blocks.append(torch.randn((NOISE_BLOCK, *shape), generator=generator, device=device))
    return torch.cat(blocks).narrow(0, first % NOISE_BLOCK, count)


def read_batch(data, seed, step, batch, positions):
    """The images at these positions (int64) of a step's global batch: latents in their stored
    dtype, labels, the normals of their times (fp32), and which labels to drop (bool)."""
    normals, drop, flip = (values[positions] for values in draws(seed, step, batch))
    x, y = data.batch(stream(seed, step * batch + positions, len(data)), flip < 0.5)
    return x, y, torch.from_numpy(normals), torch.from_numpy(drop < OBJECTIVE["label_drop"])


# -------------------------------------------------------------------------------------------------
# The recipe

def make_optimizer(parameters, lr):
    """Any torch.optim.Optimizer will do. One made of several must give its parts its own `.state`
    and `.param_groups`, or a checkpoint holds nothing of them (as ablations/muon.py does)."""
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def learning_rate(step, steps, base, warmup_steps, decay) -> float:
    """Linear warm-up, then constant, then a linear fall to 0 over the last share `decay` of the
    run."""
    rise = (step + 1) / max(warmup_steps, 1)  # the first step already learns
    fall = (steps - step) / max(decay * steps, 1) if decay else 1
    return base * min(1, rise, fall)


@torch.no_grad()
def update_ema(ema_parameters, parameters, decay):
    """ema <- decay * ema + (1 - decay) * parameter, for whole lists in one fused call."""
    torch._foreach_lerp_(ema_parameters, parameters, 1 - decay)


def is_young(step, decay):
    """Whether an EMA still remembers much (e^-3 or more) of the weights it started from."""
    return step * (1 - decay) < 3


def parse(argv, ablation=None):
    preset = "demo" if "--demo" in (sys.argv if argv is None else argv) else "imagenet"
    parser = Parser("Train a JLT.")
    add = parser.add_argument_group("what is trained").add_argument
    add("--demo", action="store_true",
        help="small digits in minutes on a CPU; any other flag overrides this preset")
    add("--target", choices=TARGETS, default="x", help="what the network predicts")
    add("--loss", choices=TARGETS, default="v", help="the space of the squared error")
    add("--model", choices=SIZES, help="size")
    add("--patch", type=number(int, 1), help="patch size, in latent pixels")
    add("--bottleneck", type=number(int, 0),
        help="channels between patch and width; 0: one convolution (default: the size's)")
    add("--init", type=path, help="start from these weights (fine-tuning)")

    add = parser.add_argument_group("data").add_argument
    add("--latents", type=path, help="cache written by vae.py (default: "
        f"{PRESETS[preset]['latents']})")
    add("--val", type=path, help="cache of images that training never sees")
    add("--vae", help="codec for sample grids (default: the one that made the cache)")
    add("--out", type=path, help="the run's folder (default: out/PRESET-MODEL+PATCH-TARGET)")

    add = parser.add_argument_group("recipe").add_argument
    add("--steps", type=number(int, 1, 10**9), help="optimizer steps in all")
    add("--batch", type=number(int, 1, 10**6), help="images per step, over all GPUs")
    add("--micro", type=number(int, 1),
        help="images per forward pass and GPU, at most (default: 256 on CUDA, else 64)")
    add("--lr", type=number(float, 0),
        help="learning rate (default: 5e-5 * batch/256, except for --demo)")
    add("--warmup", type=number(float, 0), metavar="EPOCHS", help="linear warm-up")
    add("--decay", type=number(float, 0, 1),
        help="share of the run, at its end, in which the learning rate falls to 0")
    add("--ema", type=number(float, 0, 1), nargs="+", help="decay of one or two EMAs")
    add("--precision", choices=("auto", "bf16", "fp32"), default="auto",
        help="auto: bf16 on CUDA")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0,
        help="of weights, data order, times, noise")
    add("--compile", action=argparse.BooleanOptionalAction,
        help="torch.compile (default: on CUDA)")

    add = parser.add_argument_group("intervals, in steps").add_argument
    add("--log-every", type=number(int, 1), help="a line, and a row of log.csv")
    add("--save-every", type=number(int, 1), help="a checkpoint")
    add("--sample-every", type=number(int, 0),
        help="a sample grid, and the error by time (0: never)")
    add("--keep-every", type=number(int, 0), default=0,
        help="keep a copy of the EMA weights (0: never)")
    add("--eval-every", type=number(int, 0), default=0, help="FID against --ref (0: never)")
    add("--cfg", type=number(float, 0, 1000), help="guidance scale of sample grids and FID")
    add("--ref", type=path, help="reference statistics, npz")
    add("--eval-n", type=number(int, 2), default=10_000, help="images per FID")
    add("--inception", type=path, help="the FID network (default: torch's cache, or download)")
    if ablation:
        ablation.add_flags(parser)
    parser.set_defaults(**{k: v for k, v in PRESETS[preset].items() if k != "latents"})
    args = parser.parse_args(argv)

    args.draw_demo = args.demo and args.latents is None
    args.latents = args.latents or pathlib.Path(PRESETS[preset]["latents"])
    if args.lr is None:
        args.lr = 5e-5 * args.batch / 256
    if len(args.ema) > 2:
        raise BadInput("--ema takes at most two decays")
    if args.eval_every and not args.ref:
        raise BadInput("--eval-every needs --ref FILE (fid.py --images FOLDER --save-ref FILE)")
    if args.out is None:
        bottleneck = "" if args.bottleneck is None else f"-b{args.bottleneck}"
        loss = "" if args.loss == "v" else f"-{args.loss}loss"
        technique = f"-{ablation.name}" if ablation else ""
        args.out = pathlib.Path(f"out/{preset}-{args.model}{args.patch}{bottleneck}-{args.target}"
                                f"{loss}{technique}")
    return args


# -------------------------------------------------------------------------------------------------
# A run

@program
def main(argv=None, ablation=None):
    args, stop, device = parse(argv, ablation), StopSignal(), pick_device()
    bf16 = use_bf16(args.precision, device)
    micro_limit = args.micro or (256 if device.type == "cuda" else 64)
    first, accumulation, micro = split_batch(args.batch, micro_limit)

    # The settings that make it this run, which have to be the same when it continues.
    names = "target loss model patch steps batch lr warmup decay ema seed".split()
    settings = {name: getattr(args, name) for name in names} | OBJECTIVE
    settings |= {"format": FORMAT, "precision": "bf16" if bf16 else "fp32"}
    recipe = ", ".join(f"{name} {value}" for name, value in settings.items() if name != "format")
    log(f"{args.out}: {recipe}, clip {MAX_NORM}; each rank ({device.type}) takes {accumulation} x "
        f"{micro} images per step")

    # The data. The demo's digits become a cache in the same way as any other images.
    if args.draw_demo:
        digits = draw_digits(args.latents.with_name("demo-digits"), per_class=500)
        flags = "--vae", "pixels", "--size", "32", "--no-flip"
        if code := vae.main(["--images", str(digits), "--out", str(args.latents), *flags]):
            return code
    data = LatentDataset(args.latents)
    check_latents(data)
    val = LatentDataset(args.val) if args.val else None
    if val and (different := data.differences(val)):
        raise BadInput(f"--val {args.val}: another {', '.join(different)} than {args.latents}")
    channels, grid, width = data.shape
    if grid != width or grid % args.patch:
        raise BadInput(f"--patch {args.patch}: does not divide {grid}x{width}, or it is no square")

    # The network, its EMAs, the optimizer.
    torch.manual_seed(args.seed)
    sizes = SIZES[args.model] | ({} if args.bottleneck is None else {"bottleneck": args.bottleneck})
    network, objective = (ablation.network, ablation) if ablation else (JLT, Denoiser)  # classes
    net = network(
        grid, args.patch, channels, num_classes=data.num_classes, **sizes)
    if args.init:
        load_init(args.init, net, args.target, data.class_names)
    net = net.to(device)
    denoiser = objective(net, args.target, args.loss, **OBJECTIVE)
    emas = [copy.deepcopy(net).eval().requires_grad_(False) for _ in args.ema]
    ema_denoiser = Denoiser(emas[0], args.target, args.loss, **OBJECTIVE)
    settings["ablation"] = None
    if ablation:
        denoiser.prepare(args, data, device)
        flags = {name: getattr(args, name) for name in ablation.flags}
        settings["ablation"] = {"name": ablation.name} | flags
        optimizer = denoiser.make_optimizer(args)
    else:
        optimizer = make_optimizer(denoiser.parameters(), args.lr)
    # What an ablation trains besides the network.
    extra = {n: p for n, p in denoiser.named_parameters() if not n.startswith("net.")}
    base_lrs = [group["lr"] for group in optimizer.param_groups]
    warmup_steps = round(args.warmup * len(data) / args.batch)
    settings |= {
        "bottleneck": net.x_embedder.bottleneck, "data": data.fingerprint, "input_size": grid,
        # Any change of the time distribution shows in these.
        "times": [round(t, 6) for t in denoiser.times(torch.tensor([-1.0, 0.0, 1.0])).tolist()]}
    parameters = list(net.parameters())
    size = sum(p.numel() for p in parameters)
    log(f"{args.latents}: {len(data):,} images of {data.num_classes} classes, latents {channels}x"
        f"{grid}x{grid}; {size / 1e6:.1f} M parameters, warm-up {warmup_steps} steps, "
        f"{args.steps * args.batch / len(data):.3g} epochs")

    # Continue where this folder's run was interrupted.
    lock = lock_folder(args.out)  # held until this function returns
    step, skipped = 0, torch.zeros((), device=device)
    tensors, saved = resume_point(args.out)
    if tensors:
        check_same_run(args.out, saved, settings)
        restore(tensors, saved["optimizer"], net, emas, extra, optimizer)
        del tensors  # they would keep the old file on disk
        step, skipped = saved["step"], skipped + saved["skipped"]
        log(f"continues {args.out} at step {step}")
    else:  # three checkpoints (weights, two moments, EMAs) and an export, 4 bytes a number
        check_disk(args.out, 4 * size * (3 * (3 + len(emas)) + len(emas)))
    if len(set(gather_objects(step))) > 1:
        raise RunFailed(f"the ranks found different checkpoints, this one that of step {step}: do "
                        "all nodes see the same --out?")
    if step >= args.steps:
        return log(f"{args.out} is finished: {args.steps} steps")
    if is_young(args.steps, max(args.ema)):
        log(f"warning: an EMA of {max(args.ema)} means little after {args.steps} steps: lower "
            "--ema")

    # What sample grids and FID need, opened before hours of training.
    drawing = dict(  # what a checkpoint tells sample.py
        vae=data.vae, vae_path=data.vae_path, size=data.size, class_names=data.class_names,
        cfg=args.cfg, interval=Sampling.interval)
    sampling, codec = Sampling(cfg=args.cfg, precision=args.precision), None
    if args.eval_every or (args.sample_every and rank() == 0 and (data.vae or args.vae)):
        codec = vae.open_vae(drawing, channels, args.vae, device)
    if args.eval_every:
        reference = fid.load_reference(args.ref)
        extractors = fid.load_extractors(["fid"], args.inception, device=device)
        side = grid * codec.stride
        reference.check_size(f"{side}x{side}")

    compiled = device.type == "cuda" if args.compile is None else args.compile
    if compiled and compile_net(net, device) and args.eval_every:
        compile_net(emas[0], device)  # it draws thousands of images
    model = data_parallel(denoiser, device)
    log_file = Log(args.out / "log.csv", step)

    def read(job):  # called by threads, a few micro-batches ahead of the loop
        at, k = job
        positions = first + k * micro + np.arange(micro)
        batch = read_batch(data, args.seed, at, args.batch, positions)
        more = denoiser.extra_inputs(at, positions) if ablation else {}
        return [pinned(part) for part in batch], {name: pinned(p) for name, p in more.items()}

    batches = prefetched(read, itertools.product(range(step, args.steps), range(accumulation)))

    def save(name, tensors, keep=None, **more):
        if rank() == 0:
            now = settings | drawing | {"step": step, "skipped": int(skipped)} | more
            keep = keep and args.out / f"{keep}.safetensors"
            save_checkpoint(args.out / f"{name}.safetensors", tensors, now, keep)

    def due(every):
        return every and (step % every == 0 or step == args.steps)

    intervals = (args.log_every, args.save_every, args.keep_every, args.sample_every,
                 args.eval_every)
    ema_parameters = [list(ema.parameters()) for ema in emas]
    fused = optimizer.defaults.get("fused") and device.type == "cuda"
    in_a_row = torch.zeros((), device=device)  # consecutive skipped steps
    stopping, start, waited, images = 0, time.perf_counter(), 0.0, 0
    while step < args.steps and not stopping:
        for group, base in zip(optimizer.param_groups, base_lrs):
            group["lr"] = learning_rate(step, args.steps, base, warmup_steps, args.decay)

        loss = torch.zeros((), device=device)  # of this rank's share of the batch
        for k in range(accumulation):
            asked = time.perf_counter()
            batch, more = next(batches)
            waited += time.perf_counter() - asked
            x, y, normals, drop = (to_device(part, device) for part in batch)
            more = {name: to_device(part, device) for name, part in more.items()}
            t = denoiser.times(normals)                                 # (micro,)
            e = step_noise(args.seed, step, first + k * micro, micro, data.shape, device)
            if world_size() > 1:  # average gradients over the ranks only at the last micro-batch
                model.require_backward_grad_sync = k == accumulation - 1
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                micro_loss = model(x.float(), y, t, e, drop, **more) / accumulation
            micro_loss.backward()
            loss += micro_loss.detach()

        norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        extra_norm = torch.nn.utils.clip_grad_norm_(list(extra.values()), MAX_NORM)
        # A step whose gradient is not finite is skipped, by all ranks alike. The fused AdamW takes
        # the flag as a tensor, as from PyTorch's GradScaler, so that nothing waits for the GPU;
        # other optimizers wait here.
        bad = (~torch.isfinite(norm + extra_norm)).float()
        optimizer.found_inf = bad
        if fused or not bad:
            optimizer.step()
        optimizer.zero_grad()
        skipped, in_a_row = skipped + bad, (in_a_row + 1) * bad
        for ema, decay in zip(ema_parameters, args.ema):
            update_ema(ema, parameters, decay)
        step, images = step + 1, images + args.batch
        stopping, row = stop.agreed(), {}

        # Once in a while: save. First of all, since torchrun kills its ranks 30 s after a signal.
        if (due(args.save_every) or stopping) and rank() == 0:
            tensors, rest = run_tensors(net, emas, extra, optimizer)
            save("last", tensors, keep="previous", optimizer=rest)
            save("ema", export_tensors(emas))
        if due(args.keep_every):
            save(f"ema-step{step:07d}", export_tensors(emas))

        # Once in a while: log. Reading the loss waits for the GPU.
        if due(args.log_every):
            seconds = time.perf_counter() - start
            row |= {
                "loss": mean_over_ranks(loss.cpu()).item(), "lr": optimizer.param_groups[0]["lr"],
                "grad_norm": norm.item(), "images_per_s": round(images / seconds, 2),
                "data_wait": round(waited / seconds, 4), "memory_gb": peak_memory(device),
                "graphs": compiled_graphs(), "skipped": int(skipped)}
            if ablation:
                row |= {name: value.item() for name, value in denoiser.logged.items()}
            if in_a_row >= PATIENCE:
                log_file.append({"step": step} | row)
                raise RunFailed(f"step {step}: the gradient was not finite {int(in_a_row)} times "
                                f"in a row: --init from what {args.out} holds, with a lower --lr")

        # Once in a while: the error by time, and a sample grid of two images per class. Eagerly,
        # since compiling for these shapes would take minutes, while the other ranks wait.
        if due(args.sample_every) and not stopping and rank() == 0:
            with uncompiled():
                row |= error_by_time(denoiser, data, device, bf16, "fit")
                if val:
                    row |= error_by_time(denoiser, val, device, bf16, "val")
                if codec:
                    young = is_young(step, args.ema[0])
                    classes = list(range(data.num_classes))[:8]
                    image = draw_grid(
                        denoiser if young else ema_denoiser, codec, 2 * len(classes), classes,
                        data.class_names, sampling, f"step {step}{', no EMA' * young}")
                    (args.out / "samples").mkdir(exist_ok=True)
                    with atomic(args.out / "samples" / f"step{step:07d}.png") as temporary:
                        image.save(temporary, "png")

        # Once in a while: FID of the EMA's samples, by all ranks.
        if due(args.eval_every) and not stopping:
            scores = fid.evaluate(ema_denoiser, codec, extractors, reference, args.eval_n,
                                  Sampling(args.cfg, precision=args.precision, seed=args.seed))
            row |= {"fid_n": args.eval_n, "fid": scores["fid"],
                    "inception_score": scores["inception_score"]}

        if row:
            log_file.append({"step": step} | row)
        if any(map(due, intervals)):  # what they took is no part of the speed
            start, waited, images = time.perf_counter(), 0.0, 0

    lock.close()
    if stopping and step < args.steps:
        log(f"stopped at step {step}, saved in {args.out}; the same command continues")
        return 128 + stopping
    ckpt = args.out / "ema.safetensors"
    log(f"done: {args.out}. Draw from it: python sample.py --ckpt {quoted(ckpt)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
