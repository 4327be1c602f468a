"""Shards of latents on disk: what their headers say, and fast random access to their rows. A shard
is a safetensors file (8 bytes: the length of a JSON header, the header, the tensors' bytes) of
`latents` (N, C, h, w), `labels` (N,), mostly `latents_flip`, as LightningDiT and the JLT release
have them. Ours may also hold `pictures`, uint8 (N, 3, size, size), and carry their settings, JSON
under one metadata key."""
import hashlib
import json
import math
import pathlib
import re
import resource

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lib.files import atomic
from lib.run import BadInput, RunFailed, say

TYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32,
         "I32": torch.int32, "I64": torch.int64, "U8": torch.uint8}
# What the shards of one cache agree in.
SHARED = ("version", "shards", "images", "list", "classes", "vae", "size", "flip", "batch", "dtype",
          "pictures")


def shard_files(folder):
    """The shards in a folder, by rank and number (of any number of digits)."""
    form = re.compile(r"latents_rank(\d+)_shard(\d+)\.safetensors")
    found = {}
    for path in pathlib.Path(folder).glob("latents_rank*"):
        if match := form.fullmatch(path.name):
            found[int(match[1]), int(match[2])] = path
    return [found[key] for key in sorted(found)]


def read_header(path):
    """({tensor: (dtype, shape, place of its first byte)}, our settings or None) of a whole shard.
    Raises BadInput."""
    try:
        with safe_open(path, "pt"):  # it looks whether the header fits the file
            pass
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        settings = json.loads(header.pop("__metadata__", {}).get("nanojlt", "null"))
        tensors = {}
        for name, entry in header.items():
            place = 8 + length + entry["data_offsets"][0]
            tensors[name] = TYPES[entry["dtype"]], tuple(entry["shape"]), place
        (dtype, shape, _), (_, count, _) = tensors["latents"], tensors["labels"]
        mirrored = tensors.get("latents_flip", tensors["latents"])
        if len(shape) != 4 or count != shape[:1] or mirrored[:2] != (dtype, shape):
            raise ValueError(f"latents {shape}, labels {count}, mirrored {mirrored[1]}")
        return tensors, settings
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        reason = f"{type(error).__name__}: {str(error)[:99]}"
        raise BadInput(f"{path}: not a whole shard of latents ({reason}): delete it, and the "
                       "command that made the others makes it anew") from None


def list_hash(items):
    """Names a list of images [(path, label)]."""
    names = json.dumps([path for path, _ in items])
    return hashlib.sha256(names.encode()).hexdigest()[:16]


def differing(one, other):
    """The settings in which two shards are not of one cache (None: a shard that is not ours)."""
    if not (one and other):
        return [] if one is other else ["program"]
    return [name for name in SHARED if one.get(name) != other.get(name)]


def finished_shards(out, paths, settings, read):
    """The shards that need not be written again. Raises BadInput for one of another cache."""
    finished = []
    for path in shard_files(out):
        _, theirs = read_header(path)
        wrong = differing(theirs, settings) or ([] if path in paths else ["name"])
        if wrong:
            raise BadInput(f"{path}: made with another {', '.join(wrong)}: change --out")
        # Not finished: where an image left out can be read now, since its disk was away.
        if all(read(name)[0] is None for name in theirs["unreadable"]):
            finished.append(path)
    return finished


def save_shard(path, tensors, settings):
    """Write a shard, atomically. (One key of the header: safetensors keeps several in no order.)"""
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise RunFailed(f"{path.name}: latents that are not finite numbers: try --dtype fp32")
    with atomic(path) as temporary:
        save_file(tensors, temporary, {"nanojlt": json.dumps(settings, sort_keys=True)})


def write_codec_path(folder, path):
    """Note where a local codec lies: beside the shards, since a path is no part of the data."""
    with atomic(folder / "source.json") as temporary:
        temporary.write_text(json.dumps({"path": path}))


def read_codec_path(folder):
    """The path in that note, or None. (Older caches call it hint.)"""
    try:
        note = json.loads(pathlib.Path(folder, "source.json").read_text())
        return note.get("path", note.get("hint"))
    except (OSError, ValueError):
        return None


def read_stats(path, channels):
    """(mean, std), each (C, 1, 1) fp32, from the file that LightningDiT lays beside raw latents;
    None without one."""
    if not path.exists():
        return None
    try:
        stats = torch.load(path, "cpu", weights_only=True)
        mean, std = (stats[name].float().reshape(channels, 1, 1) for name in ("mean", "std"))
    except Exception as error:  # a damaged or unsafe pickle fails in any way it likes
        raise BadInput(f"{path}: expected tensors mean and std of {channels} channels "
                       f"({type(error).__name__}): mend it, or remove it to use the latents as "
                       "they are") from None
    return mean, std


def open_cache(folder):
    """(Rows, settings, stats, fingerprint) of the cache in a folder: settings {} and maybe stats
    (mean, std) where it is not ours. Raises BadInput."""
    folder, paths = pathlib.Path(folder), shard_files(folder)
    if not paths:
        raise BadInput(f"no latents at {folder}: make them (python vae.py --images FOLDER --out "
                       f"{folder}), or try python train.py --demo, which needs none")
    headers, settings = zip(*map(read_header, paths))
    for path, theirs in zip(paths, settings):
        if wrong := differing(theirs, settings[0]):
            raise BadInput(f"{path}: another {', '.join(wrong)} than {paths[0].name}: they are not "
                           "one cache")
    rows, ours = Rows(paths, headers), settings[0] or {}
    if ours and [theirs["shard"] for theirs in settings] != list(range(ours["shards"])):
        raise BadInput(f"{folder}: {len(paths)} of {ours['shards']} shards: finish the cache with "
                       "the same vae.py command")
    classes = len(ours["classes"]) if ours else 10**6
    if not len(rows.labels) or rows.labels.min() < 0 or rows.labels.max() >= classes:
        raise BadInput(f"{folder}: no labels, or some that are not from 0 to {classes - 1}")
    stats = None if ours else read_stats(folder / "latents_stats.pt", rows.shape[0])
    facts = json.dumps([[path.name for path in paths], headers, settings], default=str)
    digest = hashlib.sha256(facts.encode())
    for data in (rows.labels, *(stats or ())):
        digest.update(data.numpy().tobytes())
    return rows, ours, stats, digest.hexdigest()[:16]


