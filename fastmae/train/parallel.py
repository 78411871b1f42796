"""Ranks: which one this process is, on which device, and how they share weights, gradients and decisions."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import os
import socket
import time
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from fastmae import launch, torch_compat
from fastmae.errors import SettingError, UserError
from fastmae.messages import logger
from fastmae.model.family import blocks_of
from fastmae.model.sharding import local_part
from fastmae.train.precision import Precision
from fastmae.train.settings import disagreement, torch_builds

_TRAININGS = itertools.count()


@dataclass(frozen=True)
class DistContext:
    """This process among the ranks that torchrun or another launcher started. Without one it is the only rank."""

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

    def gather(self, value: Any) -> list[Any]:
        """Returns what every rank gave, by rank: anything that JSON can hold. It is exchanged over the CPU."""
        if self.size == 1:
            return [value]
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(text)]))
        padded = torch.zeros(int(max(lengths)), dtype=torch.uint8)
        padded[: len(text)] = text
        texts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(texts, padded)
        return [json.loads(bytes(one[: int(n)].tolist())) for one, n in zip(texts, lengths, strict=True)]

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


def start(device: str | None, patience: float | None = None) -> DistContext:
    """Joins the ranks that the launcher announces in the environment.

    Args:
        device: as --device says.
        patience: seconds after which a rank that does not arrive, or does not answer, is given up. None or 0: half an
            hour.

    Raises:
        UserError: what the launcher says cannot be, or the ranks do not find each other.
    """
    launched = launch.here()
    # srun and mpirun may let each task see one GPU alone.
    sees_one = launched.by != "torchrun" and torch.cuda.is_available() and torch.cuda.device_count() == 1
    chosen = choose_device(device, 0 if sees_one else launched.local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if launched.size > 1:
        backend, timeout = (
            "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo",
            timedelta(seconds=patience or 1800),
        )
        try:
            if launched.rank > 0:
                _wait_for_first_rank(launched, timeout)
            # Each training has a prefix of its own, as keys of an earlier one in these processes are still there.
            names = dist.PrefixStore(f"training {next(_TRAININGS)}", _store(timeout))
            dist.init_process_group(backend, store=names, rank=launched.rank, world_size=launched.size, timeout=timeout)
        except (RuntimeError, ValueError, OSError) as error:
            raise _not_joined(launched, timeout, error) from error
    return DistContext(launched.rank, launched.size, chosen)


@functools.cache
def _store(timeout: timedelta) -> dist.Store:
    """Returns the store in which the ranks find each other. A process has one, as rank 0 cannot open its port twice."""
    store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    return store


def _wait_for_first_rank(launched: launch.Launch, timeout: timedelta) -> None:
    """Waits until rank 0 has opened its port. torch would fill the screen while it waits.

    Raises:
        OSError: it does not, or there is no such machine.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    while True:
        try:
            socket.create_connection((launched.address, launched.port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise TimeoutError(f"timed out: {error}") from error
        time.sleep(0.1)


def _not_joined(launched: launch.Launch, timeout: timedelta, error: Exception) -> UserError:
    where = f"{launched.address}:{launched.port}"
    text = " ".join(str(error).split())
    if "EADDRINUSE" in text or "address already in use" in text.lower():
        return UserError(f"port {launched.port} is in use on this machine, by another run; export another MASTER_PORT")
    seconds = f"{timeout.total_seconds():g} s"
    if isinstance(error, TimeoutError):
        return UserError(
            f"rank {launched.rank} found no rank 0 at {where} for {seconds} ({text.removeprefix('timed out: ')}); "
            "start every rank, with the same MASTER_ADDR and MASTER_PORT"
        )
    if "timed out" in text.lower() or "timeout" in text.lower():
        return UserError(
            f"rank {launched.rank} waited {seconds} (--hang_timeout) for all {launched.size} ranks to meet at {where}; "
            "start every rank, with the same MASTER_ADDR and MASTER_PORT"
        )
    return UserError(f"rank {launched.rank} of {launched.size} did not find the others at {where} ({text[:200]})")


# --- the same run on every rank ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def agreeing(context: DistContext) -> Generator[dict[str, Any]]:
    """Leaves all ranks together: either all go on, with the same settings and data, or all end, and one says why.

    Yields:
        A dict that each rank fills with what must be the same, as ``settings.disagreement`` takes it.

    Raises:
        UserError: a rank failed while this was entered, or ranks differ. The main rank's error says which and how; that
            of the others ``is_said``.
    """
    mine: dict[str, Any] = {}
    failure: Exception | None = None
    try:
        yield mine
    except Exception as error:
        failure = error
    if context.size == 1:
        if failure is not None:
            raise failure
        return
    digest = hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).hexdigest()
    answers = _ask(context, {"failure": failure and _as_words(failure), "digest": digest})
    failures = [(rank, answer["failure"]) for rank, answer in enumerate(answers) if answer["failure"]]
    if failure is not None and not (context.is_main and isinstance(failure, UserError)):
        if isinstance(failure, UserError):
            failure.is_said = True
        raise failure
    if failures:
        rank, (text, command_line) = failures[0]
        raise failure or _RankError(rank, text, command_line, is_said=not context.is_main)
    if len({answer["digest"] for answer in answers}) == 1:
        return
    everything = _ask(context, mine)
    problem = disagreement(everything)
    if problem is not None:
        problem.is_said = not context.is_main
        raise problem
    builds = torch_builds(everything)
    if builds and context.is_main:
        logger.warning("%s", builds)


class _RankError(UserError):
    """What ended another rank, in its words."""

    def __init__(self, rank: int, text: str, command_line: str, is_said: bool) -> None:
        super().__init__(f"rank {rank}: {text}")
        self._command_line, self.is_said = f"rank {rank}: {command_line}", is_said

    def as_on_the_command_line(self) -> str:
        return self._command_line


def _as_words(failure: Exception) -> tuple[str, str]:
    if isinstance(failure, UserError):
        return str(failure), failure.as_on_the_command_line()
    text = f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}"
    return text, text


