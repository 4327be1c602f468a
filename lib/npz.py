"""Reference statistics and ADM's sample files, both npz; nothing in them is unpickled."""
import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import zipfile

import numpy as np
import torch

from lib.files import atomic, check_disk
from lib.images import batched, evenly
from lib.judges import METRICS
from lib.run import BadInput, barrier, rank, rank_batches


@contextlib.contextmanager
def reading(path):
    """Whatever goes wrong with a file from elsewhere becomes one line."""
    try:
        yield
    except Exception as error:  # a damaged zip fails in any way it likes
        raise BadInput(f"{path}: not a whole npz file with the arrays expected "
                       f"({str(error)[:150]})") from None


@dataclasses.dataclass
class Reference:
    mu: torch.Tensor      # (features,) float64
    sigma: torch.Tensor   # (features, features) float64
    hash: str             # names the reference wherever a score is written: see named
    about: dict           # what the file says of its images: size, count, crop
    embeddings: dict      # {metric: (N, E) fp16}, of those but FID that it is good for
    root: torch.Tensor | None = None  # of sigma, once somebody has computed it

    def __str__(self):
        known = (f"{name} {self.about.get(name, 'unknown')}" for name in ("size", "count", "crop"))
        return f"reference {self.hash} ({', '.join(known)})"

    def check_size(self, size):
        """Raises BadInput where this is of images of another size ("WIDTHxHEIGHT")."""
        known = self.about.get("size", size)
        if known != size:
            raise BadInput(f"--ref is of {known} images, those to score are {size}")


def named(mu, sigma, embeddings):
    """(hash of mu and sigma, name of the reference): the name has a second part, of the embeddings
    by other networks than Inception, whose weights mu and sigma do not tell."""
    digest = hashlib.sha256(mu.tobytes() + sigma.tobytes()).hexdigest()[:12]
    others = [rows.numpy().tobytes() for name, rows in sorted(embeddings.items()) if name != "mmd"]
    more = f"-{hashlib.sha256(b''.join(others)).hexdigest()[:6]}" if others else ""
    return digest, digest + more


def read_statistics(path, width: int, metrics=("fid",)) -> Reference:
    """The Reference in any npz with `mu` (width,) and `sigma` (width, width), for other metrics
    than FID with their embeddings. Raises BadInput where something is missing or not right."""
    with reading(path), np.load(path, allow_pickle=False) as file:
        mu, sigma = (np.ascontiguousarray(file[name], np.float64) for name in ("mu", "sigma"))
        about = json.loads(str(file["meta"])) if "meta" in file else {}  # only ours have it
        embeddings = {name: torch.from_numpy(file[name]) for name in METRICS if name in file}
        digest, name = named(mu, sigma, embeddings)
        if mu.shape != (width,) or sigma.shape != (width, width):
            raise ValueError(f"mu {mu.shape}, sigma {sigma.shape}, expected {width} features")
        if about.pop("hash", digest) != digest:
            raise ValueError("mu or sigma is not what --save-ref wrote there")
        if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise ValueError("values that are not finite")
        if np.abs(sigma - sigma.T).max() > 1e-5 * np.abs(sigma).max() or (np.diag(sigma) < 0).any():
            raise ValueError("sigma is no covariance")
    missing = [name for name in metrics if name not in ("fid", *embeddings)]
    if missing:
        raise BadInput(f"--ref {path}: no embeddings for {' '.join(missing)}: make it anew with "
                       f"--images FOLDER --save-ref and --metrics fid {' '.join(missing)}")
    sigma = (sigma + sigma.T) / 2
    return Reference(torch.from_numpy(mu), torch.from_numpy(sigma), name, about, embeddings)


def write_statistics(path, mu, sigma, embeddings=None, **about):
    """Write what read_statistics reads; `about` as JSON in the array `meta`. Returns that."""
    arrays = {name: rows.numpy() for name, rows in (embeddings or {}).items()}
    mu, sigma = np.asarray(mu), np.asarray(sigma)
    about["hash"], name = named(mu, sigma, embeddings or {})
    with atomic(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, mu=mu, sigma=sigma, meta=json.dumps(about, sort_keys=True), **arrays)
    return Reference(mu, sigma, name, about, embeddings or {})


@contextlib.contextmanager
def open_samples(path):
    """Yield (stream at the first pixel, shape) of ADM's sample file: `arr_0`, uint8 (N, H, W, 3).
    50,000 images of 256² are 10 GB: they are read one by one."""
    with reading(path), zipfile.ZipFile(path) as file, file.open("arr_0.npy") as stream:
        np.lib.format.read_magic(stream)
        shape, columns_first, dtype = np.lib.format.read_array_header_1_0(stream)
        if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8 or columns_first:
            raise ValueError(f"arr_0 is {dtype} {shape}, expected uint8 (N, H, W, 3) row by row")
        yield stream, shape


def image_rows(path, rows):
    """Yield the images arr_0[i], uint8 (H, W, 3), for each i of `rows`, which rise."""
    with open_samples(path) as (stream, shape):
        start, size = stream.tell(), math.prod(shape[1:])
        for i in rows:
            stream.seek(start + i * size)
            pixels = bytearray(stream.read(size))
            yield torch.frombuffer(pixels, dtype=torch.uint8).reshape(shape[1:])


def npz_images(path, n, batch):
    """ADM's `arr_0`, uint8 (N, H, W, 3), read as a stream; the same as folder_images returns."""
    with open_samples(path) as (_, shape):
        count, height, width, _ = shape
    rows = evenly(path, count, n)
    batches = rank_batches(len(rows), batch)
    images = image_rows(path, [rows[i] for i in itertools.chain(*batches)])
    images = (image.permute(2, 0, 1) for image in images)               # (3, H, W)
    return len(rows), f"{width}x{height}", batched(images, batches)


def write_npz(path, n, size, batches):
    """ADM's sample file: `arr_0`, uint8 (N, H, W, 3), filled in place by all ranks."""
    shape = n, size, size, 3
    check_disk(path.parent, 2 * math.prod(shape))
    rows = path.with_name(f".tmp-{path.name[-60:]}.npy")
    if rank() == 0:
        with open(rows, "wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
    barrier()
    with open(rows, "rb+") as file:
        np.lib.format.read_magic(file)
        np.lib.format.read_array_header_1_0(file)
        start = file.tell()
        for indices, images in batches:
            file.seek(start + indices.start * math.prod(shape[1:]))
            pixels = images.permute(0, 2, 3, 1).contiguous().cpu()
            file.write(pixels.numpy().tobytes())
    barrier()
    if rank() == 0:
        with atomic(path) as temporary, zipfile.ZipFile(temporary, "w") as file:
            file.write(rows, "arr_0.npy")
        rows.unlink()
