"""The number format of a step: float32, float32 with TF32 products, or bfloat16 autocast over float32 weights.

With bfloat16 the products of the encoder's blocks may be float8 (``step.in_float8``).
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from fastmae.errors import SettingError


@dataclass(frozen=True)
class Precision:
    """A number format, and why it was chosen."""

    name: str
    reason: str
    autocast: torch.dtype | None

    def context(self, device: torch.device) -> torch.autocast:
        """Returns the autocast region of a forward pass, which does nothing for fp32.

        Casts are not cached: a forward pass uses a weight once, and a CUDA graph must not refer to freed memory.
        """
        dtype = self.autocast or torch.bfloat16
        return torch.autocast(device.type, dtype=dtype, enabled=self.autocast is not None, cache_enabled=False)

    @contextmanager
    def products(self) -> Generator[None]:
        """Rounds the factors of float32 matrix products to TF32, forward and backward, while entered, if asked for."""
        before = torch.get_float32_matmul_precision()
        if self.name == "tf32":
            torch.set_float32_matmul_precision("high")
        try:
            yield
        finally:
            if self.name == "tf32":
                torch.set_float32_matmul_precision(before)


def choose_precision(flag: str, device: torch.device) -> Precision:
    """Returns the format of --precision. ``auto`` is bf16 on a GPU that supports it, otherwise fp32.

    Raises:
        UserError: the device does not support the format.
    """
    if flag == "tf32" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0)):
        has_none = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
        raise SettingError("precision", "tf32", f"{has_none} has no TensorFloat-32; use fp32")
    supported = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if flag == "bf16" and not supported:
        raise SettingError("precision", "bf16", f"{torch.cuda.get_device_name(device)} has no bfloat16; use fp32")
    if flag != "auto":
        return Precision(flag, "asked for", torch.bfloat16 if flag == "bf16" else None)
    if device.type == "cuda" and supported:
        return Precision("bf16", "the GPU has bfloat16", torch.bfloat16)
    reason = "the GPU has no bfloat16" if device.type == "cuda" else "exact and reproducible on a CPU"
    return Precision("fp32", reason, None)


def require_float8(device: torch.device, precision: Precision) -> None:
    """Refuses --float8 where it cannot work.

    Raises:
        UserError: the device has no float8 products, or the other numbers are not bf16.
    """
    has_none = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        raise SettingError(
            "float8", problem=f"{has_none} has no float8 products, which Ada and newer GPUs have; leave it out"
        )
    if precision.name != "bf16":
        raise SettingError("float8", problem=f"goes with --precision=bf16, not {precision.name}; leave one out")
