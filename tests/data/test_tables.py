"""Tables: which columns are features, what is missing, what is refused, and files written again with cells filled."""

import contextlib
import gzip
import math
import random
from dataclasses import replace
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastmae.data.fingerprint import fingerprint
from fastmae.data.reading import Reading
from fastmae.data.sources import (
    columns_of,
    describe,
    open_train,
    open_val,
    table_values,
    train_and_val,
    without_held_out,
)
from fastmae.data.statistics import measure
from fastmae.data.table_files import filled_array, filled_arrow, of_array, of_arrow, read_table, write_filled
from fastmae.data.tables import TableSource, like, raw_table, table_source
from fastmae.errors import UserError
from fastmae.facts import ReadAs

ANY = ReadAs(columns=())
MIXED = "id,age,sex,name,label,flag,empty\n1,33.5,0,bob,x,True,\n2,NA,1,eve,y,False,\n3,?,1,al,x,NA,NA\n"


def written(folder, name, text):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def opened(path, read_as=ANY):
    source = open_train(str(path), read_as)
    assert isinstance(source, TableSource)
    return source


def lines(source):
    return "\n".join(source.stock.lines())


def filled_file(path, filled, tmp_path):
    out = tmp_path / f"out-{path.name}"
    with open(out, "wb") as file:
        write_filled(file, read_table(path), filled)
    return out


# --- which columns ----------------------------------------------------------------------------------------------------


def test_numbers_are_features_and_everything_else_is_named(tmp_path):
    source = opened(written(tmp_path, "a.csv", MIXED))
    assert source.columns == ("age", "sex", "flag")
    np.testing.assert_array_equal(source.values, np.array([[33.5, 0, 1], [np.nan, 1, 0], [np.nan, 1, np.nan]], "f4"))
    assert source.classes == ("x", "y")
    assert source.labels.tolist() == [0, 1, 0]
    assert source.name(2).endswith("a.csv[3]")
    for said in (
        "no numbers but text (name)",
        "missing in every row (empty)",
        "'label' is the label",
        "'id' names the",
    ):
        assert said in lines(source)
    assert "3 of 9 cells (33 %) are missing, in 2 columns (age, flag)" in lines(source)


def test_a_row_is_an_image_of_one_pixel(tmp_path):
    source = opened(written(tmp_path, "a.csv", MIXED))
    assert source.read(0).tolist() == [[[33.5, 0, 1]]]
    assert source.rows(np.array([0, 1])).shape == (2, 1, 1, 3)
    facts = describe(source, read_as=ANY)
    assert (facts.kind, facts.size, facts.channels, facts.unit) == ("table", (1, 1), 3, "rows")
    assert facts.columns == source.columns
    assert facts.pixels.dtype == "float32"


def test_later_tables_are_matched_by_name(tmp_path):
    known = ReadAs(columns=("b", "a"))
    source = opened(written(tmp_path, "a.csv", "x,a,b\n7,1,2\n"), known)
    assert source.values.tolist() == [[2, 1]]
    assert "1 column left out: the model does not take them (x)" in lines(source)
    with pytest.raises(UserError, match="has no column 'b', of 1 of 2 that are wanted; it has x, a"):
        opened(written(tmp_path, "b.csv", "x,a\n7,1\n"), known)
    with pytest.raises(UserError, match="column 'b' holds text"):
        opened(written(tmp_path, "c.csv", "a,b\n7,low\n"), known)
    assert np.isnan(opened(written(tmp_path, "d.csv", "a,b\n7,\n"), known).values[0, 0])


def test_columns_of_arrays_are_matched_by_their_order(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(6.0).reshape(3, 2))
    known = ReadAs(columns=("b", "a"))
    source = opened(tmp_path / "x.npy", known)
    assert (source.columns, source.values[1].tolist()) == (("b", "a"), [2, 3])
    assert "columns have no names and are taken in their order: b, a" in lines(source)
    np.save(tmp_path / "y.npy", np.zeros((3, 4)))
    with pytest.raises(UserError, match="has 4 columns without names, and 2 are wanted"):
        opened(tmp_path / "y.npy", known)


