"""Lists of paths: every row is used or left out with a reason, and labels, parts and roots are what a user means."""

import io
import json
import os

import numpy as np
import pytest
from PIL import Image

from fastmae.data import lists
from fastmae.data.fingerprint import difference, fingerprint
from fastmae.data.sources import classes_of, describe, open_train, open_val, train_and_val
from fastmae.errors import UserError
from fastmae.facts import ReadAs

FILES = [f"{kind}/{number}.png" for kind in ("cat", "dog") for number in range(4)]


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate(FILES):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        buffer = io.BytesIO()
        Image.new("L", (8, 8), number).save(buffer, "PNG")
        (tmp_path / name).write_bytes(buffer.getvalue())
    return tmp_path


def write(folder, name, *lines):
    (folder / name).write_text("".join(f"{line}\n" for line in lines))
    return str(folder / name)


def names(source):
    """What a list names, relative to the folder with the images."""
    return ["/".join(path.split("/")[-2:]) for path in source.paths]


def labels(source):
    chosen = classes_of(source, np.arange(len(source)))
    return None if chosen is None else chosen.tolist()


def test_a_path_a_line(folder):
    source = open_train(write(folder, "all.txt", "# ours", "", *FILES, f"./{FILES[0]}"))
    assert names(source) == [*FILES, FILES[0]]
    assert source.read(3) == (folder / FILES[3]).read_bytes()
    assert source.labels is None
    assert source.stock.notes == ("1 row with the path of an earlier one, all used",)
    assert describe(source).location == "listed in all.txt"


LABELLED = {
    "numbers after a space": ("x.txt", [f"{name} {i % 3}" for i, name in enumerate(FILES)], [0, 1, 2, 0, 1, 2, 0, 1]),
    "names after a tab": ("x.txt", [f"{name}\t{name[:3]}" for name in FILES], ["cat"] * 4 + ["dog"] * 4),
    "a table": ("x.csv", ["id,file_name,label", *(f"7,{n},{n[:3]}" for n in FILES)], ["cat"] * 4 + ["dog"] * 4),
    "semicolons": ("x.csv", ["path;class", *(f'"{name}";{name[:3]}' for name in FILES)], ["cat"] * 4 + ["dog"] * 4),
    "no row of names": ("x.csv", [f"{name},{name[:3]}" for name in FILES], ["cat"] * 4 + ["dog"] * 4),
    "numbers as pandas writes them": ("x.tsv", ["image\tlabel", *(f"{n}\t{i}.0" for i, n in enumerate(FILES))],
                                      [*range(8)]),
    "records": ("x.jsonl", [json.dumps({"file_name": n, "label": n[:3]}) for n in FILES], ["cat"] * 4 + ["dog"] * 4),
    "numbers in records": ("x.jsonl", [json.dumps({"label": 5 - i, "path": n}) for i, n in enumerate(FILES)],
                           [5, 4, 3, 2, 1, 0, -1, -2]),
    "paths in quotes": ("x.jsonl", [json.dumps(name) for name in FILES], None),
}  # fmt: skip


@pytest.mark.parametrize("case", LABELLED)
def test_labels_are_numbers_or_names(folder, case):
    name, lines, right = LABELLED[case]
    source = open_train(write(folder, name, *lines))
    assert names(source) == FILES
    assert labels(source) == (right if right is None else [*map(str, right)])
    assert source.classes == (("cat", "dog") if right and "cat" in right else ())


def test_a_record_names_a_file_to_the_letter(folder):
    (folder / " a.png ").write_bytes(b"a")
    assert open_train(write(folder, "x.jsonl", json.dumps({"path": " a.png "}))).read(0) == b"a"


def test_labels_with_gaps_are_none_and_told(folder):
    rows = [f"{name},{'' if name == FILES[2] else 1}" for name in FILES]
    source = open_train(write(folder, "x.csv", "path,label,weight", *(f"{row},0.5" for row in rows)))
    assert source.labels is None
    assert source.stock.lines() == [
        "1 column left out: labels, as 1 of 8 images have none; give each one to use them (without: cat/2.png)",
        "1 column left out: neither paths, labels nor parts (weight)",
    ]


def test_files_that_are_missing_are_counted_and_named(folder):
    more = ["cat/9.png", "bird/1.png", "https://example.org/1.png", "../x.png", "cat/10.png"]
    source = open_train(write(folder, "x.csv", "path,label", *(f"{name},{name[:3]}" for name in (*FILES, *more))))
    assert names(source) == [*FILES, "example.org/1.png"]
    assert source.paths[len(FILES)] == "https://example.org/1.png", "what lies there is asked for when it is read"
    assert source.classes == ("cat", "dog", "htt")
    (missing,) = source.stock.lines()
    assert missing.startswith("4 rows left out: no such file; check the paths, or give the folder that they are")
    assert missing.endswith("(cat/9.png, bird/1.png, ../x.png, …)")
    assert source.stock.total("rows") == len(FILES) + len(more)


