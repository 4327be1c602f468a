"""The specification of the method, in the order of reading: model, vae, sample, train, fid.

Each test holds a promise against a closed form, a trusted library or a second way of computing it.
`python -m pytest test_all.py` takes about a minute on two cores, without network or GPU. tests/ has
what is refused, damaged or interrupted.
"""
# ruff: noqa: E402 (the environment has to be set before torch is imported)
import argparse
import functools
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # ranks and pytest -n 4 share the cores
GPU = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("TEST_ON_GPU", "")  # usually on the CPU
os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch.testing import assert_close

import fid
import sample
import train
import vae
from lib.checkpoint import load_denoiser, read_checkpoint
from lib.images import center_crop, read_image
from lib.log import error_by_time, read_table
from model import JLT, SIZES, TARGETS, Denoiser, RMSNorm, coefficients, edm, rotary_table, rotate

ROOT = pathlib.Path(__file__).resolve().parent
# Cached, because torch.compile of torch 2.14 asks for the attributes of a cached function here.
torch.backends.mps.is_available = functools.lru_cache(lambda: False)


# -------------------------------------------------------------------------------------------------
# Small things to test with, which tests/ uses as well

def tiny_net(patch=2, channels=3, size=8, **other):
    usual = dict(hidden_size=32, depth=2, num_heads=2, num_classes=5, bottleneck=8)
    return JLT(size, patch, channels, **usual | other)


def awake(net, seed=0):
    """The same network with noise on all weights: no layer that starts at zero hides another."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return net


def rows(n, size=8, channels=3, classes=5, seed=0):
    """x (n, channels, size, size), y (n,), t (n,) in [0.05, 0.95], e of x's shape."""
    g, shape = torch.Generator().manual_seed(seed), (n, channels, size, size)
    return (torch.randn(shape, generator=g), torch.randint(classes, (n,), generator=g),
            torch.rand(n, generator=g) * 0.9 + 0.05, torch.randn(shape, generator=g))


def image_folder(root, per_class=7, classes=("cat", "dog"), size=(40, 32)):
    """Class folders of smooth random images of (width, height)."""
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            pixels = np.random.default_rng([label, i]).integers(0, 256, (4, 5, 3), np.uint8)
            image = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
            image.save(root / name / f"{i:02d}.png")
    return root


def write_cache(images, out, size, *flags, codec="pixels"):
    """Run vae.py; returns its exit code."""
    argv = ["--images", images, "--out", out, "--vae", codec, "--size", size, *flags]
    return vae.main([str(word) for word in argv])


