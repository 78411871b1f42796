"""Sharing the batches of an evaluation among ranks, and bringing what they computed together on the first one.

Ranks take batches in turn. A batch is the same whatever their number, so that its features are the same bits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Share:
    """Which batches this process computes: those whose number is ``rank`` modulo ``ranks``."""

    rank: int = 0
    ranks: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0


WHOLE = Share()


def gather(
    share: Share, tensors: Mapping[str, torch.Tensor], facts: Any
) -> list[tuple[dict[str, torch.Tensor], Any]] | None:
    """Brings together what every rank has. All ranks call it.

    Args:
        share: this process among the ranks.
        tensors: on any device, of any shape.
        facts: anything that JSON can hold.

    Returns:
        On the first rank (the tensors; the facts) of each rank, in the order of ranks; None on others. Tensors are on
        the device of that of the same name there, if there is one, else on the CPU.
    """
    if share.ranks == 1:
        return [(dict(tensors), facts)]
    if not share.is_first:
        shapes = {name: [str(tensor.dtype).removeprefix("torch."), *tensor.shape] for name, tensor in tensors.items()}
        text = torch.frombuffer(bytearray(json.dumps([shapes, facts]).encode()), dtype=torch.uint8)
        for tensor in (torch.tensor([len(text)]), text, *tensors.values()):
            dist.send(tensor.cpu().contiguous(), 0)
        return None
    devices = {name: tensor.device for name, tensor in tensors.items()}
    return [(dict(tensors), facts), *(_received(rank, devices) for rank in range(1, share.ranks))]


def _received(rank: int, devices: Mapping[str, torch.device]) -> tuple[dict[str, torch.Tensor], Any]:
    """Returns what a rank sends, its tensors on the devices of those of the same names here."""

    def receive(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=dtype)
        dist.recv(tensor, rank)
        return tensor

    length = int(receive(1, dtype=torch.int64))
    shapes, facts = json.loads(bytes(receive(length, dtype=torch.uint8).tolist()))
    tensors = {
        name: receive(*shape, dtype=getattr(torch, dtype)).to(devices.get(name, "cpu"))
        for name, (dtype, *shape) in shapes.items()
    }
    return tensors, facts
