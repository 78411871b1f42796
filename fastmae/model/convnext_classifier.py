"""A classifier made from a pretrained encoder of ConvNeXt V2: mean over positions, LayerNorm, a linear layer.

It has what the loop of fine-tuning asks of a ``Classifier``. State-dict keys are those of the encoder, ``fc_norm.*``
and ``head.*``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from torch import nn

from fastmae.facts import UINT8, PixelFacts
from fastmae.model.classifier import HEAD_STD
from fastmae.model.convnext import (
    CELL,
    EPS,
    ConvNeXtBlock,
    ConvNeXtMAE,
    Stage,
    encoder_layers,
    encoder_products,
    initialise,
    whole_features,
)
from fastmae.model.flops import Product
from fastmae.model.pixels import register_pixels, value_range_of
from fastmae.model.vit import patch_grid
from fastmae.ops.linear import TorchLinear

GROUP = 3
"""Blocks of the third stage that share a learning rate."""
DEEP = 27
"""From so many blocks of the third stage on, blocks share learning rates: those of Base, Large and Huge."""


class ConvNeXtClassifier(nn.Module):
    """A ConvNeXt V2 that computes the logits of classes.

    Args:
        img_size: (height, width) in pixels, multiples of 32.
        in_chans: channels C of an image.
        depths, dims: blocks and width of each of the four stages.
        num_classes: the number of logits.
        mean, std: C numbers each, in units of the range of ``pixels``, by which images are normalised.
        pixels: what the numbers of images are.

    Raises:
        ValueError: the sizes do not fit each other.
    """

    global_pool = True
    pool = "mean"
    other_sizes: tuple[tuple[int, int], ...] = ()
    mean: torch.Tensor
    std: torch.Tensor
    value_range = property(value_range_of)
    pixels: PixelFacts

    def __init__(
        self,
        img_size: tuple[int, int],
        in_chans: int,
        depths: Sequence[int],
        dims: Sequence[int],
        num_classes: int,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        pixels: PixelFacts = UINT8,
    ) -> None:
        super().__init__()
        self.img_size, self.patch_size, self.in_chans = img_size, (CELL, CELL), in_chans
        self.grid_size = patch_grid(img_size, self.patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.depths, self.dims = tuple(depths), tuple(dims)
        self.stem, self.stages = encoder_layers(in_chans, self.depths, self.dims)
        self.fc_norm = nn.LayerNorm(self.dims[-1], eps=EPS)
        self.head = TorchLinear(self.dims[-1], num_classes)
        initialise(self)
        nn.init.trunc_normal_(self.head.weight, std=HEAD_STD)
        register_pixels(self, in_chans, mean, std, pixels)

    @property
    def blocks(self) -> list[ConvNeXtBlock]:
        """The blocks of all stages in their order."""
        return [block for stage in self.stages for block in _blocks_of(stage)]

    def forward(self, images: torch.Tensor, depth_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Computes the logits [N, classes].

        Args:
            images: pixels [N, H, W, C] of the model's dtype, or float [N, C, H, W], normalised.
            depth_mask: [blocks, 2, N] from ``stochastic_depth_mask``, of whose two branches a block has the first; None
                means that no branch is skipped.
        """
        x = whole_features(self, images, None if depth_mask is None else depth_mask[:, 0])
        return self.head(self.fc_norm(x.mean(dim=(1, 2))))

    def products(self) -> tuple[Product, ...]:
        """Returns the matrix products of an image's forward pass."""
        head = Product("head", 1, self.head.out_features, self.dims[-1], 1)
        return (*encoder_products(self.num_patches, self.in_chans, self.depths, self.dims), head)

    def attention_shapes(self) -> dict[str, tuple[int, int]]:
        """Returns nothing, as it has no attention."""
        return {}

    def layer_of(self, name: str) -> int:
        """Returns the layer of a parameter, for learning rates that decay from the head (``last_layer``) down.

        As ConvNeXt publishes: for the models with 27 blocks in the third stage three blocks are a layer, a stage of
        three blocks is one, and the stem is layer 0. For smaller ones each block is a layer, with what comes before it.
        """
        inside = re.match(r"stages\.(\d)\.(?:blocks\.(\d+)|downsample)\.", name)
        if inside is None:
            is_stem = name.startswith("stem.")
            return (0 if self._is_deep else 1) if is_stem else self.last_layer
        stage, block = int(inside[1]), int(inside[2] or 0)
        if not self._is_deep:
            return sum(self.depths[:stage]) + block + 1
        return stage + 1 + block // GROUP if stage < 3 else self.last_layer - 1

    @property
    def last_layer(self) -> int:
        """The layer of the head, above all others."""
        return (3 + math.ceil(self.depths[2] / GROUP) if self._is_deep else sum(self.depths)) + 1

    @property
    def _is_deep(self) -> bool:
        return self.depths[2] >= DEEP


def _blocks_of(stage: nn.Module) -> list[ConvNeXtBlock]:
    assert isinstance(stage, Stage)
    return [block for block in stage.blocks if isinstance(block, ConvNeXtBlock)]


def convnext_classifier_of(
    mae: ConvNeXtMAE, num_classes: int, *, img_size: tuple[int, int] | None = None
) -> ConvNeXtClassifier:
    """Makes a classifier with a copy of the encoder of ``mae``; the head is new, and the norm unless it has one.

    Raises:
        ValueError: ``img_size`` is no multiple of 32.
    """
    model = ConvNeXtClassifier(
        img_size or mae.img_size,
        mae.in_chans,
        mae.depths,
        mae.dims,
        num_classes,
        mean=mae.mean.tolist(),
        std=mae.std.tolist(),
        pixels=mae.pixels,
    )
    own, weights = model.state_dict(), mae.state_dict()
    with torch.no_grad():
        for name in own.keys() & weights.keys():
            own[name].copy_(weights[name])
    return model
