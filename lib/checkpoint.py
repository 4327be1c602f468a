"""Weight files: checkpoints of a run, the smaller exports that people share, the paper's release.

Ours are safetensors, which cannot hold code: tensors `model.*`, `ema.*`, `ema2.*`, `optimizer.*`
and, for some ablations, `extra.*`. Everything else that belongs to a run is JSON in the header.
"""
import argparse
import hashlib
import json
import os
import pathlib
import time
import zipfile

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lib.files import atomic
from lib.run import BadInput, log, rank
from model import JLT, TARGETS, Denoiser

FORMAT = 2  # of a run's checkpoint; 1 stored the optimizer in another way
FLUX2 = "black-forest-labs/FLUX.2-klein-4B"
WEIGHTS = ("model", "ema", "ema2")


# -------------------------------------------------------------------------------------------------
# Files

def save_checkpoint(path, tensors, settings, keep=None):
    """Write a checkpoint atomically; the old file moves to `keep` where given. Raises RunFailed."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic(path, keep) as temporary:
        save_file(tensors, temporary, {"nanojlt": json.dumps(settings, sort_keys=True)})


def read_checkpoint(path, skip=None):
    """(tensors, settings) of a safetensors file, without the tensors `skip.*`; settings are {} for
    a file that is not ours. Raises BadInput where the file is damaged."""
    try:
        with safe_open(path, "pt") as file:
            settings = dict(json.loads((file.metadata() or {}).get("nanojlt", "{}")))
            names = [name for name in file.keys() if name.split(".")[0] != skip]
            return {name: file.get_tensor(name) for name in names}, settings
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        raise BadInput(f"{path}: not a whole safetensors checkpoint ({error})") from None


def read_weights(path):
    """({"model": {name: tensor}, "ema": ...}, settings) of one of our files, of the release's
    `checkpoint-last.pth`, or of a plain state dict, which serves as model and EMA alike. Nothing in
    the file is executed. Raises BadInput."""
    path = pathlib.Path(path)
    if not path.is_file():
        time.sleep(0.2)  # a run that saves renames its files; this may be the instant between
        if not path.is_file():
            raise BadInput(f"{path}: no such checkpoint file")
    if path.suffix != ".safetensors":
        return read_release(path)
    tensors, settings = read_checkpoint(path, skip="optimizer")
    if not settings:
        return {"model": tensors, "ema": tensors}, release_settings(argparse.Namespace())
    groups = {group: group_tensors(tensors, group) for group in WEIGHTS}
    return {group: weights for group, weights in groups.items() if weights}, settings


def read_release(path):
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            data = torch.load(path, "cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        settings = release_settings(data.get("args", argparse.Namespace()))
    except Exception as error:  # a damaged or unsafe pickle can fail in any way
        known = isinstance(error, (OSError, RuntimeError, ValueError))
        reason = str(error).split(". ")[0][:150] if known else type(error).__name__
        raise BadInput(f"{path}: not a checkpoint of plain tensors ({reason})") from None
    if "model" not in data:
        return {"model": data, "ema": data}, settings
    names = {"model": "model", "ema": "model_ema1", "ema2": "model_ema2"}
    return {ours: data[name] for ours, name in names.items() if name in data}, settings


def release_settings(args):
    """Our settings, from the training arguments that the release stores beside its weights."""
    predicts_v = getattr(args, "flow_matching", None)
    target = {None: None, True: "v", False: "x"}[predicts_v]
    size = getattr(args, "img_size", 256)
    return {"target": target, "t_eps": getattr(args, "t_eps", 0.05), "cfg": 2.9, "size": size,
            "input_size": size // 16, "vae": {"kind": "flux2", "id": FLUX2}}


def find_file(source, *names):
    """The path of the first of these files in `source`, a folder or a Hugging Face id. Raises
    OSError where there is none."""
    if os.path.isdir(source):
        found = [path for path in (pathlib.Path(source, name) for name in names) if path.is_file()]
        if found:
            return found[0]
        raise FileNotFoundError(f"no {' or '.join(names)} in it")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError
    for name in names:
        try:
            return pathlib.Path(hf_hub_download(source, name))
        except EntryNotFoundError:  # also where the hub cannot be reached and its cache lacks it
            pass
    raise OSError(f"no {' or '.join(names)} in it, or the hub cannot be reached")


def group_tensors(tensors, group):
    """The tensors named GROUP.*, without that prefix."""
    return {name.removeprefix(f"{group}."): tensor for name, tensor in tensors.items()
            if name.startswith(f"{group}.")}


# -------------------------------------------------------------------------------------------------
# From a file to a network

def build_net(weights: dict, path, input_size: int) -> JLT:
    """The network that fits these tensors. Its sizes are read off their shapes, except for the
    latent's. Raises BadInput, naming the tensor, where one is missing, unknown or misshapen."""
    try:
        weights = {name.removeprefix("module.").removeprefix("net."): tensor
                   for name, tensor in weights.items()}
        weights.pop("mask_token", None)  # in the release's files, not used in the paper's model
        bottleneck = weights.get("x_embedder.proj1.weight")
        patch = weights["x_embedder.proj.weight"] if bottleneck is None else bottleneck
        width = len(weights["t_embedder.mlp.2.bias"])
        blocks = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
        net = JLT(
            input_size, patch.shape[-1], patch.shape[1], width, depth=len(blocks),
            num_heads=width // len(weights["blocks.0.attn.q_norm.weight"]),
            num_classes=len(weights["y_embedder.embedding_table.weight"]) - 1,
            bottleneck=0 if bottleneck is None else len(bottleneck))
        net.load_state_dict(weights)
    except (KeyError, ValueError, RuntimeError, IndexError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise BadInput(f"{path}: not the weights of a JLT ({reason})") from None
    return net


def load_denoiser(path, weights="ema", device="cpu", target=None, input_size=None) -> Denoiser:
    """A Denoiser in eval mode, with its `.settings`, from a checkpoint, an export or a published
    file. weights: "model", "ema" or "ema2". target and input_size (the latent's height) are for
    files that do not say them. Raises BadInput, naming what is wrong."""
    groups, settings = read_weights(path)
    if weights not in groups:
        raise BadInput(f"{path}: no weights {weights!r}: it has --weights {' '.join(groups)}")
    for name, given in {"target": target, "input_size": input_size}.items():
        if given and settings.get(name) not in (None, given):
            if name == "target" or "step" in settings:  # a release's size is only inferred
                raise BadInput(f"{path}: the {name} of that network is {settings[name]}")
        settings[name] = given or settings.get(name)
    if settings["target"] not in TARGETS:  # usually None
        raise BadInput(f"{path}: it does not say what it predicts ({settings['target']}): give "
                       "--target")
    net = build_net(groups[weights], path, settings["input_size"] or 16)
    objective = {name: settings[name] for name in
                 ("loss", "P_mean", "P_std", "t_eps", "label_drop") if name in settings}
    denoiser = Denoiser(net, settings["target"], **objective)
    denoiser.settings = {"cfg": 1.0, "interval": [0.1, 1.0]} | settings
    return denoiser.to(device).eval().requires_grad_(False)


def load_init(path, net, target, class_names):
    """Start `net` from the weights in `path`. Its patch embedding is taken over whole, so that the
    release's weights, which have no bottleneck, can be fine-tuned. Where the classes differ, by
    number or by name, the label table stays as it is. Raises BadInput where anything else differs.
    """
    groups, settings = read_weights(path)
    if settings.get("target") not in (None, target):
        raise BadInput(f"--init {path}: it predicts {settings['target']}, not {target}")
    start = build_net(groups.get("ema") or groups["model"], path, net.input_size)
    if (start.patch_size, start.in_channels) != (net.patch_size, net.in_channels):
        raise BadInput(f"--init {path}: patch size {start.patch_size} and {start.in_channels} "
                       f"channels, not {net.patch_size} and {net.in_channels}")
    weights, table = start.state_dict(), "y_embedder.embedding_table.weight"
    theirs = settings.get("class_names") or class_names  # a file that names none is believed
    if start.num_classes != net.num_classes or (class_names and theirs != class_names):
        log(f"--init {path}: other classes than the {net.num_classes} here: a new label table")
        weights[table] = net.state_dict()[table]
    net.x_embedder = start.x_embedder
    try:
        net.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise BadInput(f"--init {path}: another network than this run's ({reason})") from None


def weights_hash(net) -> str:
    """Eight characters that name a network's weights wherever something made with it is noted."""
    digest = hashlib.sha256()
    for _, tensor in sorted(net.state_dict().items()):
        digest.update(tensor.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:8]


def newest_checkpoint(weights="ema"):
    """The file with these weights of the newest run in out/: the small export where it is enough.
    """
    name = "last" if weights == "model" else "ema"
    files = list(pathlib.Path("out").glob(f"*/{name}.safetensors"))
    if not files:
        raise BadInput("no checkpoint in out/: train one (python train.py --demo takes minutes) or "
                       "give --ckpt FILE")
    return max(files, key=lambda path: path.stat().st_mtime)


# -------------------------------------------------------------------------------------------------
# A run's folder

def export_tensors(emas):
    """What people share: the EMAs alone."""
    return {f"{group}.{name}": value for group, ema in zip(WEIGHTS[1:], emas)
            for name, value in ema.state_dict().items()}


def run_tensors(net, emas, extra, optimizer):
    """(tensors, JSON) of all that a run needs to continue. extra: {name: parameter}, what an
    ablation trains besides the network. The optimizer's state dict is split into its tensors and
    the rest, so that any optimizer can be stored."""
    tensors = {f"model.{name}": value for name, value in net.state_dict().items()}
    tensors |= export_tensors(emas) | {f"extra.{name}": p for name, p in extra.items()}
    state = optimizer.state_dict()
    if not state["state"]:  # as of an optimizer that wraps others and leaves their state to them
        log("warning: the optimizer gives no state to save: if it has any, the run will not resume "
            "exactly")
    rest = {"param_groups": state["param_groups"], "state": {}}
    for index, values in state["state"].items():
        rest["state"][index] = {}
        for key, value in values.items():
            if torch.is_tensor(value):
                tensors[f"optimizer.{index}.{key}"] = value
            else:
                rest["state"][index][key] = value
    return tensors, rest


def restore(tensors, optimizer_rest, net, emas, extra, optimizer):
    """Load what `run_tensors` gave. Raises BadInput where it does not fit."""
    try:
        for group, network in zip(WEIGHTS, [net, *emas]):
            network.load_state_dict(group_tensors(tensors, group))
        for name, p in extra.items():
            p.data.copy_(tensors[f"extra.{name}"])
        state = {int(index): dict(values) for index, values in optimizer_rest["state"].items()}
        for name, value in group_tensors(tensors, "optimizer").items():
            index, key = name.split(".", 1)
            state[int(index)][key] = value.clone()
        optimizer.load_state_dict({"state": state, "param_groups": optimizer_rest["param_groups"]})
    except (KeyError, RuntimeError, ValueError) as error:
        raise BadInput(f"the checkpoint does not fit the network: {str(error)[:300]}") from None


def resume_point(out):
    """(tensors, settings) of the newest whole checkpoint in a run's folder, or (None, None). A
    damaged `last` is set aside, because the next save would move it over the whole `previous`."""
    last, previous = out / "last.safetensors", out / "previous.safetensors"
    existing = [path for path in (last, previous) if path.exists()]
    for path in existing:
        try:
            tensors, settings = read_checkpoint(path)
            if "step" not in settings:
                raise BadInput(f"{path}: not a checkpoint of a run")
        except BadInput as error:
            log(f"WARNING: {error}")
            continue
        if path == previous and last in existing and rank() == 0:
            os.replace(last, out / "last.damaged")
        return tensors, settings
    if existing:
        raise BadInput(f"{out}: its checkpoints are damaged: move them away, or choose another "
                       "--out")
    return None, None


def check_same_run(out, saved, now):
    """Raises BadInput where these settings make another run. The number of steps may change as long
    as the learning rate has not yet followed from it."""
    if saved.get("format") != FORMAT:
        raise BadInput(f"{out}: a run of an older version of this code, whose optimizer cannot be "
                       "continued here: finish it with commit 1d03df4, or choose another --out "
                       "(its exports load)")
    steps = min(saved["steps"], now["steps"])
    falling = now["decay"] and saved["step"] >= (1 - now["decay"]) * steps
    different = [f"{name} ({saved.get(name)} there, {value} here)" for name, value in now.items()
                 if saved.get(name) != value and (name != "steps" or falling)]
    if different:
        raise BadInput(f"{out} holds a run with another {', '.join(different)}")
