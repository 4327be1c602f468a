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

os.environ.setdefault("OMP_NUM_THREADS", "2")  # pytest -n 4 would start cores x 4 threads
VISIBLE = os.environ.get("CUDA_VISIBLE_DEVICES")
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # all tests but one run on the CPU
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
from lib.log import read_table
from model import JLT, SIZES, TARGETS, Denoiser, RMSNorm, coefficients, rotary_table, rotate, slope

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


def torchrun(ranks, *command, **env):
    """Run a program on several ranks of this machine's CPU; returns the finished process."""
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone",
         f"--nproc_per_node={ranks}", *map(str, command)],
        cwd=ROOT, text=True, capture_output=True, timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | env)


LOGGED = "step", "loss", "lr", "grad_norm"  # what a run repeats to the last bit


def log_rows(out, columns=(*LOGGED, "fit")):
    """Rows of a run's log.csv, as lists of texts."""
    return [[row[name] for name in columns] for row in read_table(out / "log.csv")[1]]


def same_run(a, b, columns=(*LOGGED, "fit")):
    """Assert that two runs' folders hold the same weights, optimizer, settings and log, bit for
    bit."""
    (left, one), (right, other) = (read_checkpoint(out / "last.safetensors") for out in (a, b))
    assert one == other and left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name
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


def test_names_are_those_of_the_published_weights():
    norms = "norm1 norm2 attn.q_norm attn.k_norm"
    layers = "attn.qkv attn.proj mlp.w12 mlp.w3 adaLN_modulation.1"
    rest = "t_embedder.mlp.0 t_embedder.mlp.2 final_layer.linear final_layer.adaLN_modulation.1"
    names = {"y_embedder.embedding_table.weight", "final_layer.norm_final.weight"}
    names |= {f"blocks.{k}.{name}.weight" for k in (0, 1) for name in f"{norms} {layers}".split()}
    names |= {f"blocks.{k}.{name}.bias" for k in (0, 1) for name in layers.split()}
    names |= {f"{name}.{part}" for name in rest.split() for part in ("weight", "bias")}
    two = {"x_embedder.proj1.weight", "x_embedder.proj2.weight", "x_embedder.proj2.bias"}
    one = {"x_embedder.proj.weight", "x_embedder.proj.bias"}
    assert tiny_net().state_dict().keys() == names | two
    assert tiny_net(bottleneck=0).state_dict().keys() == names | one


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


def test_a_new_network_predicts_zero_and_its_loss_is_known():
    (x, y, t, e), net = rows(4), tiny_net()
    assert not net(x, t, y).any()
    t4 = t[:, None, None, None]
    for target, error in {"x": x / (1 - t4), "eps": e / t4, "v": x - e}.items():
        assert_close(Denoiser(net, target)(x, y, t, e), (error**2).mean())


def test_patches_go_round_and_in_the_published_orders():
    """Out: row, column, channel. In: channel, row, column, as torch's own unfold lists them."""
    net, x = tiny_net(patch=2, bottleneck=0), torch.randn(2, 3, 8, 8)
    tokens = x.reshape(2, 3, 4, 2, 4, 2).permute(0, 2, 4, 3, 5, 1).reshape(2, 16, 12)
    assert_close(net.unpatchify(tokens), x)
    patches, proj = F.unfold(x, 2, stride=2).mT, net.x_embedder.proj
    assert_close(net.x_embedder(x), F.linear(patches, proj.weight.flatten(1), proj.bias))


def test_rotary_positions_are_complex_rotations():
    """The first half of a head's pairs turns with the token's row, the second with its column."""
    x = torch.randn(2, 9, 16)
    pairs = torch.view_as_complex(x.unflatten(-1, (2, 4, 2)))           # (2, tokens, half, pair)
    position = torch.tensor([divmod(token, 3) for token in range(9)])   # (tokens, half)
    angle = position[..., None] * 10000.0 ** (-torch.arange(4) / 4)        # (tokens, half, pair)
    turned = torch.view_as_real(pairs * torch.exp(1j * angle)).flatten(2)
    assert_close(rotate(x, *rotary_table(3, 16)), turned, atol=1e-5, rtol=1e-5)


