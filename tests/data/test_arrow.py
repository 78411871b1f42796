"""Tables as Hugging Face's `datasets` writes them, in Arrow and Parquet: bytes or paths, words or numbered classes."""

import json

import numpy as np
import pytest

from fastmae.data.fingerprint import difference, fingerprint
from fastmae.data.sources import classes_of, describe, open_train, open_val, train_and_val
from fastmae.errors import UserError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
DATA = [bytes([65 + i]) * (i + 1) for i in range(20)]


def table(first=0, last=20, **columns):
    rows = [{"bytes": data, "path": "x.jpg"} for data in DATA[first:last]]
    return pa.table({"image": pa.array(rows, IMAGE), **columns})


def named(of, names, column="label"):
    """A table with the metadata that `datasets` writes for classes with names."""
    features = {column: {"names": names, "_type": "ClassLabel"}}
    return of.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def write_arrow(path, of, rows=6, new=pa.ipc.new_stream, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(path), "wb") as file, new(file, of.schema, **options) as writer:
        writer.write_table(of, max_chunksize=rows)
    return path


def contents(source):
    return [source.read(i) for i in range(len(source))]


def labels(source):
    chosen = classes_of(source, np.arange(len(source)))
    return None if chosen is None else chosen.tolist()


@pytest.mark.parametrize("new", [pa.ipc.new_stream, pa.ipc.new_file])
@pytest.mark.parametrize("type", [IMAGE, pa.binary(), pa.large_binary(), pa.struct([("bytes", pa.large_binary())])])
def test_every_image_of_an_arrow_file_is_read_in_place(tmp_path, type, new):
    rows = [{"bytes": data} for data in DATA] if pa.types.is_struct(type) else DATA
    path = write_arrow(tmp_path / "x.arrow", pa.table({"a": pa.array(rows, type), "label": range(20)}), new=new)
    source = open_train(str(path))
    assert contents(source) == DATA
    assert source.labels.tolist() == list(range(20))
    assert source.name(7) == f"{path}[7]"
    assert describe(source).location == "in 1 Arrow file"
    assert source.stock.used == {"files": 1, "images": 20, "rows": 20, "columns": 2}


def test_a_data_set_that_was_saved_to_disk(tmp_path):
    for part, first, last in (("train", 0, 14), ("test", 14, 20)):
        for number in range(2):
            rows = range(first, last)[number::2]
            of = named(table().take(list(rows)).append_column("label", pa.array([i % 2 for i in rows])), ["cat", "dog"])
            write_arrow(tmp_path / part / f"data-{number:05d}-of-00002.arrow", of)
        write_arrow(tmp_path / part / "cache-0123456789abcdef.arrow", table())
        (tmp_path / part / "state.json").write_text("{}")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    train, val = train_and_val(str(tmp_path))
    assert sorted(contents(train)) == DATA[:14]
    assert sorted(contents(val)) == DATA[14:]
    assert (train.classes, val.classes) == (("cat",) * 1 + ("dog",), ("cat", "dog"))
    assert labels(train) == ["cat"] * 7 + ["dog"] * 7
    assert any("cache-0123456789abcdef.arrow" in line for line in train.stock.lines())


