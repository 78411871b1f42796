"""Blocks that pass sums on, so that an addition and a norm are one pass: the same model, and its changes count."""

import copy
import types

import pytest
import torch
from torch import nn

import fastmae.model.vit as vit
from fastmae.model.classifier import classifier_of, stochastic_depth_mask, tune
from fastmae.model.cross import CrossMAE
from fastmae.model.mae import MaskedAutoencoderViT
from fastmae.ops.random_masking import random_masking
from fastmae.train.step import TrainingLoss, prepare

SIZES = dict(img_size=16, patch_size=4, embed_dim=32, depth=3, num_heads=2)
SIZES |= dict(decoder_embed_dim=16, decoder_depth=3, decoder_num_heads=2)


@pytest.fixture
def batch():
    images = torch.randint(0, 256, (3, 16, 16, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    return images, random_masking(torch.arange(3), 0, 16)


@pytest.fixture(autouse=True)
def fused(monkeypatch):
    """A CPU takes torch's own operations unless others were measured to be faster; here it takes the ops."""
    chosen = types.SimpleNamespace(ops={"add_layer_norm", "gelu"})
    monkeypatch.setattr(vit, "uses_fused", lambda op, x, *_: op in chosen.ops)
    return chosen


def fresh(kind=MaskedAutoencoderViT):
    torch.manual_seed(0)
    model = kind(**SIZES)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return model


def loss_and_gradients(run, model):
    loss = run()
    leaves = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {"loss": loss.detach(), **dict(zip(leaves, torch.autograd.grad(loss, leaves.values()), strict=True))}


def assert_same(got, expected, tolerance=1e-5):
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (got[name] - tensor).norm() <= tolerance * tensor.norm() + 1e-8, name


class Inputs:
    """Notes what the blocks of a model are called with, by a function that no block can see."""

    def __init__(self, monkeypatch):
        self.kinds = []
        call = vit.block_output

        def noted(block, x, *inputs):
            self.kinds.append(type(x).__name__)
            return call(block, x, *inputs)

        monkeypatch.setattr(vit, "block_output", noted)


@pytest.mark.parametrize("checkpointing", ["none", "gelu", "selective", "full"])
@pytest.mark.parametrize("kind", [MaskedAutoencoderViT, CrossMAE])
def test_loss_and_gradients_are_those_of_torchs_own_operations(kind, checkpointing, batch, fused, monkeypatch):
    model, inputs = fresh(kind), Inputs(monkeypatch)
    prepare(TrainingLoss(model, 0.75), checkpointing, "off")
    got = loss_and_gradients(lambda: model.training_loss(*batch), model)
    # CrossMAE's decoder reads what every block of the encoder gives; and a sum would be two tensors to keep.
    sums = 0 if checkpointing == "full" else 3 if kind is CrossMAE else 6
    assert inputs.kinds[:6].count("Sum") == sums
    fused.ops.clear()
    assert_same(got, loss_and_gradients(lambda: model.training_loss(*batch), model))


@pytest.mark.parametrize("residual", [False, True])
def test_autocast_differs_by_its_own_roundings(residual, batch, fused):
    model = fresh()
    model.autocast_residual = residual
    exact = loss_and_gradients(lambda: model.training_loss(*batch), model)

    def run():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model.training_loss(*batch)

    got = loss_and_gradients(run, model)
    fused.ops.clear()
    plain = loss_and_gradients(run, model)
    whole = torch.stack([exact[name].norm() for name in exact if name != "loss"]).norm()
    for name, truth in exact.items():
        allowed = 2 * (plain[name] - truth).norm() + 1e-3 * (whole if name != "loss" else truth)
        assert (got[name] - truth).norm() <= allowed, name


def test_a_block_alone_takes_and_gives_tokens(fused):
    block, x = fresh().blocks[0], torch.randn(2, 5, 32)
    got, parts = block(x), block(vit.Sum(x, torch.zeros_like(x)))
    assert isinstance(parts, vit.Sum)
    assert torch.equal(parts.bias, block.mlp.fc2.bias)
    torch.testing.assert_close(vit.added(parts), got)
    assert torch.equal(vit.added(parts), parts.stream + (parts.branch + parts.bias))
    torch.testing.assert_close(block(vit.Sum(x, x), 2).stream.shape, got[:, 2:].shape)
    fused.ops.clear()
    torch.testing.assert_close(got, block(x))


class Doubled(vit.Block):
    """A block of somebody else's."""

    def forward(self, x, start=0):
        assert isinstance(x, torch.Tensor)
        return 2 * super().forward(x, start)


def doubled_by_a_class(block):
    block.__class__ = Doubled


def doubled_by_a_hook(block):
    block.register_forward_hook(lambda block, inputs, output: 2 * output)


def doubled_by_a_hook_before(block):
    block.register_forward_pre_hook(lambda block, inputs: (inputs[0] + 0, *inputs[1:]))
    doubled_by_a_hook(block)


def doubled_by_a_method(block):
    forward = block.forward
    block.forward = lambda x, start=0: 2 * forward(x, start)


@pytest.mark.parametrize("where", ["blocks.0", "blocks.1", "decoder_blocks.2"])
@pytest.mark.parametrize(
    "change", [doubled_by_a_class, doubled_by_a_hook, doubled_by_a_hook_before, doubled_by_a_method]
)
def test_a_changed_block_gets_tokens_and_gives_them(change, where, batch, fused):
    model = fresh()
    unchanged = model.training_loss(*batch)
    change(model.get_submodule(where))
    got = loss_and_gradients(lambda: model.training_loss(*batch), model)
    assert got["loss"] != unchanged
    fused.ops.clear()
    assert_same(got, loss_and_gradients(lambda: model.training_loss(*batch), model))


class Wrapped(nn.Module):
    """Twice what a layer gives."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x, *rest):
        return 2 * self.base(x, *rest)


@pytest.mark.parametrize(
    "where",
    ["norm", "blocks.1.norm1", "blocks.0.norm2", "blocks.1.mlp.fc1", "blocks.1.mlp.fc2", "decoder_blocks.2.mlp"],
)
def test_wrapped_layers_and_hooks_on_them_count(where, batch, fused):
    wrapped, hooked = fresh(), fresh()
    unchanged = wrapped.training_loss(*batch)
    wrapped.set_submodule(where, Wrapped(wrapped.get_submodule(where)))
    hooked.get_submodule(where).register_forward_hook(lambda layer, inputs, output: 2 * output)
    got = [model.training_loss(*batch) for model in (wrapped, hooked)]
    assert not torch.isclose(got[0], unchanged)
    fused.ops.clear()
    torch.testing.assert_close(got, [wrapped.training_loss(*batch)] * 2)


@pytest.mark.parametrize("norm_layer", [nn.Identity, lambda D: nn.LayerNorm(D, elementwise_affine=False), nn.RMSNorm])
def test_norms_that_are_not_layer_norms_count(norm_layer, batch, fused):
    model = MaskedAutoencoderViT(**SIZES, norm_layer=norm_layer)
    got = model.training_loss(*batch)
    fused.ops.clear()
    torch.testing.assert_close(got, model.training_loss(*batch))


@pytest.mark.parametrize("what", ["full", "lora", "last-1"])
@pytest.mark.parametrize("global_pool", [True, False])
def test_a_classifier_and_its_skipped_branches(global_pool, what, batch, fused, monkeypatch):
    model = classifier_of(fresh(), 5, global_pool=global_pool)
    model.head.weight.data.normal_()
    tune(model, what)
    inputs = Inputs(monkeypatch)
    monkeypatch.setattr("fastmae.model.classifier.block_output", vit.block_output)
    mask = stochastic_depth_mask(0, torch.arange(3).numpy(), 0.5, 3)
    assert not mask.all()

    def run():
        return (model(batch[0], mask).square() + model(batch[0])).sum()

    got = loss_and_gradients(run, model)
    assert set(inputs.kinds) == {"Sum"}
    fused.ops.clear()
    assert_same(got, loss_and_gradients(run, model))


def test_frozen_parts_have_no_gradients_and_the_others_the_same(batch, fused):
    model = fresh()
    for name, parameter in model.named_parameters():
        if "norm" in name or ".1." in name:
            parameter.requires_grad_(False)
    got = loss_and_gradients(lambda: model.training_loss(*batch), model)
    fused.ops.clear()
    assert_same(got, loss_and_gradients(lambda: model.training_loss(*batch), model))


@pytest.mark.parametrize(("compiling", "graphs"), [("block", 3), pytest.param("model", 1, marks=pytest.mark.slow)])
def test_compiled_is_the_same_and_compiled_once(compiling, graphs, batch, monkeypatch):
    """As many graphs as without the ops: a stack begins with a sum, so that its first block is like the others."""
    from torch._dynamo.testing import CompileCounterWithBackend

    model = fresh()
    expected = loss_and_gradients(lambda: model.training_loss(*batch), model)
    counter, compile_anything = CompileCounterWithBackend("aot_eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **rest: compile_anything(*args, **rest, backend=counter))
    torch.compiler.reset()
    compiled = TrainingLoss(copy.deepcopy(model), 0.75)
    prepare(compiled, "none", compiling)
    got = loss_and_gradients(lambda: compiled(*batch), compiled.model)
    torch.compiler.reset()
    assert counter.frame_count == graphs
    assert_same(got, expected)
