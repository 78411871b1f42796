"""Run folders as pretraining leaves them, without training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

Row = dict[str, Any]


def write_run(
    folder: Path,
    *,
    epochs: int,
    steps: int,
    done: int | None = None,
    change: Callable[[Row], Row] = dict,
    **settings: Any,
) -> Path:
    """Writes what a run of ``epochs`` times ``steps`` steps leaves, of which ``done`` epochs are done."""
    (folder / "reconstructions").mkdir(parents=True)
    done = epochs if done is None else done
    rows, log, probes = [], [], {}
    for step in range(1, done * steps + 1):
        epoch = (step - 1) // steps
        row = {"step": step, "epoch": epoch, "loss": 1 / step, "lr": 1e-3 / step, "grad_norm": 2 / step}
        if step % steps == 0:
            probes[str(epoch + 1)] = {"knn": 50.0 + epoch, "linear": 60.0 + epoch}
            row |= {**probes[str(epoch + 1)], "held_out_loss": 1.1 / step, "rankme": 9.0, "feature_std": 0.5}
            row |= {"images_per_second": 100.0, "data_wait": 0.01, "peak_memory": 2**30}
            log.append({"train_lr": row["lr"], "train_loss": row["loss"], "held_out_loss": 1.1 / step, "epoch": epoch})
        rows.append(change(row))
    config = {"model": "mae_vit_tiny_patch4", "epochs": epochs, "seed": 0, "data_path": "photos", **settings}
    start = {
        "command": ["fastmae", "pretrain"],
        "ranks": 1,
        "versions": {"fastmae": "0.1.0", "torch": "2.13"},
        "hardware": {"cpu": "a processor", "cores": 2},
        "backends": {"device": "cpu", "choice": "one\ntwo"},
    }
    events = [{"step": 0, "event": "started", "text": "", "time": "2026-11-30 10:00:00"}]
    if done == epochs:
        events.append({"step": epochs * steps, "event": "complete", "text": "", "time": "2026-11-30 10:30:00"})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "probe.json").write_text(json.dumps({"epochs": probes} if probes else {}))
    named = {"metrics.jsonl": rows, "log.txt": log, "environment.jsonl": [start], "events.jsonl": events}
    for name, lines in named.items():
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    for epoch in sorted({0, done - 1}):
        Image.new("RGB", (40, 20), (epoch, 0, 0)).save(folder / "reconstructions" / f"epoch-{epoch:04d}.png")
    (folder / f"checkpoint-{done - 1}.pth").touch()
    return folder
