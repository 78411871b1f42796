"""assemble_tokens: the input of the decoder, visible tokens and mask tokens with their positions, in shuffled order."""

from __future__ import annotations

from typing import Any

import torch

from fastmae.ops import cpu
from fastmae.ops.backends import is_differentiable, ops_backend
from fastmae.ops.checks import check_devices, check_floating, check_ids, check_range


def assemble_tokens(
    visible: torch.Tensor, mask_token: torch.Tensor, pos_embed: torch.Tensor, ids_shuffle: torch.Tensor
) -> torch.Tensor:
    """Appends M mask tokens to the visible ones and adds every token's position.

    Tokens stay in the shuffled order: attention does not depend on the order, positions are added by index, and the
    masked tokens form a contiguous suffix (paper, section 3, "Simple implementation", without the unshuffle).

    Args:
        visible: floating [N, K+1, D], the class token first; at least one patch is visible and one masked.
        mask_token: floating [D].
        pos_embed: floating [L+1, D], the class token's row first; fixed, as in the paper.
        ids_shuffle: int32 or int64 [N, L], a permutation per row whose first K entries are the visible patches.

    Returns:
        [N, L+1, D] in the dtype to which the three are promoted: under autocast visible tokens are bfloat16, and the
        sum is float32 as the positions are. Differentiable in ``visible`` and ``mask_token``. Equivalent to
        ``assemble_tokens_reference``.

    Raises:
        ValueError: a dtype, shape or device is wrong, the positions require a gradient, or an id is outside [0, L) (on
            a GPU ids are checked only with ``check_ids``).
    """
    if visible.ndim != 3:
        raise ValueError(f"visible must have shape [N, K+1, D], got {list(visible.shape)}")
    N, visible_tokens, D = visible.shape
    check_ids("ids_shuffle", ids_shuffle, N)
    L = ids_shuffle.shape[1]
    if not 2 <= visible_tokens <= L:
        raise ValueError(
            f"visible must hold 2 to {L} tokens per image, one of them the class token, got {visible_tokens}"
        )
    if mask_token.shape != (D,):
        raise ValueError(f"mask_token must have shape [{D}], got {list(mask_token.shape)}")
    if pos_embed.shape != (L + 1, D):
        raise ValueError(f"pos_embed must have shape [{L + 1}, {D}], got {list(pos_embed.shape)}")
    for name, tensor in (("visible", visible), ("mask_token", mask_token), ("pos_embed", pos_embed)):
        check_floating(name, tensor.dtype)
    if pos_embed.requires_grad:
        raise ValueError("pos_embed must not require a gradient: the positions of a masked autoencoder are fixed")
    check_devices(visible=visible, mask_token=mask_token, pos_embed=pos_embed, ids_shuffle=ids_shuffle)
    dtype = torch.promote_types(torch.promote_types(visible.dtype, mask_token.dtype), pos_embed.dtype)
    if is_differentiable():
        check_range("ids_shuffle", ids_shuffle, L)
        return assemble_tokens_reference(visible, mask_token, pos_embed, ids_shuffle).to(dtype)
    return _assemble_tokens(visible, mask_token, pos_embed, ids_shuffle, dtype)


def assemble_tokens_reference(
    visible: torch.Tensor, mask_token: torch.Tensor, pos_embed: torch.Tensor, ids_shuffle: torch.Tensor
) -> torch.Tensor:
    """Defines the op in PyTorch: concatenate, then add the positions chosen by index."""
    N, visible_tokens, D = visible.shape
    masked = ids_shuffle.shape[1] + 1 - visible_tokens
    tokens = torch.cat([visible, mask_token.expand(N, masked, D)], dim=1)
    positions = torch.cat([pos_embed[:1].expand(N, 1, D), pos_embed[1:][ids_shuffle.long()]], dim=1)
    return tokens + positions


@torch.library.custom_op("fastmae::assemble_tokens", mutates_args=())
def _assemble_tokens(
    visible: torch.Tensor,
    mask_token: torch.Tensor,
    pos_embed: torch.Tensor,
    ids_shuffle: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    arguments = visible, mask_token, pos_embed, ids_shuffle
    backend = ops_backend(visible.device, dtype)
    if backend == "cpu":  # the extension checks the ids
        return cpu.assemble_tokens(*arguments, dtype)
    check_range("ids_shuffle", ids_shuffle, ids_shuffle.shape[1])
    if backend == "reference":
        return assemble_tokens_reference(*arguments).to(dtype)
    from fastmae.kernels.assemble_tokens import assemble_tokens_triton

    return assemble_tokens_triton(*arguments, dtype)


@_assemble_tokens.register_fake
def _(visible: torch.Tensor, _: object, __: object, ids_shuffle: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return visible.new_empty(visible.shape[0], ids_shuffle.shape[1] + 1, visible.shape[2], dtype=dtype)


@torch.library.custom_op("fastmae::assemble_tokens_backward", mutates_args=())
def _assemble_tokens_backward(
    grad: torch.Tensor, visible_tokens: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Splits grad [N, L+1, D] into that of the visible tokens [N, K+1, D] in ``dtype`` and of the mask token [D]."""
    backend = ops_backend(grad.device, grad.dtype, dtype)
    if backend == "cpu":
        return cpu.assemble_tokens_backward(grad, visible_tokens, dtype)
    if backend == "reference":
        masked = grad[:, visible_tokens:].to(_sum_dtype(grad.dtype))
        return grad[:, :visible_tokens].to(dtype, copy=True).contiguous(), masked.sum(dim=1).sum(dim=0)
    from fastmae.kernels.assemble_tokens import assemble_tokens_backward_triton

    return assemble_tokens_backward_triton(grad, visible_tokens, dtype)


@_assemble_tokens_backward.register_fake
def _(grad: torch.Tensor, visible_tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    N, _, D = grad.shape
    return grad.new_empty(N, visible_tokens, D, dtype=dtype), grad.new_empty(D, dtype=_sum_dtype(grad.dtype))


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype in which the gradient of the mask token is added up."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    visible, mask_token = inputs[:2]
    ctx.visible_tokens, ctx.dtypes = visible.shape[1], (visible.dtype, mask_token.dtype)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    grad_visible, grad_mask_token = _assemble_tokens_backward(grad, ctx.visible_tokens, ctx.dtypes[0])
    return grad_visible, grad_mask_token.to(ctx.dtypes[1]), None, None, None


_assemble_tokens.register_autograd(_backward, setup_context=_setup_context)
