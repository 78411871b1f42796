"""Runs of mae_mlp on rows with missing numbers: they are those of a plain loop, go on where they were, and learn."""

import itertools
import json
import math
import shutil
import signal
import time
from functools import partial

import numpy as np
import pytest
import torch
from helpers import assert_same_run, command, metrics, small_run
from ranks import run_ranks, start_ranks
from torch import nn

import fastmae
from fastmae.checkpoint.load import load_model
from fastmae.cli import main
from fastmae.config import PretrainConfig
from fastmae.data.plan import plan_epoch
from fastmae.data.sources import open_train
from fastmae.errors import UserError
from fastmae.evaluate.features import extract_features
from fastmae.evaluate.reconstruct import fixed_images
from fastmae.facts import PixelFacts
from fastmae.model.mlp import MLPMAE
from fastmae.ops.bernoulli_masking import bernoulli_masking, expected_masked
from fastmae.train.pretrain import pretrain

D = 9
MLP = dict(model="mae_mlp", widths=(12, 5), mask_ratio=0.4, epochs=2)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """72 rows of 9 numbers that hang together, of columns of several scales; one in twenty is missing."""
    rng = np.random.default_rng(0)
    numbers = rng.normal(size=(72, 2)) @ rng.normal(size=(2, D)) + rng.normal(size=(72, D)) / 10
    numbers = numbers * 10.0 ** rng.integers(-1, 3, D) + rng.normal(size=D)
    numbers[rng.random(numbers.shape) < 0.05] = np.nan
    path = tmp_path_factory.mktemp("rows") / "rows.npy"
    np.save(path, numbers.astype(np.float32)[:, None, None, :])
    return str(path)


@pytest.fixture(params=["numbers", "table"])
def either(request, rows, tmp_path):
    """The same rows as arrays of one pixel, and as a CSV table with names and empty cells."""
    if request.param == "numbers":
        return rows
    lines = [",".join(f"c{n}" for n in range(D))]
    for row in np.load(rows).reshape(-1, D).tolist():
        lines.append(",".join("" if math.isnan(number) else repr(number) for number in row))
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n")
    return str(tmp_path / "rows.csv")


@pytest.fixture(scope="module")
def finished(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mlp") / "run"
    assert pretrain(small_run(rows, folder, **MLP, fill="noise")) == 0
    return folder


def plain_model(widths):
    layers = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [*([nn.GELU()] if layers else []), nn.Linear(fan_in, fan_out)]
    return nn.Sequential(*layers)


def test_twenty_steps_are_those_of_a_plain_loop(rows, tmp_path):
    """Same data, same masks, same start; the plain loop's model, optimiser and schedule are spelled out here."""
    assert pretrain(small_run(rows, tmp_path, **{**MLP, "epochs": 3}, blr=0.5, seed=11)) == 0
    settings = json.loads((tmp_path / "checkpoints" / "step-00000027" / "manifest.json").read_text())["settings"]
    low, high = (torch.tensor(settings["value_range"][first::2]) for first in (0, 1))
    mean, std = (torch.tensor(settings[name]) for name in ("mean", "std"))
    table = torch.from_numpy(np.load(rows)).flatten(1)
    table = ((table - low) / (high - low) - mean) / std

    torch.manual_seed(11)
    encoder, decoder = plain_model([2 * D, 12, 5]), plain_model([5, 12, D])
    torch.manual_seed(11)
    nn.ModuleList([plain_model([2 * D, 12, 5]), plain_model([5, 12, D])])  # draws as many numbers as a model's making
    for layer in (*encoder, *decoder):
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    parameters = [*encoder.parameters(), *decoder.parameters()]
    groups = [
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
        {"params": [p for p in parameters if p.ndim == 2], "weight_decay": 0.05},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), foreach=False, fused=False)
    peak, expected = 0.5 * 8 / 256, []
    for epoch in range(3):
        plan = plan_epoch(11, epoch, 72, 8)
        for k in range(9):
            now = epoch + k / 9
            lr = peak * now if now < 1 else peak * 0.5 * (1 + math.cos(math.pi * (now - 1) / 2))
            for group in optimizer.param_groups:
                group["lr"] = lr
            indices, draw_ids = plan.batch(k)
            x, masked = table[indices], bernoulli_masking(torch.from_numpy(draw_ids), 11, D, 0.4)
            hidden, targets = masked | x.isnan(), masked & ~x.isnan()
            pred = decoder(encoder(torch.cat([x.masked_fill(hidden, 0), hidden.float()], dim=1)))
            loss = (pred - x)[targets].square().sum() / (8 * expected_masked(D, 0.4))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            expected.append((len(expected) + 1, epoch, loss.item(), lr))
    logged = metrics(tmp_path)
    assert len(logged) == 27
    np.testing.assert_allclose(logged, expected, rtol=1e-4)
    assert logged[-1][2] < 0.8 * logged[0][2], "nothing was learnt, so nothing was compared"


