"""The switches of a step: what they must not change, what they save, and that nobody waits for the device."""

import copy
import json
import shutil
import sys
import threading
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from helpers import final_state, metrics, small_run
from ranks import run_script, start_ranks
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import get_total_norm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastmae
from fastmae.checkpoint.load import load_model
from fastmae.errors import UserError
from fastmae.model.weight_copies import WeightCopies
from fastmae.ops.backends import using
from fastmae.ops.choices import OF_0_1
from fastmae.train import pretrain as pretrain_module
from fastmae.train import step as step_part
from fastmae.train.average import start_average, update_average
from fastmae.train.metrics import StepLog
from fastmae.train.optim import make_optimizer
from fastmae.train.precision import Precision, choose_precision, require_float8
from fastmae.train.step import PassGraph, TrainingLoss, gradient_norm, in_float8, prepare, require_graph, train_step

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


def loss_and_gradients(checkpointing="none", compiling="off", bf16=False, residual=False, float8=False):
    model = small_model()
    model.autocast_residual = residual
    if float8:
        in_float8(model, emulate=True)
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
    with pytest.raises(UserError, match=r"^precision='tf32': a CPU has no TensorFloat-32; use fp32"):
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
    with pytest.raises(UserError, match=r"^residual='bf16': goes with precision='bf16', not fp32"):
        pretrain_module.pretrain(small_run(blobs, tmp_path, precision="fp32", residual="bf16"))


# --- float8 -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def wider(monkeypatch):
    """The small model with a decoder that float8 could multiply as well, and leaves alone."""
    monkeypatch.setitem(SMALL, "decoder_embed_dim", 32)


def float8_layers(model):
    return {name for name, module in model.named_modules() if type(module).__name__ == "Float8Linear"}


def test_float8_is_for_the_products_of_the_encoders_blocks_and_leaves_weights_alone(wider):
    model = small_model()
    before = list(model.named_parameters())
    in_float8(model, emulate=True)
    names = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert float8_layers(model) == {f"blocks.{block}.{name}" for block in range(3) for name in names}
    after = list(model.named_parameters())
    assert [name for name, _ in after] == [name for name, _ in before], "optimisers count them in this order"
    assert all(one is other for (_, one), (_, other) in zip(after, before, strict=True))
    assert list(model.state_dict()) == list(small_model().state_dict())


def test_layers_that_float8_cannot_multiply_are_left_alone(monkeypatch):
    """Their sizes must be multiples of 16."""
    monkeypatch.setitem(SMALL, "embed_dim", 24)
    model = small_model()
    in_float8(model, emulate=True)
    assert float8_layers(model) == set()


def test_float8_rounds_losses_and_gradients_a_little(wider):
    """A factor has 3 bits after the point, a gradient 2: errors of up to 1/16 and 1/8 each, which average out."""
    (rounded, gradients), (loss, exact) = loss_and_gradients(bf16=True, float8=True), loss_and_gradients(bf16=True)
    assert 0 < abs(rounded / loss - 1) < 2e-3
    error = torch.cat([(gradients[name] - exact[name]).flatten() for name in exact]).norm()
    assert 1e-3 < error / torch.cat([gradient.flatten() for gradient in exact.values()]).norm() < 0.1


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_float8_computed_again_has_the_same_bits(wider, checkpointing):
    expected = loss_and_gradients(bf16=True, float8=True)
    assert_same_bits(loss_and_gradients(checkpointing, bf16=True, float8=True), expected)


def test_float8_trains_as_bf16_does(wider):
    losses = {}
    for float8 in (False, True):
        trainer = Trainer()
        if float8:
            in_float8(trainer.loss_of.model, emulate=True)
        losses[float8] = [trainer.step(0, bf16=True).loss.item() for _ in range(20)]
    assert losses[True][-1] < 0.75 * losses[True][0]
    np.testing.assert_allclose(losses[True], losses[False], rtol=2e-2)


@pytest.fixture
def emulated(monkeypatch):
    """--float8 on a CPU, without waiting for torch.compile."""
    monkeypatch.setattr(pretrain_module, "require_float8", lambda device, precision: None)
    monkeypatch.setattr(step_part, "in_float8", partial(in_float8, emulate=True))
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


