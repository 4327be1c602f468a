"""Damaged files, files from elsewhere, full disks. What is damaged is named in one line, what was
whole stays whole, and nothing is run as code. The last part tests what sample.py writes."""
import json
import os
import pickle
import resource
import signal
import stat
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import save_tiny, small_reference
from PIL import Image
from safetensors.torch import load_file, save, save_file

import sample
import train
import vae
from fid import load_reference
from lib.cache import check_latents, open_shard, read_statistics
from lib.checkpoint import load_denoiser, read_checkpoint, save_checkpoint
from lib.files import atomic
from lib.inception import load_inception
from lib.run import BadInput
from test_all import flags, same_run, shard_bytes, small_cache, tiny_net, write_cache


DAMAGE = {
    "empty": lambda data: b"",
    "cut at the end": lambda data: data[:-1],
    "a page of HTML": lambda data: b"<html>404 Not Found</html>" * 50,
    "zeros": lambda data: bytes(len(data)),  # as a crash leaves it on some file systems
    "another safetensors": lambda data: save({"a": torch.zeros(9)}),
    "another pickle": lambda data: pickle.dumps({"model": [1, 2]}, protocol=2)}
SHARD = "latents_rank00_shard00000.safetensors"
FILES = {  # how each kind is written and read
    SHARD: (lambda path: (small_cache(path.parent, n=4) / SHARD).rename(path),
            lambda path: vae.LatentDataset(path.parent)),
    "a.safetensors": (save_tiny, load_denoiser),
    "plain.pth": (lambda path: torch.save(tiny_net().state_dict(), path),
                  lambda path: load_denoiser(path, target="x", input_size=8)),
    "ref.npz": (small_reference, load_reference),
    "stats.pt": (lambda path: torch.save({"mean": torch.ones(3), "std": torch.ones(3)}, path),
                 lambda path: read_statistics(path, 3)),
    "inception.pth": (lambda path: torch.save({}, path), load_inception)}  # the whole is 95 MB


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_damaged_files_are_refused_by_name(name, damage, tmp_path, small_inception):
    path, (write, read) = tmp_path / name, FILES[name]
    write(path)
    if name != "inception.pth":
        read(path)
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    with pytest.raises(BadInput, match=name) as error:
        read(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_no_file_is_run_as_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)
    evil = Evil()
    for name, data in {"plain.pth": {"model": evil}, "args.pth": {"model": {}, "args": evil},
                       "inception.pth": evil, "stats.pt": evil}.items():
        torch.save(data, tmp_path / name)
    (tmp_path / "old.pth").write_bytes(pickle.dumps(evil, protocol=2))
    np.savez(tmp_path / "ref.npz", mu=[evil], sigma=np.eye(16))
    for path in list(tmp_path.glob("*.*")):
        with pytest.raises(BadInput, match=path.name):
            FILES.get(path.name, FILES["plain.pth"])[1](path)
    assert not (tmp_path / "ran").exists()


def test_files_are_replaced_whole_and_others_may_read_them(tmp_path, monkeypatch):
    monkeypatch.setattr("lib.files.UMASK", 0o022)
    for text in ("one", "two"):
        with atomic(tmp_path / "a", tmp_path / "b") as temporary:
            temporary.write_text(text)
    with pytest.raises(ZeroDivisionError), atomic(tmp_path / "a") as temporary:
        temporary.write_text(str(1 / 0))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "two", "b": "one"}
    assert stat.S_IMODE(os.stat(tmp_path / "a").st_mode) == 0o644


# -------------------------------------------------------------------------------------------------
# Caches

def shards_of(folder):
    return sorted(folder.glob("latents_*.safetensors"))


@pytest.fixture
def cache(images, tmp_path):
    """Four shards of those images."""
    assert write_cache(images, tmp_path / "cache", 16) == 0
    return tmp_path / "cache"


