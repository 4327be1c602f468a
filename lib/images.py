"""Picture files: which ones there are, and what a person sees in them."""
import os, pathlib

import numpy as np
from PIL import Image, ImageOps

from lib.run import BadInput

Image.init()  # loads all formats now: threads that open the first images at once would meet half of them
FORMATS = sorted({"JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"} & Image.OPEN.keys())  # none that starts a program
SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"}


def open_image(path):
    """A PIL image in RGB as an image viewer shows it: turned as its EXIF says, transparency on white, 16 bits scaled to
    8, the first frame of an animation. Raises all sorts of errors where it cannot be read; also for a side over 100
    times the other, and beyond Pillow's limit of 179 million pixels."""
    if not os.path.isfile(path):  # a pipe would be waited for
        raise ValueError("no such file")
    with Image.open(path, formats=FORMATS) as image:
        if max(image.size) > 100 * min(image.size):
            raise ValueError(f"{image.width}x{image.height}: too narrow")
        image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # more than 8 bits: values to 65535 (F: to 1), or to their own maximum if that is more
        values = np.nan_to_num(np.asarray(image, np.float32))
        values *= 255 / max(values.max(), 1 if image.mode == "F" else 65535)
        image = Image.fromarray(values.clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        paper = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(paper, image.convert("RGBA"))
    return image.convert("RGB")


def list_images(folder):
    """(class names, [(path relative to folder, label)]), both sorted: FOLDER/<class>/ as torchvision's ImageFolder has
    it, images also deeper inside. Hidden files are left out. Raises BadInput where a class or everything is empty."""
    folder, items = pathlib.Path(folder), []
    if not os.path.isdir(folder):
        raise BadInput(f"{folder}: no such folder; expected one with a folder of images per class")
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not classes:
        raise BadInput(f"{folder}: no class folders in it; expected {folder}/<class>/*.jpg (one class is enough)")
    for label, name in enumerate(classes):
        found = []
        for place, folders, files in os.walk(folder / name):
            folders[:] = [f for f in folders if not f.startswith(".")]
            inside = pathlib.Path(place).relative_to(folder).as_posix()
            found += [f"{inside}/{f}" for f in files if f[0] != "." and os.path.splitext(f)[1].lower() in SUFFIXES]
        if not found:
            raise BadInput(f"{folder / name}: a class folder without images ({' '.join(sorted(SUFFIXES))}): remove it")
        items += [(path, label) for path in sorted(found)]
    return classes, items
