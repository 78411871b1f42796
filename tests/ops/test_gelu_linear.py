"""gelu_linear: the bits of GELU and of the linear map after it, with less kept for the backward pass."""

import pytest
import torch
from torch import nn

import fastmae.model.vit as vit
import fastmae.ops.gelu_linear as gelu_linear_module
from fastmae.model.mae import MaskedAutoencoderViT
from fastmae.model.vit import Block, Mlp
from fastmae.model.weight_copies import WeightCopies
from fastmae.ops.backends import using
from fastmae.ops.choices import LINEAR, Choices
from fastmae.ops.gelu_linear import gelu_linear, keeps_less
from fastmae.ops.linear import ONEDNN
from fastmae.ops.random_masking import random_masking
from fastmae.train.step import TrainingLoss, prepare

D = 16
ONEDNN_ONLY = pytest.mark.skipif(not ONEDNN, reason="this torch has no product by oneDNN")
CHOICES = [
    pytest.param("float32", {}, id="torch"),
    pytest.param("float32", {"gelu": "cpu"}, id="gelu"),
    pytest.param("float32", dict.fromkeys(LINEAR, "onednn"), id="onednn", marks=ONEDNN_ONLY),
    pytest.param("float32", {"linear_weight": "onednn-copy"}, id="onednn-copy", marks=ONEDNN_ONLY),
    pytest.param("bfloat16", {}, id="bfloat16"),
    pytest.param("bfloat16", {"gelu": "cpu"}, id="bfloat16-gelu"),
    pytest.param("bfloat16", dict.fromkeys(LINEAR, "float32"), id="bfloat16-wide"),
    pytest.param("bfloat16", {"linear_input": "float32"}, id="bfloat16-wide-input"),
]


@pytest.fixture
def apart(monkeypatch):
    """Computes GELU and the linear map apart, as elsewhere."""
    return lambda: monkeypatch.setattr(vit, "keeps_less", lambda *_: False)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fresh(kind=Mlp):
    torch.manual_seed(0)
    model = Mlp(D, 4 * D) if kind is Mlp else Block(D, 2, 4, nn.LayerNorm)
    for part in model.modules():
        if isinstance(part, Mlp):
            part.gelu_again = "on a CPU"
    return model


def results(model, x, bf16, with_copies=False):
    """The output and all gradients."""
    copies = WeightCopies(model)
    if with_copies:
        copies.write()
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    with copies.in_use():
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            out = model(x)
        return [out.detach(), *torch.autograd.grad(out, leaves, drawn(*out.shape, seed=1).to(out.dtype))]


