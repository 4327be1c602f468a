"""How fast nanoJLT is, beside what the hardware can do and beside the same thing written plainly.

    python -m bench.speed                   on a laptop's CPU or on one GPU, in minutes
    python -m bench.speed --only reading    one section of it
    python -m bench.speed --quick           2 of the 12 blocks and 3 turns: does the script work here?
    python -m bench.speed --busy            processor time of one thread: for a CPU that others use at the same time

What is compared is timed in turns, in one run, forwards and backwards; a ratio is the median of the turns' ratios.
FLOPs follow from the architecture (`flops` below); a training step counts as three forward passes. The peak is that of
a large square matrix product, timed in the same turns.
"""
import copy, functools, itertools, pathlib, platform, re, statistics, subprocess, sys, tempfile, time, types

import numpy as np
import torch
from safetensors.torch import save_file

from lib.flags import Parser
from lib.inception import Inception
from lib.log import peak_memory
from lib.prefetch import prefetched
from lib.run import BadInput, atomic, pick_device, program
from model import JLT, SIZES, Denoiser
from sample import compile_net, generate, guided_velocity, ode_sample
from train import CLIP, read_micro, step_noise, update_ema
from vae import LatentDataset

SHAPE = 128, 16, 16            # a FLUX.2 latent of a 256x256 image
STEPS, BATCH = 250_000, 1024   # the paper's run
median = statistics.median


def processor_time():
    """Seconds of processor time, of this process and of those it started (not on Windows)."""
    import resource
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


class Bench:
    """Where and how to measure, and the table of what was measured."""

    def __init__(self, quick, busy):
        self.device, self.clock = pick_device(), processor_time if busy else time.perf_counter
        self.cuda, self.depth, self.turns = self.device.type == "cuda", 2 if quick else 12, 3 if quick else 5
        self.lines = []
        if busy:
            torch.set_num_threads(1)
        cpuinfo = pathlib.Path("/proc/cpuinfo").read_text() if pathlib.Path("/proc/cpuinfo").exists() else ""
        self.bf16 = self.cuda or bool(re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", cpuinfo))
        cpu = (re.findall("model name.*: (.*)", cpuinfo) or [platform.processor()])[0]
        name = torch.cuda.get_device_name() if self.cuda else f"{cpu}, {torch.get_num_threads()} threads"
        self.print(f"{name}, torch {torch.__version__}, {'processor time' if busy else 'wall clock'}, medians of "
                   f"{self.turns} turns{', 2 blocks instead of 12' * quick}\n")
        self.print("| what | measured | aim |\n|---|---|---|")

    def print(self, line):
        self.lines.append(line)
        print(line, flush=True)

    def row(self, what, measured, aim=""):
        self.print(f"| {what} | {measured} | {aim} |")

    def time(self, function, repeat=1):
        """Seconds that one call takes, until the GPU is done with it."""
        wait = getattr(torch, self.device.type).synchronize
        wait()
        begin = self.clock()
        for _ in range(repeat):
            function()
        wait()
        return (self.clock() - begin) / repeat

    def in_turns(self, tasks, repeat=1):
        """{name: [seconds of each turn]} of functions without arguments. A first turn, not counted, warms them up."""
        seconds = {name: [] for name in tasks}
        for turn in range(self.turns + 1):
            for name in list(tasks)[::1 if turn % 2 else -1]:
                seconds[name].append(self.time(tasks[name], repeat))
        return {name: values[1:] for name, values in seconds.items()}

    def network(self, patch=1, depth=None):
        return JLT(SHAPE[1], patch, SHAPE[0], **(SIZES["B"] | {"depth": depth or self.depth})).to(self.device)

    def product(self, dtype):
        """(a large matrix product, its FLOPs): the peak."""
        n = 8192 if self.cuda else 2048
        a, b = (torch.randn(n, n, device=self.device).to(dtype) for _ in range(2))
        return lambda: a @ b, 2 * n ** 3


def ratio(above, below):
    return median(a / b for a, b in zip(above, below))


def flops(net):
    """Of one image's forward pass: 2 per weight of a matrix, as often as it is used, and attention's two products."""
    tokens, width = (net.input_size // net.patch_size) ** 2, net.blocks[0].attn.proj.in_features
    weights = {name: module.weight.numel() for name, module in net.named_modules()
               if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))}
    uses = {name: 1 if "adaLN" in name or "t_embedder" in name else tokens for name in weights}  # by image, or by token
    return 2 * sum(weights[name] * uses[name] for name in weights) + 4 * tokens ** 2 * width * len(net.blocks)


