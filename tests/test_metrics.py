"""fid.py beyond the formulas of test_all.py: MMD, references, sample files, tables of scores."""
import math

import numpy as np
import pytest
import torch
from conftest import finish, save_tiny, start
from PIL import Image

import fid
import train
from lib.checkpoint import read_checkpoint
from lib.images import subset
from lib.log import read_table
from lib.run import BadInput
from sample import Sampling, generate
from test_all import LOGGED, SmallInception, flags, log_rows, plain_inception_score, small_cache
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


def test_mmds_come_from_10000_embeddings_of_all_parts():
    zeros = torch.zeros(10_000, 3, 1, 1, dtype=torch.uint8)
    batches = [(range(10_000, 20_000), zeros + 1), (range(10_000), zeros)]
    extractor = SmallInception()
    rows = fid.score(batches, 20_000, {"mmd": extractor})["mmd"]
    first, last = extractor(torch.cat([zeros[:1], zeros[:1] + 1]))[0].half()
    assert len(rows) == 10_000 and torch.equal(rows[4999], first) and torch.equal(rows[5000], last)


def test_a_network_is_scored_by_what_it_draws(run, tmp_path):
    denoiser, pixels = fid.load_denoiser(tmp_path / "a.safetensors"), load_vae("pixels")
    reference, extractors = fid.load_reference("ref.npz"), fid.load_extractors(["fid"])
    sampling = Sampling(cfg=2.0, steps=5, seed=3)
    row = fid.evaluate(denoiser, pixels, extractors, reference, 20, sampling, 8, [3, 1])
    images = generate(denoiser, pixels, range(20), [3, 1], sampling)
    features, logits = extractors["fid"](images)
    mu, sigma = features.double().mean(0), np.cov(features.double().T)
    distance = fid.frechet_distance(mu, sigma, reference.mu, reference.sigma)
    assert row["fid"] == pytest.approx(distance, rel=1e-6)
    assert row["inception_score"] == pytest.approx(plain_inception_score(logits), rel=1e-6)
    assert row["classes"] == "3 1"

    row = fid.evaluate(denoiser, pixels, extractors, reference, 8, sampling)
    assert row["classes"] not in ("all", "3 1")  # five classes, of which two are drawn once
    assert row["inception_score"] is None  # of fewer than ten images


SMALL = dict(hidden_size=16, depth=1, num_heads=2, bottleneck=4)


def train_small(argv):
    """train.py with the small networks, in a process of its own."""
    fid.FEATURES, fid.load_inception = 16, lambda path, device: SmallInception()
    train.SIZES["T"] = SMALL
    return train.main(argv)


def test_training_scores_itself_as_fid_py_does_and_two_ranks_as_one(run, tmp_path, monkeypatch):
    monkeypatch.setitem(train.SIZES, "T", SMALL)
    cache, one, two = small_cache(tmp_path / "small"), tmp_path / "one", tmp_path / "two"
    more = "--sample-every 0 --cfg 1 --eval-every 6 --eval-n 70 --ref".split()  # of two batches
    more.append(str(tmp_path / "ref.npz"))
    assert train.main(flags(cache, one, *more)) == 0
    run("--ckpt one/ema.safetensors --ref ref.npz --num-samples 70")
    (scores,), logged = read_table(one / "fid.csv")[1], log_rows(one, ["fid"])[-1]
    assert float(scores["fid"]) == pytest.approx(float(logged[0]), rel=1e-6)

    command = flags(cache, two, *more, "--micro", 2)
    assert finish(start(train_small, command, ranks=2)) == [0, 0]
    np.testing.assert_allclose(
        *(np.array(log_rows(out, LOGGED), float) for out in (one, two)), rtol=1e-3)
    np.testing.assert_allclose(
        *(np.array(log_rows(out, ["fid", "inception_score"])[-1], float) for out in (one, two)),
        rtol=1e-3)
    a, b = (read_checkpoint(out / "last.safetensors")[0] for out in (one, two))
    assert all((a[name] - b[name]).abs().max() < 1e-5 for name in a if name.startswith("model."))


