"""benchmarks/gpu_campaign.sh with a Python that only notes what it is asked for: parts, limits, results, commands."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from fastmae.cli import parse
from fastmae.config import BenchStepConfig, check_bench
from fastmae.model.presets import PRESETS

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_campaign.sh"
TEXT = SCRIPT.read_text()
TOTAL = int(re.search(r"^TOTAL=(\d+)$", TEXT, re.MULTILINE)[1])
LIMITS = {
    name: int(seconds)
    for name, seconds in re.findall(
        r"^([a-z-]+) +(\d+)$", re.search(r'PARTS="(.*?)"', TEXT, re.DOTALL)[1], re.MULTILINE
    )
}
# Notes its words, a line each time; can do nothing of what is in $BROKEN, and leaves results as benchmarks do.
PYTHON = """#!/bin/sh
for word in "$@"; do printf '%s\\t' "$word"; done >>"$NOTES"; echo >>"$NOTES"
case "$*" in *"$BROKEN"*) echo it is broken >&2; exit 2;; esac
folder=; for word in "$@"; do [ "$before" = --output ] && folder=$word; before=$word; done
[ -z "$folder" ] || echo '{}' >"$folder/$4-x.json"
"""


def run(tmp_path, *words, broken="nothing"):
    """The words of each call of Python, and the finished script."""
    python, notes, temporary = tmp_path / "python", tmp_path / "notes", tmp_path / "tmp"
    python.write_text(PYTHON)
    python.chmod(0o755)
    notes.touch()
    temporary.mkdir(exist_ok=True)
    environment = os.environ | {"NOTES": str(notes), "BROKEN": broken, "TMPDIR": str(temporary)}
    done = subprocess.run(
        [SCRIPT, "--out", tmp_path / "out", "--python", python, *words],
        env=environment, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert not list(temporary.iterdir())  # nothing stays behind
    return [line.split("\t")[:-1] for line in notes.read_text().splitlines()], done


def lines_of(tmp_path):
    return (tmp_path / "out" / "summary.txt").read_text().splitlines()


def test_the_script_is_one_that_bash_reads_and_names_no_machine():
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    assert os.access(SCRIPT, os.X_OK)
    assert not re.search(r"/(root|home|opt|mnt|tmp/[a-z])|\b/work\b", TEXT)


def test_all_parts_together_leave_time_within_ten_minutes():
    assert sum(LIMITS.values()) < TOTAL <= 585
    assert min(LIMITS.values()) > int(re.search(r"^GRACE=(\d+)", TEXT, re.MULTILINE)[1])
    for name in LIMITS:
        body = re.search(rf"^  {name}\)(.*?)(?=^  [a-z*'-]+\))", TEXT, re.DOTALL | re.MULTILINE)[1]
        within = sum(map(int, re.findall(r"--time_limit (\d+)", body)))
        assert within < LIMITS[name]  # so that a benchmark ends by itself and leaves what it has


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_part_runs_and_asks_for_what_there_is(device, tmp_path):
    calls, done = run(tmp_path, "--device", device, *(["--quick"] if device == "cpu" else []))
    assert done.returncode == 0, done.stdout + done.stderr
    summary = lines_of(tmp_path)
    for name in LIMITS:
        assert any(line.startswith(f"{name}: well after") for line in summary), name
    commands = [call[2:] for call in calls if call[:2] == ["-m", "fastmae"]]
    assert len(commands) >= 9
    for words in commands:
        config = parse(words)
        if words[0] == "bench":
            check_bench(config)
            assert config.device == device
        if isinstance(config, BenchStepConfig):
            assert config.model in PRESETS
            assert config.precision == ("bf16" if device == "cuda" else "fp32")
    asked = {words[1] for words in commands if words[0] == "bench"}
    assert asked == {"attention", "kernels", "step", "end-to-end"}
    modules = {call[1].removeprefix("fastmae.benchmarks.") for call in calls if call[0] == "-m"}
    assert modules >= {"pytest", "smoke", "profile_step", "step_table"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "summary.txt", "attention.json", "kernels.json", "results.tar.gz", "logs.tar.gz"
    }  # fmt: skip
    copied = re.search(r"^collect\(\) {\n(.*?)^}", TEXT, re.DOTALL | re.MULTILINE)[1]
    files = re.findall(r'"\$out/([\w.-]+)"', copied) + re.findall(r'"\$work/([\w.]+)"(?=.* "\$out/")', copied)
    assert len({"summary.txt", *files}) <= 8


def test_a_part_that_fails_is_named_with_its_last_lines_and_stops_no_other(tmp_path):
    calls, done = run(tmp_path, "--device", "cpu", "--quick", "--only", "kernels,profile", broken="bench kernels")
    assert done.returncode == 1
    summary = lines_of(tmp_path)
    (failed,) = [index for index, line in enumerate(summary) if line.startswith("kernels: status 2 after")]
    assert summary[failed + 1] == "    it is broken"
    assert any(line.startswith("profile: well after") for line in summary)
    assert not any("bench\tstep" in "\t".join(call) for call in calls)


def test_accelerate_is_measured_only_where_it_is_asked_for(tmp_path):
    calls, done = run(tmp_path, "--device", "cpu", "--quick", "--only", "accelerate")
    assert done.returncode == 0, done.stdout + done.stderr
    (words,) = [call for call in calls if call[1] == "fastmae.benchmarks.accelerate"]
    assert words[words.index("--precisions") + 1] == "fp32"
    assert any(line.startswith("accelerate: well after") for line in lines_of(tmp_path))


def test_where_nothing_runs_the_rest_is_left_out(tmp_path):
    calls, done = run(tmp_path, "--device", "cpu", "--quick", broken="benchmarks.smoke")
    assert done.returncode == 1
    assert "it is broken" in done.stdout
    assert not any("bench" in call for call in calls)


@pytest.mark.parametrize("words", [["--nonsense"], ["--out", "x", "--part", "nonsense"], []])
def test_a_wrong_command_ends_with_a_line(words, tmp_path):
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [SCRIPT, *[str(tmp_path / word) if word == "x" else word for word in words]],
        env=environment, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
