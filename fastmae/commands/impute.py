"""Fills the missing cells of a table and writes it as it was read; prints how many, and the error of known ones."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from fastmae.commands.shared import make_folder, open_model, report_stock
from fastmae.config import ImputeConfig
from fastmae.data.arrays import UNREADABLE
from fastmae.data.stock import count_of
from fastmae.data.table_files import RawTable, read_table, table_suffix, write_filled
from fastmae.data.tables import table_source
from fastmae.errors import SettingError, in_one_line
from fastmae.evaluate.impute import Check, How, check_imputing, missing_filled, require_vectors
from fastmae.files import write_text, write_whole
from fastmae.screen import say, show_table

SHOWN = 12
"""Of so many columns the errors are printed, the largest first."""


def run_impute(config: ImputeConfig) -> int:
    """Fills the missing cells of a table and writes it to ``config.output``."""
    model, data = open_model(config, needs_decoder=True)
    require_vectors(model)
    output = Path(config.output)
    raw = _table(data, output)
    if config.report is not None and Path(config.report).resolve() == Path(raw.origin).resolve():
        raise SettingError("report", config.report, "is the table itself; name another file")
    make_folder(output.parent)
    _try_to_write("output", output)
    if config.report is not None:
        _try_to_write("report", Path(config.report))
    source = table_source(raw, model.read_as)
    report_stock(source)
    how = How(passes=config.passes, batch_size=config.batch_size, seed=config.seed)
    check = None if config.check is None else check_imputing(model, source, config.check, how)
    filled = missing_filled(model, raw, source, how)
    try:
        write_whole(output, lambda file: write_filled(file, raw, filled, model.read_as.nodata))
    except OSError as error:
        raise SettingError("output", str(output), f"cannot be written ({error}); name another file") from error
    cells = sum(len(rows) for rows, _ in filled.values())
    summary: dict[str, Any] = {"rows": raw.length, "columns": len(source.columns), "filled": cells}
    summary |= {"filled_by_column": {name: len(rows) for name, (rows, _) in filled.items()}}
    summary |= {} if check is None else {"check": check.summary()}
    if config.report is not None:
        _write_report(config.report, summary)
    if config.json:
        print(json.dumps(summary))
        return 0
    if check is not None:
        _show(check)
    of = f"{source.values.size:,} cells of {count_of(raw.length, 'rows')}"
    say(
        f"{output}: {cells:,} of {of} filled, in {count_of(len(filled), 'columns')}"
        if cells
        else f"{output}: no cell was missing"
    )
    return 0


def _table(data: str | tuple[str, ...], output: Path) -> RawTable:
    """Reads the table that is to be filled.

    Raises:
        SettingError: it is no file of a table, or is to be written as another kind.
    """
    paths = (data,) if isinstance(data, str) else data
    path = Path(paths[0]).expanduser()
    if len(paths) > 1 or not path.is_file() or not table_suffix(path.name):
        raise SettingError("data_path", paths, "must be one file of a table: .csv, .csv.gz, .tsv, .parquet or .npy")
    kind = table_suffix(path.name)
    if table_suffix(output.name) != kind:
        raise SettingError("output", str(output), f"must end in {kind}, as the table does, whose cells are kept")
    try:
        return read_table(path)
    except UNREADABLE as error:
        reason = in_one_line(" ".join(str(error).split()), 400)
        raise SettingError("data_path", str(path), f"cannot be read ({reason}); check or replace the file") from error


def _try_to_write(name: str, path: Path) -> None:
    """Refuses a file that cannot be written, before anything is predicted.

    Raises:
        SettingError: it is a folder, or its own folder is not there or takes no file.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder")
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise SettingError(name, str(path), f"cannot be written ({error}); name another file") from error


def _write_report(path: str, summary: dict[str, Any]) -> None:
    try:
        write_text(Path(path), json.dumps(summary, indent=1))
    except OSError as error:
        raise SettingError("report", path, f"cannot be written ({error}); name another file") from error


def _show(check: Check) -> None:
    worst = sorted(check.columns, key=lambda column: -column[2])
    rows = [(name, f"{cells:,}", f"{error:.3f}", f"{mean:.3f}") for name, cells, error, mean in worst[:SHOWN]]
    if len(worst) > SHOWN:
        rows.append((f"{len(worst) - SHOWN} more", "", "", ""))
    rows.append(("all", f"{check.cells:,}", f"{check.error:.3f}", f"{check.error_of_mean:.3f}"))
    title = f"errors of {100 * check.share:g} % of the known cells, hidden, in deviations of their column"
    show_table({"column": "left", "cells": "right", "error": "right", "of the mean": "right"}, rows, title)
