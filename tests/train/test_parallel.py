"""Any number of ranks that share weights in any way see the losses of one, stop together, and go on from each other."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_same_run, command, environment, metrics, small_run, soak
from ranks import MOMENT, Rank, run_ranks, run_script, start_ranks

from fastmae.checkpoint.load import load_model
from fastmae.checkpoint.manifest import find_checkpoint, read_manifest
from fastmae.checkpoint.official import read_official
from fastmae.config import PretrainConfig
from fastmae.errors import UserError
from fastmae.train.average import start_average
from fastmae.train.parallel import DistContext, choose_parallelism
from fastmae.train.precision import Precision
from fastmae.train.pretrain import pretrain

# 9 steps of 8 images.
SHORT = dict(epochs=1, warmup_epochs=0.5, checkpoint_freq=2, keep=9, ema=0.9)
WAYS = ["2-ddp", "2-fsdp", "2-fsdp-accumulated", "1-fsdp", "1-fsdp-hsdp"]
WAYS += ["2-ddp-accumulated", "4-ddp", "4-fsdp", "4-hsdp"][: soak(0, 4)]
KILLED = {**SHORT, "parallel": "fsdp", "save_freq": 1, "epochs": soak(1, 2)}
ROUNDED = ["2-ddp-bf16", "2-fsdp-bf16"][: soak(1, 2)]


def torchrun(words: list[str]) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *words[1:]]


def tiny(data_path: str, ranks: int, output_dir: Path, **changes: Any) -> PretrainConfig:
    """The training that is the same whatever the ranks are."""
    return small_run(data_path, output_dir, **{**SHORT, "batch_size": 8 // ranks, **changes})


def copy_of_run(source: Path, target: Path, step: int) -> Path:
    """A run folder as it was when the checkpoint of ``step`` was the newest."""
    shutil.copytree(source, target)
    for path in (target / "checkpoints").iterdir():
        if path.name > f"step-{step:08d}":
            shutil.rmtree(path)
    return target


def by_name(data_path: str, folder: Path, way: str) -> PretrainConfig:
    """The training that a way is named after."""
    ranks, parallel, *others = way.split("-")
    changes: dict[str, Any] = dict(parallel=parallel)
    changes |= dict(batch_size=4 // int(ranks), accum_iter=2) if "accumulated" in others else {}
    changes |= dict(shard_size=2) if parallel == "hsdp" else {}
    changes |= dict(reduce="bf16") if "bf16" in others else {}
    return tiny(data_path, int(ranks), folder / way, **changes)


def assert_same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """But for the bias of keys: its gradient is zero but for rounding, which AdamW takes for a direction."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        parts = tensor.chunk(3), other[name].chunk(3)
        for i in (0, 2) if name.endswith("qkv.bias") else (0, 1, 2)[: len(parts[0])]:
            torch.testing.assert_close(parts[0][i], parts[1][i], rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def runs(blobs, tmp_path_factory) -> Path:
    """The same training by 1, 2 and 4 ranks in every way, and one that went on in another way each time."""
    folder = tmp_path_factory.mktemp("runs")
    longer = folder / "two epochs"
    assert pretrain(small_run(blobs, longer, **{**SHORT, "epochs": 2}, save_freq=1)) == 0
    assert pretrain(small_run(blobs, folder / "one", **SHORT)) == 0
    assert pretrain(small_run(blobs, folder / "one-fsdp", **SHORT, parallel="fsdp", async_save=False)) == 0
    copy_of_run(folder / "one", folder / "1-fsdp", 2)
    run_ranks(
        2,
        tiny(blobs, 2, folder / "2-fsdp", parallel="fsdp", probe=True),
        tiny(blobs, 2, folder / "2-from-pth", parallel="fsdp", resume=str(longer / "checkpoint-0.pth"), epochs=2),
        tiny(blobs, 2, folder / "1-fsdp", parallel="fsdp", resume="auto"),
        *(by_name(blobs, folder, way) for way in [*WAYS, *ROUNDED] if way.startswith("2-") and way != "2-fsdp"),
    )
    copy_of_run(folder / "1-fsdp", folder / "1-fsdp-hsdp", 4)
    run_ranks(
        4,
        tiny(blobs, 4, folder / "1-fsdp-hsdp", parallel="hsdp", shard_size=2, resume="auto"),
        *(by_name(blobs, folder, way) for way in WAYS if way.startswith("4-")),
    )
    copy_of_run(folder / "1-fsdp-hsdp", folder / "1-fsdp-hsdp-one", 6)
    assert pretrain(small_run(blobs, folder / "1-fsdp-hsdp-one", **SHORT, resume="auto")) == 0
    return folder


def test_one_rank_is_by_itself_whatever_was_asked_for(runs):
    assert metrics(runs / "one-fsdp") == metrics(runs / "one")
    start = json.loads((runs / "one-fsdp" / "environment.jsonl").read_text())
    assert start["backends"]["parallel"] == "none (one rank)"


@pytest.mark.parametrize("way", WAYS)
def test_every_way_has_the_losses_of_one_rank(runs, way):
    np.testing.assert_allclose(metrics(runs / way), metrics(runs / "one"), rtol=1e-5)


@pytest.mark.parametrize("way", ROUNDED)
def test_gradients_that_travel_in_bf16_are_rounded_and_little_else_changes(runs, way):
    found, exact = metrics(runs / way), metrics(runs / way.removesuffix("-bf16"))
    assert found != exact
    np.testing.assert_allclose(found, exact, rtol=1e-3)


def test_a_run_goes_on_with_other_ranks_that_share_weights_in_another_way(runs):
    """One rank for 2 steps, FSDP on 2 for 2, HSDP on 2 × 2 for 2, one rank for 3."""
    chain, undisturbed = runs / "1-fsdp-hsdp-one", runs / "one"
    starts = [json.loads(line) for line in (chain / "environment.jsonl").read_text().splitlines()]
    assert [start["ranks"] for start in starts] == [1, 2, 4, 1]
    files = [len(list((chain / "checkpoints" / f"step-{step:08d}").glob("*.safetensors"))) for step in (2, 4, 6, 9)]
    assert files == [1, 2, 4, 1]
    np.testing.assert_allclose(metrics(chain), metrics(undisturbed), rtol=1e-6)
    assert_same_weights(load_model(str(chain)).state_dict(), load_model(str(undisturbed)).state_dict())


def test_the_average_goes_on_in_pieces_and_is_written_whole(runs):
    undisturbed = load_model(str(runs / "one"))
    expected = start_average(undisturbed, find_checkpoint(runs / "one").path)
    weights = undisturbed.state_dict()
    assert max((mean - weights[name]).abs().max() for name, mean in expected.items()) > 5e-5
    for way in ("2-fsdp", "1-fsdp-hsdp-one"):
        assert_same_weights(start_average(undisturbed, find_checkpoint(runs / way).path), expected)
        written = read_official(runs / way / "checkpoint-0-ema.pth").model
        assert_same_weights({name: written[name] for name in expected}, expected)


def test_a_checkpoint_of_several_ranks_is_read_by_one(runs):
    for way in ("2-ddp", "2-fsdp", "1-fsdp-hsdp"):
        assert_same_weights(load_model(str(runs / way)).state_dict(), load_model(str(runs / "one")).state_dict())


def test_the_published_file_and_the_pictures_of_weights_in_pieces_are_whole(runs):
    whole, gathered = (read_official(runs / way / "checkpoint-0.pth") for way in ("one", "2-fsdp"))
    assert_same_weights(gathered.model, whole.model)
    assert gathered.optimizer["state"].keys() == whole.optimizer["state"].keys()
    for index, moments in whole.optimizer["state"].items():
        for name, tensor in moments.items():
            torch.testing.assert_close(gathered.optimizer["state"][index][name], tensor, rtol=1e-4, atol=1e-7)
    assert (runs / "2-fsdp" / "reconstructions" / "epoch-0000.png").stat().st_size > 0
    probed = json.loads((runs / "2-fsdp" / "probe.json").read_text())
    assert probed["before"]["train"] == probed["after"]["train"] == 72


def test_the_published_file_resumes_in_pieces(runs):
    np.testing.assert_allclose(metrics(runs / "2-from-pth"), metrics(runs / "two epochs")[9:], rtol=1e-6)


def test_copies_must_come_out_even():
    context = DistContext(0, 4, torch.device("cpu"))
    assert choose_parallelism("hsdp", "fp32", 2, context).reason == "2 copies of 2 ranks each, gradients in fp32"
    bf16 = Precision("bf16", "asked for", torch.bfloat16)
    in_bf16 = "gradients in fp32, weights of products in bf16"
    assert choose_parallelism("hsdp", "fp32", 2, context, bf16).reason == f"2 copies of 2 ranks each, {in_bf16}"
    assert choose_parallelism("fsdp", "fp32", None, context, bf16).reason == f"4 ranks, {in_bf16}"
    assert choose_parallelism("ddp", "fp32", None, context, bf16).gather == torch.float32
    with pytest.raises(UserError, match=r"^shard_size=3: must divide the 4 ranks"):
        choose_parallelism("hsdp", "fp32", 3, context)


@pytest.fixture(scope="module")
def to_be_killed(blobs, tmp_path_factory, request) -> Path:
    """What runs that are killed must come to."""
    if KILLED["epochs"] == SHORT["epochs"]:
        return request.getfixturevalue("runs") / "2-fsdp"
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    run_ranks(2, tiny(blobs, 2, folder, **KILLED))
    return folder


def newest_step(run: Path) -> int:
    """Of the checkpoints, all of which must be intact; 0 if there is none."""
    return max((int(read_manifest(path)["step"]) for path in (run / "checkpoints").glob("step-*")), default=0)


def wait_for(rank: Rank, what: str, times: int) -> None:
    """Until the rank has begun so many steps or saves, or has ended."""
    deadline = time.monotonic() + 300
    while rank.process.is_alive() and sum(line.startswith(f"{what} begins") for line in rank.journal()) < times:
        assert time.monotonic() < deadline
        time.sleep(0.002)


def is_in(what: str, rank: Rank, run: Path) -> bool:
    """Whether a rank is, or was when it was killed, in a step; or in a save, from opening the folder to renaming it."""
    last = next((line.split() for line in reversed(rank.journal()) if line.startswith(what)), ["", ""])
    if last[1] != "begins":
        return False
    return what == "step" or (run / "checkpoints" / f".partial-{last[2]}").exists()


@pytest.mark.timeout(soak(600, 3600))
@pytest.mark.parametrize(
    "instants", [pytest.param("step", marks=pytest.mark.slow), "save", pytest.param("any time", marks=pytest.mark.slow)]
)
def test_killed_at_random_instants_the_run_goes_on_from_an_intact_checkpoint_to_the_same_end(
    blobs, tmp_path, to_be_killed, instants, record_property
):
    """One rank in the middle of a step; one or all in the middle of a save; all at any time, starting included.

    What missed is checked as well, but does not count. A run that is through is begun once more.
    """
    dice, run = random.Random(), tmp_path / "run"
    config = tiny(blobs, 2, run, **{**KILLED, "checkpoint_freq": 1, "keep": 2}, resume="auto")
    starts = hits = in_saves = kills = 0
    while hits < soak(1, 20):
        starts, before = starts + 1, newest_step(run)
        assert starts <= 10 * (hits + 3), "hardly any kill hit what it was meant for"
        ranks = start_ranks(2, config, slow_saves=instants == "save")
        victims = ranks if instants == "any time" or (instants == "save" and hits % 2) else [dice.choice(ranks)]
        if instants == "any time":
            wait_for(victims[0], "step", dice.randint(0, 5))
            time.sleep(dice.uniform(0, 0.3))
        else:
            wait_for(victims[0], instants, dice.randint(1, 5))
            while instants == "save" and victims[0].process.is_alive() and not is_in("save", victims[0], run):
                time.sleep(0.002)
            time.sleep(dice.uniform(0, 0.02 if instants == "step" else 8 * MOMENT))
        for victim in victims:
            victim.process.kill()
        statuses = [rank.finish()[0] for rank in ranks]
        assert None not in statuses, "a rank whose companion is gone must end as well"
        killed = all(victim.process.exitcode == -signal.SIGKILL for victim in victims)
        kills += sum(victim.process.exitcode == -signal.SIGKILL for victim in victims)
        hits += killed and (instants == "any time" or any(is_in(instants, victim, run) for victim in victims))
        in_saves += killed and any(is_in("save", victim, run) for victim in victims)
        assert newest_step(run) >= before
        if ranks[0].journal():
            began = f"step-{before:08d}, after step {before}\n" in ranks[0].said()
            assert began == (before > 0)
        if statuses == [0, 0]:
            assert_same_run(run, to_be_killed)
            shutil.rmtree(run)
    run_ranks(2, config)
    assert_same_run(run, to_be_killed)
    assert not list(run.rglob("*partial*"))
    record_property("kills of a rank or of both", kills)
    record_property("in the middle of a step, of a save or at any time, as meant", hits)
    record_property("in the middle of a save", in_saves)
    print(f"{starts} starts, {hits} kills that hit ({instants}), {in_saves} in the middle of a save")


def test_a_full_disk_is_told_each_time_and_is_an_error_after_the_last_step(blobs, tmp_path, runs):
    intact = copy_of_run(runs / "2-fsdp", tmp_path / "run", 6)
    ranks = start_ranks(2, tiny(blobs, 2, intact, parallel="fsdp", resume="auto"), file_size=2 * 2**20)
    (first, said), (second, also_said) = (rank.finish() for rank in ranks)
    assert (first, second) == (1, 1), said
    assert said.count("the run goes on and tries again") == 2, said  # after steps 8 and 9
    assert said.count("step-00000009 could not be saved") == also_said.count("step-00000009 could not be saved") + 1
    assert metrics(intact) == metrics(runs / "2-fsdp")
    assert find_checkpoint(intact).path == intact / "checkpoints" / "step-00000006"
    assert not list(intact.rglob("*partial*"))


def test_a_signal_to_one_rank_stops_all_at_the_same_step(blobs, tmp_path):
    words = torchrun(command(blobs, tmp_path / "run", batch_size=4, epochs=200))
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    process = subprocess.Popen(words, cwd="/", env=environment(), **pipes)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "run" / "checkpoints").glob("step-*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    os.kill(max(int(pid) for pid in children.split()), signal.SIGUSR1)
    out, _ = process.communicate(timeout=120)
    assert "after step" in out
    step = metrics(tmp_path / "run")[-1][0]
    assert (tmp_path / "run" / "checkpoints" / f"step-{step:08d}").is_dir()
    assert process.returncode != 0, "a rank that stops early must not look finished"


# --- weights that travel in bf16 --------------------------------------------------------------------------------------

GATHERING = """
import sys, torch, fastmae
import torch.distributed as dist
from torch import nn
from fastmae.model.weight_copies import WeightCopies
from fastmae.train import parallel
from fastmae.train.optim import make_optimizer
from fastmae.train.precision import Precision
from fastmae.train.step import TrainingLoss, prepare, train_step
kind, precision, gather, compiling = sys.argv[1:]
context = parallel.start("cpu")
precision = Precision(precision, "", torch.bfloat16 if precision == "bf16" else None)
sent = []

def counted(send):
    def send_counted(output_tensor, *args, **rest):
        sent.append(output_tensor.nbytes)
        return send(output_tensor, *args, **rest)
    return send_counted

for name in ("all_gather_single", "all_gather_into_tensor"):  # of torch 2.13 and 2.11
    if hasattr(dist, name):
        setattr(dist, name, counted(getattr(dist, name)))
compile_anything = torch.compile
torch.compile = lambda *args, **rest: compile_anything(*args, **rest, backend="aot_eager")
torch.manual_seed(0)
sizes = dict(embed_dim=36, num_heads=3, depth=2, decoder_embed_dim=28, decoder_num_heads=2, decoder_depth=2)
model = fastmae.mae_vit_tiny_patch4(img_size=16, **sizes)
images = torch.randint(0, 256, (8, 16, 16, 3), dtype=torch.uint8)
ids = fastmae.ops.random_masking(torch.arange(8), 0, 16)
mine = slice(context.rank * 8 // context.size, (context.rank + 1) * 8 // context.size)
loss_of = TrainingLoss(model, 0.75)
prepare(loss_of, "selective", compiling)
choice = parallel.choose_parallelism(kind, "fp32", None, context, precision if gather == "bf16" else None)
products = [part.weight.numel() for part in model.modules() if isinstance(part, nn.Linear | nn.Conv2d)]
others = sum(p.numel() for p in model.parameters()) - sum(products)
loss_of = parallel.parallelize(loss_of, context, choice)
optimizer = make_optimizer(model, 1e-3, 0.05)
for step in range(4):
    micro = [(images[mine], ids[mine]), (images[mine] // 2, ids[mine])]
    autocast = precision.context(context.device)
    copies = WeightCopies(model) if precision.autocast else None
    result = train_step(loss_of, optimizer, micro, 2, 1e-3, autocast, 0.5, context.mean, copies=copies)
    print("seen", context.mean(result.loss).item(), result.grad_norm.item())
    assert all(p.dtype == torch.float32 for p in model.parameters())
print("sent", sum(sent), "products", sum(products), "others", others)
parallel.stop(context)
"""


def gathered(file: Path, *words: str) -> tuple[list[float], int, int, int]:
    """Losses and norms of four steps, the bytes that one rank received, and how many numbers weights have."""
    file.write_text(GATHERING)
    started = start_ranks(2, partial(run_script, file, *words))
    ended = [rank.finish() for rank in started]
    assert [status for status, _ in ended] == [0, 0], ended
    lines = [line.split() for line in started[0].said().splitlines()]
    (last,) = [line for line in lines if line[0] == "sent"]
    seen = [float(word) for line in lines if line[0] == "seen" for word in line[1:]]
    return seen, int(last[1]), int(last[3]), int(last[5])


@pytest.mark.slow
def test_weights_that_travel_in_bf16_change_no_bit(tmp_path):
    """As autocast rounds them anyway, and norms, biases and positions travel as they are: half the bytes."""
    file = tmp_path / "ranks.py"
    rounded, bytes_rounded, products, others = gathered(file, "fsdp", "bf16", "bf16", "off")
    whole, bytes_whole, _, _ = gathered(file, "fsdp", "bf16", "fp32", "off")
    assert rounded == whole
    assert others > 0
    assert 0.5 < bytes_rounded / bytes_whole < (0.5 * products + others) / (products + others) + 0.02
    copies, _, _, _ = gathered(file, "ddp", "bf16", "bf16", "off")
    assert rounded == pytest.approx(copies, rel=1e-4)


@pytest.mark.slow
def test_weights_that_travel_in_bf16_compile_too(tmp_path):
    """And a run in fp32 gathers what it did before."""
    file = tmp_path / "ranks.py"
    eager, _, _, _ = gathered(file, "fsdp", "bf16", "bf16", "off")
    compiled, _, _, _ = gathered(file, "fsdp", "bf16", "bf16", "block")
    assert compiled == pytest.approx(eager, rel=1e-3)
    fp32, bytes_fp32, _, _ = gathered(file, "fsdp", "fp32", "bf16", "off")
    _, bytes_whole, _, _ = gathered(file, "fsdp", "bf16", "fp32", "off")
    copies, _, _, _ = gathered(file, "ddp", "fp32", "fp32", "off")
    assert bytes_fp32 == bytes_whole
    assert fp32 == pytest.approx(copies, rel=1e-5)
