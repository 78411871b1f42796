"""The losses of baselines by the names that `fastmae bench step --baselines` has for them."""

from __future__ import annotations

import torch
from torch import nn

from fastmae.benchmarks.baselines.official import official_like
from fastmae.benchmarks.baselines.strong import strong_like
from fastmae.benchmarks.baselines.timm_blocks import timm_like
from fastmae.benchmarks.baselines.vitmae import vitmae_like
from fastmae.model.mae import MaskedAutoencoderViT


class BaselineLoss(nn.Module):
    """Computes a baseline's loss as a forward pass, which is what torch's wrappers expect, from a fastmae's weights.

    Raises:
        UserError: its package cannot be used.
        ImportError: its package is not installed.
    """

    def __init__(self, name: str, model: MaskedAutoencoderViT) -> None:
        super().__init__()
        self.is_transformers = name == "transformers"
        make = {"official": official_like, "strong": strong_like, "timm": timm_like, "transformers": vitmae_like}[name]
        self.model = make(model)

    def order(self, ids_shuffle: torch.Tensor) -> torch.Tensor:
        """Returns an order of patches as the model takes it: transformers sorts patches by noise."""
        return ids_shuffle.argsort(dim=1).float() if self.is_transformers else ids_shuffle.long()

    def forward(self, images: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        return self.model(images, order)[0]
