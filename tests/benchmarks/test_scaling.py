"""``fastmae bench scaling``: the model's terms beside what they stand for, and real ranks beside the model."""

import json
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastmae.benchmarks import scaling
from fastmae.benchmarks.scaling import (
    BUCKET,
    KEPT,
    LAUNCHES_A_BLOCK,
    WEIGHT,
    Alone,
    Cost,
    Links,
    Speed,
    alone,
    buckets_of,
    checkpoints,
    ddp_seconds,
    fsdp_seconds,
    guess,
    links_of,
    parameters_of,
    predict,
    state_bytes,
    units_of,
)
from fastmae.cli import main
from fastmae.config import ScalingMachine
from fastmae.model.flops import flops_per_image
from fastmae.model.presets import PRESETS
from fastmae.model.vit import Block

MACHINE = ScalingMachine()
FREE = Cost(0.0, 0.0)
STEP = Alone(forward=1.0, backward=2.0, optimizer=0.5, launches=0.1)
CHECK = ["bench", "scaling", "--check", "--check_model", "mae_vit_tiny_patch4", "--rounds", "2"]


def shape_of(name):
    with torch.device("meta"):
        return PRESETS[name]()


UNITS = units_of(shape_of("mae_vit_base_patch16"))


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_units_are_the_whole_model(name):
    model = shape_of(name)
    units = units_of(model)
    assert sum(unit.flops for unit in units) == flops_per_image(model, scaling.MASK_RATIO)
    assert parameters_of(units) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(parameters for _, parameters in buckets_of(units)) == parameters_of(units)


