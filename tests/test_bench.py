"""What in bench/ has a closed form, and the tables and logs that it reads."""
import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from bench import cifar10, geometry, room, spectrum, strip
from model import TARGETS, Denoiser, slope

VARIANCES = torch.tensor([5.0, 1.0, 0.1, 0.0], dtype=torch.float64)


def drawn(n, t):
    """x of those variances, e of variance 1, and z: each (n, 4)."""
    generator = torch.Generator().manual_seed(0)
    x, e = torch.randn(2, n, 4, dtype=torch.float64, generator=generator)
    x = x * VARIANCES.sqrt()
    return x, e, t * x + (1 - t) * e


@pytest.mark.parametrize("t", [0.1, 0.3, 0.8])
def test_what_a_gaussian_asks_of_each_target_agrees_with_draws(t):
    x, e, z = drawn(400_000, t)
    for target, row in spectrum.asks(VARIANCES, t).items():
        a, b = TARGETS[target]
        values, power = a * x + b * e, (z * z).mean(0)
        coefficient, told = (values * z).mean(0) / power, b * (e * z).mean(0) / power * z
        found = {"variance": values.var(0), "coefficient": coefficient, "carried": told.var(0),
                 "ambiguity": (values - coefficient * z).var(0),
                 "noise": (b * e).var(0) / values.var(0).clamp(min=1e-9)}
        for name, wanted in row.items():
            torch.testing.assert_close(found[name], wanted, rtol=0.02, atol=5e-3)


@pytest.mark.parametrize("width", [1, 3, 5])
def test_a_squeezed_prediction_is_reduced_rank_regression(width):
    """Of draws: regress on z, keep as many directions of the fitted values as may pass."""
    (x, e, z), t = drawn(400_000, 0.3), 0.3
    for target, found in spectrum.squeezed(VARIANCES, t, width).items():
        a, b = TARGETS[target]
        fitted = z @ torch.linalg.lstsq(z, a * x + b * e).solution
        kept = torch.linalg.eigh(fitted.T @ fitted)[1][:, -width:]
        error = (a * x + b * e - fitted @ kept @ kept.T) / slope(target, t)
        assert found == pytest.approx(error.square().mean().item(), rel=0.01)


class Data(list):
    """600 latents of 4 x 4 independent tokens, in place of a cache."""
    shape, tokens = (4, 4, 4), drawn(600 * 16, 0.0)[0]

    def batch(self, rows):
        latents = self.tokens.view(600, 4, 4, 4).permute(0, 3, 1, 2).float()
        return latents[torch.as_tensor(rows)], torch.zeros(len(rows), dtype=torch.int64)


@pytest.mark.parametrize("target", TARGETS)
def test_geometry_finds_the_best_network_on_the_line(target):
    covariance = spectrum.token_statistics(Data(range(600)), 1, 10_000)[1]
    torch.testing.assert_close(covariance, Data.tokens.T.cov(correction=0))
    row, every = spectrum.asks(VARIANCES, 0.3), torch.eye(4, dtype=torch.float64)

    class Best(torch.nn.Linear):
        patch_size = 1

        def forward(self, z, t, y):
            return row[target]["coefficient"].float()[:, None, None] * z
    found = geometry.measure(Denoiser(Best(1, 1), target), Data(range(600)), every, 0.3, 600)
    wanted = {"coefficient": row[target]["coefficient"], "own": row[target]["ambiguity"],
              "v": row["v"]["ambiguity"]}
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=0.06, atol=1e-5)


@pytest.mark.parametrize("target", TARGETS)
def test_the_prediction_on_the_way_is_of_the_clean_latent_whatever_the_target(target):
    """Of a network that knows the one image there is."""
    image, (a, b) = torch.arange(64.0).view(1, 4, 4, 4) / 64, TARGETS[target]

    class Knows(torch.nn.Linear):
        in_channels = input_size = num_classes = 4

        def forward(self, z, t, y):
            t = t[:, None, None, None].clamp(max=0.95)  # the floor: e = (z - t x) / (1-t)
            return a * image + b * (z - t * image) / (1 - t)
    found = strip.predictions(Denoiser(Knows(1, 1), target, t_eps=0.02), 2, [0], 1.0)
    assert len(found) == 11
    for clean in found[1:10]:
        torch.testing.assert_close(clean, image.expand(2, -1, -1, -1), rtol=0, atol=1e-4)


def test_theory_of_room_sees_no_gap_where_all_numbers_pass():
    x, v = room.theory(VARIANCES, 4)
    assert v == pytest.approx(x)
    x, v = room.theory(VARIANCES, 3)  # room for all that varies, not for all noise
    assert x == pytest.approx(room.theory(VARIANCES, 4)[0]) and v > 1.01 * x


def test_cifar10s_own_file_becomes_class_folders(tmp_path, refused):
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    records = [bytes([label]) + image.transpose(2, 0, 1).tobytes()
               for label, image in zip((1, 0, 1), images)]
    files = {f"{name}.bin": b"".join(records) for name in cifar10.PARTS}
    meta = {"batches.meta.txt": b"cat\ndog\n\n"}
    for name, held in (("whole.tar.gz", files | meta), ("part.tar.gz", files)):
        with tarfile.open(tmp_path / name, "w:gz") as tar:
            for inside, data in held.items():
                member = tarfile.TarInfo(f"cifar-10-batches-bin/{inside}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    assert cifar10.main([str(tmp_path / "whole.tar.gz"), str(tmp_path / "out")]) == 0
    assert len(list(tmp_path.glob("out/train/*/*.png"))) == 15
    for label, image, number in zip(("dog", "cat", "dog"), images, range(3)):
        path = tmp_path / f"out/test/{label}/test_batch-{number:05d}.png"
        assert np.array_equal(np.asarray(Image.open(path)), image)
    refused(cifar10.main, [tmp_path / "part.tar.gz", tmp_path / "out"], "expected cifar-10-binary")
