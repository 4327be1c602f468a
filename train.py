"""Train a JLT: the loop, from a cache of latents to a checkpoint.

    torchrun --nproc_per_node=8 train.py --target x --patch 1     the full ImageNet run, the paper's recipe
    python train.py --target x --patch 1                          the same on one device
    python train.py --demo                                        drawn digits on a laptop's CPU, minutes, no download

Three rules shape this file. (1) What a run trains on follows from its settings and seed alone: image number p of the
endless stream, its time, noise, mirroring and hidden label are functions of (seed, step, place in the global batch), so
neither the number of GPUs, nor the micro-batch, nor an interruption changes them. (2) Everything that a run will need
is opened before step 0. (3) The hot loop never waits for the GPU: that is done where a line is logged or a file saved.
"""
import argparse
import contextlib
import copy
import functools
import pathlib
import shutil
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import vae as codec
from lib.checkpoint import agreed, check_same_run, restore, resume_point, save_checkpoint, tensors_of
from lib.digits import draw_digits
from lib.flags import Parser, number
from lib.log import Log, loss_by_time, peak_memory, picture_grid
from lib.prefetch import prefetched
from lib.run import BadInput, RunFailed, StopSignal, lock_folder, meet, pick_device, program, rank, say, world_size
from model import JLT, SIZES, TARGETS, Denoiser
from sample import compile_net, generate, is_young, load_init, open_vae, pick_classes, use_bf16

PRESETS = {  # the defaults, and those of --demo; a flag that is given wins
    "imagenet": dict(latents="data/imagenet256-flux2", model="B", patch=1, steps=250_000, batch=1024, lr=None, warmup=5,
                     decay=0.0, ema=[0.9999], cfg=2.9, log_every=100, sample_every=5000, save_every=5000),
    "demo": dict(latents="data/demo-pixels", model="T", patch=8, steps=1800, batch=64, lr=2e-3, warmup=1,
                 decay=0.3, ema=[0.99], cfg=1.5, log_every=100, sample_every=600, save_every=600),
}
OBJECTIVE = dict(P_mean=-0.8, P_std=0.8, t_eps=0.05, label_drop=0.1)  # the same for every target
CLIP = 1.0  # of the gradient's norm; not in the paper (its release added it after publication)
PATIENCE = 5  # skipped steps in a row, by the time a line is logged, at which the run fails: it would not recover
NOISE_BLOCK = 16  # noise is drawn in fixed blocks of positions of the global batch
COLUMNS = ["step", "loss", "lr", "grad_norm", "images_per_s", "data_wait", "memory_gb", "skipped",  # of log.csv
           *(f"{name}{part}" for name in ("fit", "val") for part in ("", *(f"_t{k}5" for k in range(10)))),
           "fid", "inception_score", "fid_n"]  # fit, val: the velocity's error (lib.log.loss_by_time)


# ---------------------------------------------------------------------------------------------------------------------
# What is trained on: functions of the seed, the step and the place in the global batch

@functools.lru_cache(maxsize=4)
def shuffled(seed, epoch, n):
    return np.random.default_rng([seed, 0, epoch]).permutation(n)  # 0, and below 1 and 2, keep the streams apart


def stream(seed, positions, n):
    """Indices of the images at these positions of the endless stream: each image once an epoch, in a new order."""
    epochs, places = positions // n, positions % n
    return np.concatenate([shuffled(seed, int(epoch), n)[places[epochs == epoch]] for epoch in np.unique(epochs)])


def draws(seed, step, batch):
    """(normals for times, uniforms for hiding labels, uniforms for mirroring), each (batch,), of a global batch."""
    rng = np.random.default_rng([seed, 1, step])
    return rng.standard_normal(batch, dtype=np.float32), rng.random(batch), rng.random(batch)


