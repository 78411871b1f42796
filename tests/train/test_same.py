"""A run is the same on every rank and after every stop, in data and settings; or one line says what differs."""

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import small_run
from ranks import command_of_each, start_ranks

from fastmae.checkpoint.manifest import manifest_text, peek
from fastmae.config import (
    FIXED_IN_A_FINETUNING,
    FIXED_IN_A_RUN,
    PER_RANK,
    FinetuneConfig,
    PretrainConfig,
    ResolvedConfig,
    ResolvedFinetuneConfig,
    resolve,
    resolve_finetune,
)
from fastmae.errors import UserError
from fastmae.facts import DataFacts
from fastmae.train.pretrain import pretrain
from fastmae.train.settings import as_json, disagreement, require_same_data, resolve_as_before, torch_builds

FACTS = DataFacts(kind="folder", channels=3, size=None, labelled=True, length=1000)
MEASURED = dict(mean=(0.5,) * 3, std=(0.2,) * 3, ranks=2, num_workers=3)


def resolved(flags: PretrainConfig | FinetuneConfig) -> ResolvedConfig | ResolvedFinetuneConfig:
    if isinstance(flags, PretrainConfig):
        return resolve(flags, FACTS, **MEASURED)
    return resolve_finetune(
        flags, FACTS, model="m", width=768, img_size=(224, 224), patch_size=(16, 16), nb_classes=5, **MEASURED
    )


def rank(config_class=PretrainConfig, **changes) -> dict:
    data = {"train": {"kind": "folder", "length": 2, "ranges": [["a", "1", "2"], ["b", "3", "4"]], "labels": "x"}}
    flags = config_class(data_path="photos")
    same = {"given": as_json(flags), "settings": as_json(resolved(flags)), "data": data, "start": "s"}
    return json.loads(json.dumps({**same, "versions": {"fastmae": "0.2", "torch": "2.13.0+cpu"}, **changes}))


@pytest.mark.parametrize("config_class", [PretrainConfig, FinetuneConfig])
def test_any_setting_that_differs_between_ranks_is_named_with_its_values(config_class):
    config = resolved(config_class(data_path="photos"))
    names = [field.name for field in dataclasses.fields(config)]
    fixed = FIXED_IN_A_RUN if config_class is PretrainConfig else FIXED_IN_A_FINETUNING
    assert set(fixed) < set(names)
    for name in names:
        first, second = rank(config_class), rank(config_class)
        second["settings"][name] = "another"
        error = disagreement([first, second, first])
        if name in PER_RANK:
            assert error is None, name
        else:
            line = error.as_on_the_command_line()
            assert line.startswith(f"--{name}: is "), line
            assert " on ranks 0 and 2 and another on rank 1; start every rank with the same settings" in line
    spelled_out = rank(config_class)
    spelled_out["given"]["epochs"] = config.epochs
    assert disagreement([rank(config_class), spelled_out]) is None
    derived, given = rank(config_class), rank(config_class)
    given["given"]["batch_size"] = given["settings"]["batch_size"] = 32
    given["settings"]["aaa"] = given["settings"]["crop_scale"] = 7
    assert disagreement([derived, given]).as_on_the_command_line().startswith("--batch_size: is 64 on rank 0 and 32 on")


def test_data_versions_and_first_weights_that_differ_are_named():
    def problem(**changes) -> str:
        return disagreement([rank(), rank(**changes)]).as_on_the_command_line()

    assert disagreement([rank(), rank()]) is None
    other = rank()["data"]
    other["train"]["ranges"][1] = ["b", "3", "5"]
    expected = (
        "rank 1 reads other train data than rank 0: it has other contents or sizes of b; give every rank the same"
    )
    assert expected in problem(data=other)
    assert problem(start="t").startswith("--model: holds other weights from rank to rank (s on rank 0 and t on rank")
    newer = dict(fastmae="0.2", torch="2.14.0+cpu")
    assert (
        problem(versions=newer)
        == "torch is 2.13.0 on rank 0 and 2.14.0 on rank 1; install the same version for every rank"
    )
    assert problem(versions=dict(newer, fastmae="0.3")).startswith("fastmae is 0.2 on rank 0 and 0.3 on rank 1")
    builds = [rank(), rank(versions=dict(fastmae="0.2", torch="2.13.0+cu130"))]
    assert disagreement(builds) is None
    assert (
        torch_builds(builds)
        == "torch is 2.13.0+cpu on rank 0 and 2.13.0+cu130 on rank 1: results may depend on the build"
    )
    assert torch_builds([rank(), rank()]) is None


