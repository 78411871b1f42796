"""The last resort: what nothing else caught becomes a line on the screen, and a file with all that is known.

It knows errors and shortages of machines, and no part of fastmae.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import resource
import shlex
import socket
import tempfile
import threading
import time
import traceback
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from fastmae.environment import versions
from fastmae.screen import OutputLostError, complain

EXIT_FAULT = 1
NEEDED = 2e9
"""Bytes of address space below which PyTorch and SciPy cannot be loaded. OpenBLAS then tries again without an end."""
SHOWN = 300
"""Characters of an error's own words in the line."""
VARIABLES = ("CUDA_", "GOMP_", "KMP_", "LC_", "MKL_", "NCCL_", "OMP_", "PYTORCH_", "TORCH_", "TRITON_", "FASTMAE_")
"""How the names of environment variables begin that are written into the file. Others may be secrets."""

MEMORY = (
    "can't allocate memory", "cannot allocate memory", "not enough memory", "out of memory", "std::bad_alloc",
    "failed to map segment", "alloc_failed", "memory allocation", "unable to allocate",
)  # fmt: skip
SHARED_MEMORY = ("shared memory", "/dev/shm", "shm_open", "</torch_", "bus error")
THREADS = ("can't start new thread", "resource temporarily unavailable", "pthread_create")
LOWER = {
    "batch_size": "--batch_size (raise --accum_iter instead)",
    "checkpointing": "the memory of a step with --checkpointing full",
    "num_workers": "--num_workers",
    "cache": "--cache_gb (or leave --cache out)",
    "input_size": "--input_size",
    "model": "the size of --model",
}
"""Which settings take memory, in the order in which one would lower them."""


def report(error: BaseException, words: Sequence[str], config: Any = None) -> int:
    """Shows an error that nothing else caught in one line, writes the file of it, and returns the exit status.

    Args:
        error: the error.
        words: the command.
        config: its settings, if they are known.
    """
    path = write_file(error, words, config)
    if path is None or wants_traceback():
        show_traceback(error)
    where = f"{path}, which has the traceback" if path is not None else "the traceback above"
    line = shortage(error, config)
    if line is None:
        line = f"{_words_of(error)}; this is a fault of fastmae: please report it with {where}"
    complain(f"{_who()}{line}")
    return EXIT_FAULT


def shortage(error: BaseException, config: Any = None) -> str | None:
    """Returns what the machine lacks and which setting takes less of it; None for an error of another kind."""
    text = str(error).lower()
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.EMFILE, errno.ENFILE) or "too many open files" in text:
        return f"too many open files ({_words_of(error)}); raise the limit (`ulimit -n`), or lower --num_workers"
    if number != errno.ENOSPC and any(words in text for words in SHARED_MEMORY):
        return f"too little shared memory ({_words_of(error)}); enlarge /dev/shm, in Docker with --shm-size 8g"
    if any(words in text for words in THREADS) and isinstance(error, RuntimeError | OSError):
        return f"no more threads ({_words_of(error)}); raise the limit (`ulimit -u`), or lower --num_workers"
    if isinstance(error, MemoryError) or number == errno.ENOMEM or any(words in text for words in MEMORY):
        lower = [text for name, text in LOWER.items() if hasattr(config, name)] or ["what the command is given"]
        if getattr(config, "cache", None) != "ram":
            lower = [text for text in lower if "--cache" not in text]
        if isinstance(error, ImportError) or "ulimit -v" in text:  # before there is anything that could be lower
            return f"too little memory ({_words_of(error)}); raise the limit of the process or of its job"
        return f"memory ran out ({_words_of(error)}); lower {', '.join(lower)}"
    return None


def require_address_space() -> None:
    """Refuses to begin under a limit in which the libraries cannot even be loaded: they would try for ever.

    Raises:
        MemoryError: naming the limit.
    """
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if 0 <= limit < NEEDED:
        raise MemoryError(
            f"the limit `ulimit -v` is {limit / 1e9:.1f} GB, and PyTorch needs about {NEEDED / 1e9:.0f} GB"
        )


def show_traceback(error: BaseException) -> None:
    """Prints the traceback on stderr, if that is still possible."""
    with contextlib.suppress(Exception):
        traceback.print_exception(error)


def wants_traceback() -> bool:
    """Whether ``FASTMAE_TRACEBACK=1`` asks for tracebacks on the screen, for those who work on fastmae."""
    return os.environ.get("FASTMAE_TRACEBACK", "") not in ("", "0")


def tell_launcher(error: BaseException) -> None:
    """Writes the reason into the file from which torchrun takes what it says at the end, if there is one."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        with contextlib.suppress(Exception):
            from torch.distributed.elastic.multiprocessing.errors import get_error_handler

            get_error_handler().record_exception(error)


@contextlib.contextmanager
def threads_reported(words: Sequence[str]) -> Generator[None]:
    """While entered, an error that ends a thread is a line and a file as well; what it belongs to goes on without it.

    The threads that decode and save hand their errors to the run, so this is for those of libraries.
    """

    def hook(given: threading.ExceptHookArgs) -> None:
        error = given.exc_value
        if error is None or isinstance(error, SystemExit | OutputLostError):
            return
        path = write_file(error, words, None)
        thread = given.thread.name if given.thread is not None else "unknown"
        complain(f"{_who()}the thread {thread} ended by {_words_of(error)}; the traceback is in {path}")

    before, threading.excepthook = threading.excepthook, hook
    try:
        yield
    finally:
        threading.excepthook = before


def write_file(error: BaseException, words: Sequence[str], config: Any) -> Path | None:
    """Writes what is known of an error: into the run folder if there is one, otherwise where temporary files go.

    Returns:
        The file; None if no folder takes it.
    """
    with contextlib.suppress(Exception):
        text = _all_that_is_known(error, words).encode("utf-8", "backslashreplace")
        for folder in _folders(config):
            for number in range(1000):
                path = folder / f"traceback-{os.environ.get('RANK', '0')}-{number}.txt"
                try:
                    with open(path, "xb") as file:
                        file.write(text)
                    return path
                except FileExistsError:
                    continue
                except OSError:
                    break
    return None


def _folders(config: Any) -> Generator[Path]:
    output = getattr(config, "output_dir", None)
    if isinstance(output, str) and Path(output).is_dir():
        yield Path(output)
    with contextlib.suppress(OSError):
        yield Path(tempfile.mkdtemp(prefix="fastmae-"))


def _all_that_is_known(error: BaseException, words: Sequence[str]) -> str:
    variables = {name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)}
    facts = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join(words),
        "folder": _folder(),
        "process": f"{os.getpid()} on {socket.gethostname()}, rank {os.environ.get('RANK', '0')} "
        f"of {os.environ.get('WORLD_SIZE', '1')}",
        "machine": f"{platform.platform()}, {os.cpu_count()} cores",
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
        "variables": " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items()) or "none",
    }
    head = "".join(f"{name:12}{value}\n" for name, value in facts.items())
    return f"{head}\n{''.join(traceback.format_exception(error))}"


def _folder() -> str:
    try:
        return os.getcwd()
    except OSError as error:
        return f"unknown ({error})"


def _who() -> str:
    """Which rank this is, where there are several."""
    return f"rank {os.environ.get('RANK', '0')}: " if os.environ.get("WORLD_SIZE", "1") != "1" else ""


def _words_of(error: BaseException) -> str:
    """Returns the kind of an error and its words, in one line."""
    words = " ".join(str(error).split())
    if len(words) > SHOWN:
        words = f"{words[:SHOWN]} …"
    return f"{type(error).__name__}: {words}" if words else type(error).__name__
