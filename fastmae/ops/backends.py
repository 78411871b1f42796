"""The choice of the implementation of the ops and of attention: one per process, made once at its start."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastmae import _C
from fastmae.ops.attention_table import dtype_name
from fastmae.ops.choices import CANDIDATES, TORCHS_OWN, Choices, Table, at_shape, taken_by_0_1
from fastmae.torch_compat import constant_when_compiled, is_exporting, is_transforming

OPS = ("auto", "triton", "cpu", "reference")
ATTENTION = ("auto", "sdpa", "cudnn", "flash", "xformers", "triton", "sdpa-float32", "cpu", "cpu-dot", "cpu-amx")
# Names of version 0.1, which its run folders hold.
OLD_NAMES = {"native": "cpu"}


@dataclass(frozen=True)
class Backends:
    """The implementations that were asked for. ``auto`` is decided per device, and for attention per shape as well.

    ``native``, as version 0.1 called the C++ implementations, is read as ``cpu``.
    """

    ops: str = "auto"
    """``triton`` (a CUDA device), ``cpu`` (C++ on a CPU), ``reference`` (the PyTorch that defines the ops)."""
    attention: str = "auto"
    """``sdpa`` (torch chooses), ``cudnn`` and ``flash`` (of torch's), ``xformers``, ``triton``; on a CPU also ``cpu``
    (C++), ``cpu-dot`` and ``cpu-amx`` (C++ with the processor's dot products or tiles of bfloat16) and ``sdpa-float32``
    (torch's in float32 for what is bfloat16 or float16)."""
    choices: Choices = TORCHS_OWN
    """What ``auto`` takes on a CPU for each product, attention and other call: torch's own, unless it was measured."""
    check_ids: bool = False
    """For debugging: check patch numbers on a GPU too, which waits for the GPU. On a CPU they are always checked."""
    differentiable: bool = False
    """Compute all ops and attention by torch's own operations, whose gradients have gradients; see the function."""

    def __post_init__(self) -> None:
        for name, values in (("ops", OPS), ("attention", ATTENTION)):
            asked = getattr(self, name)
            value = OLD_NAMES.get(asked, asked)
            if value not in values:
                raise ValueError(f"{name} must be one of {', '.join(values)}, got {asked!r}")
            object.__setattr__(self, name, value)


_asked = Backends()
# Names of what was asked for in this process. Compiled code is guarded by the name of what it was compiled for, so that
# other choices are compiled anew. It is a text, as the compiler may take a number for a variable.
_names: dict[Backends, str] = {}
_name = ""


def asked_backends() -> Backends:
    """Returns the implementations that were asked for last."""
    return _asked


def set_backends(backends: Backends) -> None:
    """Asks for other implementations from now on, in the whole process."""
    global _asked, _name
    _asked, _name = backends, _names.setdefault(backends, str(len(_names)))


@contextmanager
def using(**changes: Any) -> Iterator[None]:
    """Asks for other implementations inside a ``with`` block: ``with using(ops="reference"): …``."""
    before = asked_backends()
    set_backends(replace(before, **changes))
    try:
        yield
    finally:
        set_backends(before)


def differentiable() -> AbstractContextManager[None]:
    """Lets models and ops compute by torch's own operations alone inside a ``with`` block, in the whole process.

    These can be differentiated as often as you like, and by torch.func and in forward mode: for gradient penalties,
    products with the Hessian, or transforms inside of torch.compile. Only the forward pass has to be inside. Numbers
    are those of the other implementations to rounding; it is slower, and attention keeps its weights for the backward
    pass. It is not needed for a first gradient, also of images, nor where torch.func is called without torch.compile,
    which does this by itself.
    """
    return using(differentiable=True)


def is_differentiable() -> bool:
    """Tells whether everything is to be computed by torch's own operations: asked for, or torch.func is active."""
    return _asked_for_differentiable(_name) or is_transforming()


def refuse_second_gradient(gradient: torch.Tensor) -> None:
    """Says, in a backward pass that makes a graph of itself, what its forward pass needs for that.

    Raises:
        RuntimeError: gradients of gradients are wanted (``create_graph=True``), which kernels do not have.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        how = "`with fastmae.ops.differentiable():` around the forward pass"
        raise RuntimeError(f"a gradient of a gradient (create_graph=True) needs {how}")


def refusing_second_gradient(tokens: torch.Tensor) -> torch.Tensor:
    """Lets a backward pass that goes through these tokens say so if it cannot be differentiated again."""
    if tokens.requires_grad and not (torch.compiler.is_compiling() or is_differentiable()):
        tokens.register_hook(refuse_second_gradient)
    return tokens


@constant_when_compiled
def _asked_for_differentiable(name: str) -> bool:
    return asked_backends().differentiable


def op_choice(op: str, shape: tuple[int, ...], dtype: torch.dtype) -> str:
    """Returns which candidate computes a call on a CPU, as fastmae/ops/choices.py describes calls.

    A program that is exported, the reference's ops and ``differentiable`` have torch's own. A compiled function is
    compiled anew for other choices.
    """
    if not choices_hold():
        return CANDIDATES[op][0]
    if not torch.compiler.is_compiling():
        return asked_backends().choices.taken(op, shape, dtype_name(dtype))
    if asked_backends().choices.rules == "0.1":
        return taken_by_0_1(op, shape, dtype_name(dtype))
    return at_shape(_table(op, dtype, _name), op, shape)


def choices_hold() -> bool:
    """Tells whether anything but torch's own may be taken on a CPU."""
    backends = asked_backends()
    has_choices = backends.choices.rules != "torch" and backends.ops != "reference"
    return has_choices and not is_exporting() and not is_differentiable()


@constant_when_compiled
def _table(op: str, dtype: torch.dtype, name: str) -> Table:
    return asked_backends().choices.table(op, dtype_name(dtype))


def triton_runs_on(device: torch.device) -> bool:
    """Tells whether Triton runs on a device: a CUDA device, or a CPU with Triton's interpreter, which is for tests.

    The interpreter is chosen by the environment variable ``TRITON_INTERPRET=1``.
    """
    if importlib.util.find_spec("triton") is None:
        return False
    return device.type == "cuda" or (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")


def describe_ops(device: torch.device) -> str:
    """Describes ``ops_backend`` in words."""
    chosen = ops_backend(device)
    name = f"C++ ({_C.instruction_set()})" if chosen == "cpu" else {"triton": "Triton"}.get(chosen, "PyTorch")
    if asked_backends().ops != "auto":
        return f"{name}, asked for"
    return f"{name}, on a {'GPU' if device.type == 'cuda' else device.type.upper()}"


def ops_backend(device: torch.device, *dtypes: torch.dtype) -> str:
    """Returns the implementation of the five ops on ``device``: ``triton``, ``cpu`` or ``reference``.

    The kernels compute in float32, so float64 among the ``dtypes`` is left to the reference, whatever was asked for.

    Raises:
        ValueError: the implementation that was asked for cannot run there.
    """
    asked = asked_backends().ops
    if asked == "auto":
        asked = {"cuda": "triton", "cpu": "cpu"}.get(device.type, "reference")
    if asked == "triton" and not triton_runs_on(device):
        raise ValueError(f"ops 'triton' needs Triton and a CUDA device, got {device.type}; choose auto or reference")
    if asked == "cpu" and device.type != "cpu":
        raise ValueError(f"ops 'cpu' needs a CPU, got {device.type}; choose auto or triton")
    return "reference" if torch.float64 in dtypes else asked


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Returns the dtype of matrix products inside an autocast region; None outside of one."""
    has_autocast = torch.amp.is_autocast_available(device.type)  # torch.device("meta") has none
    return torch.get_autocast_dtype(device.type) if has_autocast and torch.is_autocast_enabled(device.type) else None


def uses_fused(op: str, x: torch.Tensor, dtype: torch.dtype, width: int | None = None) -> bool:
    """Tells whether a model computes with ``op``, ``add_layer_norm`` or ``gelu``, or with torch's own operations.

    ``x`` has the shape (but for the ``width``, if that is another) and the device, ``dtype`` is that of the branch or
    of what GELU is applied to. On a GPU with Triton it is the op, which moves fewer bytes than eager or compiled
    operations do (docs/kernels.md); on a CPU what was chosen, torch's own by default. An exported program has torch's
    own, and so have float64 and ``differentiable``.
    """
    if is_exporting() or is_differentiable():
        return False
    backend = _backend_of_models(x.device, dtype, _name)
    if backend == "cpu":
        return op_choice(op, (x.numel() // x.shape[-1], width or x.shape[-1]), dtype) == "cpu"
    return backend == "triton"


@constant_when_compiled
def _backend_of_models(device: torch.device, dtype: torch.dtype, name: str) -> str:
    return ops_backend(device, dtype)
