"""CIFAR-10's own archive as class folders, OUT/{train,test}/<class>/*.png: 60,000 small files.

    curl -O https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz
    python -m bench.cifar10 cifar-10-binary.tar.gz CIFAR

Each part of the archive is a sequence of records: one byte for the class and 3,072 for the pixels,
all red ones row by row, then green, then blue.
"""
import pathlib
import tarfile
import zlib

import numpy as np
from PIL import Image

from lib.flags import Parser, path
from lib.run import BadInput, log, program

PARTS = {f"data_batch_{i}": "train" for i in range(1, 6)} | {"test_batch": "test"}


def write_part(data, classes, folder, name):
    """Write the records in `data` (bytes) as folder/<class>/NAME-NUMBER.png."""
    records = np.frombuffer(data, np.uint8).reshape(-1, 1 + 3 * 32 * 32)
    for class_name in classes:
        (folder / class_name).mkdir(parents=True, exist_ok=True)
    for i, record in enumerate(records):
        image = Image.fromarray(record[1:].reshape(3, 32, 32).transpose(1, 2, 0))
        image.save(folder / classes[record[0]] / f"{name}-{i:05d}.png")


@program
def main(argv=None):
    parser = Parser("CIFAR-10's own archive as class folders.")
    parser.add_argument("file", type=path, help="cifar-10-binary.tar.gz")
    parser.add_argument("out", type=path, help="folder for train/ and test/")
    args = parser.parse_args(argv)
    try:
        with tarfile.open(args.file) as tar:
            contents = {pathlib.Path(member.name).name: tar.extractfile(member).read()
                        for member in tar if member.isfile()}
        classes = contents["batches.meta.txt"].decode().split()
        for name, part in PARTS.items():
            write_part(contents[f"{name}.bin"], classes, args.out / part, name)
    except (tarfile.TarError, zlib.error, EOFError, LookupError, ValueError) as error:
        raise BadInput(f"{args.file}: expected a whole cifar-10-binary.tar.gz ({error})") from None
    log(f"-> {args.out}")


if __name__ == "__main__":
    raise SystemExit(main())