def test_the_cache_of_datasets_and_a_repository(tmp_path):
    deep = tmp_path / "cache" / "me___set" / "default" / "0.0.0" / "0af3"
    for name, first, last in (("my_test_set-train-00000-of-00001", 0, 15), ("my_test_set-test", 15, 20)):
        write_arrow(deep / f"{name}.arrow", table(first, last))
        (tmp_path / "repository" / "data").mkdir(parents=True, exist_ok=True)
        pq.write_table(table(first, last), tmp_path / "repository" / "data" / f"{name.split('-', 1)[1]}-0.parquet")
    for root in ("cache", "repository"):
        train, val = train_and_val(str(tmp_path / root))
        assert (contents(train), contents(val)) == (DATA[:15], DATA[15:])


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_labels_are_words_names_or_numbers(tmp_path, kind):
    def read(of):
        path = tmp_path / f"x.{kind}"
        write_arrow(path, of) if kind == "arrow" else pq.write_table(of, path)
        return open_train(str(path))

    words = pa.array(["dog", "cat"] * 10)
    for values in (words, words.dictionary_encode(), words.cast(pa.large_string())):
        source = read(table(label=values))
        assert (source.classes, source.labels.tolist()) == (("cat", "dog"), [1, 0] * 10)
    source = read(named(table(label=[0, 1] * 10), ["tree", "sea"]))
    assert (source.classes, labels(source)) == (("sea", "tree"), ["tree", "sea"] * 10)
    assert read(named(table(label=[-1] * 20), ["tree", "sea"])).labels is None
    assert read(named(table(label=[5, 6] * 10), ["tree", "sea"])).labels.tolist() == [5, 6] * 10
    source = read(table(label=pa.array(["dog"] * 19 + [None]), boxes=[[1, 2]] * 20))
    assert source.labels is None
    assert source.stock.lines() == [
        "1 column left out: labels, as 1 of 20 rows have none; give each row one to use them (label)",
        "1 column left out: neither images nor labels (boxes)",
    ]
    bad = table(label=[0, 1] * 10).replace_schema_metadata({"huggingface": "[" * 100_000})
    assert read(bad).labels.tolist() == [0, 1] * 10


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_tables_of_paths_are_lists(tmp_path, kind):
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(DATA[i])
    rows = [{"bytes": None, "path": f"{i}.jpg"} for i in range(4)]
    of = pa.table({"image": pa.array(rows, IMAGE), "label": ["cat", "dog", "cat", "cow"]})
    path = tmp_path / f"x.{kind}"
    write_arrow(path, of, rows=2) if kind == "arrow" else pq.write_table(of, path)
    source = open_train(str(path))
    assert contents(source) == DATA[:3]
    assert labels(source) == ["cat", "dog", "cat"]
    assert source.stock.lines()[-1].startswith("1 row left out: no such file; ")
    assert "listed in column 'image' of" in source.location


def test_rows_without_an_image_are_left_out(tmp_path):
    rows = [{"bytes": data if i != 4 else None, "path": None} for i, data in enumerate(DATA)] + [None]
    of = pa.table({"image": pa.array(rows, IMAGE), "label": [*range(20), None]})
    source = open_train(str(write_arrow(tmp_path / "x.arrow", of)))
    assert contents(source) == DATA[:4] + DATA[5:]
    assert source.labels.tolist() == [*range(4), *range(5, 20)]
    assert source.stock.lines() == ["2 rows left out: they hold no image"]


def test_an_arrow_file_that_changes_gives_no_wrong_bytes(tmp_path):
    path = write_arrow(tmp_path / "x.arrow", table())
    source, before = open_train(str(path)), fingerprint(open_train(str(path)))
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(OSError, match=r"has changed since it was indexed|has become shorter"):
        contents(source)
    write_arrow(path, table(1, 20))
    assert difference(fingerprint(open_train(str(path))), before) is not None


BROKEN = {
    "text": lambda data: b"hello" * 99,
    "empty": lambda data: b"",
    "cut in the schema": lambda data: data[:100],
    "cut in a batch": lambda data: data[: len(data) // 2],
    "a huge claim": lambda data: b"\xff\xff\xff\xff\xff\xff\xff\x7f" + data[8:],
    "other bytes": lambda data: data[:20] + b"\xa5" * 200 + data[220:],
}


@pytest.mark.parametrize("case", BROKEN)
def test_damaged_arrow_files_are_refused_in_one_line(tmp_path, case):
    path = write_arrow(tmp_path / "x.arrow", table())
    path.write_bytes(BROKEN[case](path.read_bytes()))
    with pytest.raises(UserError, match=r"x\.arrow") as raised:
        open_train(str(path))
    assert "\n" not in str(raised.value)


def test_offsets_that_lead_outside_are_refused(tmp_path):
    path = write_arrow(tmp_path / "x.arrow", pa.table({"image": pa.array(DATA, pa.binary())}), rows=20)
    data = path.read_bytes()
    offsets = np.cumsum([0, *map(len, DATA)]).astype("<i4").tobytes()
    assert data.count(offsets) == 1
    for wrong in (np.full(21, 1 << 30), np.arange(20, -1, -1), np.array([-50, *range(20)])):
        path.write_bytes(data.replace(offsets, wrong.astype("<i4").tobytes()))
        with pytest.raises(UserError, match=r"cannot be read .*x.arrow"):
            open_train(str(path))


def test_compressed_arrow_files_are_refused_with_what_to_do(tmp_path):
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    of = pa.table({"image": pa.array([b"x" * 5000] * 20, pa.binary())})
    path = write_arrow(tmp_path / "x.arrow", of, options=options)
    with pytest.raises(UserError, match="images are compressed and cannot be read in place; write it without"):
        open_train(str(path))
    assert open_val(str(tmp_path)) is None
