"""A segmenter: a pretrained encoder with a head that gives every pixel a class.

State-dict keys of the encoder are the official ones; those of the head begin with ``head.``. Like the classifier it
knows nothing of data or of the optimiser.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from fastmae.facts import AS_STORED, ReadAs
from fastmae.model.classifier import Classifier, ClassifierBlock, copy_encoder, encoder_arguments, encoder_products
from fastmae.model.flops import Product, of_convolution
from fastmae.model.mae import MaskedAutoencoderViT
from fastmae.model.upernet import UperNetHead, upernet_taps
from fastmae.model.vit import added, as_sum, call_block
from fastmae.ops.backends import refusing_second_gradient
from fastmae.ops.linear import TorchLinear

IGNORED = 255
"""The number of pixels in label maps that count nowhere."""
HeadName = Literal["linear", "pyramid", "upernet"]
LEVELS = 4
"""How many blocks the heads of several levels look at."""
HEAD_STD = 0.02
AUXILIARY_WEIGHT = 0.4
"""Of the loss of an auxiliary head, in the recipe of MAE on ADE20K."""
SHARP = 32
"""Channels of a pyramid head where it is finest."""
LEAST = -9.0
"""Below this GELU is 0 to the rounding of float32 (it is -1e-18 here), and so is its derivative."""


class LinearHead(nn.Module):
    """One linear map from each token to the logits of its patch, which are interpolated to pixels.

    Args:
        width: D of a token.
        patch_size: not used by this head.
        num_classes: the number of logits of a pixel.
    """

    levels = 1
    takes_norm = True

    def __init__(self, width: int, patch_size: tuple[int, int], num_classes: int) -> None:
        super().__init__()
        self.classify = TorchLinear(width, num_classes)

    def forward(self, levels: Sequence[torch.Tensor], grid: tuple[int, int]) -> torch.Tensor:
        """Maps tokens [N, L, D] of the last block to logits [N, classes, rows, columns] of patches."""
        return _as_maps(self.classify(levels[-1]), grid)

    def products(self, num_patches: int) -> tuple[Product, ...]:
        """Returns the matrix products of an image's forward pass."""
        return (product_of("head", self.classify, num_patches),)


class PyramidHead(nn.Module):
    """A light decoder of several levels: it adds the tokens of four blocks, looks at neighbours, and is finer than
    patches.

    Each level has a LayerNorm and a linear map of its own; their sum goes through a convolution over patches. A linear
    map then gives each patch a square of ``SHARP`` channels (sub-pixel convolution, Shi et al. 2016), every second
    pixel in both directions, and a convolution over these gives the logits.

    Args:
        width: D of a token.
        patch_size: (height, width) of a patch in pixels.
        num_classes: the number of logits of a pixel.
    """

    levels = LEVELS
    takes_norm = True

    def __init__(self, width: int, patch_size: tuple[int, int], num_classes: int) -> None:
        super().__init__()
        inner = min(256, width)
        self.finer = (max(1, patch_size[0] // 2), max(1, patch_size[1] // 2))
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-6) for _ in range(LEVELS))
        self.levels_in = nn.ModuleList(TorchLinear(width, inner) for _ in range(LEVELS))
        self.around = nn.Conv2d(inner, inner, 3, padding=1)
        self.refine = TorchLinear(inner, SHARP * self.finer[0] * self.finer[1])
        self.classify = nn.Conv2d(SHARP, num_classes, 3, padding=1)

    def forward(self, levels: Sequence[torch.Tensor], grid: tuple[int, int]) -> torch.Tensor:
        """Maps tokens [N, L, D] of four blocks to logits [N, classes, rows · finer, columns · finer]."""
        parts = [into(norm(x)) for norm, into, x in zip(self.norms, self.levels_in, levels, strict=True)]
        x = _gelu(self.around(_gelu(_as_maps(sum(parts[1:], parts[0]), grid))))
        x = self.refine(x.permute(0, 2, 3, 1))  # [N, rows, columns, SHARP · fh · fw]
        x = x.unflatten(3, (SHARP, *self.finer)).permute(0, 3, 1, 4, 2, 5)  # [N, SHARP, rows, fh, columns, fw]
        return self.classify(_gelu(x.flatten(4, 5).flatten(2, 3)))

    def products(self, num_patches: int) -> tuple[Product, ...]:
        """Returns the matrix products of an image's forward pass."""
        finer = self.finer[0] * self.finer[1]
        return (
            *(product_of("head: levels", one, num_patches) for one in self.levels_in),
            of_convolution("head: neighbours", self.around, num_patches),
            product_of("head: refining", self.refine, num_patches),
            of_convolution("head: classes", self.classify, num_patches * finer),
        )


HEADS: dict[HeadName, Any] = {"linear": LinearHead, "pyramid": PyramidHead, "upernet": UperNetHead}


def levels(self: Any, images: torch.Tensor, depth_mask: torch.Tensor | None = None) -> list[torch.Tensor]:
    """Computes the patch tokens [N, L, D] after the blocks ``self.taps``; those of the last block are normalised.

    It is a method of the classifiers that have heads of several levels.
    """
    x = as_sum(refusing_second_gradient(self._embed_all(images)), biased=depth_mask is None)
    kept: list[torch.Tensor] = []
    for number, block in enumerate(self.blocks):
        x = call_block(block, x, None if depth_mask is None else depth_mask[number], kind=ClassifierBlock)
        if number in self.taps:
            tokens = added(x)
            tokens = self.norm(tokens) if number + 1 == len(self.blocks) else tokens
            kept += [tokens[:, self.prefix_tokens :]] * self.taps.count(number)
    return kept


