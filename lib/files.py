"""Files that are whole, folders that are locked, reading ahead."""
import collections
import concurrent.futures
import contextlib
import errno
import fcntl
import itertools
import os
import pathlib
import shutil
import socket
import time

from safetensors import SafetensorError

from lib.run import BadInput, RunFailed, barrier, rank, say

UMASK = os.umask(0o077)  # it can only be read by setting it
os.umask(UMASK)


def lock_folder(folder):
    """Lock a folder for all ranks of this run (which call this alike) and return the open file, to
    be kept: the system drops the lock when the last of them is gone, however it ends. Raises
    BadInput, naming host and process, where another run holds it."""
    folder = pathlib.Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+", errors="replace")
    except OSError as error:
        raise BadInput(f"--out {folder}: cannot be written to ({error.strerror})") from None
    if rank() == 0:
        wait_for_lock(file, folder)
        file.truncate(0)
        file.write(f"host {socket.gethostname()}, process {os.getpid()}")
        file.flush()
    barrier()
    with contextlib.suppress(OSError):
        fcntl.lockf(file, fcntl.LOCK_SH)  # rank 0's becomes shared, so that all can hold it
    return file


def wait_for_lock(file, folder, patience=120):
    """Lock an open file. A lock held on this host is refused at once; one of another host may be a
    dead one's, which NFS forgets after about 90 s: it is waited for."""
    deadline = time.monotonic() + patience
    while True:
        try:
            return fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return say(f"warning: no locks in {folder} ({error}): start no second run there")
        file.seek(0)
        owner = file.read(200)
        here = f"host {socket.gethostname()}," in owner
        if here or time.monotonic() > deadline:
            raise BadInput(f"{folder}: another run writes there ({owner}): choose another --out")
        say(f"{folder} is locked by {owner}, which may have crashed: waiting")
        time.sleep(min(10, patience))


def check_disk(folder, need):
    """Raises BadInput where the folder's disk has less than `need` bytes left."""
    place = pathlib.Path(folder).absolute()
    while not place.is_dir():
        place = place.parent
    free = shutil.disk_usage(place).free
    if need > free:
        raise BadInput(f"{folder}: {need / 1e9:.2f} GB of disk needed, {free / 1e9:.2f} GB free")


@contextlib.contextmanager
def atomic(path, keep=None):
    """Yield a temporary path beside `path`. Once written, it goes safely to disk and replaces
    `path`: a crash leaves the old file or the new one, never half of one. With `keep`, the old one
    is moved there first. Raises RunFailed."""
    path = pathlib.Path(path)
    temporary = path.with_name(f".tmp-{path.name[-60:]}")
    try:
        yield temporary
        with contextlib.suppress(OSError):  # safetensors writes for the owner alone
            os.chmod(temporary, 0o666 & ~UMASK)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
        flush_folder(path.parent)
    except (OSError, SafetensorError) as error:
        raise RunFailed(f"{path}: cannot be written ({error}); the old one is intact") from None
    finally:
        temporary.unlink(missing_ok=True)


def flush_folder(folder):
    """New names, too, are safe only once their folder is on disk (where it can be asked to)."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def prefetched(read, jobs, threads=4, ahead=8):
    """Yield read(job) for each job, in order, up to `ahead` of them done beforehand by threads,
    which are enough: files are read, JPEGs decoded and arrays copied outside Python's lock."""
    jobs = iter(jobs)
    pool = concurrent.futures.ThreadPoolExecutor(threads)
    waiting = collections.deque()
    try:
        for job in itertools.islice(jobs, ahead):
            waiting.append(pool.submit(read, job))
        while waiting:
            result = waiting.popleft().result()
            for job in itertools.islice(jobs, 1):
                waiting.append(pool.submit(read, job))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)
