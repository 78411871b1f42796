"""What works for which family of models: every cell of the table in docs/families.md."""

import functools
import json
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
VIT = ["--model", "mae_vit_tiny_patch4", "--depth", "1", "--decoder_depth", "1"]
MODELS = {
    "mae_vit_*": VIT,
    "mae_vit_* --adversarial": [*VIT, "--adversarial", "1", "--adversarial_start", "0.5"],
    "mae_convnextv2_*": ["--model", "mae_convnextv2_atto", "--input_size", "64"],
    "mae_conv": ["--model", "mae_conv", "--widths", "4", "8", "--patch_size", "4"],
    "mae_mlp": ["--model", "mae_mlp", "--widths", "8", "4"],
}
GRID = {"mae_convnextv2_*": 2}  # cells along a side; 4 patches elsewhere
MORE = {"report": ["--output", "report.html"], "push": ["card"]}
OUTPUT = {"official": "x.pth", "timm": "x.safetensors", "hf": "x", "onnx": "x.onnx", "torch-export": "x.pt2"}


def cells():
    """(family, command, whether it works), as the page says."""
    rows = re.findall(r"^\| `(.*?)` \|((?: (?:yes|–) \|)+)$", PAGE.read_text(), re.MULTILINE)
    rows = [(command, zip(MODELS, re.findall("yes|–", said), strict=True)) for command, said in rows]
    found = [(family, command, what == "yes") for command, said in rows for family, what in said]
    # What works is fast for one family here; it takes longer for the others, of which other files test most.
    long = ("sweep", "export --to onnx")
    slow = [works and (family != "mae_mlp" or command in long) for family, command, works in found]
    return [pytest.param(*cell, marks=[pytest.mark.slow] * is_slow) for cell, is_slow in zip(found, slow, strict=True)]


@pytest.fixture(scope="module")
def runs(blobs, tmp_path_factory):
    """A function that gives the folder of a run of a family, which is trained when it is first wanted."""

    @functools.cache
    def run_of(family):
        folder = tmp_path_factory.mktemp("families") / "run"
        assert main(["pretrain", *MODELS[family], "--data_path", blobs, *SHORT, "--output_dir", str(folder)]) == 0
        return folder

    return run_of


def test_the_table_has_every_family():
    assert len(cells()) == len(MODELS) * 34
    assert {cell.values[2] for cell in cells()} == {True, False}


@pytest.mark.parametrize(("family", "command", "works"), cells())
def test_a_cell_is_true(family, command, works, runs, blobs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name, *flags = command.split()
    words = [name]
    if name == "pretrain":
        side = GRID.get(family, 4)
        np.save("masks.npy", np.arange(side * side).reshape(1, side, side) % 2 == 0)
        words = [name, *MODELS[family], "--data_path", blobs, *SHORT, "--output_dir", "again"]
        if "--resume" in flags:
            shutil.copytree(runs(family), "again")
        if "--start_size" in flags and "convnext" in family:  # crops of whole cells, of which one is masked
            words, flags = [*words, "--input_size", "128"], ["--start_size", "64"]
        words += ["--epochs", "2"] if {"--resume", "--start_size"} & {*flags} else []
        words += ["--probe", "True"] if "--probe_freq" in flags else []
    elif name == "estimate":
        words = [name, *MODELS[family], "--gpu", "h100", "--images", "1e5", "--epochs", "2"]
    elif name == "finetune":
        words += ["--finetune", str(runs(family)), "--data_path", blobs, *SHORT[:6], "--device", "cpu"]
        words += ["--output_dir", "tuned"]
    elif name == "upscale":
        words += [str(runs(family)), "--data_path", blobs, *SHORT[:6], "--device", "cpu", "--output_dir", "larger"]
    elif name == "sweep":
        settings = dict(model=MODELS[family][1], data_path=blobs, batch_size=24, epochs=1, warmup_epochs=0)
        settings |= {"input_size": 64} if "convnext" in family else {}
        settings |= {"adversarial": 1.0} if "adversarial" in family else {}
        study = dict(settings=settings, search={"blr": {"values": [0.001]}}, metric="knn", trials=1)
        Path("study.json").write_text(json.dumps({"command": "pretrain", **study}))
        words += ["study.json"]
    else:
        words += [str(runs(family)), *MORE.get(name, []), *(["--output", OUTPUT[flags[1]]] if name == "export" else [])]
    status = main([*words, *flags])
    said = capsys.readouterr()
    assert status == (0 if works else 2), said.err
    if not works:
        assert said.err.count("\n") == 1 + said.err.count("no data were given"), said.err
        assert not Path("again").exists()


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[pytest.mark.slow] * (name != "mae_mlp")) for name in MODELS]
)
def test_a_model_of_each_family_is_opened_and_gives_features_in_python(family, runs, blobs):
    model = fastmae.load_model(runs(family))
    images = [np.zeros((16, 16), np.uint8), np.full((16, 16), 200, np.uint8)]
    assert model.embed(images).shape == (2, model.feature_dim)
    found = fastmae.feature_map(model, blobs)
    torch.testing.assert_close(found.features.values, fastmae.extract_features(model, blobs).values)
    assert found.points.shape == (72, 2)


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[pytest.mark.slow] * (name != "mae_mlp")) for name in MODELS]
)
def test_the_folder_of_a_run_is_the_settings_of_another(family, runs, tmp_path):
    assert main(["pretrain", "--config", str(runs(family)), "--output_dir", str(tmp_path / "again")]) == 0
    first, again = ((folder / "metrics.jsonl").read_text() for folder in (runs(family), tmp_path / "again"))
    assert [json.loads(row)["loss"] for row in again.splitlines()] == [
        json.loads(row)["loss"] for row in first.splitlines()
    ]


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
