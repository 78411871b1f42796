"""Finds the nearest images and prints them as a table or one line of JSON."""

from __future__ import annotations

import json
from pathlib import Path

from fastmae.commands.shared import choose_workers, make_folder, open_model, report_stock
from fastmae.config import SearchConfig
from fastmae.data.sources import Subset, open_train, shown
from fastmae.evaluate.features import extract_features, report_skipped
from fastmae.evaluate.reconstruct import fixed_indices
from fastmae.evaluate.search import engine, save_search, search
from fastmae.screen import say, show_table


def run_search(config: SearchConfig) -> int:
    """Searches for the images that are nearest to each query and prints them."""
    model, data_path = open_model(config)
    make_folder(Path(config.output).parent)
    source = open_train(data_path, model.read_as)
    queries = source if config.queries is None else open_train(config.queries, model.read_as)
    queries = Subset(queries, fixed_indices(queries, config.count))
    features, query_features = (
        extract_features(
            model, part, pool=config.pool, batch_size=config.batch_size, num_workers=choose_workers(config)
        )
        for part in (source, queries)
    )
    report_skipped(features.skipped + query_features.skipped)
    by = engine(features.values.device)
    results = search(queries, query_features, source, features, k=config.k, by=by)
    report_stock(source, queries)
    if draws := model.img_size != (1, 1):  # rows of a table have no picture
        save_search(Path(config.output), model, queries, source, results)
    if config.json:
        print(json.dumps({"by": by, "results": results}))
        return 0
    rows: list[tuple[str, ...] | None] = []
    for result in results:
        for rank, match in enumerate(result["found"]):
            query = "" if rank else result["query"]
            rows.append((query, match["name"], match.get("class", "–"), f"{match['cosine']:.4f}"))
        rows.append(None)
    title = f"nearest of {len(features.values)} images of {shown(data_path)}, compared by {by}"
    show_table({"query": "left", "nearest": "left", "class": "left", "cosine": "right"}, rows, title)
    if draws:
        say(config.output)
    return 0
