"""How a run behaves among other processes: closed terminals, signals, locks, several ranks."""
import functools
import io
import json
import os
import signal
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
from lib.checkpoint import read_checkpoint
from lib.files import lock_folder
from lib.log import append_row, read_table
from lib.run import connect, cores, program, rank
from test_all import ROOT, flags, image_folder, log_rows, same_run, shard_bytes, small_cache
from test_all import write_cache


def interrupting(numbers, step, sender=0):
    """(a step_noise that sends its rank signals in the middle of a step, the steps it saw)."""
    real, seen = train.step_noise, []

    def noise(seed, now, *rest):
        seen.append(now)
        for number in numbers if now == step and rank() == sender else ():
            os.kill(os.getpid(), number)
        return real(seed, now, *rest)
    return noise, seen


# -------------------------------------------------------------------------------------------------
# Terminals and signals

@pytest.mark.parametrize("stream", [
    lambda: open("/dev/full", "w"), lambda: None, lambda: io.TextIOWrapper(io.BytesIO(), "ascii")],
    ids=["cannot be written to", "closed from the start", "ASCII terminal"])
def test_a_run_survives_its_streams_and_saves_when_stopped(stream, finished, images, monkeypatch):
    """As after `train.py | tee log` and Ctrl-C, which ends tee as well: nothing can be printed."""
    monkeypatch.setattr(sys, "stdout", stream())
    monkeypatch.setattr(sys, "stderr", stream())
    monkeypatch.setattr(train, "step_noise", interrupting([signal.SIGINT], 1)[0])
    out = images.parent / "données"
    assert train.main(flags(finished[0], out, "--save-every", 100)) == 128 + signal.SIGINT
    assert read_checkpoint(out / "last.safetensors")[1]["step"] == 2
    (images / "cat" / "naïve.png").write_bytes(b"no image")  # a warning on stderr
    assert write_cache(images, images.parent / "cache", 16) == 0
    assert sample.main(["--ckpt", str(out / "nowhere é")]) == 2


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
def test_a_signal_saves_and_the_run_continues_bit_for_bit(name, tmp_path, monkeypatch, finished):
    """Sent twice, as schedulers do, and SIGTERM after it, as torchrun does."""
    number, handler = getattr(signal, name), mock.Mock()
    noise, seen = interrupting((number, number, signal.SIGTERM), 2)
    signal.signal(number, handler)
    with monkeypatch.context() as interrupted:
        interrupted.setattr(train, "step_noise", noise)
        assert train.main(flags(finished[0], tmp_path, "--save-every", 100)) == 128 + number
    assert seen == [0, 1, 2] and (tmp_path / "ema.safetensors").exists()
    assert signal.getsignal(number) is handler and not handler.called
    assert train.main(flags(finished[0], tmp_path)) == 0
    same_run(finished[1], tmp_path)


def test_under_nohup_a_closed_terminal_stops_nothing(tmp_path, monkeypatch, finished):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    monkeypatch.setattr(train, "step_noise", interrupting([signal.SIGHUP], 2)[0])
    assert train.main(flags(finished[0], tmp_path)) == 0


def test_too_little_memory_is_told_in_one_line(refused):
    """The CPU, CUDA and MPS each say it in their own way. Other errors keep their traceback."""
    of_mps = RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)")
    for error in torch.OutOfMemoryError("of CUDA"), of_mps, MemoryError():
        refused(program(mock.Mock(side_effect=error)), [], "out of memory: lower --micro", code=1)
    refused(program(lambda argv: torch.empty(10**15)), [], "out of memory", code=1)
    with pytest.raises(RuntimeError, match="memory access"):
        program(mock.Mock(side_effect=RuntimeError("an illegal memory access")))()


@pytest.mark.parametrize("granted, ranks, threads", [(4, "", 4), (64, "", 16), (64, "8", 8)])
def test_threads_are_for_the_cores_that_the_job_was_granted(granted, ranks, threads, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 256)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(granted)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    assert cores() == threads


# -------------------------------------------------------------------------------------------------
# Two processes at once

def test_a_second_run_in_the_folder_is_waited_for_and_refused(finished, run, refused, monkeypatch):
    """The lock of a host that crashed is gone after about 90 seconds on NFS."""
    first, slept = lock_folder(run), []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(time, "monotonic", lambda: sum(slept))
    refused(train.main, flags(finished[0], run), "another run writes there")
    assert 90 < sum(slept) < 140
    monkeypatch.setattr(time, "sleep", lambda seconds: first.close())
    for name in ".tmp-1-all.npz.npy", ".tmp-2-last.safetensors":
        (run / name).touch()
    assert train.main(flags(finished[0], run)) == 0
    assert [path.name for path in run.glob(".tmp*")] == [".tmp-1-all.npz.npy"]  # sample.py's


