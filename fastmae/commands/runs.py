"""``fastmae runs``: prints run folders beside each other, as a table, as JSON or as comma-separated values."""

from __future__ import annotations

import csv
import difflib
import json
import os
import sys
from typing import Any

from fastmae.config import RunsConfig
from fastmae.errors import SettingError
from fastmae.messages import logger
from fastmae.report.compare import differing, find_runs, order_of, row_of, setting
from fastmae.report.run_folder import read_run
from fastmae.screen import open_console, say, show_table

SHOWN = {"images_per_second": "images/s", "held_out_loss": "held out", "train_loss": "loss", "test_acc1": "test"}
LEFT = ("run", "status", "model")


def run_runs(config: RunsConfig) -> int:
    """Reads run folders and prints a row of each. A damaged file is a warning.

    Raises:
        UserError: there is no run, or no such column to sort by.
    """
    runs = [read_run(folder) for folder in find_runs(config.folders)]
    for run in runs:
        for problem in run.problems:
            logger.warning("%s/%s", run.folder, problem)
    found = [row_of(run) for run in runs]
    settings = [name for name in differing(runs) if name not in found[0]]
    rows = [row | {name: setting(run, name) for name in settings} for row, run in zip(found, runs, strict=True)]
    by = config.sort
    if by is not None:
        if by not in rows[0]:
            near = difflib.get_close_matches(by, rows[0], 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(rows[0])}"
            raise SettingError("sort", by, f"no such column; {hint}")
        rows.sort(key=lambda row: order_of(by, row))
    if config.json:
        print(json.dumps(rows))
    elif config.csv:
        writer = csv.DictWriter(sys.stdout, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    else:
        _show(rows)
    return 0


def _show(rows: list[dict[str, Any]]) -> None:
    """Prints a table without the columns that are empty or, of models, the same in all rows; paths are as short as they
    can be.
    """
    names = [name for name in rows[0] if name != "of" and any(row[name] is not None for row in rows)]
    models = {row["model"] for row in rows}
    if len(models) == 1 and "model" in names:
        names.remove("model")
    parent = os.path.commonpath([os.path.dirname(os.path.abspath(row["run"])) for row in rows])
    names, left_out = _that_fit(names, rows, parent)
    columns = {SHOWN.get(name, name): "left" if name in LEFT else "right" for name in names}
    cells = [[_cell(name, row, parent) for name in names] for row in rows]
    of = f" of {models.pop()}" if len(models) == 1 else ""
    show_table(columns, cells, f"{len(rows)} run{'s' * (len(rows) > 1)}{of} in {parent}")  # type: ignore[arg-type]
    if left_out:
        say(f"too narrow for {', '.join(left_out)}; a wider screen (COLUMNS), --json or --csv shows them")


def _that_fit(names: list[str], rows: list[dict[str, Any]], parent: str) -> tuple[list[str], list[str]]:
    """Returns the columns that fit the screen, at least the names of the runs and their epochs, and the others.

    The last ones, which are settings, are left out first.
    """

    def width(name: str) -> int:
        return 3 + max(len(SHOWN.get(name, name)), *(len(_cell(name, row, parent)) for row in rows))

    room, kept = open_console().width - 1, list[str]()
    needed = [name for name in names if name in ("run", "epochs")]
    for name in sorted(names, key=lambda name: name not in needed):
        room -= width(name)
        if room < 0 and name not in needed:
            break
        kept.append(name)
    return [name for name in names if name in kept], [name for name in names if name not in kept]


def _cell(name: str, row: dict[str, Any], parent: str) -> str:
    value = row[name]
    if name == "run":
        return os.path.relpath(value, parent)
    if name == "epochs":
        return f"{value}/{row['of'] or '?'}"
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
