"""What bench/ computes, against closed forms and against draws from Gaussians."""
import os
from functools import partial

import numpy as np
import pytest
import torch
from conftest import save_tiny
from safetensors.torch import load_file

import fid
from bench import figures, geometry, solvers, spectrum, speed, switch, toy, variance
from lib.log import read_table
from model import JLT, SIZES, TARGETS, Denoiser, coefficients, edm, slope
from sample import image_noise
from test_all import flags, small_cache
from train import main as train_main

EIGENVALUES = torch.tensor([5.0, 1.0, 0.1, 0.0], dtype=torch.float64)


@pytest.fixture(params=TARGETS)
def target(request):
    return request.param


def draws(n, t):
    """x with these EIGENVALUES, e and z, each (n, 4)."""
    generator = torch.Generator().manual_seed(0)
    x, e = torch.randn(2, n, 4, dtype=torch.float64, generator=generator)
    x = x * EIGENVALUES.sqrt()
    return x, e, t * x + (1 - t) * e


def test_the_best_prediction_of_gaussian_draws(target):
    (x, e, z), (a, b) = draws(400_000, 0.3), coefficients(target, 0.3)
    values = a * x + b * e
    coefficient = (values * z).mean(0) / (z * z).mean(0)
    measured = {"variance": values.var(0), "coefficient": coefficient,
                "asked": (coefficient * z).var(0), "ambiguity": (values - coefficient * z).var(0)}
    measured["asked in v"] = measured["asked"] / slope(target, 0.3) ** 2
    for name, theory in spectrum.best_prediction(target, EIGENVALUES, 0.3).items():
        torch.testing.assert_close(measured[name], theory, rtol=0.03, atol=5e-3)


@pytest.mark.parametrize("t", [0.3, 0.8])
def test_the_mean_eigenvalue_asks_least_of_its_family(t):
    def asked(target):
        return spectrum.best_prediction(target, EIGENVALUES, t)["asked in v"].sum().item()
    sums = {k: asked(partial(edm, k=k)) for k in np.linspace(0, 3, 301)}
    assert min(sums, key=sums.get) == pytest.approx(EIGENVALUES.mean().item(), abs=0.01)
    assert sums[0] == pytest.approx(asked("x")) and min(sums.values()) < asked("v")


@pytest.mark.parametrize("width", [1, 3, 4])
def test_the_linear_error_is_that_of_reduced_rank_regression(target, width, monkeypatch):
    """On draws: regress on z, keep `width` directions of the fitted values at training's times,
    here 0.3, and use the same ones at another time."""
    monkeypatch.setattr(spectrum, "TIMES", [0.3])
    for t in 0.3, 0.8:
        (x, e, z), (a, b) = draws(400_000, t), coefficients(target, t)
        fitted = z @ torch.linalg.lstsq(z, a * x + b * e).solution
        if t == 0.3:
            kept = torch.linalg.eigh(fitted.T @ fitted)[1][:, -width:]
        error = (a * x + b * e - fitted @ kept @ kept.T) / slope(target, t)
        theory, = spectrum.linear_error(target, EIGENVALUES, width, [t])
        assert theory == pytest.approx(error.square().mean().item(), rel=0.01)


def test_v_spends_its_width_on_empty_directions():
    values = torch.tensor([9.0, 1.0, 0.5, 0.0, 0.0], dtype=torch.float64)
    for target, kept in ("x", "0-2"), ("v", "0-0, 3-4"):
        lost = spectrum.left_out(target, values, width=3).tolist()
        assert spectrum.ranges({0, 1, 2, 3, 4} - set(lost)) == kept


class Gaussian(list):
    """600 latents of 4 x 4 independent tokens, in place of a cache."""
    shape, tokens = (4, 4, 4), draws(600 * 16, 0.0)[0]

    def batch(self, indices):
        latents = self.tokens.view(600, 4, 4, 4).permute(0, 3, 1, 2).float()
        return latents[torch.as_tensor(indices)], torch.zeros(len(indices), dtype=torch.int64)


def test_geometry_measures_the_best_network_on_the_lines(target):
    data = Gaussian(range(600))
    covariance = spectrum.token_statistics(data, 1)[1]
    torch.testing.assert_close(covariance, data.tokens.T.cov(correction=0))
    theory = geometry.theory(EIGENVALUES, [target])[target]

    class Best(torch.nn.Linear):
        patch_size = 1

        def forward(self, z, t, y):
            return theory["coefficient"].float()[:, None, None] * z
    vectors = torch.eye(4, dtype=torch.float64)
    measured = geometry.measure(Denoiser(Best(1, 1), target), data, vectors)
    for name, values in measured.items():
        torch.testing.assert_close(values, theory[name], rtol=0.06, atol=1e-5)


def parts_of_samples(target, coefficient):
    """Along the four axes of a token, samples of a network that predicts coefficient(t) (4,) * z:
    (16000, 4)."""
    class Linear(torch.nn.Linear):
        patch_size, in_channels, input_size, num_classes = 1, 4, 4, 1

        def forward(self, z, t, y):
            return torch.as_tensor(coefficient(float(t[0]))).float()[:, None, None] * z
    return spectrum.tokens(variance.draw(Denoiser(Linear(1, 1), target, t_eps=0.02), 1000), 1)


def test_samples_of_the_best_network_vary_as_the_data_does(target):
    def coefficient(t):
        return spectrum.best_prediction(target, EIGENVALUES, t)["coefficient"]
    measured = parts_of_samples(target, coefficient).square().mean(0)
    torch.testing.assert_close(measured, EIGENVALUES, rtol=0.05, atol=0.01)


