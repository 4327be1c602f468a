"""The Inception network behind FID and Inception Score, as TensorFlow published it on 2015-12-05.

Modules are named as in the published weight file. The network's quirks (TensorFlow 1's resize,
average pools that leave out the padding, a max pool in the last block) change FID by more than
methods differ. They all follow torch-fidelity, which the paper used.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from lib.run import BadInput

FEATURES, CLASSES = 2048, 1008
URL = ("https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
       "weights-inception-2015-12-05-6726825d.pth")


class Conv(nn.Module):
    """Convolution, BatchNorm with its stored statistics, ReLU. By default the padding keeps the
    image's size at stride 1."""

    def __init__(self, channels, out, height, width=None, stride=1, padding=None):
        super().__init__()
        kernel = height, width or height
        padding = [k // 2 for k in kernel] if padding is None else padding
        self.conv = nn.Conv2d(channels, out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=0.001)

    def forward(self, x):
        # (w * x - mean) scale + shift = (w scale) * x + (shift - mean scale), so BatchNorm needs no
        # pass of its own.
        scale = self.bn.weight * torch.rsqrt(self.bn.running_var + self.bn.eps)
        weight = self.conv.weight * scale.view(-1, 1, 1, 1)
        bias = self.bn.bias - self.bn.running_mean * scale
        x = F.conv2d(x, weight, bias, self.conv.stride, self.conv.padding)
        return F.relu(x, inplace=True)


def halving_conv(channels, out):
    return Conv(channels, out, 3, stride=2, padding=0)


class Mixed(nn.Module):
    """Parallel branches whose outputs are concatenated: chains of convolutions, and a pool that is
    followed by a convolution or by none. A tuple of two convolutions in a chain is a fork: both see
    the same input, and their outputs are concatenated."""

    def __init__(self, pool, branch_pool=None, **branches):
        super().__init__()
        self.pool, self.branch_pool = pool, branch_pool or nn.Identity()
        self.chains = list(branches.values())
        for name, chain in branches.items():
            for i, step in enumerate(chain, 1):
                step_name = f"{name}_{i}" if len(chain) > 1 else name
                if isinstance(step, tuple):
                    self.add_module(step_name + "a", step[0])
                    self.add_module(step_name + "b", step[1])
                else:
                    self.add_module(step_name, step)

    def forward(self, x):
        outputs = []
        for chain in self.chains:
            y = x
            for step in chain:
                is_fork = isinstance(step, tuple)
                y = torch.cat([step[0](y), step[1](y)], 1) if is_fork else step(y)
            outputs.append(y)
        return torch.cat([*outputs, self.branch_pool(self.pool(x))], 1)


AVERAGE_POOL = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
MAX_POOL = nn.MaxPool2d(3, stride=1, padding=1)
HALVING_POOL = nn.MaxPool2d(3, stride=2)


def mixed_a(channels, pool):
    return Mixed(
        AVERAGE_POOL, Conv(channels, pool, 1),
        branch1x1=[Conv(channels, 64, 1)],
        branch5x5=[Conv(channels, 48, 1), Conv(48, 64, 5)],
        branch3x3dbl=[Conv(channels, 64, 1), Conv(64, 96, 3), Conv(96, 96, 3)])


def mixed_b():
    return Mixed(
        HALVING_POOL,
        branch3x3=[halving_conv(288, 384)],
        branch3x3dbl=[Conv(288, 64, 1), Conv(64, 96, 3), halving_conv(96, 96)])


def mixed_c(n):
    return Mixed(
        AVERAGE_POOL, Conv(768, 192, 1),
        branch1x1=[Conv(768, 192, 1)],
        branch7x7=[Conv(768, n, 1), Conv(n, n, 1, 7), Conv(n, 192, 7, 1)],
        branch7x7dbl=[Conv(768, n, 1), Conv(n, n, 7, 1), Conv(n, n, 1, 7), Conv(n, n, 7, 1),
                      Conv(n, 192, 1, 7)])


def mixed_d():
    return Mixed(
        HALVING_POOL,
        branch3x3=[Conv(768, 192, 1), halving_conv(192, 320)],
        branch7x7x3=[Conv(768, 192, 1), Conv(192, 192, 1, 7), Conv(192, 192, 7, 1),
                     halving_conv(192, 192)])


def mixed_e(channels, pool):
    return Mixed(
        pool, Conv(channels, 192, 1),
        branch1x1=[Conv(channels, 320, 1)],
        branch3x3=[Conv(channels, 384, 1), (Conv(384, 384, 1, 3), Conv(384, 384, 3, 1))],
        branch3x3dbl=[Conv(channels, 448, 1), Conv(448, 384, 3),
                      (Conv(384, 384, 1, 3), Conv(384, 384, 3, 1))])


class Inception(nn.Module):
    """forward(uint8 images (B, 3, H, W), any size) -> (features (B, 2048), logits (B, 1008)). Both
    are fp32, and the logits leave out the last layer's bias, as the Inception Score wants it."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = halving_conv(3, 32)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, padding=0)
        self.Mixed_5b = mixed_a(192, 32)
        self.Mixed_5c = mixed_a(256, 64)
        self.Mixed_5d = mixed_a(288, 64)
        self.Mixed_6a = mixed_b()
        self.Mixed_6b = mixed_c(128)
        self.Mixed_6c = mixed_c(160)
        self.Mixed_6d = mixed_c(160)
        self.Mixed_6e = mixed_c(192)
        self.Mixed_7a = mixed_d()
        self.Mixed_7b = mixed_e(1280, AVERAGE_POOL)
        self.Mixed_7c = mixed_e(2048, MAX_POOL)  # the only block with a max pool
        self.fc = nn.Linear(FEATURES, CLASSES)

    @torch.inference_mode()
    def forward(self, images):
        if images.device.type == "cpu" and len(images) > 16:  # a tenth faster, by fitting caches
            parts = [self(part) for part in images.split(16)]
            return tuple(map(torch.cat, zip(*parts)))
        # Reduced precision shifts FID, so neither autocast nor TF32, whatever the caller has set.
        no_tf32 = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        with no_tf32, torch.autocast(images.device.type, enabled=False):
            x = (resize(images.float(), 299) - 128) / 128                   # (B, 3, 299, 299)
            x = x.contiguous(memory_format=torch.channels_last)
            x = self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))
            x = F.max_pool2d(self.Conv2d_2b_3x3(x), 3, 2)                   # (B, 64, 73, 73)
            x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
            x = F.max_pool2d(x, 3, 2)                                       # (B, 192, 35, 35)
            x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))              # (B, 288, 35, 35)
            x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))              # (B, 768, 17, 17)
            x = self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(x)))              # (B, 1280, 8, 8)
            x = self.Mixed_7c(self.Mixed_7b(x))                             # (B, 2048, 8, 8)
            features = x.mean((2, 3))                                       # (B, 2048)
            return features, F.linear(features, self.fc.weight)


def resize(x, size):
    """Bilinear resize as in TensorFlow 1: output pixel i samples the input at i * (in/out), without
    half-pixel shift and without anti-aliasing. x: float (B, C, H, W) -> (B, C, size, size)."""
    for dim in (3, 2):
        count = x.shape[dim]
        source = torch.arange(size, device=x.device, dtype=torch.float32) * (count / size)
        low = source.long()
        fraction = (source - low).view(-1, *[1] * (3 - dim))
        a = x.index_select(dim, low)
        b = x.index_select(dim, (low + 1).clamp(max=count - 1))
        x = a + (b - a) * fraction
    return x


def load_inception(path=None, device="cpu") -> Inception:
    """Inception in eval mode. path: its weights, by default torch-fidelity's file in torch
    hub's cache, or else a download into it, whose hash is checked. Raises BadInput."""
    inception = Inception()
    try:
        if path:
            weights = torch.load(path, "cpu", weights_only=True)
        else:
            weights = torch.hub.load_state_dict_from_url(
                URL, map_location="cpu", progress=False, check_hash=True, weights_only=True)
        inception.load_state_dict(weights)
    except Exception as error:  # a damaged or unsafe pickle raises errors of many kinds
        readable = isinstance(error, (OSError, RuntimeError))
        reason = str(error)[:150] if readable else type(error).__name__
        raise BadInput(f"{path or 'torch hub'}: not Inception's weights ({reason}): download {URL} "
                       "and give --inception FILE") from None
    inception = inception.eval().requires_grad_(False)
    return inception.to(device, memory_format=torch.channels_last)
