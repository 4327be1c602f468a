"""Every formula against a closed form, a trusted library or a second way of computing it; every promise of the programs
against what they do. Minutes on two CPU cores, no network, no GPU:  python -m pytest -q test_all.py

All but one test run on the CPU, also where there is a GPU: numbers compare, and noise is the same, on one device only.
"""

import argparse
import csv
import functools
import io
import json
import math
import os
import pathlib
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest

VISIBLE = os.environ.get("CUDA_VISIBLE_DEVICES")
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fid
import lib.inception
import sample
import train
import vae
from bench import curves, digits, geometry, guidance, nine, progress, spectrum
from lib.checkpoint import read_checkpoint, save_checkpoint, tensors_of
from lib.digits import draw_digits
from lib.log import loss_by_time
from lib.npz import image_rows, write_statistics
from lib.run import BadInput, RunFailed, lock_folder
from lib.table import append_rows, read_rows
from lib.taef2 import Taef2
from model import JLT, SIZES, TARGETS, Denoiser, rotary_table, rotate
from sample import generate, guided_velocity, image_noise, load_denoiser, ode_sample
from vae import (
    LatentDataset,
    center_crop,
    from_uint8,
    image_tensor,
    list_images,
    load_vae,
    open_image,
    to_uint8,
    write_cache,
)
from vae import main as vae_main

ROOT = pathlib.Path(__file__).resolve().parent
torch.backends.mps.is_available = lambda: False


# ---------------------------------------------------------------------------------------------------------------------
# model.py: the network


def tiny_net(patch=2, channels=3, size=8, **other):
    return JLT(
        size, patch, channels, **(dict(hidden_size=32, depth=2, num_heads=2, num_classes=5, bottleneck=8) | other)
    )


