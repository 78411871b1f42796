"""Writes a model in a form that other tools read, and prints what was written and checked."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from fastmae.checkpoint.load import open_checkpoint
from fastmae.config import ExportConfig
from fastmae.data.loader import default_workers
from fastmae.data.sources import shown
from fastmae.export.run import export


def run_export(config: ExportConfig) -> int:
    """Writes the model and prints what was written; with ``config.check`` also how a program compares."""
    opened = open_checkpoint(config.checkpoint, config.model)
    line, comparison = export(config, opened.model, opened.settings, opened.has_decoder, default_workers())
    print(line)
    if config.check is None:
        return 0
    table = Table("encoder", title=f"{config.output} on {shown(config.check)}")
    for name in ("largest difference", "k-NN", "logistic regression", "images/s"):
        table.add_column(name, justify="right")
    for name, figures in comparison.items():
        cells = f"{figures.knn:.2f} %", f"{figures.linear:.2f} %", f"{figures.images_per_second:.0f}"
        table.add_row(name, f"{figures.difference:.1e}", *cells)
    Console().print(table)
    return 0
