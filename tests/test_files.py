"""Files that others wrote or will read, and damaged ones: those are one line that names them, what
was whole stays whole, nothing is run as code. A disk that is full or fails is exit code 1."""
import argparse
import itertools
import json
import os
import pickle
import shutil
from unittest import mock

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import largest_file, save_tiny, small_reference
from PIL import Image

import fid
import lib.cache
import sample
import train
import vae
from lib.cache import check_latents
from lib.checkpoint import load_denoiser, load_init, read_checkpoint, save_checkpoint
from lib.images import list_images, open_image, read_picture
from lib.inception import load_inception
from lib.npz import image_rows, read_statistics
from lib.run import BadInput, program
from test_all import flags, picture_folder, read_all, same_run, small_cache, tiny_net

# -------------------------------------------------------------------------------------------------
# Pictures

RANDOM = np.random.default_rng(0)
GREY, ALPHA, NUMBER = RANDOM.integers(0, [[[256]], [[256]], [[4]]], (3, 6, 5), np.uint8)
RGB, COLOURS = RANDOM.integers(0, 256, (6, 5, 3), np.uint8), RANDOM.integers(0, 256, (4, 3), "u1")
DEEP = RANDOM.integers(0, 65536, (6, 5), np.uint16)
SCALED, GREYS = ((values / 1.0)[..., None].repeat(3, 2) for values in (DEEP / 257, GREY))
HOLE = np.where((NUMBER == 2)[..., None], 255, COLOURS[NUMBER])  # white shines through
FRAMES = dict(save_all=True, append_images=[Image.fromarray(255 - RGB)])
PALETTE = Image.fromarray(NUMBER, "P")
PALETTE.putpalette(COLOURS.tobytes())


def on_white(colour):
    return 255 + (colour - 255.0) * (ALPHA / 255)[..., None]


@pytest.mark.parametrize("pixels, mode, name, wanted, options", [
    (RGB, None, "a.png", RGB, {}), (GREY, None, "a.png", GREYS, {}),
    (GREY > 99, None, "a.png", 255 * (GREYS > 99), {}), (DEEP, None, "a.png", SCALED, {}),
    (np.dstack([RGB, ALPHA]), None, "a.png", on_white(RGB), {}),
    (np.dstack([GREY, ALPHA]), "LA", "a.png", on_white(GREYS), {}),
    (PALETTE, None, "a.png", COLOURS[NUMBER], {}),
    (PALETTE, None, "a.png", HOLE, dict(transparency=2)),  # one entry of the palette is clear
    (PALETTE, None, "a.gif", HOLE, dict(transparency=2)), (RGB, None, "a.png", RGB, FRAMES),
    (PALETTE, None, "a.png", HOLE, dict(transparency=b"\xff\xff\x00\xff")),
    (RGB, None, "a.png", np.where((RGB == RGB[2, 3]).all(-1)[..., None], 255, RGB),
     dict(transparency=tuple(RGB[2, 3].tolist()))),  # one colour is clear
    (DEEP, None, "a.tif", SCALED, {}), (DEEP.astype(np.int32), None, "a.tif", SCALED, {}),
    ((DEEP / 65535).astype(np.float32), None, "a.tif", SCALED, {}),
    (np.dstack([RGB, GREY]), "CMYK", "a.tif", (255.0 - RGB) * (255 - GREYS) / 255, {}),
    (Image.new("CMYK", (9, 9), (0, 255, 255, 0)), None, "a.jpg", np.full((9, 9, 3), [254, 1, 1]),
     dict(quality=100)),  # red, which JPEG stores inverted
    (RGB, None, "a.webp", RGB, FRAMES | dict(lossless=True)),  # of an animation the first frame
    (Image.new("RGB", (9, 9), "red"), None, "a.png", np.full((9, 9, 3), [254, 0, 0]),
     dict(format="JPEG"))])  # a wrong suffix is no matter
