"""The command line as a user meets it: flags, results, and one line for everything that is wrong."""

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

from fastmae.cli import _first_section, main
from fastmae.config import PretrainConfig
from fastmae.train.pretrain import pretrain

# The published script's flags, with values, as recipes for it are written.
PUBLISHED = shlex.split("""
--batch_size 8 --epochs 2 --accum_iter 1 --model mae_vit_tiny_patch4 --input_size 16 --mask_ratio 0.75 --norm_pix_loss
--weight_decay 0.05 --lr None --blr 1e-3 --min_lr 0 --warmup_epochs 40 --device cpu --seed 0 --resume= --start_epoch 0
--num_workers 10 --pin_mem
""")


@pytest.fixture(scope="module")
def finished(blobs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "run"
    assert pretrain(small_run(blobs, folder, epochs=1)) == 0
    return folder


def parse(words):
    from fastmae.cli import _parse

    return _parse(words)


def test_published_flags_have_their_names_and_defaults():
    config = parse(["pretrain"])
    assert config == PretrainConfig()
    defaults = dict(batch_size=64, accum_iter=1, mask_ratio=0.75, norm_pix_loss=False, weight_decay=0.05, lr=None)
    defaults |= dict(min_lr=0.0, output_dir="./output_dir", seed=0, resume="", start_epoch=0, pin_mem=True)
    assert {name: getattr(config, name) for name in defaults} == defaults


@pytest.mark.parametrize("change", [lambda word: word, lambda word: word.replace("_", "-")])
def test_flags_with_underscores_or_dashes(change):
    words = [change(word) if word.startswith("--") else word for word in PUBLISHED]
    config = parse(["pretrain", *words, change("--no_pin_mem")])
    assert (config.norm_pix_loss, config.pin_mem, config.input_size, config.lr) == (True, False, (16,), None)


def test_the_published_command_trains(image_folder, tmp_path):
    output = ["--output_dir", str(tmp_path / "run"), "--log_dir", str(tmp_path / "tb")]
    assert main(["pretrain", *PUBLISHED, "--data_path", str(image_folder), *output]) == 0
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
    assert info.keys() == {"versions", "hardware", "backends"}
    assert "C++" in info["backends"]["ops"]


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
    assert main(["pretrain", *PUBLISHED, *output, "--probe", "False"]) == 0
    assert "1 unusable images" in capsys.readouterr().out
    (line,) = (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["name"] == str(bad)


WRONG = {
    "unknown flag": (["pretrain", "--learning_rate", "1"], "--learning_rate"),
    "unknown command": (["train"], "train"),
    "no command": ([], "pretrain, finetune, probe, reconstruct"),
    "not a number": (["pretrain", "--lr", "fast"], "--lr"),
    "missing positional": (["probe"], "CHECKPOINT"),
    "missing path": (["pretrain", "--data_path", "{tmp}/nowhere"], "no such file or folder"),
    "empty folder": (["pretrain", "--data_path", "{tmp}/empty"], "holds no images"),
    "mask ratio 0": (["pretrain", "--mask_ratio", "0"], "--mask_ratio 0.0"),
    "mask ratio 1": (["pretrain", "--mask_ratio", "1"], "--mask_ratio 1.0"),
    "mask ratio that leaves nothing": (["pretrain", "--mask_ratio", "0.99"], "--mask_ratio 0.99"),
    "size of no multiple": (["pretrain", "--input_size", "30"], "not a multiple of a patch"),
    "three sizes": (["pretrain", "--input_size", "8", "8", "8"], "--input_size 8 8 8"),
    "batch over the data": (["pretrain", "--batch_size", "5000"], "more than the 1438 images"),
    "accumulation over the data": (["pretrain", "--accum_iter", "5000"], "more than the 1438 images"),
    "batch of nothing": (["pretrain", "--batch_size", "0"], "--batch_size 0"),
    "model that is not": (["pretrain", "--model", "vit"], "--model vit: unknown"),
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
def test_wrong_input_is_one_line_and_status_2(case, finished, tmp_path, capsys):
    words, expected = WRONG[case]
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.pth").write_text("hello")
    np.save(tmp_path / "plain.npy", np.zeros((30, 16, 16), np.uint8))
    words = [word.format(tmp=tmp_path, run=finished) for word in words]
    if words[:1] == ["pretrain"] and "--output_dir" not in words:
        words += ["--output_dir", str(tmp_path / "out")]
    assert main(words) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("fastmae: ")
    assert expected in lines[0]
    assert not re.search(r"[╭│]", lines[0])
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("*.pth"))


def test_a_file_that_cannot_be_written_anywhere_in_a_run_is_one_line(finished, blobs, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "probe.json").mkdir()
    words = ["--output_dir", str(tmp_path / "run"), "--data_path", blobs, "--resume", "auto", "--epochs", "1"]
    assert main(["pretrain", *words, "--batch_size", "8", "--probe", "True"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert "probe.json" in lines[0]


def test_what_a_box_complains_of_is_found_whatever_it_is_drawn_with():
    unicode = "╭─ Parsing error ─╮\n│ No such │\n│ flag. │\n│ ───── │\n│ Perhaps: --epochs │\n╰───╯\n"
    ascii_alone = " Parsing error   \n ------------ \n  No such \n  flag.  \n ------------ \n  Perhaps: --epochs \n"
    assert _first_section(unicode) == _first_section(ascii_alone) == "No such flag"
    assert _first_section("") == ""


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as left:
        main(["pretrain", "--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    for name in PretrainConfig.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in text or f"--{name}" in text
