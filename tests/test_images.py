"""Image files of every sort: what is read from them, and that a folder is accounted for in full."""
import io
import os
import struct

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

import lib.images
from lib.images import FORMATS, draw_digits, image_files, list_images, open_image, read_image
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
    return np.asarray(open_image(data))                     # (H, W, 3)


def grey(values):
    return np.asarray(values)[..., None].repeat(3, 2)


@pytest.mark.parametrize("pixels, format, expected", [
    (RGB, "PNG", RGB),
    (GREY, "PNG", grey(GREY)),
    (np.dstack([RGB, GREY]), "PNG", 255 + (RGB - 255.0) * grey(GREY / 255)),  # alpha, on white
    (Image.fromarray(RGB).quantize(256), "GIF", RGB),
    (DEEP, "PNG", grey(DEEP / 257)),
    (Image.frombytes("I;16B", DEEP.shape[::-1], DEEP.astype(">u2").tobytes()), "TIFF",
     grey(DEEP / 257)),
    (Image.new("CMYK", (9, 9), (0, 255, 255, 0)), "JPEG", np.full((9, 9, 3), [254, 1, 1])),
    pytest.param(Image.new("RGB", (9, 9), (200, 30, 10)), "AVIF", np.full((9, 9, 3), [200, 30, 10]),
                 marks=pytest.mark.skipif("AVIF" not in FORMATS, reason="not in this Pillow"))])
def test_images_look_as_in_a_viewer(pixels, format, expected):
    seen = opened(encoded(pixels, format, quality=100)).astype(float)
    assert seen.shape == expected.shape and np.abs(seen - expected).max() <= 3


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("data, words", [
    (encoded(Image.new("RGB", (1, 101))), "1x101"),
    (encoded(RGB, "JPEG")[:-30], "truncated"),
    (encoded(Image.new("1", (20_000, 10_000))), "DecompressionBomb"),
    (b"<!DOCTYPE html>", "<!DOC"),
    (encoded(np.array([[0, 70000]], np.int32), "TIFF"), "32-bit integers from 0 to 70000"),
    (b"MM\0*\0\0\0\x08\0\0", "of a kind that Pillow reads"),
    (encoded(np.array([[-0.5, 1.5]], np.float32), "TIFF"), "floats from -0.5 to 1.5")], ids=len)
def test_images_that_cannot_be_read_are_left_out_with_a_reason(data, words, tmp_path):
    (tmp_path / "a.png").write_bytes(data)
    image, reason = read_image(tmp_path / "a.png", 8)
    assert image is None and words in reason and "BytesIO" not in reason
    with pytest.raises(OSError):  # a failing disk is no reason
        read_image(tmp_path / "gone.png", 8)


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_images_are_turned_as_their_exif_says(format):
    for orientation, expected in {
            1: RGB, 2: RGB[:, ::-1], 3: RGB[::-1, ::-1], 4: RGB[::-1], 5: RGB.transpose(1, 0, 2),
            6: np.rot90(RGB, -1), 7: np.rot90(RGB, 2).transpose(1, 0, 2), 8: np.rot90(RGB),
            9: RGB}.items():
        tags = Image.Exif()
        tags[0x0112] = orientation
        seen = opened(encoded(RGB, format, exif=tags, lossless=True))
        assert np.array_equal(seen, expected), orientation


def test_malformed_metadata_is_ignored():
    """But for the orientation, where it can be made out."""
    turned = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)  # of type short, one value: 6
    letters = struct.pack(">HHI4s", 0x011A, 2, 4, b"abc\0")  # a resolution
    exif = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 2) + turned + letters + bytes(4)
    for format in "JPEG", "PNG":
        assert opened(encoded(RGB, format, exif=exif)).shape == (5, 6, 3)
        assert opened(encoded(RGB, format, exif=b"Exif\0\0rubbish")).shape == (6, 5, 3)
    png = encoded(RGB, icc_profile=RANDOM.bytes(1_500_000))  # more than Pillow reads
    assert np.array_equal(opened(png), RGB)
    png = png[:33] + b"\0\0\0\7pHYsrubbish\0\0\0\0" + png[33:]  # with a wrong checksum
    assert np.array_equal(opened(png), RGB)
    png = encoded(RGB, exif=exif)
    at = png.index(b"eXIf") + 20
    assert np.array_equal(opened(png[:at] + b"?" + png[at + 1:]), RGB)  # another wrong checksum


def test_pngs_of_imagemagick_are_turned():
    """It writes the EXIF block into a text, as hexadecimal numbers."""
    tags, text = Image.Exif(), PngImagePlugin.PngInfo()
    tags[0x0112] = 3
    block = tags.tobytes()
    text.add_text("Raw profile type exif", f"\nexif\n{len(block):8d}\n{block.hex()}\n", zip=True)
    assert np.array_equal(opened(encoded(RGB, pnginfo=text)), RGB[::-1, ::-1])


