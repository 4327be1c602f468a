"""Kill runs again and again, start them with the same command, and compare with runs that were left alone.

    python -m bench.soak                                       one process, and the encoding of a cache
    python -m bench.soak --kills 20 --cache-kills 0 --ranks 2  torchrun and workers die alike, and once torchrun alone

On the CPU, in a temporary folder. A life ends by SIGKILL at one of three moments, drawn at random: while it starts
(imports, data, the checkpoint read back), some time after its first new step, or while a temporary file is there, in
the middle of saving. Compared, byte for byte: last.safetensors (network, EMAs, optimizer, settings), ema, the shards of
a cache; of log.csv step, loss, lr and grad_norm. Exit code 1 where anything differs.
"""
import csv, os, pathlib, subprocess, sys, tempfile, time

import numpy as np

from lib.digits import draw_digits
from lib.flags import Parser, number
from lib.run import RunFailed, program, say

MOMENTS = ("starting", "later", "saving")
kill = lambda pids: subprocess.run(["kill", "-KILL", *map(str, pids)], stderr=subprocess.DEVNULL)


def start(command, log):
    """Start python with these arguments; all that it says is added to the file `log`."""
    with open(log, "a") as file:
        return subprocess.Popen([sys.executable, *map(str, command)], stdout=file, stderr=file)


def finish(process, log):
    if process.wait():
        raise RunFailed(f"exit code {process.returncode}: {log.read_text()[-500:]}")


def alive():
    """{pid: its parent's} of all processes (zombies are not)."""
    table = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,stat="], capture_output=True, text=True, check=True).stdout
    return {int(pid): int(parent) for pid, parent, state in map(str.split, table.splitlines()) if state[0] != "Z"}


def family(pid):
    """A process and its descendants: torchrun starts each worker apart, so no process group has all."""
    found, parents = [pid], alive()
    for member in found:  # grows while it is read
        found += [child for child, parent in parents.items() if parent == member]
    return found


def names(folder, *starts):
    return sorted(name for start in starts for name in map(os.path.basename, folder.glob(f"{start}*")))


def rows(out):
    """What two runs must agree on in log.csv."""
    lines = (out / "log.csv").read_text().splitlines() if names(out, "log.csv") else []
    return [[row[name] for name in ("step", "loss", "lr", "grad_norm")] for row in csv.DictReader(lines)]


def progress(out):  # steps logged, or shards written
    return len(names(out, "latents")) + len(rows(out))


def wait_for(happened, process):
    while not happened() and process.poll() is None:
        time.sleep(0.001)


def under_fire(command, out, kills, log, rng, first, pace):
    """Kill it `kills` times. A life needs about `first` seconds to its first step or shard, then `pace` for each."""
    seen = dict.fromkeys((*MOMENTS, "temporary files left", "only previous left"), 0)
    for k in range(kills):
        moment, before, process = MOMENTS[rng.integers(3)], progress(out), start(command, log)
        if moment == "starting":
            time.sleep(rng.random() * first)
        else:
            wait_for(lambda: progress(out) > before, process)
        pids = family(process.pid)
        if moment == "saving":
            wait_for(lambda: names(out, ".tmp-"), process)
        time.sleep(rng.random() * pace * {"starting": 0, "later": 2, "saving": 0.2}[moment])
        if process.poll() is not None:
            raise RunFailed(f"exit code {process.returncode} before kill {k + 1}: {log.read_text()[-500:]}")
        kill(pids)
        process.wait()
        seen[moment] += 1
        seen["temporary files left"] += len(names(out, ".tmp-")) > 0
        seen["only previous left"] += names(out, "last", "previous") == ["previous.safetensors"]
    return seen


def agent_alone(command, out, log):
    """Kill torchrun's agent alone once its workers train, and give the command again: what becomes of all."""
    before, process = progress(out), start(command, log)
    wait_for(lambda: progress(out) > before, process)
    workers = set(family(process.pid)[1:])
    process.kill()
    process.wait()
    killed, step, again = time.monotonic(), progress(out), start(command, log).wait()
    while (left := alive().keys() & workers) and time.monotonic() < killed + 300:
        time.sleep(0.1)
    kill(left)
    say(f"torchrun alone killed at step {step}: its workers {'hung' if left else 'ended'} at step {progress(out)}, "
        f"after {time.monotonic() - killed:.0f} s; the same command, given at once, ended with exit code {again}")


def soak(command, calm, fire, kills, log, rng, agent=False):
    """Run the command left alone, into the folder `calm`, then under fire, into `fire`. Returns whether they agree."""
    began, process = time.monotonic(), start([*command, "--out", calm], log)
    wait_for(lambda: progress(calm) > 0, process)
    first = time.monotonic() - began
    finish(process, log)
    pace, command = (time.monotonic() - began - first) / progress(calm), [*command, "--out", fire]
    began = time.monotonic()
    seen = under_fire(command, fire, kills, log, rng, first, pace)
    if agent:
        agent_alone(command, fire, log)
    finish(start(command, log), log)
    kept = names(calm, "latents", "last", "ema")
    same = rows(calm) == rows(fire) and all((calm / name).read_bytes() == (fire / name).read_bytes() for name in kept)
    say(f"{progress(calm)} steps or shards, {kills} kills in {time.monotonic() - began:.0f} s:",
        *(f"{what} {n}," for what, n in seen.items()), "as if left alone" if same else "NOT AS IF LEFT ALONE")
    return same


@program
def main(argv=None):
    parser = Parser("Kill runs again and again, and compare with runs that were left alone.")
    parser.add_argument("--kills", type=number(int, 0), default=50, help="of training")
    parser.add_argument("--cache-kills", type=number(int, 0), default=10, help="of encoding a cache")
    parser.add_argument("--ranks", type=number(int, 1), default=1, help="processes, under torchrun from two on")
    args = parser.parse_args(argv)
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    python = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.ranks}"] * (args.ranks > 1)
    encode = ["vae.py", "--vae", "pixels", "--size", 8, "--images"]
    train = [*python, "train.py", "--model", "T", "--patch", 4, "--batch", 8, "--lr", 1e-3, "--ema", 0.9, "--steps",
             3 * args.kills + 30, "--save-every", 1, "--log-every", 1, "--sample-every", 50, "--latents"]
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        folder, rng, same = pathlib.Path(folder), np.random.default_rng(0), True
        log, few, many = folder / "log.txt", folder / "few", folder / "many"
        if args.cache_kills:
            draw_digits(many, 103 * (args.cache_kills + 3), size=8)  # a shard holds 1,024 pictures
            same &= soak([*encode, many], folder / "c", folder / "d", args.cache_kills, log, rng)
        if args.kills:
            draw_digits(few, 4, size=8)
            finish(start([*encode, few, "--out", folder / "cache"], log), log)
            same &= soak([*train, folder / "cache"], folder / "a", folder / "b", args.kills, log, rng, args.ranks > 1)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
