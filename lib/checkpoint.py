"""Checkpoint files: safetensors, which hold no code. Tensors `model.*`, `ema.*`, `ema2.*` and `optimizer.*`; all else
that belongs to a run is JSON, sorted, under one key of the header. Files of the paper's release are read as well."""
import argparse
import json
import os
import pathlib
import zipfile

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lib.run import BadInput, RunFailed, atomic, rank, say, world_size

RELEASE_TARGETS = ("x", "v")  # what its args may say


def save_checkpoint(path, tensors, settings, keep=None):
    """Write atomically; what stood at `path` moves to `keep` where given. Raises RunFailed, the old file intact."""
    header = {"nanojlt": json.dumps(settings, sort_keys=True)}
    try:
        with atomic(path, keep) as temporary:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary, header)
    except (OSError, SafetensorError) as error:
        raise RunFailed(f"cannot save {path}: {error}; what was saved before is intact") from None


def read_checkpoint(path, skip="nothing"):
    """(tensors, settings) of a safetensors file; settings are None where it is not ours. Tensors of the group `skip`
    are left out. Raises BadInput where the file is not whole."""
    try:
        with safe_open(path, "pt") as file:
            settings = json.loads((file.metadata() or {}).get("nanojlt", "null"))
            return {name: file.get_tensor(name) for name in file.keys() if name.split(".")[0] != skip}, settings
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not a whole safetensors checkpoint ({error})") from None


def between(low, high):
    return lambda value: isinstance(value, (int, float)) and low <= value <= high


SOUND = {  # what the settings in a file may be, where they are there; the file may come from anywhere
    "target": lambda x: type(x) is str, "loss": lambda x: type(x) is str, "step": between(0, 1e12),
    "input_size": between(1, 512), "size": between(1, 8192), "cfg": between(0, 1000), "t_eps": between(0, 1),
    "P_mean": between(-99, 99), "P_std": between(0, 99), "label_drop": between(0, 1), "hint": lambda x: type(x) is str,
    "ema": lambda x: type(x) is list and all(map(between(0, 1), x)),
    "interval": lambda x: type(x) is list and len(x) == 2 and all(map(between(0, 1), x)),
    "class_names": lambda x: type(x) is list and all(type(name) is str for name in x),
    "vae": lambda x: type(x) is dict and type(x.get("kind")) is type(x.get("id")) is str}


def sound(path, settings):
    """The settings, where they are of the expected types and ranges. Raises BadInput, naming the one that is not."""
    for name, fits in SOUND.items():
        if settings.get(name) is not None and not fits(settings[name]):
            raise BadInput(f"{path}: settings that make no sense ({name} {str(settings[name])[:40]!r})")
    return settings


def plain(tensor):
    """Whether this is an ordinary tensor of floats, with all its numbers in memory. A file may hold other kinds, and a
    view that claims a shape for which its file would be too small."""
    return (isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and tensor.is_floating_point()
            and tensor.device.type == "cpu" and tensor.nbytes <= tensor.untyped_storage().nbytes())


def read_weights(path):
    """({"model": {name: tensor}, "ema": {...}, ...}, settings) of any file this project reads: a checkpoint or export
    of ours, the release's `checkpoint-last.pth`, or a plain state dict, whose one set counts as model and EMA alike.
    Only tensors and the release's argparse.Namespace are unpickled: a file from anywhere cannot run code here."""
    data, settings, said = {}, None, {}
    if not pathlib.Path(path).is_file():
        raise BadInput(f"{path}: no such checkpoint file")
    if pathlib.Path(path).suffix == ".safetensors":
        data, settings = read_checkpoint(path, skip="optimizer")
    else:
        try:
            packed = zipfile.is_zipfile(path)
            if packed and any(part.compress_type for part in zipfile.ZipFile(path).infolist()):
                raise ValueError("compressed, as torch never writes it")  # it could unpack to any size
            with torch.serialization.safe_globals([argparse.Namespace]):
                data = torch.load(path, "cpu", weights_only=True, mmap=packed)
            said = vars(data.get("args", argparse.Namespace()))
        except Exception as error:  # a damaged or hostile pickle fails in any way it likes
            known = isinstance(error, (OSError, RuntimeError, ValueError))  # others say what would be unsafe to follow
            reason = str(error).split(". ")[0][:150] if known else type(error).__name__
            raise BadInput(f"{path}: not a checkpoint of plain tensors ({reason})") from None
    if isinstance(settings, dict):
        groups = {name.split(".")[0] for name in data}
        return {group: {name.split(".", 1)[1]: tensor for name, tensor in data.items() if name.startswith(f"{group}.")}
                for group in groups}, sound(path, settings)
    spoken = (str(said.get(name)) for name in ("target", "prediction", "pred", "pred_type"))
    target = next((target for word in spoken for target in RELEASE_TARGETS if word.startswith(target)), None)
    settings = {"target": target, "t_eps": said.get("t_eps", 0.05), "size": said.get("img_size", 256), "cfg": 2.9,
                "vae": {"kind": "flux2", "id": "black-forest-labs/FLUX.2-klein-4B"}}
    sound(path, settings)
    if isinstance(data.get("model"), dict):
        release = {"model": "model", "ema": "model_ema1", "ema2": "model_ema2"}
        return {ours: data[theirs] for ours, theirs in release.items() if isinstance(data.get(theirs), dict)}, settings
    return {"model": data, "ema": data}, settings


