"""Signals, locks, saving, compiling; and two ranks, whose program this file is itself."""
import contextlib
import gc
import json
import os
import pathlib
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import save_tiny, small_reference, use_small_inception
from PIL import Image

import fid
import lib.device
import sample
import train
import vae
from lib.files import atomic, lock_folder
from lib.log import read_table
from lib.run import STOPS, BadInput, RunFailed, StopSignal, barrier, connect, leave, program, rank
from test_all import ROOT, flags, picture_folder, same_run, small_cache, torchrun

needs_gxx = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile wants g++ on a CPU")

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
def test_a_signal_saves_last_then_ema_and_the_run_continues(
        name, tmp_path, monkeypatch, capsys, finished):
    """Sent twice, as schedulers do, and SIGTERM after it, as torchrun does."""
    number, saved, save = getattr(signal, name), [], train.save_checkpoint
    noise, seen = interrupting((number, number, signal.SIGTERM), 2)
    signal.signal(number, lambda *_: None)  # so that one that is not caught ends no test
    monkeypatch.setattr(train, "step_noise", noise)
    monkeypatch.setattr(train, "save_checkpoint", lambda path, *rest: saved.append(path.stem) or
                        save(path, *rest))
    assert train.main(flags(finished[0], tmp_path, "--save-every", 100)) == 128 + number
    assert "stopped at step 3, saved in" in capsys.readouterr().out
    assert saved == ["last", "ema"] and seen == [0, 1, 2]
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does: it stays ignored
    monkeypatch.setattr(train, "step_noise", interrupting([signal.SIGHUP], 4)[0])
    assert train.main(flags(finished[0], tmp_path)) == 0
    same_run(finished[1], tmp_path)


def test_a_second_signal_ends_at_once_but_not_within_5_seconds(monkeypatch):
    end = mock.Mock()
    monkeypatch.setattr(os, "_exit", end)
    stop = StopSignal()
    for now, ended in ((1.0, 0), (1.1, 0), (5.9, 0), (6.1, 1)):
        monkeypatch.setattr(time, "monotonic", lambda now=now: now)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.number == stop.agreed() == signal.SIGUSR1 and end.call_count == ended
    end.assert_called_with(128 + signal.SIGUSR1)


def test_a_signal_stops_vae_between_two_batches(tmp_path, monkeypatch):
    kill = mock.Mock(side_effect=lambda x: os.kill(os.getpid(), signal.SIGHUP) or x)
    monkeypatch.setattr(vae.Pixels, "encode", kill)
    command = f"--images {picture_folder(tmp_path / 'images')} --vae pixels --batch 3 --out"
    assert vae.main([*command.split(), str(tmp_path / "cache")]) == 128 + signal.SIGHUP
    assert kill.call_count == 2 and os.listdir(tmp_path / "cache") == [".lock"]  # both ways round


@pytest.mark.parametrize("name", ["fsync", "chmod"])
def test_files_are_saved_where_folders_have_no_fsync_or_files_no_chmod(name, tmp_path, monkeypatch):
    real, fail = getattr(os, name), mock.Mock(side_effect=OSError(22, "Invalid argument"))
    monkeypatch.setattr(os, name, lambda place, *mode: (
        fail() if mode or stat.S_ISDIR(os.fstat(place).st_mode) else real(place)))
    for text in ("one", "two"):
        with atomic(tmp_path / "a", tmp_path / "b") as temporary:
            temporary.write_text(text)
    assert [(tmp_path / name).read_text() for name in "ab"] == ["two", "one"]
    assert fail.call_count == len(os.listdir(tmp_path)) == 2


def test_gradients_are_kept_once_and_constant_tables_not_sent(monkeypatch):
    monkeypatch.setattr(lib.device, "world_size", lambda: 2)
    monkeypatch.setattr(lib.device, "DistributedDataParallel", dict)
    assert lib.device.data_parallel({}, torch.device("cpu")) == {
        "device_ids": None, "broadcast_buffers": False, "gradient_as_bucket_view": True}


