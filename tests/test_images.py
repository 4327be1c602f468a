"""Image files of every sort: what is read from them, and that a folder is accounted for in full."""
import concurrent.futures
import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import lib.images
from lib.images import (
    FORMATS,
    draw_digits,
    folder_images,
    image_files,
    image_grid,
    list_images,
    open_image,
    read_image,
)
from lib.run import BadInput

RANDOM = np.random.default_rng(0)
RGB, GREY = RANDOM.integers(0, 256, (6, 5, 3), np.uint8), RANDOM.integers(0, 256, (6, 5), np.uint8)
DEEP = RANDOM.integers(0, 65536, (6, 5), np.uint16)


def encoded(pixels, format="PNG", **options) -> bytes:
    file = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(file, format, **options)
    return file.getvalue()


def opened(data):
    return np.asarray(open_image(io.BytesIO(data)))                     # (H, W, 3)


def grey(values):
    return np.asarray(values)[..., None].repeat(3, 2)


@pytest.mark.parametrize("pixels, format, expected", [
    (RGB, "PNG", RGB), (GREY, "PNG", grey(GREY)), (GREY > 99, "PNG", 255 * grey(GREY > 99)),
    (np.dstack([RGB, GREY]), "PNG", 255 + (RGB - 255.0) * grey(GREY / 255)),  # alpha, on white
    (Image.fromarray(RGB).quantize(256), "GIF", RGB),
    (DEEP, "PNG", grey(DEEP / 257)), (DEEP, "TIFF", grey(DEEP / 257)),
    (Image.new("CMYK", (9, 9), (0, 255, 255, 0)), "JPEG", np.full((9, 9, 3), [254, 1, 1])),
    pytest.param(Image.new("RGB", (9, 9), (200, 30, 10)), "AVIF", np.full((9, 9, 3), [200, 30, 10]),
                 marks=pytest.mark.skipif("AVIF" not in FORMATS, reason="not in this Pillow"))])
def test_images_look_as_in_a_viewer(pixels, format, expected):
    seen = opened(encoded(pixels, format, quality=100)).astype(float)
    assert seen.shape == expected.shape and np.abs(seen - expected).max() <= 3


@pytest.mark.parametrize("data, words", [
    (encoded(Image.new("RGB", (1, 101))), "1x101"), (encoded(RGB, "JPEG")[:-30], "truncated"),
    (encoded(Image.new("1", (20_000, 10_000))), "DecompressionBomb"), (b"<!DOCTYPE html>", "<!DOC"),
    (encoded(np.array([[0, 70000]], np.int32), "TIFF"), "32-bit integers from 0 to 70000"),
    (encoded(np.array([[-0.5, 1.5]], np.float32), "TIFF"), "floats from -0.5 to 1.5")], ids=len)
def test_images_that_cannot_be_read_are_left_out_with_a_reason(data, words, tmp_path):
    (tmp_path / "a.png").write_bytes(data)
    image, reason = read_image(tmp_path / "a.png", 8)
    assert image is None and words in reason and "BytesIO" not in reason
    with pytest.raises(OSError):  # a failing disk is no reason
        read_image(tmp_path / "gone.png", 8)


# -------------------------------------------------------------------------------------------------
# Metadata must not decide whether pixels are read

def test_images_are_turned_as_their_exif_says():
    for orientation, expected in {
            1: RGB, 2: RGB[:, ::-1], 3: RGB[::-1, ::-1], 4: RGB[::-1], 5: RGB.transpose(1, 0, 2),
            6: np.rot90(RGB, -1), 7: np.rot90(RGB, 2).transpose(1, 0, 2), 8: np.rot90(RGB),
            9: RGB}.items():
        tags = Image.Exif()
        tags[0x0112] = orientation
        for format in "PNG", "TIFF", "WEBP":
            seen = opened(encoded(RGB, format, exif=tags, lossless=True))
            assert np.array_equal(seen, expected), (orientation, format)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_malformed_exif_is_ignored(format):
    turned = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)  # of type short, one value: 6
    letters = struct.pack(">HHI4s", 0x011A, 2, 4, b"abc\0")  # a resolution
    block = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 2) + turned + letters + bytes(4)
    assert opened(encoded(RGB, format, exif=block)).shape == (5, 6, 3)
    assert opened(encoded(RGB, format, exif=b"Exif\0\0rubbish")).shape == (6, 5, 3)