def test_12_bit_data_in_16_bits_is_dark_and_warned_of_once(monkeypatch, capsys):
    monkeypatch.setattr(lib.images, "dark_images", [])
    opened(encoded(np.full((1, 1), 4096, np.uint16)))  # needs 13 bits
    for name in "first", "second":
        seen = np.asarray(open_image(encoded(DEEP // 16), name))
        assert np.abs(seen - grey(DEEP / 16 / 257)).max() <= 1
    error = capsys.readouterr().err
    assert error.count("\n") == error.count("12-bit") == error.count("first:") == 1


# -------------------------------------------------------------------------------------------------
# A folder is accounted for in full

def make(root, *names):
    """Empty files, in whatever folders they need."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def test_images_are_listed_sorted_deep_and_visible(tmp_path):
    make(tmp_path, "b/2.JPG", "b/10.png", "a/deep/er/x.jpeg", "a/1.tiff", "b/.no.png", ".git/1.png",
         "@eaDir/1.png", "__MACOSX/a/1.png", "a/@eaDir/1.png")
    items = [("a/1.tiff", 0), ("a/deep/er/x.jpeg", 0), ("b/10.png", 1), ("b/2.JPG", 1)]
    assert list_images(tmp_path) == (["a", "b"], items)
    assert image_files(tmp_path)[0] == sorted(tmp_path / path for path, _ in items)


@pytest.mark.parametrize("link, target, found", [
    ("dog", "elsewhere/dog", ["dog/2.png"]), ("cat/more", "elsewhere", ["cat/more/dog/2.png"]),
    ("cat/deep/again", "images/cat", []), ("cat/root", "/", [])])
def test_links_are_followed_but_not_back(link, target, found, tmp_path, capsys):
    root = make(tmp_path, "images/cat/1.png", "images/cat/deep/3.png", "elsewhere/dog/2.png")
    (root / "images" / link).symlink_to(tmp_path / target)
    items = list_images(root / "images")[1]
    assert sorted(name for name, _ in items) == sorted(["cat/1.png", "cat/deep/3.png", *found])
    assert ("(a link to a folder listed already" in capsys.readouterr().out) == (not found)


def test_no_image_is_listed_twice_however_folders_link_to_each_other(tmp_path):
    folders = [tmp_path / "images" / "a" / name for name in "bcdefghij"]
    make(tmp_path, "pool/x/1.png", "pool/y/1.png", *(folder / "1.png" for folder in folders))
    for folder in folders:
        for other in folders:  # the number of ways through them is that of permutations
            (folder / f"a-{other.name}").symlink_to(other)
    for link in "x", "y", "":
        (tmp_path / "images" / "a" / f"a-pool{link}").symlink_to(tmp_path / "pool" / link)
    (folders[0] / "up").symlink_to(tmp_path)
    names = [name for name, _ in list_images(tmp_path / "images")[1]]
    assert names == sorted([f"a/{name}/1.png" for name in "bcdefghij"]
                           + ["a/a-pool/x/1.png", "a/a-pool/y/1.png"])
    assert len(image_files(tmp_path / "images")[0]) == 11


@pytest.mark.parametrize("link, target, words", [
    ("dog", "cat", "would be in two classes, cat and dog"),
    ("cat/dogs", "dog/deep", "would be in two classes, cat and dog"),
    ("all", "", "a link to a folder above it")])
def test_links_that_put_a_folder_into_two_classes_are_refused(link, target, words, tmp_path):
    make(tmp_path, "cat/1.png", "dog/deep/2.png" if "deep" in target else "cat/2.png")
    (tmp_path / link).symlink_to(tmp_path / target)
    with pytest.raises(BadInput, match=words):
        list_images(tmp_path)


@pytest.mark.parametrize("link", ["cat/2.png", "dog", "cat/self"])
def test_a_link_that_leads_nowhere_ends_the_listing(link, tmp_path):
    make(tmp_path, "cat/1.png")
    (tmp_path / link).symlink_to(tmp_path / "cat" / "self")
    with pytest.raises(BadInput, match=f"{link}: a link that leads nowhere"):
        list_images(tmp_path)


def test_an_unreadable_folder_ends_the_listing(tmp_path, monkeypatch):
    make(tmp_path, "cat/1.png", "cat/deep/2.png", "dog/1.png")
    scandir = os.scandir  # the tests may run as root, who can read everything
    monkeypatch.setattr(os, "scandir", lambda path: scandir(
        "/no/such/folder" if os.path.basename(path) == "deep" else path))
    with pytest.raises(BadInput, match="cat/deep: .*not readable"):
        list_images(tmp_path)


def test_classes_and_what_is_not_taken_are_logged(tmp_path, capsys):
    many = [f"n{i:04d}/1.png" for i in range(50)]
    list_images(make(tmp_path, "cat/1.png", "cat/2.heic", "cat/deep/3.HEIC", "loose.png", *many))
    printed = capsys.readouterr().out
    for fact in "51 images", "51 classes", "cat (1)", "n0000 (1)", "n0049 (1)", "2 .heic", "1 .png":
        assert fact in printed
    assert "n0020" not in printed  # of so many classes only some are named


@pytest.mark.parametrize("files, warned", [
    (["train/cat/1.png", "train/dog/1.png", "val/cat/1.png", "val/dog/1.png"], True),
    (["cat/1.png", "cat/a/1.png", "cat/b/1.png"], False), (["cat/images/1.png"], False)])
def test_classes_within_classes_are_warned_of(files, warned, tmp_path, capsys):
    list_images(make(tmp_path, *files))
    assert (f"{tmp_path}/train" in capsys.readouterr().err) == warned


@pytest.mark.parametrize("file, words", [
    ("dog/deep/2.heic", "dog: .*1 .heic"), (".git/1.png", "no class folders.*1 .png outside")])
def test_a_folder_without_images_says_what_it_holds(file, words, tmp_path):
    make(tmp_path, "loose.png", file)
    with pytest.raises(BadInput, match=words):
        list_images(tmp_path)


def test_digits_are_a_function_of_the_seed(tmp_path):
    first, same, other = (
        [path.read_bytes() for path in image_files(draw_digits(tmp_path / name, 2, seed))[0]]
        for name, seed in (("a", 3), ("b", 3), ("c", 4)))
    assert len(first) == 20 and first == same != other
