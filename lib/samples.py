"""Samples on disk, written by all ranks together: ADM's npz, or a folder of PNG files."""
import contextlib
import math
import os
import shutil
import zipfile

import numpy as np
from PIL import Image

from lib.run import BadInput, RunFailed, atomic, meet, rank


@contextlib.contextmanager
def saving(path):
    """Where writing fails, one line says what and why: RunFailed."""
    try:
        yield
    except OSError as error:
        raise RunFailed(f"{path}: cannot be written ({error.strerror or error}): make room or choose another") from None


def check_out(path):
    """Raises BadInput where samples cannot be written to `path`: NAME.png, NAME.npz, else a folder."""
    folder = path.suffix.lower() not in (".png", ".npz")
    if len(os.fsencode(path.name)) > 255 or not os.access(path.absolute().parent, os.W_OK):
        raise BadInput(f"--out {str(path)[:99]}: its folder does not exist or cannot be written to, or it is too long")
    if path.exists() and path.is_dir() != folder:
        raise BadInput(f"--out {path}: there is a {'file' if folder else 'folder'} of that name: choose another")


def write_npz(path, n, size, batches):
    """ADM's sample file: `arr_0`, uint8 (N, H, W, 3), filled in place by all ranks; nothing is held in memory."""
    shape, rows = (n, size, size, 3), path.with_name(f".tmp-{path.name[-60:]}.npy")
    if 2 * math.prod(shape) > (free := shutil.disk_usage(path.absolute().parent).free):
        raise BadInput(f"--out {path}: {2 * math.prod(shape) / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free")
    with saving(path):
        try:
            if rank() == 0:
                with open(rows, "wb") as file:
                    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(file, header)
            meet()
            with open(rows, "rb+") as file:  # no memory map: on a full disk, writing to one ends the process
                np.lib.format.read_magic(file)
                np.lib.format.read_array_header_1_0(file)
                start = file.tell()
                for indices, images in batches:
                    file.seek(start + indices.start * math.prod(shape[1:]))
                    file.write(images.permute(0, 2, 3, 1).contiguous().cpu().numpy().tobytes())
            meet()
            if rank() == 0:
                with atomic(path) as temporary, zipfile.ZipFile(temporary, "w", allowZip64=True) as file:
                    file.write(rows, "arr_0.npy")
        finally:
            if rank() == 0:
                rows.unlink(missing_ok=True)


def write_folder(folder, batches, draw, facts):
    """One PNG file an image, 000000.png, 000001.png ... Continues what was interrupted; refuses a folder of other
    images, which its file facts.txt tells apart."""
    folder.mkdir(exist_ok=True)
    note = folder / "facts.txt"
    if rank() == 0:
        if any(folder.glob("*.png")) and (not note.exists() or note.read_text(encoding="utf-8") != facts):
            raise BadInput(f"--out {folder}: holds images drawn with other settings (see its facts.txt): take another")
        with saving(note):
            note.write_text(facts, encoding="utf-8")
    meet()
    missing = [indices for indices in batches if not all((folder / f"{i:06d}.png").exists() for i in indices)]
    for indices, images in draw(missing):
        for i, image in zip(indices, images.permute(0, 2, 3, 1).cpu().numpy()):
            with saving(folder), atomic(folder / f"{i:06d}.png") as temporary:
                Image.fromarray(image).save(temporary, "png")
