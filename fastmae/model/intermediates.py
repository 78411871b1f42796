"""What an encoder computes on the way: the tokens after each block, the weights of attention, and pooled tokens.

The functions are methods of the models with an encoder (``MaskedAutoencoderViT``, ``CrossMAE``, ``Classifier``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from fastmae.model.pixels import size_of
from fastmae.ops.attention import attention_weights

TokenPool = Literal["mean", "cls", "both", "tokens"]
POOLS = ("mean", "cls", "both", "tokens")
FORMATS = ("NCHW", "NLC")


def forward_intermediates(
    model: Any,
    images: torch.Tensor,
    indices: int | Sequence[int] | None = None,
    return_prefix_tokens: bool = False,
    norm: bool = False,
    stop_early: bool = False,
    output_fmt: Literal["NCHW", "NLC"] = "NCHW",
    intermediates_only: bool = False,
) -> Any:
    """Runs the encoder on whole images and returns the tokens after some of its blocks, as timm's method of this name.

    Args:
        model: the encoder; left out in a call of the method.
        images: pixels [N, H, W, C] of the model's dtype, or float [N, C, H, W], normalised.
        indices: which blocks, counted from 0, or from the end if negative; a number n is the last n; None is all.
        return_prefix_tokens: return pairs (patch tokens, prefix tokens [N, 1+R, D]: class token and registers).
        norm: apply the encoder's last norm to them too.
        stop_early: leave out the blocks after the last that is asked for.
        output_fmt: the patch tokens as maps [N, D, rows, columns] (``NCHW``) or as a sequence [N, L, D] (``NLC``).
        intermediates_only: return the list alone.

    Returns:
        the normalised tokens [N, 1+R+L, D] of the last block that ran, and the list of the patch tokens after the
        blocks that were asked for, in the order of the blocks. Gradients flow through all of them.

    Raises:
        ValueError: a block that there is not, or another format.
    """
    if output_fmt not in FORMATS:
        raise ValueError(f"output_fmt must be one of {', '.join(FORMATS)}, got {output_fmt!r}")
    wanted = _wanted("indices", indices, len(model.blocks))
    last_norm = getattr(model, "norm", nn.Identity())  # a classifier of mean tokens has none
    x, kept = model._embed_all(images), []
    for number, block in enumerate(model.blocks[: max(wanted) + 1] if stop_early else model.blocks):
        x = block(x)
        if number in wanted:
            kept.append(last_norm(x) if norm else x)
    height, width = size_of(model, images)
    grid = height // model.patch_size[0], width // model.patch_size[1]
    found: list[Any] = [tokens[:, model.prefix_tokens :] for tokens in kept]
    if output_fmt == "NCHW":
        found = [tokens.mT.unflatten(2, grid).contiguous() for tokens in found]
    if return_prefix_tokens:
        found = [(tokens, all_[:, : model.prefix_tokens]) for tokens, all_ in zip(found, kept, strict=True)]
    return found if intermediates_only else (last_norm(x), found)


def attention_maps(model: Any, images: torch.Tensor, blocks: int | Sequence[int] | None = None) -> list[torch.Tensor]:
    """Returns the weights of self-attention of some of the encoder's blocks, for whole images.

    They are computed beside the pass, in float32 (float64 for a float64 model), whatever computes attention in it.
    All blocks of ViT-B at 224 pixels have 22 MB an image: ask for those that you need, or for few images.

    Args:
        model: the encoder; left out in a call of the method.
        images: pixels [N, H, W, C] of the model's dtype, or float [N, C, H, W], normalised.
        blocks: which blocks, counted from 0, or from the end if negative; a number n is the last n; None is all.

    Returns:
        of each block, in their order, [N, heads, S, S] with S = 1+R+L: how much the token of a row reads of each token.
        Rows add up to 1. Token 0 is the class token, so ``maps[-1][:, :, 0, model.prefix_tokens:]`` is what it reads
        of each patch.

    Raises:
        ValueError: a block that there is not.
        TypeError: a block of another kind, whose weights are not known.
    """
    wanted = _wanted("blocks", blocks, len(model.blocks))
    x, maps = model._embed_all(images), []
    for number, block in enumerate(model.blocks[: max(wanted) + 1]):
        if number in wanted:
            attn = getattr(block, "attn", None)
            if attn is None or not hasattr(attn, "qkv") or not hasattr(attn, "num_heads"):
                raise TypeError(f"block {number} is a {type(block).__name__} without attn.qkv: its weights are unknown")
            packed = attn.qkv(block.norm1(x))
            packed = packed.to(torch.promote_types(packed.dtype, torch.float32))
            with torch.autocast(packed.device.type, enabled=False):
                maps.append(attention_weights(packed.unflatten(2, (3, attn.num_heads, -1))))
        x = block(x)
    return maps


def pool_tokens(model: Any, tokens: torch.Tensor, pool: TokenPool = "mean") -> torch.Tensor:
    """Turns the tokens [N, 1+R+L, D] of ``forward_features`` into features, with the words of ``extract_features``.

    Args:
        model: the encoder; left out in a call of the method.
        tokens: class token first, then R registers, which are left out, then the patches.
        pool: ``mean`` of the patch tokens [N, D], after which an encoder of a classifier has its own norm; the class
            token (``cls``) [N, D]; ``both``, class token and mean [N, 2·D]; or all patch tokens one after another
            (``tokens``) [N, L·D].

    Raises:
        ValueError: another word, or the class token of an encoder that has none (``fastmae.wrap``).
    """
    if pool not in POOLS:
        raise ValueError(f"pool must be one of {', '.join(POOLS)}, got {pool!r}")
    if pool in ("cls", "both") and not getattr(model, "has_class_token", True):
        raise ValueError(f"pool is {pool!r}, and this encoder has no class token; take mean or tokens")
    if pool == "cls":
        return tokens[:, 0]
    patches = tokens[:, model.prefix_tokens :]
    if pool == "tokens":
        return patches.flatten(1)
    fc_norm = getattr(model, "fc_norm", None)
    mean = patches.mean(dim=1)
    mean = mean if fc_norm is None else fc_norm(mean)
    return torch.cat([tokens[:, 0], mean], dim=1) if pool == "both" else mean


def _wanted(name: str, indices: int | Sequence[int] | None, depth: int) -> set[int]:
    """Returns the numbers of the blocks that ``indices`` means.

    Raises:
        ValueError: it means one that there is not, or none.
    """
    if isinstance(indices, int):
        if not 1 <= indices <= depth:
            raise ValueError(f"{name} must be 1 to {depth}, how many of the last blocks, or a list, got {indices}")
        return set(range(depth - indices, depth))
    wanted = range(depth) if indices is None else indices
    if not wanted or not all(-depth <= index < depth for index in wanted):
        raise ValueError(f"{name} must name blocks from {-depth} to {depth - 1}, got {list(wanted)}")
    return {index % depth for index in wanted}