def test_a_run_in_float8_resumes_and_may_go_on_without(emulated, blobs, tmp_path, monkeypatch):
    """And pictures, as all that is measured, come from the plain model, which is what reads the checkpoint later."""
    seen = []
    draw = pretrain_module.reconstruct
    monkeypatch.setattr(
        pretrain_module, "reconstruct", lambda model, *args, **rest: seen.append(model) or draw(model, *args, **rest)
    )
    settings = dict(batch_size=16, epochs=1, checkpoint_freq=2, precision="bf16", compile="block")
    config = small_run(blobs, tmp_path / "run", **settings, float8=True)
    assert pretrain_module.pretrain(config) == 0
    whole, losses = final_state(tmp_path / "run"), metrics(tmp_path / "run")
    newest = max((tmp_path / "run" / "checkpoints").glob("step-*"))
    shutil.rmtree(newest)
    assert pretrain_module.pretrain(replace(config, resume="auto")) == 0
    assert final_state(tmp_path / "run") == whole
    assert metrics(tmp_path / "run") == losses
    assert [float8_layers(model) for model in seen] == [set(), set()]
    started = json.loads((tmp_path / "run" / "environment.jsonl").read_text().splitlines()[0])
    assert started["backends"]["float8"].startswith("products of the encoder's blocks (torchao ")
    shutil.rmtree(newest)
    assert pretrain_module.pretrain(replace(config, resume="auto", float8=False)) == 0
    assert metrics(tmp_path / "run")[:2] == losses[:2]
    assert metrics(tmp_path / "run") != losses
    # Processors differ in bf16: 2.05 % was seen on a Xeon with AMX, less than 2 % on an EPYC.
    np.testing.assert_allclose(metrics(tmp_path / "run"), losses, rtol=3e-2)


