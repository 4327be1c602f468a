"""How many network evaluations a sample needs: ODE solvers compared on trained networks.

    python -m bench.solvers out/RUN-x/ema.safetensors out/RUN-v/ema.safetensors --cfg 1 2 \\
        --csv out/solvers.csv --out assets/solvers.png

Measured is the distance |z - z*| / |z*| of 24 images to a fine solution z*, which is 250 steps of
Heun's method with the two sides of the guidance interval's edge integrated separately. (Whether
such a distance matters, fid.py tells with --method and --steps.) With guidance the velocity jumps
at that edge. A solver that steps over the jump, as the paper's does ("heun", and "euler"), makes an
error there that no order removes; "heun apart" restarts at the edge, as ab2 always does.

Without networks, --out draws a table that is there.
"""
import itertools

import torch

from bench.figures import COLORS, image_path, pyplot, save_figure
from lib.checkpoint import load_denoiser, weights_hash
from lib.flags import Parser, number, path
from lib.log import read_table, write_table
from lib.run import BadInput, log, pick_device, program
from sample import balanced_labels, guided_velocity, image_noise, ode_sample

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
def solve(denoiser, solver, cfg, evaluations, n, seed):
    """(latents (n, C, H, W) of the images 0 ... n-1, how often the velocity was evaluated)."""
    method, apart = SOLVERS[solver]
    net, device = denoiser.net, next(denoiser.parameters()).device
    shape = net.in_channels, net.input_size, net.input_size
    z = image_noise(seed, range(n), shape).to(device)
    y = balanced_labels(range(net.num_classes), range(n)).to(device)
    breaks = INTERVAL[:1] if apart and cfg != 1 else ()
    velocity, times = guided_velocity(denoiser, y, cfg, INTERVAL), []

    def counted(z, t):
        times.append(t)
        return velocity(z, t)

    steps = steps_for(method, evaluations, len(breaks) + 1)
    return ode_sample(counted, z, steps, method, breaks), len(times)


def measure(denoiser, args):
    """A row of the table for each guidance scale, solver and number of evaluations."""
    n, seed = args.num_samples, args.seed
    network = dict(network=weights_hash(denoiser.net), target=denoiser.target, n=n, seed=seed)
    for cfg in args.cfg:
        fine, _ = solve(denoiser, "heun apart", cfg, 499, n, seed)
        for solver, evaluations in itertools.product(args.solvers, args.evaluations):
            z, count = solve(denoiser, solver, cfg, evaluations, n, seed)
            distance = ((z - fine).norm() / fine.norm()).item()
            row = dict(cfg=f"{cfg:g}", solver=solver, evaluations=count,
                       measure="distance to a fine solution", value=f"{distance:.5g}")
            log(f"{denoiser.target}, guidance {cfg:g}, {solver}: {count} evaluations, distance "
                f"{distance:.5g}")
            yield network | row


def draw(file, rows):
    """A panel for each guidance scale: the measure against evaluations."""
    scales, measure = sorted({row["cfg"] for row in rows}), rows[0]["measure"]
    figure, panels = pyplot().subplots(1, len(scales), figsize=(6 * len(scales), 4.5),
                                       squeeze=False)
    for panel, cfg in zip(panels[0], scales):
        lines = {}
        for row in rows:
            if row["cfg"] == cfg and row["solver"] in SOLVERS:
                point = int(row["evaluations"]), float(row["value"])
                lines.setdefault((row["target"], row["solver"]), []).append(point)
        for (target, solver), points in lines.items():
            panel.plot(*zip(*sorted(points)), STYLES[solver], color=COLORS.get(target),
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
    add("--cfg", type=number(float, 0, 1000), nargs="+", default=[1.0, 2.0], help="guidance scales")
    add("--solvers", nargs="+", choices=SOLVERS, default=list(SOLVERS), help="which")
    add("--evaluations", type=number(int, 3), nargs="+", default=[99, 49, 35, 27, 17, 12, 9, 7],
        help="of the velocity, per image")
    add("--seed", type=number(int, 0), default=0, help="of the noise")
    add("--num-samples", type=number(int, 1), default=24, help="images")
    add("--csv", type=path, required=True, help="the table")
    add("--out", type=image_path, help="the figure, NAME.png")
    args = parser.parse_args(argv)
    rows = [row for file in args.ckpts
            for row in measure(load_denoiser(file, device=pick_device()), args)]
    if rows:
        write_table(args.csv, list(rows[0]), rows)
    if args.out:
        rows = [row for row in read_table(args.csv)[1] if row["seed"] == str(args.seed)]
        if not rows:
            raise BadInput(f"{args.csv}: no rows with seed {args.seed}, so nothing to draw")
        draw(args.out, rows)


if __name__ == "__main__":
    raise SystemExit(main())
