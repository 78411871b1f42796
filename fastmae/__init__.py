"""fastmae: a fast, exact, resumable trainer for masked autoencoders (MAE, He et al. 2021).

Importing it touches no device and starts no thread.
"""

from fastmae import ops
from fastmae.model.mae import MaskedAutoencoderViT
from fastmae.model.presets import (
    mae_vit_base_patch16,
    mae_vit_base_patch16_dec512d8b,
    mae_vit_huge_patch14,
    mae_vit_huge_patch14_dec512d8b,
    mae_vit_large_patch16,
    mae_vit_large_patch16_dec512d8b,
    mae_vit_small_patch16,
    mae_vit_tiny_patch4,
    mae_vit_tiny_patch16,
)

__all__ = [
    "MaskedAutoencoderViT",
    "mae_vit_base_patch16",
    "mae_vit_base_patch16_dec512d8b",
    "mae_vit_huge_patch14",
    "mae_vit_huge_patch14_dec512d8b",
    "mae_vit_large_patch16",
    "mae_vit_large_patch16_dec512d8b",
    "mae_vit_small_patch16",
    "mae_vit_tiny_patch4",
    "mae_vit_tiny_patch16",
    "ops",
]
