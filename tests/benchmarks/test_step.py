"""``fastmae bench step``: what it leaves, and what it refuses to time."""

import json

import pytest
import torch

from fastmae.benchmarks import step
from fastmae.cli import main

WORDS = ["bench", "step", "--model", "mae_vit_tiny_patch4", "--batch_size", "2", "--rounds", "2", "--device", "cpu"]


def test_every_switch_is_timed_beside_the_peers_and_who_cannot_run_is_named(tmp_path, capsys):
    switches = ["bf16", "bf16-residual", "tf32", "checkpointing-selective", "checkpointing-full", "clip-grad", "ema"]
    assert main([*WORDS, "--switches", *switches, "--phases", "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("step-mae_vit_tiny_patch4-*-n2-fp32.json")
    result = json.loads(path.read_text())
    timed = {"fastmae", "published formulation", "transformers ViTMAE", *switches} - {"tf32"}
    assert result["seconds"].keys() == result["losses"].keys() == timed
    assert result["phases"].keys() == {"forward", "forward and backward"}
    assert all(len(samples) == 2 and min(samples) > 0 for samples in result["seconds"].values())
    assert result["losses"]["checkpointing-full"] == result["losses"]["fastmae"]
    assert "tf32 cannot run: --precision tf32" in capsys.readouterr().err


def test_a_wrong_loss_is_not_timed(monkeypatch, tmp_path, capsys):
    right = step.published

    def wrong(*words):
        made = right(*words)
        return step.Contestant(made.precision, made.forward, lambda: torch.tensor(1.0))

    monkeypatch.setattr(step, "published", wrong)
    assert main([*WORDS, "--output", str(tmp_path)]) == 1
    assert "the loss of published formulation differs, so no time is reported" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [["--switches", "faster"], ["--model", "mae_vit_giant"]])
def test_what_there_is_not_is_one_line(words, capsys):
    assert main([*WORDS, *words]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
