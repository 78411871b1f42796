"""The sizes of a vision transformer where they are not those of its preset."""

from __future__ import annotations

from dataclasses import dataclass, fields

from fastmae.config.values import need, need_at_least_one


@dataclass(frozen=True, kw_only=True)
class EncoderShape:
    """The sizes of an encoder. Which of them fit each other is known with the preset: ``model/sizes.py`` says so."""

    embed_dim: int | None = None
    """Width of the encoder's tokens, a multiple of 4 and of its heads. Default: the preset's."""
    depth: int | None = None
    """Number of blocks of the encoder. Default: as many as the preset has."""
    num_heads: int | None = None
    """Heads of the encoder's attention. Default: as many as the preset has."""
    mlp_ratio: float | None = None
    """Width inside the encoder's MLPs over the width of its tokens. Default: the preset's, mostly 4."""
    registers: int | None = None
    """Learnt tokens of the encoder beside the class token, 4 in their paper (Darcet et al. 2024, arXiv 2309.16588).
    Default: none."""


@dataclass(frozen=True, kw_only=True)
class Shape(EncoderShape):
    """The sizes of a masked autoencoder."""

    decoder_embed_dim: int | None = None
    """Width of the decoder's tokens, a multiple of 4 and of its heads. Default: the preset's."""
    decoder_depth: int | None = None
    """Number of blocks of the decoder. Default: as many as the preset has."""
    decoder_num_heads: int | None = None
    """Heads of the decoder's attention. Default: as many as the preset has."""
    decoder_mlp_ratio: float | None = None
    """Width inside the decoder's MLPs over the width of its tokens. Default: the preset's, which is 4."""


ENCODER_SHAPE, SHAPE = (tuple(field.name for field in fields(kind)) for kind in (EncoderShape, Shape))
"""The names of their settings."""


def check_shape(config: EncoderShape) -> None:
    """Refuses sizes that no model has.

    Raises:
        SettingError: naming the setting, its value and what it must be.
    """
    need_at_least_one(
        config, "embed_dim", "depth", "num_heads", "decoder_embed_dim", "decoder_depth", "decoder_num_heads"
    )  # fmt: skip
    for name in ("mlp_ratio", "decoder_mlp_ratio"):
        value = getattr(config, name, None)
        need(config, value is None or value > 0, name, "a positive number")
    need(config, config.registers is None or config.registers >= 0, "registers", "0 or more")


def hidden_width(width: int, mlp_ratio: float) -> int:
    """Returns the width inside an MLP: the product rounded down, but for what the ratio itself was rounded by."""
    return int(width * mlp_ratio + 1e-6)
