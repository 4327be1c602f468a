"""Files that are never half written, locked folders, reading ahead."""
import collections
import concurrent.futures
import contextlib
import itertools
import os
import pathlib
import shutil
import tempfile
import time

from safetensors import SafetensorError

from lib.run import BadInput, RunFailed, barrier, log, rank

try:
    import fcntl
except ImportError:  # Windows has no such locks; a second run is not noticed there
    fcntl = None

UMASK = os.umask(0o077)  # it can only be read by setting it
os.umask(UMASK)


@contextlib.contextmanager
def atomic(path, keep=None):
    """Yield a temporary path beside `path`, of which no other process knows. Once written, it is
    flushed to disk and replaces `path`, so a crash leaves the old file or the new one. With `keep`,
    the old file is moved there first. Raises RunFailed where the file cannot be written."""
    path, temporary = pathlib.Path(path), None
    try:
        handle, temporary = tempfile.mkstemp(path.suffix, ".tmp-", path.parent)
        os.close(handle)
        yield pathlib.Path(temporary)
        with contextlib.suppress(OSError):  # mkstemp and safetensors write for the owner alone
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
        if temporary:
            pathlib.Path(temporary).unlink(missing_ok=True)


def flush_folder(folder):
    """A renamed file is safe only once its folder is on disk too, where the platform can do it."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def check_disk(folder, need):
    """Raises BadInput where the folder's disk has less than `need` bytes left."""
    folder = pathlib.Path(folder).absolute()
    existing = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    free = shutil.disk_usage(existing).free
    if need > free:
        raise BadInput(f"{folder}: {need / 1e9:.2f} GB of disk needed, {free / 1e9:.2f} GB free")


def lock_folder(folder, patience=120):
    """Make the folder, lock it and remove what a killed save has left there, on rank 0; called by
    all ranks. Returns the open lock file: the system drops the lock when it is closed or the
    process ends. Another run that writes there is waited for, since it may be about to end, and NFS
    forgets a crashed host's locks only after about 90 seconds. Raises BadInput after `patience`
    seconds, or where the folder cannot be written to."""
    folder = pathlib.Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a")
    except OSError as error:
        raise BadInput(f"--out {folder}: cannot be written to ({error.strerror})") from None
    start = time.monotonic()
    while rank() == 0 and fcntl:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            waited = time.monotonic() - start
        except OSError as error:
            log(f"warning: {folder} cannot be locked ({error}): start no second run there")
            break
        if waited > patience:
            raise BadInput(f"{folder}: another run writes there: choose another --out")
        if waited < 2:
            log(f"another run writes in {folder}: waiting for up to {patience} s")
        time.sleep(2)
    if rank() == 0:
        for stale in folder.glob(".tmp*"):  # of a save that was killed; safetensors has some, too
            if stale.suffix in ("", ".safetensors", ".json"):  # others may be sample.py's, in use
                stale.unlink(missing_ok=True)
    barrier()  # no rank reads the folder while another run may still be saving
    return file


@contextlib.contextmanager
def one_at_a_time(folder):
    """Wait until no other process is in such a block for this folder, as far as the platform and
    the file system have locks."""
    if not fcntl:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def prefetched(read, jobs, threads=4, ahead=8):
    """Yield read(job) for each job, in order. Threads work up to `ahead` jobs in advance; they are
    enough, because files are read and JPEGs decoded outside Python's interpreter lock."""
    jobs = iter(jobs)
    pool = concurrent.futures.ThreadPoolExecutor(threads)
    pending = collections.deque()
    try:
        for job in itertools.islice(jobs, ahead):
            pending.append(pool.submit(read, job))
        while pending:
            result = pending.popleft().result()
            for job in itertools.islice(jobs, 1):
                pending.append(pool.submit(read, job))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)
