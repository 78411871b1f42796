"""bfloat16 copies of the weights of products, cast once for all micro-batches of a step instead of at every use.

Copies are neither parameters nor buffers. Layers have them only while ``in_use`` is entered, so that state dicts, deep
copies, pickles and evaluation never meet them. They are written anew before every step, so that nothing that happens to
weights between steps (the optimiser, a skipped step, a checkpoint, a rollback, an average, somebody's edit) can leave
an old one behind.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import TypeGuard

import torch
from torch import nn

from fastmae.model.classifier import LoraLinear
from fastmae.model.sharding import is_sharded
from fastmae.model.vit import PatchEmbed, has_hooks
from fastmae.ops.linear import Linear, TorchLinear, reads_copies
from fastmae.ops.linear_bf16 import Copies
from fastmae.torch_compat import copy_all

Layer = Linear | PatchEmbed
Weights = tuple[torch.Tensor | None, torch.Tensor | None]


def takes_copies(module: nn.Module) -> TypeGuard[Layer]:
    """Whether a layer uses copies if it has them. Somebody's subclass may change its weights before it uses them."""
    return type(module) in (Linear, TorchLinear, LoraLinear, PatchEmbed)


class WeightCopies:
    """The copies of one model: 2 bytes for each number of a weight, at the same addresses from step to step.

    Layers whose weights are not plain float32 parameters (pruned, parametrised, in bfloat16 already) have none, and
    there are none at all for a model whose weights are sharded.

    Args:
        model: the model on its device, after it was sharded, if it is.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        self._layers = [] if is_sharded(model) else [module for module in self._modules if takes_copies(module)]
        self._copies: list[Copies | None] = [None] * len(self._layers)
        self._has_hooks = False

    @torch.no_grad()
    def write(self) -> None:
        """Casts all weights as they are now. The host does not wait for the device."""
        weights = [_weights(layer) for layer in self._layers]
        self._copies = [_room(own, copies) for own, copies in zip(weights, self._copies, strict=True)]
        self._has_hooks = any(map(has_hooks, self._modules))
        targets, sources = [], []
        for own, copies in zip(weights, self._copies, strict=True):
            for copy, weight in zip(copies or (), own, strict=False):
                if copy is not None and weight is not None:
                    targets.append(copy)
                    sources.append(weight)
        copy_all(targets, sources)

    @contextmanager
    def in_use(self) -> Generator[None]:
        """Lends layers their copies, as ``write`` has written them, for a forward pass and its backward pass.

        A model with hooks gets none, as these may change weights in the middle of a pass.
        """
        if not self._has_hooks:
            for layer, copies in zip(self._layers, self._copies, strict=True):
                layer.copies = copies
        try:
            yield
        finally:
            for layer in self._layers:
                vars(layer).pop("copies", None)


def _weights(layer: Layer) -> Weights:
    """Returns a layer's weight and bias as they are now."""
    holder = layer.proj if isinstance(layer, PatchEmbed) else layer
    return getattr(holder, "weight", None), getattr(holder, "bias", None)


def _room(weights: Weights, copies: Copies | None) -> Copies | None:
    """Returns memory for the copies of a layer: that of before, if it fits. None if the layer has none."""
    weight, bias = weights
    if weight is None or not all(p is None or (type(p) is nn.Parameter and p.dtype == torch.float32) for p in weights):
        return None
    if not reads_copies(weight.device):
        return None
    weight_copy, bias_copy = copies or (None, None)
    return _like(weight, weight_copy), None if bias is None else _like(bias, bias_copy)


def _like(weight: torch.Tensor, copy: torch.Tensor | None) -> torch.Tensor:
    if copy is not None and (copy.shape, copy.stride(), copy.device) == (weight.shape, weight.stride(), weight.device):
        return copy
    return torch.empty_like(weight, dtype=torch.bfloat16, requires_grad=False)
