"""The masked autoencoder (He et al. 2021) and its presets.

``forward`` speaks the published interface; ``training_loss`` is the same mathematics without the work that the loss
does not need, and is what the trainer runs. State-dict keys and shapes are the published ones. A decoder with
cross-attention is another model (docs/cross-attention.md), with the same encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from fastmae.model.vit import Block, CrossBlock, NormLayer, PatchEmbed, sincos_positions
from fastmae.ops.assemble_tokens import assemble_tokens
from fastmae.ops.gather_patches import gather_patches
from fastmae.ops.linear import Linear
from fastmae.ops.masked_mse import masked_mse

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Size = int | tuple[int, int]
DecoderAttention = Literal["self", "cross"]


def _autocast_dtype(device: str) -> torch.dtype | None:
    """What matrix products are computed in inside an autocast region; None outside."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _pair(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


class MaskedAutoencoderViT(nn.Module):
    """A masked autoencoder with a vision transformer as encoder and a lighter one as decoder.

    Args:
        img_size, patch_size: in pixels, square or (height, width); the image must be a multiple of the patch.
        in_chans: channels C of an image.
        embed_dim, depth, num_heads: the encoder.
        decoder_embed_dim, decoder_depth, decoder_num_heads: the decoder.
        mlp_ratio: hidden width of an MLP over the width of a token.
        norm_layer: makes a norm for a width.
        norm_pix_loss: predict pixels normalised by their patch's own mean and variance (paper, table 1d).
        decoder_attention: ``self``, as published; or ``cross`` (CrossMAE, Fu et al. 2024, arXiv 2401.14391): each patch
            is decoded by itself, and each block of the decoder reads a learnt sum of the encoder's feature maps.
        mean, std: C numbers each, in units of [0, 1], with which uint8 images are normalised. Without them: ImageNet's
            for 3 channels, 0.5 and 0.25 for any other number.

    With ``autocast_residual`` set, the tokens between blocks are kept in autocast's dtype: half the memory and traffic,
    and a rounding after every addition. Otherwise, as published, autocast leaves them in float32.

    Raises:
        ValueError: sizes that do not fit each other.
    """

    def __init__(
        self,
        img_size: Size = 224,
        patch_size: Size = 16,
        in_chans: int = 3,
        embed_dim: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4.0,
        norm_layer: NormLayer = nn.LayerNorm,
        norm_pix_loss: bool = False,
        *,
        decoder_attention: DecoderAttention = "self",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.img_size, self.patch_size = _pair(img_size), _pair(patch_size)
        (height, width), (ph, pw) = self.img_size, self.patch_size
        if min(ph, pw) < 1 or min(height, width) < 1 or height % ph or width % pw:
            raise ValueError(f"an image of {height}×{width} pixels is not a multiple of a patch of {ph}×{pw}")
        if decoder_depth < 1:
            raise ValueError("the decoder needs at least one block")
        if decoder_attention not in ("self", "cross"):
            raise ValueError(f"decoder_attention must be self or cross, got {decoder_attention}")
        self.grid_size = (height // ph, width // pw)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.head_dims = (embed_dim // num_heads, decoder_embed_dim // decoder_num_heads)
        self.in_chans = in_chans
        self.norm_pix_loss = norm_pix_loss
        self.decoder_attention = decoder_attention

        # Parameters are registered in the published order: a saved optimiser refers to them by number.
        self.patch_embed = PatchEmbed(self.patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(sincos_positions(embed_dim, self.grid_size)[None], requires_grad=False)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio, norm_layer) for _ in range(depth))
        self.norm = norm_layer(embed_dim)

        if decoder_attention == "self":
            self.decoder_embed = Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(
            sincos_positions(decoder_embed_dim, self.grid_size)[None], requires_grad=False
        )
        if decoder_attention == "self":
            self.decoder_blocks = nn.ModuleList(
                Block(decoder_embed_dim, decoder_num_heads, mlp_ratio, norm_layer) for _ in range(decoder_depth)
            )
        else:
            self.decoder_map_weights = nn.Parameter(torch.zeros(decoder_depth, depth + 1))
            self.decoder_blocks = nn.ModuleList(
                CrossBlock(decoder_embed_dim, embed_dim, decoder_num_heads, mlp_ratio, norm_layer)
                for _ in range(decoder_depth)
            )
        self.decoder_norm = norm_layer(decoder_embed_dim)
        self.decoder_pred = Linear(decoder_embed_dim, ph * pw * in_chans)

        # Not in the state dict, whose keys are the published ones.
        self._other_sizes: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        imagenet = in_chans == 3
        self._register_statistics("mean", mean, IMAGENET_MEAN if imagenet else (0.5,) * in_chans)
        self._register_statistics("std", std, IMAGENET_STD if imagenet else (0.25,) * in_chans)
        self.register_buffer("_zeros", torch.zeros(in_chans), persistent=False)
        self.register_buffer("_ones", torch.ones(in_chans), persistent=False)
        self._initialise()

    autocast_residual = False
    mean: torch.Tensor
    std: torch.Tensor
    _zeros: torch.Tensor
    _ones: torch.Tensor

    def _register_statistics(self, name: str, given: Sequence[float] | None, default: Sequence[float]) -> None:
        values = default if given is None else given
        if len(values) != self.in_chans:
            raise ValueError(f"{name} needs {self.in_chans} numbers, one a channel, got {len(values)}")
        if name == "std" and min(values) <= 0:
            raise ValueError(f"std must be positive, got {list(values)}")
        self.register_buffer(name, torch.tensor(list(values), dtype=torch.float32), persistent=False)

    def _initialise(self) -> None:
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.data.flatten(1))
        if self.patch_embed.proj.bias is not None:
            nn.init.zeros_(self.patch_embed.proj.bias)
        if self.decoder_attention == "cross":
            nn.init.xavier_uniform_(self.decoder_map_weights)

    # --- pixels -----------------------------------------------------------------------------------------------------

    def num_visible(self, mask_ratio: float, num_patches: int | None = None) -> int:
        """K, the patches that the encoder sees of an image of ``num_patches``, by default of ``img_size``.

        Raises:
            ValueError: no patch would be visible, or none masked.
        """
        L = self.num_patches if num_patches is None else num_patches
        K = int(L * (1 - mask_ratio))
        if not 1 <= K < L:
            raise ValueError(
                f"mask ratio {mask_ratio} leaves {K} of {L} patches visible; "
                "at least one must be visible and one masked"
            )
        return K

    def num_predicted(self, mask_ratio: float, predict_ratio: float | None, num_patches: int | None = None) -> int:
        """How many of the masked patches of an image the loss is of: int(L · ``predict_ratio``), all of them for None.

        Raises:
            ValueError: no patch would be, or more than are masked; or not all, and they are decoded together.
        """
        L = self.num_patches if num_patches is None else num_patches
        masked = L - self.num_visible(mask_ratio, L)
        if predict_ratio is None:
            return masked
        if self.decoder_attention == "self":
            raise ValueError("a decoder with self-attention predicts all masked patches, so it takes no predict_ratio")
        M = int(L * predict_ratio)
        if not 1 <= M <= masked:
            raise ValueError(
                f"predict ratio {predict_ratio} is {M} of {L} patches; at least one can be predicted, and at most the "
                f"{masked} that are masked"
            )
        return M

    def grid_of(self, size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of patches of an image of a size (height, width) in pixels."""
        return size[0] // self.patch_size[0], size[1] // self.patch_size[1]

    def allow_sizes(self, sizes: Iterable[tuple[int, int]]) -> None:
        """Lets ``training_loss`` and the encoder take images of these (height, width) too, multiples of the patch.

        Their positions are fixed and made from ``img_size``'s axes, so they are no weights: they are kept where the
        model is now, in plain tensors that no wrapper shards, broadcasts or saves.
        """
        device = self.mean.device
        for size in {*sizes} - {self.img_size}:
            grid, widths = self.grid_of(size), (self.pos_embed.shape[2], self.decoder_pos_embed.shape[2])
            encoder, decoder = (sincos_positions(width, grid, self.grid_size)[None].to(device) for width in widths)
            self._other_sizes[size] = encoder, decoder

    def _positions(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of the encoder and of the decoder, [1, 1+L, width] each, for images of an allowed size."""
        return self._other_sizes.get(self._size_of(images)) or (self.pos_embed, self.decoder_pos_embed)

    def _size_of(self, images: torch.Tensor) -> Any:
        """(height, width) of images of either form."""
        return tuple(images.shape[1:3] if images.dtype == torch.uint8 else images.shape[2:])

    def attention_shapes(self, mask_ratio: float) -> dict[str, tuple[int, int]]:
        """(keys S, width Dh of a head) of the encoder's attention and of the decoder's while training."""
        encoder, decoder = self.head_dims
        seen = self.num_visible(mask_ratio) + 1
        read = seen if self.decoder_attention == "cross" else self.num_patches + 1
        return {"encoder": (seen, encoder), "decoder": (read, decoder)}

    def _pixels(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Images of either form as (view [N, H, W, C], mean, std)."""
        uint8 = images.dtype == torch.uint8
        size = self._size_of(images) if self._size_of(images) in self._other_sizes else self.img_size
        shape = (*size, self.in_chans) if uint8 else (self.in_chans, *size)
        if images.ndim != 4 or images.shape[1:] != shape:
            form = "uint8 images [N, H, W, C]" if uint8 else "float images [N, C, H, W]"
            raise ValueError(f"{form} must have shape [N, {', '.join(map(str, shape))}], got {list(images.shape)}")
        if uint8:
            return images, self.mean, self.std
        return images.permute(0, 2, 3, 1), self._zeros, self._ones

    def patchify(self, imgs: torch.Tensor) -> torch.Tensor:
        """Images [N, C, H, W] to patches [N, L, P], P in (row, column, channel) order."""
        N, C, H, W = imgs.shape
        ph, pw = self.patch_size
        if H % ph or W % pw:
            raise ValueError(f"an image of {H}×{W} pixels is not a multiple of a patch of {ph}×{pw}")
        return imgs.reshape(N, C, H // ph, ph, W // pw, pw).permute(0, 2, 4, 3, 5, 1).reshape(N, -1, ph * pw * C)

    def unpatchify(self, x: torch.Tensor) -> torch.Tensor:
        """Patches [N, L, P] of an image of ``img_size`` back to [N, C, H, W]."""
        N = x.shape[0]
        (gh, gw), (ph, pw) = self.grid_size, self.patch_size
        images = x.reshape(N, gh, gw, ph, pw, self.in_chans).permute(0, 5, 1, 3, 2, 4)
        return images.reshape(N, self.in_chans, gh * ph, gw * pw)

    # --- encoder and decoder ----------------------------------------------------------------------------------------

    def _encode(self, images: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The encoder on the patches ``ids`` [N, K] alone: tokens [N, 1+K, D], class token first."""
        x = self._embed(images, ids)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def _latent(self, images: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """What the decoder reads of the patches ``ids`` [N, K]: the tokens of ``_encode``.

        With cross-attention each of its B blocks has tokens of its own, [B, N, 1+K, D]: a learnt sum of what goes into
        the encoder's first block and of what every block makes of it, the last one's normalised.
        """
        if self.decoder_attention == "self":
            return self._encode(images, ids)
        maps = [self._embed(images, ids)]
        for block in self.blocks:
            maps.append(block(maps[-1]))
        maps[-1] = self.norm(maps[-1])
        return (self.decoder_map_weights @ torch.stack(maps).flatten(1)).unflatten(1, maps[-1].shape)

    def _embed(self, images: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """What goes into the encoder's first block: tokens [N, 1+K, D] with their positions, class token first."""
        pixels, mean, std = self._pixels(images)
        dtype = _autocast_dtype(images.device.type) or self.patch_embed.proj.weight.dtype
        x = self.patch_embed(gather_patches(pixels, ids, self.patch_size, mean, std, dtype))
        pos_embed, _ = self._positions(images)
        x = x + pos_embed[0, 1:][ids.long()]
        cls_token = self.cls_token + pos_embed[:, :1]
        return self._residual(torch.cat([cls_token.expand(x.shape[0], -1, -1), x], dim=1))

    def _residual(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens as the blocks add to them. The dtype lasts: autocast's products have it too."""
        dtype = _autocast_dtype(x.device.type) if self.autocast_residual else None
        return x if dtype is None else x.to(dtype)

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        """The encoder on whole images, nothing masked: normalised tokens [N, 1+L, D], class token first."""
        ids = torch.arange(self._positions(images)[0].shape[1] - 1, device=images.device)
        return self._encode(images, ids.expand(images.shape[0], -1))

    def forward_encoder(
        self, imgs: torch.Tensor, mask_ratio: float = 0.75, *, ids_shuffle: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The encoder on the visible patches.

        Args:
            imgs: float [N, C, H, W], normalised, or uint8 [N, H, W, C].
            mask_ratio: K = int(L · (1 − mask_ratio)) patches are seen.
            ids_shuffle: int [N, L], a permutation a row, its first K entries visible. Without it: drawn from torch's
                generator of the device, as the published model does.

        Returns:
            latent [N, 1+K, D]; mask [N, L] with 1 at masked patches; ids_restore int64 [N, L], the inverse permutation.
            For a decoder with cross-attention, latent is [B, N, 1+K, D]: what each of its B blocks reads.
        """
        N, L = imgs.shape[0], self._positions(imgs)[0].shape[1] - 1
        if ids_shuffle is None:
            ids_shuffle = torch.rand(N, L, device=imgs.device).argsort(dim=1)
        elif ids_shuffle.shape != (N, L):
            raise ValueError(f"ids_shuffle must have shape [{N}, {L}], got {list(ids_shuffle.shape)}")
        K = self.num_visible(mask_ratio, L)
        ids_restore = ids_shuffle.argsort(dim=1)
        mask = (ids_restore >= K).to(self.cls_token.dtype)
        return self._latent(imgs, ids_shuffle[:, :K]), mask, ids_restore

    def forward_decoder(self, x: torch.Tensor, ids_restore: torch.Tensor) -> torch.Tensor:
        """The decoder on ``forward_encoder``'s latents: predictions [N, L, P] for every patch, in the image's order."""
        pred = self._decode(x, self.decoder_pos_embed, ids_restore.argsort(dim=1), start=1)
        return pred.gather(1, ids_restore[:, :, None].expand(-1, -1, pred.shape[2]))

    def _decode(
        self, latent: torch.Tensor, pos_embed: torch.Tensor, ids_shuffle: torch.Tensor, start: int
    ) -> torch.Tensor:
        """Predictions [N, L+1−start, P] of the shuffled tokens from ``start`` on (0 is the class token).

        With cross-attention ``ids_shuffle`` may end early, as no patch's prediction depends on another's.
        """
        if self.decoder_attention == "cross":
            x = self._residual(self.mask_token + pos_embed[0, 1:][ids_shuffle[:, start - 1 :].long()])
            for block, read in zip(self.decoder_blocks, latent, strict=True):
                x = block(x, read)
        else:
            x = self.decoder_embed(latent)
            x = self._residual(assemble_tokens(x, self.mask_token[0, 0], pos_embed[0], ids_shuffle))
            for block in self.decoder_blocks[:-1]:
                x = block(x)
            x = self.decoder_blocks[-1](x, start)
        return self.decoder_pred(self.decoder_norm(x))

    # --- losses -----------------------------------------------------------------------------------------------------

    def forward(
        self, imgs: torch.Tensor, mask_ratio: float = 0.75, *, ids_shuffle: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The published forward pass; arguments as in ``forward_encoder``.

        Returns:
            loss, a scalar: the mean over masked pixels; pred [N, L, P] for every patch; mask [N, L], 1 where masked.
        """
        latent, mask, ids_restore = self.forward_encoder(imgs, mask_ratio, ids_shuffle=ids_shuffle)
        pred = self.forward_decoder(latent, ids_restore)
        ids_masked = ids_restore.argsort(dim=1)[:, self.num_visible(mask_ratio) :]
        masked = pred.gather(1, ids_masked[:, :, None].expand(-1, -1, pred.shape[2]))
        pixels, mean, std = self._pixels(imgs)
        return masked_mse(masked, pixels, ids_masked, self.patch_size, mean, std, self.norm_pix_loss), pred, mask

    def training_loss(
        self,
        images: torch.Tensor,
        ids_shuffle: torch.Tensor,
        mask_ratio: float = 0.75,
        predict_ratio: float | None = None,
    ) -> torch.Tensor:
        """The loss of ``forward``, computing nothing that it does not need.

        Only visible patches are embedded, the decoder keeps the shuffled order, and its last block, norm and head run
        on the masked tokens alone. Exact: loss and gradients are those of ``forward`` to rounding.

        Args:
            images: uint8 [N, H, W, C], or float [N, C, H, W], normalised.
            ids_shuffle: int [N, L], from ``fastmae.ops.random_masking``.
            mask_ratio: as in ``forward_encoder``.
            predict_ratio: the loss is of the first int(L · ``predict_ratio``) masked patches alone, which random ids
                list in random order; needs a decoder with cross-attention. None: of all.
        """
        L = ids_shuffle.shape[1]
        K = self.num_visible(mask_ratio, L)
        ids_shuffle = ids_shuffle[:, : K + self.num_predicted(mask_ratio, predict_ratio, L)]
        latent = self._latent(images, ids_shuffle[:, :K])
        pred = self._decode(latent, self._positions(images)[1], ids_shuffle, start=K + 1)
        pixels, mean, std = self._pixels(images)
        return masked_mse(pred, pixels, ids_shuffle[:, K:], self.patch_size, mean, std, self.norm_pix_loss)


def _preset(overrides: dict[str, Any], **preset: Any) -> MaskedAutoencoderViT:
    return MaskedAutoencoderViT(**{"norm_layer": partial(nn.LayerNorm, eps=1e-6), **preset, **overrides})


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


_PUBLISHED_DECODER = dict(decoder_embed_dim=512, decoder_depth=8, decoder_num_heads=16)


def mae_vit_base_patch16_dec512d8b(**kwargs: Any) -> MaskedAutoencoderViT:
    """The published ViT-B/16 with its decoder of 512 wide, 8 blocks."""
    return _preset(kwargs, patch_size=16, embed_dim=768, depth=12, num_heads=12, **_PUBLISHED_DECODER)


def mae_vit_large_patch16_dec512d8b(**kwargs: Any) -> MaskedAutoencoderViT:
    """The published ViT-L/16 with its decoder of 512 wide, 8 blocks."""
    return _preset(kwargs, patch_size=16, embed_dim=1024, depth=24, num_heads=16, **_PUBLISHED_DECODER)


def mae_vit_huge_patch14_dec512d8b(**kwargs: Any) -> MaskedAutoencoderViT:
    """The published ViT-H/14 with its decoder of 512 wide, 8 blocks."""
    return _preset(kwargs, patch_size=14, embed_dim=1280, depth=32, num_heads=16, **_PUBLISHED_DECODER)


mae_vit_base_patch16 = mae_vit_base_patch16_dec512d8b
mae_vit_large_patch16 = mae_vit_large_patch16_dec512d8b
mae_vit_huge_patch14 = mae_vit_huge_patch14_dec512d8b

# What --model accepts.
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
