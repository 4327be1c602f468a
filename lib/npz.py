"""Reference statistics and sample files: npz from anywhere, so nothing is unpickled and no header simply believed."""
import contextlib
import hashlib
import json
import math
import os
import re
import zipfile

import numpy as np
import torch

from lib.run import BadInput, atomic
from lib.samples import saving


@contextlib.contextmanager
def open_npz(path):
    """Yield a function: array's name -> (stream at its first value, shape, dtype), or KeyError. A header that does not
    fit the real size is refused before anything is allocated. Whatever turns out wrong becomes a BadInput."""
    try:
        if not os.path.isfile(path):  # a pipe would be waited for
            raise ValueError("No such file")
        with zipfile.ZipFile(path) as file:
            def member(name):
                info = file.getinfo(f"{name}.npy")
                if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others take memory at will
                    raise BadInput(f"{name} is compressed in a way that numpy does not write")
                stream = file.open(info)
                if np.lib.format.read_magic(stream) != (1, 0):  # only this version's header is sure to be short
                    raise BadInput(f"{name} is not in npy format 1.0")
                shape, by_column, dtype = np.lib.format.read_array_header_1_0(stream)
                if dtype.hasobject or by_column and len(shape) > 1:
                    raise BadInput(f"{name} holds objects or is stored by column")
                if stream.tell() + math.prod(shape) * dtype.itemsize != info.file_size:
                    raise BadInput(f"the header of {name} does not fit its data")
                return stream, shape, dtype
            yield member
    except BadInput as error:
        raise BadInput(f"{path}: {str(error)[:200]}") from None
    except Exception as error:  # a damaged file fails in any way it likes
        raise BadInput(f"{path}: not a whole npz file with the arrays expected ({str(error)[:150]})") from None


def read_array(member, name, shape, kind="f", longest=16):
    """The array of this name, which must have this shape, this kind of dtype and at most `longest` bytes per item."""
    stream, real, dtype = member(name)
    if real != shape or dtype.kind != kind or dtype.itemsize > longest:
        raise BadInput(f"{name} is {dtype} {real}, expected {'floats' if kind == 'f' else 'a short text'} {shape}")
    data = stream.read(math.prod(shape) * dtype.itemsize)
    return np.frombuffer(data, dtype).reshape(shape).astype(dtype.newbyteorder("="))


def statistics_hash(mu, sigma):
    return hashlib.sha256(mu.tobytes() + sigma.tobytes()).hexdigest()[:12]


def read_statistics(path, width):
    """(mu (width,), sigma (width, width), about) in float64, from any npz with `mu` and `sigma`; about is what the file
    says of its images, {name: text}, and always a `hash` of both arrays. Raises BadInput where they cannot be right."""
    with open_npz(path) as member:
        mu, sigma = (np.ascontiguousarray(read_array(member, name, shape), np.float64)
                     for name, shape in (("mu", (width,)), ("sigma", (width, width))))
        try:
            about = json.loads(str(read_array(member, "meta", (), "U", 4096)))
        except KeyError:  # not one of ours
            about = {}
        if not isinstance(about, dict) or not all(re.fullmatch(r"[\w -]{1,40}", str(x)) for x in about.values()):
            raise BadInput("meta is not what --save-ref writes")
        digest = statistics_hash(mu, sigma)
        if about.setdefault("hash", digest) != digest:
            raise BadInput("mu or sigma is not what --save-ref wrote there: make the file again")
        if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise BadInput("mu or sigma holds values that are not finite")
        if np.abs(sigma - sigma.T).max() > 1e-5 * np.abs(sigma).max() or sigma.diagonal().min() < 0 or not sigma.any():
            raise BadInput("sigma is no covariance: not symmetric, or without positive variances")
    return mu, (sigma + sigma.T) / 2, {name: str(value) for name, value in about.items()}


def write_statistics(path, mu, sigma, **about):
    """Write what read_statistics reads, with `about` as JSON in the array `meta`. Returns the hash."""
    mu, sigma = np.asarray(mu), np.asarray(sigma)
    about["hash"] = statistics_hash(mu, sigma)
    with saving(path), atomic(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, mu=mu, sigma=sigma, meta=json.dumps(about, sort_keys=True))
    return about["hash"]


def image_shape(path):
    """(N, height, width) of ADM's sample file: `arr_0`, uint8 (N, H, W, 3)."""
    with open_npz(path) as member:
        _, shape, dtype = member("arr_0")
        if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8 or not all(1 <= side <= 4096 for side in shape[1:3]):
            raise BadInput(f"arr_0 is {dtype} {shape}, expected uint8 (N, H, W, 3), sides up to 4096")
        return shape[:3]


def image_rows(path, rows):
    """Yield the images arr_0[i], uint8 (H, W, 3), for each i of `rows`, which rise; one at a time is in memory."""
    with open_npz(path) as member:
        stream, shape, _ = member("arr_0")
        start, size = stream.tell(), math.prod(shape[1:])
        for i in rows:
            stream.seek(start + i * size)
            yield torch.frombuffer(bytearray(stream.read(size)), dtype=torch.uint8).reshape(shape[1:])
