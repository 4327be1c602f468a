"""The figures of docs/ that show samples and training curves.

    python -m bench.figures samples CKPT ... --cfg 2 --out samples.png   a row for each checkpoint
    python -m bench.figures path CKPT ... --cfg 2 --out path.png         from noise to image
    python -m bench.figures curves RUN ... --column val --out curves.png

samples  Noise and class are the same within a column. Give the exports that a run kept (train.py
         --keep-every) to see it learn, or the last exports of several runs to compare them.
path     The clean image as the network predicts it at t = 0, 0.1 ... 0.9, and the sample, a row for
         each image and checkpoint. At time t the velocity v points to z + (1-t) v, which is the
         prediction of the clean latent, whatever the target.
curves   Left, the squared error of the velocity by training step, averaged over the times that
         training draws; right, the same by time t at the last step. RUN is the folder of a run.
         train.py measures this in the same way whatever the target and the loss.

What the other programs of bench/ need for their charts comes first.
"""
import argparse
import collections

import torch
from PIL import Image, ImageDraw, ImageFont

import sample
from lib.checkpoint import load_denoiser, read_checkpoint
from lib.files import atomic
from lib.flags import Parser, number, path
from lib.images import image_grid
from lib.log import read_table
from lib.run import BadInput, log, pick_device, program
from vae import open_vae, to_uint8

COLORS = collections.defaultdict(
    lambda: "tab:green", {"x": "tab:blue", "eps": "tab:red", "v": "tab:orange"})
DASHES = ("-", "--", ":", "-.")  # of runs with the same target
PATH_TIMES = [i / 10 for i in range(10)]


# -------------------------------------------------------------------------------------------------
# Charts

def pyplot():
    """matplotlib.pyplot, drawing to files only. Raises BadInput without matplotlib."""
    try:
        import matplotlib.pyplot
    except ImportError:
        raise BadInput("figures need matplotlib: pip install matplotlib") from None
    matplotlib.pyplot.switch_backend("Agg")
    return matplotlib.pyplot


def image_path(text):
    """An argparse type: NAME.png in a folder that exists."""
    file = path(text)
    if file.suffix.lower() != ".png" or not file.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: expected NAME.png in a folder that exists")
    return file


def save_figure(figure, file):
    """Give each panel a grid and a legend, and write the figure as PNG."""
    for panel in figure.axes:
        panel.grid(alpha=0.3, which="both")
        panel.legend(fontsize=8)
    figure.tight_layout()
    with atomic(file) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    log(f"-> {file}")


# -------------------------------------------------------------------------------------------------
# Samples. Each function returns ([(name of a row, its uint8 images)], captions of the columns).

def open_network(file, args):
    """(denoiser, codec, class ids that take turns, names of all classes) of a checkpoint."""
    denoiser = load_denoiser(file, device=pick_device())
    vae = open_vae(denoiser.settings, denoiser.net.in_channels, device=pick_device())
    names = denoiser.settings.get("class_names") or range(denoiser.net.num_classes)
    names = [str(name) for name in names]
    return denoiser, vae, sample.pick_classes(args.classes, names, len(names)), names


def draw_samples(args):
    rows, captions = [], []
    for file in args.inputs:
        denoiser, vae, classes, names = open_network(file, args)
        settings, patch = denoiser.settings, denoiser.net.patch_size
        name = f"{denoiser.target}, patch {patch}\nstep {settings.get('step', '?')}"
        sampling = sample.Sampling(cfg=args.cfg)
        images = sample.generate(denoiser, vae, range(args.columns), classes, sampling).cpu()
        rows.append((name, images))
        captions = [names[classes[i % len(classes)]] for i in range(args.columns)]
    return rows, captions


def draw_path(args):
    paths = []
    for file in args.inputs:
        denoiser, vae, classes, _ = open_network(file, args)
        latents = predicted_latents(denoiser, classes, args.columns, args.cfg)
        images = torch.stack([to_uint8(vae.decode(z)).cpu() for z in latents], 1)
        paths.append((denoiser.target, images))
    rows = [(f"predicts {target}\nimage {i}", images[i])
            for i in range(args.columns) for target, images in paths]
    return rows, [*(f"t = {t:g}" for t in PATH_TIMES), "sample"]