def test_a_png_may_hold_a_large_profile_and_texts():
    texts = PngInfo()
    texts.add_text("a", "b" * 3_000_000, zip=True)
    texts.add_itxt("a", "b" * 3_000_000, zip=True)
    data = encoded(RGB, icc_profile=RANDOM.bytes(1_500_000), pnginfo=texts)
    assert np.array_equal(opened(data), RGB)


def png_of_16_bit_colours(values):
    """Pillow writes none."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for kind, content in (b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""):
        checksum = zlib.crc32(kind + content)
        data += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)
    return data


@pytest.mark.parametrize("data, expected", [
    (encoded(DEEP // 16), grey(DEEP / 16 / 257)),
    (encoded(DEEP // 16, "TIFF"), grey(DEEP / 16 / 257)),
    (png_of_16_bit_colours(16.0 * RGB), RGB / 16)], ids=["grey", "TIFF", "colours"])
def test_12_bit_data_in_16_bits_is_dark_and_warned_of_once(data, expected, monkeypatch, capsys):
    monkeypatch.setattr(lib.images, "dark_images", [])
    for name in "first", "second":
        seen = np.asarray(open_image(io.BytesIO(data), name))
        assert np.abs(seen - expected).max() <= 1
    error = capsys.readouterr().err
    assert error.count("\n") == error.count("12-bit") == error.count("first:") == 1


# -------------------------------------------------------------------------------------------------
# A folder is accounted for in full

def make(root, *names):
    """Files that are images if their suffix says so, folders where a name ends in a slash."""
    for name in names:
        path = root / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() in lib.images.SUFFIXES:
            path.write_bytes(encoded(RGB))
        elif not name.endswith("/"):
            path.touch()
    return root


def test_images_are_listed_sorted_deep_and_visible(tmp_path):
    make(tmp_path, "b/2.JPG", "b/10.png", "a/deep/er/x.jpeg", "a/1.tiff", "b/.no.png", ".git/1.png",
         "@eaDir/1.png", "__MACOSX/a/1.png", "a/@eaDir/1.png")
    items = [("a/1.tiff", 0), ("a/deep/er/x.jpeg", 0), ("b/10.png", 1), ("b/2.JPG", 1)]
    assert list_images(tmp_path) == (["a", "b"], items)
    assert image_files(tmp_path)[0] == sorted(tmp_path / path for path, _ in items)


@pytest.mark.parametrize("link, target, found", [
    ("dog", "elsewhere/dog", ["dog/2.png"]), ("cat/more", "elsewhere", ["cat/more/dog/2.png"]),
    ("cat/linked.png", "elsewhere/dog/2.png", ["cat/linked.png"]),
    ("cat/again", "images/cat", []), ("cat/deep/all", "images", []), ("cat/root", "/", [])])
def test_links_are_followed_but_not_back(link, target, found, tmp_path, capsys):
    root = make(tmp_path, "images/cat/1.png", "images/cat/deep/3.png", "elsewhere/dog/2.png")
    (root / "images" / link).symlink_to(tmp_path / target)
    items = list_images(root / "images")[1]
    assert sorted(name for name, _ in items) == sorted(["cat/1.png", "cat/deep/3.png", *found])
    assert ("(a link to a folder above it)" in capsys.readouterr().out) == (not found)


@pytest.mark.parametrize("name", [".", "cat", "cat/deep"])
def test_an_unreadable_folder_ends_the_listing(name, tmp_path, monkeypatch):
    make(tmp_path, "cat/1.png", "cat/deep/2.png", "dog/1.png")
    scandir = os.scandir  # the tests may run as root, who can read everything

    def fail_in_one_folder(path):
        if os.path.abspath(path) == os.path.abspath(tmp_path / name):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", fail_in_one_folder)
    for walk in list_images, image_files:
        with pytest.raises(BadInput, match=f"{tmp_path / name}: .*denied"):
            walk(tmp_path)


@pytest.mark.parametrize("files, words", [
    ([f"cat/{i}.HEIC" for i in range(40)] + ["cat/deep/1.xcf"], "not taken: 40 .heic, 1 .xcf\n"),
    (["cat/0123abcd", "cat/4567ef"], "not taken: 2 without a suffix\n"),
    (["loose.png"], "not taken: 1 .png outside the class folders\n"),
    ([f"n{i:04d}/1.png" for i in range(50)], "52 images of 51 classes: cat (2), n0000 (1), "),
    ([f"n{i:04d}/1.png" for i in range(50)], "..., n0047 (1), n0048 (1), n0049 (1)\n")])
def test_classes_and_what_is_not_taken_are_logged(files, words, tmp_path, capsys):
    list_images(make(tmp_path, "cat/1.png", "cat/2.png", *files))
    assert words in capsys.readouterr().out


@pytest.mark.parametrize("files, warned", [
    (["train/cat/1.png", "train/dog/1.png", "val/cat/1.png", "val/dog/1.png"], "train"),
    (["data/cat/1.png", "data/dog/1.png"], "data"),  # an unpacked archive
    (["cat/1.png", "cat/a/1.png", "cat/b/1.png"], ""), (["cat/images/1.png"], "")])
def test_classes_within_classes_are_warned_of(files, warned, tmp_path, capsys):
    list_images(make(tmp_path, *files))
    error = capsys.readouterr().err
    assert str(tmp_path / warned) in error if warned else not error


@pytest.mark.parametrize("files, words", [
    (["dog/"], "dog: .*nothing"), (["dog/1.heic", "dog/deep/2.heic"], "dog: .*2 .heic"),
    ([".git/"], "no class folders.*1 .png outside")])
def test_a_folder_without_images_says_what_it_holds(files, words, tmp_path):
    make(tmp_path, "loose.png", *files)
    with pytest.raises(BadInput, match=words):
        list_images(tmp_path)


# -------------------------------------------------------------------------------------------------
# Folders to be scored, digits, grids

def test_images_of_a_folder_are_read_evenly(tmp_path):
    for i in range(10):
        make(tmp_path, f"{i // 5}/")
        Image.new("RGB", (8, 6), (i, i, i)).save(tmp_path / str(i // 5) / f"{i}.png")
    number, size, batches = folder_images(tmp_path, None, 5, 2)
    indices, images = zip(*batches)
    assert (number, size) == (5, "8x6")
    assert list(map(list, indices)) == [[0, 1], [2, 3], [4]]
    assert torch.cat(images)[:, 0, 0, 0].tolist() == [0, 2, 4, 6, 8]
    assert folder_images(tmp_path, 4, None, 4)[:2] == (10, "4x4")
    with pytest.raises(BadInput, match="10 images found, 11 needed"):
        folder_images(tmp_path, 4, 11, 4)
    Image.new("RGB", (9, 6)).save(tmp_path / "1" / "9.png")
    with pytest.raises(BadInput, match="9.png.*--size"):
        list(folder_images(tmp_path, None, None, 2)[2])


def test_digits_are_a_function_of_the_seed_and_may_be_drawn_twice_at_once(tmp_path):
    def pixels(name, seed):
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: draw_digits(tmp_path / name, 2, seed), range(4)))
        return torch.stack([read_image(path)[0] for path in image_files(tmp_path / name)[0]])

    first = pixels("a", 3)
    assert first.shape == (20, 3, 32, 32)
    assert torch.equal(first, pixels("b", 3)) and not torch.equal(first, pixels("c", 4))
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "c"]  # nothing temporary is left
    (tmp_path / "d").mkdir()
    assert os.stat(tmp_path / "a").st_mode == os.stat(tmp_path / "d").st_mode


def test_a_grid_shows_images_row_by_row():
    images = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 3, 32, 32) * 50
    grid = np.asarray(image_grid(images, 2, ["a caption far too long for its column", 7], "title"))
    centres = [grid[40 + 48 + 100 * (i // 2), 4 + 48 + 100 * (i % 2)].tolist() for i in range(6)]
    assert centres == [[50 * i] * 3 for i in range(5)] + [[255] * 3]
    assert grid.shape == (40 + 3 * 100, 4 + 2 * 100, 3)
