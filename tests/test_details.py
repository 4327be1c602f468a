"""Details that a larger test passes over."""
import pathlib

import numpy as np
import pytest
import torch

import train
from lib.checkpoint import check_same_run, resume_point
from lib.inception import resize
from lib.run import BadInput


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
    draw = train.draw_digits
    monkeypatch.setattr(train, "draw_digits", lambda folder, per_class: draw(folder, 5))
    argv = ["--demo", "--steps", "1", "--batch", "8", "--ema", "0.1", "--sample-every", "0"]
    assert train.main(argv) == 0
    data = train.codec.LatentDataset("data/demo-pixels")
    assert data.shape == (3, 32, 32) and len(data) == 50 and data.num_classes == 10
    assert not data.mirrored and data.class_names == [str(digit) for digit in range(10)]
    assert (tmp_path / "out/demo-T8-x/ema.safetensors").exists()


def test_half_a_file_of_a_killed_save_is_cleared_away_by_rank_0(tmp_path, monkeypatch):
    for rank, left in ((1, [".tmp-last.safetensors"]), (0, [])):
        (tmp_path / ".tmp-last.safetensors").write_bytes(b"half")
        monkeypatch.setenv("RANK", str(rank))
        assert resume_point(tmp_path) == (None, None)
        assert [path.name for path in tmp_path.iterdir()] == left
