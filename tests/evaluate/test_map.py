"""Maps of features: points are the first principal components, or of UMAP, and the picture shows what lies there."""

import io
import sys

import numpy as np
import pyarrow.parquet
import pytest
import torch
from helpers import small_run
from PIL import Image

import fastmae
from fastmae.checkpoint.load import load_model
from fastmae.cli import main
from fastmae.data.sources import open_train
from fastmae.errors import SettingError, UserError
from fastmae.evaluate.features import Features, extract_features
from fastmae.evaluate.map import feature_map
from fastmae.report import map as drawing
from fastmae.train.pretrain import pretrain


@pytest.fixture(scope="module")
def finished(blobs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("map") / "run"
    assert pretrain(small_run(blobs, folder, epochs=1)) == 0
    return folder


def features_of(values):
    return Features(torch.as_tensor(values), np.arange(len(values)), ())


def test_the_points_are_the_first_two_principal_components():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(60, 5)) * (5, 3, 1, 0.5, 0.1) + 1000  # a mean that float32 would drown the rest in
    found = feature_map(features_of(values))
    centred = values - values.mean(0)
    _, sizes, directions = np.linalg.svd(centred, full_matrices=False)
    expected = centred @ directions[:2].T
    expected *= np.sign((expected * found.points).sum(0))
    np.testing.assert_allclose(found.points, expected, rtol=1e-4, atol=1e-4)
    assert found.explained == pytest.approx(tuple((sizes**2 / (sizes**2).sum())[:2]))
    assert [axis.startswith(f"principal component {n}: ") for n, axis in enumerate(found.axes, 1)] == [True, True]
    np.testing.assert_array_equal(found.points, feature_map(features_of(values)).points)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (np.eye(2), "at least 3 images"),
        (np.arange(8.0)[:, None], "have 1"),
        (np.ones((8, 3)), "all features are alike"),
        (np.full((8, 3), np.nan), "not finite"),
    ],
)
def test_what_makes_no_map_is_refused_in_one_line(values, problem):
    with pytest.raises(UserError, match=problem) as refused:
        feature_map(features_of(values))
    assert "\n" not in str(refused.value)


def test_each_cell_shows_its_most_central_point_and_no_cell_two():
    points = np.random.default_rng(1).normal(size=(500, 2))
    shown = drawing.shown_points(points, 7, 5)
    low, high = drawing.limits(points)
    scaled = (points - low) / (high - low) * (7, 5)
    assert len(set(shown.cells)) == len(shown.cells) == len({tuple(cell) for cell in scaled.astype(int)})
    for point, cell in zip(shown.points, shown.cells, strict=True):
        assert tuple(scaled[point].astype(int)) == cell
        inside = (scaled.astype(int) == cell).all(axis=1)
        distances = np.abs(scaled - cell - 0.5)
        assert (distances[point] ** 2).sum() == (distances[inside] ** 2).sum(axis=1).min()


def test_of_many_points_at_most_400_have_a_picture():
    points = np.random.default_rng(2).uniform(size=(20_000, 2))
    assert len(drawing.shown_as_pictures(points).points) == 400


def test_classes_differ_in_colour_or_shape_and_small_ones_share_gray():
    classes = [str(n) for n in range(40) for _ in range(100 - n)]
    looks = drawing._looks(classes)
    named = [look for name, look in looks.items() if name is not None]
    assert len({(look.colour, look.marker) for look in named}) == len(named) == 23
    assert "30" not in looks
    assert looks[None].colour not in {look.colour for look in named}


def test_a_picture_lies_in_the_cell_of_its_point_and_is_the_same_again():
    """A red picture is where its point is: at the top right of the right panel; names with signs of TeX are drawn."""
    points = np.array([[0, 0], [0.1, 0], [1, 1]], np.float32)
    shown = drawing.shown_as_pictures(points)
    pictures = [np.full((4, 4, 3), (255, 0, 0) if n == 2 else (0, 255, 0), np.uint8) for n in shown.points]
    drawn = [io.BytesIO(), io.BytesIO()]
    for file in drawn:
        drawing.save_map(file, points, ("x", "y"), "$a_{", ["$b_{", "^", "[/]"], shown, pictures=pictures)
    assert drawn[0].getvalue() == drawn[1].getvalue()
    pixels = np.asarray(Image.open(drawn[0]).convert("RGB"))
    rows, columns = np.nonzero((pixels == (255, 0, 0)).all(axis=2))
    assert rows.max() < pixels.shape[0] / 3
    assert columns.min() > pixels.shape[1] * 0.8


