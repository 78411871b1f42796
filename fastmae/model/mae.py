"""The masked autoencoder of He et al. (2021).

``forward`` has the official interface. ``training_loss`` computes the same loss without the work that the loss does not
need; the trainer runs it. State-dict keys and shapes are the official ones. CrossMAE (cross.py), a model with the same
encoder and another decoder, overrides the methods of the decoder.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import nn

from fastmae.config.family import Family
from fastmae.errors import UserError
from fastmae.facts import UINT8, PixelFacts
from fastmae.model.family import MaskedModel, Size, drawn
from fastmae.model.flops import Product, products_of
from fastmae.model.intermediates import POOLS, TokenPool, attention_maps, forward_intermediates, pool_tokens
from fastmae.model.pixels import nodata_of, without_missing
from fastmae.model.sizes import Sizes, sizes_of
from fastmae.model.vit import (
    Block,
    NormLayer,
    PatchEmbed,
    as_sum,
    call_block,
    normed,
    patch_grid,
    sincos_positions,
)
from fastmae.ops.assemble_tokens import assemble_tokens
from fastmae.ops.backends import autocast_dtype, refusing_second_gradient
from fastmae.ops.gather_patches import gather_patches
from fastmae.ops.linear import Linear
from fastmae.ops.masked_mse import masked_mse

OFFICIAL_STEPS = ("forward", "forward_encoder", "random_masking", "forward_decoder", "forward_loss", "patchify")
"""The methods of the official model that compute the loss, and that a subclass may override."""
DRAW_MASKS = ("forward", "forward_encoder", "random_masking")
"""Those that draw the masks, unless they take them as ``ids_shuffle``."""

DecoderAttention = Literal["self", "cross"]


class MaskedAutoencoderViT(MaskedModel):
    """A masked autoencoder with a vision transformer as encoder and a lighter one as decoder.

    Args:
        img_size, patch_size: in pixels, square or (height, width); the image must be a multiple of the patch.
        in_chans: channels C of an image.
        embed_dim, depth, num_heads: the encoder.
        decoder_embed_dim, decoder_depth, decoder_num_heads: the decoder.
        mlp_ratio: hidden width of an MLP over the width of a token.
        decoder_mlp_ratio: the same of the decoder; by default as ``mlp_ratio``.
        registers: how many learnt tokens the encoder has beside the class token (Darcet et al. 2024, arXiv 2309.16588).
            They follow it, have no positions, and the decoder does not see them.
        norm_layer: a function that makes a norm for a width.
        norm_pix_loss: predict pixels normalised by their patch's own mean and variance (paper, table 1d).
        mean, std: C numbers each, in units of the range of ``pixels``, by which images are normalised. The defaults are
            ImageNet's for 3 channels, 0.5 and 0.25 for any other number.
        pixels: what the numbers of images are: their dtype, their range, and the value of those that are missing.

    If ``autocast_residual`` is set, the tokens between blocks have autocast's dtype: half the memory and traffic, and a
    rounding after every addition. Otherwise autocast leaves them in float32, as in the official code.

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
        decoder_mlp_ratio: float | None = None,
        registers: int = 0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        pixels: PixelFacts = UINT8,
    ) -> None:
        super().__init__()
        decoder_mlp_ratio = mlp_ratio if decoder_mlp_ratio is None else decoder_mlp_ratio
        self._take_images(img_size, patch_size, in_chans, norm_pix_loss)
        if decoder_depth < 1:
            raise ValueError("the decoder needs at least one block")
        self.head_dims = (embed_dim // num_heads, decoder_embed_dim // decoder_num_heads)

        # Parameters are registered in the official order: a saved optimiser refers to them by number.
        self.patch_embed = PatchEmbed(self.patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.reg_token = nn.Parameter(torch.zeros(1, registers, embed_dim)) if registers else None
        self.pos_embed = nn.Parameter(sincos_positions(embed_dim, self.grid_size)[None], requires_grad=False)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio, norm_layer) for _ in range(depth))
        self.norm = norm_layer(embed_dim)
        self.fc_norm: nn.Module | None = None  # of a classifier's encoder: the norm after the mean of the patch tokens

        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(
            sincos_positions(decoder_embed_dim, self.grid_size)[None], requires_grad=False
        )
        self._add_decoder_blocks(decoder_embed_dim, decoder_depth, decoder_num_heads, decoder_mlp_ratio, norm_layer)
        self.decoder_norm = norm_layer(decoder_embed_dim)
        self.decoder_pred = Linear(decoder_embed_dim, self.patch_size[0] * self.patch_size[1] * in_chans)

        # These are not in the state dict, whose keys are the official ones.
        self._other_sizes: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self._take_pixels(mean, std, pixels)
        self._initialise()
        self.find_overrides()

    family: Family = "vit"
    pools = POOLS
    decoder_attention: DecoderAttention = "self"
    overridden: tuple[str, ...] = ()
    """Which of ``OFFICIAL_STEPS`` are not this class's own; ``training_loss`` then goes by the official steps."""

    def _add_decoder_blocks(
        self, width: int, depth: int, num_heads: int, mlp_ratio: float, norm_layer: NormLayer
    ) -> None:
        """Adds the modules between the encoder and the decoder's last norm."""
        self.decoder_embed = Linear(self.cls_token.shape[2], width)
        self.decoder_blocks = nn.ModuleList(Block(width, num_heads, mlp_ratio, norm_layer) for _ in range(depth))

    def _initialise(self) -> None:
        """Draws the first weights, in an order on which the weights for a seed depend."""
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
        if self.reg_token is not None:
            nn.init.normal_(self.reg_token, std=0.02)  # last, so that the others are as without registers

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in OFFICIAL_STEPS:
            self.find_overrides()

    def find_overrides(self) -> None:
        """Finds the official steps that a subclass, or somebody who set a method, has replaced."""
        self.overridden = tuple(
            name
            for name, own in _OWN_STEPS.items()
            if getattr(type(self), name) is not own or (name in self.__dict__ and name != "forward")
        )

    @property
    def prefix_tokens(self) -> int:
        """How many tokens come before those of the patches in the encoder: the class token and the registers."""
        return 1 if self.reg_token is None else 1 + self.reg_token.shape[1]

    # --- pixels -----------------------------------------------------------------------------------------------------

    def allow_sizes(self, sizes: Iterable[tuple[int, int]]) -> None:
        """Lets ``training_loss`` and the encoder take images of these (height, width) too, multiples of the patch.

        Their positions are fixed and made from the axes of ``img_size``, so they are not weights. They are plain
        tensors on the model's present device, which no wrapper shards, broadcasts or saves.
        """
        device = self.mean.device
        for size in {*sizes} - {self.img_size}:
            grid, widths = self.grid_of(size), (self.pos_embed.shape[2], self.decoder_pos_embed.shape[2])
            encoder, decoder = (sincos_positions(width, grid, self.grid_size)[None].to(device) for width in widths)
            self._other_sizes[size] = encoder, decoder

    @property
    def has_fixed_positions(self) -> bool:
        """Whether its positions are those that ``allow_sizes`` computes for other sizes, and no learnt ones."""
        for table in (self.pos_embed, self.decoder_pos_embed):
            fixed = sincos_positions(table.shape[2], self.grid_size)[None].to(table)
            if not torch.allclose(table, fixed, rtol=0, atol=1e-2):  # a file may have rounded them to bfloat16
                return False
        return True

    @property
    def has_other_sizes(self) -> bool:
        """Whether ``allow_sizes`` let it take images of other sizes."""
        return bool(self._other_sizes)

    @property
    def other_sizes(self) -> tuple[tuple[int, int], ...]:
        """The (height, width) beside ``img_size`` that ``allow_sizes`` let it take."""
        return tuple(self._other_sizes)

    def set_positions(self, size: tuple[int, int], pos_embed: torch.Tensor, decoder_pos_embed: torch.Tensor) -> None:
        """Makes this a model of images of another (height, width), with the positions [1, 1+L, width] of their patches.

        Raises:
            ValueError: the image is not a multiple of the patch.
        """
        self.img_size, self.grid_size = size, patch_grid(size, self.patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        for name, table in (("pos_embed", pos_embed), ("decoder_pos_embed", decoder_pos_embed)):
            old = getattr(self, name)
            setattr(self, name, nn.Parameter(table.to(old), requires_grad=old.requires_grad))
        self._other_sizes.clear()

    def _positions(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the positions of encoder and decoder, [1, 1+L, width] each, for images of an allowed size."""
        return self._other_sizes.get(self._size_of(images)) or (self.pos_embed, self.decoder_pos_embed)

    def attention_shapes(self, mask_ratio: float) -> dict[str, tuple[int, int]]:
        """Returns (number of keys S, width Dh of a head) of the encoder's and the decoder's attention in training."""
        encoder, decoder = self.head_dims
        tokens = self.num_visible(mask_ratio) + self.prefix_tokens
        return {"encoder": (tokens, encoder), "decoder": (self.num_patches + 1, decoder)}

    # --- encoder and decoder ----------------------------------------------------------------------------------------

    def _encode(self, images: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Runs the encoder on the patches ``ids`` [N, K] alone: tokens [N, 1+R+K, D], patches last."""
        return self._encoded(self._embed(images, ids))

    def _encoded(self, embedded: torch.Tensor) -> torch.Tensor:
        """Runs the blocks and the norm of the encoder on what ``_embed`` makes."""
        x = as_sum(refusing_second_gradient(embedded))
        for block in self.blocks:
            x = call_block(block, x, kind=Block)
        return normed(x, self.norm)

    def _latent(self, embedded: torch.Tensor) -> torch.Tensor:
        """Returns what the decoder reads, tokens [N, 1+K, D] without registers, for what ``_embed`` makes."""
        return self._without_registers(self._encoded(embedded))

    def _without_registers(self, tokens: torch.Tensor) -> torch.Tensor:
        """Drops the registers from tokens [N, 1+R+K, D]."""
        if self.reg_token is None:
            return tokens
        return torch.cat([tokens[:, :1], tokens[:, self.prefix_tokens :]], dim=1)

    def _embed(self, images: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Makes the input of the encoder's first block: tokens [N, 1+R+K, D], of which registers have no positions."""
        return self._with_prefix(self._patch_tokens(images, ids), self._positions(images)[0])

    def _patch_tokens(self, images: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Makes the tokens [N, K, D] of the patches ``ids`` [N, K], with their positions."""
        pixels, mean, std, value_range, nodata = self._pixels(images)
        dtype = autocast_dtype(images.device) or self.patch_embed.proj.weight.dtype
        x = self.patch_embed(gather_patches(pixels, ids, self.patch_size, mean, std, dtype, value_range, nodata))
        return x + self._positions(images)[0][0, 1:][ids.long()]

    def _with_prefix(self, x: torch.Tensor, pos_embed: torch.Tensor) -> torch.Tensor:
        """Puts the class token, with its position, and the registers before the tokens [N, K, D] of patches."""
        prefix = self.cls_token + pos_embed[:, :1]
        if self.reg_token is not None:
            prefix = torch.cat([prefix, self.reg_token], dim=1)
        return self._residual(torch.cat([prefix.expand(x.shape[0], -1, -1), x], dim=1))

    def _residual(self, x: torch.Tensor) -> torch.Tensor:
        """Casts tokens to the dtype that they have between blocks. Blocks keep it: autocast's products have it too."""
        dtype = autocast_dtype(x.device) if self.autocast_residual else None
        return x if dtype is None else x.to(dtype)

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        """Runs the encoder on whole images, nothing masked: normalised tokens [N, 1+R+L, D].

        The class token is first, then come R registers, if there are any; from ``prefix_tokens`` on are the patches.
        """
        return self._encoded(self._embed_all(images))

    forward_intermediates = forward_intermediates
    attention_maps = attention_maps
    pool_tokens = pool_tokens

    def _embed_all(self, images: torch.Tensor) -> torch.Tensor:
        """Makes the input of the encoder's first block for whole images: tokens [N, 1+R+L, D]."""
        return self._embed(images, self._all_ids(images))

    def _all_ids(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the numbers of all patches [N, L] of images, in order."""
        ids = torch.arange(self._positions(images)[0].shape[1] - 1, device=images.device)
        return ids.expand(images.shape[0], -1)

    def forward_encoder(
        self,
        imgs: torch.Tensor,
        mask_ratio: float = 0.75,
        *,
        ids_shuffle: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Runs the encoder on the visible patches.

        Args:
            imgs: pixels [N, H, W, C] of the model's dtype, or float [N, C, H, W], normalised.
            mask_ratio: K = int(L · (1 − mask_ratio)) patches are seen.
            ids_shuffle: int [N, L], a permutation per row, its first K entries visible. By default it is drawn from
                torch's generator of the device, as in the official model.
            mask: bool [N, L] or [N, rows, columns] of patches, True where masked, as many in each row of the batch;
                in place of the two before it. ``ids_from_mask`` says what a mask on a GPU costs.

        Returns:
            latent [N, 1+K, D], without registers (CrossMAE has [B, N, 1+K, D], one for each of the decoder's B blocks);
            mask [N, L] with 1 at masked patches; ids_restore int64 [N, L], the inverse permutation.
        """
        N, L = imgs.shape[0], self._positions(imgs)[0].shape[1] - 1
        ids_shuffle, mask_ratio = self._given_order(imgs, mask_ratio, ids_shuffle, mask)
        if ids_shuffle is not None and ids_shuffle.shape != (N, L):
            raise ValueError(f"ids_shuffle must have shape [{N}, {L}], got {list(ids_shuffle.shape)}")
        if "random_masking" in self.overridden:
            x, is_masked, ids_restore = self._call_random_masking(imgs, mask_ratio, ids_shuffle)
        else:
            ids_shuffle = drawn(N, L, imgs.device) if ids_shuffle is None else ids_shuffle
            K = self.num_visible(mask_ratio, L)
            ids_restore = ids_shuffle.argsort(dim=1)
            is_masked = (ids_restore >= K).to(self.cls_token.dtype)
            x = self._patch_tokens(imgs, ids_shuffle[:, :K])
        return self._latent(self._with_prefix(x, self._positions(imgs)[0])), is_masked, ids_restore

    def random_masking(
        self, x: torch.Tensor, mask_ratio: float, *, ids_shuffle: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keeps the tokens of visible patches, as the official step of this name does. A subclass can override it.

        Our own encoder never makes the tokens of masked patches, so it calls this only where it is overridden.

        Args:
            x: the tokens [N, L, D] of all patches, with their positions.
            mask_ratio: as in ``forward_encoder``.
            ids_shuffle: the order that training has drawn. An override that is to work with ``fastmae pretrain``, which
                draws masks so that a run can be repeated, takes this argument; with ``MAELoss`` and ``forward`` it need
                not.

        Returns:
            the visible tokens [N, K, D]; mask [N, L] with 1 at masked patches; ids_restore int64 [N, L].
        """
        N, L, D = x.shape
        ids_shuffle = drawn(N, L, x.device) if ids_shuffle is None else ids_shuffle.long()
        K = self.num_visible(mask_ratio, L)
        ids_restore = ids_shuffle.argsort(dim=1)
        kept = x.gather(1, ids_shuffle[:, :K, None].expand(-1, -1, D))
        return kept, (ids_restore >= K).to(x.dtype), ids_restore

    def _call_random_masking(
        self, images: torch.Tensor, mask_ratio: float, ids_shuffle: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Calls an overridden ``random_masking``, which gets the tokens of all patches.

        Raises:
            TypeError: masks are given, and it does not take any.
        """
        self._check_takes_order(ids_shuffle)
        given = {} if ids_shuffle is None else {"ids_shuffle": ids_shuffle}
        return self.random_masking(self._patch_tokens(images, self._all_ids(images)), mask_ratio, **given)

    @property
    def draws_masks(self) -> str | None:
        """The name of an overridden step that draws the masks itself and cannot be given any, such as official code."""
        for name in DRAW_MASKS:
            if name in self.overridden and "ids_shuffle" not in inspect.signature(getattr(self, name)).parameters:
                return name
        return None

    def _check_takes_order(self, ids_shuffle: torch.Tensor | None) -> None:
        """Refuses masks that an overridden step would not use.

        Raises:
            TypeError: there are masks, and a step draws its own.
        """
        if ids_shuffle is not None and (name := self.draws_masks) is not None:
            raise TypeError(
                f"{type(self).__name__}.{name} must take the argument ids_shuffle, the order of the patches of each "
                "image, where masks are given, as a run does; fastmae.MAELoss lets it draw its own"
            )

    def forward_decoder(self, x: torch.Tensor, ids_restore: torch.Tensor) -> torch.Tensor:
        """Runs the decoder on ``forward_encoder``'s latent: predictions [N, L, P] of every patch, in image order."""
        pred = self._decode(x, self.decoder_pos_embed, ids_restore.argsort(dim=1), start=1)
        return pred.gather(1, ids_restore[:, :, None].expand(-1, -1, pred.shape[2]))

    def _decode(
        self, latent: torch.Tensor, pos_embed: torch.Tensor, ids_shuffle: torch.Tensor, start: int
    ) -> torch.Tensor:
        """Returns predictions [N, L+1−start, P] of the shuffled tokens from ``start`` on (0 is the class token)."""
        x = self.decoder_embed(latent)
        if pos_embed.requires_grad:  # assemble_tokens takes positions for constants
            positions = torch.cat(
                [pos_embed[:, :1].expand(len(x), -1, -1), pos_embed[0, 1:][ids_shuffle.long()]], dim=1
            )
            x = assemble_tokens(x, self.mask_token[0, 0], torch.zeros_like(pos_embed[0]), ids_shuffle) + positions
        else:
            x = assemble_tokens(x, self.mask_token[0, 0], pos_embed[0], ids_shuffle)
        x = as_sum(self._residual(x))
        for block in self.decoder_blocks[:-1]:
            x = call_block(block, x, kind=Block)
        x = call_block(self.decoder_blocks[-1], x, start, kind=Block)
        return self.decoder_pred(normed(x, self.decoder_norm))

    # --- losses -----------------------------------------------------------------------------------------------------

    def forward(
        self,
        imgs: torch.Tensor,
        mask_ratio: float = 0.75,
        *,
        ids_shuffle: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Runs the official forward pass; the arguments are those of ``forward_encoder``.

        Returns:
            loss, a scalar: the mean over masked pixels; pred [N, L, P] for every patch; mask [N, L], 1 where masked.
        """
        ids_shuffle, mask_ratio = self._given_order(imgs, mask_ratio, ids_shuffle, mask)
        given_imgs, imgs = imgs, self._normalised(imgs) if self.overridden else imgs
        self._check_takes_order(ids_shuffle)
        given = {} if ids_shuffle is None else {"ids_shuffle": ids_shuffle}
        latent, is_masked, ids_restore = self.forward_encoder(imgs, mask_ratio, **given)
        pred = self.forward_decoder(latent, ids_restore)
        if self.overridden:
            return self.forward_loss(imgs, pred, without_missing(self, given_imgs, is_masked)), pred, is_masked
        ids_masked = ids_restore.argsort(dim=1)[:, self.num_visible(mask_ratio) :]
        masked = pred.gather(1, ids_masked[:, :, None].expand(-1, -1, pred.shape[2]))
        return self._masked_mse(masked, imgs, ids_masked), pred, is_masked

    def forward_loss(self, imgs: torch.Tensor, pred: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Computes the official loss: the mean over masked patches of the squared error of their pixels.

        ``forward`` and ``training_loss`` compute the same in another way, and call this only where a step of the
        official model is overridden. A subclass can override it.

        Args:
            imgs: pixels [N, H, W, C] of the model's dtype, or float [N, C, H, W], normalised.
            pred: [N, L, P], in image order.
            mask: [N, L], 1 at masked patches. Those of ``imgs`` that have a missing pixel do not count.
        """
        mask = without_missing(self, imgs, mask)
        target = self.patchify(self._normalised(imgs))
        if self.norm_pix_loss:
            variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
            target = (target - mean) / (variance + 1e-6).sqrt()
        loss = (pred - target).square().mean(dim=-1)
        return (loss * mask).sum() / mask.sum().clamp(min=1)

    def training_loss(
        self,
        images: torch.Tensor,
        ids_shuffle: torch.Tensor | None = None,
        mask_ratio: float = 0.75,
        predict_ratio: float | None = None,
        *,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Computes the loss of ``forward`` without the work that the loss does not need.

        Only visible patches are embedded, the decoder keeps the shuffled order, and its last block, norm and head run
        on the masked tokens alone. Loss and gradients are those of ``forward`` up to rounding. Where one of
        ``OFFICIAL_STEPS`` is overridden or the model has hooks, this calls the model itself, which takes longer.

        Args:
            images: pixels [N, H, W, C] of the model's dtype, or float [N, C, H, W], normalised.
            ids_shuffle: int [N, L], from ``fastmae.ops.random_masking``; by default drawn as in ``forward_encoder``.
            mask_ratio, mask: as in ``forward_encoder``.
            predict_ratio: for CrossMAE alone: the loss is that of the first int(L · ``predict_ratio``) masked patches,
                which random ids list in random order. None means all of them.

        This is a method and no forward pass: DistributedDataParallel and other wrappers need ``fastmae.MAELoss``.
        """
        if mask is not None and predict_ratio is not None:
            raise ValueError("predict_ratio takes the first masked patches, and a mask has no order; give ids_shuffle")
        ids_shuffle, mask_ratio = self._given_order(images, mask_ratio, ids_shuffle, mask)
        if self.overridden or self._forward_hooks or self._forward_pre_hooks:
            return self._official_loss(images, ids_shuffle, mask_ratio, predict_ratio)
        if ids_shuffle is None:
            ids_shuffle = drawn(images.shape[0], self._positions(images)[0].shape[1] - 1, images.device)
        return self.loss_and_prediction(images, ids_shuffle, mask_ratio, predict_ratio)[0]

    def loss_and_prediction(
        self,
        images: torch.Tensor,
        ids_shuffle: torch.Tensor,
        mask_ratio: float = 0.75,
        predict_ratio: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes the loss of ``training_loss``, and the predictions [N, M, P] that it is of, by the same short way.

        Steps of the official model that are overridden have no effect here.
        """
        L = ids_shuffle.shape[1]
        K = self.num_visible(mask_ratio, L)
        ids_shuffle = ids_shuffle[:, : K + self.num_predicted(mask_ratio, predict_ratio, L)]
        latent = self._latent(self._embed(images, ids_shuffle[:, :K]))
        pred = self._decode(latent, self._positions(images)[1], ids_shuffle, start=K + 1)
        return self._masked_mse(pred, images, ids_shuffle[:, K:]), pred

    def predict(self, images: torch.Tensor, ids_shuffle: torch.Tensor, mask_ratio: float) -> torch.Tensor:
        """Returns the predictions [N, L, P] of all patches, in the order of the image."""
        latent, _, ids_restore = self.forward_encoder(images, mask_ratio, ids_shuffle=ids_shuffle)
        return self.forward_decoder(latent, ids_restore)

    def features(self, images: torch.Tensor, pool: TokenPool = "mean") -> torch.Tensor:
        """Returns the tokens of whole images, pooled as ``pool_tokens`` says: [N, D], of "both" [N, 2·D]."""
        return self.pool_tokens(self.forward_features(images), pool)

    def products(
        self, mask_ratio: float, num_patches: int | None = None, predict_ratio: float | None = None
    ) -> tuple[Product, ...]:
        """Returns the matrix products of an image's forward pass that the loss depends on."""
        return products_of(sizes_of(self), mask_ratio, num_patches, predict_ratio)

    @property
    def last_layer(self) -> nn.Module:
        """The layer whose output is the prediction."""
        return self.decoder_pred

    @property
    def sizes(self) -> Sizes:
        """Its sizes."""
        return sizes_of(self)

    @property
    def feature_dim(self) -> int:
        """D, the width of the encoder's tokens."""
        return self.cls_token.shape[2]

    def _masked_mse(self, pred: torch.Tensor, images: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Computes the loss of the predictions [N, M, P] of the patches ``ids`` [N, M]."""
        pixels, mean, std, value_range, nodata = self._pixels(images)
        return masked_mse(pred, pixels, ids, self.patch_size, mean, std, self.norm_pix_loss, value_range, nodata)

    def _official_loss(
        self, images: torch.Tensor, ids_shuffle: torch.Tensor | None, mask_ratio: float, predict_ratio: float | None
    ) -> torch.Tensor:
        """Computes the training loss by a call of the model, so that overridden steps and hooks have their effect.

        Raises:
            TypeError: an overridden step does not take the masks that are given.
            ValueError: a share of the masked patches, images of another size, or missing pixels, which the official
                steps do not know.
        """
        names = ", ".join(self.overridden) or "the model with its hooks"
        self._check_takes_order(ids_shuffle)
        if predict_ratio is not None:
            raise ValueError(f"{names} predicts all masked patches, so that it takes no predict_ratio")
        if self._size_of(images) != self.img_size:
            raise ValueError(f"{names} takes images of {self.img_size} pixels only, got {self._size_of(images)}")
        if nodata_of(self.pixels) is None:
            images = self._normalised(images)
        elif "forward" in self.overridden:
            raise ValueError(f"{type(self).__name__}.forward takes normalised images, which cannot tell missing pixels")
        given = {} if ids_shuffle is None else {"ids_shuffle": ids_shuffle}
        return self(images, mask_ratio, **given)[0].reshape(())  # as a loss of one's own may have the shape [1]


def as_vit(model: MaskedModel, purpose: str) -> MaskedAutoencoderViT:
    """Returns a model that is a vision transformer.

    Args:
        purpose: what is for these alone, as the beginning of a sentence.

    Raises:
        UserError: it is of another family.
    """
    if not isinstance(model, MaskedAutoencoderViT):
        raise UserError(f"{purpose} is for vision transformers (mae_vit_*), and the model is {type(model).__name__}")
    return model


_OWN_STEPS = {name: getattr(MaskedAutoencoderViT, name) for name in OFFICIAL_STEPS}
