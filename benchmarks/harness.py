"""What every benchmark has in common: turns, the clock, ceilings, processes of their own, tables and the result file.

Implementations take turns (A B C A B C …), so that a machine whose speed drifts drifts for all of them. A benchmark
first checks that results are equal; an implementation whose result is not gets no time, and the command returns 1.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import date
from itertools import accumulate
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console, RenderableType
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from fastmae.config.family import family_of
from fastmae.environment import hardware, processor, versions
from fastmae.errors import UserError
from fastmae.files import write_text
from fastmae.model.presets import PRESETS
from fastmae.ops.attention_table import dtype_name
from fastmae.screen import open_console
from fastmae.torch_compat import compile_errors

OURS = "fastmae"
Call = Callable[[int], object]
"""One call of an implementation on input set number i; what it returns is kept until the set's next turn."""
Samples = dict[str, list[float]]
"""Seconds of one call, a number per round, by implementation."""
Key = TypeVar("Key")

CACHE_WHEN_UNKNOWN = 64 << 20
MAX_INPUT_SETS = 32
FILE_WIDTH = 140  # of a table that goes into a file, whose width is unknown


@dataclass(frozen=True, kw_only=True)
class Stopwatch:
    """How samples are taken."""

    device: torch.device
    rounds: int  # samples of each implementation
    sample_seconds: float = 0.0  # calls are repeated until a sample takes this long, which is long beside the noise
    graph: bool = False  # on a GPU: calls are replayed from a CUDA graph, so that Python's launches are not timed


def take_turns(
    samplers: Mapping[Key, Callable[[], float]], rounds: int, enough: Callable[[float], bool] = lambda seconds: False
) -> dict[Key, list[float]]:
    """A sample of each implementation per round, in turns. There is no further round once ``enough`` says so, of the
    seconds that the last one took."""
    samples: dict[Key, list[float]] = {name: [] for name in samplers}
    for _ in range(rounds):
        begin = time.monotonic()
        for name, sample in samplers.items():
            samples[name].append(sample())
        if enough(time.monotonic() - begin):
            break
    return samples


def interleave(calls: Mapping[Key, Call], watch: Stopwatch, input_sets: int = 1) -> dict[Key, list[float]]:
    """Times every implementation ``watch.rounds`` times, in turns, each turn over all ``input_sets``."""
    return take_turns({name: _warm_turn(call, watch, input_sets) for name, call in calls.items()}, watch.rounds)


def _warm_turn(call: Call, watch: Stopwatch, input_sets: int) -> Callable[[], float]:
    """Compiles and warms an implementation up, and gives the function that takes one sample of it."""
    results: list[object] = [None] * input_sets  # they stay alive, so that outputs rotate through memory as inputs do

    def calls() -> None:
        for i in range(input_sets):
            results[i] = call(i)

    lap: Callable[[], object] = calls
    lap()
    if watch.graph and watch.device.type == "cuda":
        lap = _captured(lap, watch.device)
    laps = 1
    while watch.sample_seconds > 0 and elapsed(lap, laps, watch.device) < watch.sample_seconds:
        laps *= 2
    return lambda: elapsed(lap, laps, watch.device) / (laps * input_sets)


def _captured(lap: Callable[[], object], device: torch.device) -> Callable[[], object]:
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries make their handles and workspaces a stream: not inside the capture
            lap()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            lap()
    return graph.replay


def elapsed(work: Callable[[], object], times: int, device: torch.device) -> float:
    """Seconds that ``times`` calls of ``work`` take: between two events on a GPU, on the host's clock otherwise."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(times):
            work()
        return time.perf_counter() - start
    with torch.cuda.device(device):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(times):
            work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def peak_bytes(work: Callable[[], object], device: torch.device) -> float:
    """Returns the bytes that torch holds at the peak of ``work`` beside what it holds before.

    What libraries allocate behind torch's back is not in it.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        work()
        return float(torch.cuda.max_memory_allocated(device) - held)
    # torch counts what it holds on a CPU only for its profiler, which writes it down for people: as a trace.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    with tempfile.TemporaryDirectory(prefix="fastmae-bench-") as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    return float(max(accumulate((size for _, size in changes), initial=0)))


def quartiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """The first quartile, the median and the third quartile."""
    first, median, third = np.quantile(samples, [0.25, 0.5, 0.75]).tolist()
    return first, median, third


def speed_up(samples: Samples, name: str, base: str) -> float:
    """How many times as fast as ``base`` the implementation ``name`` is: above 1 it is faster.

    The median of the rounds' ratios, because two samples of one round met the same noise.
    """
    return float(np.median([b / a for a, b in zip(samples[name], samples[base], strict=True)]))


def wait_for(device: torch.device) -> None:
    """Waits until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def refuse(why: str) -> int:
    """Says on stderr why no time is reported, and returns the command's exit status."""
    print(f"{why}, so no time is reported", file=sys.stderr)
    return 1


def agree(losses: Iterable[float], expected: Iterable[float], tolerance: float) -> bool:
    """Whether all losses are within a relative tolerance of those expected; NaN is not."""
    return all(abs(loss / right - 1) <= tolerance for loss, right in zip(losses, expected, strict=True))


# --- what the machine can do ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ceilings:
    """Measured, because a data sheet describes another machine; of several samples the best, as a ceiling that a busy
    moment has lowered would flatter all."""

    copy_bytes: float  # bytes per second, read and written ones added up, of a copy far larger than the caches
    matmul_flops: dict[str, float]  # operations per second of a large square matrix product, by dtype


