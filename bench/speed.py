"""How fast nanoJLT is, beside what the hardware can do and beside the same thing written plainly.

    python -m bench.speed | tee speed.md
    python -m bench.speed --quick --only reading

Rows of one kind are timed in turns, with a large square matrix product, whose speed is the peak. A
step counts as three forward passes. At r images/s, the paper's run takes 71,111 / r hours.
"""
import contextlib
import gc
import tempfile
import time
from functools import partial

import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lib.device import compile_net, peak_memory, pick_device
from lib.flags import Parser, training_args
from lib.inception import Inception
from lib.run import program, say
from lib.taef2 import Taef2
from model import JLT, SIZES, TARGETS, Denoiser
from sample import guided_velocity, ode_sample
from train import CLIP, PRESETS, Run
from vae import DTYPES, LatentDataset

TURNS = 5
DEVICE = pick_device()
CUDA = DEVICE.type == "cuda"
SYNCHRONIZE = getattr(torch, DEVICE.type).synchronize
N = 64 if CUDA else 8                           # images at a time
Z = torch.randn(N, 128, 16, 16, device=DEVICE)  # FLUX.2 latents of 256x256 images
T, Y = torch.rand(N, device=DEVICE), torch.arange(N, device=DEVICE)


def compare(what, n, tasks, flops=0, precision="fp32", repeat=1):
    """Table rows of {name: function}, timed in turns: n images of so many FLOPs each."""
    functions, side, seconds = dict(tasks), 8192 if CUDA else 2048, {}
    if flops:
        a = torch.randn(side, side, device=DEVICE).to(DTYPES[precision])
        functions["peak"] = partial(torch.mm, a, a)
    for turn in range(TURNS + 1):
        for name in functions if turn % 2 else reversed(functions):
            SYNCHRONIZE()
            start = time.perf_counter()
            for _ in range(repeat):
                functions[name]()
            SYNCHRONIZE()
            seconds.setdefault(name, []).append(time.perf_counter() - start)
    seconds = {name: np.array(values[1:]) / repeat for name, values in seconds.items()}  # once warm
    first = seconds[next(iter(tasks))]
    for name in tasks:
        speed, times, share = n / np.median(seconds[name]), np.median(first / seconds[name]), ""
        if flops:
            work = n * flops / (2 * side ** 3)  # in products
            share = f"{np.median(work * seconds['peak'] / seconds[name]):.2f} of {precision}"
        yield f"| {what}, {name} | {speed:,.2f} | {times:.3f} | {share} |"


def network(model):
    """(the network, the FLOPs of a forward pass of one image)."""
    net = JLT(16, 1, 128, **SIZES[model]).to(DEVICE)
    # Of attention's kernels, the counter knows the parts of the plain one alone.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        net(Z[:1], T[:1], Y[:1])
    return net, counter.get_total_flops()


@torch.no_grad()
def forward(model, folder):
    """Rows of the network without gradients, given a model's name and a folder with a cache."""
    (eager, flops), (compiled, _) = network(model), network(model)
    compile_net(compiled, DEVICE)
    guided = guided_velocity(Denoiser(eager), Y, 2.9)
    tasks = {"eager": partial(eager, Z, T, Y), "compiled": partial(compiled, Z, T, Y),
             "guided, inside the interval": partial(guided, Z, 0.5),
             "guided, outside": partial(guided, Z, 0.05)}
    for precision in DTYPES:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision == "bf16"):
            yield from compare(f"forward, batch {N}, {precision}", N, tasks, flops, precision)


def open_run(model, folder, batch, flags, patch=1):
    """A run of train.py, ready to step."""
    words = (f"--latents {folder} --out {tempfile.mkdtemp(dir=folder)} --model {model} --patch "
             f"{patch} --batch {batch} --micro {batch} --lr 1e-4 {flags}").split()
    gc.collect()  # of the run before, which refers to itself
    with contextlib.redirect_stdout(None):  # what it says has no place in the table
        run = Run(training_args(words, PRESETS, TARGETS, SIZES))
        for part in run.open_data, run.build, run.start:
            part()
    return run


def plain_step(run):
    """The same step, its optimizer and its average as one writes them first."""
    parameters, averages = list(run.net.parameters()), list(run.nets[1].parameters())
    optimizer = torch.optim.AdamW(parameters, 1e-4, (0.9, 0.95), weight_decay=0, foreach=False)

    def step():
        run.micro_loss(0).backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for average, weight in zip(averages, parameters):
                average.mul_(0.9999).add_(weight, alpha=0.0001)
    return step


