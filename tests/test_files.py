"""Files that grow by whole lines, whatever the disk does."""

import json
import subprocess
import sys

from fastmae.files import JsonLines

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