def assert_equal(ones, others):
    for one, other in zip(ones, others, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def kept(model, x, bf16=False):
    """The numbers of each piece of memory that autograd keeps, largest first."""
    pieces = {}

    def noted(tensor):
        pieces[tensor.untyped_storage().data_ptr()] = tensor.numel(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(noted, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            out = model(x)
        del out
    return sorted((numel for numel, _ in pieces.values()), reverse=True)


@pytest.mark.parametrize("with_copies", [False, True])
@pytest.mark.parametrize(("dtype", "taken"), CHOICES)
def test_bits_are_those_of_the_two_apart(dtype, taken, with_copies, apart):
    model, x, bf16 = fresh(), drawn(3, 7, D).requires_grad_(), dtype == "bfloat16"
    with using(choices=Choices.always(dtype, **taken)):
        together = results(model, x, bf16, with_copies)
        apart()
        assert_equal(together, results(model, x, bf16, with_copies))


@pytest.mark.parametrize(
    "frozen", [["fc1"], ["fc2.bias"], ["fc1.bias"], ["fc1.weight", "fc1.bias", "fc2.bias"]], ids=str
)
@pytest.mark.parametrize("taken", [{}, {"gelu": "cpu"}], ids=["torch", "cpu"])
def test_only_gradients_that_are_needed_are_computed(frozen, taken, apart):
    model, x = fresh(), drawn(3, 7, D).requires_grad_()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(tuple(frozen)))
    with using(choices=Choices.always(**taken)):
        together = results(model, x, False)
        apart()
        assert_equal(together, results(model, x, False))


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("taken", [{}, {"gelu": "cpu"}], ids=["torch", "cpu"])
def test_a_block_keeps_one_piece_of_the_hidden_width(taken, bf16, apart):
    block, x, hidden = fresh(Block), drawn(8, 20, D).requires_grad_(), 8 * 20 * 4 * D
    with using(choices=Choices.always("bfloat16" if bf16 else "float32", **taken)):
        assert kept(block, x, bf16).count(hidden) == 1
        apart()
        assert kept(block, x, bf16).count(hidden) == 2


@pytest.mark.parametrize(
    ("checkpointing", "encoder", "decoder"),
    [
        ("none", "on a CPU", "in one pass"),
        ("gelu", "always", "always"),
        ("selective", "no", "no"),
        ("full", "no", "no"),
    ],
)
def test_pretraining_takes_it_where_it_costs_little_or_is_asked_for(checkpointing, encoder, decoder):
    """Where blocks are computed again it would be a third time, and with ``full`` the last product for nobody."""
    model = MaskedAutoencoderViT(img_size=16, patch_size=4, embed_dim=32, depth=3, num_heads=2, decoder_embed_dim=16)
    prepare(TrainingLoss(model, 0.75), checkpointing, "off")
    assert [block.mlp.gelu_again for block in model.blocks] == 3 * [encoder]
    assert {block.mlp.gelu_again for block in model.decoder_blocks} == {decoder}


@pytest.mark.parametrize(
    ("where", "taken", "pieces"),
    [("no", {"gelu": "cpu"}, 2), ("in one pass", {}, 2), ("in one pass", {"gelu": "cpu"}, 1), ("always", {}, 1)],
    ids=str,
)
def test_gelu_is_computed_again_in_the_pass_of_its_gradient_if_there_is_one(where, taken, pieces):
    model, x = fresh(), drawn(8, 20, D).requires_grad_()
    model.gelu_again = where
    with using(choices=Choices.always("float32", **taken)):
        assert kept(model, x).count(8 * 20 * 4 * D) == pieces


def test_one_pass_over_the_argument_gives_gelu_and_its_gradient(monkeypatch):
    """GELU's forward pass is not called again, and its gradient comes with it."""
    model, x, calls = fresh(), drawn(3, 7, D).requires_grad_(), []
    for name in ("gelu", "gelu_backward", "gelu_again_and_backward"):
        function = getattr(gelu_linear_module, name)

        def noted(*arguments, _function=function, _name=name):
            calls.append(_name)
            return _function(*arguments)

        monkeypatch.setattr(gelu_linear_module, name, noted)
    with using(choices=Choices.always("float32", gelu="cpu")):
        model(x).sum().backward()
    assert calls == ["gelu", "gelu_again_and_backward"]


def test_a_step_has_the_same_bits_and_keeps_less():
    images = torch.randint(0, 256, (4, 16, 16, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    patches = random_masking(torch.arange(4), 0, 16)
    torch.manual_seed(0)
    model = MaskedAutoencoderViT(img_size=16, patch_size=4, embed_dim=32, depth=3, num_heads=2, decoder_embed_dim=16)

    def loss_and_gradients():
        loss = model.training_loss(images, patches)
        leaves = [p for p in model.parameters() if p.requires_grad]
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    hidden = 4 * 5 * 4 * 32  # images, tokens, width
    expected, before = loss_and_gradients(), kept(lambda _: model.training_loss(images, patches), None)
    prepare(TrainingLoss(model, 0.75), "none", "off")
    assert_equal(loss_and_gradients(), expected)
    after = kept(lambda _: model.training_loss(images, patches), None)
    assert before.count(hidden) - after.count(hidden) == 3


def test_it_is_for_what_it_computes_and_keeps_less_of():
    h, weight = drawn(3, 4), nn.Parameter(drawn(2, 4))
    assert keeps_less(h, weight)
    assert not keeps_less(h.double(), nn.Parameter(weight.double()))
    assert not keeps_less(h.bfloat16(), weight)
    assert not keeps_less(h, weight.detach())  # the linear map keeps no input for a frozen weight
    assert not keeps_less(h[:0], weight)
    with using(ops="reference"):
        assert not keeps_less(h, weight)
    with torch.no_grad():
        assert not keeps_less(h, weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert keeps_less(h.bfloat16(), weight)
        assert not keeps_less(h, weight)
    with torch.autocast("cpu", torch.float16):
        assert not keeps_less(h.half(), weight)


def test_a_weight_that_changed_before_the_backward_pass_is_refused():
    model = fresh()
    out = model(drawn(2, 3, D))
    with torch.no_grad():
        model.fc2.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("taken", [{}, {"gelu": "cpu"}], ids=["torch", "cpu"])
def test_a_compiled_mlp_is_one_graph_with_the_same_gradients_and_keeps_less_if_asked(taken):
    """The compiler keeps what it likes unless a run asks for less."""
    hidden, pieces = 6 * 4 * D, []
    with using(choices=Choices.always("float32", **taken)):
        for where in ("on a CPU", "always"):
            model, x = fresh(), drawn(2, 3, D).requires_grad_()
            model.gelu_again = where
            expected = results(model, x, False)
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
            pieces.append(kept(compiled, x).count(hidden))
            out = compiled(x)
            gradients = torch.autograd.grad(out, [x, *model.parameters()], drawn(*out.shape, seed=1))
            for got, wanted in zip([out.detach(), *gradients], expected, strict=True):
                # The compiler multiplies matrices where eager code may multiply stacks of them.
                assert (
                    torch.equal(got, wanted)
                    if where == "on a CPU"
                    else torch.allclose(got, wanted, rtol=1e-6, atol=1e-6)
                )
    # torch's GELU, called twice, is called once by the compiler, which keeps the result.
    assert pieces == [2, 1 if taken else 2]


def test_functions_of_torch_func_take_it():
    h, weight, grad = drawn(3, 5, 4), drawn(2, 4).requires_grad_(), torch.func.grad

    def loss(weight, h):
        return gelu_linear(h, None, weight, None).square().sum()

    each = torch.stack([grad(loss)(weight, rows) for rows in h])
    torch.testing.assert_close(torch.func.vmap(grad(loss), (None, 0))(weight, h), each)
