"""The log says what happened, on every rank together, and nothing that only shows a run can stop it."""

import gzip
import hashlib
import io
import json
import math
import shutil
import sys
import types
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import metrics, small_run, step_log
from PIL import Image
from run_folders import write_run
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastmae.environment import peak_flops
from fastmae.errors import UserError
from fastmae.model.flops import flops_per_image
from fastmae.model.presets import PRESETS
from fastmae.ops.random_masking import random_masking
from fastmae.train.metrics import Screen, StepLog
from fastmae.train.pretrain import pretrain
from fastmae.train.sinks import Sink, _identity


def result(loss: float, skipped: bool = False, grad_norm: float = 1.0) -> SimpleNamespace:
    values = dict(loss=loss, grad_norm=grad_norm, skipped=float(skipped))
    return SimpleNamespace(told={}, **{name: torch.tensor(value) for name, value in values.items()})


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# --- the log ----------------------------------------------------------------------------------------------------------


def test_skipped_steps_are_counted_in_a_row_and_are_no_part_of_means(tmp_path):
    said: list[str] = []
    log = step_log(tmp_path, said)
    losses = [1.0, math.nan, math.inf, 2.0, math.nan, 3.0, math.nan, math.nan]
    in_a_row = []
    for step, loss in enumerate(losses, 1):
        log.add(result(loss, skipped=not math.isfinite(loss)), step=step, epoch=0, lr=step, images=8)
        in_a_row.append(log.skipped_in_a_row)
    assert in_a_row == [0, 0, 0, 0, 0, 0, 0, 2], "known only when the numbers are read, every 4 steps"
    assert [row["loss"] for row in rows(tmp_path)] == [1.0, None, None, 2.0, None, 3.0, None, None]
    assert [row["step"] for row in rows(tmp_path) if row.get("skipped")] == [2, 3, 5, 7, 8]
    assert log.skipped == 5
    assert [line.split(",")[0] for line in said] == [
        "skipped         2 of the last 4 steps",
        "skipped         3 of the last 4 steps",
    ]
    log.end_epoch(0)
    assert json.loads((tmp_path / "log.txt").read_text()) == {"train_lr": 11 / 3, "train_loss": 2.0, "epoch": 0}
    log.exclude(torch.tensor(0.5))
    log.exclude(torch.tensor(0.25))
    log.add(result(1.0), step=9, epoch=1, lr=1, images=8)
    log.exclude(torch.tensor(1.0))
    log.add(result(math.nan, skipped=True), step=10, epoch=1, lr=1, images=8)
    log.end_epoch(1)
    assert [row.get("excluded") for row in rows(tmp_path)[-3:]] == [None, 0.375, 1.0]
    assert json.loads((tmp_path / "log.txt").read_text().splitlines()[1])["excluded"] == 0.375
    again = step_log(tmp_path, said)
    again.resume(6, 0, None)
    assert again.skipped == 3
    assert len(rows(tmp_path)) == 6


def test_an_epoch_of_skipped_steps_alone_has_no_mean(tmp_path):
    log = step_log(tmp_path, [])
    log.add(result(math.nan, skipped=True), step=1, epoch=0, lr=0.1, images=8)
    log.end_epoch(0)
    assert json.loads((tmp_path / "log.txt").read_text()) == {"train_lr": None, "train_loss": None, "epoch": 0}


def test_a_spike_is_in_its_line_and_on_the_screen(tmp_path):
    said: list[str] = []
    log = step_log(tmp_path, said, spike_score=lambda loss: 12.34 if loss > 5 else None)
    for step, loss in enumerate([1.0, 9.0, 1.0, 1.0], 1):
        log.add(result(loss), step=step, epoch=0, lr=0.1, images=8)
    assert [row.get("spike") for row in rows(tmp_path)] == [None, 12.3, None, None]
    assert said == ["loss spike      9.0000 at step 2, 12 robust standard deviations above those before"]


def test_one_exchange_a_read_tells_the_mean_loss_and_the_slowest_rank(tmp_path, monkeypatch):
    """Two logs stand in for two ranks: the exchange of the first waits for the second's numbers."""
    sent: list[torch.Tensor] = []

    def note(values: torch.Tensor) -> torch.Tensor:
        sent.append(values.clone())
        return values

    memory = iter([3 * 2**30, 5 * 2**30, 3 * 2**30])
    monkeypatch.setattr("fastmae.train.metrics.peak_memory", lambda device: next(memory))

    def train(rank: int, losses: list[float], wait: float, exchange) -> StepLog:
        log = step_log(tmp_path / str(rank), [], rank=rank, ranks=2, mean_over_ranks=exchange)
        log.loading.wait = wait
        for step, loss in enumerate(losses, 1):
            log.add(result(loss), step=step, epoch=0, lr=0.1, images=8, seconds_at_peak=8e-5)
        return log

    (tmp_path / "0").mkdir()
    train(0, [1.0, 2.0, 3.0, 4.0], 1e-9, note)
    train(1, [3.0, 4.0, 5.0, 6.0], 1e3, note)
    assert not (tmp_path / "1").exists(), "the first rank alone writes"
    assert len(sent) == 2
    first = train(0, [1.0, 2.0, 3.0, 4.0], 1e-9, lambda values: (values + sent[1]) / 2)
    found = rows(tmp_path / "0")[4:]
    assert [row["loss"] for row in found] == [2.0, 3.0, 4.0, 5.0]
    assert found[3]["peak_memory"] == 5 * 2**30
    assert found[3]["data_wait"] > 1, "the second rank's"
    assert first.latest["mfu"] == pytest.approx(first.latest["images_per_second"] / 1e5, abs=1e-4)


