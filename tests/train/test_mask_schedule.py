"""A mask ratio that changes from epoch to epoch: a function of the epoch alone, so that every run of it is the same."""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers import assert_same_run, metrics, small_run
from ranks import run_ranks

from fastmae.data.sizes import visible_counts, visible_in
from fastmae.errors import UserError
from fastmae.model.cross import CrossMAE
from fastmae.model.mae import MaskedAutoencoderViT
from fastmae.ops import random_masking
from fastmae.train.pretrain import pretrain
from fastmae.train.step import TrainingLoss

# 16 patches: 4, 6, 8 visible.
SCHEDULE = dict(mask_ratio=0.75, mask_ratio_schedule=0.5, epochs=3, checkpoint_freq=7, keep=9, save_freq=3)


def seen(monkeypatch, kind=MaskedAutoencoderViT):
    """The number of visible patches of every loss that is computed from now on."""
    counts, loss = [], kind.training_loss

    def spy(model, images, ids_shuffle, mask_ratio, *rest):
        counts.append(model.num_visible(mask_ratio))
        return loss(model, images, ids_shuffle, mask_ratio, *rest)

    monkeypatch.setattr(kind, "training_loss", spy)
    return counts


@pytest.fixture(scope="module")
def run(blobs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("schedule") / "run"
    with pytest.MonkeyPatch.context() as patch:
        counts = seen(patch)
        assert pretrain(small_run(blobs, folder, **SCHEDULE)) == 0
    assert counts == [4] * 9 + [6] * 9 + [8] * 9
    return folder


def test_steps_are_evenly_spaced_and_few():
    assert visible_counts(4, 8, 3) == (4, 6, 8)
    assert visible_counts(49, 98, 800) == (49, 56, 63, 70, 77, 84, 91, 98)
    assert visible_counts(98, 49, 4) == (98, 82, 65, 49)
    assert visible_counts(4, 5, 100) == (4, 5)
    assert visible_counts(4, 4, 100) == (4,)
    assert visible_counts(4, 8, 1) == (4,)
    assert [visible_in(epoch, (4, 6, 8), 7) for epoch in range(9)] == [4, 4, 4, 6, 6, 8, 8, 8, 8]


@pytest.mark.parametrize("changes", [dict(masking="block"), dict(masking="random", predict_ratio=0.25)])
def test_an_epoch_has_its_ratio_whatever_the_decoder_the_masks_and_the_batch(blobs, tmp_path, monkeypatch, changes):
    counts, cross = seen(monkeypatch, CrossMAE), dict(decoder_attention="cross", accum_iter=2, **changes)
    assert pretrain(small_run(blobs, tmp_path / "run", **SCHEDULE, **cross)) == 0
    assert counts == [4] * 8 + [6] * 8 + [8] * 8


def test_the_log_says_the_ratio_of_each_epoch(run):
    log = [json.loads(line) for line in (run / "log.txt").read_text().splitlines()]
    assert [line["mask_ratio"] for line in log] == [0.75, 0.625, 0.5]


def test_any_number_of_visible_patches_is_told_by_a_shape():
    model = MaskedAutoencoderViT((28, 28), (4, 4), 1, 32, 1, 2, 32, 1, 2)
    images, ids = torch.zeros(2, 28, 28, 1, dtype=torch.uint8), random_masking(torch.arange(2), 0, 49)
    counts, loss_of = [], TrainingLoss(model, 0.75)
    model.training_loss = lambda images, ids, ratio, predict: counts.append(model.num_visible(ratio))
    for visible in range(1, 49):
        loss_of(images, ids, torch.empty(visible, 0))
    assert counts == list(range(1, 49))


def test_it_resumes_to_the_bit_in_the_middle_of_a_step_and_with_no_other_schedule(blobs, run, tmp_path):
    resumed = tmp_path / "run"
    shutil.copytree(run, resumed)
    for folder in (resumed / "checkpoints").iterdir():
        if int(folder.name.rpartition("-")[2]) > 14:
            shutil.rmtree(folder)
    assert pretrain(small_run(blobs, resumed, **SCHEDULE, resume="auto")) == 0
    assert_same_run(resumed, run)
    with pytest.raises(UserError, match=r"was made with mask_ratio_schedule 0.5, not None"):
        pretrain(small_run(blobs, resumed, **{**SCHEDULE, "mask_ratio_schedule": None}, resume="auto"))


@pytest.mark.slow
def test_ranks_and_compiled_code_follow(blobs, run, tmp_path):
    ways = ("ddp", "fsdp")
    run_ranks(2, *(small_run(blobs, tmp_path / way, **SCHEDULE, batch_size=4, parallel=way) for way in ways))
    assert pretrain(small_run(blobs, tmp_path / "model", **SCHEDULE, compile="model")) == 0
    for way in (*ways, "model"):
        np.testing.assert_allclose(metrics(tmp_path / way), metrics(run), rtol=1e-4)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (dict(mask_ratio_schedule=1.0), "mask_ratio_schedule=1.0: must be above 0 and below 1"),
        (dict(masking="grid"), "mask_ratio_schedule=0.5: must be left out with masking='grid'"),
        (dict(start_size=8), "mask_ratio_schedule=0.5: must be left out with start_size"),
        (dict(cuda_graph=True), "mask_ratio_schedule=0.5: must be left out with cuda_graph"),
        (
            dict(decoder_attention="cross", predict_ratio=0.6),
            "mask_ratio_schedule=0.5: must be at least predict_ratio=0.6",
        ),
        (dict(mask_ratio_schedule=0.99), "mask ratio 0.99 leaves 0 of 16 patches visible"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(blobs, tmp_path, flags, said):
    with pytest.raises(UserError) as caught:
        pretrain(small_run(blobs, tmp_path / "run", **{**SCHEDULE, **flags}))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
