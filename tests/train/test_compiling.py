"""--compile auto: what it comes to, that it never ends a run, and that restarts find what was compiled."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import metrics, small_run
from ranks import run_script, start_ranks
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir

import fastmae
from fastmae.config import FinetuneConfig, PretrainConfig, resolve, resolve_finetune, training
from fastmae.errors import SettingError
from fastmae.facts import DataFacts
from fastmae.model.weight_copies import WeightCopies
from fastmae.train import compiling, settings
from fastmae.train.compiling import CACHE, keep_compiled_code, why_it_fails
from fastmae.train.optim import make_optimizer
from fastmae.train.precision import Precision
from fastmae.train.pretrain import pretrain
from fastmae.train.step import TrainingLoss, prepare, train_step

PHOTOS = DataFacts(kind="folder", channels=3, size=None, labelled=True, length=64_000)
MACHINE = dict(mean=(0.5,) * 3, std=(0.2,) * 3, ranks=1, num_workers=3)
ENCODER = dict(model="m", width=768, img_size=(224, 224), patch_size=(16, 16), nb_classes=5)


def mode_of(on_gpu: bool, **flags) -> str:
    """Of a pretraining with 1000 steps of 64 images an epoch."""
    return resolve(PretrainConfig(**flags), PHOTOS, **MACHINE, on_gpu=on_gpu).compile


def test_a_long_run_on_a_gpu_compiles_its_blocks():
    assert mode_of(True) == mode_of(True, epochs=2) == mode_of(True, epochs=1, repeated_masks=2) == "block"
    assert mode_of(True, epochs=1) == mode_of(True, epochs=3, batch_size=128) == mode_of(False) == "off"
    for asked in ("off", "block", "model"):
        assert mode_of(True, compile=asked) == mode_of(False, compile=asked, epochs=1) == asked
    assert mode_of(True, float8=True, epochs=1, precision="bf16") == "block"
    for epochs, mode in ((2, "block"), (1, "off")):
        flags = FinetuneConfig(data_path="photos", epochs=epochs, warmup_epochs=0)
        assert resolve_finetune(flags, PHOTOS, **ENCODER, **MACHINE, on_gpu=True).compile == mode


@pytest.mark.parametrize(("before", "asked", "mode"), [("off", "auto", "off"), ("model", "auto", "model")])
def test_a_run_that_goes_on_keeps_its_mode(monkeypatch, before, asked, mode):
    """A run of version 0.1 on a GPU was not compiled, and never is unless somebody asks for it."""
    monkeypatch.setattr(settings, "peek", lambda *_: {"settings": {"compile": before}})
    by_default = partial(resolve, facts=PHOTOS, **MACHINE, on_gpu=True)
    config, lines = settings.resolve_as_before(PretrainConfig(compile=asked, resume="auto"), by_default)
    assert config.compile == mode
    assert lines[0] == f"as before       compile {mode} (from the checkpoint, as no flag gives another)"
    config, _ = settings.resolve_as_before(PretrainConfig(compile="block", resume="auto"), by_default)
    assert config.compile == "block"


@pytest.fixture
def as_on_a_gpu(monkeypatch, tmp_path):
    """Short runs on this CPU are compiled by default, as long ones on a GPU are."""
    monkeypatch.setattr(training, "COMPILED_STEPS", 0)
    monkeypatch.setattr(compiling, "TRIED_ON", ("cpu",))
    choose = training.chosen_compile
    for module in (sys.modules["fastmae.config.pretrain"], sys.modules["fastmae.config.finetune"]):
        monkeypatch.setattr(module, "chosen_compile", lambda config, steps, *_, **rest: choose(config, steps, True))
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def with_backend(monkeypatch, backend):
    compile_anything = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **rest: compile_anything(*args, **rest, backend=backend))


def start_of(run: Path) -> dict:
    return json.loads((run / "environment.jsonl").read_text().splitlines()[0])["backends"]


def test_a_default_that_fails_is_a_line_and_the_run_goes_on(as_on_a_gpu, blobs, tmp_path, monkeypatch, capsys):
    """With the bits of a run without it; later starts do not try again. What was asked for ends the run."""

    def broken(*_):
        raise RuntimeError("there is no ptxas\nand much more")

    assert pretrain(small_run(blobs, tmp_path / "eager", epochs=1, compile="off")) == 0
    with_backend(monkeypatch, broken)
    capsys.readouterr()
    assert pretrain(small_run(blobs, tmp_path / "run", epochs=1)) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("compile ")]
    assert "off (torch.compile failed: " in line
    assert "there is no ptxas" in line
    assert line.endswith("; the run is slower so)")
    assert metrics(tmp_path / "run") == metrics(tmp_path / "eager")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["compile"] == "off"

    assert pretrain(small_run(blobs, tmp_path / "run", epochs=2, resume="auto")) == 0
    assert "as before       compile off (from the checkpoint" in capsys.readouterr().out
    with pytest.raises(SettingError, match=r"^compile: torch.compile failed .*there is no ptxas"):
        pretrain(small_run(blobs, tmp_path / "asked", epochs=1, compile="block"))


def test_a_default_that_works_is_stored_and_kept(as_on_a_gpu, blobs, tmp_path, monkeypatch, capsys):
    """A run that goes on elsewhere has the mode that it began with."""
    with_backend(monkeypatch, "aot_eager")
    assert pretrain(small_run(blobs, tmp_path / "run", epochs=1)) == 0
    assert start_of(tmp_path / "run")["compile"] == "block (as it began)"
    assert json.loads((tmp_path / "run" / "config.json").read_text())["compile"] == "block"
    monkeypatch.setattr(training, "COMPILED_STEPS", 10**9)
    capsys.readouterr()
    assert pretrain(small_run(blobs, tmp_path / "run", epochs=2, resume="auto")) == 0
    assert "as before       compile block (from the checkpoint" in capsys.readouterr().out


def small_loss() -> TrainingLoss:
    torch.manual_seed(0)
    sizes = dict(in_chans=1, embed_dim=32, depth=1, num_heads=2)
    sizes |= dict(decoder_embed_dim=32, decoder_depth=2, decoder_num_heads=2)
    return TrainingLoss(fastmae.mae_vit_tiny_patch4(img_size=16, **sizes), 0.75)


def small_batch() -> tuple[torch.Tensor, ...]:
    return torch.zeros(2, 16, 16, 1, dtype=torch.uint8), fastmae.ops.random_masking(torch.arange(2), 0, 16)


def test_trying_leaves_no_trace(monkeypatch):
    """Neither gradients nor other random numbers. If another rank fails, nothing is compiled on this one either."""
    with_backend(monkeypatch, "aot_eager")
    torch.compiler.reset()
    loss_of = small_loss()
    before = {name: value.clone() for name, value in loss_of.state_dict().items()}
    prepare(loss_of, "none", "block")
    draws = torch.get_rng_state()
    fp32 = Precision("fp32", "", None)

    def compiled() -> list[bool]:
        return [part._compiled_call_impl is not None for part in (*loss_of.model.blocks, *loss_of.model.decoder_blocks)]

    assert why_it_fails(loss_of, small_batch(), fp32, lambda one: [one]) is None
    assert all(compiled())
    problem = why_it_fails(loss_of, small_batch(), fp32, lambda one: [one, None, "no ptxas"])
    assert problem == "torch.compile failed on rank 2: no ptxas"
    assert not any(compiled())
    assert torch.equal(torch.get_rng_state(), draws)
    assert all(parameter.grad is None for parameter in loss_of.parameters())
    assert all(torch.equal(value, before[name]) for name, value in loss_of.state_dict().items())
    torch.compiler.reset()


def test_compiled_code_is_kept_where_a_restart_finds_it(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(CACHE, "")
    keep_compiled_code()
    assert os.environ[CACHE] == str(tmp_path / "fastmae" / "compiled")
    monkeypatch.setenv(CACHE, "/elsewhere")
    keep_compiled_code()
    assert os.environ[CACHE] == "/elsewhere"
    monkeypatch.delenv(CACHE)
    cache_dir()  # as torch does when its compiler is loaded: nobody has named the folder that it writes there
    assert os.environ[CACHE] == default_cache_dir()
    keep_compiled_code()
    assert os.environ[CACHE] == str(tmp_path / "fastmae" / "compiled")

    monkeypatch.setenv(CACHE, "")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    keep_compiled_code()
    assert os.environ[CACHE] == ""
    assert "compiled code is not kept for the next start" in caplog.text


COMPILED_TWICE = """
import sys, torch
sys.path[:0] = {paths}
from torch._dynamo.utils import counters
from fastmae.train.step import prepare
from fastmae.train.compiling import keep_compiled_code
from test_compiling import small_batch, small_loss
keep_compiled_code()
loss_of = small_loss()
prepare(loss_of, "selective", "block")
loss_of(*small_batch()).backward()
print(counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"],
      counters["aot_autograd"]["autograd_cache_hit"], counters["aot_autograd"]["autograd_cache_miss"])
