"""The training techniques of ablations/: their formulas, and the promises of a run with each."""
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import sample
import train
import vae
from ablations import NAMES, join, load, main
from ablations.contrastive import Contrastive
from ablations.repa import Repa, alignment, on_grid, spatial_norm
from ablations.tread import Tread, keep
from lib.cache import mean_latent
from lib.checkpoint import load_denoiser, read_checkpoint
from lib.device import compile_net
from model import JLT, TARGETS, Denoiser, slope
from sample import Sampling, guided_velocity
from test_all import (
    LOGGED,
    ROOT,
    awake,
    flags,
    log_rows,
    picture_folder,
    rows,
    same_run,
    tiny_net,
    torchrun,
)

TEACHER = "tests.test_ablations:stub_teacher"


class Stub(torch.nn.Module):
    """A teacher of 9 tokens of 5 numbers."""

    def __init__(self):
        super().__init__()
        self.mix = torch.nn.Conv2d(3, 5, 1)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.mix.reset_parameters()

    def forward(self, images):
        x = self.mix(F.adaptive_avg_pool2d(images.float() / 255, 3))
        return x.mean((2, 3)), x.flatten(2).transpose(1, 2)


def stub_teacher():
    return Stub()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """40 pictures of 4 classes, stored beside their latents."""
    folder = tmp_path_factory.mktemp("pictured")
    pictures = picture_folder(folder / "pictures", 10, [f"class{k}" for k in range(4)], (8, 8))
    pixels = vae.load_vae("pixels")
    assert vae.write_cache(pictures, folder / "cache", pixels, 8, keep_images=True) == 0
    return folder / "cache"


@pytest.fixture(scope="module")
def plain(cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("plain") / "run"
    assert train.main(flags(cache, out)) == 0
    return out


REPA = "--teacher", TEACHER, "--hidden", "16"
WAYS = {  # module, its flags
    "tread": ("tread", ()),
    "irepa": ("repa", (*REPA, "--conv", "--gamma", "0.6", "--with", "contrastive")),
    "stopped": ("repa", (*REPA, "--until", "3")),
    "all": ("repa", (*REPA, "--until", "4", "--with", "tread", "contrastive",
                     "--tread-share", "0.25")),
    "other way round": ("tread", ("--with", "repa", *(
        word.replace("--", "--repa-") for word in REPA))),
}


def run(way, cache, out, *more, **steps):
    name, own = WAYS[way]
    return main(load(name), [*own, *flags(cache, out, *more, **steps)])


# -------------------------------------------------------------------------------------------------
# Formulas

def contrastive_loss(denoiser, x, y, t, e, x_other, e_other, weight, drop=None):
    """The loss of a Denoiser's network where each image's other is given."""
    own = Contrastive(denoiser.net, denoiser.target, denoiser.loss_space, t_eps=denoiser.t_eps)
    own.v_other, own.contrastive_weight = x_other - e_other, weight
    return Denoiser.forward(own, x, y, t, e, drop)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("loss", TARGETS)
def test_the_contrastive_loss_image_by_image(target, loss):
    """The negative is the target for the other's velocity at this z and t."""
    net = awake(tiny_net())
    (x, y, t, e), (x_other, _, _, e_other) = rows(6), rows(6, seed=1)
    drop = torch.tensor([True, False] * 3)
    found = contrastive_loss(Denoiser(net, target, loss), x, y, t, e, x_other, e_other, 0.05, drop)
    total = 0
    for i in range(6):
        s, label = t[i].item(), 5 if drop[i] else y[i]
        z, v = s * x[i] + (1 - s) * e[i], x_other[i] - e_other[i]
        a, b = TARGETS[target]
        pred = net(z[None], t[i:i + 1], torch.tensor([label]))[0]
        away = {"x": z + (1 - s) * v, "eps": z - s * v, "v": v}[target]
        error = (pred - (a * x[i] + b * e[i])).square() - 0.05 * (pred - away).square()
        weight = 1 if target == loss else (slope(loss, s) / slope(target, s, 0.05)) ** 2
        total += weight * error.mean() / 6
    assert_close(found, total, rtol=1e-5, atol=1e-6)


def test_the_others_are_the_next_places_of_the_global_batch(cache):
    """Also of the last of a micro-batch, and of the last of all, whose other is the first."""
    seen = []

    class Watched(Contrastive):
        def loss(self, pred, x, t, e):
            seen.append((x, e, self.v_other))
            return super().loss(pred, x, t, e)
    for micro in (8, 2):
        argv = flags(cache, cache / f"seen{micro}", "--micro", micro, steps=1)
        assert train.main(argv, Watched) == 0
    x, e, _ = seen[0]
    wanted = x.roll(-1, 0) - e.roll(-1, 0)
    assert_close(seen[0][2], wanted, rtol=0, atol=0)
    assert_close(torch.cat([v for _, _, v in seen[1:]]), wanted, rtol=0, atol=0)


class Lookup(torch.nn.Module):
    """A network that knows nothing but the label: a number for each."""
    num_classes = 4

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))

    def forward(self, z, t, y):
        return self.table[y][:, None, None, None].expand_as(z)


