"""How a run behaves among other processes: signals, locks, several ranks, another platform."""
import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import finish, save_tiny, start
from PIL import Image

import sample
import train
import vae
from lib.files import lock_folder
from lib.run import STOP_SIGNALS, BadInput, RunFailed, StopSignal, barrier, connect, program, rank
from test_all import ROOT, flags, image_folder, log_rows, same_run, shard_bytes, small_cache


def interrupting(numbers, step, sender=0):
    """(a step_noise that sends its rank signals in the middle of a step, the steps it saw)."""
    real, seen = train.step_noise, []

    def noise(seed, now, *rest):
        seen.append(now)
        for number in numbers if now == step and rank() == sender else ():
            os.kill(os.getpid(), number)
        return real(seed, now, *rest)
    return noise, seen


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
def test_a_signal_saves_and_the_run_continues_bit_for_bit(name, tmp_path, monkeypatch, finished):
    """Sent twice, as schedulers do, and SIGTERM after it, as torchrun does."""
    number, handlers = getattr(signal, name), [*map(signal.getsignal, STOP_SIGNALS)]
    noise, seen = interrupting((number, number, signal.SIGTERM), 2)
    signal.signal(number, lambda *_: None)  # so that one that is not caught ends no test
    monkeypatch.setattr(train, "step_noise", noise)
    assert train.main(flags(finished[0], tmp_path, "--save-every", 100)) == 128 + number
    assert seen == [0, 1, 2] and (tmp_path / "ema.safetensors").exists()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does: it stays ignored
    monkeypatch.setattr(train, "step_noise", interrupting([signal.SIGHUP], 4)[0])
    assert train.main(flags(finished[0], tmp_path)) == 0
    same_run(finished[1], tmp_path)
    changed = {number, signal.SIGHUP}
    assert all(signal.getsignal(other) == handler for other, handler in zip(STOP_SIGNALS, handlers)
               if other not in changed)


def test_a_second_signal_ends_at_once_but_not_within_5_seconds(monkeypatch):
    end = mock.Mock()
    monkeypatch.setattr(os, "_exit", end)
    stop = StopSignal()
    for now, ended in ((1.0, 0), (1.1, 0), (5.9, 0), (6.1, 1)):
        monkeypatch.setattr(time, "monotonic", lambda now=now: now)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.number == stop.agreed() == signal.SIGUSR1 and end.call_count == ended
    end.assert_called_with(128 + signal.SIGUSR1)


def test_too_little_memory_is_told_in_one_line(refused):
    """A CPU, CUDA and MPS each say it with an error of their own; other errors keep their trace."""
    def failing(error):
        @program
        def main(argv=None):
            raise error
        return main

    with pytest.raises(RuntimeError, match="allocate memory") as of_a_cpu:
        torch.empty(10**15)
    for error in (of_a_cpu.value, torch.OutOfMemoryError("of CUDA"), MemoryError(),
                  RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)")):
        refused(failing(error), [], "out of memory: lower --micro", code=1)
    with pytest.raises(RuntimeError, match="memory access"):
        failing(RuntimeError("CUDA error: an illegal memory access"))()


def hold(folder):
    with lock_folder(folder):
        (folder / "locked").touch()
        time.sleep(100)


def test_a_second_run_is_refused_and_another_host_waited_for(finished, run, refused, monkeypatch):
    (first,) = processes = start(hold, run)
    try:
        while not (run / "locked").exists():
            time.sleep(0.01)
        slept, owner = [], f"host {socket.gethostname()}, process {first.pid}"
        monkeypatch.setattr(time, "sleep", slept.append)
        monkeypatch.setattr(time, "monotonic", lambda: sum(slept))
        refused(train.main, flags(finished[0], run), f"another run writes there ({owner}")
        assert not slept
        monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
        with pytest.raises(BadInput, match=owner):
            lock_folder(run)
        assert 90 < sum(slept) < 140
        monkeypatch.setattr(time, "sleep", lambda seconds: first.kill() or first.join())
        lock_folder(run).close()  # the other host has crashed, and its lock is gone after a while
    finally:
        first.kill()
        finish(processes)
    assert (run / ".lock").read_text() == f"host elsewhere, process {os.getpid()}"


# -------------------------------------------------------------------------------------------------
# Two ranks

def call(module, *argv):
    """A program's work without its end, after which the ranks would be apart."""
    code = module.main.__wrapped__([str(part) for part in argv]) or 0
    barrier()
    return code