def plain_forward(net, z, t, y):
    """The network of two blocks, two heads of 16 and patch 2, once more in plain formulas."""
    w = net.state_dict()

    def norm(x, name):
        return x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-6) * w[f"{name}.weight"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].flatten(1).T + w.get(f"{name}.bias", 0)

    def turned(x, name):
        return rotate(norm(x, name), net.rotary_cos, net.rotary_sin)

    angle = t[:, None] * 10000 ** (-torch.arange(128) / 128)
    c = linear(torch.cat([angle.cos(), angle.sin()], 1), "t_embedder.mlp.0")
    c = linear(F.silu(c), "t_embedder.mlp.2") + w["y_embedder.embedding_table.weight"][y]
    c = F.silu(c)[:, None]
    x = linear(linear(F.unfold(z, 2, stride=2).mT, "x_embedder.proj1"), "x_embedder.proj2")
    for b in ("blocks.0.", "blocks.1."):
        steer = linear(c, b + "adaLN_modulation.1").split(32, -1)
        shift, scale, gate, shift2, scale2, gate2 = steer
        h = norm(x, b + "norm1") * (1 + scale) + shift
        q, k, v = (part.split(16, -1) for part in linear(h, b + "attn.qkv").split(32, -1))
        heads = []
        for head in (0, 1):
            qh, kh = turned(q[head], b + "attn.q_norm"), turned(k[head], b + "attn.k_norm")
            heads.append(torch.softmax(qh @ kh.mT / math.sqrt(16), -1) @ v[head])
        x = x + gate * linear(torch.cat(heads, -1), b + "attn.proj")
        h = norm(x, b + "norm2") * (1 + scale2) + shift2
        left, right = linear(h, b + "mlp.w12").chunk(2, -1)
        x = x + gate2 * linear(F.silu(left) * right, b + "mlp.w3")
    shift, scale = linear(c, "final_layer.adaLN_modulation.1").chunk(2, -1)
    x = linear(norm(x, "final_layer.norm_final") * (1 + scale) + shift, "final_layer.linear")
    x = x.unflatten(-1, (4, -1)).transpose(-1, -2).flatten(2)  # to channel, row, column
    return F.fold(x.mT, z.shape[-2:], 2, stride=2)


def test_the_network_is_its_formulas():
    net = awake(tiny_net())
    z, y, t, _ = rows(3)
    assert_close(net(z, t, y), plain_forward(net, z, t, y), atol=2e-5, rtol=2e-4)
    assert_close(RMSNorm(4)(torch.full((4,), 1e-3)), torch.full((4,), 0.5**0.5))  # its 1e-6 counts


@pytest.mark.parametrize("bottleneck", [0, 8])
def test_every_parameter_gets_a_gradient(bottleneck):
    denoiser = Denoiser(awake(tiny_net(bottleneck=bottleneck)))
    denoiser(*rows(8)).backward()
    assert all(p.grad is not None and p.grad.any() for p in denoiser.parameters())


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

def vp(t):
    """A target that depends on t: the "v" of variance-preserving diffusion, uncorrelated with z for
    data of unit variance."""
    n = ((1 - t) ** 2 + t ** 2) ** 0.5
    return (1 - t) / n, -t / n


FIVE = TARGETS | {"u": (2, -1), "vp": vp}  # a fourth and a fifth target are one row each


@pytest.fixture(params=FIVE)
def target(request, monkeypatch):
    for name in ("u", "vp"):
        monkeypatch.setitem(TARGETS, name, FIVE[name])
    return request.param


class Oracle(torch.nn.Module):
    """A "network" that knows the answer, and remembers for which labels it was asked."""
    num_classes = 5

    def __init__(self, answer=None):
        super().__init__()
        self.answer, self.asked = answer, []

    def forward(self, z, t, y):
        self.asked.append(y.tolist())
        return self.answer


def of(target, x, e, t):
    a, b = coefficients(target, torch.as_tensor(t).reshape(-1, *[1] * (x.ndim - 1)))
    return a * x + b * e


