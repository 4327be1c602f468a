"""A Vision Transformer (arXiv 2010.11929) that only judges or teaches: DINOv2's, with or without
registers, by the names of torch hub or of Hugging Face, and the vision half of CLIP's. Its sizes
are read off the weights. Images are brought to one size, bicubic (CLIP: antialiased), so embeddings
compare only where that size is the same."""
import math
import pathlib
import re

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file

from lib.checkpoint import find_file
from lib.run import BadInput

DINO = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean, std of ImageNet's colours
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

# Hugging Face's names of DINOv2 and CLIP (the typing error is real) -> torch hub's, where q, k and
# v are one tensor. To be replaced in this order.
RENAMED = {
    "vision_model.": "", "dinov2.": "",
    "patch_embeddings.projection.": "patch_embed.proj.", "patch_embedding.": "patch_embed.proj.",
    "position_embeddings": "pos_embed", "position_embedding.weight": "pos_embed",
    "class_embedding": "cls_token", "embeddings.": "",
    "encoder.layers.": "blocks.", "encoder.layer.": "blocks.",
    "layer_scale1.lambda1": "ls1.gamma", "layer_scale2.lambda1": "ls2.gamma",
    "attention.attention.query.": "attn.q.", "attention.attention.key.": "attn.k.",
    "attention.attention.value.": "attn.v.", "attention.output.dense.": "attn.proj.",
    "self_attn.q_proj.": "attn.q.", "self_attn.k_proj.": "attn.k.",
    "self_attn.v_proj.": "attn.v.", "self_attn.out_proj.": "attn.proj.",
    "layer_norm": "norm", "pre_layrnorm.": "norm_pre.", "post_layernorm.": "norm.",
    "layernorm.": "norm.", "visual_projection.": "head.",
}


class Scale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    """x + ls1(attn(norm1 x)), then x + ls2(mlp(norm2 x)). CLIP has no scales and another GELU."""

    def __init__(self, dim, hidden, eps, is_clip):
        super().__init__()
        self.heads, self.is_clip = dim // 64, is_clip
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps), nn.LayerNorm(dim, eps)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, hidden), "fc2": nn.Linear(hidden, dim)})
        self.ls1, self.ls2 = (nn.Identity() if is_clip else Scale(dim) for _ in range(2))

    def forward(self, x):                                               # (B, N, dim)
        qkv = self.attn["qkv"](self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                            # each (B, heads, N, 64)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.ls1(self.attn["proj"](h))
        h = self.mlp["fc1"](self.norm2(x))
        h = h * torch.sigmoid(1.702 * h) if self.is_clip else F.gelu(h)
        return x + self.ls2(self.mlp["fc2"](h))


class ViT(nn.Module):
    """forward(uint8 images (B, 3, H, W)) -> (embedding (B, E), patch tokens (B, T, D)): DINOv2's
    class token and patch tokens after the final norm; CLIP's projected class token and its patch
    tokens as they are. An oblong image loses its long side's ends."""

    def __init__(self, weights, size):
        super().__init__()
        _, positions, dim = weights["pos_embed"].shape
        patch = weights["patch_embed.proj.weight"].shape[-1]
        hidden = len(weights["blocks.0.mlp.fc1.bias"])
        self.is_clip = "head.weight" in weights
        self.size = size or (336 if self.is_clip else 518)
        eps = 1e-5 if self.is_clip else 1e-6
        colours = torch.tensor(CLIP if self.is_clip else DINO)[:, :, None, None]
        self.register_buffer("colours", colours, persistent=False)     # mean and deviation
        self.patch_embed = nn.ModuleDict(
            {"proj": nn.Conv2d(3, dim, patch, patch, bias=not self.is_clip)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, positions, dim))
        self.register_tokens = nn.Parameter(torch.zeros_like(weights["register_tokens"]))
        depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
        self.blocks = nn.Sequential(*(Block(dim, hidden, eps, self.is_clip) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps)
        if self.is_clip:
            self.norm_pre = nn.LayerNorm(dim, eps)
            self.head = nn.Linear(dim, len(weights["head.weight"]), bias=False)

    def prepared(self, images):
        """uint8 images of any size to normalised ones of self.size."""
        side = min(images.shape[-2:])
        top, left = (images.shape[-2] - side) // 2, (images.shape[-1] - side) // 2
        x = images[..., top:top + side, left:left + side].float() / 255
        if side != self.size:
            x = F.interpolate(x, (self.size, self.size), mode="bicubic", antialias=self.is_clip)
        mean, std = self.colours
        return (x - mean) / std

    def positions(self, grid):
        """The learned positions, resampled where the grid of patches is another. (Here by the rule
        of transformers; the hub's plain DINOv2 scales by (grid + 0.1) / 37 instead.)"""
        own = math.isqrt(self.pos_embed.shape[1] - 1)
        if own == grid:
            return self.pos_embed
        table = self.pos_embed[:, 1:].unflatten(1, (own, own)).permute(0, 3, 1, 2)
        table = F.interpolate(table, (grid, grid), mode="bicubic",
                              antialias=self.register_tokens.shape[1] > 0)
        return torch.cat([self.pos_embed[:, :1], table.flatten(2).transpose(1, 2)], dim=1)

    def forward(self, images):
        x = self.patch_embed["proj"](self.prepared(images))             # (B, D, grid, grid)
        grid = x.shape[-1]
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], dim=1)
        x = x + self.positions(grid)                                    # (B, 1 + T, D)
        registers = self.register_tokens.expand(len(x), -1, -1)
        x = torch.cat([x[:, :1], registers, x[:, 1:]], dim=1)
        x = self.blocks(self.norm_pre(x) if self.is_clip else x)
        tokens = x[:, 1 + registers.shape[1]:]                          # (B, T, D)
        if self.is_clip:
            return self.head(self.norm(x[:, 0])), tokens
        return self.norm(x[:, 0]), self.norm(tokens)


def hub_names(weights):
    """The weights by torch hub's names, without what has no part in an embedding."""
    found = {}
    for name, tensor in weights.items():
        for old, new in RENAMED.items():
            name = name.replace(old, new)
        if not re.match("mask_token|position_ids|text_|logit_scale|classifier", name):
            found[name] = tensor
    for name in [name for name in found if ".attn.q." in name]:
        parts = [found.pop(name.replace(".q.", f".{part}.")) for part in "qkv"]
        found[name.replace(".q.", ".qkv.")] = torch.cat(parts)
    width = found["cls_token"].shape[-1]
    for name in ("cls_token", "pos_embed"):
        found[name] = found[name].reshape(1, -1, width)
    found.setdefault("register_tokens", torch.zeros(1, 0, width))
    return found


def load_vit(path, size=None, device="cpu") -> ViT:
    """A ViT in eval mode from a weight file, a folder or a Hugging Face id of DINOv2 or CLIP. size:
    of the images it sees, by default 518 or 336. Raises BadInput."""
    try:
        path = pathlib.Path(path)
        if not path.is_file():
            path = find_file(str(path), "model.safetensors", "pytorch_model.bin")
        if path.suffix == ".safetensors":
            weights = load_file(path)
        else:
            weights = torch.load(path, "cpu", weights_only=True)
        weights = hub_names(weights)
        vit = ViT(weights, size)
        vit.load_state_dict(weights)
    except Exception as error:  # a damaged or unsafe file fails in any way it likes
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise BadInput(f"{path}: not the weights of DINOv2 or CLIP ({reason})") from None
    return vit.eval().requires_grad_(False).to(device)
