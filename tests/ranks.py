"""Ranks in processes of their own, forked from one that has imported everything: Python starts slower than they run."""

from __future__ import annotations

import io
import multiprocessing
import os
import resource
import runpy
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystem

from fastmae import torch_compat
from fastmae.checkpoint import save as saving
from fastmae.cli import main
from fastmae.config import PretrainConfig
from fastmae.messages import messages_on_stderr
from fastmae.train import pretrain as pretrain_module

_FORKSERVER = multiprocessing.get_context("forkserver")
_FORKSERVER.set_forkserver_preload(["ranks"])
MOMENT = 0.03
Work = PretrainConfig | Callable[[], int]
"""A training, or something else that ranks start, do and end together; returns an exit status."""


@dataclass(frozen=True)
class Rank:
    """A process, and the folder of what it said: stdout, stderr, and a journal of the steps and saves that it did."""

    process: BaseProcess
    folder: Path

    def finish(self) -> tuple[int | None, str]:
        """Its exit status and its stderr, once it has ended; None if it does not."""
        self.process.join(timeout=300)
        return self.process.exitcode, self._text("stderr")

    def journal(self) -> list[str]:
        """``step begins``, ``step ends``, ``save begins step-00000007``, ``save ends …``, in the order of their time.

        A save goes on beside the steps after it.
        """
        return self._text("journal").splitlines()

    def said(self) -> str:
        """Its stdout."""
        return self._text("stdout")

    def _text(self, name: str) -> str:
        path = self.folder / name
        return path.read_text() if path.exists() else ""  # killed before it had begun


def start_ranks(ranks: int, *work: Work, file_size: int | None = None, slow_saves: bool = False) -> list[Rank]:
    """Starts ``ranks`` processes that do one after another.

    Args:
        file_size: none writes files beyond so many bytes.
        slow_saves: a checkpoint takes a moment at every stage of being written, and in the middle of each file.
    """
    folder, port = Path(tempfile.mkdtemp()), _free_port()
    started = []
    for rank in range(ranks):
        (folder / str(rank)).mkdir()
        words = (rank, ranks, port, work, folder / str(rank), file_size, slow_saves)
        started.append(Rank(_FORKSERVER.Process(target=_do, args=words, daemon=True), folder / str(rank)))
    for one in started:
        one.process.start()
    return started


def run_ranks(ranks: int, *work: Work) -> None:
    """Does all of it, which must succeed."""
    ended = [rank.finish() for rank in start_ranks(ranks, *work)]
    assert [status for status, _ in ended] == [0] * ranks, ended


def run_script(file: Path, *words: str) -> int:
    """Runs a script as ``python FILE WORDS`` does; a work for ``start_ranks``."""
    sys.argv = [str(file), *words]
    runpy.run_path(str(file), run_name="__main__")
    return 0


def command_of_each(*rows: tuple[list[str], ...]) -> int:
    """Runs commands one after another, each with words of its own for every rank, and prints their exit statuses."""
    for row in rows:
        print(main(row[int(os.environ["RANK"])]))
    return 0


def _do(
    rank: int,
    ranks: int,
    port: int,
    work: tuple[Work, ...],
    folder: Path,
    file_size: int | None,
    slow_saves: bool,
) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), number)
    sys.stdout.reconfigure(line_buffering=True)  # what is said before a kill must not be lost
    _keep_journal(os.open(folder / "journal", os.O_WRONLY | os.O_CREAT | os.O_APPEND))
    if slow_saves:
        _slow_saves()
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    if ranks > 1:
        names = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=ranks, LOCAL_WORLD_SIZE=ranks)
        names |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        os.environ.update({name: str(value) for name, value in names.items()})
        torch.set_num_threads(1)
    with messages_on_stderr():
        _work(work)


def _work(work: tuple[Work, ...]) -> None:
    for one in work:
        status = pretrain_module.pretrain(one) if isinstance(one, PretrainConfig) else one()
        if status:
            sys.exit(status)


def _keep_journal(journal: int) -> None:
    """Written at once, so that it says of a rank that was killed what it was doing."""

    take_step, save = pretrain_module.train_step, saving.save_checkpoint

    def note(line: str) -> None:
        os.write(journal, f"{line}\n".encode())

    def noted_step(*words: Any, **options: Any) -> Any:
        note("step begins")
        stepped = take_step(*words, **options)
        note("step ends")
        return stepped

    def noted_save(run: Path, step: int, *words: Any) -> Path:
        note(f"save begins step-{step:08d}")
        path = save(run, step, *words)
        note(f"save ends step-{step:08d}")
        return path

    pretrain_module.train_step, saving.save_checkpoint = noted_step, noted_save


def _slow_saves() -> None:
    def slowly(call: Callable) -> Callable:
        def waits(*words: Any) -> Any:
            time.sleep(MOMENT)
            return call(*words)

        return waits

    stages = (torch_compat, "stored_tensors"), (saving, "sha256_of"), (saving, "write_text"), (Path, "rename")
    for owner, name in stages:
        setattr(owner, name, slowly(getattr(owner, name)))

    class SlowFile(io.FileIO):
        def write(self, data: Any) -> int:
            half = len(data) // 2
            return super().write(data[:half]) + slowly(super().write)(data[half:])

    @contextmanager
    def create_stream(self: FileSystem, path: Any, mode: str) -> Generator[Any]:
        with SlowFile(path, "w") if mode == "wb" else Path(path).open(mode) as file:
            yield file

    FileSystem.create_stream = create_stream


def _free_port() -> int:
    with socket.socket() as any_socket:
        any_socket.bind(("127.0.0.1", 0))
        return any_socket.getsockname()[1]
