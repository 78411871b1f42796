"""ConvMAE: the plain convolutional masked autoencoder of the textbooks, for small images.

Convolution and pooling down to a vector of a few numbers, and up again to the image (Masci et al. 2011, "Stacked
convolutional auto-encoders"; masked input as in Vincent et al. 2008, "Extracting and composing robust features with
denoising autoencoders"). Everything that is predicted comes through that vector, so it is a reduction of the image to
``latent_dim`` numbers, and these are the features. Nothing is normalised over a batch: the loss of an image depends on
that image alone, so that any number of ranks and micro-steps trains the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from fastmae.config.family import FAMILY, PRESET_OF_FAMILY
from fastmae.facts import UINT8, PixelFacts
from fastmae.model.family import MaskedModel, Size, pair
from fastmae.model.fill import normal_noise
from fastmae.model.flops import Product
from fastmae.model.intermediates import TokenPool
from fastmae.model.pixels import without_missing
from fastmae.model.vit import Checkpointing, checkpointed
from fastmae.ops.gather_patches import gather_patches
from fastmae.ops.linear import Linear
from fastmae.ops.masked_mse import masked_mse

WIDTHS, LATENT_DIM = (32, 64, 128), 64

MaskUnit = Literal["pixel", "patch"]
Fill = Literal["zero", "mean", "noise"]


class Down(nn.Module):
    """A level of the encoder: convolution 3×3, ReLU, and the largest of every 2×2 positions; odd sides round up.

    ``checkpointing`` has the same meaning as in ``vit.Block``.
    """

    checkpointing: Checkpointing = "none"

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width_in, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps [N, D, h, w] to [N, D', ⌈h/2⌉, ⌈w/2⌉]."""
        return checkpointed(self._output, x, keeps=self.checkpointing)

    def _output(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(F.max_pool2d(self.conv(x), 2, ceil_mode=True))  # ReLU of the largest is the largest ReLU


class Up(nn.Module):
    """A level of the decoder: each position repeated 2×2 times, convolution 3×3, ReLU but in the last level.

    Four of the nine weights of an output meet the same repeated position, or two of them. So weights are added up
    first, and one transposed convolution of 4×4 does the rest with 4 products in place of 9.

    ``checkpointing`` has the same meaning as in ``vit.Block``.
    """

    def __init__(self, width_in: int, width: int, size: tuple[int, int], is_last: bool) -> None:
        super().__init__()
        self.size, self.is_last = size, is_last
        if not is_last:  # the last layer is no block of its own, as --adversarial takes gradients by its weight
            self.checkpointing: Checkpointing = "none"
        self.conv = nn.Conv2d(width_in, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps [N, D, ⌈h/2⌉, ⌈w/2⌉] to [N, D', h, w]; what an odd side has too much is cut off."""
        return checkpointed(self._output, x, keeps="none" if self.is_last else self.checkpointing)

    def _output(self, x: torch.Tensor) -> torch.Tensor:
        weight, (height, width) = self.conv.weight.flip(2, 3).transpose(0, 1), self.size
        pairs = F.pad(weight, (0, 1)) + F.pad(weight, (1, 0))
        weight = F.pad(pairs, (0, 0, 0, 1)) + F.pad(pairs, (0, 0, 1, 0))  # [D, D', 4, 4]
        x = F.conv_transpose2d(x, weight, self.conv.bias, stride=2, padding=1)[:, :, :height, :width]
        return x if self.is_last else F.relu(x)


class ConvMAE(MaskedModel):
    """A masked autoencoder of convolutions, whose decoder sees nothing of an image but ``latent_dim`` numbers.

    Args:
        img_size: in pixels, square or (height, width); any size, as pooling rounds up and upsampling knows the sizes.
        patch_size: the unit of masks with ``mask_unit`` "patch", in pixels; the image must be a multiple of it. None:
            4, 2 or 1, the largest that leaves at least 4 patches along a side.
        in_chans: channels C of an image.
        norm_pix_loss: predict pixels normalised by their patch's own mean and variance.
        widths: channels of the levels, from the image down; each level halves the image.
        latent_dim: numbers of the latent vector.
        mask_unit: what is masked at once, a "patch" or a "pixel" (with all its channels); the patch size is 1×1 then.
        fill: what stands in the place of masked pixels: "zero", the low end of the value range; "mean", that of the
            channel; "noise", normal with the mean and deviation of the channel, a function of the image and its mask.
        loss: "mse", the squared error of normalised pixels; or "bce", the binary cross-entropy of pixels as shares of
            the value range, those beyond its ends taken as the ends. Predictions are normalised pixels with both.
        loss_on: compute the loss on the "masked" pixels, or on "all" of them.
        mean, std, pixels: as in ``MaskedAutoencoderViT``.

    Raises:
        ValueError: sizes that do not fit each other, or settings that do not go together.
    """

    family = "conv"

    def __init__(
        self,
        img_size: Size = 32,
        patch_size: Size | None = None,
        in_chans: int = 3,
        norm_pix_loss: bool = False,
        *,
        widths: Sequence[int] = WIDTHS,
        latent_dim: int = LATENT_DIM,
        mask_unit: MaskUnit = "patch",
        fill: Fill = "mean",
        loss: Literal["mse", "bce"] = "mse",
        loss_on: Literal["masked", "all"] = "masked",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        pixels: PixelFacts = UINT8,
    ) -> None:
        super().__init__()
        cell = 1 if mask_unit == "pixel" else usual_patch(pair(img_size)) if patch_size is None else patch_size
        self._take_images(img_size, cell, in_chans, norm_pix_loss)
        self._take_pixels(mean, std, pixels)
        if norm_pix_loss and loss == "bce":
            raise ValueError("bce compares shares of the value range, which norm_pix_loss takes away; use mse")
        if norm_pix_loss and mask_unit == "pixel":
            raise ValueError("norm_pix_loss normalises patches; with mask_unit pixel there are none")
        self.widths, self.latent_dim = tuple(widths), latent_dim
        self.mask_unit, self.fill, self.loss, self.loss_on = mask_unit, fill, loss, loss_on
        sizes = level_sizes(self.img_size, len(self.widths))
        channels = (in_chans, *self.widths)
        self.bottom = (self.widths[-1], *sizes[-1])
        numbers = self.bottom[0] * self.bottom[1] * self.bottom[2]

        self.encoder = nn.Sequential(*(Down(*pair) for pair in pairwise(channels)))
        self.to_latent = Linear(numbers, latent_dim)
        self.from_latent = Linear(latent_dim, numbers)
        self.decoder = nn.Sequential(
            *(Up(channels[n + 1], channels[n], sizes[n], n == 0) for n in reversed(range(len(self.widths))))
        )
        self._initialise()

    def _initialise(self) -> None:
        """Draws the first weights: He et al. (2015) before a ReLU, Glorot and Bengio (2010) elsewhere; biases are 0."""
        before_relu = {*self.encoder.modules(), *self.decoder.modules(), self.from_latent} - {self.last_layer}
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                if module in before_relu:
                    nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                else:
                    nn.init.xavier_normal_(module.weight)
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    @property
    def feature_dim(self) -> int:
        """The numbers of the latent vector."""
        return self.latent_dim

    @property
    def last_layer(self) -> nn.Module:
        """The convolution whose output is the prediction."""
        last = self.decoder[-1]
        assert isinstance(last, Up)
        return last.conv

    def features(self, images: torch.Tensor, pool: TokenPool = "mean") -> torch.Tensor:
        """Returns the latent vectors of whole images, nothing masked: float32 [N, latent_dim].

        Args:
            images: pixels [N, H, W, C] of the model's dtype, or float [N, C, H, W], normalised.
            pool: "mean"; an image has one vector here, so that nothing is left to pool.
        """
        if pool not in self.pools:
            raise ValueError(f"an image has one vector here, so that there is no pool {pool}; use mean")
        self._pixels(images)  # refuses other sizes
        return self._latent(self._normalised(images)).float()

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        """Returns the images of latent vectors [N, latent_dim] of yours: normalised pixels, float [N, C, H, W]."""
        return self.unpatchify(self._prediction(self.patchify(self._decode(latent))))

    @property
    def own_settings(self) -> dict[str, Any]:
        """Its preset and the settings that make one like it."""
        own = {name: getattr(self, name) for name in FAMILY}
        patch = {"patch_size": None} if self.mask_unit == "pixel" else {}
        return {"model": PRESET_OF_FAMILY[self.family], **own, **patch}

    @property
    def sizes(self) -> str:
        """Its sizes in words."""
        height, width = self.patch_size
        unit = "pixels" if self.mask_unit == "pixel" else f"patches of {height}×{width}"
        levels = ", ".join(map(str, self.widths))
        loss = f"{self.loss} of {'all' if self.loss_on == 'all' else 'masked'} pixels"
        return f"levels of {levels} channels, latent of {self.latent_dim}; masked {unit} become {self.fill}; {loss}"

    def predict(self, images: torch.Tensor, ids_shuffle: torch.Tensor, mask_ratio: float) -> torch.Tensor:
        """Predicts all patches [N, L, P] of masked images, in image order and normalised as the loss compares them.

        Args:
            images: pixels [N, H, W, C] of the model's dtype, or float [N, C, H, W], normalised.
            ids_shuffle: int [N, L], a permutation per row, its first K entries visible.
            mask_ratio: K = int(L · (1 − mask_ratio)).
        """
        return self._prediction(self._output(images, ids_shuffle[:, : self.num_visible(mask_ratio)]))

    def loss_and_prediction(
        self,
        images: torch.Tensor,
        ids_shuffle: torch.Tensor,
        mask_ratio: float = 0.75,
        predict_ratio: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes the loss, a scalar, and the prediction [N, M, P] of the masked patches, in the order of the ids.

        Args:
            images, ids_shuffle, mask_ratio: as in ``predict``.
            predict_ratio: must be None, as all masked patches are predicted.
        """
        self.num_predicted(mask_ratio, predict_ratio)
        K = self.num_visible(mask_ratio)
        output = self._output(images, ids_shuffle[:, :K])
        masked = output.gather(1, ids_shuffle[:, K:, None].long().expand(-1, -1, output.shape[2]))
        if self.loss_on == "all":
            everywhere = torch.arange(self.num_patches, device=output.device).expand(len(output), -1)
            return self._loss(output, images, everywhere), self._prediction(masked)
        return self._loss(masked, images, ids_shuffle[:, K:]), self._prediction(masked)

    def products(
        self, mask_ratio: float, num_patches: int | None = None, predict_ratio: float | None = None
    ) -> tuple[Product, ...]:
        """Returns the products of an image's forward pass; masked pixels are computed as all others."""
        sizes, channels = level_sizes(self.img_size, len(self.widths)), (self.in_chans, *self.widths)
        areas, numbers = [h * w for h, w in sizes], self.bottom[0] * self.bottom[1] * self.bottom[2]
        levels = [(area, *pair) for area, pair in zip(areas, pairwise(channels), strict=False)]
        down = [Product("encoder convolution", area, n, 9 * k, 1, "convolution") for area, k, n in levels]
        up = [Product("decoder convolution", area, n, 4 * k, 1, "convolution") for area, n, k in reversed(levels)]
        vector = [
            Product("to latent", 1, self.latent_dim, numbers, 1),
            Product("from latent", 1, numbers, self.latent_dim, 1),
        ]
        return (*down, *vector, *up)

    # --- the parts ----------------------------------------------------------------------------------------------------

    def _output(self, images: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """Returns what the last layer says of all patches [N, L, P] if those of ``visible`` [N, K] are seen."""
        return self.patchify(self._decode(self._latent(self._masked(images, visible))))

    def _masked(self, images: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """Returns normalised images [N, C, H, W] with ``fill`` in the place of all patches but ``visible`` [N, K]."""
        self._pixels(images)  # refuses other sizes
        x = self._normalised(images)
        (rows, columns), (height, width) = self.grid_size, self.patch_size
        masked = torch.ones(len(x), self.num_patches, dtype=torch.bool, device=x.device)
        masked = masked.scatter(1, visible.long(), False).view(-1, 1, rows, 1, columns, 1)
        return torch.where(
            masked.expand(-1, 1, -1, height, -1, width).reshape(-1, 1, *self.img_size), self._filling(images, masked), x
        )

    def _filling(self, images: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        """Returns what stands at masked pixels, in normalised pixels: a tensor that [N, C, H, W] can be made of."""
        if self.fill == "mean":
            return torch.zeros((), device=images.device)
        if self.fill == "zero":
            return (-self.mean / self.std)[:, None, None]
        height, width = self.img_size
        noise = normal_noise((images, masked), height * width * self.in_chans)
        return noise.view(-1, height, width, self.in_chans).permute(0, 3, 1, 2)

    def _latent(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the latent vectors [N, latent_dim] of normalised images [N, C, H, W]."""
        x = x.to(self.to_latent.weight.dtype, memory_format=torch.channels_last)
        return self.to_latent(self.encoder(x).flatten(1))

    def _decode(self, latent: torch.Tensor) -> torch.Tensor:
        """Returns the output of the last layer [N, C, H, W] for latent vectors [N, latent_dim]."""
        x = F.relu(self.from_latent(latent)).view(-1, *self.bottom)
        return self.decoder(x.contiguous(memory_format=torch.channels_last))

    def _prediction(self, output: torch.Tensor) -> torch.Tensor:
        """Returns the normalised pixels [N, M, P] that the output of the last layer says."""
        if self.loss == "mse":
            return output
        shares = output.sigmoid().unflatten(2, (-1, self.in_chans))
        return ((shares - self.mean) / self.std).flatten(2)

    def _loss(self, output: torch.Tensor, images: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Computes the loss of the output [N, M, P] for the patches ``ids`` [N, M]; those with missing pixels do not
        count."""
        pixels, mean, std, value_range, nodata = self._pixels(images)
        if self.loss == "mse":
            return masked_mse(output, pixels, ids, self.patch_size, mean, std, self.norm_pix_loss, value_range, nodata)
        compute = torch.float64 if output.dtype == torch.float64 else torch.float32
        target = gather_patches(pixels, ids, self.patch_size, mean, std, compute, value_range, nodata)
        shares = (target.unflatten(2, (-1, self.in_chans)) * self.std + self.mean).clamp(0, 1).flatten(2)
        errors = F.binary_cross_entropy_with_logits(output.to(compute), shares, reduction="none").mean(dim=2)
        counts = without_missing(self, images, torch.ones_like(errors[:, :1]).expand(-1, self.num_patches))
        counts = counts.gather(1, ids.long())
        return (errors * counts).sum() / counts.sum().clamp(min=1)


def usual_patch(size: tuple[int, int]) -> tuple[int, int]:
    """Returns the (height, width) of patches for images of a (height, width), where none are given."""

    def side(length: int) -> int:
        return next((patch for patch in (4, 2) if length % patch == 0 and length >= 4 * patch), 1)

    return side(size[0]), side(size[1])


def level_sizes(size: tuple[int, int], levels: int) -> list[tuple[int, int]]:
    """Returns the (height, width) of an image and of what each level leaves of it: halves, rounded up.

    Raises:
        ValueError: a level would get a single position, which cannot be halved.
    """
    sizes = [size]
    for level in range(levels):
        height, width = sizes[-1]
        if height == width == 1:
            raise ValueError(f"an image of {size[0]}×{size[1]} pixels can be halved {level} times, not {levels}")
        sizes.append((-(-height // 2), -(-width // 2)))
    return sizes
