"""Parquet: the image column is found, row groups are read one at a time and kept, and what cannot be is refused."""

import os
import resource
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from fastmae.data import parquet
from fastmae.data.parquet import Recent
from fastmae.data.reading import Reading
from fastmae.data.sources import describe, open_train, train_and_val
from fastmae.data.statistics import measure
from fastmae.errors import UserError
from fastmae.facts import ReadAs

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
DATA = [bytes([i]) * (i + 1) for i in range(50)]


def write(path, columns, group=7, **options):
    pq.write_table(pa.table(columns), path, row_group_size=group, **options)
    return str(path)


def images(data=DATA, type=IMAGE):
    return pa.array([{"bytes": d, "path": "x.jpg"} for d in data] if type == IMAGE else data, type)


@pytest.mark.parametrize("type", [IMAGE, pa.binary(), pa.large_binary(), pa.struct([("bytes", pa.large_binary())])])
@pytest.mark.parametrize("name", ["image", "img", "jpg", "anything"])
def test_the_image_column_is_found_under_any_name(tmp_path, type, name):
    data = [{"bytes": d} for d in DATA] if pa.types.is_struct(type) else DATA
    other = {"label": pa.array(range(50), pa.int16()), "caption": pa.array(["x"] * 50)}
    source = open_train(write(tmp_path / "x.parquet", {**other, name: pa.array(data, type)}))
    assert [source.read(i) for i in range(50)] == DATA
    assert source.labels.dtype == np.int64
    assert source.labels.tolist() == list(range(50))
    assert source.name(33) == f"{tmp_path / 'x.parquet'}[33]"
    assert source.shards.starts.tolist() == [*range(0, 50, 7), 50]


def test_files_follow_each_other_and_names_decide_their_part(tmp_path):
    for part, first, last in (("train-00000-of-00002", 0, 20), ("train-00001-of-00002", 20, 40), ("test-0", 0, 5),
                              ("validation-00000-of-00001", 40, 50)):  # fmt: skip
        write(tmp_path / f"{part}.parquet", {"image": images(DATA[first:last]), "label": range(first, last)})
    train, val = train_and_val(str(tmp_path))
    assert [train.read(i) for i in range(40)] == DATA[:40]
    assert [val.read(i) for i in range(10)] == DATA[40:]
    assert train.labels.tolist() == list(range(40))
    assert train.name(20) == f"{tmp_path / 'train-00001-of-00002.parquet'}[0]"
    assert describe(train).location == "in column 'image' of 2 Parquet files"


@pytest.mark.parametrize(
    "label",
    [
        None,
        pa.array([0.5] * 50),
        pa.array(["cat"] * 49 + [None]),
        pa.array([1] * 49 + [None]),
        pa.array([1] * 49 + [None], pa.uint8()),
    ],
)
def test_labels_only_if_every_row_has_an_integer_or_a_word(tmp_path, label):
    columns = {"image": images()} if label is None else {"image": images(), "label": label}
    assert open_train(write(tmp_path / "x.parquet", columns)).labels is None


def test_a_row_without_bytes_is_an_error_of_that_row(tmp_path):
    source = open_train(write(tmp_path / "x.parquet", {"image": images([b"one", None, b"three"])}))
    assert (source.read(0), source.read(2)) == (b"one", b"three")
    with pytest.raises(OSError, match="no bytes"):
        source.read(1)