def solved(target, guess, z, t):
    """The x and e with z = t x + (1-t) e and guess = a x + b e: two linear equations."""
    equations = torch.tensor([[[s, 1 - s], coefficients(target, s)] for s in t.tolist()])
    sides = torch.stack([z.flatten(1), guess.flatten(1)], 1)            # (B, 2, C H W)
    return torch.linalg.solve(equations, sides).view(len(z), 2, *z.shape[1:]).unbind(1)


def test_a_target_is_linear_in_v_with_its_slope(target):
    """x = z + (1-t) v and e = z - t v make a x + b e equal to (a+b) z + slope v."""
    x, _, t, e = rows(6)
    t4 = t[:, None, None, None]
    z, v, (a, b) = t4 * x + (1 - t4) * e, x - e, coefficients(target, t4)
    assert_close((a + b) * z + slope(target, t4) * v, of(target, x, e, t))
    known = {"x": 0.75, "eps": -0.25, "v": 1, "u": 1.75, "vp": 0.625 ** 0.5}
    assert slope(target, 0.25).item() == pytest.approx(known[target])
    floored = [slope(target, s, 0.05).item() for s in (0.01, 0.99)]  # the sign is kept
    n = (0.99 ** 2 + 0.01 ** 2) ** 0.5
    known = {"x": (0.99, 0.05), "eps": (-0.05, -0.99), "v": (1, 1), "u": (1.99, 1.01), "vp": (n, n)}
    assert floored == pytest.approx(known[target])
    assert slope("eps", 0.0, 0.05) == -0.05


def test_a_target_that_says_nothing_about_v_is_refused(monkeypatch):
    monkeypatch.setitem(TARGETS, "sum", (1, 1))  # its slope 1 - 2t is zero at t = 1/2
    for pair in (("sum", "v"), ("x", "sum"), ("y", "v")):
        with pytest.raises(ValueError, match="target"):
            Denoiser(Oracle(), *pair)


@pytest.mark.parametrize("loss", FIVE)
def test_a_loss_is_the_error_of_prediction_and_truth_both_converted(target, loss):
    """The slow way: solve prediction and z for x and e, and those for what the loss compares."""
    x, y, t, e = rows(6)
    t4 = t[:, None, None, None]
    z, guess = t4 * x + (1 - t4) * e, rows(6, seed=1)[0]
    assert Denoiser(Oracle(of(target, x, e, t)), target, loss)(x, y, t, e) < 1e-9
    error = of(loss, *solved(target, guess, z, t), t) - of(loss, x, e, t)
    assert_close(Denoiser(Oracle(guess), target, loss)(x, y, t, e), error.square().mean(),
                 rtol=1e-4, atol=0)


@pytest.mark.parametrize("target", TARGETS)
def test_weights_of_the_losses_are_the_table_with_floored_denominators(target):
    t = torch.tensor([0.001, 0.01, 0.3, 0.97, 0.999])
    one, a, b = torch.ones(5), (1 - t).clamp(min=0.05), t.clamp(min=0.05)
    table = {"x":   {"x": one, "eps": (t / a) ** 2, "v": 1 / a**2},
             "eps": {"x": ((1 - t) / b) ** 2, "eps": one, "v": 1 / b**2},
             "v":   {"x": (1 - t) ** 2, "eps": t**2, "v": one}}
    for loss, weight in table[target].items():
        assert_close(Denoiser(Oracle(), target, loss).loss_weight(t), weight)


def test_the_right_answer_gives_the_same_velocity_whatever_the_target(target):
    x, y, _, e = rows(5)
    for t in (0.05, 0.3, 0.95):
        denoiser, z = Denoiser(Oracle(of(target, x, e, t)), target), t * x + (1 - t) * e
        for time in (t, torch.full((5,), t)):
            assert_close(denoiser.velocity(z, time, y), x - e, atol=2e-5, rtol=1e-4)
    assert_close(Denoiser(Oracle(0 * z), "x").velocity(z, 0.99, y), (0 - z) / 0.05)  # the floor
    assert not Denoiser(Oracle(e), "eps").velocity(e, 0.0, y).any()


