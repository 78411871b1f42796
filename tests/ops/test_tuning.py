"""Measuring on a CPU: what is taken, what happens when the time is over, and a cache that is never in the way."""

import dataclasses
import json
import os
import time
from functools import partial

import pytest
import torch

from fastmae.environment import CoreTimes, core_times, used_by_others
from fastmae.model.calls import calls_of
from fastmae.model.flops import flops_per_image
from fastmae.model.presets import PRESETS
from fastmae.ops import tuning
from fastmae.ops.backends import asked_backends
from fastmae.ops.choices import CANDIDATES, LINEAR, OF_0_1, TORCHS_OWN, Choice, Choices
from fastmae.ops.tuning import Call, cached_here, describe, measure, measured, unmet

LARGE = Call("linear", (400, 768, 768), count=12)
SMALL = Call("linear", (400, 64, 64), count=1)
MIXES = Call("attention", (50, 50, 64), images=8, heads=12, count=12)


class Machine:
    """A processor on which every call takes the seconds that the test gives, and a clock that knows them."""

    def __init__(self, monkeypatch, seconds):
        self.time, self.seconds, self.ran, self.noise = 0.0, seconds, [], [0.0]
        monkeypatch.setattr(tuning, "_parts", self.parts)
        monkeypatch.setattr(tuning, "_whole_layer", self.whole)

    def now(self):
        return self.time

    def run(self, op, call, name):
        self.ran.append((op, call.shape, name))
        self.noise.append(self.noise.pop(0))
        self.time += self.seconds(op, call, name) * (1 + self.noise[-1])

    def parts(self, call, dtype):
        self.dtype = dtype
        for op in LINEAR if call.op == "linear" else (call.op,):
            names = CANDIDATES[op][:2]
            yield op, 0.5, {name: partial(self.run, op, call, name) for name in names}

    def whole(self, call, dtype, taken):
        runs = {"torch": dict.fromkeys(taken, "torch"), "chosen": taken}
        return {
            name: (lambda chosen=chosen: [self.run(op, call, by) for op, by in chosen.items()])
            for name, chosen in runs.items()
        }


def taken(choices):
    return {(entry.op, entry.shape): entry.taken for entry in choices.entries}


def test_what_is_faster_is_taken_and_by_how_much_is_kept(monkeypatch):
    faster = {"linear_input": 2.0, "linear_weight": 0.5, "attention": 4.0}
    machine = Machine(monkeypatch, lambda op, _, name: 0.004 / (1 if name in ("torch", "sdpa") else faster.get(op, 1)))
    choices = measure([LARGE, MIXES], now=machine.now)
    found = {entry.op: (entry.taken, entry.speedup) for entry in choices.entries}
    assert found == {
        "linear_forward": ("torch", 1.0),
        "linear_input": ("onednn", 2.0),
        "linear_weight": ("torch", 1.0),
        "attention": ("sdpa-float32", 4.0),
    }
    assert {entry.dtype for entry in choices.entries} == {"float32"}
    assert choices.processor


@pytest.mark.parametrize(("gain", "by"), [(1.015, "torch"), (1.03, "onednn")])
def test_a_tie_stays_torchs_own(monkeypatch, gain, by):
    machine = Machine(monkeypatch, lambda op, _, name: 0.004 / (1 if name == "torch" else gain))
    assert set(taken(measure([LARGE], now=machine.now)).values()) == {by}


def test_what_is_faster_only_now_and_then_stays_torchs_own(monkeypatch):
    machine = Machine(monkeypatch, lambda op, _, name: 0.004 / (1 if name == "torch" else 1.03))
    machine.noise = [0.0, 0.2, -0.2, 0.0, 0.3, 0.1, -0.2, 0.0, -0.1, 0.25, 0.1]
    assert set(taken(measure([LARGE], now=machine.now)).values()) == {"torch"}


def test_products_that_make_the_layer_no_faster_stay_torchs_own(monkeypatch):
    """The overhead of an op of our own shows only when the layer runs as a whole."""
    machine = Machine(monkeypatch, lambda op, _, name: 0.004 if name == "torch" else 0.003)
    machine.whole = lambda *_: {name: partial(machine.run, "whole", LARGE, name) for name in ("torch", "chosen")}
    monkeypatch.setattr(tuning, "_whole_layer", machine.whole)
    machine.seconds = lambda op, _, name: 0.004 if op == "whole" or name == "torch" else 0.003
    assert set(taken(measure([LARGE], now=machine.now)).values()) == {"torch"}


