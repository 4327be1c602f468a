"""How fast nanoJLT is, beside what the hardware can do and beside the same thing written plainly.

    python -m bench.speed | tee speed.md
    python -m bench.speed --quick --only reading

Prints a Markdown table. The timings within a group are interleaved, so that a machine that slows
down slows all of them; among them is a large square matrix product, whose speed is called the peak.
A training step counts as three forward passes. At r images/s, the paper's run takes 71,111 / r
hours.
"""
import functools
import itertools
import statistics
import tempfile
import time
import timeit
from functools import partial

import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lib.files import prefetched
from lib.flags import Parser
from lib.inception import Inception
from lib.run import compile_net, log, peak_memory, pick_device, pinned, program, to_device
from lib.taef2 import Taef2
from model import JLT, SIZES, Denoiser
from sample import guided_velocity, ode_sample
from train import MAX_NORM, make_optimizer, read_batch, step_noise, update_ema
from vae import LatentDataset

TURNS = 5
DEVICE = pick_device()
CUDA = DEVICE.type == "cuda"
N = 64 if CUDA else 8          # images at a time
SIDE = 8192 if CUDA else 2048  # of the matrices whose product is called the peak
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Z = torch.randn(N, 128, 16, 16, device=DEVICE)  # FLUX.2 latents of 256x256 images
T, Y = torch.rand(N, device=DEVICE), torch.arange(N, device=DEVICE)


@functools.cache
def precisions():
    """Those of DTYPES that are worth timing here. A CPU without instructions for bf16 emulates it
    and may take 300 times as long as for fp32."""
    def seconds(dtype):
        a = torch.randn(256, 256, device=DEVICE).to(dtype)
        return min(timeit.repeat(lambda: (a @ a).sum().item(), number=1, repeat=5))
    emulated = seconds(torch.bfloat16) > 5 * seconds(torch.float32)
    return ["fp32"] if emulated else list(DTYPES)


def table_rows(title, n, tasks, flops=0, repeat=1):
    """Rows of the table for tasks {name: function}, in which a precision may be named. A call
    handles n images of so many FLOPs each. The calls take turns, with a product of two square
    matrices per precision, whose speed is the peak; medians are of all turns but the first."""
    peaks = {}
    for precision in precisions() if flops else ():
        a = torch.randn(SIDE, SIDE, device=DEVICE).to(DTYPES[precision])
        peaks[precision] = partial(torch.mm, a, a)
    functions, synchronize = tasks | peaks, getattr(torch, DEVICE.type).synchronize
    seconds = {name: [] for name in functions}
    for turn in range(TURNS + 1):
        for name in functions if turn % 2 else reversed(functions):
            synchronize()
            start = time.perf_counter()
            for _ in range(repeat):
                functions[name]()
            synchronize()
            seconds[name].append((time.perf_counter() - start) / repeat)
    seconds = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    first = seconds[next(iter(tasks))]
    for name in tasks:
        share = ""
        if flops:
            precision = "bf16" if "bf16" in name else "fp32"
            peak_seconds = seconds[precision] * n * flops / (2 * SIDE ** 3)
            share = f"{peak_seconds / seconds[name]:.2f} of {precision}"
        yield (f"| {title}, {name} | {n / seconds[name]:,.2f} | {first / seconds[name]:.3f} "
               f"| {share} |")


def network(model):
    """(a network, the FLOPs of its forward pass on one image)."""
    net = JLT(16, 1, 128, **SIZES[model]).to(DEVICE)
    # The counter sees inside only the plain one of attention's kernels.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        net(Z[:1], T[:1], Y[:1])
    return net, counter.get_total_flops()


def under_autocast(precision, function, *args):
    """A function without arguments that calls function(*args) in this precision."""
    def call():
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision == "bf16"):
            return function(*args)
    return call


@torch.no_grad()
def forward(model, cache):
    """The network without gradients."""
    (eager, flops), (compiled, _) = network(model), network(model)
    compile_net(compiled, DEVICE)
    guided = guided_velocity(Denoiser(eager), Y, 2.9, (0.1, 1.0))
    tasks = {}
    for precision in precisions():
        tasks |= {
            f"{precision}, eager": under_autocast(precision, eager, Z, T, Y),
            f"{precision}, compiled": under_autocast(precision, compiled, Z, T, Y),
            f"{precision}, guided": under_autocast(precision, guided, Z, 0.5)}
    yield from table_rows(f"forward, batch {N}", N, tasks, flops)


