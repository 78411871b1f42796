"""attention: softmax(q·kᵀ/√Dh)·v for short sequences, straight from the packed projection, in one of three ways.

Which one runs is asked for in fastmae/ops/backends.py; ``auto`` looks up what was measured on the device at hand.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from fastmae.files import write_text
from fastmae.ops.backends import asked_backends, triton_runs_on

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TRITON_TOKENS = 320
TRITON_HEAD_DIMS = (32, 64, 80)

SHIPPED_TABLE = Path(__file__).with_name("attention_table.json")
NEAREST = 1.25  # a measurement at S tokens speaks for sequences up to so many times longer or shorter
TABLE_BYTES = 1 << 20
NOT_MEASURED = "not measured on this device: fastmae bench attention --write"


def attention(packed: torch.Tensor, queries: torch.Tensor | None = None) -> torch.Tensor:
    """Multi-head attention without mask or dropout (Vaswani et al. 2017, equation 1).

    Args:
        packed: floating [N, S, 3, H, Dh], queries, keys and values as one projection leaves them; or
            [N, S, 2, H, Dh], keys and values, when the queries come apart. Any strides.
        queries: [N, T, H, Dh] with 1 ≤ T ≤ S, of the dtype and device of ``packed``: for when only some tokens ask.

    Returns:
        [N, T, H, Dh] (T = S without ``queries``) in the dtype of ``packed``, or of autocast inside its region, as
        torch's own attention. Differentiable in both arguments. Equivalent to ``attention_reference``.

    Raises:
        ValueError: a wrong shape, dtype or device; a backend that was asked for and cannot do it.
    """
    device = packed.device.type
    if torch.is_autocast_enabled(device) and packed.dtype != torch.float64:
        packed = packed.to(torch.get_autocast_dtype(device))
        queries = None if queries is None else queries.to(packed.dtype)
    _check(packed, queries)
    name, _ = attention_backend(packed.device, packed.dtype, packed.shape[1], packed.shape[4])
    if name == "sdpa":
        q, k, v = (x.transpose(1, 2) for x in _unpack(packed, queries))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    return _attention(packed, queries, name)[0]


def attention_reference(packed: torch.Tensor, queries: torch.Tensor | None = None) -> torch.Tensor:
    """The definition, in PyTorch: two matrix products with a softmax between them."""
    q, k, v = (x.transpose(1, 2) for x in _unpack(packed, queries))
    scores = q @ k.transpose(2, 3) / q.shape[3] ** 0.5
    return (scores.softmax(dim=3) @ v).transpose(1, 2)


def _unpack(packed: torch.Tensor, queries: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """Views q [N, T, H, Dh], k and v [N, S, H, Dh]."""
    return packed.unbind(2) if queries is None else (queries, *packed.unbind(2))


def _check(packed: torch.Tensor, queries: torch.Tensor | None) -> None:
    count = 3 if queries is None else 2
    if packed.ndim != 5 or packed.shape[2] != count or 0 in (packed.shape[1], *packed.shape[3:]):
        form = "[N, S, 3, H, Dh] without queries" if queries is None else "[N, S, 2, H, Dh] with queries"
        raise ValueError(f"packed must have shape {form}, got {list(packed.shape)}")
    if packed.dtype not in DTYPES:
        raise ValueError(f"packed must be one of {', '.join(map(_short, DTYPES))}, got {_short(packed.dtype)}")
    if queries is None:
        return
    N, S, _, H, D = packed.shape
    if queries.ndim != 4 or (queries.shape[0], *queries.shape[2:]) != (N, H, D) or not 1 <= queries.shape[1] <= S:
        raise ValueError(f"queries must have shape [{N}, 1 to {S}, {H}, {D}], got {list(queries.shape)}")
    if queries.dtype != packed.dtype:
        raise ValueError(f"queries must be {_short(packed.dtype)} as packed is, got {_short(queries.dtype)}")
    if queries.device != packed.device:
        raise ValueError(f"queries must be on {packed.device} as packed is, got {queries.device}")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- which one runs -------------------------------------------------------------------------------------------------


def attention_backend(device: torch.device, dtype: torch.dtype, S: int, head_dim: int) -> tuple[str, str]:
    """(``sdpa``, ``xformers`` or ``triton``; why) for sequences of S tokens with heads of ``head_dim`` numbers.

    ``auto`` takes the winner of the nearest measurement, if one lies within a factor of 1.25 of S; the user's table
    goes before the shipped one. float64 is always ``sdpa``, as the kernels of all ops leave it to torch.

    Raises:
        ValueError: what was asked for cannot run here, or a table is damaged.
    """
    asked = asked_backends().attention
    if dtype == torch.float64:
        return "sdpa", "float64 is for torch alone"
    if asked != "auto":
        if refusal := _refusal(asked, device, dtype, S, head_dim):
            raise ValueError(f"attention '{asked}' {refusal}; choose auto or sdpa")
        return asked, "asked for"
    if device.type != "cuda":
        return "sdpa", f"torch's own on {device.type}"
    for measured in _measurements(device, dtype):
        near = [(max(S / at, at / S), at, name, where) for at, dim, name, where in measured if dim == head_dim]
        distance, at, name, where = min(near, default=(NEAREST + 1, 0, "", ""))
        if distance <= NEAREST:
            if refusal := _refusal(name, device, dtype, S, head_dim):
                return "sdpa", f"{name} was faster at {at} tokens ({where}), but it {refusal}"
            return name, f"fastest at {at} tokens ({where})"
    return "sdpa", NOT_MEASURED


def _refusal(name: str, device: torch.device, dtype: torch.dtype, S: int, head_dim: int) -> str:
    """Why a backend cannot run, as the end of a sentence that starts with its name; empty if it can."""
    if name == "sdpa":
        return ""
    # Without tensor cores, float32 would spill registers in Triton; xformers does not take it.
    if dtype not in (torch.bfloat16, torch.float16):
        return f"does bfloat16 and float16, got {_short(dtype)}"
    if name == "triton":
        if not _runs("triton", device):
            return f"needs Triton and a CUDA device, got {device.type}"
        if S > TRITON_TOKENS:
            return f"does 1 to {TRITON_TOKENS} tokens, got {S}"
        if head_dim not in TRITON_HEAD_DIMS:
            return f"does heads of {', '.join(map(str, TRITON_HEAD_DIMS))} numbers, got {head_dim}"
    if name == "xformers":
        if not _runs("xformers", device):
            return f"needs a CUDA device and pip install xformers, got {device.type}"
        if head_dim % 8 or head_dim > 256:
            return f"does heads of a multiple of 8 numbers up to 256, got {head_dim}"
    return ""


# torch.compile takes the answers of these two as constants: what they look at (the machine, its files) it cannot trace.


@torch.compiler.assume_constant_result
def _runs(name: str, device: torch.device) -> bool:
    if name == "triton":
        return triton_runs_on(device)
    return device.type == "cuda" and importlib.util.find_spec("xformers") is not None


@torch.compiler.assume_constant_result
def _measurements(
    device: torch.device, dtype: torch.dtype
) -> tuple[tuple[tuple[int, int, str, str], ...], tuple[tuple[int, int, str, str], ...]]:
    """What the user's and the shipped table say of a device: (tokens, head_dim, backend, where it was measured).

    Measurements on a GPU of the same name, or else on any of the same compute capability.
    """
    gpu = torch.cuda.get_device_name(device)
    capability = ".".join(map(str, torch.cuda.get_device_capability(device)))

    def of(path: Path) -> tuple[tuple[int, int, str, str], ...]:
        fitting = [entry for entry in _cached_table(path) if entry["dtype"] == _short(dtype)]
        same = [entry for entry in fitting if entry["device"] == gpu]
        same = same or [entry for entry in fitting if entry["capability"] == capability]
        return tuple((entry["S"], entry["head_dim"], entry["backend"], f"{entry['device']}, {path}") for entry in same)

    return of(user_table()), of(SHIPPED_TABLE)


# --- the table ------------------------------------------------------------------------------------------------------


def user_table() -> Path:
    """Where a user's own measurements are kept: ``$XDG_CACHE_HOME`` or ``~/.cache``, then fastmae/attention.json."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastmae" / "attention.json"


