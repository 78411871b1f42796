"""Defaults that suit the data, and settings that are refused before anything loads."""

import dataclasses
import inspect
import json
import pickle
import re
import typing
from pathlib import Path

import numpy as np
import pytest

import fastmae.config
from fastmae.config import (
    IMAGE_SETTINGS,
    AnomalyConfig,
    ExportConfig,
    FeaturesConfig,
    FinetuneConfig,
    InfoConfig,
    InpaintConfig,
    MaskingConfig,
    PackConfig,
    PretrainConfig,
    ProbeConfig,
    PushConfig,
    ReconstructConfig,
    RunsConfig,
    SearchConfig,
    SweepConfig,
    VerifyConfig,
    images_given,
    pixel_settings,
    read_as,
    resolve,
)
from fastmae.config.family import FAMILY, USUAL_RATIO, family_of
from fastmae.config.groups import GROUPS, MAIN
from fastmae.config.model import ModelSpec
from fastmae.config.pretrain import OF_ADVERSARY
from fastmae.config.shape import SHAPE
from fastmae.config.trainings import TRAININGS
from fastmae.config.values import field_types
from fastmae.errors import SettingError, UserError
from fastmae.facts import DataFacts, PixelFacts, ReadAs

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
    assert config.mask_ratio == 0.75


def test_a_family_has_its_own_mask_ratio_and_takes_its_own_settings_alone():
    assert resolved(FOLDER, model="mae_convnextv2_atto").mask_ratio == 0.6
    assert resolved(FOLDER, model="mae_convnextv2_atto", masking="grid").mask_ratio == 0.75
    assert resolved(FOLDER, model="mae_convnextv2_atto", mask_ratio=0.5).mask_ratio == 0.5
    with pytest.raises(UserError, match=r"^latent_dim=8: is for mae_conv, not for mae_vit_tiny_patch4; leave it out$"):
        PretrainConfig(model="mae_vit_tiny_patch4", latent_dim=8)
    with pytest.raises(UserError, match=r"^embed_dim=64: is for mae_vit_\*, not for mae_mlp; leave it out$"):
        PretrainConfig(model="mae_mlp", embed_dim=64)


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


def test_finetunes_tune_is_read_as_autotune_by_its_value():
    assert FinetuneConfig(tune="off") == FinetuneConfig(autotune="off")
    with pytest.raises(UserError, match=r"^tune='off': must be left out with autotune='auto'$"):
        FinetuneConfig(tune="off", autotune="auto")


def test_nothing_is_left_open():
    left = {name for name, value in dataclasses.asdict(resolved(CIFAR)).items() if value is None}
    assert left == {
        "start_size", "patch_size", "predict_ratio", "clip_grad", "ema", "device", "shard_size",
        "cache_gb", "checkpoint_freq", "keep_every", "log_dir", "wandb", "profile", "probe_freq", "tune", "root",
        "held_out", "data_weights", "mlflow", "mask_ratio_schedule",
    } | {*SHAPE} | {*FAMILY} | {*OF_ADVERSARY} | {*IMAGE_SETTINGS} - {"pixel_type", "other_types"}  # fmt: skip


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


CONFIGS = {"pretrain": PretrainConfig, "finetune": FinetuneConfig}
NEEDED = dict(
    checkpoint="run",
    file="sweep.yaml",
    folders=("runs",),
    output="a.npz",
    data_path=("digits",),
    queries=("a.jpg",),
    to="timm",
)
NEEDED |= dict(model="mae_vit_tiny_patch4", input_size=(16,), in_chans=1)
NEEDED |= dict(image="a.png", mask="b.png")


