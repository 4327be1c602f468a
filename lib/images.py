"""Picture files: which ones there are, what a person sees in them, and the demo's drawn digits."""
import io
import itertools
import math
import os
import pathlib

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from lib.files import prefetched
from lib.run import BadInput, barrier, rank, rank_batches

Image.init()  # loads all formats now: threads that open the first images would meet half of them
FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"]  # none that starts a program
SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff",
            ".ppm", ".pgm", ".pbm", ".pnm"}


def open_image(file) -> Image.Image:
    """A PIL image in RGB as an image viewer shows it: turned as its EXIF says, transparency on
    white, 16 bits scaled to 8, the first frame of an animation. Raises all sorts of errors."""
    with Image.open(file, formats=FORMATS) as image:
        image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # more than 8 bits: up to 65535 (F: 1), or what its maximum is
        values = np.nan_to_num(np.asarray(image, np.float32))
        values *= 255 / max(values.max(), 1 if image.mode == "F" else 65535)
        image = Image.fromarray(values.clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        paper = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(paper, image.convert("RGBA"))
    return image.convert("RGB")


def center_crop(image, size):
    """ADM's crop: halve with a box filter, bring the short side to `size` with a bicubic one, cut
    out the middle."""
    if max(image.size) > 100 * min(image.size):  # the short side may grow, and the long one with it
        raise ValueError(f"{image.width}x{image.height}: too oblong")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    wide, high = round(image.width * scale), round(image.height * scale)
    image = image.resize((wide, high), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def read_picture(path, size=None):
    """(uint8 (3, H, W), None) of a picture file, cropped where a size is given, or (None, reason)
    where its bytes are no image. A disk that fails is no reason: that raises OSError."""
    data = pathlib.Path(path).read_bytes()
    try:
        image = open_image(io.BytesIO(data))
        image = center_crop(image, size) if size else image
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous(), None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's errors for broken files are of every kind
        return None, f"{type(error).__name__}: {error}"


def picture_files(folder) -> list[pathlib.Path]:
    """The picture files below a folder, sorted; hidden ones are left out."""
    found = []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [pathlib.Path(place, name) for name in files
                  if not name.startswith(".") and pathlib.Path(name).suffix.lower() in SUFFIXES]
    return sorted(found)


def list_images(folder):
    """(class names, [(path relative to folder, label)]), both sorted: FOLDER/<class>/ as
    torchvision's ImageFolder has it, images also deeper inside. Raises BadInput where a class or
    everything is empty."""
    folder, items = pathlib.Path(folder), []
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder; expected one with a folder of images per class")
    classes = sorted(path.name for path in folder.iterdir()
                     if path.is_dir() and not path.name.startswith("."))
    if not classes:
        raise BadInput(f"{folder}: no class folders in it; expected {folder}/<class>/*.jpg "
                       "(one class is enough)")
    for label, name in enumerate(classes):
        found = [path.relative_to(folder).as_posix() for path in picture_files(folder / name)]
        if not found:
            raise BadInput(f"{folder / name}: a class folder without images: remove it")
        items += [(path, label) for path in sorted(found)]
    return classes, items


def evenly(path, count, n):
    """The indices of n (None: all) of `count` images, evenly spread."""
    n = n or count
    if not 2 <= n <= count:
        raise BadInput(f"{path}: {count} images found, {max(n, 2)} needed")
    return [i * count // n for i in range(n)]  # the first n would be of few classes


def batched(images, batches):
    for indices in batches:  # images: a stream, in the order of the indices
        yield indices, torch.stack(list(itertools.islice(images, len(indices))))


def folder_images(folder, size, n, batch):
    """All images below a folder, center-cropped to `size` where given; else all of one size. n: how
    many, None for all. Returns (how many, "WIDTHxHEIGHT", this rank's batches of (indices, uint8
    images (B, 3, H, W))). Raises BadInput."""
    paths = picture_files(folder)
    paths = [paths[i] for i in evenly(folder, len(paths), n)]

    shape = None  # of the first, which all must have

    def read(i):
        image, reason = read_picture(paths[i], size)
        if image is None:
            raise BadInput(f"{paths[i]}: cannot be read as an image ({reason})")
        if image.shape != (shape or image.shape):
            raise BadInput(f"{paths[i]}: not of the size of {paths[0]}: crop all with --size")
        return image                                                    # (3, H, W)

    shape = read(0).shape
    batches = rank_batches(len(paths), batch)
    images = prefetched(read, itertools.chain(*batches), 8, 2 * batch)
    return len(paths), f"{shape[2]}x{shape[1]}", batched(images, batches)


def draw_digits(folder, per_class, seed=0, size=32):
    """Write `per_class` pictures of each digit into FOLDER/<digit>/, size x size, RGB: bold, white
    on black, turned by up to 12 degrees and shifted a little; which ones is a function of `seed`. A
    very small network can learn them within minutes. A folder that is there is left alone. Returns
    it. To be called by all ranks alike."""
    folder = pathlib.Path(folder)
    if rank() == 0 and not folder.exists():
        write_digits(folder, per_class, seed, size)
    barrier()
    return folder


def write_digits(folder, per_class, seed, size):
    canvas = 96  # drawn large, then brought down, so that edges are smooth
    font, random = ImageFont.load_default(72), np.random.default_rng(seed)
    unfinished = folder.with_name(f"{folder.name}.part")  # renamed once whole
    for digit in range(10):
        (unfinished / str(digit)).mkdir(parents=True, exist_ok=True)
        upright = Image.new("L", (canvas, canvas))
        ImageDraw.Draw(upright).text((canvas / 2, canvas / 2), str(digit), 255, font, "mm",
                                     stroke_width=4, stroke_fill=255)
        for i in range(per_class):
            angle, dx, dy = random.uniform((-12, -4, -4), (12, 4, 4))
            turned = upright.rotate(angle, Image.Resampling.BICUBIC, translate=(dx, dy))
            picture = turned.resize((size, size), Image.Resampling.BOX).convert("RGB")
            picture.save(unfinished / str(digit) / f"{i:05d}.png", compress_level=1)
    os.replace(unfinished, folder)


def picture_grid(images, columns, captions=(), title=""):
    """uint8 images (N, 3, H, W) as one Pillow image, row by row, with a caption over each column
    and a line on top."""
    zoom = max(1, 96 // images.shape[-1])  # 32-pixel images are shown larger
    tiles = images.permute(0, 2, 3, 1).cpu().numpy().repeat(zoom, 1).repeat(zoom, 2)
    side, gap, head = tiles.shape[1], 4, 40
    width = gap + columns * (side + gap)
    height = head + math.ceil(len(tiles) / columns) * (side + gap)
    grid = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(12)
    draw.text((gap, 3), title, "black", font)
    for column, caption in enumerate(map(str, captions[:columns])):
        while font.getlength(caption) > side:
            caption = caption[:-1]
        draw.text((gap + column * (side + gap), 21), caption, "dimgray", font)
    for i, tile in enumerate(tiles):
        row, column = divmod(i, columns)
        place = gap + column * (side + gap), head + row * (side + gap)
        grid.paste(Image.fromarray(tile), place)
    return grid
