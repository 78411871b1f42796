"""Measures frozen features on labelled data and prints a table or one line of JSON."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, Literal

from fastmae.checkpoint.load import Opened
from fastmae.commands.shared import choose_workers, make_folder, open_frozen, ranks_that_share, report_stock
from fastmae.config import SEEDS, ProbeConfig, amounts_of, seeds_of
from fastmae.data.few import shown_amount
from fastmae.data.sources import Source, scored_parts, shown
from fastmae.errors import SettingError
from fastmae.evaluate.corruptions import constants_for
from fastmae.evaluate.features import Features, extract_features, report_skipped
from fastmae.evaluate.few import Draws, FewResult, draw, pixels_of, score_draws, shown_mean, untrained
from fastmae.evaluate.probe import MIN_LARS_IMAGES, ProbeResult, fit_and_score, save_json, save_probe, scorable
from fastmae.evaluate.robustness import accuracies, fit, require_8_bits, under_attacks, under_corruptions
from fastmae.evaluate.sharing import WHOLE, Share
from fastmae.screen import say, show_table
from fastmae.train import parallel


def run_probe(config: ProbeConfig) -> int:
    """Measures the features of a frozen model and prints their accuracy."""
    with ranks_that_share(config.device) as (context, share):
        with parallel.agreeing(context):
            opened, data_path = open_frozen(config)
            opened.model.to(context.device)
            if config.output is not None:
                make_folder(Path(config.output))
            train, val = scored_parts(data_path, opened.model.read_as)
            draws = _draw(config, train)
            val = scorable(train, val, (1,) if draws else config.k, config.linear)
            for name in ("corruptions", "attacks"):
                if getattr(config, name):
                    require_8_bits(opened, name)
        if draws:
            few = _of_few_labels(config, opened, draws, val, share)
        else:
            learnt, test = (_features(config, opened, source, share) for source in (train, val))
            found = _robustness(config, opened, train, val, learnt, test, share)
    if not share.is_first:
        return 0
    where = f"{config.checkpoint} on {shown(data_path)}"
    if draws:
        report_stock(draws.source, val)
        return _show_few(config, few, len(val), where)
    result = _score(config, train, val, test, learnt)
    report_stock(train, val)
    report_skipped(result.skipped)
    _show(config, result, where, found)
    return 0


def _features(config: ProbeConfig, opened: Opened, source: Source, share: Share, **other: Any) -> Features:
    return extract_features(
        opened.model,
        source,
        pool=config.pool,
        batch_size=config.batch_size,
        num_workers=choose_workers(config),
        share=share,
        **other,
    )


def _score(config: ProbeConfig, train: Source, val: Source, test: Features, learnt: Features) -> ProbeResult:
    return fit_and_score(
        train,
        val,
        [learnt, test],
        pool=config.pool,
        ks=[min(k, len(learnt.values)) for k in config.k] if amounts_of(config) else config.k,
        linear=config.linear,
        rates=config.blr,
        linear_batch=config.linear_batch,
    )


def _show(config: ProbeConfig, result: ProbeResult, where: str, found: dict[str, Any]) -> None:
    summary = {**result.summary(), **found}
    title = f"{where}: {summary['train']} train, {summary['test']} test"
    if config.output is not None:
        save_probe(Path(config.output), result, title)
        if found:
            save_json(Path(config.output) / "robustness.json", found)
    if config.json:
        print(json.dumps(summary))
        return
    rows = [(f"k-NN (k = {k}, {config.pool})", f"{result.accuracy(result.knn[k]):.2f} %") for k in config.k]
    classifier = f"LARS, blr {summary['blr']:g}" if config.linear == "lars" else "logistic regression"
    rows.append((f"{classifier} ({config.pool})", f"{summary['linear']:.2f} %"))
    show_table({"frozen features": "left", "top-1": "right"}, rows, title)
    if config.output is not None:
        say(Path(config.output) / "confusion.png")
    _show_robustness(config, found)


# --- robustness -------------------------------------------------------------------------------------------------------


def _robustness(
    config: ProbeConfig, opened: Opened, train: Source, val: Source, learnt: Features, test: Features, share: Share
) -> dict[str, Any]:
    """Returns what --corruptions and --attacks ask for, on the first rank, which does it alone."""
    if not share.is_first or not (config.corruptions or config.attacks):
        return {}
    found: dict[str, Any] = {}
    fitted = fit(opened, train, val, learnt, test, config.k[0])
    if config.corruptions:
        constants = constants_for(opened.model.img_size)
        extract = partial(_features, config, opened, share=WHOLE)
        by_classifier = under_corruptions(fitted, extract, config.severity)
        clean = accuracies(fitted, extract)
        found["corruptions"] = {"constants": constants, "severity": config.severity, "clean": clean, **by_classifier}
    if config.attacks:
        found["attacks"] = under_attacks(
            opened, fitted, config.attacks, config.radius, pool=config.pool, num_workers=choose_workers(config)
        )
    return found


def _show_robustness(config: ProbeConfig, found: dict[str, Any]) -> None:
    if corrupted := found.get("corruptions"):
        names = {"knn": f"k-NN (k = {config.k[0]})", "linear": "logistic regression", "fine-tuned": "its own head"}
        for name in corrupted["clean"]:
            columns: dict[str, Literal["left", "right"]] = {"corruption": "left"}
            columns |= dict.fromkeys([*map(str, config.severity), "mean"], "right")
            rows: list[tuple[str, ...] | None] = [
                (kind.replace("_", " "), *(f"{value:.1f}" for value in one["of"]), f"{one['mean']:.1f}")
                for kind, one in corrupted[name]["kinds"].items()
            ]
            empty = [""] * len(config.severity)
            rows += [None, ("all", *empty, f"{corrupted[name]['mean']:.2f}")]
            clean = corrupted["clean"][name]
            title = f"{names[name]}: {clean:.2f} % on clean images, by severity ({corrupted['constants']})"
            show_table(columns, rows, title)
        say("left out        frost, which is made of photographs of frost")
    if attacked := found.get("attacks"):
        sides: dict[str, Literal["left", "right"]] = {"attacked": "left", "by": "left", "clean": "right"}
        sides |= dict.fromkeys([f"±{radius:g}/255" for radius in config.radius], "right")
        lines = [
            (name, attack, f"{one['clean']:.2f}", *(f"{value:.2f}" for value in one[attack].values()))
            for name, one in attacked.items()
            if name != "images"
            for attack in config.attacks
        ]
        show_table(sides, lines, f"top-1 in percent on {attacked['images']} attacked images")


# --- few labels -------------------------------------------------------------------------------------------------------


def _draw(config: ProbeConfig, train: Source) -> Draws | None:
    """Draws the labelled images of --shots and --label_share; None without them."""
    amounts = amounts_of(config)
    if not amounts:
        return None
    draws = draw(train, amounts, seeds_of(config.seeds or (SEEDS,)))
    fewest = min(map(len, draws.rows.values()))
    if config.linear == "lars" and fewest < MIN_LARS_IMAGES:
        problem = f"needs at least {MIN_LARS_IMAGES} images to train on, not {fewest}; use --linear=logistic"
        raise SettingError("linear", "lars", problem)
    return draws


def _of_few_labels(config: ProbeConfig, opened: Opened, draws: Draws, val: Source, share: Share) -> list[FewResult]:
    """Returns the accuracies of the encoder's features, and of those that --beside names, on the first rank."""
    own: dict[str, tuple[Opened, dict[str, Any]]] = {"the checkpoint": (opened, {})}
    if "random" in config.beside:
        fresh = Opened(untrained(opened).to(opened.model.device), opened.settings, has_decoder=False)
        own["random weights"] = fresh, {}
    if "pixels" in config.beside:
        own["pixels"] = opened, {"of": pixels_of(opened.model)}
    results = []
    for name, (model, other) in own.items():
        train, test = (_features(config, model, source, share, **other) for source in (draws.source, val))
        if not share.is_first:
            continue
        if model is opened and not other:
            report_skipped(train.skipped + test.skipped)
        results += score_draws(name, draws, train, partial(_score, config, draws.source, val, test))
    return results