def test_candidates_are_timed_in_turns(monkeypatch):
    machine = Machine(monkeypatch, lambda op, _, name: 0.004)
    measure([MIXES], now=machine.now)
    names = [name for _, _, name in machine.ran[4 : 4 + 2 * tuning.ROUNDS]]
    assert names == ["sdpa", "sdpa-float32"] * tuning.ROUNDS


def test_what_costs_most_comes_first_and_the_rest_keeps_torchs_own_when_the_time_is_over(monkeypatch):
    machine = Machine(monkeypatch, lambda op, _, name: 0.1 if name in ("torch", "sdpa") else 0.05)
    choices = measure([SMALL, MIXES, LARGE], seconds=5.0, now=machine.now)
    by_call = taken(choices)
    assert [by_call[op, LARGE.shape] for op in LINEAR] == ["onednn"] * 3
    assert [by_call[op, SMALL.shape] for op in LINEAR] == ["torch"] * 3
    assert [entry.speedup for entry in choices.entries if entry.shape == SMALL.shape] == [None] * 3
    assert choices.taken("linear_input", SMALL.shape, "float32") == "torch"
    assert machine.time < 5.5


def test_it_takes_three_steps_or_two_seconds(monkeypatch):
    def time_of(seconds):
        machine = Machine(monkeypatch, lambda op, call, name: seconds * (1 if name in ("torch", "sdpa") else 1.01))
        calls = [Call("linear", (400, 768, 8 * n)) for n in range(1, 100)]
        measure(calls, now=machine.now)
        step = 2 * 3 * seconds * sum(call.operations for call in calls) / max(call.operations for call in calls)
        return machine.time, step * tuning.OTHER_WORK

    took, _ = time_of(0.001)
    assert 1.9 < took < 2.1
    took, step = time_of(0.1)
    assert 2.5 * step < took < 3.1 * step


def test_a_first_call_that_was_disturbed_does_not_make_it_last_longer(monkeypatch):
    slow = 50
    machine = Machine(monkeypatch, lambda op, call, _: 0.001 * (slow if call.shape[0] == 500 else 1))
    measure(
        [Call("linear", (500, 768, 768)), *(Call("linear", (499, 768, 8 * n)) for n in range(1, 90))], now=machine.now
    )
    first = slow * 0.001 * 3 * 2 * (tuning.ROUNDS + 2)
    assert machine.time < first + 2


def test_the_share_that_other_programs_had_is_of_this_process_s_cores():
    before = CoreTimes(clock=10.0, at_work=100.0, own=5.0, cores=2)
    assert used_by_others(before, CoreTimes(12.0, 103.0, 7.0, 2)) == 0.25  # one of three seconds, in two on two cores
    assert used_by_others(before, CoreTimes(12.0, 101.9, 7.0, 2)) == 0.0  # ticks are rounded
    assert used_by_others(before, CoreTimes(10.1, 100.2, 5.0, 2)) is None  # too short to tell
    assert used_by_others(before, CoreTimes(12.0, 103.0, 7.0, 1)) is None
    assert used_by_others(None, before) is None


def test_the_system_counts_the_work_of_this_process():
    before = core_times()
    if before is None:
        pytest.skip("this system does not say")
    while time.process_time() < before.own + 0.1:
        sum(range(1000))
    after = core_times()
    assert after.at_work - before.at_work >= 0.05
    assert after.cores == len(os.sched_getaffinity(0))


def test_how_much_faster_bfloat16_would_be_is_predicted(monkeypatch):
    machine = Machine(monkeypatch, lambda op, _, name: 0.002 if machine.dtype == torch.bfloat16 else 0.006)
    machine.dtype = torch.float32
    speedup = measure([LARGE, MIXES], now=machine.now).bf16_speedup
    assert 1.5 < speedup < 3  # norms and the like are hardly faster
    assert measure([LARGE, MIXES], torch.bfloat16, now=machine.now).bf16_speedup is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_calls_are_measured_and_nothing_else_changes(dtype):
    before, drawn = asked_backends(), torch.random.get_rng_state()
    calls = [
        Call("linear", (2000, 32, 48), is_first=True, count=2),
        Call("linear", (20, 32, 48)),
        Call("attention", (9, 9, 16), images=3, heads=2),
        Call("attention", (9, 5, 16), images=3, heads=2),
        Call("gelu", (50, 96)),
        Call("add_layer_norm", (5000, 48)),
    ]
    choices = measure(calls, dtype, seconds=60)
    assert asked_backends() == before
    assert torch.equal(torch.random.get_rng_state(), drawn)
    found = {(entry.op, entry.shape): entry.speedup for entry in choices.entries}
    assert len(found) == 2 + 3 + 2 + 2  # the first input gets no gradient
    assert all(found.values())
    assert Choices.from_json(json.loads(json.dumps(choices.as_json()))) == choices


