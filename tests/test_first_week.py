"""What happens to users in their first week: nothing is lost, mislabelled or silent.
(tests/test_images.py has what concerns image files.)"""
import io
import os
import shlex
import shutil
import signal
import sys
import threading

import numpy as np
import pytest
import torch
from conftest import finish, save_tiny, start
from PIL import Image
from safetensors.torch import save_file
from test_runs import interrupting

import sample
import train
import vae
from lib.checkpoint import load_denoiser, read_checkpoint
from lib.log import append_row, read_table
from lib.run import BadInput, connect, cores, rank, world_size
from test_all import flags, image_folder, shard_bytes, write_cache


# Printing never ends a run.

def broken_pipe():
    read_end, write_end = os.pipe()
    os.close(read_end)
    return open(write_end, "w")


def closed_terminal():
    terminal, program_end = os.openpty()
    os.close(terminal)
    return open(program_end, "w")


STREAMS = {"a broken pipe": broken_pipe, "a closed terminal": closed_terminal,
           "a full disk": lambda: open("/dev/full", "w"), "closed from the start": lambda: None,
           "an ASCII terminal": lambda: io.TextIOWrapper(io.BytesIO(), "ascii")}


@pytest.mark.parametrize("name", STREAMS)
def test_a_run_survives_its_streams_and_saves_when_stopped(name, finished, images, monkeypatch):
    """As after `train.py | tee log` and Ctrl-C, which ends tee as well."""
    monkeypatch.setattr(sys, "stdout", STREAMS[name]())
    monkeypatch.setattr(sys, "stderr", STREAMS[name]())
    monkeypatch.setattr(train, "step_noise", interrupting([signal.SIGINT], 1)[0])
    out = images.parent / "données"
    assert train.main(flags(finished[0], out, "--save-every", 100)) == 128 + signal.SIGINT
    assert read_checkpoint(out / "last.safetensors")[1]["step"] == 2
    (images / "cat" / "naïve.png").write_bytes(b"no image")  # a warning on stderr
    assert write_cache(images, images.parent / "cache", 16) == 0
    assert sample.main(["--ckpt", str(out / "nowhere é")]) == 2


# A cache is finished only if its images are the same.

def overwrite(image, other, cache):
    Image.new("RGB", (40, 32), "red").save(image)


def overwrite_with_as_many_bytes(image, other, cache):
    data = bytearray(image.read_bytes())
    data[-20] ^= 1  # in a checksum, so that it cannot be read any more
    image.write_bytes(data)


def swap(image, other, cache):
    image.rename(image.with_suffix(".aside"))
    other.rename(image)
    image.with_suffix(".aside").rename(other)


def overwrite_without_notes(image, other, cache):
    """As in caches of commit 1d03df4, which have none."""
    for note in cache.glob("*.json"):
        note.unlink()
    overwrite(image, other, cache)
    os.utime(image, (2e9, 2e9))


@pytest.mark.parametrize("change", [
    overwrite, overwrite_with_as_many_bytes, swap, overwrite_without_notes])
def test_shards_whose_images_have_changed_are_encoded_again(change, images, tmp_path, capsys):
    cache = tmp_path / "cache"
    assert write_cache(images, cache, 16) == 0
    before = {path: path.stat().st_mtime_ns for path in cache.glob("*.safetensors")}
    change(images / "dog" / "03.png", images / "dog" / "04.png", cache)
    assert write_cache(images, cache, 16) == 0
    assert "images have changed" in capsys.readouterr().out
    again = [path.stem[-1] for path in sorted(before) if path.stat().st_mtime_ns != before[path]]
    assert again == ["2"]  # of images 8 to 11
    assert write_cache(images, tmp_path / "new", 16) == 0
    assert shard_bytes(cache) == shard_bytes(tmp_path / "new")
    assert write_cache(images, cache, 16) == 0
    assert "0 of 4 shards to write" in capsys.readouterr().out.splitlines()[-2]


@pytest.mark.parametrize("granted, ranks, threads", [
    (1, None, 1), (4, None, 4), (64, None, 16), (64, 8, 8), (4, 8, 1), (256, 2, 16)])
def test_threads_are_for_the_cores_that_the_job_was_granted(granted, ranks, threads, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 256)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(granted)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks or ""))
    assert cores() == threads


# Paths.

def test_a_tilde_is_expanded_where_the_shell_leaves_it(finished, tmp_path, monkeypatch, refused):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished[0], "cache")
    argv = flags("~/cache", "~/run", "--val=~/cache", "--sample-every=0", steps=1)
    assert train.main(argv) == 0
    image_folder(tmp_path / "images", 2)
    assert vae.main("--images=~/images --out=~/latents --vae pixels --size 8".split()) == 0
    command = "--ckpt=~/run/ema.safetensors --out=~/grid.png --steps=1".split()
    refused(sample.main, [*command, "--vae=~/images"], "no vae/config.json or config.json")
    assert sample.main(command) == 0
    assert sorted(os.listdir()) == ["cache", "grid.png", "images", "latents", "run"]


