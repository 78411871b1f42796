"""Fine-tunes once; or several times, with few labels or several seeds, and prints what came of all runs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fastmae.config import FinetuneConfig, amounts_of, seeds_of
from fastmae.data.few import shown_amount
from fastmae.errors import SettingError
from fastmae.evaluate.few import mean_and_deviation, shown_mean
from fastmae.evaluate.probe import save_json
from fastmae.files import read_rows
from fastmae.launch import read_launch
from fastmae.screen import say, show_table
from fastmae.train.classify import finetune
from fastmae.train.settings import as_json

RESULTS = "few.json"
METRIC = "test_acc1"


@dataclass(frozen=True)
class _One:
    """One of several runs."""

    amount: int | float | None
    """How many labelled images it learns from; None for all."""
    config: FinetuneConfig

    @property
    def name(self) -> str:
        return Path(self.config.output_dir).name


def run_finetune(config: FinetuneConfig) -> int:
    """Fine-tunes as the settings say, one run after another where they mean several, and returns the exit status."""
    if len(amounts_of(config)) <= 1 and config.seeds is None:
        return finetune(config)
    if read_launch(os.environ).size > 1:
        name = "seeds" if config.seeds else "shots" if config.shots else "label_share"
        raise SettingError(
            name, getattr(config, name), "means several runs; without torchrun, or with one number a run"
        )
    if config.resume not in ("", "auto", "anew"):
        raise SettingError("resume", config.resume, "must be auto or anew for several runs")
    path = Path(config.output_dir) / RESULTS
    settings = as_json(replace(config, resume=""))
    done = _done(path, settings) if config.resume == "auto" else {}
    runs = [*_runs(config)]
    for number, one in enumerate(runs, 1):
        if one.name in done:
            say(f"run {number} of {len(runs)}     {one.name}: done before, {METRIC} {done[one.name]:.2f} %")
            continue
        say(f"run {number} of {len(runs)}     {one.name}")
        status = finetune(one.config)
        if status:
            return status
        rows = read_rows(Path(one.config.output_dir) / "log.txt")[0]
        done[one.name] = float(next(row[METRIC] for row in reversed(rows) if METRIC in row))
        save_json(path, {"settings": settings, "runs": done, "few": _summary(runs, done)})
    _show(config, runs, done)
    say(f"results         {path}")
    return 0


def _runs(config: FinetuneConfig) -> Iterator[_One]:
    for amount in amounts_of(config) or (None,):
        for seed in seeds_of(config.seeds) if config.seeds else (config.seed,):
            few = {None: "", int: f"shots-{amount}-", float: f"share-{amount:g}-" if amount else ""}
            folder = Path(config.output_dir) / f"{few[None if amount is None else type(amount)]}seed-{seed}"
            yield _One(
                amount,
                replace(
                    config,
                    shots=(amount,) if isinstance(amount, int) else None,
                    label_share=(amount,) if isinstance(amount, float) else None,
                    seeds=None,
                    seed=seed,
                    output_dir=str(folder),
                ),
            )


def _done(path: Path, settings: dict[str, Any]) -> dict[str, float]:
    """Returns what finished runs reached, by their names.

    Raises:
        SettingError: they were made with other settings, or the file is damaged.
    """
    try:
        found = json.loads(path.read_text())
        runs, before = {str(name): float(value) for name, value in found["runs"].items()}, dict(found["settings"])
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SettingError("resume", "auto", f"{path} cannot be read ({error}); use --resume=anew") from error
    # Which runs there are may change, what a run is may not.
    several = {"shots", "label_share", "seeds"}
    now = json.loads(json.dumps(settings))
    for name in now.keys() - several:
        if before.get(name) != now[name]:
            problem = f"the runs in {path} have {name} {before.get(name)}, not {now[name]}"
            raise SettingError("resume", "auto", f"{problem}; use the same, or another --output_dir")
    return runs


def _grouped(runs: list[_One], done: dict[str, float]) -> dict[int | float | None, list[float]]:
    groups: dict[int | float | None, list[float]] = {}
    for one in runs:
        if one.name in done:
            groups.setdefault(one.amount, []).append(done[one.name])
    return groups


def _summary(runs: list[_One], done: dict[str, float]) -> list[dict[str, Any]]:
    return [
        {"label_share" if isinstance(amount, float) else "shots": amount, METRIC: mean_and_deviation(values)}
        for amount, values in _grouped(runs, done).items()
    ]


def _show(config: FinetuneConfig, runs: list[_One], done: dict[str, float]) -> None:
    columns: dict[str, Literal["left", "right"]] = {"labelled": "right", "runs": "right", "top-1": "right"}
    rows = [
        ("all" if amount is None else shown_amount(amount), len(values), shown_mean(values))
        for amount, values in _grouped(runs, done).items()
    ]
    show_table(columns, rows, f"{config.finetune or 'random weights'}: fine-tuned, mean ± deviation over seeds")