"""


@pytest.mark.slow
def test_a_restart_compiles_nothing_again(tmp_path):
    """Generated code, forward and backward, by the counters of torch."""
    script = COMPILED_TWICE.format(paths=[str(Path(__file__).parent), str(Path(__file__).parents[1])])
    seen = []
    environment = {name: value for name, value in os.environ.items() if name != CACHE}
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            env=environment | {"XDG_CACHE_HOME": str(tmp_path)},
        )
        assert done.returncode == 0, done.stderr
        seen.append([int(word) for word in done.stdout.split()])
    print(seen)
    (_, missed, _, autograd_missed), (again, missed_again, autograd_again, autograd_missed_again) = seen
    assert missed + autograd_missed > 0
    assert missed_again == autograd_missed_again == 0
    assert again + autograd_again > 0


# --- several ranks ----------------------------------------------------------------------------------------------------

RANKS = """
import sys, torch, fastmae
from torch._dynamo.testing import CompileCounterWithBackend
from fastmae.train import parallel
from fastmae.train.compiling import why_it_fails
from fastmae.train.optim import make_optimizer
from fastmae.train.precision import Precision
from fastmae.train.step import TrainingLoss, prepare, train_step
kind, compiling, checkpointing, failing = sys.argv[1:]
context = parallel.start("cpu")
counter, compile_anything = CompileCounterWithBackend("aot_eager"), torch.compile

