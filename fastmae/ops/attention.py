"""attention: softmax(q·kᵀ/√Dh)·v for short sequences, directly from the packed projection, in one of nine ways.

``attention_backend`` chooses one: what fastmae/ops/backends.py asks for; with ``auto``, the process's choice on a CPU,
and on a GPU the winner of a table of measurements (attention_table.py) or of a prediction. torch's own attention is
called directly, with the kernel that torch takes (``sdpa``) or one of its kernels (``cudnn``, ``flash``), in the dtype
that it gets or in float32 (``sdpa-float32``: torch's backward pass in bfloat16 is slow on CPUs).
The others are one custom op, ``fastmae::attention``, with a backward of its own.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import register_flop_formula

from fastmae import _C
from fastmae.errors import install_hint
from fastmae.ops import cpu
from fastmae.ops.attention_table import DTYPES, TAKEN_BY_AUTO, dtype_name, measurements
from fastmae.ops.backends import asked_backends, autocast_dtype, is_differentiable, op_choice, triton_runs_on
from fastmae.torch_compat import constant_when_compiled, is_exporting

TRITON_TOKENS = 320
TRITON_HEAD_DIMS = (32, 64, 80)
# Where Triton is predicted to be faster than torch (benchmarks/LOG.md); for heads of 80 numbers it is not.
PREDICTED_ON = ((8, 0), (9, 0), (10, 0))
PREDICTED_HEAD_DIMS = (32, 64)
OF_TORCH = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "math": SDPBackend.MATH,  # of operations that can be differentiated again
}
OF_TORCH_HEAD_DIMS = {"cudnn": 128, "flash": 256}
# What the ways for CPUs alone compute in another way than torch does.
CPU_DTYPES = {
    "sdpa-float32": (torch.bfloat16, torch.float16),
    "cpu": (torch.float32, torch.bfloat16),
    "cpu-dot": (torch.bfloat16,),
    "cpu-amx": (torch.bfloat16,),
}
# What multiplies in C++; see fastmae/ops/cpu.py.
CPU_PRODUCTS = {"cpu": "float32", "cpu-dot": "dot", "cpu-amx": "amx"}

CPU = torch.device("cpu")
NEAREST = 1.25  # a measurement at S tokens holds for sequences up to so many times longer or shorter
NOT_MEASURED = "not measured on this device: fastmae bench attention --write"


def attention(packed: torch.Tensor, queries: torch.Tensor | None = None) -> torch.Tensor:
    """Computes multi-head attention without mask or dropout (Vaswani et al. 2017, equation 1).

    Args:
        packed: floating [N, S, 3, H, Dh], queries, keys and values as one projection writes them; or
            [N, S, 2, H, Dh], keys and values, if ``queries`` are given. Any strides.
        queries: [N, T, H, Dh] with T ≥ 1, of the dtype and device of ``packed``; for queries of only some of the
            tokens, or of other tokens.

    Returns:
        [N, T, H, Dh] (T = S without ``queries``) in the dtype of ``packed``, or of autocast inside its region, like
        torch's own attention. Differentiable in both arguments. Equivalent to ``attention_reference``.

    Raises:
        ValueError: a shape, dtype or device is wrong, or the backend that was asked for cannot do it.
    """
    autocast = autocast_dtype(packed.device)
    if autocast is not None and packed.dtype != torch.float64:
        packed = packed.to(autocast)
        queries = None if queries is None else queries.to(packed.dtype)
    _check(packed, queries)
    S, T = packed.shape[1], packed.shape[1] if queries is None else queries.shape[1]
    name, _ = attention_backend(packed.device, packed.dtype, S, packed.shape[4], T)
    if is_differentiable():
        name = "math"
    if name == "sdpa":
        return _sdpa(*_unpack(packed, queries))
    if name in OF_TORCH:
        with sdpa_kernel(OF_TORCH[name]):
            return _sdpa(*_unpack(packed, queries))
    if name == "sdpa-float32":
        with torch.autocast(packed.device.type, enabled=False):
            return _sdpa(*(x.float() for x in _unpack(packed, queries))).to(packed.dtype)
    return _attention(packed, queries, name)[0]


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Computes it by torch's own function, which has the heads before the tokens."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def attention_reference(packed: torch.Tensor, queries: torch.Tensor | None = None) -> torch.Tensor:
    """Defines the op in PyTorch: two matrix products with a softmax between them."""
    values = _unpack(packed, queries)[2].transpose(1, 2)
    return (attention_weights(packed, queries) @ values).transpose(1, 2)


def attention_weights(packed: torch.Tensor, queries: torch.Tensor | None = None) -> torch.Tensor:
    """Returns the softmax [N, H, T, S] by which ``attention_reference`` multiplies the values."""
    q, k, _ = (x.transpose(1, 2) for x in _unpack(packed, queries))
    return (q @ k.transpose(2, 3) / q.shape[3] ** 0.5).softmax(dim=3)


def _unpack(packed: torch.Tensor, queries: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """Returns views q [N, T, H, Dh], k and v [N, S, H, Dh]."""
    return packed.unbind(2) if queries is None else (queries, *packed.unbind(2))


def _check(packed: torch.Tensor, queries: torch.Tensor | None) -> None:
    """Refuses arguments of a wrong shape, dtype or device."""
    count = 3 if queries is None else 2
    if packed.ndim != 5 or packed.shape[2] != count or 0 in (packed.shape[1], *packed.shape[3:]):
        form = "[N, S, 3, H, Dh] without queries" if queries is None else "[N, S, 2, H, Dh] with queries"
        raise ValueError(f"packed must have shape {form}, got {list(packed.shape)}")
    if packed.dtype not in DTYPES:
        raise ValueError(f"packed must be one of {', '.join(map(dtype_name, DTYPES))}, got {dtype_name(packed.dtype)}")
    if queries is None:
        return
    N, _, _, H, D = packed.shape
    if queries.ndim != 4 or (queries.shape[0], *queries.shape[2:]) != (N, H, D) or queries.shape[1] < 1:
        raise ValueError(f"queries must have shape [{N}, at least 1, {H}, {D}], got {list(queries.shape)}")
    if queries.dtype != packed.dtype:
        raise ValueError(f"queries must be {dtype_name(packed.dtype)} as packed is, got {dtype_name(queries.dtype)}")
    if queries.device != packed.device:
        raise ValueError(f"queries must be on {packed.device} as packed is, got {queries.device}")


# --- the choice of a backend ------------------------------------------------------------------------------------------


def attention_backend(
    device: torch.device, dtype: torch.dtype, S: int, head_dim: int, T: int | None = None
) -> tuple[str, str]:
    """Chooses (a name of ``Backends.attention``; why) for S tokens with heads of ``head_dim`` numbers.

    On a GPU ``auto`` takes the winner of the nearest measurement, if one lies within a factor of 1.25 of S; the user's
    table goes before the shipped one, and a prediction comes last. On a CPU it takes what the process's choice says for
    S keys and T queries, by default as many; that is ``sdpa`` unless it was measured, or if the ops are the
    reference's. float64 is always ``sdpa``, as the kernels of all ops leave it to torch, and so is a program that is
    exported.

    Raises:
        ValueError: what was asked for cannot run here, or a table is damaged.
    """
    asked = asked_backends().attention
    if dtype == torch.float64:
        return "sdpa", "float64 is for torch alone"
    if is_exporting():
        return "sdpa", "an exported program knows torch's ops alone"
    if asked != "auto":
        unmet = unmet_requirement(asked, device, dtype, S, head_dim)
        if unmet is not None:
            raise ValueError(f"attention '{asked}' needs {unmet}; choose auto or sdpa")
        return asked, "asked for"
    if device.type == "cuda":
        return _fastest_on_gpu(device, dtype, S, head_dim)
    if device.type == "cpu":
        name = op_choice("attention", (S, S if T is None else T, head_dim), dtype)
        if name != "sdpa" and unmet_requirement(name, device, dtype, S, head_dim) is None:
            return name, "as in version 0.1" if asked_backends().choices.rules == "0.1" else "measured to be faster"
        unmet = unmet_requirement("cpu", device, dtype, S, head_dim) if dtype in CPU_DTYPES["cpu"] else None
        if unmet is not None:
            return "sdpa", f"torch's own, as C++ needs {unmet}"
    return "sdpa", f"torch's own on {device.type}"


def _fastest_on_gpu(device: torch.device, dtype: torch.dtype, S: int, head_dim: int) -> tuple[str, str]:
    """Chooses the winner of the nearest measurement on this GPU, ``sdpa`` if that cannot run; and if none is near,
    what is predicted."""
    for table in measurements(device, dtype):
        same_head = [
            (max(S / tokens, tokens / S), tokens, name, where)
            for tokens, D, name, where in table
            if head_dim == D and name in TAKEN_BY_AUTO
        ]
        distance, tokens, name, where = min(same_head, default=(math.inf, 0, "", ""))
        if distance <= NEAREST:
            unmet = unmet_requirement(name, device, dtype, S, head_dim)
            if unmet is not None:
                return "sdpa", f"{name} was faster at {tokens} tokens ({where}), but it needs {unmet}"
            return name, f"fastest at {tokens} tokens ({where})"
    is_predicted = head_dim in PREDICTED_HEAD_DIMS and _capability(device) in PREDICTED_ON
    if is_predicted and unmet_requirement("triton", device, dtype, S, head_dim) is None:
        return "triton", f"predicted, {NOT_MEASURED}"
    if head_dim not in TRITON_HEAD_DIMS:
        return "sdpa", f"{NOT_MEASURED}; Triton takes heads of {', '.join(map(str, TRITON_HEAD_DIMS))} numbers"
    return "sdpa", NOT_MEASURED


def unmet_requirement(name: str, device: torch.device, dtype: torch.dtype, S: int, head_dim: int) -> str | None:
    """Returns what a backend needs and does not get ("float32, got bfloat16"); None if it can run."""
    if name == "sdpa":
        return None
    if name in CPU_DTYPES:
        if device.type != "cpu":
            return f"a CPU, got {device.type}"
        if dtype not in CPU_DTYPES[name]:
            return f"{' or '.join(map(dtype_name, CPU_DTYPES[name]))}, got {dtype_name(dtype)}"
        if name == "cpu-dot" and not _multiplies_by("dot"):
            return "a processor with AVX512-BF16, got one without"
        if name == "cpu-amx" and not _multiplies_by("amx"):
            return "a processor with AMX that the kernel grants and that agrees with float32, got none"
        if name == "sdpa-float32":
            return None
        if head_dim % 16 or head_dim > 128:
            return f"heads of a multiple of 16 numbers up to 128, got {head_dim}"
        return None
    if name in OF_TORCH:
        return _unmet_by_torch(name, device, dtype, head_dim)
    if not _is_installed(name, device):
        package = "Triton" if name == "triton" else f"xformers ({install_hint('cuda')})"
        return f"{package} and a CUDA device, got {device.type}"
    # Without tensor cores, float32 would spill registers in Triton; xformers does not take it.
    if dtype not in (torch.bfloat16, torch.float16):
        return f"bfloat16 or float16, got {dtype_name(dtype)}"
    if name == "triton" and S > TRITON_TOKENS:
        return f"1 to {TRITON_TOKENS} tokens, got {S}"
    if name == "triton" and head_dim not in TRITON_HEAD_DIMS:
        return f"heads of {', '.join(map(str, TRITON_HEAD_DIMS))} numbers, got {head_dim}"
    if name == "xformers" and (head_dim % 8 or head_dim > 256):
        return f"heads of a multiple of 8 numbers up to 256, got {head_dim}"
    return None


def _unmet_by_torch(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """The same for one of torch's own kernels."""
    if name == "flash" and device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"a CUDA device, got {device.type}"
    if _capability(device) < (8, 0):
        return f"a GPU of compute capability 8.0 or higher, got {'.'.join(map(str, _capability(device)))}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"bfloat16 or float16, got {dtype_name(dtype)}"
    if head_dim % 8 or head_dim > OF_TORCH_HEAD_DIMS[name]:
        return f"heads of a multiple of 8 numbers up to {OF_TORCH_HEAD_DIMS[name]}, got {head_dim}"
    return None


