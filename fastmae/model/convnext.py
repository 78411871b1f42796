"""The fully convolutional masked autoencoder of ConvNeXt V2 (FCMAE; Woo et al. 2023, arXiv 2301.00808, section 3).

A mask covers cells of 32×32 pixels. Stage i of the encoder has s×s positions in a cell, s = 8, 4, 2, 1. All layers but
the depthwise convolution work on one position or inside one cell, so the encoder holds the visible cells alone,
[N, K, s, s, D], and only that convolution looks up where their neighbours lie; a masked one counts as zeros. That is
what a dense encoder computes whose maps are set to zero at masked positions before and after each depthwise
convolution (section 3.1, "sparse convolution"). Whole images are maps [N, H, W, D], and the same layers take both.

Names of the encoder's weights are timm's; ``fc1`` and ``fc2`` are matrices.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastmae.facts import UINT8, PixelFacts
from fastmae.model.family import MaskedModel
from fastmae.model.flops import Product
from fastmae.model.pixels import pixels_of
from fastmae.model.sizes import CONVNEXT_SIZES
from fastmae.model.vit import Checkpointing, checkpointed
from fastmae.ops.backends import autocast_dtype, refusing_second_gradient
from fastmae.ops.depthwise_visible import depthwise_visible, slots_of
from fastmae.ops.gather_patches import gather_patches
from fastmae.ops.grn import grn
from fastmae.ops.linear import Linear, linear
from fastmae.ops.masked_mse import masked_mse

CELL = 32
"""Side of a cell in pixels: what all downsampling together divides an image by."""
STEM, MERGE = 4, 2
"""Side in pixels of a position of the first stage, and positions on a side that become one between two stages."""
KERNEL = 7
EPS = 1e-6
STD = 0.02


class GRN(nn.Module):
    """Global response normalisation (section 3.2): channels compete by their norm over all positions of an image.

    Gx = ‖x‖₂ of each channel over the positions, Nx = Gx / (mean of Gx over the channels + 1e-6), and the output is
    γ·(x·Nx) + β + x. γ and β are zero at first.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps [N, ..., D] to the same shape and dtype; all axes between the first and the last are positions."""
        return grn(x, self.weight, self.bias)


class ConvNeXtMlp(nn.Module):
    """Two linear maps with an exact (erf) GELU and GRN between them, at every position."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, 4 * dim)
        self.grn = GRN(4 * dim)
        self.fc2 = Linear(4 * dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.grn(F.gelu(self.fc1(x))))


