"""Fills what is missing in a table with what a model of vectors predicts, and measures how well it does so.

A cell gets the mean of several predictions, each of which sees another four fifths of what is there. On tables of
scikit-learn the error is 0.2 to 5.5 % lower than that of one prediction that sees everything (docs/tables.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastmae.data.table_files import RawTable
from fastmae.data.tables import TableSource
from fastmae.errors import SettingError, UserError
from fastmae.model.family import MaskedModel
from fastmae.ops.bernoulli_masking import bernoulli_masking

ALSO_HIDDEN = 0.2
"""The share of the known cells that each of several predictions does not see."""
Filled = dict[str, tuple[np.ndarray, np.ndarray]]
"""By the name of a column the rows int64 [n], rising, and their numbers float64 [n] in its units."""


@dataclass(frozen=True, kw_only=True)
class How:
    """How cells are predicted."""

    passes: int = 32
    """Over how many predictions the mean is taken; with one, every cell that is there is seen."""
    batch_size: int = 4096
    """Rows per forward pass."""
    seed: int = 0
    """The number from which it follows what each prediction does not see."""


@dataclass(frozen=True)
class Check:
    """How far predictions are from known cells that were hidden. Errors are in units of the column's deviation."""

    share: float
    cells: int
    """How many were hidden."""
    error: float
    """The root of the mean squared error over all of them."""
    error_of_mean: float
    """That of the mean of each column, which needs no model."""
    columns: tuple[tuple[str, int, float, float], ...]
    """Of each column with hidden cells its name, their number, and both errors."""

    def summary(self) -> dict[str, Any]:
        """Returns it for JSON."""
        names = ("column", "cells", "error", "error_of_mean")
        columns = [dict(zip(names, column, strict=True)) for column in self.columns]
        whole = {"share": self.share, "cells": self.cells, "error": self.error, "error_of_mean": self.error_of_mean}
        return {**whole, "columns": columns}


def require_vectors(model: MaskedModel) -> None:
    """Refuses a model that predicts no cells of a table.

    Raises:
        UserError: it is of another family, or was trained on images.
    """
    if model.family != "mlp":
        raise UserError("impute needs a model of vectors (--model mae_mlp); reconstruct fills in images")
    if model.img_size != (1, 1):
        raise UserError("the model was trained on images, and tables are filled by one that was trained on a table")


def predicted(model: MaskedModel, values: np.ndarray, hidden: np.ndarray | None, how: How) -> np.ndarray:
    """Predicts every cell of a table, in units of its column: float64 [N, D].

    Args:
        model: of vectors; it is used on its device.
        values: float32 [N, D], NaN where a cell is missing.
        hidden: bool [N, D], which cells the model does not see at all; None for none.
    """
    mean, std = (tensor.double().cpu().numpy() for tensor in (model.mean, model.std))
    known = values if hidden is None else np.where(hidden, np.float32(np.nan), values)
    parts = [_standardised(model, known, start, how) for start in range(0, len(values), how.batch_size)]
    return np.concatenate([np.zeros((0, len(mean))), *parts]) * std + mean


@torch.no_grad()
def _standardised(model: MaskedModel, values: np.ndarray, start: int, how: How) -> np.ndarray:
    """Returns the mean of the predictions for some rows, each of which sees another part of what is there."""
    rows = torch.from_numpy(values[start : start + how.batch_size]).to(model.device)[:, None, None]
    draw_ids = torch.arange(start, start + len(rows))
    total = np.zeros((len(rows), values.shape[1]))
    for number in range(how.passes):
        if how.passes == 1:
            mask = torch.zeros(total.shape, dtype=torch.bool, device=model.device)
        else:
            mask = bernoulli_masking(draw_ids * how.passes + number, how.seed, values.shape[1], ALSO_HIDDEN)
        total += model.predict(rows, mask.to(model.device), ALSO_HIDDEN)[..., 0].double().cpu().numpy()
    return total / how.passes


def missing_filled(model: MaskedModel, raw: RawTable, source: TableSource, how: How) -> Filled:
    """Returns what is written into the missing cells of a table, as it is stored.

    Args:
        model: of vectors.
        raw: the table.
        source: the same as a source, with the columns of the model.

    Raises:
        UserError: a prediction is no number.
    """
    missing = np.isnan(source.values)
    some = np.flatnonzero(missing.any(axis=1))
    numbers = np.zeros(source.values.shape)
    numbers[some] = predicted(model, source.values[some], None, how)
    _require_finite(numbers, missing, source)
    stored = source.columns if set(source.columns) <= set(raw.names) else raw.names
    rows = [np.flatnonzero(column) for column in missing.T]
    return {name: (at, numbers[at, d]) for d, (name, at) in enumerate(zip(stored, rows, strict=True)) if len(at)}


def _require_finite(numbers: np.ndarray, wanted: np.ndarray, source: TableSource) -> None:
    """Raises UserError if a number that is wanted is none, as a row or the weights of the model are too large."""
    wrong = np.argwhere(wanted & ~np.isfinite(numbers))
    if not len(wrong):
        return
    row, d = wrong[0].tolist()
    largest = int(np.nan_to_num(np.abs(source.values[row])).argmax())
    has = f"its largest number is {source.values[row, largest]:g}, in column {source.columns[largest]!r}"
    problem = (
        f"row {row + 1} of column {source.columns[d]!r} cannot be predicted, as the model computes no finite number"
    )
    raise UserError(
        f"{source.origin}: {problem} for this row ({has}); correct the row, or train again without such rows"
    )


def check_imputing(model: MaskedModel, source: TableSource, share: float, how: How) -> Check:
    """Hides a share of the known cells, each with the same chance, and compares what is predicted with what is there.

    Raises:
        SettingError: no known cell falls to the share.
    """
    values = source.values
    drawn = np.random.Generator(np.random.Philox(how.seed)).random(values.shape) < share
    hidden = drawn & ~np.isnan(values)
    if not hidden.any():
        raise SettingError("check", share, "hides none of the known cells; raise it, or give more rows")
    mean, std = (tensor.double().cpu().numpy() for tensor in (model.mean, model.std))
    with np.errstate(invalid="ignore"):
        off = np.square((predicted(model, values, hidden, how) - values) / std)
        off_mean = np.square((values - mean) / std)

    def root(squares: np.ndarray, where: np.ndarray) -> float:
        return round(float(np.sqrt(squares[where].mean())), 4)

    columns = [
        (name, int(which.sum()), root(off[:, d], which), root(off_mean[:, d], which))
        for d, (name, which) in enumerate(zip(source.columns, hidden.T, strict=True))
        if which.any()
    ]
    return Check(share, int(hidden.sum()), root(off, hidden), root(off_mean, hidden), tuple(columns))
