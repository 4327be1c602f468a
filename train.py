"""Train a JLT: the recipe, from a cache of latents to a checkpoint.

    torchrun --nproc_per_node=8 train.py --target x --patch 1     the ImageNet run, as in the paper
    python train.py --target x --patch 1                          the same on one device
    python train.py --demo                                        digits on a laptop, in minutes

Three rules shape this file. (1) What a run trains on follows from its settings and seed alone: each
image, its time, noise, mirroring and hidden label are functions of (seed, step, place in the global
batch), whatever the number of GPUs, the micro-batch or the interruptions. (2) Everything that a run
will need is opened before step 0. (3) The hot loop never waits for the GPU; logging and saving do.
One seam, the argument `ablation` of main, lets another training technique in (ablations/).
"""
import copy
import functools
import itertools
import math
import pathlib
import sys

import numpy as np
import torch

import fid
import vae as codec
from lib.cache import check_latents, mean_latent
from lib.checkpoint import export_tensors, is_young, load_init, resume, run_tensors
from lib.checkpoint import save_checkpoint
from lib.device import compile_net, compiled_graphs, data_parallel, peak_memory, pick_device
from lib.device import pinned, to_device, uncompiled, use_bf16
from lib.files import lock_folder, prefetched
from lib.flags import training_args
from lib.images import draw_digits
from lib.log import Log, Meter, errors_by_time
from lib.run import BadInput, RunFailed, StopSignal, barrier, connect, program, rank, say
from lib.run import mean_over_ranks, split_batch
from model import JLT, SIZES, TARGETS, Denoiser
from sample import Sampling, draw_grid

# The defaults, and those of --demo; a flag that is given wins.
PRESETS = {
    "imagenet": dict(
        latents="data/imagenet256-flux2", model="B", patch=1, steps=250_000, batch=1024, lr=None,
        warmup_epochs=5, decay=0.0, ema=[0.9999], log_every=100, sample_every=5000,
        save_every=5000, cfg=2.9),
    "demo": dict(
        latents="data/demo-pixels", model="T", patch=8, steps=1800, batch=64, lr=2e-3,
        warmup_epochs=1, decay=0.3, ema=[0.99], log_every=100, sample_every=600, save_every=600,
        cfg=1.5),
}
OBJECTIVE = dict(P_mean=-0.8, P_std=0.8, t_eps=0.05, label_drop=0.1)  # the same for every target
CLIP = 1.0        # of the gradient's norm; not in the paper (its release added it afterwards)
PATIENCE = 5      # skipped steps in a row, seen where a line is logged, at which the run fails
NOISE_BLOCK = 16  # places whose noise is drawn together, however the batch is divided


# -------------------------------------------------------------------------------------------------
# What is trained on: functions of the seed, the step and the place in the global batch

@functools.lru_cache(maxsize=4)
def shuffled(seed, epoch, n):
    # The second number of a key keeps the streams of this file apart: 0 here, 1 and 2 below.
    return np.random.default_rng([seed, 0, epoch]).permutation(n)


