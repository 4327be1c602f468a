"""The networks that only judge or stand in, restated with functional calls."""
import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from lib.images import read_picture
from lib.inception import Inception, resize
from lib.run import BadInput
from lib.taef2 import Taef2
from lib.vit import CLIP, DINO, load_vit
from test_all import picture_folder, tiny_flux2
from vae import LatentDataset, from_uint8, load_vae, open_vae, write_cache


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_taef2_reads_the_published_keys_and_is_its_description(suffix, tmp_path):
    torch.manual_seed(0)
    net = Taef2()
    for half, part in ("encoder", net.encoder), ("decoder", net.decoder):
        state = {name: value.half() for name, value in part.state_dict().items()}
        path = tmp_path / f"taef2_{half}{suffix}"
        save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    vae, x = load_vae(str(tmp_path)), torch.rand(2, 3, 32, 32) * 2 - 1

    def block(h, w, i):
        if f"{i}.pool.0.weight" in w:
            wide = F.conv2d(h, w[f"{i}.pool.0.weight"])
            wide = F.group_norm(wide, 4, w[f"{i}.pool.1.weight"], w[f"{i}.pool.1.bias"]).relu()
            h = h + F.conv2d(wide, w[f"{i}.pool.3.weight"])
        g = h
        for j in (0, 2, 4):
            g = conv(g.relu() if j else g, w, f"{i}.conv.{j}")
        return (g + h).relu()

    def conv(h, w, name, stride=1):
        return F.conv2d(h, w[f"{name}.weight"], w.get(f"{name}.bias"), stride, padding=1)

    w = {name: value.half().float() for name, value in net.encoder.state_dict().items()}
    h = block(conv((x + 1) / 2, w, 0), w, 1)
    for i in (2, 6, 10):
        h = conv(h, w, i, stride=2)
        for j in (1, 2, 3):
            h = block(h, w, i + j)
    latents = F.pixel_unshuffle(conv(h, w, 14), 2)
    torch.testing.assert_close(vae.encode(x), latents, rtol=1e-4, atol=1e-5)

    w = {name: value.half().float() for name, value in net.decoder.state_dict().items()}
    h = conv(3 * torch.tanh(F.pixel_shuffle(latents, 2) / 3), w, 1).relu()
    for i in (3, 8, 13):
        for j in (0, 1, 2):
            h = block(h, w, i + j)
        h = conv(F.interpolate(h, scale_factor=2), w, i + 4)
    images = conv(block(h, w, 18), w, 19) * 2 - 1
    torch.testing.assert_close(vae.decode(latents), images, rtol=1e-4, atol=1e-4)
    pools = {name.split(".")[0] for name in net.encoder.state_dict() if "pool" in name}
    assert pools == {"11", "12", "13"}
    assert (vae.kind, vae.channels, vae.stride) == ("taef2", 128, 16)


@pytest.fixture(scope="module")
def inception():
    torch.manual_seed(6)
    network = Inception().eval().requires_grad_(False)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.uniform_(1, 3)
            module.bias.uniform_(-0.2, 0.4)
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.3, 1)
    return network


def test_inception_has_the_published_keys(inception):
    state = inception.state_dict()
    assert len(state) == 94 * 6 + 2
    shapes = {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3), "Mixed_5b.branch1x1.bn.running_mean": (64,),
        "Mixed_5d.branch_pool.conv.weight": (64, 288, 1, 1),
        "Mixed_6a.branch3x3.conv.weight": (384, 288, 3, 3),
        "Mixed_6c.branch7x7dbl_2.conv.weight": (160, 160, 7, 1),
        "Mixed_6e.branch7x7_2.conv.weight": (192, 192, 1, 7),
        "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3),
        "Mixed_7b.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1),
        "Mixed_7c.branch3x3_2a.bn.num_batches_tracked": (), "fc.weight": (1008, 2048)}
    assert {name: tuple(state[name].shape) for name in shapes} == shapes


