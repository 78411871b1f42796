"""A masked autoencoder of fully connected layers, for rows of numbers: tables, vectors, very small images.

The idea is the denoising autoencoder's (Vincent et al. 2008, "Extracting and composing robust features with denoising
autoencoders"): some features are hidden, and an encoder and a decoder learn to give them back. That the loss is of what
was hidden, and what the encoder is for, is He et al. (2021). Missing numbers are hidden always, and never a target.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from fastmae.facts import UINT8, PixelFacts
from fastmae.model.family import MaskedModel, Size
from fastmae.model.fill import normal_noise
from fastmae.model.flops import Product
from fastmae.model.intermediates import TokenPool
from fastmae.model.vit import Checkpointing, checkpointed
from fastmae.ops.bernoulli_masking import MAX_FEATURES, expected_masked
from fastmae.ops.gather_patches import range_of
from fastmae.ops.linear import Linear

WIDTHS = (256, 128, 64)


class Rows(NamedTuple):
    """The rows of a batch as the model computes with them, [N, D] each."""

    numbers: torch.Tensor
    """Standardised: without the mean and in deviations of their column; 0 where missing."""
    missing: torch.Tensor | None
    """bool; None where nothing can be missing."""


class Layers(nn.Sequential):
    """Linear layers with an exact GELU between them; the last is linear. Its keys are those of ``nn.Sequential``."""

    checkpointing: Checkpointing = "none"
    """Whether the backward pass computes what is between the layers again, as of a ``vit.Block``."""

    def __init__(self, widths: Sequence[int]) -> None:
        layers: list[nn.Module] = []
        for fan_in, fan_out in itertools.pairwise(widths):
            layers += [*([nn.GELU()] if layers else []), Linear(fan_in, fan_out)]
        super().__init__(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpointed(super().forward, x, keeps=self.checkpointing)


class MLPMAE(MaskedModel):
    """Predicts the hidden numbers of a row from those that are visible, through a narrow latent.

    A row is an image [H, W, C] as one vector of D = H·W·C features, in (row, column, channel) order: tables are images
    of one pixel with a channel for each column. Each feature is hidden with a chance of the mask ratio, independently
    of the others. The encoder reads 2·D numbers: the features, with something else in the place of those that are
    hidden, and which of them are hidden. Told which, it predicts better: on four tables of scikit-learn the error of
    hidden cells is 1.5 to 9 % lower (docs/mlp.md).

    Args:
        img_size: (height, width).
        in_chans: C.
        norm_pix_loss: must be False: there are no patches.
        widths: of the layers of the encoder; the last is the latent, and the decoder has them in reverse.
        fill: what stands in the place of a hidden number: ``mean`` of its column (0 once standardised), ``zero`` (the
            low end of its value range: the number 0 of a table, black of an image), or ``noise`` (a normal number of
            the mean and the deviation of its column, which follows from the visible numbers and from what is hidden).
        loss: ``mse``, the squared error of standardised numbers, or ``bce``, the binary cross-entropy of numbers that
            lie between the ends of their value range; those beyond count as the end.
        loss_on: the ``masked`` features, or ``all``; missing ones never count.
        mean, std: as of every masked model; of tables one for each column.
        pixels: what the numbers are.

    Raises:
        ValueError: sizes that do not fit each other.
    """

    family = "mlp"
    has_pictures = False
    masks_features = True

    def __init__(
        self,
        img_size: Size = (1, 1),
        in_chans: int = 64,
        norm_pix_loss: bool = False,
        *,
        widths: Sequence[int] = WIDTHS,
        fill: Literal["zero", "mean", "noise"] = "mean",
        loss: Literal["mse", "bce"] = "mse",
        loss_on: Literal["masked", "all"] = "masked",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        pixels: PixelFacts = UINT8,
    ) -> None:
        super().__init__()
        self._take_images(img_size, 1, in_chans, norm_pix_loss)
        D = self.img_size[0] * self.img_size[1] * in_chans
        if norm_pix_loss:
            raise ValueError("norm_pix_loss is for patches, and single numbers have no deviation")
        if not 2 <= D <= MAX_FEATURES:
            raise ValueError(f"a row must have 2 to {MAX_FEATURES} numbers, as one predicts another, and has {D}")
        if not widths or min(widths) < 1:
            raise ValueError(f"widths must be one or more numbers of at least 1, got {list(widths)}")
        self.grid_size, self.num_patches = (1, D), D
        self.widths, self.fill, self.loss, self.loss_on = tuple(widths), fill, loss, loss_on
        self.encoder = Layers([2 * D, *widths])
        self.decoder = Layers([*reversed(widths), D])
        self._take_pixels(mean, std, pixels)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def grid_of(self, size: tuple[int, int]) -> tuple[int, int]:
        """Returns (1, D): masks are of single numbers."""
        return 1, size[0] * size[1] * self.in_chans

    def num_visible(self, mask_ratio: float, num_patches: int | None = None) -> int:
        """Returns how many features are visible on average, at least one and not all."""
        D = self.num_patches if num_patches is None else num_patches
        return min(max(1, int(D * (1 - mask_ratio))), D - 1)

    @property
    def sizes(self) -> str:
        """The widths of its layers, for people."""
        return "-".join(map(str, [self.num_patches, *self.widths, *self.widths[-2::-1], self.num_patches]))

    @property
    def own_settings(self) -> dict[str, Any]:
        """The settings by which ``build_model`` makes one like it."""
        names = ("widths", "fill", "loss", "loss_on")
        return {"model": "mae_mlp", **{name: getattr(self, name) for name in names}}

    @property
    def feature_dim(self) -> int:
        return self.widths[-1]

    @property
    def last_layer(self) -> nn.Module:
        return self.decoder[-1]

    def products(
        self, mask_ratio: float, num_patches: int | None = None, predict_ratio: float | None = None
    ) -> tuple[Product, ...]:
        """Returns the product of each layer. What is hidden saves none."""
        named = [("encoder", self.encoder), ("decoder", self.decoder)]
        layers = [(part, layer) for part, layers in named for layer in layers if isinstance(layer, nn.Linear)]
        return tuple(Product(part, 1, layer.out_features, layer.in_features, 1) for part, layer in layers)

    # --- rows -------------------------------------------------------------------------------------------------------

    def rows(self, images: torch.Tensor) -> Rows:
        """Returns images of either form as standardised rows. NaN is missing, and so is ``pixels.nodata``."""
        pixels, mean, std, value_range, nodata = self._pixels(images)
        numbers = pixels if pixels.is_floating_point() else pixels.float()
        low, high = range_of(pixels.dtype, value_range, numbers.dtype)
        spread = high - low
        rows = ((numbers - (low + mean * spread)) * (1 / (std * spread))).flatten(1)
        if nodata is None and not pixels.is_floating_point():
            return Rows(rows, None)
        missing = numbers.isnan()
        if nodata is not None and not math.isnan(nodata):
            missing = missing | (pixels == nodata)
        missing = missing.flatten(1)
        return Rows(rows.masked_fill(missing, 0), missing)

    def encode(self, rows: Rows, hidden: torch.Tensor | None) -> torch.Tensor:
        """Returns the latents [N, widths[-1]] of rows of which the numbers ``hidden`` (bool [N, D]) are not seen."""
        numbers, missing = rows
        if hidden is None:
            hidden = torch.zeros_like(numbers, dtype=torch.bool) if missing is None else missing
        elif missing is not None:
            hidden = hidden | missing
        seen = torch.where(hidden, self._filling(numbers, hidden), numbers)
        return self.encoder(torch.cat([seen, hidden.to(seen.dtype)], dim=1).to(self._dtype))

    @property
    def _dtype(self) -> torch.dtype:
        """That of its weights."""
        return next(self.parameters()).dtype

    def _filling(self, numbers: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Returns what stands in the place of hidden numbers, standardised: [N, D], [D] or []."""
        if self.fill == "mean":
            return numbers.new_zeros(())
        if self.fill == "zero":
            return (-self.mean / self.std).to(numbers.dtype).repeat(numbers.shape[1] // self.in_chans)
        visible = numbers.masked_fill(hidden, 0)  # what is hidden must not be told by the noise
        return normal_noise((visible, hidden), numbers.shape[1]).to(numbers.dtype)

    # --- what is asked of a family ----------------------------------------------------------------------------------

    def loss_and_prediction(
        self,
        images: torch.Tensor,
        ids_shuffle: torch.Tensor,
        mask_ratio: float = 0.5,
        predict_ratio: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes the loss, a scalar, and the predictions [N, D, 1] of all features.

        The loss is the sum over the targets of the batch, divided by how many a batch of so many complete rows has on
        average. This divisor is the same on every rank and in every micro-batch, so that their mean is the loss of all
        rows together, and every known number of a table counts the same, whether its row has many or few. Of rows with
        missing numbers it is so much lower as there are fewer targets.

        Args:
            images: [N, H, W, C] or [N, C, H, W].
            ids_shuffle: bool [N, D], True where masked, of ``fastmae.ops.bernoulli_masking``.
            mask_ratio: the chance with which features were masked.
            predict_ratio: must be None.
        """
        if predict_ratio is not None:
            raise ValueError("all masked features are predicted, so that there is no predict_ratio")
        rows, masked = self.rows(images), ids_shuffle
        pred = self.decoder(self.encode(rows, masked))
        targets: torch.Tensor | None = masked
        if self.loss_on == "all":
            targets = None if rows.missing is None else ~rows.missing
        elif rows.missing is not None:
            targets = masked & ~rows.missing
        errors = self._errors(pred, rows.numbers)
        if targets is not None:
            errors = errors.masked_fill(~targets, 0)
        expected = self.num_patches if self.loss_on == "all" else expected_masked(self.num_patches, mask_ratio)
        return errors.sum() / (len(pred) * expected), pred[:, :, None]

    def _errors(self, pred: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Returns what the loss adds up, [N, D], of predictions and standardised numbers."""
        if self.loss == "mse":
            return (pred - numbers.to(pred.dtype)).square()
        shares = numbers * self._of_features(self.std) + self._of_features(self.mean)  # of the value range
        shares = shares.clamp(0, 1).to(pred.dtype)
        return F.binary_cross_entropy_with_logits(pred, shares, reduction="none")

    def _of_features(self, of_channels: torch.Tensor) -> torch.Tensor:
        """Returns numbers [C] of channels for each of the D features."""
        return of_channels.repeat(self.num_patches // self.in_chans)

    def training_loss(
        self,
        images: torch.Tensor,
        ids_shuffle: torch.Tensor | None = None,
        mask_ratio: float = 0.5,
        predict_ratio: float | None = None,
        *,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Computes the loss of ``loss_and_prediction``. ``mask`` is another name of ``ids_shuffle``, bool [N, D]; where
        neither is given, masks are drawn from torch's generator.
        """
        if ids_shuffle is not None and mask is not None:
            raise ValueError("ids_shuffle and mask say the same, so only one of them can be given")
        masked = mask if ids_shuffle is None else ids_shuffle
        if masked is None:
            masked = torch.rand(len(images), self.num_patches, device=images.device) < mask_ratio
        return self.loss_and_prediction(images, masked.flatten(1), mask_ratio, predict_ratio)[0]

    def predict(
        self, images: torch.Tensor, ids_shuffle: torch.Tensor | None = None, mask_ratio: float = 0.5
    ) -> torch.Tensor:
        """Returns predictions [N, D, 1] of all features, standardised.

        Args:
            images: [N, H, W, C] or [N, C, H, W].
            ids_shuffle: bool [N, D]: what is hidden beside what is missing; None hides nothing else.
            mask_ratio: has no meaning here.
        """
        pred = self.decoder(self.encode(self.rows(images), ids_shuffle))
        if self.loss == "bce":
            pred = (pred.sigmoid() - self._of_features(self.mean)) / self._of_features(self.std)
        return pred[:, :, None]

    def features(self, images: torch.Tensor, pool: TokenPool = "mean") -> torch.Tensor:
        """Returns the latents float32 [N, widths[-1]] of whole rows; only what is missing is hidden."""
        if pool not in self.pools:
            raise ValueError(f"a row has one latent, so that pool must be mean, got {pool}")
        return self.encode(self.rows(images), None).float()
