"""A run folder is read whatever its state, without torch: what is damaged is counted, and the rest is there."""

import fcntl
import json
import subprocess
import sys

import pytest
from helpers import small_run
from run_folders import write_run

from fastmae.errors import UserError
from fastmae.report.run_folder import read_run
from fastmae.train.pretrain import pretrain


def test_everything_that_a_run_leaves_is_there(tmp_path):
    run = read_run(write_run(tmp_path / "one", epochs=3, steps=4))
    assert run.name == "one"
    assert (run.settings["model"], run.settings["epochs"]) == ("mae_vit_tiny_patch4", 3)
    assert [row["step"] for row in run.rows] == [*range(1, 13)]
    assert [row["epoch"] for row in run.epochs] == [0, 1, 2]
    assert run.steps_per_epoch == 4
    assert run.curve("images_per_second") == [(4, 100.0), (8, 100.0), (12, 100.0)]
    assert run.newest("linear") == run.probes["epochs"]["3"]["linear"]
    assert run.newest("train_loss") == run.epochs[-1]["train_loss"]
    assert (list(run.reconstructions), list(run.official)) == ([0, 2], [2])
    assert [(event.kind, event.step) for event in run.events] == [("started", 0), ("complete", 12)]
    assert (run.status, run.problems) == ("complete", ())


def test_damage_is_counted_and_the_rest_is_read(tmp_path):
    folder = write_run(tmp_path / "one", epochs=2, steps=3)
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": "x"}\n{"step": 2, "epoch": 0, "loss": 7.5}\n\xff\xfe\n{"step": 9, "epo')
    (folder / "config.json").write_bytes(b"[1, 2")
    (folder / "probe.json").write_text('{"before": 3, "epochs": {"1": {"knn": 1e999, "linear": 2}}}')
    run = read_run(folder)
    assert run.settings == {}
    assert [row["step"] for row in run.rows] == [*range(1, 7)]
    assert run.rows[1]["loss"] == 7.5  # of two lines of a step the later one, as steps may come again
    assert run.problems == (
        "config.json: cannot be read (no JSON: Expecting ',' delimiter in line 1)",
        "metrics.jsonl: 2 damaged lines",
        "metrics.jsonl: 1 line without step",
        "probe.json: no accuracies under before, epochs",
    )


def test_numbers_that_no_run_has_are_damage(tmp_path):
    folder = write_run(tmp_path / "one", epochs=2, steps=2)
    lines = [{"step": 10**400, "epoch": 0}, {"step": 5, "epoch": -1}, {"step": 6, "epoch": 0}]
    for name in ("metrics.jsonl", "events.jsonl"):
        with open(folder / name, "a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    run = read_run(folder)
    assert run.steps_per_epoch == 2
    assert max(event.step for event in run.events) == 6
    assert run.problems == ("metrics.jsonl: 1 line without step",)


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), True, "0.5", 10**400, [1]])
def test_what_is_no_number_is_not_in_a_curve(tmp_path, value):
    folder = write_run(tmp_path / "one", epochs=1, steps=2, change=lambda row: row | {"loss": value})
    assert read_run(folder).curve("loss") == []
    assert read_run(folder).newest("loss") is None


def test_events_tell_what_happened_in_the_order_of_the_steps(tmp_path):
    marks = {2: {"skipped": True}, 3: {"skipped": True}, 5: {"skipped": True}, 6: {"spike": 8.2}}
    folder = write_run(tmp_path / "one", epochs=2, steps=4, change=lambda row: row | marks.get(row["step"], {}))
    run = read_run(folder)
    assert [(event.kind, event.step, event.text) for event in run.events[1:-1]] == [
        ("skipped", 3, "steps 2 to 3: a loss or gradient was not finite"),
        ("skipped", 5, "step 5: a loss or gradient was not finite"),
        ("spike", 6, "the loss was 8 robust standard deviations above those before"),
    ]
    (folder / "events.jsonl").unlink()  # a run from before there was such a file
    (folder / "rollbacks.json").write_text("[4]")
    kinds = [event.kind for event in read_run(folder).events]
    assert kinds == ["started", "skipped", "rolled back", "skipped", "spike"]


def test_the_status_says_who_holds_a_run_and_how_it_ended(tmp_path):
    folder = write_run(tmp_path / "one", epochs=3, steps=2, done=2)
    assert read_run(folder).status == "unfinished"
    (folder / "run.lock").write_text('{"pid": 1}')
    assert read_run(folder).status == "unfinished"  # killed: nobody holds the lock
    with open(folder / "run.lock", "r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert read_run(folder).status == "running"
    with open(folder / "events.jsonl", "a") as file:
        file.write('{"step": 4, "event": "stopped", "text": "by SIGTERM", "time": "2026-11-30 11:00:00"}\n')
    assert read_run(folder).status == "stopped"
    with open(folder / "events.jsonl", "a") as file:
        file.write('{"step": 4, "event": "resumed", "text": "", "time": "2026-11-30 12:00:00"}\n')
    assert read_run(folder).status == "unfinished"
    with open(folder / "events.jsonl", "a") as file:  # in the same second
        file.write('{"step": 4, "event": "stopped", "text": "", "time": "2026-11-30 12:00:00"}\n')
    assert read_run(folder).status == "stopped"


@pytest.mark.parametrize("name", ["", "nothing"])
def test_a_folder_without_a_run_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="name a folder that fastmae pretrain or finetune wrote"):
        read_run(tmp_path / name)


def test_reading_needs_no_torch():
    code = "import sys, fastmae.report.run_folder; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd="/").returncode == 0


def test_the_events_of_a_run_are_written(blobs, tmp_path):
    """A run that is stopped and goes on says so; the status follows."""
    assert pretrain(small_run(blobs, tmp_path / "run", epochs=1)) == 0
    assert pretrain(small_run(blobs, tmp_path / "run", epochs=2, resume="auto")) == 0
    run = read_run(tmp_path / "run")
    assert [(event.kind, event.step) for event in run.events] == [
        ("started", 0), ("complete", 9), ("resumed", 9), ("complete", 18),
    ]  # fmt: skip
    assert (run.status, run.steps_per_epoch, run.problems) == ("complete", 9, ())
    assert run.reconstructions[1].exists()
    assert json.loads((tmp_path / "run" / "events.jsonl").read_text().splitlines()[0])["time"].startswith("20")
