"""The networks behind the metrics, each loaded once; their embeddings, gathered."""
import pathlib

import torch
import torch.distributed as dist

from lib.checkpoint import weights_hash
from lib.inception import load_inception
from lib.run import BadInput, world_size
from lib.vit import load_vit

EMBEDDINGS = 10_000
METRICS = ("fid", "mmd", "cmmd", "dino")
WANTED = {"cmmd": "--clip openai/clip-vit-large-patch14-336, or a file or folder of it",
          "dino": "--dino facebook/dinov2-with-registers-large, or a file or folder of it"}


def judge_flags(add):
    """The flags of what is measured and of where the networks' weights are."""
    add("--metrics", nargs="+", choices=METRICS, default=["fid"],
        help="fid: FID and IS; mmd: with Inception's features; cmmd, dino: with CLIP's, DINOv2's")
    add("--inception", type=pathlib.Path,
        help="Inception's weights (default: torch's cache, or download)")
    add("--clip", help=WANTED["cmmd"])
    add("--dino", help=WANTED["dino"])


def load_judges(metrics, inception=None, clip=None, dino=None, device="cpu", reference=None):
    """{metric: network} in the order of METRICS; fid and mmd share Inception. inception, clip,
    dino: where their weights are. Raises BadInput for weights that are missing, or that are others
    than the Reference was made with."""
    judges = {}
    for metric in METRICS:
        if metric in ("fid", "mmd") and metric in metrics:
            judges[metric] = judges.get("fid") or load_inception(inception, device)
        elif metric in metrics:
            path = {"cmmd": clip, "dino": dino}[metric]
            if path is None:
                raise BadInput(f"--metrics {metric}: give {WANTED[metric]}")
            judges[metric] = load_vit(path, device=device)
    made_by = reference.about.get("judges") if reference else None
    for metric, name in judge_names(judges).items() if made_by else ():
        if made_by.get(metric, name) != name:
            raise BadInput(f"{WANTED[metric].split()[0]}: another network ({name}) than made the "
                           f"{metric} of --ref ({made_by[metric]})")
    return judges


def judge_names(judges):
    """{metric: hash of its network's weights}, but of Inception, of which there is only one."""
    return {metric: weights_hash(judges[metric]) for metric in WANTED if metric in judges}


def spread(n):
    """The indices, at most 10,000 and evenly spread over n images, that an MMD is computed from."""
    count = min(n, EMBEDDINGS)
    return [i * n // count for i in range(count)]


def gathered(rows, indices):
    """{index: embedding (E,)} of all ranks as one tensor (indices, E)."""
    parts = [rows]
    if dist.is_initialized():
        parts = [None] * world_size()
        dist.all_gather_object(parts, rows)
    everything = {i: row for part in parts for i, row in part.items()}
    return torch.stack([everything[i] for i in indices])