def test_a_run_that_was_stopped_ends_with_the_same_bits(rows, finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000018")
    assert pretrain(small_run(rows, tmp_path / "run", **MLP, fill="noise", resume="auto")) == 0
    assert "after step 14" in capsys.readouterr().out
    assert_same_run(tmp_path / "run", finished)


@pytest.mark.slow
def test_sigkill_at_random_instants_changes_nothing(either, tmp_path):
    changes = {**MLP, "widths": "12 5", "epochs": 60, "checkpoint_freq": 11, "save_freq": 20}
    words = [word for text in command(either, tmp_path / "run", **changes, resume="auto") for word in text.split()]
    undisturbed = tmp_path / "undisturbed"
    whole = [str(undisturbed) if word == str(tmp_path / "run") else word for word in words]
    assert main(whole[whole.index("pretrain") :]) == 0
    killed, dice = 0, np.random.default_rng()
    for _ in range(4):
        (rank,) = start_ranks(1, partial(main, words[words.index("pretrain") :]))
        time.sleep(dice.uniform(0.2, 1.2))
        rank.process.kill()
        status, err = rank.finish()
        assert status in (0, -signal.SIGKILL), err
        killed += status == -signal.SIGKILL
    assert killed, "every run was done before it could be killed, so nothing was tested"
    (rank,) = start_ranks(1, partial(main, words[words.index("pretrain") :]))
    status, err = rank.finish()
    assert status == 0, err
    assert_same_run(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_two_ranks_have_the_losses_of_one_though_their_rows_have_other_numbers_of_targets(either, tmp_path):
    ways, settings = ("ddp", "fsdp"), {**MLP, "fill": "noise"}
    assert pretrain(small_run(either, tmp_path / "alone", **settings)) == 0
    run_ranks(2, *(small_run(either, tmp_path / way, **settings, batch_size=4, parallel=way) for way in ways))
    for way in ways:
        np.testing.assert_allclose(metrics(tmp_path / way), metrics(tmp_path / "alone"), rtol=1e-5)


def test_micro_batches_are_a_larger_batch(rows, tmp_path):
    assert pretrain(small_run(rows, tmp_path / "whole", **MLP, batch_size=24)) == 0
    assert pretrain(small_run(rows, tmp_path / "parts", **MLP, batch_size=8, accum_iter=3)) == 0
    np.testing.assert_allclose(metrics(tmp_path / "whole"), metrics(tmp_path / "parts"), rtol=1e-5)


def test_what_a_run_says_and_leaves(rows, finished, tmp_path, capsys):
    assert pretrain(small_run(rows, tmp_path / "run", **MLP, held_out=0.2)) == 0
    said = capsys.readouterr().out
    assert "each of 9 features with a chance of 0.4" in said
    assert "9-12-5-12-9" in said
    assert "% of the numbers of 58 rows are missing, and are never among them" in said
    assert "reconstruction" not in said
    assert not (tmp_path / "run" / "reconstructions").exists()
    assert "held_out_loss" in (tmp_path / "run" / "log.txt").read_text()
    model = load_model(str(finished))
    features = extract_features(model, open_train(rows), pool="mean", batch_size=30, num_workers=1)
    assert features.values.shape == (72, 5)
    assert features.values.isfinite().all()


def test_what_has_no_pictures_says_what_to_use_instead(finished, tmp_path, capsys):
    assert main(["reconstruct", str(finished), "--output", str(tmp_path / "x.png"), "--device", "cpu"]) == 2
    assert "fastmae impute fills cells" in capsys.readouterr().err


@pytest.mark.parametrize("changes", [{}, {"widths": (7,), "loss": "bce", "loss_on": "all", "fill": "zero"}])
def test_a_run_opens_with_its_own_settings(changes, blobs, tmp_path):
    assert pretrain(small_run(blobs, tmp_path, model="mae_mlp", epochs=1, **changes)) == 0
    model = load_model(str(tmp_path))
    assert {name: getattr(model, name) for name in changes} == changes
    assert (model.img_size, model.num_patches) == ((16, 16), 256)
    assert model.predict(fixed_images(model, open_train(blobs), 4)).shape == (4, 256, 1)


def test_a_model_of_ones_own_trains_and_its_latents_are_those_of_the_run(rows, tmp_path):
    given = MLPMAE((1, 1), D, widths=(6, 4), pixels=PixelFacts(dtype="float32"), fill="zero")
    run = fastmae.pretrain(rows, output_dir=tmp_path / "run", model=given, epochs=1, batch_size=8, tune="off")
    opened = load_model(str(tmp_path / "run"))
    assert (opened.widths, opened.fill) == ((6, 4), "zero")
    images = fixed_images(opened, open_train(rows), 5)
    assert torch.equal(run.model.features(images), opened.features(images))


def test_a_model_whose_mean_and_deviation_are_not_those_of_the_columns_is_said(tmp_path, capsys):
    table = np.random.default_rng(0).normal(size=(32, 3)) + np.array([0, 50, 0])
    settings = dict(epochs=1, batch_size=8, tune="off", loss="mse", device="cpu")
    said = []
    for name, numbers in {"far": {}, "near": {"mean": (0.0, 50.0, 0.0), "std": (1.0,) * 3}}.items():
        model = MLPMAE((1, 1), 3, widths=(4,), pixels=PixelFacts(dtype="float32"), **numbers)
        fastmae.pretrain(table, output_dir=tmp_path / name, model=model, **settings)
        said.append(capsys.readouterr().out)
    assert ["after the given mean and std" in " ".join(out.split()) for out in said] == [True, False]
    assert "8 rows per step" in said[0]


def test_what_cannot_be_learnt_is_refused_in_one_line(tmp_path):
    frozen = MLPMAE((1, 1), 3, pixels=PixelFacts(dtype="float32")).requires_grad_(False)
    rows = np.zeros((8, 3))
    with pytest.raises(UserError, match="none of its parameters is trained"):
        fastmae.pretrain(rows, output_dir=tmp_path / "run", model=frozen)
    with pytest.raises(UserError, match="holds no image"):
        fastmae.pretrain(np.zeros((0, 8, 8, 3), np.uint8), output_dir=tmp_path / "run", model="mae_conv")


def test_digits_are_learnt(tmp_path, capsys):
    """By default, at the defaults: no crop, no flip, and half of the features masked."""
    config = PretrainConfig(model="mae_mlp", output_dir=str(tmp_path), device="cpu", probe=False, epochs=8, tune="off")
    assert pretrain(config) == 0
    losses = [loss for _, _, loss, _ in metrics(tmp_path)]
    assert np.mean(losses[-20:]) < 0.6
    settings = json.loads(next(tmp_path.glob("checkpoints/*/manifest.json")).read_text())["settings"]
    assert (settings["crop_scale"], settings["flip"], settings["mask_ratio"]) == ([1.0, 1.0], False, 0.5)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (dict(masking="block"), "masking='block': is for"),
        (dict(norm_pix_loss=True), "norm_pix_loss=True: is for"),
        (dict(patch_size=4), "patch_size"),
        (dict(embed_dim=64), "embed_dim=64: is for mae_vit"),
        (dict(mask_ratio_schedule=0.8), "mask_ratio_schedule"),
        (dict(widths=(8, 0)), "widths"),
        (dict(mask_ratio=1.0), "mask_ratio"),
        (dict(attention="sdpa"), "attention='sdpa': is for mae_vit"),
        (dict(checkpointing="gelu"), "checkpointing='gelu': must be none, selective or full for mae_mlp"),
        (dict(spectrogram=32), "spectrogram=32: is for"),
    ],
)
def test_what_does_not_go_with_it_is_refused_in_one_line(changes, problem, tmp_path):
    with pytest.raises(UserError, match=problem) as error:
        PretrainConfig(output_dir=str(tmp_path), **{"model": "mae_mlp", **changes})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("changes", [{"flip": True}, {"crop_scale": (0.5, 1.0)}, {"input_size": 3}, {"axis": "axial"}])
def test_settings_of_images_are_refused_for_tables_before_any_work(changes, tmp_path):
    name = next(iter(changes))
    with pytest.raises(UserError, match=f"{name}=.*: must be left out for a table, whose rows are no images") as error:
        pretrain(small_run("wine", tmp_path / "run", model="mae_mlp", **changes))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_another_width_is_refused_when_a_run_goes_on(rows, finished):
    with pytest.raises(UserError, match="widths"):
        pretrain(small_run(rows, finished, **{**MLP, "widths": (12, 6)}, fill="noise", resume="auto"))


def test_a_single_number_predicts_nothing_and_is_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(30, 1, 1, 1)).astype(np.float32))
    with pytest.raises(UserError, match="2 to 1048576 numbers"):
        pretrain(small_run(str(tmp_path / "x.npy"), tmp_path / "run", **MLP))
