"""Without data the readers of a run take the run's own, in one order of arguments: CHECKPOINT DATA."""

import json
import shutil

import pytest
import torch
from helpers import small_run

from fastmae.cli import main
from fastmae.train.pretrain import pretrain


@pytest.fixture(scope="module")
def finished(blobs, tmp_path_factory):
    """A run, and a copy of the data that it was trained on."""
    folder = tmp_path_factory.mktemp("own")
    data = shutil.copy(blobs, folder / "data.npz")
    assert pretrain(small_run(str(data), folder / "run", epochs=1)) == 0
    return folder / "run", data


def test_probe_measures_the_data_of_the_run(finished, capsys):
    run, data = finished
    for words in ([str(run)], [str(run), str(data)], [str(run), "--data_path", str(data)]):
        assert main(["probe", *words, "--json"]) == 0
        captured = capsys.readouterr()
        assert (f"no data were given; those of its run are taken: {data}" in captured.err) == (len(words) == 1)
        found = json.loads(captured.out)
        assert (found["train"], found["test"]) == (72, 24)


def test_every_reader_takes_the_data_of_the_run(finished, tmp_path, capsys):
    run, data = finished
    for command, name, more in (
        ("reconstruct", "a.png", ["--count", "2"]),
        ("features", "a.npz", []),
        ("search", "b.png", ["--count", "2", "--k", "2"]),
        ("anomaly", "folder", ["--rounds", "1", "--count", "1"]),
    ):
        assert main([command, str(run), "--output", str(tmp_path / name), *more]) == 0, command
        captured = capsys.readouterr()
        assert f"those of its run are taken: {data}" in captured.err, command
        assert "digits" not in captured.out, command
        assert (tmp_path / name).exists()


def test_search_takes_data_where_features_does_and_the_old_order_still_means_the_same(finished, tmp_path, capsys):
    run, data = finished
    found = []
    for words in ([str(data)], [str(data), "--queries", str(data)], [str(data), "--data_path", str(data)]):
        words = ["search", str(run), *words, "--count", "3", "--k", "2", "--json", "--output", str(tmp_path / "a.png")]
        assert main(words) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1] == found[2]
    assert found[0]["results"][0]["query"].startswith(str(data))


@pytest.mark.parametrize("command", ["probe", "reconstruct", "search", "anomaly"])
def test_data_that_are_gone_or_not_said_are_named_in_one_line(command, finished, tmp_path, refusal):
    run, _ = finished
    name = "--images" if command == "reconstruct" else "--data_path"
    settings = {"model": "mae_vit_tiny_patch4", "input_size": [16, 16], "mean": [0.5], "std": [0.2]}
    weights = torch.load(run / "checkpoint-0.pth", weights_only=True)["model"]
    torch.save({"model": weights, "args": settings | {"norm_pix_loss": False}}, tmp_path / "a.pth")
    line = refusal([command, str(tmp_path / "a.pth"), "--output", str(tmp_path / "x")])
    assert f"{name}: must be given, as {tmp_path / 'a.pth'} does not say its data" in line
    torch.save(
        {"model": weights, "args": settings | {"norm_pix_loss": False, "data_path": "/gone"}}, tmp_path / "b.pth"
    )
    line = refusal([command, str(tmp_path / "b.pth"), "--output", str(tmp_path / "x")])
    assert f"{name}: must be given, as the data of {tmp_path / 'b.pth'} are not at /gone any more" in line
