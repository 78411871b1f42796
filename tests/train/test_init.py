"""Runs that begin with the encoder of a file."""

import shutil

import pytest
import torch
from helpers import assert_same_run, small_run

from fastmae.checkpoint.load import load_model
from fastmae.errors import SettingError
from fastmae.train.pretrain import pretrain


@pytest.fixture(scope="module")
def encoder(blobs, tmp_path_factory):
    """A run folder whose encoder others begin with."""
    folder = tmp_path_factory.mktemp("init") / "encoder"
    assert pretrain(small_run(blobs, folder, epochs=2)) == 0
    return folder


def test_a_run_begins_with_the_encoder_and_goes_on_without_the_file(encoder, blobs, tmp_path, capsys):
    copied = shutil.copytree(encoder, tmp_path / "encoder")
    still = small_run(blobs, tmp_path / "still", init=str(copied), epochs=1, lr=1e-12, warmup_epochs=0.0)
    assert pretrain(still) == 0
    before, after = load_model(encoder).state_dict(), load_model(tmp_path / "still").state_dict()
    for name, tensor in before.items():
        if not name.startswith(("decoder_", "mask_token")):
            torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-9)
    assert not torch.equal(after["decoder_pred.weight"], before["decoder_pred.weight"])
    assert "54 tensors of its encoder, and 32 of a fresh decoder" in capsys.readouterr().out

    run = small_run(blobs, tmp_path / "run", init=str(copied), epochs=2)
    assert pretrain(run) == 0
    shutil.copytree(tmp_path / "run", tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "step-00000018")
    shutil.rmtree(copied)
    capsys.readouterr()
    assert pretrain(small_run(blobs, tmp_path / "stopped", epochs=2, resume="auto")) == 0
    assert "is not read again: the run goes on with its own weights" in capsys.readouterr().out
    assert_same_run(tmp_path / "run", tmp_path / "stopped")


def test_weights_to_begin_with_are_given_once(encoder, blobs, tmp_path):
    with pytest.raises(SettingError, match="init"):
        small_run(blobs, tmp_path, init=str(encoder), resume=str(encoder))
