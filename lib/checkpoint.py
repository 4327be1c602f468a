"""Weight files: checkpoints of a run, the light exports that people share, the paper's release.
Ours are safetensors, which hold no code: tensors `model.*`, `ema.*`, `ema2.*`, `optimizer.*`,
`beside.*` (what an ablation trains besides), `data.mean_latent`; all else that belongs to a run is
JSON under one key of the header."""
import argparse
import hashlib
import json
import os
import pathlib
import zipfile

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lib.files import atomic, check_disk
from lib.run import BadInput, RunFailed, mean_over_ranks, rank, say
from model import JLT, TARGETS, Denoiser

FLUX2 = "black-forest-labs/FLUX.2-klein-4B"
WEIGHTS = ("model", "ema", "ema2")


# -------------------------------------------------------------------------------------------------
# Files

def save_checkpoint(path, tensors, settings, keep=None):
    """Write atomically; what stood at `path` moves to `keep` where given. Raises RunFailed."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic(path, keep) as temporary:
        save_file(tensors, temporary, {"nanojlt": json.dumps(settings, sort_keys=True)})


def read_checkpoint(path, skip=None):
    """(tensors, settings) of a safetensors file, without the group `skip`; settings {} where it is
    not ours. Raises BadInput where it is not whole."""
    try:
        with safe_open(path, "pt") as file:
            settings = json.loads((file.metadata() or {}).get("nanojlt", "{}"))
            names = [name for name in file.keys() if name.split(".")[0] != skip]
            return {name: file.get_tensor(name) for name in names}, up_to_date(settings)
    except (OSError, SafetensorError, ValueError) as error:
        raise BadInput(f"{path}: not a whole safetensors checkpoint ({error})") from None


def up_to_date(settings):
    """Settings as they are called now: the one place that knows how older files called them."""
    renamed = {"warmup": "warmup_epochs", "hint": "vae_path"}
    return {renamed.get(name, name): value for name, value in settings.items()}


def read_weights(path):
    """({"model": {name: tensor}, "ema": ...}, settings) of one of our files, the release's
    `checkpoint-last.pth`, or a plain state dict, which counts as model and average alike. Nothing
    in the file is run as code."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise BadInput(f"{path}: no such checkpoint file")
    if path.suffix != ".safetensors":
        return read_release(path)
    tensors, settings = read_checkpoint(path, skip="optimizer")
    if not settings:
        return {"model": tensors, "ema": tensors}, release_settings(argparse.Namespace())
    settings["mean_latent"] = tensors.get("data.mean_latent")
    return {group: part(tensors, group) for group in WEIGHTS if part(tensors, group)}, settings