def test_pictures_are_seen_as_a_viewer_shows_them(pixels, mode, name, wanted, options, tmp_path):
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels, mode)
    image.save(tmp_path / name, **options)
    seen = np.asarray(open_image(tmp_path / name)).astype(float)
    assert seen.shape == wanted.shape and np.abs(seen - wanted).max() <= 1


def test_pictures_are_turned_as_their_exif_says(tmp_path):
    turned = {1: RGB, 2: RGB[:, ::-1], 3: RGB[::-1, ::-1], 4: RGB[::-1], 5: RGB.transpose(1, 0, 2),
              6: np.rot90(RGB, -1), 7: np.rot90(RGB, 2).transpose(1, 0, 2), 8: np.rot90(RGB)}
    for orientation, wanted in turned.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(RGB).save(tmp_path / "a.png", exif=exif)
        assert np.array_equal(np.asarray(open_image(tmp_path / "a.png")), wanted), orientation


def test_images_are_listed_sorted_deep_and_visible(tmp_path):
    for name in "b/2.JPG b/10.png a/deep/er/x.jpeg a/1.tiff b/.no.png .git/1.png b/a.txt".split():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    items = [("a/1.tiff", 0), ("a/deep/er/x.jpeg", 0), ("b/10.png", 1), ("b/2.JPG", 1)]
    assert list_images(tmp_path) == (["a", "b"], items)


# -------------------------------------------------------------------------------------------------
# Caches

@pytest.fixture
def images(tmp_path):
    return picture_folder(tmp_path / "images")


def write(images, out, **options):
    """The exit code of vae.py's work: 14 pictures of 16 x 16, four a shard."""
    return program(vae.write_cache)(images, out, vae.load_vae("pixels"), 16, batch=3, shard_size=4,
                                    **options)


@pytest.fixture
def cache(images, tmp_path):
    assert write(images, tmp_path / "cache") == 0
    return tmp_path / "cache"


def shards_of(folder):
    return sorted(folder.glob("latents_*"))


def theirs(folder, *shards):
    """A cache as others write it: no settings, three digits."""
    for k, tensors in enumerate(shards):
        safetensors.torch.save_file(tensors, folder / f"latents_rank00_shard{k:03d}.safetensors")
    return vae.LatentDataset(folder)


def test_our_shards_read_as_lightningdit_reads_them(cache):
    """By plain safetensors calls. One metadata key, sorted, without paths or dates."""
    data = vae.LatentDataset(cache)
    shards = [safetensors.torch.load_file(path) for path in sorted(cache.glob("*.safetensors"))]
    assert {t[name].dtype for t in shards for name in t} == {torch.float16, torch.int64}
    for name, values in {"latents": data.batch(range(14))[0], "labels": data.labels,
                         "latents_flip": data.batch(range(14), True)[0]}.items():
        assert torch.equal(torch.cat([t[name] for t in shards]), values)
    with safetensors.safe_open(shards_of(cache)[1], "np") as file:
        metadata = file.metadata()
    settings = json.loads(metadata["nanojlt"])
    assert metadata == {"nanojlt": json.dumps(settings, sort_keys=True)}
    facts = [settings[name] for name in ("shard", "shards", "images", "flip", "classes", "size")]
    assert facts == [1, 4, 14, True, ["cat", "dog"], 16] and str(cache.parent) not in str(metadata)


@pytest.mark.parametrize("dtype, labels", [
    (torch.float32, torch.int32), (torch.float16, torch.int64), (torch.bfloat16, torch.int32)])
def test_caches_of_others_are_read_and_trained_on(dtype, labels, tmp_path, refused):
    """In several types, with mirrored latents in all their shards or not."""
    (x, mirrored), y = torch.randn(2, 6, 3, 4, 4).to(dtype), torch.arange(6).to(labels)
    one, two = ({"latents": x[part].clone(), "labels": y[part].clone(),
                 "latents_flip": mirrored[part].clone()} for part in (slice(4), slice(4, 6)))
    data = theirs(tmp_path, one, two)
    found, found_y = data.batch([5, 1, 3], [True, False, True])
    assert torch.equal(found, torch.stack([mirrored[5], x[1], mirrored[3]]))
    assert found_y.tolist() == [5, 1, 3] and data.num_classes == 6
    assert data.vae is data.class_names is data.size is None
    del two["latents_flip"]
    assert torch.equal(theirs(tmp_path, one, two).batch([3], True)[0], x[3:4])
    assert train.main(flags(tmp_path, tmp_path / "run", "--batch", 2, steps=1)) == 0
    refused(sample.main, ["--ckpt", tmp_path / "run" / "ema.safetensors"], "give --vae")