@torch.inference_mode()
def predicted_latents(denoiser, classes, n, cfg):
    """The clean latents (n, C, H, W) as predicted at each of PATH_TIMES, and the samples."""
    noise, y = sample.noise_and_labels(denoiser.net, range(n), classes)
    predicted = {}
    guided = sample.guided_velocity(denoiser, y, cfg)

    def velocity(z, t):
        v = guided(z, t)
        # Heun evaluates each time twice. The second one, which stays, is at the point on the path.
        predicted[t] = z + (1 - t) * v
        return v

    samples = sample.ode_sample(velocity, noise, 50, "heun")  # PATH_TIMES are among its 50 times
    return [*(predicted[t] for t in PATH_TIMES), samples]


def named_rows(rows, captions, margin=90):
    """The rows as one Pillow image, with their names on the left."""
    grid = image_grid(torch.cat([images for _, images in rows]), len(captions), captions)
    head = image_grid(rows[0][1][:0], len(captions)).height  # what stands above the first row
    sheet = Image.new("RGB", (margin + grid.width, grid.height), "white")
    sheet.paste(grid, (margin, 0))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for i, (name, _) in enumerate(rows):
        middle = head + (grid.height - head) * (i + 0.5) / len(rows)
        draw.text((margin - 6, middle), name, "black", font, anchor="rm", align="right")
    return sheet


# -------------------------------------------------------------------------------------------------
# Curves

def draw_curves(args):
    targets, column = [], args.column
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(11, 4.2))
    for run in args.inputs:
        rows = [row for row in read_table(run / "log.csv")[1] if row.get(column)]
        if not rows:
            raise BadInput(f"{run}: no {column!r} in its log.csv; train.py logs it every "
                           "--sample-every steps, val only with --val CACHE")
        steps = [int(row["step"]) for row in rows]
        means = [float(row[column]) for row in rows]
        by_time = [float(rows[-1][f"{column}_t{k}5"]) for k in range(10)]
        target = read_checkpoint(run / "ema.safetensors")[1]["target"]
        style = {"color": COLORS[target], "linestyle": DASHES[targets.count(target) % 4],
                 "marker": ".", "label": run.name}
        targets.append(target)
        left.plot(steps, means, **style)
        right.plot([(k + 0.5) / 10 for k in range(10)], by_time, **style)
        errors = "  ".join(f"{error:.3f}" for error in by_time)
        log(f"{run.name}: step {steps[-1]}, mean {means[-1]:.4f}, by t {errors}")
    left.set(xlabel="training step", title=f"{column}: mean over training's times")
    right.set(xlabel="time t: noise at 0, data at 1", title="at the last step, by time")
    for panel in (left, right):
        panel.set(yscale="log", ylabel="squared error of the velocity")
    save_figure(figure, args.out)


# -------------------------------------------------------------------------------------------------

@program
def main(argv=None):
    parser = Parser("Sample grids and training curves of several runs.")
    add = parser.add_argument
    add("figure", choices=("samples", "path", "curves"), help="which figure")
    add("inputs", metavar="CKPT|RUN", type=path, nargs="+",
        help="checkpoints, or for curves the folders of runs")
    add("--out", type=image_path, required=True, help="the figure, NAME.png")
    add("--column", choices=("fit", "val"), default="fit", help="of curves: training images or val")
    add = parser.add_argument_group("samples and path").add_argument
    add("--columns", type=number(int, 1, 20), default=5, help="images per checkpoint")
    add("--classes", nargs="+", metavar="CLASS", help="names or numbers (default: all, in turn)")
    add("--cfg", type=number(float, 0, 1000), default=2.0, help="guidance scale")
    args = parser.parse_args(argv)
    if args.figure == "curves":
        return draw_curves(args)
    rows, captions = (draw_samples if args.figure == "samples" else draw_path)(args)
    with atomic(args.out) as temporary:
        named_rows(rows, captions).save(temporary, "png")
    log(f"-> {args.out}")


if __name__ == "__main__":
    raise SystemExit(main())