def check_latents(data):
    """(mean, standard deviation) of 1,000 latents from all over a LatentDataset. Warns where they
    are far from 0 and 1 (pixels may be); raises BadInput where they are no finite numbers."""
    picks = np.linspace(0, len(data) - 1, min(len(data), 1000)).astype(np.int64)
    x = data.batch(picks)[0].float()                                    # (up to 1000, C, h, w)
    mean, std = x.mean().item(), x.std(correction=0).item()
    if not math.isfinite(mean):
        raise BadInput("the latents hold values that are not finite: make the cache anew")
    healthy = abs(mean) <= 1 and 0.25 <= std <= 4
    if not healthy and (data.vae or {}).get("kind") != "pixels":
        say(f"warning: latents of mean {mean:.2f} and spread {std:.2f}, expected about 0 and 1")
    return mean, std


def mean_latent(data, count=10_000):
    """The mean latent (C, h, w) of a LatentDataset, fp32: of `count` images from all over it, every
    other one mirrored."""
    rows = np.linspace(0, len(data) - 1, min(len(data), count)).astype(np.int64)
    total = torch.zeros(data.shape, dtype=torch.float64)
    for part in np.array_split(np.arange(len(rows)), math.ceil(len(rows) / 256)):
        total += data.batch(rows[part], part % 2 == 1)[0].double().sum(0)
    return (total / len(rows)).float()


class Rows:
    """The rows of all shards as one table: .labels (N,) int64, latents of .shape (C, h, w);
    .mirrored, .pictured: whether all shards hold mirrored latents, pictures. Raises BadInput."""

    def __init__(self, paths, headers):
        self.paths, self.headers, self.maps = paths, headers, {}
        self.dtype, (_, *shape), _ = headers[0]["latents"]
        self.shape = tuple(shape)
        self.mirrored = all("latents_flip" in header for header in headers)
        self.pictured = all("pictures" in header for header in headers)
        labels = []
        for path, header in zip(paths, headers):
            dtype, (_, *shape), _ = header["latents"]
            if (dtype, tuple(shape)) != (self.dtype, self.shape):
                raise BadInput(f"{path}: latents {tuple(shape)} {dtype}, but {self.shape} "
                               f"{self.dtype} in {paths[0].name}: they are not one cache")
            dtype, (count,), place = header["labels"]
            kind = "<i4" if dtype == torch.int32 else "<i8"
            labels.append(np.fromfile(path, kind, count, offset=place))
        self.starts = np.cumsum([0] + [len(part) for part in labels])  # first row of each shard
        self.labels = torch.from_numpy(np.concatenate(labels).astype(np.int64))
        # A map keeps its file open: a large cache has more shards than the usual limit of 1,024.
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < len(paths) + 500 <= hard:
            resource.setrlimit(resource.RLIMIT_NOFILE, (len(paths) + 500, hard))

    def tables(self, shard):
        """{tensor: bytes (N, bytes of a row)} of a shard. The file is mapped once, for reading, so
        that all ranks of a machine share the memory."""
        data, tables = np.memmap(self.paths[shard], np.uint8, "r"), {}
        for name, (dtype, shape, place) in self.headers[shard].items():
            row = dtype.itemsize * int(np.prod(shape[1:]))
            tables[name] = data[place:place + shape[0] * row].reshape(shape[0], row)
        return tables

    def latents(self, rows, flip):
        """rows: int64 (B,), flip: bool (B,) -> latents (B, C, h, w) in the stored type."""
        names = [("latents", "latents_flip")[mirror] for mirror in (flip & self.mirrored).tolist()]
        return self.gather(rows, names).view(self.dtype).view(len(rows), *self.shape)

    def pictures(self, rows):
        """rows: int64 (B,) -> pictures (B, 3, size, size) uint8."""
        _, (_, *shape), _ = self.headers[0]["pictures"]
        return self.gather(rows, ["pictures"] * len(rows)).view(len(rows), *shape)

    def gather(self, rows, names):
        """The bytes of these rows of the tensors so named, one after the other. Other threads run
        meanwhile."""
        if not len(rows):
            return torch.empty(0, dtype=torch.uint8)
        if rows.min() < 0 or rows.max() >= self.starts[-1]:
            raise IndexError(f"rows {rows.min()} to {rows.max()} of {self.starts[-1]}")
        shards = np.searchsorted(self.starts, rows, "right") - 1
        within = rows - self.starts[shards]
        for shard in set(shards.tolist()) - self.maps.keys():
            self.maps[shard] = self.tables(shard)
        found = [self.maps[shard][name][row]
                 for shard, name, row in zip(shards.tolist(), names, within.tolist())]
        # Into memory of NumPy's, which asks for huge pages where torch.empty does not: that is
        # nearly as fast as copying from an array.
        out = np.empty(sum(map(len, found)), np.uint8)
        np.concatenate(found, out=out)
        return torch.from_numpy(out)
