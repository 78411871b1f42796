"""Settings in files: what is read, what is refused, and that the file of a run gives the run again."""

import dataclasses
import json
import logging
import random
import typing

import pytest
import yaml
from helpers import metrics, small_run

from fastmae.cli import main, parse
from fastmae.config import FinetuneConfig, PretrainConfig, ProbeConfig
from fastmae.config.load import MAX_BYTES, dump_yaml, load_settings, make_config, settings_as_words
from fastmae.config.values import field_types
from fastmae.errors import SettingError, UserError
from fastmae.train.pretrain import pretrain

# What version 0.1 wrote for a run of the digits, shortened to what it called by other names and what it computed.
OLD_RUN = {
    "data_path": "digits", "output_dir": "runs/old", "model": "mae_vit_tiny_patch4", "input_size": [16, 16],
    "start_size": None, "grow_epochs": 0, "mask_ratio": 0.75, "masking": "random", "masks": "", "batch_size": 64,
    "epochs": 60, "accum_iter": 1, "lr": 0.00075, "blr": 0.003, "warmup_epochs": 6.0, "crop_scale": [0.7, 1.0],
    "flip": False, "in_chans": 1, "mean": [0.3], "std": [0.37], "decoder": "pool", "ops": "native",
    "attention": "native", "num_workers": 2, "probe": True, "global_batch": 64, "dataset_length": 1438,
    "order": "a full shuffle", "given_masks": "",
}  # fmt: skip


def written(path, settings):
    if path.suffix == ".toml":  # which has no null
        lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items() if value is not None]
        path.write_text("\n".join(lines))
    else:
        path.write_text(dump_yaml(settings) if path.suffix == ".yaml" else json.dumps(settings))
    return path