def measure_ceilings(
    device: torch.device, *, copied: int | None = None, side: int | None = None, rounds: int = 15
) -> Ceilings:
    """Times a copy of ``copied`` bytes (8 caches, at least 256 MiB) and products of matrices with ``side`` rows."""
    watch = Stopwatch(device=device, rounds=rounds)
    copied = copied or max(8 * cache_bytes(device), 256 << 20)
    side = side or (8192 if device.type == "cuda" else 2048)
    random = torch.randint(0, 256, (min(copied, 16 << 20),), dtype=torch.uint8, device=device)
    source = random.repeat(-(-copied // len(random)))[:copied]  # drawing as many numbers takes seconds on a CPU
    target = torch.empty_like(source)
    copying = min(interleave({"copy": lambda _: target.copy_(source)}, watch)["copy"])

    def product(dtype: torch.dtype) -> float:
        a, b = torch.randn(2, side, side, device=device).to(dtype)
        return 2 * side**3 / min(interleave({"product": lambda _: a @ b}, watch)["product"])

    return Ceilings(
        2 * copied / copying, {dtype_name(dtype): product(dtype) for dtype in (torch.float32, torch.bfloat16)}
    )


def sdpa_kernel(shape: tuple[int, int, int], N: int, dtype: torch.dtype, device: torch.device) -> str:
    """The kernel that torch's attention takes for N sequences of (S, heads, head_dim), as a training step calls it:
    ``flash``, ``cudnn``, ``efficient`` or ``math``. On one GPU they are up to twice as fast as each other."""
    packed = torch.empty(N, shape[0], 3, *shape[1:], dtype=dtype, device=device, requires_grad=True)
    q, k, v = (x.transpose(1, 2) for x in packed.unbind(2))
    node = F.scaled_dot_product_attention(q, k, v).grad_fn
    while node is not None:  # the kernel's own gradient may lie behind those of views
        if found := re.search(r"ScaledDotProduct(\w+?)Attention(ForCpu)?Backward", node.name()):
            return found[1].removeprefix("Fused").lower()
        node = node.next_functions[0][0] if node.next_functions else None
    return "math"


def cache_bytes(device: torch.device) -> int:
    """The largest cache: a GPU's L2, a CPU's last level."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=CACHE_WHEN_UNKNOWN)


def input_sets_for(moved: int, device: torch.device) -> int:
    """So many sets of inputs that calls which move ``moved`` bytes each find none of theirs in the cache."""
    return min(max(1, math.ceil(2 * cache_bytes(device) / moved)), MAX_INPUT_SETS)


# --- processes of their own -------------------------------------------------------------------------------------------

Ask = Callable[[Any], Any]
"""Takes a request and gives the answer; both travel pickled."""

# Seconds. OpenMP's threads look for more work before they sleep, and meanwhile take the cores from the next in turn.
SETTLE = 0.02
# Seconds that a process has to tidy up, torch.compile's helpers for instance, when it is asked no more.
GRACE = 5.0
# Forked from a process that has imported everything and done nothing: as if spawned, but for seconds of imports each.
_CONTEXT = multiprocessing.get_context("forkserver")


class GoneError(Exception):
    """A process that answers no more. The message says why, in one line."""


@contextmanager
def in_own_process(begin: Callable[..., tuple[Any, Ask]], *given: object) -> Generator[tuple[Any, Ask]]:
    """What ``begin(*given)`` gives in a new process: something to begin with, and a function that is called there.

    What is written to stderr there is kept from the screen: libraries' notices, once for each process. The process ends
    with the block, whatever happens, and takes no time between two requests.

    Raises:
        GoneError: it refused with one of ``refusals()``, or died; the function raises this as well.
    """
    with beginning_in_own_process(begin, *given) as begun:
        yield begun(None)


@contextmanager
def beginning_in_own_process(
    begin: Callable[..., tuple[Any, Ask]], *given: object
) -> Generator[Callable[[float | None], tuple[Any, Ask]]]:
    """As ``in_own_process``, but does not wait: the function that it gives does, for so many seconds at most, so that
    several processes can begin at once.

    Raises:
        GoneError: by that function: as ``in_own_process``, or it was still beginning then.
    """
    _CONTEXT.set_forkserver_preload([__name__, begin.__module__])
    ours, theirs = _CONTEXT.Pipe()
    with ours, tempfile.NamedTemporaryFile("r", prefix="fastmae-bench-", errors="replace") as notices:
        process = _CONTEXT.Process(target=_live, args=(theirs, notices.name, begin, given), daemon=True)
        process.start()
        theirs.close()

        def received() -> Any:
            try:
                answer, why = ours.recv()
            except (EOFError, ConnectionError):
                process.join()
                raise GoneError(_end_of(process, notices.read())) from None
            if why:
                raise GoneError(why)
            time.sleep(SETTLE)
            return answer

        def ask(request: object) -> Any:
            with suppress(ConnectionError):  # then there is nothing to receive either, which says more
                ours.send(request)
            return received()

        def begun(seconds: float | None) -> tuple[Any, Ask]:
            if seconds is not None and not ours.poll(max(seconds, 0.0)):
                process.kill()
                raise GoneError("no time was left to start it")
            return received(), ask

        try:
            yield begun
            ours.close()
            process.join(GRACE)
        finally:
            process.terminate()
            process.join()


def _live(pipe: Connection, said: str, begin: Callable[..., tuple[Any, Ask]], given: tuple[object, ...]) -> None:
    """The life of the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one who asks
    with open(said, "w") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    try:
        first, answer = begin(*given)
        pipe.send((first, ""))
        for request in _requests(pipe):
            pipe.send((answer(request), ""))
    except refusals() as error:
        pipe.send((None, reason(error)))
    except RuntimeError as error:  # of a CPU without memory torch says so in words alone
        if "can't allocate memory" not in str(error):
            raise
        pipe.send((None, reason(error)))


def _requests(pipe: Connection) -> Generator[Any]:
    """Until the one who asks is gone."""
    with suppress(EOFError, ConnectionError):
        while True:
            yield pipe.recv()


def refusals() -> tuple[type[Exception], ...]:
    """The exceptions that say that something cannot run here. Any other is a mistake, whose traceback is shown."""
    return (GoneError, UserError, ImportError, torch.OutOfMemoryError, MemoryError, *compile_errors())


def reason(error: Exception) -> str:
    """The first line of an exception that says anything."""
    text = error.as_on_the_command_line() if isinstance(error, UserError) else str(error)
    return next(line for line in [*text.splitlines(), type(error).__name__] if line.strip())


def _end_of(process: BaseProcess, said: str) -> str:
    """Why it ended, in one line; shows the traceback of a mistake."""
    code = process.exitcode or 0
    if code < 0:
        why = f"its process was killed by {signal.Signals(-code).name}"
        return f"{why}, as the system does where memory runs out" if code == -signal.SIGKILL else why
    _, found, traceback = said.partition("Traceback (most recent call last):")
    print(found + traceback, end="", file=sys.stderr)
    last = next((line for line in reversed(said.splitlines()) if line.strip()), "it said nothing")
    return f"its process ended with exit status {code}: {last.strip()}"


# --- what is shown and kept -------------------------------------------------------------------------------------------


def console() -> Console:
    return open_console(width=None if sys.stdout.isatty() else FILE_WIDTH)


def table(title: str | None, columns: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> Table:
    """A table of text, the first ``left`` columns of which are names and the others numbers."""
    made = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        made.add_column(column, justify="left" if i < left else "right", no_wrap=True)
    for row in rows:
        made.add_row(*row)
    return made


def milliseconds(samples: Sequence[float], digits: int = 1) -> str:
    """The median and the quartiles."""
    low, median, high = (1e3 * quartile for quartile in quartiles(samples))
    return f"{median:.{digits}f} ({low:.{digits}f} – {high:.{digits}f})"


def rates(samples: Sequence[float], images: float = 1.0) -> tuple[float, float, float]:
    """The first quartile, the median and the third quartile of images per second, from seconds."""
    low, median, high = (images / seconds for seconds in reversed(quartiles(samples)))
    return low, median, high


def describe_ceilings(ceilings: Ceilings) -> str:
    products = ", ".join(f"{flops / 1e12:.3g} TFLOP/s in {name}" for name, flops in ceilings.matmul_flops.items())
    return f"copies {ceilings.copy_bytes / 1e9:.3g} GB/s (read + written), multiplies matrices at {products}"


def machine_name(device: torch.device) -> str:
    """``cpu2-xeon`` for a Xeon with 2 cores to use, ``nvidia-h100-80gb-hbm3`` for that GPU."""
    if device.type == "cuda":
        return _slug(torch.cuda.get_device_name(device))
    return f"{device.type}{hardware()['cores']}-{_slug(processor())}"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def commit() -> str:
    """``$FASTMAE_COMMIT``, otherwise what git knows of these sources, otherwise ``unknown``."""
    if given := os.environ.get("FASTMAE_COMMIT"):
        return given
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(
            describe, capture_output=True, text=True, cwd=Path(__file__).resolve().parent, check=False
        )
    except OSError:  # there is no git on this machine
        return "unknown"
    return done.stdout.strip() or "unknown"


def require_preset(model: str, flag: str = "--model") -> None:
    """Raises a UserError that names the flag if there is no such preset, or if it is of another family."""
    if family_of(model) != "vit":
        raise UserError(
            f"{flag} {model}: only vision transformers (mae_vit_*) are timed here, as what they are beside is"
        )
    if model not in PRESETS:
        raise UserError(f"{flag} {model}: unknown; one of {', '.join(PRESETS)}")


def report(
    shown: Iterable[RenderableType], name: str, *, command: Sequence[str], settings: Any, measured: dict[str, Any]
) -> None:
    """Prints tables and who is ``measured["skipped"]``, and writes ``name``.json if the settings have an ``output``."""
    console().print(*shown, sep="\n")
    for who, why in measured.get("skipped", {}).items():
        print(f"{who} cannot run: {why}", file=sys.stderr)
    if settings.output is not None:
        print(write_result(settings.output, name, command=command, settings=settings, measured=measured))


def write_result(folder: str, name: str, *, command: Sequence[str], settings: object, measured: dict[str, Any]) -> Path:
    """Writes folder/name.json: what was measured, and where, when, how and from which sources.

    Args:
        command: the words that made it.
        settings: a dataclass.
        measured: every sample, and what is needed to read them.
    """
    result = {
        "date": date.today().isoformat(),
        "command": list(command),
        "commit": commit(),
        "versions": versions(),
        "hardware": hardware() | {"processor": processor()},
        "settings": asdict(settings),  # type: ignore[call-overload]
        **measured,
    }
    path = Path(folder) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(result, indent=1) + "\n")
    return path
