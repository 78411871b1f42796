"""The pages about formats work from their first line to their last."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from fastmae.cli import main

DOCS = Path(__file__).parents[3] / "docs"


@pytest.mark.parametrize("page", ["tiff", "dicom", "photo-formats"])
def test_the_commands_of_a_page_run_on_the_data_that_it_makes(page: str, tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("tifffile")
    pytest.importorskip("pydicom")
    monkeypatch.chdir(tmp_path)
    text = (DOCS / f"{page}.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    exec(code, {})
    (commands,) = re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    for line in commands.replace("\\\n", " ").splitlines():
        assert main(shlex.split(line)[1:]) == 0, line
