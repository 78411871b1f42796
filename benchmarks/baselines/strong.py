"""The strong baseline: the official formulation with torch's own attention, as a careful user of PyTorch writes it."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from fastmae.benchmarks.baselines.official import official_like
from fastmae.model.mae import MaskedAutoencoderViT
from fastmae.model.reference import ReferenceBlock


class _FusedAttentionBlock(ReferenceBlock):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        N, S, D = x.shape
        qkv = self.attn["qkv"](self.norm1(x)).view(N, S, 3, self.num_heads, D // self.num_heads)
        mixed = scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
        x = x + self.attn["proj"](mixed.transpose(1, 2).reshape(N, S, D))
        return x + self.mlp["fc2"](gelu(self.mlp["fc1"](self.norm2(x))))


def strong_like(model: MaskedAutoencoderViT) -> nn.Module:
    """As ``official_like``."""
    return official_like(model, _FusedAttentionBlock)
