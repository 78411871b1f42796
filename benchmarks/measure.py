"""From a case to its times: first everybody's results beside the definition's in float64, then turns."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fastmae.benchmarks.cases import Case, Function, disagreement, run, true_result
from fastmae.benchmarks.timing import Samples, Stopwatch, input_sets_for, interleave


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What became of a case: times, or the reasons why there are none."""

    case: Case
    input_sets: int
    errors: dict[str, tuple[float, float]]
    """(relative error, tolerance) by contestant, of its worst output."""
    left_out: dict[str, str]
    """Why a contestant was not timed."""
    refused: str | None = None
    """Why nobody was timed."""
    seconds: Samples = field(default_factory=dict)

    @property
    def wrong(self) -> bool:
        return any(not error <= tolerance for error, tolerance in self.errors.values())


def measure(
    case: Case, contestants: Mapping[str, Function], watch: Stopwatch, *, dispensable: Collection[str] = ()
) -> Measured:
    """Times ``contestants`` if their results are right.

    A wrong result of anybody means that nobody is timed, and an exception goes on its way; but those who are
    ``dispensable`` are left out instead, with the reason.
    """
    generator = torch.Generator(watch.device).manual_seed(0)
    sets = [case.draw(generator) for _ in range(input_sets_for(case.moved, watch.device))]
    truth = true_result(case, sets[0])
    errors, left_out, wrong = {}, {}, []
    for name, function in contestants.items():
        try:
            errors[name] = error, tolerance = disagreement(run(function, sets[0]), truth)
        except Exception as problem:
            if name not in dispensable:
                raise
            left_out[name] = f"cannot run: {(str(problem).strip() or repr(problem)).splitlines()[0]}"
            continue
        if not error <= tolerance:
            complaint = f"off by {error:.1e}, allowed {tolerance:.0e}"
            if name in dispensable:
                left_out[name] = f"wrong: {complaint}"
            else:
                wrong.append(f"{name} is {complaint}")
    found = Measured(case=case, input_sets=len(sets), errors=errors, left_out=left_out)
    if wrong:
        return replace(found, refused="; ".join(wrong))
    calls = {
        name: lambda i, function=function: run(function, sets[i])
        for name, function in contestants.items()
        if name not in left_out
    }
    return replace(found, seconds=interleave(calls, watch, len(sets)))


def as_json(one: Measured) -> dict[str, Any]:
    """Everything, with every sample."""
    case = one.case
    return {
        "op": case.op,
        "backward": case.backward,
        "model": case.model,
        "sizes": case.sizes,
        "backend": case.backend,
        "bytes": case.moved,
        "flops": case.flops,
        "input_sets": one.input_sets,
        "errors": one.errors,
        "left_out": one.left_out,
        "refused": one.refused,
        "seconds": one.seconds,
    }