def small_cache(folder, n=40, classes=4, size=8, *flags):
    """The path of a cache of n random images of classes class0, class1 ..., without a codec."""
    names = [f"class{k}" for k in range(classes)]
    images = image_folder(folder / "images", n // classes, names, (size, size))
    assert write_cache(images, folder / "cache", size, *flags) == 0
    return folder / "cache"


def flags(cache, out, *more, steps=6):
    """train.py's, for a run of seconds: model T on 4 tokens."""
    return ["--latents", str(cache), "--out", str(out), "--steps", str(steps), *(
        "--model T --patch 4 --batch 8 --lr 1e-3 --warmup 0.4 --ema 0.9 0.5 --save-every 2 "
        "--log-every 1 --sample-every 6").split(), *map(str, more)]


LOGGED = "step", "loss", "lr", "grad_norm"  # what a run repeats to the last bit


def log_rows(out, columns=(*LOGGED, "fit")):
    """Rows of a run's log.csv, as lists of texts."""
    return [[row[name] for name in columns] for row in read_table(out / "log.csv")[1]]


def same_checkpoint(a, b):
    """Assert that two runs' folders hold the same weights, optimizer and settings, bit for bit."""
    (left, one), (right, other) = (read_checkpoint(out / "last.safetensors") for out in (a, b))
    assert one == other and left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def same_run(a, b, columns=(*LOGGED, "fit")):
    """Assert that two runs' folders hold the same checkpoint and log, bit for bit."""
    same_checkpoint(a, b)
    assert log_rows(a, columns) == log_rows(b, columns)


# -------------------------------------------------------------------------------------------------
# model.py: the network

def test_sizes_are_the_papers():
    """Width, depth, heads, bottleneck, the width of the feed-forward part; parameters of B."""
    paper = {"B": (768, 12, 12, 128, 2048), "L": (1024, 24, 16, 128, 2730),
             "H": (1280, 32, 16, 256, 3413)}
    with torch.device("meta"):
        nets = {name: JLT(16, 1, 128, **SIZES[name]) for name in paper}
        larger = JLT(16, 2, 128, **SIZES["B"])  # patches of 2 x 2
    for name, net in nets.items():
        heads, bottleneck = net.blocks[0].attn.num_heads, net.x_embedder.proj1.out_channels
        width, hidden = net.blocks[0].mlp.w3.weight.shape
        assert (width, len(net.blocks), heads, bottleneck, hidden) == paper[name]
    count = [sum(p.numel() for p in net.parameters()) for net in (nets["B"], larger)]
    assert [round(n / 1e6, 1) for n in count] == [130.5, 130.9]


def test_initialisation():
    """Xavier's for products, convolutions counting as matrices; 0.02 for what makes the condition;
    zero for biases, gates, shifts, scales and the output."""
    torch.manual_seed(0)
    net = JLT(8, 2, 16, hidden_size=128, depth=1, num_heads=4)
    block, last, table = net.blocks[0], net.final_layer, net.y_embedder.embedding_table
    assert table.num_embeddings == 1001 and net.x_embedder.proj1.weight.shape == (128, 16, 2, 2)
    for layer in (block.attn.qkv, block.mlp.w12, block.mlp.w3, net.x_embedder.proj1):
        bound = math.sqrt(6 / sum(layer.weight.flatten(1).shape))
        assert layer.weight.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    for layer in (net.t_embedder.mlp[0], net.t_embedder.mlp[2], table):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
    zero = [block.adaLN_modulation[1].weight, last.adaLN_modulation[1].weight, last.linear.weight]
    zero += [p for name, p in net.named_parameters() if name.endswith("bias")]
    assert not any(p.any() for p in zero)


def test_rotary_positions_are_complex_rotations():
    """The first half of a head's pairs turns with the token's row, the second with its column."""
    x = torch.randn(2, 9, 16)
    pairs = torch.view_as_complex(x.unflatten(-1, (2, 4, 2)))           # (2, tokens, half, pair)
    position = torch.tensor([divmod(token, 3) for token in range(9)])   # (tokens, half)
    angle = position[..., None] * 10000.0 ** (-torch.arange(4) / 4)        # (tokens, half, pair)
    turned = torch.view_as_real(pairs * torch.exp(1j * angle)).flatten(2)
    assert_close(rotate(x, *rotary_table(3, 16)), turned, atol=1e-5, rtol=1e-5)


def plain_forward(w, z, t, y):
    """The network of two blocks, two heads of 16 and patches of 2 x 2, once more in plain formulas.
    w: its parameters, by the names of the published weights."""
    cos, sin = rotary_table(4, 16)

    def norm(x, name):
        return x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-6) * w[f"{name}.weight"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].flatten(1).T + w.get(f"{name}.bias", 0)

    angle = t[:, None] * 10000 ** (-torch.arange(128) / 128)
    c = linear(torch.cat([angle.cos(), angle.sin()], 1), "t_embedder.mlp.0")
    c = linear(F.silu(c), "t_embedder.mlp.2") + w["y_embedder.embedding_table.weight"][y]
    c = F.silu(c)[:, None]
    x = F.unfold(z, 2, stride=2).mT  # a patch in the order channel, row, column
    for name in ("x_embedder.proj", "x_embedder.proj1", "x_embedder.proj2"):
        x = linear(x, name) if f"{name}.weight" in w else x
    for b in ("blocks.0.", "blocks.1."):
        steer = linear(c, b + "adaLN_modulation.1").split(32, -1)
        shift, scale, gate, shift2, scale2, gate2 = steer
        h = norm(x, b + "norm1") * (1 + scale) + shift
        q, k, v = (part.split(16, -1) for part in linear(h, b + "attn.qkv").split(32, -1))
        heads = []
        for head in (0, 1):
            query = rotate(norm(q[head], b + "attn.q_norm"), cos, sin)
            key = rotate(norm(k[head], b + "attn.k_norm"), cos, sin)
            heads.append(torch.softmax(query @ key.mT / math.sqrt(16), -1) @ v[head])
        x = x + gate * linear(torch.cat(heads, -1), b + "attn.proj")
        h = norm(x, b + "norm2") * (1 + scale2) + shift2
        left, right = linear(h, b + "mlp.w12").chunk(2, -1)
        x = x + gate2 * linear(F.silu(left) * right, b + "mlp.w3")
    shift, scale = linear(c, "final_layer.adaLN_modulation.1").chunk(2, -1)
    x = linear(norm(x, "final_layer.norm_final") * (1 + scale) + shift, "final_layer.linear")
    x = x.unflatten(-1, (4, -1)).transpose(-1, -2).flatten(2)  # from row, column, channel
    return F.fold(x.mT, z.shape[-2:], 2, stride=2)


@pytest.mark.parametrize("bottleneck", [0, 8])
def test_the_network_and_its_gradients_are_its_formulas(bottleneck):
    net, (z, y, t, e) = awake(tiny_net(bottleneck=bottleneck)), rows(8)
    weights = dict(net.named_parameters())
    outputs = net(z, t, y), plain_forward(weights, z, t, y)
    assert_close(*outputs, atol=2e-5, rtol=2e-4)
    gradients = [torch.autograd.grad((output - e).square().mean(), weights.values())
                 for output in outputs]
    assert_close(*gradients, atol=2e-5, rtol=2e-4)
    assert net.state_dict().keys() == weights.keys()  # nothing else is saved
    assert_close(RMSNorm(4)(torch.full((4,), 1e-3)), torch.full((4,), 0.5**0.5))  # its 1e-6 counts


def test_bf16_stays_close_to_fp32_and_ends_in_fp32():
    denoiser = Denoiser(awake(tiny_net()))
    x, y, t, e = rows(4)
    full = denoiser.net(x, t, y)
    with torch.autocast("cpu", torch.bfloat16):
        half, loss, v = denoiser.net(x, t, y), denoiser(x, y, t, e), denoiser.velocity(x, 0.5, y)
    assert half.dtype == torch.bfloat16 and loss.dtype == v.dtype == torch.float32
    assert (half - full).norm() < 0.02 * full.norm()


# -------------------------------------------------------------------------------------------------
# model.py: the objective

