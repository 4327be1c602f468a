"""How a program runs: one-line errors, printing that never fails, ranks, signals, the device."""
import contextlib
import functools
import importlib.util
import os
import re
import shutil
import signal
import sys
import time
import warnings

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

# The signals that ask a program to stop. Windows has only the first two.
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
                if hasattr(signal, name)]


class BadInput(ValueError):
    """A user's mistake: one line, exit code 2."""


class RunFailed(RuntimeError):
    """The run itself failed (a full disk, non-finite gradients): one line, exit code 1."""


# -------------------------------------------------------------------------------------------------
# Printing. Losing the terminal or the reader of a pipe must not end a run of several days.

def write_line(stream, text):
    try:
        print(text, file=stream, flush=True)
    except (OSError, ValueError):  # a closed pipe or terminal: the stream is mute from here on
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def log(*words):
    """Print a line on rank 0."""
    if rank() == 0:
        write_line(sys.stdout, " ".join(map(str, words)))


def warn(text):
    """Print a one-line warning on stderr, on whichever rank calls it."""
    write_line(sys.stderr, printable(f"warning: {text}"))


def printable(text):
    """The text as one line that is safe to print: file names may hold any bytes."""
    line = " ".join(str(text).split())
    return "".join(c if c.isprintable() else "?" for c in line)


def prepare_streams():
    """Print "\\xe9" where the terminal has no é, and to nowhere where a stream is closed
    (Python sets it to None)."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def program(main):
    """Decorate a program's main(argv=None). Its errors become one line and an exit code.

    0: done. 1: the run failed. 2: bad input. 128 + n: stopped by signal n. Anything else is a bug
    and keeps its traceback.
    """
    @functools.wraps(main)
    def run(*args, **kwargs):
        handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        prepare_streams()
        try:
            connect()
            code, line = main(*args, **kwargs) or 0, None
            barrier()  # torchrun ends every rank once one exits with a code, even while it saves
        except BadInput as error:  # its text alone is kept: an error holds on to locks and files
            code, line = 2, str(error)
        except KeyboardInterrupt:
            code, line = 130, "interrupted"
        except (RunFailed, OSError) as error:
            code, line = 1, str(error)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            code = 1
            line = f"out of memory: lower --micro in train.py, --batch elsewhere ({error})"
        finally:  # a notebook or a test may call main and go on
            for number, handler in handlers.items():
                if signal.getsignal(number) is not handler:
                    signal.signal(number, handler)
        if line is not None:
            if rank():  # rank 0 usually prints the same line; torchrun then ends this rank
                time.sleep(3)
            write_line(sys.stderr, f"error: {printable(line)}")
        if dist.is_initialized() and not args:  # called from the command line: this was all
            # Exit without interpreter shutdown: a gloo thread that frees its last tensor there can
            # abort the process, and torchrun would call a finished run failed.
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
            os._exit(code)
        return code
    return run


def is_out_of_memory(error):
    """CUDA has an error class for it; the CPU and MPS only say so in the text."""
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or re.search("out of memory|can't allocate memory", str(error))


# -------------------------------------------------------------------------------------------------
# Ranks: the processes that torchrun starts, one per GPU

def rank() -> int:
    number = os.environ.get("RANK", "")
    return int(number) if number.isdecimal() else 0  # connect refuses anything else


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE") or 1)


def connect():
    """Join torchrun's ranks; do nothing without torchrun. Raises BadInput where the environment
    holds only part of what torchrun sets."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    given = {name: os.environ[name] for name in names if os.environ.get(name)}
    numbers = all(text.isdecimal() for text in given.values())
    if not numbers or not rank() < world_size() or given.get("LOCAL_WORLD_SIZE") == "0":
        facts = ", ".join(f"{name}={text}" for name, text in given.items())
        raise BadInput(f"the environment has {facts}, which does not fit together: start several "
                       "ranks with torchrun, or unset these variables")
    if world_size() == 1 or dist.is_initialized():
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise BadInput(f"WORLD_SIZE={world_size()} without {' and '.join(missing)} in the "
                       "environment: start several ranks with torchrun")
    try:  # CPU tensors travel by gloo, without waiting for a GPU
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    except (RuntimeError, ValueError) as error:  # a port that is taken or none, an unknown host
        raise BadInput(f"the ranks cannot connect at {os.environ['MASTER_ADDR']}, port "
                       f"{os.environ['MASTER_PORT']} ({str(error)[:200]})") from None


def barrier():
    """Wait for all ranks. Raises RunFailed where one of them is gone."""
    if dist.is_initialized():
        try:
            dist.all_reduce(torch.zeros(1))
        except RuntimeError as error:
            raise RunFailed(f"another rank has ended ({error})") from None


def mean_over_ranks(tensor):
    """The mean of a CPU tensor over the ranks; the tensor is overwritten."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor / world_size()


def from_rank_0(value):
    """Rank 0's value, on every rank."""
    return gather_objects(value)[0]


def gather_objects(value) -> list:
    """The values of all ranks, on every rank."""
    values = [value]
    if dist.is_initialized():
        values = [None] * world_size()
        dist.all_gather_object(values, value)
    return values


