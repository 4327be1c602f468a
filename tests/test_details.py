"""Details that a larger test passes over."""
import pathlib
import shutil

import numpy as np
import pytest
import torch
from conftest import small_reference
from safetensors.torch import load_file, save_file

import fid
import sample
import train
import vae
from lib.checkpoint import check_same_run, resume_point
from lib.inception import resize
from lib.run import BadInput
from model import Denoiser
from test_all import SmallInception, flags, tiny_flux2, tiny_net


@pytest.mark.parametrize("size, out", [(5, 13), (7, 7), (30, 11)])
def test_the_resize_of_tensorflow_1_by_plain_loops(size, out):
    x = torch.randn(1, 1, size, size + 2)
    wanted = np.zeros((out, out))
    for row in range(out):
        for column in range(out):
            top, left = row * size / out, column * (size + 2) / out
            i, j = int(top), int(left)
            below, right = min(i + 1, size - 1), min(j + 1, size + 1)
            down, aside = top - i, left - j
            corners = [(i, j, (1 - down) * (1 - aside)), (i, right, (1 - down) * aside),
                       (below, j, down * (1 - aside)), (below, right, down * aside)]
            wanted[row, column] = sum(w * float(x[0, 0, a, b]) for a, b, w in corners)
    torch.testing.assert_close(resize(x, out)[0, 0], torch.tensor(wanted, dtype=torch.float32),
                               atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("step, allowed", [(4, True), (5, False), (9, False)])
def test_more_steps_may_be_asked_for_until_the_learning_rate_falls(step, allowed):
    """With decay 0.5 of 10 steps it falls from step 5 on; a shorter run would fall earlier."""
    saved = dict(step=step, steps=10, decay=0.5, lr=1e-3)
    wish = dict(steps=20, decay=0.5, lr=1e-3)
    if allowed:
        check_same_run(pathlib.Path("out"), saved, wish)
    else:
        with pytest.raises(BadInput, match="steps"):
            check_same_run(pathlib.Path("out"), saved, wish)
    with pytest.raises(BadInput, match="lr"):
        check_same_run(pathlib.Path("out"), saved, wish | dict(lr=2e-3))
    check_same_run(pathlib.Path("out"), saved | dict(decay=0.0), wish | dict(decay=0.0))
    if step > 2:
        with pytest.raises(BadInput, match="steps"):
            check_same_run(pathlib.Path("out"), saved | dict(step=3), wish | dict(steps=6))


def test_the_presets_are_the_papers_and_the_demos():
    paper, demo = train.PRESETS["imagenet"], train.PRESETS["demo"]
    assert (paper["model"], paper["patch"], paper["steps"]) == ("B", 1, 250_000)
    assert (paper["batch"], paper["warmup_epochs"], paper["decay"]) == (1024, 5, 0.0)
    assert (paper["ema"], paper["cfg"], paper["lr"]) == ([0.9999], 2.9, None)
    assert train.OBJECTIVE == dict(P_mean=-0.8, P_std=0.8, t_eps=0.05, label_drop=0.1)
    assert train.CLIP == 1.0 and (demo["steps"], demo["batch"], demo["lr"]) == (1800, 64, 2e-3)
    assert (demo["model"], demo["patch"], demo["warmup_epochs"], demo["decay"]) == ("T", 8, 1, 0.3)
    assert (demo["ema"], demo["cfg"], demo["save_every"]) == ([0.99], 1.5, 600)


def test_the_demo_trains_on_drawn_digits_that_are_never_mirrored(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw, asked = train.draw_digits, []
    monkeypatch.setattr(train, "draw_digits", lambda folder, per_class: (
        asked.append(per_class), draw(folder, 5))[1])
    argv = ["--demo", "--steps", "1", "--batch", "8", "--ema", "0.1", "--sample-every", "0"]
    assert train.main(argv) == 0
    data = train.codec.LatentDataset("data/demo-pixels")
    assert data.shape == (3, 32, 32) and len(data) == 50 and data.num_classes == 10
    assert asked == [500]
    assert not data.mirrored and data.class_names == [str(digit) for digit in range(10)]
    assert (tmp_path / "out/demo-T8-x/ema.safetensors").exists()


def test_half_a_file_of_a_killed_save_is_cleared_away_by_rank_0(tmp_path, monkeypatch):
    for rank, left in ((1, [".tmp-last.safetensors"]), (0, [])):
        (tmp_path / ".tmp-last.safetensors").write_bytes(b"half")
        monkeypatch.setenv("RANK", str(rank))
        assert resume_point(tmp_path) == (None, None)
        assert [path.name for path in tmp_path.iterdir()] == left


def test_another_codec_than_the_one_that_made_the_latents_is_told(tmp_path, capsys):
    pixels = {"vae": {"kind": "pixels", "id": "pixels"}, "vae_path": None}
    vae.open_vae(pixels, 3)
    vae.open_vae(pixels | {"vae": {"kind": "flux2", "id": "other"}}, 3, override="pixels")
    assert not capsys.readouterr().out
    tiny_flux2(tmp_path)
    made = {"vae": {"kind": "flux2", "id": "flux2-0123456789ab"}, "vae_path": str(tmp_path)}
    vae.open_vae(made, 24)
    assert "is not the codec that made the latents" in capsys.readouterr().out


def test_inception_score_wants_ten_images_and_fid_two(small_inception, tmp_path):
    network, reference = SmallInception(), small_reference(tmp_path / "ref.npz")
    reference = fid.load_reference(reference)
    for n, known in ((9, False), (10, True)):
        images = torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8)
        judges = {"fid": network}
        found = fid.score([(range(n), images)], n, judges)
        row = fid.results(found, judges, reference, 0.0)
        assert (row["inception_score"] != "n/a") == known
    argv = ["--ckpt", "a", "--ref", "b", "--num-samples"]
    assert fid.parse([*argv, "2"]).num_samples == 2
    with pytest.raises(BadInput, match="expected 2 or more"):
        fid.parse([*argv, "1"])


@pytest.mark.parametrize("names, captions", [(list("abcde"), ["d", "a"]), (None, [3, 0])])
def test_columns_of_a_grid_are_named_by_class(names, captions, monkeypatch):
    seen = []
    monkeypatch.setattr(sample, "picture_grid", lambda *rest: seen.append(rest))
    sample.draw_grid(Denoiser(tiny_net()), vae.load_vae("pixels"), 4, [3, 0], names,
                     sample.Sampling(steps=1), "step 1")
    (images, columns, found, title), = seen
    assert (len(images), columns, found) == (4, 2, captions)
    assert title == "x-prediction, step 1, cfg 1, 1 heun steps, seed 0"


@pytest.mark.parametrize("parse, words, lowest, highest", [
    (sample.parse, "--cfg", 0, 1000), (sample.parse, "--num-samples", 1, 10**7),
    (sample.parse, "--t-eps", 0, 1), (sample.parse, "--steps", 1, 100_000),
    (fid.parse, "--ckpt a --ref b --cfg", 0, 1000), (fid.parse, "--images a --size", 1, 4096),
    (fid.parse, "--ckpt a --num-samples", 2, 10**7)])
def test_numbers_are_taken_up_to_their_bounds_and_not_beyond(parse, words, lowest, highest):
    for value in (lowest, highest):
        parse([*words.split(), str(value)])
    for value in (lowest - 1, highest + 1):
        with pytest.raises(BadInput, match="expected"):
            parse([*words.split(), str(value)])


def test_pictures_are_drawn_where_there_is_a_codec_and_they_are_asked_for(finished, tmp_path):
    cache, out = finished
    names = sorted(path.name for path in (out / "samples").iterdir())
    assert names == ["step0000004.png", "step0000006.png"]
    assert train.main(flags(cache, tmp_path / "none", "--sample-every", 0, steps=1)) == 0
    assert not (tmp_path / "none" / "samples").exists()
    shutil.copytree(cache, tmp_path / "foreign")
    (shard,) = (tmp_path / "foreign").glob("latents*")
    save_file(load_file(shard), shard)  # without settings, and so without a codec
    assert train.main(flags(tmp_path / "foreign", tmp_path / "blind", steps=1)) == 0
    assert not (tmp_path / "blind" / "samples").exists()


@pytest.mark.parametrize("words, compiled", [
    ("", []), ("--compile", ["net"]), ("--compile --eval-every 1 --ref r", ["net", "average"])])
def test_what_is_compiled(words, compiled, finished, tmp_path, monkeypatch, small_inception):
    """The network where asked; its average as well where thousands of images are to be drawn."""
    seen, ref = [], small_reference(tmp_path / "ref.npz")
    monkeypatch.setattr(train, "compile_net", lambda net, device: seen.append(net) or True)
    monkeypatch.setattr(train.fid, "evaluate", lambda *rest: {"fid": "1", "inception_score": "n/a"})
    argv = flags(finished[0], tmp_path / "run", *words.replace(" r", f" {ref}").split(), steps=1)
    assert train.main(argv) == 0
    trains = [any(p.requires_grad for p in net.parameters()) for net in seen]
    assert trains == [name == "net" for name in compiled]


def test_imagenets_pictures_are_of_some_well_known_classes():
    assert sample.SHOWN == (88, 207, 279, 360, 387, 417, 933, 979)  # macaw, ... valley
    assert sample.Sampling.interval == (0.1, 1.0) and vae.CHUNK == 16 and vae.SHARD == 1024