class Oracle(torch.nn.Module):
    """A "network" that knows the answer, and remembers what it was asked."""
    num_classes = 5

    def __init__(self, answer=None):
        super().__init__()
        self.answer, self.z, self.asked = answer, None, []

    def forward(self, z, t, y):
        self.z = z
        self.asked.append(y.tolist())
        return self.answer


def of(target, x, e, t):
    a, b = coefficients(target, torch.as_tensor(t).reshape(-1, *[1] * (x.ndim - 1)))
    return a * x + b * e


@pytest.mark.parametrize("target", [*TARGETS, "u"])
def test_the_right_answer_gives_the_velocity_and_no_loss_whatever_the_target(target, monkeypatch):
    monkeypatch.setitem(TARGETS, "u", (2, -1))  # another target is one row more
    x, y, _, e = rows(5)
    for t in (0.05, 0.3, 0.95):
        net, times, z = Oracle(of(target, x, e, t)), torch.full((5,), t), t * x + (1 - t) * e
        denoiser = Denoiser(net, target)
        assert denoiser(x, y, times, e) < 1e-9
        assert_close(net.z, z)
        for time in (t, times):
            assert_close(denoiser.velocity(z, time, y), x - e, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("k", [0.2, 1])
def test_edm_is_the_target_of_edms_preconditioning(k):
    """There, data plus noise of deviation sigma times c_skip, plus c_out times the network's
    prediction, is the denoised data. Where the data has variance k, prediction and z are
    uncorrelated."""
    t = torch.linspace(0.05, 0.95, 10, dtype=torch.float64)
    (a, b), sigma = edm(t, k), (1 - t) / t
    c_skip, c_out = k / (sigma**2 + k), sigma * k**0.5 / (sigma**2 + k).sqrt()
    assert_close(a / k**0.5, (1 - c_skip) / c_out)
    assert_close(b / k**0.5, -c_skip * sigma / c_out)
    assert_close(a * t * k + b * (1 - t), 0 * t)
    assert_close(edm(t, 0), (0 * t + 1, 0 * t))


def test_the_floor_bounds_the_division_and_keeps_its_sign():
    z, y, _, answer = rows(5)
    x, eps = Denoiser(Oracle(answer), "x"), Denoiser(Oracle(answer), "eps")
    assert_close(x.velocity(z, 0.99, y), (answer - z) / 0.05)
    assert_close(eps.velocity(z, 0.01, y), (answer - z) / -0.05)
    assert not eps.velocity(answer, 0.0, y).any()


def test_a_target_that_says_nothing_about_v_is_refused(monkeypatch):
    monkeypatch.setitem(TARGETS, "sum", (1, 1))  # its slope 1 - 2t is zero at t = 1/2
    for pair in (("sum", "v"), ("x", "sum"), ("none", "v")):
        with pytest.raises(ValueError, match="target"):
            Denoiser(Oracle(), *pair)


@pytest.mark.parametrize("target", TARGETS)
def test_a_loss_is_the_weighted_error_of_the_target(target):
    """The weights that turn it into the error in another space, with floored denominators."""
    x, y, _, e = rows(5)
    guess, t = rows(5, seed=1)[0], torch.tensor([0.001, 0.01, 0.3, 0.97, 0.999])
    one, a, b = torch.ones(5), (1 - t).clamp(min=0.05), t.clamp(min=0.05)
    n = (1 - t) ** 2 + 0.2 * t**2  # is never small
    table = {"x":   {"x": one, "eps": (t / a) ** 2, "v": 1 / a**2, "edm": n / a**2},
             "eps": {"x": ((1 - t) / b) ** 2, "eps": one, "v": 1 / b**2, "edm": n / b**2},
             "v":   {"x": (1 - t) ** 2, "eps": t**2, "v": one, "edm": n},
             "edm": {"x": (1 - t) ** 2 / n, "eps": t**2 / n, "v": 1 / n, "edm": one}}
    error = (guess - of(target, x, e, t)).square().mean((1, 2, 3))
    for loss, weight in table[target].items():
        assert_close(Denoiser(Oracle(guess), target, loss)(x, y, t, e), (weight * error).mean())


def test_the_labels_asked_for_are_dropped_and_no_others():
    x, y, t, e = rows(6)
    net, drop = Oracle(x), torch.tensor([True, False, False, True, False, True])
    Denoiser(net)(x, y, t, e, drop)
    Denoiser(net)(x, y, t, e)
    assert net.asked == [torch.where(drop, 5, y).tolist(), y.tolist()]


# -------------------------------------------------------------------------------------------------
# vae.py: codecs, images, the cache

def tiny_flux2(folder):
    """diffusers' own network, small, with random weights and statistics, saved by diffusers."""
    from diffusers import AutoencoderKLFlux2
    torch.manual_seed(0)
    net = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=6,
        batch_norm_eps=0.25).eval()
    net.bn.running_mean.normal_()
    net.bn.running_var.uniform_(0.5, 2)
    net.save_pretrained(folder)
    return net


