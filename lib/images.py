"""Image files: reading, cropping and finding them; the demo's digits; grids of images."""
import collections
import contextlib
import io
import itertools
import math
import os
import pathlib
import tempfile

import numpy as np
import torch
from PIL import ExifTags, Image, ImageDraw, ImageFont, UnidentifiedImageError

from lib.files import prefetched
from lib.run import BadInput, barrier, cores, log, printable, rank, rank_batches, warn

Image.init()  # registers all formats now; threads opening the first images would see only some
EXTENSIONS = Image.registered_extensions()
FORMATS = [name for name in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")
           if name in EXTENSIONS.values()]  # AVIF depends on how Pillow was built
SUFFIXES = {suffix for suffix, name in EXTENSIONS.items() if name in FORMATS}

PNG = b"\x89PNG\r\n\x1a\n"  # how such a file starts
PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")  # the chunks that make the image

# How the names of hidden files and of system folders start.
HIDDEN = (".", "@eaDir", "@Recycle", "#recycle", "$RECYCLE.BIN", "__MACOSX", "lost+found")

TRANSPOSITIONS = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90}

dark_images = []  # the first image that looks like 12-bit data; only this one is warned of


def open_image(data: bytes, name="an image") -> Image.Image:
    """Read the content of an image file as a PIL image in RGB.

    The image is turned as its EXIF or XMP orientation says, transparency is laid on white, 16 bits
    (always 0 to 65535) are scaled to 8, and an animation gives its first frame. ICC profiles and
    all other metadata are ignored, as in ADM's and torchvision's loaders. Raises ValueError for
    32-bit integers and floats, whose range is unknown, and errors of many types for damaged files.
    """
    image, is_deep = decode(data)
    transposition = exif_transposition(image)
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        low, high = image.getextrema()
        kind = "floats" if image.mode == "F" else "signed or 32-bit integers"
        raise ValueError(f"{kind} from {low:g} to {high:g}, whose black and white points are "
                         "unknown; convert the image to 8 or 16 bits")
    if image.mode.startswith("I"):
        values = np.asarray(image, np.float32)                          # (H, W)
        largest = values.max()
        image = Image.fromarray((values * (255 / 65535)).round().astype(np.uint8))
    elif is_deep:  # Pillow keeps the high bytes of 16-bit colours
        largest = 256 * int(np.asarray(image.convert("RGB")).max())
    if is_deep and 0 < largest < 4096 and not dark_images:
        dark_images.append(name)
        warn(f"{name}: the values of this 16-bit image are all below 4096, like 12-bit data, so it "
             "will be dark (only the first such image is named)")
    if image.has_transparency_data:
        paper = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(paper, image.convert("RGBA"))
    image = image.convert("RGB")
    return image if transposition is None else image.transpose(transposition)


def decode(data):
    """(PIL image, whether it has 16 bits or more). Pillow refuses a whole PNG file where one of its
    profiles, texts or other metadata is malformed or large. Such a file is decoded again without
    them, and at last without its EXIF block, too."""
    kinds = [None, (*PNG_PIXELS, b"eXIf"), PNG_PIXELS] if data.startswith(PNG) else [None]
    for kind in kinds:
        content = png_chunks(data, kind) if kind else data
        try:
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                is_deep = image.mode.startswith("I") or ";16" in str(image.tile)  # grey or colour
                image.load()
            return image, is_deep
        except Exception:
            if kind is kinds[-1]:
                raise


def png_chunks(data, types):
    """The bytes of a PNG file with the chunks of these types alone."""
    kept, start = [PNG], len(PNG)
    while start < len(data):  # a chunk: 4 bytes of length, 4 of type, the content, 4 of checksum
        end = start + 12 + int.from_bytes(data[start:start + 4], "big")
        if data[start + 4:start + 8] in types:
            kept.append(data[start:end])
        start = end
    return b"".join(kept)


def exif_transposition(image):
    """The transposition that turns an image upright, or None. (ImageOps.exif_transpose rewrites the
    whole EXIF block, which fails if any field is malformed.)"""
    try:
        return TRANSPOSITIONS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # malformed as a whole
        return None


def center_crop(image, size):
    """ADM's crop of a PIL image to size x size: halve it with a box filter while its short side has
    2 * size pixels or more, bring that side to `size` with a bicubic filter, cut out the middle.
    Raises ValueError where the long side is more than 100 times the short one."""
    if max(image.size) > 100 * min(image.size):  # enlarged, its long side might fill the memory
        raise ValueError(f"{image.width}x{image.height}: too oblong")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def read_image(path, size=None):
    """Read an image file, center-cropped to size x size if a size is given. Returns (uint8 (3, H,
    W), None), or (None, reason) where the content of the file is not a readable image. A failing
    disk is no reason to leave an image out: OSError is raised, and so is MemoryError."""
    data = pathlib.Path(path).read_bytes()
    try:
        image = open_image(data, path)
        image = center_crop(image, size) if size else image
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous(), None
    except MemoryError:
        raise
    except UnidentifiedImageError:
        return None, (f"damaged, or no {'/'.join(FORMATS)} file of a kind that Pillow reads: it "
                      f"starts with {data[:12]!r}")
    except Exception as error:  # Pillow raises errors of every type for damaged files
        return None, printable(f"{type(error).__name__}: {error}")


