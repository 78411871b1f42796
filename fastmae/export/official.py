"""Export to the official form of a checkpoint, without an optimiser: the encoder, or all (the ``*_full`` files)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save as safetensors_bytes

from fastmae.export.atomic import written_aside
from fastmae.model.family import MaskedModel

Part = Literal["encoder", "full"]


def export_official(
    path: Path,
    model: MaskedModel,
    settings: dict[str, Any],
    part: Part,
    head: dict[str, torch.Tensor] | None = None,
) -> None:
    """Writes ``{'model', 'args'}`` as a .pth, or the weights as a .safetensors with the settings in its metadata.

    Args:
        path: a path that ends in .pth or .safetensors.
        model: the model.
        settings: plain numbers, strings and lists, from which fastmae can build the model again.
        part: ``encoder`` or ``full``.
        head: of a classifier, which is then written instead of an encoder.

    Raises:
        UserError: the file system refused.
    """
    weights = weights_of(model, part) | (head or {})
    with written_aside(path) as aside:
        if path.suffix == ".safetensors":
            metadata = {"format": "pt", "settings": json.dumps(settings)}
            aside.write_bytes(safetensors_bytes(weights, metadata))
        else:
            torch.save({"model": weights, "args": settings}, aside)


def weights_of(model: MaskedModel, part: Part) -> dict[str, torch.Tensor]:
    """Returns weights under their official names, each contiguous."""
    weights = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    if part == "full":
        return weights
    return {name: tensor for name, tensor in weights.items() if not name.startswith(("decoder_", "mask_token"))}


def numbers(values: torch.Tensor) -> list[float]:
    """Returns float32 numbers with the fewest digits that give the same float32 again, such as 0.485."""
    return [float(str(value)) for value in values.numpy()]