def read_table(path: Path) -> list[dict[str, Any]]:
    """The entries of a table, none if there is no such file.

    An entry has ``device`` (the GPU's name), ``capability`` ("9.0"), ``dtype`` ("bfloat16"), ``S``, ``head_dim`` and
    ``backend`` (the fastest), and whatever else the benchmark notes.

    Raises:
        ValueError: the file cannot be read, or is not a table.
    """
    try:
        if path.stat().st_size > TABLE_BYTES:
            raise ValueError(f"more than {TABLE_BYTES} bytes")
        table = json.loads(path.read_bytes())
        if not isinstance(table, dict) or not isinstance(table.get("entries"), list):
            raise ValueError("no list of entries")
        for entry in table["entries"]:
            _check_entry(entry)
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no table of attention backends ({error}); delete or reinstall it") from None
    return table["entries"]


def write_table(path: Path, entries: Iterable[dict[str, Any]]) -> None:
    """Merges entries (see ``read_table``) into a table, in place of those of the same device, dtype and shape.

    The file is replaced whole or not at all.

    Raises:
        ValueError: an entry is malformed, or the file is there but not a table. OSError: it cannot be written.
    """
    entries = list(entries)
    for entry in entries:
        _check_entry(entry)
    merged = {tuple(entry[key] for key in KEY): entry for entry in [*read_table(path), *entries]}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({"entries": [merged[key] for key in sorted(merged)]}, indent=1) + "\n")
    _cached_table.cache_clear()


