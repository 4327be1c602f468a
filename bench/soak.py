"""Kill runs again and again, start them with the same command, compare with runs left alone.

    python -m bench.soak                                       one process, and a cache's encoding
    python -m bench.soak --kills 20 --cache-kills 0 --ranks 2  torchrun and its workers die alike

On the CPU. Half of the lives end by SIGKILL while they start, half in the middle of saving. What
has to agree: a run's checkpoint, export and log (step, loss, lr, grad_norm), a cache's shards.
"""
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from lib.flags import Parser, number
from lib.images import draw_digits
from lib.log import read_table
from lib.run import RunFailed, program, say


def start(command):
    return subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.DEVNULL)


def family(pid):
    """A process and its descendants (torchrun starts each worker in a session of its own)."""
    children = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout
    return [pid] + [member for child in children.split() for member in family(int(child))]


def logged(out):
    """What two runs must agree on in log.csv."""
    _, rows = read_table(out / "log.csv")
    return [[row[name] for name in ("step", "loss", "lr", "grad_norm")] for row in rows]


def progress(out):
    """Steps logged, or shards written."""
    return len(logged(out)) + len(list(out.glob("latents*")))


def wait_for_progress(process, out):
    before = progress(out)
    while progress(out) == before and process.poll() is None:
        time.sleep(0.001)


def finish(command, out):
    """Run it to its end. Returns the seconds to its first step or shard."""
    began, process = time.monotonic(), start(command)
    wait_for_progress(process, out)
    first = time.monotonic() - began
    if process.wait():
        raise RunFailed(f"exit code {process.returncode} of {process.args}")
    return first


def soak(command, folder, kills):
    """Run the command left alone, and again under fire. Returns whether both come to the same."""
    calm, fire = folder / "calm", folder / "fire"
    first = finish([*command, "--out", calm], calm)
    command = [*command, "--out", fire]
    for kill in range(kills):
        process = start(command)
        if kill % 2:
            wait_for_progress(process, fire)
            pids = family(process.pid)  # which takes longer than saving does
            while not any(fire.glob(".tmp-*")) and process.poll() is None:
                pass
        else:
            time.sleep(first * kill / kills)
            pids = family(process.pid)
        if process.poll() is not None:
            raise RunFailed(f"exit code {process.returncode} before kill {kill + 1}")
        subprocess.run(["kill", "-KILL", *map(str, pids)])
        process.wait()
    finish(command, fire)
    same = logged(calm) == logged(fire)
    for path in [*calm.glob("latents*"), *calm.glob("last*"), *calm.glob("ema*")]:
        same = same and path.read_bytes() == (fire / path.name).read_bytes()
    say(f"{progress(calm)} steps or shards, {kills} kills, every other while saving: "
        f"{'as if' if same else 'NOT AS IF'} left alone")
    return same


@program
def main(argv=None):
    parser = Parser("Kill runs again and again, and compare with runs that were left alone.")
    add = parser.add_argument
    add("--kills", type=number(int, 0), default=50, help="of training")
    add("--cache-kills", type=number(int, 0), default=10, help="of encoding a cache")
    add("--ranks", type=number(int, 1), default=1, help="processes, by torchrun from two on")
    args = parser.parse_args(argv)
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    encode = "vae.py --vae pixels --size 8 --images".split()
    train = ("train.py --model T --patch 4 --batch 8 --lr 1e-3 --ema 0.9 --save-every 1 "
             f"--log-every 1 --sample-every 50 --steps {3 * args.kills + 30} --latents").split()
    if args.ranks > 1:
        train[:0] = f"-m torch.distributed.run --standalone --nproc_per_node={args.ranks}".split()
    with tempfile.TemporaryDirectory(prefix="soak-") as scratch:
        folder, same = pathlib.Path(scratch), True
        few, cache = draw_digits(folder / "few", 4, size=8), folder / "cache"
        finish([*encode, few, "--out", cache], cache)
        if args.cache_kills:  # a shard holds 1,024 pictures
            many = draw_digits(folder / "many", 103 * (args.cache_kills + 3), size=8)
            same = soak([*encode, many], folder / "encoding", args.cache_kills)
        if args.kills:
            same = soak([*train, cache], folder / "training", args.kills) and same
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
