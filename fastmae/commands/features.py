"""Writes frozen features to a file, draws a map of them, and prints how many there are."""

from __future__ import annotations

from pathlib import Path

from fastmae.commands.shared import choose_workers, make_folder, open_model, ranks_that_share, report_stock
from fastmae.config import FeaturesConfig
from fastmae.data.sources import open_train, shown, train_and_val
from fastmae.evaluate.features import check_features_file, extract_features, mark_of, report_skipped, save_features
from fastmae.evaluate.map import check_picture, check_reduction, feature_map, save_map
from fastmae.screen import say
from fastmae.train import parallel


def run_features(config: FeaturesConfig) -> int:
    """Extracts features, writes them to ``config.output``, draws ``config.picture``, and prints how many there are."""
    reduction = config.reduce or ("pca" if config.picture else None)
    if reduction:
        check_reduction(reduction)
    if config.picture:
        check_picture(config.picture)
    if config.output:
        check_features_file(Path(config.output))
    with ranks_that_share(config.device) as (context, share):
        with parallel.agreeing(context):
            model, data_path = open_model(config, device=context.device)
            for flag in ("output", "picture"):
                if name := getattr(config, flag):
                    make_folder(Path(name).parent, flag)
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
    count, width = features.values.shape
    phrase = f"{count} × {width} features of {shown(data_path)}"
    found = feature_map(features, reduction) if reduction else None
    if config.output:
        mark = mark_of(model, config.pool)
        save_features(Path(config.output), source, features, found.points if found else None, mark)
        say(f"{config.output}: {phrase}")
    if config.picture and found:
        save_map(Path(config.picture), model, source, found, f"{phrase} ({config.pool})")
        kept = f", {sum(found.explained):.1%} of their variance" if found.explained else ""
        say(f"{config.picture}: {phrase} in two dimensions by {found.by.upper()}{kept}")
    return 0
