"""`fastmae runs` finds run folders, says how far they are, and shows which settings differ."""

from __future__ import annotations

import csv
import fcntl
import io
import json

import pytest
from run_folders import write_run

from fastmae.cli import main


@pytest.fixture
def runs(tmp_path):
    """Three runs, one of them deeper than the others."""
    write_run(tmp_path / "a", epochs=3, steps=4, blr=1e-3, output_dir="a", dataset_length=10, crop_scale=[0.2, 1.0])
    write_run(tmp_path / "sweep" / "b", epochs=3, steps=4, done=2, blr=3e-3, output_dir="b", dataset_length=20)
    write_run(tmp_path / "c", epochs=3, steps=4, done=1, blr=1e-3, clip_grad=1.0, crop_scale=[0.2, 1.0])
    (tmp_path / "c" / "run.lock").write_text("{}")
    (tmp_path / "notes").mkdir()
    (tmp_path / "a" / "checkpoints").mkdir()
    (tmp_path / "a" / "checkpoints" / "log.txt").touch()  # no run of its own
    return tmp_path


def rows(runs, capsys, *words):
    assert main(["runs", str(runs), "--json", *words]) == 0
    return json.loads(capsys.readouterr().out)


def test_runs_are_found_and_what_differs_is_shown(runs, capsys):
    with open(runs / "c" / "run.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = {row["run"].removeprefix(f"{runs}/"): row for row in rows(runs, capsys)}
    assert list(found) == ["a", "c", "sweep/b"]
    assert [row["status"] for row in found.values()] == ["complete", "running", "unfinished"]
    assert [(row["epochs"], row["of"]) for row in found.values()] == [(3, 3), (1, 3), (2, 3)]
    assert found["a"]["linear"] == 62
    assert found["a"]["train_loss"] == 1 / 12
    assert found["a"]["held_out_loss"] == pytest.approx(1.1 / 12)
    assert found["a"]["images_per_second"] == 100
    assert [row["blr"] for row in found.values()] == [1e-3, 1e-3, 3e-3]
    assert [row["clip_grad"] for row in found.values()] == [None, 1.0, None]
    assert not {"seed", "output_dir", "dataset_length"} & set(found["a"])
    (runs / "a" / "probe.json").write_text('{"after": {"knn": 1, "linear": 2.5}}')
    assert rows(runs, capsys)[0]["linear"] == 2.5


@pytest.mark.parametrize(
    ("by", "order"), [("linear", "abc"), ("train_loss", "abc"), ("epochs", "cba"), ("clip_grad", "cab"), ("blr", "acb")]
)
def test_the_best_come_first(by, order, runs, capsys):
    assert "".join(row["run"][-1] for row in rows(runs, capsys, "--sort", by)) == order


def test_the_table_and_the_csv_have_the_same_runs(runs, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["runs", str(runs / "a"), str(runs / "sweep")]) == 0
    table = capsys.readouterr().out
    assert "3/3" in table
    assert "0.2 1.0" in table
    assert "clip_grad" not in table  # it is the same in both
    assert " test " not in table  # no run has it
    assert main(["runs", str(runs), "--csv"]) == 0
    found = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["status"] for row in found] == ["complete", "unfinished", "unfinished"]


def test_a_narrow_screen_shows_what_fits_and_names_the_rest(runs, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    assert main(["runs", str(runs)]) == 0
    *table, line = capsys.readouterr().out.strip().splitlines()
    assert all(len(row) <= 50 for row in table)
    assert "3/3" in "".join(table)
    assert line.startswith("too narrow for ")
    assert "clip_grad" in line
    assert line.endswith("--json or --csv shows them")


def test_settings_that_mean_nothing_to_a_model_are_not_compared(tmp_path, capsys):
    write_run(tmp_path / "a", epochs=1, steps=1, model="mae_mlp", masking="random", fill="mean")
    write_run(tmp_path / "b", epochs=1, steps=1, masking="block")
    a, b = rows(tmp_path, capsys)
    assert (a["masking"], b["masking"]) == (None, "block")
    assert (a["fill"], b["fill"]) == ("mean", None)


def test_a_folder_of_transformers_is_no_run(runs, capsys):
    (runs / "hub").mkdir()
    (runs / "hub" / "config.json").write_text('{"model_type": "vit", "hidden_size": 192}')
    (runs / "hub" / "model.safetensors").touch()
    found = rows(runs, capsys)
    assert len(found) == 3
    assert "hidden_size" not in found[0]


def test_settings_of_any_name_and_type_hide_no_column(tmp_path, capsys):
    """config.json is anybody's file."""
    nested = json.loads("[" * 400 + "]" * 400)
    write_run(tmp_path / "a", epochs=1, steps=1, run=3, status=["x"], model=[1, {}], data=nested)
    write_run(tmp_path / "b", epochs=1, steps=1)
    (tmp_path / "a" / "probe.json").write_text('{"after": {"knn": 1, "linear": 2, "train_loss": "<b>"}}')
    assert main(["runs", str(tmp_path)]) == 0
    assert "2 runs in" in capsys.readouterr().out
    found = rows(tmp_path, capsys, "--sort", "model")
    assert [(row["run"], row["status"]) for row in found] == [
        (str(tmp_path / "a"), "complete"), (str(tmp_path / "b"), "complete"),
    ]  # fmt: skip
    assert (found[0]["linear"], found[0]["train_loss"]) == (2, 1.0)


def test_what_cannot_be_compared_is_one_line(runs, refusal, capsys):
    assert refusal(["runs", str(runs / "no")]).endswith(
        "no: is not there; name a run folder, or a folder with run folders"
    )
    assert "notes: holds no run; name a folder" in refusal(["runs", str(runs / "notes")])
    assert refusal(["runs", str(runs), "--sort", "lineer"]).endswith("no such column; did you mean linear?")
    assert "must be left out with --json" in refusal(["runs", str(runs), "--csv", "--json"])
    (runs / "a" / "probe.json").write_text("{")
    assert main(["runs", str(runs), "--json"]) == 0
    captured = capsys.readouterr()
    assert len(json.loads(captured.out)) == 3
    assert captured.err.startswith(f"fastmae: {runs}/a/probe.json: ")
