"""A fresh model from what decides its architecture."""

from __future__ import annotations

import difflib

from fastmae.config.images import read_as
from fastmae.config.model import ModelSpec
from fastmae.errors import SettingError
from fastmae.model.mae import MaskedAutoencoderViT
from fastmae.model.presets import PRESETS


def build_model(spec: ModelSpec) -> MaskedAutoencoderViT:
    """Returns a fresh model.

    Raises:
        SettingError: an unknown preset, or sizes that do not fit each other.
    """
    if spec.model not in PRESETS:
        near = difflib.get_close_matches(spec.model, PRESETS, 1)
        hint = f"; did you mean {near[0]}?" if near else ";"
        raise SettingError("model", spec.model, f"unknown{hint} one of {', '.join(PRESETS)}")
    try:
        model = PRESETS[spec.model](
            img_size=spec.input_size,
            in_chans=spec.in_chans,
            norm_pix_loss=spec.norm_pix_loss,
            decoder_attention=spec.decoder_attention,
            mean=spec.mean,
            std=spec.std,
            pixels=spec.pixels,
            **({} if spec.patch_size is None else {"patch_size": spec.patch_size}),
            **({} if spec.decoder_depth is None else {"decoder_depth": spec.decoder_depth}),
        )
    except ValueError as error:
        raise SettingError(
            "model", spec.model, f"{error}; choose another --input_size, --patch_size or --model"
        ) from error
    model.read_as = read_as(spec)
    return model
