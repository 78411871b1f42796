"""What works for which family of models: every cell of the table in docs/families.md."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import fastmae
from fastmae.cli import main
from fastmae.config import EstimateConfig, ModelSpec
from fastmae.estimate import Constant, Machine, estimate
from fastmae.model.build import build_model

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
SHORT = ["--batch_size", "24", "--epochs", "1", "--warmup_epochs", "0", "--probe", "False", "--device", "cpu"]
MODELS = {
    "mae_vit_*": ["--model", "mae_vit_tiny_patch4", "--depth", "1", "--decoder_depth", "1"],
    "mae_conv": ["--model", "mae_conv", "--widths", "4", "8", "--patch_size", "4"],
    "mae_mlp": ["--model", "mae_mlp", "--widths", "8", "4"],
}


def cells():
    """(family, command, whether it works), as the page says."""
    rows = re.findall(r"^\| `(.*?)` \| (yes|–) \| (yes|–) \| (yes|–) \|$", PAGE.read_text(), re.MULTILINE)
    found = [(family, row[0], said == "yes") for row in rows for family, said in zip(MODELS, row[1:], strict=True)]
    # What works for vision transformers is what most other files test.
    return [pytest.param(*cell, marks=[pytest.mark.slow] * (cell[2] and "vit" in cell[0])) for cell in found]


@pytest.fixture(scope="module")
def runs(blobs, tmp_path_factory):
    """A run of each family."""
    folder = tmp_path_factory.mktemp("families")
    for number, words in enumerate(MODELS.values()):
        assert main(["pretrain", *words, "--data_path", blobs, *SHORT, "--output_dir", str(folder / str(number))]) == 0
    return dict(zip(MODELS, (folder / str(number) for number in range(len(MODELS))), strict=True))


def test_the_table_has_every_family():
    assert len(cells()) == 3 * 23
    assert {cell.values[2] for cell in cells()} == {True, False}


@pytest.mark.parametrize(("family", "command", "works"), cells())
def test_a_cell_is_true(family, command, works, runs, blobs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name, *flags = command.split()
    run = str(runs[family])
    words = [name, run]
    if name == "pretrain":
        np.save("masks.npy", np.arange(16).reshape(1, 4, 4) % 2 == 0)
        words = [name, *MODELS[family], "--data_path", blobs, *SHORT, "--output_dir", "again"]
        if "--resume" in flags:
            shutil.copytree(run, "again")
        words += ["--epochs", "2"] if {"--resume", "--start_size"} & {*flags} else []
        words += ["--probe", "True"] if "--probe_freq" in flags else []
    elif name == "estimate":
        words = [name, *MODELS[family], "--gpu", "h100", "--images", "1e5", "--epochs", "2"]
    elif name == "export":
        words += ["--output", "hf" if "hf" in flags else "encoder.safetensors" if "timm" in flags else "encoder.pth"]
    elif name == "finetune":
        words = [name, "--finetune", run, "--data_path", blobs, *SHORT[:6], "--device", "cpu", "--output_dir", "tuned"]
    elif name == "report":
        words += ["--output", "report.html"]
    status = main([*words, *flags])
    said = capsys.readouterr()
    assert status == (0 if works else 2), said.err
    if not works:
        assert said.err.count("\n") == 1 + said.err.count("no data were given"), said.err
        assert not Path("again").exists()


@pytest.mark.parametrize("family", MODELS)
def test_a_model_of_each_family_is_opened_and_gives_features_in_python(family, runs, blobs):
    model = fastmae.load_model(runs[family])
    images = [np.zeros((16, 16), np.uint8), np.full((16, 16), 200, np.uint8)]
    assert model.embed(images).shape == (2, model.feature_dim)
    found = fastmae.feature_map(model, blobs)
    torch.testing.assert_close(found.features.values, fastmae.extract_features(model, blobs).values)
    assert found.points.shape == (72, 2)


@pytest.mark.parametrize(
    ("model", "flags", "size", "channels"),
    [("mae_conv", {"latent_dim": 16}, 32, 3), ("mae_mlp", {"widths": (32, 8)}, 28, 1)],
)
def test_an_estimate_counts_the_products_of_the_model_itself(model, flags, size, channels):
    rate = Constant(1e11, "measured", "a test")
    found = estimate(EstimateConfig(model=model, **flags), lambda ranks: Machine(rate, rate, rate, rate, rate))
    built = build_model(ModelSpec(model=model, input_size=(size,), in_chans=channels, **flags))
    products = built.products(built.usual_ratio)
    assert found.gigaflops == 3 * sum(product.flops for product in products) / 1e9
    assert found.parameters == sum(weight.numel() for weight in built.parameters())
    assert found.memory["moments"] == 8 * found.parameters


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--model", "mae_conv", "--checkpointing", "full"], "--checkpointing full: is counted for vision"),
        (["--model", "mae_conv", "--depth", "2"], "--depth 2: is for mae_vit_*"),
        (["--model", "mae_mlp", "--latent_dim", "2"], "--latent_dim 2: is for mae_conv"),
        (["--model", "mae_conv", "--mask_ratio", "0.999"], "--mask_ratio 0.999: "),
    ],
)
def test_an_estimate_that_cannot_be_made_is_one_line(words, expected, refusal):
    assert expected in refusal(["estimate", *words])