def settings_of(config):
    """What must be given, with values that work."""
    required = [field.name for field in dataclasses.fields(config) if field.default is dataclasses.MISSING]
    others = {
        ExportConfig: {"output": "a.pth"},
        PackConfig: {"data_path": "digits"},
        FeaturesConfig: {"output": "a.npz"},
        InpaintConfig: {"output": "a.npy"},
    }
    return {name: NEEDED[name] for name in required} | others.get(config, {})


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (config, field.name)
        for config in (
            PretrainConfig, FinetuneConfig, ProbeConfig, ReconstructConfig, FeaturesConfig, SearchConfig, AnomalyConfig,
            ExportConfig, VerifyConfig, PackConfig, InfoConfig,
            SweepConfig, RunsConfig, PushConfig,
        )
        for field in dataclasses.fields(config)
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)  # fmt: skip
def test_a_wrong_type_is_one_line_that_names_the_setting(config, name):
    for value in (object(), {"a": [1, 2]}, [[1, [2]]], b"\n", 1j):
        with pytest.raises(SettingError) as refused:
            config(**{**settings_of(config), name: value})
        lines = str(refused.value), refused.value.as_on_the_command_line()
        assert [line.count("\n") for line in lines] == [0, 0]
        assert lines[0].startswith(f"{name}=")
        assert lines[1].startswith(f"--{name} ")
        assert all(": must be " in line for line in lines)
    if type(None) not in typing.get_args(field_types(config)[name]):
        with pytest.raises(SettingError, match=f"^{name}=None: must be"):
            config(**{**settings_of(config), name: None})
    config(**settings_of(config))


@pytest.mark.parametrize(
    ("given", "value"),
    [
        (dict(input_size=16), (16,)), (dict(input_size=[16, 20]), (16, 20)), (dict(input_size=np.array([16])), (16,)),
        (dict(epochs=np.int64(3)), 3), (dict(epochs=3.0), 3), (dict(lr=1), 1.0), (dict(lr=np.float32(0.5)), 0.5),
        (dict(mean=np.array([0.5, 0.25], np.float32)), (0.5, 0.25)), (dict(mean=0), (0.0,)),
        (dict(crop_scale=[1, 1]), (1.0, 1.0)), (dict(flip=np.bool_(True)), True), (dict(output_dir=Path("a/b")), "a/b"),
        (dict(data_path=[Path("a"), "b"]), ("a", "b")), (dict(data_path=Path("a")), "a"), (dict(lr=None), None),
        (dict(precision="bf16"), "bf16"), (dict(ops="native"), "cpu"), (dict(image_decoder="pool"), "threads"),
        (dict(hang_timeout=0), 0.0), (dict(seed=2**62), 2**62), (dict(input_size=range(16, 18)), (16, 17)),
    ],
    ids=str,
)  # fmt: skip
def test_values_are_brought_to_their_types(given, value):
    (name,) = given
    coerced = getattr(PretrainConfig(**given), name)
    assert coerced == value
    assert type(coerced) is type(value)
    if isinstance(value, tuple):
        assert [type(one) for one in coerced] == [type(one) for one in value]


@pytest.mark.parametrize(
    ("config", "given", "argument", "flag"),
    [
        ("pretrain", dict(input_size=-3), "input_size=-3: must be one or two positive numbers of pixels",
         "--input_size -3: must be one or two positive numbers of pixels"),
        ("pretrain", dict(input_size=(8, 8, 8)), "input_size=(8, 8, 8): must be one or two positive numbers of pixels",
         "--input_size 8 8 8: must be one or two positive numbers of pixels"),
        ("pretrain", dict(precision="fp8"), "precision='fp8': must be auto, fp32, tf32 or bf16",
         "--precision fp8: must be auto, fp32, tf32 or bf16"),
        ("pretrain", dict(epochs="3"), "epochs='3': must be a whole number, or None",
         "--epochs 3: must be a whole number, or None"),
        ("pretrain", dict(probe=1), "probe=1: must be True or False, or None",
         "--probe 1: must be True or False, or None"),
        ("pretrain", dict(crop_scale=0.5), "crop_scale=0.5: must be two numbers, or None",
         "--crop_scale 0.5: must be two numbers, or None"),
        ("pretrain", dict(repeated_masks=3), "repeated_masks=3: must be a divisor of batch_size=64",
         "--repeated_masks 3: must be a divisor of --batch_size 64"),
        ("pretrain", dict(shard_size=3), "shard_size=3: must be given together with parallel='hsdp'",
         "--shard_size 3: must be given together with --parallel hsdp"),
        ("pretrain", dict(masking="file"), "masking='file': must be given together with masks='FILE.npy'",
         "--masking file: must be given together with --masks FILE.npy"),
        ("pretrain", dict(epochs=0), "epochs=0: must be at least 1", "--epochs 0: must be at least 1"),
        ("pretrain", dict(device=["a\nb"]), "device=['a\\nb']: must be a text, or None",
         "--device ['a\\nb']: must be a text, or None"),
        ("finetune", dict(tune="a\nb"), "tune='a\\nb': must be full, linear, lora or last-K, such as last-2",
         "--tune a b: must be full, linear, lora or last-K, such as last-2"),
    ],
    ids=str,
)  # fmt: skip
def test_errors_name_an_argument_in_python_and_a_flag_on_the_command_line(config, given, argument, flag):
    with pytest.raises(UserError) as refused:
        CONFIGS[config](**given)
    assert (str(refused.value), refused.value.as_on_the_command_line()) == (argument, flag)