@pytest.mark.parametrize("place, root", [("net/vae", "net"), ("vae", "vae")])
@torch.no_grad()
def test_flux2_is_the_mode_then_space_to_depth_then_batchnorm(place, root, tmp_path):
    """And back. Its config.json may lie in the folder named or in vae/ inside it."""
    net, codec = tiny_flux2(tmp_path / place), vae.load_vae(str(tmp_path / root))
    assert (codec.kind, codec.channels, codec.stride) == ("flux2", 24, 16)
    x = torch.rand(18, 3, 32, 48) * 2 - 1  # more than one chunk
    mode = net.encode(x).latent_dist.mean                               # (18, 6, 4, 6)
    squares = [mode[:, c, i::2, j::2] for c in range(6) for i in (0, 1) for j in (0, 1)]
    z = F.batch_norm(torch.stack(squares, 1), net.bn.running_mean, net.bn.running_var, eps=0.25)
    assert_close(codec.encode(x), z, rtol=1e-4, atol=1e-5)
    assert_close(codec.decode(z), net.decode(mode).sample, rtol=1e-4, atol=1e-5)
    half = vae.load_vae(str(tmp_path / root), dtype="bf16")
    assert codec.id == half.id and half.encode(x).dtype == half.decode(z).dtype == x.dtype
    assert 0 < (half.encode(x) - z).abs().max() < 0.1


def test_the_quantiser_inverts_and_rounds():
    every = torch.arange(256, dtype=torch.uint8)
    for stored in (vae.from_uint8(every), vae.from_uint8(every).half()):
        assert torch.equal(vae.to_uint8(stored), every)
    assert vae.from_uint8(every)[[0, 255]].tolist() == [-1, 1]
    values = torch.tensor([-9, -1, 0.4 / 127.5 - 1, 0.6 / 127.5 - 1, 1, 9])
    assert vae.to_uint8(values).tolist() == [0, 0, 0, 1, 255, 255]


@pytest.mark.parametrize("size", [(33, 32), (200, 97), (10, 7)])
def test_center_crop_restated(size):
    """ADM's: halve by a box filter while it can, then bicubic, then the middle."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    image, side = Image.fromarray(pixels), np.array(size)
    found = np.asarray(center_crop(image, 32))
    while side.min() >= 64:
        side = side // 2
        image = image.resize(side, Image.Resampling.BOX)
    side = [round(n * 32 / side.min()) for n in side]
    whole = np.asarray(image.resize(side, Image.Resampling.BICUBIC))
    left, top = (side[0] - 32) // 2, (side[1] - 32) // 2
    assert np.array_equal(found, whole[top:top + 32, left:left + 32])


def shard_bytes(folder):
    return {path.name: path.read_bytes() for path in folder.glob("latents_*.safetensors")}


def test_the_cache_holds_the_latents_of_images_and_of_mirrored_images(tmp_path, monkeypatch):
    """The latter are not the mirrored latents, since a codec is not symmetric."""
    monkeypatch.setattr(vae, "SHARD", 4)  # so that a small folder fills several
    tiny_flux2(tmp_path / "vae")
    images, codec = image_folder(tmp_path / "images"), vae.load_vae(str(tmp_path / "vae"))
    assert write_cache(images, tmp_path / "cache", 32, codec=tmp_path / "vae") == 0
    data = vae.LatentDataset(tmp_path / "cache")
    assert (len(data), data.shape, data.size, data.num_classes) == (14, (24, 2, 2), 32, 2)
    assert data.class_names == ["cat", "dog"]
    assert (data.vae, data.vae_path) == ({"kind": "flux2", "id": codec.id}, str(tmp_path / "vae"))
    pixels = torch.stack([read_image(path, 32)[0] for path in sorted(images.rglob("*.png"))])
    rng = np.random.default_rng(0)
    order, flip = rng.integers(0, 14, 50), rng.random(50) < 0.5
    mixed = torch.stack([pixels[i].flip(-1) if f else pixels[i] for i, f in zip(order, flip)])
    x, y = data.batch(order, flip)
    assert_close(x, codec.encode(vae.from_uint8(mixed)).half(), rtol=1e-3, atol=1e-3)
    assert y.tolist() == [i // 7 for i in order]
    assert torch.equal(data[-1][0], data.batch([13])[0][0]) and data[-1][1] == 1
    assert write_cache(images, tmp_path / "never", 16, "--no-flip") == 0
    data = vae.LatentDataset(tmp_path / "never")
    assert not data.mirrored and torch.equal(*(data.batch(range(14), f)[0] for f in (False, True)))


def test_a_cache_that_was_interrupted_continues_to_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(vae, "SHARD", 4)
    images, encode, calls = image_folder(tmp_path / "images"), vae.Pixels.encode, []
    assert write_cache(images, tmp_path / "whole", 16, "--batch", 2) == 0

    def interrupted(self, images):
        calls.append(images)
        if len(calls) == 9:  # after two shards of two batches, each encoded twice
            os.kill(os.getpid(), signal.SIGTERM)
        return encode(self, images)
    with monkeypatch.context() as stopped:
        stopped.setattr(vae.Pixels, "encode", interrupted)
        assert write_cache(images, tmp_path / "pieces", 16, "--batch", 2) == 128 + signal.SIGTERM
    first = {path: path.stat().st_mtime_ns for path in tmp_path.glob("pieces/*.safetensors")}
    assert len(first) == 2
    assert write_cache(images, tmp_path / "pieces", 16, "--batch", 2) == 0
    assert shard_bytes(tmp_path / "pieces") == shard_bytes(tmp_path / "whole")
    assert all(path.stat().st_mtime_ns == time for path, time in first.items())  # not again


def test_caches_of_others_are_read_batch_for_batch(tmp_path):
    """LightningDiT's: raw latents, their statistics beside them; shard 10 comes after 2."""
    ours = vae.LatentDataset(small_cache(tmp_path / "ours", n=12))
    mean, std, theirs = torch.randn(1, 3, 1, 1), torch.rand(1, 3, 1, 1) + 0.5, tmp_path / "theirs"
    theirs.mkdir()
    for k, name in enumerate(("rank00_shard002", "rank00_shard010", "rank01_shard000")):
        part = np.arange(4 * k, 4 * k + 4)
        x, mirrored = (ours.batch(part, flip)[0].float() * std + mean for flip in (False, True))
        tensors = {"latents": x, "latents_flip": mirrored, "labels": ours.labels[part].clone()}
        save_file(tensors, theirs / f"latents_{name}.safetensors")
    torch.save({"mean": mean, "std": std}, theirs / "latents_stats.pt")
    which = [11, 0, 5, 5], [True, False, True, False]
    (x, y), (wanted, labels) = vae.LatentDataset(theirs).batch(*which), ours.batch(*which)
    assert_close(x, wanted.float(), atol=1e-5, rtol=1e-4)
    assert torch.equal(y, labels)


