"""The training techniques of ablations/: their formulas, and the promises of a run with each."""
import argparse

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import finish, start
from torch.testing import assert_close

import train
import vae
from ablations import table
from ablations.contrastive import Contrastive, contrastive_loss
from ablations.muon import Muon, orthogonalize
from ablations.repa import Repa, alignment, on_grid, spatial_norm
from ablations.repa_contrastive import RepaContrastive
from ablations.repa_tread import RepaTread
from ablations.tread import RoutedJLT, Tread, keep
from lib.checkpoint import load_denoiser, read_checkpoint
from model import TARGETS, Denoiser, coefficients, slope
from test_all import LOGGED, awake, flags, log_rows, rows, same_run, small_cache, tiny_net


class Stub(torch.nn.Module):
    """A teacher of 9 tokens of 5 numbers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mix", torch.arange(15.0).view(3, 5).sin())

    def forward(self, images):
        colors = F.adaptive_avg_pool2d(images.float() / 255, 3)         # (B, 3, 3, 3)
        tokens = colors.flatten(2).transpose(1, 2) @ self.mix           # (B, 9, 5)
        return tokens.mean(1), tokens


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """40 images of 4 classes, stored beside their latents."""
    return small_cache(tmp_path_factory.mktemp("images"), 40, 4, 8, "--keep-images")


@pytest.fixture(scope="module")
def plain(cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("plain") / "run"
    assert train.main(flags(cache, out, *NO_GRIDS)) == 0
    return out


REPA = "--teacher", "tests.test_ablations:Stub", "--hidden", "16"
NO_GRIDS = "--sample-every", "0"
WAYS = {  # class, its flags
    "contrastive": (Contrastive, ()),
    "tread": (Tread, ()),
    "muon": (Muon, ("--muon-lr", "2e-3")),
    "irepa": (Repa, (*REPA, "--conv", "--gamma", "0.6", "--until", "3")),
    "repa_contrastive": (RepaContrastive, REPA),
    "repa_tread": (RepaTread, (*REPA, "--until", "4", "--share", "0.25")),
}


def run(way, cache, out, *more, **steps):
    technique, own = WAYS[way]
    return train.main([*own, *flags(cache, out, *NO_GRIDS, *more, **steps)], technique)


def run_all(cache, out, *more):
    return any(run(way, cache, out / way, *more) for way in WAYS)


@pytest.fixture(scope="module")
def both(cache, tmp_path_factory):
    """The folders of the runs that one rank made and that two made in micro-batches."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    assert not run_all(cache, one)
    assert finish(start(run_all, cache, two, "--micro", 2, ranks=2)) == [0, 0]
    return one, two


# -------------------------------------------------------------------------------------------------
# Formulas

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
        a, b = coefficients(target, s)
        pred = net(z[None], t[i:i + 1], torch.tensor([label]))[0]
        away = a * (z + (1 - s) * v) + b * (z - s * v)
        error = (pred - (a * x[i] + b * e[i])).square() - 0.05 * (pred - away).square()
        weight = 1 if target == loss else (slope(loss, s) / slope(target, s, 0.05)) ** 2
        total += weight * error.mean() / 6
    assert_close(found, total, rtol=1e-5, atol=1e-6)


def test_the_other_image_is_at_the_next_position_of_the_global_batch(cache):
    """Also for the last of a micro-batch, and for the last of all, whose other is the first."""
    seen = []

    class Watched(Contrastive):
        def forward(self, x, y, t, e, drop=None, x_next=None, e_next=None):
            seen.append((x, e, x_next.float(), e_next))
            return super().forward(x, y, t, e, drop, x_next, e_next)
    for micro in (8, 2):
        argv = flags(cache, cache / f"seen{micro}", "--micro", micro, *NO_GRIDS, steps=1)
        assert train.main(argv, Watched) == 0
    whole, *parts = seen
    for value, after in ((0, 2), (1, 3)):
        assert torch.equal(whole[after][0], whole[value][0])  # after position 7 comes 0
        assert torch.equal(torch.cat([part[value] for part in parts]), whole[value])
        assert [part[after] for part in parts[:-1]] == [
            pytest.approx(part[value][:1]) for part in parts[1:]]


def test_alignment_and_the_teachers_tokens():
    student, teacher = torch.randn(3, 4, 5), torch.randn(3, 4, 5) + 1
    a, b = student.flatten(0, 1).numpy(), teacher.flatten(0, 1).numpy()
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert alignment(student, teacher).item() == pytest.approx(cosines.mean(), rel=1e-5)
    normed = spatial_norm(teacher, 0.6)
    mean, std = teacher.mean(1), teacher.std(1, correction=0)
    assert_close(normed.mean(1), 0.4 * mean / std, rtol=1e-4, atol=1e-5)
    assert_close(normed.diff(dim=1) * std[:, None], teacher.diff(dim=1), rtol=1e-4, atol=1e-5)
    tokens = torch.arange(16.0).reshape(1, 16, 1)  # a 4x4 grid, row by row
    assert on_grid(tokens, 4).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]