def training(model, folder):
    """train.py's step against the plain one; on a GPU also by the size of the micro-batch."""
    _, flops = network(model)
    tasks = {"plain": plain_step(open_run(model, folder, N, "--precision fp32 --no-compile"))}
    for flags in ("fp32 --no-compile", "bf16 --no-compile", "bf16 --compile"):
        tasks[flags] = open_run(model, folder, N, f"--precision {flags}").train_step
    yield from compare(f"training step, batch {N}", N, tasks, 3 * flops)
    for n in (64, 128, 256, 512) if CUDA else ():
        tasks.clear()
        torch.compiler.reset()  # or its graphs become those of any size
        tasks["compiled"] = open_run(model, folder, n, "--precision bf16 --compile").train_step
        torch.cuda.reset_peak_memory_stats()
        yield from compare(f"bf16 step, batch {n}", n, tasks, 3 * flops, "bf16", repeat=5)
        yield f"| its peak memory: {peak_memory(DEVICE):.1f} GB | | | |"
    yield from kernels(tasks["compiled" if CUDA else "bf16 --no-compile"])


def kernels(function):
    """Which kernels a call spends a GPU's time in, or which operators a CPU's."""
    with torch.profiler.profile() as profile:
        function()
    spent = {event.key: event.self_device_time_total if CUDA else event.self_cpu_time_total
             for event in profile.key_averages()
             if event.device_type.name == DEVICE.type.upper() and not event.is_user_annotation}
    for name in sorted(spent, key=spent.get, reverse=True)[:12]:
        yield f"| of a bf16 step: `{name[:70]}` | | | {spent[name] / sum(spent.values()):.1%} |"


def reading(model, folder):
    """Latents in random order, their files in the page cache, against an array in memory."""
    rng, data = np.random.default_rng(0), LatentDataset(folder)
    array = data.batch(range(len(data)))[0].numpy()
    rows, flip = rng.integers(len(data), size=256), rng.random(256) < 0.5
    tasks = {"array[indices]": partial(array.__getitem__, rows),
             "LatentDataset": partial(data.batch, rows, flip)}
    yield from compare("reading 256 latents", 256, tasks, repeat=50)


@torch.no_grad()
def scoring(model, folder):
    """Sampling and the rest of an FID cell, guided: on a CPU of 64², or it would take hours."""
    side = 16 if CUDA else 4
    denoiser = Denoiser(JLT(side, 1, 128, **SIZES[model]).to(DEVICE).eval())
    compile_net(denoiser.net, DEVICE)
    cast = torch.autocast(DEVICE.type, torch.bfloat16, enabled=CUDA)  # as fid.py draws there
    velocity, z = cast(guided_velocity(denoiser, Y, 2.9)), Z[:, :, :side, :side]
    codec, inception = Taef2().to(DEVICE), Inception().to(DEVICE).eval()
    images = torch.zeros(N, 3, 16 * side, 16 * side, dtype=torch.uint8, device=DEVICE)
    tasks = {"drawing, 99 evaluations": partial(ode_sample, velocity, z, 50),
             "drawing, 27 evaluations": partial(ode_sample, velocity, z, 25, "ab2", (0.1,)),
             "decoding by taef2": partial(codec.decode, z), "Inception": partial(inception, images)}
    yield from compare(f"an FID cell of {16 * side}², batch {N}", N, tasks)


def growth(model, folder):
    """How a training step grows with the batch and with the patch."""
    for batch, patch in (N, 1), (N // 2, 1), (N // 4, 1), (N, 2), (N, 4):
        step = open_run(model, folder, batch, "--no-compile", patch).train_step
        yield from compare(f"training step, patch {patch}", batch, {f"batch {batch}": step})


SECTIONS = {section.__name__: section for section in (forward, training, reading, scoring, growth)}


@program
def main(argv=None):
    parser = Parser("Speed beside the hardware's peak and beside plain code, as a Markdown table.")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="parts")
    parser.add_argument("--quick", action="store_true", help="a tiny network: to try the script")
    args = parser.parse_args(argv)
    model = "T" if args.quick else "B"
    where = torch.cuda.get_device_name() if CUDA else f"CPU, {torch.get_num_threads()} threads"
    say(f"{where}, torch {torch.__version__}, {model}/1, medians of {TURNS} turns\n\n"
        "| what | images/s | times the first | share of the peak |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        x = torch.randn(1024, 128, 16, 16).half()
        tensors = {"latents": x, "latents_flip": x.flip(-1), "labels": torch.arange(1024) % 1000}
        save_file(tensors, f"{folder}/latents_rank00_shard00000.safetensors")
        for section in args.only:
            torch.compiler.reset()  # or the graphs of other sections count against the limit
            for line in SECTIONS[section](model, folder):
                say(line)


if __name__ == "__main__":
    raise SystemExit(main())