@pytest.mark.parametrize("path", ["", "~nobody-of-that-name/x"])
@pytest.mark.parametrize("main, flag", [(train.main, "--out"), (vae.main, "--images"),
                                        (sample.main, "--ckpt")])
def test_a_path_that_cannot_be_meant_is_refused(path, main, flag, refused):
    refused(main, [f"{flag}={path}"], flag)


def test_commands_to_paste_quote_their_paths(finished, tmp_path, capsys):
    def command_of(line):
        return shlex.split(line.split("python ")[1])
    out = tmp_path / "it's mine; really"
    assert train.main(flags(finished[0], out, "--sample-every", 0, steps=1)) == 0
    command = command_of(capsys.readouterr().out.splitlines()[-1])
    assert command == ["sample.py", "--ckpt", str(out / "ema.safetensors")]
    assert write_cache(image_folder(tmp_path / "images", 2), out / "cache", 8) == 0
    command = command_of(capsys.readouterr().out.splitlines()[-1])
    assert command == ["train.py", "--latents", str(out / "cache")]
    assert train.main(["--latents", str(out / "none")]) == 2
    command = command_of(capsys.readouterr().err.split(", or")[0])
    assert command == ["vae.py", "--images", "FOLDER", "--out", str(out / "none")]


# Two processes at once.

def first_demo(folder, target):
    os.chdir(folder)
    draw_digits = train.draw_digits
    train.draw_digits = lambda folder, per_class: draw_digits(folder, 100)
    argv = f"--demo --target {target} --steps 1 --batch 8 --ema 0.1 --sample-every 0".split()
    command = f"--ckpt out/demo-T8-{target}/ema.safetensors --steps 1 --num-samples 60 --out"
    return train.main(argv) or sample.main([*command.split(), "all.npz"])


def test_two_first_demos_at_once_both_succeed(tmp_path):
    """They draw the same digits, write the same cache and draw into the same file."""
    assert finish(start(first_demo, tmp_path, "x") + start(first_demo, tmp_path, "v")) == [0, 0]
    data = vae.LatentDataset(tmp_path / "data" / "demo-pixels")
    assert len(data) == 1000 and data.shape == (3, 32, 32) and not data.mirrored
    assert np.load(tmp_path / "all.npz")["arr_0"].shape == (60, 32, 32, 3)
    assert sorted(os.listdir(tmp_path)) == ["all.npz", "data", "out"]


def append_rows(table, name):
    for i in range(20):
        append_row(table, {"sweep": name, "cfg": i})


def test_two_sweeps_into_one_table_lose_no_row(tmp_path):
    table = tmp_path / "fid.csv"
    assert finish(start(append_rows, table, "a") + start(append_rows, table, "b")) == [0, 0]
    assert len(read_table(table)[1]) == 40


# Ranks that do not fit together.

@pytest.mark.parametrize("main, environment, words", [
    (vae.main, "RANK=1", "RANK=1"), (sample.main, "RANK=x", "RANK=x"),
    (train.main, "RANK=-1 WORLD_SIZE=2", "RANK=-1"),
    (vae.main, "RANK=2 WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=1", "WORLD_SIZE=2"),
    (sample.main, "WORLD_SIZE=2", "without RANK and MASTER_ADDR and MASTER_PORT"),
    (train.main, "RANK=0 WORLD_SIZE=2", "without MASTER_ADDR"),
    (vae.main, "LOCAL_WORLD_SIZE=two", "LOCAL_WORLD_SIZE=two"),
    (vae.main, "RANK=0 WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=x", "cannot connect")])
def test_ranks_that_do_not_fit_together_are_refused(main, environment, words, monkeypatch, refused):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    for setting in environment.split():
        monkeypatch.setenv(*setting.split("="))
    refused(main, [], words)


@pytest.mark.parametrize("environment", ["RANK= WORLD_SIZE=", "RANK=0", "WORLD_SIZE=1"])
def test_one_process_needs_no_torchrun(environment, monkeypatch):
    for setting in environment.split():
        monkeypatch.setenv(*setting.split("="))
    connect()
    assert (rank(), world_size()) == (0, 1)


# A score describes what was drawn.

@pytest.mark.parametrize("out, more, words", [
    ("folder", "--num-samples 3", "first 3 are drawn 1 times, the others 0"),
    ("all.npz", "--num-samples 12", "first 2 are drawn 3 times, the others 2"),
    ("folder", "--num-samples 3 --classes a c", "first 1 are drawn 2 times, the others 1"),
    ("all.npz", "--num-samples 10", None), ("folder", "--num-samples 4 --classes a c", None)])
