"""Two ranks with the same global batch see the same losses as one, and stop together."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from helpers import command, environment, metrics, run, small_run

from fastmae.train.pretrain import pretrain


def torchrun(words: list[str]) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *words[1:]]


def test_two_ranks_equal_one(blobs, tmp_path):
    assert pretrain(small_run(blobs, tmp_path / "one", batch_size=8)) == 0
    finished = run(torchrun(command(blobs, tmp_path / "two", batch_size=4)))
    assert finished.returncode == 0, finished.stderr
    np.testing.assert_allclose(metrics(tmp_path / "two"), metrics(tmp_path / "one"), rtol=1e-5)
    assert (tmp_path / "two" / "checkpoint-3.pth").exists()


def test_a_signal_to_one_rank_stops_all_at_the_same_step(blobs, tmp_path):
    words = torchrun(command(blobs, tmp_path / "run", batch_size=4, epochs=200))
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    process = subprocess.Popen(words, cwd="/", env=environment(), **pipes)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "run" / "checkpoints").glob("step-*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    os.kill(max(int(pid) for pid in children.split()), signal.SIGUSR1)
    out, _ = process.communicate(timeout=120)
    assert "after step" in out
    step = metrics(tmp_path / "run")[-1][0]
    assert (tmp_path / "run" / "checkpoints" / f"step-{step:08d}").is_dir()
    assert process.returncode != 0, "a rank that stops early must not look finished"