def test_the_contrastive_optimum_is_the_velocity_drawn_out_from_the_mean():
    """With (E[v | y] - 0.05 m) / 0.95 the gradient vanishes; and --contrast 0.05 leads back."""
    rng, n = torch.Generator().manual_seed(0), 40_000
    y = torch.arange(n) % 4
    x, e = torch.randn(2, n, 1, 1, 1, generator=rng, dtype=torch.float64)
    x = x + y[:, None, None, None]  # Gaussians with means 0, 1, 2, 3
    other = torch.randperm(n, generator=rng)
    net, m = Lookup(), x.mean() - e.mean()
    of_class = torch.stack([(x - e)[y == k].mean() for k in range(4)])
    net.table.data[:4] = best = (of_class - 0.05 * m) / 0.95
    loss = contrastive_loss(Denoiser(net, "v"), x, y, torch.full((n,), 0.5), e, x[other], e[other],
                            0.05)
    slopes = torch.autograd.grad(loss, net.table)[0][:4]
    assert slopes.abs().max() < 2e-3  # the other's mean, class by class, is m but for chance
    assert_close(0.95 * best + 0.05 * m, of_class)
    net.table.data[:4] = of_class
    loss = contrastive_loss(Denoiser(net, "v"), x, y, torch.full((n,), 0.5), e, x[other], e[other],
                            0.05)
    assert torch.autograd.grad(loss, net.table)[0][:4].abs().max() > 0.02


def test_alignment_and_spatial_norm_by_plain_loops():
    student, teacher = torch.randn(3, 4, 5), torch.randn(3, 4, 5) + 1
    cosines = [float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))
               for s, t in zip(student, teacher) for a, b in zip(s, t)]
    assert alignment(student, teacher).item() == pytest.approx(sum(cosines) / 12, rel=1e-5)
    normed = spatial_norm(teacher, 0.6)
    for i in range(3):
        for d in range(5):
            column = teacher[i, :, d].numpy().astype(float)
            wanted = (column - 0.6 * column.mean()) / (column.std() + 1e-6)
            np.testing.assert_allclose(normed[i, :, d], wanted, rtol=1e-4, atol=1e-5)
    tokens = torch.arange(16.0).reshape(1, 16, 1)  # a 4x4 grid, row by row
    assert on_grid(tokens, 4).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert torch.equal(on_grid(tokens, 16), tokens)