def test_the_label_is_chosen_by_name_and_never_a_feature(tmp_path):
    table = written(tmp_path, "a.csv", "a,kind,target\n1,u,0.5\n2,v,0.25\n3,u,7\n")
    source = opened(table, ReadAs(columns=(), label_column="kind"))
    assert (source.columns, source.classes) == (("a", "target"), ("u", "v"))
    assert opened(table).labels is None  # a target of fractions is no class
    with pytest.raises(UserError, match=r"no such column in .*; it has a, kind, target"):
        opened(table, ReadAs(columns=(), label_column="class"))
    rows = "".join(f"{i},{i}\n" for i in range(200))
    many = opened(written(tmp_path, "b.csv", f"a,target\n{rows}"))
    assert many.columns == ("a", "target")
    assert "'target' is a feature, as it has more than 100 values" in lines(many)
    assert opened(written(tmp_path, "c.csv", "a,class\n1,0\n2,1\n")).labels.tolist() == [0, 1]


def test_a_column_with_one_word_among_numbers_is_left_out_with_the_word(tmp_path):
    source = opened(written(tmp_path, "a.csv", "a,b\n1,2\n2,3\n3,x7\n4,5\n"))
    assert source.columns == ("a",)
    assert "text, though 3 of 4 cells are numbers or missing; row 3 has 'x7' (b)" in lines(source)


def test_integers_that_float32_cannot_hold_are_said(tmp_path):
    source = opened(written(tmp_path, "a.csv", "a,b\n16777217,1\n2,2\n"))
    assert "column 'a': 1 integer beyond 16,777,216 are rounded, by up to 1" in lines(source)
    times = written(tmp_path, "b.csv", "t\n1700000000.5\n1700000001.5\n1700000003.25\n")
    assert "column 't': float32 rounds its numbers by up to" in lines(opened(times))


def test_nodata_is_missing(tmp_path):
    source = opened(written(tmp_path, "a.csv", "a,b\n-200,1\n2,-200\n"), ReadAs(columns=(), nodata=-200))
    assert np.isnan(source.values).tolist() == [[True, False], [False, True]]


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a,a\n1,2\n", "2 columns are called 'a'"),
        ("1.5,2\n3,4\n", r"its first row holds numbers \(1.5, 2\) and no names"),
        ("a,b\n1,2\n3\n", "row 2 has 1 cells, and there are 2 columns"),
        ("a,b\n1,2,3\n", "row 1 has 3 cells, and there are 2 columns"),
        (b"a,b\n1,\xe9\n", r"no text in UTF-8 \(byte 0xe9 in line 2\)"),
        ("a,b\n1,2\n".encode("utf-16"), "a text in UTF-16"),
        (b"a,b\n\0,1\n", "holds bytes of zero"),
        ("a,b\n1,2\n3,-inf\n4,inf\n", r"row 2 of column 'b' is infinite \(2 cells in all\)"),
        ("a\n1e39\n", r"row 1 of column 'a' is 1e\+39, too large for float32"),
        ("", "begins with an empty line"),
        ("a,b\n", "a row of names and no other"),
        ("a,b\nx,y\n", "no column of numbers among a, b"),
    ],
)
def test_what_cannot_be_meant_is_one_line(tmp_path, text, problem):
    with pytest.raises(UserError, match=problem) as caught:
        opened(written(tmp_path, "a.csv", text))
    assert "\n" not in str(caught.value)


def test_other_delimiters_decimal_commas_and_packing_are_read(tmp_path):
    commas = opened(written(tmp_path, "a.csv", "a;b\n1,5;2\n3,5;\n"))
    np.testing.assert_array_equal(commas.values, np.array([[1.5, 2], [3.5, np.nan]], "f4"))
    tabs = opened(written(tmp_path, "a.tsv", "a\tb\n1\t2\n"))
    packed = opened(written(tmp_path, "a.csv.gz", gzip.compress(b"\xef\xbb\xbfa,b\r\n1,2\r\n")))
    assert tabs.values.tolist() == packed.values.tolist() == [[1, 2]]
    assert packed.columns == ("a", "b")
    numbered = opened(written(tmp_path, "n.csv", ",0,1\nr1,5,6\nr2,7,8\n"))  # as pandas writes an array
    assert (numbered.columns, numbered.row_names) == (("0", "1"), ("r1", "r2"))


def test_small_files_that_unpack_to_much_are_refused(tmp_path, monkeypatch):
    packed = written(tmp_path, "a.csv.gz", gzip.compress(b"a\n" + b"1\n" * 2_000_000))
    monkeypatch.setattr("fastmae.data.arrays.available_memory", lambda: 1 << 20)
    with pytest.raises(UserError, match=r"of memory, of which 1\.0 MiB are left"):
        opened(packed)
    np.save(tmp_path / "x.npy", np.zeros((300, 300)))
    with pytest.raises(UserError, match=r"of memory, of which 1\.0 MiB are left"):
        opened(tmp_path / "x.npy")


