"""Runs of ConvNeXt V2: they go on where they were, do not depend on ranks or kills, and refuse what is not for them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_same_run, metrics, small_run
from ranks import run_ranks

from fastmae.checkpoint.load import load_model
from fastmae.cli import main
from fastmae.config import FinetuneConfig, PretrainConfig
from fastmae.errors import UserError
from fastmae.model.convnext import ConvNeXtMAE
from fastmae.train.classify import finetune
from fastmae.train.pretrain import pretrain

# 3 of 4 cells are masked; 3 steps.
CONVNEXT = dict(model="mae_convnextv2_atto", input_size=64, epochs=1, checkpoint_freq=2, batch_size=24)


@pytest.fixture(scope="module")
def finished(blobs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("convnext") / "run"
    assert pretrain(small_run(blobs, folder, **CONVNEXT)) == 0
    return folder


def _go_on_from(whole: Path, step: int, run: Path) -> None:
    """Copies a run as it was after a step, from which it goes on."""
    shutil.copytree(whole, run)
    later = [path for path in (run / "checkpoints").iterdir() if path.name > f"step-{step:08}"]
    assert later, "nothing is left to be done"
    assert (run / "checkpoints" / f"step-{step:08}").exists()
    for path in later:
        shutil.rmtree(path)


def test_a_run_that_was_stopped_ends_with_the_same_bits(blobs, finished, tmp_path, capsys):
    _go_on_from(finished, 2, tmp_path / "run")
    assert pretrain(small_run(blobs, tmp_path / "run", **CONVNEXT, resume="auto")) == 0
    said = capsys.readouterr().out
    assert "after step 2" in said
    assert "3 of 4 patches" in said, "the mask ratio of the family"
    assert_same_run(tmp_path / "run", finished)


def test_what_a_run_left_opens_and_is_used(finished, tmp_path):
    resumable = load_model(str(finished))
    assert isinstance(resumable, ConvNeXtMAE)
    opened = load_model(str(finished / "checkpoint-0.pth"), needs_decoder=True)
    for name, tensor in resumable.state_dict().items():
        assert torch.equal(tensor, opened.state_dict()[name]), name
    assert main(["reconstruct", str(finished), "--output", str(tmp_path / "a.png"), "--device", "cpu"]) == 0


@pytest.mark.slow
def test_two_ranks_have_the_losses_of_one(blobs, finished, tmp_path):
    ways = ("ddp", "fsdp")
    run_ranks(2, *(small_run(blobs, tmp_path / way, **CONVNEXT | {"batch_size": 12}, parallel=way) for way in ways))
    for way in ways:
        np.testing.assert_allclose(metrics(tmp_path / way), metrics(finished), rtol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        dict(patch_size=16),
        dict(depth=3),
        dict(decoder_attention="cross"),
        dict(latent_dim=8),
        dict(float8=True),
        dict(checkpointing="gelu"),
    ],
)
def test_settings_of_other_families_are_refused_in_one_line(change):
    (name,) = change
    with pytest.raises(UserError, match=rf"^{name}=\S+: .*mae_convnextv2_atto") as error:
        PretrainConfig(data_path="digits", model="mae_convnextv2_atto", **change)
    assert "\n" not in str(error.value)


def test_gelu_is_not_computed_again_in_silence(finished, blobs, tmp_path):
    given = dict(data_path=blobs, output_dir=str(tmp_path / "run"), checkpointing="gelu")
    with pytest.raises(
        UserError, match=r"^checkpointing='gelu': must be none, selective or full for mae_convnextv2_atto"
    ):
        FinetuneConfig(model="mae_convnextv2_atto", **given)
    with pytest.raises(
        UserError, match=r"^checkpointing='gelu': must be none, selective or full for mae_convnextv2_atto"
    ):
        finetune(FinetuneConfig(finetune=str(finished), batch_size=8, **given))


def test_images_that_are_no_cells_are_refused_in_one_line(blobs, tmp_path):
    with pytest.raises(UserError, match="100") as error:
        pretrain(small_run(blobs, tmp_path / "run", **{**CONVNEXT, "input_size": 100}))
    assert "\n" not in str(error.value)


def test_a_fine_tuning_that_was_stopped_ends_with_the_same_bits(blobs, finished, tmp_path):
    """With drop path, random erasing and mixed images, whose draws go on where they were."""
    given = dict(data_path=blobs, finetune=str(finished), epochs=2, warmup_epochs=0, batch_size=24, device="cpu")
    given |= dict(checkpoint_freq=2, log_freq=1, drop_path=0.3, reprob=0.25, mixup=0.8)
    assert finetune(FinetuneConfig(**given, output_dir=str(tmp_path / "whole"))) == 0
    _go_on_from(tmp_path / "whole", 4, tmp_path / "run")
    assert finetune(FinetuneConfig(**given, output_dir=str(tmp_path / "run"), resume="auto")) == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_crops_grow_and_a_stopped_run_goes_on_to_the_same_bits(blobs, tmp_path, capsys):
    grows = {**CONVNEXT, "input_size": 96, "start_size": 64, "epochs": 2, "grow_epochs": 1, "save_freq": 2}
    assert pretrain(small_run(blobs, tmp_path / "whole", **grows)) == 0
    assert "64×64" in capsys.readouterr().out
    _go_on_from(tmp_path / "whole", 4, tmp_path / "run")
    assert pretrain(small_run(blobs, tmp_path / "run", **grows, resume="auto")) == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_a_run_in_bf16_has_nearly_the_losses_of_float32_and_goes_on_to_the_same_bits(blobs, finished, tmp_path):
    assert pretrain(small_run(blobs, tmp_path / "whole", **CONVNEXT, precision="bf16")) == 0
    losses, expected = ([row[2] for row in metrics(run)] for run in (tmp_path / "whole", finished))
    np.testing.assert_allclose(losses, expected, rtol=1e-2)
    assert losses != expected
    _go_on_from(tmp_path / "whole", 2, tmp_path / "run")
    assert pretrain(small_run(blobs, tmp_path / "run", **CONVNEXT, precision="bf16", resume="auto")) == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_compiled_blocks_have_the_losses_of_those_that_are_not(blobs, finished, tmp_path):
    assert pretrain(small_run(blobs, tmp_path / "run", **CONVNEXT, compile="block")) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["compile"] == "block"
    np.testing.assert_allclose(metrics(tmp_path / "run"), metrics(finished), rtol=1e-5)


@pytest.mark.slow
def test_activations_that_are_computed_again_give_the_same_bits(blobs, finished, tmp_path):
    assert pretrain(small_run(blobs, tmp_path / "run", **CONVNEXT, checkpointing="full")) == 0
    assert_same_run(tmp_path / "run", finished)


def test_a_run_begins_with_the_encoder_of_another(blobs, finished, tmp_path, capsys):
    exported = tmp_path / "encoder.safetensors"
    assert main(["export", str(finished), "--to", "timm", "--output", str(exported)]) == 0
    # Steps too small to be seen.
    config = small_run(blobs, tmp_path / "run", **{**CONVNEXT, "model": None, "init": str(exported), "lr": 1e-30})
    assert pretrain(config) == 0
    assert f"{exported}: " in capsys.readouterr().out
    before, after = (load_model(str(folder)).state_dict() for folder in (finished, tmp_path / "run"))
    for name in before:
        if name.startswith(("stem.", "stages.")):
            torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-20, msg=name)
