"""fid.py beyond the formulas of test_all.py: MMD, references, sample files, tables of scores."""
import json
import math
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import fid
from lib.checkpoint import save_checkpoint
from lib.log import read_table
from lib.run import BadInput
from model import JLT
from sample import Sampling
from vae import load_vae


class Malicious:
    """Runs code where it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


class SmallExtractor(torch.nn.Module):
    """Stands in for Inception (16 features, 1008 logits) or for CLIP."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.mix, self.fc = torch.nn.Linear(48, 16), torch.nn.Linear(16, 1008)

    @torch.inference_mode()
    def forward(self, images):
        features = 99 * self.mix(F.adaptive_avg_pool2d(images.float() / 255, 4).flatten(1))
        return features, self.fc(features)

    def weights_id(self):
        return f"{self.mix.weight.sum():.6f}"


@pytest.fixture
def inception(monkeypatch):
    network = SmallExtractor()
    monkeypatch.setattr(fid, "FEATURES", 16)
    monkeypatch.setattr(fid, "load_inception", lambda path, device: network)
    return network


@pytest.fixture
def run(inception, tmp_path, monkeypatch, capsys):
    """run(command line) -> what fid.py prints, on stderr where its exit code is 2."""
    monkeypatch.chdir(tmp_path)

    def run(words, code=0):
        capsys.readouterr()
        assert fid.main(words.split()) == code
        out, err = capsys.readouterr()
        assert not code or (err.startswith("error: ") and err.count("\n") == 1)
        return err if code else out
    return run


def image_folder(folder, count, size=(8, 8)):
    """Random images of (width, height), and the same as one uint8 array (N, 3, H, W)."""
    folder.mkdir()
    pixels = np.random.default_rng(count).integers(0, 256, (count, size[1], size[0], 3), np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i:03d}.png")
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def tiny_checkpoint(path):
    """Random networks of 5 classes as "ema" and "model", in pixel space at 8 x 8."""
    tensors = {}
    for seed, group in enumerate(("ema", "model")):
        torch.manual_seed(seed)
        state = JLT(8, 2, 3, 16, 1, 2, num_classes=5, bottleneck=8).state_dict()
        tensors |= {f"{group}.{name}": torch.randn_like(value) / 4 for name, value in state.items()}
    save_checkpoint(path, tensors, dict(
        target="x", t_eps=0.05, input_size=8, step=100, ema=[0.9], cfg=1.5, interval=[0.1, 1.0],
        vae={"kind": "pixels", "id": "pixels"}, vae_path=None, size=8, class_names=list("abcde")))


# -------------------------------------------------------------------------------------------------
# MMD

