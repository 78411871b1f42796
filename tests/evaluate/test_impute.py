"""Tables with a trained model of vectors: cells that are filled, the check of known ones, and unusual rows."""

import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.csv as arrow_csv
import pytest
import torch

import fastmae
from fastmae.cli import main
from fastmae.config import ImputeConfig
from fastmae.data.tables import raw_table, table_source
from fastmae.errors import UserError
from fastmae.evaluate.anomaly import cell_errors
from fastmae.evaluate.impute import How, check_imputing, predicted, require_vectors
from fastmae.facts import PixelFacts, ReadAs
from fastmae.model.mlp import MLPMAE

NAMES = ["age", "height", "width", "depth", "weight"]


def related(rows=96, seed=0):
    """A table of which every column follows from one number, in units and places of its own."""
    draw = np.random.default_rng(seed)
    return draw.normal(size=(rows, 1)) * [3, -20, 1, 5, 0.1] + [40, 170, 5, 100, 1] + draw.normal(size=(rows, 5)) * 0.01


def with_holes(table, share=0.2, seed=1):
    return np.where(np.random.default_rng(seed).random(table.shape) < share, np.nan, table)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "table"
    table = pa.table([*with_holes(related()).T], names=NAMES)
    return fastmae.pretrain(
        table, model="mae_mlp", widths=(32, 16), output_dir=folder, epochs=60, batch_size=32, blr=2e-2, warmup_epochs=5,
        probe=False, device="cpu", tune="off", save_freq=60, num_workers=1, log_freq=1000,
    )  # fmt: skip


@pytest.fixture
def small():
    torch.manual_seed(0)
    facts = PixelFacts(dtype="float32")
    return MLPMAE((1, 1), 5, widths=(8, 4), mean=[40, 170, 5, 100, 1], std=[3, 20, 1, 5, 0.1], pixels=facts).eval()


def test_the_run_keeps_names_means_and_deviations(run):
    table = with_holes(related())
    model = run.model
    assert model.read_as.columns == tuple(NAMES)
    np.testing.assert_allclose(model.mean, np.nanmean(table.astype("f4").astype("f8"), axis=0), rtol=1e-6)
    np.testing.assert_allclose(model.std, np.nanstd(table.astype("f4").astype("f8"), axis=0), rtol=1e-5)
    assert model.img_size == (1, 1)


def test_a_run_goes_on_with_the_same_columns_in_any_order(tmp_path):
    columns = {name: pa.array(column) for name, column in zip(NAMES, related(40).T, strict=True)}
    arrow_csv.write_csv(pa.table(columns), tmp_path / "a.csv")
    arrow_csv.write_csv(pa.table({name: columns[name] for name in NAMES[::-1]}), tmp_path / "b.csv")
    arrow_csv.write_csv(pa.table({name: columns[name] for name in NAMES[1:]}), tmp_path / "c.csv")
    settings = dict(
        model="mae_mlp", output_dir=tmp_path / "run", batch_size=8, probe=False, device="cpu", tune="off", num_workers=1
    )
    fastmae.pretrain(tmp_path / "a.csv", epochs=1, **settings)
    with pytest.raises(UserError, match="has no column 'age'"):
        fastmae.pretrain(tmp_path / "c.csv", epochs=2, resume="auto", **settings)
    run = fastmae.pretrain(tmp_path / "b.csv", epochs=2, resume="auto", **settings)
    assert run.metrics[-1]["step"] == 10
    assert run.model.read_as.columns == tuple(NAMES)


def test_missing_cells_are_filled_better_than_by_means_and_others_stay(run):
    table = related()
    holed = with_holes(table)
    filled = fastmae.impute(run, holed)
    missing = np.isnan(holed)
    np.testing.assert_array_equal(filled[~missing], table[~missing])
    off = (filled - table)[missing] / np.broadcast_to(table.std(axis=0), table.shape)[missing]
    assert np.sqrt(np.square(off).mean()) < 0.5
    frame = pa.table([*holed.T[::-1]], names=NAMES[::-1], schema=None)
    again = fastmae.impute(run, frame)
    np.testing.assert_array_equal(np.stack([again[name].to_numpy() for name in NAMES], axis=1), filled)


