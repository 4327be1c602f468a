"""The first stage: images <-> latents, and the cache of latents that training reads.

    python vae.py --images FOLDER --out CACHE               FOLDER/<class>/*.jpg -> CACHE/latents_*.safetensors
    torchrun --nproc_per_node=8 vae.py --images FOLDER      the very same files, written by eight GPUs
    python vae.py --images FOLDER --out CACHE --vae taef2   with the tiny codec; `--vae pixels` with none at all

    picture file --open_image--> RGB --center_crop--> size x size --encode--> latents --write_cache--> shards of fp16
                    8-bit images <--to_uint8-- images in [-1, 1] <--decode-- latents <--LatentDataset-- shards

Where FLUX.2's 128 channels come from: its convolutions turn a 3 x 256 x 256 image into 32 x 32 x 32 (8 times smaller);
then each 2 x 2 square of positions is stacked into channels (space-to-depth): 128 x 16 x 16; then each channel is
normalised by the mean and variance that the VAE's own BatchNorm has recorded: an image is 256 vectors of 128 numbers.

Training mirrors half of its images. A mirrored *latent* is not the latent of the mirrored image (no learned codec is
symmetric; a channel may well hold a square's left half), so the mirrored image is encoded too: the cache holds both.
"""
import hashlib, json, math, os, pathlib, re, shutil, sys

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file

from lib.flags import Parser, number
from lib.hub import find_file
from lib.images import list_images, open_image
from lib.prefetch import prefetched
from lib.run import (BadInput, RunFailed, StopSignal, atomic, lock_folder, pick_device, program, rank, say,
                     world_size)
from lib.shards import Rows, differing, read_header, read_hint, read_stats, shard_files
from lib.taef2 import Taef2

FLUX2_ID, TAEF2_ID = "black-forest-labs/FLUX.2-klein-4B", "madebyollin/taef2"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CHUNK = 16    # images that a codec takes at once: this bounds its memory
SHARD = 1024  # listed images per file of the cache


# ---------------------------------------------------------------------------------------------------------------------
# Codecs: networks with encode(images in [-1, 1]) -> normalised latents and decode, the way back.

class Pixels(torch.nn.Module):
    """No codec: the latent is the image, and the same programs train a model of pixels."""
    channels, stride = 3, 1

    def encode(self, images):
        return images

    decode = encode


class Flux2(torch.nn.Module):
    """FLUX.2's VAE. diffusers' class is the network alone: space-to-depth and normalisation are in its pipeline."""

    def __init__(self, source):
        """source: a local folder or a Hugging Face id. Raises all sorts of errors."""
        super().__init__()
        path = find_file(source, "vae/config.json", "config.json")  # in a pipeline's repository, or in its own
        kind = json.loads(path.read_text())["_class_name"]
        if kind != "AutoencoderKLFlux2":
            raise ValueError(f"config.json is of {kind}, expected AutoencoderKLFlux2")
        from diffusers import AutoencoderKLFlux2  # takes seconds: imported only where it is used
        place = "vae" if path.parent.name == "vae" and path.parent != pathlib.Path(source) else None
        self.net, info = AutoencoderKLFlux2.from_pretrained(source, subfolder=place, use_safetensors=True,
                                                            low_cpu_mem_usage=False, output_loading_info=True)
        missing = [key for key in info["missing_keys"] if not key.endswith("num_batches_tracked")]
        if missing:  # diffusers would go on with random numbers there
            raise ValueError(f"the weights lack {missing[0]}")
        levels = len(self.net.config.block_out_channels)  # each but the last halves; pixel_unshuffle does once more
        self.channels, self.stride = 4 * self.net.config.latent_channels, 2 ** levels
        mean, variance = self.net.bn.running_mean, self.net.bn.running_var
        self.mean, self.std = mean[:, None, None], torch.sqrt(variance + self.net.config.batch_norm_eps)[:, None, None]

    def encode(self, images):                                                   # (B, 3, H, W)
        z = self.net.encode(images.to(self.net.dtype)).latent_dist.mode()       # (B, 32, H/8, W/8), nothing is sampled
        z = F.pixel_unshuffle(z.float(), 2)                                     # (B, 128, H/16, W/16)
        return (z - self.mean.to(z.device)) / self.std.to(z.device)

    def decode(self, latents):                                                  # (B, 128, H/16, W/16)
        z = latents * self.std.to(latents.device) + self.mean.to(latents.device)
        return self.net.decode(F.pixel_shuffle(z, 2).to(self.net.dtype)).sample  # (B, 3, H, W)


