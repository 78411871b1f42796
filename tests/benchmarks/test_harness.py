"""Turns, input sets, ceilings and result files. No test says how long anything may take."""

import json
import re

import pytest
import torch

from fastmae.benchmarks.harness import (
    MAX_INPUT_SETS,
    Stopwatch,
    agree,
    cache_bytes,
    commit,
    input_sets_for,
    interleave,
    machine_name,
    measure_ceilings,
    peak_bytes,
    processor,
    quartiles,
    refuse,
    speed_up,
    write_result,
)
from fastmae.config import BenchStepConfig

CPU = torch.device("cpu")


def test_implementations_take_turns_after_a_warm_up_and_go_through_all_input_sets():
    calls = []
    implementations = {name: lambda i, name=name: calls.append((name, i)) for name in "ABC"}
    samples = interleave(implementations, Stopwatch(device=CPU, rounds=3), input_sets=2)
    turn = [(name, i) for name in "ABC" for i in range(2)]
    assert calls == turn * 4  # one warm-up, three rounds
    assert {name: len(seconds) for name, seconds in samples.items()} == {"A": 3, "B": 3, "C": 3}


def test_a_sample_repeats_calls_until_it_is_long_enough(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def call(i):
        now[0] += 0.001

    samples = interleave({"A": call}, Stopwatch(device=CPU, rounds=2, sample_seconds=0.0155), input_sets=4)
    assert samples["A"] == pytest.approx([0.001, 0.001])
    assert now[0] == pytest.approx(0.001 * 4 * (1 + (1 + 2 + 4) + 2 * 4))


def test_results_of_a_lap_stay_alive_so_that_outputs_do_not_share_memory():
    seen = []

    def call(i):
        seen.append(torch.empty(1 << 16))
        return seen.pop()

    addresses = []
    interleave(
        {"A": lambda i: addresses.append((out := call(i)).data_ptr()) or out}, Stopwatch(device=CPU, rounds=1), 4
    )
    assert len(set(addresses[:4])) == 4


def test_ratios_compare_samples_of_one_round():
    samples = {"ours": [1.0, 10.0, 2.0], "theirs": [2.0, 20.0, 4.0]}
    assert speed_up(samples, "ours", "theirs") == 2
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2, 3, 4)
    assert quartiles([7.0]) == (7, 7, 7)


def test_input_sets_outgrow_the_cache():
    assert cache_bytes(CPU) >= 1 << 16
    assert input_sets_for(2 * cache_bytes(CPU), CPU) == 1
    assert input_sets_for(cache_bytes(CPU), CPU) == 2
    assert input_sets_for(1, CPU) == MAX_INPUT_SETS


def test_memory_is_what_is_held_at_once():
    def work():
        kept = torch.empty(1 << 20)
        for _ in range(3):
            torch.empty(1 << 18)
        return kept.new_empty(())

    assert peak_bytes(work, CPU) == pytest.approx(5 << 20, rel=1e-3)


def test_ceilings_are_measured():
    ceilings = measure_ceilings(CPU, copied=1 << 20, side=64, rounds=2)
    assert ceilings.copy_bytes > 0
    assert ceilings.matmul_flops.keys() == {"float32", "bfloat16"}
    assert min(ceilings.matmul_flops.values()) > 0


def test_a_result_says_when_where_how_and_from_which_sources(tmp_path):
    measured = {"seconds": {"A": [1.0]}}
    path = write_result(
        str(tmp_path / "new"), "a", command=["fastmae", "x"], settings=BenchStepConfig(), measured=measured
    )
    result = json.loads(path.read_text())
    assert result.keys() == {"date", "command", "commit", "versions", "hardware", "settings", "seconds"}
    assert result["settings"]["rounds"] == BenchStepConfig().rounds
    assert result["seconds"] == {"A": [1.0]}
    assert path.name == "a.json"
    assert result["hardware"]["processor"] == processor()
    assert re.fullmatch(rf"cpu{result['hardware']['cores']}-[a-z0-9-]+", machine_name(CPU))


def test_a_result_is_kept_where_there_is_no_git(tmp_path, monkeypatch):
    monkeypatch.delenv("FASTMAE_COMMIT", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit() == "unknown"
    monkeypatch.setenv("FASTMAE_COMMIT", "abc")
    assert commit() == "abc"


def test_refusing_says_why_and_is_status_1(capsys):
    assert refuse("the loss of A differs") == 1
    assert capsys.readouterr().err == "the loss of A differs, so no time is reported\n"


def test_losses_agree_within_a_relative_tolerance():
    assert agree([1.0, 2.0], [1.00001, 2.0], 1e-4)
    assert not agree([1.0, 2.0], [1.001, 2.0], 1e-4)
    assert not agree([float("nan")], [1.0], 1e9)
