"""Metrics other than FID: MMD by its formula, and the road from images to a row of a table."""
import math

import numpy as np
import pytest
import torch
from conftest import save_tiny

import fid
import lib.judges
from lib.judges import spread
from lib.log import append_score, read_scores, read_table
from lib.npz import read_statistics, write_statistics
from test_all import SmallInception, picture_folder


def test_mmd_by_the_plain_formula_and_by_its_limit():
    """1000 (E k(a,a') + E k(b,b') - 2 E k(a,b)), k = exp(-|a-b|²/200) of unit vectors. These are so
    near to one another that it is within 1% of 10 times the squared distance of their means."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((30, 7)), rng.standard_normal((20, 7)) + 0.5
    unit = [[row / math.sqrt(sum(row * row)) for row in rows] for rows in (a, b)]

    def mean(p, q):
        return sum(math.exp(-sum((x - y) ** 2) / 200) for x in p for y in q) / len(p) / len(q)
    wanted = 1000 * (mean(*2 * [unit[0]]) + mean(*2 * [unit[1]]) - 2 * mean(*unit))
    assert fid.mmd(a, b) == pytest.approx(wanted, rel=1e-9)
    assert fid.mmd(torch.tensor(5 * a), b) == pytest.approx(wanted, rel=1e-9)  # only directions
    assert fid.mmd(a, a) == pytest.approx(0, abs=1e-9)
    means = np.mean(unit[0], 0) - np.mean(unit[1], 0)
    assert 0.99 < fid.mmd(a, b) / (10 * means @ means) < 1
    many = rng.standard_normal((2500, 7)), rng.standard_normal((1100, 7))  # in blocks of 1,000
    assert fid.mmd(*many) == pytest.approx(fid.mmd(*many[::-1]), rel=1e-9)
    pairs = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in many]
    kernel = [np.exp((p @ q.T - 1) / 100).mean() for p, q in (
        (pairs[0], pairs[0]), (pairs[1], pairs[1]), pairs)]
    assert fid.mmd(*many) == pytest.approx(1000 * (kernel[0] + kernel[1] - 2 * kernel[2]), rel=1e-6)


def test_the_images_of_an_mmd_are_spread_over_all():
    assert spread(7) == list(range(7)) and len(spread(50_000)) == 10_000
    assert spread(50_000)[:3] == [0, 5, 10] and spread(50_000)[-1] == 49_995


class SmallViT(torch.nn.Module):
    """Stands in for CLIP: 4 numbers an image."""

    def __init__(self):
        super().__init__()
        self.mix = torch.nn.Linear(12, 4)

    @torch.inference_mode()
    def forward(self, images):
        pooled = torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)
        return self.mix(pooled), None


def test_all_metrics_in_one_pass(tmp_path, monkeypatch, small_inception, refused):
    """A reference for three of them; a folder and a network against it; a row asked for more."""
    vit = SmallViT()
    monkeypatch.setattr(lib.judges, "load_vit", lambda path, device: vit)
    monkeypatch.chdir(tmp_path)
    picture_folder(tmp_path / "real", 9, size=(8, 8))
    picture_folder(tmp_path / "other", 6, ("x", "y", "z"), size=(8, 8))
    made = "--images real --save-ref ref.npz --metrics fid mmd cmmd --clip file".split()
    assert fid.main(made) == 0
    reference = fid.load_reference(tmp_path / "ref.npz", ["fid", "mmd", "cmmd"])
    assert {name: tuple(rows.shape) for name, rows in reference.embeddings.items()} == {
        "mmd": (18, 16), "cmmd": (18, 4)}
    assert reference.embeddings["mmd"].dtype == torch.float16

    judges, found = {"fid": SmallInception(), "cmmd": vit}, {}
    for name in ("real", "other"):
        _, _, batches = fid.folder_images(tmp_path / name, None, None, 5)
        images = torch.cat([images for _, images in batches])
        found[name] = judges["fid"](images)[0].half(), vit(images)[0].half()
    save_tiny(tmp_path / "a.safetensors")
    score = "--ckpt a.safetensors --num-samples 18 --steps 2 --ref ref.npz --metrics".split()
    assert fid.main([*score, "fid"]) == fid.main([*score, "mmd", "cmmd", "--clip", "file"]) == 0
    first, second = read_table(tmp_path / "fid.csv")[1]
    assert first["fid"] and not first["mmd"] and second["cmmd"] and not second["fid"]
    assert fid.main([*score, "fid"]) == fid.main([*score, "cmmd", "--clip", "file"]) == 0
    assert len(read_table(tmp_path / "fid.csv")[1]) == 2  # both had been measured

    _, _, batches = fid.folder_images(tmp_path / "other", None, None, 5)
    rows = fid.score(batches, 18, {"mmd": judges["fid"], "cmmd": vit})
    row = fid.results(rows, {}, reference, 0.0)
    for at, name in enumerate(("mmd", "cmmd")):
        wanted = fid.mmd(found["other"][at], found["real"][at])
        assert float(row[name]) == pytest.approx(wanted, abs=1e-5)

    refused(fid.main, [*score, "dino", "--dino", "x"], "no embeddings for dino", "--save-ref")
    monkeypatch.setattr(lib.judges, "load_vit", lambda path, device: SmallViT())
    refused(fid.main, [*score, "cmmd", "--clip", "x"], "--clip: another network")
    refused(fid.main, [*score, "cmmd"], "give --clip openai/clip-vit-large-patch14-336")
    refused(fid.main, "--images real --save-ref new.npz --metrics mmd".split(), "statistics of FID")


def test_an_embedding_is_kept_without_its_batch(monkeypatch):
    """A view would be stored, and sent to the other ranks, with all of the batch's memory."""
    seen = {}
    monkeypatch.setattr(fid, "gathered", lambda rows, indices: seen.update(rows))
    fid.score([(range(6), torch.zeros(6, 3, 8, 8, dtype=torch.uint8))], 6, {"cmmd": SmallViT()})
    assert {row.untyped_storage().nbytes() for row in seen.values()} == {2 * 4} and len(seen) == 6


def test_a_reference_of_another_judge_has_another_name(tmp_path):
    """But that of Inception, whose mean and covariance are in the name anyway."""
    one, names = np.eye(4), []
    for rows in ({}, {"mmd": 0}, {"mmd": 1}, {"dino": 0}, {"dino": 1}):
        embeddings = {name: torch.full((2, 4), value).half() for name, value in rows.items()}
        made = write_statistics(tmp_path / "ref.npz", one[0], one, embeddings)
        assert read_statistics(tmp_path / "ref.npz", 4).hash == made.hash
        names.append(made.hash)
    assert len(set(names[:3])) == 1 and len(set(names)) == 3
    assert all(name.startswith(names[0]) for name in names)


def test_tables_of_before_the_other_metrics_are_read(tmp_path):
    old = [name for name in fid.COLUMNS if name not in ("mmd", "cmmd", "dino")]
    append_score(tmp_path / "fid.csv", old, {"network": "abc", "fid": "1.5"})
    append_score(tmp_path / "fid.csv", fid.COLUMNS, {"network": "def", "mmd": "2"})
    rows = read_scores(tmp_path / "fid.csv", fid.COLUMNS)
    assert [(row["network"], row["fid"], row["mmd"]) for row in rows] == [
        ("abc", "1.5", ""), ("def", "", "2")]
