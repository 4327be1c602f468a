"""What a run leaves to look at: log.csv, its speed, the error by time; tables of scores."""
import csv
import os
import pathlib
import time

import numpy as np
import torch

from lib.files import atomic
from lib.run import BadInput, rank, say


def read_table(path):
    """(columns, rows as {column: text}) of a CSV file; a last row that was torn is left out. Raises
    BadInput where it is no such file."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows = [row for row in reader if None not in row.values()]
            return list(reader.fieldnames or []), rows
    except FileNotFoundError:
        return [], []
    except (OSError, ValueError, csv.Error) as error:
        raise BadInput(f"{path}: cannot be read as a table ({error}): move it away") from None


def write_table(path, columns, rows):
    """Write a CSV file whole, so that it never holds half a row."""
    with atomic(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", restval="")
        writer.writeheader()
        writer.writerows(rows)


def read_scores(path, columns):
    """The rows of a table of scores; none where there is no file. Raises BadInput where it is
    another kind of table, or where it could not be written."""
    found, rows = read_table(path)
    if found and found != [name for name in columns if name in found]:  # older ones have fewer
        raise BadInput(f"{path}: not a table of these scores: choose another --csv")
    if not found and not os.access(path.absolute().parent, os.W_OK):
        raise BadInput(f"{path}: its folder does not exist or cannot be written to")
    return [dict.fromkeys(columns, "") | row for row in rows]


def append_score(path, columns, row):
    """Add a row, by rank 0, to a table that other programs may have added to meanwhile."""
    if rank() == 0:
        write_table(path, columns, [*read_scores(path, columns), row])


def error_columns(name):
    """The columns of `error_by_time`: NAME, and NAME_t05 ... NAME_t95 by the middle of a bin."""
    return [name, *(f"{name}_t{k}5" for k in range(10))]


def errors_by_time(denoiser, caches, device, bf16):
    """The columns of each of {name: LatentDataset or None} where there is one."""
    row = {}
    for name, data in caches.items():
        if data:
            row |= dict(zip(error_columns(name), error_by_time(denoiser, data, device, bf16)))
    return row


COLUMNS = ["step", "loss", "lr", "grad_norm", "images_per_s", "data_wait", "memory_gb", "graphs",
           "skipped", *error_columns("fit"), *error_columns("val"), "fid", "inception_score",
           "fid_n"]  # of log.csv


class Log:
    """A CSV file with one row per logged step, which rank 0 alone writes. Opened at `step`, it
    forgets later rows: a run that continues from there writes them again, with the same losses."""

    def __init__(self, path, step):
        self.path, self.last = pathlib.Path(path), None
        if rank() == 0:
            found, rows = read_table(path)
            if found and found[0] != "step":
                raise BadInput(f"{path}: not a log of training: move it away")
            write_table(path, COLUMNS, [row for row in rows if int(row["step"]) <= step])

    def append(self, row):
        """Add a row, or new columns to the last one where it is of the same step, and print it."""
        if rank():
            return
        if row["step"] == self.last:
            _, rows = read_table(self.path)
            rows[-1] |= row
            write_table(self.path, COLUMNS, rows)
        else:
            with open(self.path, "a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, COLUMNS).writerow(row)
        self.last = row["step"]
        shown = [f"{name} {row[name]:.4g}" for name in COLUMNS[1:]
                 if name in row and "_t" not in name]  # not the errors by time
        say(f"step {self.last}, {', '.join(shown)}")


class Meter:
    """How fast training goes, since the last restart."""

    def __init__(self):
        self.restart()

    def restart(self):
        self.start, self.waited, self.images = time.perf_counter(), 0.0, 0

    def waiting(self, batches):
        """The next of `batches`; the time it takes counts as waiting for data."""
        start = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - start
        return batch

    def rates(self):
        seconds = time.perf_counter() - self.start
        return {"images_per_s": round(self.images / seconds, 2),
                "data_wait": round(self.waited / seconds, 4)}


@torch.inference_mode()
def error_by_time(denoiser, data, device, bf16, count=256):
    """[mean, *means in 10 bins of t] of |v - predicted velocity|² per number, on `count`
    images of a cache at fixed times and noise: the same questions at every step of every run. The
    mean weighs each bin by the share of training's times that fall there. (The velocity is the
    sampler's: part of the last bin's, for eps of the first's, is the error of the floor.)"""
    count = min(count, len(data))
    rows = np.arange(count) * len(data) // count  # from all over the cache, which is in class order
    times = (torch.arange(count) * 0.6180339887) % 1  # the golden ratio spreads any run of them
    rng = np.random.default_rng(0)
    noise = torch.from_numpy(rng.standard_normal((count, *data.shape), dtype=np.float32))
    errors = []
    for part in torch.arange(count).split(64):
        x, y = data.batch(rows[part.numpy()])
        x, e, t = x.to(device).float(), noise[part].to(device), times[part].to(device)
        z = t[:, None, None, None] * x + (1 - t[:, None, None, None]) * e
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            v = denoiser.velocity(z, t, y.to(device))
        errors.append((v - (x - e)).square().mean(dim=(1, 2, 3)).cpu())
    errors, bin_of = torch.cat(errors), (times * 10).long()
    by_time = torch.stack([errors[bin_of == k].mean() for k in range(10)])
    edges = torch.linspace(0, 1, 11).logit()
    below = torch.special.ndtr((edges - denoiser.P_mean) / denoiser.P_std)
    share = below.diff() * by_time.isfinite()  # in a small cache, some bins may be empty
    mean = (share * by_time.nan_to_num()).sum() / share.sum()
    return [mean.item(), *by_time.tolist()]
