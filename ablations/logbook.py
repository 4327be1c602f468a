"""Studies: many runs at one budget on one cache, scored alike, in one table.

    python -m ablations.logbook --study targets --latents CACHE --val CACHE --ref REF
    python -m ablations.logbook --study nine --latents CACHE --steps 1000 --patch 8
    python -m ablations.logbook --study techniques --latents CACHE --ref REF --teacher FILE
    python -m ablations.logbook ... --only x-1-seed0 v-1-seed0        some runs, beside the others

What is done is not done again. Flags that are unknown here go to train.py. In the table, fit and
val are the error of the velocity on training images and on --val's, at training's times.
"""
import gc
import pathlib
import shlex
import time

import torch

import fid
import train
from ablations import join, load
from ablations.repa import load_teacher
from ablations.studies import RECIPE, STUDIES, chosen, told
from lib.flags import Parser, number
from lib.log import error_columns, read_scores, read_table
from lib.run import BadInput, program, say, world_size
from model import JLT, SIZES

SEARCHED, SEARCH_N = ("1.5", "2", "3"), 1000  # guidance scales, and images to choose among them
FAST = ("--method", "ab2", "--steps", "25")  # good enough to choose by


def train_row(args, others, row, run):
    """Train a row's run to its end. Returns an exit code."""
    detail, often = max(1, args.steps // 60), max(1, args.steps // 12)
    words = ["--latents", args.latents, "--out", run, "--log-every", detail,
             "--sample-every", often, "--save-every", often, "--keep-every", 2 * often]
    for name in RECIPE:
        words += [f"--{name}", vars(args)[name]]
    words += ["--val", args.val] if args.val else []
    torch.compiler.reset()  # or the graphs of all runs count against one limit
    gc.collect()  # of the run before, which refers to itself
    technique = row.techniques and join(*map(load, row.techniques))
    return train.main([*map(str, words), *shlex.split(row.flags), *others], technique or None)


def score_row(args, row, run):
    """Score a run. Returns an exit code."""
    def measure(*words):
        return fid.main([
            "--ckpt", str(run / "ema.safetensors"), "--ref", str(args.ref), "--metrics",
            *args.metrics, *(("--inception", str(args.inception)) if args.inception else ()),
            *map(str, words)])

    code = measure("--num-samples", args.fid_n, "--cfg", 1)
    for words in row.more:
        code = code or measure("--num-samples", args.fid_n, "--cfg", 1, *words.split())
    if row.search:
        code = code or measure("--num-samples", SEARCH_N, "--cfg", *SEARCHED, *FAST)
    if code or not row.search:
        return code
    found, name = scores(run), "FID" if "fid" in args.metrics else "MMD"
    best = min(SEARCHED, key=lambda c: found[f"{name}-{SEARCH_N}, cfg {c}, ab2, floor 0.05"])
    return measure("--num-samples", args.fid_n, "--cfg", best)


def scores(run):
    """What a run came to: {"step": ..., "fit": ..., "FID-5000, cfg 1": ..., "images/s": ...}."""
    found, (_, log) = {}, read_table(run / "log.csv")
    for column in ("fit", "val"):
        for row in log:
            if row.get(column):
                times = [float(row[name]) for name in error_columns(column)[1:]]
                found |= {"step": row["step"], column: float(row[column]),
                          f"{column}, even t": sum(times) / len(times)}
    speeds = sorted(float(row["images_per_s"]) for row in log if row.get("images_per_s"))
    if speeds:
        found["images/s"] = speeds[len(speeds) // 2]
    for row in read_scores(run / "fid.csv", fid.COLUMNS) if run.is_dir() else ():
        usual = row["method"] == "heun" and row["t_eps"] == "0.05"
        how = "" if usual else f", {row['method']}, floor {row['t_eps']}"
        for metric, name in (("fid", "FID"), ("mmd", "MMD")):
            if row[metric]:
                found[f"{name}-{row['n']}, cfg {row['cfg']}{how}"] = float(row[metric])
    return found


def markdown(rows):
    """A table in Markdown of {column: value}; a value that is missing leaves a blank."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns)]
    for row in rows:
        values = [row.get(name, "") for name in columns]
        lines.append([f"{v:.4g}" if isinstance(v, float) else str(v) for v in values])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def estimate(args, rows):
    """Hours of this machine that training takes, by a few steps of the plain network."""
    data = train.codec.LatentDataset(args.latents)
    if data.shape[1] % args.patch:
        raise BadInput(f"--patch {args.patch}: does not divide {data.shape[1]}")
    net = JLT(data.shape[1], args.patch, data.shape[0], num_classes=data.num_classes,
              **SIZES[args.model])
    x, y = data.batch(range(min(32, len(data))))
    for _ in range(3):  # the last counts
        start = time.perf_counter()
        net(x.float(), torch.full((len(x),), 0.5), y).square().mean().backward()
        seconds = (time.perf_counter() - start) / len(x)
    return len(rows) * args.steps * args.batch * seconds / 3600


@program
def main(argv=None):
    parser, path = Parser("Train, score and compare the runs of a study."), pathlib.Path
    add = parser.add_argument
    add("--study", choices=STUDIES, required=True, help="which")
    add("--latents", type=path, required=True, help="cache written by vae.py")
    add("--val", type=path, help="cache of images that training never sees")
    add("--ref", type=path, help="reference statistics, npz; without it nothing is scored")
    add("--inception", type=path, help="Inception's weights (default: as fid.py)")
    add("--metrics", nargs="+", choices=("fid", "mmd"), default=["fid"], help="as in fid.py")
    add("--fid-n", type=number(int, 2), default=5000, help="images scored")
    add("--teacher", help="of REPA; without it that is left out")
    add("--hidden", type=number(int, 1), default=2048, help="width of REPA's projector")
    add("--only", nargs="+", metavar="NAME", help="some of the runs (default: all)")
    add("--out", type=path, help="folder of the runs (default: out/STUDY)")
    for name, value in RECIPE.items():
        add(f"--{name}", type=type(value), default=value, help="as in train.py, for all alike",
            choices=SIZES if name == "model" else None)
    args, others = parser.parse_known_args(argv)
    if world_size() > 1:
        raise BadInput("one process runs a study: without torchrun")
    out, rows, table = args.out or path("out") / args.study, chosen(args), []
    todo = [row for row in rows if scores(out / row.name).get("step") != str(args.steps)]
    say(f"{len(rows)} runs, {len(todo)} to train: {', '.join(row.name for row in todo)}; about "
        f"{estimate(args, todo):.1f} hours, scores apart")
    if any("repa" in row.techniques for row in todo):
        load_teacher(args.teacher, train.codec.LatentDataset(args.latents).size)
    if args.ref:  # what will be needed is seen to before the hours of training
        fid.load_reference(args.ref, args.metrics)
        fid.load_judges(args.metrics, args.inception)
    for row, run in [(row, out / row.name) for row in rows]:
        if code := train_row(args, others, row, run) or (args.ref and score_row(args, row, run)):
            return code  # stopped by a signal, or by an error that has been told
        table.append({"run": row.name} | scores(run) | told(row))
    say(f"\n{args.latents}, {args.model}, {args.steps} steps of {args.batch}\n\n{markdown(table)}")


if __name__ == "__main__":
    raise SystemExit(main())
