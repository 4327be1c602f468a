"""A user's mistake is one line that names it, exit code 2, and nothing is written."""
import os
import shutil
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import save_tiny, small_reference
from PIL import Image
from safetensors.torch import save_file

import fid
import sample
import train
import vae
from lib.checkpoint import export_tensors, save_checkpoint
from lib.run import split_batch
from test_all import flags, picture_folder, small_cache, tiny_net


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of right and wrong things."""
    folder = tmp_path_factory.mktemp("place")
    picture_folder(folder / "images", 1)
    small_cache(folder, n=12)
    small_cache(folder / "three", n=12, classes=3)
    for name in ("empty", "hole/class", "junk/class", "flat", "sizes", "bad", "grid.png"):
        (folder / name).mkdir(parents=True)
    for name in ("file", "other.csv", "junk/class/1.png", "bad/2.png"):
        (folder / name).write_text("a,b\n1,2\n")
    for name, side in {"flat/1": 8, "sizes/1": 8, "sizes/2": 9, "bad/1": 8, "bad/3": 8}.items():
        Image.new("RGB", (side, side)).save(folder / f"{name}.png")
    for target in ("x", "eps", "y"):
        save_tiny(folder / f"{target}.safetensors", target=target)
    for name, target in {"ema": "x", "mute": None}.items():
        settings = {"target": target, "input_size": 8, "step": 1}
        save_checkpoint(folder / f"{name}.safetensors", export_tensors([0, tiny_net()]), settings)
    save_file({"pos_embed": torch.ones(9)} | tiny_net().state_dict(), folder / "more.safetensors")
    small_reference(folder / "ref.npz")
    small_reference(folder / "ref32.npz", size="32x32")
    for name, shape, kind in (("s", (9, 8, 8, 3), "u1"), ("one", (1, 8, 8, 3), "u1"),
                              ("grey", (3, 8, 8), "u1"), ("floats", (3, 8, 8, 3), "f4")):
        np.savez(folder / f"{name}.npz", arr_0=np.zeros(shape, kind))
    return folder


@pytest.fixture
def nothing_written(place, monkeypatch):
    """The test runs there. (A run's folder may be made, and locked, before a mistake is seen.)"""
    monkeypatch.chdir(place)
    before = {path for path in place.rglob("*") if path.name != ".lock"}
    yield
    after = {path for path in place.rglob("*") if path.name != ".lock"}
    assert after <= before | {place / "run"}
    shutil.rmtree("run", ignore_errors=True)


def cases(*table):
    """Rows of (words of the line, command, command ...)."""
    each = [(command, said) for said, *commands in table for command in commands]
    return pytest.mark.parametrize("given, said", each, ids=[command[-60:] for command, _ in each])


@cases(
    ("no such folder", "--images missing", "--images file"), ("--images", "--images"),
    ("no class folders", "--images empty", "--images flat"),
    ("a class folder without images", "--images hole"), ("not one of 1", "--images junk"),
    ("--colour", "--colour"), ("expected 1", "--size 0", "--batch 0"), ("invalid int", "--size x"),
    ("8192 or less", "--size 10000"), ("16 or less", "--batch 17"),
    ("invalid choice: 'fp16'", "--dtype fp16"), ("expected flux2, taef2", "--vae nonsense"),
    ("cannot be loaded", "--vae nobody/nothing", "--vae empty"),
    ("cannot be written to", "--out file", "--out file/cache"),
    ("inside --images", "--out images", "--out images/cache"),
    ("another images, list, classes", "--out cache --size 8"),
    ("made with another size", "--images pictures --out cache --size 16"),
    ("made with another flip", "--images pictures --out cache --size 8 --no-flip"),
    ("made with another batch", "--images pictures --out cache --size 8 --batch 4"))
def test_vae(given, said, refused, nothing_written):
    usual = [] if "--vae" in given else ["--vae", "pixels"]
    refused(vae.main, ["--images", "images", "--out", "run", *usual, *given.split()], said)


def test_a_disk_that_is_too_small_is_seen_beforehand(place, refused, nothing_written, monkeypatch):
    usage, said = shutil.disk_usage(place), "GB of disk needed"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    refused(vae.main, "--images images --out run --vae pixels".split(), said)
    refused(train.main, flags("cache", "run"), said)
    refused(sample.main, "--ckpt x.safetensors --out new.npz".split(), said)


@cases(
    ("--patch", "--patch 3", "--patch 16"), ("--foo", "--foo"),
    ("1 or more", "--patch 0", "--batch 0", "--steps 0", "--micro 0", "--save-every 0"),
    ("0 or more", "--lr -1", "--lr nan", "--lr inf", "--seed -1", "--warmup -1"),
    ("1 or less", "--ema 1.5", "--decay 2"), ("at most two", "--ema 0.1 0.2 0.3"),
    ("or less", "--batch 9999999", "--steps " + "9" * 400), ("invalid int", "--steps 1.5"),
    ("invalid choice", "--target y", "--loss y", "--model Q", "--precision fp16"),
    ("no latents at", "--latents nowhere", "--latents empty", "--latents x.safetensors",
     "--val nowhere"), ("another num_classes", "--val three/cache"),
    ("no such checkpoint", "--init nowhere"), ("patch size is 2, not 4", "--init x.safetensors"),
    ("it predicts eps, not x", "--init eps.safetensors --patch 2"),
    ("--eval-every needs --ref", "--eval-every 5"), ("--vae nowhere", "--vae nowhere"),
    ("nowhere.npz", "--eval-every 5 --ref nowhere.npz"),
    ("32x32 images, those to score are 8x8", "--eval-every 5 --ref ref32.npz"),
    ("cannot be written to", "--out file", "--out file/run"))
def test_train(given, said, refused, nothing_written, small_inception):
    refused(train.main, flags("cache", "run", *given.split()), said)


@cases(
    ("target (x there, v here)", "--target v"), ("loss (v there, x here)", "--loss x"),
    ("seed (0 there, 1 here)", "--seed 1"), ("batch (8 there, 4 here)", "--batch 4"),
    ("lr (0.001 there, 0.002 here)", "--lr 2e-3"), ("patch (4 there, 2 here)", "--patch 2"),
    ("ema ([0.9, 0.5] there, [0.5] here)", "--ema 0.5"), ("data (", "--latents cache"),
    ("warmup_epochs (0.4 there, 1.0 here)", "--warmup 1"),
    ("decay (0.0 there, 0.1 here)", "--decay 0.1"))
def test_another_run_in_the_folder(given, said, finished, refused, nothing_written):
    cache, out = finished
    before = (out / "last.safetensors").stat().st_mtime_ns
    refused(train.main, flags(cache, out, *given.split()), "holds a run with another", said)
    assert (out / "last.safetensors").stat().st_mtime_ns == before


def test_more_steps_are_refused_once_the_learning_rate_falls(tmp_path, finished, refused):
    few = flags(finished[0], tmp_path / "run", "--decay", 0.5, "--sample-every", 0, steps=2)
    assert train.main(few) == 0
    refused(train.main, [*few, "--steps", "6"], "another steps (2 there, 6 here)")


def test_the_papers_recipe_is_printed_before_it_needs_data(tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    say = mock.Mock()
    monkeypatch.setattr(train, "say", say)
    refused(train.main, ["--target", "v", "--patch", "1"], "vae.py --images", "--demo")
    for words in ("target v", "steps 250000", "batch 1024", "lr 0.0002", "warmup_epochs 5",
                  "ema [0.9999]", "clip 1.0", "P_mean -0.8, P_std 0.8"):
        assert words in say.call_args.args[0] and os.listdir(".") == []


@cases(
    ("no such checkpoint", "--ckpt none.safetensors", "--ckpt .", "--ckpt cache"),
    ("predicts (y): give --target", "--ckpt y.safetensors"), ("--foo", "--foo"),
    ("give --target", "--ckpt mute.safetensors"), ("give --vae", "--ckpt ema.safetensors"),
    ("Unexpected key(s) in state_dict: \"pos_embed\"", "--ckpt more.safetensors --target x"),
    ("it has --weights ema", "--ckpt ema.safetensors --weights ema2"),
    ("that network is x", "--target v"),
    ("that network is 8", "--input-size 16"), ("0 to 4", "--classes 5", "--classes -1"),
    ("class 'zebra': expected 0 to 4 or a class name", "--classes zebra", "--classes a zebra"),
    ("0 or more", "--cfg nan", "--cfg -1", "--seed -1"), ("invalid float", "--cfg x"),
    ("1 or more", "--steps 0", "--num-samples 0", "--batch 0"),
    ("or less", "--cfg 2000", "--num-samples 1000000000000", "--t-eps 2"),
    ("invalid choice", "--method rk4", "--weights ema3", "--target y"),
    ("LOW,HIGH", "--interval 0.9,0.1", "--interval 0,2"), ("--vae nowhere", "--vae nowhere"),
    ("--interval", "--interval 1", "--interval a,b", "--interval 0,0.5,1"),
    ("--t-eps 0 divides by zero", "--ckpt eps.safetensors --t-eps 0"),
    ("folder does not exist", "--out no/such/a.png"), ("other settings", "--out flat"),
    ("something else of that name", "--out grid.png", "--out file"))
def test_sample(given, said, refused, nothing_written):
    refused(sample.main, ["--ckpt", "x.safetensors", *given.split()], said)


@cases(
    ("0 images found, 2 needed", "--images empty", "--images missing"),
    ("1 images found, 2 needed", "--images junk", "--npz one.npz"),
    ("12 images found, 13 needed", "--images pictures --num-samples 13"),
    ("expected 2", "--images pictures --num-samples 1"), ("is required", "--ref ref.npz"),
    ("not allowed with", "--images pictures --npz s.npz"), ("with --size", "--images sizes"),
    ("bad/2.png: cannot be read", "--images bad"), ("bad/2.png", "--images bad --size 4"),
    ("nowhere.npz", "--images pictures --ref nowhere.npz", "--npz nowhere.npz"),
    ("not a whole npz", "--images pictures --ref file", "--npz ref.npz"),
    ("expected uint8", "--npz floats.npz", "--npz grey.npz"), ("class '9'", "@ --classes 9"),
    ("--save-ref no/ref.npz", "--images pictures --save-ref no/ref.npz"),
    ("--save-ref ref.txt", "--images pictures --save-ref ref.txt"),
    ("expected --images or --npz", "@ --save-ref new.npz"), ("0 or more", "@ --cfg 1 nan"),
    ("32x32 images, those to score are 8x8", "--images pictures --ref ref32.npz",
     "@ --ref ref32.npz"), ("no such checkpoint", "--ckpt none.safetensors"),
    ("does not exist", "@ --csv no/fid.csv"), ("not a table of these", "@ --csv other.csv"),
    ("be read as a table", "@ --csv ref.npz"), ("invalid choice", "@ --weights ema ema3"),
    ("LOW,HIGH", "@ --interval 1,0"), ("--vae nowhere", "@ --vae nowhere"),
    ("no weights 'model'", "--ckpt ema.safetensors --weights ema model"))  # before any is scored
def test_fid(given, said, refused, nothing_written, small_inception):
    """@ is a checkpoint that can be scored."""
    given = given.replace("@", "--ckpt x.safetensors").split()
    refused(fid.main, ["--ref", "ref.npz", *given], said)


def test_what_is_missing_or_does_not_fit_together(refused, nothing_written, monkeypatch):
    refused(sample.main, [], "python train.py --demo")
    refused(sample.main, ["--ckpt", "no\x1b[2J\n\udcff.pth"], "no?[2J ?.pth: no such checkpoint")
    refused(fid.main, ["--images", "pictures"], "nothing to compare with: give --ref")
    refused(fid.main, "--ckpt x.safetensors --save-ref new.npz".split(), "give --ref")
    monkeypatch.setattr(vae.Pixels, "channels", 4)
    refused(sample.main, ["--ckpt", "x.safetensors"], "latents of 4 channels, but 3 wanted")
    monkeypatch.setattr(vae.Pixels, "stride", 16)
    command = "--images images --out run --vae pixels --size 40".split()
    refused(vae.main, command, "--size 40: expected a multiple of 16")
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(train, "connect", lambda: None)
    refused(train.main, flags("cache", "run"), "--batch 8: 3 ranks do not divide it")


@pytest.mark.parametrize("module, zeros", [
    (vae, []), (sample, ["--seed"]), (fid, ["--seed"]),
    (train, ["--seed", "--decay", "--keep-every", "--eval-every"])])
def test_help_shows_defaults_that_are_0_and_torchrun_lets_every_flag_pass(module, zeros, capsys):
    """Torchrun takes what it knows for its own, also abbreviated: --n, --no, --m ..."""
    from torch.distributed.run import get_args_parser
    with pytest.raises(SystemExit) as done:
        module.main(["--help"])
    text = capsys.readouterr().out
    assert done.value.code == 0 and "(default: None)" not in text and "fp16" not in text
    for flag in zeros:
        described = text.split(f"\n  {flag} ")[1].split("\n  --")[0]
        assert "(default: 0" in " ".join(described.split()), flag
    for flag in {word.strip("[],") for word in text.split() if "--" in word[:3]} - {"--help"}:
        command = ["--standalone", "--nproc_per_node=2", f"{module.__name__}.py", flag, "7"]
        assert get_args_parser().parse_args(command).training_script_args == [flag, "7"]


def test_a_batch_that_divides_badly_says_which_divides_well(capsys):
    assert split_batch(1018, 256) == (0, 509, 2)
    said = capsys.readouterr().out
    assert said == "warning: only 2 images at a time: --batch 768 divides better\n"
    for batch, most, *passes in ((768, 256, 3, 256), (1024, 256, 4, 256), (64, 256, 1, 64),
                                 (26, 8, 13, 2), (7, 8, 1, 7)):
        assert split_batch(batch, most) == (0, *passes) and not capsys.readouterr().out
