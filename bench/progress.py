"""Samples as training goes on, several runs side by side: the same images, by number, everywhere.

    python train.py --demo --target x --keep-every 300        (the same with eps and v)
    python -m bench.progress out/demo-T8-x out/demo-T8-v --cfg 1.5 --out assets/progress.png

A block for each run, a row for each export that it has kept (by --keep-every) and for its last.
With --steps: a block for each patch size and step, a row for each target. Noise and class of a
column are the same everywhere.
"""
import pathlib

import torch
from PIL import Image, ImageDraw, ImageFont

from bench.chart import picture
from lib.checkpoint import load_denoiser
from lib.device import pick_device
from lib.files import atomic
from lib.flags import Parser, number
from lib.images import picture_grid
from lib.run import BadInput, program, say
from sample import Sampling, generate, pick_classes
from vae import open_vae

MARGIN, GAP = 64, 20  # pixels to the left, for the steps, and between blocks


def side_by_side(cells, names, columns, captions):
    """{(title of a block, name of a row): uint8 images (columns, 3, H, W)} as one picture, blank
    where a block lacks a row."""
    blank = torch.full_like(next(iter(cells.values())), 255)
    grids = []
    for title in dict.fromkeys(title for title, _ in cells):
        images = torch.cat([cells.get((title, name), blank) for name in names])
        grids.append(picture_grid(images, columns, captions, title))
    width, height = grids[0].size
    sheet = Image.new("RGB", (MARGIN + len(grids) * (width + GAP) - GAP, height), "white")
    for place, grid in enumerate(grids):
        sheet.paste(grid, (MARGIN + place * (width + GAP), 0))
    head = picture_grid(blank[:0], columns).height  # what stands above the first row
    row = (height - head) / len(names)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for place, name in enumerate(names):
        middle = head + row * (place + 0.5)
        draw.text((MARGIN - 6, middle), name, "black", font, anchor="rm")
    return sheet


@program
def main(argv=None):
    parser = Parser("Samples of several runs, side by side, as training goes on.")
    add = parser.add_argument
    add("runs", metavar="RUN", type=pathlib.Path, nargs="+", help="folders of runs")
    add("--columns", type=number(int, 1, 20), default=5, help="images in a row")
    add("--classes", nargs="+", metavar="CLASS", help="names or numbers, taking turns")
    add("--cfg", type=number(float, 0, 1000), default=1.5, help="guidance scale")
    add("--ode-steps", type=number(int, 1), default=50, help="steps of the ODE solver")
    add("--steps", type=number(int, 1), nargs="+", help="blocks of these, a row for each target")
    add("--out", type=picture, default="assets/progress.png", help="the picture, NAME.png")
    args = parser.parse_args(argv)
    sampling, cells, device = Sampling(args.cfg, steps=args.ode_steps), {}, pick_device()
    for run in args.runs:
        for path in [*sorted(run.glob("ema-step*.safetensors")), run / "ema.safetensors"]:
            denoiser = load_denoiser(path, device=device)
            settings, net, target = denoiser.settings, denoiser.net, denoiser.target
            step, cell = settings["step"], (f"{run}: predicts {target}", f"{settings['step']:,}")
            if args.steps:
                cell = f"patch {net.patch_size}, after {step:,} steps", target
            if cell in cells or args.steps and step not in args.steps:
                continue  # the last export may be kept twice
            vae = open_vae(settings, net.in_channels, device=device)
            names = settings["class_names"] or range(net.num_classes)
            classes = pick_classes(args.classes, settings["class_names"], net.num_classes)
            images = generate(denoiser, vae, range(args.columns), classes, sampling)
            cells[cell] = images.cpu()
    if not cells:
        raise BadInput(f"--steps: none of the runs has kept an export of {args.steps}")
    rows = list(dict.fromkeys(row for _, row in cells))
    if not args.steps:
        rows.sort(key=lambda text: (len(text), text))
    captions = [names[classes[i % len(classes)]] for i in range(args.columns)]
    with atomic(args.out) as temporary:
        side_by_side(cells, rows, args.columns, captions).save(temporary, "png")
    say(f"{sampling}, rows {'; '.join(rows)} -> {args.out}")


if __name__ == "__main__":
    raise SystemExit(main())