def test_references_of_all_kinds_load_and_others_are_refused(small_inception, tmp_path):
    """ADM's has further arrays and says nothing of its images; ours may hold embeddings. The names,
    which tables hold, are the ones of 1d03df4."""
    file, arrays = tmp_path / "ref.npz", dict(mu=np.arange(16.0), sigma=np.diag(np.arange(16.0)))
    np.savez_compressed(file, **arrays, mu_s=np.zeros(9), arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    reference = fid.load_reference(file)
    assert np.array_equal(reference.sigma, arrays["sigma"]) and reference.hash == "265058e0be60"
    reference.check_size("256x256")  # unknown, so none is refused

    embeddings = {name: torch.ones(3, 4).half() for name in ("mmd", "cmmd")}
    fid.save_reference(file, **arrays, embeddings=embeddings, size="32x32")
    reference = fid.load_reference(file, ["fid", "mmd", "cmmd"])
    assert reference.hash == "265058e0be60-5f20ca" and reference.about == {"size": "32x32"}
    assert torch.equal(reference.embeddings["cmmd"], embeddings["cmmd"])
    with pytest.raises(BadInput, match="no embeddings for dino"):
        fid.load_reference(file, ["fid", "dino"])
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


def test_folders_and_npz_files_are_scored_alike(run):
    first = scores_in(run("--images images --ref ref.npz"))
    for words in ("--images images --batch 3", "--npz plain.npz", "--npz packed.npz --batch 5"):
        assert scores_in(run(f"{words} --ref ref.npz")) == pytest.approx(first, rel=1e-6)
    rows = subset("", 14, 4)
    for count, size, batches in (fid.npz_images("packed.npz", 4, 3),
                                 fid.folder_images("images", None, 4, 3)):
        indices, images = zip(*batches)
        assert (count, size, *map(list, indices)) == (4, "10x6", [0, 1, 2], [3])
        assert np.array_equal(torch.cat(images).permute(0, 2, 3, 1), PIXELS[rows])


def test_a_subset_has_all_classes_whether_they_take_turns_or_not(tmp_path):
    for count, n, classes in (100, 10, 10), (50_000, 10_000, 1_000), (120, 40, 12):
        taking_turns = np.bincount(np.array(subset("", count, n)) % classes, minlength=classes)
        assert taking_turns.max() <= 5 + 2 * n / classes and (taking_turns > 0).mean() > 0.5
        for by_class in True, False:  # images sorted by class
            rows = np.array(subset("", count, n, by_class))
            assert np.abs(np.bincount(rows * classes // count) - n / classes).max() < 2
            assert (np.diff(rows) > 0).all() and rows[-1] < count
    for i in range(40):
        file = tmp_path / "images" / "ab"[i // 20] / f"{i:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((2, 2, 3), i, np.uint8)).save(file)
    _, _, batches = fid.folder_images(tmp_path / "images", None, 8, 8)
    assert next(batches)[1][:, 0, 0, 0].tolist() == list(range(0, 40, 5))


def test_images_are_at_distance_0_from_their_own_statistics(run):
    assert "size 6x6, count 14, crop center" in run("--images images --size 6 --save-ref own.npz")
    assert abs(scores_in(run("--images images --size 6 --ref own.npz"))[0]) < 1e-3
    assert "6x6 images, those to score are 10x6" in run("--npz plain.npz --ref own.npz", 2)
    fid.load_inception(None, "cpu").fc.weight.data.zero_()  # as in a file without the classifier
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


def test_a_sweep_scores_only_what_its_table_lacks(run, tmp_path, monkeypatch):
    fid.save_reference("ref.npz", np.arange(16.0), np.eye(16), {"mmd": torch.eye(16).half()})
    drawn = []
    monkeypatch.setattr(fid, "generate", lambda *args: drawn.append(args) or generate(*args))
    sweep = "--ckpt a.safetensors --num-samples 20 --steps 2 --ref ref.npz"
    run(f"{sweep} --weights ema model --cfg 1 2 --interval 0.1,1 0,0.5")
    rows = read_table("fid.csv")[1]
    assert [(row["weights"], row["cfg"], row["interval"]) for row in rows] == [
        (weights, *pair) for weights in ("ema", "model")
        for pair in (("1", "-"), ("2", "0.1,1"), ("2", "0,0.5"))]       # at cfg 1 nothing is guided
    columns = "target step steps method nfe t_eps classes vae seed precision n".split()
    settings = "x 100 2 heun 3 0.05 all pixels 0 fp32 20".split()
    assert [rows[0][name] for name in columns] == settings and len(drawn) == 6

    lines = run(f"{sweep} --cfg 2 3 --interval 0.1,1").splitlines()[-2:]  # one of two is new
    assert len(drawn) == 7 and lines[0].startswith(f"FID-20 {rows[1]['fid']}  IS ")
    run(f"{sweep} --cfg 2 --metrics fid mmd")                           # another metric is asked
    rows = read_table("fid.csv")[1]
    assert len(drawn) == 8 and [bool(row["mmd"]) for row in rows] == [False] * 7 + [True]
    assert rows[1]["fid"] == rows[7]["fid"]
