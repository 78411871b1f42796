"""grn: global response normalisation (Woo et al. 2023, arXiv 2301.00808, section 3.2) in two passes over memory."""

from __future__ import annotations

from typing import Any

import torch

from fastmae.ops import cpu
from fastmae.ops.backends import is_differentiable, ops_backend
from fastmae.ops.checks import check_devices, check_floating
from fastmae.torch_compat import is_exporting

EPS = 1e-6  # of the paper's code


def grn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Lets channels compete by their norms over all positions of an image.

    Gx = ‖x‖₂ of each channel over the positions, Nx = Gx / (mean of Gx over the channels + 1e-6), and the output is
    γ·(x·Nx) + β + x.

    Args:
        x: floating [N, ..., D]; all axes between the first and the last are positions.
        weight, bias: floating [D], γ and β.

    Returns:
        The shape and the dtype of ``x``; norms are float32, or float64 if ``x`` is. Differentiable in all three. In C++
        on a CPU; elsewhere, and in exported programs, ``grn_reference``, which it is equivalent to.

    Raises:
        ValueError: a dtype, shape or device is wrong.
    """
    check_floating("x", x.dtype)
    if x.ndim < 2 or x.shape[-1] == 0:
        raise ValueError(f"x must have shape [N, ..., D], got {list(x.shape)}")
    for name, value in (("weight", weight), ("bias", bias)):
        check_floating(name, value.dtype)
        if value.shape != x.shape[-1:]:
            raise ValueError(f"{name} must have shape {list(x.shape[-1:])}, got {list(value.shape)}")
    check_devices(x=x, weight=weight, bias=bias)
    if is_exporting() or is_differentiable() or ops_backend(x.device, x.dtype, weight.dtype, bias.dtype) != "cpu":
        return grn_reference(x, weight, bias)
    out, _ = _grn(x.flatten(1, -2) if x.ndim > 2 else x[:, None], weight, bias)
    return out.view(x.shape)


def grn_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Defines the op in PyTorch."""
    flat = x.flatten(1, -2) if x.ndim > 2 else x[:, None]
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    norm = torch.linalg.vector_norm(flat, dim=1, keepdim=True, dtype=compute)  # its gradient at 0 is 0
    scale = _scale(norm, weight.to(compute))
    return torch.addcmul(bias.to(x.dtype), flat, scale.to(x.dtype)).view(x.shape)


def _scale(norm: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Returns what each channel is multiplied by, 1 + γ·Nx, for norms [..., D]."""
    return 1 + weight * (norm / (norm.mean(dim=-1, keepdim=True) + EPS))


@torch.library.custom_op("fastmae::grn", mutates_args=())
def _grn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the output [N, P, D] and the norms float32 [N, D], on a CPU."""
    norm = cpu.sums_of_products(x)[0].sqrt()
    return cpu.scale_and_add(x, _scale(norm, weight.float()), bias.float()[None]), norm


@_grn.register_fake
def _(x: torch.Tensor, weight: object, bias: object) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[0], x.shape[2], dtype=torch.float32)


@torch.library.custom_op("fastmae::grn_backward", mutates_args=())
def _grn_backward(
    grad: torch.Tensor, x: torch.Tensor, norm: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the gradients of x [N, P, D], and float32 [2, D] of weight and bias."""
    grad, weight = grad.to(x.dtype), weight.float()
    along, plain = cpu.sums_of_products(x, grad)  # of gradient · x, and of the gradient
    whole = norm.mean(dim=-1, keepdim=True) + EPS
    of_ratio = along * weight  # the gradient of Nx
    of_norm = (of_ratio - (of_ratio * norm).mean(dim=-1, keepdim=True) / whole) / whole
    slope = torch.where(norm > 0, of_norm / norm, 0)
    grad_x = cpu.scale_and_add(grad, _scale(norm, weight), slope, x)
    return grad_x, torch.stack(((along * (norm / whole)).sum(dim=0), plain.sum(dim=0)))


@_grn_backward.register_fake
def _(grad: object, x: torch.Tensor, norm: torch.Tensor, weight: object) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), norm.new_empty(2, x.shape[2])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, weight, bias = inputs
    ctx.save_for_backward(x, output[1], weight)
    ctx.bias_dtype = bias.dtype
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: torch.Tensor, _: object) -> tuple[torch.Tensor, ...]:
    x, norm, weight = ctx.saved_tensors
    grad_x, (in_weight, in_bias) = _grn_backward(grad, x, norm, weight)
    return grad_x, in_weight.to(weight.dtype), in_bias.to(ctx.bias_dtype)


_grn.register_autograd(_backward, setup_context=_save)
