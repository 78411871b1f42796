"""Tables of the fastest attention backend by GPU and shape: one that ships, and the user's own, which goes before it.

``fastmae bench attention --write`` writes them, fastmae/ops/attention.py reads them. Nothing here computes attention.
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
TAKEN_BY_AUTO = ("sdpa", "triton", "cudnn", "flash")
"""What --attention auto takes if it is the fastest; what else a table names is passed over."""
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def dtype_name(dtype: torch.dtype) -> str:
    """Returns the name of a dtype without its module: ``bfloat16`` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


@constant_when_compiled
def measurements(device: torch.device, dtype: torch.dtype) -> tuple[tuple[Measurement, ...], tuple[Measurement, ...]]:
    """Returns the measurements for a device in the user's table and in the shipped one.

    They are those of a GPU of the same name, or else of any GPU of the same compute capability. The result is
    a constant to torch.compile, which cannot trace how the machine and its files are read.
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
    """Returns the path of the user's own table: fastmae/attention.json in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastmae" / "attention.json"


def read_table(path: Path) -> list[dict[str, Any]]:
    """Reads the entries of a table; there are none if there is no such file.

    An entry has ``device`` (the GPU's name), ``capability`` ("9.0"), ``dtype`` ("bfloat16"), ``S``, ``head_dim`` and
    ``backend`` (the fastest), and whatever else the benchmark adds.

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
ALLOWED = {"dtype": tuple(map(dtype_name, DTYPES)), "backend": (*TAKEN_BY_AUTO, "xformers")}


def _check_entry(entry: object) -> None:
    """Raises ValueError for an entry that lacks a key or has a value of another kind."""
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