def step_noise(seed, step, first, count, shape, device):
    """Noise (count, *shape) for places first ... of the global batch, drawn on the device that needs it."""
    blocks = []
    for block in range(first // NOISE_BLOCK, -(-(first + count) // NOISE_BLOCK)):
        key = np.random.SeedSequence([seed, 2, step, block]).generate_state(1, np.uint64)[0]
        generator = torch.Generator(device).manual_seed(int(key))
        blocks.append(torch.randn((NOISE_BLOCK, *shape), generator=generator, device=device))
    return torch.cat(blocks).narrow(0, first % NOISE_BLOCK, count)


def read_micro(data, seed, step, batch, places, label_drop):
    """The micro-batch at these places of a step's global batch, as it comes from disk: latents in their stored type,
    labels, normals (fp32) for the times, and which labels to hide (bool)."""
    normals, hide, flip = (values[places] for values in draws(seed, step, batch))
    x, y = data.batch(stream(seed, step * batch + places, len(data)), flip < 0.5)
    parts = x, y, torch.from_numpy(normals), torch.from_numpy(hide < label_drop)
    return [part.pin_memory() for part in parts] if torch.cuda.is_available() else parts


# ---------------------------------------------------------------------------------------------------------------------
# Parts of the recipe

def learning_rate(step, steps, base, warmup, decay):
    """Linear warm-up over `warmup` steps, then constant; a fall to 0 over the last `decay` (a share) of the run."""
    return base * min(1, (step + 1) / max(warmup, 1), (steps - step) / max(decay * steps, 1) if decay else 1)


@torch.no_grad()
def update_ema(ema, net, decay):
    """ema <- decay * ema + (1 - decay) * net, all parameters in one fused call."""
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)


def draw_grid(out, step, denoiser, emas, decays, vae, data, cfg, precision):
    """Pictures from fixed noise, two a class, by the EMA once it is old enough to mean something, else the network."""
    old = not is_young(step, decays[0])
    classes = pick_classes(None, None, data.num_classes)[:8]
    images = generate(emas[0] if old else denoiser, vae, range(2 * len(classes)), classes, cfg=cfg, precision=precision)
    names = [data.class_names[c] if data.class_names else c for c in classes]
    (out / "samples").mkdir(exist_ok=True)
    title = f"step {step}, {denoiser.target}-prediction, {'EMA' if old else 'weights'}, cfg {cfg:g}"
    picture_grid(images, len(classes), names, title).save(out / "samples" / f"step{step:07d}.png")


# ---------------------------------------------------------------------------------------------------------------------
# The program

def parse(argv):
    preset = "demo" if "--demo" in (sys.argv if argv is None else argv) else "imagenet"
    parser = Parser("Train a JLT.")
    what = parser.add_argument_group("what is trained")
    what.add_argument("--demo", action="store_true", help="small digits in minutes on a CPU; other flags beside it win")
    what.add_argument("--target", choices=TARGETS, default="x", help="what the network predicts")
    what.add_argument("--loss", choices=TARGETS, default="v", help="the space of the squared error")
    what.add_argument("--model", choices=SIZES, help="size")
    what.add_argument("--patch", type=number(int, 1), help="patch size, in latent pixels")
    what.add_argument("--init", type=pathlib.Path, help="start from these weights (fine-tuning)")
    data = parser.add_argument_group("data")
    data.add_argument("--latents", type=pathlib.Path, help="cache written by vae.py")
    data.add_argument("--val", type=pathlib.Path, help="cache of images that training never sees")
    data.add_argument("--vae", help="codec for pictures (default: the one that made the cache)")
    data.add_argument("--out", type=pathlib.Path, help="the run's folder (default: out/PRESET-MODEL+PATCH-TARGET)")
    how = parser.add_argument_group("recipe")
    how.add_argument("--steps", type=number(int, 1, 10**9), help="optimizer steps in all")
    how.add_argument("--batch", type=number(int, 1, 10**6), help="images a step, over all GPUs")
    how.add_argument("--micro", type=number(int, 1), help="images a pass, at most (default: 256 on CUDA, else 64)")
    how.add_argument("--lr", type=number(float, 0), help="learning rate (default: 5e-5 * batch/256, except --demo)")
    how.add_argument("--warmup", type=number(float, 0), help="linear warm-up, in epochs")
    how.add_argument("--decay", type=number(float, 0, 1), help="share of the run, its last, in which the lr falls to 0")
    how.add_argument("--ema", type=number(float, 0, 1), nargs="+", help="decay of one or two averages of the weights")
    how.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="auto: bf16 on CUDA")
    how.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=0, help="of weights, data order, times, noise")
    how.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on CUDA)")
    when = parser.add_argument_group("once in a while (in steps, 0 = never)")
    when.add_argument("--log-every", type=number(int, 1), help="a line, and a row of log.csv")
    when.add_argument("--sample-every", type=number(int, 0), help="a grid of pictures, and the loss by time")
    when.add_argument("--save-every", type=number(int, 1), help="a checkpoint")
    when.add_argument("--keep-every", type=number(int, 0), default=0, help="an export of the EMA that is kept")
    when.add_argument("--eval-every", type=number(int, 0), default=0, help="FID against --ref")
    when.add_argument("--ref", type=pathlib.Path, help="reference statistics, npz")
    when.add_argument("--eval-n", type=number(int, 2), default=10_000, help="images scored each time")
    when.add_argument("--inception", type=pathlib.Path, help="the FID network (default: torch's cache, or download)")
    parser.set_defaults(**{name: value for name, value in PRESETS[preset].items() if name != "cfg"})
    args = parser.parse_args(argv)
    if len(args.ema) > 2:
        raise BadInput(f"--ema {' '.join(map(str, args.ema))}: at most two")
    if args.eval_every and not args.ref:
        raise BadInput("--eval-every needs --ref FILE: make one (python fid.py --images FOLDER --save-ref FILE)")
    name = f"{preset}-{args.model}{args.patch}-{args.target}" + f"-{args.loss}loss" * (args.loss != "v")
    args.out = args.out or pathlib.Path("out") / name
    args.lr = args.lr if args.lr is not None else 5e-5 * args.batch / 256
    return args, PRESETS[preset]["cfg"]


