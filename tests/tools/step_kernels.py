"""How many kernels does a block of ViT-B launch on a GPU, and how many bytes do they move, with torch's ops and ours?

Runs a block forward and backward on tensors that hold nothing (FakeTensorMode), under bfloat16 autocast, and counts the
operations. No GPU and no memory are needed. Products and attention are counted apart: their bytes are no overhead. The
tensors pretend to lie on a CPU, because torch without CUDA has no others; autocast treats these operations alike there,
while tokens are float32 between blocks. Docs: docs/kernels.md.

    python tests/tools/step_kernels.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastmae.model import vit

N, S, D, HEADS = 256, 50, 768, 12
APART = ("mm", "linear", "attention")
# The sums of programs are added up by a kernel of torch's.
LAUNCHES = {"add_layer_norm_backward": 2, "gelu_backward": 2}


@dataclass
class Work:
    """Launches, and bytes per row and channel of all but products and attention."""

    launches: int = 0
    bytes: float = 0.0


class Count(TorchDispatchMode):
    """Counts every operation that moves anything."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.work = work

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        out = operation(*arguments, **(keywords or {}))
        given, made = (_tensors(part) for part in ((arguments, keywords), out))
        storages = {tensor.untyped_storage()._cdata for tensor in given}
        if all(tensor.untyped_storage()._cdata in storages for tensor in made) or operation._schema.name.endswith(
            "empty"
        ):
            return out  # a view, or memory that nobody writes to yet
        name = operation._schema.name.split("::")[1]
        ours = operation.namespace == "fastmae"
        self.work.launches += LAUNCHES.get(name, 1) if ours else 1
        if not any(part in name for part in APART):
            # Weights and their casts do not grow with the rows.
            rows = [tensor for tensor in (*given, *made) if tensor.numel() % (N * S) == 0]
            self.work.bytes += sum(tensor.numel() * tensor.itemsize for tensor in rows) / (N * S * D)
        return out


def _tensors(tree: Any) -> list[torch.Tensor]:
    """The different tensors among arguments or results."""
    return list({id(leaf): leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)}.values())


@contextmanager
def fused(chosen: bool) -> Iterator[None]:
    """Lets models compute with the fused ops or torch's own operations; attention is Triton's, as on a GPU."""
    before = vit.uses_fused, vit.attention
    vit.uses_fused = lambda *_: chosen
    vit.attention = lambda packed, queries=None: torch.ops.fastmae.attention(packed, queries, "triton")[0]
    try:
        yield
    finally:
        vit.uses_fused, vit.attention = before


def block_work(with_ops: bool, residual: torch.dtype = torch.float32) -> tuple[Work, Work]:
    """What one block in the middle of a stack takes, forward and backward."""
    forward, backward = Work(), Work()
    with FakeTensorMode(), fused(with_ops):
        block = vit.Block(D, HEADS, 4.0, partial(nn.LayerNorm, eps=1e-6))
        x = torch.empty(N, S, D, dtype=residual, requires_grad=True)
        branch = torch.empty(N, S, D, dtype=torch.bfloat16, requires_grad=True)
        given = vit.Sum(x, branch) if with_ops else x
        with Count(forward), torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
            out = block(given)
        outputs = list(out) if with_ops else [out]
        gradients = [torch.empty_like(tensor) for tensor in outputs]
        leaves = [x, branch, *block.parameters()] if with_ops else [x, *block.parameters()]
        with Count(backward):
            torch.autograd.grad(outputs, leaves, gradients)
    return forward, backward


def table() -> str:
    """A Markdown table of all cases."""
    rows = ["| a block of ViT-B, bf16 | launches forward, backward | bytes·D per row forward, backward, together |"]
    rows.append("|---|---|---|")
    cases: dict[str, Callable[[], tuple[Work, Work]]] = {
        "torch's operations, float32 between blocks": partial(block_work, False),
        "`add_layer_norm` and `gelu`, float32 between blocks": partial(block_work, True),
        "`add_layer_norm` and `gelu`, bfloat16 between blocks": partial(block_work, True, torch.bfloat16),
    }
    for name, count in cases.items():
        works = count()
        launches, sizes = ([getattr(work, field) for work in works] for field in ("launches", "bytes"))
        rows.append(f"| {name} | {launches[0]}, {launches[1]} | {sizes[0]:.0f}, {sizes[1]:.0f}, {sum(sizes):.0f} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
