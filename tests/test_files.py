"""Damaged files, files from elsewhere, full disks. What is damaged is named in one line, what was
whole stays whole, and nothing is run as code."""
import contextlib
import json
import os
import pickle
import resource
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


@contextlib.contextmanager
def largest_file(size):
    """A disk on which no file grows beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


DAMAGE = {
    "empty": lambda data: b"",
    "cut in the middle": lambda data: data[:len(data) // 2],
    "cut at the end": lambda data: data[:-1],
    "a page of HTML": lambda data: b"<html>404 Not Found</html>" * 50,
    "zeros": lambda data: bytes(len(data)),  # as a crash leaves it on some file systems
    "another safetensors": lambda data: save({"a": torch.zeros(9)}),
    "another pickle": lambda data: pickle.dumps([1, 2], protocol=2)}
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


@pytest.mark.parametrize("name", ["nothing", "fsync", "chmod"])
def test_files_are_replaced_whole_and_others_may_read_them(name, tmp_path, monkeypatch):
    """Also where folders have no fsync, or the file system no chmod."""
    real = getattr(os, name, None)

    def without(place, *mode):
        if mode or stat.S_ISDIR(os.fstat(place).st_mode):
            raise OSError(22, "Invalid argument")
        return real(place)
    monkeypatch.setattr(os, name, without, raising=False)
    monkeypatch.setattr("lib.files.UMASK", 0o022)
    for text in ("one", "two"):
        with atomic(tmp_path / "a", tmp_path / "b") as temporary:
            temporary.write_text(text)
    with pytest.raises(ZeroDivisionError), atomic(tmp_path / "a") as temporary:
        temporary.write_text(str(1 / 0))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "two", "b": "one"}
    assert name == "chmod" or stat.S_IMODE(os.stat(tmp_path / "a").st_mode) == 0o644


# -------------------------------------------------------------------------------------------------
# Caches

def shards_of(folder):
    return sorted(folder.glob("latents_*.safetensors"))


@pytest.fixture
def cache(images, tmp_path):
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


@pytest.mark.parametrize("change, words", [
    ({"labels": torch.tensor([0, 0, 0, 2])}, "not from 0 to 1"),
    ({"labels": torch.zeros(3).long()}, "not a whole shard"),
    (dict.fromkeys(["latents", "latents_flip"], torch.zeros(4, 3, 8, 8)), "not one cache"),
    (None, "another program"), ({"size": 32}, "another size"), ({"shard": 1}, "4 of 4 shards")])
def test_shards_that_are_not_of_one_cache_are_refused(cache, change, words):
    path = shards_of(cache)[2]
    tensors, settings = load_file(path), open_shard(path)[1]
    (settings if {"size", "shard"} & set(change or {}) else tensors).update(change or {})
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors, path, {"nanojlt": json.dumps(settings)} if change else None)
    with pytest.raises(BadInput, match=words):
        vae.LatentDataset(cache)


def test_unreadable_images_are_left_out_listed_and_tried_again(images, tmp_path, capsys):
    """So a cache is completed that was written while the disk with the images was away."""
    out, names = tmp_path / "cache", ("cat/01.png", "cat/05.png", "dog/00.png")
    data = {name: (images / name).read_bytes() for name in names}
    for name, size in zip(names, (60, 0, 3)):
        (images / name).write_bytes(data[name][:size])
    assert write_cache(images, out, 16) == 0
    assert capsys.readouterr().err.count("warning: left out: ") == 3
    left_out = [open_shard(path)[1]["unreadable"] for path in shards_of(out)]
    assert left_out == [["cat/01.png"], ["cat/05.png", "dog/00.png"], [], []]
    assert len(vae.LatentDataset(out)) == 11
    (images / names[1]).write_bytes(data[names[1]])
    assert write_cache(images, out, 16) == 0 and len(vae.LatentDataset(out)) == 12


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
    (run / ".tmpA1b2C3").write_bytes(half)  # of a save that was killed
    assert train.main(flags(finished[0], run)) == 0
    assert "at step 4" in capsys.readouterr().out and not list(run.glob(".tmp*"))
    same_run(finished[1], run)
    assert (run / "last.damaged").read_bytes() == half  # it has not replaced the whole one
    assert previous.read_bytes() == step4


@pytest.mark.parametrize("content", [b"rubbish", save({"a": torch.ones(1)})])
def test_damaged_checkpoints_are_not_taken_for_a_new_run(content, run, finished, refused):
    for name in ("last", "previous"):
        (run / f"{name}.safetensors").write_bytes(content)
    refused(train.main, flags(finished[0], run), "its checkpoints are damaged")
    assert (run / "last.safetensors").read_bytes() == content


def test_a_run_of_commit_1d03df4_is_refused_by_that_name_and_its_export_loads(
        run, finished, refused):
    """It stored no format, and warmup under another name."""
    for name in ("last", "ema"):
        tensors, settings = read_checkpoint(run / f"{name}.safetensors")
        del settings["format"], settings["times"]
        settings["warmup_epochs"] = settings.pop("warmup")
        save_checkpoint(run / f"{name}.safetensors", tensors, settings)
    before = (run / "last.safetensors").read_bytes()
    refused(train.main, flags(finished[0], run), "1d03df4", "its exports load")
    assert (run / "last.safetensors").read_bytes() == before
    assert load_denoiser(run / "ema.safetensors").settings["step"] == 6


@pytest.mark.parametrize("torn_step", [4, 5])
def test_a_torn_line_of_a_log_is_dropped(torn_step, run, finished):
    """As a crash leaves it: of the step at which the run continues, or of a later one."""
    (run / "last.safetensors").unlink()  # so the run continues at step 4
    lines = (run / "log.csv").read_text().splitlines(keepends=True)
    (run / "log.csv").write_text("".join(lines[:torn_step + 1])[:-60])
    assert train.main(flags(finished[0], run)) == 0
    steps = [line.split(",")[0] for line in (run / "log.csv").read_text().splitlines()]
    assert steps == ["step", *("12356" if torn_step == 4 else "123456")]


def test_a_log_of_another_kind_is_left_alone(run, finished, refused):
    (run / "last.safetensors").unlink()
    for text in ("a,b\n1,2\n", "\x00" * 50, "step,loss\n1," + "9" * 200_000):
        (run / "log.csv").write_text(text)
        refused(train.main, flags(finished[0], run), "log.csv", "move it away")
        assert (run / "log.csv").read_text() == text


def test_a_full_disk_leaves_the_last_checkpoint(run, finished, refused):
    before = (run / "previous.safetensors").read_bytes()
    (run / "last.safetensors").write_bytes(before)  # of step 4
    with largest_file(len(before) // 2):
        refused(train.main, flags(finished[0], run), "last.safetensors: cannot be written", code=1)
    assert (run / "last.safetensors").read_bytes() == before and not list(run.glob(".tmp*"))
    assert train.main(flags(finished[0], run)) == 0
    same_run(finished[1], run)


# -------------------------------------------------------------------------------------------------
# Samples

@pytest.fixture
def draw(tmp_path, monkeypatch):
    """draw(OUT, flags ...) -> (sample.py's exit code, the batches that were drawn)."""
    generate = mock.Mock(wraps=sample.generate)
    monkeypatch.setattr(sample, "generate", generate)
    monkeypatch.chdir(tmp_path)
    save_tiny("a.safetensors")

    def draw(out, *more, side_effect=None):
        generate.reset_mock()
        generate.side_effect = side_effect
        command = f"--ckpt a.safetensors --steps 3 --num-samples 7 --batch 3 --out {out}".split()
        code = sample.main([*command, *more])
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


def test_a_folder_of_images_continues_where_it_was_interrupted(draw, tmp_path, refused):
    folder, first, rest = tmp_path / "folder", [0, 1, 2], [[3, 4, 5], [6]]
    assert draw("whole") == (0, [first, *rest])
    assert draw("folder", side_effect=[mock.DEFAULT, KeyboardInterrupt])[0] == 130
    assert [int(path.stem) for path in sorted(folder.glob("*.png"))] == first
    for other in ("--seed 1", "--cfg 2", "--steps 4", "--weights model", "--classes a b",
                  "--method euler", "--interval 0,1", "--t-eps 0.1", "--precision bf16"):
        refused(lambda argv: draw("folder", *argv)[0], other.split(), "other settings")
    assert draw("folder") == (0, rest)
    (folder / "000004.png").write_bytes(b"")  # as a crash may leave it
    (folder / "000006.png").unlink()
    assert draw("folder") == (0, rest)
    assert np.array_equal(pixels_of(folder), pixels_of(tmp_path / "whole"))


@pytest.mark.parametrize("out, size", [
    ("cache", 9000), ("folder", 100), ("all.npz", 500), ("grid.png", 1000)])
def test_a_full_disk_leaves_nothing_half_written(out, size, images, draw, tmp_path, refused):
    def write(argv=()):
        return write_cache(images, tmp_path / out, 16) if out == "cache" else draw(out)[0]
    before = set(tmp_path.rglob("[!.]*.*"))
    with largest_file(size):
        refused(write, [], code=1)
    left = set(tmp_path.rglob("[!.]*.*")) - before
    assert all(path.name == "facts.txt" for path in left)
    assert write() == 0
