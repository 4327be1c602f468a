"""Draws the demo's images: bold white digits on black in class folders, FOLDER/<0 ... 9>/<number>.png.

Recognisable and simple on purpose: a very small network has to learn them within minutes on a laptop's CPU.
"""
import os
import pathlib

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CANVAS = 96  # drawn large, then brought down, so that edges are smooth


def upright(digit):
    """A digit on the large canvas, in Pillow's built-in font."""
    canvas = Image.new("L", (CANVAS, CANVAS))
    ImageDraw.Draw(canvas).text((CANVAS / 2, CANVAS / 2), str(digit), 255, ImageFont.load_default(72), "mm",
                                stroke_width=4, stroke_fill=255)
    return canvas


def draw_digits(folder, per_class, seed=0, size=32):
    """Write `per_class` pictures of each digit, turned by up to 12 degrees and shifted by up to 4 of the canvas's 96
    pixels: size x size, RGB. Which ones is a function of `seed`. A folder that is there is left alone."""
    random, folder = np.random.default_rng(seed), pathlib.Path(folder)
    if folder.exists():
        return
    part = folder.with_name(f"{folder.name}.part")  # renamed once whole: half a folder would look whole
    for digit in range(10):
        place = part / str(digit)
        place.mkdir(parents=True, exist_ok=True)
        canvas = upright(digit)
        for i in range(per_class):
            angle, dx, dy = random.uniform((-12, -4, -4), (12, 4, 4))
            turned = canvas.rotate(angle, Image.Resampling.BICUBIC, translate=(dx, dy))
            picture = turned.resize((size, size), Image.Resampling.BOX).convert("RGB")
            picture.save(place / f"{i:05d}.png", compress_level=1)
    os.replace(part, folder)
