"""What the benchmarks refuse: one line that names the flag, and status 2, before anything is measured or written."""

import pytest

from fastmae.benchmarks.images import ImagesConfig, write_images
from fastmae.cli import main

LOADER = ["loader", "--batch_size", "4", "--input_size", "32", "--num_workers", "1", "--device", "cpu"]
END_TO_END = [
    "end-to-end",
    "--model",
    "mae_vit_tiny_patch4",
    "--batch_size",
    "2",
    "--num_workers",
    "1",
    "--device",
    "cpu",
]
WRONG = [
    (["speed"], "speed"),
    (["step", "--sample_ms", "3"], "--sample_ms"),
    (["kernels", "--round", "3"], "fastmae bench kernels --help"),
    (["kernels", "--rounds", "0"], "--rounds 0"),
    (["kernels", "--only", "softmax"], "softmax"),
    (["kernels", "--only"], "--only"),
    (["kernels", "--models", "vit"], "--models vit: unknown"),
    (["kernels", "--device", "cuda:63"], "--device cuda:63"),
    (["attention", "--sample_ms", "-1"], "--sample_ms -1"),
    (["attention", "--models", "vit"], "--models vit: unknown"),
    (["attention", "--shapes", "50x12"], "--shapes 50x12"),
    (["attention", "--shapes", "0x12x64"], "--shapes 0x12x64"),
    (["attention", "--write", "a", "b"], "--write a b"),
    (["attention", "--device", "cpu", "--write"], "--write"),
    (["step", "--batch_size", "0"], "--batch_size 0"),
    (["step", "--model", "vit"], "--model vit: unknown"),
    (["step", "--model", "mae_conv"], "--model mae_conv: only vision transformers"),
    (["all", "--output", "x", "--model", "mae_mlp"], "--model mae_mlp: only vision transformers"),
    (["step", "--switches", "faster"], "--switches faster: faster is unknown; one of bf16,"),
    (["step", "--switches", "bf16+faster"], "--switches bf16+faster: faster is unknown"),
    (["step", "--switches", "float8"], "--batch_size 8: must be a multiple of 16 with --switches float8"),
    (["step", "--baselines", "somebody"], "somebody"),
    (
        ["step", "--model", "mae_vit_tiny_patch4", "--input_size", "30", "--device", "cpu"],
        "--input_size 30: an image of 30×30 pixels is not a multiple",
    ),
    (["checkpoint", "--rounds", "0"], "--rounds 0: must be at least 1"),
    (["checkpoint", "--model", "mae_vit_giant"], "--model mae_vit_giant: unknown"),
    (["checkpoint", "--folder", "/does/not/exist"], "--folder /does/not/exist: no such folder"),
    ([*LOADER, "--batches", "0"], "--batches 0: must be at least 1"),
    ([*LOADER, "--num_workers", "0"], "--num_workers 0"),
    ([*LOADER, "--data_path", "digits", "--files", "9"], "--files: is for images that are made"),
    ([*LOADER, "--data_path", "digits", "--kinds", "tar"], "--kinds: is for images that are made"),
    ([*LOADER, "--kinds"], "--kinds"),
    ([*LOADER, "--files", "3", "--kinds", "tar"], "--batch_size 4: more than the 3 images of tar"),
    ([*LOADER, "--image_decoders", "gpu"], "fastmae bench loader --help"),
    ([*END_TO_END, "--steps", "0"], "--steps 0: must be at least 1"),
    ([*END_TO_END, "--model", "vit"], "--model vit: unknown"),
    ([*END_TO_END, "--data_path", "digits", "--files", "3"], "--files: is for images that are made"),
    ([*END_TO_END, "--files", "1"], "--batch_size 2: more than the 1 images"),
    ([*END_TO_END, "--image_decoder", "dali-gpu"], "use --device cuda"),
    ([*END_TO_END, "--image_decoder", "gpu"], "fastmae bench end-to-end --help"),
    (["quality", "--seeds", "3"], "--seeds 3: must be at least two, each once"),
    (["quality", "--seeds", "3", "3"], "--seeds 3 3: must be at least two, each once"),
    (["quality", "--seeds", "0", "-1"], "--seeds 0 -1: must be in [0, 2**63)"),
    (["quality", "--k", "0"], "--k 0: must be at least 1"),
    (["quality", "--num_workers", "-1"], "--num_workers -1: must be 0 or more"),
    (["quality", "--epochs", "0"], "--epochs 0: must be at least 1"),
    (["quality", "--mask_ratio", "1"], "--mask_ratio 1.0: must be above 0 and below 1"),
    (["all"], "--output"),
    (["all", "--output", "out", "--batch_sizes", "0"], "--batch_sizes 0: must be at least 1"),
    (["all", "--output", "out", "--input_sizes"], "--input_sizes: must name at least one"),
    (["all", "--output", "out", "--only"], "--only: must name at least one"),
    (["all", "--output", "out", "--only", "speed"], "fastmae bench all --help"),
    (["all", "--output", "out", "--model", "vit"], "--model vit: unknown"),
    (["all", "--output", "out", "--device", "cuda:63"], "--device cuda:63"),
]


@pytest.mark.parametrize(("words", "expected"), WRONG, ids=lambda value: " ".join(value) if len(value) < 40 else None)
def test_wrong_input_is_one_line_and_status_2(words, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("fastmae: ")
    assert expected in line
    assert not any(tmp_path.iterdir())


def test_words_of_version_0_1_are_understood(tmp_path, capsys):
    write_images(ImagesConfig(folder=tmp_path / "x", count=4, kind="tar", height=40, width=50))
    words = [*LOADER, "--data_path", str(tmp_path / "x"), "--decoders", "pool", "--batches", "1", "--rounds", "1"]
    assert main(["bench", *words]) == 0
    assert "threads, /" in capsys.readouterr().out
    assert main(["bench", "step", "--peers", "published", "--rounds", "0"]) == 2
    assert "--rounds 0" in capsys.readouterr().err
