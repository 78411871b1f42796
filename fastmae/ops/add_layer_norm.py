"""add_layer_norm: the addition at the end of a branch and the LayerNorm after it, in one pass over the tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fastmae.ops import cpu
from fastmae.ops.backends import ops_backend
from fastmae.ops.checks import check_devices, check_floating

WIDEST = 8192
"""The widest token that the Triton kernel takes, whose rows lie in registers."""


def add_layer_norm(
    x: torch.Tensor,
    branch: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    dtype: torch.dtype | None = None,
    branch_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds a branch to the stream of tokens and normalises every token of the sum (Ba et al. 2016, arXiv 1607.06450).

    Args:
        x: floating [..., D], the stream, any strides.
        branch: floating [..., D], of the same shape; its dtype may be another.
        weight, bias: floating [D].
        eps: what is added to the variance (divisor D) inside the root.
        dtype: the dtype of the normalised tokens; None is that of ``x``.
        branch_bias: floating [D], what the product that ends the branch has left to be added, or None.

    Returns:
        stream [..., D] = x + (branch + branch_bias) in the dtype of ``x``, and the normalised stream [..., D] in
        ``dtype``. Both are differentiable in everything but ``eps``. Means, variances and sums are float32, or float64
        if ``x`` is. The gradient of ``x`` is written in the dtype of ``x``, that of ``branch`` in its own, and that of
        ``branch_bias`` is added up, in the same pass; if the first two dtypes are the same, they are one tensor.
        Equivalent to ``add_layer_norm_reference``.

    Raises:
        ValueError: a dtype, shape or device is wrong.
    """
    dtype = x.dtype if dtype is None else dtype
    rows = {"weight": weight, "bias": bias} | ({} if branch_bias is None else {"branch_bias": branch_bias})
    for name, tensor in {"x": x, "branch": branch, **rows}.items():
        check_floating(name, tensor.dtype)
    check_floating("dtype", dtype)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have shape [..., D] with D ≥ 1, got {list(x.shape)}")
    if branch.shape != x.shape:
        raise ValueError(f"branch must have the shape of x, {list(x.shape)}, got {list(branch.shape)}")
    for name, tensor in rows.items():
        if tensor.shape != x.shape[-1:]:
            raise ValueError(f"{name} must have shape {list(x.shape[-1:])}, got {list(tensor.shape)}")
    check_devices(x=x, branch=branch, **rows)
    stream, normed, _, _ = _add_layer_norm(x, branch, branch_bias, weight, bias, eps, dtype)
    return stream, normed


