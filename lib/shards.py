"""Shards of latents on disk: are they whole, what do their headers say, and fast random access to their rows.

A shard is a safetensors file: 8 bytes that hold the length of a JSON header, the header, the tensors' bytes. Keys
`latents` (N, C, h, w), `labels` (N,), mostly `latents_flip`: the layout of LightningDiT and of the JLT release. Ours
carry their settings besides, as JSON under the one metadata key "nanojlt".
"""
import json, math, os, pathlib, re

import numpy as np
import torch

from lib.run import BadInput

TYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "I32": torch.int32, "I64": torch.int64}
SETTINGS = {"version": int, "shard": int, "shards": int, "images": int, "list": str, "classes": list, "vae": dict,
            "size": int, "flip": bool, "batch": int, "dtype": str, "unreadable": list}


def shard_files(folder):
    """The shards in a folder, by rank and number (any number of digits)."""
    form = re.compile(r"latents_rank(\d+)_shard(\d+)\.safetensors")
    if not os.path.isdir(folder):
        return []
    found = [(form.fullmatch(path.name), path) for path in pathlib.Path(folder).glob("latents_rank*")]
    return [path for *_, path in sorted((int(m[1]), int(m[2]), path) for m, path in found if m)]


def read_header(path):
    """({tensor: (dtype, shape, place of its first byte)}, our settings or None); BadInput unless the shard is whole."""
    try:
        if not os.path.isfile(path):  # a pipe would be waited for
            raise ValueError("no such file")
        with open(path, "rb") as file:
            size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length < size else {}  # never more memory than the file has bytes
        settings = json.loads(header.pop("__metadata__", {}).get("nanojlt", "null"))
        tensors, end = {}, 8 + length
        for name, entry in header.items():
            dtype, shape, (start, stop) = TYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
            if any(type(n) is not int or n < 0 for n in (start, stop, *shape)):
                raise ValueError(f"{name} has a place or shape that is no number")
            if start + math.prod(shape) * dtype.itemsize != stop:
                raise ValueError(f"{name} does not fit its bytes")
            tensors[name], end = (dtype, shape, 8 + length + start), max(end, 8 + length + stop)
        if end != size:
            raise ValueError(f"{size:,} bytes, expected {end:,}")
        (dtype, shape, _), (kind, count, _) = tensors["latents"], tensors["labels"]
        floats = dtype.is_floating_point, kind.is_floating_point
        if len(shape) != 4 or 0 in shape[1:] or count != shape[:1] or floats != (True, False):
            raise ValueError(f"latents {shape} and labels {count} do not belong together")
        if tensors.get("latents_flip", tensors["latents"])[:2] != (dtype, shape):
            raise ValueError("latents and latents_flip differ in shape or type")
        if settings is not None:
            texts = [*settings["classes"], *settings["unreadable"], settings["vae"]["kind"], settings["vae"]["id"]]
            if not all(type(settings[k]) is t for k, t in SETTINGS.items()) or not all(type(t) is str for t in texts):
                raise ValueError("settings of an unknown form")
        return tensors, settings
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(f"{path}: not a whole shard of latents ({type(error).__name__}: {str(error)[:99]}): delete it, "
                       "and the command that made the others makes it anew") from None


def differing(one, other):
    """The settings that shards of one cache share, in which these two differ (None: not a shard of ours)."""
    if not (one and other):
        return [] if one is other else ["program"]
    return [key for key in SETTINGS if key not in ("shard", "unreadable") and one[key] != other[key]]


def read_hint(path):
    """The path that a cache remembers beside its shards; None where that file is gone or not readable: it may."""
    try:
        hint = json.loads(path.read_text())["hint"]
        return hint if type(hint) is str else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def read_stats(path, channels):
    """(mean, std), each (C, 1, 1) fp32, from the file that LightningDiT lays beside raw latents; None without one."""
    if not path.exists():
        return None
    try:
        stats = torch.load(path, "cpu", weights_only=True)
        mean, std = (stats[name].float().reshape(channels, 1, 1) for name in ("mean", "std"))
        if not (mean.isfinite() & std.isfinite() & (std > 0)).all():
            raise ValueError("not finite, or a std of 0")
    except Exception as error:
        known = isinstance(error, (OSError, RuntimeError, ValueError))  # others say what would be unsafe to follow
        reason = " ".join(str(error).split())[:99] if known else type(error).__name__
        raise BadInput(f"{path}: expected tensors mean and std of {channels} channels ({reason}): mend it, or "
                       "remove it to use the latents as they are") from None
    return mean, std


class Rows:
    """The rows of all shards as one table: .labels (N,) int64, and gather(rows, flip) for latents of .shape (C, h, w).
    .mirrored: every shard holds mirrored latents. A file is mapped when it is first needed. Raises BadInput."""

    def __init__(self, paths, headers):
        self.paths, self.headers, self.maps = paths, headers, {}
        self.dtype, (_, *shape), _ = headers[0]["latents"]
        self.shape, self.mirrored = tuple(shape), all("latents_flip" in header for header in headers)
        labels = []
        for path, header in zip(paths, headers):
            dtype, (_, *shape), _ = header["latents"]
            if (dtype, tuple(shape)) != (self.dtype, self.shape):
                raise BadInput(f"{path}: latents {tuple(shape)} {dtype}, expected {self.shape} {self.dtype} as in "
                               f"{paths[0].name}: they are not one cache")
            dtype, (count,), place = header["labels"]
            labels.append(np.fromfile(path, "<i4" if dtype == torch.int32 else "<i8", count, offset=place))
        self.starts = np.cumsum([0] + [len(part) for part in labels])  # the first row of each shard, then their number
        self.labels = torch.from_numpy(np.concatenate(labels).astype(np.int64))

    def __getstate__(self):  # a spawned worker makes its own maps
        return self.__dict__ | {"maps": {}}

    def table(self, shard, flip):
        """One tensor of a shard as bytes (N, bytes of a row)."""
        dtype, shape, place = self.headers[shard]["latents_flip" if flip else "latents"]
        length = math.prod(shape) * dtype.itemsize
        # torch's map, unlike Python's, keeps no file open: a cache may have thousands of shards
        data = torch.from_file(str(self.paths[shard]), shared=False, size=place + length, dtype=torch.uint8)
        return data[place:].view(shape[0], -1).numpy()

    def gather(self, rows, flip):
        """rows: int64 (B,), flip: bool (B,) -> latents (B, C, h, w) in the stored type. Other threads run meanwhile."""
        if not len(rows):
            return torch.empty(0, *self.shape, dtype=self.dtype)
        if not 0 <= rows.min() <= rows.max() < self.starts[-1]:
            raise IndexError(f"rows {rows.min()} to {rows.max()} of {self.starts[-1]}")
        shard = np.searchsorted(self.starts, rows, "right") - 1
        keys, within = (2 * shard + (flip & self.mirrored)).tolist(), (rows - self.starts[shard]).tolist()
        for key in set(keys) - self.maps.keys():
            self.maps[key] = self.table(key // 2, key % 2)
        # Into memory of NumPy's, which asks for huge pages where torch.empty does not: nearly as fast as from an array.
        out = np.empty(len(rows) * math.prod(self.shape) * self.dtype.itemsize, np.uint8)
        np.concatenate([self.maps[key][row] for key, row in zip(keys, within)], out=out)
        return torch.from_numpy(out).view(self.dtype).view(len(rows), *self.shape)