def write_cache(folder, shape, shards, rows):
    """A cache of noise, in LightningDiT's layout."""
    folder.mkdir()
    x = {name: torch.randn(rows, *shape).half() for name in ("latents", "latents_flip")}
    for k in range(shards):
        save_file(x | {"labels": torch.arange(rows) % 1000}, folder / f"latents_rank00_shard{k:05d}.safetensors")
    return LatentDataset(folder)


# ---------------------------------------------------------------------------------------------------------------------
# The sections

def forward(bench, scratch):
    """The network without gradients, against the peak."""
    net, n, device = bench.network().eval(), 256 if bench.cuda else 8, bench.device
    compiled = copy.deepcopy(net)
    possible = compile_net(compiled, device)
    z, t, y = torch.randn(n, *SHAPE, device=device), torch.rand(n, device=device), torch.arange(n, device=device)

    @torch.inference_mode()
    def run(net, bf16):
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            net(z, t, y)
    (product, work), (product16, _) = bench.product(torch.float32), bench.product(torch.bfloat16)
    tasks = {"fp32": lambda: run(net, False), "fp32, compiled": lambda: run(compiled, False), "fp32 peak": product}
    if bench.bf16:
        tasks |= {"bf16": lambda: run(net, True), "bf16, compiled": lambda: run(compiled, True), "bf16 peak": product16}
    tasks = {name: task for name, task in tasks.items() if possible or "compiled" not in name}
    seconds = bench.in_turns(tasks)
    for name in [name for name in tasks if "peak" not in name]:
        peak = f"{name[:4]} peak"
        share = ratio(seconds[peak], seconds[name]) * n * flops(net) / work
        bench.row(f"forward B/1, batch {n}, {name}: share of the {peak}",
                  f"{share:.2f} of {work / median(seconds[peak]) / 1e12:.3g} TFLOP/s "
                  f"({n / median(seconds[name]):.1f} images/s)",
                  {"fp32": "0.80", "bf16": "0.50"}[name[:4]] * (not bench.cuda))
    for name in [name for name in ("fp32", "bf16") if name in tasks]:
        breakdown(bench, f"the forward pass, {name}", tasks[name], 5)
    if not bench.bf16:
        bench.row("forward, bf16", "bf16: no instructions")
    else:
        peaks = f"the peaks: {ratio(seconds['fp32 peak'], seconds['bf16 peak']):.2f}"
        for name in ("", ", compiled") if possible else ("",):
            bench.row(f"forward, bf16{name}: times as fast as fp32{name} ({peaks})",
                      f"{ratio(seconds[f'fp32{name}'], seconds[f'bf16{name}']):.2f}", "2.5" * (not bench.cuda))


def breakdown(bench, what, function, most):
    """What one call spends most time in, by the device's own time."""
    with torch.profiler.profile() as profile:
        bench.time(function)
    spent = lambda event: event.self_device_time_total if bench.cuda else event.self_cpu_time_total
    events = [e for e in profile.key_averages() if e.device_type.name == bench.device.type.upper() and spent(e)
              and not e.is_user_annotation]  # those contain others
    for event in sorted(events, key=spent, reverse=True)[:most]:
        share = spent(event) / sum(map(spent, events))
        bench.row(f"of {what}: `{event.key[:70].replace('|', '/')}`, {event.count} times", f"{share:.1%}")


