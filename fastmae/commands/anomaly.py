"""Scores images by how little they are like normal ones and prints a table or one line of JSON."""

from __future__ import annotations

import json
from pathlib import Path

from fastmae.commands.shared import choose_workers, make_folder, open_model, report_stock
from fastmae.config import AnomalyConfig, AnomalyPool
from fastmae.data.sources import open_train, shown, train_and_val
from fastmae.errors import SettingError
from fastmae.evaluate.anomaly import are_anomalous, find_anomalies, save_anomalies, summarise, without_class
from fastmae.evaluate.features import report_skipped
from fastmae.model.family import MaskedModel
from fastmae.screen import say, show_table


def run_anomaly(config: AnomalyConfig) -> int:
    """Scores images, draws heat maps of the least normal ones, and prints how well the scores separate labels."""
    model, data_path = open_model(config, needs_decoder=True)
    pool = _pool(model, config.pool)
    make_folder(Path(config.output))
    if config.test_path is None:
        normal, test = train_and_val(data_path, model.read_as)
    else:
        normal, test = (open_train(path, model.read_as) for path in (data_path, config.test_path))
    if config.left_out is not None:
        normal = without_class(normal, config.left_out)
    scores = find_anomalies(
        model,
        normal,
        test,
        pool=pool,
        k=config.k,
        mask_ratio=model.usual_ratio if config.mask_ratio is None else config.mask_ratio,
        rounds=config.rounds,
        seed=config.seed,
        batch_size=config.batch_size,
        num_workers=choose_workers(config),
    )
    report_stock(normal, test)
    report_skipped(scores.skipped)
    anomalous = are_anomalous(normal, test, scores.indices)
    summary = {"normal": len(normal), "pool": pool, **summarise(scores, anomalous)}
    save_anomalies(Path(config.output), model, test, scores, anomalous, summary, config.count)
    if config.json:
        print(json.dumps(summary))
        return 0
    unit = "images" if model.has_pictures else "rows"
    counted = f", {summary['anomalous']} of them anomalous" if "anomalous" in summary else ""
    title = f"{summary['images']} {unit}{counted}, beside {len(normal)} normal ones of {shown(data_path)}"
    rows = []
    for name, key in ((f"distance ({pool}, k = {config.k})", "distance"), ("reconstruction error", "error")):
        area = summary.get(f"auroc_{key}")
        rows.append((name, "– (no labels of both kinds)" if area is None else f"{area:.4f}"))
    show_table({"score": "left", "AUROC": "right"}, rows, title)
    say(Path(config.output) / ("anomaly.png" if model.has_pictures else "scores.json"))
    return 0


def _pool(model: MaskedModel, asked: AnomalyPool | None) -> AnomalyPool:
    """Returns what is compared: what is asked for, or tokens where the model has them.

    Raises:
        SettingError: the model has no such features.
    """
    if asked is not None and asked not in model.pools:
        raise SettingError("pool", asked, f"must be {' or '.join(model.pools)} with this model; leave it out")
    return asked or ("tokens" if "tokens" in model.pools else "mean")
