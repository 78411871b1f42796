"""Compares run folders: finds them, and makes a row of each, in which settings stand that differ."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fastmae.config.family import PRESET_OF_FAMILY, TAKEN_BY, family_of
from fastmae.config.load import COMPUTED
from fastmae.errors import UserError
from fastmae.report.run_folder import RunRecord, is_run

PROBES = ("linear", "knn")
REACHED = ("train_loss", "held_out_loss", *PROBES, "test_acc1")
"""What a run may have reached, as log.txt, metrics.jsonl and probe.json call it."""
LARGE_IS_BETTER = ("linear", "knn", "test_acc1", "images_per_second")
SAME = (*COMPUTED, "output_dir", "resume", "num_workers", "log_dir", "wandb", "model", "epochs")
"""What is not compared: it follows from the rest, names the run, or has a column of its own."""


def find_runs(folders: Iterable[str | Path]) -> list[Path]:
    """Returns the run folders that are named, and those below other folders; links to folders are not followed.

    Raises:
        UserError: a folder is not there, or holds no run.
    """
    found: list[Path] = []
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise UserError(f"{folder}: is not there; name a run folder, or a folder with run folders")
        before = len(found)
        for path, names, _ in os.walk(folder):
            names.sort()
            if is_run(Path(path)):
                found.append(Path(path))
                names.clear()
        if len(found) == before:
            raise UserError(f"{folder}: holds no run; name a folder that fastmae pretrain or finetune wrote into")
    return list(dict.fromkeys(found))


def row_of(run: RunRecord) -> dict[str, Any]:
    """Returns how far a run is and what it reached. What it does not have is None.

    Accuracies of probes are those after the training, or else the newest.
    """
    epochs = run.probes.get("epochs", {})
    newest = epochs[max(epochs, key=int)] if epochs else {}
    probed = run.probes.get("after", newest)
    reached = {name: probed[name] if probed and name in PROBES else run.newest(name) for name in REACHED}
    model = run.settings.get("model")
    return {
        "run": str(run.folder),
        "status": run.status,
        "model": None if model is None else str(model),
        "epochs": run.epochs[-1]["epoch"] + 1 if run.epochs else 0,
        "of": run.settings.get("epochs"),
        **reached,
        "images_per_second": run.newest("images_per_second"),
    }


def setting(run: RunRecord, name: str) -> Any:
    """Returns a setting of a run; None where it has none, or where it means nothing to the family of its model."""
    means_something = family_of(run.settings.get("model")) in TAKEN_BY.get(name, PRESET_OF_FAMILY)
    return run.settings.get(name) if means_something else None


def differing(runs: Sequence[RunRecord]) -> list[str]:
    """Returns the settings that are not the same in all runs, in the order in which config.json has them."""
    names = dict.fromkeys(name for run in runs for name in run.settings if name not in SAME)
    found = [name for name in names if len({repr(setting(run, name)) for run in runs}) > 1]
    return [name for name in found if name != "lr" or "blr" not in found]  # it follows from blr


def order_of(name: str, row: dict[str, Any]) -> tuple[bool, bool, Any]:
    """Returns by what a row is sorted: the best values of a column first, texts after numbers, no value last."""
    value = row[name]
    if isinstance(value, int | float):
        return False, False, -value if name in LARGE_IS_BETTER else value
    return value is None, True, str(value)
