"""Codecs besides FLUX.2's, which test_all.py has: the tiny one, and any AutoencoderKL."""
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from lib.run import BadInput
from lib.taef2 import Taef2
from test_all import tiny_flux2
from vae import load_vae, open_vae


@pytest.mark.parametrize("suffix, save", [(".pth", torch.save), (".safetensors", save_file)])
def test_taef2_gives_the_numbers_of_its_description(suffix, save, tmp_path):
    """The numbers are those of the published description, written once more in plain formulas at
    commit 190858a. Each weight follows from its published name, so that no name may change."""
    net = Taef2()
    for half in ("encoder", "decoder"):
        weights = {}
        for name, value in getattr(net, half).state_dict().items():
            rng = np.random.default_rng(list(name.encode()))
            weights[name] = torch.from_numpy(0.05 * rng.standard_normal(value.shape)).half()
        save(weights, tmp_path / f"taef2_{half}{suffix}")
    codec, rng = load_vae(str(tmp_path)), np.random.default_rng(0)
    assert (codec.kind, codec.channels, codec.stride) == ("taef2", 128, 16)
    latents = codec.encode(torch.from_numpy(rng.uniform(-1, 1, (1, 3, 32, 32))))
    images = codec.decode(4 * latents)
    assert latents.shape == (1, 128, 2, 2) and images.shape == (1, 3, 32, 32)
    position = torch.tensor([-0.21618, -0.46736, 0.25327, 0.34768])     # 4 of 128 channels
    pixel = torch.tensor([8.04645, -8.30774, 6.67480])
    assert_close(latents[0, :4, 1, 0], position, rtol=1e-4, atol=1e-4)
    assert_close(images[0, :, 5, 20], pixel, rtol=1e-4, atol=1e-4)


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