def plain_inception(state, images):
    """The pool features, from a state dict alone: stride 2 has no padding, else kernels keep the
    size, but for 2a and 4a."""
    def conv(x, name, stride=1):
        weight = state[f"{name}.conv.weight"]
        pad = [k // 2 for k in weight.shape[2:]] if stride == 1 and name[-6:] not in unpadded else 0
        x = F.conv2d(x, weight, None, stride, pad)
        keys = "running_mean", "running_var", "weight", "bias"
        return F.relu(F.batch_norm(x, *(state[f"{name}.bn.{key}"] for key in keys), eps=0.001))

    def chain(x, base, count, last_stride=1):
        for i in range(1, count + 1):
            x = conv(x, f"{base}_{i}", last_stride if i == count else 1)
        return x

    unpadded = "2a_3x3", "4a_3x3"
    x = (resize(images.float(), 299) - 128) / 128
    x = conv(conv(conv(x, "Conv2d_1a_3x3", 2), "Conv2d_2a_3x3"), "Conv2d_2b_3x3")
    x = conv(conv(F.max_pool2d(x, 3, 2), "Conv2d_3b_1x1"), "Conv2d_4a_3x3")
    x = F.max_pool2d(x, 3, 2)
    for name in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"):
        m = f"Mixed_{name}."
        average = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        pool = F.max_pool2d(x, 3, 1, 1) if name == "7c" else average
        if name[0] == "5":
            parts = [conv(x, m + "branch1x1"), chain(x, m + "branch5x5", 2),
                     chain(x, m + "branch3x3dbl", 3)]
        elif name == "6a":
            parts = [conv(x, m + "branch3x3", 2), chain(x, m + "branch3x3dbl", 3, 2)]
        elif name[0] == "6":
            parts = [conv(x, m + "branch1x1"), chain(x, m + "branch7x7", 3),
                     chain(x, m + "branch7x7dbl", 5)]
        elif name == "7a":
            parts = [chain(x, m + "branch3x3", 2, 2), chain(x, m + "branch7x7x3", 4, 2)]
        else:
            three, double = conv(x, m + "branch3x3_1"), chain(x, m + "branch3x3dbl", 2)
            parts = [conv(x, m + "branch1x1"), conv(three, m + "branch3x3_2a"),
                     conv(three, m + "branch3x3_2b"), conv(double, m + "branch3x3dbl_3a"),
                     conv(double, m + "branch3x3dbl_3b")]
        halves = name in ("6a", "7a")
        parts.append(F.max_pool2d(x, 3, 2) if halves else conv(pool, m + "branch_pool"))
        x = torch.cat(parts, 1)
    return x.mean((2, 3))


def test_inception_is_its_description_in_fp32_whatever_surrounds_it(inception):
    images = torch.randint(0, 256, (2, 3, 20, 28), dtype=torch.uint8)
    inception.fc.bias.fill_(1e6)  # must not be seen
    with torch.autocast("cpu", torch.bfloat16):
        features, logits = inception(images)
    wanted = plain_inception(inception.state_dict(), images)
    assert features.dtype == logits.dtype == torch.float32 and features.shape == (2, 2048)
    size = wanted.abs().max().item()
    torch.testing.assert_close(features, wanted, rtol=1e-4, atol=1e-5 * size)
    torch.testing.assert_close(logits, features @ inception.fc.weight.T, rtol=1e-4, atol=1e-4)
    assert math.isfinite(size) and wanted.std() > 0


def test_inception_in_bf16_is_near(inception, monkeypatch):
    images = torch.randint(0, 256, (2, 3, 20, 28), dtype=torch.uint8)
    exact, _ = inception(images)
    monkeypatch.setattr(inception, "precision", torch.bfloat16)
    rough, logits = inception(images)
    assert rough.dtype == logits.dtype == torch.float32
    assert 1e-5 < (rough - exact).norm() / exact.norm() < 0.05


def test_flux2_is_known_by_its_weights_and_refused_without_them(tmp_path):
    for name in ("here", "there"):
        tiny_flux2(tmp_path / name)
    here, there = load_vae(str(tmp_path / "here")), load_vae(str(tmp_path / "there"))
    assert here.id == there.id and re.fullmatch("flux2-[0-9a-f]{12}", here.id)
    assert here.path == str(tmp_path / "here") and load_vae("pixels").path is None

    path = tmp_path / "there" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["bn.running_mean"][0] += 1
    save_file(weights, path)
    assert load_vae(str(tmp_path / "there")).id != here.id
    del weights["bn.running_mean"]
    save_file(weights, path)
    with pytest.raises(BadInput, match="lack bn.running_mean"):
        load_vae(str(tmp_path / "there"))
    config = json.loads((tmp_path / "here" / "config.json").read_text())
    config["_class_name"] = "AutoencoderTiny"
    (tmp_path / "here" / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match="of AutoencoderTiny, expected AutoencoderKLFlux2 or"):
        load_vae(str(tmp_path / "here"))


@pytest.mark.parametrize("normalised_by", [
    dict(scaling_factor=0.5, shift_factor=0.25), dict(scaling_factor=0.5), dict(
        latents_mean=[0.5, -1, 2.0], latents_std=[2.0, 0.5, 4])])
@torch.no_grad()
def test_a_kl_autoencoder_is_its_mode_normalised_by_its_configuration(normalised_by, tmp_path):
    """Of diffusers, with random weights; through a cache, and by the checkpoint's settings."""
    from diffusers import AutoencoderKL
    torch.manual_seed(0)
    net = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=(8, 8, 8), norm_num_groups=4, latent_channels=3, **normalised_by).eval()
    net.save_pretrained(tmp_path / "codec")
    codec, x = load_vae(str(tmp_path / "codec")), torch.rand(2, 3, 16, 32) * 2 - 1
    assert (codec.kind, codec.channels, codec.stride) == ("kl", 3, 4)
    mode = net.encode(x).latent_dist.mean                               # (2, 3, 4, 8)
    if "latents_mean" in normalised_by:
        mean, std = (torch.tensor(normalised_by[name])[:, None, None]
                     for name in ("latents_mean", "latents_std"))
        wanted = (mode - mean) / std
    else:
        wanted = (mode - normalised_by.get("shift_factor", 0)) * 0.5
    torch.testing.assert_close(codec.encode(x), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(codec.decode(wanted), net.decode(mode).sample, rtol=1e-4, atol=1e-5)
    images = picture_folder(tmp_path / "images", 2)
    assert write_cache(images, tmp_path / "cache", codec, 16) == 0
    data = LatentDataset(tmp_path / "cache")
    again = open_vae({"vae": data.vae, "vae_path": data.vae_path}, 3)
    assert again.id == codec.id and data.vae["kind"] == "kl"
    pixels = from_uint8(read_picture(images / "cat" / "00.png", 16)[0])[None]
    torch.testing.assert_close(data[0][0].float(), codec.encode(pixels)[0], rtol=1e-2, atol=1e-2)


def test_a_vision_transformer_by_plain_formulas_and_hub_names(tmp_path):
    """DINOv2 with registers: 2 heads, 2 blocks, positions for 3x3 patches."""
    rng, d = torch.Generator().manual_seed(0), 128

    def random(*shape):
        return torch.randn(shape, generator=rng) * 0.2
    w = {"cls_token": random(1, 1, d), "pos_embed": random(1, 10, d), "mask_token": random(1, d),
         "register_tokens": random(1, 4, d), "patch_embed.proj.weight": random(d, 3, 14, 14),
         "patch_embed.proj.bias": random(d), "norm.weight": random(d), "norm.bias": random(d)}
    shapes = {"norm1.weight": [d], "norm1.bias": [d], "norm2.weight": [d], "norm2.bias": [d],
              "attn.qkv.weight": [3 * d, d], "attn.qkv.bias": [3 * d], "attn.proj.weight": [d, d],
              "attn.proj.bias": [d], "ls1.gamma": [d], "ls2.gamma": [d], "mlp.fc1.weight": [512, d],
              "mlp.fc1.bias": [512], "mlp.fc2.weight": [d, 512], "mlp.fc2.bias": [d]}
    for i in range(2):
        w |= {f"blocks.{i}.{name}": random(*shape) for name, shape in shapes.items()}
    torch.save(w, tmp_path / "dino.pth")
    images = torch.randint(0, 256, (2, 3, 42, 50), dtype=torch.uint8, generator=rng)
    mean, std = torch.tensor(DINO)[:, :, None, None]
    x = (images[..., 4:46] / 255 - mean) / std  # the middle
    patches = F.unfold(x, 14, stride=14).transpose(1, 2)                # (2, 9, 3*14*14)
    x = patches @ w["patch_embed.proj.weight"].flatten(1).T + w["patch_embed.proj.bias"]
    x = torch.cat([w["cls_token"].expand(2, 1, d), x], 1) + w["pos_embed"]
    x = torch.cat([x[:, :1], w["register_tokens"].expand(2, 4, d), x[:, 1:]], 1)
    for i in range(2):
        b = {name: w[f"blocks.{i}.{name}"] for name in shapes}
        h = F.layer_norm(x, (d,), b["norm1.weight"], b["norm1.bias"], 1e-6)
        qkv = h @ b["attn.qkv.weight"].T + b["attn.qkv.bias"]
        heads = []
        for k in range(2):
            q, key, v = (qkv[..., n * d + 64 * k:n * d + 64 * (k + 1)] for n in range(3))
            heads.append((q @ key.transpose(1, 2) / 8).softmax(-1) @ v)
        h = torch.cat(heads, -1) @ b["attn.proj.weight"].T + b["attn.proj.bias"]
        x = x + b["ls1.gamma"] * h
        h = F.layer_norm(x, (d,), b["norm2.weight"], b["norm2.bias"], 1e-6)
        h = h @ b["mlp.fc1.weight"].T + b["mlp.fc1.bias"]
        h = h * (1 + torch.erf(h / 2 ** 0.5)) / 2
        x = x + b["ls2.gamma"] * (h @ b["mlp.fc2.weight"].T + b["mlp.fc2.bias"])
    x = F.layer_norm(x, (d,), w["norm.weight"], w["norm.bias"], 1e-6)
    embedding, tokens = load_vit(tmp_path / "dino.pth", 42)(images)
    torch.testing.assert_close(embedding, x[:, 0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(tokens, x[:, 5:], rtol=1e-3, atol=1e-4)
    (tmp_path / "other.pth").write_bytes(b"nothing")
    with pytest.raises(BadInput, match="not the weights of DINOv2 or CLIP"):
        load_vit(tmp_path / "other.pth")


@pytest.mark.parametrize("size", [None, 224])
@pytest.mark.parametrize("kind", ["Dinov2", "Dinov2WithRegisters", "CLIPVision"])
def test_vision_transformers_are_those_of_transformers(kind, size, tmp_path):
    """Random weights; at the size of the positions, and where they are resampled."""
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    clip = kind == "CLIPVision"
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=2, patch_size=14,
        intermediate_size=512, image_size=336 if clip else 518)
    torch.manual_seed(0)
    name = "CLIPVisionModelWithProjection" if clip else f"{kind}Model"
    net = getattr(transformers, name)(config).eval()
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    net.save_pretrained(tmp_path)
    side = size or config.image_size
    images = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
    mean, std = torch.tensor(CLIP if clip else DINO)[:, :, None, None]
    with torch.no_grad():
        more = dict(interpolate_pos_encoding=True) if clip and size else {}
        wanted = net(pixel_values=(images / 255 - mean) / std, **more)
    states = wanted.last_hidden_state
    embedding, tokens = load_vit(tmp_path, size)(images)
    first = 5 if kind == "Dinov2WithRegisters" else 1
    torch.testing.assert_close(embedding, wanted.image_embeds if clip else states[:, 0],
                               rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tokens, states[:, first:], rtol=1e-5, atol=1e-5)
