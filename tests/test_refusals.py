"""A user's mistake is one line that names it, exit code 2, and nothing is written.
(What fid.py refuses of reference files and sample files is in tests/test_metrics.py.)"""
import contextlib
import os
import pathlib
import shlex
import shutil

import pytest
import torch
from conftest import save_tiny, small_reference
from safetensors.torch import save_file

import fid
import lib.flags
import sample
import train
import vae
from lib.checkpoint import check_same_run
from lib.run import BadInput, connect, rank, split_batch, world_size
from test_all import flags, image_folder, small_cache, tiny_net


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of right and wrong things."""
    folder = tmp_path_factory.mktemp("place")
    small_cache(folder, n=12)
    small_cache(folder / "three", n=12, classes=3)
    image_folder(folder / "other", 1, ["a"])
    image_folder(folder / "other", 1, ["b"], (8, 8))
    for name in ("empty", "empty.png", "broken/cat"):
        (folder / name).mkdir(parents=True)
    for name in ("file", "other.csv", "broken/cat/1.png"):
        (folder / name).write_text("a,b\n1,2\n")
    for target in ("x", "eps", "y"):
        save_tiny(folder / f"{target}.safetensors", target=target)
    save_tiny(folder / "codec.safetensors", vae=None)
    save_file({"pos_embed": torch.ones(9)} | tiny_net().state_dict(), folder / "more.safetensors")
    small_reference(folder / "ref.npz")
    small_reference(folder / "ref32.npz", size="32x32")
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
    each = [(command, words) for words, *commands in table for command in commands]
    return pytest.mark.parametrize("given, words", each, ids=[command[-60:] for command, _ in each])


@cases(
    ("no such folder", "--images missing"), ("no class folders", "--images empty"),
    ("expected a path", "--images="), ("--colour", "--colour"), ("expected 1", "--size 0"),
    ("none of 1 images can be read; the first: cat/1.png (damaged, or no", "--images broken"),
    ("expected flux2, taef2", "--vae nonsense"), ("cannot be loaded", "--vae nobody/nothing"),
    ("cannot be written to", "--out file/cache"), ("inside --images", "--out images/cache"),
    ("another images, list, classes, size", "--images other --out cache"))
def test_vae(given, words, refused, nothing_written):
    usual = [] if "--vae" in given else ["--vae", "pixels"]
    refused(vae.main, ["--images", "images", "--out", "run", *usual, *given.split()], words)


@cases(
    ("--patch", "--patch 3"), ("0 or more", "--lr nan"), ("at most two", "--ema 0.1 0.2 0.3"),
    ("no latents in", "--latents empty"), ("another num_classes", "--val three/cache"),
    ("it predicts eps, not x", "--init eps.safetensors --patch 2"), ("--vae no", "--vae nowhere"),
    ("--eval-every needs --ref", "--eval-every 5"), ("cannot be written to", "--out file/run"),
    ("32x32 images", "--eval-every 5 --ref ref32.npz"), ("no such home", "--out ~nobody-there/x"))
def test_train(given, words, refused, nothing_written, small_inception):
    refused(train.main, flags("cache", "run", *given.split()), words)


@cases(
    ("no such checkpoint", "--ckpt none.safetensors"), ("give --target", "--ckpt y.safetensors"),
    ("give --vae", "--ckpt codec.safetensors"), ("pos_embed", "--ckpt more.safetensors --target x"),
    ("it has --weights model ema", "--ckpt more.safetensors --target x --weights ema2"),
    ("that network is x", "--target v"), ("that network is 8", "--input-size 16"),
    ("0 to 4 or a class name", "--classes a zebra"), ("--interval", "--interval 0.9,0.1"),
    ("--t-eps 0 divides by zero", "--ckpt eps.safetensors --t-eps 0"),
    ("folder does not exist", "--out no/such/a.png"), ("NAME.png", "--out a.jpg", "--out a.npy"),
    ("NAME.png", "--out a.svg", "--out a.txt.gz"),
    ("something else has that name", "--out empty.png"),
    ("holds 1 images besides the 10 asked for", "--out broken/cat"))
def test_sample(given, words, refused, nothing_written):
    refused(sample.main, ["--ckpt", "x.safetensors", *given.split()], words)


@cases(
    ("0 images found, 2 needed", "--images empty"), ("not of the size of", "--images other"),
    ("32x32 images", "--images images --ref ref32.npz", "@ --ref ref32.npz"),
    ("class '9'", "@ --classes 9"), ("not a table of these", "@ --csv other.csv"),
    ("it needs --ckpt", "--images images --cfg 2", "--images images --t-eps 0"))
def test_fid(given, words, refused, nothing_written, small_inception):
    given = given.replace("@", "--ckpt x.safetensors").split()
    refused(fid.main, ["--ref", "ref.npz", *given], words)


def test_a_disk_that_is_too_small_is_seen_beforehand(place, refused, nothing_written, monkeypatch):
    usage, words = shutil.disk_usage(place), "GB of disk needed"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    refused(vae.main, "--images images --out run --vae pixels".split(), words)
    refused(train.main, flags("cache", "run"), words)
    refused(sample.main, "--ckpt x.safetensors --out new.npz".split(), words)


def test_what_is_missing_or_does_not_fit_together(refused, nothing_written, monkeypatch):
    refused(sample.main, [], "python train.py --demo")
    refused(sample.main, ["--ckpt", "no\x1b[2J\n\udcff.pth"], "no?[2J ?.pth: no such checkpoint")
    refused(train.main, ["--target", "v"], "vae.py --images", "--demo")
    monkeypatch.setattr(vae.Pixels, "channels", 4)
    refused(sample.main, ["--ckpt", "x.safetensors"], "latents of 4 channels, expected 3")
    monkeypatch.setattr(vae.Pixels, "stride", 16)
    command = "--images images --out run --vae pixels --size 40".split()
    refused(vae.main, command, "--size 40: expected a multiple of 16")


def test_codecs_of_other_channels_are_refused_when_they_are_opened(tmp_path):
    from diffusers import AutoencoderKL
    sizes = dict(block_out_channels=(8,), norm_num_groups=4, latent_channels=3)
    AutoencoderKL(in_channels=1, out_channels=1, **sizes).save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="1 channels"):
        vae.load_vae(str(tmp_path))


@cases(
    ("target (x there, v here)", "--target v"), ("lr (0.001 there, 0.002 here)", "--lr 2e-3"),
    ("ema ([0.9, 0.5] there, [0.5] here)", "--ema 0.5"), ("data (", "--latents cache"))
def test_another_run_in_the_folder(given, words, finished, refused, nothing_written):
    cache, out = finished
    before = (out / "last.safetensors").stat().st_mtime_ns
    refused(train.main, flags(cache, out, *given.split()), "holds a run with another", words)
    assert (out / "last.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("step, steps, allowed", [
    (4, 20, True), (5, 20, False), (2, 6, True), (3, 6, False)])
def test_steps_may_change_until_the_learning_rate_has_followed_from_them(step, steps, allowed):
    """With decay 0.5 of 10 steps it falls from step 5 on; that of a shorter run fell earlier."""
    saved = {"format": 2, "step": step, "steps": 10}
    now = {"format": 2, "steps": steps}
    check_same_run("out", saved | {"decay": 0.0}, now | {"decay": 0.0})
    refusal = contextlib.nullcontext() if allowed else pytest.raises(BadInput, match="steps")
    with refusal:
        check_same_run("out", saved | {"decay": 0.5}, now | {"decay": 0.5})


# -------------------------------------------------------------------------------------------------
# Ranks, flags, paths

@cases(
    ("RANK=1", "RANK=1"), ("RANK=x", "RANK=x"), ("does not fit", "LOCAL_WORLD_SIZE=0"),
    ("without RANK and MASTER_ADDR and MASTER_PORT", "WORLD_SIZE=2"),
    ("cannot connect", "RANK=0 WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=x"))
def test_ranks_that_do_not_fit_together(given, words, monkeypatch, refused):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    for setting in given.split():
        monkeypatch.setenv(*setting.split("="))
    refused(vae.main, [], words)


def test_one_process_needs_no_torchrun(monkeypatch):
    for name in "RANK", "WORLD_SIZE":
        monkeypatch.setenv(name, "")
    connect()
    assert (rank(), world_size()) == (0, 1)


def test_a_batch_that_divides_badly_says_which_divides_well(capsys, monkeypatch):
    assert split_batch(1018, 256) == (0, 509, 2)
    assert "--batch 768 divides better" in capsys.readouterr().out
    for batch, most, *passes in ((768, 256, 3, 256), (64, 256, 1, 64), (26, 8, 13, 2)):
        assert split_batch(batch, most) == (0, *passes) and not capsys.readouterr().out
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(BadInput, match="8 cannot be divided by 3 ranks"):
        split_batch(8, 256)


@pytest.mark.parametrize("module", [vae, sample, fid, train])
def test_help_shows_defaults_and_torchrun_lets_every_flag_pass(module, capsys):
    """Torchrun takes what it knows for its own, also abbreviated: --n, --no, --m ..."""
    from torch.distributed.run import get_args_parser
    with pytest.raises(SystemExit):
        module.main(["--help"])
    text = capsys.readouterr().out
    assert "(default: None)" not in text and "(default: " in text
    for flag in {word.strip("[],") for word in text.split() if "--" in word[:3]} - {"--help"}:
        command = ["--standalone", "--nproc_per_node=2", f"{module.__name__}.py", flag, "7"]
        assert get_args_parser().parse_args(command).training_script_args == [flag, "7"]


def test_a_tilde_is_expanded_where_the_shell_leaves_it(finished, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished[0], "cache")
    assert train.main(flags("~/cache", "~/run", "--val=~/cache", steps=1)) == 0
    image_folder(tmp_path / "images", 2)
    assert vae.main("--images=~/images --out=~/latents --vae pixels --size 8".split()) == 0
    assert sample.main("--ckpt=~/run/ema.safetensors --out=~/grid.png --steps=1".split()) == 0
    assert sorted(os.listdir()) == ["cache", "grid.png", "images", "latents", "run"]
    assert lib.flags.path("./~/run") == pathlib.Path("~/run")  # a folder called ~


def test_a_command_to_paste_quotes_its_path(finished, tmp_path, capsys):
    out = tmp_path / "it's mine; really"
    assert train.main(flags(finished[0], out, steps=1)) == 0
    command = shlex.split(capsys.readouterr().out.splitlines()[-1].split("python ")[1])
    assert command == ["sample.py", "--ckpt", str(out / "ema.safetensors")]
