"""Segmentation: it learns, is as exact as fine-tuning is, and refuses what cannot be meant in one line."""

import json
import os
import random
import shutil
import signal
import time
from functools import partial

import numpy as np
import pytest
import torch
from helpers import assert_same_run, metrics
from PIL import Image
from ranks import run_ranks, start_ranks
from safetensors.torch import load_file

from fastmae.checkpoint.load import load_model, load_segmenter
from fastmae.cli import main
from fastmae.config import SegmentConfig
from fastmae.data import shapes
from fastmae.errors import UserError
from fastmae.evaluate.segment import confusion_of, scores_of, segment_picture
from fastmae.signals import EXIT_INTERRUPTED
from fastmae.train import finetune as module
from fastmae.train.segment import segment
from fastmae.train.step import train_step


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """24 images of shapes with their maps, and 6 to test on, as files."""
    folder = tmp_path_factory.mktemp("shapes")
    made = shapes.make_shapes(np.arange(30), 32)
    for number, (image, classes) in enumerate(zip(made.images, made.maps, strict=True)):
        part = "train" if number < 24 else "val"
        for kind, pixels in (("images", image), ("annotations", classes)):
            (folder / kind / part).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / kind / part / f"{number:02}.png")
    (folder / "classes.txt").write_text("\n".join(shapes.CLASSES))
    return str(folder)


def small(data, output_dir, **changes):
    """A run of 6 steps, 3 an epoch."""
    words = dict(
        data_path=data, output_dir=str(output_dir), model="mae_vit_tiny_patch4", input_size=32, patch_size=8,
        batch_size=8, epochs=2, checkpoint_freq=2, keep=9, log_freq=2, device="cpu", drop_path=0.2, autotune="off",
        warmup_epochs=0.5,
    )  # fmt: skip
    return SegmentConfig(**{**words, **changes})