def other_value(name, annotation, generator):
    """A value that is not the default, of a type that a field may have."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return generator.choice(arguments)
    if origin is tuple:
        count = 2 if arguments[-1] is Ellipsis else len(arguments)
        return [other_value(name, arguments[0], generator) for _ in range(count)]
    if arguments:
        choices = [one for one in arguments if one is not type(None)]
        return other_value(name, generator.choice(choices), generator)
    kinds = {
        bool: lambda: generator.random() < 0.5, int: lambda: generator.randrange(1, 99), float: generator.random,
        str: lambda: generator.choice(["off", "None of them", "1e-3", "x: y", "#", "true", "", "ä/ö", "[1]"]),
    }  # fmt: skip
    return kinds[annotation]()


@pytest.mark.parametrize("suffix", [".yaml", ".toml", ".json"])
@pytest.mark.parametrize("config", [PretrainConfig, FinetuneConfig, ProbeConfig])
def test_every_setting_comes_back_from_a_file(config, suffix, tmp_path):
    generator = random.Random(f"{config}{suffix}")
    for _ in range(20):
        types = field_types(config)
        settings = {name: other_value(name, annotation, generator) for name, annotation in types.items()}
        if config is FinetuneConfig and settings["tune"] == "off":
            settings["tune"] = "lora"  # off would be another setting's
        loaded = load_settings(written(tmp_path / f"a{suffix}", settings), config)
        expected = {name: tuple(v) if isinstance(v, list) else v for name, v in settings.items()}
        assert loaded == expected
        assert {type(v) for v in loaded.values()} == {type(v) for v in expected.values()}


def test_what_tune_means_in_finetune_is_told_by_its_value(tmp_path):
    path = written(tmp_path / "a.yaml", {"tune": "lora"})
    assert make_config(FinetuneConfig, {"tune": "off"}, path) == FinetuneConfig(tune="lora", autotune="off")
    assert load_settings(written(tmp_path / "b.yaml", {"tune": "auto"}), FinetuneConfig) == {"autotune": "auto"}
    assert load_settings(path.with_name("b.yaml"), PretrainConfig) == {"tune": "auto"}


def test_yaml_reads_as_one_expects(tmp_path):
    path = tmp_path / "a.yml"
    path.write_text(
        "# a comment\ncompile: off\nblr: 1e-3\nmin-lr: 1.0e-06\ncache: none\nlr: None\nepochs: ~\nflip: true\n"
    )
    expected = dict(compile="off", blr=1e-3, min_lr=1e-6, cache="none", lr=None, epochs=None, flip=True)
    assert load_settings(path, PretrainConfig) == expected
    path.write_text("")
    assert load_settings(path, PretrainConfig) == {}


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.yaml", "epoch: 3", r"epoch=3: no such setting; did you mean epochs\?"),
        ("a.json", '{"zzz": 3}', "zzz=3: no such setting; leave it out$"),
        ("a.yaml", "epochs: many", "epochs='many': must be a whole number, or None"),
        ("a.toml", "epochs = 2.5", "epochs=2.5: must be a whole number, or None"),
        ("a.yaml", "precision: fp8", "precision='fp8': must be auto, fp32, tf32 or bf16"),
        ("a.yaml", "data_path: {a: 1}", "data_path={'a': 1}: must be"),
        ("a.yaml", "epochs: 3\nepochs: 4", "epochs is given twice"),
        ("a.json", '{"epochs": 3, "epochs": 4}', "epochs is given twice"),
        ("a.toml", "epochs = 3\nepochs = 4", "not readable"),
        ("a.yaml", "decoder: pool\nimage_decoder: threads", "image_decoder: is another name|decoder: is another name"),
        ("a.yaml", "a: [", "not readable"),
        ("a.yaml", "!!python/object/apply:os.system [true]", "not readable"),
        ("a.yaml", "a: &a [1]\nb: [*a, *a]\n", r"a=\[1\]: no such setting"),
        ("a.json", "{", "not readable"),
        ("a.json", "[" * 100_000, "not readable"),
        ("a.json", "3", "holds no settings"),
        ("a.yaml", "- epochs", "holds no settings"),
        ("a.ini", "[epochs]", "give a .yaml, .toml or .json file, or a run folder"),
        ("a.yaml", "#" * (MAX_BYTES + 1), f"settings have at most {MAX_BYTES}"),
    ],
    ids=lambda value: value[:24],
)
def test_what_is_wrong_in_a_file_is_one_line_that_names_it(name, text, words, tmp_path):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UserError, match=words) as refused:
        load_settings(path, PretrainConfig)
    assert str(refused.value).startswith(f"{path}: ")
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 700


def test_a_file_that_is_not_there_is_refused(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path / "none", tmp_path):
        with pytest.raises(UserError, match=str(path)):
            load_settings(path, PretrainConfig)
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not readable"):
        load_settings(tmp_path / "a.yaml", PretrainConfig)


def test_a_run_of_version_01_is_read(tmp_path, caplog):
    path = written(tmp_path / "config.json", OLD_RUN)
    with caplog.at_level(logging.WARNING, "fastmae"):
        settings = load_settings(tmp_path, PretrainConfig)
    (line,) = caplog.messages
    assert line == f"{path}: ignored 4 values that a run computes (global_batch, dataset_length, order, given_masks)"
    config = PretrainConfig(**settings)
    assert (config.image_decoder, config.ops, config.attention) == ("threads", "cpu", "cpu")
    assert (config.lr, config.blr, config.grow_epochs) == (None, 0.003, None), "they follow from others"
    assert config.mean == (0.3,)
    settings = load_settings(written(path, OLD_RUN | {"lr": 0.1}), PretrainConfig)
    assert settings["lr"] == 0.1, "a rate of its own stays"


def test_settings_by_name_from_python():
    assert make_config(PretrainConfig, dict(decoder="pool", epochs=3)) == PretrainConfig(
        epochs=3, image_decoder="threads"
    )
    with pytest.raises(SettingError, match=r"^batchsize=3: no such setting; did you mean batch_size\?$") as refused:
        make_config(FinetuneConfig, dict(batchsize=3))
    assert refused.value.as_on_the_command_line() == "--batchsize 3: no such setting; did you mean --batch_size?"


def test_settings_as_the_words_of_a_command():
    settings = dict(lr=None, hang_timeout=None, resume="", flip=True, mean=(0.5, 0.25), epochs=3, input_size=(16,))
    words = [
        "--hang_timeout=None",
        "--resume=",
        "--flip=True",
        "--mean",
        "0.5",
        "0.25",
        "--epochs=3",
        "--input_size",
        "16",
    ]
    assert settings_as_words(settings, PretrainConfig) == words


@pytest.mark.parametrize("file", ["config.yaml", "config.json"])
def test_the_file_of_a_run_gives_the_same_run(blobs, tmp_path, file):
    growing = dict(start_size=(8,), epochs=2, blr=0.02, repeated_masks=2, masking="block", seed=5)
    assert pretrain(small_run(blobs, tmp_path / "one", **growing)) == 0
    settings = load_settings(tmp_path / "one" / file, PretrainConfig)
    assert pretrain(make_config(PretrainConfig, settings | {"output_dir": str(tmp_path / "two")})) == 0
    assert metrics(tmp_path / "two") == metrics(tmp_path / "one")
    one, two = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("one", "two"))
    assert two == one | {"output_dir": str(tmp_path / "two")}
    texts = [(tmp_path / name / "config.yaml").read_text() for name in ("one", "two")]
    assert texts[1] == texts[0].replace(str(tmp_path / "one"), str(tmp_path / "two"))
    fields = {field.name for field in dataclasses.fields(PretrainConfig)}
    assert yaml.safe_load(texts[0]).keys() == fields


def test_flags_override_the_file(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        "epochs: 3\nprobe: false\nasync_save: false\ninput_size: [16, 12]\ncompile: off\nwandb: --odd\n"
        "hang_timeout: null\nshard_size: 2\n"
    )
    assert parse(["pretrain", "--parallel", "hsdp", "--config", str(path)]) == PretrainConfig(
        epochs=3, probe=False, async_save=False, input_size=(16, 12), wandb="--odd", hang_timeout=None, shard_size=2,
        parallel="hsdp", compile="off",
    )  # fmt: skip
    flags = [
        "--epochs",
        "4",
        "--probe",
        "--async-save",
        "--input_size",
        "20",
        "--parallel=hsdp",
        "--wandb=b",
        "--no_flip",
    ]
    config = parse(["pretrain", f"--config={path}", *flags])
    assert (config.epochs, config.probe, config.async_save, config.input_size) == (4, True, True, (20,))
    assert (config.wandb, config.flip, config.shard_size) == ("b", False, 2)
    path.write_text("finetune: runs/x\ndata_path: [a, b]\nresume: ''\n")
    expected = FinetuneConfig(finetune="runs/x", data_path=("a", "b"), epochs=2)
    assert parse(["finetune", "--epochs", "2", "--config", str(path)]) == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--config"], "--config: must be given once"),
        (["--config", "a.yaml", "b.yaml"], "--config: must be given once"),
        (["--config", "{tmp}/none.yaml"], "none.yaml: cannot be read"),
        (["--config", "{tmp}/a.yaml"], "a.yaml: batchsize=3: no such setting; did you mean batch_size?"),
        (["--config", "{tmp}/b.yaml"], "--mask_ratio 2.0: must be above 0 and below 1"),
    ],
    ids=str,
)
def test_what_is_wrong_with_a_file_on_the_command_line_is_one_line(words, expected, tmp_path, refusal):
    (tmp_path / "a.yaml").write_text("batchsize: 3")
    (tmp_path / "b.yaml").write_text("mask_ratio: 2")
    line = refusal(["pretrain", *(word.format(tmp=tmp_path) for word in words)])
    assert expected in line


def test_the_command_of_a_config_yaml_does_the_run_again(blobs, tmp_path, capsys):
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    words = ["--data_path", blobs, "--device", "cpu", "--batch_size", "8", "--epochs", "1", "--probe", "False"]
    assert main(["pretrain", *words, "--output_dir", one]) == 0
    assert main(["pretrain", "--config", f"{one}/config.yaml", "--output_dir", two]) == 0
    assert metrics(tmp_path / "two") == metrics(tmp_path / "one")
    words = ["--data_path", blobs, "--device", "cpu", "--batch_size", "8", "--epochs", "1", "--warmup_epochs", "0.5"]
    assert main(["finetune", *words, "--finetune", one, "--output_dir", f"{one}-tuned"]) == 0
    capsys.readouterr()
    assert main(["finetune", "--config", f"{one}-tuned/config.json", "--output_dir", f"{two}-tuned"]) == 0
    assert metrics(tmp_path / "two-tuned") == metrics(tmp_path / "one-tuned")
