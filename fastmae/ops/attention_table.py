"""What was measured of attention on which GPU: a table that ships, and one of the user's own that goes before it.

Written by ``fastmae bench attention --write``, read by fastmae/ops/attention.py. It knows nothing of attention itself.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from fastmae.files import write_text
from fastmae.torch_compat import constant_when_compiled

SHIPPED_TABLE = Path(__file__).with_name("attention_table.json")
TABLE_BYTES = 1 << 20
Measurement = tuple[int, int, str, str]
"""(tokens, head_dim, the fastest backend, where it was measured)."""
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


@constant_when_compiled
def measurements(device: torch.device, dtype: torch.dtype) -> tuple[tuple[Measurement, ...], tuple[Measurement, ...]]:
    """What the user's and the shipped table say of a device.

    Measurements on a GPU of the same name, or else on any of the same compute capability. A constant to torch.compile,
    which cannot trace a look at the machine and its files.
    """
    gpu = torch.cuda.get_device_name(device)
    capability = ".".join(map(str, torch.cuda.get_device_capability(device)))

    def of(path: Path) -> tuple[Measurement, ...]:
        fitting = [entry for entry in _cached_table(path) if entry["dtype"] == dtype_name(dtype)]
        same = [entry for entry in fitting if entry["device"] == gpu]
        same = same or [entry for entry in fitting if entry["capability"] == capability]
        return tuple((entry["S"], entry["head_dim"], entry["backend"], f"{entry['device']}, {path}") for entry in same)

    return of(user_table()), of(SHIPPED_TABLE)


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
ALLOWED = {"dtype": tuple(map(dtype_name, DTYPES)), "backend": ("sdpa", "xformers", "triton")}


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