def test_the_command_fills_a_file_and_checks_known_cells(run, tmp_path, capsys):
    table = with_holes(related(seed=3))
    columns = {**{name: table[:, d] for d, name in reversed([*enumerate(NAMES)])}, "note": ["a b"] * len(table)}
    arrow_csv.write_csv(
        pa.table({name: pa.array(c, from_pandas=True) for name, c in columns.items()}), tmp_path / "a.csv"
    )
    words = ["impute", str(run.folder), str(tmp_path / "a.csv"), "--output", str(tmp_path / "b.csv"), "--device", "cpu"]
    assert main([*words, "--check", "0.2", "--report", str(tmp_path / "r.json"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == json.loads((tmp_path / "r.json").read_text())
    assert said["filled"] == int(np.isnan(table).sum())
    assert said["check"]["error"] < 0.6 < said["check"]["error_of_mean"]
    assert {column["column"] for column in said["check"]["columns"]} == {*NAMES}
    before, after = ((tmp_path / name).read_text().splitlines() for name in ("a.csv", "b.csv"))
    for old, new in zip(before[1:], after[1:], strict=True):
        for cell, filled in zip(old.split(","), new.split(","), strict=True):
            assert filled == cell or (cell == "" and math.isfinite(float(filled)))
    assert main([*words, "--check", "0.2"]) == 0
    assert "of the mean" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "text", "output", "problem"),
    [
        ("a.csv", "age,height,width,depth\n1,2,3,4\n", "b.csv", "has no column 'weight'"),
        ("a.csv", "age,height,width,depth,weight\n1,2,3,4,\n", "b.parquet", "must end in .csv"),
        ("a.png", "x", "b.png", "must be one file of a table"),
    ],
)
def test_wrong_tables_end_in_one_line(run, tmp_path, capsys, name, text, output, problem):
    (tmp_path / name).write_text(text)
    assert main(["impute", str(run.folder), str(tmp_path / name), "--output", str(tmp_path / output)]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert problem in last
    assert not (tmp_path / output).exists()


def test_models_of_images_fill_no_tables():
    with pytest.raises(UserError, match="needs a model of vectors"):
        require_vectors(fastmae.mae_vit_tiny_patch4(img_size=16))


def test_predictions_depend_on_no_batch_size_and_on_no_hidden_cell(small):
    values = with_holes(related(20)).astype(np.float32)
    hidden = np.zeros(values.shape, bool)
    hidden[:, 2] = True
    whole = predicted(small, values, hidden, How(passes=3))
    np.testing.assert_allclose(predicted(small, values, hidden, How(passes=3, batch_size=7)), whole, rtol=1e-6)
    values[:, 2] = 1e6
    np.testing.assert_array_equal(predicted(small, values, hidden, How(passes=3)), whole)


def test_the_check_compares_with_known_cells_alone(small):
    values = with_holes(related(50)).astype(np.float32)
    source = table_source(raw_table(values)[0], ReadAs(columns=()))
    check = check_imputing(small, source, 0.3, How(passes=1))
    assert check.cells == sum(column[1] for column in check.columns) < 0.3 * 250
    drawn = np.random.Generator(np.random.Philox(0)).random(values.shape) < 0.3
    hidden = drawn & ~np.isnan(values)
    mean, std = small.mean.numpy(), small.std.numpy()
    assert check.error_of_mean == pytest.approx(np.sqrt(np.square((values - mean) / std)[hidden].mean()), abs=1e-4)
    with pytest.raises(UserError, match="hides none of the known cells"):
        check_imputing(small, source, 1e-9, How())


def test_each_cell_is_scored_while_it_is_hidden(small):
    rows = torch.tensor(related(6), dtype=torch.float32)
    rows[1, 3] = math.nan
    draw_ids = torch.arange(6)

    def errors(rows):
        given = rows[:, None, None]
        return cell_errors(small, given, draw_ids, mask_ratio=0.2, rounds=2, seed=0)[:, 0]

    before = errors(rows)
    assert before.isnan().nonzero().tolist() == [[1, 3]]
    other = rows.clone()
    other[0, 0] = 46  # two deviations above the mean; alone in its masks, as there are five of one cell
    z = ((rows - small.mean) / small.std)[0, 0]
    prediction = [z + sign * before[0, 0].sqrt() for sign in (1, -1)]
    after = errors(other)[0, 0]
    assert any(torch.isclose(after, (p - 2).square(), rtol=1e-3) for p in prediction)


def test_rows_of_numbers_that_the_model_cannot_compute_with_are_named(run, tmp_path, capsys):
    table = related(4, seed=5)
    table[2] = [3e38, -3e38, 3e38, 3e38, np.nan]
    with pytest.raises(UserError, match="row 3 of column 'weight' cannot be predicted"):
        fastmae.impute(run, pa.table([*table.T], names=NAMES))
    path = tmp_path / "new.csv"
    arrow_csv.write_csv(pa.table([*table.T], names=NAMES), path)
    words = ["anomaly", str(run.folder), "--data_path", str(path), "--test_path", str(path), "--device", "cpu"]
    assert main([*words, "--output", str(tmp_path / "out")]) == 2
    assert "new.csv[2]: the model computes no finite features" in capsys.readouterr().err


def test_labels_beside_a_table_leave_it_a_table(run):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(with_holes(related(4)), columns=NAMES)
    found = fastmae.impute(run, (frame, np.arange(4)), passes=2)
    assert list(found.columns) == NAMES
    assert frame.isna().any(axis=None)
    assert not found.isna().any(axis=None)


def test_cross_entropy_is_refused_for_numbers_that_are_no_shares(tmp_path, capsys):
    arrow_csv.write_csv(pa.table([*related(8).T], names=NAMES), tmp_path / "a.csv")
    words = ["pretrain", "--model", "mae_mlp", "--loss", "bce", "--data_path", str(tmp_path / "a.csv")]
    assert main([*words, "--output_dir", str(tmp_path / "run"), "--device", "cpu", "--tune", "off"]) == 2
    assert "is for numbers from 0 to 1, and those of the table go from" in capsys.readouterr().err


def test_the_report_is_no_file_of_the_table(tmp_path):
    with pytest.raises(UserError, match="another file than"):
        ImputeConfig(checkpoint="run", output=str(tmp_path / "a.csv"), report=str(tmp_path / "a.csv"))


def test_what_cannot_be_written_is_refused_before_anything_is_predicted(run, tmp_path, capsys, monkeypatch):
    arrow_csv.write_csv(pa.table([*related(8).T], names=NAMES), tmp_path / "a.csv")
    (tmp_path / "folder.csv").mkdir()
    monkeypatch.setattr("fastmae.commands.impute.missing_filled", None)  # nothing calls it
    words = ["impute", str(run.folder), str(tmp_path / "a.csv"), "--device", "cpu", "--output"]
    for output, problem in (
        ([str(tmp_path / "folder.csv")], "is a folder"),
        ([str(tmp_path / "b.csv"), "--report", str(tmp_path / "a.csv")], "is the table itself"),
        ([str(tmp_path / "b.csv"), "--report", str(tmp_path / "no" / "r.json")], "cannot be written"),
    ):
        assert main([*words, *output]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert problem in line


def test_rows_that_break_the_relation_are_unusual(run, tmp_path, capsys):
    table = related(40, seed=5)
    table[7, 1] += 60  # three deviations away from what the others say
    normal, new = tmp_path / "normal.csv", tmp_path / "new.csv"
    arrow_csv.write_csv(pa.table([*related().T], names=NAMES), normal)
    arrow_csv.write_csv(pa.table([pa.array([f"row {i}" for i in range(40)]), *table.T], names=["id", *NAMES]), new)
    words = ["anomaly", str(run.folder), "--data_path", str(normal), "--test_path", str(new), "--device", "cpu"]
    assert main([*words, "--output", str(tmp_path / "out")]) == 0
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())["scores"]
    worst = max(scores, key=lambda row: row["error"])
    assert worst["name"].endswith("new.csv[row 7]")
    assert "height" in worst["cells"]
    assert not (tmp_path / "out" / "anomaly.png").exists()
    assert main([*words, "--pool", "tokens", "--output", str(tmp_path / "out")]) == 2
    assert "must be mean with this model" in capsys.readouterr().err
