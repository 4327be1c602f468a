"""Files that others wrote or will read, damaged files, and disks that are full.

What is damaged is named in one line, what was whole stays whole, and nothing is run as code.
"""
import contextlib
import json
import os
import pickle
import resource
import stat
from unittest import mock

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import save_tiny, small_reference
from PIL import Image

import sample
import train
import vae
from fid import load_reference
from lib.cache import check_latents, open_shard, read_statistics
from lib.checkpoint import load_denoiser, read_checkpoint, save_checkpoint
from lib.files import atomic
from lib.inception import load_inception
from lib.run import BadInput
from test_all import flags, image_folder, same_run, shard_bytes, small_cache, tiny_net, write_cache


@contextlib.contextmanager
def largest_file(size):
    """A disk on which no file grows beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# -------------------------------------------------------------------------------------------------
# Caches

@pytest.fixture
def images(tmp_path, monkeypatch):
    """14 images, which fill four shards."""
    monkeypatch.setattr(vae, "SHARD", 4)
    return image_folder(tmp_path / "images")


def encode(images, out):
    return write_cache(images, out, 16, "--batch", 3)


@pytest.fixture
def cache(images, tmp_path):
    assert encode(images, tmp_path / "cache") == 0
    return tmp_path / "cache"


def shards_of(folder):
    return sorted(folder.glob("latents_*.safetensors"))


def foreign_cache(folder, *shards):
    """A cache as others write it: no settings, three digits."""
    for k, tensors in enumerate(shards):
        safetensors.torch.save_file(tensors, folder / f"latents_rank00_shard{k:03d}.safetensors")
    return vae.LatentDataset(folder)


def test_our_shards_are_plain_safetensors_without_paths_or_dates(cache):
    """LightningDiT, for one, reads them. Equal caches are equal bytes, so there is one metadata
    key, whose JSON is sorted."""
    data, shards = vae.LatentDataset(cache), [*map(safetensors.torch.load_file, shards_of(cache))]
    assert {t[name].dtype for t in shards for name in t} == {torch.float16, torch.int64}
    for name, values in {"latents": data.batch(range(14))[0], "labels": data.labels,
                         "latents_flip": data.batch(range(14), True)[0]}.items():
        assert torch.equal(torch.cat([t[name] for t in shards]), values)
    with safetensors.safe_open(shards_of(cache)[1], "pt") as file:
        metadata = file.metadata()
    settings = json.loads(metadata["nanojlt"])
    assert metadata == {"nanojlt": json.dumps(settings, sort_keys=True)}
    assert (settings["shard"], settings["shards"], settings["classes"]) == (1, 4, ["cat", "dog"])
    assert str(cache.parent) not in str(metadata)


@pytest.mark.parametrize("dtype, labels", [
    (torch.float32, torch.int32), (torch.float16, torch.int64), (torch.bfloat16, torch.uint8)])
def test_caches_of_others_are_read_and_trained_on(dtype, labels, tmp_path, refused):
    """In several types, with mirrored latents in all of their shards or not. What codec made them
    is not known, so no samples are drawn."""
    (x, mirrored), y = torch.randn(2, 6, 3, 4, 4).to(dtype), torch.arange(6).to(labels)
    one, two = ({"latents": x[part].clone(), "labels": y[part].clone(),
                 "latents_flip": mirrored[part].clone()} for part in (slice(4), slice(4, 6)))
    data = foreign_cache(tmp_path, one, two)
    batch, batch_labels = data.batch([5, 1, 3], [True, False, True])
    assert torch.equal(batch, torch.stack([mirrored[5], x[1], mirrored[3]]))
    assert batch_labels.tolist() == [5, 1, 3] and data.num_classes == 6
    assert data.vae is data.class_names is data.size is None
    del two["latents_flip"]
    assert torch.equal(foreign_cache(tmp_path, one, two).batch([3], True)[0], x[3:4])
    assert train.main(flags(tmp_path, tmp_path / "run", "--batch", 2, steps=1)) == 0
    assert not (tmp_path / "run" / "samples").exists()
    refused(sample.main, ["--ckpt", tmp_path / "run" / "ema.safetensors"], "give --vae")


def test_latents_that_are_not_normalised_are_warned_of(tmp_path, capsys):
    labels, x = torch.zeros(64).long(), torch.randn(64, 4, 4, 4)
    for mean, std, warns in ((0.1, 0.9, 0), (0, 5, 1), (2, 1, 1), (0, 0.1, 1)):
        check_latents(foreign_cache(tmp_path, {"latents": x * std + mean, "labels": labels}))
        assert capsys.readouterr().out.count("warning") == warns
    with pytest.raises(BadInput, match="not finite"):
        check_latents(foreign_cache(tmp_path, {"latents": x * torch.nan, "labels": labels}))


def test_a_shard_that_is_damaged_or_gone_is_named_and_written_again(images, cache, refused):
    paths, whole = shards_of(cache), shard_bytes(cache)
    paths[2].write_bytes(whole[paths[2].name][:-9])
    refused(lambda _: encode(images, cache), [], paths[2].name, "delete it")
    refused(train.main, flags(cache, cache / "run"), paths[2].name, "delete it")
    paths[2].unlink()
    refused(train.main, flags(cache, cache / "run"), "3 of 4 shards")
    assert encode(images, cache) == 0 and shard_bytes(cache) == whole


@pytest.mark.parametrize("change, words", [
    ({"labels": torch.tensor([0, 0, 0, 2])}, "not from 0 to 1"),
    ({"labels": torch.zeros(3).long()}, "not a whole shard"),
    ({"latents_flip": torch.zeros(4, 3, 8, 8).half()}, "not a whole shard"),
    (dict.fromkeys(["latents", "latents_flip"], torch.zeros(4, 3, 8, 8)), "not one cache"),
    (None, "another program"), ({"size": 32}, "another size"), ({"shard": 1}, "4 of 4 shards")])
def test_shards_that_are_not_of_one_cache_are_refused(cache, change, words):
    path = shards_of(cache)[2]
    tensors, settings = safetensors.torch.load_file(path), open_shard(path)[1]
    (settings if {"size", "shard"} & set(change or {}) else tensors).update(change or {})
    metadata = {"nanojlt": json.dumps(settings)} if change else None
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    safetensors.torch.save_file(tensors, path, metadata)
    with pytest.raises(BadInput, match=words):
        vae.LatentDataset(cache)


def test_unreadable_images_are_left_out_listed_and_tried_again(images, tmp_path, capsys):
    """So a cache is completed that was written while the disk with the images was away."""
    out, names = tmp_path / "cache", ("cat/01.png", "cat/05.png", "dog/00.png")
    data = {name: (images / name).read_bytes() for name in names}
    for name, size in zip(names, (60, 0, 3)):
        (images / name).write_bytes(data[name][:size])
    assert encode(images, out) == 0
    assert capsys.readouterr().err.count("warning: left out: ") == 3
    left_out = [open_shard(path)[1]["unreadable"] for path in shards_of(out)]
    assert left_out == [["cat/01.png"], ["cat/05.png", "dog/00.png"], [], []]
    assert len(vae.LatentDataset(out)) == 11
    before = [path.stat().st_mtime_ns for path in shards_of(out)]
    (images / names[1]).write_bytes(data[names[1]])
    assert encode(images, out) == 0 and len(vae.LatentDataset(out)) == 12
    after = [path.stat().st_mtime_ns for path in shards_of(out)]
    assert [a != b for a, b in zip(after, before)] == [False, True, False, False]


def test_images_that_vanish_end_the_program_and_leave_whole_shards(
        images, tmp_path, refused, monkeypatch):
    out, listing, lost = tmp_path / "cache", vae.list_images(images), images / "dog" / "04.png"
    data = lost.read_bytes()
    lost.unlink()
    monkeypatch.setattr(vae, "list_images", lambda folder: listing)
    refused(lambda _: encode(images, out), [], "04.png", code=1)
    assert [path.stem[-5:] for path in shards_of(out)] == ["00000", "00001"]
    lost.write_bytes(data)
    assert encode(images, out) == 0 and len(vae.LatentDataset(out)) == 14


# -------------------------------------------------------------------------------------------------
# Runs and checkpoints

def test_a_damaged_last_is_set_aside_and_previous_continued(run, finished, capsys):
    last, previous = run / "last.safetensors", run / "previous.safetensors"
    step4, half = previous.read_bytes(), last.read_bytes()[:last.stat().st_size // 2]
    last.write_bytes(half)
    assert train.main(flags(finished[0], run)) == 0
    assert "at step 4" in capsys.readouterr().out
    same_run(finished[1], run)
    assert (run / "last.damaged").read_bytes() == half  # it has not replaced the whole one
    assert previous.read_bytes() == step4


@pytest.mark.parametrize("spoil, words", [
    (lambda path: path.write_bytes(b"rubbish"), "its checkpoints are damaged"),
    (lambda path: save_checkpoint(path, {"a": torch.ones(1)}, {}), "its checkpoints are damaged"),
    (lambda path: save_tiny(path), "1d03df4")])
def test_checkpoints_that_cannot_be_continued(spoil, words, run, finished, refused):
    for name in ("last", "previous"):
        spoil(run / f"{name}.safetensors")
    before = sorted(os.listdir(run))
    refused(train.main, flags(finished[0], run), words)
    assert sorted(os.listdir(run)) == before


def test_a_run_of_commit_1d03df4_is_refused_by_that_name_and_its_export_loads(
        run, finished, refused):
    """It stored the optimizer's moments by the parameters' names, and no format."""
    for name in ("last", "ema"):
        tensors, settings = read_checkpoint(run / f"{name}.safetensors")
        del settings["format"], settings["times"]
        settings["warmup_epochs"] = settings.pop("warmup")
        save_checkpoint(run / f"{name}.safetensors", tensors, settings)
    before = (run / "last.safetensors").read_bytes()
    refused(train.main, flags(finished[0], run), "1d03df4", "its exports load")
    assert (run / "last.safetensors").read_bytes() == before
    assert load_denoiser(run / "ema.safetensors").settings["step"] == 6


@pytest.mark.parametrize("lost, step", [(40, 4), (10, 4), (10, 5)])
def test_a_torn_line_of_a_log_is_dropped_or_written_again(lost, step, run, finished):
    """As a crash leaves it; also where the checkpoint is of a later step than the torn line's."""
    (run / "last.safetensors").unlink()  # so the run continues at step 4
    lines = (run / "log.csv").read_text().splitlines(keepends=True)
    torn = "".join(lines[:step + 1])[:-lost]
    (run / "log.csv").write_text(torn)
    assert train.main(flags(finished[0], run)) == 0
    whole, found = ((folder / "log.csv").read_text().splitlines() for folder in (finished[1], run))
    first_steps = [line.split(",")[:3] for line in whole if not line.startswith(f"{step},")]
    kept = [line.split(",")[:3] for line in found if not line.startswith(f"{step},")]
    assert kept == first_steps