# -------------------------------------------------------------------------------------------------
# sample.py

@pytest.mark.parametrize("method, order", [("euler", 1), ("heun", 2), ("ab2", 2)])
def test_the_ode_takes_noise_to_the_data(method, order):
    """For data x ~ N(0, 4), E[v | z] is known, and the flow is linear: noise z lands on 2 z. The
    error falls as 1/steps^order."""
    def velocity(z, t):
        return (4 * t - (1 - t)) * z / (4 * t**2 + (1 - t) ** 2)
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)
    few, many = ((sample.ode_sample(velocity, z, steps, method) - 2 * z).norm() / z.norm()
                 for steps in (160, 320))
    assert few / many == pytest.approx(2**order, rel=0.1) and many < 0.02


def test_evaluations_are_counted_as_in_the_paper():
    """50 Heun steps are 99, of which 88 lie in the interval and are guided, in a doubled batch."""
    def counted(cfg, low):
        net, z = Oracle(torch.zeros(())), torch.zeros(3, 1, 1, 1)
        velocity = sample.guided_velocity(Denoiser(net), torch.zeros(3).long(), cfg, (low, 1.0))
        sample.ode_sample(velocity, z, 50)
        return len(net.asked), net.asked.count([0, 0, 0, 5, 5, 5])
    assert counted(2.9, 0.1) == (99, 88)
    assert counted(2.9, 0.0) == (99, 99)
    assert counted(1.0, 0.0) == (99, 0)


def test_the_papers_settings_are_the_defaults():
    d, paper = Denoiser(Oracle()), ("x", "v", -0.8, 0.8, 0.05, 0.1)
    assert (d.target, d.loss_space, d.P_mean, d.P_std, d.t_eps, d.label_drop) == paper
    assert train.OBJECTIVE == dict(P_mean=-0.8, P_std=0.8, t_eps=0.05, label_drop=0.1)
    assert sample.Sampling() == sample.Sampling(1.0, (0.1, 1.0), 50, "heun", None, "auto", 0)
    args = train.parse(["--target", "x", "--patch", "1"])
    names = "model patch steps batch lr warmup decay ema cfg loss".split()
    assert [getattr(args, name) for name in names] == [
        "B", 1, 250_000, 1024, 2e-4, 5, 0.0, [0.9999], 2.9, "v"]


