"""Measures frozen features on labelled data and prints a table or one line of JSON."""

from __future__ import annotations

import json
from pathlib import Path

from fastmae.commands.shared import choose_workers, make_folder, open_model, report_stock
from fastmae.config import ProbeConfig
from fastmae.data.sources import scored_parts, shown
from fastmae.evaluate.features import report_skipped
from fastmae.evaluate.probe import probe_in_detail, save_probe
from fastmae.screen import say, show_table


def run_probe(config: ProbeConfig) -> int:
    """Measures the features of a frozen model and prints their accuracy."""
    model, data_path = open_model(config)
    if config.output is not None:
        make_folder(Path(config.output))
    train, val = scored_parts(data_path, model.read_as)
    result = probe_in_detail(
        model,
        train,
        val,
        pool=config.pool,
        ks=config.k,
        linear=config.linear,
        rates=config.blr,
        linear_batch=config.linear_batch,
        batch_size=config.batch_size,
        num_workers=choose_workers(config),
    )
    summary = result.summary()
    report_stock(train, val)
    report_skipped(result.skipped)
    sizes = f"{summary['train']} train, {summary['test']} test"
    title = f"{config.checkpoint} on {shown(data_path)}: {sizes}"
    if config.output is not None:
        save_probe(Path(config.output), result, title)
    if config.json:
        print(json.dumps(summary))
        return 0
    rows = [(f"k-NN (k = {k}, {config.pool})", f"{result.accuracy(result.knn[k]):.2f} %") for k in config.k]
    classifier = f"LARS, blr {summary['blr']:g}" if config.linear == "lars" else "logistic regression"
    rows.append((f"{classifier} ({config.pool})", f"{summary['linear']:.2f} %"))
    show_table({"frozen features": "left", "top-1": "right"}, rows, title)
    if config.output is not None:
        say(Path(config.output) / "confusion.png")
    return 0
