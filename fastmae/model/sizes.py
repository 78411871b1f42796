"""The sizes of a masked autoencoder as plain numbers, for what needs no tensors. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastmae.model.mae import MaskedAutoencoderViT

_OFFICIAL_DECODER = dict(decoder_embed_dim=512, decoder_depth=8, decoder_num_heads=16)
# The arguments of each preset, as MaskedAutoencoderViT takes them; an image has 224 pixels a side unless stated.
PRESET_SIZES: dict[str, dict[str, int]] = {
    "mae_vit_tiny_patch4": dict(
        img_size=28, patch_size=4, embed_dim=128, depth=4, num_heads=4, decoder_embed_dim=96, decoder_depth=2,
        decoder_num_heads=3,
    ),
    "mae_vit_tiny_patch16": dict(
        patch_size=16, embed_dim=192, depth=12, num_heads=3, decoder_embed_dim=192, decoder_depth=4,
        decoder_num_heads=6,
    ),
    "mae_vit_small_patch16": dict(
        patch_size=16, embed_dim=384, depth=12, num_heads=6, decoder_embed_dim=256, decoder_depth=4,
        decoder_num_heads=8,
    ),
    "mae_vit_base_patch16": dict(patch_size=16, embed_dim=768, depth=12, num_heads=12, **_OFFICIAL_DECODER),
    "mae_vit_large_patch16": dict(patch_size=16, embed_dim=1024, depth=24, num_heads=16, **_OFFICIAL_DECODER),
    "mae_vit_huge_patch14": dict(patch_size=14, embed_dim=1280, depth=32, num_heads=16, **_OFFICIAL_DECODER),
}  # fmt: skip


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


def _block_parameters(width: int, hidden: int) -> int:
    """Four projections of attention, two of the MLP, their biases, and two norms."""
    return 4 * width * (width + 1) + (width + 1) * hidden + (hidden + 1) * width + 4 * width


def preset_sizes(name: str, input_size: Sequence[int] = (), patch_size: Sequence[int] = ()) -> Sizes:
    """Returns the sizes of a preset for colour images.

    Args:
        name: of the preset.
        input_size, patch_size: (height, width) in pixels, or one number for both; by default the preset's own.

    Raises:
        ValueError: the image is no whole number of patches.
    """
    given = PRESET_SIZES[name]
    image, patch = input_size or [given.get("img_size", 224)], patch_size or [given["patch_size"]]
    (height, width), (ph, pw) = (image[0], image[-1]), (patch[0], patch[-1])
    if height < ph or width < pw or height % ph or width % pw:
        raise ValueError(f"an image of {height}×{width} pixels is not a multiple of a patch of {ph}×{pw}")
    return Sizes(
        num_patches=(height // ph) * (width // pw),
        patch_numbers=3 * ph * pw,
        width=given["embed_dim"],
        depth=given["depth"],
        heads=given["num_heads"],
        hidden=4 * given["embed_dim"],
        decoder_width=given["decoder_embed_dim"],
        decoder_depth=given["decoder_depth"],
        decoder_heads=given["decoder_num_heads"],
        decoder_hidden=4 * given["decoder_embed_dim"],
    )


def sizes_of(model: MaskedAutoencoderViT) -> Sizes:
    """Returns the sizes of a model."""
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
        registers=model.prefix_tokens - 1,
        crosses=hasattr(model, "decoder_map_weights"),
    )