def test_the_command_writes_the_points_and_the_picture(finished, blobs, tmp_path, capsys):
    npz, parquet, picture = tmp_path / "f.npz", tmp_path / "f.parquet", tmp_path / "deep" / "map.png"
    assert main(["features", str(finished), blobs, "--output", str(npz), "--picture", str(picture)]) == 0
    out = capsys.readouterr().out
    assert f"{picture}: 72 × 128 features of {blobs} in two dimensions by PCA, " in out
    found = fastmae.feature_map(finished, blobs, picture=tmp_path / "python.png")
    assert {Image.open(path).format for path in (picture, tmp_path / "python.png")} == {"PNG"}
    model, source = load_model(str(finished)), open_train(blobs)
    values = extract_features(model, source, pool="mean", batch_size=256, num_workers=1)
    np.testing.assert_array_equal(found.points, feature_map(values).points)
    with np.load(npz) as held:
        np.testing.assert_array_equal(held["reduced"], found.points)
        assert held["features"].shape == (72, 128)
    assert main(["features", str(finished), blobs, "--output", str(parquet), "--reduce", "pca"]) == 0
    table = pyarrow.parquet.read_table(parquet)
    np.testing.assert_array_equal(np.array(table["reduced"].to_pylist(), np.float32), found.points)


def test_images_without_labels_have_a_map(finished, tmp_path):
    np.save(tmp_path / "plain.npy", np.random.default_rng(0).integers(0, 256, (9, 16, 16), dtype=np.uint8))
    words = ["features", str(finished), str(tmp_path / "plain.npy"), "--picture", str(tmp_path / "map.png")]
    assert main(words) == 0
    assert Image.open(tmp_path / "map.png").width > 1500


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "--output: must name a file for the features, or --picture one for a map"),
        (["--reduce", "pca"], "--output: must name a file"),
        (["--picture", "map.jpg"], "--picture map.jpg: must end in .png"),
        (["--picture", "{blobs}/map.png"], "--picture: "),
    ],
)
def test_wrong_flags_are_one_line(words, expected, finished, blobs, refusal):
    line = refusal(["features", str(finished), blobs, *(word.format(blobs=blobs) for word in words)])
    assert expected in line


@pytest.mark.parametrize(("package", "words", "extra"), [
    ("umap", ["--reduce", "umap", "--output", "f.npz"], "umap"),
    ("matplotlib", ["--picture", "map.png"], "report"),
])  # fmt: skip
def test_a_package_that_lacks_is_named_before_any_work(package, words, extra, monkeypatch, refusal):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "fastmae.report.map")
    monkeypatch.delattr("fastmae.report.map")
    line = refusal(["features", "no such run", "x", *words])
    assert f"pip install 'fastmae[{extra}]'" in line


def test_another_way_of_reducing_is_refused_in_python(finished, blobs):
    with pytest.raises(SettingError, match="by='tsne': must be one of pca, umap"):
        fastmae.feature_map(finished, blobs, by="tsne")


@pytest.mark.parametrize("count", [3, 4, 15, 16, 60])
def test_umap_gives_the_same_points_again_whatever_the_number_of_images(count):
    pytest.importorskip("umap", reason="needs umap-learn: make test-umap")
    values = np.random.default_rng(0).normal(size=(count, 8)) + 50 * (np.arange(count) % 2)[:, None]
    found = feature_map(features_of(values), "umap")
    assert found.points.shape == (count, 2)
    assert found.explained is None
    assert np.isfinite(found.points).all()
    np.testing.assert_array_equal(found.points, feature_map(features_of(values), "umap").points)
    if count == 60:  # neighbours stay together: the two groups lie apart
        one, other = found.points[::2], found.points[1::2]
        assert np.linalg.norm(one.mean(0) - other.mean(0)) > 2 * max(one.std(), other.std())
