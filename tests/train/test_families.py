"""Runs of every family of models: they go on where they were, do not depend on ranks, and what they leave is read.

A new family adds a row to ``FAMILIES``.
"""

import json
import random
import shutil
import time
from functools import partial
from typing import Any

import numpy as np
import pytest
from helpers import assert_same_run, command, metrics, small_run
from ranks import run_ranks, start_ranks

from fastmae.checkpoint.load import load_model
from fastmae.cli import main
from fastmae.config import PretrainConfig
from fastmae.errors import UserError
from fastmae.train.pretrain import pretrain

# 72 images of 16×16 pixels, 9 steps an epoch.
FAMILIES: dict[str, dict[str, Any]] = {
    "conv": dict(model="mae_conv", widths=(4, 8), latent_dim=6, mask_unit="pixel", fill="noise", loss="bce"),
}
# ConvNeXt V2 has tests of its own in test_convnext.py; here it is killed like the others.
KILLED = FAMILIES | {"convnext": dict(model="mae_convnextv2_atto", input_size=64, batch_size=24)}
REFUSED = {
    "conv": [
        (dict(decoder_depth=2), "decoder_depth=2: is for mae_vit_"),
        (dict(widths=(4, 0)), r"widths=\(4, 0\): must be one or more whole numbers of at least 1"),
        (dict(widths=(4, 4, 4, 4, 4)), "an image of 16×16 pixels can be halved 4 times, not 5"),
        (dict(latent_dim=0), "latent_dim=0: must be at least 1"),
        (dict(patch_size=4), "patch_size=.*: must be left out with mask_unit='pixel'"),
        (
            dict(mask_unit="patch", patch_size=4, norm_pix_loss=True),
            "norm_pix_loss=True: must be left out with loss='bce'",
        ),
        (dict(mask_unit="patch", input_size=18, patch_size=4), "multiple"),
        (dict(fill="black"), "fill='black': must be zero, mean or noise"),
        (dict(init="encoder.pth"), "init='encoder.pth': is for mae_vit_"),
        (dict(attention="sdpa"), "attention='sdpa': is for mae_vit_"),
        (dict(checkpointing="gelu"), "checkpointing='gelu': must be none, selective or full for mae_conv"),
    ],
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def finished(family, blobs, tmp_path_factory):
    folder = tmp_path_factory.mktemp(family) / "run"
    assert pretrain(small_run(blobs, folder, **FAMILIES[family], epochs=2, ema=0.9, held_out=None)) == 0
    return folder


def test_a_run_that_was_stopped_ends_with_the_same_bits(family, blobs, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000018")
    config = small_run(blobs, tmp_path / "run", **FAMILIES[family], epochs=2, ema=0.9, resume="auto")
    assert pretrain(config) == 0
    assert_same_run(tmp_path / "run", finished)


def test_what_a_run_left_is_read_by_every_command(finished, blobs, tmp_path, capsys):
    folder, device = str(finished), ["--device", "cpu"]
    commands = [
        ["reconstruct", folder, "--output", str(tmp_path / "grid.png"), *device],
        ["features", folder, "--output", str(tmp_path / "features.npz"), *device],
        ["anomaly", folder, "--output", str(tmp_path / "anomaly"), *device],
        ["search", folder, "--output", str(tmp_path / "search.png"), *device],
        ["report", folder, "--output", str(tmp_path / "report.html")],
    ]
    for words in commands:
        assert main(words) == 0, words
    model = load_model(folder)
    assert np.load(tmp_path / "features.npz")["features"].shape == (72, model.feature_dim)
    assert json.loads((tmp_path / "anomaly" / "scores.json").read_text())["scores"]


def test_what_a_family_does_not_take_is_refused_in_one_line(family, blobs, tmp_path):
    for changes, words in REFUSED[family]:
        with pytest.raises(UserError, match=words) as error:
            pretrain(PretrainConfig(**{**vars(small_run(blobs, tmp_path)), **FAMILIES[family], **changes}))
        assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("family", KILLED)
def test_killed_at_any_instant_a_run_goes_on_to_the_same_end(family, blobs, tmp_path):
    settings = {"epochs": 40, "save_freq": 20, **KILLED[family]}
    assert pretrain(small_run(blobs, tmp_path / "whole", **settings)) == 0
    words = command(blobs, tmp_path / "run", **{name: _as_words(value) for name, value in settings.items()})
    words = [part for word in words[words.index("pretrain") :] for part in word.split()]
    killed, dice = 0, random.Random(0)
    for _ in range(4):
        (rank,) = start_ranks(1, partial(main, [*words, "--resume", "auto"]))
        time.sleep(dice.uniform(0.5, 2.5))
        rank.process.kill()
        killed += rank.finish()[0] != 0
    assert killed, "every run was done before it could be killed, so nothing was tested"
    assert pretrain(small_run(blobs, tmp_path / "run", **settings, resume="auto")) == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def _as_words(value: Any) -> Any:
    return " ".join(map(str, value)) if isinstance(value, tuple) else value


@pytest.mark.slow
def test_two_ranks_have_the_losses_of_one(family, blobs, finished, tmp_path):
    settings = {**FAMILIES[family], "epochs": 2, "ema": 0.9, "batch_size": 4}
    run_ranks(2, *(small_run(blobs, tmp_path / way, **settings, parallel=way) for way in ("ddp", "fsdp")))
    for way in ("ddp", "fsdp"):
        np.testing.assert_allclose(metrics(tmp_path / way), metrics(finished), rtol=1e-5)