def test_more_files_than_a_process_may_have_open_are_opened(tmp_path):
    for number in range(60):
        write(tmp_path / f"{number:02d}.parquet", {"image": images(DATA[number % 50 : number % 50 + 1])})
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 30, before[1]))
    try:
        source = open_train(str(tmp_path))
        assert [source.read(number) for number in range(60)] == DATA + DATA[:10]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_paths_in_a_table_are_found_below_a_root_in_the_home_folder(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.jpg").write_bytes(b"a")
    path = write(tmp_path / "x.parquet", {"image": pa.array([{"bytes": None, "path": "a.jpg"}], IMAGE)})
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_train(path, ReadAs(root="~/photos")).read(0) == b"a"


def test_rows_and_columns_are_used_or_left_out_for_a_reason(tmp_path):
    columns = {"id": range(5), "image": images([b"one", None, b"three", None, b"five"]), "caption": ["x"] * 5}
    write(tmp_path / "a.parquet", {**columns, "label": pa.array(["cat"] * 5)}, group=2)
    write(tmp_path / "b.parquet", {"image": images([b"x"] * 4), "label": pa.array(["dog"] * 4)})
    source = open_train(str(tmp_path))
    assert source.stock.used == {"files": 2, "images": 9, "rows": 7, "columns": 2}
    assert source.stock.total("rows") == len(source) == 9
    assert (source.classes, source.labels.tolist()) == (("cat", "dog"), [0] * 5 + [1] * 4)
    assert source.stock.lines() == [
        "2 rows left out: they hold no image; a run takes the next row's",
        "2 columns left out: neither images nor labels (id, caption)",
    ]


def test_labels_that_some_rows_or_files_lack_are_left_out_with_the_reason(tmp_path):
    path = write(tmp_path / "a.parquet", {"image": images(), "label": pa.array([1] * 48 + [None] * 2)})
    source = open_train(path)
    assert source.labels is None
    assert source.stock.used["columns"] == 1
    assert "labels, as 2 of 50 rows have none; give each row one" in source.stock.lines()[0]
    write(tmp_path / "b.parquet", {"image": images()})
    assert "some of the files have no such column" in open_train(str(tmp_path)).stock.lines()[0]
    whole = open_train(write(tmp_path / "c.parquet", {"image": images(), "label": pa.array(range(50))}))
    assert (whole.stock.used["columns"], whole.stock.lines()) == (2, [])


def test_a_file_that_changes_under_a_run_gives_no_other_images(tmp_path):
    path = tmp_path / "x.parquet"
    source = open_train(write(path, {"image": images(type=pa.binary())}, group=10, use_dictionary=False))
    held = source.read(0)
    write(path, {"image": images([data[::-1] + b"" for data in DATA[::-1]], pa.binary())}, group=10)
    assert source.read(0) == held
    with pytest.raises(OSError, match=r"x\.parquet|row group 2"):
        source.read(20)
    write(path, {"image": images(type=pa.binary())}, group=10, use_dictionary=False)
    with pytest.raises(OSError, match="has changed since it was opened"):
        source.read(20)


def test_more_rows_than_a_file_can_hold_are_damage(tmp_path, monkeypatch):
    path = write(tmp_path / "x.parquet", {"image": images([b"x"] * 900, pa.binary())})
    monkeypatch.setattr(parquet, "MAX_ROWS_A_BYTE", 0.001)
    with pytest.raises(UserError, match=r"says that it has 900 rows, 900 in its groups, in [\d,]+ bytes"):
        open_train(path)


def _cut(path):
    path.write_bytes(path.read_bytes()[:-30])


def _spoil(path):
    data = bytearray(path.read_bytes())
    data[len(data) - 60 : len(data) - 20] = b"\xff" * 40
    path.write_bytes(data)


REFUSED = {
    "paths only": (lambda p: write(p, {"image": images([None] * 9)}), "none of its 9 files is there"),
    "no column of bytes": (lambda p: write(p, {"image": ["x"], "label": [1]}), "none of bytes among image, label"),
    "several of bytes": (lambda p: write(p, {"a": [b"x"], "b": [b"x"]}), "several of bytes (a, b); call it `image`"),
    "empty table": (lambda p: write(p, {"image": images([])}), "holds no images"),
    "text": (lambda p: p.write_text("hello"), "cannot be read (x.parquet: "),
    "empty file": (lambda p: p.touch(), "cannot be read (x.parquet: "),
    "cut": (lambda p: (write(p, {"image": images()}), _cut(p)), "cannot be read (x.parquet: "),
    "spoilt footer": (lambda p: (write(p, {"image": images()}), _spoil(p)), "x.parquet"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_in_one_line(tmp_path, case):
    make, words = REFUSED[case]
    make(tmp_path / "x.parquet")
    with pytest.raises(UserError) as caught:
        open_train(str(tmp_path / "x.parquet"))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_of_other_columns_is_named(tmp_path):
    write(tmp_path / "a.parquet", {"image": images()})
    write(tmp_path / "b.parquet", {"photo": images()})
    with pytest.raises(UserError, match=r"b\.parquet: has no image column 'image'"):
        open_train(str(tmp_path))


def test_row_groups_too_large_to_hold_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "MAX_GROUP_BYTES", 100)
    with pytest.raises(UserError, match="write it with row_group_size=100"):
        open_train(write(tmp_path / "x.parquet", {"image": images()}, group=50))


def test_without_pyarrow_one_line_says_how_to_get_it(tmp_path, monkeypatch):
    path = write(tmp_path / "x.parquet", {"image": images()})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"need pyarrow; run pip install 'fastmae\[parquet\]'"):
        open_train(path)


def test_damage_inside_a_row_group_is_an_error_of_its_rows(tmp_path):
    path = tmp_path / "x.parquet"
    write(path, {"image": images([bytes(range(256)) * 9] * 20)}, group=10, use_dictionary=False, compression="zstd")
    start = pq.read_metadata(path).row_group(1).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + 30] = b"\xff" * 30
    path.write_bytes(data)
    source = open_train(str(path))
    assert len(source.read(9)) == 9 * 256
    for _ in range(2):
        with pytest.raises(OSError, match="row group 1"):
            source.read(10)
    path.unlink()
    with pytest.raises(OSError, match=r"row group 1: .*x\.parquet"):
        source.read(15)


