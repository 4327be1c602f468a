"""Codecs besides FLUX.2's, which test_all.py has: the tiny one, and any AutoencoderKL."""
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from lib.run import BadInput
from lib.taef2 import Taef2
from test_all import tiny_flux2
from vae import load_vae, open_vae


def conv(h, w, name, stride=1):
    return F.conv2d(h, w[f"{name}.weight"], w.get(f"{name}.bias"), stride, padding=1)


def block(h, w, i):
    if f"{i}.pool.0.weight" in w:
        wide = F.conv2d(h, w[f"{i}.pool.0.weight"])
        wide = F.group_norm(wide, 4, w[f"{i}.pool.1.weight"], w[f"{i}.pool.1.bias"]).relu()
        h = h + F.conv2d(wide, w[f"{i}.pool.3.weight"])
    g = h
    for j in (0, 2, 4):
        g = conv(g.relu() if j else g, w, f"{i}.conv.{j}")
    return (g + h).relu()


@pytest.mark.parametrize("suffix, save", [(".pth", torch.save), (".safetensors", save_file)])
def test_taef2_reads_the_published_keys_and_is_its_description(suffix, save, tmp_path):
    torch.manual_seed(0)
    net, weights = Taef2(), {}
    for name in ("encoder", "decoder"):
        state = {key: value.half() for key, value in getattr(net, name).state_dict().items()}
        save(state, tmp_path / f"taef2_{name}{suffix}")
        weights[name] = {key: value.float() for key, value in state.items()}
    codec, x = load_vae(str(tmp_path)), torch.rand(2, 3, 32, 32) * 2 - 1
    assert (codec.kind, codec.channels, codec.stride) == ("taef2", 128, 16)

    w = weights["encoder"]
    assert {key.split(".")[0] for key in w if "pool" in key} == {"11", "12", "13"}
    h = block(conv((x + 1) / 2, w, 0), w, 1)
    for i in (2, 6, 10):
        h = conv(h, w, i, stride=2)
        for j in (1, 2, 3):
            h = block(h, w, i + j)
    latents = F.pixel_unshuffle(conv(h, w, 14), 2)
    assert_close(codec.encode(x), latents, rtol=1e-4, atol=1e-5)

    w = weights["decoder"]
    h = conv(3 * torch.tanh(F.pixel_shuffle(latents, 2) / 3), w, 1).relu()
    for i in (3, 8, 13):
        for j in (0, 1, 2):
            h = block(h, w, i + j)
        h = conv(F.interpolate(h, scale_factor=2), w, i + 4)
    images = conv(block(h, w, 18), w, 19) * 2 - 1
    assert_close(codec.decode(latents), images, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("normalised_by, mean, std", [
    (dict(scaling_factor=0.5, shift_factor=0.25), [0.25], [2.0]),
    (dict(scaling_factor=0.5), [0.0], [2.0]),
    (dict(latents_mean=[0.5, -1, 2.0], latents_std=[2.0, 0.5, 4]), [0.5, -1, 2.0], [2.0, 0.5, 4])])
@torch.no_grad()
def test_a_kl_autoencoder_is_its_mode_normalised_by_its_configuration(
        normalised_by, mean, std, tmp_path):
    from diffusers import AutoencoderKL
    torch.manual_seed(0)
    net = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=(8, 8, 8), norm_num_groups=4, latent_channels=3, **normalised_by).eval()
    net.save_pretrained(tmp_path)
    codec, x = load_vae(str(tmp_path)), torch.rand(2, 3, 16, 32) * 2 - 1
    assert (codec.kind, codec.channels, codec.stride) == ("kl", 3, 4)
    mode = net.encode(x).latent_dist.mean                               # (2, 3, 4, 8)
    latents = (mode - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert_close(codec.encode(x), latents, rtol=1e-4, atol=1e-5)
    assert_close(codec.decode(latents), net.decode(mode).sample, rtol=1e-4, atol=1e-5)


def test_a_local_codec_is_known_by_its_weights_and_refused_without_them(tmp_path, capsys):
    tiny_flux2(tmp_path)
    path, config = tmp_path / "diffusion_pytorch_model.safetensors", tmp_path / "config.json"
    weights, id = load_file(path), load_vae(str(tmp_path)).id
    made_by = {"vae": {"kind": "flux2", "id": id}, "vae_path": str(tmp_path)}
    for change, warned in ((0, False), (1, True)):
        weights["bn.running_mean"][0] += change
        save_file(weights, path)
        open_vae(made_by, 24)
        assert ("is not the codec that made the latents" in capsys.readouterr().out) == warned
    del weights["bn.running_mean"]
    save_file(weights, path)
    with pytest.raises(BadInput, match="lack bn.running_mean"):
        load_vae(str(tmp_path))
    config.write_text(config.read_text().replace("AutoencoderKLFlux2", "Other"))
    with pytest.raises(BadInput, match="of Other, expected AutoencoderKLFlux2 or"):
        load_vae(str(tmp_path))
