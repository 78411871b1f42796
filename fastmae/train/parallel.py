"""Ranks: who am I among how many, on which device, and how gradients and decisions are shared."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastmae.errors import UserError


@dataclass(frozen=True)
class World:
    """This process among the ranks that torchrun started; alone without torchrun."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether any rank says yes. Over the CPU, so that no GPU work is waited for."""
        if self.size == 1:
            return flag
        votes = torch.tensor([int(flag)])
        dist.all_reduce(votes, dist.ReduceOp.MAX)
        return bool(votes.item())

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean over ranks of a tensor of each."""
        if self.size == 1:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total / self.size

    def barrier(self) -> None:
        """Waits until every rank is here."""
        if self.size > 1:
            dist.barrier()


def choose_device(flag: str | None, local_rank: int = 0) -> torch.device:
    """The device of a flag; without one, this rank's GPU if there is any, otherwise the CPU.

    Raises:
        UserError: not a device, or one that is not there.
    """
    if flag is None:
        flag = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(flag)
    except RuntimeError as error:
        raise UserError(f"--device {flag}: not a device; use cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {flag}: not supported; use cpu, cuda or cuda:N")
    if device.type == "cuda":
        index = local_rank if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise UserError(f"--device {flag}: torch sees {torch.cuda.device_count()} GPUs here; use --device cpu")
        device = torch.device("cuda", index)
    return device


def start(device: str | None) -> World:
    """Joins the ranks that torchrun announces in the environment."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = choose_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if size > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo")
    return World(int(os.environ.get("RANK", "0")), size, chosen)


def ranks_here() -> int:
    """How many ranks share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def stop(world: World) -> None:
    """Leaves the ranks."""
    if world.size > 1:
        dist.destroy_process_group()


def share_gradients(module: nn.Module, world: World) -> nn.Module:
    """The module, with gradients averaged over ranks during backward where there are several."""
    if world.size == 1:
        return module
    options: dict[str, Any] = {"gradient_as_bucket_view": True}
    if world.device.type == "cuda":
        options["device_ids"] = [world.device.index]
    return DistributedDataParallel(module, **options)