def test_a_shard_that_is_damaged_or_gone_is_named_and_written_again(images, cache, refused):
    paths, whole = shards_of(cache), shard_bytes(cache)
    paths[2].write_bytes(whole[paths[2].name][:-9])
    refused(lambda _: write_cache(images, cache, 16), [], paths[2].name, "delete it")
    refused(train.main, flags(cache, cache / "run"), paths[2].name, "delete it")
    paths[2].unlink()
    refused(train.main, flags(cache, cache / "run"), "3 of 4 shards")
    assert write_cache(images, cache, 16) == 0 and shard_bytes(cache) == whole


@pytest.mark.parametrize("tensors, settings, words", [
    ({"labels": torch.tensor([0, 0, 0, 2])}, {}, "not from 0 to 1"),
    ({"labels": torch.zeros(3).long()}, {}, "not a whole shard"),
    ({}, {"size": 32}, "another size"), ({}, {"shard": 1}, "4 of 4 shards")])
def test_shards_that_are_not_of_one_cache_are_refused(cache, tensors, settings, words):
    path = shards_of(cache)[2]
    tensors, settings = load_file(path) | tensors, open_shard(path)[1] | settings
    save_file(tensors, path, {"nanojlt": json.dumps(settings)})
    with pytest.raises(BadInput, match=words):
        vae.LatentDataset(cache)


@pytest.mark.parametrize("has_notes", [True, False])  # caches of older versions have none
def test_shards_whose_images_have_changed_are_encoded_again(has_notes, images, cache, capsys):
    def written():
        return [path.stat().st_mtime_ns for path in shards_of(cache)]
    before = written()
    for note in cache.glob("*.json" if not has_notes else "none"):
        note.unlink()
    image = images / "dog" / "03.png"  # image 10
    size = image.stat().st_size
    Image.new("RGB", (40, 32), "red").save(image)
    os.truncate(image, size)  # as many bytes as before
    os.utime(image, (2e9, 2e9))
    assert write_cache(images, cache, 16) == 0
    assert shards_of(cache)[2].name in capsys.readouterr().out
    after = written()
    assert [new == old for new, old in zip(after, before)] == [True, True, False, True]
    assert vae.to_uint8(vae.LatentDataset(cache)[10][0])[:, 0, 0].tolist() == [255, 0, 0]
    assert write_cache(images, cache, 16) == 0 and written() == after
    os.utime(images / "cat" / "00.png", (1e9, 1e9))  # older than its shard, which has a note by now
    assert write_cache(images, cache, 16) == 0
    assert [new == old for new, old in zip(written(), after)] == [False, True, True, True]
    assert not list(cache.glob("*.outdated"))


def test_outdated_shards_are_not_trained_on_where_encoding_was_stopped(images, cache, monkeypatch):
    for image in images.glob("*/*.png"):
        os.utime(image, (2e9, 2e9))

    def stopped(items, images, codec, args, stop, bar):
        stop.number = signal.SIGTERM
    monkeypatch.setattr(vae, "encode_shard", stopped)
    assert write_cache(images, cache, 16) == 128 + signal.SIGTERM
    with pytest.raises(BadInput):
        vae.LatentDataset(cache)


def test_unreadable_images_are_left_out_listed_and_tried_again(images, tmp_path, capsys):
    """Also if their sizes and dates stay the same, as after a disk was away."""
    out, names = tmp_path / "cache", ("cat/01.png", "cat/05.png", "dog/00.png")
    data = (images / names[1]).read_bytes()
    for name in names:
        (images / name).write_bytes(bytes(len(data)))
        os.utime(images / name, (1e9, 1e9))
    assert write_cache(images, out, 16) == 0
    assert capsys.readouterr().err.count("warning: left out: ") == 3
    left_out = [open_shard(path)[1]["unreadable"] for path in shards_of(out)]
    assert left_out == [["cat/01.png"], ["cat/05.png", "dog/00.png"], [], []]
    assert len(vae.LatentDataset(out)) == 11
    (images / names[1]).write_bytes(data)
    os.utime(images / names[1], (1e9, 1e9))
    assert write_cache(images, out, 16) == 0 and len(vae.LatentDataset(out)) == 12


