"""A classifier made from a pretrained encoder (He et al. 2021, section 4.1), and the choice of the weights to train.

State-dict keys and shapes are those of the official fine-tuned files, which are timm's VisionTransformer: no decoder,
``fc_norm.*`` after the mean of the patch tokens instead of ``norm.*``, and ``head.*``. This module knows nothing of
data or of the optimiser.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fastmae.facts import UINT8, PixelFacts
from fastmae.model.flops import Product, block_products
from fastmae.model.intermediates import TokenPool, attention_maps, forward_intermediates, pool_tokens
from fastmae.model.mae import MaskedAutoencoderViT
from fastmae.model.pixels import pixels_of, register_pixels, value_range_of
from fastmae.model.vit import (
    Block,
    NormLayer,
    PatchEmbed,
    Sum,
    Tokens,
    add_norm,
    added,
    as_sum,
    block_output,
    call_block,
    normed,
    patch_grid,
)
from fastmae.ops.backends import autocast_dtype, refusing_second_gradient
from fastmae.ops.gather_patches import gather_patches
from fastmae.ops.linear import Linear, TorchLinear, linear
from fastmae.philox import STREAM_DROP_PATH, uniforms_numpy

HEAD_STD = 2e-5
LORA = (".lora_a", ".lora_b")


class LoraLinear(Linear):
    """A linear map W·x with an update of low rank, B·A·x (Hu et al. 2021, arXiv 2106.09685, section 4.1; α = r).

    B starts at zero, so the map is unchanged at first. W and its bias are not trained.
    """

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__(base.in_features, base.out_features)
        self.weight, self.bias = base.weight, base.bias
        self.requires_grad_(False)
        self.lora_a = nn.Parameter(torch.empty(rank, base.in_features))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.normal_(self.lora_a, std=base.in_features**-0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + linear(linear(x, self.lora_a, None), self.lora_b, None)


class ClassifierBlock(Block):
    """A block with stochastic depth: in training, each sample may skip either branch (Huang et al. 2016)."""

    def forward(self, x: Tokens, depth_mask: torch.Tensor | None = None) -> Tokens:  # type: ignore[override]
        """Maps tokens [N, S, D] to [N, S, D]; ``depth_mask`` [2, N] multiplies the branches, None means all ones."""
        return block_output(self, x, depth_mask)

    def branches(  # type: ignore[override]
        self, x: torch.Tensor, normed: torch.Tensor, depth_mask: torch.Tensor | None, *, apart: bool
    ) -> Sum:
        if depth_mask is None:
            return super().branches(x, normed, 0, apart=apart)
        depth_mask = depth_mask.to(x.dtype)[:, :, None, None]
        x, normed = add_norm(self.norm2, x, depth_mask[0] * self.attn(normed))
        return Sum(x, depth_mask[1] * self.mlp(normed))


class Classifier(nn.Module):
    """A vision transformer that computes the logits of classes.

    Args:
        img_size, patch_size: (height, width) in pixels; the image must be a multiple of the patch.
        in_chans: channels C of an image.
        embed_dim, depth, num_heads, mlp_ratio: sizes of the encoder.
        num_classes: the number of logits.
        registers: tokens beside the class token, as in ``MaskedAutoencoderViT``.
        global_pool: classify the mean of the patch tokens; otherwise the class token.
        mean, std: C numbers each, in units of the range of ``pixels``, by which images are normalised.
        pixels: what the numbers of images are: their dtype, their range, and the value of those that are missing.

    Raises:
        ValueError: the sizes do not fit each other.
    """

    def __init__(
        self,
        img_size: tuple[int, int],
        patch_size: tuple[int, int],
        in_chans: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        num_classes: int,
        *,
        mlp_ratio: float = 4.0,
        registers: int = 0,
        global_pool: bool = True,
        mean: Sequence[float],
        std: Sequence[float],
        pixels: PixelFacts = UINT8,
    ) -> None:
        super().__init__()
        norm_layer: NormLayer = partial(nn.LayerNorm, eps=1e-6)
        self.img_size, self.patch_size, self.in_chans = img_size, patch_size, in_chans
        self.grid_size = patch_grid(img_size, patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.head_dim = embed_dim // num_heads
        self.global_pool = global_pool
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.reg_token = nn.Parameter(torch.zeros(1, registers, embed_dim)) if registers else None
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.num_patches, embed_dim))
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.blocks = nn.ModuleList(ClassifierBlock(embed_dim, num_heads, mlp_ratio, norm_layer) for _ in range(depth))
        if global_pool:
            self.fc_norm = norm_layer(embed_dim)
        else:
            self.norm = norm_layer(embed_dim)
        self.head = TorchLinear(embed_dim, num_classes)  # so small that nothing is measured for it
        nn.init.trunc_normal_(self.head.weight, std=HEAD_STD)
        nn.init.zeros_(self.head.bias)
        register_pixels(self, in_chans, mean, std, pixels)

    mean: torch.Tensor
    std: torch.Tensor
    value_range = property(value_range_of)
    pixels: PixelFacts
    other_sizes: tuple[tuple[int, int], ...] = ()

    @property
    def prefix_tokens(self) -> int:
        """How many tokens come before those of the patches: the class token and the registers."""
        return 1 if self.reg_token is None else 1 + self.reg_token.shape[1]

    def forward(self, images: torch.Tensor, depth_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Computes the logits [N, classes].

        Args:
            images: pixels [N, H, W, C] of the model's dtype, or float [N, C, H, W], normalised.
            depth_mask: [depth, 2, N] from ``stochastic_depth_mask``; None means that no branch is skipped.
        """
        return self.head(self.pool_tokens(self.forward_features(images, depth_mask), self.pool))

    def forward_features(self, images: torch.Tensor, depth_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Computes the tokens [N, 1+R+L, D] that are pooled and classified; the arguments are those of ``forward``.

        They are normalised if the class token is classified; otherwise ``fc_norm`` comes after their mean.
        """
        x = as_sum(refusing_second_gradient(self._embed_all(images)), biased=depth_mask is None)
        for number, block in enumerate(self.blocks):
            x = call_block(block, x, None if depth_mask is None else depth_mask[number], kind=ClassifierBlock)
        return added(x) if self.global_pool else normed(x, self.norm)

    forward_intermediates = forward_intermediates
    attention_maps = attention_maps
    pool_tokens = pool_tokens

    def products(self) -> tuple[Product, ...]:
        """Returns the matrix products of an image's forward pass."""
        return (*encoder_products(self), Product("head", 1, self.head.out_features, self.head.in_features, 1))

    def attention_shapes(self) -> dict[str, tuple[int, int]]:
        """Returns (number of keys S, width Dh of a head) of its attention."""
        return {"encoder": (self.prefix_tokens + self.num_patches, self.head_dim)}

    def layer_of(self, name: str) -> int:
        """Returns the layer of a parameter: 0 is the embedding, then come the blocks, and ``last_layer``."""
        if name.startswith(("cls_token", "reg_token", "pos_embed", "patch_embed")):
            return 0
        return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else self.last_layer

    @property
    def last_layer(self) -> int:
        """The layer of the head."""
        return len(self.blocks) + 1

    @property
    def pool(self) -> TokenPool:
        """What is classified, in the words of ``pool_tokens``."""
        return "mean" if self.global_pool else "cls"

    def _embed_all(self, images: torch.Tensor) -> torch.Tensor:
        """Makes tokens [N, 1+R+L, D] with their positions, class token and registers first."""
        pixels, mean, std, value_range, nodata = pixels_of(self, images)
        dtype = autocast_dtype(images.device) or self.cls_token.dtype
        ids = torch.arange(self.num_patches, device=images.device, dtype=torch.int32).expand(len(images), -1)
        x = self.patch_embed(gather_patches(pixels, ids, self.patch_size, mean, std, dtype, value_range, nodata))
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        if self.reg_token is None:
            return x
        return torch.cat([x[:, :1], self.reg_token.expand(len(x), -1, -1), x[:, 1:]], dim=1)


class ClassificationLoss(nn.Module):
    """Cross-entropy with soft targets as a module: torch's wrappers (DDP, compile) need a forward pass."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, images: torch.Tensor, targets: torch.Tensor | None = None, depth_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Computes the mean loss against ``targets`` [N, classes], which add up to 1; without targets, the logits."""
        logits = self.model(images, depth_mask).float()
        return logits if targets is None else F.cross_entropy(logits, targets)


def classifier_of(
    mae: MaskedAutoencoderViT, num_classes: int, *, img_size: tuple[int, int] | None = None, global_pool: bool = True
) -> Classifier:
    """Makes a classifier with a copy of the encoder of ``mae``; ``fc_norm`` and the head are new.

    Positions for another ``img_size`` are interpolated, as in the official code.

    Raises:
        ValueError: ``img_size`` is not a multiple of the patch.
    """
    model = Classifier(num_classes=num_classes, global_pool=global_pool, **encoder_arguments(mae, img_size))
    copy_encoder(mae, model)
    return model


def encoder_arguments(mae: MaskedAutoencoderViT, img_size: tuple[int, int] | None = None) -> dict[str, Any]:
    """Returns the arguments by which a ``Classifier`` has an encoder like that of ``mae``, for ``img_size``."""
    block = mae.blocks[0]
    assert isinstance(block, Block)
    return dict(
        img_size=img_size or mae.img_size,
        patch_size=mae.patch_size,
        in_chans=mae.in_chans,
        embed_dim=mae.cls_token.shape[2],
        depth=len(mae.blocks),
        num_heads=block.attn.num_heads,
        mlp_ratio=block.mlp.fc1.out_features / block.mlp.fc1.in_features,
        registers=mae.prefix_tokens - 1,
        mean=mae.mean.tolist(),
        std=mae.std.tolist(),
        pixels=mae.pixels,
    )


@torch.no_grad()
def copy_encoder(mae: MaskedAutoencoderViT, model: Classifier) -> None:
    """Copies the encoder of ``mae`` into ``model``, in place; positions are interpolated to its grid."""
    weights, own = mae.state_dict(), model.state_dict()
    for name in own.keys() & weights.keys() - {"pos_embed"}:
        own[name].copy_(weights[name])
    model.pos_embed.copy_(resized_positions(mae.pos_embed, mae.grid_size, model.grid_size))


def take_pooled_norm(mae: MaskedAutoencoderViT, *, has_norm: bool) -> None:
    """Turns the encoder of ``mae`` in place into that of a classifier: its ``fc_norm`` comes after the mean of tokens.

    ``has_norm`` says whether the tokens are normalised as well; otherwise ``norm`` leaves them as they are.
    """
    mae.fc_norm = copy.deepcopy(mae.norm)
    if not has_norm:
        mae.norm = nn.Identity()


def resized_positions(positions: torch.Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> torch.Tensor:
    """Interpolates positions [1, 1+L, D] of a grid (rows, columns) for another grid; the class token's is unchanged."""
    if grid == new_grid:
        return positions
    patches = positions[:, 1:].unflatten(1, grid).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=new_grid, mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], patches.flatten(2).mT], dim=1)