@torch.no_grad()
def test_guidance_1_is_conditional_and_0_is_unconditional():
    denoiser = Denoiser(awake(tiny_net()))
    z, y, _, _ = rows(3)
    c, u = (denoiser.velocity(z, 0.5, labels) for labels in (y, torch.full_like(y, 5)))
    assert (c - u).abs().max() > 1e-3
    edges = [(3.0, t, denoiser.velocity(z, t, y)) for t in (0.4, 0.6)]  # the interval is open
    for cfg, t, wanted in ((1.0, 0.5, c), (0.0, 0.5, u), (3.0, 0.5, u + 3 * (c - u)), *edges):
        v = sample.guided_velocity(denoiser, y, cfg, (0.4, 0.6))(z, t)
        assert_close(v, wanted, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_images_depend_on_seed_and_index_alone():
    """However they are batched; restated by Euler's method, one image at a time."""
    denoiser, pixels, classes = Denoiser(awake(tiny_net())), vae.load_vae("pixels"), [0, 3, 1]
    sampling = sample.Sampling(cfg=2.0, interval=(0.3, 0.8), steps=10, method="euler", seed=5)
    together = sample.generate(denoiser, pixels, range(4, 10), classes, sampling)
    for image, i, y in zip(together, range(4, 10), (3, 1, 0, 3, 1, 0)):
        noise = np.random.default_rng([5, i]).standard_normal((1, 3, 8, 8), dtype=np.float32)
        z = torch.from_numpy(noise)
        for k in range(10):
            v, u = (denoiser.velocity(z, k / 10, torch.tensor([label])) for label in (y, 5))
            z = z + (u + 2 * (v - u) if 3 < k < 8 else v) / 10
        apart = (image.int() - vae.to_uint8(z)[0].int()).abs()
        assert apart.max() <= 1 and (apart > 0).float().mean() < 0.02


def test_the_published_file_loads_and_says_what_it_predicts(tmp_path):
    net, path, (z, y, t, _) = awake(tiny_net(bottleneck=0)), tmp_path / "last.pth", rows(3)
    weights = {f"net.{name}": value for name, value in net.state_dict().items()}
    for flow_matching, target in ((True, "v"), (False, "x")):
        args = argparse.Namespace(img_size=128, flow_matching=flow_matching)
        torch.save({"model": {}, "model_ema1": weights, "epoch": 3, "args": args}, path)
        denoiser = load_denoiser(path)
        assert denoiser.target == target and denoiser.net.input_size == 128 / 16
        assert_close(denoiser.net(z, t, y), net(z, t, y))


# -------------------------------------------------------------------------------------------------
# train.py

def test_the_stream_shows_every_image_once_an_epoch():
    order = train.stream(3, np.arange(30), 10)
    epochs = order.reshape(3, 10)
    assert (np.sort(epochs) == np.arange(10)).all() and len(np.unique(epochs, axis=0)) == 3
    assert np.array_equal(train.stream(3, np.arange(7, 23), 10), order[7:23])  # however it is cut


def test_noise_follows_from_seed_step_and_position():
    """However a batch is divided. Each block of 16 positions has a random stream of its own."""
    blocks = []
    for block in range(4):
        key = np.random.SeedSequence([1, 2, 5, block]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(key))
        blocks.append(torch.randn(16, 3, 2, 2, generator=generator))
    whole = torch.cat(blocks)
    for first, count in ((0, 64), (7, 9), (15, 2), (16, 34), (49, 1)):
        part = train.step_noise(1, 5, first, count, (3, 2, 2), "cpu")
        assert torch.equal(part, whole[first:first + count])


def test_the_learning_rate_rises_stays_and_falls():
    lr = [train.learning_rate(step, 100, 2.0, 10, 0.3) for step in range(100)]
    assert lr[:10] == pytest.approx([0.2 * k for k in range(1, 11)])
    assert lr[9:71] == [2.0] * 62 and lr[85] == pytest.approx(1.0)
    assert lr[99] == pytest.approx(2 / 30)
    assert [train.learning_rate(step, 10, 2.0, 0, 0.0) for step in (0, 9)] == [2.0, 2.0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(cache, folder of a run of 6 steps)."""
    folder = tmp_path_factory.mktemp("trained")
    cache = small_cache(folder)
    assert train.main(flags(cache, folder / "run", "--val", cache, "--keep-every", 3)) == 0
    return cache, folder / "run"


@pytest.mark.parametrize("micro", [8, 2])
def test_three_steps_are_the_recipe_written_plainly(micro, trained, tmp_path):
    """Whole or in micro-batches of 2; 2 steps of warm-up, then the fall of the learning rate."""
    more = "--micro", micro, "--decay", 0.5, "--sample-every", 0
    assert train.main(flags(trained[0], tmp_path, *more, steps=3)) == 0
    torch.manual_seed(0)
    net = JLT(8, 4, 3, num_classes=4, **SIZES["T"])
    weights, data, logged = net.state_dict(), vae.LatentDataset(trained[0]), []
    emas = [{name: value.clone() for name, value in weights.items()} for _ in range(2)]
    optimizer = torch.optim.AdamW(net.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(3):
        order = np.random.default_rng([0, 0, 0]).permutation(40)[8 * step:8 * step + 8]
        rng = np.random.default_rng([0, 1, step])
        t = torch.sigmoid(-0.8 + 0.8 * torch.tensor(rng.standard_normal(8, dtype=np.float32)))
        drop, flip = torch.tensor(rng.random(8) < 0.1), rng.random(8) < 0.5
        (x, y), e = data.batch(order, flip), train.step_noise(0, step, 0, 8, (3, 8, 8), "cpu")
        loss = Denoiser(net)(x.float(), y, t, e, drop)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        lr = optimizer.param_groups[0]["lr"] = 1e-3 * (0.5, 1.0, 1 / 1.5)[step]
        optimizer.step()
        for ema, decay in zip(emas, (0.9, 0.5)):
            for name, value in weights.items():
                ema[name] = decay * ema[name] + (1 - decay) * value
        logged.append([step + 1, loss.item(), lr, norm.item()])
    np.testing.assert_allclose(np.array(log_rows(tmp_path, LOGGED), float), logged, rtol=1e-3)
    groups = {"model": weights, "ema": emas[0], "ema2": emas[1]} | {
        f"optimizer.{i}": optimizer.state[p] for i, p in enumerate(net.parameters())}
    tensors, _ = read_checkpoint(tmp_path / "last.safetensors")
    for group, wanted in groups.items():
        for name, value in wanted.items():
            assert_close(tensors[f"{group}.{name}"], value, atol=1e-5, rtol=1e-3)


def test_a_run_leaves_checkpoints_exports_and_a_log(trained):
    out = trained[1]
    steps = {path.stem: read_checkpoint(path)[1]["step"] for path in out.glob("*.safetensors")}
    assert steps == {"last": 6, "previous": 4, "ema": 6, "ema-step0000003": 3, "ema-step0000006": 6}
    tensors, settings = read_checkpoint(out / "last.safetensors")
    for name, weights in (("last", "model"), ("last", "ema"), ("last", "ema2"), ("ema", "ema2")):
        denoiser = load_denoiser(out / f"{name}.safetensors", weights)
        for key, value in denoiser.net.state_dict().items():
            assert torch.equal(value, tensors[f"{weights}.{key}"])
        assert denoiser.settings["times"] == settings["times"]
    steps, fit, val = zip(*log_rows(out, ("step", "fit", "val")))
    assert steps == tuple("123456") and fit == val and [bool(f) for f in fit] == [0, 0, 0, 0, 0, 1]
    assert [path.name for path in (out / "samples").iterdir()] == ["step0000006.png"]


def test_the_error_by_time_is_weighted_by_how_often_training_draws_each_time(trained):
    """Of a network that predicts v as 0, so that its error is v² itself."""
    data = vae.LatentDataset(trained[0])
    found = error_by_time(Denoiser(tiny_net(), "v"), data, torch.device("cpu"), False)
    noise = np.random.default_rng(0).standard_normal((40, 3, 8, 8), dtype=np.float32)
    errors = (data.batch(range(40))[0].float() - torch.from_numpy(noise)).square().mean((1, 2, 3))
    bins = torch.tensor([int(10 * (i * 0.6180339887 % 1)) for i in range(40)])
    by_time = torch.stack([errors[bins == k].mean() for k in range(10)])
    edges = (torch.arange(11) / 10).logit()
    share = torch.special.ndtr((edges + 0.8) / 0.8).diff()  # t = sigmoid(n), n ~ N(-0.8, 0.8²)
    assert [found[f"fit_t{k}5"] for k in range(10)] == pytest.approx(by_time.tolist())
    assert found["fit"] == pytest.approx((share * by_time).sum().item(), rel=1e-4)


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(trained, tmp_path):
    assert train.main(flags(trained[0], tmp_path, steps=4)) == 0
    assert train.main(flags(trained[0], tmp_path, "--save-every", 5)) == 0
    same_run(trained[1], tmp_path, LOGGED)  # the first part has a grid and an error of its own


KILLED = """
import os, signal, train
calls, replace = [], os.replace
def killed(*paths):
    calls.append(paths)
    os.kill(os.getpid(), signal.SIGKILL) if len(calls) == 5 else replace(*paths)
os.replace = killed
train.main()
"""


def test_a_run_that_is_killed_while_saving_continues_bit_for_bit(trained, tmp_path):
    """At a moment when `last` has become `previous` and is not yet replaced."""
    command = flags(trained[0], tmp_path, "--save-every", 1)
    killed = subprocess.run([sys.executable, "-c", KILLED, *command], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL and list(tmp_path.glob(".tmp*"))
    assert {path.stem for path in tmp_path.glob("[!.]*.safetensors")} == {"previous", "ema"}
    assert train.main(command) == 0 and not list(tmp_path.glob(".tmp*"))
    same_run(trained[1], tmp_path, LOGGED)


def test_a_step_that_is_not_finite_is_skipped_and_five_in_a_row_end_the_run(
        trained, tmp_path, monkeypatch, capsys):
    noise = train.step_noise
    monkeypatch.setattr(train, "step_noise", lambda seed, step, *rest: (
        noise(seed, step, *rest) * (1 if step in (0, 2) else math.nan)))
    assert train.main(flags(trained[0], tmp_path, "--sample-every", 0, steps=20)) == 1
    assert "step 8: the gradient was not finite 5 times in a row" in capsys.readouterr().err
    (last, settings), (previous, _) = (
        read_checkpoint(tmp_path / f"{name}.safetensors") for name in ("last", "previous"))
    assert (settings["step"], settings["skipped"]) == (8, 6)
    for name in last:  # but for the EMAs, which take the same network in once more
        assert name.startswith("ema") or torch.equal(last[name], previous[name])


def test_fine_tuning_keeps_all_but_the_labels_of_other_classes(trained, tmp_path):
    cache, start = small_cache(tmp_path, classes=3), trained[1] / "ema.safetensors"
    assert train.main(flags(cache, tmp_path, "--init", start, "--lr", 0, steps=1)) == 0
    before, after = (load_denoiser(path).net.state_dict()
                     for path in (start, tmp_path / "ema.safetensors"))
    assert len(after.pop("y_embedder.embedding_table.weight")) == 3 + 1
    assert all(torch.equal(value, before[name]) for name, value in after.items())


# -------------------------------------------------------------------------------------------------
# fid.py

@pytest.mark.parametrize("n, m", [(20, 30), (200, 300)])
def test_the_frechet_distance_in_another_way(n, m):
    """Of the Gaussians of n samples x and m samples y, also where those are fewer than dimensions:
    tr((S1 S2)^1/2) is the nuclear norm of x yᵀ, once both are centred."""
    rng = np.random.default_rng(2)
    x, y = rng.standard_normal((n, 64)), rng.standard_normal((m, 64)) * 2 + 1
    (m1, s1), (m2, s2) = ((part.mean(0), np.cov(part.T)) for part in (x, y))
    root = np.linalg.norm((x - m1) @ (y - m2).T, "nuc") / np.sqrt((n - 1) * (m - 1))
    distance = ((m1 - m2) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * root
    assert fid.frechet_distance(m1, s1, m2, s2) == pytest.approx(distance, rel=1e-8)
    assert abs(fid.frechet_distance(m1, s1, m1, s1)) < 1e-6  # equal ones are at 0
    known = fid.frechet_distance([1.0], [[4.0]], [3.0], [[25.0]])
    assert known == pytest.approx((1 - 3) ** 2 + (2 - 5) ** 2)


def plain_inception_score(logits):
    """As papers write it: exp of the mean KL(p(class | image) || p(class)), of 10 parts."""
    p = logits.double().softmax(1).numpy()[np.random.RandomState(2020).permutation(len(logits))]
    n, scores = len(p), []
    for i in range(10):
        part = p[i * n // 10:(i + 1) * n // 10]
        scores.append(np.exp((part * np.log(part / part.mean(0))).sum(1).mean()))
    return np.mean(scores)


@pytest.mark.parametrize("n, batch", [(10, 1), (57, 7)])
def test_streamed_statistics_are_those_of_all_at_once(n, batch):
    g = torch.Generator().manual_seed(3)
    x, logits = torch.randn(n, 24, generator=g) + 5, torch.randn(n, 9, generator=g) * 3
    statistics = fid.Statistics(n, features=24, classes=9)
    for part in reversed(torch.arange(n).split(batch)):  # in any order
        statistics.update(x[part], logits[part], part.tolist())
    mu, sigma = statistics.mean_and_covariance()
    np.testing.assert_allclose(mu, x.double().mean(0), rtol=1e-12)
    np.testing.assert_allclose(sigma, np.cov(x.double().T), rtol=1e-9, atol=1e-12)
    score = plain_inception_score(logits)
    assert statistics.inception_score() == pytest.approx(score, rel=1e-12)
    assert fid.inception_score(logits) == pytest.approx(score, rel=1e-12)


class SmallInception(torch.nn.Module):
    """Stands in for Inception: 16 features, 1008 logits."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.mix, self.fc = torch.nn.Linear(48, 16), torch.nn.Linear(16, 1008)

    @torch.inference_mode()
    def forward(self, images):
        features = 99 * self.mix(F.adaptive_avg_pool2d(images.float() / 255, 4).flatten(1))
        return features, self.fc(features)


# -------------------------------------------------------------------------------------------------
# The device, and the layout

@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not shutil.which("nvidia-smi"), reason="no GPU"))])
def test_a_device_trains_compiled_in_bf16_resumes_draws_and_scores(device, tmp_path):
    """The same body runs on the CPU, so that what a GPU would run cannot break unseen."""
    code = f"import test_all; test_all.on_a_device({device!r}, {str(tmp_path)!r})"
    env = os.environ | {"TEST_ON_GPU": GPU if device == "cuda" else ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, text=True,
                          capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr


def on_a_device(device, folder):
    """Train, resume, draw and score on this device, and check what came of it."""
    import lib.inception
    from lib.run import compile_net, pick_device
    folder = pathlib.Path(folder)
    cache = small_cache(folder)
    # Much smaller than T, so that compiling takes seconds.
    train.SIZES["T"] = dict(hidden_size=16, depth=1, num_heads=2, bottleneck=4)
    assert pick_device().type == device

    def trained(name, *more):
        assert train.main(flags(cache, folder / name, "--val", cache, *more)) == 0
        return np.array(log_rows(folder / name, ["loss"]), float)
    plain = trained("plain", "--precision", "fp32", "--no-compile")
    torch.compiler.reset()
    half = trained("half", "--precision", "bf16", *(["--compile"] if shutil.which("g++") else []))
    np.testing.assert_allclose(half, plain, rtol=0.02)
    if shutil.which("g++"):
        assert int(log_rows(folder / "half", ["graphs"])[-1][0]) > 0
    (folder / "half" / "last.safetensors").unlink()  # back to step 4
    np.testing.assert_allclose(trained("half", "--precision", "bf16"), half, rtol=0.02)

    denoiser = load_denoiser(folder / "half" / "ema.safetensors", device=device)
    assert next(denoiser.parameters()).device.type == device
    pixels, sampling = vae.load_vae("pixels", device), sample.Sampling(steps=4, cfg=2.0)
    drawn = sample.generate(denoiser, pixels, range(8), range(4), sampling)
    assert drawn.device.type == device and drawn.shape == (8, 3, 8, 8)
    if device == "cuda" and compile_net(denoiser.net, torch.device(device)):
        again = sample.generate(denoiser, pixels, range(8), range(4), sampling)
        assert (drawn.int() - again.int()).abs().max() <= 2

    torch.manual_seed(0)
    inception = lib.inception.Inception().eval().requires_grad_(False)
    for name, value in inception.state_dict().items():
        if "running_var" in name:
            value.fill_(1 / 6)  # so that features have a spread
    images = torch.randint(0, 256, (12, 3, 40, 40), dtype=torch.uint8)
    cpu, other = (fid.score([(range(12), images)], 12, {"fid": inception.to(where)})["fid"]
                  for where in ("cpu", device))
    for a, b in zip(cpu.mean_and_covariance(), other.mean_and_covariance()):
        assert (a - b).abs().max() < 1e-3 * a.abs().max()
    assert abs(cpu.inception_score() - other.inception_score()) < 1e-8


def test_imports_run_one_way():
    """A program may import what stands above it, and lib; lib imports no program, and only
    lib/checkpoint.py the network."""
    above = {"model": "", "lib/*": "lib", "lib/checkpoint": "lib model", "vae": "lib",
             "sample": "lib vae model", "fid": "lib vae model sample",
             "train": "lib vae model sample fid"}
    ours = set("model lib vae sample fid train bench ablations".split())
    allowed = {path: set(names.split()) for place, names in above.items()
               for path in ROOT.glob(f"{place}.py")}
    for path, names in allowed.items():
        lines = re.findall(r"^ *(?:from|import) (\w+(?:, \w+)*)", path.read_text(), re.M)
        imported = {name for line in lines for name in line.split(", ")}
        assert not imported & ours - names, path
