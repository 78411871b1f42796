"""The switches of a step: what they must not change, what they save, and that nobody waits for the device."""

import copy
import shutil
import sys
import threading
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import final_state, metrics, run, small_run
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastmae
from fastmae.errors import UserError
from fastmae.train import pretrain as story
from fastmae.train.average import start_average, update_average
from fastmae.train.checkpoint import load_model
from fastmae.train.metrics import StepLog
from fastmae.train.optim import make_optimizer
from fastmae.train.precision import Precision, choose_precision
from fastmae.train.step import TrainingLoss, prepare, train_step

SMALL = dict(img_size=16, in_chans=1, embed_dim=32, depth=3, num_heads=2)
SMALL |= dict(decoder_embed_dim=24, decoder_depth=2, decoder_num_heads=2)
N = 6


def small_model():
    torch.manual_seed(0)
    return fastmae.mae_vit_tiny_patch4(**SMALL)


def batch(seed=0):
    images = torch.randint(0, 256, (N, 16, 16, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return images, fastmae.ops.random_masking(torch.arange(N), seed, 16)


def autocast(bf16=False):
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16)


def loss_and_gradients(checkpointing="none", compiling="off", bf16=False, residual=False):
    model = small_model()
    model.autocast_residual = residual
    loss_of = TrainingLoss(model, 0.75)
    prepare(loss_of, checkpointing, compiling)
    assert model.state_dict().keys() == small_model().state_dict().keys()
    with autocast(bf16):
        loss = loss_of(*batch())
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def assert_same_bits(got, expected):
    assert torch.equal(got[0], expected[0])
    assert [name for name, gradient in expected[1].items() if not torch.equal(got[1][name], gradient)] == []


# --- precision --------------------------------------------------------------------------------------------------------


def test_tf32_lasts_as_long_as_the_run():
    before = torch.get_float32_matmul_precision()
    with Precision("tf32", "", None).products():
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before
    with Precision("fp32", "", None).products():
        assert torch.get_float32_matmul_precision() == before


def test_tf32_on_a_cpu_is_refused():
    with pytest.raises(UserError, match=r"--precision tf32: a CPU has no TensorFloat-32; use fp32"):
        choose_precision("tf32", torch.device("cpu"))


def test_a_residual_in_bf16_is_what_blocks_add_to():
    """Off, autocast leaves it in float32. On, the loss moves by less than bf16 products alone move it from float32."""
    seen = []
    hook = nn.modules.module.register_module_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].dtype) if isinstance(module, fastmae.model.vit.Block) else None
    )
    try:
        losses = {residual: loss_and_gradients(bf16=True, residual=residual)[0] for residual in (False, True)}
        exact = loss_and_gradients(residual=True)[0]
    finally:
        hook.remove()
    assert seen == [torch.float32] * 5 + [torch.bfloat16] * 5 + [torch.float32] * 5
    assert losses[False] != losses[True]
    assert abs(losses[True] / losses[False] - 1) < 2e-3
    assert torch.equal(exact, loss_and_gradients()[0]), "outside autocast the tokens are float32 all the same"


def test_a_residual_in_bf16_needs_bf16(blobs, tmp_path):
    with pytest.raises(UserError, match="--residual bf16: goes with --precision bf16, not fp32"):
        story.pretrain(small_run(blobs, tmp_path, precision="fp32", residual="bf16"))


# --- checkpointing ----------------------------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Counts operations, and the bytes of what they made that is alive."""

    def __init__(self):
        super().__init__()
        self.count, self.made = Counter(), {}

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        self.count[str(operation).split(".")[1]] += 1
        out = operation(*arguments, **(keywords or {}))
        given = {tensor.untyped_storage()._cdata for tensor in tree_leaves(arguments) if torch.is_tensor(tensor)}
        for tensor in tree_leaves(out):
            if torch.is_tensor(tensor) and tensor.untyped_storage()._cdata not in given:
                storage = tensor.untyped_storage()
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    def alive(self):
        return sum(size for storage, size in self.made.values() if not storage.expired())


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_what_is_computed_again_has_the_same_bits(checkpointing, bf16):
    assert_same_bits(loss_and_gradients(checkpointing, bf16=bf16), loss_and_gradients(bf16=bf16))


