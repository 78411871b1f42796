"""Measures on a CPU which implementation is fastest for the calls of a step, and keeps what was found in a cache.

The candidates of a call are timed in turns, forward and backward, at the call's own shape, on at most ``MOST_ROWS``
rows. One is taken only if it is faster than torch's own beyond noise. What is measured first costs most of a step, and
when the time is over, the rest keeps torch's own. The values of the tensors do not matter and no random numbers are
drawn, so a run is the same whether it measured or found its choices in the cache.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from fastmae.environment import core_times, processor, processor_details, used_by_others
from fastmae.files import open_file, write_text
from fastmae.ops.add_layer_norm import add_layer_norm
from fastmae.ops.attention import attention, cpu_candidates, unmet_requirement
from fastmae.ops.attention_table import dtype_name
from fastmae.ops.backends import using
from fastmae.ops.choices import CANDIDATES, LINEAR, Choice, Choices
from fastmae.ops.gelu import gelu
from fastmae.ops.linear import linear, linear_candidates

MOST_ROWS = 1024  # of a product that is timed: its rate hardly grows beyond
MOST_TOKENS = 4096  # of a norm or GELU that is timed: beyond the caches
LEAST_SECONDS = 2.0  # to measure in, if three steps take less
STEPS = 3
LOOK_AT_BF16 = 0.15  # of that time, at the end, for a look at bfloat16 in a float32 run
ROUNDS = 7  # in which the candidates of a call are timed in turns
LEAST_ROUNDS = 3
SHORTEST = 1e-3  # seconds that are timed at once: shorter calls are repeated
TIE = 1.02  # a candidate that is not at least so many times as fast as torch's own is not taken
OTHER_WORK = 1.25  # a step's time, as times that of its products and attention: norms, GELU, the optimiser
DISTURBED = 0.1  # from this share of the cores on, other programs spoil a measurement
CACHE_BYTES = 1 << 20

Run = Callable[[], object]


@dataclass(frozen=True)
class Call:
    """A call of a step, and how often it is made."""

    op: str
    """``linear``, ``attention``, ``add_layer_norm`` or ``gelu``."""
    shape: tuple[int, ...]
    """As in fastmae/ops/choices.py."""
    images: int = 1
    heads: int = 1
    """Of attention: the call has so many heads of so many images."""
    is_first: bool = False
    """Whether its input gets no gradient."""
    count: int = 1

    @property
    def operations(self) -> float:
        """About what the calls of a step cost, in multiply-adds of products."""
        if self.op == "linear":
            return self.count * 3.0 * math.prod(self.shape)
        if self.op == "attention":  # 2 and 5 products, which reach half the rate
            return self.count * 14.0 * self.images * self.heads * math.prod(self.shape)
        return self.count * 400.0 * math.prod(self.shape)  # bound by memory: some passes, forward and backward


@dataclass
class _Times:
    """What was measured of one part of a call."""

    op: str
    call: Call
    share: float
    """The part of the call's rows that was timed."""
    seconds: dict[str, float]
    """By candidate, medians."""
    speedup: dict[str, float]
    """How many times as fast as torch's own each is: the median over rounds of the ratios of neighbours."""
    is_sure: dict[str, bool]
    """Whether it was faster in nearly all rounds."""

    @property
    def taken(self) -> str:
        """The fastest candidate; torch's own, which is the first, if none is faster beyond noise."""
        own = next(iter(self.seconds))
        better = [name for name in self.seconds if self.speedup[name] >= TIE and self.is_sure[name]]
        return max(better, key=lambda name: self.speedup[name], default=own)


@dataclass
class _Clock:
    """The time that measuring may take."""

    now: Callable[[], float]
    allowed: float
    began: float = field(init=False)

    def __post_init__(self) -> None:
        self.began = self.now()

    @property
    def is_over(self) -> bool:
        return self.now() - self.began >= self.allowed