@pytest.mark.parametrize("name, expected", [("x", 0), ("v", 1), ("edm", 0.2)])
def test_what_a_network_leaves_out_ends_with_a_variance_that_its_target_decides(name, expected):
    parts = parts_of_samples(name, lambda t: [0.0] * 4)
    measured = parts.square().mean(0)
    torch.testing.assert_close(measured, torch.full_like(measured, expected), rtol=0.05, atol=1e-3)
    matched = variance.matched(parts, EIGENVALUES)
    torch.testing.assert_close(matched.square().mean(0), EIGENVALUES, rtol=0.03, atol=1e-3)
    if name == "v":  # where there is too much, nothing is drawn: it is scaled
        torch.testing.assert_close(matched[:, 2], parts[:, 2] * (0.1 / measured[2]) ** 0.5)


class Knows(torch.nn.Linear):
    """A network that knows the only image there is, and predicts this target of it."""
    in_channels = input_size = num_classes = 4
    image, target = torch.arange(64.0).view(1, 4, 4, 4) / 64, "x"

    def forward(self, z, t, y):
        t = t[:, None, None, None].clamp(max=0.95)
        a, b = coefficients(self.target, t)
        return a * self.image + b * (z - t * self.image) / (1 - t)


def test_the_path_shows_the_clean_latent_whatever_the_target(target):
    net = Knows(1, 1)
    net.target = target
    latents = figures.predicted_latents(Denoiser(net, target, t_eps=0.02), [0], n=2, cfg=1.0)
    assert len(latents) == 11
    for clean in latents[1:10]:
        torch.testing.assert_close(clean, net.image.expand(2, -1, -1, -1), rtol=0, atol=1e-4)


class Constant(Knows):
    """A network that predicts the same everywhere."""

    def __init__(self, velocity):
        super().__init__(1, 1)
        self.velocity = velocity

    def forward(self, z, t, y):
        return torch.full_like(z, self.velocity)


@pytest.mark.parametrize("at", [0, 0.3, 0.8, 1])
def test_a_sampler_follows_one_network_up_to_a_time_and_another_from_there(at):
    first, second = (Denoiser(Constant(velocity), "v") for velocity in (2.0, -5.0))
    samples = switch.switched_latents(first, second, at, range(3))
    moved = samples - image_noise(0, range(3), (4, 4, 4))
    torch.testing.assert_close(moved, torch.full_like(moved, 2 * at - 5 * (1 - at)))


def test_both_orders_are_scored_once_and_the_table_is_continued(
        small_inception, tmp_path, monkeypatch, refused):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(switch, "compile_net", lambda net, device: True)
    fid.save_reference("ref.npz", np.arange(16.0), np.eye(16), {"mmd": torch.eye(16).half()})
    for target in "xv":
        save_tiny(f"{target}.safetensors", target=target)
    argv = "x.safetensors v.safetensors --ref ref.npz --csv s.csv --out s.png --num-samples 20"
    assert switch.main([*argv.split(), "--times", "0.4"]) == 0
    rows = read_table("s.csv")[1]
    assert [(row["early"], row["late"], row["at"]) for row in rows] == [
        ("x", "x", "1"), ("v", "v", "1"), ("x", "v", "0.4"), ("v", "x", "0.4")]
    assert len({row["fid"] for row in rows}) == 4 and os.path.exists("s.png")
    for target in "xv":
        fid.main(f"--ckpt {target}.safetensors --ref ref.npz --num-samples 20 --cfg 1 --method ab2 "
                 "--steps 25 --csv f.csv".split())
    alone = [float(row["fid"]) for row in read_table("f.csv")[1]]
    assert [float(row["fid"]) for row in rows[:2]] == pytest.approx(alone, abs=1e-3)
    assert switch.main([*argv.split(), "--times", "0.4", "0.8"]) == 0
    again = read_table("s.csv")[1]
    assert again[:4] == rows and [row["at"] for row in again[4:]] == ["0.8", "0.8"]
    save_tiny("other.safetensors", target="v", class_names=list("vwxyz"))
    for second, more, word in (("v", "--csv f.csv", "f.csv"), ("v", "--csv no/s.csv", "no/s.csv"),
                               ("other", "", "class_names")):
        files = ["x.safetensors", f"{second}.safetensors"]
        refused(switch.main, [*files, *argv.split()[2:], *more.split()], word)


@pytest.mark.parametrize("solver", solvers.SOLVERS)
def test_a_solver_takes_the_evaluations_that_it_is_given(solver):
    for cfg in 1, 2:
        for evaluations in 7, 12, 27:
            _, count = solvers.solve(Denoiser(Knows(1, 1)), solver, cfg, evaluations)
            assert evaluations - 1 <= count <= evaluations


def test_toy_v_keeps_all_noise_outside_the_span_of_the_last_layer():
    denoiser = Denoiser(toy.MLP(200), "v")
    torch.nn.init.zeros_(denoiser.net.layers[-1].bias)
    kept = toy.outside_span(toy.sample(denoiser, 200), denoiser)
    assert kept.mean() == pytest.approx((200 - toy.WIDTH) ** 0.5, rel=0.02)


@pytest.mark.parametrize("plain", [False, True])
def test_speed_times_the_steps_that_train_py_takes(plain, tmp_path):
    cache = small_cache(tmp_path)
    argv = flags(cache, tmp_path / "run", "--lr", "1e-4", "--warmup", "0", steps=3)
    assert train_main(argv) == 0
    weights = load_file(tmp_path / "run" / "last.safetensors")
    torch.manual_seed(0)
    net = JLT(8, 4, 3, num_classes=4, **SIZES["T"]).to(speed.DEVICE)
    step = speed.training_step(net, cache, 8, plain=plain)
    for _ in range(3):
        step()
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value.cpu(), weights[f"model.{name}"], rtol=1e-3, atol=1e-5)
