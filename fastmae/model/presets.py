"""The presets: the sizes of the official models, of smaller and of larger ones, with either decoder; ConvNeXt V2."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from fastmae.model.convnext import ConvNeXtMAE
from fastmae.model.cross import CrossMAE
from fastmae.model.mae import MaskedAutoencoderViT
from fastmae.model.sizes import CONVNEXT_SIZES, PRESET_SIZES

MODELS: dict[str, type[MaskedAutoencoderViT]] = {"self": MaskedAutoencoderViT, "cross": CrossMAE}


def _preset(name: str, overrides: dict[str, Any]) -> MaskedAutoencoderViT:
    """Makes a preset's model with the caller's ``overrides``; ``decoder_attention`` among them chooses the class."""
    arguments = {"norm_layer": partial(nn.LayerNorm, eps=1e-6), **PRESET_SIZES[name], **overrides}
    decoder_attention = arguments.pop("decoder_attention", "self")
    if decoder_attention not in MODELS:
        raise ValueError(f"decoder_attention must be {' or '.join(MODELS)}, got {decoder_attention}")
    return MODELS[decoder_attention](**arguments)


def mae_vit_tiny_patch4(**kwargs: Any) -> MaskedAutoencoderViT:
    """For images of 16 to 64 pixels: encoder 128 wide, 4 blocks; decoder 96 wide, 2 blocks."""
    return _preset("mae_vit_tiny_patch4", kwargs)


def mae_vit_tiny_patch16(**kwargs: Any) -> MaskedAutoencoderViT:
    """ViT-Ti/16: encoder 192 wide, 12 blocks; decoder 192 wide, 4 blocks."""
    return _preset("mae_vit_tiny_patch16", kwargs)


def mae_vit_small_patch16(**kwargs: Any) -> MaskedAutoencoderViT:
    """ViT-S/16: encoder 384 wide, 12 blocks; decoder 256 wide, 4 blocks."""
    return _preset("mae_vit_small_patch16", kwargs)


def mae_vit_small_patch8(**kwargs: Any) -> MaskedAutoencoderViT:
    """ViT-S/8: as ViT-S/16 on four times as many patches."""
    return _preset("mae_vit_small_patch8", kwargs)


def mae_vit_base_patch8(**kwargs: Any) -> MaskedAutoencoderViT:
    """ViT-B/8: as ViT-B/16 on four times as many patches."""
    return _preset("mae_vit_base_patch8", kwargs)


def mae_vit_so400m_patch14(**kwargs: Any) -> MaskedAutoencoderViT:
    """Shape-optimised ViT of 400 M/14: encoder 1152 wide, 27 blocks, MLPs 4304 wide; the official decoder."""
    return _preset("mae_vit_so400m_patch14", kwargs)


def mae_vit_giant_patch14(**kwargs: Any) -> MaskedAutoencoderViT:
    """ViT-g/14: encoder 1408 wide, 40 blocks, MLPs 6144 wide; the official decoder."""
    return _preset("mae_vit_giant_patch14", kwargs)


def mae_vit_base_patch16_dec512d8b(**kwargs: Any) -> MaskedAutoencoderViT:
    """The official ViT-B/16: its decoder is 512 wide and has 8 blocks."""
    return _preset("mae_vit_base_patch16", kwargs)


def mae_vit_large_patch16_dec512d8b(**kwargs: Any) -> MaskedAutoencoderViT:
    """The official ViT-L/16: its decoder is 512 wide and has 8 blocks."""
    return _preset("mae_vit_large_patch16", kwargs)


def mae_vit_huge_patch14_dec512d8b(**kwargs: Any) -> MaskedAutoencoderViT:
    """The official ViT-H/14: its decoder is 512 wide and has 8 blocks."""
    return _preset("mae_vit_huge_patch14", kwargs)


mae_vit_base_patch16 = mae_vit_base_patch16_dec512d8b
mae_vit_large_patch16 = mae_vit_large_patch16_dec512d8b
mae_vit_huge_patch14 = mae_vit_huge_patch14_dec512d8b

# The presets by name.
PRESETS: dict[str, Callable[..., MaskedAutoencoderViT]] = {
    "mae_vit_tiny_patch4": mae_vit_tiny_patch4,
    "mae_vit_tiny_patch16": mae_vit_tiny_patch16,
    "mae_vit_small_patch16": mae_vit_small_patch16,
    "mae_vit_small_patch8": mae_vit_small_patch8,
    "mae_vit_base_patch16": mae_vit_base_patch16,
    "mae_vit_base_patch16_dec512d8b": mae_vit_base_patch16_dec512d8b,
    "mae_vit_base_patch8": mae_vit_base_patch8,
    "mae_vit_large_patch16": mae_vit_large_patch16,
    "mae_vit_large_patch16_dec512d8b": mae_vit_large_patch16_dec512d8b,
    "mae_vit_so400m_patch14": mae_vit_so400m_patch14,
    "mae_vit_huge_patch14": mae_vit_huge_patch14,
    "mae_vit_huge_patch14_dec512d8b": mae_vit_huge_patch14_dec512d8b,
    "mae_vit_giant_patch14": mae_vit_giant_patch14,
}


def mae_convnextv2_atto(**kwargs: Any) -> ConvNeXtMAE:
    """ConvNeXt V2-Atto with the published decoder."""
    return ConvNeXtMAE(**{**CONVNEXT_SIZES["mae_convnextv2_atto"], **kwargs})


def mae_convnextv2_femto(**kwargs: Any) -> ConvNeXtMAE:
    """ConvNeXt V2-Femto with the published decoder."""
    return ConvNeXtMAE(**{**CONVNEXT_SIZES["mae_convnextv2_femto"], **kwargs})


def mae_convnextv2_pico(**kwargs: Any) -> ConvNeXtMAE:
    """ConvNeXt V2-Pico with the published decoder."""
    return ConvNeXtMAE(**{**CONVNEXT_SIZES["mae_convnextv2_pico"], **kwargs})


def mae_convnextv2_nano(**kwargs: Any) -> ConvNeXtMAE:
    """ConvNeXt V2-Nano with the published decoder."""
    return ConvNeXtMAE(**{**CONVNEXT_SIZES["mae_convnextv2_nano"], **kwargs})


def mae_convnextv2_tiny(**kwargs: Any) -> ConvNeXtMAE:
    """ConvNeXt V2-Tiny with the published decoder."""
    return ConvNeXtMAE(**{**CONVNEXT_SIZES["mae_convnextv2_tiny"], **kwargs})


def mae_convnextv2_base(**kwargs: Any) -> ConvNeXtMAE:
    """ConvNeXt V2-Base with the published decoder."""
    return ConvNeXtMAE(**{**CONVNEXT_SIZES["mae_convnextv2_base"], **kwargs})


def mae_convnextv2_large(**kwargs: Any) -> ConvNeXtMAE:
    """ConvNeXt V2-Large with the published decoder."""
    return ConvNeXtMAE(**{**CONVNEXT_SIZES["mae_convnextv2_large"], **kwargs})


def mae_convnextv2_huge(**kwargs: Any) -> ConvNeXtMAE:
    """ConvNeXt V2-Huge with the published decoder."""
    return ConvNeXtMAE(**{**CONVNEXT_SIZES["mae_convnextv2_huge"], **kwargs})


# Those of ConvNeXt V2 by name.
CONVNEXT_PRESETS: dict[str, Callable[..., ConvNeXtMAE]] = {
    "mae_convnextv2_atto": mae_convnextv2_atto,
    "mae_convnextv2_femto": mae_convnextv2_femto,
    "mae_convnextv2_pico": mae_convnextv2_pico,
    "mae_convnextv2_nano": mae_convnextv2_nano,
    "mae_convnextv2_tiny": mae_convnextv2_tiny,
    "mae_convnextv2_base": mae_convnextv2_base,
    "mae_convnextv2_large": mae_convnextv2_large,
    "mae_convnextv2_huge": mae_convnextv2_huge,
}