def results(run):
    return [json.loads(line) for line in (run / "log.txt").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert segment(small(data, folder)) == 0
    return folder


def test_a_run_leaves_scores_pictures_and_official_keys(whole):
    lines = results(whole)
    assert [line["epoch"] for line in lines] == [0, 1]
    assert all(0 <= line["test_miou"] <= 100 for line in lines)
    assert {"test_accuracy", "test_iou_0"} <= lines[1].keys()
    assert Image.open(whole / "segmented.png").width > 200
    names = load_file(whole / "checkpoint-1.safetensors").keys()
    assert {"pos_embed", "blocks.0.attn.qkv.weight", "norm.weight"} <= names
    assert all(name.startswith("head.") for name in names - load_model(str(whole)).state_dict().keys())


def test_a_run_that_is_stopped_goes_on_to_the_same_bits(data, whole, tmp_path, monkeypatch):
    count = [0]

    def stopped(*words, **options):
        count[0] += 1
        if count[0] == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(*words, **options)

    monkeypatch.setattr(module, "train_step", stopped)
    run = tmp_path / "run"
    assert segment(small(data, run, resume="auto")) == EXIT_INTERRUPTED
    assert len(metrics(run)) == 4
    assert segment(small(data, run, resume="auto", num_workers=3)) == 0
    assert_same_run(run, whole)


@pytest.mark.slow
def test_a_run_of_upernet_goes_on_to_the_same_bits(data, tmp_path):
    """Its BatchNorm has means and variances that are no weights; they are saved, and tests leave them as they are."""
    own = dict(segmenter_head="upernet", input_size=16, batch_size=4, epochs=1, warmup_epochs=0.2)
    assert segment(small(data, tmp_path / "whole", **own)) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        if path.name > "step-00000002":
            shutil.rmtree(path)
    assert segment(small(data, tmp_path / "run", **own, resume="auto")) == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_at_any_instant_a_run_goes_on_to_the_same_end(data, tmp_path, ranks):
    """One of the ranks is killed; the others are killed after it, as launchers do."""
    long = dict(epochs=30, batch_size=8 // ranks, checkpoint_freq=5, test_freq=3, output_dir=str(tmp_path / "whole"))
    run_ranks(ranks, partial(segment, small(data, **long)))
    again = small(data, **{**long, "output_dir": str(tmp_path / "run")}, resume="auto")
    killed, dice = [], random.Random(0)
    for _ in range(5):
        started = start_ranks(ranks, partial(segment, again), slow_saves=True)
        deadline = time.monotonic() + 120
        while not any(rank.said() for rank in started) and time.monotonic() < deadline:
            time.sleep(0.01)  # Python starts
        time.sleep(dice.uniform(0, 3))
        dice.choice(started).process.kill()
        for rank in started:
            rank.process.kill()
        ended = [rank.finish()[0] for rank in started]
        logged = tmp_path / "run" / "metrics.jsonl"
        killed += [logged.read_text().count("\n")] if any(ended) and logged.exists() else []
    assert any(0 < steps < 90 for steps in killed), f"nothing was tested: the steps done at the kills were {killed}"
    run_ranks(ranks, partial(segment, again))
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_several_ranks_are_as_one(data, whole, tmp_path):
    ways = dict(ddp=dict(), fsdp=dict(parallel="fsdp"))
    run_ranks(2, *(partial(segment, small(data, tmp_path / way, batch_size=4, **ways[way])) for way in ways))
    for way in ways:
        np.testing.assert_allclose(metrics(tmp_path / way), metrics(whole), rtol=1e-4)
        for line, expected in zip(results(tmp_path / way), results(whole), strict=True):
            assert line == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("change", [dict(precision="bf16"), dict(compile="block"), dict(checkpointing="full")])
def test_formats_compiling_and_checkpointing_train(data, whole, tmp_path, change):
    assert segment(small(data, tmp_path / "run", **change)) == 0
    ours, theirs = results(tmp_path / "run")[1]["train_loss"], results(whole)[1]["train_loss"]
    assert ours == pytest.approx(theirs, rel=2e-2)


def test_other_numbers_than_those_of_the_run_are_refused(data, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    with pytest.raises(UserError, match="random_scale") as error:
        segment(small(data, tmp_path / "run", resume="auto", random_scale=(1.0, 1.0), epochs=3))
    assert "\n" not in str(error.value)


def test_pictures_of_any_size_are_segmented(whole, tmp_path, capsys):
    made = shapes.make_shapes(np.arange(40, 42), 80)
    (tmp_path / "in").mkdir()
    Image.fromarray(made.images[0]).save(tmp_path / "in" / "a.png")
    Image.fromarray(made.images[1][:50]).save(tmp_path / "in" / "b.jpg")
    words = ["segment", str(whole), "--predict", str(tmp_path / "in"), "--output_dir", str(tmp_path / "out")]
    assert main(words) == 0
    assert "label maps and overlays of 2 pictures" in capsys.readouterr().out
    for name, size in (("a", (80, 80)), ("b", (80, 50))):
        found, over = (Image.open(tmp_path / "out" / f"{name}{end}.png") for end in ("", "-overlay"))
        assert (found.mode, found.size, over.size) == ("P", size, size)
        assert np.array(found).max() < 5


def test_a_picture_of_the_models_size_is_one_window(whole):
    model = load_segmenter(whole)
    image = shapes.make_shapes(np.arange(1), 32).images[0]
    with torch.no_grad():
        expected = model(torch.from_numpy(image)[None])[0].argmax(0).numpy()
    np.testing.assert_array_equal(segment_picture(model, image), expected)
    np.testing.assert_array_equal(segment_picture(model, image.repeat(2, 0).repeat(2, 1))[::2, ::2].shape, (32, 32))


@pytest.mark.slow  # importing it takes seconds
def test_scores_are_those_of_torchmetrics():
    torchmetrics = pytest.importorskip("torchmetrics")
    draw = torch.Generator().manual_seed(0)
    maps = torch.randint(0, 4, (3, 9, 7), generator=draw)
    found = torch.where(torch.rand(maps.shape, generator=draw) < 0.6, maps, maps.roll(1))
    maps[0, :3] = 255
    scores = scores_of(confusion_of(found, maps, 4).numpy())
    options = dict(num_classes=4, ignore_index=255)
    iou = torchmetrics.functional.classification.multiclass_jaccard_index(found, maps, **options, average="none")
    accuracy = torchmetrics.functional.classification.multiclass_accuracy(found, maps, **options, average="micro")
    np.testing.assert_allclose(scores.iou, 100 * iou, rtol=1e-5)
    assert scores.miou == pytest.approx(100 * float(iou.mean()), rel=1e-5)
    assert scores.accuracy == pytest.approx(100 * float(accuracy), rel=1e-5)


def test_a_class_that_is_nowhere_counts_nowhere():
    maps = torch.tensor([[[0, 1, 1]]])
    scores = scores_of(confusion_of(torch.tensor([[[0, 1, 0]]]), maps, 3).numpy())
    assert scores.miou == pytest.approx((50 + 50) / 2)
    assert np.isnan(scores.iou[2])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (dict(data_path="digits"), "data_path"),
        (dict(input_size=36), "input_size"),
        (dict(classes=("a", "b")), "class 4"),
        (dict(model="mae_conv"), "model"),
        (dict(model="mae_convnextv2_atto"), "model"),
        (dict(crop_scale=(0.5, 1.0)), "crop_scale"),
        (dict(random_scale=(2.0, 1.0)), "random_scale"),
        (dict(classes=("a", "a")), "classes"),
        (dict(tune="last-9"), "tune"),
        (dict(reduce_zero_label=True, classes=("a",)), "classes"),
        (dict(finetune="nowhere"), "nowhere"),
        (dict(segmenter_head="upernet", batch_size=1), "batch_size"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(data, tmp_path, change, problem):
    with pytest.raises(UserError, match=problem) as error:
        segment(small(data, tmp_path / "run", **change))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_what_has_no_head_for_pixels_predicts_nothing(data, tmp_path, capsys):
    assert main(["segment", "--predict", data, "--output_dir", str(tmp_path)]) == 2
    assert "given together with a RUN" in capsys.readouterr().err
    assert main(["segment", "nowhere", "--predict", data, "--output_dir", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "nowhere" in line
