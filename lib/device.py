"""The device: which one, in which precision, compiled or not, how much memory it took."""
import contextlib
import importlib.util
import os
import resource
import shutil
import sys
import warnings

import torch
from torch.nn.parallel import DistributedDataParallel

from lib.run import BadInput, say, world_size


def pick_device() -> torch.device:
    """This rank's own GPU, else Apple's MPS, else the CPU. `CUDA_VISIBLE_DEVICES=` (empty) asks for
    the CPU."""
    if not torch.cuda.is_available():
        mps = torch.backends.mps.is_available() and world_size() == 1  # gloo does not know it
        return torch.device("mps" if mps else "cpu")
    local, found = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local >= found:
        raise BadInput(f"rank {local} has no GPU of its own (of {found}): lower --nproc_per_node")
    torch.cuda.set_device(local)
    torch.backends.cudnn.allow_tf32 = False  # fp32 is fp32, in convolutions as in products
    return torch.device("cuda", local)


def cores() -> int:
    """How many of this machine's cores this rank may use: the ranks share them."""
    return max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def pinned(tensor):
    """The tensor in pinned memory, from where it is copied to a GPU without anybody waiting; as it
    is where there is no GPU, or where it is there already."""
    return tensor.pin_memory() if torch.cuda.is_available() and not tensor.is_cuda else tensor


def use_bf16(precision: str, device: torch.device) -> bool:
    """Whether the network runs in bf16: where asked, by "auto" where CUDA has it in hardware."""
    if precision != "auto":
        return precision == "bf16"
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def to_device(tensor, device):
    """The tensor there. CUDA copies pinned memory while the CPU goes on; MPS would read memory that
    may be another's by then (pytorch issue 189690), so it is waited for."""
    return tensor.to(device, non_blocking=device.type == "cuda")


def compile_net(net, device):
    """torch.compile, in place: the state dict keeps its names. Returns whether it was asked for;
    where it cannot work, says why. `compiled_graphs` says what came of it."""
    if device.type == "cuda":
        able, wanted = importlib.util.find_spec("triton"), "Triton"
    else:
        able, wanted = device.type == "cpu" and shutil.which("g++"), "a CPU with g++, or CUDA"
    if not able:
        say(f"without torch.compile: it wants {wanted}")
        return False
    torch._dynamo.config.suppress_errors = True  # what fails to compile runs as it is, and warns
    # A network with a hook is another network: or a graph from before it would be taken for it.
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    net.compile()
    return True


def compiled_graphs() -> int:
    """How many graphs torch.compile has made in this process."""
    if "torch._dynamo" not in sys.modules:  # importing it takes seconds
        return 0
    return sys.modules["torch._dynamo"].utils.counters["stats"]["unique_graphs"]


def uncompiled():
    """A context in which compiled networks run as they are, whatever the shape of their input."""
    if compiled_graphs():
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()


def peak_memory(device):
    """Peak memory in GB: of the GPU, or of this process where there is none."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 1e9, 2)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024
    return round(peak * unit / 1e9, 2)


def data_parallel(module, device):
    """The module with gradients averaged over the ranks, where there are several. (Its only buffers
    are constant tables, and gradients need no second copy.)"""
    if world_size() == 1:
        return module
    with warnings.catch_warnings():  # torch 2.13 has a new name for what 2.6 knows by the old one
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(
            module, device_ids=[device.index] if device.type == "cuda" else None,
            broadcast_buffers=False, gradient_as_bucket_view=True)
