"""The command line as a user meets it: flags, results, and one line for everything that is wrong."""

import dataclasses
import importlib.metadata
import json
import re
import shlex
import shutil
import socket
import sys

import numpy as np
import pytest
from helpers import run, small_run
from PIL import Image

from fastmae.cli import COMMANDS, main, parse
from fastmae.commands.help import EXAMPLES, _default
from fastmae.config import FinetuneConfig, PretrainConfig, ResolvedConfig
from fastmae.config.family import usual_ratio
from fastmae.config.groups import GROUPS, MAIN
from fastmae.config.masking import chosen_ratio
from fastmae.flags import field_texts, flags_of
from fastmae.train.pretrain import pretrain

# The official script's flags, with values, as recipes for it are written.
OFFICIAL_FLAGS = shlex.split("""
--batch_size 8 --epochs 2 --accum_iter 1 --model mae_vit_tiny_patch4 --input_size 16 --mask_ratio 0.75 --norm_pix_loss
--weight_decay 0.05 --lr None --blr 1e-3 --min_lr 0 --warmup_epochs 40 --device cpu --seed 0 --resume= --start_epoch 0
--num_workers 10 --pin_mem
""")


@pytest.fixture(scope="module")
def finished(blobs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "run"
    assert pretrain(small_run(blobs, folder, epochs=1)) == 0
    return folder


def test_official_flags_have_their_names_and_defaults():
    config = parse(["pretrain"])
    assert config == PretrainConfig()
    assert chosen_ratio(config, usual_ratio(config.model)) == 0.75
    defaults = dict(batch_size=64, accum_iter=1, mask_ratio=None, norm_pix_loss=False, weight_decay=0.05, lr=None)
    defaults |= dict(min_lr=0.0, output_dir="./output_dir", seed=0, resume="", start_epoch=0, pin_mem=True)
    assert {name: getattr(config, name) for name in defaults} == defaults


@pytest.mark.parametrize("change", [lambda word: word, lambda word: word.replace("_", "-")])
def test_flags_with_underscores_or_dashes(change):
    words = [change(word) if word.startswith("--") else word for word in OFFICIAL_FLAGS]
    config = parse(["pretrain", *words, change("--no_pin_mem")])
    assert (config.norm_pix_loss, config.pin_mem, config.input_size, config.lr) == (True, False, (16,), None)


def test_the_official_command_trains(image_folder, tmp_path):
    output = ["--output_dir", str(tmp_path / "run"), "--log_dir", str(tmp_path / "tb")]
    assert main(["pretrain", *OFFICIAL_FLAGS, "--data_path", str(image_folder), *output]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.txt").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1]
    assert (tmp_path / "run" / "checkpoint-1.pth").exists()
    assert (tmp_path / "run" / "reconstructions" / "epoch-0001.png").exists()
    assert list((tmp_path / "tb").glob("events.*"))
    results = json.loads((tmp_path / "run" / "probe.json").read_text())
    assert results.keys() == {"before", "after"}


def test_nothing_asks_the_network(blobs, tmp_path, monkeypatch):
    def no_network(*words, **options):
        raise AssertionError("somebody asked the network")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, no_network, raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    words = ["--device", "cpu", "--batch_size", "36", "--epochs", "1", "--output_dir", str(tmp_path / "run")]
    assert main(["pretrain", "--data_path", blobs, *words]) == 0
    assert main(["probe", str(tmp_path / "run"), "--data_path", blobs]) == 0
    assert main(["verify", "--data_path", blobs]) == 0
    assert main(["info"]) == 0


def test_python_dash_m_works(tmp_path):
    done = run([sys.executable, "-m", "fastmae", "info", "--json"])
    assert done.returncode == 0, done.stderr
    info = json.loads(done.stdout)
    assert info.keys() == {"versions", "hardware", "backends", "choices"}
    assert "C++" in info["backends"]["ops"]
    assert "off" in info["backends"]["compile"]


def test_probe_prints_json(finished, blobs, capsys):
    assert main(["probe", str(finished), "--data_path", blobs, "--json", "--pool", "cls", "--k", "5"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results.keys() == {"knn", "linear", "pool", "k", "train", "test"}
    assert (results["pool"], results["k"], results["train"], results["test"]) == ("cls", 5, 72, 24)
    assert main(["probe", str(finished / "checkpoint-0.pth"), "--data_path", blobs, blobs]) == 0
    out = capsys.readouterr().out
    assert "k-NN" in out
    assert "144 train, 48 test" in " ".join(out.split())


def test_reconstruct_takes_data_or_pictures(finished, blobs, tmp_path):
    assert main(["reconstruct", str(finished), "--images", blobs, "--output", str(tmp_path / "a.png")]) == 0
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(tmp_path / "one.jpg")
    one = ["--images", str(tmp_path / "one.jpg"), "--output", str(tmp_path / "b.png")]
    assert main(["reconstruct", str(finished / "checkpoint-0.pth"), *one]) == 0
    assert Image.open(tmp_path / "a.png").width > Image.open(tmp_path / "b.png").width
    two = ["--images", *[str(tmp_path / "one.jpg")] * 8, "--output", str(tmp_path / "c.png")]
    assert main(["reconstruct", str(finished), *two]) == 0
    assert Image.open(tmp_path / "c.png").size == Image.open(tmp_path / "a.png").size


def test_a_corrupt_image_is_skipped_counted_and_listed(image_folder, tmp_path, capsys):
    bad = image_folder / "train" / "n01" / "3.JPEG"
    bad.write_bytes(bad.read_bytes()[:300])
    output = ["--output_dir", str(tmp_path / "run"), "--data_path", str(image_folder)]
    assert main(["pretrain", *OFFICIAL_FLAGS, *output, "--probe", "False"]) == 0
    assert "1 unusable images" in capsys.readouterr().out
    (line,) = (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["name"] == str(bad)


WRONG = {
    "unknown flag": (["pretrain", "--learning_rate", "1"], "--learning_rate"),
    "unknown command": (["train"], "train: no such command; did you mean pretrain?"),
    "unknown benchmark": (["bench", "steps"], "steps: no such benchmark; did you mean step?"),
    "a benchmark of earlier versions": (["bench", "scaling"], "use `fastmae estimate` instead"),
    "help for it": (["bench", "scaling", "--help"], "use `fastmae estimate` instead"),
    "flag before a benchmark": (["bench", "--rounds", "1"], "--rounds: a benchmark comes before flags"),
    "flag before a command": (["--lr", "1"], "--lr: a command comes before flags"),
    "no benchmark": (["bench"], "bench: must be followed by one of all, attention, checkpoint"),
    "help for what is not": (["help", "prob"], "did you mean probe?"),
    "help for a benchmark that is not": (["help", "bench", "steps"], "steps: no such benchmark; did you mean step?"),
    "a flag nearly": (["pretrain", "--batchsize", "1"], "--batchsize: no such flag; did you mean --batch_size?"),
    "a flag by another name": (["pretrain", "--learning_rate", "1"], "did you mean --lr?"),
    "a flag of one dash": (["pretrain", "-lr", "1"], "-lr: no such flag"),
    "a flag turned off that cannot be": (["pretrain", "--no_lr"], "--no_lr: no such flag"),
    "a choice nearly": (["pretrain", "--precision", "bf61"], "must be auto, fp32, tf32 or bf16; did you mean bf16?"),
    "a word too many": (["pretrain", "digits"], "digits: one argument too many"),
    "two values for one": (["pretrain", "--lr", "1", "2"], "--lr 1 2: must have one value"),
    "no value": (["pretrain", "--lr", "--epochs", "3"], "--lr: must have one value"),
    "one value for two": (["pretrain", "--crop_scale", "0.2"], "--crop_scale 0.2: must have 2 values"),
    "no value of several": (["pretrain", "--data_path"], "--data_path: must have at least one value"),
    "two values for a boolean": (["pretrain", "--pin_mem", "True", "x"], "must have at most one value"),
    "no boolean": (["pretrain", "--pin_mem", "maybe"], "--pin_mem maybe: must be True or False"),
    "a boolean twice": (["pretrain", "--no_pin_mem", "True"], "write --pin_mem True"),
    "not a whole number": (["pretrain", "--keep", "1.5"], "--keep 1.5: must be a whole number"),
    "a file that is not": (["pretrain", "--config", "{tmp}/nowhere.yaml"], "nowhere.yaml"),
    "a file of text": (["pretrain", "--config", "{tmp}/notes.pth"], "notes.pth"),
    "no file": (["pretrain", "--config"], "--config: must be given once, with one file"),
    "two files": (["pretrain", "--config", "a", "--config", "b"], "--config: must be given once"),
    "a file for a command without": (["probe", "{run}", "--config", "a.yaml"], "--config: no such flag"),
    "a negative number": (["pretrain", "--lr", "-1"], "--lr -1.0: must be a positive number"),
    "missing flag": (["export", "{run}"], "--to: must be given"),
    "a value like a flag": (["pretrain", "--device", "-x"], "--device -x"),
    "not a number": (["pretrain", "--lr", "fast"], "--lr"),
    "missing positional": (["probe"], "CHECKPOINT"),
    "missing path": (["pretrain", "--data_path", "{tmp}/nowhere"], "no such file or folder"),
    "empty folder": (["pretrain", "--data_path", "{tmp}/empty"], "holds no images"),
    "mask ratio 0": (["pretrain", "--mask_ratio", "0"], "--mask_ratio 0.0"),
    "mask ratio 1": (["pretrain", "--mask_ratio", "1"], "--mask_ratio 1.0"),
    "mask ratio that leaves nothing": (["pretrain", "--mask_ratio", "0.99"], "--mask_ratio 0.99"),
    "size of no multiple": (["pretrain", "--input_size", "30"], "not a multiple of a patch"),
    "size of no whole cells": (
        ["pretrain", "--model", "mae_convnextv2_atto", "--input_size", "50"],
        "a patch of 32×32; choose another --input_size or --model",
    ),
    "three sizes": (["pretrain", "--input_size", "8", "8", "8"], "--input_size 8 8 8"),
    "batch over the data": (["pretrain", "--batch_size", "5000"], "more than the 1438 images"),
    "accumulation over the data": (["pretrain", "--accum_iter", "5000"], "more than the 1438 images"),
    "batch of nothing": (["pretrain", "--batch_size", "0"], "--batch_size 0"),
    "model that is not": (["pretrain", "--model", "vit"], "--model vit: unknown"),
    "model nearly": (["pretrain", "--model", "vit_base_patch16"], "unknown; did you mean mae_vit_base_patch16?"),
    "mean of another length": (["pretrain", "--mean", "0.5", "0.5"], "mean needs 1"),
    "GPU that is not": (["pretrain", "--device", "cuda:63"], "--device cuda:63"),
    "device that is not": (["pretrain", "--device", "abacus"], "--device abacus"),
    "resume from nothing": (["pretrain", "--resume", "{tmp}/nowhere"], "no such checkpoint"),
    "resume from an empty folder": (["pretrain", "--resume", "{tmp}/empty"], "no intact checkpoint"),
    "resume from text": (["pretrain", "--resume", "{tmp}/notes.pth"], "not a readable checkpoint"),
    "checkpoint that is not": (["probe", "{tmp}/nowhere"], "no such checkpoint"),
    "checkpoint of text": (["probe", "{tmp}/notes.pth"], "not a readable checkpoint"),
    "folder without a run": (["reconstruct", "{tmp}/empty"], "no intact checkpoint"),
    "output under a file": (["pretrain", "--output_dir", "{tmp}/notes.pth/run"], "cannot be written"),
    "unlabelled probe": (["probe", "{run}", "--data_path", "{tmp}/plain.npy"], "no labels"),
    "epochs before the start": (["pretrain", "--start_epoch", "9", "--epochs", "3"], "--start_epoch 9"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line_and_status_2(case, finished, tmp_path, refusal):
    words, expected = WRONG[case]
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.pth").write_text("hello")
    np.save(tmp_path / "plain.npy", np.zeros((30, 16, 16), np.uint8))
    words = [word.format(tmp=tmp_path, run=finished) for word in words]
    if words[:1] == ["pretrain"] and "--output_dir" not in words:
        words += ["--output_dir", str(tmp_path / "out")]
    line = refusal(words)
    assert expected in line
    assert not re.search(r"[╭│]", line)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("*.pth"))


def test_a_large_model_on_a_cpu_gets_a_note(blobs, tmp_path, capsys, monkeypatch):
    words = ["pretrain", "--data_path", blobs, "--device", "cpu", "--batch_size", "36", "--epochs", "1", "--no_probe"]
    assert main([*words, "--output_dir", str(tmp_path / "small")]) == 0
    assert "note  " not in capsys.readouterr().out
    monkeypatch.setattr("fastmae.train.pretrain.LARGE_MODEL", 1)
    monkeypatch.setattr("fastmae.train.pretrain.CORE_FLOPS", 1e4)
    assert main([*words, "--output_dir", str(tmp_path / "large")]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("note  "))
    assert re.search(
        r"a step of mae_vit_tiny_patch4 takes about \d+ minutes on \d+ cores of a CPU; train on a GPU", line
    )
    assert "--model mae_vit_tiny_patch16 for small data" in line


def test_a_file_that_cannot_be_written_anywhere_in_a_run_is_one_line(finished, blobs, tmp_path, refusal):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "probe.json").mkdir()
    words = ["--output_dir", str(tmp_path / "run"), "--data_path", blobs, "--resume", "auto", "--epochs", "1"]
    line = refusal(["pretrain", *words, "--batch_size", "8", "--probe", "True"])
    assert "probe.json" in line


# --- spellings --------------------------------------------------------------------------------------------------------

SWITCHES = [
    (command, flag)
    for command, config in COMMANDS.items()
    for flag in flags_of(config)
    if flag.kind is bool and flag.metavar is None
]
NEEDED = {
    "probe": ["RUN"], "reconstruct": ["RUN"], "features": ["RUN", "DATA", "--output", "x.npz"],
    "search": ["RUN", "one.jpg"], "anomaly": ["RUN"], "impute": ["RUN", "x.csv", "--output", "y.csv"],
    "inpaint": ["RUN", "x.png", "--mask", "m.png", "--output", "y.png"],
    "runs": ["RUN"], "push": ["RUN", "DEST"], "serve": ["RUN"],
    "push private": ["--repo", "a/b"],
    "export": ["RUN", "--to", "vitdet", "--output", "x"], "verify": ["--data_path", "x"],
    "bench all": ["--output", "x"], "pretrain float8": ["--precision", "bf16", "--compile", "block"],
}  # fmt: skip


def test_there_are_switches_of_both_kinds():
    assert {flag.takes_none for _, flag in SWITCHES} == {True, False}
    assert len(SWITCHES) > 15


@pytest.mark.parametrize(("command", "flag"), SWITCHES, ids=lambda one: getattr(one, "name", one))
def test_every_switch_takes_every_spelling(command, flag):
    name = flag.name
    spellings = {
        f"--{name}": True, f"--{name.replace('_', '-')}": True, f"--no_{name}": False, f"--no-{name}": False,
        f"--{name} True": True, f"--{name} False": False, f"--{name}=False": False, f"--{name} true": True,
    }  # fmt: skip
    if flag.takes_none:
        spellings[f"--{name} None"] = None
    for words, expected in spellings.items():
        config = parse(
            [*command.split(), *words.split(), *NEEDED.get(command, []), *NEEDED.get(f"{command} {name}", [])]
        )
        assert getattr(config, name) is expected, words


def test_a_switch_before_an_argument_takes_no_value():
    config = parse(["probe", "--json", "RUN"])
    assert (config.json, config.checkpoint) == (True, "RUN")
    config = parse(["reconstruct", "--paste_visible", "False", "RUN"])
    assert (config.paste_visible, config.checkpoint) == (False, "RUN")


def test_the_last_of_several_spellings_counts():
    assert parse(["pretrain", "--pin_mem", "--no_pin_mem"]).pin_mem is False
    assert parse(["pretrain", "--flip", "False", "--flip"]).flip is True
    assert parse(["pretrain", "--lr", "1", "--lr", "2"]).lr == 2


def test_values_of_every_kind():
    config = parse(["pretrain", "--lr=1e-3", "--input-size", "32", "48", "--model", "None", "--resume", ""])
    assert (config.lr, config.input_size, config.model, config.resume) == (1e-3, (32, 48), None, "")
    config = parse(["probe", "RUN", "--k", "5", "20", "--output", "-"])
    assert (config.checkpoint, config.k, config.output) == ("RUN", (5, 20), "-")
    config = parse(["features", "RUN", "--output", "x.npz", "--split", "val", "a", "b"])
    assert config.data_path == ("a", "b")


def test_other_spellings_of_a_flag():
    for old, new in OLD.items():
        assert parse(old.split()) == parse(new.split()), old


OLD = {
    "pretrain --ops native --attention native": "pretrain --ops cpu --attention cpu",
    "pretrain --autotune off": "pretrain --tune off",
    "bench step --autotune off": "bench step --tune off",
    "finetune --tune auto": "finetune --autotune auto",
    "finetune --tune=off --tune lora": "finetune --tune lora --autotune off",
    "pretrain --decoder pool": "pretrain --image_decoder threads",
    "pretrain --decoder=pool": "pretrain --image-decoder threads",
    "bench step --peers published timm": "bench step --baselines official timm",
    "bench all --output x --peers": "bench all --output x --baselines",
    "search RUN one.jpg two.jpg --data_path photos": "search RUN photos --queries one.jpg two.jpg",
    "probe RUN --data_path photos more": "probe RUN photos more",
    "reconstruct RUN --images one.jpg": "reconstruct RUN one.jpg",
    "anomaly --k 2 RUN --data_path photos": "anomaly RUN photos --k 2",
    "bench loader --decoders pool": "bench loader --image_decoders threads",
    "bench end-to-end --decoder pool": "bench end-to-end --image_decoder threads",
}


def test_flags_override_the_settings_of_a_file(tmp_path):
    (tmp_path / "small.yaml").write_text("epochs: 3\nlr: 1e-3\ninput_size: [32, 48]\nflip: true\npin_mem: false\n")
    config = parse(["pretrain", "--epochs", "5", "--config", str(tmp_path / "small.yaml"), "--no_flip", "--seed=1"])
    expected = PretrainConfig(epochs=5, lr=1e-3, input_size=(32, 48), flip=False, pin_mem=False, seed=1)
    assert config == expected
    (tmp_path / "b.toml").write_text('tune = "last-2"\ndata_path = ["a", "b"]\nresume = ""\n')
    config = parse(["finetune", f"--config={tmp_path / 'b.toml'}", "--data_path", "c"])
    assert config == FinetuneConfig(tune="last-2", data_path="c")
    config = parse(["finetune", f"--config={tmp_path / 'b.toml'}", "--tune", "full"])
    assert config == FinetuneConfig(data_path=("a", "b"))


def test_a_run_goes_on_in_another_folder_with_its_own_settings(finished):
    config = parse(["pretrain", "--config", str(finished), "--output_dir", "other"])
    settings = json.loads((finished / "config.json").read_text())
    for name in ("data_path", "model", "batch_size", "epochs", "seed", "mask_ratio"):
        value = getattr(config, name)
        assert settings[name] in (value, list(value) if isinstance(value, tuple) else value), name
    assert config.output_dir == "other"


# The command lines of the official documentation for pretraining and fine-tuning, and every flag of the two scripts.
OFFICIAL = {
    "pretrain": """pretrain --batch_size 64 --model mae_vit_large_patch16 --norm_pix_loss --mask_ratio 0.75 --epochs 800
        --warmup_epochs 40 --blr 1.5e-4 --weight_decay 0.05 --data_path imagenet""",
    "every flag of pretrain": """pretrain --batch_size 64 --epochs 400 --accum_iter 1 --model mae_vit_large_patch16
        --input_size 224 --mask_ratio 0.75 --norm_pix_loss --weight_decay 0.05 --lr None --blr 1e-3 --min_lr 0.0
        --warmup_epochs 40 --data_path imagenet --output_dir ./output_dir --log_dir ./output_dir --device cuda --seed 0
        --resume '' --start_epoch 0 --num_workers 10 --pin_mem --no_pin_mem --world_size 1 --local_rank -1 --dist_on_itp
        --dist_url env://""",
    "finetune": """finetune --accum_iter 4 --batch_size 32 --model vit_base_patch16 --finetune mae_pretrain_vit_base.pth
        --epochs 100 --blr 5e-4 --layer_decay 0.65 --weight_decay 0.05 --drop_path 0.1 --mixup 0.8 --cutmix 1.0
        --reprob 0.25 --dist_eval --data_path imagenet""",
    "every flag of finetune": """finetune --batch_size 64 --epochs 50 --accum_iter 1 --model vit_large_patch16
        --input_size 224 --drop_path 0.1 --clip_grad None --weight_decay 0.05 --lr None --blr 1e-3 --layer_decay 0.75
        --min_lr 1e-6 --warmup_epochs 5 --color_jitter None --aa rand-m9-mstd0.5-inc1 --smoothing 0.1 --reprob 0.25
        --remode pixel --recount 1 --mixup 0 --cutmix 0 --cutmix_minmax None --mixup_prob 1.0 --mixup_switch_prob 0.5
        --mixup_mode batch --finetune '' --global_pool --data_path imagenet --nb_classes 1000 --output_dir ./output_dir
        --log_dir ./output_dir --device cuda --seed 0 --resume '' --start_epoch 0 --dist_eval --num_workers 10 --pin_mem
        --world_size 1 --local_rank -1 --dist_on_itp --dist_url env://""",
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_command_lines_of_the_official_scripts_parse(name, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    config = parse(shlex.split(OFFICIAL[name]))
    assert config.data_path == "imagenet" or config.data_path == ("imagenet",)
    lines = capsys.readouterr().err.splitlines()
    flags = "--world_size and --local_rank and --dist_on_itp and --dist_url"
    command = name.split()[-1]
    expected = f"fastmae: {flags}: not used; torchrun sets this, as in `torchrun -m fastmae {command} …`"
    assert lines == [expected] * ("every" in name)


def test_only_the_first_rank_mentions_flags_of_launchers(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert parse(["pretrain", "--local-rank=1"]) == PretrainConfig()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        ("--eval", "fine-tuning tests every --test_freq epochs"),
        ("--remode const", "an erased rectangle is filled with noise"),
        ("--color_jitter 0.4", "--aa rand-m9-mstd0.5-inc1 changes colours"),
        ("--mixup_mode elem", "leave it out"), ("--mixup_prob 0.5", "leave it out"), ("--resplit", "leave it out"),
        ("--recount 3", "leave it out"), ("--cutmix_minmax 0.2 0.8", "leave it out"),
        ("--start_epoch 5", "--resume continues"),
    ],
)  # fmt: skip
def test_official_flags_without_a_counterpart_get_advice(words, advice, refusal):
    line = refusal(["finetune", *words.split()])
    assert line.startswith(f"fastmae: {words.split()[0]}")
    assert advice in line


# --- help -------------------------------------------------------------------------------------------------------------

PAGES = [
    [], ["help"], ["--help"], ["bench", "--help"], ["help", "bench"],
    *[[*command.split(), "--help"] for command in COMMANDS], ["pretrain", "--help-all"], ["finetune", "--help-all"],
]  # fmt: skip


def page(words, capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    assert main(words) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("words", PAGES, ids=" ".join)
def test_help_fits_and_is_plain(words, width, capsys, monkeypatch):
    text = page(words, capsys, monkeypatch, width)
    widest = max(len(line) for line in text.splitlines())
    assert widest <= min(width, 100)
    assert "None)" not in text
    assert "(default" not in text
    assert "\x1b" not in text  # no colours where there is no terminal
    flags = re.findall(r"(?<![\w`-])--[a-z][\w-]*", text)
    assert {flag for flag in flags if "-" in flag[2:]} <= {"--help-all"}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_flag(command, capsys, monkeypatch):
    text = page([*command.split(), "--help"], capsys, monkeypatch, 100)
    for flag in flags_of(COMMANDS[command]):
        pattern = rf"--{flag.name}\b" if flag.metavar is None else rf"^  {flag.metavar}"
        assert re.search(pattern, text, re.MULTILINE), flag
    for field in dataclasses.fields(COMMANDS[command]):
        assert field.name in {flag.name for flag in flags_of(COMMANDS[command])} | {"machine"}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_every_flag_is(command):
    for flag in flags_of(COMMANDS[command]):
        assert flag.text, flag.name
        assert "\n" not in flag.text


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_help_of_training_shows_ten_flags_and_the_groups_of_all_others(command, capsys, monkeypatch):
    text = page([command, "--help"], capsys, monkeypatch, 80)
    titles = [title.capitalize() for title in GROUPS]
    for title in titles:
        assert re.search(rf"^  {title} ", text, re.MULTILINE), title
    described = re.findall(r"^  --(\w+)", text.split("All other flags")[0], re.MULTILINE)
    assert described == [*(name for name in MAIN if name in COMMANDS[command].__dataclass_fields__), "config"]
    assert "--help-all" in text
    in_full = page([command, "--help-all"], capsys, monkeypatch, 80)
    assert [line for line in in_full.splitlines() if line in titles] == titles
    names = {"config", *(flag.name for flag in flags_of(COMMANDS[command]))}
    assert set(re.findall(r"^  --(\w+)", in_full, re.MULTILINE)) == names


def test_help_says_a_default_once(capsys, monkeypatch):
    text = " ".join(page(["pretrain", "--help-all"], capsys, monkeypatch, 100).split())
    assert re.search(r"--batch_size INT .*? Default: 64\. --", text)
    assert re.search(r"--min_lr FLOAT [\w ]*\. Default: 0\. --", text)
    assert re.search(r"--pin_mem, --no_pin_mem Copy [\w -]*\. Default: on\.", text)
    for flag in flags_of(PretrainConfig):
        assert (flag.text + _default(flag)).count("Default:") <= 1, flag.name


def test_help_goes_to_a_pipe_that_closes_and_to_a_terminal_of_ascii():
    main = f"{sys.executable} -m fastmae pretrain --help-all"
    done = run(["bash", "-c", f"{main} | head -1; echo ${{PIPESTATUS[0]}}"])
    assert done.stdout.splitlines()[-1] == "0", done.stderr
    assert "Error" not in done.stderr
    done = run(["env", "PYTHONIOENCODING=ascii", sys.executable, "-m", "fastmae", "pretrain", "--help"])
    assert done.returncode == 0, done.stderr
    assert "batch_size x accum_iter" in " ".join(done.stdout.split())


def test_the_first_help_has_every_command(capsys, monkeypatch):
    pages = {" ".join(words): page(words, capsys, monkeypatch, 80) for words in ([], ["help"], ["--help"], ["-h"])}
    assert len(set(pages.values())) == 1
    for command in COMMANDS:
        assert re.search(rf"^  {command.split()[0]} ", pages[""], re.MULTILINE), command
    assert page(["help", "probe"], capsys, monkeypatch, 80) == page(["probe", "--help"], capsys, monkeypatch, 80)
    step = page(["help", "bench", "step"], capsys, monkeypatch, 80)
    assert step == page(["bench", "step", "-h"], capsys, monkeypatch, 80)


def test_examples_in_the_help_parse():
    for command, examples in EXAMPLES.items():
        assert command in COMMANDS
        for example in examples:
            words = shlex.split(example)
            assert isinstance(parse(words[words.index("fastmae") + 1 :]), COMMANDS[command])


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastmae {importlib.metadata.version('fastmae')}\n"


@pytest.mark.parametrize(
    "words",
    [
        [], ["--help"], ["--version"], ["help", "pretrain"], ["pretrain", "--help"], ["bench", "--help"],
        ["pretrain", "--batchsize", "1"], ["pretrain", "--lr", "fast"], ["pretrain", "--mask_ratio", "2"], ["trian"],
        ["pretrain", "--config", "nowhere.yaml"], ["finetune", "--eval"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_help_and_wrong_flags_load_no_torch(words):
    code = "import sys; from fastmae.cli import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    done = run([sys.executable, "-c", code, *words])
    assert done.returncode == 0, done.stderr


def test_texts_of_fields_are_read_from_their_source():
    texts = field_texts(ResolvedConfig)
    assert texts["norm_pix_loss"] == field_texts(PretrainConfig)["norm_pix_loss"]
    assert texts["global_batch"] != ""
    assert field_texts(int) == {}


@pytest.mark.parametrize(
    "words", [["runs", "."], ["report", "run", "--output", "page.html"], ["push", "run", "folder"]]
)
def test_what_ranks_cannot_share_is_left_to_the_first(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, value in dict(RANK="1", LOCAL_RANK="1", WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="1").items():
        monkeypatch.setenv(name, value)
    assert main(words) == 0
    assert capsys.readouterr() == ("", "")
    assert not [*tmp_path.iterdir()]