class Segmenter(Classifier):
    """A vision transformer that computes the logits of the classes of every pixel.

    It has what the loop of fine-tuning asks of a ``Classifier``, from which it has the encoder. The tokens of the last
    block go through the encoder's ``norm`` (not before UPerNet), and those of blocks before it are taken as they are.

    Args:
        num_classes: the number of logits of a pixel.
        segmenter_head: which head it has: a key of ``HEADS``.
        encoder: the arguments of ``Classifier`` for the encoder.

    Raises:
        ValueError: the sizes do not fit each other.
    """

    head: Any
    read_as: ReadAs = AS_STORED
    """How its images are read, beside the type and the range of their pixels."""

    def __init__(self, num_classes: int, segmenter_head: HeadName, **encoder: Any) -> None:
        super().__init__(num_classes=num_classes, global_pool=False, **encoder)
        if segmenter_head == "upernet" and min(self.grid_size) < 2:
            raise ValueError("UPerNet needs at least 2 rows and 2 columns of patches")
        self.segmenter_head, self.num_classes = segmenter_head, num_classes
        head = HEADS[segmenter_head](self.cls_token.shape[2], self.patch_size, num_classes)
        depth = len(self.blocks)
        self.taps = upernet_taps(depth) if segmenter_head == "upernet" else taps_of(depth, head.levels)
        self.head = head
        _initialise(head)
        if not head.takes_norm:
            self.norm = nn.Identity()

    def forward(self, images: torch.Tensor, depth_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Computes the logits, float32 [N, classes, H, W] (float64 of a float64 model).

        Args:
            images: pixels [N, H, W, C] of the model's dtype, or float [N, C, H, W], normalised.
            depth_mask: [depth, 2, N] from ``stochastic_depth_mask``; None means that no branch is skipped.
        """
        return self._of_pixels(self.head(self.levels(images, depth_mask), self.grid_size))

    def all_logits(self, images: torch.Tensor, depth_mask: torch.Tensor | None = None) -> list[torch.Tensor]:
        """Computes the logits, and behind them those of the auxiliary head if there is one, each [N, classes, H, W]."""
        levels = self.levels(images, depth_mask)
        found = [self.head(levels, self.grid_size)]
        if hasattr(self.head, "auxiliary"):
            found.append(self.head.auxiliary(levels, self.grid_size))
        return [self._of_pixels(logits) for logits in found]

    def _of_pixels(self, logits: torch.Tensor) -> torch.Tensor:
        """Interpolates logits of a coarser grid to pixels, in float32 at least."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.interpolate(logits, size=self.img_size, mode="bilinear", align_corners=False)

    levels = levels

    def products(self) -> tuple[Product, ...]:
        """Returns the matrix products of an image's forward pass."""
        return (*encoder_products(self), *self.head.products(self.num_patches))


def taps_of(depth: int, levels: int) -> tuple[int, ...]:
    """Returns the blocks that a head of so many levels looks at, counted from 0: evenly spaced, the last among them.

    Of 12 blocks and 4 levels these are 2, 5, 8 and 11. An encoder of fewer blocks than levels gives some twice.
    """
    return tuple(max(0, (depth * level) // levels - 1) for level in range(1, levels + 1))


class SegmentationLoss(nn.Module):
    """Cross-entropy of every pixel as a module: torch's wrappers (DDP, compile) need a forward pass.

    The sum is divided by the number of all pixels, those that are ignored among them. So an image counts as much as it
    has labelled pixels, and the loss is the same however images are spread over ranks and micro-batches.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(
        self, images: torch.Tensor, maps: torch.Tensor | None = None, depth_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Computes the mean loss against ``maps``, integers [N, H, W] with ``IGNORED`` where nothing is known; without
        maps, the logits [N, classes, H, W]."""
        if maps is None:
            return self.model(images, depth_mask)
        losses = [
            F.cross_entropy(logits, maps.long(), ignore_index=IGNORED, reduction="sum") / maps.numel()
            for logits in self.model.all_logits(images, depth_mask)
        ]
        return losses[0] if len(losses) == 1 else losses[0] + AUXILIARY_WEIGHT * losses[1]


def segmenter_of(
    mae: MaskedAutoencoderViT, num_classes: int, head: HeadName = "pyramid", *, img_size: tuple[int, int] | None = None
) -> Segmenter:
    """Makes a segmenter with a copy of the encoder of ``mae``; its head is new.

    Positions for another ``img_size`` are interpolated.

    Raises:
        ValueError: ``img_size`` is not a multiple of the patch.
    """
    model = Segmenter(num_classes, head, **encoder_arguments(mae, img_size))
    copy_encoder(mae, model)
    return model


def _gelu(x: torch.Tensor) -> torch.Tensor:
    """GELU without the smallest numbers there are.

    The sums of a convolution reach -100, where the derivative of GELU is a subnormal number or just 0. Processors
    compute with subnormal numbers so slowly that the step of a trained model took twice as long as that of a new one.
    """
    return F.gelu(x.clamp_min(LEAST))


def _as_maps(tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Returns tokens [N, L, C] as maps [N, C, rows, columns]."""
    return tokens.mT.unflatten(2, grid)


def _initialise(head: nn.Module) -> None:
    for module in head.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            nn.init.trunc_normal_(module.weight, std=HEAD_STD)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def product_of(name: str, linear: Any, rows: int) -> Product:
    """Returns the matrix product of a linear map of so many rows."""
    return Product(name, rows, linear.out_features, linear.in_features, 1)
