"""The long campaigns, of which the tests do a sample: kills, damages, mutations, hostile calls, flipped bits.

    python tests/soak.py [--fresh] [--jobs 2] [--write docs/reliability.md] [words of pytest …]

`make soak` is this. What is done is kept in build/soak, so that the same command goes on where it was stopped, as long
as neither the code nor the tests have changed. With --write, the figures of a whole run go into a page of the docs.

It is a plugin of pytest, too, which leaves out tests that are done and writes down the results of the others.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
CODE = ("fastmae", "kernels", "csrc", "tests")
FOLDER = "FASTMAE_SOAK_FOLDER"
START, END = "<!-- soak -->", "<!-- /soak -->"

# (what is done, its tests), the longest first. Tests of one file share what they prepare, so one process does a file.
PARTS = (
    ("Processes killed, then resumed", "tests/train/test_parallel.py"),
    ("Run folders: damaged files, locks, full disks", "tests/train/test_folder.py"),
    ("Interrupted in every step", "tests/train/test_order.py"),
    ("Mutated image files, and memory in passes over damaged data", "tests/data/test_damage.py"),
    ("Random command lines", "tests/test_random_commands.py"),
    ("Bits flipped in checkpoints", "tests/checkpoint/test_checkpoint.py"),
    ("One rank killed, then resumed", "tests/train/test_resume.py"),
    ("Generated data sets, and mutated containers", "tests/data/test_generated.py"),
    ("Damaged headers and footers of containers", "tests/data/test_damaged_containers.py"),
    ("Hostile calls of ops", "tests/ops/test_wrong_arguments.py"),
)


# --- as a plugin ------------------------------------------------------------------------------------------------------


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what has passed."""
    passed = {result["test"] for result in results(Path(os.environ[FOLDER])) if result["outcome"] == "passed"}
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in passed])
    items[:] = [item for item in items if item.nodeid not in passed]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Writes down a result, at once and in one process."""
    over = report.when == "call" or report.outcome != "passed"
    if not over or "PYTEST_XDIST_WORKER" in os.environ:
        return
    result = {
        "test": report.nodeid,
        "outcome": report.outcome,
        "seconds": round(report.duration, 2),
        "figures": dict(report.user_properties),
    }
    with open(Path(os.environ[FOLDER]) / "results.jsonl", "a") as file:
        file.write(json.dumps(result) + "\n")


def results(folder: Path) -> list[dict[str, Any]]:
    """The newest result of each test; a line that a stop has torn is none."""
    newest: dict[str, dict[str, Any]] = {}
    path = folder / "results.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            result = json.loads(line)
        except ValueError:
            continue
        newest[result["test"]] = result
    return list(newest.values())


# --- as a command -----------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fresh", action="store_true", help="forget what was done before")
    parser.add_argument("--jobs", type=int, default=2, help="how many tests run at the same time")
    parser.add_argument("--write", type=Path, help="the page that gets the figures, once all have passed")
    options, words = parser.parse_known_args()
    folder = ROOT / "build" / "soak" / state_of_code()
    if options.fresh:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    files = [file for _, file in PARTS]
    before = len(results(folder))
    print(f"soak: {before} tests are done (kept in {folder.relative_to(ROOT)}); now the others, {files[0]} first")
    started = time.monotonic()
    status = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "soak", "-n", str(options.jobs), "--dist", "loadfile"),
            *("--no-loadscope-reorder", "--durations=10", "-m", "not gpu", *words, *files),
        ],
        cwd=ROOT,
        env={**os.environ, FOLDER: str(folder), "FASTMAE_SOAK": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": "tests"},
    ).returncode
    seconds = time.monotonic() - started
    done = results(folder)
    if len(done) > before or status not in (0, pytest.ExitCode.NO_TESTS_COLLECTED):
        with open(folder / "times.jsonl", "a") as file:
            file.write(json.dumps({"seconds": round(seconds), "commit": commit(), "date": str(datetime.date.today())}))
            file.write("\n")
    is_whole = status in (0, pytest.ExitCode.NO_TESTS_COLLECTED) and not words
    text = summary(folder, done)
    (folder / "summary.md").write_text(text)
    print(f"\n{text}")
    if not is_whole:
        print("soak: not all has passed; `make soak` again does what is missing", file=sys.stderr)
        return 1
    if options.write:
        write_into(options.write, text)
    return 0


def state_of_code() -> str:
    """A name for the code and the tests as they are, with what is not committed; documents do not count."""

    def said_by_git(*words: str) -> bytes:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True).stdout

    digest = hashlib.sha256(said_by_git("rev-parse", *(f"HEAD:{name}" for name in CODE)))
    digest.update(said_by_git("diff", "HEAD", "--", *CODE))
    for name in sorted(said_by_git("ls-files", "--others", "--exclude-standard", "--", *CODE).decode().splitlines()):
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()[:12]


def commit() -> str:
    words = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True).stdout.strip() or "unknown"


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {os.cpu_count()} threads"


def summary(folder: Path, done: list[dict[str, Any]]) -> str:
    """The figures as a table in Markdown, with where and when they were found."""
    path = folder / "times.jsonl"
    times = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    rows = ["| what | figures | tests | failed | seconds |", "|---|---|---:|---:|---:|"]
    for what, file in PARTS:
        mine = [result for result in done if result["test"].startswith(f"{file}::")]
        figures: Counter[str] = Counter()
        for result in mine:
            figures.update(result["figures"])
        text = ", ".join(f"{count:,} {name}" for name, count in figures.items()) or "–"
        failed = sum(result["outcome"] == "failed" for result in mine)
        rows.append(f"| {what} | {text} | {len(mine)} | {failed} | {sum(r['seconds'] for r in mine):,.0f} |")
    minutes = sum(time["seconds"] for time in times) / 60
    when = f"commit {times[-1]['commit']}, {times[-1]['date']}" if times else "not yet run"
    rows.append(f"\n{when}, {processor()}: {minutes:.0f} minutes in {len(times)} goes.")
    return "\n".join(rows) + "\n"


def write_into(page: Path, text: str) -> None:
    """Puts the table between the markers of a page."""
    old = page.read_text()
    start, end = old.index(START) + len(START), old.index(END)
    page.write_text(f"{old[:start]}\n\n{text}\n{old[end:]}")
    print(f"soak: {page} has the figures now")


if __name__ == "__main__":
    sys.exit(main())
