"""Samples as training goes on, several runs side by side: the same images, by number, at every step of every run.

    python train.py --demo --target x --keep-every 300        (the same with eps and v)
    python -m bench.progress out/demo-T8-x out/demo-T8-eps out/demo-T8-v --cfg 1.5 --out assets/progress.png

One block per run, one row per export that the run has kept (ema-step*.safetensors, by --keep-every) and one for its
last (ema.safetensors). Noise and class of a column are the same everywhere, so that only the training differs.
"""
import pathlib
import sys

import torch
from PIL import Image, ImageDraw, ImageFont

from bench.chart import picture
from lib.flags import Parser, number
from lib.log import picture_grid
from lib.run import BadInput, atomic, pick_device, program, rank, say
from sample import generate, load_denoiser, open_vae, pick_classes

MARGIN = 64  # pixels to the left, for the steps
GAP = 20     # between blocks


def exports(run, weights, device):
    """Yield (step, denoiser) for each export of a run's folder, each step once."""
    paths, done = [*sorted(run.glob("ema-step*.safetensors")), run / "ema.safetensors"], set()
    for path in paths:
        denoiser = load_denoiser(path, weights, device)
        step = denoiser.settings.get("step")
        if step not in done:
            done.add(step)
            yield step, denoiser


def side_by_side(blocks, steps, columns, captions):
    """{title: {step: uint8 images (columns, 3, H, W)}} as one Pillow image; a step that a run lacks leaves a blank."""
    some = next(iter(next(iter(blocks.values())).values()))
    blank = torch.full_like(some, 255)
    grids = [picture_grid(torch.cat([rows.get(step, blank) for step in steps]), columns, captions, title)
             for title, rows in blocks.items()]
    width, height = grids[0].size
    sheet = Image.new("RGB", (MARGIN + len(grids) * (width + GAP) - GAP, height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for place, grid in enumerate(grids):
        sheet.paste(grid, (MARGIN + place * (width + GAP), 0))
    head = picture_grid(some[:0], columns).height  # what stands above the first row
    row = (height - head) / len(steps)
    for place, step in enumerate(steps):
        draw.text((MARGIN - 6, head + row * (place + 0.5)), f"{step:,}", "black", font, anchor="rm")
    draw.text((MARGIN - 6, head / 2 + 8), "step", "dimgray", font, anchor="rm")
    return sheet


@program
def main(argv=None):
    from tqdm import tqdm
    parser = Parser("Samples of several runs, side by side, as training goes on.")
    parser.add_argument("runs", metavar="RUN", type=pathlib.Path, nargs="+", help="folders of runs")
    parser.add_argument("--labels", nargs="+", help="titles of the blocks (default: what each run predicts)")
    parser.add_argument("--steps", type=number(int, 0), nargs="+", help="which training steps (default: all kept)")
    parser.add_argument("--columns", type=number(int, 1, 20), default=5, help="images in a row")
    parser.add_argument("--classes", nargs="+", metavar="CLASS", help="names or numbers, taking turns (default: all)")
    parser.add_argument("--cfg", type=number(float, 0, 1000), help="guidance scale (default: the runs' own)")
    parser.add_argument("--seed", type=number(int, 0), default=0, help="of the noise")
    parser.add_argument("--ode-steps", type=number(int, 1), default=50, help="steps of the ODE solver")
    parser.add_argument("--weights", choices=("ema", "ema2"), default="ema", help="which average of the weights")
    parser.add_argument("--vae", help="codec that decodes (default: the one of the latents)")
    parser.add_argument("--out", type=picture, default="assets/progress.png", help="the picture, NAME.png")
    args = parser.parse_args(argv)
    if args.labels and len(args.labels) != len(args.runs):
        raise BadInput(f"--labels: {len(args.labels)} titles for {len(args.runs)} runs")
    device, blocks = pick_device(), {}
    for place, run in enumerate(args.runs):
        block = {}
        for step, denoiser in tqdm(exports(run, args.weights, device), desc=run.name, disable=rank() > 0 or None):
            if args.steps and step not in args.steps:
                continue
            settings = denoiser.settings
            names, cfg = settings.get("class_names"), settings.get("cfg", 1.0) if args.cfg is None else args.cfg
            classes = pick_classes(args.classes, names, denoiser.net.num_classes)[:args.columns]
            vae = open_vae(settings, denoiser.net.in_channels, args.vae, device)
            images = generate(denoiser, vae, range(args.columns), classes, args.seed, cfg, steps=args.ode_steps)
            block[step] = images.cpu()
        if not block:
            raise BadInput(f"{run}: no export of these steps; train.py keeps one every --keep-every")
        title = args.labels[place] if args.labels else f"{run.name}: predicts {denoiser.target}"
        if title in blocks:
            raise BadInput(f"two blocks would be called {title!r}: tell them apart with --labels")
        blocks[title] = block
    steps = sorted(set().union(*blocks.values()))
    captions = [names[c] if names else c for c in (classes * args.columns)[:args.columns]]
    with atomic(args.out) as temporary:
        side_by_side(blocks, steps, args.columns, captions).save(temporary, "png")
    say(f"{', '.join(blocks)}; cfg {cfg:g}, seed {args.seed}, steps {' '.join(map(str, steps))} -> {args.out}")


if __name__ == "__main__":
    sys.exit(main())