class Codec:
    """A codec at work: encode(images (B, 3, H, W) in [-1, 1]) -> latents (B, channels, H/stride, W/stride) and decode,
    the way back (not clamped), fp32 in and out whatever it computes in, on its device, CHUNK images at a time.

    .kind flux2, taef2 or pixels; .id a Hugging Face id, or for a local folder a hash of its weights; .hint its path.
    """

    def __init__(self, kind, net, id, hint=None, device="cpu", dtype="fp32"):
        self.kind, self.id, self.hint, self.device, self.dtype = kind, id, hint, device, dtype
        self.layout = torch.contiguous_format if torch.device(device).type == "mps" else torch.channels_last  # faster
        self.net = net.eval().requires_grad_(False).to(device, DTYPES[dtype], memory_format=self.layout)
        self.channels, self.stride = net.channels, net.stride

    def encode(self, images):
        return self.in_chunks(self.net.encode, images)

    def decode(self, latents):
        return self.in_chunks(self.net.decode, latents)

    @torch.no_grad()
    def in_chunks(self, function, batch):
        chunks = (x.to(self.device, torch.float32, memory_format=self.layout) for x in batch.split(CHUNK))
        return torch.cat([function(x).float() for x in chunks]).contiguous()


def load_vae(name="flux2", device="cpu", dtype="fp32"):
    """The Codec `name`: flux2, taef2, pixels, a Hugging Face id, or a local folder, recognised by what lies in it.
    dtype: fp32 or bf16, what it computes in. Raises BadInput."""
    if dtype not in DTYPES:
        raise BadInput(f"dtype {dtype}: expected fp32 or bf16 (in fp16 FLUX.2's VAE overflows: NaN or black images)")
    if name == "pixels":
        return Codec("pixels", Pixels(), "pixels", None, device)
    source = {"flux2": FLUX2_ID, "taef2": TAEF2_ID}.get(name, name)
    folder, local = pathlib.Path(source), os.path.isdir(source)
    if not local and re.fullmatch("(flux2|taef2)-[0-9a-f]{12}", source):
        raise BadInput(f"{source} is a local codec, known by a hash of its weights: name its folder with --vae")
    if not local and not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise BadInput(f"--vae {name}: expected flux2, taef2, pixels, a Hugging Face id or an existing folder")
    kind = "taef2" if source == TAEF2_ID or any(folder.glob("taef2_encoder.*")) else "flux2"
    try:
        net = Taef2(source) if kind == "taef2" else Flux2(source)
    except Exception as error:  # whatever the libraries make of no network, a broken file, another network's weights
        wanted = "taef2_encoder.* and taef2_decoder.*" if kind == "taef2" else "config.json (or vae/config.json)"
        reason = type(error).__name__
        if reason != "UnpicklingError":  # torch advises to load it all the same
            reason += f": {' '.join(str(error).split())[:160]}"
        raise BadInput(f"--vae {name}: cannot be loaded ({reason}): check the network and HF_HOME, or name a folder "
                       f"with {wanted} and its weights") from None
    if not local:
        return Codec(kind, net, source, None, device, dtype)
    digest = hashlib.sha256()
    for key, tensor in sorted(net.state_dict().items()):
        digest.update(key.encode() + tensor.float().numpy().tobytes())
    return Codec(kind, net, f"{kind}-{digest.hexdigest()[:12]}", str(folder.absolute()), device, dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Images <-> numbers. Every step from floats to 8 bits in this project is to_uint8.

def to_uint8(images):
    """Images in [-1, 1] (beyond is clamped) -> uint8, rounded to the nearest."""
    return (images.float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)


def from_uint8(images):
    """uint8 -> fp32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def center_crop(image, size):
    """ADM's crop: halve with a box filter, bring the short side to `size` with a bicubic one, cut out the middle."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def image_tensor(image):
    """PIL RGB -> uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


# ---------------------------------------------------------------------------------------------------------------------
# The cache, written. A shard is a fixed slice of the sorted list of images, and all that shaped it lies in its header,
# without paths or dates: its bytes are the same whoever wrote it, in however many pieces.

def write_cache(images, out, vae, size=256, flip=True, batch=CHUNK, shard_size=SHARD, stop=None, listing=None):
    """Encode class folders into the cache `out`, keeping the shards that are there already. Returns the exit code.

    Rank r of w writes shards r, r + w, ... and waits for nobody. batch (up to CHUNK): images at a time, of one shard.
    listing: of `images`, if at hand. stop: a StopSignal. Raises BadInput before it writes, later RunFailed or OSError.
    """
    images, out = pathlib.Path(images), pathlib.Path(out)
    if size % vae.stride:
        raise BadInput(f"--size {size}: expected a multiple of {vae.stride}, the side of a latent position in pixels")
    classes, items = listing or list_images(images)
    if images.resolve() in (out.resolve(), *out.resolve().parents):
        raise BadInput(f"--out {out}: inside --images it would pass for a class: put it elsewhere")
    shards = [items[i:i + shard_size] for i in range(0, len(items), shard_size)]
    paths = [out / f"latents_rank00_shard{k:05d}.safetensors" for k in range(len(shards))]  # LightningDiT's names
    settings = {"version": 1, "shards": len(shards), "images": len(items), "classes": classes, "size": size,
                "list": hashlib.sha256(json.dumps([path for path, _ in items]).encode()).hexdigest()[:16],
                "flip": flip, "vae": {"kind": vae.kind, "id": vae.id}, "dtype": vae.dtype, "batch": batch}
    done = {path: read_header(path)[1] for path in shard_files(out)}
    for path, theirs in done.items():
        if wrong := differing(theirs, settings) or ["name"] * (path not in paths):
            raise BadInput(f"{path}: made with another {', '.join(wrong)}: repeat that cache's command or change --out")
    todo = [k for k in range(len(shards)) if paths[k] not in done]
    shape = (vae.channels, size // vae.stride, size // vae.stride)
    need = 2 * (1 + flip) * math.prod(shape) * sum(len(shards[k]) for k in todo)
    free = shutil.disk_usage(next(p for p in (out.absolute(), *out.absolute().parents) if os.path.isdir(p))).free
    say(f"{len(items):,} images of {len(classes):,} classes: {len(todo)} of {len(shards)} shards to write, "
        f"{need / 1e9:.2f} GB ({free / 1e9:.2f} GB free)")
    if need > free:
        raise BadInput(f"--out {out}: {need / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free: choose another disk")

    def read(path):
        try:
            return image_tensor(center_crop(open_image(images / path), size))
        except Exception as error:  # Pillow's errors for broken files are of every kind
            return f"{type(error).__name__}: {error}"

    if all(isinstance(why := read(path), str) for path, _ in items):  # as a rule this reads one image
        raise BadInput(f"{images}: not one of {len(items)} images can be read; the last: {why}")
    lock = lock_folder(out) if rank() == 0 else out.mkdir(parents=True, exist_ok=True)  # kept until this function ends
    if rank() == 0 and vae.hint:  # a path is no part of the data: it lies in a file of its own, which may go
        with atomic(out / "source.json") as temporary:
            temporary.write_text(json.dumps({"hint": vae.hint}))

    from tqdm import tqdm
    mine = [k for k in todo if k % world_size() == rank()]
    threads = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    pictures = prefetched(read, [path for k in mine for path, _ in shards[k]], threads, 2 * (batch + threads))
    unreadable = {path: "as before" for theirs in done.values() for path in theirs["unreadable"] if rank() == 0}
    bar = tqdm(total=sum(len(shards[k]) for k in mine), unit="image", disable=rank() > 0 or None)
    for k in mine:
        labels, failed = [], {}
        tensors = {name: [torch.empty(0, *shape)] for name in ("latents", "latents_flip")[:1 + flip]}
        for start in range(0, len(shards[k]), batch):
            if stop and stop.number:
                say("stopped: whole shards are kept, and the same command continues")
                return 128 + stop.number
            part = [(path, label, next(pictures)) for path, label in shards[k][start:start + batch]]
            failed |= {path: picture for path, _, picture in part if isinstance(picture, str)}
            good = [(label, picture) for path, label, picture in part if path not in failed]
            if good:
                labels += [label for label, _ in good]
                x = from_uint8(torch.stack([picture for _, picture in good]).to(vae.device))  # (b, 3, size, size)
                for name in tensors:
                    tensors[name].append(vae.encode(x.flip(-1) if name == "latents_flip" else x).cpu())
            bar.update(len(part))
        tensors = {name: torch.cat(latents).half() for name, latents in tensors.items()}
        if not all(latents.isfinite().all() for latents in tensors.values()):
            raise RunFailed(f"{paths[k].name}: latents that are not finite numbers: try --dtype fp32")
        tensors["labels"] = torch.tensor(labels, dtype=torch.int64)
        header = json.dumps(settings | {"shard": k, "unreadable": [*failed]}, sort_keys=True)
        try:
            with atomic(paths[k]) as temporary:
                save_file(tensors, temporary, {"nanojlt": header})  # one key: safetensors keeps no order among several
        except SafetensorError as error:
            raise RunFailed(f"{paths[k]}: cannot be written ({error})") from None
        unreadable |= failed
    bar.close()
    for path, why in unreadable.items():
        line = f"warning: left out, cannot be read: {path} ({why})"
        print(line.encode(errors="backslashreplace").decode(), file=sys.stderr)  # names may be any bytes
    say(f"{out}: written" + " (this rank's part)" * (world_size() > 1) + f"; next: python train.py --latents {out}")
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# The cache, read

class LatentDataset(torch.utils.data.Dataset):
    """A cache of ours, of LightningDiT or of the JLT release: [i] -> (latent (C, h, w) in the stored type, int label).

    .shape (C, h, w); .num_classes; .class_names, .size of the images, .vae {"kind", "id"}: None if a foreign cache does
    not say; .hint, a local codec's path or None; .mirrored; .fingerprint of headers and labels, which is all that
    opening reads. Picklable. Raises BadInput for shards that are damaged, missing or of different caches.
    """

    def __init__(self, folder):
        folder, paths = pathlib.Path(folder), shard_files(folder)
        if not paths:
            raise BadInput(f"no latents at {folder}: make them (python vae.py --images FOLDER --out {folder}), or try "
                           "python train.py --demo, which needs none")
        headers, settings = zip(*map(read_header, paths))
        ours = settings[0]
        for path, theirs in zip(paths, settings):
            if wrong := differing(theirs, ours):
                raise BadInput(f"{path}: not of one cache with {paths[0].name}: another {', '.join(wrong)}")
        numbers = [theirs["shard"] for theirs in settings] if ours else []
        if ours and numbers != list(range(ours["shards"])):
            gap = next((k for k, number in enumerate(numbers) if k != number), len(numbers))
            raise BadInput(f"{folder}: {len(numbers)} of {ours['shards']} shards, number {gap} is not in its place: "
                           "finish the cache with the same vae.py command")
        self.rows = Rows(paths, headers)
        self.labels, self.shape, self.mirrored = self.rows.labels, self.rows.shape, self.rows.mirrored
        self.class_names, self.size, self.vae = (ours and ours[key] for key in ("classes", "size", "vae"))
        low, high = (int(extreme) for extreme in self.labels.aminmax()) if len(self) else (0, 0)
        self.num_classes = len(self.class_names) if ours else high + 1
        if not len(self) or not 0 <= low <= high < self.num_classes <= 1e6:
            raise BadInput(f"{folder}: {len(self)} labels from {low} to {high}, expected some from 0 to "
                           f"{self.num_classes - 1 if ours else 999_999}: make the cache anew")
        self.hint = read_hint(folder / "source.json")
        self.stats = None if ours else read_stats(folder / "latents_stats.pt", self.shape[0])
        digest = hashlib.sha256(json.dumps([[p.name for p in paths], headers, settings], default=str).encode())
        for data in (self.labels, *(self.stats or ())):
            digest.update(data.numpy().tobytes())
        self.fingerprint = digest.hexdigest()[:16]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        latents, labels = self.batch([range(len(self))[i]])
        return latents[0], int(labels[0])

    def batch(self, indices, flip=False):
        """Latents (B, C, h, w) in the stored type and labels (B,) int64. flip, bool (B,) or one bool: of the mirrored
        image; ignored where the cache has none (its images have sides: digits, text). Threads may call it."""
        indices = np.asarray(indices, dtype=np.int64)
        latents = self.rows.gather(indices, np.broadcast_to(np.asarray(flip, dtype=bool), indices.shape))
        if self.stats:
            mean, std = self.stats
            latents = ((latents.float() - mean) / std).to(latents.dtype)
        return latents, self.labels[torch.from_numpy(indices)]

    def check(self):
        """(mean, standard deviation) of up to 1,000 latents from all over the cache. Warns where they are far from 0
        and 1 (pixels may be); raises BadInput where they are no finite numbers."""
        picks = np.unique(np.linspace(0, len(self) - 1, 1000).astype(np.int64))
        sums = np.zeros(2)
        for part in np.array_split(picks, -(-len(picks) // 50)):  # a few at a time: memory stays small
            x = self.batch(part)[0].double()
            sums += np.array([x.mean(), x.square().mean()]) * len(part) / len(picks)
        mean, std = float(sums[0]), math.sqrt(max(0, sums[1] - sums[0] ** 2))
        if not np.isfinite(sums).all():
            raise BadInput("the latents hold values that are not finite numbers: make the cache anew")
        if (abs(mean) > 1 or not 0.25 <= std <= 4) and (self.vae or {}).get("kind") != "pixels":
            say(f"warning: latents of mean {mean:.2f} and standard deviation {std:.2f}, expected about 0 and 1")
        return mean, std


@program
def main(argv=None):
    parser = Parser("Encode class folders of images into a cache of latents. The same command continues.")
    parser.add_argument("--images", required=True, metavar="FOLDER", help="FOLDER/<class>/*.jpg, or deeper")
    parser.add_argument("--out", default="data/imagenet256-flux2", metavar="CACHE", help="folder to write")
    parser.add_argument("--vae", default="flux2", help="flux2, taef2, pixels, a Hugging Face id or a local folder")
    parser.add_argument("--size", type=number(int, 1, 8192), default=256, help="side of the square images, in pixels")
    parser.add_argument("--no-flip", action="store_true", help="no mirrored latents: for digits, text, sides")
    parser.add_argument("--batch", type=number(int, 1, CHUNK), default=CHUNK, help="images encoded at once")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"], help="codec; fp16 overflows")
    args = parser.parse_args(argv)
    stop = StopSignal()
    listing = list_images(args.images)  # a wrong folder is reported before a codec is downloaded
    vae = load_vae(args.vae, pick_device(), args.dtype)
    return write_cache(args.images, args.out, vae, args.size, not args.no_flip, args.batch, stop=stop, listing=listing)


if __name__ == "__main__":
    sys.exit(main())