def test_latents_that_are_not_normalised_are_warned_of(tmp_path, capsys):
    labels, x = torch.zeros(64).long(), torch.randn(64, 4, 4, 4)
    for mean, std, warns in ((0.1, 0.9, 0), (0, 5, 1), (2, 1, 1), (0, 0.1, 1)):
        check_latents(theirs(tmp_path, {"latents": x * std + mean, "labels": labels}))
        assert capsys.readouterr().out.count("warning") == warns
    with pytest.raises(BadInput, match="not finite"):
        check_latents(theirs(tmp_path, {"latents": x * torch.nan, "labels": labels}))


def test_a_caches_maps_are_read_only_and_one_a_shard(cache, monkeypatch):
    """A map that could be written to, or one a tensor, is memory that every rank has to be granted:
    of ImageNet's latents 168 GB."""
    memmap, data = mock.Mock(wraps=np.memmap), vae.LatentDataset(cache)
    monkeypatch.setattr(np, "memmap", memmap)
    for flip in (False, True, np.arange(14) % 2 == 0):
        data.batch(range(14), flip)
    assert memmap.mock_calls == [mock.call(path, np.uint8, "r") for path in shards_of(cache)]
    for tables in data.rows.maps.values():
        for table in tables.values():
            with pytest.raises(ValueError, match="read-only"):
                table[0, 0] = 0


def test_a_shard_that_is_damaged_or_gone_is_named_and_made_anew(images, cache, refused):
    paths, wanted = shards_of(cache), [path.read_bytes() for path in shards_of(cache)]
    paths[2].write_bytes(wanted[2][:-9])
    for command in (lambda _: write(images, cache), lambda _: train.main(flags(cache, images))):
        refused(command, [], paths[2].name, "delete it")
    for path, said in ((paths[2], "3 of 4 shards: finish the cache"), (paths[3], "2 of 4 shards")):
        path.unlink()
        refused(train.main, flags(cache, cache / "run"), said)
    assert write(images, cache) == 0
    assert [path.read_bytes() for path in paths] == wanted


@pytest.mark.parametrize("change, said", [
    ({"labels": torch.tensor([0, 0, 0, 2])}, "not from 0 to 1"),
    ({"labels": torch.zeros(3).long()}, "not a whole shard"),
    ({"latents_flip": torch.zeros(4, 3, 8, 8).half()}, "not a whole shard"),
    (dict.fromkeys(["latents", "latents_flip"], torch.zeros(4, 3, 8, 8)), "not one cache"),
    (None, "another program"), ({"size": 32}, "another size"), ({"shard": 1}, "4 of 4 shards")])
def test_shards_that_are_not_of_one_cache_are_refused(cache, change, said):
    path = shards_of(cache)[2]
    tensors, (_, settings) = safetensors.torch.load_file(path), lib.cache.read_header(path)
    (settings if {"size", "shard"} & set(change or {}) else tensors).update(change or {})
    metadata = {"nanojlt": json.dumps(settings)} if change else None
    safetensors.torch.save_file({name: t.clone() for name, t in tensors.items()}, path, metadata)
    with pytest.raises(BadInput, match=said):
        vae.LatentDataset(cache)