def first_demo(folder, target):
    os.chdir(folder)
    draw_digits = train.draw_digits
    train.draw_digits = lambda folder, per_class: draw_digits(folder, 100)
    argv = f"--demo --target {target} --steps 1 --batch 8 --ema 0.1 --sample-every 0".split()
    command = f"--ckpt out/demo-T8-{target}/ema.safetensors --steps 1 --num-samples 60 --out"
    return train.main(argv) or sample.main([*command.split(), "all.npz"])


def test_two_first_demos_at_once_both_succeed(tmp_path):
    """They draw the same digits, write the same cache and draw into the same file."""
    assert finish(start(first_demo, tmp_path, "x") + start(first_demo, tmp_path, "v")) == [0, 0]
    data = vae.LatentDataset(tmp_path / "data" / "demo-pixels")
    assert len(data) == 1000 and data.shape == (3, 32, 32) and not data.mirrored
    assert np.load(tmp_path / "all.npz")["arr_0"].shape == (60, 32, 32, 3)
    assert sorted(os.listdir(tmp_path)) == ["all.npz", "data", "out"]
    assert sorted(os.listdir(tmp_path / "data")) == ["demo-digits", "demo-pixels"]


def append_rows(table, name):
    for i in range(20):
        append_row(table, {"sweep": name, "cfg": i})


def test_two_sweeps_into_one_table_lose_no_row(tmp_path):
    table = tmp_path / "fid.csv"
    assert finish(start(append_rows, table, "a") + start(append_rows, table, "b")) == [0, 0]
    assert len(read_table(table)[1]) == 40


# -------------------------------------------------------------------------------------------------
# Two ranks

def write_and_draw(work, out, batch):
    """What one rank and two do alike, whatever the batch that is drawn at once."""
    vae.SHARD = 4
    out.mkdir(exist_ok=True)
    assert write_cache(work / "images", out / "cache", 16, "--batch", 3) == 0
    command = f"--ckpt {work}/a.safetensors --steps 2 --num-samples 23 --batch {batch} --out {out}"
    for name in "all.npz", "folder":
        assert sample.main(f"{command}/{name}".split()) == 0


def two_ranks(work):
    """Write and draw. Train uninterrupted (a); stopped by a signal to one rank, and continued (b);
    from different checkpoints, which must fail (b and c). Train a smaller network plainly (d) and
    compiled, as far as graphs (e)."""
    connect()
    write_and_draw(work, work / "two", 4)

    def run(name, *more, **steps):
        return train.main(flags(work / "small" / "cache", work / "two" / name, *more, **steps))

    codes = [run("a")]
    noise, seen = interrupting([signal.SIGUSR1], 2, sender=1)
    with mock.patch.object(train, "step_noise", noise):
        codes.append(run("b", "--save-every", 100))
    codes += [run("b"), run("bc"[rank()])]
    train.SIZES["T"] = dict(hidden_size=32, depth=1, num_heads=2, bottleneck=8)
    codes.append(run("d", steps=2))
    train.JLT.compile = functools.partialmethod(train.JLT.compile, backend="aot_eager")
    codes.append(run("e", "--compile", steps=2))
    (work / "two" / f"rank{rank()}.json").write_text(json.dumps([codes, seen]))


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The folders of what one rank made and of what two made."""
    work = tmp_path_factory.mktemp("ranks")
    small_cache(work / "small")
    image_folder(work / "images", size=(20, 20))
    save_tiny(work / "a.safetensors")
    one, two = work / "one", work / "two"
    assert finish(start(write_and_draw, work, one, 3) + start(two_ranks, work, ranks=2)) == [0] * 3
    return one, two


def test_two_ranks_write_and_draw_what_one_does(both):
    caches = [shard_bytes(out / "cache") for out in both]
    assert caches[0] == caches[1] and len(caches[0]) == 4
    one, two = (np.load(out / "all.npz")["arr_0"].astype(int) for out in both)
    files = [np.asarray(Image.open(both[1] / "folder" / f"{i:06d}.png")) for i in range(23)]
    assert np.array_equal(two, files) and not list(both[1].glob(".tmp*"))
    assert np.abs(one - two).max() <= 1 and (one != two).mean() < 0.01


def test_a_signal_to_one_of_two_ranks_stops_both_at_the_same_step(both):
    """And the same command continues, bit for bit. Ranks that would continue from different
    checkpoints, as in the fourth run, fail instead."""
    (codes, seen), other = (json.loads((both[1] / f"rank{k}.json").read_text()) for k in (0, 1))
    assert [codes, seen] == other and codes == [0, 128 + signal.SIGUSR1, 0, 1, 0, 0]
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
    subprocess.run([sys.executable, "-c", WINDOWS, tmp_path], cwd=ROOT, check=True)