def measure(
    calls: Sequence[Call],
    dtype: torch.dtype = torch.float32,
    *,
    seconds: float | None = None,
    now: Callable[[], float] = time.perf_counter,
) -> Choices:
    """Times the candidates of the calls of a step.

    Args:
        calls: of ``fastmae.model.calls.calls_of``.
        dtype: of the products: float32, or bfloat16 for a step under autocast.
        seconds: the time it may take; by default the larger of 2 s and what 3 steps are estimated to take.
        now: the clock.

    Returns:
        Choices with an entry for every call. What was not measured in time has torch's own and no speed-up.
    """
    calls = sorted(calls, key=lambda call: -call.operations)
    allowed = math.inf if seconds is None else seconds  # until a step's time can be estimated from the first call
    look = LOOK_AT_BF16 if dtype == torch.float32 else 0.0
    clock = _Clock(now, allowed * (1 - look))
    before = core_times()
    entries: dict[tuple[str, tuple[int, ...]], Choice] = {}
    measured: list[_Times] = []
    with torch.enable_grad():
        for call in calls:
            times = _measure_call(call, dtype, clock)
            measured += times
            if seconds is None and measured:  # each time, as other programs may have slowed down the first call
                allowed = min(allowed, max(LEAST_SECONDS, STEPS * _step_seconds(calls, measured)))
                clock.allowed = allowed * (1 - look)
            for found in _entries(call, dtype, times):
                entries.setdefault((found.op, found.shape), found)
        clock.allowed = allowed
        bf16 = _bf16_speedup(measured, clock) if look else None
    return Choices("measured", tuple(entries.values()), processor(), bf16, used_by_others(before, core_times()))


def _measure_call(call: Call, dtype: torch.dtype, clock: _Clock) -> list[_Times]:
    """Times the parts of a call; those that are not measured when the time is over are left out."""
    times = []
    for op, share, runs in () if clock.is_over else _parts(call, dtype):
        found = _time_in_turns(runs, clock)
        if found is not None:
            times.append(_Times(op, call, share, *found))
    return _confirmed(call, dtype, times, clock) if call.op == "linear" else times


def _confirmed(call: Call, dtype: torch.dtype, times: list[_Times], clock: _Clock) -> list[_Times]:
    """Times the layer as a whole with what was taken of its products; if it is not faster, they stay torch's own.

    One product by another implementation has a price for the others: they go through an op of our own as well.
    """
    taken = {part.op: part.taken for part in times}
    if all(name == "torch" for name in taken.values()):
        return times
    whole = _time_in_turns(_whole_layer(call, dtype, taken), clock)
    if whole is None or whole[1]["chosen"] < TIE or not whole[2]["chosen"]:
        for part in times:
            part.is_sure = dict.fromkeys(part.is_sure, False)
    return times


