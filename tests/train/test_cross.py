"""Runs with a cross-attention decoder: they learn, go on where they were, do not depend on ranks, and are read back."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import assert_same_run, metrics, small_run
from ranks import run_ranks

from fastmae.checkpoint.load import load_model
from fastmae.checkpoint.official import read_official
from fastmae.cli import main
from fastmae.config import PretrainConfig
from fastmae.data.sources import open_train
from fastmae.errors import UserError
from fastmae.evaluate.reconstruct import fixed_images
from fastmae.ops import random_masking
from fastmae.train.pretrain import pretrain

# 4 of 16 patches are predicted; 9 steps an epoch.
CROSS = dict(decoder_attention="cross", predict_ratio=0.25, decoder_depth=3, epochs=2)


@pytest.fixture(scope="module")
def finished(blobs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cross") / "run"
    assert pretrain(small_run(blobs, folder, **CROSS)) == 0
    return folder


def test_digits_are_learnt(tmp_path, capsys):
    cross = dict(decoder_attention="cross", predict_ratio=0.25, norm_pix_loss=True)
    config = PretrainConfig(output_dir=str(tmp_path / "run"), device="cpu", epochs=3, probe=False, **cross)
    assert pretrain(config) == 0
    assert "cross-attention, 2 blocks, 4 of 16 patches predicted" in capsys.readouterr().out
    model = load_model(str(tmp_path / "run"))
    images = fixed_images(model, open_train("digits"), 200)
    ids = random_masking(torch.arange(200), 0, 16)
    with torch.no_grad():
        learnt = model.training_loss(images, ids)
        model.decoder_pred.weight.zero_()
        assert learnt < 0.9 * model.training_loss(images, ids), "no better than the same prediction for every patch"


def test_a_run_that_was_stopped_ends_with_the_same_bits(blobs, finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000018")
    assert pretrain(small_run(blobs, tmp_path / "run", **CROSS, resume="auto")) == 0
    assert "after step 14" in capsys.readouterr().out
    assert_same_run(tmp_path / "run", finished)


def test_two_ranks_have_the_losses_of_one(blobs, finished, tmp_path):
    ways = ("ddp", "fsdp")
    run_ranks(2, *(small_run(blobs, tmp_path / way, **CROSS, batch_size=4, parallel=way) for way in ways))
    for way in ways:
        np.testing.assert_allclose(metrics(tmp_path / way), metrics(finished), rtol=1e-5)


def test_what_a_run_left_opens_with_its_decoder(finished, tmp_path):
    """Also a file with weights alone: the names of its tensors say what it is."""
    resumable, file = load_model(str(finished)), finished / "checkpoint-1.pth"
    content = torch.load(file, weights_only=True)
    torch.save({"model": content["model"]}, tmp_path / "weights.pth")
    args = {"input_size": 16}
    torch.save({"model": content["model"], "args": args}, tmp_path / "with-a-size.pth")
    for path in (file, tmp_path / "with-a-size.pth"):
        opened = load_model(str(path), needs_decoder=True)
        assert opened.decoder_attention == "cross"
        assert len(opened.decoder_blocks) == 3
        for name, tensor in resumable.state_dict().items():
            assert torch.equal(tensor, opened.state_dict()[name]), name
    assert read_official(tmp_path / "weights.pth").decoder_attention == "cross"
    encoder = {k: t for k, t in content["model"].items() if not k.startswith(("decoder_", "mask_token"))}
    torch.save({"model": encoder, "args": args}, tmp_path / "encoder.pth")
    assert torch.equal(load_model(str(tmp_path / "encoder.pth")).norm.weight, resumable.norm.weight)


def test_pictures_are_drawn_from_what_a_run_left(finished, tmp_path):
    for checkpoint in (finished, finished / "checkpoint-1.pth"):
        output = tmp_path / "grid.png"
        assert main(["reconstruct", str(checkpoint), "--output", str(output), "--device", "cpu"]) == 0
        assert output.stat().st_size > 1000
        output.unlink()


def test_a_run_is_not_continued_with_another_decoder(blobs, finished):
    for change in (dict(decoder_attention="self", predict_ratio=None), dict(decoder_depth=2), dict(predict_ratio=0.5)):
        with pytest.raises(UserError, match=r"another architecture|was made with"):
            pretrain(small_run(blobs, finished, **{**CROSS, **change}, resume="auto"))


def test_a_file_with_another_decoder_is_refused_with_the_remedy(blobs, finished, tmp_path):
    config = small_run(blobs, tmp_path / "run", resume=str(finished / "checkpoint-1.pth"))
    with pytest.raises(UserError, match="its decoder has --decoder_attention cross, not self; give its --decoder_"):
        pretrain(config)
    with pytest.raises(
        UserError, match="its decoder has --decoder_depth 3, not 2; give its --decoder_depth and --model"
    ):
        pretrain(replace(config, decoder_attention="cross"))
    assert pretrain(replace(config, decoder_attention="cross", decoder_depth=3, epochs=3)) == 0
    assert metrics(tmp_path / "run")[0][0] == 19, "the file holds two epochs of 9 steps"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(decoder_attention="self"), "must be given together with decoder_attention='cross'"),
        (dict(masking="block"), "must be left out with masking='block', which lists patches in order"),
        (dict(masks="m.npy"), "must be left out with masking='file'"),
        (dict(mask_ratio=0.2), "must be above 0 and at most mask_ratio=0.2"),
        (dict(predict_ratio=0.0), "must be above 0"),
        (dict(predict_ratio=float("nan")), "must be a finite number"),
    ],
)
def test_what_cannot_be_predicted_is_refused_before_anything_loads(changes, words):
    with pytest.raises(UserError, match=rf"^predict_ratio=\S+: {words}"):
        PretrainConfig(**{"decoder_attention": "cross", "predict_ratio": 0.25, **changes})


def test_a_share_of_less_than_a_patch_is_refused(blobs, tmp_path):
    with pytest.raises(UserError, match=r"^predict_ratio=0.05: .* is 0 of 16 patches; .*choose another ratio"):
        pretrain(small_run(blobs, tmp_path, **{**CROSS, "predict_ratio": 0.05}))