@pytest.mark.parametrize(
    "given",
    [
        dict(nb_classes=1), dict(tune="last-0"), dict(lora_rank=0), dict(layer_decay=0.0), dict(drop_path=1.0),
        dict(smoothing=1.0), dict(mixup=-1.0), dict(cutmix=float("inf")), dict(reprob=2.0), dict(test_freq=0),
        dict(mixup_switch_prob=-0.5), dict(clip_grad=0.0), dict(max_corrupt=1.5), dict(hang_timeout=-1.0),
        dict(keep_every=0), dict(profile=0), dict(max_skipped=0), dict(shard_size=0, parallel="hsdp"),
    ],
    ids=str,
)  # fmt: skip
def test_ranges_of_fine_tuning(given):
    name = next(iter(given))
    with pytest.raises(SettingError, match=f"^{name}=.*: must be"):
        FinetuneConfig(**given)


def numbers_in(annotation):
    """int and float, where a setting may be one or several of them."""
    inside = set().union(*map(numbers_in, typing.get_args(annotation)), set())
    return inside | ({annotation} & {int, float})


def test_every_number_of_every_command_is_finite_and_not_too_large():
    tried = 0
    for config in (value for value in vars(fastmae.config).values() if dataclasses.is_dataclass(value)):
        shared = fastmae.config.TrainingConfig, fastmae.config.TuningConfig, fastmae.config.ImagesConfig, MaskingConfig
        if config.__name__.startswith("Resolved") or config in shared:
            continue
        for name, annotation in field_types(config).items():
            several = typing.get_origin(annotation) is tuple or "tuple" in str(annotation)
            for value in (float("nan"), float("inf"), -float("inf"), 10**400) if numbers_in(annotation) else ():
                expected = "a finite number" if isinstance(value, float) else r"below 2\*\*63"
                with pytest.raises(SettingError, match=f"^{name}=.*: must be {expected}"):
                    config(**{**settings_of(config), name: (value, value) if several else value})
                tried += 1
    assert tried > 500


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (dict(mean=(127.0,)), "between 0 and 1, a share of the value range: divide numbers from 0 to 255 by 255"),
        (dict(std=(58.0,)), "between 1e-06 and 1, a share of the value range: divide numbers from 0 to 255 by 255"),
        (dict(std=(0.0,)), "between 1e-06 and 1"), (dict(std=(0.2, -0.1)), "between 1e-06 and 1"),
        (dict(mean=(-0.1,)), "between 0 and 1"), (dict(num_workers=10**6), "at most 4096"),
        (dict(hang_timeout=1e300), "0 or more seconds, at most a year"), (dict(seed=-1), r"in \[0, 2\*\*63\)"),
    ],
    ids=str,
)  # fmt: skip
def test_numbers_beyond_what_can_be_meant_are_refused(given, problem):
    (name,) = given
    with pytest.raises(SettingError, match=f"^{name}=.*: must be {problem}"):
        PretrainConfig(**given)


@pytest.mark.parametrize(
    ("facts", "epochs", "warmup"),
    [(FOLDER, None, 40), (FOLDER, 41, 40), (FOLDER, 40, 4), (FOLDER, 5, 0.5), (DIGITS, None, 6), (DIGITS, 400, 40)],
)
def test_the_warm_up_is_shorter_than_the_run(facts, epochs, warmup):
    assert resolved(facts, epochs=epochs).warmup_epochs == warmup
    assert resolved(facts, epochs=epochs, warmup_epochs=60.0).warmup_epochs == 60


def test_the_learning_rate_falls():
    assert resolved(FOLDER, lr=1e-4, min_lr=1e-4).min_lr == 1e-4
    with pytest.raises(SettingError, match=r"^min_lr=1\.0: must be at most the learning rate, which is 0\.0001 here"):
        resolved(FOLDER, lr=1e-4, min_lr=1.0)


