"""The official formulation built of timm's ViT blocks."""

from __future__ import annotations

import importlib
from functools import partial

from torch import nn

from fastmae.benchmarks.baselines.official import official_like
from fastmae.errors import UserError
from fastmae.model.mae import MaskedAutoencoderViT


def timm_like(model: MaskedAutoencoderViT) -> nn.Module:
    """As ``official_like``.

    Raises:
        UserError: timm is not installed, or the torchvision that it imports is not or was built for another torch.
    """
    try:
        block = importlib.import_module("timm.models.vision_transformer").Block
    except (ImportError, RuntimeError) as error:  # torchvision's own complaint is a RuntimeError
        raise UserError(f"timm cannot be imported ({error}); install it with a torchvision for this torch") from error
    norm = partial(nn.LayerNorm, eps=1e-6)
    return official_like(model, lambda width, heads, ratio: block(width, heads, ratio, qkv_bias=True, norm_layer=norm))
