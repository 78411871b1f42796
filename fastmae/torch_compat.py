"""Every private, renamed or otherwise fragile name of torch that fastmae uses, each behind a function of its own.

One file to mend when torch changes. A function says in which versions its names were seen, and what happens without
them. Nothing here is looked up at import, so that a name that is gone cannot break ``import fastmae``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# --- tensors in files, shared by ranks --------------------------------------------------------------------------------


class ShardError(Exception):
    """The tensors of a folder could not be written or read by some rank; raised on all ranks."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the headers of a folder's files describe it."""

    shape: torch.Size
    numbers: int
    """How many numbers its pieces have together; fewer than the shape's if a rank's piece is missing."""


def save_shards(folder: Path, tensors: dict[str, torch.Tensor], group: dist.ProcessGroup | None) -> None:
    """Writes one .safetensors per rank; a tensor that several ranks hold is written by one of them.

    Raises:
        ShardError: a rank could not write.
    """
    # torch 2.11 to 2.13. Nothing else of torch writes sharded tensors without a pickle.
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.api import CheckpointException

    _silence_single_process_warning()
    writer = checkpoint.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        checkpoint.save(tensors, storage_writer=writer, process_group=group, no_dist=group is None)
    except CheckpointException as error:
        raise ShardError(str(next(iter(error.failures.values()))[0])) from error


def load_shards(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Reads tensors in place, each rank its own part, whatever the number of ranks that wrote them.

    Raises:
        ShardError: a rank could not read.
    """
    # torch 2.11 to 2.13. Reads safetensors alone; the other readers of torch unpickle what they find.
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.api import CheckpointException

    _silence_single_process_warning()
    reader = checkpoint.HuggingFaceStorageReader(str(folder))
    try:
        checkpoint.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    except CheckpointException as error:
        raise ShardError(str(error).splitlines()[-1]) from error


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a folder by name, from the headers of its files.

    Raises:
        safetensors.SafetensorError: a file is damaged.
    """
    # torch 2.11 to 2.13.
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    entries: dict[str, Any] = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {
        name: StoredTensor(entry.size, sum(chunk.sizes.numel() for chunk in entry.chunks))
        for name, entry in entries.items()
    }


def copy_on_cpu() -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """A function that copies tensors into memory of the CPU and uses the same memory again at its next call."""
    # torch 2.11 to 2.13.
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

    options = StagingOptions(
        use_pinned_memory=torch.cuda.is_available(),
        use_shared_memory=False,
        use_async_staging=False,
        use_non_blocking_copy=False,
    )
    stager = DefaultStager(options)

    def copy(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        staged = stager.stage(tensors)
        assert isinstance(staged, dict)
        return staged

    return copy


def _silence_single_process_warning() -> None:
    """torch warns each time that one process saves or loads by itself, also if told to. A changed text warns again."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
