"""``fastmae bench checkpoint``: what it leaves, and what it refuses to time."""

import json

import pytest
import torch

from fastmae.benchmarks import checkpoint
from fastmae.cli import main

WORDS = ["bench", "checkpoint", "--model", "mae_vit_tiny_patch4", "--batch_size", "2", "--rounds", "2"]
WORDS += ["--device", "cpu"]


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """32 pixels instead of the preset's 224."""
    make = checkpoint.PRESETS["mae_vit_tiny_patch4"]
    monkeypatch.setitem(checkpoint.PRESETS, "mae_vit_tiny_patch4", lambda: make(img_size=32))


def test_every_part_is_timed_and_the_folder_is_left_empty(tmp_path, capsys):
    (tmp_path / "disk").mkdir()
    assert main([*WORDS, "--folder", str(tmp_path / "disk"), "--output", str(tmp_path / "out")]) == 0
    (path,) = (tmp_path / "out").glob("checkpoint-mae_vit_tiny_patch4-*-n2-fp32.json")
    result = json.loads(path.read_text())
    assert tuple(result["seconds"]) == tuple(result["first"]) == checkpoint.NAMES
    assert all(len(samples) == 2 and min(samples) > 0 for samples in result["seconds"].values())
    assert result["bytes"] > 3 * 4 * 1_000_000  # weights and two moments of a million parameters
    assert not list((tmp_path / "disk").iterdir())
    assert "share of a step" in capsys.readouterr().out


def test_a_copy_that_training_changes_is_not_timed(monkeypatch, tmp_path, capsys):
    """As if the copy were the tensors themselves, which the step beside the write changes."""
    stage = checkpoint.Saver.save

    def save(self, number, tensors, position):
        with torch.no_grad():
            tensors["model.cls_token"].add_(1)
        stage(self, number, tensors, position)

    monkeypatch.setattr(checkpoint.Saver, "save", save)
    assert main([*WORDS, "--output", str(tmp_path)]) == 1
    assert "another model.cls_token than the model had" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
