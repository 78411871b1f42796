"""How well does a masked autoencoder fill the missing cells of a table, beside the imputers of scikit-learn?

    python -m fastmae.benchmarks.imputation --output benchmarks/results

Cells of complete tables of scikit-learn are hidden at random; each imputer gets the same table with holes, is fitted on
it and fills it, with its defaults; those of scikit-learn stand behind its StandardScaler. The error is the root of the
mean squared difference over the hidden cells, in deviations of their columns. Imputers take turns, and a time is that
of fitting and filling together. A run on a small table comes first, so that no time counts what is loaded once.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn import datasets
from sklearn.experimental import enable_iterative_imputer  # noqa: F401
from sklearn.impute import IterativeImputer, KNNImputer, SimpleImputer
from sklearn.preprocessing import StandardScaler

from fastmae.benchmarks import harness
from fastmae.checkpoint.load import load_model
from fastmae.config import PretrainConfig
from fastmae.data.objects import given_parts
from fastmae.data.tables import like, raw_table, table_source
from fastmae.errors import UserError
from fastmae.evaluate.impute import How, missing_filled
from fastmae.facts import ReadAs
from fastmae.messages import logger
from fastmae.train.given import Given
from fastmae.train.pretrain import pretrain

TABLES = ("breast_cancer", "wine", "diabetes", "digits")
STEPS = 600
"""Optimiser steps of our model on each table, whatever its length."""
BATCH = 256


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    tables: tuple[str, ...]
    shares: tuple[float, ...]
    seeds: tuple[int, ...]
    output: str | None


Impute = Callable[[np.ndarray, int], np.ndarray]
"""From a table float64 [N, D] with NaN, and a seed, to the table filled."""
OURS = "mae_mlp"


def with_fastmae(table: np.ndarray, seed: int) -> np.ndarray:
    """Trains mae_mlp with its defaults on a table, and fills it: what ``fastmae.pretrain`` and ``impute`` do."""
    batch = min(BATCH, len(table))
    epochs = math.ceil(STEPS / (len(table) // batch))
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        config = PretrainConfig(
            data_path="<a table>", model="mae_mlp", output_dir=folder, epochs=epochs, batch_size=batch, lr=1e-3,
            seed=seed, warmup_epochs=epochs / 10, probe=False, device="cpu", tune="off", save_freq=epochs,
            checkpoint_freq=epochs, num_workers=1,
        )  # fmt: skip
        if pretrain(config, Given(data=given_parts(table, table=ReadAs(columns=())))) != 0:
            raise UserError("the training was stopped; start the benchmark again")
        model = load_model(folder)
    raw, _ = raw_table(table) or (None, None)
    assert raw is not None
    return like(table, raw, missing_filled(model, raw, table_source(raw, model.read_as), How()))


def scaled(make: Callable[[int], Any]) -> Impute:
    """Returns an imputer of scikit-learn behind its scaler, as distances and penalties depend on units."""

    def impute(table: np.ndarray, seed: int) -> np.ndarray:
        scaler = StandardScaler().fit(table)
        filled = scaler.inverse_transform(make(seed).fit_transform(scaler.transform(table)))
        return np.where(np.isnan(table), filled, table)  # as the way there and back rounds

    return impute


IMPUTERS: dict[str, Impute] = {
    "mean": scaled(lambda seed: SimpleImputer()),
    "k-NN": scaled(lambda seed: KNNImputer()),
    "iterative": scaled(lambda seed: IterativeImputer(random_state=seed)),
    OURS: with_fastmae,
}


def complete_table(name: str) -> np.ndarray:
    """Returns a table float64 [N, D] without its constant columns, of which no cell can be missed."""
    data = datasets.load_diabetes(scaled=False) if name == "diabetes" else getattr(datasets, f"load_{name}")()
    table = np.asarray(data.data, np.float64)
    return table[:, table.std(axis=0) > 0]


def bench(settings: Settings, command: Sequence[str]) -> int:
    """Prints errors and times, and writes what was asked for."""
    rows, samples = [], []
    with_fastmae(complete_table("wine")[:40], 0)  # what is loaded once
    for name in settings.tables:
        table = complete_table(name)
        for share in settings.shares:
            errors: dict[str, list[float]] = {imputer: [] for imputer in IMPUTERS}
            seconds: dict[str, list[float]] = {imputer: [] for imputer in IMPUTERS}
            for seed in settings.seeds:
                hidden = np.random.Generator(np.random.Philox(seed)).random(table.shape) < share
                for imputer, impute in IMPUTERS.items():
                    holed = np.where(hidden, np.nan, table)
                    begun = time.perf_counter()
                    filled = impute(holed, seed)
                    seconds[imputer].append(time.perf_counter() - begun)
                    if not np.array_equal(filled[~hidden], table[~hidden]):
                        return harness.refuse(f"{imputer} changed cells of {name} that were there")
                    off = ((filled - table) / table.std(axis=0))[hidden]
                    errors[imputer].append(float(np.sqrt(np.square(off).mean())))
            means = {imputer: np.mean(errors[imputer]) for imputer in IMPUTERS}
            cells = [f"{mean:.3f}{'*' * bool(mean == min(means.values()))}" for mean in means.values()]
            times = " / ".join(f"{np.median(one):.2f}" for one in seconds.values())
            rows.append((f"{name} {table.shape[0]}×{table.shape[1]}, {share:g}", *cells, times))
            samples.append({"table": name, "share": share, "errors": errors, "seconds": seconds})
            print(*rows[-1], sep="  ", flush=True)
    title = f"error of hidden cells in deviations, mean of {len(settings.seeds)} seeds; * the smallest"
    shown = harness.table(title, ("table, share hidden", *IMPUTERS, "seconds, in this order"), rows)
    machine = harness.machine_name(torch.device("cpu"))
    measured: dict[str, Any] = {"steps": STEPS, "samples": samples}
    harness.report([shown], f"imputation-{machine}", command=command, settings=settings, measured=measured)
    return 0


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", default=list(TABLES), choices=TABLES)
    parser.add_argument("--shares", nargs="+", type=float, default=[0.1, 0.3, 0.5])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", help="a folder for the result as JSON")
    given = parser.parse_args(words)
    warnings.filterwarnings("ignore", module="sklearn")  # that the iterative imputer stops after its 10 rounds
    logger.setLevel(logging.ERROR)
    settings = Settings(tuple(given.tables), tuple(given.shares), tuple(given.seeds), given.output)
    return bench(settings, ["python", "-m", "fastmae.benchmarks.imputation", *words])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