# --- the calls of a step ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["self", "cross"])
def test_the_calls_are_all_products_of_a_step(attention):
    model = PRESETS["mae_vit_tiny_patch4"](decoder_attention=attention)
    calls = calls_of(model, 3, 0.5)
    linear = sum(2 * call.count * torch.Size(call.shape).numel() for call in calls if call.op == "linear")
    mixing = sum(
        2 * 2 * call.count * call.images * call.heads * torch.Size(call.shape).numel()
        for call in calls
        if call.op == "attention"
    )
    maps = 0 if attention == "self" else 2 * 3 * 25 * 128 * 2 * 5
    assert linear + mixing + maps == 3 * flops_per_image(model, 0.5)


class Recorder(torch.overrides.TorchFunctionMode):
    """Keeps the shapes of linear layers and of attention."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.linear:
            self.seen.add(("linear", (args[0].shape[:-1].numel(), args[1].shape[1], args[1].shape[0])))
        if function is torch.nn.functional.scaled_dot_product_attention:
            (N, H, T, D), S = args[0].shape, args[1].shape[2]
            self.seen.add(("attention", (S, T, D), N, H))
        return function(*args, **(kwargs or {}))


def shapes(calls):
    return {
        (call.op, call.shape) if call.op == "linear" else (call.op, call.shape, call.images, call.heads)
        for call in calls
        if call.op in ("linear", "attention")
    }


@pytest.mark.parametrize("attention", ["self", "cross"])
def test_the_calls_have_the_shapes_of_a_step_for_images_of_all_sizes(attention):
    from fastmae.ops import random_masking

    model = PRESETS["mae_vit_tiny_patch4"](decoder_attention=attention)
    model.allow_sizes([(20, 12)])
    with Recorder() as recorder:
        for height, width in ((28, 28), (20, 12)):
            ids = random_masking(torch.arange(3), 0, height * width // 16)
            model.training_loss(torch.zeros(3, height, width, 3, dtype=torch.uint8), ids)
    assert shapes(calls_of(model, 3)) == recorder.seen


def test_the_calls_of_a_classifier_have_the_shapes_of_its_step():
    from fastmae.model.classifier import classifier_of

    model = classifier_of(PRESETS["mae_vit_tiny_patch4"](), 10)
    with Recorder() as recorder:
        model(torch.zeros(3, 28, 28, 3, dtype=torch.uint8))
    assert shapes(calls_of(model, 3)) == recorder.seen - {("linear", (3, 128, 10))}  # the head is always torch's


# --- what was chosen --------------------------------------------------------------------------------------------------


def test_what_cannot_run_here_is_named(monkeypatch):
    for choices in (TORCHS_OWN, OF_0_1, Choices.always(linear_weight="onednn-copy", attention="cpu")):
        assert unmet(choices) is None
    wrong = Choices("measured", (Choice("attention", (50, 50, 24), "float32", "cpu"),))
    assert "attention 'cpu', which needs heads of a multiple of 16" in unmet(wrong)
    monkeypatch.setattr("fastmae.ops.linear.ONEDNN", False)
    assert "products by 'onednn' in float32" in unmet(Choices.always(linear_forward="onednn"))
    assert unmet(OF_0_1) is None  # as version 0.1 did, which took torch's there


def test_it_is_described_in_a_few_lines():
    entries = (
        *(Choice("linear_forward", (n, 8, 8), "float32", "onednn", 1 + n / 10) for n in (1, 2)),
        Choice("linear_input", (1, 8, 8), "float32", "torch", 1.0),
        Choice("linear_weight", (1, 8, 8), "float32", "torch"),
        Choice("attention", (9, 9, 16), "float32", "cpu", 1.5),
        Choice("attention", (9, 9, 16), "bfloat16", "sdpa", 1.0),
    )
    choices = Choices("measured", entries, "A Processor")
    assert describe(choices) == [
        "products: onednn 2 of 4, 1.10–1.20 times as fast; torch 2 of 4 (1 not measured in time)",
        "attention: cpu 1 of 1, 1.50 times as fast",
    ]
    assert describe(choices, torch.bfloat16) == ["attention: torch 1 of 1"]
    assert describe(Choices("measured")) == ["nothing was measured in this precision: PyTorch's own"]
    assert len(describe(TORCHS_OWN)) == len(describe(OF_0_1)) == 1


# --- the cache --------------------------------------------------------------------------------------------------------

FOUND = Choices("measured", (Choice("linear_forward", LARGE.shape, "float32", "onednn", 1.25),), "A Processor", 1.5)


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache, and measurements that take no time and are counted."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    measurements = []

    def count(calls, dtype):
        measurements.append(dtype)
        return FOUND

    monkeypatch.setattr(tuning, "measure", count)
    return tmp_path / "cache" / "fastmae" / "choices", measurements


def test_it_is_measured_once(cache):
    folder, measurements = cache
    assert cached_here() == []
    assert measured([LARGE]) == measured([LARGE]) == FOUND
    assert measured([LARGE]).bf16_speedup == 1.5
    assert len(measurements) == 1
    (line,) = cached_here()
    assert line.startswith("float32: products: onednn 1 of 1, 1.25 times as fast")
    assert str(folder) in line
    measured([LARGE], anew=True)
    assert len(measurements) == 2
    assert len(list(folder.iterdir())) == 1


def test_what_other_programs_disturbed_is_told_and_not_kept(cache, monkeypatch):
    folder, measurements = cache
    disturbed = dataclasses.replace(FOUND, used_by_others=0.43)
    monkeypatch.setattr(tuning, "measure", lambda calls, dtype: measurements.append(dtype) or disturbed)
    assert measured([LARGE]) == measured([LARGE]) == disturbed
    assert len(measurements) == 2
    assert not folder.exists()
    assert describe(disturbed)[-1] == (
        "doubtful: other programs used 43 % of the cores meanwhile; a new run measures again"
    )
    assert describe(dataclasses.replace(FOUND, used_by_others=0.04)) == describe(FOUND)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("processor", lambda: "Another"),
        ("processor_details", lambda: "0"),
        ("version", lambda name: "0.0.1"),
        ("CANDIDATES", CANDIDATES | {"gelu": ("torch", "cpu", "new")}),
    ],
)
def test_another_machine_or_version_measures_by_itself(cache, monkeypatch, name, value):
    _, measurements = cache
    measured([LARGE])
    monkeypatch.setattr(tuning, name, value)
    assert cached_here() == []
    measured([LARGE])
    assert len(measurements) == 2


def test_other_threads_cores_dtypes_and_calls_are_measured_by_themselves(cache, monkeypatch):
    _, measurements = cache
    measured([LARGE])
    measured([LARGE], torch.bfloat16)
    measured([LARGE, SMALL])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1000)
    measured([LARGE])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(1000))
    measured([LARGE])
    assert len(measurements) == 5


def damage(path, content):
    data = json.loads(path.read_text())
    if callable(content):
        content(data)
        content = json.dumps(data).encode()
    path.write_bytes(content)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"key": {}, "choices": {}}',
        lambda data: data["key"].update(threads=77),  # foreign
        lambda data: data["choices"].update(rules="0.1", entries=[]),
        lambda data: data["choices"]["entries"][0].update(taken="cpu"),
        lambda data: data["choices"]["entries"][0].update(op="attention", shape=[9, 9, 24], taken="cpu"),  # cannot run
        lambda data: data.update(rest="x" * tuning.CACHE_BYTES),
    ],
)
def test_a_damaged_cache_only_means_measuring_again(cache, content):
    folder, measurements = cache
    measured([LARGE])
    (path,) = folder.iterdir()
    damage(path, content)
    cached_here()
    assert measured([LARGE]) == FOUND
    assert len(measurements) == 2
    assert measured([LARGE]) == FOUND  # and it is whole again
    assert len(measurements) == 2


def test_a_cache_that_cannot_be_written_or_is_no_folder_only_means_measuring_again(cache, monkeypatch):
    folder, measurements = cache
    folder.parent.mkdir(parents=True)
    folder.write_text("")
    assert measured([LARGE]) == measured([LARGE]) == FOUND
    assert cached_here() == []
    folder.unlink()
    measured([LARGE])
    (path,) = folder.iterdir()
    path.unlink()
    path.mkdir()
    assert measured([LARGE]) == FOUND
    cached_here()
    os.rmdir(path)
    monkeypatch.setattr(tuning, "write_text", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert measured([LARGE]) == FOUND
    assert len(measurements) == 5
