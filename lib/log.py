"""What a run leaves to look at: log.csv, the loss by time, memory in use, grids of pictures."""
import csv
import importlib.util
import pathlib
import sys

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from lib.run import BadInput, atomic, rank


class Log:
    """A CSV file with one row per logged step; rank 0 alone writes it. Opened at `step`, it forgets later rows: a run
    that continues from a checkpoint of that step will write them again, with the same losses."""

    def __init__(self, path, columns, step):
        self.path, self.columns, self.last = pathlib.Path(path), columns, None
        if rank() == 0:
            self.write([row for row in self.read() if int(row["step"]) <= step])

    def read(self):
        try:
            with open(self.path, newline="", encoding="utf-8") as file:
                rows = [row for row in csv.DictReader(file) if None not in row.values()]  # the last may be torn
            [int(row["step"]) for row in rows]  # or a ValueError
            return rows
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError, csv.Error) as error:
            raise BadInput(f"{self.path}: not a log of training ({type(error).__name__}): move it away") from None

    def write(self, rows):
        with atomic(self.path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns, extrasaction="ignore", restval="")
            writer.writeheader()
            writer.writerows(rows)

    def append(self, row):
        """Add a row, or new columns to the last one if it is of the same step, and print it."""
        if rank():
            return
        if row["step"] == self.last:
            rows = self.read()
            rows[-1] |= row
            self.write(rows)
        else:
            with open(self.path, "a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self.columns).writerow(row)
        self.last, names = row["step"], [name for name in self.columns[1:] if name in row and "_t" not in name]
        tqdm.write(f"step {self.last}" + "".join(f", {name} {row[name]:.4g}" for name in names))


@torch.inference_mode()
def loss_by_time(denoiser, data, device, bf16, count=256, bins=10):
    """(mean, [mean in each of 10 bins of t]) of |v - predicted velocity|² per number, on 256 images of a cache at
    fixed times and noise: the same questions at every step of every run, whatever its target and loss. The mean weighs
    each bin as training does, by the share of its times that fall there. The velocity is the sampler's, floored: in the
    last bin (for eps, the first) part of the error is the floor's."""
    count = min(count, len(data))
    rows = np.arange(count) * len(data) // count  # from all over the cache: its first images would be of one class
    times = (torch.arange(count) * 0.6180339887) % 1  # the golden ratio spreads times evenly over any run of images
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal((count, *data.shape), dtype=np.float32))
    errors = []
    for part in torch.arange(count).split(64):
        x, y = data.batch(rows[part.numpy()], False)
        x, e, t = x.to(device).float(), noise[part].to(device), times[part].to(device)
        z = t[:, None, None, None] * x + (1 - t[:, None, None, None]) * e
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            v = denoiser.velocity(z, t, y.to(device))
        errors.append((v - (x - e)).square().mean(dim=(1, 2, 3)).cpu())
    errors, place = torch.cat(errors), (times * bins).long()
    by_time = torch.stack([errors[place == k].mean() for k in range(bins)])
    below = torch.special.ndtr((torch.linspace(0, 1, bins + 1).logit() - denoiser.P_mean) / denoiser.P_std)
    share = below.diff() * by_time.isfinite()  # in a small cache, some bins may be empty
    return ((share * by_time.nan_to_num()).sum() / share.sum()).item(), by_time.tolist()


def peak_memory(device):
    """Peak memory in GB: of the GPU, or of this process where there is none (0 on Windows, which does not say)."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 1e9, 2)
    if not importlib.util.find_spec("resource"):
        return 0.0
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS, else in units of 1,024
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e9, 2)


def picture_grid(images, columns, captions=(), title=""):
    """uint8 images (N, 3, H, W) as one Pillow image, row by row, with a caption over each column and a line on top."""
    zoom = max(1, 96 // images.shape[-1])  # 32-pixel images are shown larger
    tiles = images.permute(0, 2, 3, 1).cpu().numpy().repeat(zoom, 1).repeat(zoom, 2)
    side, gap, head = tiles.shape[1], 4, 40
    grid = Image.new("RGB", (columns * (side + gap) + gap, -(-len(tiles) // columns) * (side + gap) + head), "white")
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(13)
    draw.text((gap, 3), title, "black", font)
    for column, caption in enumerate(captions[:columns]):
        draw.text((gap + column * (side + gap), 21), str(caption)[:side // 7], "dimgray", font)
    for i, tile in enumerate(tiles):
        grid.paste(Image.fromarray(tile), (gap + i % columns * (side + gap), head + i // columns * (side + gap)))
    return grid
