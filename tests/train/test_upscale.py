"""Upscaling: it learns more than bicubic interpolation, is as exact as fine-tuning is, and refuses the rest."""

import json
import os
import shutil
import signal
from functools import partial

import numpy as np
import pytest
import torch
from helpers import assert_same_run, metrics
from PIL import Image
from ranks import run_ranks
from safetensors.torch import load_file

from fastmae import upscale as upscale_from_python
from fastmae.checkpoint.load import load_model, load_segmenter, load_upscaler
from fastmae.cli import main
from fastmae.config import UpscaleConfig
from fastmae.data import shapes
from fastmae.errors import UserError
from fastmae.evaluate.upscale import upscale_picture
from fastmae.signals import EXIT_INTERRUPTED
from fastmae.train import finetune as module
from fastmae.train.step import train_step
from fastmae.train.upscale import upscale


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """24 images to learn from and 6 to test on, as files."""
    folder = tmp_path_factory.mktemp("shapes")
    for number, image in enumerate(shapes.make_shapes(np.arange(30), 48).images):
        part = folder / ("train" if number < 24 else "val") / "all"
        part.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(part / f"{number:02}.png")
    return str(folder)


def small(data, output_dir, **changes):
    """A run of 6 steps, 3 an epoch."""
    words = dict(
        data_path=data, output_dir=str(output_dir), model="mae_vit_tiny_patch4", input_size=16, batch_size=8, epochs=2,
        checkpoint_freq=2, keep=9, log_freq=2, device="cpu", autotune="off", warmup_epochs=0.5,
    )  # fmt: skip
    return UpscaleConfig(**{**words, **changes})


def results(run):
    return [json.loads(line) for line in (run / "log.txt").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert upscale(small(data, folder)) == 0
    return folder


def test_a_run_leaves_scores_pictures_and_official_keys(whole):
    lines = results(whole)
    assert [line["epoch"] for line in lines] == [0, 1]
    assert {"test_psnr", "test_ssim", "test_bicubic_psnr", "test_bicubic_ssim"} <= lines[1].keys()
    assert Image.open(whole / "upscaled.png").width > 200
    names = load_file(whole / "checkpoint-1.safetensors").keys()
    assert {"pos_embed", "blocks.0.attn.qkv.weight", "norm.weight"} <= names
    assert all(name.startswith("head.") for name in names - load_model(str(whole)).state_dict().keys())


def test_the_encoder_keeps_its_bits_unless_it_is_tuned(data, whole, tmp_path):
    tuned, kept = load_upscaler(whole), load_model(str(whole))
    assert upscale(small(data, tmp_path / "all", finetune=str(whole), model=None, tune="full")) == 0
    assert upscale(small(data, tmp_path / "head", finetune=str(whole), model=None)) == 0
    own = load_upscaler(tmp_path / "head").state_dict()
    for name, weight in kept.state_dict().items():
        if name in own:
            assert torch.equal(own[name], weight), name
    changed = load_upscaler(tmp_path / "all").state_dict()
    assert not torch.equal(changed["blocks.0.attn.qkv.weight"], own["blocks.0.attn.qkv.weight"])
    assert tuned.head.out.weight.abs().max() > 0


def test_it_learns_more_than_interpolation(tmp_path):
    run = upscale_from_python(
        "shapes", output_dir=tmp_path / "run", model="mae_vit_tiny_patch4", patch_size=8, input_size=32, epochs=1,
        autotune="off", device="cpu",
        lr=3e-3, test_freq=2,
    )  # fmt: skip
    line = results(run.folder)[-1]
    assert line["test_psnr"] > line["test_bicubic_psnr"] + 0.1
    assert line["test_ssim"] > line["test_bicubic_ssim"]
    assert run.model(torch.zeros(2, 32, 32, 3, dtype=torch.uint8)).shape == (2, 3, 64, 64)


def test_a_run_that_is_stopped_goes_on_to_the_same_bits(data, whole, tmp_path, monkeypatch):
    count = [0]

    def stopped(*words, **options):
        count[0] += 1
        if count[0] == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(*words, **options)

    monkeypatch.setattr(module, "train_step", stopped)
    run = tmp_path / "run"
    assert upscale(small(data, run, resume="auto")) == EXIT_INTERRUPTED
    assert len(metrics(run)) == 4
    assert upscale(small(data, run, resume="auto", num_workers=3)) == 0
    assert_same_run(run, whole)


@pytest.mark.slow
def test_several_ranks_are_as_one(data, whole, tmp_path):
    ways = dict(ddp=dict(), fsdp=dict(parallel="fsdp"))
    run_ranks(2, *(partial(upscale, small(data, tmp_path / way, batch_size=4, **ways[way])) for way in ways))
    for way in ways:
        np.testing.assert_allclose(metrics(tmp_path / way), metrics(whole), rtol=1e-4)
        for line, expected in zip(results(tmp_path / way), results(whole), strict=True):
            assert line == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change", [dict(precision="bf16"), dict(compile="block"), dict(checkpointing="full"), dict(scale=4)]
)
def test_formats_compiling_checkpointing_and_the_other_scale_train(data, tmp_path, change):
    assert upscale(small(data, tmp_path / "run", tune="full", drop_path=0.2, **change)) == 0
    assert results(tmp_path / "run")[1]["train_loss"] < 1