@program
def main(argv=None):
    from tqdm import tqdm
    args, cfg = parse(argv)
    device, ranks = pick_device(), world_size()
    bf16 = use_bf16(args.precision, device)
    if args.batch % ranks:
        raise BadInput(f"--batch {args.batch}: {ranks} ranks do not divide it")
    per_rank, most = args.batch // ranks, args.micro or (256 if device.type == "cuda" else 64)
    micro = next(size for size in range(min(per_rank, most), 0, -1) if per_rank % size == 0)
    accumulation = per_rank // micro
    say(f"{args.model}/{args.patch}, predicts {args.target}, loss in {args.loss}: {args.steps:,} steps of {args.batch} "
        f"images ({accumulation} x {micro} on each of {ranks} x {device.type}, {'bf16' if bf16 else 'fp32'}), "
        f"lr {args.lr:g}, warm-up {args.warmup:g} epochs, decay {args.decay:g}, AdamW (0.9, 0.95), weight decay 0, "
        f"clip {CLIP}, EMA {' '.join(map(str, args.ema))}, P_mean/P_std {OBJECTIVE['P_mean']}/{OBJECTIVE['P_std']}, "
        f"label dropout {OBJECTIVE['label_drop']}, seed {args.seed} -> {args.out}")
    meet()
    stop, stopping = StopSignal(), 0
    if args.demo and args.latents == pathlib.Path(PRESETS["demo"]["latents"]):  # its data, by the ordinary road
        pictures = args.latents.with_name("demo-digits")
        if rank() == 0:
            draw_digits(pictures, per_class=500)
        meet()
        code = codec.write_cache(pictures, args.latents, codec.load_vae("pixels"), 32, flip=False, stop=stop)
        meet()
        if code:
            return code

    # Everything that the run needs, before step 0
    data, val = codec.LatentDataset(args.latents), codec.LatentDataset(args.val) if args.val else None
    data.check()
    for name in ("shape", "vae", "num_classes", "class_names"):
        if val and getattr(val, name) != getattr(data, name):
            raise BadInput(f"--val {args.val}: another {name} ({getattr(val, name)}) than {args.latents}")
    channels, grid, width = data.shape
    if grid != width or grid % args.patch:
        raise BadInput(f"--patch {args.patch} does not divide the latents' {grid}x{width} grid, or that is no square")
    torch.manual_seed(args.seed)
    net = JLT(grid, args.patch, channels, num_classes=data.num_classes, **SIZES[args.model])
    if args.init:
        net = load_init(args.init, net, args.target, data.class_names)
    denoiser = Denoiser(net.to(device), args.target, args.loss, **OBJECTIVE)
    emas = [copy.deepcopy(denoiser).eval().requires_grad_(False) for _ in args.ema]
    parameters, averages = list(net.parameters()), [ema.net for ema in emas]
    optimizer = torch.optim.AdamW(net.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    warmup = round(args.warmup * len(data) / args.batch)
    size = sum(p.numel() for p in parameters)
    disk = 4 * size * (3 * (3 + len(emas)) + len(emas))  # fp32: last, previous, next of net, Adam's two, EMAs
    say(f"{args.latents}: {len(data):,} images of {data.num_classes} classes, latents {channels}x{grid}x{grid}; "
        f"{size / 1e6:.1f} M parameters; warm-up {warmup} steps of {args.steps:,}")
    settings = dict(
        model=args.model, patch=args.patch, target=args.target, loss=args.loss, data=data.fingerprint, steps=args.steps,
        batch=args.batch, lr=args.lr, warmup=args.warmup, decay=args.decay, ema=args.ema, seed=args.seed,
        precision="bf16" if bf16 else "fp32", input_size=grid, **OBJECTIVE)
    drawing = dict(vae=data.vae, hint=data.hint, size=data.size, class_names=data.class_names, cfg=cfg,
                   interval=(0.1, 1.0))
    lock = args.out.mkdir(parents=True, exist_ok=True) if rank() else lock_folder(args.out)  # held until main returns
    tensors, saved = resume_point(args.out)
    step, skipped = 0, 0
    if tensors is not None:
        check_same_run(args.out, saved, settings)
        restore(tensors, net, averages, optimizer)
        step, skipped, tensors = saved["step"], saved["skipped"], None
        say(f"continues {args.out} at step {step}" if step < args.steps else f"{args.out} is finished: {step} steps")
    elif shutil.disk_usage(args.out).free < disk:
        raise BadInput(f"{args.out}: three checkpoints and an export need {disk / 1e9:.1f} GB of free disk")
    if agreed(step) >= args.steps:
        return 0
    if any(is_young(args.steps, decay) for decay in args.ema):
        say(f"warning: {args.steps} steps are few for an EMA of {max(args.ema)}: lower --ema or sample --weights model")
    vae = None
    if args.eval_every or args.sample_every and rank() == 0:
        try:
            vae = open_vae(drawing, channels, args.vae, device)
        except BadInput as error:
            if args.eval_every or args.vae or data.vae:
                raise BadInput(f"{error} (--sample-every 0 trains without pictures)") from None
            say(f"no pictures: {error}")
    if args.eval_every:
        import fid
        reference, inception = fid.load_reference(args.ref), fid.load_inception(args.inception, device)
        fid.check_size(reference, "x".join([str(grid * vae.stride)] * 2))
    if args.compile or (args.compile is None and device.type == "cuda"):  # a minute's work: on a CPU, for long runs
        compile_net(net, device)
    model = denoiser
    if ranks > 1:
        model = DistributedDataParallel(denoiser, device_ids=[device.index] if device.type == "cuda" else None)

    # The loop
    first, start = rank() * per_rank, step
    jobs = ((s, first + k * micro + np.arange(micro)) for s in range(start, args.steps) for k in range(accumulation))
    batches = prefetched(lambda job: read_micro(data, args.seed, job[0], args.batch, job[1], denoiser.label_drop), jobs)
    log = Log(args.out / "log.csv", COLUMNS, start)
    bar = tqdm(total=args.steps, initial=start, unit="step", disable=rank() > 0 or None)  # None: only for a terminal
    skipped, in_a_row = torch.tensor(float(skipped), device=device), torch.zeros((), device=device)
    flag, pending = None, None
    clock, waited, since = time.perf_counter(), 0.0, start

    while step < args.steps and not stopping:
        lr = learning_rate(step, args.steps, args.lr, warmup, args.decay)
        optimizer.param_groups[0]["lr"] = lr
        loss = torch.zeros((), device=device)
        for k in range(accumulation):
            asked = time.perf_counter()
            x, y, normals, hide = (part.to(device, non_blocking=device.type == "cuda") for part in next(batches))
            waited += time.perf_counter() - asked
            e = step_noise(args.seed, step, first + k * micro, micro, data.shape, device)
            # Gradients are reduced over the ranks once a step, at the last micro-batch.
            with model.no_sync() if ranks > 1 and k < accumulation - 1 else contextlib.nullcontext():
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    part = model(x.float(), y, denoiser.times(normals), e, hide) / accumulation
                part.backward()
            loss += part.detach()
        norm = torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        # A gradient that is not finite on one rank is so on all, once reduced: all of them skip this step. The fused
        # optimizer takes the verdict as a tensor, so nobody waits for the GPU to know it (but on MPS, to be safe).
        optimizer.found_inf = (~torch.isfinite(norm)).float()
        if device.type != "mps" or not optimizer.found_inf:
            optimizer.step()
        optimizer.zero_grad()
        skipped += optimizer.found_inf
        in_a_row = (in_a_row + 1) * optimizer.found_inf
        for ema, decay in zip(averages, args.ema):
            update_ema(ema, net, decay)
        step += 1
        bar.update()
        stopping = stop.number
        if ranks > 1:  # all must stop at the same step: each reads the flag that all of them sent off one step ago
            if pending:
                pending.wait()
            stopping = int(flag) if pending else 0
            flag = torch.tensor(stop.number)
            pending = dist.all_reduce(flag, dist.ReduceOp.MAX, async_op=True)

        # Once in a while
        def due(every):
            return every and (step % every == 0 or step == args.steps)
        if due(args.log_every):
            mean = loss.cpu()  # waits for the GPU
            if ranks > 1:
                dist.all_reduce(mean)
            seconds = time.perf_counter() - clock
            speed = (step - since) * args.batch / seconds
            log.append(dict(step=step, loss=mean.item() / ranks, lr=lr, grad_norm=norm.item(), skipped=int(skipped),
                            images_per_s=round(speed, 2), data_wait=round(waited / seconds, 4),
                            memory_gb=peak_memory(device)))
            if in_a_row >= PATIENCE:
                raise RunFailed(f"step {step}: the loss or its gradient was not finite {int(in_a_row)} times in a row; "
                                f"the last good checkpoint is in {args.out}: --init from it, with a lower --lr and "
                                "another --out")
        if rank() == 0 and (due(args.save_every) or due(args.keep_every) or stopping):
            now = settings | drawing | dict(step=step, skipped=int(skipped))
            if due(args.keep_every):
                save_checkpoint(args.out / f"ema-step{step:07d}.safetensors", tensors_of(net, averages), now)
            if due(args.save_every) or stopping:
                save_checkpoint(args.out / "ema.safetensors", tensors_of(net, averages), now)
                save_checkpoint(args.out / "last.safetensors", tensors_of(net, averages, optimizer), now,
                                keep=args.out / "previous.safetensors")
        row = {}
        if due(args.sample_every) and rank() == 0:
            for name, cache in {"fit": data, "val": val}.items():
                if cache:
                    mean, by_time = loss_by_time(denoiser, cache, device, bf16)
                    row |= {"step": step, name: mean} | {f"{name}_t{k}5": value for k, value in enumerate(by_time)}
            if vae:
                draw_grid(args.out, step, denoiser, emas, args.ema, vae, data, cfg, args.precision)
        if due(args.eval_every):
            score = fid.evaluate(emas[0], vae, inception, reference, args.eval_n, args.seed, cfg, step=step,
                                 precision=args.precision)
            row |= {"step": step, "fid_n": args.eval_n, "fid": float(score["fid"])}
            row |= {"inception_score": float(score["inception_score"])} if score["inception_score"] != "n/a" else {}
        if row:
            log.append(row)
        if row or due(args.log_every) or due(args.save_every) or due(args.keep_every):
            clock, waited, since = time.perf_counter(), 0.0, step

    meet()  # torchrun ends all ranks once one has left: none leaves before rank 0 has saved
    if stopping and step < args.steps:
        say(f"stopped by a signal at step {step}, saved in {args.out}; the same command continues")
        return 128 + stopping
    say(f"done: {args.out}. Draw from it: python sample.py --ckpt {args.out / 'ema.safetensors'}")


if __name__ == "__main__":
    sys.exit(main())
