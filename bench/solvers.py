"""How many network evaluations a sample needs: ODE solvers compared on trained networks.

    python -m bench.solvers out/RUN-x/ema.safetensors out/RUN-v/ema.safetensors \\
        --csv out/solvers.csv --out assets/solvers.png
    python -m bench.solvers --csv assets/logs/solvers-fid.csv --out assets/solvers-fid.png

Measured is the distance |z - z*| / |z*| of 24 images to a fine solution z*, which is 250 steps of
Heun's method with the two sides of the guidance interval's edge integrated separately. (Whether
such a distance matters, fid.py tells with --method and --steps.) With guidance the velocity jumps
at that edge. A solver that steps over the jump, as the paper's does ("heun", and "euler"), makes an
error there that no order removes; "heun apart" restarts at the edge, as ab2 always does.

Without networks, a table that is there is drawn.
"""
import itertools

import torch

from bench.figures import COLORS, image_path, pyplot, save_figure
from lib.checkpoint import load_denoiser
from lib.flags import Parser, path
from lib.log import read_table, write_table
from lib.run import BadInput, log, pick_device, program
from sample import guided_velocity, noise_and_labels, ode_sample

N = 24  # images
EVALUATIONS = (99, 49, 35, 27, 17, 12, 9, 7)  # of the velocity, per image
INTERVAL = (0.1, 1.0)  # guided times, as in the paper
# name: (method, whether the two sides of the edge are integrated separately)
SOLVERS = {
    "heun": ("heun", False),
    "heun apart": ("heun", True),
    "euler": ("euler", False),
    "ab2": ("ab2", True),
}
STYLES = dict(zip(SOLVERS, ("o-", "s--", "x:", "D-")))


def steps_for(method, evaluations, pieces):
    """The number of steps that takes this many evaluations, or as many as fit into them."""
    if method == "euler":
        return evaluations
    if method == "heun":  # two per step, one in the last
        return (evaluations + 1) // 2
    return evaluations - pieces  # one per step, and one more on each piece


@torch.inference_mode()
def solve(denoiser, solver, cfg, evaluations):
    """(latents (N, C, H, W) of the images 0 ... N-1, how often the velocity was evaluated)."""
    method, apart = SOLVERS[solver]
    z, y = noise_and_labels(denoiser.net, range(N))
    breaks = INTERVAL[:1] if apart and cfg != 1 else ()
    velocity, times = guided_velocity(denoiser, y, cfg, INTERVAL), []

    def counted(z, t):
        times.append(t)
        return velocity(z, t)

    steps = steps_for(method, evaluations, len(breaks) + 1)
    return ode_sample(counted, z, steps, method, breaks), len(times)


def measure(denoiser):
    """A row of the table for each guidance scale, solver and number of evaluations."""
    for cfg in (1, 2):
        fine, _ = solve(denoiser, "heun apart", cfg, 499)
        for solver, evaluations in itertools.product(SOLVERS, EVALUATIONS):
            z, count = solve(denoiser, solver, cfg, evaluations)
            distance = ((z - fine).norm() / fine.norm()).item()
            log(f"{denoiser.target}, guidance {cfg}, {solver}: {count} evaluations, distance "
                f"{distance:.5g}")
            yield dict(target=denoiser.target, cfg=cfg, solver=solver, evaluations=count, seed=0,
                       measure="distance to a fine solution", value=f"{distance:.5g}")


def draw(file, rows):
    """A panel for each guidance scale: the measure against evaluations."""
    rows = [row for row in rows if row["solver"] in SOLVERS and row["seed"] == "0"]
    scales, measure = sorted({row["cfg"] for row in rows}), rows[0]["measure"]
    figure, panels = pyplot().subplots(1, len(scales), figsize=(6 * len(scales), 4.5),
                                       squeeze=False)
    for panel, cfg in zip(panels[0], scales):
        lines = {}
        for row in rows:
            if row["cfg"] == cfg:
                point = int(row["evaluations"]), float(row["value"])
                lines.setdefault((row["target"], row["solver"]), []).append(point)
        for (target, solver), points in lines.items():
            panel.plot(*zip(*sorted(points)), STYLES[solver], color=COLORS[target],
                       markersize=4, label=f"{target}: {solver}")
        panel.set(xscale="log", yscale="linear" if measure.startswith("FID") else "log",
                  xlabel="evaluations of the velocity", ylabel=measure,
                  title="unguided" if cfg == "1" else f"guidance {cfg} where t > {INTERVAL[0]:g}")
    save_figure(figure, file)


@program
def main(argv=None):
    parser = Parser("Distance to a fine solution against evaluations, for several ODE solvers.")
    add = parser.add_argument
    add("ckpts", metavar="CKPT", type=path, nargs="*", help="networks")
    add("--csv", type=path, required=True, help="the table")
    add("--out", type=image_path, required=True, help="the figure, NAME.png")
    args = parser.parse_args(argv)
    rows = [row for file in args.ckpts
            for row in measure(load_denoiser(file, device=pick_device()))]
    if rows:
        write_table(args.csv, list(rows[0]), rows)
    _, rows = read_table(args.csv)
    if not rows:
        raise BadInput(f"{args.csv}: no rows in it, so nothing to draw")
    draw(args.out, rows)


if __name__ == "__main__":
    raise SystemExit(main())