def cpu_candidates(dtype: torch.dtype, S: int, T: int, head_dim: int) -> tuple[str, ...]:
    """Returns the ways that can compute attention of T queries to S tokens on this CPU, torch's own first.

    Which of them is the fastest depends on the processor, the dtype and the shape: it has to be measured.
    """
    others = (name for name in CPU_DTYPES if unmet_requirement(name, CPU, dtype, max(S, T), head_dim) is None)
    return "sdpa", *others


@constant_when_compiled
def _multiplies_by(products: str) -> bool:
    """Tells whether this processor can multiply bfloat16 so; a constant to torch.compile, which cannot trace C++."""
    return products in _C.attention_products() and (products != "amx" or cpu.agrees_with_float32(products))


@constant_when_compiled
def _capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a GPU; a constant to torch.compile."""
    return torch.cuda.get_device_capability(device)


@constant_when_compiled
def _is_installed(name: str, device: torch.device) -> bool:
    """Tells whether this machine has it; a constant to torch.compile, which cannot trace the search for a package."""
    if name == "triton":
        return triton_runs_on(device)
    return device.type == "cuda" and importlib.util.find_spec("xformers") is not None


# --- the kernels as torch ops ---------------------------------------------------------------------------------------


@torch.library.custom_op("fastmae::attention", mutates_args=())
def _attention(packed: torch.Tensor, queries: torch.Tensor | None, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns out [N, T, H, Dh] and the log-sum-exp of its rows float32 [N, H, T], whose base depends on the backend.

    The backward pass of the same backend computes the softmax again from the log-sum-exp.
    """
    if backend.startswith("cpu"):
        return cpu.attention(*_for_cpp(packed, queries), CPU_PRODUCTS[backend])
    q, k, v = (_dense_heads(x) for x in _unpack(packed, queries))
    if backend == "triton":
        from fastmae.kernels.attention import attention_forward_triton

        return attention_forward_triton(q, k, v)
    fmha = importlib.import_module("xformers.ops.fmha")
    out, lse = fmha.memory_efficient_attention_forward_requires_grad(q, k, v)
    return out.contiguous(), lse[:, :, : q.shape[1]].contiguous()


