"""The plumbing that the programs share: user errors, ranks and device, signals, the folder's lock, atomic files."""
import contextlib, errno, functools, os, pathlib, signal, socket, sys, time

import torch
import torch.distributed as dist


class BadInput(ValueError):
    """A mistake in what the user gave: one line, exit code 2."""


class RunFailed(RuntimeError):
    """The run itself failed (not finite, out of memory, disk full): one line, exit code 1."""


def program(main):
    """Decorates `main(argv=None)`: its errors become one line and an exit code (0 done, 1 failed, 2 bad input)."""
    @functools.wraps(main)
    def run(argv=None):
        code, line = 0, None
        try:
            code = main(argv) or 0
        except (BadInput, RunFailed, OSError) as error:
            code, line = 2 if isinstance(error, BadInput) else 1, str(error)
        except torch.OutOfMemoryError:
            code, line = 1, "out of GPU memory: halve --micro (train.py) or --batch (the others); results stay the same"
        if line:
            time.sleep(3 if rank() else 0)  # rank 0 met the same, most likely: torchrun ends us before we repeat it
            print("error:", " ".join(line.split()), file=sys.stderr, flush=True)
        if dist.is_initialized():
            dist.destroy_process_group()
        return code
    return run


def rank():
    return int(os.environ.get("RANK", 0))


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


def say(*words):
    if rank() == 0:
        print(*words, flush=True)


def watched():  # progress bars are for people alone
    return rank() == 0 and sys.stderr.isatty()


def pick_device():
    """This rank's own GPU, else Apple's MPS, else the CPU. `CUDA_VISIBLE_DEVICES=` (empty) asks for the CPU."""
    if not torch.cuda.is_available():
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    local = int(os.environ.get("LOCAL_RANK", 0))
    if local >= torch.cuda.device_count():
        raise BadInput(f"rank {local} has no GPU of its own (of {torch.cuda.device_count()}): lower --nproc_per_node")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def join_ranks():
    """Join torchrun's processes, if any. CPU tensors travel by gloo, so stop flags and statistics wait for no GPU."""
    if world_size() > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")


class StopSignal:
    """Remembers the first SIGTERM, SIGINT or SIGUSR1 in `number`, for the loop to look at between two steps. Schedulers
    and torchrun deliver it twice: the same one within 5 s is ignored; any other ends the process at once."""
    def __init__(self):
        self.number = 0
        for name in {"SIGTERM", "SIGINT", "SIGUSR1"} & set(dir(signal)):  # Windows has no SIGUSR1
            signal.signal(getattr(signal, name), self.handle)

    def handle(self, number, frame):
        if not self.number:
            self.number, self.since = number, time.monotonic()
        elif number != self.number or time.monotonic() - self.since > 5:
            os._exit(128 + number)


def lock_folder(folder):
    """Take the operating system's lock on a folder and return the open file, to be kept: a killed process leaves no
    lock behind, and children do not inherit it. Raises BadInput, naming host and pid, where another run holds it."""
    file = open(pathlib.Path(folder) / ".lock", "a+")
    try:
        if os.name == "nt":
            file.seek(1 << 20)  # beyond the text, which others must be able to read
            __import__("msvcrt").locking(file.fileno(), 2, 1)  # 2: LK_NBLCK
        else:
            fcntl = __import__("fcntl")
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            raise BadInput(f"{folder}: another run writes there ({file.read(200)}): choose another --out") from None
        say(f"warning: {folder}: no locks on this file system ({error.strerror}): start no second run there")
    file.truncate(0)
    file.write(f"host {socket.gethostname()}, pid {os.getpid()}")
    file.flush()
    return file


@contextlib.contextmanager
def atomic(path, keep=None):
    """Yield a temporary path beside `path`; once written, it goes safely to disk and takes the place of `path`, so that
    a crash leaves the old file or the new one, never half of one. With `keep`, the old file is moved there first."""
    temporary = (path := pathlib.Path(path)).with_name(f".tmp-{path.name[-99:]}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
        if os.name != "nt":  # the new name, too, is safe only once its folder is on disk
            os.fsync(folder := os.open(path.parent, os.O_RDONLY))
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)