def split_batch(batch: int, most: int) -> tuple[int, int, int]:
    """How a global batch is divided: (position of this rank's first image, passes per step, images
    per pass). A pass takes the largest divisor of the rank's share that is at most `most`. Raises
    BadInput where the ranks do not divide the batch."""
    share, rest = divmod(batch, world_size())
    if rest:
        raise BadInput(f"--batch {batch} cannot be divided by {world_size()} ranks")
    micro = max(size for size in range(1, min(share, most) + 1) if share % size == 0)
    if 4 * micro < min(share, most):
        better = share // most * most * world_size()
        log(f"warning: only {micro} images per pass; --batch {better} divides better")
    return rank() * share, share // micro, micro


def image_batches(n, batch):
    """The indices 0 ... n-1 as ranges of at most `batch`."""
    return [range(first, min(first + batch, n)) for first in range(0, n, batch)]


def rank_batches(n, batch):
    """This rank's share of image_batches: the ranks take turns."""
    return image_batches(n, batch)[rank()::world_size()]


class StopSignal:
    """Remembers the first signal that asks to stop, for a loop to look at between two steps.

    Schedulers send SIGTERM or SIGUSR1, Ctrl-C sends SIGINT, and a closed terminal SIGHUP (which
    stays ignored under nohup). A signal repeated within 5 seconds changes nothing, since torchrun
    passes on what the terminal has sent already; a later one ends the process at once.
    """

    def __init__(self):
        self.number, self.received = 0, 0.0
        for number in STOP_SIGNALS:
            under_nohup = number.name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN
            if not under_nohup:
                signal.signal(number, self.handle)

    def handle(self, number, frame):
        if not self.number:
            self.number, self.received = number, time.monotonic()
        elif time.monotonic() - self.received > 5:
            os._exit(128 + number)

    def agreed(self) -> int:
        """The signal, or 0, that all ranks stop for. Every rank calls this once per step. The
        reduction runs on the CPU while the GPU is busy with the step."""
        number = torch.tensor(self.number)
        if dist.is_initialized():
            dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number)


# -------------------------------------------------------------------------------------------------
# The device, its precision, compilation

def pick_device() -> torch.device:
    """This rank's own GPU, else Apple's MPS, else the CPU. An empty CUDA_VISIBLE_DEVICES asks for
    the CPU. Raises BadInput where there are more ranks than GPUs."""
    if not torch.cuda.is_available():
        mps = torch.backends.mps.is_available() and world_size() == 1  # gloo does not support it
        return torch.device("mps" if mps else "cpu")
    local_rank, count = int(os.environ.get("LOCAL_RANK") or 0), torch.cuda.device_count()
    if local_rank >= count:
        raise BadInput(f"rank {local_rank} has no GPU of its own (there are {count}): lower "
                       "--nproc_per_node")
    torch.cuda.set_device(local_rank)
    torch.backends.cudnn.allow_tf32 = False  # matrix products leave TF32 off by default, too
    return torch.device("cuda", local_rank)


def cores() -> int:
    """How many reader threads this rank may start: its share of the cores this job may use."""
    if hasattr(os, "sched_getaffinity"):  # what the scheduler grants, not what the machine has
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    return min(max(1, count // int(os.environ.get("LOCAL_WORLD_SIZE") or 1)), 16)


def pinned(tensor):
    """The tensor in pinned memory where there is a GPU, so that copying does not block."""
    return tensor.pin_memory() if torch.cuda.is_available() and not tensor.is_cuda else tensor


def to_device(tensor, device):
    """Copy to the device. From pinned memory CUDA does so in the background; MPS would read memory
    that may have been reused by then (pytorch issue 189690), so there the copy blocks."""
    return tensor.to(device, non_blocking=device.type == "cuda")


def use_bf16(precision: str, device: torch.device) -> bool:
    """Whether the network runs in bf16: as asked, or for "auto" where a GPU has it in hardware."""
    if precision != "auto":
        return precision == "bf16"
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def compile_net(net, device) -> bool:
    """torch.compile in place, which leaves the names in the state dict alone. Returns False, with a
    line that says why, where compiling is not possible. (`compiled_graphs` tells what came of it.)
    """
    if device.type == "cuda":
        possible, needs = importlib.util.find_spec("triton"), "Triton"
    else:
        possible, needs = device.type == "cpu" and shutil.which("g++"), "CUDA, or a CPU with g++"
    if not possible:
        log(f"torch.compile needs {needs}: running uncompiled")
        return False
    torch._dynamo.config.suppress_errors = True  # what does not compile runs eagerly, and warns
    # Recompile when hooks change; otherwise a stale graph would be reused.
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    net.compile()
    return True


def compiled_graphs() -> int:
    """How many graphs torch.compile has made in this process."""
    if "torch._dynamo" not in sys.modules:  # importing it takes seconds
        return 0
    return sys.modules["torch._dynamo"].utils.counters["stats"]["unique_graphs"]


def uncompiled():
    """A context in which compiled networks run eagerly, so that a new shape costs no compiling."""
    if compiled_graphs():
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()


def peak_memory(device):
    """Peak memory in GB, of the GPU or else of this process; None where the platform cannot say."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 1e9, 2)
    try:
        import resource  # POSIX only
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes or kilobytes
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 2)


def data_parallel(module, device):
    """DistributedDataParallel where there are several ranks: it averages gradients over them."""
    if world_size() == 1:
        return module
    with warnings.catch_warnings():  # torch 2.13 renames an argument that 2.6 needs
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(
            module, device_ids=[device.index] if device.type == "cuda" else None,
            broadcast_buffers=False,       # the only buffers are constant tables
            gradient_as_bucket_view=True)  # keep gradients once, not twice
