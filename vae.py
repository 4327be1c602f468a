"""The first stage: images <-> latents, and the cache of latents that training reads.

    python vae.py --images FOLDER --out CACHE               FOLDER/<class>/*.jpg -> CACHE/latents_*
    torchrun --nproc_per_node=8 vae.py --images FOLDER      the same files, written by 8 GPUs
    python vae.py --images FOLDER --out CACHE --vae taef2   with the tiny codec; `pixels`: with none

    image file -> RGB -> center_crop -> encode -> latents -> shards in fp16
                   8-bit images <- to_uint8 <- decode <- latents <- LatentDataset <- shards

Where FLUX.2's 128 channels come from: its convolutions turn a 3 x 256 x 256 image into 32 x 32 x
32. Each 2 x 2 square of positions is then stacked into channels (space-to-depth), which makes
128 x 16 x 16, and each channel is normalised by a mean and variance that come with the VAE.

Training mirrors half of its images. The latent of a mirrored image is not the mirrored latent:
learned filters are not symmetric, and FLUX.2's channels also tell the left half of a 2 x 2 square
from its right. So both are encoded and stored, which doubles the cache. (--no-flip stores one.)
"""
import hashlib
import json
import os
import pathlib
import sys

import torch
import torch.nn.functional as F
from tqdm import tqdm

from lib.cache import LatentDataset  # noqa: F401 (for those who look for it here)
from lib.cache import differences, file_stamp, open_shard, read_note, save_shard, shard_paths
from lib.checkpoint import FLUX2, find_file
from lib.files import atomic, check_disk, lock_folder, prefetched
from lib.flags import Parser, number, path, quoted
from lib.images import list_images, read_image
from lib.run import BadInput, StopSignal, cores, gather_objects, log, pick_device, pinned
from lib.run import program, rank, to_device, warn, world_size
from lib.taef2 import Taef2

TAEF2 = "madebyollin/taef2"
KINDS = {"AutoencoderKLFlux2": "flux2", "AutoencoderKL": "kl"}  # classes of diffusers
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # in fp16 FLUX.2's VAE overflows
CHUNK = 16    # images that a codec processes at once, which bounds its memory
SHARD = 1024  # listed images per file of the cache


# -------------------------------------------------------------------------------------------------
# Codecs: networks with encode(images in [-1, 1]) -> normalised latents, and decode, its inverse

class Pixels(torch.nn.Module):
    """No codec: the latent is the image, and the same programs train a model in pixel space."""
    kind, channels, stride = "pixels", 3, 1

    def encode(self, images):
        return images

    decode = encode  # both are the identity


