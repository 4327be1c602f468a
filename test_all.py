"""Every formula against a closed form, a trusted library or a second way of computing it; every promise of the programs
against what they do. Minutes on two CPU cores: python -m pytest -q test_all.py"""
import argparse
import csv
import json
import math
import os
import pathlib
import pickle
import re
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

from model import JLT, SIZES, TARGETS, Denoiser, rotary_table, rotate

import sample
import train
import vae
from lib.checkpoint import read_checkpoint, save_checkpoint, tensors_of
from lib.run import BadInput, RunFailed, lock_folder
from sample import generate, guided_velocity, image_noise, load_denoiser, ode_sample
from vae import LatentDataset, load_vae

ROOT = pathlib.Path(__file__).resolve().parent


# ---------------------------------------------------------------------------------------------------------------------
# model.py: the network

def tiny_net(patch=2, channels=3, size=8, **other):
    return JLT(size, patch, channels, **(dict(hidden_size=32, depth=2, num_heads=2, num_classes=5, bottleneck=8) | other))


def awake(net, seed=0):
    """The same network with random weights everywhere, so that no zero-initialised layer hides what lies before it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return net


def rows(n, size=8, channels=3, classes=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(n, channels, size, size, generator=g), torch.randint(classes, (n,), generator=g),
            torch.rand(n, generator=g) * 0.9 + 0.05, torch.randn(n, channels, size, size, generator=g))


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
    blocks = [f"blocks.{i}.{name}" for i in range(2) for name in (
        "norm1.weight", "norm2.weight", "attn.qkv.weight", "attn.qkv.bias", "attn.q_norm.weight", "attn.k_norm.weight",
        "attn.proj.weight", "attn.proj.bias", "mlp.w12.weight", "mlp.w12.bias", "mlp.w3.weight", "mlp.w3.bias",
        "adaLN_modulation.1.weight", "adaLN_modulation.1.bias")]
    rest = ["t_embedder.mlp.0.weight", "t_embedder.mlp.0.bias", "t_embedder.mlp.2.weight", "t_embedder.mlp.2.bias",
            "y_embedder.embedding_table.weight", "final_layer.norm_final.weight", "final_layer.linear.weight",
            "final_layer.linear.bias", "final_layer.adaLN_modulation.1.weight", "final_layer.adaLN_modulation.1.bias"]
    two = ["x_embedder.proj1.weight", "x_embedder.proj2.weight", "x_embedder.proj2.bias"]
    assert set(tiny_net().state_dict()) == {*blocks, *rest, *two}
    assert set(tiny_net(bottleneck=0).state_dict()) == {*blocks, *rest, "x_embedder.proj.weight", "x_embedder.proj.bias"}


def test_initialisation():
    torch.manual_seed(0)
    net = JLT(8, 2, 16, hidden_size=128, depth=1, num_heads=4, bottleneck=32)
    for weight in (net.blocks[0].attn.qkv.weight, net.blocks[0].mlp.w12.weight, net.x_embedder.proj1.weight):
        fan_out, fan_in = weight.flatten(1).shape
        bound = math.sqrt(6 / (fan_in + fan_out))
        assert weight.abs().max() <= bound and weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    for weight in (net.t_embedder.mlp[0].weight, net.t_embedder.mlp[2].weight, net.y_embedder.embedding_table.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    zero = [*(m.bias for m in net.modules() if getattr(m, "bias", None) is not None), net.final_layer.linear.weight,
            net.blocks[0].adaLN_modulation[1].weight, net.final_layer.adaLN_modulation[1].weight]
    assert all(not p.any() for p in zero)


@pytest.mark.parametrize("target", TARGETS)
def test_new_network_predicts_zero_and_its_loss_is_known(target):
    x, y, t, e = rows(4)
    denoiser = Denoiser(tiny_net(), target, "v")
    assert not denoiser.net(x, t, y).any()
    w = {"x": 1 / (1 - t) ** 2, "v": torch.ones(4), "eps": 1 / t ** 2}[target]
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
    """The whole forward pass, restated with explicit matrices, one head and one token at a time where that is clearer."""
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
    table = {"x": {"v": 1 / a ** 2, "x": t * 0 + 1, "eps": (t / a) ** 2},
             "v": {"v": t * 0 + 1, "x": (1 - t) ** 2, "eps": t ** 2},
             "eps": {"v": 1 / b ** 2, "x": ((1 - t) / b) ** 2, "eps": t * 0 + 1}}
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
    assert Denoiser(Oracle(0 * z), "x").velocity(z, 0.99, y[:1]).unique().item() == pytest.approx(-1 / 0.05)  # the floor


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


def test_gaussian_theory():
    """x ~ N(0, λ) and e ~ N(0, 1) in one direction: covariances of the targets, their Bayes estimators given z, and what
    stays unknown, by regression on many draws (an estimator linear in z is its slope)."""
    g = torch.Generator().manual_seed(0)
    for lam, t in ((4.0, 0.3), (0.25, 0.6), (0.01, 0.5)):
        x = math.sqrt(lam) * torch.randn(1_000_000, generator=g, dtype=torch.float64)
        e = torch.randn(1_000_000, generator=g, dtype=torch.float64)
        z, v = t * x + (1 - t) * e, x - e
        var_z = t * t * lam + (1 - t) ** 2
        slopes = {"x": t * lam / var_z, "v": (t * lam - (1 - t)) / var_z, "eps": (1 - t) / var_z}
        left = {}
        for name, truth in {"x": x, "v": v, "eps": e}.items():
            slope = (truth * z).mean() / z.square().mean()
            assert slope.item() == pytest.approx(slopes[name], abs=0.01)
            left[name] = (truth - slope * z).var()
        assert v.var().item() == pytest.approx(lam + 1, rel=0.01)
        assert (left["v"] / left["x"]).item() == pytest.approx(1 / (1 - t) ** 2, rel=1e-3)
        assert (left["eps"] / left["x"]).item() == pytest.approx(t ** 2 / (1 - t) ** 2, rel=1e-3)
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
    assert error[0] / error[1] == pytest.approx(2 ** order, rel=0.15)
    assert error[1] / error[2] == pytest.approx(2 ** order, rel=0.1)
    assert error[2] < 0.05 * z.norm().item()


def test_floor_of_the_sampler_leaves_some_noise_and_takes_some_contrast():
    """FACTS of the floor at 50 steps, for data without (λ = 0) and with (λ = 1) variance."""
    z = torch.randn(1000, dtype=torch.float64)
    left = {floor: ode_sample(Gaussian(0.0, "x", floor).velocity, z, 50, "heun").norm() / z.norm() for floor in (0, 0.05)}
    assert left[0] < 1e-9 and 0.01 < left[0.05] < 0.025
    kept = {target: (ode_sample(Gaussian(1.0, target, 0.05).velocity, z, 50, "heun").norm() / z.norm()).item()
            for target in TARGETS}
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
    torch.testing.assert_close(guided_velocity(denoiser, y, 3.0)(z, 0.5), nobody + 3 * (plain - nobody), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(guided_velocity(denoiser, y, 3.0)(z, 0.1), denoiser.velocity(z, 0.1, y))  # 0.1 < t, strictly
    assert (plain - nobody).abs().max() > 1e-3


def test_pictures_depend_on_seed_and_index_alone():
    denoiser, vae, classes = Denoiser(awake(tiny_net())).eval(), load_vae("pixels"), [0, 3, 1]
    together = generate(denoiser, vae, range(7), classes, seed=5, cfg=2.0, steps=6)
    alone = torch.cat([generate(denoiser, vae, [i], classes, seed=5, cfg=2.0, steps=6) for i in range(7)])
    apart = (together.int() - alone.int()).abs()
    assert apart.max() <= 1 and (apart > 0).float().mean() < 0.01
    other = generate(denoiser, vae, range(7), classes, seed=6, cfg=2.0, steps=6)
    assert (other != together).float().mean() > 0.5
    noise = image_noise(5, [3, 2 ** 40], (3, 8, 8))
    assert torch.equal(noise[0], image_noise(5, [3], (3, 8, 8))[0]) and noise.dtype == torch.float32
    assert abs(image_noise(0, range(100), (3, 8, 8)).std().item() - 1) < 0.02


def save_tiny(path, net=None, **settings):
    net = net or awake(tiny_net())
    averages = [awake(tiny_net(), seed=1), awake(tiny_net(), seed=2)]
    base = dict(target="x", loss="v", P_mean=-0.8, P_std=0.8, t_eps=0.05, label_drop=0.1, input_size=8, step=100,
                ema=[0.9, 0.99], vae={"kind": "pixels", "id": "pixels"}, hint=None, size=8, class_names=list("abcde"),
                cfg=1.5, interval=[0.1, 1.0], model="T", patch=2)
    save_checkpoint(path, tensors_of(net, averages) | {f"model.{k}": v for k, v in net.state_dict().items()}, base | settings)
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
    assert read_checkpoint(path)[1] == {"step": 2} and sorted(os.listdir(tmp_path)) == ["last.safetensors", "previous.safetensors"]


def release_layout(net, **args):
    weights = {f"net.{name}": value for name, value in net.state_dict().items()} | {"net.mask_token": torch.zeros(1, 1, 4)}
    return {"model": {k: v.bfloat16() for k, v in weights.items()}, "model_ema1": weights,
            "model_ema2": {k: v * 0.5 for k, v in weights.items()}, "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4}]},
            "epoch": 3, "args": argparse.Namespace(img_size=128, **args)}


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
    torch.testing.assert_close(half.net.state_dict()["blocks.0.attn.qkv.weight"], net.blocks[0].attn.qkv.weight.bfloat16().float())
    assert torch.equal(load_denoiser(path, "ema2").net.x_embedder.proj.weight, net.x_embedder.proj.weight * 0.5)
    torch.save(release_layout(net), path)
    with pytest.raises(BadInput, match="--target"):
        load_denoiser(path)
    assert load_denoiser(path, target="x").target == "x"


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_plain_state_dict_loads(tmp_path, kind):
    net, path = awake(tiny_net()), tmp_path / f"plain.{kind}"
    torch.save(net.state_dict(), path) if kind == "pth" else save_file(net.state_dict(), path)
    z, y, t, _ = rows(3)
    torch.testing.assert_close(load_denoiser(path, target="x", input_size=8).net(z, t, y), net(z, t, y))


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


@pytest.mark.parametrize("change, said", [
    (lambda s: s.pop("blocks.1.mlp.w3.bias"), "blocks.1.mlp.w3.bias is missing"),
    (lambda s: s.update({"pos_embed": torch.zeros(3)}), "pos_embed is unknown"),
    (lambda s: s.update({"blocks.0.norm1.weight": torch.zeros(3)}), "blocks.0.norm1.weight does not have the shape"),
    (lambda s: s.clear(), "not the weights of a JLT")])
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
    assert sample.main([*common, "--out", "folder"]) == 0 and sample.main([*common, "--out", "all.npz"]) == 0
    assert sorted(os.listdir(".")) == ["a.safetensors", "all.npz", "folder", "grid.png"]
    with np.load("all.npz") as file:  # what the guided-diffusion evaluator asks of a file
        assert file.files == ["arr_0"]
        pixels = file["arr_0"]
    assert pixels.dtype == np.uint8 and pixels.shape == (7, 8, 8, 3)
    for i in range(7):
        assert np.array_equal(np.asarray(Image.open(f"folder/{i:06d}.png")), pixels[i])
    wanted = generate(load_denoiser("a.safetensors"), load_vae("pixels"), range(7), list(range(5)), cfg=1.5, steps=3)
    assert np.abs(wanted.permute(0, 2, 3, 1).numpy().astype(int) - pixels).max() <= 1


def test_newest_checkpoint_is_the_newest_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for age, name in enumerate(("b/last", "b/ema", "c/last", "a/ema", "a/previous")):
        path = pathlib.Path(f"out/{name}.safetensors")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * (10 - age))
        os.utime(path, (age, age))
    assert sample.newest_checkpoint() == pathlib.Path("out/a/ema.safetensors")
    assert sample.newest_checkpoint("model") == pathlib.Path("out/a/previous.safetensors")


@pytest.mark.parametrize("flags, said", [
    ([], "python train.py --demo"), (["--ckpt", "none.safetensors"], "no such checkpoint"),
    (["--ckpt", "text.safetensors"], "not a whole"), (["--ckpt", "cut.safetensors"], "not a whole"),
    (["--ckpt", "text.pth"], "not a checkpoint of plain tensors"), (["--ckpt", "."], "no such checkpoint file"),
    (["--ckpt", "a.safetensors", "--classes", "zebra"], "class 'zebra'"), (["--ckpt", "a.safetensors", "--classes", "5"], "from 0 to 4"),
    (["--ckpt", "a.safetensors", "--cfg", "nan"], "--cfg"), (["--ckpt", "a.safetensors", "--cfg", "x"], "invalid float"),
    (["--ckpt", "a.safetensors", "--steps", "0"], "1 or more"), (["--ckpt", "a.safetensors", "--seed", "-1"], "0 or more"),
    (["--ckpt", "a.safetensors", "--interval", "0.9,0.1"], "LOW,HIGH"), (["--ckpt", "a.safetensors", "--interval", "1"], "--interval"),
    (["--ckpt", "a.safetensors", "--vae", "nowhere"], "nowhere"), (["--ckpt", "a.safetensors", "--out", "no/such/a.png"], "folder"),
    (["--ckpt", "only.safetensors", "--weights", "ema2"], "--weights"), (["--ckpt", "eps.safetensors", "--t-eps", "0"], "--t-eps 0"),
    (["--ckpt", "odd.safetensors"], "make no sense"), (["--frobnicate"], "--frobnicate")])
def test_sample_program_refuses_in_one_line(tmp_path, monkeypatch, capsys, flags, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    save_tiny("a.safetensors")
    save_tiny("eps.safetensors", target="eps")
    save_tiny("odd.safetensors", target="y")
    save_checkpoint("only.safetensors", tensors_of(tiny_net(), [tiny_net()]), {"target": "x", "input_size": 8, "step": 1})
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
    return ["--latents", str(cache), "--model", "T", "--patch", "4", "--steps", str(steps), "--batch", "8", "--lr", "1e-3",
            "--warmup", "0.4", "--ema", "0.9", "0.5", "--out", str(out), "--save-every", "2", "--log-every", "1",
            "--sample-every", "4", *map(str, more)]


def log_rows(out):
    with open(out / "log.csv", newline="") as file:
        return [[row[name] for name in ("step", "loss", "lr", "grad_norm", "fit")] for row in csv.DictReader(file)]


def same_run(a, b):
    left, right = read_checkpoint(a / "last.safetensors"), read_checkpoint(b / "last.safetensors")
    assert left[0].keys() == right[0].keys() and log_rows(a) == log_rows(b)
    for name in left[0]:
        assert torch.equal(left[0][name], right[0][name]), name
    assert left[1] == right[1]


def torchrun(ranks, *command, **env):
    """Run a program of ours on several gloo ranks; returns the finished process."""
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}",
                           *map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=240,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | env)


def test_stream_shows_every_image_once_an_epoch():
    order = train.stream(3, np.arange(30), 10)
    assert all(sorted(order[k:k + 10]) == list(range(10)) for k in (0, 10, 20)) and list(order[:10]) != list(order[10:20])
    assert np.array_equal(train.stream(3, np.arange(7, 23), 10), order[7:23])  # however it is cut
    assert set(train.stream(0, np.arange(5), 1)) == {0}


def test_draws_and_noise_follow_from_seed_step_and_place():
    whole = train.step_noise(1, 2, 0, 50, (3, 2, 2), "cpu")
    for first, count in ((0, 7), (7, 9), (15, 2), (16, 34), (49, 1)):
        assert torch.equal(train.step_noise(1, 2, first, count, (3, 2, 2), "cpu"), whole[first:first + count])
    assert not torch.equal(train.step_noise(1, 3, 0, 50, (3, 2, 2), "cpu"), whole)
    many = train.step_noise(0, 0, 0, 4096, (4, 4), "cpu")
    assert abs(many.mean()) < 0.02 and abs(many.std() - 1) < 0.02 and abs((many[1:] * many[:-1]).mean()) < 0.02
    normals, hide, flip = train.draws(0, 5, 10_000)
    assert abs(normals.std() - 1) < 0.03 and abs((hide < 0.1).mean() - 0.1) < 0.01 and abs((flip < 0.5).mean() - 0.5) < 0.02


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
    losses = []
    for step in range(3):
        order = np.random.default_rng([0, 0, 0]).permutation(40)[step * 8:step * 8 + 8]
        rng = np.random.default_rng([0, 1, step])
        t = torch.sigmoid(-0.8 + 0.8 * torch.from_numpy(rng.standard_normal(8, dtype=np.float32)))
        hide, flip = torch.from_numpy(rng.random(8) < 0.1), rng.random(8) < 0.5
        x, y = data.batch(order, flip)
        loss = denoiser(x.float(), y, t, train.step_noise(0, step, 0, 8, (3, 8, 8), "cpu"), hide)
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, (step + 1) / 2, (3 - step) / 1.5)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(denoiser.net.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        for average, decay in zip(averages, (0.9, 0.5)):
            for k, v in denoiser.net.state_dict().items():
                average[k] = decay * average[k] + (1 - decay) * v
    tensors = read_checkpoint(tmp_path / "run" / "last.safetensors")[0]
    np.testing.assert_allclose([float(row[1]) for row in log_rows(tmp_path / "run")], losses, rtol=1e-4)
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
    assert sorted(os.listdir(out)) == [".lock", "ema-step0000003.safetensors", "ema-step0000006.safetensors", "ema.safetensors",
                                       "last.safetensors", "log.csv", "previous.safetensors", "samples"]
    assert sorted(os.listdir(out / "samples")) == ["step0000004.png", "step0000006.png"]
    with open(out / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == list("123456") and rows[3]["fit"] == rows[3]["val"] != "" and rows[0]["fit"] == ""
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
        def __init__(self):
            super().__init__()
            signal.setitimer(signal.ITIMER_REAL, 0)

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
    (b / "last.safetensors").write_bytes(whole[:len(whole) // 2])
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


@pytest.mark.parametrize("change", [["--target", "v"], ["--loss", "x"], ["--seed", 1], ["--batch", 4], ["--lr", 2e-3], ["--ema", 0.5],
                                    ["--patch", 2], ["--warmup", 1], ["--decay", 0.1]])
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
    assert train.main(flags(cache, tmp_path / "a", steps=6)) == 0 and train.main(flags(cache, tmp_path / "b", steps=6)) == 0
    same_run(tmp_path / "a", tmp_path / "b")
    assert train.main(flags(cache, tmp_path / "c", "--decay", 0.5, steps=4)) == 0
    assert train.main(flags(cache, tmp_path / "c", "--decay", 0.5, steps=6)) == 2 and "another steps" in capsys.readouterr().err


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
    one, two = log_rows(tmp_path / "one"), log_rows(tmp_path / "two")
    np.testing.assert_allclose([float(row[1]) for row in one], [float(row[1]) for row in two], rtol=1e-4)
    a, b = (read_checkpoint(tmp_path / name / "last.safetensors")[0] for name in ("one", "two"))
    assert all((a[name] - b[name]).abs().max() <= 1e-2 * 1e-3 for name in a if name.startswith("model."))


def test_killed_runs_continue_bit_for_bit(tmp_path):
    """The short form of `python -m bench.soak`: SIGKILL at random moments, also while saving, then the same command."""
    cache = small_cache(tmp_path)
    command = [sys.executable, "train.py", *flags(cache, tmp_path / "b", "--save-every", 1, steps=16)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "train.py", *flags(cache, tmp_path / "a", "--save-every", 1, steps=16)], cwd=ROOT, env=env, check=True)
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
    same_run(tmp_path / "a", tmp_path / "b")


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_sigterm_saves_and_says_so(tmp_path):
    cache = small_cache(tmp_path)
    assert train.main(flags(cache, tmp_path / "a", "--save-every", 100, steps=30)) == 0
    command = [sys.executable, "train.py", *flags(cache, tmp_path / "b", "--save-every", 100, steps=30)]
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    seen = 0
    for line in run.stdout:
        if line.startswith("step ") and not seen:
            seen = int(re.search(r"\d+", line).group())
            run.send_signal(signal.SIGTERM)
            run.send_signal(signal.SIGTERM)  # delivered twice, as schedulers do
    assert run.wait() == 128 + signal.SIGTERM
    subprocess.run(command, cwd=ROOT, env=env, check=True)
    same_run(tmp_path / "a", tmp_path / "b")


def test_two_runs_cannot_share_a_folder(tmp_path):
    code = "import sys, time\nfrom lib.run import lock_folder\nlock = lock_folder(sys.argv[1])\nprint('locked', flush=True)\ntime.sleep(60)"
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
    assert "4 classes there, 3 here" in capsys.readouterr().out
    before, after = load_denoiser(start).net.state_dict(), load_denoiser(tmp_path / "run" / "ema.safetensors").net.state_dict()
    for name, value in before.items():
        assert name.startswith("y_embedder") or torch.equal(value, after[name])
    assert len(after["y_embedder.embedding_table.weight"]) == 4
    assert train.main(flags(cache, tmp_path / "other", "--init", start, "--patch", 2)) == 2
    assert "patch size is 4 there, 2 here" in capsys.readouterr().err
    assert train.main(flags(cache, tmp_path / "other", "--init", start, "--target", "v")) == 2
    assert "--target x" in capsys.readouterr().err and not (tmp_path / "other").exists()


def test_the_papers_recipe_is_printed_before_it_needs_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for target in TARGETS:
        assert train.main(["--target", target, "--patch", "1"]) == 2
        said = capsys.readouterr()
        for words in ("250,000 steps of 1024", "lr 0.0002", "warm-up 5 epochs", "EMA 0.9999", "clip 1.0", "P_mean/P_std -0.8/0.8"):
            assert words in said.out
        assert "vae.py --images" in said.err and "--demo" in said.err and said.err.count("\n") == 1
    assert os.listdir(".") == []


@pytest.mark.parametrize("bad, said", [
    (["--patch", "3"], "does not divide"), (["--patch", "0"], "1 or more"), (["--batch", "0"], "1 or more"), (["--steps", "x"], "invalid int"),
    (["--lr", "nan"], "--lr"), (["--lr", "inf"], "--lr"), (["--ema", "1.5"], "1 or less"), (["--ema", "0.1", "0.2", "0.3"], "at most two"),
    (["--target", "y"], "invalid choice"), (["--latents", "nowhere"], "no latents at nowhere"), (["--latents", "empty"], "empty"),
    (["--val", "nowhere"], "nowhere"), (["--init", "nowhere"], "no such checkpoint"), (["--eval-every", "5"], "--ref"),
    (["--eval-every", "5", "--ref", "nowhere.npz"], "nowhere.npz"), (["--vae", "nowhere"], "nowhere"), (["--seed", "-1"], "0 or more"),
    (["--model", "Q"], "invalid choice"), (["--decay", "2"], "1 or less")])
def test_train_refuses_in_one_line(tmp_path, monkeypatch, capsys, finished, bad, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    os.mkdir("empty")
    assert train.main(flags(finished[0], "run", *bad)) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert [name for name in os.listdir(".") if name != "empty"] in ([], ["run"]) and os.listdir("run" if os.path.isdir("run") else "empty") in ([], [".lock"])


def test_ranks_must_divide_the_batch(monkeypatch, capsys, finished):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert train.main(flags(finished[0], "never")) == 2 and "3 ranks do not divide it" in capsys.readouterr().err


