"""The published checkpoint without its optimiser: the encoder alone, or all of it (the ``*_full`` files)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save as safetensors_bytes

from fastmae.export.place import written_aside
from fastmae.model.mae import MaskedAutoencoderViT

Part = Literal["encoder", "full"]


def export_official(path: Path, model: MaskedAutoencoderViT, settings: dict[str, Any], part: Part) -> None:
    """Writes ``{'model', 'args'}`` as a .pth, or the weights as a .safetensors with the settings in its metadata.

    Args:
        path: its suffix says which.
        model: any.
        settings: plain numbers, strings and lists, from which fastmae builds the model again.
        part: what of it.

    Raises:
        UserError: the file system refused.
    """
    weights = weights_of(model, part)
    with written_aside(path) as aside:
        if path.suffix == ".safetensors":
            metadata = {"format": "pt", "settings": json.dumps(settings)}
            aside.write_bytes(safetensors_bytes(weights, metadata))
        else:
            torch.save({"model": weights, "args": settings}, aside)


def weights_of(model: MaskedAutoencoderViT, part: Part) -> dict[str, torch.Tensor]:
    """Weights under their published names, one piece of memory each."""
    weights = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    if part == "full":
        return weights
    return {name: tensor for name, tensor in weights.items() if not name.startswith(("decoder_", "mask_token"))}


def numbers(values: torch.Tensor) -> list[float]:
    """float32 numbers as they are written shortest: 0.485, which is the same float32 again."""
    return [float(str(value)) for value in values.numpy()]