@_attention.register_fake
def _(packed: torch.Tensor, queries: torch.Tensor | None, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    N, T, H, D = _unpack(packed, queries)[0].shape
    return packed.new_empty(N, T, H, D), packed.new_empty(N, H, T, dtype=torch.float32)


@torch.library.custom_op("fastmae::attention_backward", mutates_args=())
def _attention_backward(
    grad: torch.Tensor,
    packed: torch.Tensor,
    queries: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    backend: str,
) -> list[torch.Tensor]:
    """Returns the gradient of packed, and after it that of queries if there are any.

    An op cannot return None in place of a tensor, so the list has one or two entries.
    """
    gradients = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in _present(packed, queries)]
    if backend.startswith("cpu"):
        arguments = _dense_heads(grad), *_for_cpp(packed, queries), lse, *_for_cpp(*gradients)
        cpu.attention_backward(*arguments, CPU_PRODUCTS[backend])
        return gradients
    q, k, v = (_dense_heads(x) for x in _unpack(packed, queries))
    # Views of the gradients, so that what is written to them lands in the packed layout.
    dq, dk, dv = _unpack(*gradients, *[None] * (2 - len(gradients)))
    if backend == "triton":
        from fastmae.kernels.attention import attention_backward_triton

        attention_backward_triton(grad, q, k, v, out, lse, dq, dk, dv)
    else:
        fmha = importlib.import_module("xformers.ops.fmha")
        results = fmha.memory_efficient_attention_backward(grad.contiguous(), out, lse, q, k, v)
        for view, gradient in zip((dq, dk, dv), results, strict=True):
            view.copy_(gradient)
    return gradients


