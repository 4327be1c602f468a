"""The first stage: images <-> latents, and the cache of latents that training reads.

    python vae.py --images FOLDER --out CACHE               FOLDER/<class>/*.jpg -> CACHE/latents_*
    torchrun --nproc_per_node=8 vae.py --images FOLDER      the very same files, written by 8 GPUs
    python vae.py --images FOLDER --out CACHE --vae taef2   by the tiny codec; `pixels` is none

    picture file -> RGB -> center_crop -> encode -> latents -> write_cache -> shards of fp16
                      8-bit images <- to_uint8 <- decode <- latents <- LatentDataset <- shards

Where FLUX.2's 128 channels come from: its convolutions turn a 3 x 256 x 256 image into 32 x 32 x
32; then each 2 x 2 square of positions is stacked into channels (space-to-depth), 128 x 16 x 16;
then each channel is normalised by mean and variance that the VAE's own BatchNorm has recorded.

Training mirrors half of its images. A mirrored *latent* is not the latent of the mirrored image (a
channel may well hold a square's left half), so that is encoded too: the cache holds both.
"""
import hashlib
import json
import math
import os
import pathlib
import sys

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from lib import cache
from lib.checkpoint import FLUX2, find_file
from lib.device import cores, pick_device
from lib.files import check_disk, lock_folder, prefetched
from lib.flags import Parser, number
from lib.images import list_images, read_picture
from lib.run import BadInput, StopSignal, connect, printable, program, rank, say, world_size
from lib.taef2 import Taef2

TAEF2 = "madebyollin/taef2"
KINDS = {"AutoencoderKLFlux2": "flux2", "AutoencoderKL": "kl"}  # of diffusers
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # in fp16 FLUX.2's VAE overflows
CHUNK = 16    # images that a codec takes at once: this bounds its memory
SHARD = 1024  # listed images per file of the cache


# -------------------------------------------------------------------------------------------------
# Codecs: networks with encode(images in [-1, 1]) -> normalised latents and decode, the way back

class Pixels(torch.nn.Module):
    """No codec: the latent is the image, and the same programs train a model of pixels."""
    kind, channels, stride = "pixels", 3, 1

    def encode(self, images):
        return images

    decode = encode  # both are the identity


class AutoEncoder(torch.nn.Module):
    """A VAE of diffusers, from a folder or a Hugging Face id: FLUX.2's, or any AutoencoderKL (that
    of Stable Diffusion, FLUX.1, REPA-E). diffusers' classes are the networks alone: what FLUX.2's
    pipeline adds, space-to-depth and normalisation, is here. The others are normalised by what
    their configuration says."""

    def __init__(self, source):
        super().__init__()
        import diffusers  # takes seconds: imported only where it is used
        config = find_file(source, "vae/config.json", "config.json")
        name = json.loads(config.read_text())["_class_name"]
        self.kind = KINDS.get(name)
        if not self.kind:
            raise ValueError(f"config.json is of {name}, expected {' or '.join(KINDS)}")
        # In a pipeline's repository the VAE lies in a folder of its own.
        inside = config.parent.name == "vae"
        flux2 = self.kind == "flux2"
        kind = diffusers.AutoencoderKLFlux2 if flux2 else diffusers.AutoencoderKL
        self.net, info = kind.from_pretrained(
            source, subfolder="vae" if inside else None, use_safetensors=True,
            low_cpu_mem_usage=False, output_loading_info=True)
        missing = [key for key in info["missing_keys"] if not key.endswith("num_batches_tracked")]
        if missing:  # diffusers would go on with random numbers there
            raise ValueError(f"the weights lack {missing[0]}")
        config = self.net.config
        self.square = 2 if flux2 else 1                      # space-to-depth of 2 x 2, or none
        self.channels = self.square ** 2 * config.latent_channels
        self.stride = self.square * 2 ** (len(config.block_out_channels) - 1)  # all levels but one
        if flux2:
            bn = self.net.bn
            mean, std = bn.running_mean, torch.sqrt(bn.running_var + config.batch_norm_eps)
        elif config.latents_mean and config.latents_std:
            mean, std = torch.tensor(config.latents_mean), torch.tensor(config.latents_std)
        else:
            mean = torch.tensor(config.shift_factor or 0.0)
            std = torch.tensor(1 / config.scaling_factor)
        self.mean, self.std = mean.reshape(-1, 1, 1), std.reshape(-1, 1, 1)  # (C or 1, 1, 1)

    def encode(self, images):                                           # (B, 3, H, W)
        images = images.to(self.net.dtype)
        z = self.net.encode(images).latent_dist.mode()                  # (B, 32, H/8, W/8)
        z = F.pixel_unshuffle(z.float(), self.square)                   # (B, 128, H/16, W/16)
        return (z - self.mean.to(z.device)) / self.std.to(z.device)

    def decode(self, latents):                                          # (B, 128, H/16, W/16)
        z = latents * self.std.to(latents.device) + self.mean.to(latents.device)
        z = F.pixel_shuffle(z, self.square).to(self.net.dtype)          # (B, 32, H/8, W/8)
        return self.net.decode(z).sample                                # (B, 3, H, W)


