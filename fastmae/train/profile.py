"""Traces where the time of a step goes (a Chrome trace), and on a GPU where its memory goes (a snapshot)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from fastmae.torch_compat import record_memory_history, write_memory_snapshot

FOLDER = "profile"
WARM_UP = 5
MEMORY_EVENTS = 200_000


@contextmanager
def profiled(
    run: Path, steps: int | None, rank: int, device: torch.device, say: Callable[[str], None]
) -> Iterator[Callable[[], None]]:
    """Records ``steps`` steps, after ``WARM_UP`` steps in which compiling and allocating settle.

    Writes ``OUTPUT_DIR/profile/rank-R.json.gz`` (chrome://tracing, ui.perfetto.dev) and, on a GPU,
    ``rank-R-memory.pickle`` (pytorch.org/memory_viz). A run that ends earlier leaves what was recorded.

    Yields:
        A function to call after each step. It does nothing without ``steps``, or when the recording is over.
    """
    if not steps:
        yield lambda: None
        return
    cuda = device.type == "cuda"
    trace = run / FOLDER / f"rank-{rank}.json.gz"

    def keep(profiler: profile) -> None:
        try:
            trace.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(trace))
            if cuda:
                write_memory_snapshot(trace.with_name(f"rank-{rank}-memory.pickle"))
        except (OSError, RuntimeError) as error:
            say(f"profile         {trace} cannot be written ({error}); the run goes on")
        else:
            say(f"profile         {trace}")
        if cuda:
            record_memory_history(None)

    if cuda:
        record_memory_history(MEMORY_EVENTS)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    plan = schedule(wait=0, warmup=WARM_UP, active=steps, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=keep) as profiler:
        yield profiler.step