def backend(*args):
    if context.rank == int(failing):
        raise RuntimeError("there is no ptxas")
    return counter(*args)

torch.compile = lambda *args, **rest: compile_anything(*args, **rest, backend=backend)
torch.manual_seed(0)
sizes = dict(embed_dim=256, num_heads=4, depth=2, decoder_embed_dim=256, decoder_num_heads=4, decoder_depth=2)
model = fastmae.mae_vit_tiny_patch4(img_size=16, **sizes)
images = torch.randint(0, 256, (8, 16, 16, 3), dtype=torch.uint8)
ids = fastmae.ops.random_masking(torch.arange(8), 0, 16)
mine = slice(context.rank * 8 // context.size, (context.rank + 1) * 8 // context.size)
loss_of = TrainingLoss(model, 0.75)
prepare(loss_of, checkpointing, compiling)
autocast = torch.autocast("cpu", enabled=False)
if int(failing) >= 0:
    print(why_it_fails(loss_of, (images[mine], ids[mine]), Precision("fp32", "", None), context.gather))
choice = parallel.choose_parallelism(kind, "fp32", None, context)
if kind == "ddp" and context.size > 1:  # buckets below the size of a block, as those of ViT-L are
    ddp = parallel.DistributedDataParallel
    parallel.DistributedDataParallel = lambda *args, **rest: ddp(*args, **rest, bucket_cap_mb=1)
loss_of = parallel.parallelize(loss_of, context, choice)
optimizer = make_optimizer(model, 1e-3, 0.05)
for step in range(3):
    micro = [(images[mine], ids[mine]), (images[mine] // 2, ids[mine])]
    result = train_step(loss_of, optimizer, micro, 2, 1e-3, autocast, 0.5, context.mean)
    print("seen", context.mean(result.loss).item(), result.grad_norm.item())
print("graphs", counter.frame_count)
parallel.stop(context)
"""


def seen_by_ranks(file: Path, ranks: int, *words: str) -> list[list[str]]:
    file.write_text(RANKS)
    started = start_ranks(ranks, partial(run_script, file, *words))
    ended = [rank.finish() for rank in started]
    assert [status for status, _ in ended] == [0] * ranks, ended
    return [rank.said().splitlines() for rank in started]


def losses(lines: list[str]) -> list[float]:
    return [float(word) for line in lines if line.startswith("seen") for word in line.split()[1:]]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_ranks_compile_whole_blocks_and_see_the_losses_of_one(tmp_path, kind):
    """DDP would cut the graph of each block at the ends of its buckets, which are smaller here than a block."""
    file = tmp_path / "ranks.py"
    (alone,) = seen_by_ranks(file, 1, "ddp", "off", "none", "-1")
    modes = ["block", "model"] if kind == "ddp" else ["block"]
    for mode in modes:
        for checkpointing in ("none", "selective", "full") if mode == "block" else ("selective",):
            for lines in seen_by_ranks(file, 2, kind, mode, checkpointing, "-1"):
                assert losses(lines) == pytest.approx(losses(alone), rel=1e-5), (mode, checkpointing)
                assert mode != "block" or lines[-1] == "graphs 3", (checkpointing, lines[-1])


@pytest.mark.slow
def test_one_rank_that_cannot_compile_decides_for_all(tmp_path):
    file = tmp_path / "ranks.py"
    (alone,) = seen_by_ranks(file, 1, "ddp", "off", "none", "-1")
    for lines in seen_by_ranks(file, 2, "ddp", "block", "none", "1"):
        assert lines[0].startswith("torch.compile failed on rank 1: ")
        assert "there is no ptxas" in lines[0]
        assert losses(lines) == pytest.approx(losses(alone), rel=1e-5)


def test_trying_in_bf16_compiles_what_the_steps_use(monkeypatch):
    """Steps lend the layers copies of their weights, with which other code is compiled than without."""
    counter = CompileCounterWithBackend("aot_eager")
    with_backend(monkeypatch, counter)
    torch.compiler.reset()
    loss_of, bf16 = small_loss(), Precision("bf16", "", torch.bfloat16)
    prepare(loss_of, "none", "block")
    assert why_it_fails(loss_of, small_batch(), bf16, lambda one: [one]) is None
    graphs = counter.frame_count
    autocast, optimizer = bf16.context(torch.device("cpu")), make_optimizer(loss_of, 1e-3, 0.05)
    train_step(loss_of, optimizer, [small_batch()], 1, 1e-3, autocast, copies=WeightCopies(loss_of))
    assert counter.frame_count == graphs == 3
    torch.compiler.reset()