def _time_in_turns(
    runs: dict[str, Run], clock: _Clock
) -> tuple[dict[str, float], dict[str, float], dict[str, bool]] | None:
    """Returns (seconds, speed-up, whether it is sure) by candidate, the first of which is torch's own.

    Returns None if the time is over before there are enough rounds.
    """
    once = {}
    for name, run in runs.items():
        if clock.is_over:
            return None
        once[name] = _timed(run, 1, clock)  # the first call may allocate, and fills the caches
        if once[name] < 10 * SHORTEST:
            once[name] = _timed(run, 1, clock)
    repeats = {name: max(1, min(100, round(SHORTEST / max(taken, 1e-6)))) for name, taken in once.items()}
    rounds: list[dict[str, float]] = []
    while len(rounds) < ROUNDS and not clock.is_over:
        rounds.append({name: _timed(run, repeats[name], clock) for name, run in runs.items()})
        if len(rounds) >= LEAST_ROUNDS and _is_clear(rounds):
            break
    if len(rounds) < LEAST_ROUNDS:
        return None
    own = next(iter(runs))
    ratios = {name: sorted(one[own] / one[name] for one in rounds) for name in runs}
    seconds = {name: statistics.median(one[name] for one in rounds) for name in runs}
    # Nearly all: one round in seven may have been disturbed.
    is_sure = {name: ratios[name][len(rounds) // 7] > 1 for name in runs}
    return seconds, {name: statistics.median(ratios[name]) for name in runs}, is_sure


def _is_clear(rounds: list[dict[str, float]]) -> bool:
    """Whether each candidate is faster than torch's own in every round, or slower in every round, by more than 5 %."""
    own = next(iter(rounds[0]))
    others = [[one[own] / one[name] for one in rounds] for name in rounds[0] if name != own]
    return all(min(ratios) > 1.05 or max(ratios) < 0.95 for ratios in others)


def _timed(run: Run, repeats: int, clock: _Clock) -> float:
    began = clock.now()
    for _ in range(repeats):
        run()
    return max(clock.now() - began, 1e-9) / repeats


def _entries(call: Call, dtype: torch.dtype, times: list[_Times]) -> Iterator[Choice]:
    """Returns what is taken for each part of a call that has candidates, also for those that were not measured."""
    of_op = {part.op: part for part in times}
    for op in _ops_of(call):
        taken = of_op[op].taken if op in of_op else CANDIDATES[op][0]
        speedup = round(of_op[op].speedup[taken], 3) if op in of_op else None
        yield Choice(op, call.shape, dtype_name(dtype), taken, speedup)


def _ops_of(call: Call) -> tuple[str, ...]:
    """Returns the ops of the parts of a call."""
    if call.op == "linear":
        return tuple(op for op in LINEAR if op != "linear_input" or not call.is_first)
    return (call.op,) if call.op in PARTS else ()


def _step_seconds(calls: Sequence[Call], measured: list[_Times]) -> float:
    """Estimates what a step takes from those of its calls that were measured."""
    of_these = sum(next(iter(part.seconds.values())) / part.share * part.call.count for part in measured)
    operations = sum(call.operations for call in {part.call for part in measured})
    return OTHER_WORK * of_these * sum(call.operations for call in calls) / operations


# --- the calls --------------------------------------------------------------------------------------------------------


def _linear_parts(call: Call, dtype: torch.dtype) -> Parts:
    share = min(1.0, MOST_ROWS / call.shape[0])
    for op in _ops_of(call):
        yield op, share, {name: _linear_run(call, dtype, op, name) for name in linear_candidates(op, dtype)}


def _linear_run(call: Call, dtype: torch.dtype, op: str, name: str) -> Run:
    x, weight, bias, copies = _layer(call, dtype)
    choices = Choices.always(dtype_name(dtype), **{op: name})
    call_layer = partial(_in_dtype, dtype, choices, linear, x, weight, bias, copies)
    if op == "linear_forward":
        return call_layer
    out = call_layer()
    wanted = [x] if op == "linear_input" else [weight, bias]
    return partial(torch.autograd.grad, out, wanted, _numbers(*out.shape, dtype=out.dtype), retain_graph=True)


def _whole_layer(call: Call, dtype: torch.dtype, taken: dict[str, str]) -> dict[str, Run]:
    x, weight, bias, copies = _layer(call, dtype)
    grad = _numbers(len(x), call.shape[2], dtype=dtype)
    wanted = [weight, bias] if call.is_first else [x, weight, bias]

    def run(choices: Choices) -> object:
        out = _in_dtype(dtype, choices, linear, x, weight, bias, copies)
        return torch.autograd.grad(out, wanted, grad)

    name = dtype_name(dtype)
    return {"torch": partial(run, Choices()), "chosen": partial(run, Choices.always(name, **taken))}


def _layer(call: Call, dtype: torch.dtype) -> tuple[Any, ...]:
    """Makes (input, weight, bias, copies of weight and bias) of a linear layer, as a step has them."""
    rows, inner, outer = call.shape
    x = _numbers(min(rows, MOST_ROWS), inner, dtype=dtype).requires_grad_(not call.is_first)
    weight, bias = _numbers(outer, inner).requires_grad_(), _numbers(outer).requires_grad_()
    copies = None if dtype == torch.float32 else (weight.detach().to(dtype), bias.detach().to(dtype))
    return x, weight, bias, copies


def _attention_parts(call: Call, dtype: torch.dtype) -> Parts:
    (S, T, head_dim), heads = call.shape, call.heads
    images = min(call.images, max(1, MOST_ROWS // S))
    if S == T:
        arguments = [_numbers(images, S, 3, heads, head_dim, dtype=dtype).requires_grad_()]
    else:
        shapes = (images, S, 2, heads, head_dim), (images, T, heads, head_dim)
        arguments = [_numbers(*shape, dtype=dtype).requires_grad_() for shape in shapes]
    grad = _numbers(images, T, heads, head_dim, dtype=dtype)

    def run(choices: Choices) -> object:
        return torch.autograd.grad(_in_dtype(dtype, choices, attention, *arguments), arguments, grad)

    runs: dict[str, Run] = {
        name: partial(run, Choices.always(dtype_name(dtype), attention=name))
        for name in cpu_candidates(dtype, S, T, head_dim)
    }
    yield "attention", images / call.images, runs


def _gelu_parts(call: Call, dtype: torch.dtype) -> Parts:
    rows, width = min(call.shape[0], MOST_TOKENS), call.shape[1]
    h, bias = _numbers(rows, width, dtype=dtype).requires_grad_(), _numbers(width).requires_grad_()
    grad = _numbers(rows, width, dtype=dtype)

    def torchs() -> object:  # its product adds the bias, and sums up the gradient
        (gradient,) = torch.autograd.grad(F.gelu(h), h, grad)
        return gradient.sum(0)

    def ours() -> object:
        return torch.autograd.grad(gelu(h, bias), (h, bias), grad)

    yield "gelu", rows / call.shape[0], {"torch": torchs, "cpu": ours}


def _add_layer_norm_parts(call: Call, dtype: torch.dtype) -> Parts:
    rows, width = min(call.shape[0], MOST_TOKENS), call.shape[1]
    x, branch = _numbers(rows, width).requires_grad_(), _numbers(rows, width, dtype=dtype).requires_grad_()
    weight, bias = _numbers(width).requires_grad_(), _numbers(width).requires_grad_()
    grads = [_numbers(rows, width), _numbers(rows, width, dtype=dtype)]

    def run(outputs: Callable[[], Sequence[torch.Tensor]]) -> object:
        return torch.autograd.grad(outputs(), (x, branch, weight, bias), grads)

    def torchs() -> tuple[torch.Tensor, torch.Tensor]:  # the product after it casts the norm
        stream = x + branch
        return stream, F.layer_norm(stream, (width,), weight, bias).to(dtype)

    runs: dict[str, Run] = {
        "torch": partial(run, torchs),
        "cpu": partial(run, lambda: add_layer_norm(x, branch, weight, bias, 1e-5, dtype)),
    }
    yield "add_layer_norm", rows / call.shape[0], runs


Parts = Iterator[tuple[str, float, dict[str, Run]]]
PARTS: dict[str, Callable[[Call, torch.dtype], Parts]] = {
    "linear": _linear_parts,
    "attention": _attention_parts,
    "gelu": _gelu_parts,
    "add_layer_norm": _add_layer_norm_parts,
}


def _parts(call: Call, dtype: torch.dtype) -> Parts:
    """Returns for each part of a call (its op; the part of its rows that is timed; by candidate, what runs it)."""
    return PARTS[call.op](call, dtype) if call.op in PARTS else iter(())


def _in_dtype(dtype: torch.dtype, choices: Choices, function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function as a step with products of this dtype does, with these choices."""
    with using(choices=choices, ops="auto", attention="auto"):
        if dtype == torch.float32:
            with torch.autocast("cpu", enabled=False):
                return function(*arguments)
        with torch.autocast("cpu", dtype=dtype, cache_enabled=False):
            return function(*arguments)


def _numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Returns some numbers, none of them drawn at random."""
    return torch.linspace(-1, 1, math.prod(shape)).view(shape).to(dtype)


# --- bfloat16 beside float32 ------------------------------------------------------------------------------------------


def _bf16_speedup(measured: list[_Times], clock: _Clock) -> float | None:
    """Predicts how many times as fast a step would be in bfloat16, from those calls that cost most of it.

    Returns None if there was no time to look.
    """
    slow = fast = 0.0
    enough = 0.6 * sum(_seconds(part) for part in measured)
    calls = list(dict.fromkeys(part.call for part in measured))
    for call in sorted(calls, key=lambda call: (call.op == "linear", -call.operations)):
        parts = {part.op: part for part in measured if part.call == call}
        for op, share, runs in () if clock.is_over else _parts(call, torch.bfloat16):
            if op in parts:
                once = []
                for run in runs.values():
                    if clock.is_over:
                        break
                    run()
                    once.append(min(_timed(run, 1, clock), _timed(run, 1, clock)))
                if len(once) == len(runs):
                    slow += _seconds(parts[op])
                    fast += min(once) / share * call.count
        if slow >= enough:
            break
    if fast == 0 or slow < enough / 2:
        return None
    other = (OTHER_WORK - 1) * slow  # norms and the like are hardly faster
    return round((slow + other) / (fast + other), 2)


def _seconds(part: _Times) -> float:
    """What this part of a call takes of a step."""
    return part.seconds[part.taken] / part.share * part.call.count


# --- what was chosen --------------------------------------------------------------------------------------------------


def unmet(choices: Choices) -> str | None:
    """Returns what a choice needs and this machine does not have, in a line; None if it can be used here."""
    for entry in choices.entries:
        dtype = torch.float32 if entry.dtype == "float32" else torch.bfloat16
        if entry.op in LINEAR and entry.taken not in linear_candidates(entry.op, dtype):
            return f"products by {entry.taken!r} in {entry.dtype}, which this version of PyTorch or processor lacks"
        if entry.op == "attention":
            S, _, head_dim = entry.shape
            problem = unmet_requirement(entry.taken, torch.device("cpu"), dtype, S, head_dim)
            if problem is not None:
                return f"attention {entry.taken!r}, which needs {problem}"
    return None


WORDS = {
    "linear_forward": "forward products",
    "linear_input": "gradients of inputs",
    "linear_weight": "gradients of weights",
    "attention": "attention",
    "add_layer_norm": "LayerNorm",
    "gelu": "GELU",
}


def describe(choices: Choices, dtype: torch.dtype = torch.float32) -> list[str]:
    """Describes what was chosen for products of a dtype, in at most five lines."""
    if choices.rules == "torch":
        return ["PyTorch's own products and attention, not measured"]
    if choices.rules == "0.1":
        return ["as version 0.1 chose: oneDNN for large products, C++ for attention, in float32"]
    entries = [entry for entry in choices.entries if entry.dtype == dtype_name(dtype)]
    products = [entry for entry in entries if entry.op in LINEAR]
    lines = [f"products: {_taken_in_words(products)}"] if products else []
    for op in ("attention", "add_layer_norm", "gelu"):
        own = [entry for entry in entries if entry.op == op]
        if own and (op == "attention" or any(not entry.is_torchs for entry in own)):
            lines.append(f"{WORDS[op]}: {_taken_in_words(own)}")
    if is_disturbed(choices):
        share = round(100 * (choices.used_by_others or 0))
        lines.append(f"doubtful: other programs used {share} % of the cores meanwhile; a new run measures again")
    return lines or ["nothing was measured in this precision: PyTorch's own"]


def is_disturbed(choices: Choices) -> bool:
    """Whether other programs were at work on the same cores while it was measured."""
    return choices.used_by_others is not None and choices.used_by_others >= DISTURBED


def _taken_in_words(entries: list[Choice]) -> str:
    """Says how many shapes have which candidate, and how much faster it was."""
    texts = []
    for name in dict.fromkeys(entry.taken for entry in sorted(entries, key=lambda entry: -int(not entry.is_torchs))):
        of_name = [entry for entry in entries if entry.taken == name]
        if of_name[0].is_torchs:
            texts.append(f"{'torch' if name == 'sdpa' else name} {len(of_name)} of {len(entries)}")
            continue
        speedups = sorted(entry.speedup for entry in of_name if entry.speedup is not None)
        span = "" if not speedups else f", {speedups[0]:.2f}–{speedups[-1]:.2f} times as fast"
        if speedups and f"{speedups[0]:.2f}" == f"{speedups[-1]:.2f}":
            span = f", {speedups[0]:.2f} times as fast"
        texts.append(f"{name} {len(of_name)} of {len(entries)}{span}")
    unmeasured = sum(entry.speedup is None for entry in entries)
    return "; ".join(texts) + (f" ({unmeasured} not measured in time)" if unmeasured else "")


# --- the cache --------------------------------------------------------------------------------------------------------


def measured(calls: Sequence[Call], dtype: torch.dtype = torch.float32, *, anew: bool = False) -> Choices:
    """Returns the choices for these calls that this machine's cache holds, or measures them and writes them there.

    A cache that cannot be read or written means only that it is measured again. What was measured while other programs
    used the cores is not written.

    Args:
        calls, dtype: as in ``measure``.
        anew: measure in any case.
    """
    key = _key(calls, dtype)
    path = cache_folder() / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.json"
    found = None if anew else _read(path, key)
    if found is not None:
        return found
    choices = measure(calls, dtype)
    if is_disturbed(choices):
        return choices
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({"key": key, "choices": choices.as_json()}) + "\n")
    return choices


def cache_folder() -> Path:
    """Returns where choices are kept: fastmae/choices in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "fastmae" / "choices"


def cached_here() -> list[str]:
    """Returns a line about each file of the cache that holds choices for this machine as it is now."""
    lines = []
    here = _machine()
    for path in sorted(cache_folder().glob("*.json")):
        data = _load(path)
        key = data.get("key") if isinstance(data, dict) else None
        if isinstance(key, dict) and all(key.get(name) == value for name, value in here.items()):
            choices = _read(path, key)
            if choices is not None:
                dtype = torch.bfloat16 if key.get("dtype") == "bfloat16" else torch.float32
                lines.append(f"{key.get('dtype')}: {'; '.join(describe(choices, dtype))} ({path})")
    return lines


def _machine() -> dict[str, Any]:
    """Returns what measurements depend on beside the calls."""
    return {
        "processor": processor(),
        "details": processor_details(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "fastmae": version("fastmae"),
        "candidates": {op: list(names) for op, names in CANDIDATES.items()},
    }


def _key(calls: Sequence[Call], dtype: torch.dtype) -> dict[str, Any]:
    of_calls = [[call.op, list(call.shape), call.images, call.heads, call.is_first, call.count] for call in calls]
    return _machine() | {"dtype": dtype_name(dtype), "calls": of_calls}


def _load(path: Path) -> Any:
    """Reads a file of the cache; None if it cannot be read, or is too large to be one."""
    try:
        with open_file(path) as file:
            data = file.read(CACHE_BYTES + 1)
        return json.loads(data) if len(data) <= CACHE_BYTES else None
    except (OSError, ValueError, RecursionError):
        return None


def _read(path: Path, key: dict[str, Any]) -> Choices | None:
    data = _load(path)
    if not isinstance(data, dict) or data.get("key") != key:
        return None
    try:
        choices = Choices.from_json(data.get("choices"))
    except ValueError:
        return None
    return choices if choices.rules == "measured" and unmet(choices) is None else None
