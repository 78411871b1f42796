"""A fresh model from the name of its preset and its settings."""

from __future__ import annotations

from typing import Any

from fastmae.errors import UserError
from fastmae.model.mae import MaskedAutoencoderViT
from fastmae.model.presets import PRESETS


def build_model(settings: dict[str, Any]) -> MaskedAutoencoderViT:
    """A fresh model from a configuration's model, input_size, in_chans, norm_pix_loss, mean and std, and, where they
    are said, decoder_attention and decoder_depth.

    Raises:
        UserError: an unknown preset, or sizes that do not fit each other.
    """
    name = settings["model"]
    if name not in PRESETS:
        raise UserError(f"--model {name}: unknown; one of {', '.join(PRESETS)}")
    depth = settings.get("decoder_depth")
    try:
        return PRESETS[name](
            img_size=settings["input_size"],
            in_chans=settings["in_chans"],
            norm_pix_loss=settings["norm_pix_loss"],
            decoder_attention=settings.get("decoder_attention", "self"),
            mean=settings["mean"],
            std=settings["std"],
            **({} if depth is None else {"decoder_depth": depth}),
        )
    except ValueError as error:
        raise UserError(f"--model {name}: {error}; choose another --input_size or --model") from error
