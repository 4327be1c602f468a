"""CIFAR-10's own file as class folders, OUT/{train,test}/<class>/*.png: 60,000 small files.

    curl -O https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz
    python -m bench.cifar10 cifar-10-binary.tar.gz CIFAR

Its parts are records of a byte for the class and 3,072 for the pixels: all red ones row by row,
then green, then blue.
"""
import pathlib
import tarfile
import zlib

import numpy as np
from PIL import Image

from lib.flags import Parser
from lib.run import BadInput, program, say

PARTS = {f"data_batch_{i}": "train" for i in range(1, 6)} | {"test_batch": "test"}


def write_part(data, classes, folder, name):
    """The records `data` (bytes) as folder/<class>/NAME-NUMBER.png."""
    records = np.frombuffer(data, np.uint8).reshape(-1, 1 + 3 * 32 * 32)
    for label in classes:
        (folder / label).mkdir(parents=True, exist_ok=True)
    for number, record in enumerate(records):
        image = Image.fromarray(record[1:].reshape(3, 32, 32).transpose(1, 2, 0))
        image.save(folder / classes[record[0]] / f"{name}-{number:05d}.png")


@program
def main(argv=None):
    parser = Parser("CIFAR-10's own file as class folders.")
    parser.add_argument("file", type=pathlib.Path, help="cifar-10-binary.tar.gz")
    parser.add_argument("out", type=pathlib.Path, help="folder for train/ and test/")
    args = parser.parse_args(argv)
    try:
        with tarfile.open(args.file) as tar:
            inside = {pathlib.Path(member.name).name: tar.extractfile(member).read()
                      for member in tar if member.isfile()}
        classes = inside["batches.meta.txt"].decode().split()
        for name, part in PARTS.items():
            write_part(inside[f"{name}.bin"], classes, args.out / part, name)
    except (tarfile.TarError, zlib.error, EOFError, LookupError, ValueError) as error:
        raise BadInput(f"{args.file}: expected cifar-10-binary.tar.gz, whole ({error})") from None
    say(f"-> {args.out}")


if __name__ == "__main__":
    raise SystemExit(main())
