"""gelu: a bias and the exact GELU after it, in one pass; backward the gradients of both in one pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fastmae.ops import cpu
from fastmae.ops.backends import ops_backend
from fastmae.ops.checks import check_devices, check_floating


def gelu(h: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Computes GELU(h + bias), where GELU(x) = x·Φ(x) and Φ is the normal distribution (Hendrycks and Gimpel 2016).

    Args:
        h: floating [..., F], any strides.
        bias: floating [F] of any dtype, or None.

    Returns:
        [..., F] in the dtype of ``h``, computed in float32, or in float64 if ``h`` is: h + bias is not rounded to the
        dtype of ``h``. Differentiable in both; only ``h`` and ``bias`` are kept for that, and the gradient of the bias
        is added up in float32 in the pass that writes the gradient of ``h``. Equivalent to ``gelu_reference``.

    Raises:
        ValueError: a dtype, shape or device is wrong.
    """
    check_floating("h", h.dtype)
    if h.ndim == 0:
        raise ValueError("h must have shape [..., F], got []")
    if bias is not None:
        check_floating("bias", bias.dtype)
        if bias.shape != h.shape[-1:]:
            raise ValueError(f"bias must have shape {list(h.shape[-1:])}, got {list(bias.shape)}")
        check_devices(h=h, bias=bias)
    return _gelu(h, bias)


def gelu_backward(
    grad: torch.Tensor, h: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns the gradients of h [..., F] and of bias [F], each in its dtype, from that of ``gelu(h, bias)``."""
    gradients = _gelu_backward(grad, h, bias, False)
    return gradients[0], None if bias is None else gradients[1].to(bias.dtype)


def gelu_again_and_backward(
    grad: torch.Tensor, h: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Returns ``gelu(h, bias)`` once more, and the gradients of ``gelu_backward``: all in one pass over h."""
    grad_h, *grad_bias, out = _gelu_backward(grad, h, bias, True)
    return out, grad_h, None if bias is None else grad_bias[0].to(bias.dtype)


def gelu_reference(h: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Defines the op in PyTorch."""
    return F.gelu(_argument(h, bias)).to(h.dtype)


def _argument(h: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Returns h + bias in the dtype of the arithmetic."""
    compute = torch.float64 if h.dtype == torch.float64 else torch.float32
    return h.to(compute) if bias is None else h.to(compute) + bias.to(compute)


@torch.library.custom_op("fastmae::gelu", mutates_args=())
def _gelu(h: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    backend = ops_backend(h.device, h.dtype)
    if backend == "cpu":
        return cpu.gelu(h, bias)
    if backend == "triton":
        from fastmae.kernels.gelu import gelu_triton

        return gelu_triton(h, bias)
    return gelu_reference(h, bias).contiguous()


@_gelu.register_fake
def _(h: torch.Tensor, bias: object) -> torch.Tensor:
    return h.new_empty(h.shape)


@torch.library.custom_op("fastmae::gelu_backward", mutates_args=())
def _gelu_backward(
    grad: torch.Tensor, h: torch.Tensor, bias: torch.Tensor | None, with_output: bool
) -> list[torch.Tensor]:
    """Returns the gradient of h [..., F] in its dtype; that of the bias [F], if there is one; if asked for, the output.

    The second is in the dtype of the arithmetic, the third, [..., F], is what ``gelu`` returned. An op cannot return
    None in place of a tensor.
    """
    backend = ops_backend(h.device, h.dtype, grad.dtype)
    if backend == "cpu":
        return cpu.gelu_backward(grad, h, bias, with_output)
    if backend == "triton":
        from fastmae.kernels.gelu import gelu_backward_triton

        return gelu_backward_triton(grad, h, bias, with_output)
    argument = _argument(h, bias)
    grad_h = torch.ops.aten.gelu_backward(grad.to(argument.dtype), argument)
    results = [grad_h.to(h.dtype, copy=True).contiguous()]
    if bias is not None:
        results.append(grad_h.flatten(0, -2).sum(dim=0))
    if with_output:
        results.append(F.gelu(argument).to(h.dtype).contiguous())
    return results


@_gelu_backward.register_fake
def _(grad: object, h: torch.Tensor, bias: torch.Tensor | None, with_output: bool) -> list[torch.Tensor]:
    compute = torch.float64 if h.dtype == torch.float64 else torch.float32
    of_bias = [] if bias is None else [h.new_empty(h.shape[-1:], dtype=compute)]
    return [h.new_empty(h.shape), *of_bias, *([h.new_empty(h.shape)] if with_output else [])]


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return gelu_backward(grad, *ctx.saved_tensors)


_gelu.register_autograd(_backward, setup_context=_save)
