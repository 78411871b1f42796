"""--held_out: images drawn by the seed are never trained on; the loss on them is the same wherever it is measured."""

import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import assert_same_run, metrics, small_run
from PIL import Image
from ranks import run_ranks

from fastmae.checkpoint.load import load_model
from fastmae.data.masks import choose_masks
from fastmae.data.plan import Shards, held_out_of_training, scattered_order, shards_of
from fastmae.data.sources import open_train, without_held_out
from fastmae.errors import UserError
from fastmae.evaluate.held_out import held_out_loss
from fastmae.evaluate.spread import feature_spread
from fastmae.files import read_rows
from fastmae.train.pretrain import pretrain

HELD = dict(held_out=0.25, epochs=2, checkpoint_freq=6)
NAMES = ("held_out_loss", "rankme", "feature_std")


@pytest.fixture(scope="module")
def finished(blobs, tmp_path_factory) -> Path:
    """18 of 72 images are held out, so an epoch has 6 steps."""
    run = tmp_path_factory.mktemp("held") / "run"
    assert pretrain(small_run(blobs, run, **HELD)) == 0
    return run


def measured(run: Path) -> dict[int, tuple[float, ...]]:
    rows, _ = read_rows(run / "metrics.jsonl")
    return {row["step"]: tuple(row[name] for name in NAMES) for row in rows if "held_out_loss" in row}


def of_the_last_weights(run: Path, blobs: str) -> tuple[float, ...]:
    model = load_model(str(run))
    _, held = without_held_out(open_train(blobs), 0.25, 0)
    masks = choose_masks("random", None, model.grid_size, model.num_visible(0.75), 0)
    loss, _ = held_out_loss(model, held, masks, 0.75, autocast=contextlib.nullcontext())
    return (loss, *feature_spread(model, held).values())


def test_the_choice_is_a_pure_function_of_length_share_and_seed():
    train, held = held_out_of_training(1000, 0.1, seed=3)
    assert (len(train), len(held)) == (900, 100)
    assert sorted([*train, *held]) == [*range(1000)]
    np.testing.assert_array_equal(held, held_out_of_training(1000, 0.1, seed=3)[1])
    assert not np.array_equal(held, held_out_of_training(1000, 0.1, seed=4)[1])
    assert len(held_out_of_training(1000, 0.0001, seed=3)[1]) == 1


def test_what_is_left_of_shards_is_still_read_a_few_shards_at_a_time():
    shards = Shards(np.arange(0, 1001, 100), window=200)
    train, _ = held_out_of_training(1000, 0.3, seed=0)
    left = shards_of(train, shards)
    assert left.window == 140
    order = scattered_order(0, 0, left)
    np.testing.assert_array_equal(np.sort(order), np.arange(700))
    owners = train // 100
    np.testing.assert_array_equal(np.diff(left.starts), np.bincount(owners))
    open_at_once = [len(np.unique(owners[order[first : first + 20]])) for first in range(0, 680, 20)]
    assert max(open_at_once) <= 6  # of 10


def test_the_loss_on_held_out_images_is_logged_after_each_epoch(finished, blobs):
    assert measured(finished).keys() == {6, 12}
    assert measured(finished)[12] == of_the_last_weights(finished, blobs)
    log, _ = read_rows(finished / "log.txt")
    assert [line["held_out_loss"] for line in log] == [values[0] for values in measured(finished).values()]
    config = json.loads((finished / "config.json").read_text())
    assert (config["held_out"], config["dataset_length"]) == (0.25, 54)


def test_held_out_images_change_nothing_but_the_loss_on_them(finished, blobs, tmp_path):
    with np.load(blobs) as arrays:
        changed = dict(arrays)
    _, held = held_out_of_training(72, 0.25, seed=0)
    changed["x_train"] = changed["x_train"].copy()
    changed["x_train"][held] = 255 - changed["x_train"][held]
    np.savez(tmp_path / "blobs.npz", **changed)
    assert pretrain(small_run(str(tmp_path / "blobs.npz"), tmp_path / "run", **HELD)) == 0
    assert metrics(tmp_path / "run") == metrics(finished)
    assert all(
        now[0] != before[0]
        for now, before in zip(measured(tmp_path / "run").values(), measured(finished).values(), strict=True)
    )


def test_a_resumed_run_measures_the_same_bits_and_keeps_the_share(finished, blobs, tmp_path):
    """Resumed after the first epoch without the flag; and refused with another share or seed."""
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    (run / "checkpoints" / "step-00000012" / "manifest.json").write_text("damaged")
    assert pretrain(small_run(blobs, run, **{**HELD, "held_out": None}, resume="auto")) == 0
    assert_same_run(run, finished)
    assert measured(run) == measured(finished)
    for change, message in (
        ({"held_out": 0.5}, "held_out=0.5: is another share than the run, which began with 0.25; leave it out"),
        ({"seed": 1}, "seed=1: would hold out other images than the run's 0"),
    ):
        with pytest.raises(UserError, match=message):
            pretrain(small_run(blobs, run, **{**HELD, **change}, resume="auto"))


def test_a_run_that_held_nothing_out_does_not_begin_to(blobs, tmp_path):
    assert pretrain(small_run(blobs, tmp_path / "run", epochs=1)) == 0
    with pytest.raises(UserError, match="which held no images out; leave it out"):
        pretrain(small_run(blobs, tmp_path / "run", epochs=2, held_out=0.1, resume="auto"))
    assert len(metrics(tmp_path / "run")) == 9


@pytest.mark.parametrize(("share", "problem"), [(0.0, "above 0 and below 1"), (1.0, "above 0"), (0.999, "leaves none")])
def test_a_share_must_leave_images_to_train_on(blobs, tmp_path, share, problem):
    with pytest.raises(UserError, match=problem):
        pretrain(small_run(blobs, tmp_path / "run", held_out=share))


def test_an_unusable_image_is_named_once_and_the_mean_is_that_of_the_others(tmp_path, capsys):
    random = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    _, held = held_out_of_training(24, 0.25, seed=0)
    for number in range(24):
        path = tmp_path / "images" / f"{number:02d}.png"
        Image.fromarray(random.integers(0, 255, (16, 16), np.uint8)).save(path)
        if number == held[1]:
            path.write_bytes(path.read_bytes()[:60])
    settings = dict(HELD, batch_size=6, in_chans=1, model="mae_vit_tiny_patch4", input_size=16)
    assert pretrain(small_run(str(tmp_path / "images"), tmp_path / "run", **settings)) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("held out")]
    assert said[0] == "held out        6 images, drawn by the seed and never trained on"
    assert said[1].startswith("held out        1 unusable image not measured, such as ")
    assert f"{held[1]:02d}.png" in said[1]
    assert len(said) == 2
    values = [loss for loss, *_ in measured(tmp_path / "run").values()]
    assert len(values) == 2
    assert all(0 < loss < 5 for loss in values)


@pytest.mark.slow
def test_ranks_that_share_weights_measure_as_one_does(blobs, tmp_path):
    run_ranks(2, small_run(blobs, tmp_path / "run", **{**HELD, "epochs": 1}, batch_size=4, parallel="fsdp"))
    assert measured(tmp_path / "run")[6] == of_the_last_weights(tmp_path / "run", blobs)