# --- what an image costs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "gigaflops"),
    [("mae_vit_base_patch16", 19.4), ("mae_vit_large_patch16", 41.2), ("mae_vit_huge_patch14", 97)],
)
def test_flops_are_those_of_the_recipe(preset, gigaflops):
    with torch.device("meta"):
        model = PRESETS[preset]()
    assert flops_per_image(model, 0.75) / 1e9 == pytest.approx(gigaflops, rel=0.02)


@pytest.mark.parametrize("mask_ratio", [0.75, 0.4])
def test_flops_are_those_that_torch_counts(mask_ratio):
    model = PRESETS["mae_vit_tiny_patch4"](img_size=(16, 24), in_chans=1)
    ids = random_masking(torch.arange(2), 0, model.num_patches)
    images = torch.zeros(2, 16, 24, 1, dtype=torch.uint8)
    # torch counts attention only where it is made of products.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model.training_loss(images, ids, mask_ratio)
    assert flops_per_image(model, mask_ratio) == counter.get_total_flops() / 2


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_the_peak_of_a_gpu_is_found_by_its_name_or_not_at_all(name, tera):
    assert peak_flops(name) == (tera and tera * 1e12)


# --- the screen -------------------------------------------------------------------------------------------------------


def test_the_first_steps_are_read_and_shown_at_once(tmp_path, capsys):
    log = step_log(tmp_path, [], log_freq=20, early_steps=(1, 2, 5, 10))
    screen = Screen(total_steps=1000, epochs=5, images_per_step=8, start_step=100, shows=True)
    written = []
    with screen:
        for step in range(101, 119):
            log.add(result(float(step)), step=step, epoch=0, lr=0.1, images=8)
            screen.update(step, 0, log.latest)
            written.append(len(rows(tmp_path)) if (tmp_path / "metrics.jsonl").exists() else 0)
    assert written == [1, 2, 2, 2, 5, 5, 5, 5, 5, *[10] * 9]
    assert not any("images_per_second" in row for row in rows(tmp_path)), "a speed is measured over log_freq steps"
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[3] for line in lines] == ["101/1000", "102/1000", "105/1000", "110/1000"]
    assert "first step in " in lines[0]
    assert " left" not in lines[0]
    assert all(" images/s" in line and line.endswith(" left") for line in lines[1:])


def test_a_line_says_all_that_matters(capsys):
    screen = Screen(total_steps=100, epochs=5, images_per_step=64, start_step=0, shows=True)
    latest = dict(loss=0.51239, lr=1.5e-4, images_per_second=1280.0, mfu=0.413, data_wait=0.02, peak_memory=9 * 2**30)
    screen.update(99, 4, latest)
    assert capsys.readouterr().out == "", "a line now and then"
    screen.update(100, 4, latest)
    line = (
        "epoch 5/5  step 100/100  loss 0.5124  lr 1.50e-04  1,280 images/s  MFU 41.3%  data wait 2%  memory 9.0 GiB\n"
    )
    assert capsys.readouterr().out == line
    screen = Screen(total_steps=10_000, epochs=5, images_per_step=64, start_step=0, shows=True)
    screen._printed -= 60
    screen.update(100, 0, {**latest, "loss": None})
    shown = capsys.readouterr().out
    assert "loss not finite" in shown
    assert shown.endswith(f"  {timedelta(seconds=round(9900 * 64 / 1280))} left\n")


# --- sinks and traces -------------------------------------------------------------------------------------------------


def test_a_sink_that_fails_is_left_off_with_one_line(tmp_path):
    said: list[str] = []
    taken: list[int] = []

    def write(row: dict) -> None:
        taken.append(row["step"])
        if row["step"] == 3:
            raise RuntimeError("no\nnetwork")

    sink = Sink("wandb", lambda: (write, lambda step, path: taken.append(-2), lambda: taken.append(-1)), said.append)
    log = step_log(tmp_path, said, sinks=[sink])
    for step in range(1, 9):
        log.add(result(1.0), step=step, epoch=0, lr=0.1, images=8)
    log.picture(8, tmp_path / "x.png")
    log.close()
    assert taken == [1, 2, 3]
    assert said == ["wandb           failed and is off from here on; the run and metrics.jsonl go on (no network)"]
    assert len(rows(tmp_path)) == 8


