"""Defaults that suit the data, and settings that are refused before anything loads."""

import dataclasses

import pytest

from fastmae.config import FinetuneConfig, PretrainConfig, resolve
from fastmae.config.groups import GROUPS, MAIN
from fastmae.errors import UserError
from fastmae.facts import DataFacts

DIGITS = DataFacts(kind="digits", channels=1, size=(8, 8), labelled=True, length=1438)
CIFAR = DataFacts(kind="array", channels=3, size=(32, 32), labelled=True, length=50_000)
OBLONG = DataFacts(kind="array", channels=5, size=(30, 50), labelled=False, length=200)
LARGE = DataFacts(kind="array", channels=1, size=(512, 512), labelled=True, length=200)
FOLDER = DataFacts(kind="folder", channels=3, size=None, labelled=True, length=1_281_167)


def resolved(facts, ranks=1, **flags):
    return resolve(PretrainConfig(**flags), facts, mean=(0.5,), std=(0.2,), ranks=ranks, num_workers=3)


@pytest.mark.parametrize(
    ("facts", "model", "input_size", "epochs", "flip", "probe"),
    [
        (DIGITS, "mae_vit_tiny_patch4", (16, 16), 60, False, True),
        (CIFAR, "mae_vit_tiny_patch4", (32, 32), 400, True, False),
        (OBLONG, "mae_vit_tiny_patch4", (32, 52), 400, False, False),
        (LARGE, "mae_vit_large_patch16", (224, 224), 400, False, True),
        (FOLDER, "mae_vit_large_patch16", (224, 224), 400, True, False),
    ],
)
def test_defaults_suit_the_data(facts, model, input_size, epochs, flip, probe):
    config = resolved(facts)
    assert (config.model, config.input_size, config.epochs) == (model, input_size, epochs)
    assert (config.flip, config.probe, config.in_chans) == (flip, probe, facts.channels)


def test_a_folder_gets_the_published_defaults():
    config = resolved(FOLDER, ranks=8)
    assert (config.warmup_epochs, config.blr, config.min_lr, config.crop_scale) == (40, 1e-3, 0, (0.2, 1.0))
    assert config.global_batch == 512
    assert config.lr == pytest.approx(2e-3)


def test_what_is_given_stays():
    given = dict(model="mae_vit_base_patch16", epochs=3, blr=1.0, warmup_epochs=0.0, flip=True, probe=False, in_chans=3)
    config = resolved(DIGITS, **given, accum_iter=2)
    assert {name: getattr(config, name) for name in given} == given
    assert config.input_size == (224, 224)
    assert config.lr == 128 / 256
    assert resolved(DIGITS, lr=0.125).lr == 0.125
    assert resolved(FOLDER, input_size=(192,)).input_size == (192, 192)
    assert resolved(FOLDER, input_size=(192, 320)).input_size == (192, 320)


def test_nothing_is_left_open():
    left = {name for name, value in dataclasses.asdict(resolved(CIFAR)).items() if value is None}
    assert left == {
        "start_size", "decoder_depth", "predict_ratio", "clip_grad", "ema", "device", "shard_size", "cache_gb",
        "checkpoint_freq", "keep_every", "log_dir", "wandb", "profile", "probe_freq",
    }  # fmt: skip


@pytest.mark.parametrize(
    "flags",
    [
        dict(mask_ratio=0.0), dict(mask_ratio=1.0), dict(mask_ratio=float("nan")), dict(batch_size=0), dict(epochs=0),
        dict(accum_iter=0), dict(lr=-1.0), dict(lr=float("inf")), dict(blr=0.0), dict(min_lr=-1.0), dict(seed=-1),
        dict(weight_decay=-0.1), dict(warmup_epochs=-1.0), dict(start_epoch=-1), dict(start_epoch=3, epochs=3),
        dict(input_size=(8, 8, 8)), dict(input_size=(0,)), dict(crop_scale=(0.0, 1.0)), dict(crop_scale=(0.9, 0.2)),
        dict(crop_scale=(0.5, 1.1)), dict(std=(0.1, 0.0)), dict(keep=0), dict(save_freq=0), dict(log_freq=0),
        dict(checkpoint_freq=0), dict(num_workers=0), dict(in_chans=0),
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_cannot_work_are_named(flags):
    (flag,) = [name for name in flags if name != "epochs" or len(flags) == 1]
    with pytest.raises(UserError, match=f"^{flag}=.*: must be") as refused:
        PretrainConfig(**flags)
    assert refused.value.as_on_the_command_line().startswith(f"--{flag} ")


@pytest.mark.parametrize("config", [PretrainConfig, FinetuneConfig])
def test_every_setting_is_in_one_group_of_the_help(config):
    grouped = [name for names in GROUPS.values() for name in names]
    assert len(grouped) == len(set(grouped))
    settings = {field.name for field in dataclasses.fields(config)}
    assert settings <= set(grouped)
    assert 9 <= len(settings & set(MAIN)) <= 11


def test_the_groups_of_the_help_hold_no_other_names():
    settings = {field.name for config in (PretrainConfig, FinetuneConfig) for field in dataclasses.fields(config)}
    assert settings == {name for names in GROUPS.values() for name in names}
    assert set(MAIN) <= settings