def test_routing_keeps_the_share_asked_for_by_seed_step_and_place():
    kept = keep(1, 7, np.arange(6), 16, 0.3)
    assert kept.shape == (6, 16 - round(0.3 * 16)) and (kept.diff(dim=1) > 0).all()
    assert kept.min() >= 0 and kept.max() < 16 and len({tuple(row) for row in kept.tolist()}) > 3
    assert torch.equal(keep(1, 7, np.array([4, 5]), 16, 0.3), kept[4:])
    assert not torch.equal(keep(1, 8, np.arange(6), 16, 0.3), kept)
    assert not torch.equal(keep(2, 7, np.arange(6), 16, 0.3), kept)
    assert torch.equal(keep(0, 0, range(2), 16, 0), torch.arange(16).expand(2, 16))


def test_contrast_moves_both_branches_before_guidance_and_0_changes_nothing(tmp_path, refused):
    denoiser, (z, y, _, _) = Denoiser(awake(tiny_net())), rows(3)
    m = denoiser.mean_latent = torch.randn(3, 8, 8)
    none = torch.full_like(y, 5)
    for t, cfg, contrast in ((0.5, 2.0, 0.3), (0.05, 2.0, 0.3), (0.5, 1.0, -0.05)):
        v_c, v_u = (0.7 * denoiser.velocity(z, t, label) + 0.3 * m if contrast == 0.3 else
                    1.05 * denoiser.velocity(z, t, label) - 0.05 * m for label in (y, none))
        wanted = v_c if t < 0.1 or cfg == 1 else v_u + cfg * (v_c - v_u)
        found = guided_velocity(denoiser, y, cfg, contrast=contrast)(z, t)
        assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        plain = guided_velocity(denoiser, y, cfg)(z, t)
        assert torch.equal(guided_velocity(denoiser, y, cfg, contrast=0.0)(z, t), plain)
    assert Sampling(contrast=0.05, shift=0.5).solver() == "heun shift 0.5 contrast 0.05"
    from conftest import save_tiny  # which a rank's process, after this file's teacher, cannot see
    save_tiny(tmp_path / "old.safetensors")
    refused(sample.main, ["--ckpt", tmp_path / "old.safetensors", "--contrast", 0.05],
            "--contrast 0.05", "mean latent")


@pytest.mark.parametrize("depth, first, last", [(12, 2, 8), (6, 1, 4), (24, 4, 16)])
def test_routed_tokens_skip_the_middle_blocks_with_their_rotary_rows(depth, first, last):
    """Blocks that only add each token's rotary row, and 100 to know how many it passed."""
    class Adds(torch.nn.Module):
        def forward(self, x, c, cos, sin):
            return x + cos.mean(-1) * 0 + 100 + cos[..., 0, :1]

    net = tiny_net(depth=depth)
    net.blocks = torch.nn.ModuleList(Adds() for _ in range(depth))
    net.rotary_cos = torch.arange(16.0)[:, None].expand(16, 16)
    routed = Tread(net)
    routed.route(net)
    seen = []
    net.final_layer.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    (x, y, t, e), kept = rows(3), keep(0, 0, range(3), 16, 0.5)
    net(x, t, y)  # as in sampling: nothing is routed
    routed(x, y, t, e, kept=kept)
    net(x, t, y)
    start = net.x_embedder(x)
    whole = start + depth * (100 + torch.arange(16.0)[None, :, None])
    assert_close(seen[0], whole)
    assert torch.equal(seen[2], seen[0])
    z = t[:, None, None, None] * x + (1 - t[:, None, None, None]) * e
    passed = torch.full((3, 16), depth - (last - first + 1.0)).scatter(1, kept, float(depth))
    wanted = net.x_embedder(z) + (passed * (100 + torch.arange(16.0)))[..., None]
    assert_close(seen[1], wanted)


# -------------------------------------------------------------------------------------------------
# A run

@pytest.mark.parametrize("name, own", [
    ("contrastive", ["--weight"]), ("tread", ["--share"]), ("repa", [*REPA, "--weight"]),
    ("repa", [*REPA, "--with", "tread", "--tread-share", "0", "--weight"])])
