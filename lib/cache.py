"""The latent cache: shards of latents, written once and read at random.

A shard is a safetensors file `latents_rank00_shard00000.safetensors` with `latents` (N, C, h, w),
`labels` (N,) and usually `latents_flip`, the latents of the mirrored images. LightningDiT and the
JLT release use the same format. Our shards may also hold the images themselves (`pictures`, uint8),
and carry their settings as JSON under one metadata key, since safetensors writes several keys in no
fixed order and equal caches should be equal bytes.
"""
import hashlib
import json
import math
import pathlib
import re

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lib.files import atomic
from lib.flags import quoted
from lib.run import BadInput, RunFailed, log

# The settings that all shards of one cache share.
SHARED = ("version", "shards", "images", "list", "classes", "vae", "size", "flip", "batch", "dtype",
          "pictures")
LATENT_TYPES = (torch.float16, torch.bfloat16, torch.float32)
LABEL_TYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)


def shard_paths(folder):
    """The shards in a folder, ordered by rank and number, which may have any number of digits."""
    pattern, found = re.compile(r"latents_rank(\d+)_shard(\d+)\.safetensors"), {}
    for path in pathlib.Path(folder).glob("latents_rank*"):
        if match := pattern.fullmatch(path.name):
            found[int(match[1]), int(match[2])] = path
    return [found[key] for key in sorted(found)]


