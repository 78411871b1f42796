"""Small runs for the tests of training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import load_file

from fastmae.config import PretrainConfig
from fastmae.train.metrics import StepLog

# 72 images: 9 steps an epoch.
RUN: dict[str, Any] = {
    "batch_size": 8,
    "epochs": 4,
    "warmup_epochs": 1.0,
    "log_freq": 5,
    "save_freq": 1,
    "checkpoint_freq": 7,
    "probe": False,
    "device": "cpu",
}


def step_log(run: Path, said: list[str], **changes: Any) -> StepLog:
    """A log of one rank that shows its lines in ``said``."""
    settings: dict[str, Any] = dict(
        device=torch.device("cpu"),
        log_freq=4,
        rank=0,
        ranks=1,
        mean_over_ranks=torch.clone,
        num_workers=1,
        spike_score=lambda loss: None,
        sinks=[],
        say=said.append,
        early_steps=(),
    )
    return StepLog(run, **{**settings, **changes})


def small_run(data_path: str, output_dir: Path, **changes: Any) -> PretrainConfig:
    """A configuration of 36 steps that takes seconds."""
    return PretrainConfig(data_path=data_path, output_dir=str(output_dir), **{**RUN, **changes})


def command(data_path: str, output_dir: Path, **changes: Any) -> list[str]:
    """The same as a command line."""
    words = [sys.executable, "-m", "fastmae", "pretrain", "--data_path", data_path, "--output_dir", str(output_dir)]
    for name, value in {**RUN, **changes}.items():
        words += [f"--{name}", str(value)]
    return words


def run(words: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs a command outside the repository, so that the installed package is what is tested."""
    return subprocess.run(words, capture_output=True, text=True, timeout=300, cwd="/", env=environment(), **options)


def environment() -> dict[str, str]:
    """This process's, without what would change the arithmetic or the ranks."""
    return {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}


def soak(short: Any, long: Any) -> Any:
    """How much of a test is done: little with the other tests, all of it by `make soak`."""
    return long if os.environ.get("FASTMAE_SOAK") else short


def metrics(output_dir: Path) -> list[tuple[int, int, float, float]]:
    """(step, epoch, loss, lr) of every line of metrics.jsonl, exactly as written."""
    rows = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["epoch"], row["loss"], row["lr"]) for row in rows]


def final_state(output_dir: Path) -> dict[str, bytes]:
    """Every tensor of the newest checkpoint, by rank, as bytes."""
    newest = max((output_dir / "checkpoints").glob("step-*"))
    files = sorted(newest.glob("*.safetensors"))
    return {f"{file.name} {name}": array.tobytes() for file in files for name, array in load_file(file).items()}


def assert_same_run(one: Path, other: Path) -> None:
    """Weights, moments, every logged loss and every epoch's line are the same bits."""
    assert metrics(one) == metrics(other)
    assert (one / "log.txt").read_text() == (other / "log.txt").read_text()
    assert final_state(one) == final_state(other)


def forget_accelerate() -> None:
    """Lets Hugging Face Accelerate look again for ranks: it keeps for its process what the first test had."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