class ConvNeXtBlock(nn.Module):
    """A depthwise 7×7 convolution, LayerNorm and an MLP with GRN, added to the input.

    ``checkpointing`` has the same meaning as in ``Block``.
    """

    checkpointing: Checkpointing = "none"

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(dim, dim, KERNEL, padding=KERNEL // 2, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.mlp = ConvNeXtMlp(dim)

    def forward(
        self, x: torch.Tensor, slots: torch.Tensor | None = None, depth_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Computes the block's output, of the shape of its input.

        Args:
            x: a map [N, H, W, D]; or with ``slots`` the visible cells [N, K, s, s, D].
            slots: of ``slots_of``, where the visible cells lie.
            depth_mask: [N], what multiplies the branch of each image (stochastic depth).
        """
        return checkpointed(self._output, x, slots, depth_mask, keeps=self.checkpointing)

    def _output(self, x: torch.Tensor, slots: torch.Tensor | None, depth_mask: torch.Tensor | None) -> torch.Tensor:
        branch = self.mlp(self.norm(self._convolved(x, slots)))
        if depth_mask is not None:
            branch = branch * depth_mask.to(branch.dtype).view(-1, *[1] * (x.ndim - 1))
        return x + branch

    def _convolved(self, x: torch.Tensor, slots: torch.Tensor | None) -> torch.Tensor:
        if slots is None:
            return self.conv_dw(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return depthwise_visible(x, slots, self.conv_dw.weight, self.conv_dw.bias)


class Stage(nn.Module):
    """Blocks of one width; before them, in all stages but the first, 2×2 positions become one."""

    def __init__(self, read_dim: int | None, dim: int, depth: int) -> None:
        super().__init__()
        self.downsample: nn.Module = nn.Identity()
        if read_dim is not None:
            self.downsample = nn.Sequential(nn.LayerNorm(read_dim, eps=EPS), nn.Conv2d(read_dim, dim, MERGE, MERGE))
        self.blocks = nn.ModuleList(ConvNeXtBlock(dim) for _ in range(depth))

    def downsampled(self, x: torch.Tensor) -> torch.Tensor:
        """Maps [N, ..., H, W, D] to [N, ..., H/2, W/2, D'], or leaves it as it is in the first stage."""
        if not isinstance(self.downsample, nn.Sequential):
            return x
        norm, conv = self.downsample
        assert isinstance(conv, nn.Conv2d)
        return _strided(merged(norm(x), MERGE), conv)


def merged(x: torch.Tensor, side: int) -> torch.Tensor:
    """Joins side×side positions of [..., H, W, D] to one: [..., H/side, W/side, side·side·D], in that order."""
    *batch, H, W, D = x.shape
    pieces = x.reshape(-1, H // side, side, W // side, side, D).transpose(2, 3)
    return pieces.reshape(*batch, H // side, W // side, side * side * D)


def _strided(joined: torch.Tensor, conv: nn.Conv2d) -> torch.Tensor:
    """Computes a convolution whose stride is its kernel of positions that ``merged`` has joined."""
    return linear(joined, conv.weight.permute(0, 2, 3, 1).flatten(1), conv.bias)


class ConvNeXtMAE(MaskedModel):
    """A masked autoencoder with ConvNeXt V2 as encoder and one block of it as decoder.

    Args:
        img_size: (height, width) in pixels, or one number for both; multiples of 32.
        in_chans: channels C of an image.
        depths, dims: blocks and width of each of the four stages.
        decoder_embed_dim, decoder_depth: of the decoder's blocks, which work on one position per cell.
        norm_pix_loss: predict pixels normalised by their cell's own mean and variance.
        mean, std: C numbers each, in units of the range of ``pixels``, by which images are normalised.
        pixels: what the numbers of images are: their dtype, their range, and the value of those that are missing.

    While pretraining GRN of the encoder runs over the visible positions of each image, as the paper's masked
    convolution does. (The released sparse code runs over those of all images of a GPU's batch at once.)

    Raises:
        ValueError: sizes that do not fit each other.
    """

    family = "convnext"
    pools = ("mean", "tokens")
    prefix_tokens = 0

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        depths: Sequence[int] = (3, 3, 9, 3),
        dims: Sequence[int] = (96, 192, 384, 768),
        norm_pix_loss: bool = False,
        *,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 1,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        pixels: PixelFacts = UINT8,
    ) -> None:
        super().__init__()
        self._take_images(img_size, CELL, in_chans, norm_pix_loss)
        if decoder_depth < 1:
            raise ValueError("the decoder needs at least one block")
        self.depths, self.dims = tuple(depths), tuple(dims)
        self.stem, self.stages = encoder_layers(in_chans, self.depths, self.dims)
        self.fc_norm: nn.Module | None = None  # of a classifier's encoder: the norm after the mean of the positions
        self.decoder_embed = Linear(self.dims[-1], decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_blocks = nn.ModuleList(ConvNeXtBlock(decoder_embed_dim) for _ in range(decoder_depth))
        self.decoder_pred = Linear(decoder_embed_dim, CELL * CELL * in_chans)
        self._other_sizes: tuple[tuple[int, int], ...] = ()
        self._take_pixels(mean, std, pixels)
        initialise(self)
        nn.init.normal_(self.mask_token, std=STD)

    @property
    def feature_dim(self) -> int:
        """D, the width of the last stage."""
        return self.dims[-1]

    @property
    def last_layer(self) -> nn.Module:
        """The layer whose output is the prediction."""
        return self.decoder_pred

    @property
    def sizes(self) -> str:
        """Its sizes in words."""
        depths, dims = ("·".join(map(str, sizes)) for sizes in (self.depths, self.dims))
        decoder = f"{len(self.decoder_blocks)} of {self.decoder_pred.in_features}"
        return f"encoder of {depths} blocks of {dims}; decoder of {decoder}"

    @property
    def own_settings(self) -> dict[str, Any]:
        """The preset by which ``build_model`` makes one like it; empty if it has sizes of its own."""
        own = {"depths": self.depths, "dims": self.dims}
        return next(({"model": name} for name, known in CONVNEXT_SIZES.items() if known == own), {})

    @property
    def other_sizes(self) -> tuple[tuple[int, int], ...]:
        """The (height, width) beside ``img_size`` that ``allow_sizes`` let it take."""
        return self._other_sizes

    @property
    def has_fixed_positions(self) -> bool:
        """Whether images of other sizes can be taken: convolutions have no positions."""
        return True

    def allow_sizes(self, sizes: Iterable[tuple[int, int]]) -> None:
        """Lets the model take images of these (height, width) too, which are multiples of 32."""
        self._other_sizes = tuple(sorted({*self._other_sizes, *sizes} - {self.img_size}))

    # --- encoder ----------------------------------------------------------------------------------------------------

    def encode(self, images: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Runs the encoder on the cells ``ids`` [N, K] alone: [N, K, D], as the last stage has one position a cell."""
        pixels, mean, std, value_range, nodata = self._pixels(images)
        cells = gather_patches(pixels, ids, self.patch_size, mean, std, self._dtype(images), value_range, nodata)
        slots = slots_of(ids, self.grid_of(self._size_of(images)))
        x = embedded(self.stem, merged(cells.unflatten(2, (CELL, CELL, self.in_chans)), STEM))
        x = through_stages(self.stages, refusing_second_gradient(x), slots)
        return x.flatten(2)

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        """Runs the encoder on whole images, nothing masked: the positions [N, L, D] of the last stage, row by row."""
        return whole_features(self, images).flatten(1, 2)

    def pool_tokens(self, tokens: torch.Tensor, pool: str = "mean") -> torch.Tensor:
        """Turns the positions [N, L, D] of ``forward_features`` into features.

        Args:
            tokens: the positions.
            pool: ``mean``: their mean [N, D] and LayerNorm after it, as of the classifier of ConvNeXt V2: its own in
                the encoder of a classifier, otherwise one with the weights 1 and 0. ``tokens``: one after another.

        Raises:
            ValueError: another word.
        """
        if pool not in self.pools:
            raise ValueError(f"pool must be {' or '.join(self.pools)} for a ConvNeXt V2, got {pool!r}")
        if pool == "tokens":
            return tokens.flatten(1)
        mean = tokens.mean(dim=1)
        return F.layer_norm(mean, mean.shape[1:], eps=EPS) if self.fc_norm is None else self.fc_norm(mean)

    def take_pooled_norm(self) -> None:
        """Makes it the encoder of a classifier, in place: its norm after the mean of the positions has weights."""
        self.fc_norm = nn.LayerNorm(self.dims[-1], eps=EPS).to(self.device)

    def features(self, images: torch.Tensor, pool: str = "mean") -> torch.Tensor:
        """Returns the features of whole images, nothing masked; ``pool`` as in ``pool_tokens``."""
        return self.pool_tokens(self.forward_features(images), pool)

    def _dtype(self, images: torch.Tensor) -> torch.dtype:
        """Returns the dtype in which pixels are normalised for the stem."""
        return autocast_dtype(images.device) or self.mask_token.dtype

    # --- decoder and loss -------------------------------------------------------------------------------------------

    def decode(self, latent: torch.Tensor, ids: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Returns the decoder's features [N, L, E] of all cells, in the order of the image.

        Args:
            latent: [N, K, D], of ``encode``.
            ids: [N, K], the cells that it is of. All others get the mask token.
            grid: (rows, columns) of cells.
        """
        x = self.decoder_embed(latent)
        N, _, E = x.shape
        token = self.mask_token.to(x.dtype).expand(N, grid[0] * grid[1], E)
        x = token.scatter(1, ids.long()[:, :, None].expand(-1, -1, E), x)[:, :, None, None]
        every = torch.arange(grid[0] * grid[1], dtype=torch.int32, device=x.device).view(1, *grid).expand(N, *grid)
        for block in self.decoder_blocks:
            x = block(x, every)  # with gradients, the op is faster than torch's convolution of the map
        return x.flatten(1, 3)

    def loss_and_prediction(
        self,
        images: torch.Tensor,
        ids_shuffle: torch.Tensor,
        mask_ratio: float = 0.6,
        predict_ratio: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes the loss, a scalar, and the predictions [N, M, P] of the masked cells ``ids_shuffle[:, K:]``."""
        K = self.num_visible(mask_ratio, ids_shuffle.shape[1])
        self.num_predicted(mask_ratio, predict_ratio, ids_shuffle.shape[1])  # refuses a ratio
        ids, masked = ids_shuffle[:, :K], ids_shuffle[:, K:]
        decoded = self.decode(self.encode(images, ids), ids, self.grid_of(self._size_of(images)))
        chosen = decoded.gather(1, masked.long()[:, :, None].expand(-1, -1, decoded.shape[2]))
        pred = self.decoder_pred(chosen)
        pixels, mean, std, value_range, nodata = self._pixels(images)
        loss = masked_mse(pred, pixels, masked, self.patch_size, mean, std, self.norm_pix_loss, value_range, nodata)
        return loss, pred

    def predict(self, images: torch.Tensor, ids_shuffle: torch.Tensor, mask_ratio: float) -> torch.Tensor:
        """Returns the predictions [N, L, P] of all cells, in the order of the image."""
        ids = ids_shuffle[:, : self.num_visible(mask_ratio, ids_shuffle.shape[1])]
        return self.decoder_pred(self.decode(self.encode(images, ids), ids, self.grid_of(self._size_of(images))))

    def products(
        self, mask_ratio: float, num_patches: int | None = None, predict_ratio: float | None = None
    ) -> tuple[Product, ...]:
        """Returns the products of an image's forward pass that the loss depends on: those at visible positions.

        All 49 neighbours of a position count in its depthwise convolution, also those that are masked or outside.
        """
        L = self.num_patches if num_patches is None else num_patches
        K = self.num_visible(mask_ratio, L)
        E = self.decoder_pred.in_features
        return (
            *encoder_products(K, self.in_chans, self.depths, self.dims),
            Product("decoder embedding", K, E, self.dims[-1], 1),
            *_block_products("decoder", len(self.decoder_blocks), L, E),
            Product("prediction", L - K, CELL * CELL * self.in_chans, E, 1),
        )


# --- the encoder, of the autoencoder and of the classifier ------------------------------------------------------------


def encoder_layers(in_chans: int, depths: Sequence[int], dims: Sequence[int]) -> tuple[nn.Sequential, nn.ModuleList]:
    """Returns the stem and the stages.

    Raises:
        ValueError: there are not four of both depths and widths, all at least 1.
    """
    if not len(depths) == len(dims) == 4 or min(*depths, *dims) < 1:
        raise ValueError(f"a ConvNeXt V2 has four stages, got depths {list(depths)} and widths {list(dims)}")
    stem = nn.Sequential(nn.Conv2d(in_chans, dims[0], STEM, STEM), nn.LayerNorm(dims[0], eps=EPS))
    reads = (None, *dims[:-1])
    stages = nn.ModuleList(Stage(read, dim, depth) for read, dim, depth in zip(reads, dims, depths, strict=True))
    return stem, stages


def embedded(stem: nn.Module, joined: torch.Tensor) -> torch.Tensor:
    """Maps positions of 4×4 pixels that ``merged`` has joined, [..., 16·C], to [..., D]."""
    conv, norm = stem.children()
    assert isinstance(conv, nn.Conv2d)
    return norm(_strided(joined, conv))


def through_stages(
    stages: nn.ModuleList,
    x: torch.Tensor,
    slots: torch.Tensor | None = None,
    depth_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Runs the stages on a map, or with ``slots`` on cells; ``depth_mask`` [blocks, N] multiplies the branches."""
    number = 0
    for stage in stages:
        assert isinstance(stage, Stage)
        x = stage.downsampled(x)
        for block in stage.blocks:
            x = block(x, slots, None if depth_mask is None else depth_mask[number])
            number += 1
    return x


def whole_features(model: Any, images: torch.Tensor, depth_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Runs the encoder of a model with ``stem`` and ``stages`` on whole images: the last map [N, H/32, W/32, D]."""
    pixels, mean, std, value_range, nodata = pixels_of(model, images)
    rows, columns = pixels.shape[1] // STEM, pixels.shape[2] // STEM
    ids = torch.arange(rows * columns, device=images.device, dtype=torch.int32).expand(len(images), -1)
    dtype = autocast_dtype(images.device) or model.stem[0].weight.dtype
    joined = gather_patches(pixels, ids, (STEM, STEM), mean, std, dtype, value_range, nodata)
    x = embedded(model.stem, joined.unflatten(1, (rows, columns)))
    return through_stages(model.stages, refusing_second_gradient(x), None, depth_mask)


def initialise(model: nn.Module) -> None:
    """Draws the first weights: a normal distribution of deviation 0.02, cut at ±2; biases are 0.

    As ConvNeXt does (Liu et al. 2022, arXiv 2201.03545, released code) and the released sparse encoder of ConvNeXt V2.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.trunc_normal_(module.weight, std=STD)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def encoder_products(cells: int, in_chans: int, depths: Sequence[int], dims: Sequence[int]) -> tuple[Product, ...]:
    """Returns the products of the encoder's forward pass on a number of cells."""
    side = CELL // STEM
    found = [Product("patch embedding", cells * side * side, dims[0], STEM * STEM * in_chans, 1)]
    for stage, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
        if stage:
            side //= MERGE
            found.append(Product(f"downsampling {stage}", cells * side * side, dim, MERGE * MERGE * dims[stage - 1], 1))
        found += _block_products(f"stage {stage}", depth, cells * side * side, dim)
    return tuple(found)


def _block_products(part: str, count: int, positions: int, dim: int) -> tuple[Product, ...]:
    return (
        Product(f"{part} depthwise", positions, 1, KERNEL * KERNEL, count * dim, "convolution"),
        Product(f"{part} pwconv1", positions, 4 * dim, dim, count),
        Product(f"{part} pwconv2", positions, dim, 4 * dim, count),
    )