class AutoEncoder(torch.nn.Module):
    """A VAE of diffusers, from a folder or a Hugging Face id: FLUX.2's, or any AutoencoderKL (that
    of Stable Diffusion, FLUX.1, REPA-E). diffusers' FLUX.2 class is the bare network; what its
    pipeline adds, space-to-depth and normalisation, is done here. Other latents are normalised by
    what their configuration says. Raises ValueError for other networks and incomplete weights."""

    def __init__(self, source):
        super().__init__()
        import diffusers  # imported here because it takes seconds
        config = find_file(source, "vae/config.json", "config.json")
        name = json.loads(config.read_text())["_class_name"]
        self.kind = KINDS.get(name)
        if not self.kind:
            raise ValueError(f"config.json is of {name}, expected {' or '.join(KINDS)}")
        # In a pipeline's repository the VAE has a folder of its own.
        inside = config.parent.name == "vae"
        flux2 = self.kind == "flux2"
        kind = diffusers.AutoencoderKLFlux2 if flux2 else diffusers.AutoencoderKL
        self.net, info = kind.from_pretrained(
            source, subfolder="vae" if inside else None, use_safetensors=True,
            low_cpu_mem_usage=False, output_loading_info=True)
        missing = [key for key in info["missing_keys"] if not key.endswith("num_batches_tracked")]
        if missing:  # diffusers would leave random numbers there
            raise ValueError(f"the weights lack {missing[0]}")
        config = self.net.config
        if (config.in_channels, config.out_channels) != (3, 3):
            raise ValueError(f"its images have {config.in_channels} channels, those it decodes "
                             f"{config.out_channels}: expected 3")
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
        self.mean, self.std = (values.flatten().expand(self.channels).reshape(-1, 1, 1)
                               for values in (mean, std))               # (C, 1, 1)

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
    """A codec on a device, ready to use. encode: images (B, 3, H, W) in [-1, 1] -> latents
    (B, channels, H/stride, W/stride); decode is its inverse (not clamped). Both take and return
    fp32, whatever dtype they compute in.
    .kind: flux2, kl, taef2 or pixels. .id: a Hugging Face id, or a hash of a local folder's
    weights. .path: that folder, or None.
    """

    def __init__(self, net, id, path=None, device="cpu", dtype="fp32"):
        self.id, self.path, self.device, self.dtype = id, path, device, dtype
        self.kind, self.channels, self.stride = net.kind, net.channels, net.stride
        mps = torch.device(device).type == "mps"
        self.layout = torch.contiguous_format if mps else torch.channels_last  # faster elsewhere
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
    """The Codec `name`: flux2, taef2, pixels, a Hugging Face id, or a local folder, whose kind is
    recognised by its files. dtype: fp32 or bf16, what it computes in. Raises BadInput."""
    name = os.path.expanduser(name)
    if name == "pixels":
        return Codec(Pixels(), "pixels", None, device)
    source = {"flux2": FLUX2, "taef2": TAEF2}.get(name, name)
    folder, is_local = pathlib.Path(source), os.path.isdir(source)  # else a Hugging Face id
    if not is_local and source.count("/") != 1:
        raise BadInput(f"--vae {name}: expected flux2, taef2, pixels, a Hugging Face id, a folder")
    try:
        is_taef2 = source == TAEF2 or any(folder.glob("taef2_encoder.*"))
        net = Taef2(source) if is_taef2 else AutoEncoder(source)
    except Exception as error:  # a missing network or a broken file can fail in any way
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        raise BadInput(f"--vae {name}: cannot be loaded ({reason}): check the network and HF_HOME, "
                       "or name a folder (with config.json, or taef2_encoder.*)") from None
    if is_local:  # identified by its weights, wherever the folder is
        digest = hashlib.sha256()
        for key, tensor in sorted(net.state_dict().items()):
            digest.update(key.encode() + tensor.float().numpy().tobytes())
        source = f"{net.kind}-{digest.hexdigest()[:12]}"
    return Codec(net, source, str(folder.absolute()) if is_local else None, device, dtype)


def open_vae(settings: dict, channels: int, override=None, device="cpu") -> Codec:
    """The codec that decodes a checkpoint's latents: `override` where given, else the local folder
    that made them, else the codec that the checkpoint's settings name. Raises BadInput."""
    id, folder = (settings.get("vae") or {}).get("id"), settings.get("vae_path")
    name = override or folder or id
    if not name or (name == folder and not os.path.exists(folder)):
        known = folder or id or "unknown"
        raise BadInput(f"the codec of these latents ({known}) is not here: give --vae")
    vae = load_vae(name, device)
    if vae.channels != channels:
        raise BadInput(f"--vae {name}: latents of {vae.channels} channels, expected {channels}")
    if not override and vae.id != id:
        log(f"warning: {name} is not the codec that made the latents ({id}): wrong colours")
    return vae


# Every conversion from floats to 8 bits in this project is to_uint8.