def test_routing_keeps_the_share_asked_for_by_seed_step_and_place():
    kept = keep(1, 7, np.arange(6), 16, 0.3)
    assert kept.shape == (6, 16 - round(0.3 * 16)) and (kept.diff(dim=1) > 0).all()
    assert kept.min() >= 0 and kept.max() < 16 and len({tuple(row) for row in kept.tolist()}) > 3
    assert torch.equal(keep(1, 7, np.array([4, 5]), 16, 0.3), kept[4:])
    assert not torch.equal(keep(1, 8, np.arange(6), 16, 0.3), kept)
    assert not torch.equal(keep(2, 7, np.arange(6), 16, 0.3), kept)


@pytest.mark.parametrize("depth, first, last", [(12, 2, 8), (6, 1, 4)])
def test_routed_tokens_skip_the_middle_blocks_with_their_rotary_rows(depth, first, last):
    """Blocks that only add each token's rotary row, and 100 to count how many it passed."""
    class Adds(torch.nn.Module):
        def forward(self, x, c, cos, sin):
            return x + 100 + cos[..., 0, :1]

    net = RoutedJLT(8, 2, 3, hidden_size=32, depth=depth, num_heads=2, bottleneck=8)
    net.blocks = torch.nn.ModuleList(Adds() for _ in range(depth))
    cos = torch.arange(16.0)[:, None, None].expand(16, 1, 16)
    x, kept = torch.zeros(3, 16, 32), keep(0, 0, range(3), 16, 0.5)
    net.kept = None  # as in sampling
    whole = net.run_blocks(x, None, cos, cos)
    assert_close(whole, (depth * (100 + torch.arange(16.0)))[None, :, None].expand(3, 16, 32))
    net.kept = kept
    passed = torch.full((3, 16), depth - (last - first + 1.0)).scatter(1, kept, float(depth))
    wanted = (passed * (100 + torch.arange(16.0)))[..., None].expand(3, 16, 32)
    assert_close(net.run_blocks(x, None, cos, cos), wanted)


@pytest.mark.parametrize("shape", [(64, 128), (384, 128), (32, 32)])
def test_orthogonalize_maps_each_singular_value_by_the_polynomial(shape):
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    left, values, right = torch.linalg.svd(matrices.double(), full_matrices=False)
    values = values / values.square().sum(-1, keepdim=True).sqrt()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values ** 3 + 2.0315 * values ** 5
    found = orthogonalize(matrices)
    assert_close(found.double(), left * values[:, None] @ right, rtol=0, atol=1e-5)
    assert torch.linalg.svdvals(found).max() < 1.21 and torch.linalg.svdvals(found).median() > 0.68


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has no Muon yet")
def test_muons_steps_are_torchs_for_matrices_and_adamws_for_the_rest():
    ours, theirs = (Muon(awake(tiny_net())) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    optimizer = ours.make_optimizer(argparse.Namespace(lr=0.01, muon_lr=0.02))
    torch.manual_seed(0)
    matrices = [p for name, p in theirs.named_parameters() if "blocks." in name and p.ndim == 2]
    rest = [p for name, p in theirs.named_parameters() if "blocks." not in name or p.ndim != 2]
    references = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        train.make_optimizer(rest, 0.01)]
    for _ in range(3):
        for p, q in zip(ours.parameters(), theirs.parameters()):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        before = [q.clone() for q in theirs.parameters()]
        for part in optimizer, *references:
            part.step()
            part.zero_grad()
        for p, q, old in zip(ours.parameters(), theirs.parameters(), before):
            if any(q is matrix for matrix in matrices):
                assert (p - q).norm() < 0.04 * (q - old).norm()  # torch's computes in bf16
                p.data.copy_(q)
            else:
                assert not torch.equal(q, old) and torch.equal(p, q)
    assert len(matrices) == 10  # two blocks of qkv, proj, w12, w3 and the modulation


# -------------------------------------------------------------------------------------------------
# A run

@pytest.mark.parametrize("technique, own", [
    (Contrastive, ["--negative-weight"]), (Tread, ["--share"]), (Repa, [*REPA, "--align-weight"])])