def test_of_many_ranks_a_few_are_named():
    many = [rank() for _ in range(20)]
    many[3]["settings"]["lr"] = 7
    line = disagreement(many).as_on_the_command_line()
    assert "on ranks 0, 1, 2, 4 and 15 more and 7 on rank 3; start" in line


def folder_with(tmp_path: Path, **settings) -> str:
    """A run folder with the manifest of a checkpoint."""
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000007"
    checkpoint.mkdir(parents=True)
    saved = as_json(resolved(PretrainConfig(data_path="photos", epochs=20))) | settings
    text = manifest_text({"step": 7, "files": {}, "settings": saved, "epoch_sums": None})
    (checkpoint / "manifest.json").write_text(text)
    return str(tmp_path / "run")


def test_what_is_left_open_is_as_in_the_checkpoint(tmp_path):
    """As of version 0.1, whose warm-up of 20 epochs was 40."""
    run = folder_with(tmp_path, warmup_epochs=40.0, lr=1e-3, weight_decay=0.1)
    assert peek("auto", Path(run))["step"] == peek(run, tmp_path)["step"] == 7
    config, lines = resolve_as_before(PretrainConfig(data_path="photos", output_dir=run, resume="auto"), resolved)
    assert (config.epochs, config.lr, config.warmup_epochs, config.weight_decay) == (20, 1e-3, 40, 0.05)
    assert lines == [
        "as before       epochs 20, lr 0.001 (from the checkpoint, as no flag gives another)",
        "changed         weight_decay 0.05 instead of 0.1, from this step on",
        "note            the warm-up of 40 epochs leaves none of 20 at --lr; lower --warmup_epochs",
    ]
    given = PretrainConfig(data_path="photos", output_dir=run, resume="auto", blr=2e-3, epochs=30, warmup_epochs=3)
    config, lines = resolve_as_before(given, resolved)
    assert (config.epochs, config.blr, config.lr, config.warmup_epochs) == (30, 2e-3, 2e-3 * 128 / 256, 3)
    assert not any(line.startswith("as before") for line in lines)
    assert "warmup_epochs 3.0 instead of 40.0" in lines[0]


def test_a_fresh_run_says_when_its_warm_up_is_shortened(tmp_path):
    flags = PretrainConfig(data_path="photos", output_dir=str(tmp_path), epochs=20, resume="auto")
    expected = "warm-up         shortened to 2 of 20 epochs, as the official 40 are for longer runs (--warmup_epochs)"
    assert resolve_as_before(flags, resolved)[1] == [expected]
    assert resolve_as_before(dataclasses.replace(flags, epochs=41), resolved)[1] == []
    assert resolve_as_before(dataclasses.replace(flags, warmup_epochs=2), resolved)[1] == []
    tuned = FinetuneConfig(data_path="photos", output_dir=str(tmp_path), epochs=5)
    assert "shortened to 0.5 of 5 epochs, as the official 5" in resolve_as_before(tuned, resolved)[1][0]


def test_a_checkpoint_that_tells_no_data_is_resumed_with_a_line(capsys):
    require_same_data("run", {"step": 7}, rank(), "begin anew")
    assert (
        "run does not say which data it was made with (version 0.1), so they are not compared"
        in capsys.readouterr().err
    )
    require_same_data("run", {}, rank(), "begin anew")
    require_same_data("run", rank(), rank(), "begin anew")
    assert capsys.readouterr().err == ""
    require_same_data("run", rank(), rank(start="t"), "begin anew")
    assert "--model holds other weights than run began with; they are not used" in capsys.readouterr().err


def test_replaced_data_are_refused_on_resume_and_moved_data_are_not(blobs, tmp_path, capsys):
    arrays = dict(np.load(blobs))
    data, run = tmp_path / "here" / "blobs.npz", tmp_path / "run"
    data.parent.mkdir()
    np.savez(data, **arrays)
    short = dict(epochs=1, warmup_epochs=0.5, crop_scale=(0.9, 1.0), mean=(0.2,), std=(0.2,))
    assert pretrain(small_run(str(data), run, **short)) == 0
    moved = shutil.move(data, tmp_path / "elsewhere.npz")
    assert pretrain(small_run(str(moved), run, **short, resume="auto")) == 0
    capsys.readouterr()
    arrays["x_train"][9, 0, 0] ^= 1
    np.savez(moved, **arrays)
    line = rf"resume='{run}': was made with other train data: data_path now has other contents or sizes .* image 9.*;"
    with pytest.raises(
        UserError, match=line + r" give the same data, or begin a new run from its weights \(fastmae export"
    ):
        pretrain(small_run(str(moved), run, **short, resume="auto"))


WORDS = ["pretrain", "--epochs", "1", "--warmup_epochs", "0", "--batch_size", "8", "--device", "cpu", "--no_probe"]