@pytest.mark.parametrize("mean, std", [(-0.8, 0.8), (0.5, 1.2)])
def test_times_are_logit_normal(mean, std):
    normals = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    logits = Denoiser(Oracle(), P_mean=mean, P_std=std).times(normals).logit()
    assert logits.mean().item() == pytest.approx(mean, abs=0.01)
    assert logits.std().item() == pytest.approx(std, abs=0.01)


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


@pytest.mark.parametrize("place, root", [("net", "net"), ("net/vae", "net"), ("vae", "vae")])
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


@pytest.mark.parametrize("size", [(33, 32), (200, 97), (64, 131), (10, 7), (64, 64), (1, 1)])
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


@pytest.fixture
def few(monkeypatch):
    """Shards of four images, so that a small folder fills several."""
    monkeypatch.setattr(vae, "SHARD", 4)


def read_all(images, size):
    return torch.stack([read_image(path, size)[0] for path in sorted(images.rglob("*.png"))])


def shard_bytes(folder):
    return {path.name: path.read_bytes() for path in folder.glob("latents_*.safetensors")}


def test_the_cache_gives_back_images_and_mirrored_images(tmp_path, few):
    images = image_folder(tmp_path / "images")
    assert write_cache(images, tmp_path / "cache", 16, "--batch", 3) == 0
    data, wanted = vae.LatentDataset(tmp_path / "cache"), read_all(images, 16)
    assert (len(data), data.shape, data.size, data.num_classes) == (14, (3, 16, 16), 16, 2)
    assert data.class_names == ["cat", "dog"] and data.vae == {"kind": "pixels", "id": "pixels"}
    x, y = data.batch(range(14))
    assert x.dtype == torch.float16 and y.tolist() == [0] * 7 + [1] * 7
    assert torch.equal(vae.to_uint8(x), wanted)
    rng = np.random.default_rng(0)
    order, flip = rng.integers(0, 14, 50), rng.random(50) < 0.5
    mixed = torch.stack([wanted[i].flip(-1) if f else wanted[i] for i, f in zip(order, flip)])
    assert torch.equal(vae.to_uint8(data.batch(order, flip)[0]), mixed)
    assert torch.equal(data[-1][0], x[13]) and data[-1][1] == 1
    assert write_cache(images, tmp_path / "never", 16, "--no-flip") == 0
    data = vae.LatentDataset(tmp_path / "never")
    assert not data.mirrored and torch.equal(data.batch(range(14), True)[0], x)


def test_the_mirrored_latent_is_the_mirrored_images_latent(tmp_path):
    """It is not the mirror image of the latent, where the codec is not symmetric."""
    tiny_flux2(tmp_path / "vae")
    images, codec = image_folder(tmp_path / "images", 2), vae.load_vae(str(tmp_path / "vae"))
    assert write_cache(images, tmp_path / "cache", 32, codec=tmp_path / "vae") == 0
    data = vae.LatentDataset(tmp_path / "cache")
    wanted = codec.encode(vae.from_uint8(read_all(images, 32)).flip(-1))
    mirrored = data.batch(range(4), True)[0]
    assert_close(mirrored, wanted.half(), rtol=1e-3, atol=1e-3)
    assert (mirrored - data.batch(range(4))[0].flip(-1)).abs().max() > 0.1
    assert (data.vae, data.vae_path) == ({"kind": "flux2", "id": codec.id}, str(tmp_path / "vae"))


def test_the_cache_is_the_same_bytes_from_two_ranks_and_in_two_pieces(tmp_path, few, monkeypatch):
    images = image_folder(tmp_path / "images")
    (images / "cat" / "03.png").write_bytes(b"no image")
    assert write_cache(images, tmp_path / "one", 16, "--batch", 3) == 0
    whole = shard_bytes(tmp_path / "one")
    with monkeypatch.context() as ranks:
        ranks.setenv("WORLD_SIZE", "2")
        for number, shards in (("1", 2), ("0", 4)):
            ranks.setenv("RANK", number)
            argv = f"--images {images} --out {tmp_path}/two --vae pixels --size 16 --batch 3"
            assert vae.main.__wrapped__(argv.split()) == 0
            assert len(shard_bytes(tmp_path / "two")) == shards
    assert shard_bytes(tmp_path / "two") == whole

    encode, calls = vae.Pixels.encode, []  # a signal in the midst of the third shard

    def interrupted(self, images):
        calls.append(images)
        if len(calls) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return encode(self, images)
    with monkeypatch.context() as stopped:
        stopped.setattr(vae.Pixels, "encode", interrupted)
        assert write_cache(images, tmp_path / "pieces", 16, "--batch", 3) == 128 + signal.SIGTERM
    first = {path: path.stat().st_mtime_ns for path in tmp_path.glob("pieces/*.safetensors")}
    assert len(first) == 2
    assert write_cache(images, tmp_path / "pieces", 16, "--batch", 3) == 0
    assert shard_bytes(tmp_path / "pieces") == whole
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

