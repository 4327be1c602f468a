"""The training of several runs in one picture, from their log.csv.

    python -m bench.curves out/demo-T8-x out/demo-T8-eps out/demo-T8-v --out assets/curves.png

Right: the squared error of the velocity at the last step, by time t, from noise (t = 0) to data (t = 1). Whatever a run
predicts and whatever its loss, train.py measures this error in v space, on the same images, times and noise for all
(lib.log.loss_by_time), so that the curves compare. With --column val it is that on images which training never saw,
where the runs had --val.

Left: its mean by training step. Times count as often as training draws them (t = sigmoid(n), n ~ N(-0.8, 0.8²)), which
is the paper's loss and the column `fit` of log.csv. Under times spread evenly the last moments would decide it all: an
error of x counts 1/(1-t)² and one of eps 1/t², up to 400 times, at times that training hardly ever visits.
"""
import csv
import pathlib
import sys

from bench.chart import picture, pyplot, save, settings_of, styles
from lib.flags import Parser
from lib.run import BadInput, program, say


def read_log(run, column="fit"):
    """{step: (mean at training's times, {t: error})} of a run's folder; t is the middle of a bin of times. (Small
    caches leave some bins empty: those are missing here.) BadInput where there is none."""
    path, prefix = pathlib.Path(run) / "log.csv", f"{column}_t"
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row.get(column)]
        # The columns fit_t05, fit_t15 ... have the middle of their bin in their name, in hundredths.
        log = {int(row["step"]): (float(row[column]), {
            int(name.removeprefix(prefix)) / 100: float(text) for name, text in row.items()
            if name.startswith(prefix) and text != "nan"}) for row in rows}
    except FileNotFoundError:
        raise BadInput(f"{run}: expected the folder of a run, with a log.csv in it") from None
    except (OSError, KeyError, ValueError, AttributeError, TypeError, csv.Error) as error:
        raise BadInput(f"{path}: not a log of train.py ({error})") from None
    if not log:
        raise BadInput(f"{path}: no {column!r} there: it is logged every --sample-every steps"
                       + " of a run with --val CACHE" * (column == "val"))
    return log


@program
def main(argv=None):
    parser = Parser("Training curves, and the loss by time, of several runs.")
    parser.add_argument("runs", metavar="RUN", type=pathlib.Path, nargs="+", help="folders of runs")
    parser.add_argument("--labels", nargs="+", help="their names in the picture (default: their folders')")
    parser.add_argument("--column", choices=("fit", "val"), default="fit", help="error on training data or --val")
    parser.add_argument("--out", type=picture, default="assets/curves.png", help="the picture, NAME.png")
    args = parser.parse_args(argv)
    labels = args.labels or [run.name for run in args.runs]
    if len(labels) != len(args.runs):
        raise BadInput(f"--labels: {len(labels)} names for {len(args.runs)} runs")
    logs = [read_log(run, args.column) for run in args.runs]
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(11, 4.2))
    from matplotlib.ticker import LogLocator
    looks = styles([settings_of(run).get("target") for run in args.runs])
    for label, log, look in zip(labels, logs, looks):
        last, (mean, bins) = max(log.items())
        left.plot(list(log), [mean for mean, _ in log.values()], marker=".", label=label, **look)
        right.plot(list(bins), list(bins.values()), marker=".", label=label, **look)
        by_time = "  ".join(f"{error:.3f}" for error in bins.values())
        say(f"{label}: step {last}, mean at training's times {mean:.4f}, by time {by_time}")
    whose = {"fit": "on images of the training data", "val": "on images never trained on"}[args.column]
    left.set(xlabel="training step", ylabel="squared error of the velocity", title=f"{whose}, mean at training's times")
    right.set(xlabel="time t: noise 0, data 1", title="the same at the last step, by time", xlim=(0, 1))
    for panel in (left, right):
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter("")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=9)
    save(figure, args.out)
    say(f"-> {args.out}")


if __name__ == "__main__":
    sys.exit(main())