def said(rows: list[tuple[list[str], list[str]]]) -> tuple[list[str], list[str], list[str]]:
    """Two ranks run each pair of commands. Returns both ranks' statuses, and the lines on stderr of each."""
    ranks = start_ranks(2, partial(command_of_each, *rows))
    ended = [one.finish() for one in ranks]
    assert [status for status, _ in ended] == [0, 0], ended
    statuses = [[line for line in one.said().splitlines() if line.isdigit()] for one in ranks]
    assert statuses[0] == statuses[1]
    return statuses[0], ended[0][1].splitlines(), ended[1][1].splitlines()


def test_two_ranks_of_another_run_end_together_with_one_line(blobs, tmp_path):
    """Another rate; other data of another length; no data on one rank alone, the first or the second."""
    arrays = dict(np.load(blobs))
    np.savez(tmp_path / "fewer.npz", x_train=arrays["x_train"][:64])
    words = [*WORDS, "--output_dir", str(tmp_path / "run"), "--data_path"]
    nothing = str(tmp_path / "nothing")
    statuses, first, second = said([
        ([*words, blobs, "--lr", "0.001"], [*words, blobs, "--lr", "0.002"]),
        ([*words, blobs], [*words, str(tmp_path / "fewer.npz")]),
        ([*words, blobs], [*words, nothing]),
        ([*words, nothing], [*words, blobs]),
    ])  # fmt: skip
    assert statuses == ["2"] * 4
    expected = [
        "--lr: is 0.001 on rank 0 and 0.002 on rank 1; start every rank with the same settings",
        "--data_path: rank 1 reads other train data than rank 0: it has 64 images instead of 72; give every rank",
        f"rank 1: --data_path {nothing}: no such file or folder",
        f"--data_path {nothing}: no such file or folder",
    ]
    assert len(first) == len(expected)
    assert all(line.startswith(f"fastmae: {text}") for line, text in zip(first, expected, strict=True)), first
    assert second == []
    assert not (tmp_path / "run").exists()


DIFFERENT = [
    "--model mae_vit_tiny_patch4 --input_size 32", "--mask_ratio 0.5", "--norm_pix_loss", "--seed 1", "--keep_last",
    "--mean 0.3", "--std 0.3", "--crop_scale 0.5 1", "--flip", "--batch_size 4", "--accum_iter 2", "--epochs 2",
    "--warmup_epochs 0.5", "--blr 1e-2", "--min_lr 1e-5", "--weight_decay 0.1", "--clip_grad 1", "--ema 0.9",
    "--masking block", "--repeated_masks 2", "--start_size 16 --input_size 32", "--decoder_depth 1",
    "--decoder_attention cross", "--in_chans 3", "--checkpoint_freq 3", "--save_freq 2", "--resume auto",
    "--parallel fsdp", "--reduce bf16", "--max_skipped 3", "--log_freq 3", "--attention sdpa", "--ops reference",
]  # fmt: skip


@pytest.mark.slow
def test_two_ranks_with_any_differing_setting_end_together(blobs, tmp_path):
    words = [*WORDS, "--output_dir", str(tmp_path / "run"), "--data_path", blobs]
    rows = [(words, [*words, *more.split()]) for more in DIFFERENT]
    statuses, first, second = said(rows)
    assert statuses == ["2"] * len(rows)
    assert second == []
    assert len(first) == len(rows)
    for line, more in zip(first, DIFFERENT, strict=True):
        assert " on rank 0 and " in line, line
        assert line.removeprefix("fastmae: --").partition(":")[0] in more or "--input_size 32" in more, (line, more)


@pytest.mark.slow
def test_two_ranks_that_may_differ_train(blobs, tmp_path):
    copied = shutil.copy(blobs, tmp_path / "copy.npz")
    words = [*WORDS, "--output_dir", str(tmp_path / "run"), "--num_workers"]
    statuses, _, _ = said([([*words, "1", "--data_path", blobs], [*words, "2", "--data_path", str(copied)])])
    assert statuses == ["0"]


@pytest.mark.slow
def test_a_rank_that_never_comes_is_one_line(tmp_path, monkeypatch, refusal):
    for name, value in dict(WORLD_SIZE="2", RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29731").items():
        monkeypatch.setenv(name, value)
    words = [*WORDS, "--output_dir", str(tmp_path), "--hang_timeout", "2"]
    assert "rank 0 waited 2 s (--hang_timeout) for all 2 ranks to meet at 127.0.0.1:29731" in refusal(words)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("MASTER_PORT", "29732")
    assert "rank 1 found no rank 0 at 127.0.0.1:29732 for 2 s" in refusal(words)
    assert not torch.distributed.is_initialized()
