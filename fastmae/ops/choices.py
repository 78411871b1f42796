"""Which implementation computes a call on a CPU: torch's own, by the rules of version 0.1, or what was fastest here.

``Choices`` is plain data, kept in checkpoints and in a cache; fastmae/ops/tuning.py measures one. A process has one,
``asked_backends().choices``, to which the ops go for each call. Nothing here computes or measures.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

from fastmae import _C

# The candidates of each op, torch's own first. A call is described by a shape: (rows, inner, outer) of the product of a
# linear layer, [rows, inner]·[inner, outer] in the forward pass; (S, T, Dh) of attention, S keys, T queries; (rows,
# width) of the others. ``onednn-copy`` is oneDNN with our transposed copy. ``float32``: a product of bfloat16 numbers
# that is computed in float32.
CANDIDATES: dict[str, tuple[str, ...]] = {
    "linear_forward": ("torch", "onednn", "float32"),
    "linear_input": ("torch", "onednn", "float32"),
    "linear_weight": ("torch", "onednn", "onednn-copy", "float32"),
    "attention": ("sdpa", "sdpa-float32", "cpu", "cpu-dot", "cpu-amx"),
    "add_layer_norm": ("torch", "cpu"),
    "gelu": ("torch", "cpu"),
}
LINEAR = ("linear_forward", "linear_input", "linear_weight")
NUMBERS = {op: 3 if op in (*LINEAR, "attention") else 2 for op in CANDIDATES}  # of a shape
DTYPES = ("float32", "bfloat16")
RULES = ("torch", "0.1", "measured")
MOST_ENTRIES = 10_000
Table = tuple[tuple[tuple[int, ...], tuple[tuple[int, str], ...]], ...]
"""For each of the widths that were measured: (up to which size, what is taken), from small to large. Above the last
size, the last one is taken."""


@dataclass(frozen=True)
class Choice:
    """What was taken for the calls of one shape."""

    op: str
    shape: tuple[int, ...]
    dtype: str
    """``float32`` or ``bfloat16``, of the products."""
    taken: str
    """One of ``CANDIDATES[op]``."""
    speedup: float | None = None
    """How many times as fast it was as torch's own; None if it was not measured."""

    def __post_init__(self) -> None:
        if self.op not in CANDIDATES:
            raise ValueError(f"unknown op {self.op!r:.50}; one of {', '.join(CANDIDATES)}")
        shape, count = self.shape, NUMBERS[self.op]
        if not isinstance(shape, tuple) or len(shape) != count or not all(map(_is_size, shape)):
            raise ValueError(f"{self.op}: the shape must be {count} positive integers, got {shape!r:.50}")
        if self.dtype not in DTYPES:
            raise ValueError(f"{self.op}: the dtype must be {' or '.join(DTYPES)}, got {self.dtype!r:.50}")
        if self.taken not in CANDIDATES[self.op]:
            raise ValueError(f"{self.op}: must be one of {', '.join(CANDIDATES[self.op])}, got {self.taken!r:.50}")
        speedup = self.speedup
        if speedup is not None and not (type(speedup) in (int, float) and math.isfinite(speedup) and speedup > 0):
            raise ValueError(f"{self.op}: the speed-up must be a positive number, got {speedup!r:.50}")

    @property
    def is_torchs(self) -> bool:
        """Whether torch's own was taken."""
        return self.taken == CANDIDATES[self.op][0]