def training_step(net, cache, batch, precision="fp32", plain=False):
    """A function that trains a network for one step, as the loop of train.py does with one rank and
    one micro-batch. plain: with an optimizer and an EMA as one would write them first."""
    data, denoiser, parameters = LatentDataset(cache), Denoiser(net), list(net.parameters())
    ema_parameters = [parameter.detach().clone() for parameter in parameters]
    optimizer = make_optimizer(parameters, 1e-4)
    if plain:
        optimizer = torch.optim.AdamW(
            parameters, 1e-4, (0.9, 0.95), weight_decay=0.0, foreach=False)

    def read(step):
        return [pinned(part) for part in read_batch(data, 0, step, batch, np.arange(batch))]

    steps, batches = itertools.count(), prefetched(read, itertools.count())

    def step():
        x, y, normals, drop = (to_device(part, DEVICE) for part in next(batches))
        t = denoiser.times(normals)                                     # (batch,)
        e = step_noise(0, next(steps), 0, batch, data.shape, DEVICE)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = denoiser(x.float(), y, t, e, drop)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        if plain:
            with torch.no_grad():
                for average, parameter in zip(ema_parameters, parameters):
                    average.mul_(0.9999).add_(parameter, alpha=0.0001)
        else:
            update_ema(ema_parameters, parameters, 0.9999)
    return step


def training(model, cache):
    """The training step beside the plain one, and on a GPU by the size of the batch."""
    net, flops = network(model)
    tasks = {"fp32, plain": training_step(net, cache, N, plain=True)}
    for precision, compiled in ("fp32", False), ("bf16", False), ("bf16", True):
        if precision in precisions():
            net, _ = network(model)
            if compiled:
                compile_net(net, DEVICE)
            name = f"{precision}, {'compiled' if compiled else 'eager'}"
            tasks[name] = training_step(net, cache, N, precision)
    yield from table_rows(f"training step, batch {N}", N, tasks, 3 * flops)
    tasks.clear()
    for batch in (64, 128, 256, 512) if CUDA else ():
        torch.compiler.reset()  # otherwise it would compile for any batch size
        torch.cuda.reset_peak_memory_stats()
        net, _ = network(model)
        compile_net(net, DEVICE)
        tasks = {"bf16, compiled": training_step(net, cache, batch, "bf16")}
        yield from table_rows(f"training step, batch {batch}", batch, tasks, 3 * flops, repeat=5)
        yield f"| its peak memory: {peak_memory(DEVICE):.1f} GB | | | |"


def reading(model, cache):
    """Latents in random order, their files in the page cache, beside an array in memory."""
    rng, data = np.random.default_rng(0), LatentDataset(cache)
    array = data.batch(range(len(data)))[0].numpy()
    indices, flip = rng.integers(len(data), size=256), rng.random(256) < 0.5
    tasks = {"array[indices]": partial(array.__getitem__, indices),
             "LatentDataset": partial(data.batch, indices, flip)}
    yield from table_rows("reading 256 latents", 256, tasks, repeat=50)


@torch.no_grad()
def scoring(model, cache):
    """What an FID needs per image: drawing it, guided, decoding it, and its features. On a CPU the
    images have 64² pixels, since 256² would take hours."""
    side = 16 if CUDA else 4
    denoiser = Denoiser(JLT(side, 1, 128, **SIZES[model]).to(DEVICE).eval())
    compile_net(denoiser.net, DEVICE)
    velocity, z = guided_velocity(denoiser, Y, 2.9, (0.1, 1.0)), Z[:, :, :side, :side]
    precision = "bf16" if CUDA else "fp32"  # as in sample.py
    codec, inception = Taef2().to(DEVICE), Inception().to(DEVICE).eval()
    images = torch.zeros(N, 3, 16 * side, 16 * side, dtype=torch.uint8, device=DEVICE)
    tasks = {
        "drawing, 99 evaluations": under_autocast(precision, ode_sample, velocity, z, 50, "heun"),
        "drawing, 27 evaluations": under_autocast(
            precision, ode_sample, velocity, z, 25, "ab2", (0.1,)),
        "decoding by taef2": partial(codec.decode, z), "Inception": partial(inception, images)}
    yield from table_rows(f"scoring an image of {16 * side}², batch {N}", N, tasks)


SECTIONS = {section.__name__: section for section in (forward, training, reading, scoring)}


@program
def main(argv=None):
    parser = Parser("Speed beside the hardware's peak and beside plain code, as a Markdown table.")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="parts")
    parser.add_argument("--quick", action="store_true", help="a tiny network, to try the script")
    args = parser.parse_args(argv)
    model = "T" if args.quick else "B"
    machine = torch.cuda.get_device_name() if CUDA else f"CPU, {torch.get_num_threads()} threads"
    log(f"{machine}, torch {torch.__version__}, {model}/1, medians of {TURNS} turns\n\n"
        "| what | images/s | times the first | share of the peak |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as cache:
        x = torch.randn(1024, 128, 16, 16).half()
        tensors = {"latents": x, "latents_flip": x.flip(-1), "labels": torch.arange(1024) % 1000}
        save_file(tensors, f"{cache}/latents_rank00_shard00000.safetensors")
        for section in args.only:
            torch.compiler.reset()  # otherwise graphs of other sections count against the limit
            for row in SECTIONS[section](model, cache):
                log(row)


if __name__ == "__main__":
    raise SystemExit(main())