KEY = ("device", "capability", "dtype", "head_dim", "S")
ALLOWED = {"dtype": tuple(map(_short, DTYPES)), "backend": ("sdpa", "xformers", "triton")}


def _check_entry(entry: object) -> None:
    for key in (*KEY, "backend"):
        value = entry.get(key) if isinstance(entry, dict) else None
        number = key in ("S", "head_dim")
        good = (
            type(value) is int and value > 0 if number else isinstance(value, str) and value in ALLOWED.get(key, value)
        )
        if not good:
            allowed = "a positive integer" if number else " or ".join(ALLOWED.get(key, ("a text",)))
            raise ValueError(f"entry {entry!r:.200}: {key} must be {allowed}")


_cached_table = lru_cache(maxsize=8)(read_table)


# --- the kernels as torch ops ---------------------------------------------------------------------------------------


@torch.library.custom_op("fastmae::attention", mutates_args=())
def _attention(packed: torch.Tensor, queries: torch.Tensor | None, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [N, T, H, Dh], log-sum-exp of its rows float32 [N, H, T], the base being the backend's own)."""
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
    """[gradient of packed], and that of queries behind it if there are any."""
    q, k, v = (_dense_heads(x) for x in _unpack(packed, queries))
    gradients = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in _present(packed, queries)]
    dq, dk, dv = _unpack(*gradients, *[None] * (2 - len(gradients)))
    if backend == "triton":
        from fastmae.kernels.attention import attention_backward_triton

        attention_backward_triton(grad, q, k, v, out, lse, dq, dk, dv)
    else:
        fmha = importlib.import_module("xformers.ops.fmha")
        made = fmha.memory_efficient_attention_backward(grad.contiguous(), out, lse, q, k, v)
        for place, gradient in zip((dq, dk, dv), made, strict=True):
            place.copy_(gradient)
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
    return [packed] if queries is None else [packed, queries]


def _dense_heads(x: torch.Tensor) -> torch.Tensor:
    """The kernels read a head's Dh numbers one after another, and count within an image in 32 bits."""
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