# -------------------------------------------------------------------------------------------------
# Finding images

def visible(folder):
    """The entries of a folder that are not hidden, sorted by name. Raises BadInput."""
    try:
        entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(HIDDEN)]
    except OSError as error:
        raise BadInput(f"{folder}: no such folder, or not readable ({error.strerror})") from None
    for entry in entries:
        suffix = pathlib.Path(entry.path).suffix.lower()
        if entry.is_symlink() and not os.path.exists(entry) and suffix in ("", *SUFFIXES):
            raise BadInput(f"{entry.path}: a link that leads nowhere, or where this user may not "
                           "look: mend it or remove it")
    return sorted(entries, key=lambda entry: entry.name)


def image_files(folder, seen=None):
    """Find the image files in a folder and its subfolders, following links, but into no folder
    twice, nor into one above it. Hidden files and folders are ignored.

    seen: the resolved paths of folders not to be entered; those that are entered are added to it.
    Returns (paths, Counter of what was not taken, by suffix). Paths are sorted folder by folder,
    those behind links last. Raises BadInput for a folder that cannot be read and for a link that
    leads nowhere.
    """
    images, links, not_taken = [], [], collections.Counter()
    seen = set(pathlib.Path(folder).resolve().parents) if seen is None else seen

    def walk(folder):
        place = folder.resolve()
        if place in seen:
            not_taken[f"{folder.name}/ (a link to a folder listed already, or above)"] += 1
            return
        seen.add(place)
        for entry in visible(folder):
            path = pathlib.Path(entry.path)
            if entry.is_dir():
                links.append(path) if entry.is_symlink() else walk(path)
            elif entry.is_file() and path.suffix.lower() in SUFFIXES:
                images.append(path)
            else:
                not_taken[path.suffix.lower() or "without a suffix"] += 1

    walk(pathlib.Path(folder))
    while links:  # last, so that an image is listed where it lies
        walk(links.pop(0))
    return images, not_taken


def describe(not_taken):
    """Put image_files' Counter into words: "40 .heic, 7 .xcf"."""
    kinds = [f"{count:,} {kind}" for kind, count in not_taken.most_common()]
    if len(kinds) > 10:
        kinds[10:] = ["..."]
    return printable(", ".join(kinds) or "nothing")


def list_images(folder):
    """List the images in FOLDER/<class>/ and, like torchvision's ImageFolder, its subfolders.

    Returns (class names, [(path relative to FOLDER, as "class/name.jpg", label)]), both sorted, and
    logs how many images each class has and what was not taken. Raises BadInput where a folder
    cannot be read, where there are no class folders, where one holds no images, or where links put
    a folder into two classes.
    """
    root = pathlib.Path(folder).resolve()
    above = {root, *root.parents}
    classes, items, counts, nested = [], [], [], []
    not_taken, owners = collections.Counter(), {}  # owners: of each folder read, its class
    for entry in visible(folder):
        path = pathlib.Path(entry.path)
        if not entry.is_dir():
            not_taken[f"{path.suffix.lower() or path.name} outside the class folders"] += 1
            continue
        if path.resolve() in above:
            raise BadInput(f"{path}: a link to a folder above it: remove it")
        seen = {*above, *path.resolve().parents}
        barred = frozenset(seen)
        images, others = image_files(path, seen)
        for place in seen - barred:
            if place in owners:
                raise BadInput(f"{place} would be in two classes, {owners[place]} and {path.name}: "
                               "remove one of the links to it")
            owners[place] = path.name
        if not images:
            raise BadInput(f"{path}: a class folder without images of a known format; it holds "
                           f"{describe(others)}")
        names = sorted(image.relative_to(folder).as_posix() for image in images)
        items += [(name, len(classes)) for name in names]
        classes.append(path.name)
        counts.append(f"{path.name} ({len(images):,})")
        not_taken += others
        subfolders = {image.parent for image in images}
        if len(subfolders) > 1 and path not in subfolders:
            nested.append(path)
    if not classes:
        raise BadInput(f"{folder}: no class folders in it but {describe(not_taken)}; expected "
                       f"{folder}/<class>/*.jpg (one class is enough)")

    if len(counts) > 12:
        counts[6:-3] = ["..."]
    log(printable(f"{len(items):,} images of {len(classes):,} classes: {', '.join(counts)}"))
    if not_taken:
        log(f"not taken: {describe(not_taken)}")
    if nested and rank() == 0:
        warn(f"{len(nested):,} of {len(classes):,} classes hold images only in several subfolders; "
             f"if those of {nested[0]} are the classes, give that folder instead")
    return classes, items


