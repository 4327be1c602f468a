"""The Inception network behind FID and Inception Score, as TensorFlow published it on 2015-12-05, and its weights.

Its quirks count, since they move FID by more than methods differ: the resize of TensorFlow 1, average pools that leave
the padding out, a max pool in the last block. All follow torch-fidelity, which the paper used.
"""
import contextlib
import pathlib

import torch
import torch.nn as nn
import torch.nn.functional as F

from lib.run import BadInput

FEATURES, CLASSES = 2048, 1008


class Conv(nn.Module):
    """Convolution, BatchNorm with its stored statistics, ReLU."""

    def __init__(self, channels, out, kernel, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=0.001)

    def forward(self, x):
        # (w * x - mean) * scale + shift  =  (w scale) * x + (shift - mean scale): one pass over the image, not two.
        scale = self.bn.weight * torch.rsqrt(self.bn.running_var + self.bn.eps)
        x = F.conv2d(x, self.conv.weight * scale.view(-1, 1, 1, 1), self.bn.bias - self.bn.running_mean * scale,
                     self.conv.stride, self.conv.padding)
        return F.relu(x, inplace=True)


class Mixed(nn.ModuleDict):
    """Branches side by side, concatenated: chains of convolutions (out, height, width), and a pool.

    branches: {name: chain}. A list inside a chain is a fork, whose two outputs are concatenated.
    pool: ("avg" or "max", out) keeps the image's size; None halves it, in each chain's last convolution and the pool.
    """

    def __init__(self, channels, branches, pool):
        super().__init__()
        self.chains, self.pool = [], pool
        for name, chain in branches.items():
            names, width = [], channels
            for i, fork in enumerate((step if isinstance(step, list) else [step] for step in chain), 1):
                shrink = pool is None and i == len(chain)
                base = f"{name}_{i}" if len(chain) > 1 else name
                names.append([base + "a", base + "b"] if len(fork) > 1 else [base])
                for key, (out, *kernel) in zip(names[-1], fork):
                    self[key] = Conv(width, out, kernel, 2 if shrink else 1, 0 if shrink else [k // 2 for k in kernel])
                width = sum(out for out, *_ in fork)
            self.chains.append(names)
        if pool:
            self["branch_pool"] = Conv(channels, pool[1], 1)

    def forward(self, x):
        outputs = []
        for chain in self.chains:
            y = x
            for fork in chain:
                y = torch.cat([self[key](y) for key in fork], 1) if len(fork) > 1 else self[fork[0]](y)
            outputs.append(y)
        if self.pool is None:
            outputs.append(F.max_pool2d(x, 3, 2))
        elif self.pool[0] == "max":
            outputs.append(self["branch_pool"](F.max_pool2d(x, 3, 1, 1)))
        else:  # TensorFlow's average leaves the padding out
            outputs.append(self["branch_pool"](F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)))
        return torch.cat(outputs, 1)


class Inception(nn.Module):
    """The network behind FID and IS; its state dict has the keys and shapes of pt_inception-2015-12-05-6726825d.pth.

    forward(images uint8 (B, 3, H, W), any size) -> features (B, 2048), logits without the bias (B, 1008), both fp32.
    """

    def __init__(self):
        super().__init__()
        one = lambda out: (out, 1, 1)
        a = {"branch1x1": [one(64)], "branch5x5": [one(48), (64, 5, 5)],
             "branch3x3dbl": [one(64), (96, 3, 3), (96, 3, 3)]}
        b = {"branch3x3": [(384, 3, 3)], "branch3x3dbl": [one(64), (96, 3, 3), (96, 3, 3)]}
        c = lambda n: {"branch1x1": [one(192)], "branch7x7": [one(n), (n, 1, 7), (192, 7, 1)],
                       "branch7x7dbl": [one(n), (n, 7, 1), (n, 1, 7), (n, 7, 1), (192, 1, 7)]}
        d = {"branch3x3": [one(192), (320, 3, 3)], "branch7x7x3": [one(192), (192, 1, 7), (192, 7, 1), (192, 3, 3)]}
        fork = [(384, 1, 3), (384, 3, 1)]
        e = {"branch1x1": [one(320)], "branch3x3": [one(384), fork], "branch3x3dbl": [one(448), (384, 3, 3), fork]}
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        self.Mixed_5b = Mixed(192, a, ("avg", 32))
        self.Mixed_5c = Mixed(256, a, ("avg", 64))
        self.Mixed_5d = Mixed(288, a, ("avg", 64))
        self.Mixed_6a = Mixed(288, b, None)
        self.Mixed_6b = Mixed(768, c(128), ("avg", 192))
        self.Mixed_6c = Mixed(768, c(160), ("avg", 192))
        self.Mixed_6d = Mixed(768, c(160), ("avg", 192))
        self.Mixed_6e = Mixed(768, c(192), ("avg", 192))
        self.Mixed_7a = Mixed(768, d, None)
        self.Mixed_7b = Mixed(1280, e, ("avg", 192))
        self.Mixed_7c = Mixed(2048, e, ("max", 192))  # the only block whose pool is max
        self.fc = nn.Linear(FEATURES, CLASSES)

    @torch.inference_mode()
    def forward(self, images):
        with full_precision(images.device):
            x = (resize(images.float(), 299) - 128) / 128                                    # (B, 3, 299, 299)
            x = x.contiguous(memory_format=torch.channels_last)
            x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))                # (B, 64, 147, 147)
            x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))                # (B, 192, 71, 71)
            x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))           # (B, 288, 35, 35)
            x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))  # (B, 768, 17, 17)
            x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))                               # (B, 2048, 8, 8)
            features = x.mean((2, 3))                                                        # (B, 2048)
            return features, F.linear(features, self.fc.weight)


