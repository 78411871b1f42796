"""Fine-tuning with few labels: one run for each number of labels and each seed, a folder each."""

import json

import numpy as np
import pytest

from fastmae.cli import main
from fastmae.data.few import few_labelled
from fastmae.data.sources import train_and_val

FLAGS = ["--model", "mae_vit_tiny_patch4", "--epochs", "1", "--autotune", "off", "--tune", "linear", "--log_freq", "99"]


def test_several_runs_end_in_a_table_and_go_on_where_they_were_stopped(blobs, tmp_path, capsys):
    words = ["finetune", "--data_path", str(blobs), "--output_dir", str(tmp_path / "out"), *FLAGS, "--resume", "auto"]
    assert main([*words, "--shots", "2", "--seeds", "2"]) == 0
    found = json.loads((tmp_path / "out" / "few.json").read_text())
    assert [*found["runs"]] == ["shots-2-seed-0", "shots-2-seed-1"]
    assert found["few"][0]["test_acc1"]["of"] == [*found["runs"].values()]
    train, _ = train_and_val(str(blobs))
    its = json.loads((tmp_path / "out" / "shots-2-seed-1" / "log.txt").read_text().splitlines()[-1])
    assert its["test_acc1"] == found["runs"]["shots-2-seed-1"]
    capsys.readouterr()
    assert main([*words, "--shots", "2", "3", "--seeds", "2"]) == 0
    shown = capsys.readouterr().out
    assert "shots-2-seed-0: done before" in shown
    assert f"data            {blobs}: {len(few_labelled(train.labels, 3, 0))} to learn" in shown
    assert "3 per class" in shown
    assert len(json.loads((tmp_path / "out" / "few.json").read_text())["runs"]) == 4
    # A single number is one run, in the folder itself.
    alone = [*words[:3], "--output_dir", str(tmp_path / "one"), *FLAGS, "--label_share", "0.5"]
    assert main(alone) == 0
    assert not (tmp_path / "one" / "few.json").exists()
    assert np.isfinite(json.loads((tmp_path / "one" / "log.txt").read_text().splitlines()[-1])["test_loss"])


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--shots", "0"], "--shots 0: must be at least 1"),
        (["--label_share", "2"], "--label_share 2.0: must be above 0 and at most 1"),
        (["--seeds", "0"], "--seeds 0: must be at least 1"),
        (["--seeds", "2", "--resume", "elsewhere"], "--resume elsewhere: must be auto or anew"),
        (["--shots", "1", "--data_path", "{tmp}/plain.npy"], "no labels"),
        (["--shots", "1", "--model", "mae_mlp"], "--model mae_mlp"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(flags, expected, blobs, tmp_path, refusal):
    np.save(tmp_path / "plain.npy", np.zeros((30, 16, 16), np.uint8))
    words = ["finetune", "--data_path", str(blobs), "--output_dir", str(tmp_path / "out"), *FLAGS]
    assert expected in refusal([*words, *(flag.format(tmp=tmp_path) for flag in flags)])