def test_unreadable_images_are_listed_left_out_and_tried_again(images, tmp_path, capsys):
    """That, too, is how a cache is mended which was written while the images' disk was away."""
    out, names = tmp_path / "cache", ("cat/01.png", "cat/05.png", "dog/00.png")
    data = {name: (images / name).read_bytes() for name in names}
    for name, size in zip(names, (60, 0, 3)):
        (images / name).write_bytes(data[name][:size])
    Image.new("RGB", (1, 101)).save(images / names[1])  # its other side would grow without bound
    assert write(images, out) == 0
    assert capsys.readouterr().err.count("warning: left out: ") == 3
    left = [lib.cache.read_header(path)[1]["unreadable"] for path in shards_of(out)]
    assert left == [["cat/01.png"], ["cat/05.png", "dog/00.png"], [], []]

    def rewritten():
        """Which shards the same command writes again, and how many images there are then."""
        before = [path.stat().st_mtime_ns for path in shards_of(out)]
        assert write(images, out) == 0
        after = [path.stat().st_mtime_ns for path in shards_of(out)]
        return [a != b for a, b in zip(after, before)], len(vae.LatentDataset(out))
    assert rewritten() == ([False] * 4, 11)
    (images / names[1]).write_bytes(data[names[1]])
    assert rewritten() == ([False, True, False, False], 12)


def test_a_disk_that_fails_makes_no_image_unreadable(images, monkeypatch):
    for name, error in ("lib.images.open_image", MemoryError), ("pathlib.Path.read_bytes", OSError):
        monkeypatch.setattr(name, mock.Mock(side_effect=error))
        with pytest.raises(error):
            read_picture(images / "dog" / "04.png")


def test_images_that_vanish_end_the_program_and_leave_whole_shards(images, tmp_path, refused):
    out, listing, lost = tmp_path / "cache", list_images(images), images / "dog" / "04.png"
    data = lost.read_bytes()
    lost.unlink()
    refused(lambda _: write(images, out, listing=listing), [], "04.png", code=1)
    assert [path.stem[-5:] for path in shards_of(out)] == ["00000", "00001"]
    lost.write_bytes(data)
    assert write(images, out) == 0 and len(vae.LatentDataset(out)) == 14


# -------------------------------------------------------------------------------------------------
# Checkpoints, runs, samples, statistics

@pytest.mark.parametrize("predicts_v, target, other", [(True, "v", "x"), (False, "x", "v")])
def test_the_published_checkpoint_says_what_it_predicts(
        predicts_v, target, other, tmp_path, refused):
    path, weights = tmp_path / "checkpoint-last.pth", tiny_net(bottleneck=0).state_dict()
    saved = {"model": weights, "model_ema1": weights,
             "model_ema2": {f"net.{name}": value * 2 for name, value in weights.items()},
             "args": argparse.Namespace(img_size=128, flow_matching=predicts_v)}
    torch.save(saved, path)
    refused(sample.main, ["--ckpt", path, "--target", other], f"of that network is {target}")
    denoiser, name = load_denoiser(path, "ema2", target=target), "x_embedder.proj.weight"
    assert torch.equal(denoiser.net.state_dict()[name], weights[name] * 2)
    facts = [denoiser.settings[name] for name in ("target", "size", "input_size", "cfg")]
    assert facts == [target, 128, 8, 2.9] and denoiser.settings["vae"]["kind"] == "flux2"
    del saved["args"].flow_matching
    torch.save(saved, path)
    refused(sample.main, ["--ckpt", path], "give --target")


def test_a_run_and_a_cache_of_an_older_version_continue(run, finished, cache):
    """It called warmup_epochs warmup and vae_path hint."""
    (run / "last.safetensors").unlink()
    tensors, settings = read_checkpoint(run / "previous.safetensors")
    old = {"warmup": settings.pop("warmup_epochs"), "hint": "/a"}
    del settings["vae_path"]
    save_checkpoint(run / "previous.safetensors", tensors, settings | old)
    assert load_denoiser(run / "previous.safetensors").settings["vae_path"] == "/a"
    assert train.main(flags(finished[0], run)) == 0
    same_run(finished[1], run)
    for text, path in [('{"hint": "/a"}', "/a"), ('{"path": "/b"}', "/b"), ("[", None)]:
        (cache / "source.json").write_text(text)
        assert vae.LatentDataset(cache).vae_path == path


