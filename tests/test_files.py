"""Files that grow by whole lines, whatever the disk does."""

import json
import os
import subprocess
import sys

import pytest

from fastmae import files
from fastmae.files import JsonLines, json_lines, read_json, read_rows

FULL = """
import json, resource, signal, sys
from pathlib import Path
from fastmae.files import JsonLines
from fastmae.messages import messages_on_stderr
messages = messages_on_stderr()
messages.__enter__()
file = JsonLines(Path(sys.argv[1]))
file.add([{"row": 0}])
resource.setrlimit(resource.RLIMIT_FSIZE, (20, resource.RLIM_INFINITY))
for row in range(1, 5):
    file.add([{"row": row}])
print(len(file), Path(sys.argv[1]).read_text().count("\\n"), flush=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
file.add([{"row": 5}])
"""


def test_a_full_disk_loses_no_line_and_cuts_none(tmp_path):
    path = tmp_path / "rows.jsonl"
    done = subprocess.run([sys.executable, "-c", FULL, str(path)], capture_output=True, text=True, check=True)
    kept, whole = map(int, done.stdout.split())
    assert (kept, whole) == (4, 1)
    assert [json.loads(line)["row"] for line in path.read_text().splitlines()] == list(range(6))
    (line,) = done.stderr.splitlines()  # once, not with every row
    assert line.startswith(f"fastmae: {path} cannot be written (")


def test_a_folder_that_comes_later_gets_all(tmp_path, capsys):
    file = JsonLines(tmp_path / "run" / "rows.jsonl")
    file.add([{"row": 0}])
    file.add([{"row": 1}])
    assert len(file) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    (tmp_path / "run").mkdir()
    file.add([])
    assert len(file) == 0
    assert file.path.read_text() == '{"row": 0}\n{"row": 1}\n'


LINES = {
    b'{"row": 0}\n': True,
    b"\n": None,
    b"  \r\n": None,
    b"\0\0\0\n": None,
    b'\0\0{"row": 1}\r\n': True,
    b'\xef\xbb\xbf{"row": 2}\n': True,
    b"[1]\n": False,
    b"null\n": False,
    b'"text"\n': False,
    b'{"row": \n': False,
    b'{"row": 1}{"row": 2}\n': False,
    b'{"row": "\xff"}\n': False,
    b"[" * 50_000 + b"\n": False,
    b'{"row": 1' + b"0" * 5_000 + b"}\n": False,
    b'{"row": 3}': True,
}


def test_every_line_is_a_row_or_damaged_and_blank_ones_are_neither(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"".join(LINES))
    assert [(line, row is not None) for line, row in json_lines(path)] == [
        (line, whole) for line, whole in LINES.items() if whole is not None
    ]
    rows, damaged = read_rows(path)
    assert [row["row"] for row in rows] == [0, 1, 2, 3]
    assert damaged == list(LINES.values()).count(False)
    assert read_rows(tmp_path / "no file") == ([], 0)


def test_a_line_that_is_too_long_is_not_held_in_memory_and_its_rest_is_no_row(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LARGEST_JSON", 20)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"x" * 21 + b'{"row": 1}\n{"row": 2}\n')
    assert read_rows(path) == ([{"row": 2}], 2)


def test_what_only_has_the_name_of_a_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, reason in (("pipe", "is not a file"), ("folder", "is a folder, not a file")):
        with pytest.raises(OSError, match=reason):
            read_json(tmp_path / name)
        with pytest.raises(OSError, match=reason):
            read_rows(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"\n", "empty"),
        (b'{"a": ', "no JSON: Expecting value in line 1"),
        (b"\xff", "no UTF-8 text"),
        (b"[" * 50_000, "nested too deeply"),
    ],
)
def test_a_json_file_that_is_damaged_is_refused_in_few_words(tmp_path, content, reason):
    (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"^{reason}$"):
        read_json(tmp_path / "file.json")


def test_a_torn_line_is_ended_before_rows_are_added(tmp_path):
    path = tmp_path / "rows.jsonl"
    JsonLines(path).add([{"row": 0}])
    with open(path, "a") as file:
        file.write('{"row": 1, "na')
    JsonLines(path).add([{"row": 2}])
    JsonLines(path).add([])
    assert path.read_text() == '{"row": 0}\n{"row": 1, "na\n{"row": 2}\n'
    assert read_rows(path) == ([{"row": 0}, {"row": 2}], 1)