def test_a_run_does_not_start_behind_its_end():
    with pytest.raises(SettingError, match=r"^start_epoch=60: must be below the 60 of epochs"):
        resolved(DIGITS, start_epoch=60)


def test_a_resolved_configuration_may_hold_what_nobody_gives():
    config = resolved(CIFAR)
    assert config.grow_epochs == 0, "which --grow_epochs may not be"
    assert dataclasses.replace(config, epochs=3).epochs == 3


def test_an_error_travels_between_processes():
    for error in (SettingError("keep", 0, "must be at least 1"), SettingError("float8", problem="needs a GPU")):
        other = pickle.loads(pickle.dumps(error))
        assert str(other) == str(error)
        assert other.as_on_the_command_line() == error.as_on_the_command_line()


def test_the_files_of_settings_do_not_import_each_other_in_a_circle():
    folder = Path(fastmae.config.__file__).parent
    imports = {}
    for path in folder.glob("*.py"):
        text = path.read_text()
        assert "TYPE_CHECKING" not in text, path
        imports[path.stem] = set(re.findall(r"^from fastmae\.config\.(\w+) import", text, re.MULTILINE))
    del imports["__init__"]
    while imports:
        free = {name for name, others in imports.items() if not others & imports.keys()}
        assert free, f"a circle among {sorted(imports)}"
        imports = {name: others for name, others in imports.items() if name not in free}


@pytest.mark.parametrize("config", TRAININGS.values())
def test_every_setting_is_in_one_group_of_the_help(config):
    grouped = [name for names in GROUPS.values() for name in names]
    assert len(grouped) == len(set(grouped))
    settings = {field.name for field in dataclasses.fields(config)}
    assert settings <= set(grouped)
    assert 9 <= len(settings & set(MAIN)) <= 11


def test_the_groups_of_the_help_hold_no_other_names():
    settings = {field.name for config in TRAININGS.values() for field in dataclasses.fields(config)}
    assert settings == {name for names in GROUPS.values() for name in names}
    assert set(MAIN) <= settings


# --- how images are read ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (dict(value_range=(5.0, 3.0)), "value_range"),
        (dict(value_range=(5.0,)), "value_range"),
        (dict(value_range=("auto", 3.0)), "value_range"),
        (dict(value_range=()), "value_range"),
        (dict(nodata=256, pixel_type="uint8"), "nodata"),
        (dict(nodata=0.5, pixel_type="uint16"), "nodata"),
        (dict(pixel_type="int16"), "pixel_type"),
    ],
)
@pytest.mark.parametrize("make", [PretrainConfig, FinetuneConfig, lambda **given: ProbeConfig(checkpoint="x", **given)])
def test_a_range_or_a_missing_value_that_cannot_be_is_refused_in_every_command(make, settings, name):
    with pytest.raises(SettingError, match=f"^{name}"):
        make(**settings)


def test_images_are_read_as_given_then_as_before_then_by_default():
    given = PretrainConfig(nodata=3)
    assert read_as(given) == ReadAs(nodata=3.0)
    before = {"pixel_type": "uint16", "nodata": 5, "value_range": [0, 4095]}
    assert images_given(given, before) | {"pixel_type": "uint16", "nodata": 3.0, "value_range": (0.0, 4095.0)} == (
        images_given(given, before)
    )
    assert read_as(given, {"model": "of version 0.1"}).pixel_type == "uint8"


def test_the_facts_of_pixels_make_a_round_trip_through_settings():
    facts = PixelFacts(dtype="float32", low=(-1024.0, 0.0), high=(3071.0, 1.0), nodata=-9999.0)
    spec = ModelSpec(model="mae_vit_tiny_patch4", input_size=(8, 8), in_chans=2, **pixel_settings(facts))
    assert spec.pixels == facts == ModelSpec.from_json(json.loads(json.dumps(spec.as_json()))).pixels
    with pytest.raises(SettingError, match="value_range"):
        ModelSpec(model="mae_vit_tiny_patch4", input_size=(8, 8), in_chans=1, **pixel_settings(facts))


def test_the_usual_mask_ratios_are_those_that_the_help_says_and_what_is_no_name_is_no_family():
    said = inspect.getsource(MaskingConfig)
    assert all(f" {ratio:g}" in said for ratio in USUAL_RATIO.values())
    assert [family_of(model) for model in (None, {"a": 1}, 3, "mae_conv")] == ["vit", "vit", "vit", "conv"]