def test_row_groups_are_read_once_while_they_are_in_use(tmp_path, monkeypatch):
    path = write(tmp_path / "x.parquet", {"image": images(), "huge": [b"y" * 1000] * 50})
    loads = []
    original = parquet.read_group
    monkeypatch.setattr(parquet, "read_group", lambda *words: (loads.append(words[1]), original(*words))[1])
    source = open_train(path)
    assert loads == [0]
    order = np.random.default_rng(0).permutation(50).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.read, order)) == [DATA[i] for i in order]
    assert sorted(loads) == list(range(8))


def test_recent_results_are_bounded_and_computed_once_for_all_threads():
    calls = []
    lock = threading.Lock()

    def make(key):
        time.sleep(0.001)
        with lock:
            calls.append(key)
        return key * key

    recent = Recent(make, 3)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(recent, [5] * 50)) == [25] * 50
        assert calls == [5]
        keys = np.random.default_rng(0).integers(0, 6, 400).tolist()
        assert list(pool.map(recent, keys)) == [key * key for key in keys]
    assert len(recent) <= 3
    calls.clear()
    for key in (1, 2, 3, 1, 4, 1, 2):
        recent(key)
    assert [key for key in calls if key not in (1, 3)][-2:] == [4, 2]


def test_a_failure_reaches_the_caller_and_is_tried_again():
    outcomes = iter([OSError("first"), None])

    def make(key):
        outcome = next(outcomes)
        if outcome is not None:
            raise outcome
        return key

    recent = Recent(make, 3)
    with pytest.raises(OSError, match="first"):
        recent(1)
    assert recent(1) == 1


def test_statistics_read_runs_and_not_every_row_group(tmp_path, monkeypatch):
    from fastmae.benchmarks.images import make_jpeg

    data = [make_jpeg(0, i, 16, 16) for i in range(8)]
    path = write(tmp_path / "x.parquet", {"image": images(data * 1000)}, group=10)
    source = open_train(path)
    loads = []
    original = parquet.read_group
    monkeypatch.setattr(parquet, "read_group", lambda *words: (loads.append(words[1]), original(*words))[1])
    measured = measure(source, Reading(1))
    mean, std = measured.mean, measured.std
    assert len(set(loads)) < 300
    assert 0.2 < mean[0] < 0.8
    assert 0.05 < std[0] < 0.4
    assert measure(source, Reading(1)) == measured
