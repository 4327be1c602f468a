"""What the tests of this folder share."""
import contextlib
import resource
import shutil
import signal

import numpy as np
import pytest

import fid
import lib.judges
import train
from lib.checkpoint import export_tensors, save_checkpoint
from lib.npz import write_statistics
from test_all import SmallInception, awake, flags, small_cache, tiny_net


@pytest.fixture(autouse=True)
def offline_and_with_its_own_signals(monkeypatch):
    """No test asks the network, and no program's handlers outlive their test."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = {number: signal.getsignal(number) for number in (
        signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def refused(capsys):
    """refused(main, argv, *words, code=2): that exit code and one line, which holds the words."""
    def check(main, argv, *words, code=2):
        capsys.readouterr()
        assert main([str(part) for part in argv]) == code
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1, error
        assert all(word in error for word in words), error
    return check


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """(cache, folder of a run of 6 steps, saved at 2, 4 and 6)."""
    folder = tmp_path_factory.mktemp("finished")
    cache = small_cache(folder)
    assert train.main(flags(cache, folder / "run")) == 0
    return cache, folder / "run"


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished[1], tmp_path / "run")


@contextlib.contextmanager
def largest_file(size):
    """A disk on which no file grows over so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def save_tiny(path, **settings):
    """A checkpoint of tiny networks: model, ema, ema2. Returns them."""
    nets = [awake(tiny_net(), seed) for seed in range(3)]
    tensors = {f"model.{name}": value for name, value in nets[0].state_dict().items()}
    usual = dict(
        target="x", loss="v", P_mean=-0.8, P_std=0.8, t_eps=0.05, label_drop=0.1, input_size=8,
        step=100, ema=[0.9, 0.9], vae={"kind": "pixels", "id": "pixels"}, vae_path=None, size=8,
        class_names=list("abcde"), cfg=1.5, interval=[0.1, 1.0])
    save_checkpoint(path, tensors | export_tensors(nets), usual | settings)
    return nets


def use_small_inception(setattr):
    """fid.py, and what uses it, with the small network. setattr: monkeypatch's or Python's."""
    network = SmallInception()
    setattr(fid, "FEATURES", 16)
    setattr(fid.Statistics.__init__, "__defaults__", ("cpu", 16, 1008))
    setattr(lib.judges, "load_inception", lambda path, device: network)


@pytest.fixture
def small_inception(monkeypatch):
    use_small_inception(monkeypatch.setattr)


def small_reference(path, **about):
    write_statistics(path, np.arange(16.0), np.diag(np.arange(16.0)), **about)
    return path