def test_fine_tuning_keeps_the_labels_of_the_same_classes_only(tmp_path):
    labels = save_tiny(tmp_path / "a.safetensors")[1].y_embedder.embedding_table.weight
    for names, kept in ((list("abcde"), True), (None, True), (list("abcdx"), False)):
        net = load_init(tmp_path / "a.safetensors", tiny_net(), "x", names)
        assert torch.equal(net.y_embedder.embedding_table.weight, labels) == kept


def test_a_damaged_last_is_set_aside_and_previous_continued(run, finished, capsys):
    last, previous = run / "last.safetensors", run / "previous.safetensors"
    step4, half = previous.read_bytes(), last.read_bytes()[:last.stat().st_size // 2]
    last.write_bytes(half)
    assert train.main(flags(finished[0], run)) == 0
    assert "at step 4" in capsys.readouterr().out
    same_run(finished[1], run)
    assert (run / "last.damaged").read_bytes() == half  # not moved over the whole one
    assert previous.read_bytes() == step4
    last.unlink()  # as if killed between the two renames
    assert train.main(flags(finished[0], run)) == 0
    same_run(finished[1], run)


@pytest.mark.parametrize("spoil, said", [
    (lambda path: path.write_bytes(b"rubbish"), "its checkpoints are damaged"),
    (lambda path: save_checkpoint(path, {"a": torch.ones(1)}, {}), "its checkpoints are damaged"),
    (lambda path: shutil.copy(path.with_name("ema.safetensors"), path), "does not fit")])
def test_checkpoints_that_cannot_be_continued(spoil, said, run, finished, refused):
    for name in ("last", "previous"):
        spoil(run / f"{name}.safetensors")
    before = sorted(os.listdir(run))
    refused(train.main, flags(finished[0], run), said)
    assert sorted(os.listdir(run)) == before


def test_a_logs_torn_last_line_is_written_again(run, finished):
    (run / "last.safetensors").unlink()  # which leaves step 4
    with open(run / "log.csv", "rb+") as file:
        file.truncate(file.seek(0, os.SEEK_END) - 40)
    assert train.main(flags(finished[0], run)) == 0
    same_run(finished[1], run)


def test_a_log_of_another_kind_is_left_alone(run, finished, refused):
    (run / "last.safetensors").unlink()
    for text in ("a,b\n1,2\n", "\x00" * 50, "step,loss\n1," + "9" * 200_000):
        (run / "log.csv").write_text(text)
        refused(train.main, flags(finished[0], run), "log.csv", "move it away")
        assert (run / "log.csv").read_text() == text


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
        return sample.main([*command, *more]), [list(call.args[2]) for call in
                                                generate.call_args_list]
    return draw


def pixels_of(folder):
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])


def test_folder_npz_and_grid_hold_the_same_pictures(draw, tmp_path):
    assert draw("folder")[0] == draw("all.NPZ")[0] == draw("grid.png")[0] == 0
    assert sorted(os.listdir(".")) == ["a.safetensors", "all.NPZ", "folder", "grid.png"]
    ((name, pixels),) = np.load("all.NPZ").items()  # as the guided-diffusion evaluator wants it
    assert name == "arr_0" and pixels.dtype == np.uint8 and pixels.shape == (7, 8, 8, 3)
    assert np.array_equal(pixels_of(tmp_path / "folder"), pixels)
    grid = np.asarray(Image.open("grid.png")).astype(int)
    assert grid.shape == (40 + 2 * 100, 4 + 5 * 100, 3)
    for i in range(7):
        top, left = 40 + i // 5 * 100, 4 + i % 5 * 100
        tile = grid[top:top + 96:12, left:left + 96:12]  # shown 12 times as large
        assert np.abs(tile - pixels[i]).max() <= 1  # another batch may round otherwise


def test_a_folder_of_pictures_is_continued_where_it_was_interrupted(draw, tmp_path):
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


