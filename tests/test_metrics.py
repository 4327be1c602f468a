"""fid.py beyond the formulas of test_all.py: MMD, references, sample files, tables of scores."""
import json
import math

import numpy as np
import pytest
import torch
from conftest import save_tiny
from PIL import Image

import fid
from lib.log import read_table
from lib.run import BadInput
from sample import Sampling
from test_all import SmallInception
from vae import load_vae

PIXELS = np.random.default_rng(0).integers(0, 256, (14, 6, 10, 3), np.uint8)


@pytest.fixture
def run(small_inception, tmp_path, monkeypatch, capsys):
    """run(command line) -> what fid.py prints, on stderr where its exit code is 2. Beside images
    (10 x 6 pixels, also as npz files), a checkpoint and a reference of another kind of images."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for i, image in enumerate(PIXELS):
        Image.fromarray(image).save(f"images/{i:02d}.png")
    np.savez("plain.npz", arr_0=PIXELS)
    np.savez_compressed("packed.npz", arr_0=PIXELS)
    np.savez("ref.npz", mu=np.arange(16.0), sigma=np.eye(16))
    save_tiny(tmp_path / "a.safetensors")

    def run(words, code=0):
        capsys.readouterr()
        assert fid.main(words.split()) == code
        out, err = capsys.readouterr()
        assert not code or (err.startswith("error: ") and err.count("\n") == 1)
        return err if code else out
    return run


def scores_in(line):
    """(FID, Inception Score) as a line of results has them."""
    words = line.split("FID-")[1].split()
    return float(words[1]), float(words[3])


def test_mmd_is_the_formula_of_cmmd():
    """1000 (E k(a, a') + E k(b, b') - 2 E k(a, b)) with k = exp(-|a-b|²/200) of unit vectors."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((30, 7)), rng.standard_normal((20, 7)) + 0.5
    a, b = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (a, b))

    def mean(p, q):
        return sum(math.exp(-sum((x - y) ** 2) / 200) for x in p for y in q) / len(p) / len(q)
    expected = 1000 * (mean(a, a) + mean(b, b) - 2 * mean(a, b))
    many = np.concatenate([5 * a] * 50)  # scaled to unit length, summed in blocks of 1,000
    assert fid.mmd(torch.tensor(many), b) == pytest.approx(expected, rel=1e-9)


def test_mmds_come_from_10000_embeddings_spread_evenly():
    zeros = torch.zeros(10_000, 3, 1, 1, dtype=torch.uint8)
    batches = [(range(10_000, 20_000), zeros + 1), (range(10_000), zeros)]
    extractor = SmallInception()
    rows = fid.score(batches, 20_000, {"mmd": extractor})["mmd"]
    first, last = extractor(torch.cat([zeros[:1], zeros[:1] + 1]))[0].half()
    assert len(rows) == 10_000 and torch.equal(rows[0], first) and torch.equal(rows[4999], first)
    assert torch.equal(rows[5000], last)