@needs_gxx
def test_a_run_can_be_compiled_and_its_log_says_so(tmp_path, finished, monkeypatch):
    small = dict(hidden_size=16, depth=1, num_heads=2, bottleneck=4)  # compiles in seconds
    monkeypatch.setitem(train.SIZES, "T", small)
    monkeypatch.setattr(torch._dynamo.config, "suppress_errors", False)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    graphs, losses = [], []
    for flag in ("--no-compile", "--compile"):
        assert train.main(flags(finished[0], tmp_path / flag, flag, "--sample-every", 2)) == 0
        rows = read_table(tmp_path / flag / "log.csv")[1]
        graphs.append({int(row["graphs"]) for row in rows})
        losses.append([float(row["loss"]) for row in rows])
    torch.compiler.reset()
    assert graphs[0] == {0} and max(graphs[1]) > 0
    assert len(graphs[1]) == 1  # pictures, of another shape than training's batch, make no more
    np.testing.assert_allclose(*losses, rtol=1e-3)


HOLD = """
import sys, time
from lib.files import lock_folder
from lib.run import connect
connect()
lock = lock_folder(sys.argv[1])
print("locked", flush=True)
time.sleep(100)
"""


def test_all_ranks_hold_the_lock_and_another_host_is_waited_for(tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    env = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    first, second = ranks = [subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        env=env | {"RANK": k}) for k in "01"]
    try:
        assert [process.stdout.readline() for process in ranks] == ["locked\n"] * 2
        slept, owner = [], f"host {socket.gethostname()}, process {first.pid}"
        monkeypatch.setattr(time, "sleep", slept.append)
        monkeypatch.setattr(time, "monotonic", lambda: sum(slept))
        for _ in range(2):
            with pytest.raises(BadInput, match=f"another run writes there .{owner}"):
                lock_folder(tmp_path)
            first.kill()
            first.wait()  # the second rank still writes
        assert not slept
        monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
        with pytest.raises(BadInput, match=owner):
            lock_folder(tmp_path)
        assert 120 <= sum(slept) <= 140
        monkeypatch.setattr(time, "sleep", lambda seconds: second.kill() or second.wait())
        lock_folder(tmp_path).close()  # the other host's lock is gone after a while
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
    assert (tmp_path / ".lock").read_text() == f"host elsewhere, process {os.getpid()}"


# -------------------------------------------------------------------------------------------------
# Two ranks

def call(module, *argv):
    """A program's work without its end, after which the ranks would be apart."""
    code = module.main.__wrapped__([str(part) for part in argv]) or 0
    gc.collect()  # which drops a run's lock
    barrier()
    return code


def write_and_draw(work, out):
    """What one rank and two do alike."""
    out.mkdir(exist_ok=True)
    with mock.patch.object(vae.write_cache, "__defaults__", (256, True, 16, 4, None, None, False)):
        call(vae, "--images", work / "images", "--out", out / "cache", "--vae", "pixels",
             "--size", 16, "--batch", 3)
    network = "--ckpt", work / "a.safetensors", "--steps", 2, "--num-samples", 23, "--batch", 3
    call(sample, *network, "--out", out / "all.npz")
    call(sample, *network, "--out", out / "folder")
    with open(out / f"said{rank()}", "w") as said, contextlib.redirect_stdout(said):
        call(fid, "--images", work / "images", "--ref", work / "ref.npz", "--batch", 3)
        call(fid, *network, "--ref", work / "ref.npz", "--csv", out / "fid.csv")