def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] (values beyond are clamped) -> uint8, rounded to nearest."""
    return (images.float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)


def from_uint8(images: torch.Tensor) -> torch.Tensor:
    """uint8 -> fp32 in [-1, 1]."""
    return images.float() / 127.5 - 1


# -------------------------------------------------------------------------------------------------
# Writing the cache. A shard is a fixed slice of the sorted list of images, and everything that
# shaped it is in its header, without paths or dates: its bytes are the same whoever wrote it.

def is_finished(shard, items, settings, root, read):
    """Whether the shard at this path holds the latents of items [(path, label)], whose images have
    not changed since. A note that it lacks is written. Raises BadInput where it belongs to another
    cache."""
    if not shard.exists():
        return False
    _, theirs = open_shard(shard)
    if different := differences(theirs, settings):
        raise BadInput(f"{shard}: made with another {', '.join(different)}: change --out")
    note = read_note(shard.with_suffix(".json"))
    stamp = file_stamp(root, items)
    if "stamp" in note:
        changed = note["stamp"] != stamp
    else:  # of an older cache, or killed before its note was written
        written = shard.stat().st_mtime
        changed = any((root / name).stat().st_mtime > written for name, _ in items)
        if not changed:
            write_note(shard.with_suffix(".json"), stamp=stamp)
    if changed:
        log(f"{shard.name}: its images have changed since it was written: encoding them again (a "
            "run on the old latents would go on with the new ones: give it another --out)")
        return False
    # Another version of Pillow, say, may read what was left out.
    return all(read(name)[0] is None for name in theirs["unreadable"])


def write_note(note, **facts):
    with atomic(note) as temporary:
        temporary.write_text(json.dumps(facts))


def encode_shard(items, images, vae, args, stop, bar):
    """Encode the next len(items) of `images`, an iterator of (uint8 (3, size, size), None) or
    (None, reason). Returns (the shard's tensors, the paths left out), or None when asked to stop.
    """
    side = args.size // vae.stride
    none = torch.empty(0, vae.channels, side, side, dtype=torch.float16, device=vae.device)
    names = ["latents"] if args.no_flip else ["latents", "latents_flip"]
    latents = {name: [none] for name in names}
    stored = [torch.empty(0, 3, args.size, args.size, dtype=torch.uint8)]
    labels, unreadable = [], []
    for start in range(0, len(items), args.batch):
        if stop.number:
            return None
        batch = []
        for name, label in items[start:start + args.batch]:
            image, reason = next(images)
            if image is None:
                warn(f"left out: {name} ({reason})")
                unreadable.append(name)
            else:
                batch.append(image)
                labels.append(label)
            bar.update()
        if not batch:
            continue
        batch = torch.stack(batch)                                      # (b, 3, size, size)
        if args.keep_images:
            stored.append(batch)
        # Nothing waits for the device before the shard is complete, so that the next images are
        # read and copied while it encodes these.
        x = from_uint8(to_device(pinned(batch), vae.device))
        for name, parts in latents.items():
            z = vae.encode(x.flip(-1) if name == "latents_flip" else x)
            parts.append(z.half())                                      # (b, C, h, w)
    tensors = {name: torch.cat(parts).cpu() for name, parts in latents.items()}
    if args.keep_images:
        tensors["pictures"] = torch.cat(stored)
    return tensors | {"labels": torch.tensor(labels, dtype=torch.int64)}, unreadable


def parse(argv):
    parser = Parser("Encode class folders into a cache of latents. The same command continues.")
    add = parser.add_argument
    add("--images", type=path, required=True, metavar="FOLDER",
        help="FOLDER/<class>/*.jpg, also deeper")
    add("--out", type=path, default=pathlib.Path("data/imagenet256-flux2"), metavar="CACHE",
        help="folder to write")
    add("--vae", default="flux2", help="flux2, taef2, pixels, a Hugging Face id or a folder")
    add("--size", type=number(int, 1, 8192), default=256, help="side of the images, in pixels")
    add("--no-flip", action="store_true", help="no mirrored latents: where left and right matter")
    add("--keep-images", action="store_true", help="store the images too, for ablations/repa.py")
    add("--batch", type=number(int, 1, CHUNK), default=CHUNK, help="images encoded at once")
    add("--dtype", default="fp32", choices=DTYPES, help="what the codec computes in")
    return parser.parse_args(argv)


@program
def main(argv=None):
    args = parse(argv)
    root, out, stop = args.images, args.out, StopSignal()
    if root.resolve() in (out.resolve(), *out.resolve().parents):
        raise BadInput(f"--out {out}: inside --images it would be read as a class")
    classes, items = list_images(root)  # before a codec is downloaded
    vae = load_vae(args.vae, pick_device(), args.dtype)
    if args.size % vae.stride:
        raise BadInput(f"--size {args.size}: expected a multiple of {vae.stride}, the pixels per "
                       "side of a latent's position")
    shards = [items[i:i + SHARD] for i in range(0, len(items), SHARD)]
    names = json.dumps([name for name, _ in items])
    settings = {
        "version": 1, "shards": len(shards), "images": len(items), "classes": classes,
        "size": args.size, "list": hashlib.sha256(names.encode()).hexdigest()[:16],
        "flip": not args.no_flip, "vae": {"kind": vae.kind, "id": vae.id}, "dtype": vae.dtype,
        "batch": args.batch}
    if args.keep_images:
        settings["pictures"] = True

    def read(name):
        return read_image(root / name, args.size)

    # The release's naming; it is rank00 whichever rank wrote the shard.
    paths = [out / f"latents_rank00_shard{k:05d}.safetensors" for k in range(len(shards))]
    for shard in shard_paths(out):
        if shard not in paths:
            raise BadInput(f"{shard}: no shard of this cache: change --out")
    reasons = []
    for name, _ in items:  # usually this reads one image
        image, reason = read(name)
        if image is not None:
            break
        reasons.append(f"{name} ({reason})")
    else:
        raise BadInput(f"{root}: none of {len(items)} images can be read; the first: {reasons[0]}")

    # Another process may be writing the same cache: then its shards are used.
    lock = lock_folder(out)
    ours = range(rank(), len(shards), world_size())  # no rank waits for another
    todo = [k for k in ours if not is_finished(paths[k], shards[k], settings, root, read)]
    side = args.size // vae.stride
    copies = 1 if args.no_flip else 2
    per_image = 2 * copies * vae.channels * side ** 2 + args.keep_images * 3 * args.size ** 2
    all_todo = [k for part in gather_objects(todo) for k in part]       # of all ranks
    need = per_image * sum(len(shards[k]) for k in all_todo)
    log(f"{len(all_todo)} of {len(shards)} shards to write, {need / 1e9:.2f} GB")
    check_disk(out, need)
    if rank() == 0 and vae.path:
        write_note(out / "source.json", path=vae.path)
    for k in todo:  # outdated shards must not be trained on if this is interrupted
        if paths[k].exists():
            os.replace(paths[k], paths[k].with_suffix(".outdated"))
            paths[k].with_suffix(".json").unlink(missing_ok=True)
    jobs, threads = [name for k in todo for name, _ in shards[k]], cores()
    images = prefetched(read, jobs, threads, 2 * (args.batch + threads))
    with lock, tqdm(total=len(jobs), unit="image", disable=rank() > 0 or None) as bar:
        for k in todo:
            # The stamp comes first, so that an image that changes meanwhile is noticed next time.
            stamp = file_stamp(root, shards[k])
            encoded = encode_shard(shards[k], images, vae, args, stop, bar)
            if encoded is None:
                log("stopped: whole shards are kept, and the same command continues")
                return 128 + stop.number
            tensors, unreadable = encoded
            save_shard(paths[k], tensors, settings | {"shard": k, "unreadable": unreadable})
            write_note(paths[k].with_suffix(".json"), stamp=stamp)
            paths[k].with_suffix(".outdated").unlink(missing_ok=True)
    log(f"{out}: written; next: python train.py --latents {quoted(out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