def gaussian(var, target, t_eps=0.0):
    """The velocity of the best network for data x ~ N(0, var): where training would end."""
    denoiser = Denoiser(Oracle(), target, t_eps=t_eps)

    def velocity(z, t):
        x, e = t * var * z, (1 - t) * z  # E[x | z] and E[e | z], but for the variance of z
        best = of(target, x, e, t) / (t * t * var + (1 - t) ** 2)
        return denoiser.to_velocity(best, z, t)
    return velocity


@pytest.mark.parametrize("target", ["x", "v"])
@pytest.mark.parametrize("method, order", [("euler", 1), ("heun", 2)])
def test_the_ode_lands_on_the_gaussian(target, method, order):
    """Its flow is linear: noise z lands on std * z. The error falls as 1/steps^order."""
    z = torch.linspace(-2, 2, 64, dtype=torch.float64)
    ends = [sample.ode_sample(gaussian(4.0, target), z, n, method) for n in (80, 160)]
    few, many = ((end - 2 * z).norm() / z.norm() for end in ends)
    assert few / many == pytest.approx(2**order, rel=0.1) and many < 0.05


def test_the_floor_leaves_some_noise_and_takes_some_contrast():
    """In the paper's 50 steps. Data without variance show the noise, of variance 1 the contrast."""
    def end(var, target, t_eps):
        z = torch.ones(1, dtype=torch.float64)
        return sample.ode_sample(gaussian(var, target, t_eps), z, 50).item()
    assert abs(end(0, "x", 0)) < 1e-9 and 0.01 < end(0, "x", 0.05) < 0.025
    for target, contrast in {"x": 0.978, "eps": 1.026, "v": 1.0}.items():
        assert end(1, target, 0.05) == pytest.approx(contrast, abs=0.002)


def test_evaluations_are_counted_as_in_the_paper():
    """50 Heun steps are 99, of which 88 lie in the interval and are guided, in a doubled batch."""
    def counted(cfg, low, steps=50, method="heun"):
        net, z = Oracle(torch.zeros(())), torch.zeros(3, 1, 1, 1)
        velocity = sample.guided_velocity(Denoiser(net), torch.zeros(3).long(), cfg, (low, 1.0))
        sample.ode_sample(velocity, z, steps, method)
        return len(net.asked), net.asked.count([0, 0, 0, 5, 5, 5])
    assert counted(2.9, 0.1) == (99, 88)
    assert counted(2.9, 0.0) == (99, 99)
    assert counted(1.0, 0.0) == (99, 0)
    assert counted(2.9, 0.1, method="euler") == (50, 44)
    assert counted(2.9, 0.0, steps=1) == (1, 1)


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


def test_draws_and_noise_follow_from_seed_step_and_position():
    whole = train.step_noise(1, 2, 0, 50, (3, 2, 2), "cpu")
    for first, count in ((0, 7), (7, 9), (15, 2), (16, 34), (49, 1)):
        part = train.step_noise(1, 2, first, count, (3, 2, 2), "cpu")
        assert torch.equal(part, whole[first:first + count])
    key = np.random.SeedSequence([1, 2, 2, 1]).generate_state(1, np.uint64)[0]  # of block 1
    block = torch.randn(16, 3, 2, 2, generator=torch.Generator().manual_seed(int(key)))
    assert torch.equal(whole[16:32], block)
    many = train.step_noise(0, 0, 0, 4096, (4, 4), "cpu")
    for other in (many[16:], train.step_noise(1, 0, 0, 4080, (4, 4), "cpu"),
                  train.step_noise(0, 1, 0, 4080, (4, 4), "cpu")):
        assert abs(other.mean()) < 0.02 and abs(other.std() - 1) < 0.02
        assert abs((other * many[:-16]).mean()) < 0.02  # no block, seed or step is like another
    normals, drop, flip = train.draws(0, 5, 10_000)
    assert abs(normals.mean()) < 0.03 and abs(normals.std() - 1) < 0.03
    assert np.abs(np.sort([drop, flip]) - np.linspace(0, 1, 10_000)).max() < 0.02  # uniform
    assert np.abs(np.corrcoef([normals, drop, flip]) - np.eye(3)).max() < 0.05


