"""UPerNet (Xiao et al. 2018, arXiv 1807.10221) on four blocks of a vision transformer, as published for MAE on ADE20K.

The maps of four blocks are brought to strides of ¼, ½, 1 and 2 patches (a "simple" pyramid, as in BEiT). The coarsest
goes through pyramid pooling (Zhao et al. 2017); its result is added downwards to the finer ones, and all of them
together give the logits at the finest. An auxiliary head, whose loss has a weight of 0.4, looks at the third map alone.
Names of weights are those of `transformers`, so that files move without a table. The recipe drops a tenth of the
channels before the classifier while it trains; that is left out here, so that a run is a function of its seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.nn.functional import all_reduce

from fastmae.model.flops import Product, of_convolution

CHANNELS = 512
AUXILIARY_CHANNELS = 256
AUXILIARY_LEVEL = 2
POOLS = (1, 2, 3, 6)
"""Sides of the grids to which pyramid pooling averages the coarsest map."""


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm whose mean and variance are those of the batches of all ranks together, forward and backward.

    torch's SyncBatchNorm does so on GPUs alone. With one rank it is torch's BatchNorm.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalises maps [N, C, H, W]. Statistics that are not finite are not kept: the step with them is skipped."""
        if not self.training:
            return super().forward(x)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        mean, variance, share = self.running_mean.clone(), self.running_var.clone(), self.momentum or 0.1
        if not dist.is_initialized() or dist.get_world_size() == 1:
            x = F.batch_norm(x, mean, variance, self.weight, self.bias, True, share, self.eps)
        else:
            x = self._normalised_by_all(x, mean, variance, share)
        with torch.no_grad():
            is_fine = mean.isfinite().all() & variance.isfinite().all()
            self.num_batches_tracked += is_fine
            for kept, new in ((self.running_mean, mean), (self.running_var, variance)):
                kept.copy_(torch.where(is_fine, new, kept))
        return x

    def _normalised_by_all(
        self, x: torch.Tensor, mean_so_far: torch.Tensor, variance_so_far: torch.Tensor, share: float
    ) -> torch.Tensor:
        """Normalises by the statistics of all ranks, which are taken into the two running ones in place."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        count = wide.numel() // wide.shape[1] * dist.get_world_size()  # ranks have batches of one size
        mean = all_reduce(wide.sum(dim=(0, 2, 3))) / count
        centred = wide - mean[:, None, None]
        variance = all_reduce(centred.square().sum(dim=(0, 2, 3))) / count
        with torch.no_grad():
            mean_so_far.lerp_(mean.to(mean_so_far.dtype), share)
            variance_so_far.lerp_((variance * (count / (count - 1))).to(variance_so_far.dtype), share)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


class ConvolutionBlock(nn.Module):
    """A convolution without bias, BatchNorm and ReLU."""

    def __init__(self, channels_in: int, channels: int, size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels, size, padding=size // 2, bias=False)
        self.batch_norm = BatchNorm(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps [N, channels_in, H, W] to [N, channels, H, W]."""
        return F.relu(self.batch_norm(self.conv(x)))


