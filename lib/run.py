"""The plumbing that the programs share: user errors, ranks and device, signals, the folder's lock, atomic files."""
import contextlib, errno, os, pathlib, signal, socket, sys, time

import torch
import torch.distributed as dist
os.umask(UMASK := os.umask(0o077))  # reading it takes setting it


class BadInput(ValueError):
    """A mistake in what the user gave: one line, exit code 2."""


class RunFailed(RuntimeError):
    """The run itself failed (not finite, disk full): one line, exit code 1."""


def program(main):
    """Decorates `main(argv=None)`: its errors become one line and an exit code (0 done, 1 failed, 2 bad input)."""
    def run(argv=None):
        try:
            getattr(sys.stdout, "reconfigure", dict)(line_buffering=True, errors="backslashreplace")  # for odd names
            code = main(argv) or 0
        except (BadInput, RunFailed, OSError, KeyboardInterrupt, MemoryError, torch.OutOfMemoryError) as error:
            code, line = {BadInput: 2, KeyboardInterrupt: 130}.get(type(error), 1), str(error) or type(error).__name__
            line += " (lower --micro in train.py, --batch elsewhere)" * (code == 1 and "emory" in type(error).__name__)
            time.sleep(3 if rank() else 0)  # rank 0 likely says it too, and torchrun then ends us before we do
            print("error:", "".join(c if c.isprintable() else "?" for c in " ".join(line.split())), file=sys.stderr)
        if dist.is_initialized():  # failed, or interrupted: NCCL's goodbye may wait for the others
            os._exit(code) if code in (1, 2, 130) else dist.destroy_process_group()
        return code
    return run


rank = lambda: int(os.environ.get("RANK", 0))
world_size = lambda: int(os.environ.get("WORLD_SIZE", 1))


def say(*words):
    if rank() == 0:
        print(*words, flush=True)


def pick_device():
    """This rank's own GPU, else Apple's MPS, else the CPU. `CUDA_VISIBLE_DEVICES=` (empty) asks for the CPU."""
    if not torch.cuda.is_available():
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    local = int(os.environ.get("LOCAL_RANK", 0))
    if local >= torch.cuda.device_count():
        raise BadInput(f"rank {local} has no GPU of its own (of {torch.cuda.device_count()}): lower --nproc_per_node")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def meet():
    """Wait for all of torchrun's ranks (the first call joins them). CPU tensors travel by gloo and wait for no GPU."""
    if world_size() > 1 and not dist.is_initialized():  # (Windows has no NCCL)
        dist.init_process_group("gloo" if os.name == "nt" or not torch.cuda.is_available() else "cpu:gloo,cuda:nccl")
    if world_size() > 1:
        dist.all_reduce(torch.zeros(1))


class StopSignal:
    """Remembers the first SIGTERM, SIGINT or SIGUSR1 in `number`, for the loop to look at between two steps. Schedulers
    and torchrun send several: more of them within 5 s are ignored, a later one ends the process at once."""
    def __init__(self):
        self.number = 0
        for name in {"SIGTERM", "SIGINT", "SIGUSR1"} & set(dir(signal)):  # Windows has no SIGUSR1
            signal.signal(getattr(signal, name), self.handle)

    def handle(self, number, frame):
        if not self.number:
            self.number, self.since = number, time.monotonic()
        elif time.monotonic() - self.since > 5:
            os._exit(128 + number)


def lock_folder(folder):
    """Take the operating system's lock on a folder and return the open file, to be kept: a killed process leaves no
    lock behind, and children do not inherit it. Raises BadInput, naming host and pid, where another run holds it."""
    try:
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
        file = open(pathlib.Path(folder) / ".lock", "a+", errors="replace")
    except OSError as error:
        raise BadInput(f"--out {folder}: cannot be written to ({error.strerror}): choose another folder") from None
    try:
        if os.name == "nt":
            import msvcrt
            file.seek(1 << 20)  # beyond the text, which others must be able to read
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            owner = pathlib.Path(file.name).read_text(errors="replace")[:200]
            raise BadInput(f"{folder}: another run writes there ({owner}): choose another --out") from None
        say(f"warning: {folder}: no locks on this file system ({error.strerror}): start no second run there")
    file.truncate(0)
    print(f"host {socket.gethostname()}, pid {os.getpid()}", end="", file=file, flush=True)
    return file


@contextlib.contextmanager
def atomic(path, keep=None):
    """Yield a temporary path beside `path`; once written, it goes safely to disk and takes the place of `path`, so that
    a crash leaves the old file or the new one, never half of one. With `keep`, the old file is moved there first."""
    temporary = (path := pathlib.Path(path)).with_name(f".tmp-{path.name[-60:]}")
    try:
        yield temporary
        os.chmod(temporary, 0o666 & ~UMASK)  # some libraries write files for their owner alone
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