# --- stochastic depth -------------------------------------------------------------------------------------------------


def stochastic_depth_mask(seed: int, draw_ids: np.ndarray, drop_path: float, depth: int) -> torch.Tensor:
    """Draws the factors of the branches of each block: float32 [depth, 2, N], a pure function of the arguments.

    A branch of block i is skipped (factor 0) with a probability that grows with i from 0 to ``drop_path``. Otherwise
    its factor is above 1, so that the mean is 1.
    """
    rates = np.linspace(0, drop_path, depth)[:, None, None]
    draws = uniforms_numpy(seed, STREAM_DROP_PATH, draw_ids, 2 * depth).T.reshape(depth, 2, len(draw_ids))
    return torch.from_numpy(((draws >= rates) / (1 - rates)).astype(np.float32))


# --- the weights to train ---------------------------------------------------------------------------------------------


def tune(model: Any, what: str, lora_rank: int = 8) -> None:
    """Chooses in place which weights are trained.

    Args:
        model: the classifier, with ``blocks``, ``head`` and ``fc_norm``.
        what: ``full``: all weights; ``linear``: the head and its new norm; ``last-K``: these and the last K blocks;
            ``lora``: these and updates of low rank for the attention of every block.
        lora_rank: the rank of the updates.

    Raises:
        ValueError: the model has fewer than K blocks.
    """
    if what == "full":
        return
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    if model.global_pool:
        model.fc_norm.requires_grad_(True)
    if what.startswith("last-"):
        blocks = int(what.removeprefix("last-"))
        if blocks > len(model.blocks):
            raise ValueError(f"the model has {len(model.blocks)} blocks")
        for block in model.blocks[len(model.blocks) - blocks :]:
            block.requires_grad_(True)
        if not model.global_pool:
            model.norm.requires_grad_(True)
    elif what == "lora":
        for block in model.blocks:
            if not isinstance(block, Block):
                raise ValueError("an encoder of convolutions has no attention that could have updates of low rank")
            block.attn.qkv = LoraLinear(block.attn.qkv, lora_rank)
            block.attn.proj = LoraLinear(block.attn.proj, lora_rank)


def merge_lora(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Adds the updates of low rank to their weights: the state dict, not sharded, then has the official keys alone."""
    plain = {name: tensor for name, tensor in weights.items() if not name.endswith(LORA)}
    for name in [name.removesuffix(".lora_a") for name in weights if name.endswith(".lora_a")]:
        update = weights[f"{name}.lora_b"] @ weights[f"{name}.lora_a"]
        plain[f"{name}.weight"] = plain[f"{name}.weight"] + update
    return plain


def encoder_products(model: Classifier) -> tuple[Product, ...]:
    """Returns the matrix products of an image's forward pass through the encoder of a classifier."""
    block: Any = model.blocks[0]
    L, D = model.num_patches, model.cls_token.shape[2]
    P = model.patch_size[0] * model.patch_size[1] * model.in_chans
    sizes, tokens = (D, D, block.mlp.fc1.out_features, block.attn.num_heads), model.prefix_tokens + L
    blocks = block_products("encoder", len(model.blocks), *sizes, tokens, tokens)
    return (Product("patch embedding", L, D, P, 1), *blocks)