class Codec:
    """A codec at work: encode(images (B, 3, H, W) in [-1, 1]) -> latents (B, channels, H/stride,
    W/stride) and decode, the way back (not clamped); fp32 in and out whatever it computes in.
    .kind flux2, kl, taef2 or pixels; .id a Hugging Face id, or a hash of a local folder's weights;
    .path that folder, or None.
    """

    def __init__(self, net, id, path=None, device="cpu", dtype="fp32"):
        self.id, self.path, self.device, self.dtype = id, path, device, dtype
        self.kind, self.channels, self.stride = net.kind, net.channels, net.stride
        mps = torch.device(device).type == "mps"
        self.layout = torch.contiguous_format if mps else torch.channels_last  # which is faster
        net = net.eval().requires_grad_(False)
        self.net = net.to(device, DTYPES[dtype], memory_format=self.layout)

    def encode(self, images):
        return self.in_chunks(self.net.encode, images)

    def decode(self, latents):
        return self.in_chunks(self.net.decode, latents)

    @torch.no_grad()
    def in_chunks(self, function, batch):
        done = []
        for x in batch.split(CHUNK):
            x = x.to(self.device, torch.float32, memory_format=self.layout)
            done.append(function(x).float())
        return torch.cat(done).contiguous()


def load_vae(name="flux2", device="cpu", dtype="fp32") -> Codec:
    """The Codec `name`: flux2, taef2, pixels, a Hugging Face id, or a local folder, recognised by
    what lies in it. dtype: fp32 or bf16, what it computes in. Raises BadInput."""
    if name == "pixels":
        return Codec(Pixels(), "pixels", None, device)
    source = {"flux2": FLUX2, "taef2": TAEF2}.get(name, name)
    folder, is_local = pathlib.Path(source), os.path.isdir(source)  # else a Hugging Face id
    if not is_local and source.count("/") != 1:
        raise BadInput(f"--vae {name}: expected flux2, taef2, pixels, a Hugging Face id, a folder")
    try:
        is_taef2 = source == TAEF2 or any(folder.glob("taef2_encoder.*"))
        net = Taef2(source) if is_taef2 else AutoEncoder(source)
    except MemoryError:
        raise
    except Exception as error:  # whatever the libraries make of no network, or of a broken file
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        raise BadInput(f"--vae {name}: cannot be loaded ({reason}): check the network and HF_HOME, "
                       "or name a folder (with config.json, or taef2_encoder.*)") from None
    if is_local:  # known by its weights, wherever it lies
        digest = hashlib.sha256()
        for key, tensor in sorted(net.state_dict().items()):
            digest.update(key.encode() + tensor.float().numpy().tobytes())
        source = f"{net.kind}-{digest.hexdigest()[:12]}"
    return Codec(net, source, str(folder.absolute()) if is_local else None, device, dtype)


def open_vae(settings: dict, channels: int, override=None, device="cpu") -> Codec:
    """The codec that decodes a checkpoint's latents: the one asked for, else the local one that
    made them, else the one that settings name. Raises BadInput."""
    id, path = (settings.get("vae") or {}).get("id"), settings.get("vae_path")
    name = override or path or id
    if not name or (name == path and not os.path.exists(path)):
        raise BadInput(f"the codec of these latents ({path or 'unknown'}) is not here: give --vae")
    vae = load_vae(name, device)
    if vae.channels != channels:
        raise BadInput(f"--vae {name}: latents of {vae.channels} channels, but {channels} wanted")
    if not override and vae.id != id:
        say(f"warning: {name} is not the codec that made the latents ({id}): wrong colours")
    return vae


# Every step from floats to 8 bits in this project is to_uint8.