def subset(path, count, n, by_class=False):
    """Indices of n of `count` images (None: of all), one from each of n equal parts: the first if
    the images are sorted by class, else a random one. (The classes of samples take turns, so that
    of 100 samples of 10 classes every tenth would show the same class.) Always the same for the
    same count and n. Raises BadInput, which names `path`, for fewer than n images, or than 2."""
    n = n or count
    if not 2 <= n <= count:
        raise BadInput(f"{path}: {count} images found, {max(n, 2)} needed")
    starts = [i * count // n for i in range(n + 1)]
    if by_class:
        return starts[:-1]
    return np.random.default_rng([count, n]).integers(starts[:-1], starts[1:]).tolist()


def batched(images, batches):
    """Yield (indices, images (B, 3, H, W)) for each of `batches`, which are ranges of indices.
    images: an iterator over single images (3, H, W) in the same order."""
    for indices in batches:
        yield indices, torch.stack(list(itertools.islice(images, len(indices))))


def folder_images(folder, size, n, batch):
    """Read n of the images in a folder and its subfolders, spread over it (None: all of them),
    center-cropped to size x size. Without a size, all must have the same one.

    Returns (number of images, "WIDTHxHEIGHT", an iterator over this rank's batches, which are
    (indices, uint8 images (B, 3, H, W))). Raises BadInput for whatever cannot be read.
    """
    paths, not_taken = image_files(folder)
    if not_taken:
        log(f"not taken: {describe(not_taken)}")
    in_classes = len({path.parent for path in paths}) > 1
    paths = [paths[i] for i in subset(folder, len(paths), n, in_classes)]
    shape = None  # that of the first image, once it is read

    def read(i):
        image, reason = read_image(paths[i], size)
        if image is None:
            raise BadInput(f"{paths[i]}: cannot be read as an image ({reason})")
        if shape not in (None, image.shape):
            raise BadInput(f"{paths[i]}: not of the size of {paths[0]}: crop all with --size")
        return image                                                    # (3, H, W)

    shape = read(0).shape
    batches = rank_batches(len(paths), batch)
    images = prefetched(read, itertools.chain(*batches), cores(), batch + cores())
    return len(paths), f"{shape[2]}x{shape[1]}", batched(images, batches)


# -------------------------------------------------------------------------------------------------
# Drawing images

def draw_digits(folder, per_class, seed=0, size=32):
    """Write `per_class` RGB images of size x size pixels of each digit into FOLDER/<digit>/.

    The digits are bold, white on black, turned by up to 12 degrees and shifted a little, all as a
    function of `seed`; a very small network can learn them within minutes. An existing folder is
    left alone. To be called by all ranks. Returns the folder.
    """
    folder = pathlib.Path(folder)
    if rank() == 0 and not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".digits-", dir=folder.parent) as scratch:
            unfinished = pathlib.Path(scratch) / folder.name
            write_digits(unfinished, per_class, seed, size)
            with contextlib.suppress(OSError):  # another process was faster: use its digits
                os.rename(unfinished, folder)
    barrier()
    return folder


def write_digits(folder, per_class, seed, size):
    canvas = 96  # drawn large and then reduced, for smooth edges
    font, random = ImageFont.load_default(72), np.random.default_rng(seed)
    for digit in range(10):
        (folder / str(digit)).mkdir(parents=True)
        upright = Image.new("L", (canvas, canvas))
        ImageDraw.Draw(upright).text((canvas / 2, canvas / 2), str(digit), 255, font, "mm",
                                     stroke_width=4, stroke_fill=255)
        for i in range(per_class):
            angle, dx, dy = random.uniform((-12, -4, -4), (12, 4, 4))
            turned = upright.rotate(angle, Image.Resampling.BICUBIC, translate=(dx, dy))
            image = turned.resize((size, size), Image.Resampling.BOX).convert("RGB")
            image.save(folder / str(digit) / f"{i:05d}.png", compress_level=1)


def image_grid(images, columns, captions=(), title=""):
    """Lay out uint8 images (N, 3, H, W) row by row in one PIL image, with a title and, above each
    column, a caption (cut to its width)."""
    zoom = max(1, 96 // images.shape[-1])  # small images are enlarged
    tiles = images.permute(0, 2, 3, 1).cpu().numpy().repeat(zoom, 1).repeat(zoom, 2)
    side, gap, header = tiles.shape[1], 4, 40  # pixels
    width = gap + columns * (side + gap)
    height = header + math.ceil(len(tiles) / columns) * (side + gap)
    grid = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(12)
    draw.text((gap, 3), title, "black", font)
    for column, caption in enumerate(map(str, captions[:columns])):
        while font.getlength(caption) > side:
            caption = caption[:-1]
        draw.text((gap + column * (side + gap), 21), caption, "dimgray", font)
    for i, tile in enumerate(tiles):
        row, column = divmod(i, columns)
        left, top = gap + column * (side + gap), header + row * (side + gap)
        grid.paste(Image.fromarray(tile), (left, top))
    return grid
