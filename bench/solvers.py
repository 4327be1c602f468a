"""How many evaluations a sample needs: solvers and grids of times on trained networks.

    python -m bench.solvers out/RUN-x/ema.safetensors out/RUN-v/ema.safetensors --cfg 1 2 \\
        --csv out/solvers.csv --out assets/solvers.png
    python -m bench.solvers out/RUN-x/ema.safetensors --cfg 2 --ref ref.npz --num-samples 5000 \\
        --csv out/solvers-fid.csv

The first measures a distance: |z - z*| / |z*| over the same 24 images, z* by 250 steps of Heun's
method with the two sides of the guidance interval's edge integrated apart. The second measures FID,
which says when a distance matters. With guidance the velocity jumps at that edge. A solver that
steps over the jump, as the paper's does ("heun", also "euler"), makes an error there that no order
removes. "heun apart" starts anew at the edge, as ab2 always does. The table grows by a row a cell;
the same command continues it.
"""
import itertools
import pathlib
import sys
import time

import torch

import fid
from bench.chart import COLOURS, picture, pyplot, save
from lib.checkpoint import load_denoiser, weights_hash
from lib.device import compile_net, pick_device
from lib.flags import Parser, number
from lib.inception import load_inception
from lib.log import append_score, read_scores
from lib.run import image_batches, program, say
from sample import balanced_labels, guided_velocity, image_noise, ode_sample
from vae import open_vae, to_uint8

EDGE = (0.1, 1.0)  # the guidance interval, as in the paper
# name: (method, whether the sides are integrated apart, shift of the grid)
SOLVERS = {
    "heun": ("heun", False, 1.0),
    "heun apart": ("heun", True, 1.0),
    "euler": ("euler", False, 1.0),
    "ab2": ("ab2", True, 1.0),
    "ab2 shift 0.8": ("ab2", True, 0.8),
}
COLUMNS = ("network", "target", "cfg", "solver", "evaluations", "n", "seed", "measure", "value",
           "seconds")


def steps_for(method, evaluations, sides):
    """The number of steps that takes this many evaluations, or the next below."""
    if method == "euler":
        return evaluations
    if method == "heun":  # two a step, but for the last
        return (evaluations + 1) // 2
    return evaluations - sides  # one a step, and one more on each side


@torch.inference_mode()
def solve(denoiser, solver, cfg, evaluations, indices, seed):
    """Latents (B, C, H, W) of the images with these indices, and how often the velocity was
    asked."""
    method, apart, shift = SOLVERS[solver]
    net, device = denoiser.net, next(denoiser.parameters()).device
    shape = net.in_channels, net.input_size, net.input_size
    z = image_noise(seed, indices, shape).to(device)
    y = balanced_labels(range(net.num_classes), indices).to(device)
    breaks = EDGE[:1] if apart and cfg != 1 else ()
    velocity, asked = guided_velocity(denoiser, y, cfg, EDGE), []

    def counted(z, t):
        asked.append(t)
        return velocity(z, t)

    steps = steps_for(method, evaluations, len(breaks) + 1)
    return ode_sample(counted, z, steps, method, breaks, shift), len(asked)


def distance(denoiser, solver, cfg, evaluations, n, seed, fine):
    z, count = solve(denoiser, solver, cfg, evaluations, range(n), seed)
    return ((z - fine).norm() / fine.norm()).item(), count


def measure_fid(denoiser, solver, cfg, evaluations, n, seed, vae, inception, reference):
    count = 0

    def batches():
        nonlocal count
        for indices in image_batches(n, 250):
            z, count = solve(denoiser, solver, cfg, evaluations, indices, seed)
            yield indices, to_uint8(vae.decode(z))

    statistics = fid.score(batches(), n, {"fid": inception})["fid"]
    return statistics.fid(reference), count