@pytest.mark.parametrize("latents, labels, refusal", [
    (torch.bfloat16, torch.uint8, None),
    (torch.float16, torch.float32, "labels of torch.float32"),
    (torch.float64, torch.int64, "latents of torch.float64")])
def test_caches_of_other_types_are_trained_on_or_refused(
        latents, labels, refusal, tmp_path, refused):
    """What codec made them is not known, so no sample grids are drawn."""
    x, y = torch.randn(6, 3, 8, 8).to(latents), torch.arange(6).to(labels)
    save_file({"latents": x, "labels": y}, tmp_path / SHARD)
    command = flags(tmp_path, tmp_path / "run", "--batch", 2, steps=1)
    if refusal:
        refused(train.main, command, SHARD, refusal)
    else:
        assert train.main(command) == 0 and not (tmp_path / "run" / "samples").exists()
        assert load_denoiser(tmp_path / "run" / "ema.safetensors").net.num_classes == 6


def test_latents_that_are_not_normalised_are_warned_of(tmp_path, capsys):
    labels, x = torch.zeros(64).long(), torch.randn(64, 4, 4, 4)
    for mean, std, warns in ((0.1, 0.9, 0), (0, 5, 1), (2, 1, 1), (0, 0.1, 1)):
        save_file({"latents": x * std + mean, "labels": labels}, tmp_path / SHARD)
        check_latents(vae.LatentDataset(tmp_path))
        assert capsys.readouterr().out.count("warning") == warns
    save_file({"latents": x * torch.nan, "labels": labels}, tmp_path / SHARD)
    with pytest.raises(BadInput, match="not finite"):
        check_latents(vae.LatentDataset(tmp_path))


# -------------------------------------------------------------------------------------------------
# Runs

def test_a_damaged_last_is_set_aside_and_previous_continued(run, finished, capsys):
    last, previous = run / "last.safetensors", run / "previous.safetensors"
    step4, half = previous.read_bytes(), last.read_bytes()[:last.stat().st_size // 2]
    last.write_bytes(half)
    assert train.main(flags(finished[0], run)) == 0
    assert "at step 4" in capsys.readouterr().out
    same_run(finished[1], run)
    assert (run / "last.damaged").read_bytes() == half  # it has not replaced the whole one
    assert previous.read_bytes() == step4


def test_damaged_checkpoints_are_not_taken_for_a_new_run(run, finished, refused):
    for name in ("last", "previous"):
        (run / f"{name}.safetensors").write_bytes(b"rubbish")
    refused(train.main, flags(finished[0], run), "its checkpoints are damaged")
    assert (run / "last.safetensors").read_bytes() == b"rubbish"


def test_a_run_of_another_format_is_refused_and_its_export_loads(run, finished, refused):
    """As those of commit 1d03df4, whose optimizer is stored in another way."""
    for name in ("last", "ema"):
        tensors, settings = read_checkpoint(run / f"{name}.safetensors")
        save_checkpoint(run / f"{name}.safetensors", tensors, settings | {"format": 1})
    refused(train.main, flags(finished[0], run), "commit 1d03df4")
    assert load_denoiser(run / "ema.safetensors").settings["step"] == 6


def test_a_checkpoint_is_read_in_the_instant_between_two_renames(run, monkeypatch):
    last = run / "last.safetensors"
    aside = last.rename(run / "aside")
    monkeypatch.setattr("lib.checkpoint.time.sleep", lambda seconds: aside.rename(last))
    assert load_denoiser(last).settings["step"] == 6


def test_a_torn_line_of_a_log_is_dropped(run, finished):
    """As a crash leaves it, here the line of the step at which the run continues."""
    (run / "last.safetensors").unlink()  # so the run continues at step 4
    lines = (run / "log.csv").read_text().splitlines(keepends=True)
    (run / "log.csv").write_text("".join(lines[:5])[:-60])
    assert train.main(flags(finished[0], run)) == 0
    steps = [line.split(",")[0] for line in (run / "log.csv").read_text().splitlines()]
    assert steps == ["step", *"12356"]


def test_a_log_of_another_kind_is_left_alone(run, finished, refused):
    (run / "last.safetensors").unlink()
    for text in ("a,b\n1,2\n", "\x00" * 50):
        (run / "log.csv").write_text(text)
        refused(train.main, flags(finished[0], run), "log.csv", "move it away")
        assert (run / "log.csv").read_text() == text


def test_a_full_disk_leaves_the_last_checkpoint(run, finished, refused):
    before = (run / "previous.safetensors").read_bytes()
    (run / "last.safetensors").write_bytes(before)  # of step 4
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))  # no file may be larger
    try:
        refused(train.main, flags(finished[0], run), "last.safetensors: cannot be written", code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (run / "last.safetensors").read_bytes() == before and not list(run.glob(".tmp*"))


# -------------------------------------------------------------------------------------------------
# Samples

@pytest.fixture
def draw(tmp_path, monkeypatch):
    """draw(command line) -> (sample.py's exit code, the batches that were drawn)."""
    generate = mock.Mock(wraps=sample.generate)
    monkeypatch.setattr(sample, "generate", generate)
    monkeypatch.chdir(tmp_path)
    save_tiny("a.safetensors")

    def draw(words, side_effect=None):
        generate.reset_mock()
        generate.side_effect = side_effect
        command = f"--ckpt a.safetensors --steps 3 --num-samples 7 --batch 3 --out {words}"
        code = sample.main(command.split())
        return code, [list(call.args[2]) for call in generate.call_args_list]
    return draw


def pixels_of(folder):
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])