@dataclass(frozen=True)
class Choices:
    """What is taken for every call: torch's own, unless it says otherwise.

    Raises:
        ValueError: entries without ``measured``, or two of one call.
    """

    rules: str = "torch"
    """``torch``: always torch's own. ``0.1``: as version 0.1 decided. ``measured``: as ``entries`` say."""
    entries: tuple[Choice, ...] = ()
    processor: str = ""
    """Where it was measured."""
    bf16_speedup: float | None = field(default=None, compare=False)
    """How many times as fast a step would be in bfloat16 as in float32, as predicted; None if nobody looked."""
    used_by_others: float | None = field(default=None, compare=False)
    """The share of the cores that other programs used while it was measured, from 0 to 1; None if it is not known."""

    def __post_init__(self) -> None:
        if self.rules not in RULES:
            raise ValueError(f"rules must be one of {', '.join(RULES)}, got {self.rules!r:.50}")
        if self.entries and self.rules != "measured":
            raise ValueError(f"the rules {self.rules!r} take no entries, got {len(self.entries)}")
        if len(self.entries) > MOST_ENTRIES:
            raise ValueError(f"at most {MOST_ENTRIES} entries, got {len(self.entries)}")
        if len({(entry.op, entry.shape, entry.dtype) for entry in self.entries}) < len(self.entries):
            raise ValueError("two entries for one call")

    @classmethod
    def always(cls, dtype: str = "float32", **taken: str) -> Choices:
        """Takes the given candidate of each op for every shape; torch's own for ops that are not given."""
        return cls("measured", tuple(Choice(op, (16,) * NUMBERS[op], dtype, name) for op, name in taken.items()))

    def as_json(self) -> dict[str, Any]:
        """Returns it as what JSON has: objects, lists, texts and numbers."""
        return asdict(self) | {"entries": [asdict(entry) | {"shape": list(entry.shape)} for entry in self.entries]}

    @classmethod
    def from_json(cls, data: Any) -> Choices:
        """Reads what ``as_json`` wrote.

        Raises:
            ValueError: it is something else; the message is one line.
        """
        values = _exactly(data, "choices", ("rules", "entries", "processor", "bf16_speedup", "used_by_others"))
        if not isinstance(values["entries"], list) or len(values["entries"]) > MOST_ENTRIES:
            raise ValueError(f"choices: entries must be a list of at most {MOST_ENTRIES}")
        if not isinstance(values["processor"], str) or len(values["processor"]) > 1000:
            raise ValueError("choices: processor must be a short text")
        speedup = values["bf16_speedup"]
        if speedup is not None and not (type(speedup) in (int, float) and math.isfinite(speedup) and speedup > 0):
            raise ValueError("choices: bf16_speedup must be a positive number or null")
        share = values["used_by_others"]
        if share is not None and not (type(share) in (int, float) and 0 <= share <= 1):
            raise ValueError("choices: used_by_others must be a number from 0 to 1, or null")
        return cls(**values | {"entries": tuple(map(_choice_from_json, values["entries"]))})

    # --- what is taken ------------------------------------------------------------------------------------------------

    def taken(self, op: str, shape: tuple[int, ...], dtype: str) -> str:
        """Returns the candidate for a call: as measured at its shape, or else at the nearest one.

        That is the one of the nearest size among those of the same widths, or else of the nearest widths.
        """
        key = op, shape, dtype
        if key not in self._known:
            by_0_1 = self.rules == "0.1"
            self._known[key] = taken_by_0_1(op, shape, dtype) if by_0_1 else at_shape(self.table(op, dtype), op, shape)
        return self._known[key]

    def of_layer(self, shape: tuple[int, int, int], dtype: str) -> tuple[str, str, str]:
        """Returns the candidates for the three products of a linear layer, in the order of ``LINEAR``."""
        key = "layer", shape, dtype
        if key not in self._known:
            forward, of_input, of_weight = (self.taken(op, shape, dtype) for op in LINEAR)
            self._known[key] = forward, of_input, of_weight
        return self._known[key]

    @cached_property
    def _known(self) -> dict[tuple[str, tuple[int, ...], str], Any]:
        """What was asked before: every call of a step asks."""
        return {}

    def table(self, op: str, dtype: str) -> Table:
        """Returns what is taken for the calls of an op."""
        if (op, dtype) not in self._tables:
            self._tables[op, dtype] = self._table(op, dtype)
        return self._tables[op, dtype]

    @cached_property
    def _tables(self) -> dict[tuple[str, str], Table]:
        """The tables that were asked for: every call of a step asks."""
        return {}

    def _table(self, op: str, dtype: str) -> Table:
        of_widths: dict[tuple[int, ...], dict[int, str]] = {}
        for entry in sorted(self.entries, key=lambda entry: entry.shape):
            if (entry.op, entry.dtype) == (op, dtype):
                size, widths = _size_and_widths(op, entry.shape)
                of_widths.setdefault(widths, {})[size] = entry.taken
        return tuple((widths, _bands(of_size)) for widths, of_size in of_widths.items())


