"""``fastmae bench loader``: what it leaves and what it refuses to time."""

import json

import pytest

from fastmae.benchmarks import loader
from fastmae.cli import main

WORDS = ["bench", "loader", "--batch_size", "4", "--batches", "2", "--rounds", "2", "--input_size", "32"]
WORDS += ["--num_workers", "1", "--device", "cpu"]


def test_every_sample_is_kept_and_who_cannot_run_is_named(image_folder, tmp_path, capsys):
    assert main([*WORDS, "--data_path", str(image_folder), "--files", "5", "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("loader-*-t1-n4.json")
    result = json.loads(path.read_text())
    assert result["files"]["count"] == 5
    assert len(result["seconds"]["pool"]) == 2
    assert min(result["seconds"]["pool"]) > 0
    assert result["differences"]["pool"] == {"mean": 0, "largest": 0}
    assert "use --device cuda" in result["left_out"]["dali-gpu"]
    assert set(result["seconds"]) | set(result["left_out"]) == {"pool", "dali-cpu", "dali-gpu"}
    captured = capsys.readouterr()
    assert "images/s" in captured.out
    assert "dali-gpu cannot run" in captured.err


def test_a_wrong_decoder_is_not_timed(image_folder, capsys, monkeypatch):
    monkeypatch.setattr(loader, "TOLERANCE", -1.0)
    assert main([*WORDS, "--data_path", str(image_folder), "--decoders", "pool"]) == 1
    captured = capsys.readouterr()
    assert "no time is reported" in captured.err
    assert "images/s" not in captured.out


def test_without_a_path_photographs_are_made(capsys):
    assert main([*WORDS, "--rounds", "1", "--batches", "1", "--decoders", "pool"]) == 0
    assert "48 JPEGs of 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--batches", "0"], "--batches 0: must be at least 1"),
        (["--num_workers", "0"], "--num_workers 0"),
        (["--data_path", "digits"], "no plain JPEG"),
        (["--decoders", "gpu"], "fastmae bench loader --help"),
    ],
)
def test_wrong_input_is_one_line(words, expected, capsys):
    assert main([*WORDS, *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert expected in line