def _show_few(config: ProbeConfig, results: list[FewResult], tested: int, where: str) -> int:
    seeds = seeds_of(config.seeds or (SEEDS,))
    how = {"test": tested, "pool": config.pool, "k": config.k[0], "linear_by": config.linear, "seeds": list(seeds)}
    summary = {**how, "few": [result.summary() for result in results]}
    if config.output is not None:
        save_json(Path(config.output) / "few.json", summary)
    if config.json:
        print(json.dumps(summary))
        return 0
    rows: list[tuple[str, ...] | None] = []
    for number, result in enumerate(results):
        if number and result.features != results[number - 1].features:
            rows.append(None)
        labelled = f"{shown_amount(result.amount)} ({result.images:,})"
        rows.append((result.features, labelled, *map(shown_mean, result.accuracies.values())))
    linear = "LARS" if config.linear == "lars" else "logistic regression"
    columns: dict[str, Literal["left", "right"]] = {
        "features": "left",
        "labelled": "right",
        f"k-NN (k ≤ {config.k[0]})": "right",
        linear: "right",
    }
    drawn = f"{len(seeds)} draws, mean ± deviation" if len(seeds) > 1 else f"the draw of seed {seeds[0]}"
    show_table(columns, rows, f"{where}: {tested} test, {drawn}")
    if config.output is not None:
        say(Path(config.output) / "few.json")
    return 0