def test_the_learning_rate_rises_stays_and_falls():
    lr = [train.learning_rate(step, 100, 2.0, 10, 0.3) for step in range(100)]
    assert lr[:10] == pytest.approx([0.2 * k for k in range(1, 11)])
    assert lr[9:71] == [2.0] * 62 and lr[85] == pytest.approx(1.0)
    assert lr[99] == pytest.approx(2 / 30)
    assert [train.learning_rate(step, 10, 2.0, 0, 0.0) for step in (0, 9)] == [2.0, 2.0]


@pytest.mark.parametrize("decay", [0.0, 0.9, 1.0])
def test_the_ema_is_its_formula(decay):
    ema, net = ([*network.parameters()] for network in (tiny_net(), awake(tiny_net())))
    wanted = [decay * a + (1 - decay) * p for a, p in zip(ema, net)]
    train.update_ema(ema, net, decay)
    assert_close(ema, wanted)


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


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(trained, tmp_path):
    assert train.main(flags(trained[0], tmp_path, steps=4)) == 0
    assert train.main(flags(trained[0], tmp_path, "--save-every", 5)) == 0
    same_run(trained[1], tmp_path, LOGGED)  # the first part has a grid and an error of its own


KILLED = """
import os, signal, sys, train
calls, replace = [], os.replace
def killed(*paths):
    calls.append(paths)
    os.kill(os.getpid(), signal.SIGKILL) if len(calls) == int(sys.argv[1]) else replace(*paths)
os.replace = killed
train.main(sys.argv[2:])
"""


def test_a_run_that_is_killed_while_saving_continues_bit_for_bit(trained, tmp_path):
    """First when `last` has become `previous` and is not yet replaced, then before that."""
    command = flags(trained[0], tmp_path, "--save-every", 1)
    for call, left in ((5, {"previous", "ema"}), (4, {"previous", "ema", "last"})):
        killed = subprocess.run([sys.executable, "-c", KILLED, str(call), *command], cwd=ROOT)
        assert killed.returncode == -signal.SIGKILL and list(tmp_path.glob(".tmp*"))
        assert {path.stem for path in tmp_path.glob("[!.]*.safetensors")} == left
    assert train.main(command) == 0 and not list(tmp_path.glob(".tmp*"))
    same_run(trained[1], tmp_path, LOGGED)


def test_a_step_that_is_not_finite_is_skipped_and_five_in_a_row_end_the_run(
        trained, tmp_path, monkeypatch, capsys):
    bad, noise = set(), train.step_noise
    monkeypatch.setattr(train, "step_noise", lambda seed, step, *rest: (
        noise(seed, step, *rest) * (math.nan if step in bad else 1)))

    def run(steps):
        code = train.main(flags(trained[0], tmp_path, "--sample-every", 0, steps=steps))
        return code, *read_checkpoint(tmp_path / "last.safetensors")
    _, two, _ = run(2)
    bad |= {2}
    code, three, settings = run(3)
    assert code == 0 and settings["skipped"] == 1
    for name in two:  # but for the averages, which take the same network in once more
        assert name.startswith("ema") or torch.equal(two[name], three[name])
    bad |= {3, *range(5, 20)}  # a good one, 4, lies between
    code, _, settings = run(20)
    error = capsys.readouterr().err
    assert code == 1 and "step 10: the gradient was not finite 5 times in a row" in error
    assert (settings["step"], settings["skipped"]) == (10, 7)