def test_classes_that_are_not_drawn_equally_often_are_warned_of(out, more, words, tmp_path, capsys):
    save_tiny(tmp_path / "a.safetensors")
    command = f"--ckpt {tmp_path}/a.safetensors --steps 1 --out {tmp_path}/{out} {more}"
    assert sample.main(command.split()) == 0
    printed = capsys.readouterr().out
    assert ("warning" in printed) == bool(words) and (words or "") in printed
    assert "classes: " + ("0 2" if "--classes" in more else "all") in printed


@pytest.mark.parametrize("stranger", ["000005.png", "mine.jpg", "sub/1.png"])
def test_a_sample_folder_with_other_images_is_refused(stranger, tmp_path, refused):
    """fid.py would score them, too."""
    save_tiny(tmp_path / "a.safetensors")
    command = f"--ckpt {tmp_path}/a.safetensors --steps 1 --out {tmp_path}/f --num-samples".split()
    assert sample.main([*command, "4"]) == 0
    (tmp_path / "f" / stranger).parent.mkdir(exist_ok=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "f" / stranger)
    refused(sample.main, [*command, "5"], "1 images besides the 5", stranger.split("/")[-1])


# Files from elsewhere have other types.

@pytest.mark.parametrize("latents, labels, refusal", [
    (torch.float32, torch.int32, None), (torch.bfloat16, torch.uint8, None),
    (torch.float16, torch.float32, "labels of torch.float32"),
    (torch.float64, torch.int64, "latents of torch.float64")])
def test_caches_of_other_types_are_trained_on_or_refused(
        latents, labels, refusal, tmp_path, refused):
    """What codec made them is not known, so no sample grids are drawn."""
    x, y = torch.randn(6, 3, 8, 8).to(latents), torch.arange(6).to(labels)
    save_file({"latents": x, "labels": y}, tmp_path / "latents_rank00_shard000.safetensors")
    command = flags(tmp_path, tmp_path / "run", "--batch", 2, steps=1)
    if refusal:
        refused(train.main, command, "shard000", refusal)
    else:
        assert train.main(command) == 0 and not (tmp_path / "run" / "samples").exists()
        assert load_denoiser(tmp_path / "run" / "ema.safetensors").net.num_classes == 6
        refused(sample.main, ["--ckpt", tmp_path / "run" / "ema.safetensors"], "give --vae")


@pytest.mark.parametrize("content", [
    {"model_ema1": [torch.ones(3)], "model": {}}, {"model_ema1": None, "model": None},
    {0: torch.ones(3)}, [torch.ones(3)], {"x_embedder.proj.weight": [[1.0]]}])
def test_weights_of_other_types_are_refused(content, tmp_path):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(BadInput, match="a.pth"):
        load_denoiser(tmp_path / "a.pth", target="x", input_size=8)


def test_a_checkpoint_is_read_in_the_instant_between_two_renames(tmp_path):
    save_tiny(tmp_path / "previous.safetensors")
    last = tmp_path / "last.safetensors"
    timer = threading.Timer(0.05, lambda: (tmp_path / "previous.safetensors").rename(last))
    timer.start()
    assert load_denoiser(last, "model").settings["step"] == 100
    timer.join()


# Codecs of other channels, and words.

@pytest.mark.parametrize("change, words", [
    (dict(in_channels=1, out_channels=1), "1 channels"), (dict(in_channels=4), "4 channels"),
    (dict(out_channels=1), "decodes 1"),
    (dict(latents_mean=[0.1, 0.2], latents_std=[1.0, 1.0]), "cannot be loaded")])
def test_codecs_of_other_channels_are_refused_when_they_are_opened(change, words, tmp_path):
    from diffusers import AutoencoderKL
    sizes = dict(block_out_channels=(8,), norm_num_groups=4, latent_channels=3)
    AutoencoderKL(**sizes | change).save_pretrained(tmp_path)
    with pytest.raises(BadInput, match=words):
        vae.load_vae(str(tmp_path))


def test_that_no_image_can_be_read_has_a_reason(tmp_path, refused):
    (tmp_path / "images" / "cat").mkdir(parents=True)
    for name, data in {"0.jpg": b"<html>404 Not Found</html>", "1.png": b""}.items():
        (tmp_path / "images" / "cat" / name).write_bytes(data)
    command = f"--images {tmp_path}/images --out {tmp_path}/cache --vae pixels".split()
    refused(vae.main, command, "none of 2 images", "cat/0.jpg", "<html>404")


@pytest.mark.parametrize("name", ["grid.jpg", "grid.WEBP", "a.avif", "a.pdf", "a.npy", "a.zip"])
def test_other_formats_are_no_folders(name, tmp_path, refused):
    save_tiny(tmp_path / "a.safetensors")
    command = f"--ckpt {tmp_path}/a.safetensors --steps 1 --out {tmp_path}/{name}".split()
    refused(sample.main, command, name, "NAME.png")
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors"]