def tensors_of(net, emas, optimizer=None):
    """What is saved: with an optimizer, all that the run needs to continue; without, the averages that people share."""
    modules = {"model": net if optimizer else None, **dict(zip(("ema", "ema2"), emas))}
    tensors = {f"{group}.{name}": value for group, module in modules.items() if module
               for name, value in module.state_dict().items()}
    return tensors | {f"optimizer.{key}.{name}": value for name, p in net.named_parameters() if optimizer
                      for key, value in optimizer.state[p].items()}


def restore(tensors, net, emas, optimizer):
    """Put the tensors of a checkpoint back where they came from."""
    try:
        for group, module in {"model": net, **dict(zip(("ema", "ema2"), emas))}.items():
            mine = (name for name in tensors if name.startswith(f"{group}."))
            module.load_state_dict({name.removeprefix(f"{group}."): tensors[name] for name in mine})
        for name, p in net.named_parameters():
            state = {key: tensors[f"optimizer.{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
            for key, value in state.items():  # the fused optimizer does not look: it would read beyond the end
                if value.shape != (() if key == "step" else p.shape) or value.dtype != torch.float32:
                    raise KeyError(f"optimizer.{key}.{name} is {value.dtype} {tuple(value.shape)}")
            optimizer.state[p] = {key: value.to(p.device, copy=True) for key, value in state.items()}
    except (KeyError, RuntimeError) as error:
        raise BadInput(f"the checkpoint to continue does not fit the network: {str(error)[:300]}") from None


def resume_point(out):
    """(tensors, settings) of the newest whole checkpoint in a run's folder, or (None, None) where there is none yet. A
    damaged `last` is set aside as last.damaged, or the next save would move it over the whole `previous`."""
    last, previous = out / "last.safetensors", out / "previous.safetensors"
    for stale in out.glob(".tmp*") if rank() == 0 else ():  # of a save that was killed; the caller holds the lock
        stale.unlink()
    found = [path for path in (last, previous) if path.exists()]
    for path in found:
        try:
            tensors, settings = read_checkpoint(path)
            if not isinstance(settings, dict) or not all(
                    type(settings.get(name)) is int and settings[name] >= 0 for name in ("step", "steps", "skipped")):
                raise BadInput(f"{path}: not a checkpoint of a run")
        except BadInput as error:
            say(f"WARNING: {error}")
            continue
        if path == previous and last in found and rank() == 0:
            os.replace(last, out / "last.damaged")
        return tensors, settings
    if found:
        raise BadInput(f"{out}: its checkpoints are damaged: move them away to start anew, or choose another --out")
    return None, None


def agreed(step):
    """The step from which this rank, and so every rank, continues. Raises RunFailed where they differ."""
    if world_size() > 1:
        both = torch.tensor([step, -step])
        dist.all_reduce(both, dist.ReduceOp.MAX)
        if both[0] != -both[1]:
            raise RunFailed(f"ranks found checkpoints of different steps ({-both[1]} to {both[0]}): do all nodes see "
                            "the same --out, and can all read it?")
    return step


def check_same_run(out, saved, now):
    """Refuse to continue a run with settings that would make it another run. The number of steps is free as long as the
    learning rate has not yet followed from it."""
    falling = now["decay"] and saved["step"] >= (1 - now["decay"]) * min(saved["steps"], now["steps"])
    different = [f"{name} ({saved.get(name)} there, {value} here)" for name, value in now.items()
                 if saved.get(name) != value and (name != "steps" or falling)]
    if different:
        raise BadInput(f"{out} holds a run with another {', '.join(different)}: take another --out or the same flags")


def newest_checkpoint(weights="ema", folder="out"):
    """The newest run's file with these weights: the light export where it is enough, else the whole checkpoint."""
    files = [f for name in ("ema", "last", "previous") for f in pathlib.Path(folder).glob(f"*/{name}.safetensors")]
    if not files:
        raise BadInput(f"no checkpoint in {folder}/: train one (python train.py --demo: minutes) or give --ckpt FILE")
    run = max(files, key=lambda f: f.stat().st_mtime).parent
    wanted = ("ema", "last", "previous") if weights != "model" else ("last", "previous", "ema")
    return next(run / f"{name}.safetensors" for name in wanted if run / f"{name}.safetensors" in files)
