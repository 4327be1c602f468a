"""How a program runs: errors of one line, torchrun's ranks, signals."""
import functools
import os
import re
import signal
import sys
import time

import torch
import torch.distributed as dist

STOPS = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP  # they ask to stop
NO_MEMORY = "out of memory|can't allocate memory"  # what MPS says, and the CPU


class BadInput(ValueError):
    """A mistake in what the user gave: one line, exit code 2."""


class RunFailed(RuntimeError):
    """The run itself failed (not finite, disk full): one line, exit code 1."""


def printable(text):
    """One line that is safe to print: file names may hold any bytes."""
    line = " ".join(str(text).split())
    return "".join(c if c.isprintable() else "?" for c in line)


def program(main):
    """Decorates `main(argv=None)`: its errors become one line and an exit code. 0: done; 1: failed;
    2: bad input; 128 + the signal's number: interrupted. One of torchrun's ranks ends here."""
    @functools.wraps(main)
    def run(*args, **options):
        caught = {number: signal.getsignal(number) for number in STOPS}
        try:
            code, line = main(*args, **options) or 0, ""
        except BadInput as error:
            code, line = 2, error
        except KeyboardInterrupt:
            code, line = 130, "interrupted"
        except (RunFailed, OSError) as error:
            code, line = 1, error
        except (MemoryError, RuntimeError) as error:  # torch has a class of its own for CUDA alone
            known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
            if not known and not re.search(NO_MEMORY, str(error)):
                raise
            code = 1
            line = f"out of memory: lower --micro in train.py, --batch elsewhere ({error})"
        if line:
            if rank():  # rank 0 mostly says the same, and torchrun then ends this one unheard
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                time.sleep(3)
            print(f"error: {printable(line)}", file=sys.stderr, flush=True)
        if dist.is_initialized():
            leave(code)
        for number, handler in caught.items():  # for whoever called it from Python
            if signal.getsignal(number) is not handler:
                signal.signal(number, handler)
        return code
    return run


# -------------------------------------------------------------------------------------------------
# Ranks

def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def say(*words):
    """Print, on rank 0 alone."""
    if rank() == 0:
        print(*words, flush=True)


def connect():
    """Join torchrun's ranks. CPU tensors travel by gloo, which waits for no GPU."""
    if world_size() > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")


def leave(code):
    """End this rank, without Python's own end: a thread of gloo's that lets go of its last tensor
    meanwhile aborts the process, and torchrun would call a finished run failed."""
    if code not in (1, 2, 130):  # else a proper goodbye would wait for the other ranks
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def barrier():
    """Wait for all ranks. Where one has ended, the others end as well, and one of them says so."""
    if dist.is_initialized():
        try:
            dist.all_reduce(torch.zeros(1))
        except RuntimeError as error:
            if rank():
                os._exit(1)
            raise RunFailed(f"another rank has ended ({error})") from None


def mean_over_ranks(tensor):
    """The mean of a CPU tensor, which is overwritten, over the ranks."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor / world_size()


def from_rank_0(value):
    """Rank 0's value, whatever the others have."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def split_batch(batch: int, most: int) -> tuple[int, int, int]:
    """(place of this rank's first image in the global batch, passes, images a pass): a pass takes
    the largest divisor of the rank's share that is at most `most`. Raises BadInput where the ranks
    do not divide the batch."""
    share, rest = divmod(batch, world_size())
    if rest:
        raise BadInput(f"--batch {batch}: {world_size()} ranks do not divide it")
    micro = max(size for size in range(1, min(share, most) + 1) if share % size == 0)
    if 4 * micro < min(share, most):
        better = share // most * most * world_size()
        say(f"warning: only {micro} images at a time: --batch {better} divides better")
    return rank() * share, share // micro, micro


def image_batches(n, batch):
    """The images 0 ... n-1 as ranges of at most `batch`."""
    return [range(first, min(first + batch, n)) for first in range(0, n, batch)]


def rank_batches(n, batch):
    """This rank's share of image_batches: the ranks take turns."""
    return image_batches(n, batch)[rank()::world_size()]


# -------------------------------------------------------------------------------------------------
# Signals

class StopSignal:
    """Remembers the first signal that asks to stop, for the loop to look at between two steps.

    Schedulers send SIGTERM or SIGUSR1, Ctrl-C SIGINT, a closed terminal SIGHUP (which stays ignored
    under nohup). Torchrun may repeat a signal: repeats within 5 s change nothing, a later one ends
    the process at once.
    """

    def __init__(self):
        self.number, self.since = 0, 0.0
        self.sent, self.pending = None, None
        for number in STOPS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.handle)

    def handle(self, number, frame):
        if not self.number:
            self.number, self.since = number, time.monotonic()
        elif time.monotonic() - self.since > 5:
            os._exit(128 + number)

    def agreed(self):
        """The signal, or 0, that all ranks stop for at this same step. All call it once a step. The
        answer is what they sent off one step ago: so nobody waits for it."""
        if not dist.is_initialized():
            return self.number
        heard = 0
        if self.pending:
            self.pending.wait()
            heard = int(self.sent)
        self.sent = torch.tensor(self.number)
        self.pending = dist.all_reduce(self.sent, dist.ReduceOp.MAX, async_op=True)
        return heard
