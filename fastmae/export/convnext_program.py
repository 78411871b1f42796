"""The encoder of a ConvNeXt V2 in PyTorch's own operations, for programs that run without fastmae."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from fastmae.model.convnext import EPS, ConvNeXtMAE, Stage


class PlainBlock(nn.Module):
    """A block of maps [N, D, H, W] in PyTorch's own operations."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.conv_dw, self.norm = copy.deepcopy(block.conv_dw), copy.deepcopy(block.norm)
        self.fc1, self.fc2 = plain_linear(block.mlp.fc1), plain_linear(block.mlp.fc2)
        self.gamma, self.beta = copy.deepcopy(block.mlp.grn.weight), copy.deepcopy(block.mlp.grn.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.conv_dw(x).permute(0, 2, 3, 1))
        y = nn.functional.gelu(self.fc1(y))
        gx = y.float().square().sum(dim=(1, 2), keepdim=True).sqrt()  # sums of squares leave the range of float16
        nx = (gx / (gx.mean(dim=3, keepdim=True) + EPS)).to(y.dtype)
        y = self.gamma * (y * nx) + self.beta + y
        return x + self.fc2(y).permute(0, 3, 1, 2)


class PlainNorm(nn.Module):
    """LayerNorm over the channels of [N, D, H, W]."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = copy.deepcopy(norm)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def plain_linear(layer: nn.Linear) -> nn.Linear:
    """Returns a copy of a layer as torch's own: ``ops.linear`` looks at sizes that an exported program leaves open."""
    plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    plain.load_state_dict(layer.state_dict())
    return plain


class ConvNeXtTokens(nn.Module):
    """Maps normalised images [N, C, H, W] to the positions [N, L, D] of the last stage, row by row."""

    def __init__(self, model: ConvNeXtMAE) -> None:
        super().__init__()
        layers: list[nn.Module] = [copy.deepcopy(model.stem[0]), PlainNorm(model.stem[1])]
        for stage in model.stages:
            assert isinstance(stage, Stage)
            if isinstance(stage.downsample, nn.Sequential):
                layers += [PlainNorm(stage.downsample[0]), copy.deepcopy(stage.downsample[1])]
            layers += [PlainBlock(block) for block in stage.blocks]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images).flatten(2).transpose(1, 2)