def test_a_folder_of_pictures_drawn_otherwise_is_refused(draw, refused):
    draw("folder")
    for other in ("--seed 1", "--cfg 2", "--steps 4", "--weights model", "--classes a b",
                  "--method euler", "--interval 0,1", "--t-eps 0.1", "--precision bf16"):
        refused(lambda argv: draw("folder", *argv)[0], other.split(), "other settings")


def test_statistics_of_others_are_read_where_they_can_be_right(tmp_path):
    """ADM's file has more in it, and says nothing of its images' size."""
    path, right = tmp_path / "adm.npz", dict(mu=np.arange(16.0), sigma=np.diag(np.arange(16.0)))
    np.savez_compressed(path, **right, mu_s=np.zeros(9), arr_0=RGB)
    adm = read_statistics(path, 16)
    assert np.array_equal(adm.mu, right["mu"]) and np.array_equal(adm.sigma, right["sigma"])
    assert str(adm) == f"reference {adm.hash} (size unknown, count unknown, crop unknown)"
    adm.check_size("256x256")
    for wrong in (dict(mu=np.zeros(8)), dict(mu=np.full(16, np.nan)), dict(sigma=-np.eye(16)),
                  dict(meta="{"), dict(meta='{"hash": "0"}')):
        np.savez(path, **right | wrong)
        with pytest.raises(BadInput, match="adm.npz"):
            read_statistics(path, 16)


def test_images_folders_and_npz_files_score_alike(images, tmp_path, small_inception, capsys):
    """Also packed, as some write it, and whatever the batch. Our own statistics: distance 0."""
    def run(*argv):
        assert fid.main([str(part) for part in argv]) == 0
        return capsys.readouterr().out.split("\nFID-14 ")
    (images / ".a.png").write_text("hidden, and no image")
    array = np.stack([np.asarray(open_image(images / path)) for path, _ in list_images(images)[1]])
    np.savez(tmp_path / "plain.npz", arr_0=array)
    np.savez_compressed(tmp_path / "packed.npz", arr_0=array)
    ref, own, scores = small_reference(tmp_path / "ref.npz"), tmp_path / "own.npz", []
    for source, batch in itertools.product(("images", "plain.npz", "packed.npz"), (1, 5, 64)):
        kind = "--npz" if "npz" in source else "--images"
        score = run(kind, tmp_path / source, "--ref", ref, "--batch", batch)[1].split()
        scores.append([float(score[0]), float(score[2])])
    np.testing.assert_allclose(scores, [scores[0]] * 9, rtol=1e-5)
    digest = run("--images", images, "--save-ref", own, "--size", 6)[0].split("reference ")[-1][:12]
    said, score = run("--images", images, "--ref", own, "--size", 6)
    assert f"reference {digest} (size 6x6, count 14, crop center)" in said
    assert abs(float(score.split()[0])) < 1e-3 and "does not compare with FID-50K" in said
    fid.load_judges(["fid"])["fid"].fc.weight.data.zero_()  # as files without the classifier have
    assert "IS n/a" in run("--images", images, "--ref", ref)[1]


def test_a_codec_is_judged_by_the_images_that_it_gives_back(
        images, tmp_path, small_inception, monkeypatch, capsys, refused):
    def run(*argv):
        assert fid.main([str(part) for part in argv]) == 0
        return capsys.readouterr().out.split("\nFID-14 ")[1]
    ref, array = small_reference(tmp_path / "ref.npz"), read_all(images, 6).permute(0, 2, 3, 1)
    np.savez(tmp_path / "negative.npz", arr_0=255 - array.numpy())
    monkeypatch.setattr(vae.Pixels, "decode", lambda self, z: -z)
    there_and_back = run("--images", images, "--size", 6, "--ref", ref, "--vae", "pixels")
    assert "'vae': 'pixels'" in there_and_back
    negative = run("--npz", tmp_path / "negative.npz", "--ref", ref)
    assert there_and_back.split()[:3] == negative.split()[:3]
    monkeypatch.setattr(vae.Pixels, "stride", 4)
    command = ["--images", str(images), "--size", "6", "--vae", "pixels", "--ref", str(ref)]
    refused(fid.main, command, "--vae: 6x6 pixels, expected multiples of 4")
    refused(fid.main, [*command[:-2], "--save-ref", "new.npz"], "without --vae")
    np.savez(tmp_path / "turned.npz", arr_0=np.asfortranarray(array.numpy()))
    refused(fid.main, ["--npz", tmp_path / "turned.npz", "--ref", ref], "row by row")