def read_release(path):
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            data = torch.load(path, "cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        settings = release_settings(data.get("args", argparse.Namespace()))
    except Exception as error:  # a damaged or unsafe pickle fails in any way it likes
        known = isinstance(error, (OSError, RuntimeError, ValueError))
        reason = str(error).split(". ")[0][:150] if known else type(error).__name__
        raise BadInput(f"{path}: not a checkpoint of plain tensors ({reason})") from None
    if "model" not in data:
        return {"model": data, "ema": data}, settings
    names = {"model": "model", "ema": "model_ema1", "ema2": "model_ema2"}
    return {ours: data[name] for ours, name in names.items() if name in data}, settings


def release_settings(args):
    """Our settings, from the arguments that the release stores beside its weights."""
    predicts_v = getattr(args, "flow_matching", None)
    target = {None: None, True: "v", False: "x"}[predicts_v]
    size = getattr(args, "img_size", 256)
    return {"target": target, "t_eps": getattr(args, "t_eps", 0.05), "cfg": 2.9, "size": size,
            "input_size": size // 16, "vae": {"kind": "flux2", "id": FLUX2}}


def find_file(source, *names):
    """The path of the first of these files that `source`, a folder or a Hugging Face id, has.
    Raises OSError."""
    if os.path.isdir(source):
        found = [path for path in (pathlib.Path(source, name) for name in names) if path.is_file()]
        if found:
            return found[0]
        raise FileNotFoundError(f"no {' or '.join(names)} there")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError
    for name in names:
        try:
            return pathlib.Path(hf_hub_download(source, name))
        except EntryNotFoundError:  # also where the hub cannot be reached and its cache lacks it
            pass
    raise OSError(f"no {' or '.join(names)} there, or the hub cannot be reached")


# -------------------------------------------------------------------------------------------------
# From a file to a network

def part(tensors, group):
    """The tensors of one group, without the group's name."""
    return {name.removeprefix(f"{group}."): tensor for name, tensor in tensors.items()
            if name.startswith(f"{group}.")}


def build_net(weights: dict, path, input_size: int) -> JLT:
    """The network that fits these tensors, its sizes (but the latent's) read off their shapes.
    Raises BadInput, naming the tensor, where one is missing, unknown or misshapen."""
    weights = {name.removeprefix("module.").removeprefix("net."): tensor
               for name, tensor in weights.items()}
    weights.pop("mask_token", None)  # in the release's files; the paper's model has no use for it
    try:
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
    sets, settings = read_weights(path)
    if weights not in sets:
        raise BadInput(f"{path}: no weights {weights!r}: it has --weights {' '.join(sets)}")
    for name, given in {"target": target, "input_size": input_size}.items():
        if given and settings.get(name) not in (None, given):
            if name == "target" or "step" in settings:  # a release's size is only an inference
                raise BadInput(f"{path}: the {name} of that network is {settings[name]}")
        settings[name] = given or settings.get(name)
    if settings["target"] not in TARGETS:  # most likely None
        raise BadInput(f"{path} does not say what its network predicts ({settings['target']}): "
                       f"give --target {', '.join(TARGETS)}")
    objective = {name: settings[name] for name in ("loss", "P_mean", "P_std", "t_eps", "label_drop")
                 if name in settings}
    net = build_net(sets[weights], path, settings["input_size"])
    denoiser = Denoiser(net, settings["target"], **objective)
    denoiser.settings = {"cfg": 1.0, "interval": (0.1, 1.0)} | settings
    mean = denoiser.settings.pop("mean_latent", None)
    denoiser.mean_latent = None if mean is None else mean.to(device)
    return denoiser.to(device).eval().requires_grad_(False)


def is_young(step: int, decay: float) -> bool:
    """Whether an average over about 1/(1-decay) steps still remembers the start of training."""
    return step * (1 - decay) < 3  # that is, before three times as many steps


def warn_if_young(settings, weights):
    decays = dict(zip(("ema", "ema2"), settings.get("ema", [])))
    if weights in decays and is_young(settings["step"], decays[weights]):
        say(f"warning: {settings['step']} steps are few for an EMA of {decays[weights]}, which "
            "remembers the start: compare with --weights model of the run's last.safetensors")


def load_init(path, net, target, class_names=None):
    """The network in `path`, to start from. Where its classes are others, by number or by name, it
    gets the new label table of `net`. Raises BadInput where it differs from `net` otherwise (but a
    bottleneck, or none, may)."""
    sets, settings = read_weights(path)
    start = build_net(sets.get("ema") or sets["model"], path, net.input_size)
    if settings.get("target") not in (None, target):
        raise BadInput(f"--init {path}: it predicts {settings['target']}, not {target}")
    ours, theirs = (
        {"patch size": n.patch_size, "channels": n.in_channels}
        | {name: tuple(value.shape) for name, value in n.state_dict().items()
           if not name.startswith(("x_embedder", "y_embedder"))}
        for n in (net, start))
    for name in ours | theirs:
        if ours.get(name) != theirs.get(name):
            raise BadInput(f"--init {path}: {name} is {theirs.get(name)}, not {ours.get(name)}")
    known = settings.get("class_names") or class_names  # where it does not name them: believed
    if start.num_classes != net.num_classes or (class_names and known != class_names):
        say(f"--init {path}: other classes than the {net.num_classes} here: a new label table")
        start.y_embedder, start.num_classes = net.y_embedder, net.num_classes
    return start


def weights_hash(net) -> str:
    """Eight characters that name a network's weights wherever something made by it is written."""
    digest = hashlib.sha256()
    for _, tensor in sorted(net.state_dict().items()):
        digest.update(tensor.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:8]


# -------------------------------------------------------------------------------------------------
# A run's folder

# Below, nets are the network and its averages, in the order of WEIGHTS.

def export_tensors(nets):
    """What people share: the averages alone."""
    return {f"{group}.{name}": value for group, net in zip(WEIGHTS[1:], nets[1:])
            for name, value in net.state_dict().items()}


def run_tensors(nets, optimizer, beside):
    """All that a run needs to continue. beside: {name: parameter}, what an ablation trains besides
    the network."""
    tensors = {f"model.{name}": value for name, value in nets[0].state_dict().items()}
    tensors |= {f"beside.{name}": p for name, p in beside.items()}
    for name, p in (dict(nets[0].named_parameters()) | beside).items():
        tensors |= {f"optimizer.{key}.{name}": v for key, v in optimizer.state[p].items()}
    return tensors | export_tensors(nets)


def restore(tensors, nets, optimizer, beside):
    """Put the tensors of a checkpoint back where they came from."""
    try:
        for group, net in zip(WEIGHTS, nets):
            net.load_state_dict(part(tensors, group))
        for name, p in beside.items():
            p.data.copy_(tensors[f"beside.{name}"])
        for name, p in (dict(nets[0].named_parameters()) | beside).items():
            state = {key: tensors[f"optimizer.{key}.{name}"]
                     for key in ("step", "exp_avg", "exp_avg_sq")}
            optimizer.state[p] = {key: v.to(p.device, copy=True) for key, v in state.items()}
    except (KeyError, RuntimeError) as error:
        raise BadInput(f"the checkpoint does not fit the network: {str(error)[:300]}") from None


def resume_point(out):
    """(tensors, settings) of the newest whole checkpoint in a run's folder, or (None, None). A
    damaged `last` is set aside: the next save would move it over the whole `previous`."""
    last, previous = out / "last.safetensors", out / "previous.safetensors"
    if rank() == 0:  # which holds the folder's lock
        for stale in out.glob(".tmp*"):  # of a save that was killed
            stale.unlink()
    found = [path for path in (last, previous) if path.exists()]
    for path in found:
        try:
            tensors, settings = read_checkpoint(path)
            if "step" not in settings:
                raise BadInput(f"{path}: not a checkpoint of a run")
        except BadInput as error:
            say(f"WARNING: {error}")
            continue
        if path == previous and last in found and rank() == 0:
            os.replace(last, out / "last.damaged")
        return tensors, settings
    if found:
        raise BadInput(f"{out}: its checkpoints are damaged: move them away, or take another --out")
    return None, None


def resume(out, settings, nets, optimizer, beside):
    """Put the newest checkpoint of a run's folder into nets, optimizer and what is trained beside.
    Returns (step, skipped steps), 0 where there is none. Raises BadInput where it is another
    run's."""
    tensors, saved = resume_point(out)
    step, skipped = 0, 0
    if tensors:
        check_same_run(out, saved, settings)
        restore(tensors, nets, optimizer, beside)
        step, skipped = saved["step"], saved["skipped"]
        say(f"continues {out} at step {step}")
    if mean_over_ranks(torch.tensor(step, dtype=torch.float64)) != step:
        raise RunFailed(f"ranks found different checkpoints, this one that of step {step}: do all "
                        "nodes see the same --out?")
    if step == 0:  # three whole checkpoints (last, previous, the next) and an export
        size = sum(p.numel() for p in nets[0].parameters())
        more = sum(p.numel() for p in beside.values())  # with its two moments
        check_disk(out, 4 * (size * (3 * (len(nets) + 2) + len(nets) - 1) + more * 9))
    return step, skipped


def check_same_run(out, saved, now):
    """Raises BadInput where these settings make it another run. The number of steps is free as long
    as the learning rate has not yet followed from it."""
    steps = min(saved["steps"], now["steps"])
    falling = now["decay"] and saved["step"] >= (1 - now["decay"]) * steps
    different = [f"{name} ({saved.get(name)} there, {value} here)" for name, value in now.items()
                 if saved.get(name) != value and (name != "steps" or falling)]
    if different:
        raise BadInput(f"{out} holds a run with another {', '.join(different)}")


def newest_checkpoint(weights="ema", folder="out"):
    """The newest run's file with these weights: the light export where it is enough."""
    names = ("ema", "last", "previous") if weights != "model" else ("last", "previous", "ema")
    files = [path for name in names
             for path in pathlib.Path(folder).glob(f"*/{name}.safetensors")]
    if not files:
        raise BadInput(f"no checkpoint in {folder}/: train one (python train.py --demo: minutes) "
                       "or give --ckpt FILE")
    run = max(files, key=lambda path: path.stat().st_mtime).parent
    return next(path for path in files if path.parent == run)
