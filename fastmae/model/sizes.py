"""The sizes of a masked autoencoder as plain numbers, for what needs no tensors. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastmae.config.shape import SHAPE, Shape, hidden_width
from fastmae.errors import SettingError

_OFFICIAL_DECODER = dict(decoder_embed_dim=512, decoder_depth=8, decoder_num_heads=16)
_SMALL_DECODER = dict(decoder_embed_dim=256, decoder_depth=4, decoder_num_heads=8)
# The arguments of each preset, as MaskedAutoencoderViT takes them; an image has 224 pixels a side unless stated.
PRESET_SIZES: dict[str, dict[str, Any]] = {
    "mae_vit_tiny_patch4": dict(
        img_size=28, patch_size=4, embed_dim=128, depth=4, num_heads=4, decoder_embed_dim=96, decoder_depth=2,
        decoder_num_heads=3,
    ),
    "mae_vit_tiny_patch16": dict(
        patch_size=16, embed_dim=192, depth=12, num_heads=3, decoder_embed_dim=192, decoder_depth=4,
        decoder_num_heads=6,
    ),
    "mae_vit_small_patch16": dict(patch_size=16, embed_dim=384, depth=12, num_heads=6, **_SMALL_DECODER),
    "mae_vit_small_patch8": dict(patch_size=8, embed_dim=384, depth=12, num_heads=6, **_SMALL_DECODER),
    "mae_vit_base_patch16": dict(patch_size=16, embed_dim=768, depth=12, num_heads=12, **_OFFICIAL_DECODER),
    "mae_vit_base_patch8": dict(patch_size=8, embed_dim=768, depth=12, num_heads=12, **_OFFICIAL_DECODER),
    "mae_vit_large_patch16": dict(patch_size=16, embed_dim=1024, depth=24, num_heads=16, **_OFFICIAL_DECODER),
    # SoViT-400m/14 (Alabdulmohsin et al. 2023, arXiv 2305.13035, table 1): an MLP is 4304 wide.
    "mae_vit_so400m_patch14": dict(
        patch_size=14, embed_dim=1152, depth=27, num_heads=16, mlp_ratio=4304 / 1152, decoder_mlp_ratio=4.0,
        **_OFFICIAL_DECODER,
    ),
    "mae_vit_huge_patch14": dict(patch_size=14, embed_dim=1280, depth=32, num_heads=16, **_OFFICIAL_DECODER),
    # ViT-g/14 (Zhai et al. 2022, arXiv 2106.04560, table 2): an MLP is 6144 wide.
    "mae_vit_giant_patch14": dict(
        patch_size=14, embed_dim=1408, depth=40, num_heads=16, mlp_ratio=48 / 11, decoder_mlp_ratio=4.0,
        **_OFFICIAL_DECODER,
    ),
}  # fmt: skip
# Blocks and widths of the four stages of ConvNeXt V2 (Woo et al. 2023, section 4.1, "model scaling").
CONVNEXT_SIZES: dict[str, dict[str, tuple[int, ...]]] = {
    "mae_convnextv2_atto": dict(depths=(2, 2, 6, 2), dims=(40, 80, 160, 320)),
    "mae_convnextv2_femto": dict(depths=(2, 2, 6, 2), dims=(48, 96, 192, 384)),
    "mae_convnextv2_pico": dict(depths=(2, 2, 6, 2), dims=(64, 128, 256, 512)),
    "mae_convnextv2_nano": dict(depths=(2, 2, 8, 2), dims=(80, 160, 320, 640)),
    "mae_convnextv2_tiny": dict(depths=(3, 3, 9, 3), dims=(96, 192, 384, 768)),
    "mae_convnextv2_base": dict(depths=(3, 3, 27, 3), dims=(128, 256, 512, 1024)),
    "mae_convnextv2_large": dict(depths=(3, 3, 27, 3), dims=(192, 384, 768, 1536)),
    "mae_convnextv2_huge": dict(depths=(3, 3, 27, 3), dims=(352, 704, 1408, 2816)),
}
HEAD_WIDTH = 64
"""Of most vision transformers: what is proposed where a width does not fit its heads."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the arithmetic of a model depends on."""

    num_patches: int
    """L, of an image."""
    patch_numbers: int
    """P: height · width · channels of a patch."""
    width: int
    depth: int
    heads: int
    hidden: int
    """The width inside the MLPs of the encoder, whose other sizes are the three before."""
    decoder_width: int
    decoder_depth: int
    decoder_heads: int
    decoder_hidden: int
    registers: int = 0
    """R, tokens of the encoder beside the class token."""
    crosses: bool = False
    """Whether the decoder reads the encoder's feature maps by cross-attention, as CrossMAE does."""

    @property
    def parameters(self) -> int:
        """Returns the number of trained weights if the decoder has self-attention; positions are constants."""
        D, E = self.width, self.decoder_width
        encoder = self.depth * _block_parameters(D, self.hidden) + 2 * D
        decoder = self.decoder_depth * _block_parameters(E, self.decoder_hidden) + 2 * E
        ends = (self.patch_numbers + 1) * D + (D + 1) * E + (E + 1) * self.patch_numbers
        return encoder + decoder + ends + (1 + self.registers) * D + E  # the class token, registers, the mask token

    def __str__(self) -> str:
        registers = f", {self.registers} registers" if self.registers else ""
        encoder = f"{self.depth} blocks of {self.width}, {self.heads} heads, MLPs of {self.hidden}{registers}"
        decoder = f"{self.decoder_depth} of {self.decoder_width}, {self.decoder_heads}, {self.decoder_hidden}"
        return f"encoder of {encoder}; decoder of {decoder}"

    @property
    def shape(self) -> dict[str, Any]:
        """Returns the sizes under the names of ``Shape``."""
        return dict(
            embed_dim=self.width,
            depth=self.depth,
            num_heads=self.heads,
            mlp_ratio=self.hidden / self.width,
            registers=self.registers,
            decoder_embed_dim=self.decoder_width,
            decoder_depth=self.decoder_depth,
            decoder_num_heads=self.decoder_heads,
            decoder_mlp_ratio=self.decoder_hidden / self.decoder_width,
        )


