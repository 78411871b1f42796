"""On a GPU: the suite, its steps and its end-to-end part come to an end, with equal losses."""

import json

import numpy as np
import torch

from fastmae.benchmarks.end_to_end import CACHED, FROM_FILES, OFFICIAL
from fastmae.cli import main

MODEL = ["--model", "mae_vit_tiny_patch16", "--device", "cuda", "--rounds", "1"]


def test_loading_ahead_of_the_gpu_changes_no_loss(tmp_path):
    words = ["--batch_size", "8", "--steps", "2", "--num_workers", "2", "--precision", "fp32"]
    assert main(["bench", "end-to-end", *MODEL, *words, "--files", "32", "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    losses = json.loads(path.read_text())["losses"]
    np.testing.assert_allclose(losses[FROM_FILES], losses[CACHED], rtol=1e-5)
    np.testing.assert_allclose(losses[OFFICIAL], losses[CACHED], rtol=1e-3)


def test_implementations_share_the_gpu_and_no_process(tmp_path):
    held = torch.cuda.memory_allocated()
    words = ["--batch_size", "8", "--baselines", "official", "strong", "--switches", "bf16", "cuda-graph", "--phases"]
    assert main(["bench", "step", *MODEL, *words, "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    assert list(result["seconds"]) == ["fastmae", "official", "strong", "bf16", "cuda-graph"]
    assert all(samples[0] > 0 for samples in result["seconds"].values())
    assert result["peak_bytes"].keys() == result["seconds"].keys() - {"cuda-graph"}
    assert min(result["peak_bytes"].values()) > 0
    assert torch.cuda.memory_allocated() == held


def test_everything_is_measured_and_drawn(tmp_path):
    words = [
        "--quick",
        "--batch_sizes",
        "8",
        "16",
        "--baselines",
        "official",
        "--only",
        "step",
        "batch-sizes",
        "end-to-end",
    ]
    assert main(["bench", "all", *MODEL, *words, "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("all-*.json")
    assert {part["outcome"] for part in json.loads(path.read_text())["parts"]} == {"measured"}
    assert (tmp_path / "report.html").stat().st_size > 10_000
