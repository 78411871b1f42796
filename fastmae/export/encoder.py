"""The encoder on whole images in PyTorch's own operations, for programs that run without fastmae."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastmae.export.convnext_program import ConvNeXtTokens
from fastmae.model.convnext import ConvNeXtMAE
from fastmae.model.mae import MaskedAutoencoderViT
from fastmae.model.pixels import nodata_of, range_ends
from fastmae.model.segmenter import Segmenter

AnyEncoder = MaskedAutoencoderViT | ConvNeXtMAE
"""The models whose encoders are exported."""
Exported = AnyEncoder | Segmenter
"""The models that become programs: encoders, and segmenters whole."""


class Encoder(nn.Module):
    """Computes ``model.forward_features`` in PyTorch's own operations, or the logits of a classifier or a segmenter.

    Args:
        model: the model whose weights are copied.
        dtype: the dtype of the weights and of the computation.
        raw: take pixels [N, H, W, C] of the model's dtype and normalise them here, as the model does, instead of
            normalised float32 [N, C, H, W].
        head: ``head.weight`` [classes, D] and ``head.bias`` of a classifier with this encoder, which gives logits.
    """

    mean: torch.Tensor
    std: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor

    def __init__(
        self, model: Exported, dtype: torch.dtype, raw: bool, head: dict[str, torch.Tensor] | None = None
    ) -> None:
        super().__init__()
        self.tokens: nn.Module
        if isinstance(model, Segmenter):
            self.tokens = PixelLogits(model)
        else:
            self.tokens = ConvNeXtTokens(model) if isinstance(model, ConvNeXtMAE) else VitTokens(model)
        self.prefix_tokens: int = model.prefix_tokens
        self.fc_norm = copy.deepcopy(model.fc_norm) if head else None
        self.head = linear_of(head) if head else None
        self.dtype, self.raw, self.nodata = dtype, raw, nodata_of(model.pixels)
        self.to(dtype)
        self.register_buffer("mean", model.mean[:, None, None].clone())  # pixels are normalised in float32
        self.register_buffer("std", model.std[:, None, None].clone())
        for name, end in zip(("low", "high"), range_ends(model), strict=True):
            self.register_buffer(name, end[:, None, None].clone())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns float32: tokens, as the model; of a classifier logits [N, classes], of a segmenter
        [N, classes, H, W]."""
        if self.raw:
            images = self._normalised(images.permute(0, 3, 1, 2).float())
        x = self.tokens(images.to(self.dtype))
        if self.head is not None:
            x = self.head(x[:, 0] if self.fc_norm is None else self.fc_norm(x[:, self.prefix_tokens :].mean(dim=1)))
        return x.float()

    def _normalised(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalises pixels float32 [N, C, H, W]; missing ones become 0."""
        images = ((pixels - self.low) / (self.high - self.low) - self.mean) / self.std
        if self.nodata is None:
            return images
        missing = pixels.isnan() if math.isnan(self.nodata) else pixels.isnan() | (pixels == self.nodata)
        return torch.where(missing, 0.0, images)


class VitTokens(nn.Module):
    """Maps normalised images [N, C, H, W] to the tokens [N, 1+R+L, D] of a vision transformer.

    All patches are projected by one convolution.
    """

    def __init__(self, model: MaskedAutoencoderViT | Segmenter) -> None:
        super().__init__()
        self.projection = nn.Conv2d(model.in_chans, model.cls_token.shape[-1], model.patch_size, model.patch_size)
        self.projection.load_state_dict(model.patch_embed.proj.state_dict())
        prefix = [model.cls_token + model.pos_embed[:, :1], *([] if model.reg_token is None else [model.reg_token])]
        self.prefix = nn.Parameter(torch.cat(prefix, dim=1).detach())  # the class token and registers
        self.positions = nn.Parameter(model.pos_embed[:, 1:].detach().clone())
        self.blocks, self.norm = _with_torchs_linear(copy.deepcopy(model.blocks)), copy.deepcopy(model.norm)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.embedded(images)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def embedded(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the tokens that the first block gets."""
        x = self.projection(images).flatten(2).transpose(1, 2) + self.positions
        return torch.cat([self.prefix.expand(x.shape[0], -1, -1), x], dim=1)


class PixelLogits(VitTokens):
    """Maps normalised images [N, C, H, W] to the logits [N, classes, H, W] of a segmenter."""

    def __init__(self, model: Segmenter) -> None:
        super().__init__(model)
        self.pixel_head = _with_torchs_linear(copy.deepcopy(model.head))
        self.taps, self.grid, self.size, self.first = model.taps, model.grid_size, model.img_size, model.prefix_tokens

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x, levels = self.embedded(images), list[torch.Tensor]()
        for number, block in enumerate(self.blocks):
            x = block(x)
            tokens = self.norm(x) if number + 1 == len(self.blocks) else x
            levels += [tokens[:, self.first :]] * self.taps.count(number)
        logits = self.pixel_head(levels, self.grid)
        return F.interpolate(logits.float(), size=self.size, mode="bilinear", align_corners=False)


def linear_of(head: dict[str, torch.Tensor]) -> nn.Linear:
    """Returns the head of a classifier as a layer."""
    layer = nn.Linear(head["head.weight"].shape[1], head["head.weight"].shape[0])
    layer.load_state_dict({name.removeprefix("head."): tensor.float() for name, tensor in head.items()})
    return layer.requires_grad_(False)


def _with_torchs_linear(blocks: Any) -> Any:
    """Replaces ``ops.linear`` in blocks or a head by torch's: it looks at sizes that programs leave open."""
    for parent in list(blocks.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear):
                plain = nn.Linear(child.in_features, child.out_features, bias=child.bias is not None, device="meta")
                plain.load_state_dict(child.state_dict(), assign=True)
                setattr(parent, name, plain)
    return blocks
