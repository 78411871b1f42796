"""Holding an encoder near the weights that it began with (--l2sp), so that it keeps what it knew.

L2-SP (Li et al. 2018, arXiv 1802.01483, equation 2) adds α/2 · ‖w − w⁰‖² to the loss. AdamW takes its decay out of the
loss, as the step of Adam does not grow with the gradient (Loshchilov & Hutter 2019), and so does this: after the step
of AdamW, w ← w + lr · α · (w⁰ − w).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from fastmae.torch_compat import load_shards

Anchor = dict[str, torch.Tensor]


def start_anchor(model: nn.Module, strength: float, checkpoint: Path | None) -> Anchor:
    """Returns the first weights of the encoder by name: those in the ``checkpoint`` that a run resumes, otherwise the
    weights now. Without ``strength`` there are none. They have the sharding of the parameters."""
    if not strength:
        return {}
    named = model.named_parameters()
    of_encoder = ((name, weight) for name, weight in named if not name.startswith(("decoder_", "mask_token")))
    anchor = {name: weight.detach().clone() for name, weight in of_encoder if weight.requires_grad}
    if checkpoint is not None:
        load_shards(checkpoint, in_checkpoint(anchor))
    return anchor


def in_checkpoint(anchor: Anchor) -> dict[str, torch.Tensor]:
    """Returns the tensors under the names that they have in a checkpoint."""
    return {f"anchor.{name}": tensor for name, tensor in anchor.items()}


@torch.no_grad()
def pull_back(anchor: Anchor, model: nn.Module, share: float, skipped: torch.Tensor) -> None:
    """Moves the encoder's weights by ``share`` of the way to the anchor, unless the step was skipped. The host does not
    wait for the device."""
    if not anchor:
        return
    weights, step = dict(model.named_parameters()), share * (1 - skipped)
    for name, first in anchor.items():
        weights[name].lerp_(first, step)