class Neck(nn.Module):
    """Brings the maps [N, D, rows, columns] of four blocks to 4, 2, 1 and ½ times as many rows and columns."""

    def __init__(self, width: int) -> None:
        super().__init__()

        def doubled() -> nn.ConvTranspose2d:
            return nn.ConvTranspose2d(width, width, 2, stride=2)

        self.fpn1 = nn.Sequential(doubled(), BatchNorm(width), nn.GELU(), doubled())
        self.fpn2 = nn.Sequential(doubled())

    def forward(self, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Returns the four maps, the finest first."""
        return [self.fpn1(maps[0]), self.fpn2(maps[1]), maps[2], F.max_pool2d(maps[3], 2, ceil_mode=False)]


class AuxiliaryHead(nn.Module):
    """One convolution and a classifier, on one map."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.convs: Any = nn.Sequential(ConvolutionBlock(width, AUXILIARY_CHANNELS, 3))
        self.classifier = nn.Conv2d(AUXILIARY_CHANNELS, num_classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps [N, D, rows, columns] to logits [N, classes, rows, columns]."""
        return self.classifier(self.convs(x))


class UperNetHead(nn.Module):
    """UPerNet with its neck and its auxiliary head.

    Args:
        width: D of a token.
        patch_size: not used by this head.
        num_classes: the number of logits of a pixel.
    """

    levels = 4
    takes_norm = False
    """The tokens of the last block are taken before the encoder's norm, as published."""

    def __init__(self, width: int, patch_size: tuple[int, int], num_classes: int) -> None:
        super().__init__()
        self.fpn = Neck(width)
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(side), ConvolutionBlock(width, CHANNELS, 1)) for side in POOLS
        )
        self.bottleneck = ConvolutionBlock(width + len(POOLS) * CHANNELS, CHANNELS, 3)
        self.lateral_convs = nn.ModuleList(ConvolutionBlock(width, CHANNELS, 1) for _ in range(3))
        self.fpn_convs = nn.ModuleList(ConvolutionBlock(CHANNELS, CHANNELS, 3) for _ in range(3))
        self.fpn_bottleneck = ConvolutionBlock(4 * CHANNELS, CHANNELS, 3)
        self.classifier = nn.Conv2d(CHANNELS, num_classes, 1)
        self.auxiliary_head = AuxiliaryHead(width, num_classes)

    def forward(self, levels: Sequence[torch.Tensor], grid: tuple[int, int]) -> torch.Tensor:
        """Maps tokens [N, L, D] of four blocks to logits [N, classes, 4 · rows, 4 · columns]."""
        *finer, coarsest = self.fpn([tokens.mT.unflatten(2, grid) for tokens in levels])
        pooled = [_resized(pool(coarsest), coarsest) for pool in self.psp_modules]
        maps = [lateral(x) for lateral, x in zip(self.lateral_convs, finer, strict=True)]
        maps.append(self.bottleneck(torch.cat([coarsest, *pooled], dim=1)))
        for level in (2, 1, 0):
            maps[level] = maps[level] + _resized(maps[level + 1], maps[level])
        smoothed = [convolve(x) for convolve, x in zip(self.fpn_convs, maps, strict=False)]
        smoothed.append(maps[3])
        together = torch.cat([smoothed[0], *(_resized(x, smoothed[0]) for x in smoothed[1:])], dim=1)
        return self.classifier(self.fpn_bottleneck(together))

    def auxiliary(self, levels: Sequence[torch.Tensor], grid: tuple[int, int]) -> torch.Tensor:
        """Returns the logits [N, classes, rows, columns] of the auxiliary head, which is for training alone."""
        return self.auxiliary_head(levels[AUXILIARY_LEVEL].mT.unflatten(2, grid))

    def products(self, num_patches: int) -> tuple[Product, ...]:
        """Returns the matrix products of an image's forward pass in training."""
        L = num_patches
        ups: list[tuple[Any, int]] = [(self.fpn.fpn1[0], L), (self.fpn.fpn1[3], 4 * L), (self.fpn.fpn2[0], L)]
        laterals = zip(self.lateral_convs, (16 * L, 4 * L, L), strict=True)
        smoothing = zip(self.fpn_convs, (16 * L, 4 * L, L), strict=True)
        pools: list[tuple[Any, int]] = list(zip(self.psp_modules, POOLS, strict=True))
        return (
            *(Product("head: neck", at, 4 * one.out_channels, one.in_channels, 1, "convolution") for one, at in ups),
            *(of_convolution("head: laterals", one.conv, at) for one, at in laterals),
            *(of_convolution("head: pooling", pool[1].conv, side * side) for pool, side in pools),
            of_convolution("head: pooling", self.bottleneck.conv, -(-L // 4)),
            *(of_convolution("head: smoothing", one.conv, at) for one, at in smoothing),
            of_convolution("head: smoothing", self.fpn_bottleneck.conv, 16 * L),
            of_convolution("head: classes", self.classifier, 16 * L),
            of_convolution("head: auxiliary", self.auxiliary_head.convs[0].conv, L),
            of_convolution("head: auxiliary", self.auxiliary_head.classifier, L),
        )


def upernet_taps(depth: int) -> tuple[int, ...]:
    """Returns the blocks that UPerNet looks at, counted from 0: of 12 those after which 4, 6, 8 and 12 are done."""
    return tuple(max(0, depth * sixths // 6 - 1) for sixths in (2, 3, 4, 6))


def _resized(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)
