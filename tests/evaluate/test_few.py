"""Probing with few labels: one feature extraction, many draws, means and deviations."""

import json
import statistics

import numpy as np
import pytest
import torch
from helpers import small_run

import fastmae
from fastmae.checkpoint.load import open_checkpoint
from fastmae.cli import main
from fastmae.data.few import few_labelled
from fastmae.data.sources import Subset, train_and_val
from fastmae.evaluate.few import draw, mean_and_deviation, pixels_of, untrained
from fastmae.evaluate.probe import probe_in_detail
from fastmae.train.pretrain import pretrain


@pytest.fixture(scope="module")
def run(blobs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("few") / "run"
    assert pretrain(small_run(blobs, folder, epochs=1)) == 0
    return folder


def test_each_draw_is_scored_as_a_probe_on_its_images_alone(run, blobs, tmp_path, capsys):
    capsys.readouterr()
    words = ["probe", str(run), "--data_path", str(blobs), "--shots", "2", "5", "--label_share", "0.5"]
    assert main([*words, "--seeds", "0", "4", "--beside", "random", "pixels", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["seeds"] == [0, 4]
    assert [(row["features"], row.get("shots"), row.get("label_share")) for row in found["few"]] == [
        (name, *amount)
        for name in ("the checkpoint", "random weights", "pixels")
        for amount in ((2, None), (5, None), (None, 0.5))
    ]
    opened = open_checkpoint(run)
    train, val = train_and_val(str(blobs))
    for model, row in ((opened.model, found["few"][1]), (untrained(opened), found["few"][4])):
        alone = []
        for seed in (0, 4):
            some = Subset(train, few_labelled(train.labels, 5, seed))
            k = min(20, len(some))
            one = probe_in_detail(
                model, some, val, pool="mean", ks=(k,), linear="logistic", batch_size=256, num_workers=1
            )
            alone.append(one.summary())
        for name in ("knn", "linear"):
            assert row[name]["of"] == [one[name] for one in alone]
            assert row[name]["mean"] == pytest.approx(statistics.mean(row[name]["of"]), abs=0.005)
            assert row[name]["std"] == pytest.approx(np.std(row[name]["of"], ddof=1), abs=0.005)
        assert row["images"] == len(some)

    assert main([*words, "--output", str(tmp_path / "out"), "--seeds", "1"]) == 0
    shown = capsys.readouterr().out
    assert "5 per class" in shown
    assert "50 %" in shown
    assert "the draw of seed 0" in " ".join(shown.split())
    assert json.loads((tmp_path / "out" / "few.json").read_text())["few"][0]["linear"]["std"] is None


def test_features_are_computed_of_the_drawn_images_alone(blobs):
    train, _ = train_and_val(str(blobs))
    draws = draw(train, (1, 3), (0, 1))
    assert len(draws.source) <= 6 * len(np.unique(train.labels)) < len(train)
    for (amount, seed), rows in draws.rows.items():
        assert draws.source.indices[rows].tolist() == few_labelled(train.labels, amount, seed).tolist()


def test_random_weights_are_the_same_each_time_and_leave_torchs_generator_alone(run):
    opened = open_checkpoint(run)
    before = torch.get_rng_state()
    models = [untrained(opened), untrained(opened)]
    assert torch.equal(before, torch.get_rng_state())
    own, (one, other) = opened.model.state_dict(), (model.state_dict() for model in models)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(one["blocks.0.attn.qkv.weight"], own["blocks.0.attn.qkv.weight"])


def test_pixels_are_normalised_and_mean_and_deviation_are_those_of_a_sample():
    model = fastmae.mae_vit_tiny_patch4(img_size=16, in_chans=1)
    images = torch.randint(0, 256, (2, 16, 16, 1), dtype=torch.uint8)
    expected = (images.float() / 255 - model.mean) / model.std
    torch.testing.assert_close(pixels_of(model)(images), expected.flatten(1))
    assert mean_and_deviation([1.0, 2.0, 4.0]) == {"mean": 2.33, "std": 1.53, "of": [1.0, 2.0, 4.0]}


WRONG = {
    "no images": (["--shots", "0"], "--shots 0: must be at least 1"),
    "no number": (["--shots"], "--shots"),
    "no whole number": (["--shots", "1.5"], "--shots"),
    "more than all": (["--label_share", "2"], "--label_share 2.0: must be above 0 and at most 1"),
    "no share": (["--label_share", "0"], "--label_share 0.0: must be above 0 and at most 1"),
    "twice the same": (["--shots", "5", "5"], "--shots 5 5: must be numbers that differ"),
    "no seeds": (["--shots", "5", "--seeds", "0"], "--seeds 0: must be at least 1, how many there are"),
    "a negative seed": (["--shots", "5", "--seeds", "1", "-1"], "--seeds -1"),
    "seeds of all labels": (["--seeds", "3"], "given together with --shots or --label_share"),
    "beside all labels": (["--beside", "pixels"], "given together with --shots or --label_share"),
    "beside what": (["--shots", "5", "--beside", "noise"], "--beside"),
    "several k": (["--shots", "5", "--k", "1", "5"], "one number with --shots or --label_share"),
    "too few for lars": (
        ["--shots", "1", "--linear", "lars", "--data_path", "{blobs}"],
        "--linear lars: needs at least 10",
    ),
    "no labels": (["--shots", "1", "--data_path", "{tmp}/plain.npy"], "no labels"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line_and_status_2(case, run, blobs, tmp_path, refusal):
    np.save(tmp_path / "plain.npy", np.zeros((30, 16, 16), np.uint8))
    words, expected = WRONG[case]
    assert expected in refusal(["probe", str(run), *(word.format(blobs=blobs, tmp=tmp_path) for word in words)])