def test_without_weight_it_is_the_plain_run_bit_for_bit(name, own, cache, plain, tmp_path):
    assert main(load(name), [*own, "0", *flags(cache, tmp_path / "0")]) == 0
    (wanted, _), (found, settings) = (read_checkpoint(out / "last.safetensors")
                                      for out in (plain, tmp_path / "0"))
    assert all(torch.equal(found[key], value) for key, value in wanted.items())
    assert settings["ablation"][name]
    assert log_rows(tmp_path / "0") == log_rows(plain)
    if name != "tread":
        assert main(load(name), [*own, "1e-12", *flags(cache, tmp_path / "1")]) == 0
        nearly, _ = read_checkpoint(tmp_path / "1" / "last.safetensors")
        for key, value in wanted.items():
            assert_close(nearly[key], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_a_technique_continues_bit_for_bit_and_differs_from_the_plain_run(
        way, cache, plain, tmp_path):
    assert run(way, cache, tmp_path / "whole") == 0
    assert run(way, cache, tmp_path / "parts", steps=2) == 0
    assert run(way, cache, tmp_path / "parts", steps=4) == 0  # `stopped` ends in between
    assert run(way, cache, tmp_path / "parts") == 0
    same_run(tmp_path / "whole", tmp_path / "parts", LOGGED)
    tensors, _ = read_checkpoint(tmp_path / "whole" / "last.safetensors")
    theirs, _ = read_checkpoint(plain / "last.safetensors")
    trained = [name for name in tensors if name.startswith("beside.")]
    assert bool(trained) == (way != "tread")
    assert all(f"optimizer.exp_avg.{name[7:]}" in tensors for name in trained)
    key = "model.blocks.3.mlp.w3.weight"
    assert not torch.equal(tensors[key], theirs[key])
    exported, _ = read_checkpoint(tmp_path / "whole" / "ema.safetensors")
    assert {name.split(".")[0] for name in exported} == {"ema", "ema2", "data"}


def test_a_projector_is_frozen_at_the_step_asked_for(cache, tmp_path):
    """At step 3 of 6; the network learns on, without alignment in its loss."""
    def projector(steps):
        assert run("stopped", cache, tmp_path, steps=steps) == 0
        tensors, _ = read_checkpoint(tmp_path / "last.safetensors")
        return tensors["beside.projector.0.weight"], tensors["model.blocks.0.mlp.w3.weight"]
    (two, _), (three, net), (six, later) = projector(2), projector(3), projector(6)
    assert not torch.equal(two, three) and torch.equal(three, six)
    assert not torch.equal(net, later)


def test_techniques_train_alike_on_two_ranks_and_in_micro_batches(cache, tmp_path):
    """All three; alignment ends at step 4 of 6."""
    assert run("all", cache, tmp_path / "one") == 0
    assert run("all", cache, tmp_path / "micro", "--micro", 2) == 0
    name, own = WAYS["all"]
    done = torchrun(2, "-m", f"ablations.{name}", *own, *flags(cache, tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    one, _ = read_checkpoint(tmp_path / "one" / "last.safetensors")
    for other in ("micro", "two"):
        tensors, _ = read_checkpoint(tmp_path / other / "last.safetensors")
        for key, value in one.items():
            if key.startswith(("model.", "beside.")):
                assert_close(tensors[key], value, rtol=1e-3, atol=1e-5)
        logs = (np.array(log_rows(tmp_path / out, LOGGED), float) for out in ("one", other))
        np.testing.assert_allclose(*logs, rtol=2e-3)


def test_the_teacher_sees_the_image_mirrored_when_its_latent_is(cache):
    data, flip = vae.LatentDataset(cache), np.arange(40) % 3 == 0
    images, (latents, _) = data.pictures(range(40), flip), data.batch(range(40), flip)
    assert images.shape == (40, 3, 8, 8) and images.dtype == torch.uint8
    assert torch.equal(vae.to_uint8(latents), images)  # this cache's latents are the pixels
    seen = []

    class Watched(Repa):
        def forward(self, x, y, t, e, drop=None, images=None, **more):
            seen.append(torch.equal(vae.to_uint8(x), images))
            return super().forward(x, y, t, e, drop, images, **more)
    argv = [*REPA, *flags(cache, cache / "watched", "--micro", 4, steps=3)]
    assert train.main(argv, Watched) == 0 and seen == [True] * 6


def test_mistakes_are_told_in_one_line(cache, plain, finished, tmp_path, refused):
    def train_with(name):
        return lambda argv: main(load(name), argv)
    refused(train_with("contrastive"), flags(cache, plain), "another ablation")
    refused(train.main, flags(cache, tmp_path / "new", "--share", "0.5"), "--share")
    refused(train_with("repa"), flags(cache, tmp_path), "required: --teacher")
    refused(train_with("repa"), [*REPA, *flags(finished[0], tmp_path)], "--keep-images")
    refused(train_with("repa"), ["--teacher", "nowhere:load", *flags(cache, tmp_path)], "nowhere")
    refused(train_with("repa"), ["--teacher", "a.pth", *flags(cache, tmp_path)], "a.pth")
    refused(train_with("repa"), [*REPA, "--after", "9", *flags(cache, tmp_path)], "--after 9")
    refused(train_with("repa"), [*REPA, "--conv", "--with", "tread", *flags(cache, tmp_path)],
            "--conv needs all tokens")
    other = ["--repa-teacher", REPA[1], "--repa-conv", "--with", "repa", *flags(cache, tmp_path)]
    refused(train_with("tread"), other, "--conv needs all tokens")
    assert main(Tread, flags(cache, tmp_path / "half", "--share", "0.5", steps=2)) == 0
    refused(train_with("tread"), flags(cache, tmp_path / "half", "--share", "0.25"),
            "another ablation")
    refused(train.main, flags(cache, tmp_path / "half"), "another ablation")


def test_the_run_folder_is_named_after_it_and_the_export_is_like_any_other(
        cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["--latents", str(cache), *"--patch 4 --model T --batch 8 --steps 1".split()]
    assert main(Tread, [*argv, "--with", "contrastive", "--sample-every", "0"]) == 0
    path = tmp_path / "out/imagenet-T4-x-tread-contrastive/ema.safetensors"
    denoiser = load_denoiser(path)
    assert type(denoiser) is Denoiser and not denoiser.net.blocks[1]._forward_pre_hooks
    assert_close(denoiser.mean_latent, mean_latent(vae.LatentDataset(cache)))
    named = {"tread": {"share": 0.5}, "contrastive": {"weight": 0.05}}
    assert denoiser.settings["ablation"] == named
    assert join(Tread, Contrastive).name == "tread-contrastive"


def test_the_papers_run_imports_no_technique():
    code = "import sys, train; assert not [m for m in sys.modules if m.startswith('ablations')]"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    assert sorted(NAMES) == sorted(path.stem for path in ROOT.glob("ablations/*.py")
                                   if path.stem not in ("__init__", "logbook", "studies"))


def test_a_hook_is_kept_where_a_network_without_one_was_compiled_before():
    """torch.compile does not look at hooks by itself: a study's second run would train as the
    first."""
    inputs, seen = (torch.randn(2, 4, 4, 4), torch.rand(2), torch.tensor([0, 1])), []
    for hooked in (False, True):
        net = JLT(4, 1, 4, hidden_size=32, depth=1, num_heads=1, num_classes=3, bottleneck=0)
        if not compile_net(net, torch.device("cpu")):
            pytest.skip("torch.compile is not to be had")
        if hooked:
            net.blocks[0].register_forward_hook(lambda *_: seen.append(1))
        net(*inputs)
    assert seen == [1]
