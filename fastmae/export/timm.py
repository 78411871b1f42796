"""The encoder as timm's ``vit_*_patch*_224.mae`` have it: a bare state dict for its VisionTransformer, strictly."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save as safetensors_bytes

from fastmae.export.official import weights_of
from fastmae.export.place import written_aside
from fastmae.model.mae import MaskedAutoencoderViT


def save_timm(path: Path, model: MaskedAutoencoderViT) -> None:
    """Writes a .pth or, by its suffix, a .safetensors, without ``mask_token``, which timm takes for another model's.

    Its VisionTransformer is made with ``num_classes=0`` and, for a size or a patch other than the name's, ``img_size``
    and ``patch_size``.

    Raises:
        UserError: the file system refused.
    """
    weights = weights_of(model, "encoder")
    with written_aside(path) as aside:
        if path.suffix == ".safetensors":
            aside.write_bytes(safetensors_bytes(weights, {"format": "pt"}))
        else:
            torch.save(weights, aside)