class Trainer:
    """A network with all that a training step needs: train.py's step or, plain, the same as one writes it first."""

    def __init__(self, bench, net, plain=False, compiled=False):
        self.device, self.plain, self.net, self.denoiser = bench.device, plain, net, Denoiser(net)
        self.ema = copy.deepcopy(net).requires_grad_(False)
        how = dict(foreach=False, fused=False) if plain else dict(fused=True)
        self.optimizer = torch.optim.AdamW(net.parameters(), 1e-4, (0.9, 0.95), weight_decay=0.0, **how)
        self.compiled = compiled and compile_net(net, bench.device)

    def loss(self, batch, bf16):
        x, y, normals, hide = (part.to(self.device, non_blocking=self.device.type == "cuda") for part in batch)
        e = step_noise(0, 0, 0, len(x), x.shape[1:], self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            return self.denoiser(x.float(), y, self.denoiser.times(normals), e, hide)

    def update(self):
        norm = torch.nn.utils.clip_grad_norm_(list(self.net.parameters()), CLIP)
        if not self.plain:
            self.optimizer.found_inf = (~torch.isfinite(norm)).float()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if not self.plain:
            return update_ema(self.ema, self.net, 0.9999)
        with torch.no_grad():
            for average, weight in zip(self.ema.parameters(), self.net.parameters()):
                average.mul_(0.9999).add_(weight, alpha=0.0001)

    def step(self, batch, bf16):
        self.loss(batch, bf16).backward()
        self.update()


def training(bench, scratch):
    """train.py's step against the plain one; on a GPU also as the real run has it, and what that run would take."""
    n, work = 64 if bench.cuda else 8, 3 * flops(bench.network())
    data = write_cache(scratch / "training", SHAPE, 4, 1024 if bench.cuda else 16)
    batch = read_micro(data, 0, 0, n, np.arange(n), 0.1)
    ours, plain = Trainer(bench, bench.network()), Trainer(bench, bench.network(), plain=True)
    product, product_work = bench.product(torch.float32)
    tasks = {"plain": lambda: plain.step(batch, False), "fp32": lambda: ours.step(batch, False), "peak": product}
    if bench.bf16:
        tasks["bf16"] = lambda: ours.step(batch, True)
    if bench.bf16 and not bench.cuda:  # what train.py --precision bf16 --compile does (on CUDA: full_run)
        compiled = Trainer(bench, bench.network(), compiled=True)
        if compiled.compiled:
            tasks["bf16, compiled"] = lambda: compiled.step(batch, True)
    seconds = bench.in_turns(tasks)
    for name, aim in {"fp32": "1.0", "bf16": "2.2", "bf16, compiled": "2.2"}.items():
        if name not in seconds:
            continue
        measured = f"{ratio(seconds['plain'], seconds[name]):.2f} ({n / median(seconds[name]):.2f} images/s)"
        bench.row(f"training step B/1, batch {n}, {name}: times as fast as the plain eager fp32 step", measured, aim)
    share = ratio(seconds["peak"], seconds["fp32"]) * n * work / product_work
    bench.row("the fp32 step: share of the fp32 peak", f"{share:.2f}")
    bench.row("peak memory of these networks with optimizer and EMA", f"{peak_memory(bench.device):.1f} GB")
    if bench.cuda:
        del ours, plain, product, tasks
        full_run(bench, data)


def full_run(bench, data):
    """On one GPU: steps in bf16 from latents on disk, compiled and not; where their time goes; memory; hours in all."""
    def reader(n):
        return prefetched(lambda s: read_micro(data, 0, s, BATCH, np.arange(n), 0.1), itertools.count())
    batches, (product, product_work) = reader(256), bench.product(torch.bfloat16)
    one, two = (Trainer(bench, bench.network(patch), compiled=True) for patch in (1, 2))
    trainers = {"B/1 compiled": one, "B/1 eager": Trainer(bench, bench.network()), "B/2 compiled": two}
    tasks = {name: functools.partial(lambda t: t.step(next(batches), True), t) for name, t in trainers.items()}
    seconds = bench.in_turns(tasks | {"peak": product}, repeat=5)
    for (name, trainer), aim in zip(trainers.items(), ("0.45", "", "0.35")):
        share = ratio(seconds["peak"], seconds[name]) * 3 * 256 * flops(trainer.net) / product_work
        bench.row(f"training step {name}, bf16, micro-batch 256 from disk: share of the bf16 peak",
                  f"{share:.2f} of {product_work / median(seconds['peak']) / 1e12:.0f} TFLOP/s "
                  f"({256 / median(seconds[name]):.0f} images/s)", aim)
    del two, trainers, trainer, product, tasks

    parts = {name: [] for name in ("waiting for data", "forward", "backward", "clip, AdamW, EMA")}
    for _ in range(10):  # each part is waited for: what they overlap is not seen here
        found = []
        work = (lambda: found.append(next(batches)), lambda: found.append(one.loss(found[0], True)),
                lambda: found[1].backward(), one.update)
        for name, part in zip(parts, work):
            parts[name].append(bench.time(part))
    parts = {name: median(values) for name, values in parts.items()}
    for name, value in parts.items():
        bench.row(f"of a compiled B/1 step: {name}", f"{1e3 * value:.1f} ms, {value / sum(parts.values()):.1%}",
                  "under 2%" * (name == "waiting for data"))
    breakdown(bench, "its kernels", lambda: one.step(next(batches), True), 10)

    times = {}
    for n in (256, 128, 64, 512):  # the first size has a compiled graph of its own, the others share one for any size
        source = reader(n)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            seconds = bench.in_turns({n: lambda: one.step(next(source), True)}, repeat=3)
            times[n] = median(seconds[n])
            measured = f"{peak_memory(bench.device):.1f} GB ({n / times[n]:.0f} images/s)"
        except torch.OutOfMemoryError:
            measured = "more than there is"
        source.close()
        bench.row(f"peak memory of B/1 compiled, micro-batch {n}", measured)
    batches.close()
    for cards, n in ((1, 256), (8, 128)):
        if n not in times:
            continue
        seconds = BATCH / cards / n * (times[n] - parts["clip, AdamW, EMA"]) + parts["clip, AdamW, EMA"]
        bench.row(f"from these: {STEPS:,} steps of {BATCH} on {cards} GPU" + ", without communication" * (cards > 1),
                  f"{STEPS * seconds / 3600:.1f} h")


def reading(bench, scratch):
    """LatentDataset in random order, its files in the page cache, against the same gather from an array in memory."""
    for shape, rows, n in ((SHAPE, 1024, 256), ((3, 32, 32), 8192, 1024)):
        data, rng = write_cache(scratch / f"reading{shape[0]}", shape, 4, rows), np.random.default_rng(0)
        array = np.empty((len(data), *shape), np.float16)
        for i in range(0, len(data), rows):
            array[i:i + rows] = data.batch(range(i, i + rows), False)[0].numpy()
            data.batch(range(i, i + rows), True)  # so that the mirrored half is in the page cache as well
        picks = itertools.cycle([rng.permutation(len(data))[:n] for _ in range(30)])
        seconds = bench.in_turns({"ours": lambda: data.batch(next(picks), rng.random(n) < 0.5),
                                  "array": lambda: array[next(picks)]}, repeat=50)
        bench.row(f"reading {n} of {len(data):,} latents {'x'.join(map(str, shape))}: speed against numpy's "
                  "`array[indices]`", f"{ratio(seconds['array'], seconds['ours']):.2f} "
                  f"({n / median(seconds['ours']):,.0f} images/s)", "0.5")
    for shards in (1, 100, 1000):
        write_cache(scratch / f"shards{shards}", (4, 2, 2), shards, 2)
        seconds = bench.in_turns({0: functools.partial(LatentDataset, scratch / f"shards{shards}")})
        bench.row(f"opening a cache of {shards:,} shards", f"{1e3 * median(seconds[0]):.1f} ms")


@torch.inference_mode()
def sampling(bench, scratch):
    """Guidance against two plain passes; the network behind FID; on a GPU, whole samples and the hours of FID-50K."""
    denoiser, n, device = Denoiser(bench.network().eval()), 64 if bench.cuda else 2, bench.device
    z, y, rows = torch.randn(n, *SHAPE, device=device), torch.arange(n, device=device), []
    velocity = guided_velocity(denoiser, y, 2.9, (0.1, 1.0))
    with torch.autocast(device.type, torch.bfloat16, enabled=bench.cuda):
        seconds = bench.in_turns({"guided": lambda: velocity(z, 0.5), "outside": lambda: velocity(z, 0.05),
                                  "plain": lambda: denoiser.velocity(z, 0.5, y)})
    bench.row(f"guided evaluation, batch {n}: time against twice the unguided one",
              f"{ratio(seconds['guided'], seconds['plain']) / 2:.3f}", "at most 1.05")
    bench.row("outside the interval: time against the unguided one",
              f"{ratio(seconds['outside'], seconds['plain']):.3f}", "1")
    counter = types.SimpleNamespace(net=denoiser.net, velocity=lambda z, t, y: rows.append(len(z)) or 0 * z)
    ode_sample(guided_velocity(counter, y[:1], 2.9, (0.1, 1.0)), z[:1], 50, "heun")
    bench.row("evaluations in 50 Heun steps: doubled, plain", f"{rows.count(2)}, {rows.count(1)}", "88, 11")
    inception = Inception().eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
    images = torch.randint(256, (n, 3, 256, 256), dtype=torch.uint8, device=device)
    scored = median(bench.in_turns({0: lambda: inception(images)})[0]) / n
    bench.row(f"Inception, batch {n} of 256x256", f"{1 / scored:.1f} images/s")
    if bench.cuda:
        codec = types.SimpleNamespace(decode=lambda z: z[:, :3])  # none: what decoding adds depends on the codec
        draw = functools.partial(generate, denoiser, codec, range(n), range(1000), cfg=2.9)
        eager = median(bench.in_turns({0: draw})[0]) / n
        bench.row(f"50 Heun steps, guided, bf16, batch {n}, without decoding", f"{1 / eager:.1f} images/s")
        compile_net(denoiser.net, device)
        compiled = median(bench.in_turns({0: draw})[0]) / n
        bench.row("the same, compiled", f"{1 / compiled:.1f} images/s ({eager / compiled:.2f} times as fast)")
        for cards in (1, 8):
            bench.row(f"from these: FID-50K on {cards} GPU, not compiled, without decoding",
                      f"{50_000 * (eager + scored) / 3600 / cards:.2f} h")


def growth(bench, scratch):
    """How a training step grows with the batch and with the number of tokens."""
    sizes, depth = ((64, 128, 256), bench.depth) if bench.cuda else ((2, 4, 8), 2)
    trainers = {patch: Trainer(bench, bench.network(patch, depth)) for patch in (1, 2, 4)}
    batch = {n: [torch.randn(n, *SHAPE), torch.arange(n), torch.randn(n), torch.rand(n) < 0.1] for n in sizes}
    cells = [(1, n) for n in sizes] + [(patch, sizes[-1]) for patch in (2, 4)]
    seconds = bench.in_turns({(p, n): functools.partial(trainers[p].step, batch[n], bench.cuda) for p, n in cells})
    for patch, n in cells:
        bench.row(f"training step, {depth} blocks, patch {patch} ({(SHAPE[1] // patch) ** 2} tokens), batch {n}: time "
                  f"against 256 tokens, batch {sizes[-1]}", f"{ratio(seconds[patch, n], seconds[1, sizes[-1]]):.3f}")


def start(bench, scratch):
    """All of `sample.py --help`, against importing torch alone."""
    commands = {"torch": ["-c", "import torch"], "sample.py": ["sample.py", "--help"]}
    root = pathlib.Path(__file__).parents[1]
    run = functools.partial(subprocess.run, cwd=root, check=True, stdout=subprocess.DEVNULL)
    tasks = {name: functools.partial(run, [sys.executable, *words]) for name, words in commands.items()}
    seconds = bench.in_turns(tasks)
    extra = median(a - b for a, b in zip(seconds["sample.py"], seconds["torch"]))
    bench.row(f"`python sample.py --help` beyond the {median(seconds['torch']):.2f} s of `import torch`",
              f"{extra:.2f} s", "at most 0.3 s")


SECTIONS = {section.__name__: section for section in (forward, training, reading, sampling, growth, start)}


@program
def main(argv=None):
    parser = Parser("Speed beside the hardware's peak and beside plain code, as a Markdown table.")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections to run")
    parser.add_argument("--quick", action="store_true", help="2 blocks and 3 turns: to try the script")
    parser.add_argument("--busy", action="store_true", help="processor time of one thread: where others use the CPU")
    parser.add_argument("--out", type=pathlib.Path, help="also write the table there")
    args = parser.parse_args(argv)
    if args.out and not args.out.absolute().parent.is_dir():
        raise BadInput(f"--out {args.out}: its folder does not exist")
    if args.busy and torch.cuda.is_available():
        raise BadInput("--busy: processor time says nothing of a GPU (CUDA_VISIBLE_DEVICES= hides it)")
    bench = Bench(args.quick, args.busy)
    for name in args.only:
        torch.compiler.reset()  # a network's code is compiled for a few kinds of input only, then no more
        with tempfile.TemporaryDirectory() as scratch:
            if bench.cuda:
                torch.cuda.reset_peak_memory_stats()
            SECTIONS[name](bench, pathlib.Path(scratch))
        if args.out:
            with atomic(args.out) as temporary:
                temporary.write_text("\n".join(bench.lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
