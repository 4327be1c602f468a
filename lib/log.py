"""What a run leaves to look at: log.csv, and the error by time. Tables of scores are CSV, too."""
import csv
import pathlib

import numpy as np
import torch

from lib.files import atomic, one_at_a_time
from lib.run import BadInput, RunFailed, log, rank


def read_table(path):
    """(columns, rows as {column: text}) of a CSV file, ([], []) where there is none. A last row
    that was torn by a crash is left out. Raises BadInput where the file is no table."""
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
    with atomic(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)


def append_row(path, row):
    """Add a row {column: value} to a CSV file, on rank 0. Columns that are new widen the table, and
    the file is replaced whole, so that other programs may read it at any time."""
    if rank() == 0:
        with one_at_a_time(pathlib.Path(path).parent):  # two sweeps may share a table
            columns, rows = read_table(path)
            columns += [name for name in row if name not in columns]
            write_table(path, columns, [*rows, row])


class Log:
    """A run's log.csv, which rank 0 writes. Opened at `step`, it drops later rows, since a run that
    continues from there writes them again. Raises BadInput where the file is another table."""

    def __init__(self, path, step):
        self.path, self.columns = pathlib.Path(path), []
        if rank() == 0:
            self.columns, rows = read_table(path)
            if self.columns and self.columns[0] != "step":
                raise BadInput(f"{path}: not a log of training: move it away")
            if self.columns:  # in any case, since a torn line must not be continued
                kept = [row for row in rows if int(row["step"]) <= step]
                write_table(path, self.columns, kept)

    def append(self, row):
        """Write a row {"step": int, column: value} and print it, but for the columns of single
        bins of t. One row is appended to the file; a new column rewrites it."""
        if rank():
            return
        new = [name for name in row if name not in self.columns]
        if new:
            self.columns += new
            write_table(self.path, self.columns, [*read_table(self.path)[1], row])
        else:
            try:
                with open(self.path, "a", newline="", encoding="utf-8") as file:
                    csv.DictWriter(file, self.columns, restval="").writerow(row)
            except OSError as error:
                raise RunFailed(f"{self.path}: cannot be written ({error})") from None
        shown = [f"{name} {value:.4g}" for name, value in row.items()
                 if name != "step" and value is not None and "_t" not in name]
        log(f"step {row['step']}, {', '.join(shown)}")


@torch.inference_mode()
def error_by_time(denoiser, data, device, bf16, name="fit", count=256) -> dict[str, float]:
    """The squared error of the velocity, per number, of `count` images of a cache:
    {name: the mean over training's times, name_t05 ... name_t95: the mean in each bin of t}.

    Images, times and noise are the same at every step of every run. The velocity is the sampler's,
    so the last bin (for eps the first) contains the error that the floor t_eps makes.
    """
    count = min(count, len(data))
    indices = np.arange(count) * len(data) // count  # the cache is sorted by class
    times = (torch.arange(count) * 0.6180339887) % 1  # the golden ratio spreads any run of them
    rng = np.random.default_rng(0)
    noise = torch.from_numpy(rng.standard_normal((count, *data.shape), dtype=np.float32))
    errors = []
    for part in torch.arange(count).split(64):
        x, y = data.batch(indices[part.numpy()])
        x, e, t = x.to(device).float(), noise[part].to(device), times[part].to(device)
        z = denoiser.noised(x, t, e)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            v = denoiser.velocity(z, t, y.to(device))
        errors.append((v - (x - e)).square().mean(dim=(1, 2, 3)).cpu())
    errors, bin_of = torch.cat(errors), (times * 10).long()
    by_time = torch.stack([errors[bin_of == k].mean() for k in range(10)])

    # The share of training's times in each bin, from evenly spaced quantiles of their normals.
    quantiles = torch.special.ndtri((torch.arange(100_000) + 0.5) / 100_000)
    share = torch.histc(denoiser.times(quantiles).float(), 10, 0, 1)
    share = share * by_time.isfinite()  # a small cache may leave bins empty
    mean = (share * by_time.nan_to_num()).sum() / share.sum()
    bins = {f"{name}_t{k}5": by_time[k].item() for k in range(10)}
    return {name: mean.item()} | bins
