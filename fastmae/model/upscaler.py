"""An upscaler: a pretrained encoder with a head that makes an image two or four times as large.

The head adds to bicubic interpolation what it has learnt, and at first that is nothing. State-dict keys of the encoder
are the official ones; those of the head begin with ``head.``. Like the classifier it knows nothing of data or of the
optimiser.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastmae.facts import AS_STORED, ReadAs
from fastmae.model.classifier import Classifier, copy_encoder, encoder_arguments, encoder_products
from fastmae.model.flops import Product, of_convolution
from fastmae.model.mae import MaskedAutoencoderViT
from fastmae.model.pixels import DTYPES, normalised, range_ends
from fastmae.model.segmenter import LEVELS, levels, product_of, taps_of
from fastmae.ops.linear import TorchLinear

SLOPE = 0.1
"""Of the leaky ReLU, below 0."""
CHANNELS = 32
"""Channels of the head at the size of the image."""
HEAD_STD = 0.02


class ResidualHead(nn.Module):
    """What is added to the interpolated image, from its pixels and from the tokens of four blocks.

    Each level has a LayerNorm and a linear map of its own; of their sum a linear map gives each patch a square of
    ``CHANNELS`` channels, and a convolution of the image is added to them. Two convolutions follow, the second of which
    gives each pixel a square of ``scale`` × ``scale`` pixels (sub-pixel convolution, Shi et al. 2016). It begins with
    zeros. Between them is a leaky ReLU: with a plain one heads were seen to die at three times the default rate.

    Args:
        width: D of a token.
        patch_size: (height, width) of a patch in pixels.
        in_chans: channels C of an image.
        scale: how many times as large the image becomes.
    """

    def __init__(self, width: int, patch_size: tuple[int, int], in_chans: int, scale: int) -> None:
        super().__init__()
        inner = min(256, width)
        self.patch_size, self.scale = patch_size, scale
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-6) for _ in range(LEVELS))
        self.levels_in = nn.ModuleList(TorchLinear(width, inner) for _ in range(LEVELS))
        self.refine = TorchLinear(inner, CHANNELS * patch_size[0] * patch_size[1])
        self.pixels_in = nn.Conv2d(in_chans, CHANNELS, 3, padding=1)
        self.around = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.out = nn.Conv2d(CHANNELS, in_chans * scale**2, 3, padding=1)
        for linear in (*self.levels_in, self.refine):
            nn.init.trunc_normal_(linear.weight, std=HEAD_STD)
            nn.init.zeros_(linear.bias)
        for convolution in (self.pixels_in, self.around):
            nn.init.kaiming_normal_(convolution.weight, a=SLOPE)
        for convolution in (self.pixels_in, self.around, self.out):
            nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
        nn.init.zeros_(self.out.weight)

    def forward(self, images: torch.Tensor, levels: Sequence[torch.Tensor], grid: tuple[int, int]) -> torch.Tensor:
        """Maps normalised images [N, C, H, W] and tokens [N, L, D] of four blocks to [N, C, H · scale, W · scale]."""
        parts = [into(norm(x)) for norm, into, x in zip(self.norms, self.levels_in, levels, strict=True)]
        x = self.refine(_active(sum(parts[1:], parts[0])))  # [N, L, CHANNELS · ph · pw]
        x = x.unflatten(2, (CHANNELS, *self.patch_size)).unflatten(1, grid)
        x = x.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)  # [N, CHANNELS, H, W]
        x = self.around(_active(x + self.pixels_in(images.to(x.dtype))))
        return F.pixel_shuffle(self.out(_active(x)), self.scale)

    def products(self, num_patches: int) -> tuple[Product, ...]:
        """Returns the matrix products of an image's forward pass."""
        pixels = num_patches * self.patch_size[0] * self.patch_size[1]
        return (
            *(product_of("head: levels", one, num_patches) for one in self.levels_in),
            product_of("head: refining", self.refine, num_patches),
            of_convolution("head: pixels", self.pixels_in, pixels),
            of_convolution("head: neighbours", self.around, pixels),
            of_convolution("head: larger", self.out, pixels),
        )