def test_a_log_of_another_kind_is_left_alone(run, finished, refused):
    (run / "last.safetensors").unlink()
    for text in ("a,b\n1,2\n", "\x00" * 50, "step,loss\n1," + "9" * 200_000):
        (run / "log.csv").write_text(text)
        refused(train.main, flags(finished[0], run), "log.csv", "move it away")
        assert (run / "log.csv").read_text() == text


@pytest.mark.parametrize("name", ["nothing", "fsync", "chmod"])
def test_files_are_replaced_whole_and_others_may_read_them(name, tmp_path, monkeypatch):
    """Also where folders have no fsync, or the file system no chmod."""
    real, fail = getattr(os, name, None), mock.Mock(side_effect=OSError(22, "Invalid argument"))
    if real:
        monkeypatch.setattr(os, name, lambda place, *mode: (
            fail() if mode or stat.S_ISDIR(os.fstat(place).st_mode) else real(place)))
    monkeypatch.setattr("lib.files.UMASK", 0o022)
    for text in ("one", "two"):
        with atomic(tmp_path / "a", tmp_path / "b") as temporary:
            temporary.write_text(text)
    assert [(tmp_path / name).read_text() for name in sorted(os.listdir(tmp_path))] == ["two", "one"]
    assert name == "chmod" or stat.S_IMODE(os.stat(tmp_path / "a").st_mode) == 0o644
    with pytest.raises(ZeroDivisionError), atomic(tmp_path / "a") as temporary:
        temporary.write_text(str(1 / 0))
    assert sorted(os.listdir(tmp_path)) == ["a", "b"] and (tmp_path / "a").read_text() == "two"


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