@_attention_backward.register_fake
def _(
    grad: torch.Tensor,
    packed: torch.Tensor,
    queries: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    backend: str,
) -> list[torch.Tensor]:
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in _present(packed, queries)]


def _present(packed: torch.Tensor, queries: torch.Tensor | None) -> list[torch.Tensor]:
    """Returns the arguments that are not None."""
    return [packed] if queries is None else [packed, queries]


def _for_cpp(packed: torch.Tensor, queries: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns views of four axes, which the extension takes: the heads of the parts of ``packed`` are side by side."""
    return _dense_heads(packed.flatten(2, 3)), None if queries is None else _dense_heads(queries)


def _dense_heads(x: torch.Tensor) -> torch.Tensor:
    """Copies a tensor if the kernels cannot read it.

    They need the Dh numbers of a head one after another, and offsets within an image that fit into 32 bits.
    """
    small = sum(length * stride for length, stride in zip(x.shape[1:], x.stride()[1:], strict=True)) < 2**31
    return x if x.stride(3) == 1 and small else x.contiguous()


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    packed, queries, ctx.backend = inputs
    ctx.save_for_backward(packed, queries, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: torch.Tensor | None, _: None) -> tuple[torch.Tensor | None, ...]:
    if grad is None:
        return None, None, None
    gradients = _attention_backward(grad, *ctx.saved_tensors, ctx.backend)
    return gradients[0], gradients[1] if len(gradients) > 1 else None, None


_attention.register_autograd(_backward, setup_context=_save)


# What the backward pass computes again is counted too, as torch counts its own attention: 2 products, then 5.


@register_flop_formula(torch.ops.fastmae.attention)
def _flops(packed: torch.Size, queries: torch.Size | None, backend: str, **_: Any) -> int:
    asking = math.prod(packed) // 3 if queries is None else math.prod(queries)
    return 2 * 2 * asking * packed[1]


@register_flop_formula(torch.ops.fastmae.attention_backward)
def _flops_backward(grad: torch.Size, packed: torch.Size, *_: Any, **__: Any) -> int:
    return 5 * 2 * math.prod(grad) * packed[1]
