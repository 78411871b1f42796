"""Writes a page about runs, for people."""

from __future__ import annotations

import os
from pathlib import Path

from fastmae.config import ReportConfig
from fastmae.errors import SettingError
from fastmae.report.page import write_report
from fastmae.report.run_folder import read_run
from fastmae.screen import printable


def run_report(config: ReportConfig) -> int:
    """Reads the run folders, writes the page, and says where it is."""
    folder = Path(config.output).absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise SettingError(
            "output", config.output, "cannot be written; name a file in a folder that is there and yours"
        )
    runs = [read_run(run) for run in dict.fromkeys(config.runs)]
    size = write_report(config.output, runs)
    for run in runs:
        for problem in run.problems:
            print(printable(f"{run.folder}: {problem}"))
    print(printable(f"{config.output}: {len(runs)} run{'s' if len(runs) > 1 else ''}, {size / 1e6:.1f} MB"))
    return 0