def resize(x, size):
    """Bilinear as in TensorFlow 1: output pixel i samples the input at i * (in/out), without the half-pixel shift and
    without anti-aliasing. x: float (B, C, H, W) -> (B, C, size, size)."""
    for dim in (3, 2):
        last = x.shape[dim] - 1
        source = torch.arange(size, device=x.device, dtype=torch.float32) * ((last + 1) / size)
        low = source.long()
        a, b = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=last))
        x = a + (b - a) * (source - low).view(-1, *[1] * (3 - dim))
    return x


@contextlib.contextmanager
def full_precision(device):
    """fp32 that is fp32: no autocast, no TF32, whatever the surrounding program has chosen."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"


def load_inception(path=None, device="cpu"):
    """Inception with the published weights, in eval mode: from `path`, else from torch hub's cache (torch-fidelity's or
    pytorch-fid's file), else downloaded into it, the hash checked. Raises BadInput."""
    if path is None:
        cache = pathlib.Path(torch.hub.get_dir(), "checkpoints")
        names = URL.split("/")[-1], "pt_inception-2015-12-05-6726825d.pth"
        path = next((cache / name for name in names if (cache / name).exists()), cache / names[0])
        if not path.exists():
            try:
                cache.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(URL, path, hash_prefix="6726825d", progress=False)
            except (OSError, RuntimeError) as error:
                raise BadInput(f"Inception's weights are not here and cannot be downloaded ({error}): "
                               f"put {URL} into {cache}, or give --inception FILE") from None
    inception = Inception()
    try:
        if not pathlib.Path(path).is_file():  # a pipe would be waited for
            raise OSError("no such file")
        inception.load_state_dict(torch.load(path, "cpu", weights_only=True))
    except Exception as error:  # a damaged or hostile pickle fails in any way it likes
        reason = str(error)[:150] if isinstance(error, (OSError, RuntimeError)) else type(error).__name__
        raise BadInput(f"{path}: not Inception's weights, as in {URL.split('/')[-1]} ({reason})") from None
    if not all(tensor.isfinite().all() for tensor in inception.state_dict().values()):
        raise BadInput(f"{path}: not Inception's weights: some are not finite")
    return inception.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