def test_float8_where_it_cannot_work_is_refused(blobs, tmp_path, monkeypatch):
    float8 = dict(float8=True, compile="block", batch_size=16)
    with pytest.raises(UserError, match=r"^float8: a CPU has no float8 products, .*; leave it out$"):
        pretrain_module.pretrain(small_run(blobs, tmp_path, **float8))
    with pytest.raises(UserError, match=r"^compile='off': must be block or model with float8"):
        pretrain_module.pretrain(small_run(blobs, tmp_path, **float8 | {"compile": "off"}))
    with pytest.raises(UserError, match=r"^batch_size=24: must be a multiple of 16 with float8"):
        pretrain_module.pretrain(small_run(blobs, tmp_path, **float8 | {"batch_size": 24}))
    gpu, bf16 = torch.device("cuda"), Precision("bf16", "", torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(UserError, match=r"^float8: an A100 has no float8 products"):
        require_float8(gpu, bf16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    require_float8(gpu, bf16)
    with pytest.raises(UserError, match=r"^float8: goes with precision='bf16', not tf32; leave one out"):
        require_float8(gpu, Precision("tf32", "", None))


def test_without_torchao_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(UserError, match=r"^float8: torchao cannot be loaded \(.*\); pip install 'fastmae\[float8\]'$"):
        prepare(TrainingLoss(small_model(), 0.75), "none", "block", float8=True)


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
        # With torch's own products, which save their inputs before they compute. What fastmae.ops.linear does is saved
        # afterwards, so on a CPU the last result is computed again for nobody.
        with using(ops="reference"), Operations() as forward:
            loss = loss_of(*batch())
            alive[checkpointing] = forward.alive()
        with using(ops="reference"), Operations() as backward:
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


def test_float8_compiles(traced, wider):
    loss, gradients = loss_and_gradients("selective", bf16=True, float8=True)
    got = loss_and_gradients("selective", "block", bf16=True, float8=True)
    assert traced.frame_count == 3
    torch.testing.assert_close(got[0], loss, rtol=1e-5, atol=0)
    for name, gradient in gradients.items():
        assert (got[1][name] - gradient).norm() <= 1e-2 * gradient.norm() + 1e-9, name


def test_a_run_compiles_its_blocks_and_nothing_else(traced, blobs, tmp_path):
    """Probing and pictures have other shapes, and stay eager."""
    config = small_run(blobs, tmp_path / "compiled", epochs=1, compile="block", probe=True)
    assert pretrain_module.pretrain(config) == 0
    assert traced.frame_count == 3
    assert pretrain_module.pretrain(small_run(blobs, tmp_path / "eager", epochs=1)) == 0
    assert traced.frame_count == 3
    np.testing.assert_allclose(metrics(tmp_path / "compiled"), metrics(tmp_path / "eager"), rtol=1e-6)


@pytest.mark.slow
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
    with pytest.raises(UserError, match=r"^compile: .* C\+\+ compiler .* use compile='off'") as refused:
        train_step(loss_of, make_optimizer(loss_of, 1e-3, 0.05), [batch()], 1, 1e-3, autocast())
    assert len(str(refused.value).splitlines()) == 1


# --- the gradient -----------------------------------------------------------------------------------------------------


class Trainer:
    """A model and its optimiser; ``step`` is a train_step of two micro-batches."""

    def __init__(self, loss_of=None):
        self.loss_of = loss_of or TrainingLoss(small_model(), 0.75)
        self.optimizer = make_optimizer(self.loss_of, 1e-3, 0.05)

    def step(self, seed=0, bf16=False, **settings):
        micro = [batch(2 * seed), batch(2 * seed + 1)]
        return self.step_with(micro, bf16, **settings)

    def step_with(self, micro, bf16=False, **settings):
        return train_step(self.loss_of, self.optimizer, micro, len(micro), 1e-3, autocast(bf16), **settings)

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


def test_the_norm_of_the_gradient_is_that_of_float64_and_in_runs_of_0_1_that_of_0_1():
    dice = torch.Generator().manual_seed(0)
    sizes = [(700, 900), (900, 700), (1, 1, 5), (), (300_001,)]
    gradients = [torch.randn(size, generator=dice) * 1e-3 for size in sizes]
    gradients[1] = gradients[1].T
    truth = torch.cat([gradient.double().flatten() for gradient in gradients]).norm()
    norm = gradient_norm(gradients)
    assert (norm.dtype, norm.shape) == (torch.float32, ())
    assert abs(norm / truth - 1) < 2e-6
    assert abs(gradient_norm([gradient.double() for gradient in gradients]) / truth - 1) < 1e-12
    with using(choices=OF_0_1):
        assert torch.equal(gradient_norm(gradients), get_total_norm(gradients))
    assert gradient_norm([]).item() == 0
    assert gradient_norm([torch.full((3,), 1e30)]).isinf(), "as get_total_norm"


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


# --- CUDA graphs ------------------------------------------------------------------------------------------------------


class Replays:
    """In place of CUDA graphs: what was captured is done again by Python, and must find all at the same addresses."""

    def __init__(self, monkeypatch, trainer):
        self.trainer, self.captured = trainer, []
        monkeypatch.setattr(step_part, "_warm_up", lambda run, device: [run() for _ in range(step_part.WARM_UPS)])
        monkeypatch.setattr(step_part, "_recorded", self.record)

    def addresses(self):
        parameters = [p for p in self.trainer.loss_of.parameters() if p.requires_grad]
        return [(p.data_ptr(), p.grad.data_ptr()) for p in parameters]

    def record(self, run, stream):
        addresses, result = self.addresses(), torch.zeros(())
        self.captured.append([tuple(tensor.shape) for tensor in run.args])

        def replay():
            assert self.addresses() == addresses
            return result.copy_(run())

        return replay


def float_batch(seed, size=N, value=None):
    """Images as floats, of which one value may be bad."""
    images, ids = batch(seed)
    images = (images / 255).permute(0, 3, 1, 2).contiguous()
    if value is not None:
        images[0, 0] = value
    return images[:size], ids[:size]


@pytest.mark.parametrize("bf16", [False, True])
def test_replayed_passes_are_the_steps_without_them(monkeypatch, bf16):
    """Losses are looked at when all is done, as the log does; one step is not finite, and shapes change twice.

    In bfloat16 replays read copies of the weights, which must stay at their addresses and be written before each step.
    """
    plain, replayed = Trainer(), Trainer()
    replays, graph = Replays(monkeypatch, replayed), PassGraph()
    copies = WeightCopies(replayed.loss_of) if bf16 else None
    steps = [
        [float_batch(0), float_batch(1)],
        [float_batch(2), float_batch(3)],
        [float_batch(4), float_batch(5, value=torch.nan)],
        [float_batch(6), float_batch(7)],
        [float_batch(8, 4)],
        [float_batch(9, 4)],
        [float_batch(10), float_batch(11)],
    ]
    assert_same_steps(
        [replayed.step_with(micro, bf16, clip_grad=0.5, graph=graph, copies=copies) for micro in steps],
        [plain.step_with(micro, bf16, clip_grad=0.5) for micro in steps],
        skipped=[0, 0, 1, 0, 0, 0, 0],
    )
    assert_same_state(replayed.state(), plain.state())
    assert [images[0] for images, _ in replays.captured] == [6, 4, 6]


def assert_same_steps(got, expected, skipped):
    assert [step.skipped.item() for step in got] == skipped
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_array_equal([one.loss, one.grad_norm], [other.loss, other.grad_norm])


def test_a_capture_in_the_middle_of_a_step_keeps_the_gradient_so_far(monkeypatch):
    plain, replayed = Trainer(), Trainer()
    replays, graph = Replays(monkeypatch, replayed), PassGraph()
    for seed in range(2):
        micro = [float_batch(seed), float_batch(seed + 5, 3)]
        assert_same_steps([replayed.step_with(micro, graph=graph)], [plain.step_with(micro)], [0])
    assert_same_state(replayed.state(), plain.state())
    assert [images[0] for images, _ in replays.captured] == [6, 3, 6, 3]


def test_a_cuda_graph_where_it_cannot_work_is_refused(blobs, tmp_path):
    with pytest.raises(UserError, match=r"^cuda_graph: the device is cpu, which has no CUDA graphs; leave it out$"):
        pretrain_module.pretrain(small_run(blobs, tmp_path, cuda_graph=True))
    with pytest.raises(UserError, match=r"^cuda_graph: is for one rank, and there are 4; use compile instead$"):
        require_graph(torch.device("cuda"), 4)
    require_graph(torch.device("cuda"), 1)


# --- several ranks ----------------------------------------------------------------------------------------------------

RANKS = """
import sys, torch, fastmae
from fastmae.model.sharding import in_one_piece, local_part
from fastmae.train import parallel
from fastmae.train.average import start_average, update_average
from fastmae.train.optim import make_optimizer
from fastmae.train.step import TrainingLoss, in_float8, prepare, train_step
kind, compiling, *float8 = sys.argv[1:]
context = parallel.start("cpu")
compile_anything = torch.compile
torch.compile = lambda *args, **rest: compile_anything(*args, **rest, backend="aot_eager")
torch.manual_seed(0)
model = fastmae.mae_vit_tiny_patch4(img_size=16, depth=2)
images = torch.randint(0, 256, (8, 16, 16, 3), dtype=torch.uint8)
ids = fastmae.ops.random_masking(torch.arange(8), 0, 16)
mine = slice(context.rank * 8 // context.size, (context.rank + 1) * 8 // context.size)
loss_of = TrainingLoss(model, 0.75)
if float8:
    in_float8(model, emulate=True)
prepare(loss_of, "selective", compiling)
loss_of = parallel.parallelize(loss_of, context, parallel.choose_parallelism(kind, "fp32", None, context))
optimizer = make_optimizer(model, 1e-3, 0.05)
average = start_average(model, None)

def step():
    micro = [(images[mine], ids[mine]), (images[mine] // 2, ids[mine])]
    autocast = torch.autocast("cpu", enabled=False)
    result = train_step(loss_of, optimizer, micro, 2, 1e-3, autocast, 0.5, context.mean)
    update_average(average, model, 0.9, result.skipped)
    return result

def state():
    moments = [value for p in model.parameters() for value in optimizer.state.get(p, {}).values()]
    return [local_part(tensor).detach().clone() for tensor in [*model.parameters(), *moments, *average.values()]]

first = step()
before = state()
hook = model.decoder_norm.register_forward_hook(lambda _, __, out: out * torch.nan if context.rank == 1 else out)
bad = step()
hook.remove()
if context.size > 1:
    assert bad.skipped == 1 and bool(bad.loss.isfinite()) == (context.rank == 0), bad
    assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
last = step()
assert first.skipped == last.skipped == 0
numbers = [x.item() for step in (first, last) for x in (step.grad_norm, context.mean(step.loss))]
numbers.append(torch.stack([mean.norm() for mean in in_one_piece(average, True).values()]).norm().item())
if context.is_main:
    print("seen", *numbers, flush=True)
parallel.stop(context)
"""


def test_one_rank_that_is_not_finite_stops_them_all(tmp_path):
    """And norms and losses are those of one rank, which takes the step that the others skip before it compares."""
    file = tmp_path / "ranks.py"
    file.write_text(RANKS)
    seen = {}
    for ranks, *words in ((1, "ddp", "off"), (2, "ddp", "off"), (2, "fsdp", "block"), (2, "fsdp", "off", "float8")):
        started = start_ranks(ranks, partial(run_script, file, *words))
        ended = [rank.finish() for rank in started]
        assert [status for status, _ in ended] == [0] * ranks, ended
        seen[ranks, *words] = [float(word) for word in started[0].said().split()[-5:]]
    print(seen)
    (one, *others, float8) = seen.values()
    assert float8 != others[0]
    assert float8 == pytest.approx(others[0], rel=2e-2)
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
        result = trainer.step(seed)
        weights = [p.detach() for p in trainer.loss_of.parameters() if p.requires_grad]
        torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)(expected, weights, None)
        update_average(average, trainer.loss_of, 0.9, result.skipped)
        for mean, other in zip(average.values(), expected, strict=True):
            torch.testing.assert_close(mean, other, rtol=1e-6, atol=1e-8)
    before = copy.deepcopy(average)
    update_average(average, trainer.loss_of, 0.9, torch.ones(()))
    assert_same_state(average, before)


def test_the_average_is_saved_resumed_and_written_beside_the_weights(blobs, tmp_path):
    config = small_run(blobs, tmp_path / "run", epochs=1, checkpoint_freq=4, ema=0.8)
    assert pretrain_module.pretrain(config) == 0
    whole = final_state(tmp_path / "run")
    shutil.rmtree(max((tmp_path / "run" / "checkpoints").glob("step-*")))
    assert pretrain_module.pretrain(replace(config, resume="auto")) == 0
    assert final_state(tmp_path / "run") == whole
    written = load_model(str(tmp_path / "run" / "checkpoint-0-ema.pth")).state_dict()
    saved = {name.split()[-1]: value for name, value in whole.items()}  # without the file of the rank
    names = [name for name in saved if name.startswith("average.")]
    assert {name.removeprefix("average.") for name in names} == written.keys() - {"pos_embed", "decoder_pos_embed"}
    for name in names:
        assert written[name.removeprefix("average.")].numpy().tobytes() == saved[name]
        assert saved[name] != saved[name.replace("average.", "model.")]
    with pytest.raises(UserError, match=r"was made with ema 0\.8, not None"):
        pretrain_module.pretrain(replace(config, resume="auto", ema=None))


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
    monkeypatch.setattr(pretrain_module, "train_step", watched(pretrain_module.train_step, True))
    monkeypatch.setattr(pretrain_module, "update_average", watched(pretrain_module.update_average, True))
    monkeypatch.setattr(StepLog, "add", watched(StepLog.add, True))
    monkeypatch.setattr(StepLog, "flush", watched(StepLog.flush, False))
    config = small_run(blobs, tmp_path, epochs=2, accum_iter=2, clip_grad=1.0, checkpointing="full", ema=0.9)
    assert pretrain_module.pretrain(config) == 0
    assert calls["train_step"] == calls["update_average"] == calls["add"] == 8
    assert calls["flush"] > 1
    assert reads == {}
    watching.append(True)
    torch.ones(()).item(), bool(torch.ones(())), float(torch.ones(()))
    assert sum(reads.values()) == 3, "the counting works"