def test_other_data_where_a_table_is_wanted_are_refused():
    with pytest.raises(UserError, match=r"no table \(.*\), and the columns a, b are wanted"):
        open_train("digits", ReadAs(columns=("a", "b")))
    assert open_train("digits", ANY).kind == "digits"  # which a model of vectors takes as well


@pytest.mark.parametrize("rounds", [32, pytest.param(100, marks=pytest.mark.slow)])
def test_damaged_files_end_in_one_line(rounds, tmp_path):
    pq.write_table(pa.table({"a": np.arange(50.0), "b": np.arange(50)}), tmp_path / "a.parquet")
    np.save(tmp_path / "a.npy", np.zeros((9, 4)))
    whole = {
        "a.csv": b'a,b,"c d"\n1,2.5,x\n,3,"y\nz"\n7,NA,"q""r"\n' * 3,
        "a.csv.gz": gzip.compress(MIXED.encode() * 3),
        **{name: (tmp_path / name).read_bytes() for name in ("a.parquet", "a.npy")},
    }
    draw = random.Random(0)
    ends = set()
    for round_ in range(rounds):
        name = sorted(whole)[round_ % 4]
        data = bytearray(whole[name])
        for _ in range(draw.choice((1, 2, 8))):
            at = draw.randrange(len(data))
            data[at : at + draw.choice((0, 1, 3))] = draw.randbytes(draw.choice((0, 1, 4)))
        if draw.random() < 0.2:
            del data[draw.randrange(len(data)) :]
        with contextlib.suppress(UserError):  # and nothing else
            ends.add(len(open_train(str(written(tmp_path, f"damaged-{name}", bytes(data))), ANY)) > 0)
            continue
        ends.add("refused")
    assert ends == {True, "refused"}


# --- parts, statistics and fingerprints -------------------------------------------------------------------------------


def test_a_folder_has_parts_with_the_same_columns(tmp_path):
    written(tmp_path, "train.csv", "a,b,label\n1,2,u\n3,4,v\n")
    written(tmp_path, "test.csv", "label,b,a,c\nv,6,5,0\n")
    written(tmp_path, "notes.txt", "hello")
    train, val = train_and_val(str(tmp_path), ANY)
    assert (table_values(train).tolist(), table_values(val).tolist()) == ([[1, 2], [3, 4]], [[5, 6]])
    assert val.classes == ("v",)
    assert "1 file left out: no tables" in lines(train)
    assert open_val(str(tmp_path / "train.csv"), ANY) is None


def test_several_tables_are_joined(tmp_path):
    first, second = written(tmp_path, "a.csv", "a,b\n1,2\n"), written(tmp_path, "b.csv", "b,a\n4,3\n")
    both = open_train([str(first), str(second)], ANY)
    assert columns_of(both) == ("a", "b")
    assert table_values(both).tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(("name", "columns"), [("breast_cancer", 30), ("wine", 13), ("diabetes", 10)])
def test_tables_of_scikit_learn_are_built_in(name, columns):
    train, val = train_and_val(name, ANY)
    assert len(columns_of(train)) == columns == len(columns_of(val))
    assert (train.labels is None) == (name == "diabetes")


def test_means_and_deviations_are_exact_over_all_rows_that_are_trained_on():
    numbers = np.random.default_rng(0).normal(1e6, 3, (5000, 3))
    numbers[::7, 1] = np.nan
    numbers[:, 2] = 4
    source = table_source(raw_table(numbers)[0], ANY)
    train, _ = without_held_out(source, 0.2, seed=0)
    exact = table_values(train).astype(np.float64)
    measured = measure(train, Reading(3, dtype="float32", read_as=ANY))
    np.testing.assert_allclose(measured.mean, np.nanmean(exact, axis=0), rtol=1e-14)
    np.testing.assert_allclose(measured.std[:2], np.nanstd(exact, axis=0)[:2], rtol=1e-9)
    assert measured.std[2] == 1
    assert "1 column of one value get the deviation 1" in measured.lines[0]
    assert (measured.pixels.low, measured.pixels.high) == (None, None)


