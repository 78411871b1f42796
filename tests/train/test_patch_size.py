"""Patches of any size: time series of one row, oblong patches, and what reads their checkpoints afterwards."""

import h5py
import numpy as np
import pytest
import torch
from helpers import small_run

from fastmae.checkpoint.load import load_model, open_checkpoint
from fastmae.config import FinetuneConfig, PretrainConfig
from fastmae.data.plan import Box, crop_draws, random_box
from fastmae.data.sources import open_train
from fastmae.errors import UserError
from fastmae.facts import ReadAs
from fastmae.train.classify import finetune
from fastmae.train.pretrain import pretrain


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    """24 series of 3 channels and 60 steps, sines of two rates: uint8 [24, 1, 60, 3], with labels."""
    rng, labels = np.random.default_rng(0), np.arange(24) % 2
    time = np.arange(60)[None, :, None] * np.where(labels, 0.2, 0.8)[:, None, None] + rng.uniform(0, 6, (24, 1, 3))
    path = tmp_path_factory.mktemp("series") / "series.npz"
    pixels = np.round(127.5 + 100 * np.sin(time)).astype(np.uint8)[:, None]
    np.savez(path, train_images=pixels, train_labels=labels, val_images=pixels[:8], val_labels=labels[:8])
    return str(path)


@pytest.fixture(scope="module")
def finished(series, tmp_path_factory):
    run = tmp_path_factory.mktemp("patches") / "run"
    changes = dict(epochs=1, warmup_epochs=0, model="mae_vit_tiny_patch4", patch_size=(1, 8))
    assert pretrain(small_run(series, run, **changes)) == 0
    return run


def test_series_are_read_whole_in_patches_of_one_row(finished):
    model = load_model(str(finished))
    assert (model.patch_size, model.img_size, model.grid_size) == ((1, 8), (1, 64), (1, 8))
    settings = open_checkpoint(str(finished)).settings
    assert settings["patch_size"] == [1, 8]
    assert settings["flip"] is False
    assert settings["crop_scale"] == [1, 1]


@pytest.mark.parametrize("file", ["checkpoint-0.pth", "checkpoint-0.safetensors"])
def test_files_in_the_official_format_have_the_patches_of_their_weights(finished, file):
    model, run = load_model(str(finished / file)), load_model(str(finished))
    assert model.patch_size == (1, 8)
    for name, weight in run.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name])


def test_a_classifier_has_the_patches_of_its_encoder_and_is_read_again(series, finished, tmp_path):
    run = tmp_path / "tuned"
    flags = FinetuneConfig(
        data_path=series, finetune=str(finished), output_dir=str(run), epochs=1, warmup_epochs=0, batch_size=8,
        device="cpu",
    )  # fmt: skip
    assert finetune(flags) == 0
    opened = open_checkpoint(str(run))
    assert opened.model.patch_size == (1, 8)
    assert opened.settings["patch_size"] == [1, 8]


def test_another_patch_than_the_encoders_is_refused(series, finished, tmp_path):
    flags = FinetuneConfig(data_path=series, finetune=str(finished), output_dir=str(tmp_path / "run"), patch_size=4)
    with pytest.raises(UserError, match="the encoder's patches have 1×8 pixels; leave it out"):
        finetune(flags)


def test_a_run_is_not_continued_with_other_patches(series, finished):
    config = small_run(
        series, finished, epochs=2, warmup_epochs=0, model="mae_vit_tiny_patch4", patch_size=(1, 16),
        input_size=(1, 64), resume="auto",
    )  # fmt: skip
    with pytest.raises(UserError, match="patch_size"):
        pretrain(config)


def test_a_size_of_no_whole_patches_names_the_flags(series, tmp_path):
    config = small_run(series, tmp_path / "run", model="mae_vit_tiny_patch4", patch_size=(1, 8), input_size=(1, 60))
    with pytest.raises(UserError, match="not a multiple of a patch of 1×8; choose another input_size, patch_size"):
        pretrain(config)
    with pytest.raises(UserError, match="one or two positive numbers"):
        PretrainConfig(patch_size=(1, 0))


@pytest.mark.parametrize("kind", ["npz", "h5", "folder"])
@pytest.mark.parametrize("layout", ["tc", "ct"])
def test_series_without_an_axis_of_rows_are_read_by_their_layout(kind, layout, tmp_path):
    values = np.random.default_rng(0).normal(size=(5, 40, 3)).astype(np.float32)
    stored = values if layout == "tc" else np.ascontiguousarray(values.transpose(0, 2, 1))
    path = str(tmp_path)
    if kind == "npz":
        path += "/series.npz"
        np.savez(path, images=stored)
    elif kind == "h5":
        path += "/series.h5"
        with h5py.File(path, "w") as file:
            file.create_dataset("images", data=stored, chunks=(2, *stored.shape[1:]))
    else:
        for number, one in enumerate(stored):
            np.save(tmp_path / f"{number}.npy", one)
    source = open_train(path, ReadAs(layout=layout))
    assert len(source) == 5
    for index in range(5):
        assert np.array_equal(source.read(index), values[index][None])


def test_a_layout_of_series_is_refused_for_images(tmp_path):
    np.save(tmp_path / "images.npy", np.zeros((5, 8, 8, 3), np.uint8))
    with pytest.raises(UserError, match=r"is for series \[N, T, C\], .* has \[5, 8, 8, 3\]"):
        open_train(str(tmp_path / "images.npy"), ReadAs(layout="tc"))


def test_crops_of_one_row_are_shares_of_the_width_anywhere():
    boxes = [random_box(draws, 1, 1000, (0.2, 0.6), (1, 64)) for draws in crop_draws(0, np.arange(2000))]
    widths, lefts = np.array([box.width for box in boxes]), np.array([box.left for box in boxes])
    assert {(box.top, box.height) for box in boxes} == {(0, 1)}
    assert 200 <= widths.min() < 205
    assert 595 < widths.max() <= 600
    assert abs(widths.mean() - 400) < 8
    assert (lefts + widths).max() > 990
    assert lefts.min() < 10
    assert random_box(crop_draws(0, np.arange(1))[0], 1, 1000, (1.0, 1.0), (1, 1000)) == Box(0, 0, 1, 1000)