class Upscaler(Classifier):
    """A vision transformer that makes images ``scale`` times as large: bicubic interpolation, and what its head adds.

    It has what the loop of fine-tuning asks of a ``Classifier``.

    Args:
        scale: how many times as large images become: 2 or 4.
        encoder: the arguments of ``Classifier`` for the encoder.

    Raises:
        ValueError: the sizes do not fit each other.
    """

    head: Any
    read_as: ReadAs = AS_STORED
    """How its images are read, beside the type and the range of their pixels."""

    def __init__(self, scale: int, **encoder: Any) -> None:
        super().__init__(num_classes=1, global_pool=False, **encoder)
        self.scale = scale
        self.taps = taps_of(len(self.blocks), LEVELS)
        self.head = ResidualHead(self.cls_token.shape[2], self.patch_size, self.in_chans, scale)

    def forward(self, images: torch.Tensor, depth_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Computes images normalised as the model's, float32 [N, C, H · scale, W · scale].

        Args:
            images: pixels [N, H, W, C] of the model's dtype, or float [N, C, H, W], normalised.
            depth_mask: [depth, 2, N] from ``stochastic_depth_mask``; None means that no branch is skipped.
        """
        return bicubic(normalised(self, images), self.scale) + self.added(images, depth_mask)

    def added(self, images: torch.Tensor, depth_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Computes what ``forward`` adds to the interpolated images; the arguments are the same."""
        added = self.head(normalised(self, images), self.levels(images, depth_mask), self.grid_size)
        return added.to(torch.promote_types(added.dtype, torch.float32))

    levels = levels

    def products(self) -> tuple[Product, ...]:
        """Returns the matrix products of an image's forward pass."""
        return (*encoder_products(self), *self.head.products(self.num_patches))

    def as_normalised(self, images: torch.Tensor) -> torch.Tensor:
        """Returns pixels [N, H, W, C] of the model's dtype, of any height and width, as float [N, C, H, W]."""
        low, high = (end.to(self.mean) for end in range_ends(self))
        return (((images.to(self.mean.dtype) - low) / (high - low) - self.mean) / self.std).permute(0, 3, 1, 2)

    def as_pixels(self, images: torch.Tensor) -> torch.Tensor:
        """Returns normalised images [N, C, H, W] of any size as pixels [N, H, W, C] of the model's dtype."""
        low, high = (end.to(images) for end in range_ends(self))
        values = (images.permute(0, 2, 3, 1) * self.std + self.mean) * (high - low) + low
        return rounded(values, DTYPES[self.pixels.dtype])


class UpscalingLoss(nn.Module):
    """The mean absolute error of normalised pixels as a module: torch's wrappers (DDP, compile) need a forward pass.

    The absolute error gives sharper images than the squared one, and fewer outliers in training (Lim et al. 2017).
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(
        self, images: torch.Tensor, targets: torch.Tensor | None = None, depth_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Computes the mean loss against ``targets``, pixels [N, H · scale, W · scale, C]; without targets, the
        enlarged images as such pixels."""
        larger = self.model(images, depth_mask)
        if targets is None:
            return self.model.as_pixels(larger)
        return F.l1_loss(larger, self.model.as_normalised(targets))


def _active(x: torch.Tensor) -> torch.Tensor:
    return F.leaky_relu(x, SLOPE)


def bicubic(images: torch.Tensor, scale: float) -> torch.Tensor:
    """Resizes images [N, C, H, W] by a bicubic filter of a = -0.5, antialiased where they become smaller: Pillow's."""
    return F.interpolate(
        images, scale_factor=scale, mode="bicubic", antialias=True, align_corners=False, recompute_scale_factor=False
    )


def resized_pixels(images: torch.Tensor, scale: float) -> torch.Tensor:
    """Returns pixels [N, H, W, C] resized by ``bicubic``, of the same dtype: what a file of them would hold."""
    resized = bicubic(images.float().permute(0, 3, 1, 2), scale).permute(0, 2, 3, 1).contiguous()
    return rounded(resized, images.dtype)


def rounded(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns values as pixels of ``dtype``: whole numbers are rounded, and stay within the range of the dtype."""
    return values if dtype.is_floating_point else values.round().clamp(0, torch.iinfo(dtype).max).to(dtype)


def upscaler_of(mae: MaskedAutoencoderViT, scale: int, *, img_size: tuple[int, int] | None = None) -> Upscaler:
    """Makes an upscaler with a copy of the encoder of ``mae``; its head is new.

    Positions for another ``img_size`` are interpolated.

    Raises:
        ValueError: ``img_size`` is not a multiple of the patch.
    """
    model = Upscaler(scale, **encoder_arguments(mae, img_size))
    copy_encoder(mae, model)
    return model