# -------------------------------------------------------------------------------------------------
# Damage, and full disks

DAMAGE = {
    "empty": lambda data: b"",
    "cut in the middle": lambda data: data[:len(data) // 2],
    "cut at the end": lambda data: data[:-1],
    "a page of HTML": lambda data: b"<html>404 Not Found</html>" * 50,
    "zeros": lambda data: bytes(len(data)),  # as a crash leaves it on some file systems
    "noise": lambda data: np.random.default_rng(0).bytes(len(data)),
    "an empty zip": lambda data: b"PK\5\6" + bytes(18),
    "another safetensors": lambda data: safetensors.torch.save({"a": torch.zeros(9)}),
    "another pickle": lambda data: pickle.dumps([1, 2], protocol=2)}
SHARD = "latents_rank00_shard00000.safetensors"
FILES = {  # how each kind is written and read
    SHARD: (lambda path: shutil.copy(small_cache(path.parent, n=4) / SHARD, path),
            lambda path: vae.LatentDataset(path.parent)),
    "a.safetensors": (save_tiny, load_denoiser),
    "plain.safetensors": (lambda path: safetensors.torch.save_file(tiny_net().state_dict(), path),
                          lambda path: load_denoiser(path, target="x", input_size=8)),
    "plain.pth": (lambda path: torch.save(tiny_net().state_dict(), path),
                  lambda path: load_denoiser(path, target="x", input_size=8)),
    "ref.npz": (small_reference, lambda path: read_statistics(path, 16)),
    "samples.npz": (lambda path: np.savez(path, arr_0=np.zeros((99, 8, 8, 3), np.uint8)),
                    lambda path: list(image_rows(path, range(99)))),
    "latents_stats.pt": (lambda path: torch.save({"mean": torch.ones(3), "std": torch.ones(3)},
                                                 path), lambda path: lib.cache.read_stats(path, 3)),
    "inception.pth": (lambda path: torch.save({}, path), load_inception)}  # the whole is 95 MB


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_damaged_files_are_refused_by_name(name, kind, tmp_path):
    path, (write, read) = tmp_path / name, FILES[name]
    write(path)
    if name != "inception.pth":
        read(path)
    path.write_bytes(DAMAGE[kind](path.read_bytes()))
    with pytest.raises(BadInput, match=name) as error:
        read(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_no_file_is_run_as_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)
    evil = Evil()
    for name, data in {"plain.pth": {"model": evil}, "args.pth": {"model": {}, "args": evil},
                       "inception.pth": evil, "latents_stats.pt": evil}.items():
        torch.save(data, tmp_path / name)
    (tmp_path / "old.pth").write_bytes(pickle.dumps(evil, protocol=2))
    for name in ("ref.npz", "samples.npz"):
        np.savez(tmp_path / name, mu=[evil], sigma=np.eye(16), arr_0=[evil])
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


def test_a_full_disk_leaves_whole_shards(images, tmp_path, refused):
    out = tmp_path / "cache"
    with largest_file(9000):
        refused(lambda _: write(images, out), [], "shard00000", "cannot be written", code=1)
    assert not shards_of(out) and not list(out.glob(".tmp*")) and write(images, out) == 0


@pytest.mark.parametrize("out, size", [("folder", 100), ("all.npz", 500), ("grid.png", 1000)])
def test_a_full_disk_leaves_no_half_samples(out, size, draw, tmp_path, refused):
    with largest_file(size):
        refused(lambda _: draw(out)[0], [], code=1)
    assert not [path for path in tmp_path.rglob("*.[pn][np][gz]") if path.name[0] != "."]
    assert draw(out)[0] == 0
