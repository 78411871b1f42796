"""Writes a model in a form that other tools read, and prints what was written and checked."""

from __future__ import annotations

import dataclasses
import tempfile
from functools import partial
from pathlib import Path

from fastmae.checkpoint.load import Opened, open_checkpoint, own_data
from fastmae.commands.shared import make_folder, ranks_that_share
from fastmae.config import ExportConfig
from fastmae.data.loader import default_workers
from fastmae.data.sources import shown
from fastmae.errors import SettingError
from fastmae.export.atomic import refuse_filled_folder
from fastmae.export.measure import EncoderFigures, open_labelled
from fastmae.export.prune import (
    PrunedFigures,
    all_of,
    check_count,
    compare,
    pruned,
    read_for_search,
    search,
    some_drawn,
)
from fastmae.export.run import export
from fastmae.export.segmenter import export_segmenter, open_whole_segmenter
from fastmae.model.mae import as_vit
from fastmae.screen import say, show_table
from fastmae.train import parallel


def run_export(config: ExportConfig) -> int:
    """Writes the model and prints what was written; with ``config.check`` also how a program compares."""
    with ranks_that_share("cpu") as (context, share):
        with parallel.agreeing(context):
            if config.prune is not None and share.ranks > 1:
                raise SettingError("prune", config.prune, f"searches in one process, not in {share.ranks}")
            segmenter = open_whole_segmenter(config)
            if segmenter is not None:
                say(export_segmenter(config, *segmenter) if share.is_first else "")
                return 0
            opened = open_checkpoint(config.checkpoint, config)
        if config.prune is not None:
            return _export_pruned(config, opened)
        line, comparison = export(config, opened, default_workers(), share, partial(parallel.agreeing, context))
    if not share.is_first:
        return 0
    _show_export(config, line, comparison)
    return 0


def _show_export(config: ExportConfig, line: str, comparison: dict[str, EncoderFigures]) -> None:
    """Prints the line of an export, and how a program compares if that was measured."""
    say(line)
    if config.check is None:
        return
    rows = []
    for name, figures in comparison.items():
        cells = f"{figures.knn:.2f} %", f"{figures.linear:.2f} %", f"{figures.images_per_second:.0f}"
        rows.append((name, f"{figures.difference:.1e}", *cells))
    names = ("largest difference", "k-NN", "logistic regression", "images/s")
    show_table({"encoder": "left", **dict.fromkeys(names, "right")}, rows, f"{config.output} on {shown(config.check)}")


def _export_pruned(config: ExportConfig, opened: Opened) -> int:
    """Chooses what is removed, writes what is left, and prints what that costs and saves."""
    assert config.prune is not None
    if opened.head and config.part != "encoder":
        problem = "is for encoders, and the head was trained on this whole one; give --part=encoder with it"
        raise SettingError("prune", config.prune, problem)
    whole, workers = as_vit(opened.model, "--prune"), default_workers()
    check_count(whole, config.prune, config.prune_count)
    data = own_data(config.checkpoint, opened.settings) if config.data_path is None else config.data_path
    parts = open_labelled(data, whole.read_as, "--data_path")
    train, test = (some_drawn(part, config.prune_images) for part in parts)
    opened = dataclasses.replace(opened, has_decoder=False, head={})
    # What the format cannot hold, and a path that cannot be written, are refused before the search, not after it: by
    # an export of the first block alone.
    refuse_filled_folder(Path(config.output))
    make_folder(Path(config.output).parent)
    with tempfile.TemporaryDirectory() as folder:
        trial = dataclasses.replace(config, output=str(Path(folder) / Path(config.output).name), check=None)
        first = pruned(whole, {0: all_of(whole)[0]})
        export(trial, dataclasses.replace(opened, model=first), workers)
    bank, queries = read_for_search(whole, train, workers)
    steps = []
    for step in search(whole, config.prune, config.prune_count, bank, queries):
        steps.append(step)
        found = f"k-NN {step.knn:.2f} %, of the whole {step.whole_knn:.2f} %"
        asked = f"on {len(queries.labels)} images of the train part"
        say(f"{len(steps)} of {config.prune_count}: without {step.removed}; {found} ({asked})")
    smaller = dataclasses.replace(opened, model=pruned(whole, steps[-1].kept))
    _show_export(config, *export(config, smaller, workers))
    _show_pruned(compare(whole, steps, train, test, workers), f"{config.output} on {len(test)} images of {shown(data)}")
    return 0


def _show_pruned(encoders: dict[str, PrunedFigures], title: str) -> None:
    """Prints what each encoder is worth and what it costs."""
    rows = []
    for name, one in encoders.items():
        figures = one.figures
        accuracy = f"{figures.knn:.2f} %", f"{figures.linear:.2f} %"
        costs = f"{one.parameters / 1e6:.3f}", f"{one.megabytes:.2f}", f"{one.flops / 1e6:.1f}"
        rows.append((name, *accuracy, *costs, f"{1e3 / figures.images_per_second:.2f}"))
    names = ("k-NN", "logistic", "million", "MB", "MFLOP", "ms/image")
    show_table({"encoder": "left", **dict.fromkeys(names, "right")}, rows, title)