def test_a_root_is_what_relative_paths_are_relative_to(folder, tmp_path_factory, monkeypatch):
    elsewhere = tmp_path_factory.mktemp("lists")
    path = write(elsewhere, "x.txt", *FILES[:4], str(folder / FILES[5]))
    assert names(open_train(path, ReadAs(root=str(folder)))) == [*FILES[:4], FILES[5]]
    assert names(open_train(path)) == [FILES[5]]
    path = write(elsewhere, "x.txt", *FILES)
    with pytest.raises(UserError, match=r"none of its 8 files is there, such as .*0\.png; give the folder .* root"):
        open_train(path)
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match="relative to this folder, so give root"):
        open_train(path)


def test_a_column_says_the_part(folder):
    parts = ["train", "Train", "val", "test", "training", "train", "validation", "extra"]
    path = write(folder, "x.csv", "path,label,split", *(f"{n},{n[:3]},{p}" for n, p in zip(FILES, parts, strict=True)))
    train, val = train_and_val(path)
    assert names(train) == [FILES[i] for i in (0, 1, 4, 5)]
    assert names(val) == [FILES[2], FILES[6]]
    assert labels(val) == ["cat", "dog"]
    assert train.stock.lines() == [
        "1 row left out: of test, as val is the part to evaluate on (cat/3.png)",
        "1 row left out: of no part to train or evaluate on (dog/3.png)",
    ]
    assert train.stock.used == {"rows": 6}
    with pytest.raises(UserError, match="no row is of a part to train on"):
        open_train(write(folder, "y.csv", "path,split", *(f"{name},test" for name in FILES)))
    source = open_train(write(folder, "z.csv", "path,split", *(f"{name},3" for name in FILES)))
    assert (len(source), open_val(str(folder / "z.csv"))) == (8, None)
    assert source.stock.notes == ("its column of parts names none (3), so all rows are to train on",)


def test_lists_of_parts_beside_each_other(folder):
    train = write(folder, "train.csv", "path,label", *(f"{name},{name[:3]}" for name in FILES[1:]))
    assert open_val(train) is None
    test = write(folder, "test.csv", "path,label", f"{FILES[0]},cat")
    assert names(open_val(train)) == [FILES[0]]
    write(folder, "val.csv", "path,label", f"{FILES[1]},cat")
    write(folder, "val_old.csv", "path,label", f"{FILES[2]},cat")
    write(folder, "val.txt", FILES[3])
    assert names(open_val(train)) == [FILES[1]]
    assert open_val(test) is None


WRONG = {
    "empty": ("x.txt", [], "an empty list"),
    "no column of paths": ("x.csv", ["a,b", "1,2"], "no column of paths among a, b; call it `path`"),
    "no JSON": ("x.jsonl", ['{"path": "a.png"}', "{"], "line 2 is no JSON"),
    "deep JSON": ("x.jsonl", ["[" * 100_000], "line 1 is no JSON"),
    "numbers": ("x.jsonl", ['{"path": 3}'], "path is no text but 3"),
    "too many cells": ("x.csv", ["path,label", "a,b.png,3"], "row 1 has 3 cells, and there are 2 columns"),
    "an endless cell": ("x.csv", ["path,label", '"' + "x" * 200_000], "no table: "),
    "binary": ("x.txt", ["a\0b"], "no text in UTF-8"),
    "backslashes": ("x.txt", ["cat\\0.png"], "write / instead of"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_list_is_refused_in_one_line(folder, case):
    name, lines, message = WRONG[case]
    with pytest.raises(UserError) as raised:
        open_train(write(folder, name, *lines))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_list_without_end_is_not_read(folder, monkeypatch):
    monkeypatch.setattr(lists, "MAX_LIST_BYTES", 100)
    with pytest.raises(UserError, match="a list of 80,000 bytes; split it"):
        open_train(write(folder, "x.txt", *["cat/0.png"] * 8000))


def test_a_long_list_is_kept_until_it_or_a_folder_changes(folder, monkeypatch, tmp_path_factory):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(lists, "WORTH_KEEPING", 4)
    path = write(folder, "x.csv", "path,label", *(f"{name},{name[:3]}" for name in (*FILES, "dog/7.png")))
    for changed in (path, folder / "cat", folder / "dog", folder):
        os.utime(changed, (1_600_000_000, 1_600_000_000))
    parsed, read = [], lists._parsed
    monkeypatch.setattr(lists, "_parsed", lambda *of: parsed.append(of) or read(*of))
    first, second = open_train(path), open_train(path)
    assert len(parsed) == 1
    assert (second.paths, second.labels.tolist(), second.classes) == (first.paths, first.labels.tolist(), first.classes)
    assert second.stock == first.stock
    assert difference(fingerprint(second), fingerprint(first)) is None
    (folder / "dog" / "7.png").write_bytes((folder / FILES[0]).read_bytes())
    third = open_train(path)
    assert (len(parsed), len(third)) == (2, 9)
    assert difference(fingerprint(third), fingerprint(first)).startswith("9 images instead of 8")
