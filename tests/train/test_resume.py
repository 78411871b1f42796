"""A run that is killed, stopped, damaged or moved goes on as if nothing had happened, to the last bit."""

import dataclasses
import json
import os
import pickle
import random
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_same_run, command, final_state, metrics, small_run, soak
from ranks import Rank, start_ranks

from fastmae.checkpoint.load import load_model
from fastmae.cli import main
from fastmae.config import ImagesConfig
from fastmae.config.family import FAMILY
from fastmae.config.pretrain import OF_ADVERSARY
from fastmae.config.shape import Shape
from fastmae.errors import UserError
from fastmae.signals import EXIT_INTERRUPTED
from fastmae.train.pretrain import pretrain

LONG = dict(epochs=12, save_freq=4, checkpoint_freq=5)


@pytest.fixture(scope="module")
def undisturbed(blobs, tmp_path_factory) -> Path:
    """108 steps in one go."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert pretrain(small_run(blobs, folder / "run", **LONG)) == 0
    return folder / "run"


def start(output_dir: Path, data_path: str, file_size: int | None = None, **changes: Any) -> Rank:
    """The command line, in a process of its own."""
    words = command(data_path, output_dir, **LONG, **changes)
    (process,) = start_ranks(1, partial(main, words[words.index("pretrain") :]), file_size=file_size)
    return process


def wait_for_checkpoint(process: Rank, output_dir: Path, besides: set[str] = frozenset()) -> None:
    deadline = time.monotonic() + 120
    while not {path.name for path in (output_dir / "checkpoints").glob("step-*")} - besides:
        if not process.process.is_alive():
            assert process.finish()[0] == 0, process.finish()
            return  # a fast machine was done before it could be disturbed
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_sigkill_at_random_instants_changes_nothing(blobs, tmp_path, undisturbed, record_property):
    """Killed three times, each time gone on with another number of decoding threads; begun anew when it is done."""
    output_dir, seen, killed = tmp_path / "run", set(), 0
    dice = random.Random(os.getpid())
    for number in range(soak(3, 60)):
        process = start(output_dir, blobs, resume="auto", num_workers=1 + number % 3)
        wait_for_checkpoint(process, output_dir, seen)
        time.sleep(dice.uniform(0, 0.5))
        process.process.kill()
        status, err = process.finish()
        killed += status == -signal.SIGKILL
        seen = {path.name for path in (output_dir / "checkpoints").glob("step-*")}
        if status != -signal.SIGKILL:
            assert status == 0, err
            assert_same_run(output_dir, undisturbed)
            shutil.rmtree(output_dir)
            seen = set()
    assert killed, "every run was done before it could be killed, so nothing was tested"
    status, err = start(output_dir, blobs, resume="auto", num_workers=1).finish()
    assert status == 0, err
    assert_same_run(output_dir, undisturbed)
    record_property("kills", killed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_finish_the_step_save_and_say_so(blobs, tmp_path, undisturbed, number):
    output_dir = tmp_path / "run"
    process = start(output_dir, blobs)
    wait_for_checkpoint(process, output_dir)
    os.kill(process.process.pid, number)
    status, err = process.finish()
    out = process.said()
    assert status == EXIT_INTERRUPTED, err
    assert signal.Signals(number).name in out
    assert "--resume auto" in out
    assert "Traceback" not in err
    step = metrics(output_dir)[-1][0]
    assert f"after step {step}," in out
    assert (output_dir / "checkpoints" / f"step-{step:08d}").is_dir()
    assert 5 <= step < 108
    assert pretrain(small_run(blobs, output_dir, **LONG, resume="auto")) == 0
    assert_same_run(output_dir, undisturbed)


def test_nothing_is_unpickled_from_a_checkpoint(blobs, tmp_path, undisturbed, monkeypatch):
    shutil.copytree(undisturbed, tmp_path / "run")
    shutil.rmtree(max((tmp_path / "run" / "checkpoints").iterdir()))

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("something was unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    assert pretrain(small_run(blobs, tmp_path / "run", **LONG, resume="auto")) == 0
    load_model(str(tmp_path / "run"))
    monkeypatch.undo()
    assert_same_run(tmp_path / "run", undisturbed)


def test_a_finished_run_resumes_to_nothing(blobs, undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "run")
    assert pretrain(small_run(blobs, tmp_path / "run", **LONG, resume="auto")) == 0
    assert_same_run(tmp_path / "run", undisturbed)


@pytest.mark.parametrize("damage", ["truncated", "bit flipped", "no tensors", "no manifest", "manifest cut"])
def test_a_damaged_newest_checkpoint_is_refused_by_name_and_the_one_before_used(
    blobs, undisturbed, tmp_path, capsys, damage
):
    shutil.copytree(undisturbed, tmp_path / "run")
    older, newest = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    (tensors,), manifest = newest.glob("*.safetensors"), newest / "manifest.json"
    if damage == "truncated":
        os.truncate(tensors, tensors.stat().st_size - 1)
    elif damage == "bit flipped":
        data = bytearray(tensors.read_bytes())
        data[len(data) // 2] ^= 1
        tensors.write_bytes(data)
    elif damage == "no tensors":
        tensors.unlink()
    elif damage == "no manifest":
        manifest.unlink()
    else:
        manifest.write_bytes(manifest.read_bytes()[:100])
    assert pretrain(small_run(blobs, tmp_path / "run", **LONG, resume="auto")) == 0
    captured = capsys.readouterr()
    assert f"refused checkpoint {newest}" in captured.err
    assert f"{newest.with_name('superseded-' + newest.name)}, as the run goes on from before it" in captured.out
    assert f"{older}, after step {int(older.name[5:])}" in captured.out
    assert_same_run(tmp_path / "run", undisturbed)


def test_going_back_to_an_older_checkpoint_leaves_the_newer_course(blobs, undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "run")
    older, newest = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    stopped = small_run(blobs, tmp_path / "run", **{**LONG, "checkpoint_freq": 1}, resume=str(older), weight_decay=0.5)
    assert pretrain(stopped) == 0
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-00000107", "step-00000108", f"superseded-{newest.name}"]
    assert final_state(tmp_path / "run") != final_state(undisturbed)


def test_with_nothing_intact_the_run_does_not_start_over(blobs, undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").glob("step-*/*.safetensors"):
        os.truncate(path, 100)
    with pytest.raises(UserError, match="no intact checkpoint"):
        pretrain(small_run(blobs, tmp_path / "run", **LONG, resume="auto"))
    assert metrics(tmp_path / "run") == metrics(undisturbed)


def test_a_full_disk_while_saving_is_told_each_time_and_neither_ends_the_run_nor_loses_anything(
    blobs, tmp_path, undisturbed
):
    """A file-size limit stands in for a full disk: the write fails half-way, as it would there."""
    output_dir = tmp_path / "run"
    process = start(output_dir, blobs)
    wait_for_checkpoint(process, output_dir)
    process.process.terminate()
    assert process.finish()[0] == EXIT_INTERRUPTED
    before = {path: path.stat().st_mtime_ns for path in (output_dir / "checkpoints").rglob("*")}
    failing = start(output_dir, blobs, file_size=4 * 2**20, resume="auto", max_failed_saves=99)
    status, err = failing.finish()
    assert status == 2
    lines = err.strip().splitlines()
    assert all(line.startswith("fastmae: ") and "could not be saved" in line for line in lines), err
    assert len(lines) > 2
    assert "--resume auto" in lines[-1]
    assert len(metrics(output_dir)) == 108
    assert {path: path.stat().st_mtime_ns for path in (output_dir / "checkpoints").rglob("*")} == before
    assert not list(output_dir.rglob("*partial*"))
    assert pretrain(small_run(blobs, output_dir, **LONG, resume="auto")) == 0
    assert_same_run(output_dir, undisturbed)


def test_a_loss_that_is_not_finite_stops_the_run_and_poisons_no_checkpoint(blobs, tmp_path):
    with pytest.raises(UserError, match=r"the loss or its gradient is not finite at step \d+"):
        pretrain(small_run(blobs, tmp_path, lr=1e30, log_freq=100, checkpoint_freq=4, max_skipped=1))
    assert [row[0] for row in metrics(tmp_path)] == [1, 2, 3, 4]
    assert not list((tmp_path / "checkpoints").glob("step-*"))
    assert not list(tmp_path.glob("*.pth"))


def test_weights_that_are_not_finite_are_not_saved(blobs, tmp_path):
    """The loss of the step that ruins the weights is still finite."""
    with pytest.raises(UserError, match="the weights after step 2 are not finite"):
        pretrain(small_run(blobs, tmp_path, lr=1e300, log_freq=100, checkpoint_freq=2))
    assert not list((tmp_path / "checkpoints").glob("step-*"))


def test_the_global_batch_may_be_split_anew(blobs, undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "run")
    shutil.rmtree(max((tmp_path / "run" / "checkpoints").iterdir()))
    assert pretrain(small_run(blobs, tmp_path / "run", **{**LONG, "batch_size": 4}, accum_iter=2, resume="auto")) == 0
    assert metrics(tmp_path / "run")[:105] == metrics(undisturbed)[:105]
    np.testing.assert_allclose(metrics(tmp_path / "run"), metrics(undisturbed), rtol=1e-5)


def test_a_batch_in_several_parts_that_leave_some_over_has_the_same_learning_rates(blobs, tmp_path):
    """72 images are 4 steps of 16, and half a batch more in micro-batches of 8."""
    for name, split in (("one", dict(batch_size=16)), ("two", dict(batch_size=8, accum_iter=2))):
        assert pretrain(small_run(blobs, tmp_path / name, epochs=2, **split)) == 0
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [row[3] for row in one] == [row[3] for row in two]
    assert [one[step][3] for step in (2, 6)] == pytest.approx(2 * [5e-4 * 16 / 256])  # halfway up, and halfway down
    np.testing.assert_allclose(one, two, rtol=1e-5)


def test_more_epochs_may_be_asked_for(blobs, undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "run")
    assert pretrain(small_run(blobs, tmp_path / "run", **{**LONG, "epochs": 13}, resume="auto")) == 0
    assert metrics(tmp_path / "run")[:108] == metrics(undisturbed)
    assert len(metrics(tmp_path / "run")) == 117


def test_the_official_file_resumes_too(blobs, undisturbed, tmp_path):
    """After the epoch of the file, in another folder, with the same end."""
    config = small_run(blobs, tmp_path / "run", **LONG, resume=str(undisturbed / "checkpoint-4.pth"))
    assert pretrain(config) == 0
    assert metrics(tmp_path / "run") == metrics(undisturbed)[45:]
    assert final_state(tmp_path / "run") == final_state(undisturbed)


def test_another_recipe_is_refused_by_name(blobs, undisturbed, tmp_path):
    for change in (dict(batch_size=9), dict(seed=1), dict(mask_ratio=0.5), dict(norm_pix_loss=True)):
        name = next(iter(change)).replace("batch_size", "global_batch")
        with pytest.raises(UserError, match=f"was made with {name}"):
            pretrain(small_run(blobs, tmp_path / "run", **{**LONG, **change}, resume=str(undisturbed)))
    for resume in ("", str(tmp_path)):
        with pytest.raises(UserError, match="holds a run already"):
            pretrain(small_run(blobs, undisturbed, **LONG, resume=resume))


def test_the_run_folder_says_everything(undisturbed):
    config = json.loads((undisturbed / "config.json").read_text())
    assert config["model"] == "mae_vit_tiny_patch4"
    assert config["input_size"] == [16, 16]
    assert config["lr"] == pytest.approx(1e-3 * 8 / 256)
    may_stay_open = {"log_dir", "wandb", "profile", "checkpoint_freq", "keep_every", "shard_size", "device", "cache_gb"}
    may_stay_open |= {
        "clip_grad",
        "ema",
        "start_size",
        "patch_size",
        "predict_ratio",
        "mask_ratio_schedule",
        "probe_freq",
        "held_out",
        "data_weights",
        "mlflow",
        "tune",
    }
    may_stay_open |= {field.name for field in dataclasses.fields(ImagesConfig)} - {"pixel_type"}
    may_stay_open |= {field.name for field in dataclasses.fields(Shape)} | {*FAMILY} | {*OF_ADVERSARY}
    assert {key for key, value in config.items() if value is None} <= may_stay_open
    start = json.loads((undisturbed / "environment.jsonl").read_text().splitlines()[0])
    assert start["versions"]["torch"]
    assert "C++" in start["backends"]["ops"]
    rows = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 109))
    loading = {"data_wait", "queue", "decoded_per_second", "decode_capacity", "read_bytes_per_second"}
    for row in rows:
        more = loading | {"images_per_second", "peak_memory"} if row["step"] % 5 == 0 else set()
        assert row.keys() == {"step", "epoch", "loss", "grad_norm", "lr"} | more
        assert not more or (0 <= row["data_wait"] <= 1 and row["decode_capacity"] > 0)
    log = [json.loads(line) for line in (undisturbed / "log.txt").read_text().splitlines()]
    assert [line["epoch"] for line in log] == list(range(12))
    assert all(line.keys() == {"train_lr", "train_loss", "epoch"} for line in log)
    assert log[3]["train_loss"] == pytest.approx(sum(row["loss"] for row in rows[27:36]) / 9)
    assert log[3]["train_lr"] == pytest.approx(sum(row["lr"] for row in rows[27:36]) / 9)
    for suffix in ("pth", "safetensors"):
        found = sorted(path.name for path in undisturbed.glob(f"*.{suffix}"))
        assert found == [f"checkpoint-{e}.{suffix}" for e in (0, 11, 4, 8)]
    assert len(list((undisturbed / "checkpoints").iterdir())) == 2
    assert len(list((undisturbed / "reconstructions").glob("epoch-*.png"))) == 4
