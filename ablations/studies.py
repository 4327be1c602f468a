"""What logbook.py can run: studies, each a list of runs that differ in one thing."""
import dataclasses
import shlex

from lib.run import BadInput
from model import TARGETS

RECIPE = {"model": "T", "patch": 1, "batch": 128, "lr": 1e-3, "steps": 6000, "warmup": 0.25,
          "decay": 0.3, "ema": 0.999}
# FID, CMMD, DINO-MMD and batches/s that PRX reports for its own, much larger, runs.
PRX = {"plain": "18.20 / .41 / .39 / 3.95", "contrastive": "20.03 / .40 / .36 / 3.75",
       "repa": "16.6 / .39 / .31 / 3.66 (DINOv2)", "tread": "21.61 / .55 / .41 / 4.11"}


@dataclasses.dataclass
class Row:
    """A run, and how it is scored: flags of train.py; techniques; whether the guidance scale is
    searched; further scores, as flags of fid.py."""
    name: str
    flags: str = ""
    techniques: tuple = ()
    search: bool = False
    more: tuple = ()


def nine(args):
    """All predictions with all losses; two seeds of x with x and v with v say what is chance."""
    rows = [Row(f"{target}-{loss}loss-seed0", f"--target {target} --loss {loss}")
            for loss in ("v", "x", "eps") for target in TARGETS]
    return rows + [Row(f"{t}-{t}loss-seed1", f"--target {t} --loss {t} --seed 1") for t in "xv"]


def targets(args):
    """The paper's table in small: three targets at two patch sizes, two seeds of x and v."""
    floor = {"x": ("--t-eps 0",), "eps": (f"--t-eps {1 / 50}",), "v": ()}
    rows = [Row(f"{t}-{patch}-seed0", f"--target {t} --patch {patch}", (), True, floor[t])
            for patch in (1, 2) for t in ("x", "v", "eps")]
    return rows + [Row(f"{t}-{patch}-seed1", f"--target {t} --patch {patch} --seed 1")
                   for patch in (1, 2) for t in "xv"]


def techniques(args):
    """Each technique of this folder, with x as the target, and some joined."""
    repa = f"--teacher {shlex.quote(str(args.teacher))} --hidden {args.hidden}"
    rows = [
        Row("plain", more=("--contrast -0.0526316",)), Row("plain-seed1", "--seed 1"),
        Row("contrastive", "", ("contrastive",), more=("--contrast 0.05",)),
        Row("tread", "", ("tread",)), Row("repa", repa, ("repa",)),
        Row("irepa", f"{repa} --conv --gamma 0.6 --weight 1", ("repa",)),
        Row("repa-stopped", f"{repa} --until {args.steps // 3}", ("repa",)),
        Row("repa-contrastive", repa, ("repa", "contrastive")),
        Row("repa-tread", repa, ("repa", "tread"))]
    return [row for row in rows if args.teacher or "repa" not in row.techniques]


def told(row):
    """What others report of such a run, {} or {column: text}."""
    return {"PRX": PRX[row.name]} if row.name in PRX else {}


STUDIES = {"nine": nine, "targets": targets, "techniques": techniques}


def chosen(args):
    """The rows of args.study, those of args.only where it is given. Raises BadInput."""
    rows = STUDIES[args.study](args)
    names = [row.name for row in rows]
    for name in args.only or ():
        if name not in names:
            raise BadInput(f"--only {name}: expected some of {', '.join(names)}")
    return [row for row in rows if not args.only or row.name in args.only]