def test_references_of_all_kinds_load_and_others_are_refused(small_inception, tmp_path):
    """ADM's has further arrays and says nothing of its images; --save-ref's of 1d03df4 has `judges`
    in its meta. The names, which tables hold, are the ones of 1d03df4."""
    file, arrays = tmp_path / "ref.npz", dict(mu=np.arange(16.0), sigma=np.diag(np.arange(16.0)))
    np.savez_compressed(file, **arrays, mu_s=np.zeros(9), arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    reference = fid.load_reference(file)
    assert np.array_equal(reference.sigma, arrays["sigma"]) and reference.hash == "265058e0be60"
    reference.check_size("256x256")  # unknown, so none is refused

    embeddings = {name: torch.ones(3, 4).half() for name in ("mmd", "cmmd")}
    meta = {"hash": "265058e0be60", "size": "32x32", "count": 3, "judges": {"cmmd": "12345678"}}
    np.savez(file, **arrays, **embeddings, meta=json.dumps(meta))
    reference = fid.load_reference(file, ["fid", "mmd", "cmmd"])
    assert reference.hash == "265058e0be60-5f20ca"
    with pytest.raises(BadInput, match="32x32 images, those to score are 8x8"):
        reference.check_size("8x8")
    with pytest.raises(BadInput, match="no embeddings for dino"):
        fid.load_reference(file, ["fid", "dino"])
    again = fid.save_reference(file, **arrays, embeddings=embeddings, size="32x32")
    assert again.hash == reference.hash and again.about == {"size": "32x32"}
    assert torch.equal(again.embeddings["cmmd"], embeddings["cmmd"])

    for wrong in (dict(mu=np.zeros(8)), dict(mu=np.full(16, np.nan)), dict(meta="{")):
        np.savez(file, **arrays | wrong)
        with pytest.raises(BadInput, match="ref.npz"):
            fid.load_reference(file)


def test_a_reference_names_the_networks_behind_its_embeddings(run, monkeypatch):
    monkeypatch.setattr(fid, "load_features", lambda name, device: SmallInception())
    made = run("--images images --save-ref own.npz --metrics fid mmd cmmd --clip one")
    assert "size 10x6, count 14, crop none" in made
    score = "--npz packed.npz --ref own.npz --metrics mmd cmmd"
    assert "CMMD 0.0000" in run(f"{score} --clip folder/one").replace("-0.0", "0.0")
    assert "the cmmd of --ref was made with one" in run(f"{score} --clip two", 2)


def test_folders_and_npz_files_are_scored_alike(run, capsys):
    """Whatever the batch; at distance 0 from their own statistics; with no Inception Score for few
    images or without a classifier."""
    first = scores_in(run("--images images --ref ref.npz"))
    for words in ("--images images --batch 3", "--npz plain.npz", "--npz packed.npz --batch 5"):
        assert scores_in(run(f"{words} --ref ref.npz")) == pytest.approx(first, rel=1e-6)
    count, size, batches = fid.npz_images("packed.npz", 4, 3)           # 4 of 14, spread evenly
    images = torch.cat([batch for _, batch in batches]).permute(0, 2, 3, 1)
    assert (count, size) == (4, "10x6") and np.array_equal(images, PIXELS[[0, 3, 7, 10]])

    run("--images images --size 6 --save-ref own.npz")
    assert fid.main("--images images --size 6 --ref own.npz".split()) == 0
    out, err = capsys.readouterr()
    assert abs(scores_in(out)[0]) < 1e-3 and "FID-14 is not comparable with FID-50K" in err
    assert "size 6x6, count 14, crop center" in out
    assert "6x6 images, those to score are 10x6" in run("--npz plain.npz --ref own.npz", 2)

    assert "IS n/a" in run("--images images --ref ref.npz --num-samples 9")
    fid.load_inception(None, "cpu").fc.weight.data.zero_()
    assert "IS n/a" in run("--images images --ref ref.npz")


def test_other_npz_files_are_refused(run, tmp_path):
    np.savez("wrong.npz", arr_0=np.asfortranarray(PIXELS))
    assert "expected uint8 (N, H, W, 3)" in run("--npz wrong.npz --ref ref.npz", 2)
    data = (tmp_path / "plain.npz").read_bytes()
    (tmp_path / "short.npz").write_bytes(data.replace(b"(14, 6, 10, 3)", b"(99, 6, 10, 3)"))
    assert "not a whole npz file" in run("--npz short.npz --ref ref.npz", 2)


def test_a_codec_is_scored_by_what_it_reconstructs(run, monkeypatch):
    np.savez("negative.npz", arr_0=255 - PIXELS)
    negative = scores_in(run("--npz negative.npz --ref ref.npz"))
    pixels = type(load_vae("pixels").net)
    monkeypatch.setattr(pixels, "decode", lambda self, z: -z)
    assert scores_in(run("--images images --ref ref.npz --vae pixels")) == negative
    monkeypatch.setattr(pixels, "stride", 3)
    assert "multiples of 3" in run("--images images --ref ref.npz --vae pixels", 2)


OLD_TABLE = """\
network,target,weights,step,cfg,interval,steps,method,nfe,t_eps,classes,vae,seed,precision,n,\
reference,fid,inception_score,mmd,cmmd,dino,seconds
NETWORK,x,ema,100,1,-,2,heun,3,0.05,all,pixels,0,fp32,20,REFERENCE,60.011430,n/a,,,,787.8
"""


def test_a_sweep_scores_only_what_its_table_lacks(run, tmp_path, monkeypatch):
    """Also in a table that 1d03df4 began."""
    reference = fid.save_reference(
        "ref.npz", np.arange(16.0), np.eye(16), {"mmd": torch.eye(16).half()})
    network = fid.weights_hash(fid.load_denoiser(tmp_path / "a.safetensors").net)
    table = OLD_TABLE.replace("NETWORK", network).replace("REFERENCE", reference.hash)
    (tmp_path / "fid.csv").write_text(table)
    drawn, generate = [], fid.generate
    monkeypatch.setattr(fid, "generate", lambda *args: drawn.append(args) or generate(*args))
    sweep = "--ckpt a.safetensors --num-samples 20 --steps 2 --ref ref.npz --weights ema model"
    out = run(f"{sweep} --cfg 1 2 --interval 0.1,1 0,0.5")
    assert "FID-20 60.011430  IS n/a  (" in out and len(drawn) == 5     # that one is known
    columns, rows = read_table("fid.csv")
    assert (tmp_path / "fid.csv").read_text().startswith(table)
    assert [(row["weights"], row["cfg"], row["interval"]) for row in rows] == [
        (weights, *pair) for weights in ("ema", "model")
        for pair in (("1", "-"), ("2", "0.1,1"), ("2", "0,0.5"))]       # at cfg 1 nothing is guided

    lines = run(f"{sweep} --cfg 2 3").splitlines()[-4:]                 # two of four are new
    assert len(drawn) == 7 and lines[0].startswith(f"FID-20 {rows[1]['fid']}  IS ")
    run(f"{sweep} --cfg 2 --metrics fid mmd")                           # another metric is asked
    rows = read_table("fid.csv")[1]
    assert len(drawn) == 9 and [bool(row["mmd"]) for row in rows] == [False] * 8 + [True] * 2
    assert rows[1]["fid"] == rows[8]["fid"]


def test_a_row_tells_which_classes_were_drawn_how_often(run, tmp_path):
    """And `evaluate` gives scores as numbers, or None."""
    denoiser, pixels = fid.load_denoiser(tmp_path / "a.safetensors"), load_vae("pixels")
    reference, extractors = fid.load_reference("ref.npz"), fid.load_extractors(["fid"])
    rows = [fid.evaluate(denoiser, pixels, extractors, reference, n, Sampling(steps=1),
                         classes=classes)
            for n, classes in ((10, None), (8, None), (8, [3, 1]))]
    assert rows[0]["classes"] == "all" and rows[2]["classes"] == "3 1"
    assert rows[1]["classes"] not in ("all", "3 1")  # five classes, of which two are drawn once
    assert isinstance(rows[0]["fid"], float) and isinstance(rows[0]["inception_score"], float)
    assert rows[1]["inception_score"] is None  # of fewer than ten images
