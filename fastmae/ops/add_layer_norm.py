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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds a branch to the stream of tokens and normalises every token of the sum (Ba et al. 2016, arXiv 1607.06450).

    Args:
        x: floating [..., D], the stream, any strides.
        branch: floating [..., D], of the same shape; its dtype may be another.
        weight, bias: floating [D].
        eps: what is added to the variance (divisor D) inside the root.
        dtype: the dtype of the normalised tokens; None is that of ``x``.

    Returns:
        stream [..., D] = x + branch in the dtype of ``x``, and the normalised stream [..., D] in ``dtype``. Both are
        differentiable in everything but ``eps``. Means, variances and sums are float32, or float64 if ``x`` is. The
        gradient of ``x`` is written in the dtype of ``x``, that of ``branch`` in its own, in the same pass; if the two
        dtypes are the same, they are one tensor. Equivalent to ``add_layer_norm_reference``.

    Raises:
        ValueError: a dtype, shape or device is wrong.
    """
    dtype = x.dtype if dtype is None else dtype
    for name, tensor in (("x", x), ("branch", branch), ("weight", weight), ("bias", bias)):
        check_floating(name, tensor.dtype)
    check_floating("dtype", dtype)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have shape [..., D] with D ≥ 1, got {list(x.shape)}")
    if branch.shape != x.shape:
        raise ValueError(f"branch must have the shape of x, {list(x.shape)}, got {list(branch.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor.shape != x.shape[-1:]:
            raise ValueError(f"{name} must have shape {list(x.shape[-1:])}, got {list(tensor.shape)}")
    check_devices(x=x, branch=branch, weight=weight, bias=bias)
    stream, normed, _, _ = _add_layer_norm(x, branch, weight, bias, eps, dtype)
    return stream, normed


def add_layer_norm_reference(
    x: torch.Tensor,
    branch: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Defines the op in PyTorch: what is normalised is the sum as it is rounded to the dtype of ``x``."""
    stream = (x + branch).to(x.dtype)
    compute = _compute_dtype(x)
    normed = F.layer_norm(stream.to(compute), x.shape[-1:], weight.to(compute), bias.to(compute), eps)
    return stream, normed.to(x.dtype if dtype is None else dtype)


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    """Returns the dtype of the statistics of tokens."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _backend(x: torch.Tensor, *dtypes: torch.dtype) -> str:
    """Returns what computes this: as for the other ops, but tokens that are too wide for the kernel are torch's."""
    backend = ops_backend(x.device, x.dtype, *dtypes)
    return "reference" if backend == "triton" and x.shape[-1] > WIDEST else backend


@torch.library.custom_op("fastmae::add_layer_norm", mutates_args=())
def _add_layer_norm(
    x: torch.Tensor, branch: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns stream, normed [..., D], and the means and the inverse deviations of the tokens of stream [...]."""
    arguments = x, branch, weight, bias, eps, dtype
    backend = _backend(x, branch.dtype, weight.dtype, bias.dtype, dtype)
    if backend == "cpu":
        return cpu.add_layer_norm(*arguments)
    if backend == "triton":
        from fastmae.kernels.add_layer_norm import add_layer_norm_triton

        return add_layer_norm_triton(*arguments)
    compute = _compute_dtype(x)
    stream = (x + branch).to(x.dtype).contiguous()
    affine = weight.to(compute), bias.to(compute)
    normed, mean, rstd = torch.native_layer_norm(stream.to(compute), x.shape[-1:], *affine, eps)
    return stream, normed.to(dtype), mean.flatten().view(x.shape[:-1]), rstd.flatten().view(x.shape[:-1])


@_add_layer_norm.register_fake
def _(
    x: torch.Tensor, branch: object, weight: object, bias: object, eps: float, dtype: torch.dtype
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
) -> list[torch.Tensor]:
    """Returns the gradients of x [..., D]; of branch, if its ``branch_dtype`` is not that of x; of weight, bias [2, D].

    ``grad_stream`` is None if nothing but the LayerNorm uses the stream. The last result is in the dtype of ``mean``.
    """
    arguments = grad_stream, grad_normed, stream, weight, mean, rstd, branch_dtype
    backend = _backend(stream, grad_normed.dtype, weight.dtype, branch_dtype)
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
    return [*gradients, torch.stack([grad_weight, grad_bias])]


@_add_layer_norm_backward.register_fake
def _(
    grad_stream: object,
    grad_normed: object,
    stream: torch.Tensor,
    weight: object,
    mean: torch.Tensor,
    rstd: object,
    branch_dtype: torch.dtype,
) -> list[torch.Tensor]:
    gradients = [stream.new_empty(stream.shape, dtype=dtype) for dtype in _gradient_dtypes(stream, branch_dtype)]
    return [*gradients, mean.new_empty(2, stream.shape[-1])]


def _gradient_dtypes(stream: torch.Tensor, branch_dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """Returns the dtypes in which the gradient of the sum is written."""
    return (stream.dtype,) if branch_dtype == stream.dtype else (stream.dtype, branch_dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    _, branch, weight, bias, *_ = inputs
    stream, _, mean, rstd = output
    ctx.save_for_backward(stream, weight, mean, rstd)
    ctx.branch_dtype, ctx.bias_dtype = branch.dtype, bias.dtype
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad_stream: torch.Tensor | None, grad_normed: torch.Tensor | None, *_: Any
) -> tuple[torch.Tensor | None, ...]:
    if grad_normed is None:  # nobody uses the normalised tokens, so that this is an addition
        in_branch = None if grad_stream is None else grad_stream.to(ctx.branch_dtype)
        return grad_stream, in_branch, None, None, None, None
    stream, weight, mean, rstd = ctx.saved_tensors
    gradients = _add_layer_norm_backward(grad_stream, grad_normed, stream, weight, mean, rstd, ctx.branch_dtype)
    *of_sum, affine = gradients
    grad_weight, grad_bias = affine.unbind()
    return of_sum[0], of_sum[-1], grad_weight.to(weight.dtype), grad_bias.to(ctx.bias_dtype), None, None


_add_layer_norm.register_autograd(_backward, setup_context=_save)
