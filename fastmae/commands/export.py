"""Writes a model in a form that other tools read, and prints what was written and checked."""

from __future__ import annotations

from functools import partial

from fastmae.checkpoint.load import open_checkpoint
from fastmae.commands.shared import ranks_that_share
from fastmae.config import ExportConfig
from fastmae.data.loader import default_workers
from fastmae.data.sources import shown
from fastmae.export.run import export
from fastmae.export.segmenter import export_segmenter, open_whole_segmenter
from fastmae.screen import say, show_table
from fastmae.train import parallel


def run_export(config: ExportConfig) -> int:
    """Writes the model and prints what was written; with ``config.check`` also how a program compares."""
    with ranks_that_share("cpu") as (context, share):
        with parallel.agreeing(context):
            segmenter = open_whole_segmenter(config)
            if segmenter is not None:
                say(export_segmenter(config, *segmenter) if share.is_first else "")
                return 0
            opened = open_checkpoint(config.checkpoint, config)
        line, comparison = export(config, opened, default_workers(), share, partial(parallel.agreeing, context))
    if not share.is_first:
        return 0
    say(line)
    if config.check is None:
        return 0
    rows = []
    for name, figures in comparison.items():
        cells = f"{figures.knn:.2f} %", f"{figures.linear:.2f} %", f"{figures.images_per_second:.0f}"
        rows.append((name, f"{figures.difference:.1e}", *cells))
    names = ("largest difference", "k-NN", "logistic regression", "images/s")
    show_table({"encoder": "left", **dict.fromkeys(names, "right")}, rows, f"{config.output} on {shown(config.check)}")
    return 0