def test_16_bits_are_enlarged_as_16_bits(tmp_path, capsys):
    grays = shapes.make_shapes(np.arange(12), 48).images[..., 0].astype(np.uint16) * 200
    np.save(tmp_path / "images.npy", grays)
    assert (
        upscale(small(str(tmp_path / "images.npy"), tmp_path / "run", epochs=1, warmup_epochs=0.1, batch_size=4)) == 0
    )
    Image.fromarray(grays[9]).save(tmp_path / "one.png")
    words = ["upscale", str(tmp_path / "run"), "--predict", str(tmp_path / "one.png"), "--output_dir"]
    assert main([*words, str(tmp_path / "out")]) == 0
    assert "1 picture, 2 times as large" in capsys.readouterr().out
    larger = np.array(Image.open(tmp_path / "out" / "one.png"))
    assert (larger.dtype, larger.shape) == (np.uint16, (96, 96))
    assert np.abs(larger[::2, ::2].astype(float) - grays[9]).mean() < 0.2 * grays[9].std()


def test_pictures_of_any_size_are_enlarged(whole, tmp_path, capsys):
    made = shapes.make_shapes(np.arange(40, 42), 70)
    (tmp_path / "in").mkdir()
    Image.fromarray(made.images[0]).save(tmp_path / "in" / "a.png")
    Image.fromarray(made.images[1][:9]).save(tmp_path / "in" / "b.jpg")
    words = ["upscale", str(whole), "--predict", str(tmp_path / "in"), "--output_dir", str(tmp_path / "out")]
    assert main(words) == 0
    assert "2 pictures, 2 times as large" in capsys.readouterr().out
    for name, size in (("a", (140, 140)), ("b", (140, 18))):
        assert Image.open(tmp_path / "out" / f"{name}.png").size == size


def test_a_picture_of_the_models_size_is_one_window(whole):
    model = load_upscaler(whole)
    image = shapes.make_shapes(np.arange(1), 16).images[0]
    with torch.no_grad():
        expected = model.as_pixels(model(torch.from_numpy(image)[None]))[0].numpy()
    np.testing.assert_array_equal(upscale_picture(model, image), expected)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (dict(scale=3), "scale"),
        (dict(input_size=18), "input_size"),
        (dict(input_size=4), "input_size"),
        (dict(model="mae_conv"), "model"),
        (dict(model="mae_convnextv2_atto"), "model"),
        (dict(tune="last-9"), "tune"),
        (dict(finetune="nowhere"), "nowhere"),
        (dict(data_path="nowhere"), "nowhere"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(data, tmp_path, change, problem):
    with pytest.raises(UserError, match=problem) as error:
        upscale(small(data, tmp_path / "run", **change))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_what_is_no_upscaler_enlarges_nothing(data, whole, tmp_path, capsys):
    assert main(["upscale", "--predict", data, "--output_dir", str(tmp_path)]) == 2
    assert "given together with a RUN" in capsys.readouterr().err
    with pytest.raises(UserError, match="an upscaler, not of fastmae segment"):
        load_segmenter(whole)
    shutil.copytree(whole, tmp_path / "run")
    with pytest.raises(UserError, match="scale"):
        upscale(small(data, tmp_path / "run", resume="auto", scale=4, epochs=3))
