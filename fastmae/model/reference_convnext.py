"""FCMAE of ConvNeXt V2 written plainly: the oracle of tests, and a baseline of benchmarks.

Maps [N, C, H, W] are dense: masked positions are computed as well, and set to zero before and after each depthwise
convolution. It shares no code with ``convnext.py``, but both load each other's state dict. It is written from the paper
(Woo et al. 2023, arXiv 2301.00808, sections 3.1 and 3.2). Keep it plain: everything else is compared with it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn


class ReferenceGRN(nn.Module):
    """Global response normalisation of [N, H, W, D], over the positions where ``seen`` [N, H, W, 1] is 1."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        gx = (x * seen).square().sum(dim=(1, 2), keepdim=True).sqrt()
        nx = gx / (gx.mean(dim=3, keepdim=True) + 1e-6)
        return self.weight * (x * nx) + self.bias + x


class ReferenceBlock(nn.Module):
    """A ConvNeXt V2 block of maps [N, D, H, W]; ``seen`` [N, 1, H, W] is 1 at visible positions."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        layers = {"fc1": nn.Linear(dim, 4 * dim), "grn": ReferenceGRN(4 * dim), "fc2": nn.Linear(4 * dim, dim)}
        self.mlp = nn.ModuleDict(layers)

    def forward(self, x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        y = self.conv_dw(x * seen) * seen
        y = self.norm(y.permute(0, 2, 3, 1))
        y = self.mlp["grn"](F.gelu(self.mlp["fc1"](y)), seen.permute(0, 2, 3, 1))
        return x + self.mlp["fc2"](y).permute(0, 3, 1, 2) * seen


class ReferenceNorm(nn.LayerNorm):
    """LayerNorm over the channels of [N, D, H, W]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ReferenceFCMAE(nn.Module):
    """The autoencoder. Arguments are those of ``ConvNeXtMAE``; images are normalised floats of any size of cells."""

    def __init__(
        self,
        in_chans: int = 3,
        depths: Sequence[int] = (3, 3, 9, 3),
        dims: Sequence[int] = (96, 192, 384, 768),
        norm_pix_loss: bool = False,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 1,
    ) -> None:
        super().__init__()
        self.norm_pix_loss = norm_pix_loss
        self.stem = nn.Sequential(nn.Conv2d(in_chans, dims[0], 4, 4), ReferenceNorm(dims[0], eps=1e-6))
        self.stages = nn.ModuleList()
        for i, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
            down = nn.Sequential(ReferenceNorm(dims[i - 1], eps=1e-6), nn.Conv2d(dims[i - 1], dim, 2, 2))
            blocks = nn.ModuleList(ReferenceBlock(dim) for _ in range(depth))
            self.stages.append(nn.ModuleDict({"downsample": down if i else nn.Identity(), "blocks": blocks}))
        self.decoder_embed = nn.Linear(dims[-1], decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_blocks = nn.ModuleList(ReferenceBlock(decoder_embed_dim) for _ in range(decoder_depth))
        self.decoder_pred = nn.Linear(decoder_embed_dim, 32 * 32 * in_chans)

    def encode(self, imgs: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """Returns the last map [N, D, H/32, W/32], zero where ``seen`` [N, 1, H/32, W/32] is 0."""
        x = self.stem(imgs)
        for stage in self.stages:
            assert isinstance(stage, nn.ModuleDict)
            x = stage["downsample"](x)
            scale = x.shape[2] // seen.shape[2]
            visible = seen.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
            x = x * visible
            for block in stage["blocks"].children():
                x = block(x, visible)
        return x

    def patchify(self, imgs: torch.Tensor) -> torch.Tensor:
        """Cuts images [N, C, H, W] into cells [N, L, P], P in (row, column, channel) order, one cell at a time."""
        rows, columns = range(0, imgs.shape[2], 32), range(0, imgs.shape[3], 32)
        cut = [imgs[:, :, y : y + 32, x : x + 32].permute(0, 2, 3, 1).flatten(1) for y in rows for x in columns]
        return torch.stack(cut, dim=1)

    def forward(
        self, imgs: torch.Tensor, ids_shuffle: torch.Tensor, mask_ratio: float = 0.6
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns loss, pred [N, L, P] and mask [N, L] for normalised float imgs [N, C, H, W], ids_shuffle [N, L]."""
        N, L = ids_shuffle.shape
        rows, columns = imgs.shape[2] // 32, imgs.shape[3] // 32
        K = int(L * (1 - mask_ratio))
        mask = (ids_shuffle.argsort(dim=1) >= K).to(imgs.dtype)
        seen = 1 - mask.reshape(N, 1, rows, columns)

        x = self.encode(imgs, seen).permute(0, 2, 3, 1)
        hidden = 1 - seen.permute(0, 2, 3, 1)
        x = self.decoder_embed(x) * (1 - hidden) + self.mask_token[:, None] * hidden
        x = x.permute(0, 3, 1, 2)
        for block in self.decoder_blocks:
            x = block(x, torch.ones_like(seen))
        pred = self.decoder_pred(x.permute(0, 2, 3, 1)).flatten(1, 2)

        target = self.patchify(imgs)
        if self.norm_pix_loss:
            target = (target - target.mean(dim=-1, keepdim=True)) / (target.var(dim=-1, keepdim=True) + 1e-6).sqrt()
        error = (pred - target).square().mean(dim=-1)
        return (error * mask).sum() / mask.sum(), pred, mask
