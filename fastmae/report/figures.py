"""Which charts a report has: what each shows, of which file of a run it is, and one sentence on how to read it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from fastmae.report.charts import Chart, Curve, Look, Points, draw
from fastmae.report.colours import colour_of
from fastmae.report.run_folder import RunRecord, is_number

Where = Literal["metrics", "log", "probes"]
"""Of which file numbers are: metrics.jsonl, log.txt or probe.json."""


@dataclass(frozen=True)
class Line:
    """The numbers of a curve that each run has in a chart."""

    where: Where
    key: str
    look: Look = "line"
    kind: str = ""
    """For the legend, in a chart with several kinds."""
    times: float = 1.0


@dataclass(frozen=True)
class Figure:
    """A chart, for whatever runs."""

    title: str
    unit: str
    how: str
    lines: tuple[Line, ...]
    bottom: float | None = None
    marked: bool = False
    """Whether it shows where runs were resumed or rolled back."""


FIGURES = (
    Figure(
        "Loss",
        "loss",
        "Lower is better; only runs with the same data, masks and targets can be compared.",
        (
            Line("metrics", "loss", "faint", "each step"),
            Line("log", "train_loss", "line", "mean of the epoch"),
            Line("log", "held_out_loss", "dashed", "held out"),
        ),
        marked=True,
    ),
    Figure(
        "Held-out loss",
        "loss",
        "On images that are never trained on: where it rises and the training loss falls, images are learnt by heart.",
        (Line("log", "held_out_loss"),),
    ),
    Figure(
        "Accuracy of probes",
        "% of the images",
        "How well classes can be read from the frozen encoder: higher is better, whatever the loss does.",
        (Line("probes", "knn", "line", "k-NN"), Line("probes", "linear", "dashed", "linear probe")),
    ),
    Figure(
        "k-NN accuracy of each path",
        "% of the images",
        "Of the paths of --data_weights in their order, the first dashed: a fall of one while another rises is "
        "forgetting, which a larger share or --l2sp holds up.",
        tuple(
            Line("probes", f"knn_path_{number}", "dashed" if number == 1 else "line", f"path {number}")
            for number in range(1, 5)
        ),
    ),
    Figure(
        "Accuracy on the test part",
        "% of the images",
        "Higher is better; dashed: the class is among the first five.",
        (Line("log", "test_acc1", "line", "first"), Line("log", "test_acc5", "dashed", "among five")),
    ),
    Figure(
        "Loss on the test part",
        "loss",
        "Lower is better: where it rises while the training loss falls, images are learnt by heart.",
        (Line("log", "test_loss"),),
    ),
    Figure(
        "Effective rank of the features (RankMe)",
        "dimensions",
        "How many directions the features use: a fall towards 1 is a collapse; more is mostly better.",
        (Line("metrics", "rankme"),),
    ),
    Figure(
        "Deviation of the features",
        "share of an even spread",
        "How much the features of images differ: near 0 the encoder tells images apart no more.",
        (Line("metrics", "feature_std"),),
        bottom=0,
    ),
    Figure(
        "Adversary",
        "loss",
        "Of the discriminator: near 1 it tells nothing apart, near 0 everything; dashed: the loss by which the model "
        "deceives it.",
        (
            Line("metrics", "discriminator_loss", "line", "discriminator"),
            Line("metrics", "adversarial_loss", "dashed", "adversarial"),
        ),
        marked=True,
    ),
    Figure(
        "Adaptive weight λ",
        "factor",
        "It makes the adversarial gradient of the last layer as long as that of the loss: where it stays at its upper "
        "end, 10,000, the discriminator teaches nothing.",
        (Line("metrics", "adversarial_weight"),),
        marked=True,
    ),
    Figure(
        "Learning rate",
        "learning rate",
        "It grows in the warm-up, then falls along a cosine; a loss that is unstable at its top asks for less --blr.",
        (Line("metrics", "lr"),),
    ),
    Figure(
        "Gradient norm",
        "norm",
        "It should settle after the warm-up: spikes or a steady rise announce an unstable run.",
        (Line("metrics", "grad_norm"),),
        marked=True,
    ),
    Figure(
        "Speed",
        "images per second",
        "Higher is better; dips are other work on the machine, or waiting for images.",
        (Line("metrics", "images_per_second"),),
        bottom=0,
    ),
    Figure(
        "Waiting for images",
        "% of the time",
        "Above a few percent the run could be faster: more --num_workers, --cache ram, or packed data.",
        (Line("metrics", "data_wait", times=100),),
        bottom=0,
    ),
    Figure(
        "Model FLOPs utilisation (MFU)",
        "% of the peak",
        "The share of the device's peak rate that the model's own operations reach: higher is better.",
        (Line("metrics", "mfu", times=100),),
        bottom=0,
    ),
    Figure(
        "Peak memory",
        "GiB",
        "Of the rank with the most; it should not grow after the first epochs.",
        (Line("metrics", "peak_memory", times=2.0**-30),),
        bottom=0,
    ),
)


def drawn_charts(runs: Sequence[RunRecord]) -> Iterator[dict[str, str]]:
    """Yields ``title``, ``how`` and ``svg`` of each chart for which a run has two numbers or more.

    The horizontal axis is epochs if all runs tell how many steps these have, and steps otherwise.
    """
    in_epochs = all(run.steps_per_epoch for run in runs if run.rows)
    for figure in FIGURES:
        curves = [
            Curve(points, colour_of(number), line.look, line.kind)
            for line in figure.lines
            for number, run in enumerate(runs)
            if (points := points_of(run, line, in_epochs))
        ]
        if not any(len(curve.points) > 1 for curve in curves):
            continue
        marks = [
            (_across(run, event.step, in_epochs), colour_of(number))
            for number, run in enumerate(runs)
            for event in run.events
            if figure.marked and event.kind in ("resumed", "rolled back") and event.step
        ]
        how = figure.how + (" Dotted lines: a run was resumed or rolled back." if marks else "")
        chart = Chart(figure.unit, curves, "epochs" if in_epochs else "optimiser steps", marks, figure.bottom)
        yield {"title": figure.title, "how": how, "svg": draw(chart)}


def points_of(run: RunRecord, line: Line, in_epochs: bool) -> Points:
    """Returns (x, y) of a curve of a run; x is how many epochs, or steps, were done."""
    if line.where == "metrics":
        return [(_across(run, step, in_epochs), value * line.times) for step, value in run.curve(line.key)]
    if line.where == "log":
        found = [(row["epoch"] + 1, row[line.key]) for row in run.epochs if is_number(row.get(line.key))]
    else:
        probes = {int(number): one for number, one in run.probes.get("epochs", {}).items()}
        probes |= {0: run.probes["before"]} if "before" in run.probes else {}
        if "after" in run.probes and run.epochs:
            probes[run.epochs[-1]["epoch"] + 1] = run.probes["after"]
        by_epoch = {number: one[line.key] for number, one in probes.items() if line.key in one}
        found = sorted(by_epoch.items())
    per_epoch = 1 if in_epochs else run.steps_per_epoch or 1
    return [(epoch * per_epoch, value * line.times) for epoch, value in found]


def _across(run: RunRecord, step: int, in_epochs: bool) -> float:
    return step / (run.steps_per_epoch or 1) if in_epochs else step