def test_a_column_that_is_missing_in_all_rows_of_the_training_is_named():
    numbers = np.full((4, 2), 1.0)
    numbers[:3, 1] = np.nan
    source = table_source(raw_table(pa.table({"a": numbers[:, 0], "b": numbers[:, 1]}))[0], ANY)
    with pytest.raises(UserError, match="every cell of the column 'b' is missing in the rows that are trained on"):
        measure(
            type(source)(source.values[:3], source.columns, None, (), "x", source.stock), Reading(2, dtype="float32")
        )


def test_another_cell_or_another_name_is_another_table():
    def of(numbers, names="ab"):
        return fingerprint(table_source(raw_table(pa.table(numbers, names=list(names)))[0], ANY))

    first, same = [[1.0, 2.0], [3.0, 4.0]], [[1.0, 2.0], [3.0, 4.0]]
    assert of(first) == of(same)
    assert of(first) != of([[1.0, 2.0], [3.0, 5.0]])
    assert of(first) != of(first, "ba")


# --- objects of Python ------------------------------------------------------------------------------------------------


def test_frames_and_arrow_tables_are_tables():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"a": [1.0, None], "n": [1, 2], "w": ["u", "v"]}, index=["first", "second"])
    source = table_source(raw_table(frame)[0], ANY)
    assert (source.columns, source.row_names) == (("a", "n"), ("first", "second"))
    filled = like(frame, raw_table(frame)[0], {"a": (np.array([1]), np.array([7.5]))})
    assert filled["a"].tolist() == [1.0, 7.5]
    assert filled.drop(columns="a").equals(frame.drop(columns="a"))
    assert math.isnan(frame["a"].iloc[1])
    arrow = pa.table({"n": pa.array([1, None], pa.int16())})
    assert like(arrow, raw_table(arrow)[0], {"n": (np.array([1]), np.array([2.6]))})["n"].to_pylist() == [1, 3]
    assert raw_table([1, 2]) is None
    labelled = raw_table((np.zeros((3, 2)), np.array([0, 1, 0])))
    assert table_source(labelled[0], ANY, labelled[1]).labels.tolist() == [0, 1, 0]


# --- writing ----------------------------------------------------------------------------------------------------------


def test_a_text_is_written_with_every_other_byte_as_it_was(tmp_path):
    text = (
        '\ufeffid, n ,f,"q,t",w,flag\r\n007,1,0.50,"a,""b"" NA",NA,true\r\n\r\n8,NA,,"x\r\ny",5" z,?\r\n9, ,1e3,,,false'
    )
    path = written(tmp_path, "a.csv", text)
    fill = {"n": ([1, 2], [2.6, -1.2]), "f": ([1], [0.1]), "flag": ([1], [0.7])}
    out = filled_file(path, {name: (np.array(rows), np.array(to)) for name, (rows, to) in fill.items()}, tmp_path)
    right = text.replace('8,NA,,"x\r\ny",5" z,?', '8,3,0.1,"x\r\ny",5" z,true').replace("9, ,1e3", "9,-1,1e3")
    assert out.read_bytes().decode() == right
    assert filled_file(path, {}, tmp_path).read_bytes() == path.read_bytes()


def test_decimal_commas_and_packing_are_kept(tmp_path):
    path = written(tmp_path, "a.csv.gz", gzip.compress(b"a;b\n1,5;2,5\n;3,25\n"))
    out = filled_file(path, {"a": (np.array([1]), np.array([0.75]))}, tmp_path)
    assert gzip.decompress(out.read_bytes()) == b"a;b\n1,5;2,5\n0,75;3,25\n"


def test_a_cell_that_is_there_is_never_overwritten(tmp_path):
    path = written(tmp_path, "a.csv", "a,b\n1,2\n")
    with pytest.raises(UserError, match=r"row 1 cannot be written cell by cell \(1\)"):
        filled_file(path, {"a": (np.array([0]), np.array([5.0]))}, tmp_path)