def write_and_draw(work, out, batch):
    """What one rank and two do alike, whatever the batch that is drawn at once."""
    out.mkdir(exist_ok=True)
    call(vae, "--images", work / "images", "--out", out / "cache", "--vae", "pixels", "--size", 16,
         "--batch", 3)
    network = "--ckpt", work / "a.safetensors", "--steps", 2, "--num-samples", 23, "--batch", batch
    call(sample, *network, "--out", out / "all.npz")
    call(sample, *network, "--out", out / "folder")


def two_ranks(work):
    """Write and draw. Train uninterrupted (a); stopped by a signal to one rank, and continued (b);
    from different checkpoints, which must fail (b and c). Train a smaller network plainly (d) and
    compiled, as far as graphs (e)."""
    connect()
    vae.SHARD = 4
    out, cache = work / "two", work / "small" / "cache"
    write_and_draw(work, out, 4)
    codes = [call(train, *flags(cache, out / "a"))]
    noise, seen = interrupting([signal.SIGUSR1], 2, sender=1)
    with mock.patch.object(train, "step_noise", noise):
        codes.append(call(train, *flags(cache, out / "b", "--save-every", 100)))
    codes.append(call(train, *flags(cache, out / "b")))
    with contextlib.suppress(RunFailed):
        codes.append(call(train, *flags(cache, out / "bc"[rank()])))
    train.SIZES["T"] = dict(hidden_size=32, depth=1, num_heads=2, bottleneck=8)
    codes.append(call(train, *flags(cache, out / "d", steps=2)))
    train.JLT.compile = functools.partialmethod(train.JLT.compile, backend="aot_eager")
    codes.append(call(train, *flags(cache, out / "e", "--compile", steps=2)))
    (out / f"rank{rank()}.json").write_text(json.dumps([codes, seen]))


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The folders of what one rank made and of what two made."""
    work = tmp_path_factory.mktemp("ranks")
    small_cache(work / "small")
    image_folder(work / "images", size=(20, 20))
    save_tiny(work / "a.safetensors")
    processes = start(two_ranks, work, ranks=2)
    with mock.patch.object(vae, "SHARD", 4):
        write_and_draw(work, work / "one", 3)
    assert finish(processes) == [0, 0]
    return work / "one", work / "two"


def test_two_ranks_write_and_draw_what_one_does(both):
    caches = [shard_bytes(out / "cache") for out in both]
    assert caches[0] == caches[1] and len(caches[0]) == 4
    one, two = (np.load(out / "all.npz")["arr_0"].astype(int) for out in both)
    files = [np.asarray(Image.open(both[1] / "folder" / f"{i:06d}.png")) for i in range(23)]
    assert np.array_equal(two, files) and not list(both[1].glob(".tmp*"))
    assert np.abs(one - two).max() <= 1 and (one != two).mean() < 0.01


def test_a_signal_to_one_of_two_ranks_stops_both_at_the_same_step(both):
    """And the same command continues, bit for bit. Ranks that would continue from different
    checkpoints fail instead: there is no exit code of the fourth run."""
    (codes, seen), other = (json.loads((both[1] / f"rank{k}.json").read_text()) for k in (0, 1))
    assert [codes, seen] == other and codes == [0, 128 + signal.SIGUSR1, 0, 0, 0]
    assert seen in ([0, 1, 2], [0, 1, 2, 3])
    same_run(both[1] / "a", both[1] / "b")


def test_two_ranks_train_compiled(both):
    assert int(log_rows(both[1] / "e", ["graphs"])[0][0]) > 0
    plain, compiled = (np.array(log_rows(both[1] / run, ["grad_norm"]), float) for run in "de")
    np.testing.assert_allclose(plain, compiled, rtol=1e-4)


WINDOWS = """
import os, pathlib, signal, sys
sys.modules["fcntl"] = sys.modules["resource"] = None  # importing them raises ImportError
for name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGKILL"):
    delattr(signal, name)
for name in ("sched_getaffinity", "getuid", "fork"):
    delattr(os, name)
os.environ["USERNAME"] = "user"  # Windows sets it, and torch asks for it
import fid, sample, train, vae
from test_all import flags, small_cache
cache, out = small_cache(pathlib.Path(sys.argv[1])), pathlib.Path(sys.argv[1], "run")
assert train.main(flags(cache, out, steps=2)) == 0 == train.main(flags(cache, out, steps=4))
assert sample.main(["--ckpt", str(out / "ema.safetensors"), "--out", str(out / "a.png")]) == 0
"""


def test_nothing_needs_posix(tmp_path):
    done = subprocess.run([sys.executable, "-c", WINDOWS, tmp_path], cwd=ROOT, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "a.png").exists()
    assert log_rows(tmp_path / "run", ["memory_gb"]) == [[""]] * 4