def open_shard(path):
    """({name: tensor}, our settings or None) of a shard. safetensors maps the file into memory, so
    that rows are read from disk only when they are used, and all ranks share them. Raises BadInput
    where the file is not a whole shard."""
    try:
        with safe_open(path, "pt") as file:  # checks that header and file fit together
            settings = json.loads((file.metadata() or {}).get("nanojlt", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        latents, labels = tensors["latents"], tensors["labels"]
        mirrored = tensors.get("latents_flip", latents)
        if not (latents.ndim == 4 and latents.shape == mirrored.shape
                and labels.shape == latents.shape[:1]):
            raise ValueError(f"latents {tuple(latents.shape)}, mirrored {tuple(mirrored.shape)}, "
                             f"labels {tuple(labels.shape)}")
        if settings is not None and not {"shard", "shards"} <= set(settings):
            raise ValueError("its settings are not ours")
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {str(error)[:150]}"
        raise BadInput(f"{path}: not a whole shard of latents ({reason}): delete it, and the "
                       "command that wrote the others writes it again") from None
    if latents.dtype not in LATENT_TYPES or labels.dtype not in LABEL_TYPES:
        raise BadInput(f"{path}: latents of {latents.dtype} and labels of {labels.dtype}: expected "
                       "fp16, bf16 or fp32, and uint8, int16, int32 or int64")
    return tensors, settings


def save_shard(path, tensors, settings):
    """Write a shard atomically. Raises RunFailed, also where latents are not finite."""
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise RunFailed(f"{path.name}: some latents are not finite: try --dtype fp32")
    with atomic(path) as temporary:
        save_file(tensors, temporary, {"nanojlt": json.dumps(settings, sort_keys=True)})


def differences(one, other):
    """The names of the settings in which two shards differ, and so are not of one cache. None
    stands for a shard that this project did not write."""
    if not (one and other):
        return [] if one is other else ["program"]
    return [name for name in SHARED if one.get(name) != other.get(name)]


def file_stamp(root, items):
    """A hash of the sizes and modification times of the listed images [(path, label)], by which
    vae.py notices changed images. It is kept beside a shard, whose own bytes hold no dates."""
    digest = hashlib.sha256()
    for path, _ in items:
        facts = (root / path).stat()
        digest.update(f"{path} {facts.st_size} {facts.st_mtime_ns}\n".encode(errors="replace"))
    return digest.hexdigest()[:16]


def read_note(path):
    """A JSON file beside the shards, or {} where there is none."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def read_statistics(path, channels):
    """(mean, std), each (C, 1, 1) fp32, of LightningDiT's raw latents, from the file beside them;
    None where there is none. Raises BadInput."""
    if not path.exists():
        return None
    try:
        stats = torch.load(path, "cpu", weights_only=True)
        mean, std = (stats[name].float().reshape(channels, 1, 1) for name in ("mean", "std"))
    except Exception as error:  # a damaged or unsafe pickle can fail in any way
        raise BadInput(f"{path}: expected tensors mean and std of {channels} channels "
                       f"({type(error).__name__}): repair it, or remove it to use the latents as "
                       "they are") from None
    return mean, std


class LatentDataset:
    """A cache written by vae.py, by LightningDiT or by the JLT release. dataset[i] is (latent
    (C, h, w) in its stored dtype, int label).

    .shape (C, h, w); .num_classes; .mirrored: whether there are latents of mirrored images.
    .class_names, .size of the images, .vae {"kind", "id"}: None where a foreign cache does not say.
    .vae_path: the folder of a local codec, or None. .has_images: whether `images` works.
    .fingerprint: a hash of settings and labels. Raises BadInput where shards are damaged, missing
    or not of one cache.
    """

    def __init__(self, folder):
        folder, paths = pathlib.Path(folder), shard_paths(folder)
        if not paths:
            raise BadInput(f"no latents in {folder}: write them with python vae.py --images FOLDER "
                           f"--out {quoted(folder)}, or try python train.py --demo, which needs "
                           "none")
        self.shards, settings = zip(*map(open_shard, paths))
        for path, shard, theirs in zip(paths, self.shards, settings):
            different = differences(theirs, settings[0])
            first, latents = self.shards[0]["latents"], shard["latents"]
            if (latents.shape[1:], latents.dtype) != (first.shape[1:], first.dtype):
                different.append("shape or type")
            if different:
                raise BadInput(f"{path}: another {', '.join(different)} than {paths[0].name}: they "
                               "are not one cache")
        ours = settings[0] or {}
        if ours and [theirs["shard"] for theirs in settings] != list(range(ours["shards"])):
            raise BadInput(f"{folder}: {len(paths)} of {ours['shards']} shards: finish the cache "
                           "with the same vae.py command")

        labels = [shard["labels"].long() for shard in self.shards]
        self.labels = torch.cat(labels)                                 # (N,) int64
        self.starts = np.cumsum([0, *map(len, labels)])                 # first row of each shard
        self.class_names, self.size = ours.get("classes"), ours.get("size")
        most = len(self.class_names) if ours else 10**6
        if not len(self.labels) or self.labels.min() < 0 or self.labels.max() >= most:
            raise BadInput(f"{folder}: no labels, or some that are not from 0 to {most - 1}")
        self.num_classes = len(self.class_names) if ours else int(self.labels.max()) + 1
        self.shape = tuple(first.shape[1:])
        self.mirrored = all("latents_flip" in shard for shard in self.shards)
        self.has_images = all("pictures" in shard for shard in self.shards)
        self.vae = ours.get("vae")
        self.vae_path = read_note(folder / "source.json").get("path")
        self.stats = None if ours else read_statistics(folder / "latents_stats.pt", self.shape[0])

        facts = json.dumps([[path.name for path in paths], settings, self.shape, str(first.dtype)])
        digest = hashlib.sha256(facts.encode())
        for tensor in (self.labels, *(self.stats or ())):
            digest.update(tensor.numpy().tobytes())
        self.fingerprint = digest.hexdigest()[:16]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        latents, labels = self.batch([range(len(self))[i]])
        return latents[0], int(labels[0])

    def batch(self, indices, flip=False):
        """Latents (B, C, h, w) in their stored dtype and labels (B,) int64. flip: bool (B,) or one
        bool, whether to take the mirrored image's; ignored where the cache has none."""
        indices = np.asarray(indices, dtype=np.int64)
        flip = np.broadcast_to(np.asarray(flip, dtype=bool), indices.shape) & self.mirrored
        names = [("latents", "latents_flip")[mirror] for mirror in flip.tolist()]
        latents = self.rows(indices, names)                             # (B, C, h, w)
        if self.stats:  # LightningDiT's latents are raw
            mean, std = self.stats
            latents = ((latents.float() - mean) / std).to(latents.dtype)
        return latents, self.labels[torch.from_numpy(indices)]

    def images(self, indices, flip):
        """The images (B, 3, size, size) uint8, mirrored where `batch` gives the mirrored latent.
        Only where .has_images: vae.py --keep-images stores them."""
        indices = np.asarray(indices, dtype=np.int64)
        images = self.rows(indices, ["pictures"] * len(indices))
        flip = torch.as_tensor(flip) & self.mirrored                    # (B,)
        return torch.where(flip[:, None, None, None], images.flip(-1), images)

    def rows(self, indices, names):
        """Row indices[i] of the tensor names[i], stacked."""
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"images {indices.min()} to {indices.max()} of {len(self)}")
        shard = np.searchsorted(self.starts, indices, "right") - 1
        row = indices - self.starts[shard]
        tensors = [self.shards[s][name] for s, name in zip(shard.tolist(), names)]
        return torch.stack([tensor[r] for tensor, r in zip(tensors, row.tolist())])

    def differences(self, other):
        """What keeps two caches from serving one network."""
        names = ("shape", "vae", "num_classes", "class_names")
        return [name for name in names if getattr(self, name) != getattr(other, name)]


def check_latents(data):
    """(mean, standard deviation) of 1,000 latents from all over a cache. Warns where they are far
    from 0 and 1, unless they are pixels; raises BadInput where they are not finite."""
    indices = np.linspace(0, len(data) - 1, min(len(data), 1000)).astype(np.int64)
    x = data.batch(indices)[0].float()                                  # (up to 1000, C, h, w)
    mean, std = x.mean().item(), x.std(correction=0).item()
    if not math.isfinite(mean):
        raise BadInput("the latents hold values that are not finite: write the cache again")
    healthy = abs(mean) <= 1 and 0.25 <= std <= 4
    if not healthy and (data.vae or {}).get("kind") != "pixels":
        log(f"warning: latents with mean {mean:.2f} and standard deviation {std:.2f}: expected "
            "about 0 and 1")
    return mean, std