def test_checkpointing_keeps_less_and_computes_again_what_it_says():
    alive, again = {}, {}
    for checkpointing in ("none", "selective", "full"):
        loss_of = TrainingLoss(small_model(), 0.75)
        prepare(loss_of, checkpointing, "off")
        with Operations() as forward:
            loss = loss_of(*batch())
            alive[checkpointing] = forward.alive()
        with Operations() as backward:
            loss.backward()
        again[checkpointing] = [backward.count[name] for name in ("addmm", "gelu", "native_layer_norm")]
    assert alive["full"] < alive["selective"] < alive["none"]
    assert again["none"] == [0, 0, 0]
    assert again["selective"] == [0, 5, 10]
    # Of qkv, proj, fc1 and fc2: the last result is needed by nobody. The last block's queries take one of their own.
    assert again["full"] == [15, 5, 10]
    assert forward.count["addmm"] == 5 * 4 + 3


# --- torch.compile ----------------------------------------------------------------------------------------------------


@pytest.fixture
def traced(monkeypatch):
    """torch.compile without code generation, which takes minutes: counts the graphs."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter, compile_anything = CompileCounterWithBackend("aot_eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **rest: compile_anything(*args, **rest, backend=counter))
    torch.compiler.reset()
    yield counter
    torch.compiler.reset()


@pytest.mark.parametrize(("compiling", "graphs"), [("block", 3), ("model", 1)])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_compiled_is_the_same_and_compiled_once(traced, checkpointing, compiling, graphs):
    """Blocks of the encoder share a graph, those of the decoder another; its last one has its own."""
    loss, gradients = loss_and_gradients()
    for _ in range(2):
        got = loss_and_gradients(checkpointing, compiling)
        assert traced.frame_count == graphs
        torch.testing.assert_close(got[0], loss, rtol=1e-6, atol=0)
        for name, gradient in gradients.items():
            assert (got[1][name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, name


def test_a_run_compiles_its_blocks_and_nothing_else(traced, blobs, tmp_path):
    """Probing and pictures have other shapes, and stay eager."""
    config = small_run(blobs, tmp_path / "compiled", epochs=1, compile="block", probe=True)
    assert story.pretrain(config) == 0
    assert traced.frame_count == 3
    assert story.pretrain(small_run(blobs, tmp_path / "eager", epochs=1)) == 0
    assert traced.frame_count == 3
    np.testing.assert_allclose(metrics(tmp_path / "compiled"), metrics(tmp_path / "eager"), rtol=1e-6)


def test_generated_code_gives_the_same_loss(monkeypatch):
    monkeypatch.setitem(SMALL, "depth", 1)
    monkeypatch.setitem(SMALL, "decoder_depth", 1)
    torch.compiler.reset()
    got = loss_and_gradients("selective", "model")[0]
    torch.testing.assert_close(got, loss_and_gradients()[0], rtol=1e-6, atol=0)


def test_without_a_compiler_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("/nowhere/c++",))
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    torch.compiler.reset()
    loss_of = TrainingLoss(small_model(), 0.75)
    prepare(loss_of, "none", "model")
    with pytest.raises(UserError, match=r"--compile: .* C\+\+ compiler .* use --compile off") as refused:
        train_step(loss_of, make_optimizer(loss_of, 1e-3, 0.05), [batch()], 1, 1e-3, autocast())
    assert len(str(refused.value).splitlines()) == 1


# --- the gradient -----------------------------------------------------------------------------------------------------


class Trainer:
    """A model and its optimiser; ``step`` is a train_step of two micro-batches."""

    def __init__(self, loss_of=None):
        self.loss_of = loss_of or TrainingLoss(small_model(), 0.75)
        self.optimizer = make_optimizer(self.loss_of, 1e-3, 0.05)

    def step(self, seed=0, **settings):
        micro = [batch(2 * seed), batch(2 * seed + 1)]
        return train_step(self.loss_of, self.optimizer, micro, 2, 1e-3, autocast(), **settings)

    def state(self):
        """Every weight, moment and step count."""
        tensors = copy.deepcopy(self.loss_of.state_dict())
        for number, state in copy.deepcopy(self.optimizer.state_dict()["state"]).items():
            tensors |= {f"{number}.{name}": tensor for name, tensor in state.items()}
        return tensors

    def gradients(self):
        return [p.grad for p in self.loss_of.parameters() if p.requires_grad]


def assert_same_state(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_a_long_gradient_is_clipped_and_a_short_one_left_alone():
    free, loose, tight = Trainer(), Trainer(), Trainer()
    norm = free.step().grad_norm
    assert torch.equal(loose.step(clip_grad=1.1 * norm.item()).grad_norm, norm)
    assert_same_state(loose.state(), free.state())
    assert torch.equal(tight.step(clip_grad=norm.item() / 3).grad_norm, norm), "the norm before clipping"
    torch.testing.assert_close(norm, torch.cat([g.flatten() for g in free.gradients()]).norm())
    for clipped, gradient in zip(tight.gradients(), free.gradients(), strict=True):
        torch.testing.assert_close(clipped, gradient / 3, rtol=1e-4, atol=1e-9)


class Poisoned(nn.Module):
    """A loss whose ``bad``-th call is NaN, or whose gradient there is infinite while the loss is not."""

    def __init__(self, bad, gradient_only):
        super().__init__()
        self.loss_of, self.calls, self.bad = TrainingLoss(small_model(), 0.75), 0, bad
        self.gradient_only = gradient_only

    def forward(self, images, ids):
        loss, self.calls = self.loss_of(images, ids), self.calls + 1
        if self.calls != self.bad:
            return loss
        if not self.gradient_only:
            return loss * torch.nan
        loss.register_hook(lambda gradient: gradient * torch.inf)
        return loss


@pytest.mark.parametrize("gradient_only", [False, True])
@pytest.mark.parametrize("clip_grad", [None, 0.1])
def test_a_step_that_is_not_finite_changes_nothing(gradient_only, clip_grad):
    """The second micro-batch of the second of four steps is bad; the others go on as if it had not been."""
    poisoned = Trainer(Poisoned(4, gradient_only))
    steps = [poisoned.step(0, clip_grad=clip_grad)]
    before = poisoned.state()
    steps.append(poisoned.step(7, clip_grad=clip_grad))
    assert_same_state(poisoned.state(), before)
    steps += [poisoned.step(seed, clip_grad=clip_grad) for seed in (1, 2)]
    assert [step.skipped.item() for step in steps] == [0.0, 1.0, 0.0, 0.0]
    assert steps[1].loss.isfinite() == gradient_only
    assert not steps[1].grad_norm.isfinite()
    healthy = Trainer(Poisoned(0, gradient_only))
    for seed in (0, 1, 2):
        assert healthy.step(seed, clip_grad=clip_grad).skipped == 0
    assert_same_state(poisoned.state(), healthy.state())


def test_a_healthy_step_is_that_of_the_optimiser_alone():
    ours, plain = Trainer(), Trainer()
    for seed in range(3):
        ours.step(seed)
        plain.optimizer.zero_grad()
        for each in (2 * seed, 2 * seed + 1):
            (plain.loss_of(*batch(each)) / 2).backward()
        plain.optimizer.step()
    assert_same_state(ours.state(), plain.state())


RANKS = """
import sys, torch, fastmae
from fastmae.model.sharding import in_one_piece, local_part
from fastmae.train import parallel
from fastmae.train.average import start_average, update_average
from fastmae.train.optim import make_optimizer
from fastmae.train.step import TrainingLoss, prepare, train_step
kind, compiling = sys.argv[1:]
world = parallel.start("cpu")
compile_anything = torch.compile
torch.compile = lambda *args, **rest: compile_anything(*args, **rest, backend="aot_eager")
torch.manual_seed(0)
model = fastmae.mae_vit_tiny_patch4(img_size=16, depth=2)
images = torch.randint(0, 256, (8, 16, 16, 3), dtype=torch.uint8)
ids = fastmae.ops.random_masking(torch.arange(8), 0, 16)
mine = slice(world.rank * 8 // world.size, (world.rank + 1) * 8 // world.size)
loss_of = TrainingLoss(model, 0.75)
prepare(loss_of, "selective", compiling)
loss_of = parallel.share(loss_of, world, parallel.choose_sharing(kind, "fp32", None, world))
optimizer = make_optimizer(model, 1e-3, 0.05)
average = start_average(model, None)

def step():
    micro = [(images[mine], ids[mine]), (images[mine] // 2, ids[mine])]
    autocast = torch.autocast("cpu", enabled=False)
    stepped = train_step(loss_of, optimizer, micro, 2, 1e-3, autocast, 0.5, world.mean)
    update_average(average, model, 0.9, stepped.skipped)
    return stepped

def state():
    moments = [value for p in model.parameters() for value in optimizer.state.get(p, {}).values()]
    return [local_part(tensor).detach().clone() for tensor in [*model.parameters(), *moments, *average.values()]]

first = step()
before = state()
hook = model.decoder_norm.register_forward_hook(lambda _, __, out: out * torch.nan if world.rank == 1 else out)
bad = step()
hook.remove()
if world.size > 1:
    assert bad.skipped == 1 and bool(bad.loss.isfinite()) == (world.rank == 0), bad
    assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
last = step()
assert first.skipped == last.skipped == 0
numbers = [x.item() for step in (first, last) for x in (step.grad_norm, world.mean(step.loss))]
numbers.append(torch.stack([mean.norm() for mean in in_one_piece(average, True).values()]).norm().item())
if world.is_first:
    print("seen", *numbers, flush=True)
parallel.stop(world)
"""


def test_one_rank_that_is_not_finite_stops_them_all(tmp_path):
    """And norms and losses are those of one rank, which takes the step that the others skip before it compares."""
    file = tmp_path / "ranks.py"
    file.write_text(RANKS)
    seen = {}
    for ranks, kind, compiling in ((1, "ddp", "off"), (2, "ddp", "off"), (2, "fsdp", "block")):
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if ranks == 2 else []
        done = run([sys.executable, *start, str(file), kind, compiling])
        assert done.returncode == 0, done.stderr
        seen[ranks, kind, compiling] = [float(word) for word in done.stdout.split()[1:]]
    print(seen)
    (one, *others) = seen.values()
    for numbers in others:
        assert numbers[:2] == pytest.approx(one[:2], rel=1e-5)
        assert numbers == pytest.approx(others[0], rel=1e-5)
        assert numbers[3] < numbers[1]


# --- the moving average -----------------------------------------------------------------------------------------------


def test_the_average_is_torchs_and_leaves_skipped_steps_out():
    trainer = Trainer()
    average = start_average(trainer.loss_of, None)
    expected = [mean.clone() for mean in average.values()]
    for seed in range(3):
        stepped = trainer.step(seed)
        weights = [p.detach() for p in trainer.loss_of.parameters() if p.requires_grad]
        torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)(expected, weights, None)
        update_average(average, trainer.loss_of, 0.9, stepped.skipped)
        for mean, other in zip(average.values(), expected, strict=True):
            torch.testing.assert_close(mean, other, rtol=1e-6, atol=1e-8)
    before = copy.deepcopy(average)
    update_average(average, trainer.loss_of, 0.9, torch.ones(()))
    assert_same_state(average, before)


def test_the_average_is_saved_resumed_and_written_beside_the_weights(blobs, tmp_path):
    config = small_run(blobs, tmp_path / "run", epochs=1, checkpoint_freq=4, ema=0.8)
    assert story.pretrain(config) == 0
    whole = final_state(tmp_path / "run")
    shutil.rmtree(max((tmp_path / "run" / "checkpoints").glob("step-*")))
    assert story.pretrain(replace(config, resume="auto")) == 0
    assert final_state(tmp_path / "run") == whole
    written = load_model(str(tmp_path / "run" / "checkpoint-0-ema.pth")).state_dict()
    names = [name for name in whole if name.startswith("average.")]
    assert {name.removeprefix("average.") for name in names} == written.keys() - {"pos_embed", "decoder_pos_embed"}
    for name in names:
        assert written[name.removeprefix("average.")].numpy().tobytes() == whole[name]
        assert whole[name] != whole[name.replace("average.", "model.")]
    with pytest.raises(UserError, match=r"was made with ema 0\.8, not None"):
        story.pretrain(replace(config, resume="auto", ema=None))


# --- nobody waits -----------------------------------------------------------------------------------------------------

# What waits for a GPU; torch refuses numpy() of a tensor that is on one.
WAITS = ("item", "tolist", "cpu", "__bool__", "__int__", "__float__", "__index__")


def test_nothing_is_read_from_the_device_between_two_log_steps(blobs, tmp_path, monkeypatch):
    """In train_step, the average and StepLog.add, but for what is due at a log step. Decoding threads may read."""
    reads, watching = Counter(), []
    for name in WAITS:
        read = getattr(torch.Tensor, name)

        def counted(self, *args, read=read, name=name, **rest):
            if watching and watching[-1] and threading.current_thread() is threading.main_thread():
                reads[name] += 1
            return read(self, *args, **rest)

        monkeypatch.setattr(torch.Tensor, name, counted)

    def watched(function, watch):
        def wrapped(*args, **rest):
            watching.append(watch)
            calls[function.__name__] += 1
            try:
                return function(*args, **rest)
            finally:
                watching.pop()

        return wrapped

    calls = Counter()
    monkeypatch.setattr(story, "train_step", watched(story.train_step, True))
    monkeypatch.setattr(story, "update_average", watched(story.update_average, True))
    monkeypatch.setattr(StepLog, "add", watched(StepLog.add, True))
    monkeypatch.setattr(StepLog, "flush", watched(StepLog.flush, False))
    config = small_run(blobs, tmp_path, epochs=2, accum_iter=2, clip_grad=1.0, checkpointing="full", ema=0.9)
    assert story.pretrain(config) == 0
    assert calls["train_step"] == calls["update_average"] == calls["add"] == 8
    assert calls["flush"] > 1
    assert reads == {}
    watching.append(True)
    torch.ones(()).item(), bool(torch.ones(())), float(torch.ones(()))
    assert sum(reads.values()) == 3, "the counting works"
