"""Export of the encoder as a bare state dict that timm's VisionTransformer (``vit_*.mae``) loads strictly."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save as safetensors_bytes

from fastmae.export.atomic import written_aside
from fastmae.export.official import weights_of
from fastmae.model.mae import MaskedAutoencoderViT


def save_timm(path: Path, model: MaskedAutoencoderViT, head: dict[str, torch.Tensor] | None = None) -> None:
    """Writes a .pth or a .safetensors, by the suffix, without ``mask_token``, which timm would not recognise.

    timm's VisionTransformer must be made with ``num_classes=0``, and with ``img_size`` and ``patch_size`` if they are
    not those of its name; for a classifier with its ``head`` it needs ``num_classes``, and ``global_pool="avg"`` if the
    mean of the tokens is classified.

    Raises:
        UserError: the file system refused.
    """
    weights = weights_of(model, "encoder") | (head or {})
    with written_aside(path) as aside:
        if path.suffix == ".safetensors":
            aside.write_bytes(safetensors_bytes(weights, {"format": "pt"}))
        else:
            torch.save(weights, aside)
