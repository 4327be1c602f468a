"""The networks that only measure or teach: vision backbones of transformers, and Inception."""
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lib.features import load_features
from lib.inception import Inception
from lib.run import BadInput

# What this project's own Vision Transformer (lib/vit.py of 1d03df4, which agreed with transformers
# to 1e-5) gave for the random weights and images below: four numbers of an embedding, and four of
# the last patch token. At 56 pixels the learned positions, made for 42, are interpolated.
BACKBONES = {
    ("Dinov2", 42): ([-0.07332, 0.15523, -1.90982, -0.05956],
                     [-0.03911, -0.50834, -0.66933, -0.14501]),
    ("Dinov2WithRegisters", 56): ([-0.39886, 0.02175, -0.54734, 0.08118],
                                  [-0.42544, -0.04384, 0.52121, -0.22968]),
    ("CLIPVision", 56): ([0.86664, -0.13723, 1.07203, -1.47358],
                         [-5.58618, 1.50906, 3.1233, -3.86828])}

# torch-fidelity's features and logits of the second image, for the random weights below.
INCEPTION = ([0.02280, 32.36615, 0.05658, 10.44854], [-3.18492, 13.78416, -8.07533, -11.24451])


def save_backbone(folder, kind, suffix="Model"):
    """Save a small random network as transformers does, with weights that depend on the names in
    the file alone."""
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=1, intermediate_size=256,
        patch_size=14, image_size=42)
    getattr(transformers, kind + suffix)(config).save_pretrained(folder)
    weights, rng = load_file(folder / "model.safetensors"), np.random.default_rng(0)
    for name in sorted(weights):
        values = 0.3 * rng.standard_normal(weights[name].shape, np.float32)
        weights[name] = torch.from_numpy(values)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def two_images():
    pixels = np.random.default_rng(1).integers(0, 256, (2, 3, 40, 52), np.uint8)
    return torch.from_numpy(pixels)


@pytest.mark.parametrize("kind, size", BACKBONES)
def test_backbones_give_the_features_they_always_gave(kind, size, tmp_path):
    clip = kind == "CLIPVision"
    save_backbone(tmp_path, kind, "ModelWithProjection" if clip else "Model")
    features = load_features(str(tmp_path), None if size == 42 else size)
    embedding, tokens = features(two_images())
    assert embedding.shape == (2, 512 if clip else 64) and tokens.shape == (2, (size // 14)**2, 64)
    expected = map(torch.tensor, BACKBONES[kind, size])
    for row, numbers in zip((embedding[1, :4], tokens[0, -1, :4]), expected):
        torch.testing.assert_close(row, numbers, rtol=0, atol=1e-4)
    assert not tokens.requires_grad and not tokens.is_inference()  # a student's loss may use them


@pytest.mark.parametrize("kind, reason", [
    ("SiglipVision", "patch tokens"),       # has no class token
    ("CLIPVision", "visual_projection")])   # without its projection, which would stay random
def test_networks_that_cannot_be_used_are_refused(kind, reason, tmp_path):
    save_backbone(tmp_path, kind)
    with pytest.raises(BadInput, match=reason):
        load_features(str(tmp_path))
    with pytest.raises(BadInput, match="Hugging Face id or the folder"):
        load_features(str(tmp_path / "none"))


def test_without_transformers_one_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(BadInput, match="pip install transformers"):
        load_features("facebook/dinov2-base")


def test_inception_is_torch_fidelitys_in_fp32_whatever_surrounds_it():
    inception, rng = Inception().eval().requires_grad_(False), np.random.default_rng(0)
    for name, tensor in sorted(inception.state_dict().items()):
        if name.endswith(("running_var", "bn.weight")):
            values = rng.uniform(0.5, 1.5, tensor.shape)
        elif tensor.ndim > 1:
            values = rng.standard_normal(tensor.shape) * (2 / tensor[0].numel())**0.5
        else:  # also the bias of the logits, which must not be seen
            values = 0.1 * rng.standard_normal(tensor.shape)
        tensor.copy_(torch.tensor(values))
    with torch.autocast("cpu", torch.bfloat16):
        features, logits = inception(two_images())
    for rows, numbers in zip((features, logits), INCEPTION):
        torch.testing.assert_close(rows[1, :4], torch.tensor(numbers), rtol=1e-4, atol=1e-4)