def draw(path, rows):
    """One panel for each scale of guidance: the measure against evaluations, distances as logs."""
    scales = sorted({row["cfg"] for row in rows})
    figure, panels = pyplot().subplots(1, len(scales), figsize=(6 * len(scales), 4.5),
                                       squeeze=False)
    scale = "linear" if rows[0]["measure"].startswith("FID") else "log"
    looks = dict(zip(SOLVERS, ("o-", "s--", "x:", "D-", "d--")))
    for panel, cfg in zip(panels[0], scales):
        lines = {}
        for row in rows:
            if row["cfg"] == cfg:
                place = int(row["evaluations"]), float(row["value"])
                lines.setdefault((row["target"], row["solver"]), []).append(place)
        for (target, solver), points in lines.items():
            panel.plot(*zip(*sorted(points)), looks[solver], color=COLOURS.get(target),
                       markersize=4, label=f"{target}: {solver}")
        panel.set(xscale="log", yscale=scale, xlabel="evaluations of the velocity",
                  title="unguided" if cfg == "1" else f"guidance {cfg} where t > {EDGE[0]:g}")
        panel.set_ylabel(rows[0]["measure"])
        panel.grid(alpha=0.3, which="both")
        panel.legend(fontsize=7)
    save(figure, path)


@program
def main(argv=None):
    parser = Parser("Distance to a fine solution, or FID, against evaluations.")
    parser.add_argument("ckpts", metavar="CKPT", type=pathlib.Path, nargs="+", help="networks")
    parser.add_argument("--cfg", type=number(float, 0, 1000), nargs="+", default=[1.0, 2.0],
                        help="guidance scales")
    parser.add_argument("--solvers", nargs="+", choices=SOLVERS, default=list(SOLVERS))
    parser.add_argument("--evaluations", type=number(int, 3), nargs="+",
                        default=[99, 49, 35, 27, 17, 12, 9, 7], help="of the velocity, an image")
    parser.add_argument("--seed", type=number(int, 0), nargs="+", default=[0], help="of the noise")
    parser.add_argument("--num-samples", type=number(int, 2), default=24, help="images")
    parser.add_argument("--ref", type=pathlib.Path, help="reference statistics: measure FID")
    parser.add_argument("--inception", type=pathlib.Path, help="Inception's weights")
    parser.add_argument("--bf16", action="store_true", help="Inception in bf16: for this study")
    parser.add_argument("--vae", help="codec (default: the latents')")
    parser.add_argument("--csv", type=pathlib.Path, required=True, help="the table")
    parser.add_argument("--out", type=picture, help="the picture, NAME.png")
    args = parser.parse_args(argv)
    device, n = pick_device(), args.num_samples
    read_scores(args.csv, COLUMNS)
    measure = "distance to a fine solution"
    if args.ref:
        measure = f"FID-{n}"
        reference = fid.load_reference(args.ref)
        inception = load_inception(args.inception, device)
        if args.bf16:
            measure, inception.precision = f"{measure}, Inception in bf16", torch.bfloat16
    for path, seed in itertools.product(args.ckpts, args.seed):
        denoiser = load_denoiser(path, device=device)
        vae = open_vae(denoiser.settings, denoiser.net.in_channels, args.vae, device)
        name = dict(network=weights_hash(denoiser.net), target=denoiser.target, n=str(n),
                    seed=str(seed), measure=measure)
        if n >= 1000:  # as fid.py does
            compile_net(denoiser.net, device)
        for cfg in args.cfg:
            fine = None
            for solver, evaluations in itertools.product(args.solvers, args.evaluations):
                row = name | dict(cfg=f"{cfg:g}", solver=solver)
                known = read_scores(args.csv, COLUMNS)
                done = [old for old in known if row.items() <= old.items()
                        and abs(int(old["evaluations"]) - evaluations) < 2]
                if not done:
                    start = time.monotonic()
                    if args.ref:
                        value, count = measure_fid(denoiser, solver, cfg, evaluations, n, seed,
                                                   vae, inception, reference)
                    else:
                        if fine is None:
                            fine, _ = solve(denoiser, "heun apart", cfg, 499, range(n), seed)
                        value, count = distance(denoiser, solver, cfg, evaluations, n, seed, fine)
                    done = [row | dict(evaluations=str(count), value=f"{value:.5g}",
                                       seconds=f"{time.monotonic() - start:.1f}")]
                    append_score(args.csv, COLUMNS, done[0])
                say(", ".join(f"{key} {done[0][key]}" for key in COLUMNS))
    if args.out:
        draw(args.out, [row for row in read_scores(args.csv, COLUMNS)
                        if (row["measure"], row["seed"]) == (measure, str(args.seed[0]))])


if __name__ == "__main__":
    sys.exit(main())
