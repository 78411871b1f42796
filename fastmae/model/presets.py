"""The presets: the sizes of the official models and of three smaller ones, with either decoder."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from fastmae.model.cross import CrossMAE
from fastmae.model.mae import MaskedAutoencoderViT

MODELS: dict[str, type[MaskedAutoencoderViT]] = {"self": MaskedAutoencoderViT, "cross": CrossMAE}


def _preset(overrides: dict[str, Any], **preset: Any) -> MaskedAutoencoderViT:
    """Makes a preset's model with the caller's ``overrides``; ``decoder_attention`` among them chooses the class."""
    arguments = {"norm_layer": partial(nn.LayerNorm, eps=1e-6), **preset, **overrides}
    decoder_attention = arguments.pop("decoder_attention", "self")
    if decoder_attention not in MODELS:
        raise ValueError(f"decoder_attention must be {' or '.join(MODELS)}, got {decoder_attention}")
    return MODELS[decoder_attention](**arguments)


def mae_vit_tiny_patch4(**kwargs: Any) -> MaskedAutoencoderViT:
    """For images of 16 to 64 pixels: encoder 128 wide, 4 blocks; decoder 96 wide, 2 blocks."""
    encoder = dict(embed_dim=128, depth=4, num_heads=4)
    decoder = dict(decoder_embed_dim=96, decoder_depth=2, decoder_num_heads=3)
    return _preset(kwargs, img_size=28, patch_size=4, **encoder, **decoder)


def mae_vit_tiny_patch16(**kwargs: Any) -> MaskedAutoencoderViT:
    """ViT-Ti/16: encoder 192 wide, 12 blocks; decoder 192 wide, 4 blocks."""
    encoder = dict(embed_dim=192, depth=12, num_heads=3)
    decoder = dict(decoder_embed_dim=192, decoder_depth=4, decoder_num_heads=6)
    return _preset(kwargs, patch_size=16, **encoder, **decoder)


def mae_vit_small_patch16(**kwargs: Any) -> MaskedAutoencoderViT:
    """ViT-S/16: encoder 384 wide, 12 blocks; decoder 256 wide, 4 blocks."""
    encoder = dict(embed_dim=384, depth=12, num_heads=6)
    decoder = dict(decoder_embed_dim=256, decoder_depth=4, decoder_num_heads=8)
    return _preset(kwargs, patch_size=16, **encoder, **decoder)


_OFFICIAL_DECODER = dict(decoder_embed_dim=512, decoder_depth=8, decoder_num_heads=16)


def mae_vit_base_patch16_dec512d8b(**kwargs: Any) -> MaskedAutoencoderViT:
    """The official ViT-B/16 with its decoder of 512 wide, 8 blocks."""
    return _preset(kwargs, patch_size=16, embed_dim=768, depth=12, num_heads=12, **_OFFICIAL_DECODER)


def mae_vit_large_patch16_dec512d8b(**kwargs: Any) -> MaskedAutoencoderViT:
    """The official ViT-L/16 with its decoder of 512 wide, 8 blocks."""
    return _preset(kwargs, patch_size=16, embed_dim=1024, depth=24, num_heads=16, **_OFFICIAL_DECODER)


def mae_vit_huge_patch14_dec512d8b(**kwargs: Any) -> MaskedAutoencoderViT:
    """The official ViT-H/14 with its decoder of 512 wide, 8 blocks."""
    return _preset(kwargs, patch_size=14, embed_dim=1280, depth=32, num_heads=16, **_OFFICIAL_DECODER)


mae_vit_base_patch16 = mae_vit_base_patch16_dec512d8b
mae_vit_large_patch16 = mae_vit_large_patch16_dec512d8b
mae_vit_huge_patch14 = mae_vit_huge_patch14_dec512d8b

# The names that --model accepts.
PRESETS: dict[str, Callable[..., MaskedAutoencoderViT]] = {
    "mae_vit_tiny_patch4": mae_vit_tiny_patch4,
    "mae_vit_tiny_patch16": mae_vit_tiny_patch16,
    "mae_vit_small_patch16": mae_vit_small_patch16,
    "mae_vit_base_patch16": mae_vit_base_patch16,
    "mae_vit_base_patch16_dec512d8b": mae_vit_base_patch16_dec512d8b,
    "mae_vit_large_patch16": mae_vit_large_patch16,
    "mae_vit_large_patch16_dec512d8b": mae_vit_large_patch16_dec512d8b,
    "mae_vit_huge_patch14": mae_vit_huge_patch14,
    "mae_vit_huge_patch14_dec512d8b": mae_vit_huge_patch14_dec512d8b,
}