def test_fine_tuning_keeps_all_but_the_labels_of_other_classes(trained, tmp_path):
    cache, start = small_cache(tmp_path, classes=3), trained[1] / "ema.safetensors"
    assert train.main(flags(cache, tmp_path, "--init", start, "--lr", 0, steps=1)) == 0
    before, after = (load_denoiser(path).net.state_dict()
                     for path in (start, tmp_path / "ema.safetensors"))
    assert len(after.pop("y_embedder.embedding_table.weight")) == 3 + 1
    assert all(torch.equal(value, before[name]) for name, value in after.items())


# -------------------------------------------------------------------------------------------------
# fid.py

def test_frechet_distance_has_closed_forms():
    """Covariances that commute, in any basis; and 2 x 2, where the trace of a root is known."""
    rng = np.random.default_rng(0)
    a, b, mu = rng.uniform(0, 3, 32), rng.uniform(0, 3, 32), rng.standard_normal(32)
    wanted = (mu**2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    turn = np.linalg.qr(rng.standard_normal((32, 32)))[0]
    found = fid.frechet_distance(mu, turn * a @ turn.T, 0 * mu, turn * b @ turn.T)
    assert found == pytest.approx(wanted, rel=1e-10)
    s1, s2 = (np.cov(rng.standard_normal((2, 9))) for _ in range(2))
    root = np.sqrt(np.trace(s1 @ s2) + 2 * np.sqrt(np.linalg.det(s1 @ s2)))
    found = fid.frechet_distance(np.zeros(2), s1, np.ones(2), torch.from_numpy(s2))
    assert found == pytest.approx(2 + np.trace(s1 + s2) - 2 * root, rel=1e-10)


def test_frechet_distance_of_singular_covariances():
    """Fewer samples x, y than dimensions: tr((S1 S2)^1/2) is the nuclear norm of x yᵀ."""
    rng = np.random.default_rng(2)
    x, y = rng.standard_normal((20, 64)), rng.standard_normal((30, 64)) * 2 + 1
    (m1, s1), (m2, s2) = ((part.mean(0), np.cov(part.T)) for part in (x, y))
    cross = np.linalg.svd((x - m1) @ (y - m2).T, compute_uv=False).sum() / np.sqrt(19 * 29)
    wanted = ((m1 - m2) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * cross
    assert fid.frechet_distance(m1, s1, m2, s2) == pytest.approx(wanted, rel=1e-8)
    assert abs(fid.frechet_distance(m1, s1, m1, s1)) < 1e-6  # equal ones are at 0


def plain_inception_score(logits):
    """As papers write it: exp of the mean KL(p(class | image) || p(class)), of 10 parts."""
    p = logits.double().softmax(1).numpy()[np.random.RandomState(2020).permutation(len(logits))]
    n, scores = len(p), []
    for i in range(10):
        part = p[i * n // 10:(i + 1) * n // 10]
        scores.append(np.exp((part * np.log(part / part.mean(0))).sum(1).mean()))
    return np.mean(scores)


@pytest.mark.parametrize("n, batch", [(10, 1), (57, 7), (130, 64)])
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


TWO_RANKS = """
import sys, torch, fid, test_all, train
from lib.run import connect, from_rank_0, rank, rank_batches
connect()
assert from_rank_0([rank()]) == [0]
x = test_all.rows(100, size=2)[0].flatten(1)
statistics = fid.Statistics(100, features=12, classes=8)
for part in rank_batches(100, 7):
    statistics.update(x[list(part)], x[list(part), :8], part)
statistics.all_reduce()
both = *statistics.mean_and_covariance(), statistics.inception_score()
torch.save(both, f"{sys.argv[1]}/{rank()}.pt")
del sys.argv[1]
train.main()
"""


def test_two_ranks_measure_and_train_as_one(trained, tmp_path):
    more, x = flags(trained[0], tmp_path, "--micro", 2), rows(100, size=2)[0].flatten(1)
    done = torchrun(2, "--no-python", sys.executable, "-c", TWO_RANKS, tmp_path, *more)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        mu, sigma, score = torch.load(tmp_path / f"{rank}.pt")
        np.testing.assert_allclose(mu, x.double().mean(0), atol=1e-12)
        np.testing.assert_allclose(sigma, np.cov(x.double().T), atol=1e-12)
        assert score == pytest.approx(plain_inception_score(x[:, :8]), rel=1e-12)
    one, two = (np.array(log_rows(out, LOGGED), float) for out in (trained[1], tmp_path))
    np.testing.assert_allclose(one, two, rtol=1e-3)
    a, b = (read_checkpoint(out / "last.safetensors")[0] for out in (trained[1], tmp_path))
    assert all((a[name] - b[name]).abs().max() < 1e-5 for name in a if name.startswith("model."))


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


def test_a_network_is_scored_by_what_it_draws(trained, tmp_path, monkeypatch):
    """By fid.py and, with the same number, by training itself."""
    inception, rng, ref = SmallInception(), np.random.default_rng(1), tmp_path / "ref.npz"
    monkeypatch.setattr(fid.Statistics.__init__, "__defaults__", ("cpu", 16, 1008))
    monkeypatch.setattr(fid, "FEATURES", 16)
    monkeypatch.setattr(fid, "load_inception", lambda path, device: inception)
    np.savez(ref, mu=rng.standard_normal(16), sigma=np.cov(rng.standard_normal((16, 40))))
    denoiser, pixels = load_denoiser(trained[1] / "ema.safetensors"), vae.load_vae("pixels")
    sampling, reference = sample.Sampling(cfg=2.0, steps=5, seed=3), fid.load_reference(ref)
    extractors = {"fid": inception}
    row = fid.evaluate(denoiser, pixels, extractors, reference, 20, sampling, 8, classes=[1, 2])
    images = [sample.generate(denoiser, pixels, part, [1, 2], sampling)
              for part in (range(8), range(8, 16), range(16, 20))]
    features, logits = inception(torch.cat(images))
    mu, sigma = features.double().mean(0), np.cov(features.double().T)
    distance = fid.frechet_distance(mu, sigma, reference.mu, reference.sigma)
    assert row["fid"] == pytest.approx(distance, rel=1e-6)
    assert row["inception_score"] == pytest.approx(plain_inception_score(logits), rel=1e-6)

    more = "--sample-every", 0, "--eval-every", 6, "--ref", ref, "--eval-n", 12
    assert train.main(flags(trained[0], tmp_path, *more)) == 0
    assert fid.main(f"--ckpt {tmp_path}/ema.safetensors --ref {ref} --num-samples 12".split()) == 0
    (row,), logged = read_table(tmp_path / "fid.csv")[1], log_rows(tmp_path, ("fid", "fid_n"))[-1]
    assert float(row["fid"]) == pytest.approx(float(logged[0]), rel=1e-6)
    assert row["cfg"] == "2.9" and row["n"] == logged[1]
    columns = "target weights interval steps method nfe t_eps vae seed precision classes".split()
    known = "x ema 0.1,1 50 heun 99 0.05 pixels 0 fp32 all".split()
    assert [row[name] for name in columns] == known


# -------------------------------------------------------------------------------------------------
# The device, and the layout

@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not shutil.which("nvidia-smi"), reason="no GPU"))])
def test_a_device_trains_compiled_in_bf16_resumes_draws_and_scores(device, tmp_path):
    """The same body runs on the CPU, so that what a GPU would run cannot break unseen."""
    script = tmp_path / "script.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
                      f"import test_all; test_all.on_a_device({device!r}, sys.argv[1])\n")
    env = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    visible = {} if VISIBLE is None else {"CUDA_VISIBLE_DEVICES": VISIBLE}
    done = subprocess.run([sys.executable, script, tmp_path], env=env | visible | hidden, text=True,
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
    """A program may import what stands above it, and lib; lib imports no program."""
    above = {"model": "", "lib": "lib model", "vae": "lib", "sample": "lib vae model",
             "fid": "lib vae model sample", "train": "lib vae model sample fid"}
    for place, allowed in above.items():
        for path in ROOT.glob("lib/*.py" if place == "lib" else f"{place}.py"):
            imported = set(re.findall(r"^ *(?:from|import) (\w+)", path.read_text(), re.M))
            assert not imported & {*above, "bench", "ablations"} - set(allowed.split()), path
