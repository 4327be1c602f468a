"""The training of several runs in one picture, from their log.csv.

    python -m bench.curves out/demo-T8-x out/demo-T8-eps out/demo-T8-v --out assets/curves.png

Right: the squared error of the velocity at the last step, by time t. Whatever a run predicts and
whatever its loss, train.py measures it on the same images, times and noise. Left: its mean by step,
with times as training draws them. (Were they spread evenly, the ends would decide it all: an error
of x counts 1/(1-t)² and one of eps 1/t², up to 400 times.)
"""
import math
import pathlib

from bench.chart import picture, pyplot, save, settings_of, styles
from lib.flags import Parser
from lib.log import error_columns, read_table
from lib.run import BadInput, program, say


def read_log(run, column="fit"):
    """{step: (mean at training's times, {t: error})} of a run's folder; t: the middle of a bin of
    times, of which small caches leave some empty. Raises BadInput."""
    log, (_, rows) = {}, read_table(pathlib.Path(run) / "log.csv")
    for row in rows:
        if row.get(column):
            mean, *bins = [float(row[name]) for name in error_columns(column)]
            errors = {(k + 0.5) / 10: e for k, e in enumerate(bins) if not math.isnan(e)}
            log[int(row["step"])] = mean, errors
    if not log:
        raise BadInput(f"{run}: expected a run's folder with {column!r} in its log.csv, where "
                       "train.py notes it every --sample-every steps, val with --val CACHE")
    return log


@program
def main(argv=None):
    parser = Parser("Training curves, and the error by time, of several runs.")
    add = parser.add_argument
    add("runs", metavar="RUN", type=pathlib.Path, nargs="+", help="folders of runs")
    add("--labels", nargs="+", help="their names in the picture (default: their folders')")
    add("--column", choices=("fit", "val"), default="fit", help="on images of --latents or --val")
    add("--out", type=picture, default="assets/curves.png", help="the picture, NAME.png")
    args = parser.parse_args(argv)
    labels = args.labels or [run.name for run in args.runs]
    if len(labels) != len(args.runs):
        raise BadInput(f"--labels: {len(labels)} names for {len(args.runs)} runs")
    logs = [read_log(run, args.column) for run in args.runs]
    looks = styles([settings_of(run).get("target") for run in args.runs])
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(11, 4.2))
    for log, label, look in zip(logs, labels, looks):
        mean, errors = log[max(log)]
        left.plot(list(log), [mean for mean, _ in log.values()], marker=".", label=label, **look)
        right.plot(list(errors), list(errors.values()), marker=".", label=label, **look)
        by_time = "  ".join(f"{error:.3f}" for error in errors.values())
        say(f"{label}: step {max(log)}, mean at training's times {mean:.4f}, by time {by_time}")
    left.set(xlabel="training step", title=f"{args.column}: mean at training's times")
    right.set(xlabel="time t: noise 0, data 1", title="the same at the last step, by time")
    for panel in (left, right):
        panel.set(yscale="log", ylabel="squared error of the velocity")
    save(figure, args.out)


if __name__ == "__main__":
    raise SystemExit(main())
