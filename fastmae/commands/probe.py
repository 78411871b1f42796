"""Measures frozen features on labelled data and prints a table or one line of JSON."""

from __future__ import annotations

import json
from pathlib import Path

from fastmae.commands.shared import choose_workers, make_folder, open_model, ranks_that_share, report_stock
from fastmae.config import ProbeConfig
from fastmae.data.sources import scored_parts, shown
from fastmae.evaluate.features import extract_features, report_skipped
from fastmae.evaluate.probe import fit_and_score, save_probe, scorable
from fastmae.screen import say, show_table
from fastmae.train import parallel


def run_probe(config: ProbeConfig) -> int:
    """Measures the features of a frozen model and prints their accuracy."""
    with ranks_that_share(config.device) as (context, share):
        with parallel.agreeing(context):
            model, data_path = open_model(config, device=context.device)
            if config.output is not None:
                make_folder(Path(config.output))
            train, val = scored_parts(data_path, model.read_as)
            val = scorable(train, val, config.k, config.linear)
        features = [
            extract_features(
                model,
                source,
                pool=config.pool,
                batch_size=config.batch_size,
                num_workers=choose_workers(config),
                share=share,
            )
            for source in (train, val)
        ]
    if not share.is_first:
        return 0
    result = fit_and_score(
        train,
        val,
        features,
        pool=config.pool,
        ks=config.k,
        linear=config.linear,
        rates=config.blr,
        linear_batch=config.linear_batch,
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
