"""Ranks in processes of their own, forked from one that has imported everything: Python starts slower than they run."""

from __future__ import annotations

import multiprocessing
import os
import resource
import socket
import sys
import tempfile
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from fastmae.config import PretrainConfig
from fastmae.train.pretrain import pretrain

_FORKSERVER = multiprocessing.get_context("forkserver")
_FORKSERVER.set_forkserver_preload(["ranks"])


@dataclass(frozen=True)
class Rank:
    """A process, and the file of its stderr."""

    process: BaseProcess
    stderr: Path

    def finish(self) -> tuple[int | None, str]:
        """Its exit status and what it said, once it has ended; None if it does not."""
        self.process.join(timeout=300)
        return self.process.exitcode, self.stderr.read_text()


def start_ranks(ranks: int, *configs: PretrainConfig, file_size: int | None = None) -> list[Rank]:
    """Starts ``ranks`` processes that do the trainings one after another; none writes files beyond ``file_size``."""
    jobs = [(config, _free_port()) for config in configs]
    folder = Path(tempfile.mkdtemp())
    started = [
        Rank(_process(rank, ranks, jobs, folder / str(rank), file_size), folder / str(rank)) for rank in range(ranks)
    ]
    for rank in started:
        rank.process.start()
    return started


def run_ranks(ranks: int, *configs: PretrainConfig) -> None:
    """Does the trainings, which must succeed."""
    ended = [rank.finish() for rank in start_ranks(ranks, *configs)]
    assert [status for status, _ in ended] == [0] * ranks, ended


def _process(rank: int, ranks: int, jobs: list, stderr: Path, file_size: int | None) -> BaseProcess:
    return _FORKSERVER.Process(target=_train, args=(rank, ranks, jobs, stderr, file_size), daemon=True)


def _train(rank: int, ranks: int, jobs: list[tuple[PretrainConfig, int]], stderr: Path, file_size: int | None) -> None:
    for number, path in ((1, os.devnull), (2, str(stderr))):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    names = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=ranks, LOCAL_WORLD_SIZE=ranks, MASTER_ADDR="127.0.0.1")
    os.environ.update({name: str(value) for name, value in names.items()})
    torch.set_num_threads(1)
    for config, port in jobs:
        os.environ["MASTER_PORT"] = str(port)
        status = pretrain(config)
        if status:
            sys.exit(status)


def _free_port() -> int:
    with socket.socket() as any_socket:
        any_socket.bind(("127.0.0.1", 0))
        return any_socket.getsockname()[1]