def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] (beyond is clamped) -> uint8, rounded to the nearest."""
    return (images.float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)


def from_uint8(images: torch.Tensor) -> torch.Tensor:
    """uint8 -> fp32 in [-1, 1]."""
    return images.float() / 127.5 - 1


# -------------------------------------------------------------------------------------------------
# The cache, written. A shard is a fixed slice of the sorted list of images, and all that shaped it
# lies in its header, without paths or dates: its bytes are the same whoever wrote it.

def write_cache(images, out, vae, size=256, flip=True, batch=CHUNK, shard_size=SHARD, stop=None,
                listing=None, keep_images=False):
    """Encode class folders into the cache `out`, keeping shards that are there. Returns the exit
    code. stop: a StopSignal. listing: of `images`, if at hand. keep_images: the 8-bit crops beside
    their latents. Raises BadInput before it writes."""
    images, out = pathlib.Path(images), pathlib.Path(out)
    if size % vae.stride:
        raise BadInput(f"--size {size}: expected a multiple of {vae.stride}, a latent's pixels")
    if images.resolve() in (out.resolve(), *out.resolve().parents):
        raise BadInput(f"--out {out}: inside --images it would pass for a class: put it elsewhere")
    classes, items = listing or list_images(images)
    shards = [items[i:i + shard_size] for i in range(0, len(items), shard_size)]
    settings = {
        "version": 1, "shards": len(shards), "images": len(items), "classes": classes, "size": size,
        "list": cache.list_hash(items), "flip": flip,
        "vae": {"kind": vae.kind, "id": vae.id}, "dtype": vae.dtype, "batch": batch}
    settings |= {"pictures": True} if keep_images else {}  # older caches lack the word

    def read(path):
        return read_picture(images / path, size)

    paths = [out / f"latents_rank00_shard{k:05d}.safetensors" for k in range(len(shards))]
    finished = cache.finished_shards(out, paths, settings, read)
    todo = [k for k in range(len(shards)) if paths[k] not in finished]
    shape = vae.channels, size // vae.stride, size // vae.stride        # (C, h, w)
    per_image = 2 * (1 + flip) * math.prod(shape) + keep_images * 3 * size * size  # bytes
    need = per_image * sum(len(shards[k]) for k in todo)
    say(f"{len(items):,} images of {len(classes)} classes: {len(todo)} of {len(shards)} shards to "
        f"write, {need / 1e9:.2f} GB")
    check_disk(out, need)
    if all(read(path)[0] is None for path, _ in items):  # as a rule this reads one image
        raise BadInput(f"{images}: not one of {len(items)} images can be read")
    mine = [k for k in todo if k % world_size() == rank()]  # no rank waits for another
    jobs, threads = [path for k in mine for path, _ in shards[k]], cores()
    pictures = prefetched(read, jobs, threads, 2 * (batch + threads))
    bar = tqdm(total=len(jobs), unit="image", disable=rank() > 0 or None)
    with lock_folder(out), bar:
        if rank() == 0 and vae.path:
            cache.write_codec_path(out, vae.path)
        for k in mine:
            encoded = encode_shard(shards[k], pictures, vae, shape, flip, batch, bar, stop,
                                   size if keep_images else None)
            if encoded is None:
                say("stopped: whole shards are kept, and the same command continues")
                return 128 + stop.number
            tensors, unreadable = encoded
            cache.save_shard(paths[k], tensors, settings | {"shard": k, "unreadable": unreadable})
    done = "written" if world_size() == 1 else "rank 0 has written its part"
    say(f"{out}: {done}; next: python train.py --latents {out}")
    return 0


def encode_shard(items, pictures, vae, shape, flip, batch, bar, stop, kept_size=None):
    """Encode the next of `pictures`, those of items [(path, label)]. Returns (tensors of the shard,
    paths that cannot be read), or None where a signal says stop."""
    labels, unreadable, names = [], [], ("latents", "latents_flip")[:1 + flip]
    tensors = {name: [torch.empty(0, *shape).half()] for name in names}
    if kept_size:
        tensors["pictures"] = [torch.empty(0, 3, kept_size, kept_size, dtype=torch.uint8)]
    for start in range(0, len(items), batch):
        if stop and stop.number:
            return None
        good = []
        for path, label in items[start:start + batch]:
            picture, reason = next(pictures)
            if reason:
                print(printable(f"warning: left out: {path} ({reason})"), file=sys.stderr)
                unreadable.append(path)
            else:
                good.append(picture)
                labels.append(label)
            bar.update()
        if good:
            if kept_size:
                tensors["pictures"].append(torch.stack(good))
            x = from_uint8(torch.stack(good).to(vae.device))            # (b, 3, size, size)
            for name in names:
                z = vae.encode(x.flip(-1) if name == "latents_flip" else x)
                tensors[name].append(z.cpu().half())                    # (b, C, h, w)
    tensors = {name: torch.cat(latents) for name, latents in tensors.items()}
    return tensors | {"labels": torch.tensor(labels, dtype=torch.int64)}, unreadable


# -------------------------------------------------------------------------------------------------
# The cache, read

class LatentDataset:
    """A cache of ours, of LightningDiT or of the JLT release: [i] -> (latent (C, h, w) in the
    stored type, int label).
    .shape (C, h, w); .num_classes; .mirrored: whether it holds mirrored images; .class_names, .size
    of the images, .vae {"kind", "id"}: None where a foreign cache does not say; .vae_path, a local
    codec's folder or None; .fingerprint of headers and labels. Raises BadInput.
    """

    def __init__(self, folder):
        self.rows, settings, self.stats, self.fingerprint = cache.open_cache(folder)
        self.labels, self.shape = self.rows.labels, self.rows.shape
        self.mirrored, self.pictured = self.rows.mirrored, self.rows.pictured
        self.class_names, self.size = settings.get("classes"), settings.get("size")
        self.num_classes = len(self.class_names or range(int(self.labels.max()) + 1))
        self.vae, self.vae_path = settings.get("vae"), cache.read_codec_path(folder)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        latents, labels = self.batch([range(len(self))[i]])
        return latents[0], int(labels[0])

    def differs(self, other):
        """What keeps two caches from being of one kind, for one network."""
        names = ("shape", "vae", "num_classes", "class_names")
        return [name for name in names if getattr(self, name) != getattr(other, name)]

    def batch(self, indices, flip=False):
        """Latents (B, C, h, w) in the stored type and labels (B,) int64. flip, bool (B,) or one
        bool: of the mirrored image; ignored where the cache has none."""
        indices = np.asarray(indices, dtype=np.int64)
        flip = np.broadcast_to(np.asarray(flip, dtype=bool), indices.shape)
        latents = self.rows.latents(indices, flip)                      # (B, C, h, w)
        if self.stats:  # LightningDiT's latents are raw
            mean, std = self.stats
            latents = ((latents.float() - mean) / std).to(latents.dtype)
        return latents, self.labels[torch.from_numpy(indices)]

    def pictures(self, indices, flip):
        """The images themselves (B, 3, size, size) uint8, mirrored where `batch` gives a mirrored
        one's latent. Only where .pictured: vae.py --keep-images stores them."""
        images = self.rows.pictures(np.asarray(indices, dtype=np.int64))
        flip = torch.as_tensor(flip) & self.mirrored                    # (B,)
        return torch.where(flip[:, None, None, None], images.flip(-1), images)