def _block_parameters(width: int, hidden: int) -> int:
    """Four projections of attention, two of the MLP, their biases, and two norms."""
    return 4 * width * (width + 1) + (width + 1) * hidden + (hidden + 1) * width + 4 * width


def full_shape(name: str, given: Shape) -> dict[str, Any]:
    """Returns all sizes of a preset, or what was given instead, under the names of ``Shape``.

    Raises:
        SettingError: sizes that do not fit each other, naming one that was given.
    """
    preset = PRESET_SIZES[name.removesuffix("_dec512d8b")]
    defaults = {"mlp_ratio": 4.0, "decoder_mlp_ratio": 4.0, "registers": 0, **preset}
    shape = {field: defaults[field] for field in SHAPE}
    shape |= {field: getattr(given, field) for field in shape if getattr(given, field) is not None}
    for prefix in ("", "decoder_"):
        width, heads = shape[f"{prefix}embed_dim"], shape[f"{prefix}num_heads"]
        if width % 4:
            problem = "must be a multiple of 4, as positions are sines and cosines of two axes"
            raise SettingError(f"{prefix}embed_dim", width, problem)
        if width % heads:
            flag = f"--{prefix}num_heads={_fitting_heads(width)}"
            whose = "" if getattr(given, f"{prefix}num_heads") else f" that {name} has"
            problem = f"must be a multiple of the heads, of which there are {heads}{whose}; {flag} would fit"
            raise SettingError(f"{prefix}embed_dim", width, problem)
        if hidden_width(width, shape[f"{prefix}mlp_ratio"]) < 1:
            raise SettingError(
                f"{prefix}mlp_ratio", shape[f"{prefix}mlp_ratio"], f"leaves nothing of a width of {width}"
            )
    return shape


def _fitting_heads(width: int) -> int:
    """Returns the number of heads of whole numbers that is the nearest to heads of the usual width."""
    return min((n for n in range(1, width + 1) if width % n == 0), key=lambda n: abs(math.log(width / n / HEAD_WIDTH)))


def beyond_preset(name: str, shape: Mapping[str, Any]) -> dict[str, Any]:
    """Returns sizes with None in place of those that a preset has, as settings leave them open."""
    own = full_shape(name, Shape())
    return {field: value if abs(value - own[field]) > 1e-9 else None for field, value in shape.items()}


def preset_sizes(
    name: str, input_size: Sequence[int] = (), patch_size: Sequence[int] = (), given: Shape | None = None
) -> Sizes:
    """Returns the sizes of a preset for colour images.

    Args:
        name: of the preset.
        input_size, patch_size: (height, width) in pixels, or one number for both; by default the preset's own.
        given: sizes that are not the preset's.

    Raises:
        ValueError: the image is no whole number of patches.
        SettingError: the given sizes do not fit each other.
    """
    preset, shape = PRESET_SIZES[name], full_shape(name, given or Shape())
    image, patch = input_size or [preset.get("img_size", 224)], patch_size or [preset["patch_size"]]
    (height, width), (ph, pw) = (image[0], image[-1]), (patch[0], patch[-1])
    if height < ph or width < pw or height % ph or width % pw:
        raise ValueError(f"an image of {height}×{width} pixels is not a multiple of a patch of {ph}×{pw}")
    return Sizes(
        num_patches=(height // ph) * (width // pw),
        patch_numbers=3 * ph * pw,
        width=shape["embed_dim"],
        depth=shape["depth"],
        heads=shape["num_heads"],
        hidden=hidden_width(shape["embed_dim"], shape["mlp_ratio"]),
        decoder_width=shape["decoder_embed_dim"],
        decoder_depth=shape["decoder_depth"],
        decoder_heads=shape["decoder_num_heads"],
        decoder_hidden=hidden_width(shape["decoder_embed_dim"], shape["decoder_mlp_ratio"]),
        registers=shape["registers"],
    )


def sizes_of(model: Any) -> Sizes:
    """Returns the sizes of a vision transformer, a ``MaskedAutoencoderViT``."""
    encoder: Any = model.blocks[0]
    decoder: Any = model.decoder_blocks[0]
    return Sizes(
        num_patches=model.num_patches,
        patch_numbers=model.decoder_pred.out_features,
        width=model.cls_token.shape[2],
        depth=len(model.blocks),
        heads=encoder.attn.num_heads,
        hidden=encoder.mlp.fc1.out_features,
        decoder_width=model.mask_token.shape[2],
        decoder_depth=len(model.decoder_blocks),
        decoder_heads=decoder.attn.num_heads,
        decoder_hidden=decoder.mlp.fc1.out_features,
        registers=0 if model.reg_token is None else model.reg_token.shape[1],
        crosses=hasattr(model, "decoder_map_weights"),
    )