def test_without_weight_it_is_the_plain_run_bit_for_bit(technique, own, cache, plain, tmp_path):
    assert train.main([*own, "0", *flags(cache, tmp_path, *NO_GRIDS)], technique) == 0
    (wanted, _), (tensors, _) = (read_checkpoint(out / "last.safetensors")
                                 for out in (plain, tmp_path))
    assert all(torch.equal(tensors[key], value) for key, value in wanted.items())
    assert log_rows(tmp_path, LOGGED) == log_rows(plain, LOGGED)


@pytest.mark.parametrize("way", WAYS)
def test_a_technique_resumes_bit_for_bit_and_differs_from_the_plain_run(
        way, cache, plain, both, tmp_path):
    out = both[0] / way
    for steps in (4, 6):
        assert run(way, cache, tmp_path, steps=steps) == 0
    same_run(out, tmp_path, LOGGED)
    tensors, _ = read_checkpoint(out / "last.safetensors")
    theirs, _ = read_checkpoint(plain / "last.safetensors")
    key = "model.blocks.3.mlp.w3.weight"
    assert not torch.equal(tensors[key], theirs[key])
    assert any(name.startswith("extra.") for name in tensors) == ("repa" in way)
    exported, settings = read_checkpoint(out / "ema.safetensors")
    assert {name.split(".")[0] for name in exported} == {"ema", "ema2"}
    assert type(load_denoiser(out / "ema.safetensors")) is Denoiser
    if "repa" in way:
        aligned = log_rows(out, ["alignment"])
        until = settings["ablation"]["until"] or 6
        assert [bool(value) for value, in aligned] == [step < until for step in range(6)]


@pytest.mark.parametrize("way", WAYS)
def test_a_technique_trains_alike_on_two_ranks_and_in_micro_batches(way, both):
    one, two = (read_checkpoint(out / way / "last.safetensors")[0] for out in both)
    for key, value in one.items():
        if key.startswith(("model.", "extra.")):
            assert_close(two[key], value, rtol=1e-3, atol=1e-5)
    logs = (np.array(log_rows(out / way, LOGGED), float) for out in both)
    np.testing.assert_allclose(*logs, rtol=2e-3)


def test_the_teacher_sees_the_image_mirrored_when_its_latent_is(cache):
    seen = []

    class Watched(Repa):
        def forward(self, x, y, t, e, drop=None, images=None):
            seen.append(torch.equal(vae.to_uint8(x), images))  # this cache's latents are the pixels
            return super().forward(x, y, t, e, drop, images)
    argv = [*REPA, *flags(cache, cache / "watched", "--micro", 4, *NO_GRIDS, steps=3)]
    assert train.main(argv, Watched) == 0 and seen == [True] * 6


def test_mistakes_are_one_line(cache, finished, tmp_path, refused):
    def training(technique):
        return lambda argv: train.main(argv, technique)
    refused(training(Repa), [*REPA, *flags(finished[0], tmp_path)], "--keep-images")
    refused(training(Repa), ["--teacher", "nowhere:load", *flags(cache, tmp_path)], "nowhere")
    refused(training(Repa), [*REPA, "--after", "9", *flags(cache, tmp_path)], "--after 9")
    refused(training(RepaTread), [*REPA, "--conv", *flags(cache, tmp_path)], "needs all tokens")
    assert run("tread", cache, tmp_path / "half", steps=2) == 0
    refused(training(Tread), flags(cache, tmp_path / "half", "--share", "0.25"), "another ablation")


# -------------------------------------------------------------------------------------------------
# The table of a study

LOG = """step,loss,images_per_s,fit,fit_t05,val
100,0.9,10,,,
200,0.8,30,0.5,0.4,0.75
300,0.7,20,,,
"""
SCORES = """weights,cfg,interval,method,nfe,t_eps,n,fid,inception_score,mmd
ema,1,-,heun,99,0.05,5000,61.5,3.5,0.25
ema,3,"0.1,1",ab2,27,0,5000,48.25,4.5,
"""


def test_the_table_has_the_numbers_of_all_runs(tmp_path, capsys):
    for name, scores in ("x", SCORES), ("v", None):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.csv").write_text(LOG)
        if scores:
            (tmp_path / name / "fid.csv").write_text(scores)
    assert table.main([str(tmp_path / "x"), str(tmp_path / "v")]) == 0
    columns, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]]
                         for line in capsys.readouterr().out.splitlines()]
    logged = {"step": "300", "fit": "0.5", "val": "0.75", "images/s": "20"}
    scored = {"FID-5000, cfg 1": "61.5", "MMD-5000, cfg 1": "0.25",
              "FID-5000, cfg 3, ab2 27, floor 0": "48.25"}
    assert [dict(zip(columns, row)) for row in rows] == [
        {"run": "x"} | logged | scored, {"run": "v"} | logged | dict.fromkeys(scored, "")]
