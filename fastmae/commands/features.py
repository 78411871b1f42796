"""Writes frozen features to a file and prints how many."""

from __future__ import annotations

from pathlib import Path

from fastmae.commands.shared import choose_workers, make_folder, open_model, ranks_that_share, report_stock
from fastmae.config import FeaturesConfig
from fastmae.data.sources import open_train, shown, train_and_val
from fastmae.evaluate.features import check_features_file, extract_features, report_skipped, save_features
from fastmae.screen import say
from fastmae.train import parallel


def run_features(config: FeaturesConfig) -> int:
    """Extracts features, writes them to ``config.output`` and prints how many there are."""
    output = Path(config.output)
    check_features_file(output)
    with ranks_that_share(config.device) as (context, share):
        with parallel.agreeing(context):
            model, data_path = open_model(config, device=context.device)
            make_folder(output.parent)
            if config.split == "val":
                _, source = train_and_val(data_path, model.read_as)
            else:
                source = open_train(data_path, model.read_as)
        features = extract_features(
            model,
            source,
            pool=config.pool,
            batch_size=config.batch_size,
            num_workers=choose_workers(config),
            share=share,
        )
    if not share.is_first:
        return 0
    report_stock(source)
    report_skipped(features.skipped)
    save_features(output, source, features)
    count, width = features.values.shape
    say(f"{output}: {count} × {width} features of {shown(data_path)}")
    return 0