def test_parquet_and_arrays_keep_types_and_other_values_to_the_bit(tmp_path):
    table = pa.table({
        "i": pa.array([1, None, 3], pa.int8()), "f": pa.array([math.pi, None, float("nan")]), "t": ["x", None, "z"],
        "b": pa.array([True, None, False]), "s": pa.array([1.5, None, 2.5], pa.float32()),
    }).replace_schema_metadata({"made": "by hand"})  # fmt: skip
    pq.write_table(table, tmp_path / "a.parquet")
    fill = {"i": ([1], [200.0]), "f": ([1, 2], [0.5, 0.25]), "b": ([1], [0.2]), "s": ([1], [9.0])}
    filled = {name: (np.array(rows), np.array(to)) for name, (rows, to) in fill.items()}
    after = pq.read_table(filled_file(tmp_path / "a.parquet", filled, tmp_path))
    assert after.schema == table.schema
    assert after.schema.metadata == table.schema.metadata
    assert after.to_pydict() == {
        "i": [1, 127, 3], "f": [math.pi, 0.5, 0.25], "t": ["x", None, "z"], "b": [True, False, False],
        "s": [1.5, 9.0, 2.5],
    }  # fmt: skip
    array = np.array([[1.1, np.nan], [2.2, 3.3]], ">f8")
    np.save(tmp_path / "a.npy", array)
    out = np.load(filled_file(tmp_path / "a.npy", {"1": (np.array([0]), np.array([7.0]))}, tmp_path))
    assert out.tolist() == [[1.1, 7.0], [2.2, 3.3]]


def test_a_column_without_numbers_leaves_the_others_as_rows_that_can_be_read(tmp_path):
    table = np.ones((5, 3))
    table[:, 1] = np.nan
    np.save(tmp_path / "t.npy", table)
    source = opened(tmp_path / "t.npy")
    assert source.columns == ("0", "2")
    assert source.values.flags.c_contiguous
    assert len(fingerprint(source)) > 0


def test_numbers_stored_as_float32_are_compared_with_nodata_as_float32():
    source = table_source(of_array(np.array([[-999.9, 1], [2, 3]], np.float32), "x"), replace(ANY, nodata=-999.9))
    assert np.isnan(source.values).tolist() == [[True, False], [False, False]]


def test_numbers_beyond_a_type_become_its_ends():
    array = of_array(np.array([[255, 2], [3, 4]], np.uint8), "x")
    assert filled_array(array, {"0": (np.array([0]), np.array([300.0]))}).tolist() == [[255, 2], [3, 4]]
    columns = {"a": pa.array([None, Decimal("1.25")], pa.decimal128(3, 2)), "b": pa.nulls(2)}
    at = np.array([0])
    filled = {"a": (at, np.array([-12.3])), "b": (np.arange(2), np.array([1.5, 2.5]))}
    found = filled_arrow(of_arrow(pa.table(columns), "x"), filled).to_pydict()
    assert found == {"a": [Decimal("-9.99"), Decimal("1.25")], "b": [1.5, 2.5]}


def test_a_table_without_rows_is_refused():
    with pytest.raises(UserError, match="has no rows"):
        table_source(of_array(np.zeros((0, 3)), "x"), ANY)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('a,b\n1,2\n3,"4\n5,6\n7,8\n', "open in line 3 are never closed"),
        ('a,b,c\n1,2,x\n3,4,"y\n5,6,"z"\n7,8,w\n', "open in line 3 are closed inside a cell of line 4"),
        ('a,"b\n1,2\n', "open in line 1 are never closed"),
    ],
)
def test_quotes_that_swallow_rows_are_refused_with_their_line(tmp_path, text, said):
    with pytest.raises(UserError, match=said) as error:
        read_table(written(tmp_path, "a.csv", text))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ['a,b\n1,"x\ny ""q"", "\n3,"u"\n', 'a,b\n1,5" pipe\n3,u\n', 'a,b\n1,"x"y\n3,"u"'])
def test_other_quotes_are_read(tmp_path, text):
    assert read_table(written(tmp_path, "a.csv", text)).length == 2


@pytest.mark.parametrize("mark", ["1e38", "-9999", "999999", "1e6"])
def test_a_number_that_spoils_a_mean_is_said_with_what_to_do(tmp_path, mark):
    path = written(tmp_path, "a.csv", f"a,b\n1,3.5\n2,{mark}\n3,4.5\n4,{mark}\n5,4\n")
    (line,) = [line for line in lines(opened(path)).splitlines() if "--nodata" in line]
    assert f"column 'b': {float(mark):g} (2 cells)" in line
    assert f"--nodata {float(mark):g}" in line
    assert "--nodata" not in lines(opened(path, replace(ANY, nodata=float(mark))))


@pytest.mark.parametrize("cells", ["0 0 0 1", "0 1 1 0", "5 5 5 5", "990 999 1000 995", "1 2 3 20"])
def test_usual_numbers_are_no_marks(tmp_path, cells):
    rows = "".join(f"{number},{cell}\n" for number, cell in enumerate(cells.split()))
    assert "--nodata" not in lines(opened(written(tmp_path, "a.csv", f"a,b\n{rows}")))