@program
def main(argv=None):
    parser = Parser("Encode class folders into a cache of latents. The same command continues.")
    add = parser.add_argument
    add("--images", required=True, metavar="FOLDER", help="FOLDER/<class>/*.jpg, or deeper")
    add("--out", default="data/imagenet256-flux2", metavar="CACHE", help="folder to write")
    add("--vae", default="flux2", help="flux2, taef2, pixels, a Hugging Face id or a folder")
    add("--size", type=number(int, 1, 8192), default=256, help="side of the images, in pixels")
    add("--no-flip", action="store_true", help="no mirrored latents: where left and right matter")
    add("--keep-images", action="store_true", help="store the images, too, for ablations/repa.py")
    add("--batch", type=number(int, 1, CHUNK), default=CHUNK, help="images encoded at once")
    add("--dtype", default="fp32", choices=DTYPES, help="what the codec computes in")
    args = parser.parse_args(argv)
    connect()
    stop = StopSignal()
    listing = list_images(args.images)  # a wrong folder is reported before a codec is downloaded
    vae = load_vae(args.vae, pick_device(), args.dtype)
    return write_cache(args.images, args.out, vae, args.size, not args.no_flip, args.batch,
                       stop=stop, listing=listing, keep_images=args.keep_images)


if __name__ == "__main__":
    sys.exit(main())
