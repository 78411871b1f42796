"""Copies of the log, the settings and the pictures for other programs: TensorBoard, Weights & Biases, MLflow.

One that fails is stopped; the run goes on.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastmae.errors import SettingError, install_hint
from fastmae.files import json_lines
from fastmae.report.run_folder import EVENTS

# The names that the official script uses in TensorBoard.
NAMES = {"loss": "train_loss"}
PICTURES = "reconstructions"
RESULTS = ("train_loss", "held_out_loss", "knn", "linear", "rankme", "feature_std")
"""What runs are compared by, beside their settings."""
MLFLOW_METRICS, MLFLOW_PARAMS, MLFLOW_SECONDS = 500, 100, 10.0
"""How many numbers and settings go into one request, and how long numbers wait for it at most while others come."""

Write = Callable[[dict[str, Any]], None]
Picture = Callable[[int, Path], None]
Close = Callable[[], None]
Opened = tuple[Write, Picture, Close]


class Sink:
    """Takes rows of the log, and pictures, until it fails, which is reported once."""

    def __init__(self, name: str, open_it: Callable[[], Opened], say: Callable[[str], None]) -> None:
        self._name, self._say, self._works = name, say, True
        self._guard(lambda: self._open(open_it))

    def _open(self, open_it: Callable[[], Opened]) -> None:
        self._write, self._picture, self._close = open_it()

    def write(self, row: dict[str, Any]) -> None:
        self._guard(lambda: self._write(row))

    def picture(self, step: int, path: Path) -> None:
        self._guard(lambda: self._picture(step, path))

    def close(self) -> None:
        self._guard(lambda: self._close())

    def _guard(self, act: Callable[[], None]) -> None:
        if not self._works:
            return
        try:
            act()
        except Exception as error:  # whatever it is, training matters more
            self._works = False
            reason = " ".join(str(error).split()) or type(error).__name__
            self._say(f"{self._name:15} failed and is off from here on; the run and metrics.jsonl go on ({reason})")


def check_sinks(log_dir: str | None, wandb: str | None, mlflow: str | None) -> None:
    """Checks that the packages which they need are installed.

    Raises:
        UserError: a package is not installed.
    """
    for flag, value, module, name, extra in (
        ("log_dir", log_dir, "tensorboard", "TensorBoard", "track"),
        ("wandb", wandb, "wandb", "Weights & Biases", "wandb"),
        ("mlflow", mlflow, "mlflow", "MLflow", "mlflow"),
    ):
        if value and importlib.util.find_spec(module) is None:
            raise SettingError(flag, value, f"{name} is not installed; {install_hint(extra)}")


def open_sinks(
    run: Path,
    *,
    log_dir: str | None,
    wandb: str | None,
    mlflow: str | None,
    settings: dict[str, Any],
    say: Callable[[str], None],
) -> list[Sink]:
    """Opens the sinks that were asked for: TensorBoard files in ``log_dir``, a run in the W&B project ``wandb``, a run
    in the MLflow experiment ``mlflow``.
    """
    sinks = []
    if log_dir:
        sinks.append(Sink("tensorboard", lambda: _tensorboard(log_dir, settings), say))
    if wandb:
        sinks.append(Sink("wandb", lambda: _wandb(wandb, run, settings), say))
    if mlflow:
        sinks.append(Sink("mlflow", lambda: _mlflow(mlflow, run, settings), say))
    return sinks


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    """Returns the numbers of a row under the names that the sinks show."""
    return {NAMES.get(key, key): float(value) for key, value in row.items() if value is not None and key != "step"}


def _flat(settings: dict[str, Any]) -> dict[str, bool | int | float | str]:
    """Returns the settings that are given, as numbers and texts."""
    given = {name: value for name, value in settings.items() if value is not None and value != ""}
    return {name: value if isinstance(value, bool | int | float | str) else str(value) for name, value in given.items()}


def _identity(run: Path) -> str:
    """Returns a name of a run that is the same however often it goes on, and that no other run has, not even in a
    folder of the same path: where one began anew, where one was deleted, or in a container.

    It is made of the path and of the lines about how the run began. One from before there were events is known by its
    path, and by how many runs in it began anew.
    """
    earlier = len(list(run.glob("earlier-[0-9]*")))
    known = os.fsencode(run.resolve()) + b"\0%d" % earlier * bool(earlier)
    line, event = next(json_lines(run / EVENTS), (b"", None))
    if event is not None and event.get("event") == "started":
        start, _ = next(json_lines(run / "environment.jsonl"), (b"", None))
        known += b"\0" + line + start
    return hashlib.sha256(known).hexdigest()[:16]


def _tensorboard(log_dir: str, settings: dict[str, Any]) -> Opened:
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    writer = SummaryWriter(log_dir)
    for summary in hparams(_flat(settings), dict.fromkeys(RESULTS, 0.0)):  # into this run, not into one of its own
        writer._get_file_writer().add_summary(summary)

    def write(row: dict[str, Any]) -> None:
        for name, value in _numbers(row).items():
            writer.add_scalar(name, value, row["step"])

    def picture(step: int, path: Path) -> None:
        with Image.open(path) as image:
            writer.add_image(PICTURES, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    return write, picture, writer.close


def _wandb(project: str, run: Path, settings: dict[str, Any]) -> Opened:
    import wandb

    wandb_run = wandb.init(
        project=project,
        name=run.name,
        id=_identity(run),
        resume="allow",
        dir=str(run),
        config=settings,
        settings=wandb.Settings(console="off"),
    )
    wandb_run.define_metric("*", step_metric="step")  # so that steps which are repeated after a rollback are taken

    def picture(step: int, path: Path) -> None:
        wandb_run.log({PICTURES: wandb.Image(str(path)), "step": step})

    return lambda row: wandb_run.log({**_numbers(row), "step": row["step"]}), picture, wandb_run.finish


def _mlflow(experiment: str, run: Path, settings: dict[str, Any]) -> Opened:
    """Settings are parameters, which MLflow lets nobody change; those of a run that goes on are in settings.json."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    client, identity = MlflowClient(), _identity(run)
    found = client.get_experiment_by_name(experiment)
    number = client.create_experiment(experiment) if found is None else found.experiment_id
    earlier = client.search_runs([number], f"tags.`fastmae.run` = '{identity}'", max_results=1)
    if earlier:
        name = earlier[0].info.run_id
        client.update_run(name, status="RUNNING")
    else:
        name = client.create_run(number, run_name=run.name, tags={"fastmae.run": identity}).info.run_id
        for some in _pieces([Param(key, str(value)) for key, value in _flat(settings).items()], MLFLOW_PARAMS):
            client.log_batch(name, params=some)
    client.log_dict(name, settings, "settings.json")
    waiting: list[Metric] = []
    sent = time.monotonic()

    def send() -> None:
        nonlocal sent
        for some in _pieces(waiting, MLFLOW_METRICS):
            client.log_batch(name, metrics=some)
        waiting.clear()
        sent = time.monotonic()

    def write(row: dict[str, Any]) -> None:
        now = int(time.time() * 1000)
        waiting.extend(Metric(key, value, now, row["step"]) for key, value in _numbers(row).items())
        if len(waiting) >= MLFLOW_METRICS or time.monotonic() - sent > MLFLOW_SECONDS:
            send()

    def picture(step: int, path: Path) -> None:
        client.log_artifact(name, str(path), PICTURES)

    def close() -> None:
        send()
        client.set_terminated(name)

    return write, picture, close


def _pieces(items: list[Any], size: int) -> Iterator[list[Any]]:
    return (items[first : first + size] for first in range(0, len(items), size))
