"""What the tests of this folder share."""
import faulthandler
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys

# test_all comes first: it sets the environment that torch and huggingface_hub read when imported.
from test_all import ROOT, SmallInception, awake, flags, image_folder, small_cache, tiny_net

import numpy as np
import pytest

import fid
import train
import vae
from lib.checkpoint import export_tensors, save_checkpoint
from lib.run import STOP_SIGNALS

# Where other processes that tests start find the programs and this file.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])


@pytest.fixture(autouse=True)
def own_signals():
    """No program's handlers outlive their test."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def refused(capsys):
    """refused(main, argv, *words, code=2): that exit code and one error line with these words."""
    def check(main, argv, *words, code=2):
        capsys.readouterr()
        assert main([str(part) for part in argv]) == code
        lines = capsys.readouterr().err.splitlines()
        errors = [line for line in lines if not line.startswith("warning: ")]
        assert len(errors) == 1 and errors[0].startswith("error: "), lines
        assert all(word in errors[0] for word in words), errors
    return check


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """(cache, folder of a run of 6 steps, saved at 2, 4 and 6). Not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    cache = small_cache(folder)
    assert train.main(flags(cache, folder / "run")) == 0
    return cache, folder / "run"


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run, for a test to change."""
    return shutil.copytree(finished[1], tmp_path / "run")


@pytest.fixture
def images(tmp_path, monkeypatch):
    """14 images of two classes, which fill four shards."""
    monkeypatch.setattr(vae, "SHARD", 4)
    return image_folder(tmp_path / "images")


def save_tiny(path, **settings):
    """A checkpoint of tiny networks: model, ema, ema2. Returns them."""
    nets = [awake(tiny_net(), seed) for seed in range(3)]
    tensors = {f"model.{name}": value for name, value in nets[0].state_dict().items()}
    usual = dict(
        target="x", loss="v", P_mean=-0.8, P_std=0.8, t_eps=0.05, label_drop=0.1, input_size=8,
        step=100, ema=[0.9, 0.9], vae={"kind": "pixels", "id": "pixels"}, vae_path=None, size=8,
        class_names=list("abcde"), cfg=1.5, interval=[0.1, 1.0])
    save_checkpoint(path, tensors | export_tensors(nets[1:]), usual | settings)
    return nets


@pytest.fixture
def small_inception(monkeypatch):
    """fid.py, and what uses it, with the small network."""
    network = SmallInception()
    monkeypatch.setattr(fid, "FEATURES", 16)
    monkeypatch.setattr(fid, "load_inception", lambda path, device: network)


def small_reference(path, **about):
    mu = np.arange(16.0)
    np.savez(path, mu=mu, sigma=np.diag(mu), meta=json.dumps(about))
    return path


def start(work, *args, ranks=1):
    """Start work(*args) in as many processes as there are ranks; its result is the exit code. They
    are forks of a process that has imported everything already, so they begin within moments."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["conftest", "torch._dynamo"])
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=as_rank, args=(rank, ranks, port, work, args))
                 for rank in range(ranks)]
    for process in processes:
        process.start()
    return processes


def as_rank(rank, ranks, port, work, args):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="localhost",
                      MASTER_PORT=str(port))
    faulthandler.dump_traceback_later(240)  # where a rank hangs, before `finish` ends it
    code = work(*args)
    sys.stdout.flush()
    os._exit(code or 0)  # without what pytest's process would do at its end


def finish(processes):
    """Wait for processes and return their exit codes, -9 for those that had to be killed."""
    for process in processes:
        process.join(300)
        process.kill()
        process.join()
    return [process.exitcode for process in processes]