def train_stop_and_continue(cache, out):
    """Uninterrupted; stopped by a signal that one rank alone gets; continued; in two folders, with
    different checkpoints; compiled, up to the graphs."""
    codes = [call(train, *flags(cache, out / "a"))]
    noise, seen = interrupting([signal.SIGUSR1], 2, sender=1)
    with mock.patch.object(train, "step_noise", noise):
        codes.append(call(train, *flags(cache, out / "b", "--save-every", 100)))
    codes.append(call(train, *flags(cache, out / "b")))
    with contextlib.suppress(RunFailed):
        codes.append(call(train, *flags(cache, out / "bc"[rank()])))
    compile_net = torch.nn.Module.compile
    with mock.patch.object(train.JLT, "compile", lambda net: compile_net(net, backend="aot_eager")):
        codes.append(call(train, *flags(cache, out / "d", "--compile", steps=4)))
    (out / f"rank{rank()}.json").write_text(json.dumps([codes, seen]))


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The folders of what one rank made and of what two made."""
    work = tmp_path_factory.mktemp("ranks")
    picture_folder(work / "images", size=(20, 20))
    small_cache(work)
    save_tiny(work / "a.safetensors")
    small_reference(work / "ref.npz")
    with pytest.MonkeyPatch.context() as patch:
        use_small_inception(patch.setattr)
        write_and_draw(work, work / "one")
    done = torchrun(2, __file__, work, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    return work / "one", work / "two"


def test_two_ranks_write_draw_and_score_what_one_does(both):
    caches = [{path.name: path.read_bytes() for path in (out / "cache").glob("latents*")}
              for out in both]
    assert caches[0] == caches[1] and len(caches[0]) == 4
    one, two = (np.load(out / "all.npz")["arr_0"].astype(int) for out in both)
    files = [np.asarray(Image.open(both[1] / "folder" / f"{i:06d}.png")) for i in range(23)]
    assert np.array_equal(two, files) and not list(both[1].glob(".tmp*"))
    assert np.abs(one - two).max() <= 1 and (one != two).mean() < 0.01
    scores = [[float(line.split()[at]) for line in (out / "said0").read_text().splitlines()
               if line.startswith("FID-") for at in (1, 3)] for out in both]
    assert len(scores[0]) == 4 and not (both[1] / "said1").read_text()
    np.testing.assert_allclose(*scores, rtol=1e-3)  # of a folder of images, and of a network


def test_a_signal_to_one_of_two_ranks_stops_both_at_the_same_step(both):
    """And the same command continues, bit for bit. (The fourth run's ranks would have continued
    from different checkpoints: it has no exit code.)"""
    (codes, seen), other = (json.loads((both[1] / f"rank{k}.json").read_text()) for k in (0, 1))
    assert [codes, seen] == other and codes == [0, 128 + signal.SIGUSR1, 0, 0]
    assert seen == [0, 1, 2, 3]  # what a rank hears is agreed upon one step later
    same_run(both[1] / "a", both[1] / "b")


@needs_gxx
def test_two_ranks_train_compiled(both):
    plain, compiled = (read_table(both[1] / run / "log.csv")[1][:4] for run in "ad")
    assert int(compiled[0]["graphs"]) > 0 and compiled[0]["graphs"] == compiled[3]["graphs"]
    norms = [[float(row["grad_norm"]) for row in rows] for rows in (plain, compiled)]
    np.testing.assert_allclose(*norms, rtol=1e-4)


def test_a_program_leaves_signals_as_it_found_them(finished):
    before = [signal.getsignal(number) for number in STOPS]
    assert train.main(flags(*finished)) == 0
    assert [signal.getsignal(number) for number in STOPS] == before


def test_too_little_memory_is_told_in_one_line(capsys):
    """A CPU, CUDA and MPS each say it with an error of their own; other errors keep their trace."""
    def told(error):
        @program
        def main():
            raise error
        return main()

    with pytest.raises(RuntimeError, match="allocate memory") as real:
        torch.empty(10**15)
    for error in (real.value, torch.OutOfMemoryError("of CUDA"), MemoryError(),
                  RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)")):
        assert told(error) == 1
        assert capsys.readouterr().err.startswith("error: out of memory: lower --micro")
    with pytest.raises(RuntimeError, match="memory access"):
        told(RuntimeError("CUDA error: an illegal memory access"))


def test_a_mistake_under_torchrun_is_said_once(finished, tmp_path):
    done = torchrun(2, "train.py", *flags(finished[0], tmp_path, "--patch", 3))
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode and len(said) == 1 and "--patch 3" in said[0]


if __name__ == "__main__":
    connect()
    use_small_inception(setattr)
    folder = pathlib.Path(sys.argv[1])
    write_and_draw(folder, folder / "two")
    train_stop_and_continue(folder / "cache", folder / "two")
    leave(0)