def test_mmd_is_the_formula_of_cmmd():
    """1000 (E k(a, a') + E k(b, b') - 2 E k(a, b)) with k = exp(-|a-b|²/200) of unit vectors. In
    this kernel's width they are close, so it is within 1% of 10 |mean a - mean b|²."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((30, 7)), rng.standard_normal((20, 7)) + 0.5
    a, b = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (a, b))

    def mean(p, q):
        return sum(math.exp(-sum((x - y) ** 2) / 200) for x in p for y in q) / len(p) / len(q)
    expected = 1000 * (mean(a, a) + mean(b, b) - 2 * mean(a, b))
    assert fid.mmd(a, b) == pytest.approx(expected, rel=1e-9)
    assert fid.mmd(torch.tensor(5 * a), b) == pytest.approx(expected, rel=1e-9)  # scaled to unity
    assert 0.99 < expected / (10 * np.square(a.mean(0) - b.mean(0)).sum()) < 1
    many = np.concatenate([a] * 50)                                     # summed in blocks of 1,000
    assert fid.mmd(many, b) == pytest.approx(expected, rel=1e-9)


def test_all_metrics_come_from_one_pass(inception, tmp_path):
    """And MMDs from at most 10,000 embeddings, spread evenly, with Inception shared."""
    images, clip = image_folder(tmp_path / "images", 15), SmallExtractor(1)
    extractors = {"fid": inception, "mmd": inception, "cmmd": clip}
    batches = [(range(i, i + 5), images[i:i + 5]) for i in (10, 0, 5)]
    results = fid.score(batches, 15, extractors)
    torch.testing.assert_close(results["mmd"], inception(images)[0].half())
    torch.testing.assert_close(results["cmmd"], clip(images)[0].half())
    mu, sigma = results["fid"].mean_and_covariance()
    features = inception(images)[0].double()
    np.testing.assert_allclose(mu, features.mean(0), rtol=1e-4)
    np.testing.assert_allclose(sigma, np.cov(features.T), rtol=1e-4, atol=1e-2)

    zeros = torch.zeros(10_000, 3, 1, 1, dtype=torch.uint8)
    batches = [(range(10_000), zeros), (range(10_000, 20_000), zeros + 1)]
    rows = fid.score(batches, 20_000, {"mmd": clip})["mmd"]
    assert len(rows) == 10_000 and torch.equal(rows[0], rows[4999]) and (rows[0] != rows[-1]).any()


# -------------------------------------------------------------------------------------------------
# References

def test_references_of_all_kinds_load_and_others_are_refused(inception, tmp_path):
    """ADM's has further arrays and says nothing of its images; --save-ref's of 1d03df4 has `judges`
    in its meta. The names, which tables hold, are the ones of 1d03df4."""
    file, arrays = tmp_path / "ref.npz", dict(mu=np.arange(16.0), sigma=np.diag(np.arange(16.0)))
    np.savez_compressed(file, **arrays, mu_s=np.zeros(9), arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    reference = fid.load_reference(file)
    assert np.array_equal(reference.mu, arrays["mu"]) and np.array_equal(
        reference.sigma, arrays["sigma"])
    assert reference.hash == "265058e0be60"
    reference.check_size("256x256")  # unknown, so none is refused

    embeddings = {name: torch.ones(3, 4).half() for name in ("mmd", "cmmd")}
    meta = {"hash": "265058e0be60", "size": "32x32", "count": 3, "judges": {"cmmd": "12345678"}}
    np.savez(file, **arrays, **embeddings, meta=json.dumps(meta))
    reference = fid.load_reference(file, ["fid", "mmd", "cmmd"])
    assert reference.hash == "265058e0be60-5f20ca" and torch.equal(
        reference.embeddings["cmmd"], embeddings["cmmd"])
    with pytest.raises(BadInput, match="32x32 images, those to score are 8x8"):
        reference.check_size("8x8")
    with pytest.raises(BadInput, match="no embeddings for dino"):
        fid.load_reference(file, ["fid", "dino"])
    again = fid.save_reference(file, reference.mu, reference.sigma, embeddings, size="32x32")
    assert fid.load_reference(file).hash == again.hash == reference.hash

    malicious = np.array([Malicious(tmp_path / "run")] * 16)
    for wrong in (dict(mu=np.zeros(8)), dict(mu=np.full(16, np.nan)), dict(sigma=-np.eye(16)),
                  dict(sigma=np.triu(np.ones((16, 16)))), dict(mu=malicious), dict(meta="{"),
                  dict(meta='{"hash": "0"}')):
        np.savez(file, **arrays | wrong)
        with pytest.raises(BadInput, match="ref.npz"):
            fid.load_reference(file)
    assert not (tmp_path / "run").exists()
    file.write_bytes(file.read_bytes()[:999])
    with pytest.raises(BadInput, match="ref.npz"):
        fid.load_reference(file)


def test_a_reference_knows_the_networks_behind_its_embeddings(run, tmp_path, monkeypatch):
    image_folder(tmp_path / "real", 12)
    monkeypatch.setattr(fid, "load_features", lambda name, device: SmallExtractor(int(name)))
    made = run("--images real --save-ref ref.npz --metrics fid mmd cmmd --clip 1")
    assert "size 8x8, count 12, crop none" in made
    score = "--images real --ref ref.npz --metrics mmd cmmd"
    line = run(f"{score} --clip 1")
    assert "CMMD 0.0000" in line or "CMMD -0.0000" in line
    assert "--clip: another network" in run(f"{score} --clip 2", 2)
    assert "give --clip openai/clip-vit-large-patch14-336" in run(score, 2)
    assert "no embeddings for dino" in run("--images real --ref ref.npz --metrics dino", 2)
    assert "fid among --metrics" in run("--images real --save-ref a.npz --metrics mmd", 2)
    assert "give --ref" in run("--images real", 2)


# -------------------------------------------------------------------------------------------------
# Folders and npz files of images

def test_folders_and_npz_files_are_scored_alike(run, inception, tmp_path, capsys):
    """The same row from PNG files and from ADM's file, packed or not, whatever the batch; distance
    0 from their own statistics; no Inception Score for few images or without a classifier."""
    images = image_folder(tmp_path / "images", 14, (10, 6)).permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "plain.npz", arr_0=images)
    np.savez_compressed(tmp_path / "packed.npz", arr_0=images)
    np.savez(tmp_path / "ref.npz", mu=np.arange(16.0), sigma=np.eye(16))

    def scores(words):
        score = run(f"{words} --ref ref.npz").split("FID-14 ")[1].split()
        return float(score[0]), float(score[2])
    first = scores("--images images")
    for words in ("--images images --batch 3", "--npz plain.npz", "--npz packed.npz --batch 5"):
        assert scores(words) == pytest.approx(first, rel=1e-6)
    assert first[1] > 1

    rows = fid.npz_images(tmp_path / "packed.npz", 4, 3)                # 4 of 14, spread evenly
    assert rows[:2] == (4, "10x6")
    read = torch.cat([batch for _, batch in rows[2]]).permute(0, 2, 3, 1)
    assert np.array_equal(read, images[[0, 3, 7, 10]])

    run("--images images --size 6 --save-ref own.npz")
    assert fid.load_reference("own.npz").about | {"hash": 0} == {
        "size": "6x6", "count": 14, "crop": "center", "extractors": {}, "hash": 0}
    assert fid.main("--images images --size 6 --ref own.npz".split()) == 0
    out, err = capsys.readouterr()
    assert abs(float(out.split("FID-14 ")[1].split()[0])) < 1e-3
    assert "FID-14 is not comparable with FID-50K" in err
    assert "6x6 images, those to score are 10x6" in run("--npz plain.npz --ref own.npz", 2)

    assert "IS n/a" in run("--images images --ref ref.npz --num-samples 9")
    inception.fc.weight.data.zero_()
    assert "IS n/a" in run("--images images --ref ref.npz")


def test_other_npz_files_are_refused(run, tmp_path):
    images = np.zeros((4, 6, 10, 3), np.uint8)
    np.savez(tmp_path / "ref.npz", mu=np.arange(16.0), sigma=np.eye(16))
    for wrong in (images.astype(float), images[..., 0], np.asfortranarray(images + 1)):
        np.savez(tmp_path / "wrong.npz", arr_0=wrong)
        assert "expected uint8 (N, H, W, 3)" in run("--npz wrong.npz --ref ref.npz", 2)
    np.savez(tmp_path / "short.npz", arr_0=images)
    data = (tmp_path / "short.npz").read_bytes()
    (tmp_path / "short.npz").write_bytes(data.replace(b"(4, 6, 10, 3)", b"(9, 6, 10, 3)"))
    for words in ("--npz short.npz", "--npz ref.npz", "--npz none.npz"):
        assert "not a whole npz file" in run(f"{words} --ref ref.npz", 2)


def test_a_codec_is_scored_by_what_it_reconstructs(run, tmp_path, monkeypatch):
    images = image_folder(tmp_path / "images", 12)
    np.savez(tmp_path / "ref.npz", mu=np.arange(16.0), sigma=np.eye(16))
    np.savez(tmp_path / "negative.npz", arr_0=255 - images.permute(0, 2, 3, 1).numpy())
    negative = run("--npz negative.npz --ref ref.npz").split("FID-12 ")[1].split()[0]
    pixels = type(load_vae("pixels").net)
    monkeypatch.setattr(pixels, "decode", lambda self, z: -z)
    line = run("--images images --ref ref.npz --vae pixels")
    assert line.split("FID-12 ")[1].split()[0] == negative and "vae pixels" in line
    monkeypatch.setattr(pixels, "stride", 3)
    assert "multiples of 3" in run("--images images --ref ref.npz --vae pixels", 2)


# -------------------------------------------------------------------------------------------------
# Tables of scores

OLD_TABLE = """\
network,target,weights,step,cfg,interval,steps,method,nfe,t_eps,classes,vae,seed,precision,n,\
reference,fid,inception_score,mmd,cmmd,dino,seconds
NETWORK,x,ema,100,1,-,2,heun,3,0.05,all,pixels,0,fp32,20,REFERENCE,60.011430,n/a,,,,787.8
"""


def test_a_sweep_scores_only_what_its_table_lacks(run, tmp_path, monkeypatch):
    """Also in a table that 1d03df4 began."""
    tiny_checkpoint(tmp_path / "a.safetensors")
    embeddings = {"mmd": torch.eye(16).half()}
    reference = fid.save_reference("ref.npz", np.arange(16.0), np.eye(16), embeddings)
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

    (tmp_path / "other.csv").write_text("step,loss,fid\n1,2,3\n")
    assert "other.csv: not a table of these scores" in run(f"{sweep} --csv other.csv", 2)
    assert "no/t.csv: its folder does not exist" in run(f"{sweep} --csv no/t.csv", 2)
    assert "no weights 'ema2'" in run(f"{sweep} ema2", 2) and len(drawn) == 9


def test_a_row_tells_which_classes_were_drawn_how_often(inception, tmp_path):
    """And `evaluate` gives scores as numbers, or None."""
    tiny_checkpoint(tmp_path / "a.safetensors")
    reference = fid.save_reference(tmp_path / "ref.npz", np.arange(16.0), np.eye(16))
    denoiser, pixels = fid.load_denoiser(tmp_path / "a.safetensors"), load_vae("pixels")
    rows = [fid.evaluate(denoiser, pixels, {"fid": inception}, reference, n, Sampling(steps=1),
                         classes=classes)
            for n, classes in ((10, None), (8, None), (8, [3, 1]))]
    assert rows[0]["classes"] == "all" and rows[2]["classes"] == "3 1"
    assert rows[1]["classes"] not in ("all", "3 1")  # five classes, of which two are drawn once
    assert isinstance(rows[0]["fid"], float) and isinstance(rows[0]["inception_score"], float)
    assert rows[1]["inception_score"] is None  # of fewer than ten images
