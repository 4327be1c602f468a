"""A user's mistake is one line that names it, exit code 2, and nothing is written.
(What fid.py refuses of reference files and sample files is in tests/test_metrics.py.)"""
import shutil

import pytest
import torch
from conftest import save_tiny, small_reference
from PIL import Image
from safetensors.torch import save_file

import fid
import sample
import train
import vae
from lib.checkpoint import check_same_run, export_tensors, save_checkpoint
from lib.run import BadInput, split_batch
from test_all import flags, image_folder, small_cache, tiny_net


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of right and wrong things."""
    folder = tmp_path_factory.mktemp("place")
    small_cache(folder, n=12)
    small_cache(folder / "three", n=12, classes=3)
    image_folder(folder / "other", 1)
    for name in ("empty", "flat", "grid.png"):
        (folder / name).mkdir()
    for name in ("file", "other.csv"):
        (folder / name).write_text("a,b\n1,2\n")
    Image.new("RGB", (8, 8)).save(folder / "flat" / "1.png")
    for target in ("x", "eps", "y"):
        save_tiny(folder / f"{target}.safetensors", target=target)
    for name, target in {"ema": "x", "mute": None}.items():
        settings = {"target": target, "input_size": 8, "step": 1}
        save_checkpoint(folder / f"{name}.safetensors", export_tensors([tiny_net()]), settings)
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
    ("no such folder", "--images missing", "--images file"), ("--images", "--images"),
    ("no class folders", "--images empty", "--images flat"), ("--colour", "--colour"),
    ("expected 1", "--size 0"), ("invalid int", "--size x"), ("16 or less", "--batch 17"),
    ("expected flux2, taef2", "--vae nonsense"), ("cannot be loaded", "--vae nobody/nothing"),
    ("cannot be written to", "--out file", "--out file/cache"),
    ("inside --images", "--out images", "--out images/cache"),
    ("another images, list, classes", "--images other --out cache --size 8"),
    ("made with another size", "--out cache --size 16"),
    ("made with another flip", "--out cache --size 8 --no-flip"))
def test_vae(given, words, refused, nothing_written):
    usual = [] if "--vae" in given else ["--vae", "pixels"]
    refused(vae.main, ["--images", "images", "--out", "run", *usual, *given.split()], words)


@cases(
    ("--patch", "--patch 3", "--patch 16"), ("--foo", "--foo"), ("1 or more", "--micro 0"),
    ("0 or more", "--lr -1", "--lr nan", "--lr inf"), ("at most two", "--ema 0.1 0.2 0.3"),
    ("1 or less", "--decay 2"), ("or less", "--steps " + "9" * 400), ("invalid int", "--steps 1.5"),
    ("invalid choice", "--target y", "--model Q"), ("another num_classes", "--val three/cache"),
    ("no latents in", "--latents nowhere", "--latents empty", "--latents x.safetensors"),
    ("no such checkpoint", "--init nowhere"), ("patch size 2", "--init x.safetensors"),
    ("it predicts eps, not x", "--init eps.safetensors --patch 2"),
    ("--eval-every needs --ref", "--eval-every 5"), ("--vae nowhere", "--vae nowhere"),
    ("nowhere.npz", "--eval-every 5 --ref nowhere.npz"),
    ("32x32 images", "--eval-every 5 --ref ref32.npz"),
    ("cannot be written to", "--out file", "--out file/run"))
def test_train(given, words, refused, nothing_written, small_inception):
    refused(train.main, flags("cache", "run", *given.split()), words)


@cases(
    ("no such checkpoint", "--ckpt none.safetensors", "--ckpt ."), ("--foo", "--foo"),
    ("give --target", "--ckpt mute.safetensors", "--ckpt y.safetensors"),
    ("give --vae", "--ckpt ema.safetensors"), ("--vae nowhere", "--vae nowhere"),
    ("pos_embed", "--ckpt more.safetensors --target x"),
    ("it has --weights ema", "--ckpt ema.safetensors --weights ema2"),
    ("that network is x", "--target v"), ("that network is 8", "--input-size 16"),
    ("0 to 4 or a class name", "--classes 5", "--classes -1", "--classes a zebra"),
    ("0 or more", "--cfg nan", "--seed -1"), ("1 or more", "--steps 0", "--num-samples 0"),
    ("or less", "--cfg 2000", "--t-eps 2"), ("invalid choice", "--method rk4"),
    ("--interval", "--interval 0.9,0.1", "--interval 0,2", "--interval 1", "--interval a,b"),
    ("--t-eps 0 divides by zero", "--ckpt eps.safetensors --t-eps 0"),
    ("folder does not exist", "--out no/such/a.png"), ("besides the 10", "--out flat"),
    ("something else has that name", "--out grid.png", "--out file"))
def test_sample(given, words, refused, nothing_written):
    refused(sample.main, ["--ckpt", "x.safetensors", *given.split()], words)


@cases(
    ("0 images found, 2 needed", "--images empty"), ("12 images found", "--images images "
     "--num-samples 13"), ("32x32 images", "--images images --ref ref32.npz", "@ --ref ref32.npz"),
    ("no such checkpoint", "--ckpt none.safetensors"), ("class '9'", "@ --classes 9"),
    ("not a table of these", "@ --csv other.csv"), ("does not exist", "@ --csv no/fid.csv"),
    ("no weights 'model'", "--ckpt ema.safetensors --weights ema model"))
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
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr("lib.run.connect", lambda: None)
    refused(train.main, flags("cache", "run"), "--batch 8 cannot be divided by 3 ranks")


@cases(
    ("target (x there, v here)", "--target v"), ("loss (v there, x here)", "--loss x"),
    ("seed (0 there, 1 here)", "--seed 1"), ("batch (8 there, 4 here)", "--batch 4"),
    ("lr (0.001 there, 0.002 here)", "--lr 2e-3"), ("patch (4 there, 2 here)", "--patch 2"),
    ("ema ([0.9, 0.5] there, [0.5] here)", "--ema 0.5"), ("data (", "--latents cache"),
    ("warmup (0.4 there, 1.0 here)", "--warmup 1"), ("decay (0.0 there, 0.1", "--decay 0.1"))
def test_another_run_in_the_folder(given, words, finished, refused, nothing_written):
    cache, out = finished
    before = (out / "last.safetensors").stat().st_mtime_ns
    refused(train.main, flags(cache, out, *given.split()), "holds a run with another", words)
    assert (out / "last.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("step, steps, allowed", [
    (4, 20, True), (5, 20, False), (9, 20, False), (2, 6, True), (3, 6, False)])
def test_steps_may_change_until_the_learning_rate_has_followed_from_them(step, steps, allowed):
    """With decay 0.5 of 10 steps it falls from step 5 on; that of a shorter run fell earlier."""
    saved = {"format": 2, "step": step, "steps": 10, "decay": 0.5}
    now = {"format": 2, "steps": steps, "decay": 0.5}
    check_same_run("out", saved | {"decay": 0.0}, now | {"decay": 0.0})
    try:
        check_same_run("out", saved, now)
    except BadInput as error:
        assert not allowed and "steps" in str(error)
    else:
        assert allowed


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


def test_a_batch_that_divides_badly_says_which_divides_well(capsys):
    assert split_batch(1018, 256) == (0, 509, 2)
    assert "--batch 768 divides better" in capsys.readouterr().out
    for batch, most, *passes in ((768, 256, 3, 256), (64, 256, 1, 64), (26, 8, 13, 2)):
        assert split_batch(batch, most) == (0, *passes) and not capsys.readouterr().out