def _ask(context: DistContext, value: Any) -> list[Any]:
    """Returns what every rank gives; a UserError if one of them is gone."""
    try:
        return context.gather(value)
    except RuntimeError as error:
        raise UserError(
            "another rank ended, or did not answer, before the run began; its own last line says why"
        ) from error


def ranks_here() -> int:
    """Returns the number of ranks on this machine."""
    return launch.read_launch(os.environ).local_size


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
    gather: torch.dtype = torch.float32
    """The format in which ranks that hold pieces of the weights exchange those of matrix products."""


def choose_parallelism(
    kind: str, reduce: str, shard_size: int | None, context: DistContext, precision: Precision | None = None
) -> Parallelism:
    """Returns what --parallel, --reduce and --shard_size mean for these ranks.

    Args:
        kind, reduce, shard_size: the flags.
        context: this process among the ranks.
        precision: the number format of the run; None for fp32.

    Raises:
        UserError: ``shard_size`` does not divide the number of ranks.
    """
    dtype = torch.bfloat16 if reduce == "bf16" else torch.float32
    if context.size == 1:
        return Parallelism("none", "one rank", dtype, 1)
    if kind == "ddp":
        return Parallelism(kind, f"{context.size} ranks, gradients in {reduce}", dtype, 1)
    gather, formats = torch.float32, f"gradients in {reduce}"
    if precision is not None and precision.autocast == torch.bfloat16:
        gather, formats = torch.bfloat16, f"{formats}, weights of products in bf16"
    if kind == "fsdp":
        return Parallelism(kind, f"{context.size} ranks, {formats}", dtype, context.size, gather)
    if shard_size is None:
        shard_size = int(os.environ.get("LOCAL_WORLD_SIZE", context.size))
    if context.size % shard_size:
        raise SettingError("shard_size", shard_size, f"must divide the {context.size} ranks")
    copies = f"{context.size // shard_size} copies of {shard_size} ranks each"
    return Parallelism(kind, f"{copies}, {formats}", dtype, shard_size, gather)


def parallelize(module: nn.Module, context: DistContext, parallelism: Parallelism) -> nn.Module:
    """Returns the module as all ranks train it: the backward pass averages gradients over the ranks.

    FSDP2 works in place. Its parameters are DTensors, of which each rank holds a piece, so the optimiser must be made
    afterwards. They stay float32, and autocast lowers the precision of the computation, as with DDP. What it would
    round is rounded before it is sent, which gives the same bits and moves half as many.
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
    for block in blocks_of(module):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=policy)
    if parallelism.gather == torch.bfloat16:
        for part in module.modules():
            if isinstance(part, nn.Linear | nn.Conv2d) and "weight" in part._parameters:  # not computed from another
                torch_compat.send_in_bf16(part.weight)
    return module
