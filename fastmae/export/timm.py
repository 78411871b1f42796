"""Export of the encoder as a bare state dict that timm's VisionTransformer (``vit_*.mae``) loads strictly."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes

from fastmae.export.atomic import written_aside
from fastmae.export.official import weights_of
from fastmae.model.mae import MaskedAutoencoderViT
from fastmae.model.sizes import sizes_of


def save_timm(path: Path, model: MaskedAutoencoderViT, head: dict[str, torch.Tensor] | None = None) -> None:
    """Writes a .pth or a .safetensors, by the suffix, without ``mask_token``, which timm would not recognise.

    ``as_timm`` says how the model is made. Positions have rows of zeros for registers, as timm adds positions to them.

    Raises:
        UserError: the file system refused.
    """
    weights = weights_of(model, "encoder") | (head or {})
    if model.reg_token is not None:
        table = weights["pos_embed"]
        zeros = table.new_zeros(model.reg_token.shape)
        weights["pos_embed"] = torch.cat([table[:, :1], zeros, table[:, 1:]], dim=1)
    save_weights(path, weights)


def save_weights(path: Path, weights: dict[str, torch.Tensor]) -> None:
    """Writes a bare state dict as a .pth or a .safetensors, by the suffix.

    Raises:
        UserError: the file system refused.
    """
    with written_aside(path) as aside:
        if path.suffix == ".safetensors":
            aside.write_bytes(safetensors_bytes(weights, {"format": "pt"}))
        else:
            torch.save(weights, aside)


def as_timm(model: MaskedAutoencoderViT, classes: int = 0) -> str:
    """Returns the call that makes the model for the file in timm, which rounds the width inside an MLP down."""
    sizes = sizes_of(model)
    arguments: dict[str, Any] = dict(
        img_size=_plain(model.img_size),
        patch_size=_plain(model.patch_size),
        in_chans=model.in_chans,
        num_classes=classes,
        global_pool="avg" if model.fc_norm is not None else "token",
        embed_dim=sizes.width,
        depth=sizes.depth,
        num_heads=sizes.heads,
        mlp_ratio=math.ceil(1e6 * sizes.hidden / sizes.width) / 1e6,
    )
    if sizes.registers:
        arguments["reg_tokens"] = sizes.registers
    return f"VisionTransformer({', '.join(f'{name}={value!r}' for name, value in arguments.items())})"


def _plain(size: tuple[int, int]) -> int | tuple[int, int]:
    return size[0] if size[0] == size[1] else size
