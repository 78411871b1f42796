"""Files of features hold what the encoder makes of the images that they name."""

import json

import numpy as np
import pyarrow.parquet
import pytest
import torch
from helpers import small_run

from fastmae.checkpoint.load import load_model
from fastmae.cli import main
from fastmae.data.sources import open_train, train_and_val
from fastmae.evaluate.features import extract_features
from fastmae.train.pretrain import pretrain


@pytest.fixture(scope="module")
def finished(blobs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("features") / "run"
    assert pretrain(small_run(blobs, folder, epochs=1)) == 0
    return folder


def test_both_formats_hold_features_names_and_labels(finished, blobs, tmp_path, capsys):
    npz, parquet = tmp_path / "deep" / "f.npz", tmp_path / "f.parquet"
    assert main(["features", str(finished), blobs, "--output", str(npz), "--pool", "both"]) == 0
    assert "72 × 256" in capsys.readouterr().out
    source = open_train(blobs)
    expected = extract_features(load_model(str(finished)), source, pool="both", batch_size=9, num_workers=1).values
    with np.load(npz, allow_pickle=False) as held:
        np.testing.assert_allclose(held["features"], expected.numpy(), rtol=1e-5, atol=1e-5)
        assert held["names"].tolist() == [source.name(index) for index in range(72)]
        assert held["labels"].tolist() == source.labels.tolist()
    assert main(["features", str(finished), blobs, "--output", str(parquet), "--split", "val"]) == 0
    table = pyarrow.parquet.read_table(parquet)
    _, val = train_and_val(blobs)
    expected = extract_features(load_model(str(finished)), val, pool="mean", batch_size=9, num_workers=1).values
    np.testing.assert_allclose(np.array(table["features"].to_pylist()), expected.numpy(), rtol=1e-5, atol=1e-5)
    assert table["labels"].to_pylist() == val.labels.tolist()
    assert table["names"].to_pylist()[0] == val.name(0)


def test_class_folders_give_names_of_classes_and_unusable_images_no_row(finished, image_folder, tmp_path, capsys):
    bad = image_folder / "train" / "n02" / "0.JPEG"
    bad.write_bytes(b"")
    output = tmp_path / "f.npz"
    assert main(["features", str(finished), str(image_folder), "--output", str(output)]) == 0
    assert f"1 unusable images were skipped; the first is {bad}" in capsys.readouterr().err
    with np.load(output) as held:
        assert held["classes"].tolist() == ["n01"] * 12 + ["n02"] * 11
        assert str(bad) not in held["names"].tolist()
        assert held["features"].shape == (23, 128)


def test_data_without_labels_have_features_names_and_the_mark_of_their_model_alone(finished, tmp_path):
    np.save(tmp_path / "plain.npy", np.zeros((3, 16, 16), np.uint8))
    assert main(["features", str(finished), str(tmp_path / "plain.npy"), "--output", str(tmp_path / "f.npz")]) == 0
    with np.load(tmp_path / "f.npz") as held:
        assert sorted(held) == ["features", "mark", "names"]


WRONG = {
    "another ending": (["features", "{run}", "{blobs}", "--output", "{tmp}/f.csv"], "must end in .npz or .parquet"),
    "data twice": (["features", "{run}", "{blobs}", "--data_path", "{blobs}", "--output", "{tmp}/f.npz"], "DATA is"),
    "empty folder": (["features", "{run}", "{tmp}/empty", "--output", "{tmp}/f.npz"], "holds no images"),
    "output under a file": (["features", "{run}", "{blobs}", "--output", "{blobs}/f.npz"], "cannot be written"),
    "nothing of use": (["features", "{run}", "{tmp}/bad", "--output", "{tmp}/f.npz"], "images in a row cannot be used"),
    "search for more than there is": (
        ["search", "{run}", "{tmp}/three.npy", "--data_path", "{tmp}/three.npy", "--k", "3"],
        "--k 3: there are only 2 images besides",
    ),
    "queries twice": (
        ["search", "{run}", "{blobs}", "--data_path", "{blobs}", "--queries", "{blobs}"],
        "DATA is given by --queries already",
    ),
    "search in nothing": (["search", "{run}", "{blobs}", "--data_path", "{tmp}/nowhere"], "no such file or folder"),
    "picture under a file": (
        ["search", "{run}", "{blobs}", "--data_path", "{blobs}", "--output", "{blobs}/x.png"],
        "cannot be written",
    ),
    "left out without labels": (
        ["anomaly", "{run}", "--data_path", "{tmp}/three.npy", "--left_out", "1"],
        "have no labels",
    ),
    "left out of nothing": (["anomaly", "{run}", "--data_path", "{blobs}", "--left_out", "cat"], "there are 0, 1, 2"),
    "anomalies of too many neighbours": (["anomaly", "{run}", "--data_path", "{blobs}", "--k", "73"], "--k 73"),
    "anomalies with nothing masked": (["anomaly", "{run}", "--mask_ratio", "0"], "--mask_ratio 0.0"),
    "anomalies with all masked": (["anomaly", "{run}", "{blobs}", "--mask_ratio", "0.99"], "--mask_ratio 0.99"),
    "scores under a file": (["anomaly", "{run}", "--data_path", "{blobs}", "--output", "{blobs}/x"], "--output"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line_and_status_2(case, finished, blobs, tmp_path, refusal, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save(tmp_path / "three.npy", np.zeros((3, 16, 16), np.uint8))
    for name in ("empty", "bad"):
        (tmp_path / name).mkdir()
    (tmp_path / "bad" / "a.png").write_text("hello")
    words, expected = WRONG[case]
    line = refusal([word.format(run=finished, blobs=blobs, tmp=tmp_path) for word in words])
    assert expected in line
    assert not list(tmp_path.glob("f.*"))
    assert not list(tmp_path.glob("*.png"))


def test_search_prints_json_of_what_is_nearest(finished, blobs, tmp_path, capsys):
    words = ["search", str(finished), blobs, "--data_path", blobs, "--count", "3", "--k", "4", "--json"]
    assert main([*words, "--output", str(tmp_path / "s.png")]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    features = extract_features(
        load_model(str(finished)), open_train(blobs), pool="mean", batch_size=72, num_workers=1
    ).values
    cosines = torch.nn.functional.cosine_similarity(features[:, None], features[None], dim=2).fill_diagonal_(-1)
    assert [result["index"] for result in results] == [0, 1, 2]
    for row, result in zip((0, 35, 71), results, strict=True):
        best = cosines[row].topk(4)
        assert [match["cosine"] for match in result["found"]] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert result["query"] not in [match["name"] for match in result["found"]]
        assert {match["class"] for match in result["found"]} <= {"0", "1", "2"}
    assert (tmp_path / "s.png").stat().st_size > 0