def stream(seed: int, positions: np.ndarray, n: int) -> np.ndarray:
    """Indices of the images at these positions (int64) of the endless stream: each of n images once
    an epoch, in a new order every time."""
    order = np.empty_like(positions)
    for epoch in np.unique(positions // n):
        inside = positions // n == epoch
        order[inside] = shuffled(seed, int(epoch), n)[positions[inside] % n]
    return order


def draws(seed, step, batch):
    """Of a step's global batch, each (batch,): normals for times, uniforms for hiding labels and
    for mirroring."""
    rng = np.random.default_rng([seed, 1, step])
    return rng.standard_normal(batch, dtype=np.float32), rng.random(batch), rng.random(batch)


def step_noise(seed, step, first, count, shape, device) -> torch.Tensor:
    """Noise (count, *shape) for places first ... of a step's global batch, drawn on the device."""
    blocks = []
    for block in range(first // NOISE_BLOCK, math.ceil((first + count) / NOISE_BLOCK)):
        key = np.random.SeedSequence([seed, 2, step, block]).generate_state(1, np.uint64)[0]
        generator = torch.Generator(device).manual_seed(int(key))
        blocks.append(torch.randn((NOISE_BLOCK, *shape), generator=generator, device=device))
    return torch.cat(blocks).narrow(0, first % NOISE_BLOCK, count)


def read_micro(data, seed, step, batch, places):
    """The micro-batch at these places (int64) of a step's global batch: latents in their stored
    type, labels, normals (fp32) for the times, which labels to hide (bool)."""
    normals, hide, flip = (values[places] for values in draws(seed, step, batch))
    x, y = data.batch(stream(seed, step * batch + places, len(data)), flip < 0.5)
    drop = torch.from_numpy(hide < OBJECTIVE["label_drop"])
    return [pinned(part) for part in (x, y, torch.from_numpy(normals), drop)]


# -------------------------------------------------------------------------------------------------
# A run: opened before step 0, stepped, looked at once in a while (in the order of its methods)

def learning_rate(step, steps, base, warmup_steps, decay) -> float:
    """Linear warm-up, then constant, then a linear fall to 0 over a share `decay` of the run."""
    rise = (step + 1) / max(warmup_steps, 1)  # the first step already learns
    fall = (steps - step) / max(decay * steps, 1) if decay else 1
    return base * min(1, rise, fall)


@torch.no_grad()
def update_ema(ema, net, decay):
    """ema <- decay * ema + (1 - decay) * net, all parameters in one fused call."""
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)


class Run:
    def __init__(self, args, ablation=None):
        self.args, self.ablation, self.step, self.device = args, ablation, 0, pick_device()
        self.bf16 = use_bf16(args.precision, self.device)
        self.compile = self.device.type == "cuda" if args.compile is None else args.compile
        most = args.micro or (256 if self.device.type == "cuda" else 64)
        self.first, self.accumulation, self.micro = split_batch(args.batch, most)
        # What makes it this run, and has to be the same when it continues.
        names = "model patch target loss steps batch lr warmup_epochs decay ema seed".split()
        self.settings = {name: getattr(args, name) for name in names} | OBJECTIVE | {
            "precision": "bf16" if self.bf16 else "fp32",
            "ablation": ablation and ablation.constants(args)}
        recipe = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        say(f"{args.out}: {recipe}, clip {CLIP}; each rank ({self.device.type}) takes "
            f"{self.accumulation} x {self.micro} images a step, torch.compile {self.compile}")

    def open_data(self):
        args = self.args
        self.data = codec.LatentDataset(args.latents)
        check_latents(self.data)
        self.mean_latent = mean_latent(self.data) if rank() == 0 else None  # rank 0 saves it
        self.val = codec.LatentDataset(args.val) if args.val else None  # never trained on
        if self.val and (wrong := self.data.differs(self.val)):
            raise BadInput(f"--val {args.val}: another {', '.join(wrong)} than {args.latents}")
        channels, grid, width = self.data.shape  # of a latent
        if grid != width or grid % args.patch:
            raise BadInput(f"--patch {args.patch}: does not divide {grid}x{width}, or no square")
        self.settings |= {"data": self.data.fingerprint, "input_size": grid}

    def build(self):
        """The network, its averages, the optimizer."""
        args, data, (channels, grid, _) = self.args, self.data, self.data.shape
        torch.manual_seed(args.seed)
        net = JLT(grid, args.patch, channels, num_classes=data.num_classes, **SIZES[args.model])
        if args.init:
            net = load_init(args.init, net, args.target, data.class_names)
        self.net = net.to(self.device)
        meaning = args.target, args.loss
        self.denoiser = (self.ablation or Denoiser)(self.net, *meaning, **OBJECTIVE)
        emas = [Denoiser(copy.deepcopy(self.net), *meaning, **OBJECTIVE) for _ in args.ema]
        self.emas = [ema.eval().requires_grad_(False) for ema in emas]
        self.nets = [self.net, *(ema.net for ema in emas)]
        if self.ablation:
            self.denoiser.prepare(self)
        self.beside = {name: p for name, p in self.denoiser.named_parameters()
                       if not name.startswith("net.")}  # what an ablation trains as well
        self.optimizer = torch.optim.AdamW(
            self.denoiser.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        self.warmup_steps = round(args.warmup_epochs * len(data) / args.batch)
        self.skipped, self.in_a_row = torch.zeros(2, device=self.device)  # counts of steps
        size = sum(p.numel() for p in self.denoiser.parameters()) / 1e6
        say(f"{args.latents}: {len(data):,} images of {data.num_classes} classes, latents "
            f"{channels}x{grid}x{grid}; {size:.1f} M parameters, warm-up {self.warmup_steps} steps")

    def resume(self):
        """Take the run's folder, and go on from its newest checkpoint where there is one."""
        self.lock = lock_folder(self.args.out)  # held as long as this process lives
        self.step, skipped = resume(
            self.args.out, self.settings, self.nets, self.optimizer, self.beside)
        self.skipped += skipped

    def open_judges(self):
        """What pictures and scores need: the codec, reference statistics, Inception."""
        args, data, self.vae = self.args, self.data, None
        self.drawing = dict(  # what the checkpoint tells a sampler
            vae=data.vae, vae_path=data.vae_path, size=data.size, class_names=data.class_names,
            cfg=args.cfg, interval=Sampling.interval)
        pictures = args.sample_every and rank() == 0 and (data.vae or args.vae)
        if pictures or args.eval_every:
            self.vae = codec.open_vae(self.drawing, data.shape[0], args.vae, self.device)
        if args.eval_every:
            self.reference = fid.load_reference(args.ref)
            self.judges = fid.load_judges(["fid"], args.inception, device=self.device)
            side = data.shape[1] * self.vae.stride
            self.reference.check_size(f"{side}x{side}")

    def start(self):
        args = self.args
        if self.compile and compile_net(self.net, self.device) and args.eval_every:
            compile_net(self.emas[0].net, self.device)  # it draws thousands of images: that pays
        self.model = data_parallel(self.denoiser, self.device)
        jobs = itertools.product(range(self.step, args.steps), range(self.accumulation))
        self.batches = prefetched(self.read, jobs)  # by threads, a few micro-batches ahead
        self.log, self.meter = Log(args.out / "log.csv", self.step), Meter()

    def read(self, job):
        """A micro-batch, and what an ablation needs of it besides, {name: tensor}."""
        args, (step, k) = self.args, job
        places = self.first + k * self.micro + np.arange(self.micro)
        more = self.denoiser.more(step, places) if self.ablation else {}
        more = {name: pinned(part) for name, part in more.items()}
        return read_micro(self.data, args.seed, step, args.batch, places), more

    def train_step(self):
        """One step of the optimizer. Returns (this rank's loss, the gradient's norm, the learning
        rate), the first two as tensors, for which nobody has waited."""
        args = self.args
        lr = learning_rate(self.step, args.steps, args.lr, self.warmup_steps, args.decay)
        self.optimizer.param_groups[0]["lr"] = lr
        if self.ablation and self.denoiser.freezes(self.step):  # DDP has to learn of it
            self.model = data_parallel(self.denoiser, self.device)
        loss = torch.zeros((), device=self.device)  # of the rank's share of the batch
        for k in range(self.accumulation):
            # DDP averages gradients over the ranks once a step, with the last micro-batch.
            self.model.require_backward_grad_sync = k == self.accumulation - 1
            micro_loss = self.micro_loss(k) / self.accumulation
            micro_loss.backward()
            loss += micro_loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.net.parameters(), CLIP)
        beside = torch.nn.utils.clip_grad_norm_(self.beside.values(), CLIP)  # mostly of nothing: 0
        # Where it is not finite, all ranks skip the step. The fused optimizer takes that as a
        # tensor: nobody waits for the GPU.
        self.optimizer.found_inf = bad = (~torch.isfinite(norm + beside)).float()
        if self.device.type != "mps" or not bad:  # there, to be safe, it is waited for
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.skipped += bad
        self.in_a_row = (self.in_a_row + 1) * bad
        for ema, decay in zip(self.nets[1:], args.ema):
            update_ema(ema, self.net, decay)
        self.step += 1
        self.meter.images += args.batch
        return loss, norm, lr

    def micro_loss(self, k):
        parts, more = self.meter.waiting(self.batches)
        x, y, normals, drop = (to_device(part, self.device) for part in parts)
        more = {name: to_device(part, self.device) for name, part in more.items()}
        t = self.denoiser.times(normals)                                # (micro,)
        first = self.first + k * self.micro
        e = step_noise(self.args.seed, self.step, first, self.micro, self.data.shape, self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return self.model(x.float(), y, t, e, drop, **more)

    def log_line(self, loss, norm, lr):
        loss = mean_over_ranks(loss.cpu()).item()  # .cpu() and .item() wait for the GPU
        self.log.append(dict(
            step=self.step, loss=loss, lr=lr, grad_norm=norm.item(), **self.meter.rates(),
            memory_gb=peak_memory(self.device), graphs=compiled_graphs(),
            skipped=int(self.skipped)))
        if self.in_a_row >= PATIENCE:
            raise RunFailed(f"step {self.step}: not finite {int(self.in_a_row)} times in a row: "
                            f"--init from what {self.args.out} holds, with a lower --lr")

    def save(self, name, tensors, keep=None):
        """Write a file of the run's folder, by rank 0. keep: what the old one is called then."""
        if rank() == 0:
            now = self.settings | self.drawing | dict(step=self.step, skipped=int(self.skipped))
            path = self.args.out / f"{name}.safetensors"
            tensors["data.mean_latent"] = self.mean_latent
            save_checkpoint(path, tensors, now, keep and path.with_stem(keep))

    def look(self):
        """The error by time, and a grid of pictures, two a class."""
        args, caches = self.args, {"fit": self.data, "val": self.val}
        row = errors_by_time(self.denoiser, caches, self.device, self.bf16)
        if self.vae:  # by the average, once it is old enough
            young, names = is_young(self.step, args.ema[0]), self.data.class_names
            classes = list(range(self.data.num_classes))[:8]
            grid = draw_grid(
                self.denoiser if young else self.emas[0], self.vae, 2 * len(classes), classes,
                names, Sampling(args.cfg, precision=args.precision),
                f"step {self.step}{', no EMA' * young}")
            (args.out / "samples").mkdir(exist_ok=True)
            grid.save(args.out / "samples" / f"step{self.step:07d}.png")
        return row

    def score(self):
        """FID of the first average's samples, by all ranks."""
        args, names = self.args, ("fid", "inception_score")
        row = fid.evaluate(
            self.emas[0], self.vae, self.judges, self.reference, args.eval_n,
            Sampling(cfg=args.cfg, precision=args.precision, seed=args.seed))
        return {"fid_n": args.eval_n} | {n: float(row[n]) for n in names if row[n] != "n/a"}


# -------------------------------------------------------------------------------------------------
# The program

@program
def main(argv=None, ablation=None):
    args = training_args(argv, PRESETS, TARGETS, SIZES, ablation)
    connect()
    stop, stopping, run = StopSignal(), 0, Run(args, ablation)
    if args.latents == pathlib.Path(PRESETS["demo"]["latents"]):  # made by the ordinary road
        pictures = draw_digits(args.latents.with_name("demo-digits"), per_class=500)
        pixels = codec.load_vae("pixels")
        if code := codec.write_cache(pictures, args.latents, pixels, 32, flip=False, stop=stop):
            return code
        barrier()
    run.open_data()
    run.build()
    run.resume()
    if run.step >= args.steps:
        return say(f"{args.out} is finished: {args.steps} steps")
    if is_young(args.steps, max(args.ema)):
        say(f"warning: {args.steps} steps are few for an EMA of {max(args.ema)}: lower --ema")
    run.open_judges()
    run.start()
    pauses = (args.log_every, args.save_every, args.keep_every, args.sample_every, args.eval_every)

    def due(every):
        return every and (run.step % every == 0 or run.step == args.steps)

    while run.step < args.steps and not stopping:
        loss, norm, lr = run.train_step()
        stopping, row = stop.agreed(), {}
        if due(args.log_every):
            run.log_line(loss, norm, lr)
        # First what the run continues from: torchrun kills its ranks 30 s after a signal.
        if due(args.save_every) or stopping:
            run.save("last", run_tensors(run.nets, run.optimizer, run.beside), keep="previous")
            run.save("ema", export_tensors(run.nets))
        if due(args.keep_every):
            run.save(f"ema-step{run.step:07d}", export_tensors(run.nets))
        if due(args.sample_every) and rank() == 0:
            with uncompiled():  # graphs for these shapes take minutes, while the other ranks wait
                row |= run.look()
        if due(args.eval_every) and not stopping:
            row |= run.score()
        if row:
            run.log.append({"step": run.step} | row)
        if any(map(due, pauses)):  # what they take is no part of the speed
            run.meter.restart()

    barrier()  # torchrun ends all ranks once one ends with a code: rank 0 has to have saved
    if stopping and run.step < args.steps:
        say(f"stopped at step {run.step}, saved in {args.out}; the same command continues")
        return 128 + stopping
    say(f"done: {args.out}. Draw from it: python sample.py --ckpt {args.out / 'ema.safetensors'}")


if __name__ == "__main__":
    sys.exit(main())