def test_folder_npz_and_grid_hold_the_same_images(draw, tmp_path):
    assert draw("folder")[0] == draw("all.NPZ")[0] == draw("grid.png")[0] == 0
    assert sorted(os.listdir(".")) == ["a.safetensors", "all.NPZ", "folder", "grid.png"]
    ((name, pixels),) = np.load("all.NPZ").items()  # as the guided-diffusion evaluator wants it
    assert name == "arr_0" and pixels.dtype == np.uint8 and pixels.shape == (7, 8, 8, 3)
    assert np.array_equal(pixels_of(tmp_path / "folder"), pixels)
    grid = np.asarray(Image.open("grid.png")).astype(int)
    for i in range(7):
        top, left = 40 + i // 5 * 100, 4 + i % 5 * 100
        tile = grid[top:top + 96:12, left:left + 96:12]  # shown 12 times as large
        assert np.abs(tile - pixels[i]).max() <= 1  # another batch may round otherwise


def test_a_folder_of_images_continues_where_it_was_interrupted(draw, tmp_path):
    folder, first, rest = tmp_path / "folder", [0, 1, 2], [[3, 4, 5], [6]]
    assert draw("whole") == (0, [first, *rest])
    assert draw("folder", side_effect=[mock.DEFAULT, KeyboardInterrupt])[0] == 130
    assert [int(path.stem) for path in sorted(folder.glob("*.png"))] == first
    for other in ("--seed 1", "--cfg 2", "--weights model", "--classes a b", "--precision bf16"):
        assert draw(f"folder {other}")[0] == 2
    assert draw("folder") == (0, rest)
    (folder / "000004.png").write_bytes(b"")  # as a crash may leave it
    (folder / "000006.png").unlink()
    assert draw("folder") == (0, rest)
    assert np.array_equal(pixels_of(folder), pixels_of(tmp_path / "whole"))
    (folder / "old").mkdir()
    (folder / "000000.png").rename(folder / "old" / "000000.png")  # fid.py would score it, too
    assert draw("folder")[0] == 2


@pytest.mark.parametrize("words, warning, classes", [
    ("folder --num-samples 3", "the first 3 are drawn 1 times, the others 0", "all, the first 3"),
    ("all.npz --num-samples 10", None, "all"),
    ("folder --num-samples 4 --classes a c", None, "0 2")])
def test_classes_that_are_not_drawn_equally_often_are_warned_of(
        words, warning, classes, draw, capsys):
    assert draw(words)[0] == 0
    printed = capsys.readouterr().out
    assert f"classes: {classes}" in printed
    assert warning in printed if warning else "warning" not in printed