TORCHS_OWN = Choices()
OF_0_1 = Choices("0.1")


def _bands(of_size: dict[int, str]) -> tuple[tuple[int, str], ...]:
    """Returns (up to which size, what is taken): up to the one that is as near to a size as to the next, as a ratio."""
    sizes = sorted(of_size)
    limits = [math.isqrt(size * larger) for size, larger in pairwise(sizes)] + sizes[-1:]
    return tuple((limit, of_size[size]) for limit, size in zip(limits, sizes, strict=True))


def at_shape(table: Table, op: str, shape: tuple[int, ...]) -> str:
    """Returns what is taken at a shape; torch's own if the table is empty.

    torch.compile traces it, perhaps with numbers that it does not know, so it is loops over comparisons of integers.
    """
    if not table:
        return CANDIDATES[op][0]
    size, widths = _size_and_widths(op, shape)
    bands, least = table[0][1], -1
    for known, known_bands in table:
        if known[0] == widths[0] and known[-1] == widths[-1]:
            bands = known_bands
            break
        distance = sum([max(a, b) * 1024 // min(a, b) for a, b in zip(known, widths, strict=True)])
        if least < 0 or distance < least:
            bands, least = known_bands, distance
    for limit, taken in bands:
        if size <= limit:
            return taken
    return bands[-1][1]


def _size_and_widths(op: str, shape: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """Returns how large a call is among those that are alike (its rows; of attention, S·T), and what these share."""
    if op == "attention":
        return shape[0] * shape[1], shape[2:]
    return shape[0], shape[1:]


def _is_size(number: Any) -> bool:
    return type(number) is int and 0 < number < 2**31


# --- version 0.1 ------------------------------------------------------------------------------------------------------
# Constants that were measured on one processor (Zen 4). They live on for the sake of runs that began with them.
SMALLEST = 1 << 27  # multiply-adds of a product from which oneDNN computes it
LEAST_SUMMED = 256  # with fewer numbers to add up for each result, a product stays with torch
CPU_TOKENS = 1024  # up to so many keys, attention is computed in C++
WIDE_VECTORS = _C.instruction_sets()[-1] != "baseline"  # but not with vectors of 16 bytes


def taken_by_0_1(op: str, shape: tuple[int, ...], dtype: str) -> str:
    """Returns what version 0.1 took: in float32 oneDNN for large products, C++ for attention to short sequences."""
    if dtype == "float32" and op == "attention" and shape[0] <= CPU_TOKENS and WIDE_VECTORS:
        return "cpu"
    if dtype == "float32" and op in LINEAR:
        rows, inner, outer = shape
        summed = {"linear_forward": inner, "linear_input": outer, "linear_weight": rows}[op]
        if rows * inner * outer >= SMALLEST and summed >= LEAST_SUMMED:
            return "onednn-copy" if op == "linear_weight" else "onednn"
    return CANDIDATES[op][0]


# --- JSON -------------------------------------------------------------------------------------------------------------


def _exactly(data: Any, what: str, names: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(data, dict) or set(data) != set(names):
        found = ", ".join(map(str, data)) if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"{what}: must have {', '.join(names)}, got {found:.200}")
    return dict(data)


def _choice_from_json(data: Any) -> Choice:
    values = _exactly(data, "an entry of choices", ("op", "shape", "dtype", "taken", "speedup"))
    for name in ("op", "dtype", "taken"):
        if not isinstance(values[name], str):
            raise ValueError(f"an entry of choices: {name} must be a text, got {values[name]!r:.50}")
    if not isinstance(values["shape"], list):
        raise ValueError(f"an entry of choices: shape must be a list, got {values['shape']!r:.50}")
    return Choice(**values | {"shape": tuple(values["shape"])})