def add_layer_norm_reference(
    x: torch.Tensor,
    branch: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    dtype: torch.dtype | None = None,
    branch_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Defines the op in PyTorch: what is normalised is the sum as it is rounded to the dtype of ``x``."""
    stream = _sum(x, branch, branch_bias)
    compute = _compute_dtype(x)
    normed = F.layer_norm(stream.to(compute), x.shape[-1:], weight.to(compute), bias.to(compute), eps)
    return stream, normed.to(x.dtype if dtype is None else dtype)


def _sum(x: torch.Tensor, branch: torch.Tensor, branch_bias: torch.Tensor | None) -> torch.Tensor:
    """Returns x + (branch + branch_bias), rounded once to the dtype of x."""
    if branch_bias is not None:
        branch = branch.to(_compute_dtype(x)) + branch_bias.to(_compute_dtype(x))
    return (x + branch).to(x.dtype)


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    """Returns the dtype of the statistics of tokens."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _backend(x: torch.Tensor, *others: torch.Tensor, dtype: torch.dtype) -> str:
    """Returns what computes this: as for the other ops, but tokens that are too wide for the kernel are torch's."""
    backend = ops_backend(x.device, x.dtype, *(other.dtype for other in others), dtype)
    return "reference" if backend == "triton" and x.shape[-1] > WIDEST else backend


@torch.library.custom_op("fastmae::add_layer_norm", mutates_args=())
def _add_layer_norm(
    x: torch.Tensor,
    branch: torch.Tensor,
    branch_bias: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns stream, normed [..., D], and the means and the inverse deviations of the tokens of stream [...]."""
    arguments = x, branch, branch_bias, weight, bias, eps, dtype
    tensors = [tensor for tensor in (x, branch, branch_bias, weight, bias) if tensor is not None]
    backend = _backend(*tensors, dtype=dtype)
    if backend == "cpu":
        return cpu.add_layer_norm(*arguments)
    if backend == "triton":
        from fastmae.kernels.add_layer_norm import add_layer_norm_triton

        return add_layer_norm_triton(*arguments)
    compute = _compute_dtype(x)
    stream = _sum(x, branch, branch_bias).contiguous()
    affine = weight.to(compute), bias.to(compute)
    normed, mean, rstd = torch.native_layer_norm(stream.to(compute), x.shape[-1:], *affine, eps)
    return stream, normed.to(dtype), mean.flatten().view(x.shape[:-1]), rstd.flatten().view(x.shape[:-1])


@_add_layer_norm.register_fake
def _(
    x: torch.Tensor,
    branch: object,
    branch_bias: object,
    weight: object,
    bias: object,
    eps: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=_compute_dtype(x)) for _ in range(2))
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=dtype), mean, rstd


@torch.library.custom_op("fastmae::add_layer_norm_backward", mutates_args=())
def _add_layer_norm_backward(
    grad_stream: torch.Tensor | None,
    grad_normed: torch.Tensor,
    stream: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    branch_dtype: torch.dtype,
    has_branch_bias: bool,
) -> list[torch.Tensor]:
    """Returns the gradients of x [..., D]; of branch, if its ``branch_dtype`` is not that of x; and a third.

    That is [2 or 3, D] in the dtype of ``mean``: of weight, of bias, and of the branch's bias if it has one.
    ``grad_stream`` is None if nothing but the LayerNorm uses the stream.
    """
    arguments = grad_stream, grad_normed, stream, weight, mean, rstd, branch_dtype, has_branch_bias
    backend = _backend(stream, grad_normed, weight, dtype=branch_dtype)
    if backend == "cpu":
        return cpu.add_layer_norm_backward(*arguments)
    if backend == "triton":
        from fastmae.kernels.add_layer_norm import add_layer_norm_backward_triton

        return add_layer_norm_backward_triton(*arguments)
    grad, weight = grad_normed.to(mean.dtype), weight.to(mean.dtype)
    statistics = mean[..., None], rstd[..., None]
    grad_x, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        grad, stream.to(mean.dtype), stream.shape[-1:], *statistics, weight, weight, [True, True, True]
    )
    if grad_stream is not None:
        grad_x = grad_x + grad_stream
    gradients = [grad_x.to(dtype, copy=True).contiguous() for dtype in _gradient_dtypes(stream, branch_dtype)]
    of_branch_bias = [grad_x.flatten(0, -2).sum(dim=0)] if has_branch_bias else []
    return [*gradients, torch.stack([grad_weight, grad_bias, *of_branch_bias])]


@_add_layer_norm_backward.register_fake
def _(
    grad_stream: object,
    grad_normed: object,
    stream: torch.Tensor,
    weight: object,
    mean: torch.Tensor,
    rstd: object,
    branch_dtype: torch.dtype,
    has_branch_bias: bool,
) -> list[torch.Tensor]:
    gradients = [stream.new_empty(stream.shape, dtype=dtype) for dtype in _gradient_dtypes(stream, branch_dtype)]
    return [*gradients, mean.new_empty(3 if has_branch_bias else 2, stream.shape[-1])]


def _gradient_dtypes(stream: torch.Tensor, branch_dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """Returns the dtypes in which the gradient of the sum is written."""
    return (stream.dtype,) if branch_dtype == stream.dtype else (stream.dtype, branch_dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    _, branch, branch_bias, weight, bias, *_ = inputs
    stream, _, mean, rstd = output
    ctx.save_for_backward(stream, weight, mean, rstd)
    ctx.branch_dtype, ctx.bias_dtype = branch.dtype, bias.dtype
    ctx.branch_bias_dtype = None if branch_bias is None else branch_bias.dtype
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad_stream: torch.Tensor | None, grad_normed: torch.Tensor | None, *_: Any
) -> tuple[torch.Tensor | None, ...]:
    stream, weight, mean, rstd = ctx.saved_tensors
    sums_up = ctx.branch_bias_dtype is not None and ctx.needs_input_grad[2]
    if grad_normed is None:  # nobody uses the normalised tokens, so that this is an addition
        in_branch = of_branch_bias = None
        if grad_stream is not None:
            in_branch = grad_stream.to(ctx.branch_dtype)
            if sums_up:
                of_branch_bias = grad_stream.flatten(0, -2).sum(0, dtype=mean.dtype).to(ctx.branch_bias_dtype)
        return grad_stream, in_branch, of_branch_bias, None, None, None, None
    arguments = grad_stream, grad_normed, stream, weight, mean, rstd, ctx.branch_dtype, sums_up
    *of_sum, affine = _add_layer_norm_backward(*arguments)
    grad_weight, grad_bias, *rest = affine.unbind()
    of_branch_bias = rest[0].to(ctx.branch_bias_dtype) if sums_up else None
    of_affine = grad_weight.to(weight.dtype), grad_bias.to(ctx.bias_dtype)
    return of_sum[0], of_sum[-1], of_branch_bias, *of_affine, None, None


_add_layer_norm.register_autograd(_backward, setup_context=_save)