class Launches(TorchDispatchMode):
    """Counts operations that compute: no views, no memory that is only taken."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        computes = not function.is_view and not any(word in name for word in ("detach", "empty", "_unsafe_view"))
        self.count += computes
        return function(*args, **(kwargs or {}))


def block_and_tokens(images):
    block = Block(192, 3, 4.0, partial(nn.LayerNorm, eps=1e-6))
    return block, torch.randn(images, 50, 192, requires_grad=True)


def test_a_block_launches_what_the_model_counts():
    block, tokens = block_and_tokens(2)
    with Launches() as launches:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = block(tokens)
        out.backward(tokens)
    assert launches.count == pytest.approx(LAUNCHES_A_BLOCK, rel=0.05)


def kept_by(images):
    block, tokens = block_and_tokens(images)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        out = block(tokens)
    assert out.shape == tokens.shape
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_a_block_keeps_what_the_model_counts():
    an_image = kept_by(3) - kept_by(2)  # without the weights
    assert an_image == pytest.approx(KEPT["none"] * 50 * 192, rel=0.02)


def test_collectives_of_a_machine_are_those_of_the_formulas():
    links = links_of(MACHINE, 8, "ddp")
    rate = 0.8 * 450e9
    assert links.all_reduce(1e9) == pytest.approx(2 * 7 * 3.4e-6 + 2 * 7 / 8 * 1e9 / rate)
    assert links.gather(1e9) == links.reduce(1e9) == pytest.approx(7 * 3.4e-6 + 7 / 8 * 1e9 / rate)
    assert links_of(MACHINE, 1, "ddp").all_reduce(1e9) == 0


def test_machines_are_joined_by_the_slower_link_and_a_copy_a_machine_gathers_within_it():
    slow = replace(MACHINE, network_rate=1e9)
    assert links_of(slow, 64, "ddp").all_reduce.a_byte == pytest.approx(2 * 63 / 64 / (0.8 * 8e9))
    copies = links_of(slow, 64, "hsdp")
    assert copies.gather == links_of(slow, 8, "fsdp").gather
    across = 2 * 7 / 8 / 8 / 0.8e9  # of the eighth that a GPU has
    assert copies.reduce.a_byte == pytest.approx(copies.gather.a_byte + across)


@pytest.mark.parametrize("hides", [True, False])
def test_without_communication_ranks_take_as_long_as_one(hides):
    links = Links(FREE, FREE, FREE)
    assert ddp_seconds(UNITS, STEP, links, hides=hides) == pytest.approx(3.5)
    assert fsdp_seconds(UNITS, STEP, links, 8, hides=hides) == pytest.approx(3 + 0.5 / 8)


def test_what_nothing_hides_is_the_sum_of_all_messages():
    links = Links(Cost(1e-3, 1e-10), Cost(2e-3, 2e-10), Cost(3e-3, 3e-10))
    size, blocks = parameters_of(UNITS) * WEIGHT, sum(unit.is_block for unit in UNITS)
    inside = sum(unit.parameters for unit in UNITS if unit.is_block) * WEIGHT
    messages = len(list(buckets_of(UNITS)))
    scalar = links.all_reduce(WEIGHT)
    assert ddp_seconds(UNITS, STEP, links, hides=False) == pytest.approx(3.5 + messages * 1e-3 + size * 1e-10 + scalar)
    gathers = (2 * blocks + 1) * 2e-3 + (size + inside) * 2e-10
    reduces = (blocks + 1) * 3e-3 + size * 3e-10
    expected = 3 + 0.5 / 8 + gathers + reduces + 2 * scalar
    assert fsdp_seconds(UNITS, STEP, links, 8, hides=False) == pytest.approx(expected)


@pytest.mark.parametrize(("latency", "a_byte"), [(0.0, 1e-12), (1e-3, 1e-11), (0.1, 1e-9)])
def test_hiding_saves_time_but_never_the_last_message(latency, a_byte):
    cost = Cost(latency, a_byte)
    links = Links(cost, cost, cost)
    last = list(buckets_of(UNITS))[-1][1] * WEIGHT
    scalar = cost(WEIGHT)
    assert last < BUCKET
    assert 3.5 + cost(last) + scalar <= ddp_seconds(UNITS, STEP, links) < ddp_seconds(UNITS, STEP, links, hides=False)
    root = sum(unit.parameters for unit in UNITS if not unit.is_block) * WEIGHT
    least = 3 + 0.5 / 8 + 2 * cost(root) + 2 * scalar
    assert least <= fsdp_seconds(UNITS, STEP, links, 8) < fsdp_seconds(UNITS, STEP, links, 8, hides=False)


def test_half_as_many_bytes_travel_faster():
    links = links_of(MACHINE, 64, "ddp")
    slow, fast = (ddp_seconds(UNITS, STEP, replace(links, all_reduce=Cost(0.0, 1e-8)), wire) for wire in (4, 2))
    assert fast < slow


def test_one_gpu_takes_what_was_measured_and_no_less_than_its_launches():
    curve = Speed("measured", 0.4 / 100, ((10, 0.1), (100, 0.4)))
    for batch, seconds in ((10, 0.1), (100, 0.4), (55, 0.25), (200, 0.8), (1, 0.1)):
        step = alone(UNITS, curve, MACHINE, batch)
        assert step.forward + step.backward + step.optimizer == pytest.approx(seconds)
    for sharded, a_block in ((False, LAUNCHES_A_BLOCK * 1e-3), (True, LAUNCHES_A_BLOCK * 1e-3 + 1.5e-3)):
        one = alone(UNITS, Speed("given", 1e-9), replace(MACHINE, launch=1e-3), 1, sharded)
        assert one.forward + one.backward + one.optimizer == pytest.approx(20 * a_block)


def predicted(machine=MACHINE, **changes):
    words = dict(gpus=64, batch=4096, epochs=1600)
    return predict("B", UNITS, Speed("given", 1 / 7000), machine, **(words | changes))


def test_more_gpus_for_the_same_batch_are_used_less_well():
    found = [predicted(gpus=gpus) for gpus in (1, 8, 64, 512, 1024)]
    assert [one.efficiency for one in found] == sorted((one.efficiency for one in found), reverse=True)
    assert 0.9 < found[0].efficiency <= 1


def test_the_limit_is_what_was_made_slow():
    assert predicted(replace(MACHINE, storage_rate=1e8)).limit == "storage"
    assert predicted(replace(MACHINE, storage_rate=1e15, decoded=1.0)).limit == "decoding"
    fast = replace(MACHINE, storage_rate=1e15)
    assert predicted(replace(fast, host_latency=1e-2)).limit == "vote on stopping"
    assert predicted(replace(fast, launch=1e-3)).limit == "launches"
    assert predicted(replace(fast, network_rate=1e8)).limit == "communication"
    assert predicted(fast, gpus=8).limit == "work"


def test_a_batch_that_does_not_fit_is_taken_in_several_steps_and_one_that_does_not_divide_is_left_out():
    small = replace(MACHINE, gpu_memory=8e9)
    assert (predicted(gpus=8).micro_steps, predicted(small, gpus=8).micro_steps) == (1, 8)
    assert predicted(batch=4095) is None
    # Whole weights fit no more, pieces do.
    assert predicted(replace(MACHINE, gpu_memory=1.1 * state_bytes(UNITS, 1))).ways.keys() == {"fsdp", "hsdp"}
    assert predicted(replace(MACHINE, gpu_memory=1e6)) is None


def test_no_other_interval_loses_less_and_none_is_shorter_than_a_save():
    copying, writing, between = 1.2e9 / 20e9, 1.2e9 / 20e9 + 1.2e9 / 1e9, 50_700 * 3600 / 1024

    def loses(interval):
        return copying / interval + (interval / 2 + writing + 180) / between

    every, lost = checkpoints(10**8, 1, MACHINE, 1024)
    assert lost == pytest.approx(loses(every))
    assert all(loses(factor * every) > lost for factor in (0.5, 0.95, 1.05, 2.0))
    slow, lost_by_slow = checkpoints(10**8, 1, replace(MACHINE, hash_rate=1e6), 1024)
    assert slow > 1200  # 1.2 GB are hashed before the next
    assert lost_by_slow > lost


def test_a_guess_is_the_formula_of_what_was_sampled():
    units = units_of(shape_of("mae_vit_tiny_patch16"))
    links = Links(Cost(1e-4, 1e-9), Cost(2e-4, 2e-9), Cost(3e-4, 3e-9))
    bucket, block = scaling._message_sizes(units)
    samples = {"alone": [3.5], "fsdp alone": [4.5], "optimizer": [0.5]}
    for name, cost, small, large in (
        ("all-reduce", links.all_reduce, WEIGHT, bucket),
        ("gather", links.gather, 2 * WEIGHT, block),
        ("reduce", links.reduce, 2 * WEIGHT, block),
    ):
        samples |= {f"{name}, small": [cost(small)], f"{name}, large": [cost(large)]}
    slower = Alone(4 / 3, 8 / 3, 0.5, 0.0)
    assert guess(units, samples, 2, "ddp", False) == pytest.approx([ddp_seconds(units, STEP, links, hides=False)])
    assert guess(units, samples, 2, "fsdp", True) == pytest.approx([fsdp_seconds(units, slower, links, 2)])


def measured_step(path, batch, seconds, ranks=1):
    result = {
        "command": ["fastmae", "bench", "step"],
        "hardware": {"gpus": ["NVIDIA H100"]},
        "settings": {"model": "mae_vit_base_patch16", "batch_size": batch},
        "ranks": ranks,
        "seconds": {"fastmae": [seconds] * 3},
    }
    path.write_text(json.dumps(result))
    return str(path)


def test_results_of_other_benchmarks_replace_assumptions_and_all_is_written(tmp_path, capsys):
    loader = tmp_path / "loader.json"
    pool = {"published, tar": [0.1], "pool, tar": [0.002, 0.002, 0.002], "pool, folder": [0.004]}
    words = {"command": ["fastmae", "bench", "loader"], "num_workers": 2, "seconds": pool}
    loader.write_text(json.dumps(words))
    files = [measured_step(tmp_path / f"{n}.json", n, seconds) for n, seconds in ((64, 0.01), (256, 0.03))]
    words = ["bench", "scaling", "--models", "mae_vit_base_patch16", "mae_vit_large_patch16", "--gpus", "8", "48"]
    assert main([*words, "--measured", str(loader), *files, "--output", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert "8,533 images/s of one GPU alone, measured on NVIDIA H100" in said.out
    assert "mae_vit_large_patch16: 3,220 images/s of one GPU alone, PREDICTED" in said.out
    assert "decoding: 250 images/s and core, measured" in said.out
    assert "network_latency 1.4e-05" in said.out
    assert "left out: 2 models" in said.err  # 4096 images on 48 GPUs
    result = json.loads((tmp_path / "out" / "scaling.json").read_text())
    assert result["machine"] == asdict(replace(MACHINE, decoded=250.0))
    assert [len(rows) for rows in result["predicted"].values()] == [2, 4]
    assert result["speeds"]["mae_vit_base_patch16"]["curve"] == [[64, 0.01], [256, 0.03]]


def test_a_given_speed_is_taken_as_it_is(capsys):
    words = ["bench", "scaling", "--models", "mae_vit_base_patch16", "--gpus", "8", "--images_per_second", "5000"]
    assert main(words) == 0
    assert "5,000 images/s of one GPU alone, given" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--gpus", "12"], "--gpus 12: must be up to 8 (--gpus_a_node), or a multiple of it"),
        (["--ranks", "1"], "--ranks 1: must be at least 2"),
        (["--mfu", "0"], "--mfu 0.0: must be above 0"),
        (["--images_per_second", "1"], "must be 3 positive numbers, one a model"),
        (["--models", "mae_vit_giant"], "--models mae_vit_giant: unknown"),
        (["--measured", "nowhere.json"], "--measured nowhere.json: is no result of bench step or loader"),
    ],
)
def test_what_cannot_work_is_one_line(words, why, capsys):
    assert main(["bench", "scaling", *words]) == 2
    said = capsys.readouterr().err
    assert why in said
    assert len(said.splitlines()) == 1


def test_a_result_of_several_ranks_is_not_one_gpu(tmp_path, capsys):
    assert main(["bench", "scaling", "--measured", measured_step(tmp_path / "2.json", 64, 0.1, ranks=2)]) == 2
    assert "of 2 ranks" in capsys.readouterr().err


def test_real_ranks_train_the_same_and_are_timed_beside_the_formulas(tmp_path, capsys):
    assert main([*CHECK, "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("scaling-check-mae_vit_tiny_patch4-*-n1.json")
    found = json.loads(path.read_text())["ranks"]["2"]
    assert found["losses"].keys() == {"alone", "fsdp alone", "ddp", "fsdp"}
    assert found["losses"]["alone"] > 0
    for clock in ("wall", "processor"):
        samples = found["clocks"][clock]["seconds"]
        assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in samples.values())
        for way in ("ddp", "fsdp"):
            made = found["clocks"][clock][way]
            assert all(0 < some <= all_ for some, all_ in zip(made["all hidden"], made["nothing hidden"], strict=True))
            ratios = [m / p - 1 for m, p in zip(samples[way], made["nothing hidden"], strict=True)]
            assert made["off_by"] == pytest.approx(ratios)
    assert "nothing hidden" in capsys.readouterr().out


def test_ranks_that_train_differently_are_not_timed(monkeypatch, tmp_path, capsys):
    losses = {"alone": 1.0, "ddp": 1.0, "fsdp": 1.01}
    monkeypatch.setattr(scaling, "run_ranks", lambda config, ranks: ({}, losses))
    assert main([*CHECK, "--output", str(tmp_path)]) == 1
    assert "the losses of 2 ranks differ, so no time is reported" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
