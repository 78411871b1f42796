"""Ranks that share an evaluation have the numbers of one process, to the bit."""

import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import start_ranks

from fastmae.cli import main
from fastmae.evaluate import features, sharing
from fastmae.evaluate.features import extract_features
from fastmae.evaluate.sharing import WHOLE, Share, gather
from fastmae.export.measure import _encoded
from fastmae.model.presets import mae_vit_tiny_patch4


class Pixels:
    """Twelve images, of which the fifth and the last cannot be read."""

    kind, location, shards, labels, classes = "array", "in memory", None, None, ()

    def __len__(self):
        return 12

    def read(self, index):
        if index in (4, 11):
            return b"no image"
        return np.full((16, 16, 3), 20 * index, np.uint8)

    def name(self, index):
        return f"image {index}"


def test_ranks_take_batches_in_turn():
    """What each computes has the bits of one process, whatever the number of ranks."""
    model, options = mae_vit_tiny_patch4(img_size=16).eval(), {"pool": "mean", "batch_size": 3, "num_workers": 1}
    whole = extract_features(model, Pixels(), **options)
    assert whole.indices.tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 9, 10]
    for ranks in (2, 3, 5):
        parts = [_own(model, Share(rank, ranks), options) for rank in range(ranks)]
        for part in parts:
            for index, value in zip(part.indices, part.values, strict=True):
                assert value.equal(whole.values[whole.indices.tolist().index(index)])
        assert sorted(np.concatenate([part.indices for part in parts]).tolist()) == whole.indices.tolist()
        assert sorted(image.index for part in parts for image in part.skipped) == [4, 11]


def _own(model, share, options):
    """What a rank computes itself: it sends it to nobody."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "_together", lambda own, share: own)
        return extract_features(model, Pixels(), share=share, **options)


def commands_of_ranks(run: str, folder: str) -> int:
    """Three commands as ranks start them; what they print is in the files of the ranks."""
    words = [
        ["features", run, "--output", f"{folder}/shared.npz"],
        ["probe", run, "--json", "--batch_size", "100"],
        ["export", run, "--to", "torch-export", "--output", f"{folder}/shared.pt2", "--check", "digits"],
        ["anomaly", run, "--output", f"{folder}/anomaly"],
    ]
    return max(main(one) for one in words)


@pytest.mark.slow
def test_commands_of_two_ranks_give_the_numbers_of_one(tmp_path, capsys):
    run = str(tmp_path / "run")
    training = ["pretrain", "--output_dir", run, "--epochs", "1", "--probe", "False", "--device", "cpu"]
    assert main(training) == 0
    ranks = start_ranks(2, partial(commands_of_ranks, run, str(tmp_path)))
    ended = [rank.finish() for rank in ranks]
    assert [status for status, _ in ended] == [0, 0], ended
    assert ranks[1].said() == "", "the first rank says it"
    assert "the other 1 ranks have left" in ended[0][1]
    assert main(["features", run, "--output", str(tmp_path / "alone.npz")]) == 0
    alone, shared = (np.load(tmp_path / f"{name}.npz") for name in ("alone", "shared"))
    for name in alone:
        assert np.array_equal(alone[name], shared[name]), name
    capsys.readouterr()
    assert main(["probe", run, "--json", "--batch_size", "100"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(ranks[0].said().splitlines()[1])
    assert main(["export", run, "--to", "torch-export", "--output", str(tmp_path / "a.pt2"), "--check", "digits"]) == 0
    assert _accuracies(capsys.readouterr().out) == _accuracies(ranks[0].said()) != []
    assert Path(tmp_path / "anomaly").is_dir()
    assert "RANK" not in os.environ


def _accuracies(table: str) -> list[str]:
    """The cells of the comparison, without those of speed."""
    rows = [line for line in table.splitlines() if line.startswith("│") and "%" in line]
    return [cell.strip() for row in rows for cell in row.strip("│").split("│")[:4]]


class FewUsable(Pixels):
    """Seventy images, of which the first forty cannot be read: more than a batch of them."""

    labels = np.arange(70) % 2

    def __len__(self):
        return 70

    def read(self, index):
        return b"no image" if index < 40 else np.full((16, 16, 3), index, np.uint8)


def test_a_batch_of_which_no_image_can_be_used_is_passed_over():
    model = mae_vit_tiny_patch4(img_size=16).eval()
    found = extract_features(model, FewUsable(), pool="mean", batch_size=32, num_workers=1)
    assert (found.indices.tolist(), len(found.values), len(found.skipped)) == ([*range(40, 70)], 30, 40)
    encoded = _encoded(model, {"fastmae": model.forward_features}, FewUsable(), True, 1, WHOLE)
    assert encoded.features["fastmae"].equal(found.values)
    assert (encoded.differences, len(encoded.seconds["fastmae"])) == ({"fastmae": 0.0}, 2)


def test_the_first_rank_takes_what_it_has_none_of_itself(monkeypatch):
    values = torch.rand(2, 3)
    text = torch.frombuffer(bytearray(json.dumps([{"values": ["float32", 2, 3]}, "facts"]).encode()), dtype=torch.uint8)
    sent = [torch.tensor([len(text)]), text, values]
    monkeypatch.setattr(sharing.dist, "recv", lambda tensor, rank: tensor.copy_(sent.pop(0)))
    own, (tensors, facts) = gather(Share(0, 2), {}, None)
    assert own == ({}, None)
    assert (tensors["values"].equal(values), facts) == (True, "facts")