def awake(net, seed=0):
    """The same network with random weights everywhere, so that no zero-initialised layer hides what lies before it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return net


def rows(n, size=8, channels=3, classes=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(n, channels, size, size, generator=g),
        torch.randint(classes, (n,), generator=g),
        torch.rand(n, generator=g) * 0.9 + 0.05,
        torch.randn(n, channels, size, size, generator=g),
    )


@pytest.mark.parametrize("patch, millions", [(1, 130.5), (2, 130.9)])
def test_parameter_count(patch, millions):
    with torch.device("meta"):
        net = JLT(16, patch, 128, **SIZES["B"])
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 1) == millions


def test_sizes_are_the_papers():
    with torch.device("meta"):
        hidden = {name: JLT(16, 1, 128, **size).blocks[0].mlp.w3.in_features for name, size in SIZES.items()}
    assert (hidden["B"], hidden["L"], hidden["H"]) == (2048, 2730, 3413)


def test_names_are_those_of_the_published_weights():
    blocks = [
        f"blocks.{i}.{name}"
        for i in range(2)
        for name in (
            "norm1.weight",
            "norm2.weight",
            "attn.qkv.weight",
            "attn.qkv.bias",
            "attn.q_norm.weight",
            "attn.k_norm.weight",
            "attn.proj.weight",
            "attn.proj.bias",
            "mlp.w12.weight",
            "mlp.w12.bias",
            "mlp.w3.weight",
            "mlp.w3.bias",
            "adaLN_modulation.1.weight",
            "adaLN_modulation.1.bias",
        )
    ]
    rest = [
        "t_embedder.mlp.0.weight",
        "t_embedder.mlp.0.bias",
        "t_embedder.mlp.2.weight",
        "t_embedder.mlp.2.bias",
        "y_embedder.embedding_table.weight",
        "final_layer.norm_final.weight",
        "final_layer.linear.weight",
        "final_layer.linear.bias",
        "final_layer.adaLN_modulation.1.weight",
        "final_layer.adaLN_modulation.1.bias",
    ]
    two = ["x_embedder.proj1.weight", "x_embedder.proj2.weight", "x_embedder.proj2.bias"]
    assert set(tiny_net().state_dict()) == {*blocks, *rest, *two}
    assert set(tiny_net(bottleneck=0).state_dict()) == {
        *blocks,
        *rest,
        "x_embedder.proj.weight",
        "x_embedder.proj.bias",
    }


def test_initialisation():
    torch.manual_seed(0)
    net = JLT(8, 2, 16, hidden_size=128, depth=1, num_heads=4, bottleneck=32)
    for weight in (net.blocks[0].attn.qkv.weight, net.blocks[0].mlp.w12.weight, net.x_embedder.proj1.weight):
        fan_out, fan_in = weight.flatten(1).shape
        bound = math.sqrt(6 / (fan_in + fan_out))
        assert weight.abs().max() <= bound and weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    for weight in (net.t_embedder.mlp[0].weight, net.t_embedder.mlp[2].weight, net.y_embedder.embedding_table.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    zero = [
        *(m.bias for m in net.modules() if getattr(m, "bias", None) is not None),
        net.final_layer.linear.weight,
        net.blocks[0].adaLN_modulation[1].weight,
        net.final_layer.adaLN_modulation[1].weight,
    ]
    assert all(not p.any() for p in zero)


@pytest.mark.parametrize("target", TARGETS)
def test_new_network_predicts_zero_and_its_loss_is_known(target):
    x, y, t, e = rows(4)
    denoiser = Denoiser(tiny_net(), target, "v")
    assert not denoiser.net(x, t, y).any()
    w = {"x": 1 / (1 - t) ** 2, "v": torch.ones(4), "eps": 1 / t**2}[target]
    wanted = {"x": x, "v": x - e, "eps": e}[target]
    expected = (w * wanted.square().mean(dim=(1, 2, 3))).mean()
    torch.testing.assert_close(denoiser(x, y, t, e), expected)


def test_patches_go_round_and_in_the_published_orders():
    net = tiny_net(patch=2)
    x = torch.randn(2, 3, 8, 8)
    tokens = x.reshape(2, 3, 4, 2, 4, 2).permute(0, 2, 4, 3, 5, 1).reshape(2, 16, 12)  # (row, column, channel)
    torch.testing.assert_close(net.unpatchify(tokens), x)
    single = tiny_net(patch=2, bottleneck=0).x_embedder
    patches = F.unfold(x, 2, stride=2).transpose(1, 2)  # torch's own unfold lists (channel, row, column)
    torch.testing.assert_close(single(x), patches @ single.proj.weight.flatten(1).T + single.proj.bias)


def test_rotary_embedding_against_complex_rotation():
    grid, head_dim = 3, 16
    cos, sin = rotary_table(grid, head_dim)
    x = torch.randn(2, grid * grid, head_dim, dtype=torch.float64)
    out = torch.empty_like(x)
    for token in range(grid * grid):
        for half, position in ((0, token // grid), (1, token % grid)):  # rows first, columns second
            for i in range(head_dim // 4):
                at = half * head_dim // 2 + 2 * i
                angle = position * 10000 ** (-2 * i / (head_dim // 2))
                turned = torch.complex(x[:, token, at], x[:, token, at + 1]) * complex(math.cos(angle), math.sin(angle))
                out[:, token, at], out[:, token, at + 1] = turned.real, turned.imag
    torch.testing.assert_close(rotate(x.float(), cos, sin).double(), out, atol=1e-5, rtol=1e-5)


def test_network_against_plain_formulas():
    """The whole forward pass, restated with explicit matrices, one head at a time."""
    net = awake(tiny_net(patch=2, size=4))
    z, y, t, _ = rows(2, size=4)
    s = net.state_dict()

    def norm(x, name):
        return x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6) * s[name + ".weight"]

    def linear(x, name):
        return x @ s[name + ".weight"].flatten(1).T + s.get(name + ".bias", torch.zeros(()))

    frequency = 10000 ** (-torch.arange(128) / 128)
    angle = t[:, None] * frequency
    c = linear(F.silu(linear(torch.cat([angle.cos(), angle.sin()], 1), "t_embedder.mlp.0")), "t_embedder.mlp.2")
    c = F.silu(c + s["y_embedder.embedding_table.weight"][y])[:, None]
    x = F.unfold(z, 2, stride=2).transpose(1, 2)
    x = linear(x @ s["x_embedder.proj1.weight"].flatten(1).T, "x_embedder.proj2")
    for b in ("blocks.0.", "blocks.1."):
        m = linear(c, b + "adaLN_modulation.1").split(32, -1)
        h = norm(x, b + "norm1") * (1 + m[1]) + m[0]
        q, k, v = linear(h, b + "attn.qkv").split(32, -1)
        heads = []
        for at in (slice(0, 16), slice(16, 32)):
            qh = rotate(norm(q[..., at], b + "attn.q_norm"), net.rotary_cos, net.rotary_sin)
            kh = rotate(norm(k[..., at], b + "attn.k_norm"), net.rotary_cos, net.rotary_sin)
            heads.append(torch.softmax(qh @ kh.transpose(1, 2) / 4, -1) @ v[..., at])
        x = x + m[2] * linear(torch.cat(heads, -1), b + "attn.proj")
        h = norm(x, b + "norm2") * (1 + m[4]) + m[3]
        gate, value = linear(h, b + "mlp.w12").chunk(2, -1)
        x = x + m[5] * linear(F.silu(gate) * value, b + "mlp.w3")
    shift, scale = linear(c, "final_layer.adaLN_modulation.1").chunk(2, -1)
    x = linear(norm(x, "final_layer.norm_final") * (1 + scale) + shift, "final_layer.linear")
    out = F.fold(x.unflatten(-1, (4, 3)).transpose(-1, -2).flatten(2).transpose(1, 2), 4, 2, stride=2)
    torch.testing.assert_close(net(z, t, y), out, atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("bottleneck", [0, 8])
def test_every_parameter_receives_a_gradient(bottleneck):
    denoiser = Denoiser(awake(tiny_net(bottleneck=bottleneck)))
    x, y, t, e = rows(8)
    denoiser(x, y, t, e).backward()
    assert all(p.grad is not None and p.grad.any() for p in denoiser.parameters())


def test_bf16_autocast_stays_close_to_fp32():
    net = awake(tiny_net())
    z, y, t, _ = rows(4)
    with torch.autocast("cpu", torch.bfloat16):
        half = net(z, t, y)
    assert half.dtype == torch.bfloat16
    assert (half.float() - net(z, t, y)).norm() < 0.02 * net(z, t, y).norm()


# ---------------------------------------------------------------------------------------------------------------------
# model.py: the objective


class Oracle(torch.nn.Module):
    """A "network" that knows the answer."""

    num_classes = 5

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, z, t, y):
        return self.answer


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("loss", TARGETS)
def test_weights_equal_losses_of_converted_predictions(target, loss):
    """The loss of all nine pairs, the slow way: turn prediction and truth into the loss's space, then compare."""
    x, y, t, e = rows(6)
    z = t[:, None, None, None] * x + (1 - t[:, None, None, None]) * e
    truth = {"x": x, "eps": e, "v": x - e}
    assert Denoiser(Oracle(truth[target]), target, loss)(x, y, t, e) == 0
    guess = torch.randn_like(x)
    s = t[:, None, None, None]
    v = {"x": (guess - z) / (1 - s), "eps": (z - guess) / s, "v": guess}[target]
    converted = {"x": z + (1 - s) * v, "eps": z - s * v, "v": v}[loss]
    expected = (converted - truth[loss]).square().mean()
    torch.testing.assert_close(Denoiser(Oracle(guess), target, loss)(x, y, t, e), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", TARGETS)
def test_loss_weights_are_the_table_with_floored_denominators(target):
    t = torch.tensor([0.001, 0.01, 0.3, 0.97, 0.999])
    a, b = (1 - t).clamp(min=0.05), t.clamp(min=0.05)
    table = {
        "x": {"v": 1 / a**2, "x": t * 0 + 1, "eps": (t / a) ** 2},
        "v": {"v": t * 0 + 1, "x": (1 - t) ** 2, "eps": t**2},
        "eps": {"v": 1 / b**2, "x": ((1 - t) / b) ** 2, "eps": t * 0 + 1},
    }
    for loss in TARGETS:
        torch.testing.assert_close(Denoiser(Oracle(None), target, loss).loss_weight(t), table[target][loss])


def test_oracles_of_all_targets_give_the_same_velocity():
    x, y, _, e = rows(5)
    for t in (0.05, 0.3, 0.95):
        z = t * x + (1 - t) * e
        for target, answer in {"x": x, "eps": e, "v": x - e}.items():
            denoiser = Denoiser(Oracle(answer), target)
            torch.testing.assert_close(denoiser.velocity(z, t, y), x - e, atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(denoiser.velocity(z, torch.full((5,), t), y), x - e, atol=2e-5, rtol=1e-4)
    z = torch.ones(1, 3, 8, 8)
    assert Denoiser(Oracle(0 * z), "x").velocity(z, 0.99, y[:1]).unique().item() == pytest.approx(
        -1 / 0.05
    )  # the floor


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("loss", TARGETS)
def test_all_nine_combinations_train(target, loss):
    torch.manual_seed(0)
    denoiser = Denoiser(tiny_net(), target, loss)
    x, y, t, e = rows(16)
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        losses.append(denoiser(x, y, t, e, torch.zeros(16, dtype=torch.bool)))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0]


def test_times_are_logit_normal():
    denoiser = Denoiser(Oracle(None))
    t = denoiser.times(torch.randn(200_000, generator=torch.Generator().manual_seed(0)))
    logits = torch.log(t / (1 - t))
    assert logits.mean().item() == pytest.approx(-0.8, abs=0.01) and logits.std().item() == pytest.approx(0.8, abs=0.01)


def test_label_dropout_rate_and_eval_mode():
    seen = []

    class Spy(Oracle):
        def forward(self, z, t, y):
            seen.append(y)
            return z

    denoiser = Denoiser(Spy(None), label_drop=0.1)
    x, y = torch.zeros(20_000, 1, 1, 1), torch.zeros(20_000, dtype=torch.int64)
    torch.manual_seed(0)
    denoiser(x, y)
    assert (seen[-1] == 5).float().mean().item() == pytest.approx(0.1, abs=0.01) and set(seen[-1].tolist()) == {0, 5}
    denoiser.eval()(x, y)
    assert not seen[-1].any()
    hide = torch.arange(20_000) % 2 == 0
    denoiser(x, y, drop=hide)
    assert torch.equal(seen[-1] == 5, hide)


def test_wrong_sizes_are_refused():
    for bad in (dict(patch=3), dict(hidden_size=36, num_heads=2)):
        with pytest.raises(ValueError):
            tiny_net(**bad)
    with pytest.raises(ValueError):
        Denoiser(Oracle(None), "y")


# ---------------------------------------------------------------------------------------------------------------------
# vae.py: codecs, pictures, the cache


def vae_picture(path, size=(40, 32), seed=0):
    """A file of random pixels, smooth enough for JPEG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(path)


def vae_folder(root, per_class=7, classes=("cat", "dog"), size=(40, 32)):
    for label, name in enumerate(classes):
        for i in range(per_class):
            vae_picture(root / name / f"{i:02d}.png", size, 100 * label + i)
    return root


def vae_write(images, out, size=16, **options):
    """write_cache in pixels, four images to a shard."""
    assert write_cache(images, out, load_vae("pixels"), size, **{"batch": 3, "shard_size": 4} | options) == 0
    return LatentDataset(out)


def vae_bytes(folder):
    return {path.name: path.read_bytes() for path in folder.glob("latents_*")}


def vae_foreign(folder, shards, **more):
    """Shards as others write them: no metadata, any number of digits."""
    folder.mkdir()
    for (rank_, k), tensors in shards.items():
        save_file(tensors, folder / f"latents_rank{rank_:02d}_shard{k:03d}.safetensors")
    for name, value in more.items():
        torch.save(value, folder / f"{name}.pt")
    return folder


def vae_tiny_flux2(folder, **changes):
    """An AutoencoderKLFlux2 small enough for a test, with random weights and statistics, saved by diffusers itself."""
    from diffusers import AutoencoderKLFlux2

    torch.manual_seed(0)
    options = dict(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=6)
    net = AutoencoderKLFlux2(**options | changes).eval()
    net.bn.running_mean.normal_()
    net.bn.running_var.uniform_(0.5, 2)
    net.save_pretrained(folder)
    return net


@pytest.mark.parametrize("place", ["plain", "plain/vae"])
def test_flux2_is_mode_unshuffle_batchnorm(tmp_path, place):
    """Through from_pretrained, with config.json at the root or under vae/; each step written out a second way."""
    net = vae_tiny_flux2(tmp_path / place)
    vae = load_vae(str(tmp_path / "plain"))
    assert (vae.kind, vae.channels, vae.stride) == ("flux2", 24, 16)
    x = torch.rand(18, 3, 32, 48) * 2 - 1  # more than one chunk
    with torch.no_grad():
        mean = net.encode(x).latent_dist.mean  # (18, 6, 4, 6): the mode of a Gaussian
        z = torch.stack([mean[:, c, i::2, j::2] for c in range(6) for i in range(2) for j in range(2)], 1)
        wanted = F.batch_norm(z, net.bn.running_mean, net.bn.running_var, eps=1e-4)
        back = net.decode(mean).sample
    assert vae.encode(x).shape == (18, 24, 2, 3) and not vae.encode(x).requires_grad
    torch.testing.assert_close(vae.encode(x), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vae.decode(wanted), back, rtol=1e-4, atol=1e-5)


def test_flux2_settings_come_from_its_config_and_bf16_stays_close(tmp_path):
    net = vae_tiny_flux2(tmp_path / "vae", batch_norm_eps=1.0)  # the folder's own name is vae: still its root
    x = torch.rand(1, 3, 16, 16) * 2 - 1
    full, half = (load_vae(str(tmp_path / "vae"), dtype=dtype) for dtype in ("fp32", "bf16"))
    z = F.pixel_unshuffle(net.encode(x).latent_dist.mode(), 2).detach()
    torch.testing.assert_close(full.encode(x), F.batch_norm(z, net.bn.running_mean, net.bn.running_var, eps=1.0))
    assert full.id == half.id and half.encode(x).dtype == half.decode(half.encode(x)).dtype == torch.float32
    assert (half.encode(x) - full.encode(x)).abs().max() < 0.1


def test_flux2_refuses_other_configs_and_missing_weights(tmp_path):
    vae_tiny_flux2(tmp_path)
    weights = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    del weights["bn.running_mean"]
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(BadInput, match="lack bn.running_mean"):
        load_vae(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"_class_name": "AutoencoderKL"}))
    with pytest.raises(BadInput, match="expected AutoencoderKLFlux2"):
        load_vae(str(tmp_path))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_taef2_reads_the_published_keys(tmp_path, suffix):
    """Files under the published names; encoding restated with functional calls, decoding checked in shape and range."""
    torch.manual_seed(0)
    net = Taef2()
    for half, part in ("encoder", net.encoder), ("decoder", net.decoder):
        state = {k: v.half() for k, v in part.state_dict().items()}
        path = tmp_path / f"taef2_{half}{suffix}"
        save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    w = {k: v.half().float() for k, v in net.encoder.state_dict().items()}
    vae, x = load_vae(str(tmp_path)), torch.rand(2, 3, 32, 32) * 2 - 1

    def block(h, i):
        if f"{i}.pool.0.weight" in w:
            p = F.group_norm(F.conv2d(h, w[f"{i}.pool.0.weight"]), 4, w[f"{i}.pool.1.weight"], w[f"{i}.pool.1.bias"])
            h = h + F.conv2d(p.relu(), w[f"{i}.pool.3.weight"])
        g = h
        for j in (0, 2, 4):
            g = F.conv2d(g.relu() if j else g, w[f"{i}.conv.{j}.weight"], w[f"{i}.conv.{j}.bias"], padding=1)
        return (g + h).relu()

    h = block(F.conv2d((x + 1) / 2, w["0.weight"], w["0.bias"], padding=1), 1)
    for i in (2, 6, 10):
        h = F.conv2d(h, w[f"{i}.weight"], stride=2, padding=1)
        for j in (1, 2, 3):
            h = block(h, i + j)
    h = F.conv2d(h, w["14.weight"], w["14.bias"], padding=1)
    torch.testing.assert_close(vae.encode(x), F.pixel_unshuffle(h, 2), rtol=1e-4, atol=1e-5)
    assert {k for k in w if "pool" in k and k.endswith("0.weight")} == {f"{i}.pool.0.weight" for i in (11, 12, 13)}
    indices = {int(k.split(".")[0]) for k in net.decoder.state_dict()}
    assert indices == {1, 3, 4, 5, 7, 8, 9, 10, 12, 13, 14, 15, 17, 18, 19}
    assert vae.decode(vae.encode(x)).shape == x.shape and (vae.kind, vae.channels, vae.stride) == ("taef2", 128, 16)
    torch.testing.assert_close(net.decoder[0](torch.tensor([0.0, 3, 1e9])), 3 * torch.tensor([0.0, math.tanh(1), 1]))


def test_local_codecs_are_known_by_their_weights(tmp_path):
    """Never by their path; and a hash alone cannot be loaded."""
    for name in ("here", "there"):
        vae_tiny_flux2(tmp_path / name)
    here, there = (load_vae(str(tmp_path / name)) for name in ("here", "there"))
    assert here.id == there.id and re.fullmatch("flux2-[0-9a-f]{12}", here.id)
    assert here.hint == str(tmp_path / "here") and load_vae("pixels").hint is None
    weights = load_file(tmp_path / "there" / "diffusion_pytorch_model.safetensors")
    weights["bn.running_mean"][0] += 1
    save_file(weights, tmp_path / "there" / "diffusion_pytorch_model.safetensors")
    assert load_vae(str(tmp_path / "there")).id != here.id
    with pytest.raises(BadInput, match="name its folder"):
        load_vae(here.id)


def test_quantiser_inverts_and_rounds():
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(every)), every)
    assert torch.equal(to_uint8(from_uint8(every).half()), every)  # as a pixels cache stores them
    edges = torch.tensor([-9.0, -1, 0.4 / 127.5 - 1, 0.6 / 127.5 - 1, 1, 9])
    assert to_uint8(edges).tolist() == [0, 0, 0, 1, 255, 255]


@pytest.mark.parametrize("size", [(33, 32), (200, 97), (64, 131), (10, 7), (64, 64), (1, 1)])
def test_center_crop_restated(size):
    """ADM's rule on arrays: halvings are means of 2 x 2 squares, the cut is in the middle."""
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    out, side = np.asarray(center_crop(image, 32)), np.array(image.size)
    assert out.shape == (32, 32, 3)
    if size == (64, 64):
        assert np.abs(out - pixels.reshape(32, 2, 32, 2, 3).mean((1, 3))).max() <= 1
    while side.min() >= 64:
        image, side = image.resize(tuple(side // 2), Image.Resampling.BOX), side // 2
    side = [round(n * 32 / side.min()) for n in side]
    big = np.asarray(image.resize(side, Image.Resampling.BICUBIC))
    x, y = (side[0] - 32) // 2, (side[1] - 32) // 2
    assert np.array_equal(out, big[y : y + 32, x : x + 32])


def vae_seen(tmp_path, image, name="a.png", **options):
    image.save(tmp_path / name, **options)
    return np.asarray(open_image(tmp_path / name)).astype(int)


def test_pictures_of_every_mode_as_a_viewer_shows_them(tmp_path):
    random = np.random.default_rng(0)
    grey, rgb = random.integers(0, 256, (6, 5), np.uint8), random.integers(0, 256, (6, 5, 3), np.uint8)
    alpha = random.integers(0, 256, (6, 5, 1), np.uint8)
    spread = np.repeat(grey[..., None], 3, 2)

    def on_white(colour):
        return colour * (alpha / 255) + 255 * (1 - alpha / 255)

    seen = functools.partial(vae_seen, tmp_path)
    assert np.array_equal(seen(Image.fromarray(rgb)), rgb)
    assert np.array_equal(seen(Image.fromarray(grey)), spread)
    assert np.array_equal(seen(Image.fromarray(grey > 99)), 255 * (spread > 99))
    assert np.abs(seen(Image.fromarray(np.dstack([rgb, alpha]))) - on_white(rgb)).max() <= 1
    assert np.abs(seen(Image.fromarray(np.dstack([grey, alpha[..., 0]]), "LA")) - on_white(spread)).max() <= 1

    palette = Image.fromarray(grey // 64, "P")
    colours = random.integers(0, 256, (4, 3), np.uint8)
    palette.putpalette(colours.tobytes())
    assert np.array_equal(seen(palette), colours[grey // 64])
    hole = np.where((grey // 64 == 2)[..., None], 255, colours[grey // 64])
    assert np.array_equal(seen(palette, transparency=2), hole)  # one palette entry is clear
    assert np.array_equal(seen(palette, "a.gif", transparency=2), hole)
    assert np.array_equal(seen(palette, transparency=b"\xff\xff\x00\xff"), hole)
    clear = tuple(int(n) for n in rgb[2, 3])
    assert seen(Image.fromarray(rgb), transparency=clear)[2, 3].tolist() == [255] * 3  # tRNS: one colour is clear

    deep = random.integers(0, 65536, (6, 5), np.uint16)
    scaled = np.repeat(np.round(deep / 257)[..., None], 3, 2)
    for name in ("a.png", "a.tif", "a.pgm"):
        assert np.array_equal(seen(Image.fromarray(deep), name), scaled), name
    assert np.array_equal(seen(Image.fromarray(deep.astype(np.int32)), "a.tif"), scaled)
    unit = np.repeat(np.round(deep / 65535 * 255)[..., None], 3, 2)
    assert np.abs(seen(Image.fromarray((deep / 65535).astype(np.float32)), "a.tif") - unit).max() <= 1

    cmyk = Image.fromarray(np.dstack([rgb, grey]), "CMYK")
    ink = (255 - rgb.astype(float)) * (255 - spread) / 255
    assert np.abs(seen(cmyk, "a.tif") - ink).max() <= 1
    flat = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert np.abs(seen(flat, "a.jpg", quality=100) - [255, 0, 0]).max() <= 4  # red; JPEG stores it inverted

    def smooth(quality):
        return Image.fromarray(rgb).resize((40, 48), Image.Resampling.BICUBIC)

    plain = seen(smooth(0), "a.jpg", quality=95)
    assert np.array_equal(seen(smooth(0), "b.jpg", quality=95, progressive=True), plain)
    assert np.abs(plain - np.asarray(smooth(0)).astype(int)).mean() < 4
    frames = [Image.fromarray(rgb), Image.fromarray(255 - rgb)]
    assert np.array_equal(seen(frames[0], save_all=True, append_images=frames[1:]), rgb)  # animated: the first frame
    assert np.array_equal(seen(frames[0], "a.webp", save_all=True, append_images=frames[1:], lossless=True), rgb)

    turned = {
        1: rgb,
        2: rgb[:, ::-1],
        3: rgb[::-1, ::-1],
        4: rgb[::-1],
        5: rgb.transpose(1, 0, 2),
        6: np.rot90(rgb, -1),
        7: np.rot90(rgb, 2).transpose(1, 0, 2),
        8: np.rot90(rgb),
    }
    for orientation, wanted in turned.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        assert np.array_equal(seen(Image.fromarray(rgb), exif=exif), wanted), orientation


def test_what_no_image_may_do(tmp_path):
    """Bombs, slivers and formats that would start a program are refused, a wrong suffix is not."""
    Image.new("1", (20000, 20000)).save(tmp_path / "bomb.png")
    Image.new("1", (1, 101)).save(tmp_path / "sliver.png")
    (tmp_path / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    for name in ("bomb", "sliver", "script"):
        with pytest.raises(Exception):
            open_image(tmp_path / f"{name}.png")
    Image.new("RGB", (9, 9), "red").save(tmp_path / "really.png", "JPEG")
    assert open_image(tmp_path / "really.png").size == (9, 9)


def test_list_images_sorted_deep_and_visible(tmp_path):
    for name in ("b/2.JPG", "b/10.png", "a/deep/er/x.jpeg", "a/1.tiff", "b/.hidden.png", ".git/1.png", "b/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    wanted = [("a/1.tiff", 0), ("a/deep/er/x.jpeg", 0), ("b/10.png", 1), ("b/2.JPG", 1)]
    assert list_images(tmp_path) == (["a", "b"], wanted)


def test_cache_round_trip_and_mirrored_images(tmp_path):
    images = vae_folder(tmp_path / "images")
    data = vae_write(images, tmp_path / "cache")
    assert (len(data), data.shape, data.num_classes, data.size) == (14, (3, 16, 16), 2, 16)
    assert (data.class_names, data.vae, data.hint) == (["cat", "dog"], {"kind": "pixels", "id": "pixels"}, None)
    _, items = list_images(images)
    pictures = torch.stack([image_tensor(center_crop(open_image(images / path), 16)) for path, _ in items])
    latents, labels = data.batch(range(14))
    assert latents.dtype == torch.float16 and labels.tolist() == [0] * 7 + [1] * 7 and labels.dtype == torch.int64
    assert torch.equal(to_uint8(latents), pictures)
    assert torch.equal(to_uint8(data.batch(range(14), True)[0]), pictures.flip(-1))
    order, flip = np.random.default_rng(0).integers(0, 14, 50), np.random.default_rng(1).random(50) < 0.5
    wanted = torch.stack([pictures[i].flip(-1) if f else pictures[i] for i, f in zip(order, flip)])
    assert torch.equal(to_uint8(data.batch(order, flip)[0]), wanted)
    assert torch.equal(data.batch(torch.tensor([3, 12]))[0], torch.stack([data[3][0], data[12][0]]))
    assert data[-1][1] == 1 and torch.equal(data[-1][0], data[13][0]) and len(data.batch([])[1]) == 0
    for wrong in ([14], [-1]):
        with pytest.raises(IndexError):
            data.batch(wrong)
    x = latents.double()
    assert data.check() == pytest.approx((x.mean().item(), x.std(correction=0).item()), rel=1e-6)


def test_the_mirrored_latent_is_the_mirrored_images(tmp_path):
    """With a codec that is not symmetric: the latents' own mirror image is something else."""
    vae_tiny_flux2(tmp_path / "vae")
    images, vae = vae_folder(tmp_path / "images", 2), load_vae(str(tmp_path / "vae"))
    write_cache(images, tmp_path / "cache", vae, 32)
    data = LatentDataset(tmp_path / "cache")
    pictures = [image_tensor(center_crop(open_image(images / path), 32)) for path, _ in list_images(images)[1]]
    x = from_uint8(torch.stack(pictures))
    torch.testing.assert_close(data.batch(range(4), True)[0], vae.encode(x.flip(-1)).half())
    assert (data.batch(range(4), True)[0] - data.batch(range(4))[0].flip(-1)).abs().max() > 0.1
    assert (data.vae, data.hint) == ({"kind": "flux2", "id": vae.id}, str(tmp_path / "vae"))
    (tmp_path / "cache" / "source.json").write_text("[")
    assert LatentDataset(tmp_path / "cache").hint is None  # a convenience: free to go
    assert str(tmp_path).encode() not in b"".join(vae_bytes(tmp_path / "cache").values())


def test_no_flip_never_mirrors(tmp_path):
    data = vae_write(vae_folder(tmp_path / "images", 2), tmp_path / "cache", flip=False)
    assert not data.mirrored and torch.equal(data.batch([1, 2], True)[0], data.batch([1, 2])[0])


def test_cache_is_the_same_from_two_ranks_and_in_two_pieces(tmp_path, monkeypatch):
    images = vae_folder(tmp_path / "images")
    (images / "cat" / "03.png").write_bytes(b"no image")
    whole = vae_bytes(vae_write(images, tmp_path / "one").rows.paths[0].parent)
    assert len(whole) == 4
    for rank_ in ("1", "0"):
        monkeypatch.setenv("RANK", rank_), monkeypatch.setenv("WORLD_SIZE", "2")
        write_cache(images, tmp_path / "two", load_vae("pixels"), 16, batch=3, shard_size=4)
        if rank_ == "1":
            with pytest.raises(BadInput, match="2 of 4 shards, number 0"):
                LatentDataset(tmp_path / "two")
    monkeypatch.delenv("RANK"), monkeypatch.delenv("WORLD_SIZE")
    assert vae_bytes(tmp_path / "two") == whole

    class Stop:  # a signal after some batches
        calls = 0

        @property
        def number(self):
            self.calls += 1
            return 15 * (self.calls > 5)

    out = tmp_path / "pieces"
    assert write_cache(images, out, load_vae("pixels"), 16, batch=3, shard_size=4, stop=Stop()) == 143
    first = {path: path.stat().st_mtime_ns for path in out.glob("latents_*")}
    assert len(first) == 2 and not list(out.glob(".tmp*"))
    vae_write(images, out)
    assert vae_bytes(out) == whole and all(path.stat().st_mtime_ns == t for path, t in first.items())
    (out / "latents_rank00_shard00001.safetensors").unlink()
    assert vae_bytes(vae_write(images, out).rows.paths[0].parent) == whole


def test_batches_stay_within_a_shard_and_mirror_in_the_same_size(tmp_path, monkeypatch):
    vae, seen = load_vae("pixels"), []
    monkeypatch.setattr(vae, "encode", lambda x: seen.append(len(x)) or x)
    write_cache(vae_folder(tmp_path / "images"), tmp_path / "cache", vae, 16, batch=3, shard_size=4)
    assert seen == [3, 3, 1, 1] * 3 + [2, 2]


def test_cache_with_other_settings_is_left_alone(tmp_path):
    images = vae_folder(tmp_path / "images")
    vae_write(images, tmp_path / "cache")
    before = vae_bytes(tmp_path / "cache")
    for change in {"size": 8}, {"flip": False}, {"batch": 4}, {"shard_size": 7}:
        with pytest.raises(BadInput, match=next(iter(change)).removesuffix("_size") + "|shards"):
            vae_write(images, tmp_path / "cache", **change)
    (images / "dog" / "06.png").rename(images / "dog" / "07.png")
    with pytest.raises(BadInput, match="list"):
        vae_write(images, tmp_path / "cache")
    assert vae_bytes(tmp_path / "cache") == before
    vae_foreign(tmp_path / "theirs", {(0, 0): {"latents": torch.zeros(1, 3, 16, 16), "labels": torch.zeros(1).long()}})
    with pytest.raises(BadInput, match="program"):
        vae_write(images, tmp_path / "theirs")


def test_unreadable_images_are_listed_and_survived(tmp_path, capsys):
    images = vae_folder(tmp_path / "images")
    whole = (images / "cat" / "00.png").read_bytes()
    (images / "cat" / "01.png").write_bytes(whole[: len(whole) // 2])
    (images / "dog" / "00.png").write_bytes(b"")
    (images / "dog" / os.fsdecode(b"\xff\xfe \xe9.png")).symlink_to("nowhere")  # a name that is not UTF-8
    data = vae_write(images, tmp_path / "cache")
    lines = capsys.readouterr().err.splitlines()
    assert len(data) == 12 and sum(line.startswith("warning: left out") for line in lines) == 3
    left = sum((json.loads(read_metadata(path)["nanojlt"])["unreadable"] for path in data.rows.paths), [])
    assert left == ["cat/01.png", "dog/00.png", os.fsdecode(b"dog/\xff\xfe \xe9.png")]
    vae_write(images, tmp_path / "cache")  # nothing left to do; the list is repeated
    assert capsys.readouterr().err.count("left out") == 3


def read_metadata(path):
    with safe_open(path, "np") as file:
        return file.metadata()


def test_our_shards_read_as_lightningdit_reads_them(tmp_path):
    """Plain safetensors calls, the foreign keys, shapes and types; one metadata key, sorted, without paths or dates."""
    data = vae_write(vae_folder(tmp_path / "images"), tmp_path / "cache")
    tensors = [load_file(path) for path in sorted((tmp_path / "cache").glob("*.safetensors"))]
    assert [set(t) for t in tensors] == [{"latents", "latents_flip", "labels"}] * 4
    assert {str(t[k].dtype) for t in tensors for k in t} == {"torch.float16", "torch.int64"}
    assert torch.equal(torch.cat([t["latents"] for t in tensors]), data.batch(range(14))[0])
    metadata = read_metadata(data.rows.paths[1])
    settings = json.loads(metadata["nanojlt"])
    assert list(metadata) == ["nanojlt"] and metadata["nanojlt"] == json.dumps(settings, sort_keys=True)
    assert (settings["shard"], settings["shards"], settings["images"], settings["flip"]) == (1, 4, 14, True)


@pytest.mark.parametrize(
    "dtype, labels", [(torch.float32, torch.int32), (torch.float16, torch.int64), (torch.bfloat16, torch.int64)]
)
def test_foreign_caches_batch_for_batch(tmp_path, dtype, labels):
    """By rank and number (2 before 10, rank 1 after rank 0), normalised where their statistics lie beside them."""
    torch.manual_seed(0)
    order = [(0, 2), (0, 10), (1, 0)]
    shards = {
        at: {
            "latents": torch.randn(3, 4, 2, 2).to(dtype),
            "latents_flip": torch.randn(3, 4, 2, 2).to(dtype),
            "labels": torch.randint(0, 9, (3,)).to(labels),
        }
        for at in order
    }
    stats = {"mean": torch.randn(1, 4, 1, 1), "std": torch.rand(1, 4, 1, 1) + 0.5}
    raw = LatentDataset(vae_foreign(tmp_path / "raw", shards))
    scaled = LatentDataset(vae_foreign(tmp_path / "scaled", shards, latents_stats=stats))
    plain, mirrored, y = (torch.cat([shards[at][key] for at in order]) for key in ("latents", "latents_flip", "labels"))
    pick, flip = np.array([8, 0, 3, 3]), np.array([True, False, True, False])
    wanted = torch.where(torch.from_numpy(flip).view(-1, 1, 1, 1), mirrored[pick], plain[pick])
    assert torch.equal(raw.batch(pick, flip)[0], wanted) and raw.batch(pick)[1].tolist() == y[pick].tolist()
    torch.testing.assert_close(scaled.batch(pick, flip)[0], ((wanted.float() - stats["mean"]) / stats["std"]).to(dtype))
    assert raw.num_classes == y.max() + 1 and raw.vae is raw.class_names is raw.size is None and raw.mirrored
    assert raw.fingerprint != scaled.fingerprint == LatentDataset(tmp_path / "scaled").fingerprint
    del shards[0, 10]["latents_flip"]
    assert not LatentDataset(vae_foreign(tmp_path / "half", shards)).mirrored


def test_check_warns_of_latents_that_are_not_normalised(tmp_path, capsys):
    cases = {"good": (0.1, 0.9, 0), "wide": (0, 5, 1), "off": (2, 1, 1), "flat": (0, 0.1, 1)}
    for name, (mean, std, warns) in cases.items():
        shard = {"latents": torch.randn(64, 4, 4, 4) * std + mean, "labels": torch.zeros(64).long()}
        found = LatentDataset(vae_foreign(tmp_path / name, {(0, 0): shard})).check()
        assert found == pytest.approx((mean, std), abs=0.1 + 0.05 * std)
        assert capsys.readouterr().out.count("warning") == warns, name
    shard["latents"][5, 0, 0, 0] = math.nan
    with pytest.raises(BadInput, match="finite"):
        LatentDataset(vae_foreign(tmp_path / "nan", {(0, 0): shard})).check()


def test_damaged_caches_are_refused_by_name(tmp_path):
    images = vae_folder(tmp_path / "images")
    cache = tmp_path / "cache"
    vae_write(images, cache)
    path = cache / "latents_rank00_shard00002.safetensors"
    good = path.read_bytes()

    def refused(match, data=None):
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(BadInput, match=match) as error:
            LatentDataset(cache)
        assert "\n" not in str(error.value)
        path.write_bytes(good)

    refused("shard00002.*bytes, expected", good[:-5])
    refused("shard00002.*bytes, expected", good + b"x")
    for data in (
        b"",
        good[:4],
        good[:100],
        b"\xff" * 300,
        (2).to_bytes(8, "little") + b"[]",
        good.replace(b'"F16"', b'"F99"'),
    ):
        refused("shard00002", data)
    tensors, metadata = load_file(path), read_metadata(path)
    for change in ({"labels": torch.tensor([0, 0, 0, 2])}, {"labels": torch.tensor([0, -1, 0, 0])}):
        save_file(tensors | change, path, metadata)
        refused("labels from")
    for change in (
        {"labels": torch.zeros(3).long()},
        {"labels": torch.zeros(4)},
        {"latents": torch.zeros(4, 3, 256).half()},
        {"latents_flip": torch.zeros(4, 3, 8, 8).half()},
    ):
        save_file(tensors | change, path, metadata)
        refused("shard00002")
    save_file({k: v[:, :, :8, :8].contiguous() if v.ndim == 4 else v for k, v in tensors.items()}, path, metadata)
    refused(r"shard00002.*\(3, 8, 8\)")
    save_file(tensors, path)
    refused("shard00002.*program")
    settings = json.loads(metadata["nanojlt"])
    for change, match in ({"size": 32}, "size"), ({"classes": 3}, "shard00002"), ({"shard": 1}, "number 2"):
        save_file(tensors, path, {"nanojlt": json.dumps(settings | change)})
        refused(match)
    path.unlink()
    refused("3 of 4 shards, number 2")
    (cache / "latents_rank00_shard00003.safetensors").unlink()
    refused("3 of 4 shards, number 3")
    with pytest.raises(BadInput, match="no latents"):
        LatentDataset(tmp_path / "images")


def test_mutated_shards_are_read_or_refused(tmp_path):
    """Random damage to the header: one line, or a data set that can be read; never another error."""
    cache, random = tmp_path / "cache", np.random.default_rng(0)
    vae_write(vae_folder(tmp_path / "images", 2), cache, shard_size=99)
    path = next(cache.glob("latents_*"))
    good = np.frombuffer(path.read_bytes(), np.uint8)
    header = 8 + int.from_bytes(good[:8].tobytes(), "little")
    refused = 0
    for _ in range(300):
        bad = good.copy()
        bad[random.integers(0, header, random.integers(1, 4))] = random.integers(0, 256)
        path.write_bytes(bad.tobytes())
        try:
            LatentDataset(cache).batch([0, 3])
        except BadInput:
            refused += 1
    assert refused > 100


def test_stats_that_are_no_tensors_run_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "hacked"),)

    shard = {(0, 0): {"latents": torch.zeros(1, 4, 2, 2), "labels": torch.zeros(1).long()}}
    for name, stats in ("evil", Evil()), ("short", {"mean": torch.zeros(3), "std": torch.ones(3)}), ("list", [1]):
        with pytest.raises(BadInput, match="latents_stats"):
            LatentDataset(vae_foreign(tmp_path / name, shard, latents_stats=stats))
    assert not (tmp_path / "hacked").exists()


def test_spawned_workers_read_a_cache(tmp_path):
    data = vae_write(vae_folder(tmp_path / "images", 3), tmp_path / "cache")
    data.batch(range(6))
    assert not pickle.loads(pickle.dumps(data)).rows.maps
    loader = torch.utils.data.DataLoader(data, batch_size=6, num_workers=1, multiprocessing_context="spawn")
    latents, labels = next(iter(loader))
    assert torch.equal(latents, data.batch(range(6))[0]) and labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_vae_program_bad_input_is_one_line_and_writes_nothing(tmp_path, capsys, monkeypatch):
    images = str(vae_folder(tmp_path / "images", 1))
    (tmp_path / "empty").mkdir()
    (tmp_path / "flat").mkdir()
    vae_picture(tmp_path / "flat" / "1.png")
    (tmp_path / "hole" / "class").mkdir(parents=True)
    (tmp_path / "junk" / "class").mkdir(parents=True)
    (tmp_path / "junk" / "class" / "1.png").write_bytes(b"junk")
    (tmp_path / "a file").touch()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("vae.StopSignal", lambda: None)  # the test run keeps its own signals
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for arguments, word in (
        (["--images", "missing"], "no such folder"),
        (["--images", "x" * 5000], "no such folder"),
        (["--images", "empty"], "no class folders"),
        (["--images", "flat"], "no class folders"),
        (["--images", "hole"], "a class folder without images"),
        (["--images", "a file"], "no such folder"),
        (["--images", "junk"], "not one of 1 images"),
        ([], "--images"),
        (["--images", images, "--colour"], "--colour"),
        (["--images", images, "--vae", "nonsense"], "nonsense"),
        (["--images", images, "--size", "0"], "--size"),
        (["--images", images, "--size", "x"], "--size"),
        (["--images", images, "--batch", "17"], "--batch"),
        (["--images", images, "--dtype", "fp16"], "black"),
        (["--images", images, "--vae", "empty"], "config.json"),
        (["--images", images, "--out", "a file"], "a file"),
        (["--images", images, "--out", images], "inside"),
        (["--images", images, "--out", "y" * 300], "cannot be written"),
    ):
        assert vae_main(arguments + ["--vae", "pixels"] * ("--vae" not in arguments)) == 2, arguments
        error = capsys.readouterr().err.splitlines()
        assert len(error) == 1 and word in error[0], (arguments, error)
    with pytest.raises(BadInput, match="multiple of 16"):
        vae_tiny_flux2(tmp_path / "codec")
        write_cache(images, tmp_path / "out", load_vae(str(tmp_path / "codec")), 40)
    monkeypatch.setattr("vae.shutil.disk_usage", lambda path: argparse.Namespace(free=10))
    assert vae_main(["--images", images, "--vae", "pixels"]) == 2 and "another disk" in capsys.readouterr().err
    assert [p for p in sorted(tmp_path.rglob("*")) if "codec" not in str(p)] == before


def test_a_full_disk_is_one_line_and_leaves_no_half_shard(tmp_path, capsys, monkeypatch):
    """A file-size limit stands in for the disk."""
    images = vae_folder(tmp_path / "images", 3, size=(64, 64))
    code = (
        "import resource, signal, sys, vae; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)); sys.exit(vae.main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--images", images, "--out", tmp_path / "out", "--vae", "pixels", "--size", "64"],
        capture_output=True,
        text=True,
        cwd=pathlib.Path(__file__).parent,
    )
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert not list((tmp_path / "out").glob("*latents*")) and not list((tmp_path / "out").glob(".tmp*"))


def test_digits_are_drawn_the_same_from_a_seed(tmp_path):
    draw_digits(tmp_path / "a", 2, seed=1)
    draw_digits(tmp_path / "b", 2, seed=1)
    draw_digits(tmp_path / "c", 2, seed=2)
    roots = [tmp_path / name for name in "abc"]
    a, b, c = ({p.relative_to(root): p.read_bytes() for p in root.rglob("*.png")} for root in roots)
    assert a == b and a.keys() == c.keys() and a != c and len(a) == 20
    assert list_images(tmp_path / "a")[0] == list("0123456789")
    picture = np.asarray(open_image(tmp_path / "a" / "8" / "00000.png"))
    assert picture.shape == (32, 32, 3) and picture.max() == 255
    assert picture[[0, -1]].max() == picture[:, [0, -1]].max() == 0


# ---------------------------------------------------------------------------------------------------------------------
# sample.py: the ODE, guidance, files, pictures


class Gaussian:
    """The exact denoiser of data x ~ N(0, λ): the network that training would converge to, for any target."""

    def __init__(self, lam, target="v", t_eps=0.0):
        self.lam, self.real = lam, Denoiser(Oracle(None), target, t_eps=t_eps)

    def velocity(self, z, t):
        var = t * t * self.lam + (1 - t) ** 2
        best = {"x": t * self.lam, "v": t * self.lam - (1 - t), "eps": 1 - t}[self.real.target] / var * z
        return self.real.to_velocity(best, z, t)


@pytest.mark.parametrize("target", ["x", "v"])
@pytest.mark.parametrize("method, order", [("euler", 1), ("heun", 2)])
def test_ode_lands_on_the_gaussian(target, method, order):
    """The flow of a Gaussian is linear: noise z lands exactly on sqrt(λ) z; the error falls as 1/steps^order."""
    z, lam = torch.randn(64, dtype=torch.float64), 4.0
    error = [(ode_sample(Gaussian(lam, target).velocity, z, n, method) - 2 * z).norm().item() for n in (40, 80, 160)]
    assert error[0] / error[1] == pytest.approx(2**order, rel=0.15)
    assert error[1] / error[2] == pytest.approx(2**order, rel=0.1)
    assert error[2] < 0.05 * z.norm().item()
    with pytest.raises(ValueError, match="Heun"):
        ode_sample(None, z, 1, "Heun")


def test_floor_of_the_sampler_leaves_some_noise_and_takes_some_contrast():
    """What the floor does in 50 steps, for data without (λ = 0) and with (λ = 1) variance."""
    z = torch.randn(1000, dtype=torch.float64)
    left = {
        floor: ode_sample(Gaussian(0.0, "x", floor).velocity, z, 50, "heun").norm() / z.norm() for floor in (0, 0.05)
    }
    assert left[0] < 1e-9 and 0.01 < left[0.05] < 0.025
    kept = {
        target: (ode_sample(Gaussian(1.0, target, 0.05).velocity, z, 50, "heun").norm() / z.norm()).item()
        for target in TARGETS
    }
    assert kept["x"] == pytest.approx(0.978, abs=0.002)
    assert kept["eps"] == pytest.approx(1.026, abs=0.002)
    assert kept["v"] == pytest.approx(1.000, abs=0.002)


def test_evaluations_are_counted_as_in_the_paper():
    asked = []

    class Counter(Denoiser):
        def velocity(self, z, t, y):
            asked.append((t, len(z)))
            return torch.zeros_like(z)

    y = torch.zeros(3, dtype=torch.int64)
    z = torch.zeros(3, 1, 1, 1)

    def count(steps, method, **guidance):
        asked.clear()
        ode_sample(guided_velocity(Counter(Oracle(None)), y, **guidance), z, steps, method)
        return len(asked), sum(size == 6 for _, size in asked)

    assert count(50, "heun", cfg=2.9, interval=(0.1, 1.0)) == (99, 88)
    assert count(50, "heun", cfg=2.9, interval=(0.0, 1.0)) == (99, 99)
    assert count(50, "heun", cfg=1.0, interval=(0.0, 1.0)) == (99, 0)
    assert count(50, "euler", cfg=2.9, interval=(0.1, 1.0)) == (50, 44)
    assert count(1, "heun", cfg=2.0, interval=(0.0, 1.0)) == (1, 1)


def test_guidance_one_is_conditional_and_zero_is_unconditional():
    denoiser = Denoiser(awake(tiny_net())).eval()
    z, y, _, _ = rows(3)
    plain, nobody = denoiser.velocity(z, 0.5, y), denoiser.velocity(z, 0.5, torch.full_like(y, 5))
    torch.testing.assert_close(guided_velocity(denoiser, y, 1.0)(z, 0.5), plain)
    torch.testing.assert_close(guided_velocity(denoiser, y, 0.0)(z, 0.5), nobody)
    torch.testing.assert_close(
        guided_velocity(denoiser, y, 3.0)(z, 0.5), nobody + 3 * (plain - nobody), atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(
        guided_velocity(denoiser, y, 3.0)(z, 0.1), denoiser.velocity(z, 0.1, y)
    )  # 0.1 < t, strictly
    assert (plain - nobody).abs().max() > 1e-3


def test_pictures_depend_on_seed_and_index_alone():
    denoiser, vae, classes = Denoiser(awake(tiny_net())).eval(), load_vae("pixels"), [0, 3, 1]
    together = generate(denoiser, vae, range(7), classes, seed=5, cfg=2.0, steps=6)
    alone = torch.cat([generate(denoiser, vae, [i], classes, seed=5, cfg=2.0, steps=6) for i in range(7)])
    apart = (together.int() - alone.int()).abs()
    assert apart.max() <= 1 and (apart > 0).float().mean() < 0.01
    other = generate(denoiser, vae, range(7), classes, seed=6, cfg=2.0, steps=6)
    assert (other != together).float().mean() > 0.5
    noise = image_noise(5, [3, 2**40], (3, 8, 8))
    assert torch.equal(noise[0], image_noise(5, [3], (3, 8, 8))[0]) and noise.dtype == torch.float32
    assert abs(image_noise(0, range(100), (3, 8, 8)).std().item() - 1) < 0.02


def save_tiny(path, net=None, **settings):
    net = net or awake(tiny_net())
    averages = [awake(tiny_net(), seed=1), awake(tiny_net(), seed=2)]
    base = dict(
        target="x",
        loss="v",
        P_mean=-0.8,
        P_std=0.8,
        t_eps=0.05,
        label_drop=0.1,
        input_size=8,
        step=100,
        ema=[0.9, 0.99],
        vae={"kind": "pixels", "id": "pixels"},
        hint=None,
        size=8,
        class_names=list("abcde"),
        cfg=1.5,
        interval=[0.1, 1.0],
        model="T",
        patch=2,
    )
    save_checkpoint(
        path, tensors_of(net, averages) | {f"model.{k}": v for k, v in net.state_dict().items()}, base | settings
    )
    return net, averages


@pytest.mark.parametrize("weights, which", [("model", 0), ("ema", 1), ("ema2", 2)])
def test_checkpoint_round_trip(tmp_path, weights, which):
    net, averages = save_tiny(tmp_path / "a.safetensors", target="eps", t_eps=0.02)
    denoiser = load_denoiser(tmp_path / "a.safetensors", weights)
    z, y, t, _ = rows(3)
    torch.testing.assert_close(denoiser.net(z, t, y), [net, *averages][which](z, t, y))
    assert (denoiser.target, denoiser.t_eps, denoiser.training) == ("eps", 0.02, False)
    assert denoiser.net.num_classes == 5 and denoiser.settings["class_names"] == list("abcde")


def test_checkpoint_files_are_atomic_and_keep_the_one_before(tmp_path, monkeypatch):
    path, previous = tmp_path / "last.safetensors", tmp_path / "previous.safetensors"
    for k in range(3):
        save_checkpoint(path, {"model.a": torch.full((2,), float(k))}, {"step": k}, keep=previous)
    assert read_checkpoint(path)[1] == {"step": 2} and read_checkpoint(previous)[1] == {"step": 1}

    def full_disk(tensors, where, header):
        pathlib.Path(where).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lib.checkpoint.save_file", full_disk)
    with pytest.raises(RunFailed, match="No space left"):
        save_checkpoint(path, {"model.a": torch.zeros(2)}, {"step": 3}, keep=previous)
    assert read_checkpoint(path)[1] == {"step": 2} and sorted(os.listdir(tmp_path)) == [
        "last.safetensors",
        "previous.safetensors",
    ]


def release_layout(net, **args):
    weights = {f"net.{name}": value for name, value in net.state_dict().items()} | {
        "net.mask_token": torch.zeros(1, 1, 4)
    }
    return {
        "model": {k: v.bfloat16() for k, v in weights.items()},
        "model_ema1": weights,
        "model_ema2": {k: v * 0.5 for k, v in weights.items()},
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4}]},
        "epoch": 3,
        "args": argparse.Namespace(img_size=128, **args),
    }


def test_published_checkpoint_loads_as_it_is(tmp_path):
    net = awake(tiny_net(bottleneck=0))
    path = tmp_path / "checkpoint-last.pth"
    torch.save(release_layout(net, target="v"), path)
    z, y, t, _ = rows(3)
    denoiser = load_denoiser(path, "ema")
    assert denoiser.target == "v" and denoiser.net.input_size == 8 and denoiser.net.num_classes == 5
    for name, value in net.state_dict().items():
        torch.testing.assert_close(denoiser.net.state_dict()[name], value)
    torch.testing.assert_close(denoiser.net(z, t, y), net(z, t, y))
    half = load_denoiser(path, "model")
    assert all(p.dtype == torch.float32 for p in half.parameters())
    torch.testing.assert_close(
        half.net.state_dict()["blocks.0.attn.qkv.weight"], net.blocks[0].attn.qkv.weight.bfloat16().float()
    )
    assert torch.equal(load_denoiser(path, "ema2").net.x_embedder.proj.weight, net.x_embedder.proj.weight * 0.5)
    torch.save(release_layout(net), path)
    with pytest.raises(BadInput, match="--target"):
        load_denoiser(path)
    assert load_denoiser(path, target="x").target == "x"
    assert load_denoiser(path, target="x").settings["vae"]["id"] == vae.FLUX2_ID  # no warning of another codec


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_plain_state_dict_loads(tmp_path, kind):
    net, path = awake(tiny_net()), tmp_path / f"plain.{kind}"
    torch.save(net.state_dict(), path) if kind == "pth" else save_file(net.state_dict(), path)
    z, y, t, _ = rows(3)
    torch.testing.assert_close(load_denoiser(path, target="x", input_size=8).net(z, t, y), net(z, t, y))


def test_flags_that_contradict_a_checkpoint_are_refused(tmp_path):
    save_tiny(tmp_path / "a.safetensors")
    assert load_denoiser(tmp_path / "a.safetensors", target="x", input_size=8).net.input_size == 8
    for wrong in ({"target": "v"}, {"input_size": 16}):
        with pytest.raises(BadInput, match=f"the {next(iter(wrong))} of that network is"):
            load_denoiser(tmp_path / "a.safetensors", **wrong)


def test_malicious_pickle_is_refused_without_running(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    with open(tmp_path / "evil.pth", "wb") as file:
        pickle.dump({"model": Evil()}, file)
    torch.save({"model": {}, "args": Evil()}, tmp_path / "evil2.pth")
    for name in ("evil.pth", "evil2.pth"):
        with pytest.raises(BadInput):
            load_denoiser(tmp_path / name, target="x")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda s: s.pop("blocks.1.mlp.w3.bias"), "blocks.1.mlp.w3.bias is missing"),
        (lambda s: s.update({"pos_embed": torch.zeros(3)}), "pos_embed is unknown"),
        (
            lambda s: s.update({"blocks.0.norm1.weight": torch.zeros(3)}),
            "blocks.0.norm1.weight does not have the shape",
        ),
        (lambda s: s.clear(), "not the weights of a JLT"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(tmp_path, change, said):
    state = dict(tiny_net().state_dict())
    change(state)
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(BadInput, match=said):
        load_denoiser(tmp_path / "a.pth", target="x", input_size=8)


def test_sample_program_grid_folder_and_npz_agree(tmp_path, monkeypatch, capsys):
    save_tiny(tmp_path / "a.safetensors")
    monkeypatch.chdir(tmp_path)
    common = ["--ckpt", "a.safetensors", "--steps", "3", "--n", "7", "--batch", "3"]
    assert sample.main([*common, "--out", "grid.png", "--classes", "a", "3"]) == 0
    assert Image.open("grid.png").size == (2 * 100 + 4, 4 * 100 + 40)
    assert "x-prediction" in capsys.readouterr().out
    assert sample.main([*common, "--out", "folder"]) == 0 and sample.main([*common, "--out", "all.NPZ"]) == 0
    assert sorted(os.listdir(".")) == ["a.safetensors", "all.NPZ", "folder", "grid.png"]
    assert sample.main([*common, "--out", "folder", "--seed", "1"]) == 2 and "other settings" in capsys.readouterr().err
    os.remove("folder/000004.png")
    assert sample.main([*common, "--out", "folder"]) == 0
    with np.load("all.NPZ") as file:  # what the guided-diffusion evaluator asks of a file
        assert file.files == ["arr_0"]
        pixels = file["arr_0"]
    assert pixels.dtype == np.uint8 and pixels.shape == (7, 8, 8, 3)
    for i in range(7):
        assert np.array_equal(np.asarray(Image.open(f"folder/{i:06d}.png")), pixels[i])
    wanted = generate(load_denoiser("a.safetensors"), load_vae("pixels"), range(7), list(range(5)), cfg=1.5, steps=3)
    assert np.abs(wanted.permute(0, 2, 3, 1).numpy().astype(int) - pixels).max() <= 1


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile wants a C++ compiler on a CPU")
@pytest.mark.parametrize("works", [True, False])
def test_compiled_network_draws_and_learns_what_the_plain_one_does(works):
    def run(compiled):
        torch.manual_seed(0)
        net, y = awake(tiny_net(depth=1)), torch.tensor([1, 2, 3])
        names, denoiser = list(net.state_dict()), Denoiser(net)
        if compiled:
            sample.compile_net(net, torch.device("cpu"))
        denoiser(noise, y, torch.tensor([0.1, 0.5, 0.9]), noise.flip(0), y == 1).backward()
        with torch.inference_mode():
            z = ode_sample(guided_velocity(denoiser.eval(), y, 1.5, (0.1, 1.0)), noise, 3)
        assert list(net.state_dict()) == names
        return z, *(p.grad for p in net.parameters())

    noise = image_noise(0, range(3), (3, 8, 8))
    torch.compiler.reset()
    count = torch._dynamo.utils.counters
    count.clear()
    kept = torch._dynamo.config.suppress_errors
    broken = {"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}
    try:
        with torch._inductor.config.patch({} if works else broken):
            compiled = run(True)
        assert count["aot_autograd"]["total"] and bool(count["aot_autograd"]["ok"]) == works  # compiled, or only tried
    finally:
        torch._dynamo.config.suppress_errors = kept
        torch.compiler.reset()
    for ours, plain in zip(compiled, run(False), strict=True):
        assert (ours - plain).abs().max() < 1e-4


def test_newest_checkpoint_is_the_newest_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for age, name in enumerate(("b/last", "b/ema", "c/last", "a/ema", "a/previous")):
        path = pathlib.Path(f"out/{name}.safetensors")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * (10 - age))
        os.utime(path, (age, age))
    assert sample.newest_checkpoint() == pathlib.Path("out/a/ema.safetensors")
    assert sample.newest_checkpoint("model") == pathlib.Path("out/a/previous.safetensors")


@pytest.mark.parametrize(
    "flags, said",
    [
        ([], "python train.py --demo"),
        (["--ckpt", "none.safetensors"], "no such checkpoint"),
        (["--ckpt", "text.safetensors"], "not a whole"),
        (["--ckpt", "cut.safetensors"], "not a whole"),
        (["--ckpt", "text.pth"], "not a checkpoint of plain tensors"),
        (["--ckpt", "."], "no such checkpoint file"),
        (["--ckpt", "a.safetensors", "--classes", "zebra"], "class 'zebra'"),
        (["--ckpt", "a.safetensors", "--classes", "5"], "0 to 4"),
        (["--ckpt", "a.safetensors", "--cfg", "nan"], "--cfg"),
        (["--ckpt", "a.safetensors", "--cfg", "x"], "invalid float"),
        (["--ckpt", "a.safetensors", "--steps", "0"], "1 or more"),
        (["--ckpt", "a.safetensors", "--seed", "-1"], "0 or more"),
        (["--ckpt", "a.safetensors", "--interval", "0.9,0.1"], "LOW,HIGH"),
        (["--ckpt", "a.safetensors", "--interval", "1"], "--interval"),
        (["--ckpt", "a.safetensors", "--vae", "nowhere"], "nowhere"),
        (["--ckpt", "a.safetensors", "--out", "no/such/a.png"], "folder"),
        (["--ckpt", "only.safetensors", "--weights", "ema2"], "--weights"),
        (["--ckpt", "eps.safetensors", "--t-eps", "0"], "--t-eps 0"),
        (["--ckpt", "odd.safetensors"], "make no sense"),
        (["--frobnicate"], "--frobnicate"),
    ],
)
def test_sample_program_refuses_in_one_line(tmp_path, monkeypatch, capsys, flags, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    save_tiny("a.safetensors")
    save_tiny("eps.safetensors", target="eps")
    save_tiny("odd.safetensors", target="y")
    save_checkpoint(
        "only.safetensors", tensors_of(tiny_net(), [tiny_net()]), {"target": "x", "input_size": 8, "step": 1}
    )
    pathlib.Path("text.safetensors").write_text("hello")
    pathlib.Path("text.pth").write_text("hello")
    pathlib.Path("cut.safetensors").write_bytes(pathlib.Path("a.safetensors").read_bytes()[:5000])
    before = sorted(os.listdir("."))
    assert sample.main(flags) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and "Traceback" not in error
    assert sorted(os.listdir(".")) == before


# ---------------------------------------------------------------------------------------------------------------------
# train.py: what is trained on, the loop, a run that cannot be lost


def small_cache(folder, n=40, size=8, classes=4, mirrored=True, seed=0):
    """A pixels cache of random pictures, written by vae.py's own writer."""
    pictures, rng = folder / "pictures", np.random.default_rng(seed)
    for i in range(n):
        path = pictures / f"class{i % classes}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(path)
    flags = ["--images", str(pictures), "--out", str(folder / "cache"), "--vae", "pixels", "--size", str(size)]
    assert vae.main(flags + ["--no-flip"] * (not mirrored)) == 0
    return folder / "cache"


def flags(cache, out, *more, steps=6):
    """A run of seconds: the T model on 4 tokens."""
    return [
        "--latents",
        str(cache),
        "--model",
        "T",
        "--patch",
        "4",
        "--steps",
        str(steps),
        "--batch",
        "8",
        "--lr",
        "1e-3",
        "--warmup",
        "0.4",
        "--ema",
        "0.9",
        "0.5",
        "--out",
        str(out),
        "--save-every",
        "2",
        "--log-every",
        "1",
        "--sample-every",
        "4",
        *map(str, more),
    ]


def log_rows(out):
    with open(out / "log.csv", newline="") as file:
        return [[row[name] for name in ("step", "loss", "lr", "grad_norm", "fit")] for row in csv.DictReader(file)]


def same_run(a, b, columns=5):
    left, right = read_checkpoint(a / "last.safetensors"), read_checkpoint(b / "last.safetensors")
    assert left[0].keys() == right[0].keys()
    assert [row[:columns] for row in log_rows(a)] == [row[:columns] for row in log_rows(b)]
    for name in left[0]:
        assert torch.equal(left[0][name], right[0][name]), name
    assert left[1] == right[1]


def torchrun(ranks, *command, **env):
    """Run a program of ours on several gloo ranks; returns the finished process."""
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={ranks}",
            *map(str, command),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | env,
    )


def test_stream_shows_every_image_once_an_epoch():
    order = train.stream(3, np.arange(30), 10)
    assert all(sorted(order[k : k + 10]) == list(range(10)) for k in (0, 10, 20)) and list(order[:10]) != list(
        order[10:20]
    )
    assert np.array_equal(train.stream(3, np.arange(7, 23), 10), order[7:23])  # however it is cut
    assert set(train.stream(0, np.arange(5), 1)) == {0}


def test_draws_and_noise_follow_from_seed_step_and_place():
    whole = train.step_noise(1, 2, 0, 50, (3, 2, 2), "cpu")
    for first, count in ((0, 7), (7, 9), (15, 2), (16, 34), (49, 1)):
        assert torch.equal(train.step_noise(1, 2, first, count, (3, 2, 2), "cpu"), whole[first : first + count])
    assert not torch.equal(train.step_noise(1, 3, 0, 50, (3, 2, 2), "cpu"), whole)
    many = train.step_noise(0, 0, 0, 4096, (4, 4), "cpu")
    assert abs(many.mean()) < 0.02 and abs(many.std() - 1) < 0.02 and abs((many[1:] * many[:-1]).mean()) < 0.02
    normals, hide, flip = train.draws(0, 5, 10_000)
    assert (
        abs(normals.std() - 1) < 0.03
        and abs((hide < 0.1).mean() - 0.1) < 0.01
        and abs((flip < 0.5).mean() - 0.5) < 0.02
    )


def test_learning_rate_schedule():
    lr = [train.learning_rate(s, 100, 2.0, 10, 0.3) for s in range(100)]
    assert lr[0] == pytest.approx(0.2) and lr[4] == pytest.approx(1.0) and lr[9] == lr[50] == lr[70] == 2.0
    assert lr[85] == pytest.approx(1.0) and lr[99] == pytest.approx(2 / 30)
    assert [train.learning_rate(s, 10, 2.0, 0, 0.0) for s in (0, 9)] == [2.0, 2.0]


@pytest.mark.parametrize("decay", [0.0, 0.9, 1.0])
def test_ema_is_the_formula(decay):
    a, b = tiny_net(), awake(tiny_net())
    expected = [decay * p + (1 - decay) * q for p, q in zip(a.parameters(), b.parameters())]
    train.update_ema(a, b, decay)
    for p, wanted, q in zip(a.parameters(), expected, b.parameters()):
        torch.testing.assert_close(p, wanted)
        assert decay != 0 or torch.equal(p, q)


def test_a_step_is_adamw_clip_and_ema_written_plainly(tmp_path):
    """Three steps of train.py, with accumulation, against the same recipe in a few lines of plain PyTorch."""
    cache = small_cache(tmp_path)
    assert train.main(flags(cache, tmp_path / "run", "--micro", 4, "--decay", 0.5, steps=3)) == 0
    data = LatentDataset(cache)
    torch.manual_seed(0)
    denoiser = Denoiser(JLT(8, 4, 3, num_classes=4, **SIZES["T"]))
    averages = [{k: v.clone() for k, v in denoiser.net.state_dict().items()} for _ in range(2)]
    optimizer = torch.optim.AdamW(denoiser.net.parameters(), betas=(0.9, 0.95), weight_decay=0.0, fused=False)
    losses, norms = [], []
    for step in range(3):
        order = np.random.default_rng([0, 0, 0]).permutation(40)[step * 8 : step * 8 + 8]
        rng = np.random.default_rng([0, 1, step])
        t = torch.sigmoid(-0.8 + 0.8 * torch.from_numpy(rng.standard_normal(8, dtype=np.float32)))
        hide, flip = torch.from_numpy(rng.random(8) < 0.1), rng.random(8) < 0.5
        x, y = data.batch(order, flip)
        loss = denoiser(x.float(), y, t, train.step_noise(0, step, 0, 8, (3, 8, 8), "cpu"), hide)
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, (step + 1) / 2, (3 - step) / 1.5)
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(denoiser.net.parameters(), 1.0).item())
        optimizer.step()
        losses.append(loss.item())
        for average, decay in zip(averages, (0.9, 0.5)):
            for k, v in denoiser.net.state_dict().items():
                average[k] = decay * average[k] + (1 - decay) * v
    tensors = read_checkpoint(tmp_path / "run" / "last.safetensors")[0]
    logged = np.array([row[1:4] for row in log_rows(tmp_path / "run")], dtype=float)  # loss, lr, norm of the gradient
    np.testing.assert_allclose(logged[:, 0], losses, rtol=1e-4)
    np.testing.assert_allclose(logged[:, 2], norms, rtol=1e-3)  # AdamW and the clipping hardly see its scale
    for group, wanted in {"model": denoiser.net.state_dict(), "ema": averages[0], "ema2": averages[1]}.items():
        for name, value in wanted.items():
            torch.testing.assert_close(tensors[f"{group}.{name}"], value, atol=1e-5, rtol=1e-4)


def test_a_single_batch_can_be_overfitted(tmp_path):
    cache = small_cache(tmp_path, n=4)
    out = tmp_path / "run"
    more = ["--batch", 4, "--lr", 3e-3, "--ema", 0.9, "--sample-every", 150, "--log-every", 150, "--save-every", 150]
    assert train.main(flags(cache, out, *more, steps=150)) == 0
    fit = float(log_rows(out)[-1][4])
    x, _ = LatentDataset(cache).batch(np.arange(4), False)
    assert fit < 0.5 * (x.float().var() + 1)  # a network that knows nothing of x pays var(x) + 1 a number


def test_run_leaves_what_it_promises(tmp_path, capsys):
    cache = small_cache(tmp_path)
    out = tmp_path / "run"
    assert train.main(flags(cache, out, "--val", cache, "--keep-every", 3)) == 0
    text = capsys.readouterr().out
    assert "warm-up 2 steps" in text and "done" in text
    assert sorted(os.listdir(out)) == [
        ".lock",
        "ema-step0000003.safetensors",
        "ema-step0000006.safetensors",
        "ema.safetensors",
        "last.safetensors",
        "log.csv",
        "previous.safetensors",
        "samples",
    ]
    assert sorted(os.listdir(out / "samples")) == ["step0000004.png", "step0000006.png"]
    with open(out / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert (
        [row["step"] for row in rows] == list("123456")
        and rows[3]["fit"] == rows[3]["val"] != ""
        and rows[0]["fit"] == ""
    )
    full, light = read_checkpoint(out / "last.safetensors"), read_checkpoint(out / "ema.safetensors")
    assert light[1] == full[1] and all(torch.equal(v, full[0][k]) for k, v in light[0].items())
    assert {k.split(".")[0] for k in light[0]} == {"ema", "ema2"} and full[1]["step"] == 6
    assert read_checkpoint(out / "previous.safetensors")[1]["step"] == 4
    assert load_denoiser(out / "ema.safetensors").settings["class_names"] == [f"class{k}" for k in range(4)]
    before = (out / "last.safetensors").stat().st_mtime_ns
    assert train.main(flags(cache, out)) == 0 and "finished" in capsys.readouterr().out
    assert (out / "last.safetensors").stat().st_mtime_ns == before


def test_resumed_run_is_the_uninterrupted_run_bit_for_bit(tmp_path, monkeypatch):
    cache = small_cache(tmp_path)
    assert train.main(flags(cache, tmp_path / "a")) == 0

    class Stop(train.StopSignal):  # a signal that arrives while step 3 is under way
        number = property(lambda self: self.steps and 15 if next(self.count) >= 3 else 0, lambda self, value: None)
        steps, count = True, iter(range(100))

    monkeypatch.setattr(train, "StopSignal", Stop)
    assert train.main(flags(cache, tmp_path / "b")) == 128 + 15
    step = read_checkpoint(tmp_path / "b" / "last.safetensors")[1]["step"]
    assert 0 < step < 6
    monkeypatch.undo()
    assert train.main(flags(cache, tmp_path / "b", "--micro", 100, "--save-every", 5)) == 0
    same_run(tmp_path / "a", tmp_path / "b")


def test_damaged_and_missing_checkpoints(tmp_path, capsys):
    cache = small_cache(tmp_path)
    a, b = tmp_path / "a", tmp_path / "b"
    assert train.main(flags(cache, a)) == 0 and train.main(flags(cache, b)) == 0
    whole = (b / "last.safetensors").read_bytes()
    (b / "last.safetensors").write_bytes(whole[: len(whole) // 2])
    assert train.main(flags(cache, b)) == 0
    assert "WARNING" in capsys.readouterr().out
    same_run(a, b)
    assert (b / "last.damaged").exists()
    (b / "last.safetensors").unlink()  # as if killed between the two renames
    assert train.main(flags(cache, b)) == 0
    same_run(a, b)
    for name in ("last", "previous"):
        (b / f"{name}.safetensors").write_bytes(b"rubbish")
    assert train.main(flags(cache, b)) == 2 and "damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        ["--target", "v"],
        ["--loss", "x"],
        ["--seed", 1],
        ["--batch", 4],
        ["--lr", 2e-3],
        ["--ema", 0.5],
        ["--patch", 2],
        ["--warmup", 1],
        ["--decay", 0.1],
    ],
)
def test_another_run_is_refused_by_name(tmp_path_factory, change, capsys, finished):
    cache, out = finished
    assert train.main(flags(cache, out, *change)) == 2
    error = capsys.readouterr().err
    assert f"another {change[0][2:]} (" in error and error.count("\n") == 1


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    cache = small_cache(folder)
    assert train.main(flags(cache, folder / "run")) == 0
    return cache, folder / "run"


def test_more_steps_may_be_asked_for_until_the_decay_begins(tmp_path, capsys):
    cache = small_cache(tmp_path)
    assert train.main(flags(cache, tmp_path / "a", steps=4)) == 0
    assert (
        train.main(flags(cache, tmp_path / "a", steps=6)) == 0
        and train.main(flags(cache, tmp_path / "b", steps=6)) == 0
    )
    same_run(tmp_path / "a", tmp_path / "b")
    assert train.main(flags(cache, tmp_path / "c", "--decay", 0.5, steps=4)) == 0
    assert (
        train.main(flags(cache, tmp_path / "c", "--decay", 0.5, steps=6)) == 2
        and "another steps" in capsys.readouterr().err
    )


def test_a_step_that_is_not_finite_is_skipped_and_many_stop_the_run(tmp_path, monkeypatch, capsys):
    cache = small_cache(tmp_path)
    real = train.step_noise

    def poisoned(seed, step, *rest):
        return real(seed, step, *rest) * (float("nan") if step in bad else 1)

    monkeypatch.setattr(train, "step_noise", poisoned)
    bad = {2}
    assert train.main(flags(cache, tmp_path / "a", steps=2)) == 0
    two = read_checkpoint(tmp_path / "a" / "last.safetensors")[0]
    assert train.main(flags(cache, tmp_path / "a", steps=3)) == 0
    three, settings = read_checkpoint(tmp_path / "a" / "last.safetensors")
    assert settings["skipped"] == 1
    assert all(torch.equal(two[name], three[name]) for name in two if name.startswith(("model.", "optimizer.")))
    bad = set(range(3, 30))
    assert train.main(flags(cache, tmp_path / "a", steps=20)) == 1
    error = capsys.readouterr().err
    assert "not finite 5 times" in error and str(tmp_path / "a") in error
    kept = read_checkpoint(tmp_path / "a" / "last.safetensors")[0]
    assert all(torch.equal(two[name], kept[name]) for name in two if name.startswith("model."))


def test_two_ranks_train_as_one(tmp_path):
    cache = small_cache(tmp_path)
    assert train.main(flags(cache, tmp_path / "one")) == 0
    done = torchrun(2, "train.py", *flags(cache, tmp_path / "two", "--micro", 2))
    assert done.returncode == 0, done.stderr
    one, two = (np.array([row[1:4] for row in log_rows(tmp_path / name)], dtype=float) for name in ("one", "two"))
    np.testing.assert_allclose(one, two, rtol=1e-3)  # loss, lr, norm of the gradient
    a, b = (read_checkpoint(tmp_path / name / "last.safetensors")[0] for name in ("one", "two"))
    assert all((a[name] - b[name]).abs().max() <= 1e-2 * 1e-3 for name in a if name.startswith("model."))


def test_ranks_that_would_continue_from_different_steps_do_not(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from lib.checkpoint import agreed\nfrom lib.run import meet, program, rank\n\n\n@program\ndef main(argv):\n"
        "    meet()\n    print(f'together {agreed(7)}')\n    agreed(rank())\n\n\nraise SystemExit(main())\n"
    )
    done = torchrun(2, script, PYTHONPATH=str(ROOT))
    assert done.returncode == 1 and done.stdout.count("together 7") == 2
    assert "different steps (0 to 1)" in done.stderr


def test_killed_runs_continue_bit_for_bit(tmp_path):
    """The short form of `python -m bench.soak`: SIGKILL at random moments, also while saving, then the same command."""
    cache = small_cache(tmp_path)
    command = [sys.executable, "train.py", *flags(cache, tmp_path / "b", "--save-every", 1, steps=16)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(
        [sys.executable, "train.py", *flags(cache, tmp_path / "a", "--save-every", 1, steps=16)],
        cwd=ROOT,
        env=env,
        check=True,
    )
    rng = np.random.default_rng(0)
    for _ in range(3):
        run = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for line in run.stdout:
            if line.startswith("step "):
                time.sleep(rng.random() * 0.3)
                break
        run.kill()
        run.wait()
    subprocess.run(command, cwd=ROOT, env=env, check=True)
    same_run(tmp_path / "a", tmp_path / "b", 4)  # an error by time may be missing: it is measured after saving


@pytest.mark.skipif(not shutil.which("nvidia-smi"), reason="no GPU")
def test_on_a_gpu(tmp_path, device="cuda, bf16"):
    """Train, continue, draw and decode there."""
    env = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    env |= {} if VISIBLE is None else {"CUDA_VISIBLE_DEVICES": VISIBLE}

    def run(*command):
        done = subprocess.run(
            [sys.executable, *map(str, command)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    cache, out = small_cache(tmp_path), tmp_path / "run"
    command = ["train.py", *flags(cache, out, "--val", cache)]
    assert f" x {device})" in run(*command)
    first = [row[1:4] for row in log_rows(out)]  # loss, lr, norm of the gradient
    (out / "last.safetensors").unlink()
    assert "at step 4" in run(*command)
    again = [row[1:4] for row in log_rows(out)]
    np.testing.assert_allclose(np.array(again, dtype=float), np.array(first, dtype=float), rtol=0.02)
    run("sample.py", "--ckpt", out / "ema.safetensors", "--cfg", "1.5", "--out", tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").size[0] > 300


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_saves_and_says_so(name, tmp_path, monkeypatch, capsys, finished):
    """Sent in the middle of step 3, twice, as schedulers do, and SIGTERM after it, as torchrun does. The same command
    continues, bit for bit."""
    cache, run = finished
    number, real, before = (
        getattr(signal, name),
        train.step_noise,
        {n: signal.getsignal(n) for n in signal.valid_signals()},
    )

    def noise(seed, step, *rest):
        for sent in (number, number, signal.SIGTERM) if step == 2 else ():
            os.kill(os.getpid(), sent)
        return real(seed, step, *rest)

    monkeypatch.setattr(train, "step_noise", noise)
    try:
        assert train.main(flags(cache, tmp_path / "b", "--save-every", 100)) == 128 + number
        assert "stopped by a signal at step 3, saved" in capsys.readouterr().out
        assert read_checkpoint(tmp_path / "b" / "last.safetensors")[1]["step"] == 3
        monkeypatch.undo()
        assert train.main(flags(cache, tmp_path / "b")) == 0
        same_run(run, tmp_path / "b")
    finally:
        for other, handler in before.items():
            if handler is not None and other not in (signal.SIGKILL, signal.SIGSTOP):
                signal.signal(other, handler)


def test_two_runs_cannot_share_a_folder(tmp_path):
    code = (
        "import sys, time\nfrom lib.run import lock_folder\nlock = lock_folder(sys.argv[1])\n"
        "print('locked', flush=True)\ntime.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "locked\n"
    with pytest.raises(BadInput, match=f"pid {other.pid}"):
        lock_folder(tmp_path)
    other.kill()
    other.wait()
    lock_folder(tmp_path).close()


def test_fine_tuning_with_another_number_of_classes(tmp_path, finished, capsys):
    cache = small_cache(tmp_path, classes=3)
    start = finished[1] / "ema.safetensors"
    assert train.main(flags(cache, tmp_path / "run", "--init", start, "--lr", 0, steps=1)) == 0
    assert "its 4 classes are not the 3 here" in capsys.readouterr().out
    before, after = (
        load_denoiser(start).net.state_dict(),
        load_denoiser(tmp_path / "run" / "ema.safetensors").net.state_dict(),
    )
    for name, value in before.items():
        assert name.startswith("y_embedder") or torch.equal(value, after[name])
    assert len(after["y_embedder.embedding_table.weight"]) == 4
    assert train.main(flags(cache, tmp_path / "other", "--init", start, "--patch", 2)) == 2
    assert "patch size is 4 there, 2 here" in capsys.readouterr().err
    assert train.main(flags(cache, tmp_path / "other", "--init", start, "--target", "v")) == 2
    assert "--target x" in capsys.readouterr().err and not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "names, kept", [(list("abcde"), True), (None, True), (list("abcdx"), False), (list("edcba"), False)]
)
def test_init_keeps_the_labels_of_the_same_classes_only(tmp_path, names, kept, capsys):
    save_tiny(tmp_path / "a.safetensors")
    saved = load_denoiser(tmp_path / "a.safetensors").net.y_embedder.embedding_table.weight
    net = awake(tiny_net(), seed=5)
    start = sample.load_init(tmp_path / "a.safetensors", net, "x", names).y_embedder.embedding_table.weight
    assert torch.equal(start, saved if kept else net.y_embedder.embedding_table.weight)
    assert ("a new label table" in capsys.readouterr().out) == (not kept)


def test_the_papers_recipe_is_printed_before_it_needs_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for target in TARGETS:
        assert train.main(["--target", target, "--patch", "1"]) == 2
        said = capsys.readouterr()
        for words in (
            "250,000 steps of 1024",
            "lr 0.0002",
            "warm-up 5 epochs",
            "EMA 0.9999",
            "clip 1.0",
            "P_mean/P_std -0.8/0.8",
        ):
            assert words in said.out
        assert "vae.py --images" in said.err and "--demo" in said.err and said.err.count("\n") == 1
    assert os.listdir(".") == []


@pytest.mark.parametrize(
    "bad, said",
    [
        (["--patch", "3"], "does not divide"),
        (["--patch", "0"], "1 or more"),
        (["--batch", "0"], "1 or more"),
        (["--steps", "x"], "invalid int"),
        (["--lr", "nan"], "--lr"),
        (["--lr", "inf"], "--lr"),
        (["--ema", "1.5"], "1 or less"),
        (["--ema", "0.1", "0.2", "0.3"], "at most two"),
        (["--target", "y"], "invalid choice"),
        (["--latents", "nowhere"], "no latents at nowhere"),
        (["--latents", "empty"], "empty"),
        (["--val", "nowhere"], "nowhere"),
        (["--init", "nowhere"], "no such checkpoint"),
        (["--eval-every", "5"], "--ref"),
        (["--eval-every", "5", "--ref", "nowhere.npz"], "nowhere.npz"),
        (["--vae", "nowhere"], "nowhere"),
        (["--seed", "-1"], "0 or more"),
        (["--model", "Q"], "invalid choice"),
        (["--decay", "2"], "1 or less"),
    ],
)
def test_train_refuses_in_one_line(tmp_path, monkeypatch, capsys, finished, bad, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    os.mkdir("empty")
    assert train.main(flags(finished[0], "run", *bad)) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert [name for name in os.listdir(".") if name != "empty"] in ([], ["run"]) and os.listdir(
        "run" if os.path.isdir("run") else "empty"
    ) in ([], [".lock"])


def test_ranks_must_divide_the_batch(monkeypatch, capsys, finished):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert train.main(flags(finished[0], "never")) == 2 and "3 ranks do not divide it" in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["release", "lightningdit"])
def test_foreign_caches_train_as_they_are(tmp_path, capsys, layout):
    g = torch.Generator().manual_seed(0)
    cache = tmp_path / "theirs"
    cache.mkdir()
    raw = torch.randn(24, 6, 4, 4, generator=g) * 2 + 3
    labels = torch.arange(24, dtype=torch.int32) % 3
    normalised = (raw - 3) / 2
    for k in range(2):
        part, stored = slice(12 * k, 12 * k + 12), raw if layout == "lightningdit" else normalised.half()
        save_file(
            {
                "latents": stored[part].clone(),
                "latents_flip": stored[part].flip(-1).clone(),
                "labels": labels[part].clone(),
            },
            cache / f"latents_rank{k:02d}_shard000.safetensors",
        )
    if layout == "lightningdit":
        torch.save(
            {"mean": torch.full((1, 6, 1, 1), 3.0), "std": torch.full((1, 6, 1, 1), 2.0)}, cache / "latents_stats.pt"
        )
    x, y = LatentDataset(cache).batch(np.array([13, 2]), np.array([True, False]))
    torch.testing.assert_close(x.float(), torch.stack([normalised[13].flip(-1), normalised[2]]), atol=5e-3, rtol=1e-3)
    assert y.tolist() == [1, 2]
    assert train.main(flags(cache, tmp_path / "run", steps=2)) == 0
    assert "no pictures" in capsys.readouterr().out
    assert sample.main(["--ckpt", str(tmp_path / "run/ema.safetensors"), "--out", str(tmp_path / "a.png")]) == 2
    assert "--vae" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# fid.py: Inception, statistics, references, the sweep


def fid_covariance(rng, d):
    a = rng.standard_normal((d, d))
    return a @ a.T / d


class FidInception(nn.Module):
    """Stands in for Inception: 16 features, 1008 logits."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(16, 1008)
        generator = torch.Generator().manual_seed(0)
        self.mix = torch.randn(48, 16, generator=generator)
        self.fc.weight.data = torch.randn(1008, 16, generator=generator)

    @torch.inference_mode()
    def forward(self, images):
        assert images.dtype == torch.uint8
        features = F.adaptive_avg_pool2d(images.float() / 255, 4).flatten(1) @ self.mix
        return features, features @ self.fc.weight.T


@pytest.fixture
def fid_small(monkeypatch):
    """fid.py with the small network in place of Inception, and statistics of its width."""
    network = FidInception()
    monkeypatch.setattr(fid, "FEATURES", 16)
    monkeypatch.setattr(fid.Statistics.__init__, "__defaults__", ("cpu", 16, 1008))
    monkeypatch.setattr(fid, "load_inception", lambda path, device: network)
    return network


def fid_folder(folder, n=24, size=8, seed=0):
    rng = np.random.default_rng(seed)
    for i in range(n):
        (folder / str(i % 2)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8)).save(folder / str(i % 2) / f"{i:03d}.png")
    return folder


def fid_ref(path, d=16, **about):
    rng = np.random.default_rng(1)
    write_statistics(path, rng.standard_normal(d), fid_covariance(rng, d), **about)
    return path


def fid_refused(capsys, argv, *words):
    """main(argv) ends with code 2 and one line that holds these words."""
    assert fid.main([str(a) for a in argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error:") and error.count("\n") == 1 and all(word in error for word in words), error


def fid_result(out):
    """(FID, IS) of the printed result."""
    words = next(line for line in out.splitlines() if line.startswith("FID-")).split()
    return float(words[1]), float(words[3])


# Frechet distance, statistics, Inception Score


def test_fid_frechet_closed_forms():
    rng = np.random.default_rng(0)
    a, b, mu = rng.uniform(0, 3, 32), rng.uniform(0, 3, 32), rng.standard_normal(32)
    q, _ = np.linalg.qr(rng.standard_normal((32, 32)))
    expected = (mu**2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    for turn in (np.eye(32), q):
        got = fid.frechet_distance(mu, turn * a @ turn.T, np.zeros(32), turn * b @ turn.T)
        assert type(got) is float and got == pytest.approx(expected, rel=1e-10)
    s1, s2 = fid_covariance(rng, 2), fid_covariance(rng, 2)  # do not commute; a 2x2 root's trace is known
    root = np.sqrt(np.trace(s1 @ s2) + 2 * np.sqrt(np.linalg.det(s1 @ s2)))
    got = fid.frechet_distance(np.zeros(2), torch.from_numpy(s1), np.ones(2), torch.from_numpy(s2))
    assert got == pytest.approx(2 + np.trace(s1 + s2) - 2 * root, rel=1e-10)


def test_fid_equal_statistics_are_at_distance_zero():
    rng = np.random.default_rng(1)
    mu, sigma = rng.standard_normal(200), fid_covariance(rng, 200)
    assert abs(fid.frechet_distance(mu, sigma, mu, sigma)) < 1e-6
    x = rng.standard_normal((50, 200)) * 10  # singular
    assert abs(fid.frechet_distance(mu, np.cov(x.T), mu, np.cov(x.T))) < 1e-3


def test_fid_of_singular_covariances():
    rng = np.random.default_rng(2)
    x, y = rng.standard_normal((20, 64)), rng.standard_normal((30, 64)) * 2 + 1
    xc, yc = x - x.mean(0), y - y.mean(0)
    nuclear = np.linalg.svd(xc @ yc.T, compute_uv=False).sum() / np.sqrt(19 * 29)  # tr((S1 S2)^1/2), never forming S
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(np.cov(x.T)) + np.trace(np.cov(y.T)) - 2 * nuclear
    assert fid.frechet_distance(x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T)) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_fid_statistics_streamed(batch):
    generator = torch.Generator().manual_seed(3)
    x, logits = torch.randn(130, 24, generator=generator) + 5, torch.randn(130, 9, generator=generator) * 3
    statistics = fid.Statistics(130, features=24, classes=9)
    for i in reversed(range(0, 130, batch)):  # any order
        statistics.update(x[i : i + batch], logits[i : i + batch], range(i, min(i + batch, 130)))
    mu, sigma = statistics.mean_and_covariance()
    np.testing.assert_allclose(mu, x.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(sigma, np.cov(x.double().numpy().T), rtol=1e-9, atol=1e-12)
    assert statistics.inception_score() == pytest.approx(fid_direct_score(logits), rel=1e-12)


def fid_direct_score(logits):
    """Inception Score as it is written in papers, of everything at once."""
    x = logits.double().numpy()[np.random.RandomState(2020).permutation(len(logits))]
    p = np.exp(x - x.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    scores = []
    for i in range(10):
        part = p[i * len(p) // 10 : (i + 1) * len(p) // 10]
        scores.append(np.exp((part * (np.log(part) - np.log(part.mean(0)))).sum(1).mean()))
    return np.mean(scores)


@pytest.mark.parametrize("n", [10, 57, 200])
def test_fid_inception_score(n):
    logits = torch.randn(n, 40, generator=torch.Generator().manual_seed(n)) * 4
    assert fid.inception_score(logits) == pytest.approx(fid_direct_score(logits), rel=1e-12)
    assert fid.inception_score(torch.zeros(n, 40)) == pytest.approx(1)


def test_fid_two_ranks_are_one(tmp_path):
    code = f"""
import torch, torch.distributed as dist, fid
dist.init_process_group("gloo", init_method="file://{tmp_path}/meet", rank=int(fid.rank()), world_size=2)
generator = torch.Generator().manual_seed(4)
x, logits = torch.randn(100, 16, generator=generator), torch.randn(100, 8, generator=generator)
statistics = fid.Statistics(100, features=16, classes=8)
for indices in fid.rank_batches(100, 7):
    statistics.update(x[list(indices)], logits[list(indices)], indices)
statistics.all_reduce()
torch.save([*statistics.mean_and_covariance(), statistics.inception_score()], f"{tmp_path}/{{fid.rank()}}.pt")
dist.destroy_process_group()
"""
    root = pathlib.Path(fid.__file__).parent
    ranks = [
        subprocess.Popen([sys.executable, "-c", code], cwd=root, env={**os.environ, "RANK": str(i), "WORLD_SIZE": "2"})
        for i in range(2)
    ]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    generator = torch.Generator().manual_seed(4)
    x, logits = torch.randn(100, 16, generator=generator), torch.randn(100, 8, generator=generator)
    for i in range(2):
        mu, sigma, score = torch.load(tmp_path / f"{i}.pt")
        np.testing.assert_allclose(mu, x.double().mean(0), atol=1e-12)
        np.testing.assert_allclose(sigma, np.cov(x.double().numpy().T), atol=1e-12)
        assert score == pytest.approx(fid_direct_score(logits), rel=1e-12)


# Inception


@pytest.mark.parametrize("height,width", [(1, 1), (5, 32), (299, 299), (310, 640)])
def test_fid_resize_is_tensorflows(height, width):
    x = np.random.default_rng(5).integers(0, 256, (height, width)).astype(np.float64)
    got = lib.inception.resize(torch.from_numpy(x).float()[None, None], 299)[0, 0].numpy()
    for i in range(0, 299, 13):
        for j in range(0, 299, 11):
            r, c = i * height / 299, j * width / 299
            r0, c0 = int(r), int(c)
            r1, c1 = min(r0 + 1, height - 1), min(c0 + 1, width - 1)
            top = x[r0, c0] * (1 - (c - c0)) + x[r0, c1] * (c - c0)
            low = x[r1, c0] * (1 - (c - c0)) + x[r1, c1] * (c - c0)
            assert got[i, j] == pytest.approx(top * (1 - (r - r0)) + low * (r - r0), abs=0.02)


def fid_restated(state, images):
    """The 2015-12-05 network, written out once more from its tensors alone."""

    def conv(x, name, stride=1, pad=0):
        x = F.conv2d(x, state[f"{name}.conv.weight"], None, stride, pad)
        bn = [state[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        return F.relu(F.batch_norm(x, *bn, eps=0.001))

    def chain(x, *steps):
        for step in steps:
            x = conv(x, *step)
        return x

    def pooled(x, block, kind="avg"):
        x = F.max_pool2d(x, 3, 1, 1) if kind == "max" else F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return conv(x, f"{block}.branch_pool")

    one, rows, columns = 1, (3, 0), (0, 3)
    x = (lib.inception.resize(images.float(), 299) - 128) / 128
    x = chain(x, ("Conv2d_1a_3x3", 2), ("Conv2d_2a_3x3",), ("Conv2d_2b_3x3", 1, 1))
    x = chain(F.max_pool2d(x, 3, 2), ("Conv2d_3b_1x1",), ("Conv2d_4a_3x3",))
    x = F.max_pool2d(x, 3, 2)
    for m in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        x = torch.cat(
            [
                conv(x, f"{m}.branch1x1"),
                chain(x, (f"{m}.branch5x5_1",), (f"{m}.branch5x5_2", 1, 2)),
                chain(x, (f"{m}.branch3x3dbl_1",), (f"{m}.branch3x3dbl_2", 1, one), (f"{m}.branch3x3dbl_3", 1, one)),
                pooled(x, m),
            ],
            1,
        )
    m = "Mixed_6a"
    x = torch.cat(
        [
            conv(x, f"{m}.branch3x3", 2),
            chain(x, (f"{m}.branch3x3dbl_1",), (f"{m}.branch3x3dbl_2", 1, one), (f"{m}.branch3x3dbl_3", 2)),
            F.max_pool2d(x, 3, 2),
        ],
        1,
    )
    for m in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        seven = chain(x, (f"{m}.branch7x7_1",), (f"{m}.branch7x7_2", 1, columns), (f"{m}.branch7x7_3", 1, rows))
        double = chain(
            x,
            (f"{m}.branch7x7dbl_1",),
            (f"{m}.branch7x7dbl_2", 1, rows),
            (f"{m}.branch7x7dbl_3", 1, columns),
            (f"{m}.branch7x7dbl_4", 1, rows),
            (f"{m}.branch7x7dbl_5", 1, columns),
        )
        x = torch.cat([conv(x, f"{m}.branch1x1"), seven, double, pooled(x, m)], 1)
    m = "Mixed_7a"
    x = torch.cat(
        [
            chain(x, (f"{m}.branch3x3_1",), (f"{m}.branch3x3_2", 2)),
            chain(
                x,
                (f"{m}.branch7x7x3_1",),
                (f"{m}.branch7x7x3_2", 1, columns),
                (f"{m}.branch7x7x3_3", 1, rows),
                (f"{m}.branch7x7x3_4", 2),
            ),
            F.max_pool2d(x, 3, 2),
        ],
        1,
    )
    for m, kind in (("Mixed_7b", "avg"), ("Mixed_7c", "max")):
        three = conv(x, f"{m}.branch3x3_1")
        double = chain(x, (f"{m}.branch3x3dbl_1",), (f"{m}.branch3x3dbl_2", 1, one))
        x = torch.cat(
            [
                conv(x, f"{m}.branch1x1"),
                conv(three, f"{m}.branch3x3_2a", 1, (0, 1)),
                conv(three, f"{m}.branch3x3_2b", 1, (1, 0)),
                conv(double, f"{m}.branch3x3dbl_3a", 1, (0, 1)),
                conv(double, f"{m}.branch3x3dbl_3b", 1, (1, 0)),
                pooled(x, m, kind),
            ],
            1,
        )
    return x.mean((2, 3))


@pytest.fixture(scope="module")
def fid_inception():
    torch.manual_seed(6)
    inception = lib.inception.Inception().eval().requires_grad_(False)
    for module in inception.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(1, 3)
            module.bias.uniform_(-0.2, 0.4)
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.3, 1)
    return inception


def test_fid_inception_keys(fid_inception):
    state = fid_inception.state_dict()
    assert len(state) == 94 * 6 + 2 and len([name for name in state if name.endswith(".conv.weight")]) == 94
    shapes = {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
        "Conv2d_4a_3x3.bn.running_mean": (192,),
        "Mixed_5b.branch1x1.bn.running_mean": (64,),
        "Mixed_5d.branch_pool.conv.weight": (64, 288, 1, 1),
        "Mixed_6a.branch3x3.conv.weight": (384, 288, 3, 3),
        "Mixed_6c.branch7x7dbl_2.conv.weight": (160, 160, 7, 1),
        "Mixed_6e.branch7x7_2.conv.weight": (192, 192, 1, 7),
        "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3),
        "Mixed_7b.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1),
        "Mixed_7c.branch3x3_2a.bn.num_batches_tracked": (),
        "Mixed_7c.branch_pool.conv.weight": (192, 2048, 1, 1),
        "fc.weight": (1008, 2048),
        "fc.bias": (1008,),
    }
    assert {name: tuple(state[name].shape) for name in shapes} == shapes


def test_fid_inception_forward(fid_inception):
    images = torch.randint(0, 256, (2, 3, 20, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(7))
    fid_inception.fc.bias.fill_(1e6)  # must not be seen
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    with torch.autocast("cpu", torch.bfloat16):
        features, logits = fid_inception(images)
    assert (torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()) == (before[0], "medium")
    torch.set_float32_matmul_precision(before[1])
    expected = fid_restated(fid_inception.state_dict(), images)
    assert features.dtype == logits.dtype == torch.float32 and features.shape == (2, 2048)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    torch.testing.assert_close(logits, features @ fid_inception.fc.weight.T, rtol=1e-4, atol=1e-4)


def test_fid_inception_weights_are_found_and_checked(fid_inception, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def no_network(*args, **more):
        raise OSError("no route")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(BadInput, match="inception-2015-12-05-6726825d.pth into .*checkpoints, or give --inception"):
        fid.load_inception()
    cached = tmp_path / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth"
    torch.save(fid_inception.state_dict(), cached)
    loaded = fid.load_inception()
    assert not loaded.training and torch.equal(loaded.fc.weight, fid_inception.fc.weight)
    whole = cached.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"<html>404</html>"):
        cached.write_bytes(content)
        with pytest.raises(BadInput, match="not Inception's weights"):
            fid.load_inception(cached)
    for wrong in ({"fc.weight": torch.zeros(1)}, torch.zeros(3), {"a": nn.Linear(1, 1)}):
        torch.save(wrong, cached)
        with pytest.raises(BadInput, match="not Inception's weights"):
            fid.load_inception(cached)
    with pytest.raises(BadInput, match="not Inception's weights"):
        fid.load_inception(tmp_path / "nothing.pth")


# References


def test_fid_reference_of_others_and_of_ours(fid_small, tmp_path):
    rng = np.random.default_rng(8)
    mu, sigma = rng.standard_normal(16), fid_covariance(rng, 16)
    np.savez_compressed(tmp_path / "adm.npz", mu=mu, sigma=sigma, mu_s=mu, arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    adm = fid.load_reference(tmp_path / "adm.npz")
    np.testing.assert_allclose(adm.root @ adm.root.T, sigma, atol=1e-12)
    assert str(adm) == f"reference {adm.hash} (size unknown, count unknown, crop unknown)"
    fid.check_size(adm, "256x256")
    write_statistics(tmp_path / "ours.npz", mu, sigma, size="32x32", count=100, crop="center")
    ours = fid.load_reference(tmp_path / "ours.npz")
    assert ours.hash == adm.hash and str(ours).endswith("(size 32x32, count 100, crop center)")
    with pytest.raises(BadInput, match="32x32 images, those to score are 256x256"):
        fid.check_size(ours, "256x256")
    fid.check_size(ours, "256x256", force=True)


def fid_npy(array, shape=None, descr=None):
    """An npy file whose header claims what is asked."""
    file = io.BytesIO()
    header = {"shape": shape or array.shape, "fortran_order": False, "descr": descr or array.dtype.str}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + array.tobytes()


def fid_zip(path, **members):
    with zipfile.ZipFile(path, "w") as file:
        for name, data in members.items():
            file.writestr(f"{name}.npy", data)
    return path


def test_fid_hostile_references(fid_small, tmp_path, capsys):
    path, rng, images = tmp_path / "ref.npz", np.random.default_rng(9), fid_folder(tmp_path / "images")
    mu, sigma = rng.standard_normal(16), fid_covariance(rng, 16)

    def refused(*words):
        fid_refused(capsys, ["--images", images, "--ref", path], "ref.npz", *words)

    refused("No such file")
    for content in (b"", b"\x00" * 999, b"PK\x03\x04" + b"\xff" * 99):
        path.write_bytes(content)
        refused("not a whole npz")
    np.savez(path, mu=mu, sigma=sigma)
    whole = path.read_bytes()
    path.write_bytes(whole[:-300])
    refused("not a whole npz")
    path.write_bytes(whole[:900] + bytes([whole[900] ^ 1]) + whole[901:])  # the zip's own checksum
    refused()
    for arrays, word in (
        (dict(mu=mu), "sigma"),
        (dict(mu=mu[:8], sigma=sigma), "expected"),
        (dict(mu=mu, sigma=mu), "expected"),
        (dict(mu=mu * np.nan, sigma=sigma), "not finite"),
        (dict(mu=mu, sigma=sigma * np.inf), "not finite"),
        (dict(mu=mu.astype(complex), sigma=sigma), "expected floats"),
        (dict(mu=mu, sigma=sigma + np.triu(sigma)), "no covariance"),
        (dict(mu=mu, sigma=-sigma), "no covariance"),
        (dict(mu=np.array([open] * 16), sigma=sigma), "objects"),
        (dict(mu=mu, sigma=sigma, meta="[1]"), "meta"),
        (dict(mu=mu, sigma=sigma, meta="{"), "npz"),
        (dict(mu=mu, sigma=sigma, meta=json.dumps({"size": "\x1b[2J"})), "meta"),
        (dict(mu=mu, sigma=sigma, meta=json.dumps({"hash": "0"})), "make the file again"),
    ):
        np.savez(path, **arrays)
        refused(word)
    for lie in (
        dict(shape=(2**40,)),
        dict(shape=(2**31, 2**31)),
        dict(shape=(-16,)),
        dict(descr="<f4"),
        dict(shape=(17,)),
    ):
        fid_zip(path, mu=fid_npy(mu, **lie), sigma=fid_npy(sigma))
        refused("does not fit")
    fid_zip(path, mu=b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + b" " * 99, sigma=fid_npy(sigma))
    refused("npy format")
    for header in (b"no npy", b"\x93NUMPY\x01\x00\x09\x00{'a': ((\n", b"\x93NUMPY\x01\x00\x03\x00 \x00\n"):
        fid_zip(path, mu=header, sigma=fid_npy(sigma))
        refused()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as file:
        file.writestr("mu.npy", fid_npy(mu))
    refused("compressed in a way")


# Images


def test_fid_folder_npz_and_batches_agree(fid_small, tmp_path, capsys):
    folder = fid_folder(tmp_path / "images", 40)
    paths = sorted(folder.rglob("*.png"))
    array = np.stack([np.asarray(Image.open(p)) for p in paths])
    np.savez(tmp_path / "plain.npz", arr_0=array)
    np.savez_compressed(tmp_path / "packed.npz", arr_0=array)
    ref, got = fid_ref(tmp_path / "ref.npz"), []
    for source in (["--images", folder], ["--npz", tmp_path / "plain.npz"], ["--npz", tmp_path / "packed.npz"]):
        for batch in (1, 7, 64):
            assert fid.main([str(a) for a in (*source, "--ref", ref, "--batch", batch)]) == 0
            out = capsys.readouterr().out
            assert "not comparable with FID-50K" in out
            got.append(fid_result(out))
    features, logits = fid_small(torch.from_numpy(array).permute(0, 3, 1, 2))
    reference = fid.load_reference(ref)
    x = features.double().numpy()
    expected = fid.frechet_distance(x.mean(0), np.cov(x.T), reference.mu, reference.sigma)
    for distance, score in got:
        assert distance == pytest.approx(expected, rel=1e-6) and score == pytest.approx(
            fid_direct_score(logits), rel=1e-6
        )
    some = [image.numpy() for image in image_rows(tmp_path / "packed.npz", [3, 4, 39])]
    np.testing.assert_array_equal(some, array[[3, 4, 39]])
    assert fid.spread("it", 40, 4) == [0, 10, 20, 30]


def test_fid_saves_a_reference_that_it_reads(fid_small, tmp_path, capsys):
    folder, ref = fid_folder(tmp_path / "images", 40), tmp_path / "ref.npz"
    for hidden in (".thumbnails/a.png", ".a.png"):
        (folder / hidden).parent.mkdir(exist_ok=True)
        shutil.copy(folder / "0" / "000.png", folder / hidden)
    assert fid.main(["--images", str(folder), "--save-ref", str(ref), "--size", "6"]) == 0
    digest = capsys.readouterr().out.split()[1]
    assert fid.main(["--images", str(folder), "--ref", str(ref), "--size", "6"]) == 0
    out = capsys.readouterr().out
    assert f"reference {digest} (size 6x6, count 40, crop center)" in out
    assert abs(fid_result(out)[0]) < 1e-3
    fid_refused(capsys, ["--images", folder, "--ref", ref], "6x6", "8x8")
    assert fid.main(["--images", str(folder), "--ref", str(ref), "--force"]) == 0
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_fid_grey_and_tiny_images(fid_small, tmp_path, capsys):
    for i in range(12):
        Image.fromarray(np.full((1, 1), i * 20, np.uint8)).save(tmp_path / f"{i}.png")
    assert fid.main(["--images", str(tmp_path), "--ref", str(fid_ref(tmp_path / "ref.npz"))]) == 0
    assert "size 1x1" in capsys.readouterr().out
    inception = lib.inception.Inception().eval()
    assert inception(torch.zeros(1, 3, 1, 1, dtype=torch.uint8))[0].isfinite().all()


def test_fid_without_the_classifier(fid_small, tmp_path, capsys):
    fid_small.fc.weight.data.zero_()
    assert fid.main(["--images", str(fid_folder(tmp_path / "i")), "--ref", str(fid_ref(tmp_path / "ref.npz"))]) == 0
    assert "IS n/a" in capsys.readouterr().out


def test_fid_hostile_images(fid_small, tmp_path, capsys):
    ref, empty = fid_ref(tmp_path / "ref.npz"), tmp_path / "empty"
    empty.mkdir()
    fid_refused(capsys, ["--images", empty, "--ref", ref], "empty: 0 images found, 2 needed")
    fid_refused(capsys, ["--images", tmp_path / "none", "--ref", ref], "none: 0 images found")
    folder = fid_folder(tmp_path / "images")
    fid_refused(capsys, ["--images", folder, "--ref", ref, "--n", 25], "24 images found, 25 needed")
    fid_refused(capsys, ["--images", folder, "--ref", ref, "--n", 1], "--n")
    fid_refused(capsys, ["--images", folder], "--ref")
    fid_refused(capsys, ["--images", folder, "--npz", ref, "--ref", ref], "not allowed with")
    fid_refused(capsys, ["--ckpt", tmp_path / "x.safetensors", "--save-ref", ref], "--ref")
    fid_refused(capsys, ["--images", folder, "--save-ref", tmp_path / "no" / "ref.npz"], "folder that exists")
    Image.new("RGB", (9, 8)).save(folder / "odd.png")
    fid_refused(capsys, ["--images", folder, "--ref", ref], "odd.png", "--size")
    (folder / "odd.png").write_bytes((folder / "0" / "000.png").read_bytes()[:60])
    fid_refused(capsys, ["--images", folder, "--ref", ref], "odd.png: cannot be read")
    (folder / "odd.png").write_text("no image")
    fid_refused(capsys, ["--images", folder, "--ref", ref, "--size", 4], "odd.png: cannot be read")
    npz = tmp_path / "a.npz"
    for array, word in (
        (np.zeros((3, 4, 4), np.uint8), "expected uint8"),
        (np.zeros((3, 4, 4, 3)), "expected uint8"),
        (np.zeros((1, 4, 4, 3), np.uint8), "2 needed"),
        (np.array([open] * 3), "objects"),
    ):
        np.savez(npz, arr_0=array)
        fid_refused(capsys, ["--npz", npz, "--ref", ref], "a.npz", word)
    data = np.zeros((3, 4, 4, 3), np.uint8)
    fid_zip(npz, arr_0=fid_npy(data, shape=(50000, 4000, 4000, 3)))
    fid_refused(capsys, ["--npz", npz, "--ref", ref], "does not fit")
    np.savez_compressed(npz, arr_0=np.random.default_rng(0).integers(0, 256, (64, 16, 16, 3), np.uint8))
    whole = bytearray(npz.read_bytes())
    whole[5000:5040] = bytes(40)
    npz.write_bytes(whole)
    fid_refused(capsys, ["--npz", npz, "--ref", ref], "a.npz")
    fid_refused(capsys, ["--npz", tmp_path / "none.npz", "--ref", ref], "none.npz")


# The sweep


@pytest.fixture
def fid_network(monkeypatch):
    torch.manual_seed(10)
    denoiser = Denoiser(JLT(8, 4, 3, 16, 1, 2, num_classes=3, bottleneck=4)).eval()
    denoiser.settings = {"vae": {"kind": "pixels", "id": "pixels"}, "step": 7, "cfg": 2.0, "interval": [0.1, 1.0]}
    nn.init.normal_(denoiser.net.final_layer.linear.weight, std=0.1)
    monkeypatch.setattr(fid, "load_denoiser", lambda *args: denoiser)
    return denoiser


def test_fid_sweep_continues(fid_small, fid_network, tmp_path, capsys, monkeypatch):
    drawn = []
    evaluate = fid.evaluate
    monkeypatch.setattr(
        fid, "evaluate", lambda *a, **how: drawn.append((how["cfg"], how["interval"])) or evaluate(*a, **how)
    )
    table = tmp_path / "fid.csv"
    command = [
        "--ckpt",
        tmp_path / "c.safetensors",
        "--ref",
        fid_ref(tmp_path / "ref.npz"),
        "--n",
        12,
        "--steps",
        2,
        "--cfg",
        1,
        2,
        "--interval",
        "0,1",
        "0.1,1",
        "--batch",
        5,
    ]
    command = [str(a) for a in command]
    assert fid.main(command) == 0
    first = capsys.readouterr().out
    rows = read_rows(table, fid.COLUMNS)
    assert [(row["cfg"], row["interval"]) for row in rows] == [
        ("1", "-"),
        ("2", "0,1"),
        ("2", "0.1,1"),
    ]  # one cell at cfg 1
    assert len(drawn) == 3 and all(row["nfe"] == "3" and row["step"] == "7" and row["n"] == "12" for row in rows)
    table.unlink()
    append_rows(table, fid.COLUMNS, [rows[0], rows[2]])
    assert fid.main(command) == 0
    assert drawn[3:] == [(2.0, (0.0, 1.0))]
    again = read_rows(table, fid.COLUMNS)
    without = [{name: text for name, text in row.items() if name != "seconds"} for row in (*rows, *again)]
    assert without[3:] == [without[0], without[2], without[1]]
    assert [line.split("seconds")[0] for line in capsys.readouterr().out.splitlines()] == [
        line.split("seconds")[0] for line in first.splitlines()
    ]
    for more in (["--seed", "1"], ["--t-eps", "0.01"], ["--classes", "2"]):  # other settings are other cells
        assert fid.main(command + more) == 0
    assert len(drawn) == 4 + 9
    with torch.no_grad():
        next(fid_network.net.parameters()).add_(1)  # and so are other weights
    assert fid.main(command) == 0
    assert len(drawn) == 4 + 12


def test_fid_sweep_asks_for_all_its_weights_before_the_first_cell(fid_small, tmp_path, capsys):
    save_tiny(tmp_path / "last.safetensors")
    tensors, settings = read_checkpoint(tmp_path / "last.safetensors", skip="model")
    save_checkpoint(tmp_path / "ema.safetensors", tensors, settings)
    command = ["--ref", fid_ref(tmp_path / "ref.npz"), "--n", 12, "--steps", 1, "--weights", "ema", "model", "--ckpt"]
    fid_refused(capsys, [*command, tmp_path / "ema.safetensors"], "no weights 'model'")
    assert not (tmp_path / "fid.csv").exists()
    assert fid.main([str(a) for a in (*command, tmp_path / "last.safetensors")]) == 0
    assert [row["weights"] for row in read_rows(tmp_path / "fid.csv", fid.COLUMNS)] == ["ema", "model"]


def test_fid_evaluate_scores_what_generate_draws(fid_small, fid_network, tmp_path):
    reference, vae = fid.load_reference(fid_ref(tmp_path / "ref.npz")), fid.open_vae(
        fid_network.settings, fid_network.net.in_channels
    )
    row = fid.evaluate(fid_network, vae, fid_small, reference, 12, 3, 2.0, steps=2, batch=4, classes=[1, 2])
    images = fid.generate(fid_network, vae, range(12), [1, 2], 3, 2.0, (0.1, 1.0), 2, "heun", "auto")
    features, logits = fid_small(images)
    x = features.double().numpy()
    expected = fid.frechet_distance(x.mean(0), np.cov(x.T), reference.mu, reference.sigma)
    assert float(row["fid"]) == pytest.approx(expected, rel=1e-3)  # 8-bit values may round otherwise in another batch
    assert float(row["inception_score"]) == pytest.approx(fid_direct_score(logits), rel=1e-3)
    assert row.keys() == set(fid.COLUMNS) and row["classes"] == "1 2" and row["reference"] == reference.hash


def test_fid_sweep_bad_input(fid_small, fid_network, tmp_path, capsys):
    ref = fid_ref(tmp_path / "ref.npz", size="32x32")
    command = ["--ckpt", tmp_path / "c.safetensors", "--n", 12, "--steps", 2, "--ref"]
    fid_refused(capsys, [*command, ref], "32x32", "8x8")
    ref = fid_ref(tmp_path / "ref2.npz")
    fid_refused(capsys, [*command, ref, "--csv", tmp_path / "no" / "fid.csv"], "does not exist")
    fid_refused(capsys, [*command, ref, "--csv", ref], "table")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    fid_refused(capsys, [*command, ref, "--csv", tmp_path / "other.csv"], "not a table")
    fid_refused(capsys, [*command, ref, "--classes", "9"], "class '9'")
    fid_refused(capsys, [*command, ref, "--interval", "1,0"], "LOW,HIGH")
    fid_refused(capsys, [*command, ref, "--cfg", "nan"], "--cfg")


# ---------------------------------------------------------------------------------------------------------------------
# Hostile input: one line, an exit code, nothing half-written; nothing is run, no memory out of proportion


@pytest.fixture(scope="module")
def hostile_base(tmp_path_factory):
    """Pictures, a cache, a run of two steps, a small checkpoint: to be copied and spoiled."""
    folder = tmp_path_factory.mktemp("hostile")
    cache = small_cache(folder, n=12)
    assert train.main(flags(cache, folder / "run", "--sample-every", 0, "--save-every", 1, steps=2)) == 0
    save_tiny(folder / "a.safetensors")
    return folder


@pytest.fixture
def hostile(hostile_base, tmp_path, monkeypatch):
    """In a copy of them, but for the run, which is large."""
    shutil.copytree(hostile_base, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("run"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def hostile_train(*more, out="run"):
    return flags("cache", out, "--sample-every", 0, "--save-every", 1, *more, steps=4)


def hostile_settings(path, **change):
    tensors, settings = read_checkpoint(path)
    save_checkpoint(path, tensors, settings | change)


def hostile_tensors(change):
    for name in ("last", "previous"):
        tensors, settings = read_checkpoint(f"run/{name}.safetensors")
        change(tensors)
        save_checkpoint(f"run/{name}.safetensors", tensors, settings)


def hostile_run(**change):
    for name in ("last", "previous"):
        hostile_settings(f"run/{name}.safetensors", **change)


def hostile_pickle(path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, ("ran",)

    torch.save({"model": Evil(), "mean": Evil()}, path)


def hostile_view(path):
    """A file of kilobytes whose label table claims to be of terabytes: a view that repeats one row."""
    state = dict(tiny_net().state_dict())
    state["y_embedder.embedding_table.weight"] = torch.zeros(1, 64).expand(10**10, 64)
    torch.save(state, path)


def hostile_pack(path):
    """The same checkpoint with its records compressed, as torch never writes them."""
    torch.save(tiny_net().state_dict(), "plain.pth")
    with zipfile.ZipFile("plain.pth") as plain, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for part in plain.infolist():
            packed.writestr(part.filename, plain.read(part))


HOSTILE_TRAIN = {  # what is spoiled: (flags, how, exit code, words)
    "seed": (["--seed", 10**30], None, 2, "or less"),
    "steps": (["--steps", "9" * 400], None, 2, "or less"),
    "digits": (["--steps", "9" * 5000], None, 2, "invalid int"),
    "batch": (["--batch", 10**13], None, 2, "or less"),
    "latents a file": (["--latents", "a.safetensors"], None, 2, "no latents at a.safetensors"),
    "step a text": ([], lambda: hostile_run(step="2"), 2, "damaged"),
    "step negative": ([], lambda: hostile_run(step=-1), 2, "damaged"),
    "step a fraction": ([], lambda: hostile_run(step=1e9), 2, "damaged"),
    "steps a list": ([], lambda: hostile_run(steps=[1]), 2, "damaged"),
    "skipped nothing": ([], lambda: hostile_run(skipped=None), 2, "damaged"),
    "a tensor less": (
        [],
        lambda: hostile_tensors(lambda t: t.pop("model.blocks.0.norm1.weight")),
        2,
        "blocks.0.norm1.weight",
    ),
    "a tensor more": ([], lambda: hostile_tensors(lambda t: t.update({"ema.new": torch.ones(1)})), 2, '"new"'),
    "optimizer's shapes": (
        [],
        lambda: hostile_tensors(
            lambda t: t.update({name: torch.ones(3) for name in t if name.startswith("optimizer.exp_avg.")})
        ),
        2,
        "optimizer.exp_avg",
    ),
    "optimizer's types": (
        [],
        lambda: hostile_tensors(
            lambda t: t.update({name: t[name].long() for name in t if name.startswith("optimizer.exp_avg.")})
        ),
        2,
        "int64",
    ),
    "an export as last": (
        [],
        lambda: [shutil.copy("run/ema.safetensors", f"run/{name}.safetensors") for name in ("last", "previous")],
        2,
        "does not fit",
    ),
    "log bytes": ([], lambda: pathlib.Path("run/log.csv").write_bytes(bytes(range(256))), 2, "not a log"),
    "log of another kind": ([], lambda: pathlib.Path("run/log.csv").write_text("a,b\n1,2\n"), 2, "not a log"),
    "log of long fields": (
        [],
        lambda: pathlib.Path("run/log.csv").write_text("step,loss\n1," + "9" * 200_000),
        2,
        "not a log",
    ),
    "log a folder": ([], lambda: (os.remove("run/log.csv"), os.mkdir("run/log.csv")), 2, "not a log"),
    "out a file": (["--out", "a.safetensors"], None, 2, "cannot be written to"),
    "out under a file": (["--out", "a.safetensors/run"], None, 2, "cannot be written to"),
    "out too long": (["--out", "n" * 300], None, 2, "cannot be written to"),
    "hostile init": (["--init", "evil.pth", "--out", "new"], lambda: hostile_pickle("evil.pth"), 2, "plain tensors"),
    "init claims too much": (
        ["--init", "view.pth", "--out", "new"],
        lambda: hostile_view("view.pth"),
        2,
        "embedding_table",
    ),
    "hostile statistics": (
        ["--out", "new"],
        lambda: (hostile_foreign(), hostile_pickle("cache/latents_stats.pt")),
        2,
        "mean and std",
    ),
    "labels below 0": (["--out", "new"], lambda: hostile_foreign(labels=-1), 2, "from -1"),
    "latents not square": (["--out", "new"], lambda: hostile_foreign(cut=4), 2, "no square"),
    "latents not finite": (["--out", "new"], lambda: hostile_foreign(latents=float("nan")), 2, "not finite"),
    "file-size limit": (["--out", "new"], lambda: hostile_limit(1 << 20), 1, "cannot save"),
    "out 250 letters": (["--out", "n" * 250], None, 0, ""),
    "out no UTF-8": (["--out", os.fsdecode(b"run \xff \xe6\x97\xa5")], None, 0, ""),
    "log torn": ([], lambda: open("run/log.csv", "a").write("1"), 0, ""),
}


def hostile_foreign(cut=None, **fill):
    """The cache as others would write it, latents cut to fewer rows, some of its tensors filled with one value."""
    (shard,) = pathlib.Path("cache").glob("latents*")
    tensors = {
        name: value if name == "labels" else value[:, :, :cut].contiguous() for name, value in load_file(shard).items()
    }
    for name, value in fill.items():
        tensors[name].fill_(value)
    save_file(tensors, shard)


def hostile_limit(size):
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.fixture
def hostile_no_limit():
    yield
    if os.name != "nt":
        hostile_limit(-1)


def hostile_check(capsys, code, wanted, said, before, after):
    if os.name != "nt":
        hostile_limit(-1)  # now, not at teardown: pytest's own output may go to a file
    error = capsys.readouterr().err
    assert code == wanted, error
    if wanted:
        assert said in error and error.startswith("error: ") and error.count("\n") == 1, error
        assert {path.name for path in after - before} <= {".lock", "new", "log.csv", "n" * 250}
    assert not any(path.name.startswith(".tmp") for path in after) and not os.path.exists("ran")


@pytest.mark.skipif(os.name == "nt", reason="POSIX limits and names")
@pytest.mark.parametrize("case", HOSTILE_TRAIN)
def test_hostile_training(case, hostile_base, hostile, hostile_no_limit, capsys):
    more, spoil, wanted, said = HOSTILE_TRAIN[case]
    if "--out" not in more:
        shutil.copytree(hostile_base / "run", "run")
    if spoil:
        spoil()
    before = set(hostile.rglob("*"))
    capsys.readouterr()
    hostile_check(capsys, train.main(hostile_train(*more)), wanted, said, before, set(hostile.rglob("*")))
    if case == "log torn":
        assert [row[0] for row in log_rows(pathlib.Path("run"))] == ["1", "2", "3", "4"]


@pytest.mark.parametrize("spoil", [float("nan"), float("inf")])
def test_hostile_weights(spoil, hostile, capsys):
    tensors, settings = read_checkpoint("a.safetensors")
    tensors["ema.blocks.0.mlp.w3.bias"][0] = spoil
    save_checkpoint("a.safetensors", tensors, settings)
    assert sample.main(["--ckpt", "a.safetensors", "--n", "2"]) == 2
    assert "blocks.0.mlp.w3.bias holds values that are not finite" in capsys.readouterr().err


HOSTILE_SETTINGS = dict(
    target=["x"],
    loss="w",
    P_mean="0",
    P_std=float("nan"),
    t_eps=-1,
    label_drop=[],
    input_size="8",
    cfg=1e308,
    interval=[float("nan"), 1],
    class_names=[1, 2, 3, 4, 5],
    vae=["pixels"],
    hint=5,
    step="many",
    ema="old",
)


@pytest.mark.parametrize("name", HOSTILE_SETTINGS)
def test_hostile_settings_of_a_checkpoint(name, hostile, capsys):
    hostile_settings("a.safetensors", **{name: HOSTILE_SETTINGS[name]})
    before = set(hostile.rglob("*"))
    code = sample.main(["--ckpt", "a.safetensors", "--steps", "1", "--n", "2"])
    hostile_check(capsys, code, 2, f"make no sense ({name} ", before, set(hostile.rglob("*")))


def hostile_pipe(path):
    os.mkfifo(path)  # who opens it waits for ever


@pytest.mark.skipif(os.name == "nt", reason="POSIX limits and names")
@pytest.mark.parametrize(
    "more, spoil, wanted, said",
    [
        (["--out", "n" * 300 + ".png"], None, 2, "too long"),
        (["--out", "cache"], None, 0, ""),
        (["--out", "d.png"], lambda: os.mkdir("d.png"), 2, "a folder of that name"),
        (["--out", "f"], lambda: pathlib.Path("f").touch(), 2, "a file of that name"),
        (["--out", "日本 \x1b[2J.png"], None, 0, ""),
        (["--out", "n" * 250 + ".npz"], None, 0, ""),
        (["--out", "f", "--n", "9"], lambda: hostile_limit(100), 1, "too large"),
        (["--out", "a.npz", "--n", "99"], lambda: hostile_limit(9000), 1, "too large"),
        (["--n", 10**12], None, 2, "or less"),
        (["--ckpt", "pipe.pth"], lambda: hostile_pipe("pipe.pth"), 2, "no such"),
        (["--ckpt", "view.pth", "--target", "x"], lambda: hostile_view("view.pth"), 2, "embedding_table"),
        (["--ckpt", "packed.pth", "--target", "x"], lambda: hostile_pack("packed.pth"), 2, "compressed"),
        (["--classes", "9" * 5000], None, 2, "class"),
    ],
)
def test_hostile_sampling(more, spoil, wanted, said, hostile, hostile_no_limit, capsys):
    if spoil:
        spoil()
    before = set(hostile.rglob("*"))
    code = sample.main(["--ckpt", "a.safetensors", "--steps", "1", "--n", "2", *map(str, more)])
    after = {path for path in hostile.rglob("*") if path.name not in ("f", "facts.txt")}
    hostile_check(capsys, code, wanted, said, before, after)


@pytest.mark.skipif(os.name == "nt", reason="POSIX pipes")
def test_hostile_pipes_are_not_waited_for(hostile, capsys):
    hostile_pipe("pictures/class0/pipe.png")
    hostile_pipe("ref.npz")
    hostile_pipe("weights.pth")
    assert vae.main(["--images", "pictures", "--out", "new", "--vae", "pixels", "--size", "8"]) == 0
    assert "left out, cannot be read: class0/pipe.png" in capsys.readouterr().err and len(LatentDataset("new")) == 12
    with pytest.raises(BadInput, match="No such file"):
        fid.load_reference("ref.npz")
    with pytest.raises(BadInput, match="no such file"):
        fid.load_inception("weights.pth")
    os.remove("new/latents_rank00_shard00000.safetensors")
    hostile_pipe("new/latents_rank00_shard00000.safetensors")
    with pytest.raises(BadInput, match="no such file"):
        LatentDataset("new")


def test_hostile_mutations_are_read_or_refused(hostile):
    """300 damaged files of five kinds."""
    torch.save({"model": {f"{name}": value for name, value in tiny_net().state_dict().items()}}, "b.pth")
    rng, fine = np.random.default_rng(0), {}
    write_statistics("ref.npz", rng.standard_normal(16), np.eye(16), size="8x8")
    np.savez("s.npz", arr_0=rng.integers(0, 256, (4, 8, 8, 3), np.uint8))
    readers = {
        "a.safetensors": load_denoiser,
        "b.pth": lambda path: load_denoiser(path, "model", target="x", input_size=8),
        "ref.npz": lambda path: lib.npz.read_statistics(path, 16),
        "s.npz": lambda path: list(image_rows(path, range(4))),
        "cache": LatentDataset,
    }
    for name, read in readers.items():
        path = pathlib.Path(name) if name != "cache" else next(pathlib.Path(name).glob("latents*"))
        whole, fine[name] = path.read_bytes(), 0
        read(pathlib.Path(name))
        for _ in range(60):
            data = bytearray(whole)
            for place in rng.integers(0, [600, len(data)][rng.integers(2)], rng.integers(1, 9)):
                data[place] = rng.integers(256)
            path.write_bytes(data[: rng.integers(len(data))] if rng.random() < 0.3 else data)
            try:
                read(pathlib.Path(name))
                fine[name] += 1
            except BadInput as error:
                assert name in str(error) or str(path) in str(error)
    assert 0 < sum(fine.values()) < 300


def test_hostile_names_are_printed_harmlessly(hostile, capsys):
    assert sample.main(["--ckpt", "no\x1b[2J\n\udcff.pth"]) == 2
    error = capsys.readouterr().err
    assert error.isprintable() or error.rstrip("\n").isprintable() and error.count("\n") == 1


def test_log_lines_come_at_once_without_a_terminal(hostile):
    """A pipe is buffered unless asked otherwise: the lines of a run would show after hours."""
    code = (
        "import sys, os\nfrom lib.run import program\n@program\ndef main(argv):\n"
        "    sys.stdout.write('step\\n')\n    os._exit(3)\nmain()"
    )
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert (done.returncode, done.stdout) == (3, "step\n")


# ---------------------------------------------------------------------------------------------------------------------
# bench/: what has a closed form


class bench_Data:
    """Gaussian tokens of known covariance, in place of a cache: independent channels of the given variances."""

    def __init__(self, variances, n=400, size=4):
        self.shape = (len(variances), size, size)
        noise = torch.randn(n, *self.shape, generator=torch.Generator().manual_seed(0))
        self.x = noise * torch.tensor(variances).sqrt()[:, None, None] + 0.5

    def __len__(self):
        return len(self.x)

    def batch(self, indices, flip=False):
        return self.x[torch.as_tensor(np.asarray(indices))], torch.zeros(len(indices), dtype=torch.int64)


def test_bench_tokens_and_spectrum_of_a_known_gaussian():
    data = bench_Data([4.0, 1.0, 0.25, 0.0])
    mean, covariance = spectrum.token_statistics(data, 1, 10_000)
    every = data.x.permute(0, 2, 3, 1).reshape(-1, 4).double()  # a second way: all tokens at once
    torch.testing.assert_close(mean, every.mean(0))
    torch.testing.assert_close(covariance, every.T.cov(correction=0))
    l, vectors = spectrum.spectrum(covariance)
    torch.testing.assert_close(l, torch.tensor([4.0, 1.0, 0.25, 0.0], dtype=torch.float64), rtol=0.05, atol=1e-9)
    torch.testing.assert_close(vectors @ torch.diag(l) @ vectors.T, covariance)
    assert spectrum.effective_dimension(torch.ones(7)) == 7 and spectrum.effective_dimension(torch.eye(7)[0]) == 1
    # Patches: same numbers, cut as a convolution of that stride cuts them
    x = torch.arange(2 * 3 * 4 * 4.0).reshape(2, 3, 4, 4)
    cut = torch.nn.functional.unfold(x, 2, stride=2)  # (B, C*p*p, tokens)
    ours = spectrum.tokens(x, 2).unflatten(1, (2, 2, 3)).permute(0, 3, 1, 2).flatten(1)  # to channel, row, column
    torch.testing.assert_close(ours.float(), cut.transpose(1, 2).flatten(0, 1))
    with pytest.raises(BadInput):
        spectrum.token_statistics(data, 3, 10)


@pytest.mark.parametrize("t", [0.1, 0.3, 0.8])
def test_bench_gaussian_theory_agrees_with_monte_carlo(t):
    l = torch.tensor([5.0, 1.0, 0.1, 0.0], dtype=torch.float64)
    torch.manual_seed(0)
    x, e = torch.randn(400_000, 4, dtype=torch.float64) * l.sqrt(), torch.randn(400_000, 4, dtype=torch.float64)
    z, table = t * x + (1 - t) * e, spectrum.asks(l, t)
    for target, values in {"x": x, "v": x - e, "eps": e}.items():
        slope = (values * z).mean(0) / (z * z).mean(0)
        row = table[target]
        torch.testing.assert_close(values.var(0), row["variance"], rtol=0.02, atol=1e-9)
        torch.testing.assert_close(slope, row["coefficient"], rtol=0.02, atol=0.01)
        torch.testing.assert_close((values - slope * z).var(0), row["ambiguity"], rtol=0.02, atol=1e-9)
        # the noise of the target (-e in v): its share, and what of it the best prediction tells from z
        noise = {"x": 0 * e, "v": -e, "eps": e}[target]
        torch.testing.assert_close(noise.var(0) / row["variance"].clamp(min=1e-9), row["noise"], rtol=0.02, atol=0.01)
        told = (noise * z).mean(0) / (z * z).mean(0) * z
        torch.testing.assert_close(told.var(0), row["carried"], rtol=0.02, atol=2e-3)
    # Var(v | z) = Var(x | z) / (1-t)², Var(e | z) = t² / (1-t)² Var(x | z)
    torch.testing.assert_close(table["v"]["ambiguity"], table["x"]["ambiguity"] / (1 - t) ** 2)
    torch.testing.assert_close(table["eps"]["ambiguity"], table["x"]["ambiguity"] * (t / (1 - t)) ** 2)


@pytest.mark.parametrize("width", [1, 3, 5])
def test_bench_squeezed_is_reduced_rank_regression(width):
    """Of draws: regress on z, keep as many directions of the fitted values as may pass."""
    l, t = torch.tensor([5.0, 1.0, 0.1, 0.0], dtype=torch.float64), 0.3
    torch.manual_seed(0)
    x, e = torch.randn(400_000, 4, dtype=torch.float64) * l.sqrt(), torch.randn(400_000, 4, dtype=torch.float64)
    z, found = t * x + (1 - t) * e, spectrum.squeezed(l, t, width)
    for target, values in {"x": x, "v": x - e, "eps": e}.items():
        fitted = z @ torch.linalg.lstsq(z, values).solution
        kept = torch.linalg.eigh(fitted.T @ fitted)[1][:, -width:]
        error = (values - fitted @ kept @ kept.T) * {"x": 1 / (1 - t), "v": 1, "eps": 1 / t}[target]
        assert found[target] == pytest.approx(error.square().mean().item(), rel=0.01)


@pytest.mark.parametrize("target", ["x", "eps", "v"])
def test_bench_geometry_finds_the_bayes_network_on_the_line(target):
    variances, t = [4.0, 1.0, 0.1], 0.3
    data = bench_Data(variances, n=600)
    data.x -= 0.5
    row = spectrum.asks(torch.tensor(variances, dtype=torch.float64), t)

    class Bayes(torch.nn.Module):
        patch_size, num_classes = 1, 1

        def __init__(self):
            super().__init__()
            self.c = torch.nn.Parameter(row[target]["coefficient"].float()[:, None, None])

        def forward(self, z, t, y):
            return self.c * z

    found = geometry.measure(Denoiser(Bayes(), target).eval(), data, torch.eye(3, dtype=torch.float64), t, 600)
    torch.testing.assert_close(found["coefficient"], row[target]["coefficient"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["own"], row[target]["ambiguity"], rtol=0.06, atol=0)
    torch.testing.assert_close(found["v"], row["v"]["ambiguity"], rtol=0.06, atol=0)
    assert geometry.grouped(torch.arange(6), 3) == [0.5, 2.5, 4.5]


def bench_log(run, rows):
    run.mkdir()
    parts = ("", *(f"_t{k}5" for k in range(10)))
    columns = ["step", "loss", *(f"{name}{part}" for name in ("fit", "val") for part in parts)]
    with open(run / "log.csv", "w", newline="") as file:
        table = csv.DictWriter(file, columns, restval="")
        table.writeheader()
        table.writerows(rows)


def test_bench_curves_read_a_log(tmp_path):
    bins = {f"fit_t{k}5": k + 1.0 for k in range(10)}
    bench_log(tmp_path / "run", [{"step": 10, "loss": 3}, {"step": 20, "loss": 2, "fit": 5.5, **bins}])
    assert curves.read_log(tmp_path / "run") == {20: (5.5, {(k + 0.5) / 10: k + 1.0 for k in range(10)})}
    for folder, column in (("run", "val"), ("nowhere", "fit")):
        with pytest.raises(BadInput):
            curves.read_log(tmp_path / folder, column)
    assert curves.main([str(tmp_path / "nowhere"), "--out", str(tmp_path / "c.png")]) == 2
    assert curves.main([str(tmp_path / "run"), "--out", str(tmp_path / "no" / "c.png")]) == 2


def test_velocity_error_by_time():
    """Of a velocity that is off by t: t² in every bin; the mean is that of the bins at the times of training."""

    class Off:
        P_mean, P_std = -0.8, 0.8

        def velocity(self, z, t, y):
            t = t[:, None, None, None]
            return -z / (1 - t) + t  # of x = 0

    class Zeros(list):
        shape = (3, 4, 4)

        def batch(self, indices, flip):
            return torch.zeros(len(indices), *self.shape), torch.zeros(len(indices), dtype=torch.int64)

    bins = (torch.sigmoid(-0.8 + 0.8 * torch.randn(10**6)) * 10).long()
    for count, there in ((1000, range(10)), (5, (0, 2, 4, 6, 8))):  # five images leave bins empty
        mean, by_time = loss_by_time(Off(), Zeros(range(count)), torch.device("cpu"), False)
        assert [k for k, error in enumerate(by_time) if np.isfinite(error)] == list(there)
        wanted = torch.tensor(by_time)[bins[torch.isin(bins, torch.tensor(there))]].mean()
        assert mean == pytest.approx(wanted.item(), rel=0.01)
        if count == 1000:
            assert by_time == pytest.approx([((k + 0.5) / 10) ** 2 for k in range(10)], abs=2e-2)


def test_bench_nine_makes_a_table(tmp_path, monkeypatch, capsys):
    asked = []

    def train_main(argv):
        asked.append(argv)
        out = argv[argv.index("--out") + 1]
        bench_log(nine.pathlib.Path(out), [{"step": 8, "fit": 2.0, **{f"fit_t{k}5": 2.0 for k in range(10)}}])
        return 0

    monkeypatch.setattr(nine.train, "main", train_main)
    assert nine.main(["cache", "--out", str(tmp_path), "--steps", "8", "--val", "other"]) == 0
    assert len(asked) == 11 and len({tuple(argv) for argv in asked}) == 11
    assert all(argv[-2:] == ["--val", "other"] for argv in asked)
    assert [argv[1:7:2] for argv in asked[-2:]] == [["v", "v", "1"], ["x", "x", "1"]]  # the second seeds
    table = capsys.readouterr().out
    assert "| predicts | loss in | seed | step | fit | fit, even t |" in table
    assert "| eps | x | 0 | 8 | 2 | 2 |" in table
    monkeypatch.setattr(nine.train, "main", lambda argv: 143)
    assert nine.main(["cache", "--out", str(tmp_path)]) == 143  # stopped: so is this

    run = tmp_path / "x-vloss-seed0"
    alike = dict.fromkeys(nine.fid.COLUMNS, "") | nine.USUAL | {"n": "2048", "cfg": "1"}
    guidance_table(run / "fid.csv", nine.fid.COLUMNS, [alike | {"fid": "9"}, alike | {"fid": "7", "t_eps": "0"}])
    found = nine.scores(run)
    assert found["FID-2048, cfg 1"] == 9 and found["FID-2048, cfg 1, t_eps 0"] == 7


def test_bench_guidance_lines(tmp_path):
    columns = guidance.fid.COLUMNS
    path = tmp_path / "run" / "fid.csv"
    path.parent.mkdir()
    cells = [("1", "-", 9), ("3", "0.1,1", 5), ("2", "0.1,1", 4), ("2", "0,1", 6)]
    alike = dict.fromkeys(columns, "") | {"target": "x", "n": "50", "reference": "r"}
    rows = [alike | {"cfg": cfg, "interval": times, "fid": str(score)} for cfg, times, score in cells]
    guidance_table(path, columns, rows)
    lines, n = guidance.read_lines([path])
    assert n == "50" and lines == {
        "interval 0.1,1": ("x", [(1.0, 9.0), (2.0, 4.0), (3.0, 5.0)]),
        "interval 0,1": ("x", [(1.0, 9.0), (2.0, 6.0)]),
    }
    rows[0]["n"] = "60"
    guidance_table(path, columns, rows)
    with pytest.raises(BadInput):
        guidance.read_lines([path])


def guidance_table(path, columns, rows):
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, columns)
        table.writeheader()
        table.writerows(rows)


def test_bench_progress_puts_rows_where_their_steps_are():
    red = torch.tensor([255, 0, 0], dtype=torch.uint8)[None, :, None, None].expand(2, 3, 32, 32)
    sheet = progress.side_by_side({"a": {10: red, 20: red}, "b": {20: red}}, [10, 20], 2, ["0", "1"])
    pixels = np.array(sheet).astype(int)
    is_red = (pixels == [255, 0, 0]).all(-1)
    middle = (sheet.width + progress.MARGIN) // 2
    left, right = is_red[:, :middle], is_red[:, middle:]
    assert left.sum() == 2 * right.sum() == 4 * 96 * 96  # 32-pixel images are shown three times as large
    assert not right[: sheet.height // 2].any()  # b has no step 10


def test_bench_reader_of_digits_and_its_distance():
    images, labels = digits.drawn(2, seed=5)
    assert images.shape == (20, 3, 32, 32) and labels.tolist() == sorted(list(range(10)) * 2)
    assert not torch.equal(images, digits.drawn(2, seed=6)[0])
    features = torch.randn(100, 3)
    mean, covariance = digits.statistics(features)
    np.testing.assert_allclose(covariance, np.cov(features.numpy().astype(np.float64).T))
    np.testing.assert_allclose(mean, features.numpy().astype(np.float64).mean(0))


# ---------------------------------------------------------------------------------------------------------------------
# The house


def test_line_budget_and_layout():
    for name in ("model", "train", "sample", "vae", "fid"):
        assert len((ROOT / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 350, name
    assert len((ROOT / "lib/run.py").read_text(encoding="utf-8").splitlines()) <= 120
    for path in [*ROOT.glob("*.py"), *ROOT.glob("lib/*.py"), *ROOT.glob("bench/*.py")]:
        for line, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert len(text) <= 120, f"{path.name}:{line}"


def test_imports_run_one_way():
    above = {
        "model": set(),
        "vae": set(),
        "sample": {"model", "vae"},
        "fid": {"model", "vae", "sample"},
        "train": {"model", "vae", "sample", "fid"},
    }
    for name, allowed in above.items():
        source = (ROOT / f"{name}.py").read_text(encoding="utf-8")
        imported = set(re.findall(r"^\s*(?:import|from) (model|vae|sample|fid|train)\b", source, re.M))
        assert imported <= allowed | ({"model"} if name == "vae" else set()), name
    for path in ROOT.glob("lib/*.py"):
        assert not re.search(
            r"^\s*(import|from) (model|vae|sample|fid|train)\b", path.read_text(encoding="utf-8"), re.M
        ), path


def test_readme_names_only_flags_that_exist(capsys):
    known = {}
    for name, program in {"train.py": train, "sample.py": sample, "vae.py": vae, "fid.py": fid}.items():
        with pytest.raises(SystemExit) as done:
            program.main(["--help"])
        assert done.value.code == 0
        known[name] = set(re.findall(r"--[a-z][a-z0-9-]*", capsys.readouterr().out))
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    for line in re.findall(r"^.*python.*$|^.*torchrun.*$", text, re.M):
        for part in re.split(r"&&|`|;", line):
            name = re.search(r"(?:python|torchrun)\b.*?\b((?:train|sample|vae|fid)\.py)(.*)", part)
            if name:
                for flag in re.findall(r"(?<!\S)(--[a-z][a-z0-9-]*)", name.group(2)):
                    assert flag in known[name.group(1)], f"{name.group(1)} {flag}: {line}"


def test_readme_counts_lines_as_they_are():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in ("model", "train", "sample", "vae", "fid"):
        said = re.search(rf"`{name}\.py`[^\n]*?(\d+) lines", text)
        assert said and int(said.group(1)) == len((ROOT / f"{name}.py").read_text(encoding="utf-8").splitlines()), name


def test_models_import_nothing_heavy():
    """Help and imports stay quick: diffusers, transformers and matplotlib are loaded only where they are used."""
    code = (
        "import sys, train, fid\n"
        "print([m for m in ('diffusers', 'transformers', 'matplotlib', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