def test_a_folder_of_images_continues_where_it_was_interrupted(draw, tmp_path):
    folder, first, rest = tmp_path / "folder", [0, 1, 2], [[3, 4, 5], [6]]
    assert draw("whole") == (0, [first, *rest])
    assert draw("folder", side_effect=[mock.DEFAULT, KeyboardInterrupt])[0] == 130
    assert [int(path.stem) for path in sorted(folder.glob("*.png"))] == first
    assert draw("folder") == (0, rest)
    (folder / "000004.png").write_bytes(b"")  # as a crash may leave it
    (folder / "000006.png").unlink()
    assert draw("folder") == (0, rest)
    assert np.array_equal(pixels_of(folder), pixels_of(tmp_path / "whole"))
    assert draw("folder") == (0, [])


def test_a_folder_of_images_drawn_otherwise_is_refused(draw, refused):
    draw("folder")
    for other in ("--seed 1", "--cfg 2", "--steps 4", "--weights model", "--classes a b",
                  "--method euler", "--interval 0,1", "--t-eps 0.1", "--precision bf16"):
        refused(lambda argv: draw("folder", *argv)[0], other.split(), "other settings")


# -------------------------------------------------------------------------------------------------
# Damage, and full disks

DAMAGE = {
    "empty": lambda data: b"",
    "cut in the middle": lambda data: data[:len(data) // 2],
    "cut at the end": lambda data: data[:-1],
    "a page of HTML": lambda data: b"<html>404 Not Found</html>" * 50,
    "zeros": lambda data: bytes(len(data)),  # as a crash leaves it on some file systems
    "another safetensors": lambda data: safetensors.torch.save({"a": torch.zeros(9)}),
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


def test_a_full_disk_leaves_the_last_checkpoint(run, finished, refused):
    before = (run / "previous.safetensors").read_bytes()
    (run / "last.safetensors").write_bytes(before)  # of step 4
    with largest_file(len(before) // 2):
        refused(train.main, flags(finished[0], run), "last.safetensors: cannot be written", code=1)
    assert (run / "last.safetensors").read_bytes() == before and not list(run.glob(".tmp*"))
    assert train.main(flags(finished[0], run)) == 0
    same_run(finished[1], run)


@pytest.mark.parametrize("out, size", [
    ("cache", 9000), ("folder", 100), ("all.npz", 500), ("grid.png", 1000)])
def test_a_full_disk_leaves_nothing_half_written(out, size, images, draw, tmp_path, refused):
    def write(argv=()):
        return encode(images, tmp_path / out) if out == "cache" else draw(out)[0]
    before = set(tmp_path.rglob("[!.]*.*"))
    with largest_file(size):
        refused(write, [], code=1)
    left = set(tmp_path.rglob("[!.]*.*")) - before
    assert all(path.name == "facts.txt" for path in left)
    assert write() == 0
