"""Ranks: which one this process is, on which device, and how they share weights, gradients and decisions."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from fastmae import torch_compat
from fastmae.errors import SettingError
from fastmae.model.sharding import local_part
from fastmae.model.vit import BLOCKS

_TRAININGS = itertools.count()


@dataclass(frozen=True)
class DistContext:
    """This process among the ranks that torchrun started. Without torchrun it is the only rank."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Returns whether the flag is true on any rank. It is exchanged over the CPU, so no GPU work is waited for."""
        if self.size == 1:
            return flag
        votes = torch.tensor([int(flag)])
        dist.all_reduce(votes, dist.ReduceOp.MAX)
        return bool(votes.item())

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Returns the mean over ranks of a tensor that each of them has."""
        if self.size == 1:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total / self.size

    def barrier(self) -> None:
        """Waits until every rank is here."""
        if self.size > 1:
            dist.barrier()


class StopFlag:
    """A flag that is reduced over all ranks every step, and known one step later, so that no step waits for it.

    On a thousand ranks the reduction (2(n − 1) messages, over the CPU) may take longer than a step.
    """

    def __init__(self, context: DistContext) -> None:
        self._world = context
        self._asked: tuple[torch.Tensor, dist.Work] | None = None

    def any(self, flag: bool) -> bool:
        """Returns whether any rank's flag was true at the last call; with one rank, its flag now.

        All ranks call it at the same steps.
        """
        if self._world.size == 1:
            return flag
        answer = False
        if self._asked is not None:
            votes, work = self._asked
            work.wait()
            answer = bool(votes.item())
        votes = torch.tensor([int(flag)])
        self._asked = votes, dist.all_reduce(votes, dist.ReduceOp.MAX, async_op=True)
        return answer


def choose_device(flag: str | None, local_rank: int = 0) -> torch.device:
    """Returns the device of --device; without the flag, this rank's GPU if there is one, otherwise the CPU.

    Raises:
        UserError: not a device, or one that is not there.
    """
    if flag is None:
        flag = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(flag)
    except RuntimeError as error:
        raise SettingError("device", flag, "not a device; use cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise SettingError("device", flag, "not supported; use cpu, cuda or cuda:N")
    if device.type == "cuda":
        index = local_rank if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise SettingError("device", flag, f"torch sees {torch.cuda.device_count()} GPUs here; use --device=cpu")
        device = torch.device("cuda", index)
    return device


def finiteness_check(parameters: Iterable[torch.Tensor], context: DistContext) -> torch.Tensor:
    """Returns a number, the same on every rank, that is finite only if all weights of all ranks are finite."""
    return context.mean(torch.stack([local_part(parameter.detach()).sum() for parameter in parameters]).sum())


def start(device: str | None) -> DistContext:
    """Joins the ranks that torchrun announces in the environment."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = choose_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    rank = int(os.environ.get("RANK", "0"))
    if size > 1:
        # Each training has a prefix of its own, as keys of an earlier one in these processes are still in the store.
        names = dist.PrefixStore(f"training {next(_TRAININGS)}", _store())
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=names, rank=rank, world_size=size)
    return DistContext(rank, size, chosen)


@functools.cache
def _store() -> dist.Store:
    """Returns the store in which the ranks find each other. A process has one, as rank 0 cannot open its port twice."""
    store, _, _ = next(dist.rendezvous("env://"))
    return store


def ranks_here() -> int:
    """Returns the number of ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def restart_hazard() -> str | None:
    """Returns what would keep torchrun's --max-restarts from working here; None if nothing known would.

    torchrun's store outlives the ranks, so new ranks may read the addresses of the ones before them (pytorch#135712).
    """
    if torch_compat.restarts_on_an_old_store():
        return "torchrun --max-restarts may fail: export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before it"
    return None


def stop(context: DistContext) -> None:
    """Leaves the ranks."""
    if context.size > 1:
        dist.destroy_process_group()


@dataclass(frozen=True)
class Parallelism:
    """How ranks hold the weights: ``ddp`` is a copy per rank, ``fsdp`` pieces of one copy, ``hsdp`` of several."""

    kind: str
    reason: str
    reduce: torch.dtype
    """The format in which gradients are exchanged."""
    shard_size: int
    """The number of ranks that hold one copy of the weights together."""


def choose_parallelism(kind: str, reduce: str, shard_size: int | None, context: DistContext) -> Parallelism:
    """Returns what --parallel, --reduce and --shard_size mean for these ranks.

    Raises:
        UserError: ``shard_size`` does not divide the number of ranks.
    """
    dtype = torch.bfloat16 if reduce == "bf16" else torch.float32
    if context.size == 1:
        return Parallelism("none", "one rank", dtype, 1)
    if kind != "hsdp":
        return Parallelism(
            kind, f"{context.size} ranks, gradients in {reduce}", dtype, 1 if kind == "ddp" else context.size
        )
    if shard_size is None:
        shard_size = int(os.environ.get("LOCAL_WORLD_SIZE", context.size))
    if context.size % shard_size:
        raise SettingError("shard_size", shard_size, f"must divide the {context.size} ranks")
    copies = f"{context.size // shard_size} copies of {shard_size} ranks each"
    return Parallelism(kind, f"{copies}, gradients in {reduce}", dtype, shard_size)


def parallelize(module: nn.Module, context: DistContext, parallelism: Parallelism) -> nn.Module:
    """Returns the module as all ranks train it: the backward pass averages gradients over the ranks.

    FSDP2 works in place. Its parameters are DTensors, of which each rank holds a piece, so the optimiser must be made
    afterwards. They stay float32, and autocast lowers the precision of the computation, as with DDP.
    """
    if context.size == 1:
        return module
    if parallelism.kind == "ddp":
        # Buffers are constants, which DDP would send round before every forward pass.
        options: dict[str, Any] = {"gradient_as_bucket_view": True, **torch_compat.keep_buffers_local()}
        if context.device.type == "cuda":
            options["device_ids"] = [context.device.index]
        copy = DistributedDataParallel(module, **options)
        if parallelism.reduce == torch.bfloat16:
            torch_compat.average_gradients_in_bf16(copy)
        return copy
    shape: tuple[int, ...] = (context.size,)
    names: tuple[str, ...] = ("shard",)
    if parallelism.kind == "hsdp":
        shape, names = (context.size // parallelism.shard_size, parallelism.shard_size), ("replicate", "shard")
    mesh = init_device_mesh(context.device.type, shape, mesh_dim_names=names)
    policy = MixedPrecisionPolicy(reduce_dtype=parallelism.reduce)
    for block in [part for part in module.modules() if isinstance(part, BLOCKS)]:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=policy)
    return module