def test_tensorboard_and_wandb_get_the_log_and_a_trace_is_written(blobs, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    taken: list[dict] = []
    options: list[dict] = []
    there = SimpleNamespace(log=taken.append, finish=lambda: taken.append({}), define_metric=lambda *_, **__: None)
    fake = types.ModuleType("wandb")
    fake.__spec__ = SimpleNamespace()  # as if it were installed
    fake.init = lambda **given: options.append(given) or there
    fake.Settings = lambda **given: given
    fake.Image = Path
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = small_run(blobs, tmp_path / "run", epochs=2, log_dir=str(tmp_path / "tb"), wandb="mae", profile=2)
    assert pretrain(config) == 0
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    expected = [(step, pytest.approx(loss)) for step, _, loss, _ in metrics(tmp_path / "run")]
    assert [(event.step, event.value) for event in events.Scalars("train_loss")] == expected
    assert [event.step for event in events.Scalars("images_per_second")] == [5, 10, 15]
    assert options[0]["project"] == "mae"
    assert options[0]["config"]["global_batch"] == 8
    assert options[0]["id"] == _identity(tmp_path / "run"), "the run is known by how it began"
    assert [(row["step"], row["train_loss"]) for row in taken[:-1] if "train_loss" in row] == expected
    assert taken[-1] == {}
    pictures = [tmp_path / "run" / "reconstructions" / f"epoch-000{epoch}.png" for epoch in (0, 1)]
    assert [(row["step"], row["reconstructions"]) for row in taken if "reconstructions" in row] == [
        (9, pictures[0]),
        (18, pictures[1]),
    ]
    shown = events.Images("reconstructions")
    with Image.open(pictures[1]) as picture, Image.open(io.BytesIO(shown[1].encoded_image_string)) as sent:
        assert [one.step for one in shown] == [9, 18]
        np.testing.assert_array_equal(np.asarray(sent), np.asarray(picture.convert("RGB")))
    assert b"mae_vit_tiny_patch4" in events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    with gzip.open(tmp_path / "run" / "profile" / "rank-0.json.gz", "rt") as file:
        names = [event.get("name", "") for event in json.load(file)["traceEvents"]]
    assert {"ProfilerStep#5", "ProfilerStep#6"} == {name for name in names if name.startswith("ProfilerStep")}
    assert any("linear" in name for name in names)


@pytest.mark.slow
def test_mlflow_gets_numbers_settings_and_pictures_and_a_resumed_run_is_one(blobs, tmp_path, monkeypatch):
    """In a folder of files, as mlflow-skinny has no databases."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/store")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow import MlflowClient

    changes = dict(mlflow="mae", held_out=0.2, checkpoint_freq=7)
    assert pretrain(small_run(blobs, tmp_path / "run", **changes, epochs=1)) == 0
    assert pretrain(small_run(blobs, tmp_path / "run", **changes, epochs=2, resume="auto")) == 0
    client = MlflowClient()
    (one,) = client.search_runs([client.get_experiment_by_name("mae").experiment_id])
    run = one.info.run_id
    assert (one.info.status, one.info.run_name) == ("FINISHED", "run")
    assert (one.data.params["held_out"], one.data.params["model"]) == ("0.2", "mae_vit_tiny_patch4")
    losses = [(metric.step, metric.value) for metric in client.get_metric_history(run, "train_loss")]
    assert losses == [(step, loss) for step, _, loss, _ in metrics(tmp_path / "run")]
    for name in ("held_out_loss", "rankme", "feature_std"):
        assert [metric.step for metric in client.get_metric_history(run, name)] == [7, 14]
    sent = [Path(file.path).name for file in client.list_artifacts(run, "reconstructions")]
    assert sent == ["epoch-0000.png", "epoch-0001.png"]
    settings = json.loads(Path(client.download_artifacts(run, "settings.json", str(tmp_path))).read_text())
    assert settings["epochs"] == 2


def test_a_run_is_known_however_often_it_goes_on_and_is_no_other_one_of_the_same_path(tmp_path):
    folder = write_run(tmp_path / "run", epochs=1, steps=1)
    known = _identity(folder)
    for name in ("events.jsonl", "environment.jsonl"):
        with open(folder / name, "a") as file:
            file.write('{"step": 1, "event": "resumed", "time": "2026-12-01 10:00:00"}\n')
    assert _identity(folder) == known
    shutil.rmtree(folder)
    write_run(folder, epochs=1, steps=1)
    began = (folder / "events.jsonl").read_text()
    (folder / "events.jsonl").write_text(began.replace("10:00:00", "10:00:01"))
    assert _identity(folder) != known
    (folder / "events.jsonl").unlink()  # a run of an earlier version
    assert _identity(folder) == hashlib.sha256(bytes(folder)).hexdigest()[:16]


def test_a_tensorboard_folder_that_cannot_be_written_costs_a_line_and_no_more(blobs, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert pretrain(small_run(blobs, tmp_path / "run", epochs=1, log_dir=str(tmp_path / "file" / "tb"))) == 0
    assert capsys.readouterr().out.count("tensorboard     failed and is off from here on") == 1


def test_a_sink_that_is_not_installed_is_an_error_with_the_remedy(blobs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"^wandb='mae': .*pip install 'fastmae\[wandb\]'"):
        pretrain(small_run(blobs, tmp_path / "run", wandb="mae"))
    assert not (tmp_path / "run").exists()
