"""Runs that are killed at random moments, alone and on two ranks, end as if left alone.

    NANOJLT_KILLS=20 python -m pytest tests/test_kills.py       more kills and signals than usual
"""
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from conftest import finish, start

import train
from lib.checkpoint import read_checkpoint
from test_all import LOGGED, ROOT, flags, log_rows, same_checkpoint

KILLS = int(os.environ.get("NANOJLT_KILLS") or 3)
SIGNALS = ["SIGTERM", "SIGHUP", "SIGINT"][:KILLS // 3]  # to torchrun, which takes seconds each


def command(cache, out):
    return flags(cache, out, "--save-every", 3, "--sample-every", 12, steps=24)


def ends_alike(left_alone, interrupted):
    """Assert that the last checkpoints are equal, bit for bit, and so are the logs, except that a
    kill may have prevented a line between saving and logging."""
    same_checkpoint(left_alone, interrupted)
    whole, found = (log_rows(out, LOGGED) for out in (left_alone, interrupted))
    assert [row for row in whole if row in found] == found
    assert len(found) >= len(whole) - KILLS and not list(interrupted.glob(".tmp*"))


@pytest.fixture(scope="module", params=[1, 2])
def left_alone(request, finished, tmp_path_factory):
    """(ranks, folder of a run that was not interrupted)."""
    out = tmp_path_factory.mktemp("alone") / "run"
    codes = finish(start(train.main, command(finished[0], out), ranks=request.param))
    assert codes == [0] * request.param
    return request.param, out


def test_a_run_that_is_killed_again_and_again(left_alone, finished, tmp_path):
    """With kill -9 at random moments of random steps, one rank a moment before the other."""
    (ranks, whole), chance, table = left_alone, random.Random(0), tmp_path / "log.csv"
    for step in sorted(chance.choices(range(1, 23), k=KILLS)):
        processes = start(train.main, command(finished[0], tmp_path), ranks=ranks)
        while not table.exists() or len(table.read_text().splitlines()) <= step:
            assert all(process.is_alive() for process in processes)
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.1))
        for process in chance.sample(processes, ranks):
            process.kill()
        finish(processes)
    assert finish(start(train.main, command(finished[0], tmp_path), ranks=ranks)) == [0] * ranks
    ends_alike(whole, tmp_path)


@pytest.mark.parametrize("left_alone", [2], indirect=True)
@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_to_torchrun_saves_and_the_same_command_continues(
        name, left_alone, finished, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
              "train.py", *command(finished[0], tmp_path)]
    with subprocess.Popen(launch, cwd=ROOT, text=True, stdout=subprocess.PIPE) as process:
        for line in process.stdout:
            if line.startswith("step 4,"):
                process.send_signal(getattr(signal, name))
    step = read_checkpoint(tmp_path / "last.safetensors")[1]["step"]
    assert process.returncode and 4 <= step < 24
    assert line.startswith(f"stopped at step {step}")
    assert subprocess.run(launch, cwd=ROOT, timeout=240).returncode == 0
    ends_alike(left_alone[1], tmp_path)
