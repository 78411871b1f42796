"""Everything that torch can do with a model: the rows of the table in docs/loops.md, each of which is a test here."""

from __future__ import annotations

import copy
import io
import pickle
import re
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap

import fastmae
from fastmae.facts import PixelFacts
from fastmae.model.classifier import classifier_of
from fastmae.model.cross import CrossMAE
from fastmae.model.mae import MaskedAutoencoderViT
from fastmae.model.reference import ReferenceMAE
from fastmae.ops import differentiable, gather_patches, masked_mse, random_masking, scatter_patches
from fastmae.ops.attention import attention_backend
from fastmae.ops.backends import ops_backend, using
from fastmae.ops.choices import Choice, Choices

SIZES = dict(img_size=(16, 16), patch_size=(4, 4), in_chans=3, embed_dim=32, depth=2, num_heads=2)
SIZES |= dict(decoder_embed_dim=16, decoder_depth=2, decoder_num_heads=2)
EXACT = dict(rtol=1e-9, atol=1e-11)


def fresh(kind=MaskedAutoencoderViT, **changes):
    torch.manual_seed(0)
    model = kind(**SIZES, norm_layer=partial(nn.LayerNorm, eps=1e-6), **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def plain(model):
    """The same model without any op of ours."""
    other = ReferenceMAE(**SIZES, norm_pix_loss=model.norm_pix_loss).double()
    other.load_state_dict(model.state_dict())
    return other


@pytest.fixture
def images():
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def pixels():
    return torch.randint(0, 256, (3, 16, 16, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


@pytest.fixture
def ids():
    return random_masking(torch.arange(3), 0, 16)


def weights_of(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def needs_grad(images):
    return images.clone().requires_grad_()


# --- gradients to images --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_pix_loss", [False, True])
@pytest.mark.parametrize("path", ["training_loss", "forward", "MAELoss"])
def test_gradients_to_images(images, ids, norm_pix_loss, path):
    """They flow through the encoder and through the targets; the truth is the plain formulation, in float64."""
    model = fresh(norm_pix_loss=norm_pix_loss).double()
    ours, theirs = needs_grad(images), needs_grad(images)
    calls = {
        "training_loss": lambda: model.training_loss(ours, ids),
        "forward": lambda: model(ours, ids_shuffle=ids)[0],
        "MAELoss": lambda: fastmae.MAELoss(model)(ours, ids_shuffle=ids),
    }
    found = torch.autograd.grad(calls[path](), [ours, *weights_of(model)])
    other = plain(model)
    expected = torch.autograd.grad(other(theirs, ids.long())[0], [theirs, *weights_of(other)])
    for one, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(one, truth, **EXACT)


def test_gradients_to_images_of_features_of_raw_floats_and_of_a_classifier(images):
    model = fresh()
    one = needs_grad(images.float())
    gradient = torch.autograd.grad(model.forward_features(one)[:, 0].sum(), one)[0]
    assert (gradient != 0).all()
    classifier = classifier_of(model, 5).double()
    nn.init.normal_(classifier.head.weight)
    assert (torch.autograd.grad(classifier(one).sum(), one)[0] != 0).all()
    raw = fresh(pixels=PixelFacts(dtype="float32"))
    pixels = needs_grad(images.float().permute(0, 2, 3, 1))
    assert (torch.autograd.grad(raw.forward_features(pixels)[:, 0].sum(), pixels)[0] != 0).all()


def test_ops_on_images_that_require_a_gradient_still_check_their_ids():
    images, statistics = torch.zeros(1, 4, 4, 1, requires_grad=True), (torch.zeros(1), torch.ones(1))
    wrong = torch.tensor([[-1]])
    with pytest.raises(ValueError, match="ids must lie in"):
        gather_patches(images, wrong, (2, 2), *statistics, torch.float32)
    with pytest.raises(ValueError, match="ids must lie in"):
        masked_mse(torch.zeros(1, 1, 4), images, wrong, (2, 2), *statistics, False)
    patches = torch.zeros(1, 2, 4, requires_grad=True)
    with pytest.raises(ValueError, match="distinct"):
        scatter_patches(patches, torch.tensor([[1, 1]]), (2, 2), (2, 2), *statistics, torch.float32)


def test_scattered_patches_have_gradients():
    patches, statistics = torch.randn(2, 3, 4, requires_grad=True), (torch.zeros(1), torch.full((1,), 3.0))
    ids = torch.tensor([[0, 3, 1], [2, 1, 0]])
    image = scatter_patches(patches, ids, (2, 2), (2, 2), *statistics, torch.float32)
    assert torch.equal(torch.autograd.grad(image.sum(), patches)[0], torch.full_like(patches, 3.0))


# --- gradients of gradients -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [MaskedAutoencoderViT, CrossMAE])
def test_gradients_of_gradients(images, ids, kind):
    """A penalty on the gradient of the images, against differences of the gradient in float64."""
    model, x = fresh(kind).double(), needs_grad(images)

    def penalty():
        with differentiable():
            loss = model.training_loss(x, ids)
        return torch.autograd.grad(loss, x, create_graph=True)[0].square().sum()

    weight = model.blocks[0].attn.qkv.weight
    gradient = torch.autograd.grad(penalty(), weight)[0]
    with torch.no_grad():
        weight += 1e-6 * gradient
        after = penalty_without_graph(model, x, ids)
        weight -= 2e-6 * gradient
        before = penalty_without_graph(model, x, ids)
    torch.testing.assert_close(after - before, 2e-6 * gradient.square().sum(), rtol=1e-5, atol=0)


def penalty_without_graph(model, x, ids):
    with torch.enable_grad():
        return torch.autograd.grad(model.training_loss(x, ids), x)[0].square().sum()


def test_a_gradient_of_a_gradient_says_what_it_needs(images, ids):
    model, x = fresh(), needs_grad(images.float())
    line = r"needs `with fastmae\.ops\.differentiable\(\):` around the forward pass"
    classifier = classifier_of(model, 5)
    calls = model.training_loss(x, ids), model.forward_features(x).sum(), classifier(x).sum()
    for out in (*calls, fresh(CrossMAE).training_loss(x, ids)):
        with pytest.raises(RuntimeError, match=line):
            torch.autograd.grad(out, x, create_graph=True)
    with pytest.raises(RuntimeError, match=line):
        torch.autograd.grad(model.training_loss(images.float(), ids), weights_of(model), create_graph=True)


def test_a_penalty_on_features_alone_needs_nothing(images):
    """As of a critic that reads them: their own graph is not differentiated again."""
    features = fresh().forward_features(images.float())
    (gradient,) = torch.autograd.grad(features.square().sum(), features, create_graph=True)
    gradient.square().sum().backward()


def test_differentiable_is_to_rounding_what_kernels_compute(images, ids):
    for kind in (MaskedAutoencoderViT, CrossMAE):
        model = fresh(kind)
        usual = torch.autograd.grad(model.training_loss(images.float(), ids), weights_of(model))
        with differentiable():
            again = torch.autograd.grad(model.training_loss(images.float(), ids), weights_of(model))
        for one, other in zip(usual, again, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_differentiable_goes_before_what_was_measured_and_asked_for(images, ids):
    """The C++ ways have no second gradient, so they must not be taken."""
    shapes = {"linear": (51, 32, 96), "add_layer_norm": (51, 32), "gelu": (51, 128), "attention": (17, 17, 16)}
    entries = [Choice("attention", shapes["attention"], "float32", "cpu", 1.0)]
    entries += [Choice(op, shapes[op], "float32", "cpu", 1.0) for op in ("add_layer_norm", "gelu")]
    model, x = fresh(), needs_grad(images.float())
    for changes in (dict(choices=Choices("measured", tuple(entries))), dict(attention="cpu"), dict(ops="cpu")):
        with using(**changes), differentiable():
            loss = model.forward_features(x).square().mean()
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        assert torch.isfinite(torch.autograd.grad(gradient.square().sum(), weights_of(model)[2])[0]).all()


# --- torch.func -----------------------------------------------------------------------------------------------------


def of_weights(model, images, ids):
    """The loss as a function of the weights, by ``functional_call``."""
    return lambda weights: functional_call(model, weights, (images,), dict(ids_shuffle=ids))[0]


def test_torch_func(images, ids):
    """Functions of torch.func against autograd, image by image."""
    model = fresh().double()
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    loss_of = of_weights(model, images, ids)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    truth = torch.autograd.grad(model.training_loss(images, ids), weights_of(model))
    found = grad(loss_of)(weights)
    for name, one in zip(names, truth, strict=True):
        torch.testing.assert_close(found[name], one, **EXACT)

    direction = {name: torch.randn_like(weight) for name, weight in weights.items()}
    direction |= {name: torch.zeros_like(weight) for name, weight in weights.items() if name not in names}
    _, slope = jvp(loss_of, (weights,), (direction,))
    torch.testing.assert_close(
        slope, sum((one * direction[name]).sum() for name, one in zip(names, truth, strict=True)), **EXACT
    )

    def of_one(weights, image, ids):
        return functional_call(model, weights, (image[None],), dict(ids_shuffle=ids[None]))[0]

    each = vmap(grad(of_one), in_dims=(None, 0, 0))(weights, images, ids)
    for n in range(3):
        one = torch.autograd.grad(model.training_loss(images[n : n + 1], ids[n : n + 1]), weights_of(model))
        for name, expected in zip(names, one, strict=True):
            torch.testing.assert_close(each[name][n], expected, **EXACT)


def test_torch_func_of_features(images):
    model, image = fresh().double(), images[:1]

    def first(x):
        return model.forward_features(x)[0, 0, :2]

    rows = jacrev(first)(image)
    for k in range(2):
        x = needs_grad(image)
        torch.testing.assert_close(rows[k], torch.autograd.grad(first(x)[k], x)[0], **EXACT)
    curvature = hessian(lambda x: first(x)[0])(image).reshape(768, 768)
    torch.testing.assert_close(curvature, curvature.T, rtol=1e-6, atol=1e-9)
    assert curvature.abs().max() > 1e-6


def test_forward_mode(images):
    model, direction = fresh().double(), torch.randn_like(images)
    with forward_ad.dual_level():
        dual = model.forward_features(forward_ad.make_dual(images, direction))
        tangent = forward_ad.unpack_dual(dual).tangent
    difference = model.forward_features(images + 1e-6 * direction) - model.forward_features(images - 1e-6 * direction)
    torch.testing.assert_close(tangent, difference / 2e-6, rtol=1e-5, atol=1e-7)


# --- compiling and exporting ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_torch_compile(pixels):
    """The whole of MAELoss is one graph, in which the number of the masks goes on."""
    loss_of = fastmae.MAELoss(fresh())
    compiled = torch.compile(copy.deepcopy(loss_of), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(pixels), loss_of(pixels))


@pytest.mark.slow
def test_torch_compile_of_gradients(images, ids):
    model, x = fresh().double(), needs_grad(images)
    expected = torch.autograd.grad(model.training_loss(x, ids), x)[0]
    compiled = torch.compile(model.training_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x, ids), x)[0], expected, **EXACT)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    loss_of = of_weights(model, images, ids)
    with differentiable():
        found = torch.compile(grad(loss_of), backend="aot_eager")(weights)
    torch.testing.assert_close(found["norm.weight"], grad(loss_of)(weights)["norm.weight"], **EXACT)


def test_torch_export(pixels):
    class Features(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = fresh()

        def forward(self, images):
            return self.model.forward_features(images)

    program = torch.export.export(Features(), (pixels,)).module()
    torch.testing.assert_close(program(pixels), fresh().forward_features(pixels))


@pytest.mark.slow
def test_torch_export_of_the_loss(pixels):
    program = torch.export.export(fastmae.MAELoss(fresh()), (pixels,)).module()
    loss_of = fastmae.MAELoss(fresh())
    for _ in range(2):
        torch.testing.assert_close(program(pixels), loss_of(pixels))


def test_torch_jit_trace(images, pixels):
    model = fresh().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace_module(model, {"forward_features": pixels}, check_trace=False)
    torch.testing.assert_close(traced.forward_features(pixels.flip(0)), model.forward_features(pixels.flip(0)))


# --- dtypes, layouts, devices ---------------------------------------------------------------------------------------


def test_copies_and_files(pixels, ids):
    model = fresh()
    expected = model.training_loss(pixels, ids)
    saved = io.BytesIO()
    torch.save(model, saved)
    whole = torch.load(io.BytesIO(saved.getvalue()), weights_only=False)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), whole):
        assert torch.equal(other.training_loss(pixels, ids), expected)
        assert torch.equal(other.mean, model.mean)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_models(pixels, ids, dtype):
    model = fresh().to(dtype)
    loss = model.training_loss(pixels, ids)
    loss.backward()
    assert loss.dtype == torch.float32
    assert model.norm.weight.grad.dtype == dtype
    torch.testing.assert_close(loss, fresh().training_loss(pixels, ids), rtol=0.02, atol=0)
    assert model.forward_features(pixels).dtype == dtype


def test_double_models(images, pixels, ids):
    model = fresh().double()
    torch.testing.assert_close(model.training_loss(images, ids), plain(model)(images, ids.long())[0], **EXACT)
    torch.testing.assert_close(model.training_loss(pixels, ids), fresh().training_loss(pixels, ids).double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(pixels, ids, dtype):
    model = fresh()
    with torch.autocast("cpu", dtype):
        loss = fastmae.MAELoss(model)(pixels, ids_shuffle=ids)
    loss.backward()
    assert loss.dtype == model.norm.weight.grad.dtype == torch.float32
    torch.testing.assert_close(loss, model.training_loss(pixels, ids), rtol=0.02, atol=0)


def test_channels_last(images, ids):
    model, layout = fresh(), dict(memory_format=torch.channels_last)
    expected = model.training_loss(images.float(), ids)
    found = copy.deepcopy(model).to(**layout).training_loss(images.float().to(**layout), ids)
    torch.testing.assert_close(found, expected)


def test_inference_mode(pixels, ids):
    model = fresh()
    with torch.inference_mode():
        loss, features = model.training_loss(pixels, ids), model.forward_features(pixels)
    assert loss.is_inference()
    assert not features.requires_grad
    torch.testing.assert_close(loss, model.training_loss(pixels, ids))
    model.training_loss(pixels, ids).backward()


def test_other_devices(pixels, ids):
    """What is no CPU and no CUDA gets the reference and torch's attention; torch.device("meta") computes nothing."""
    for name in ("mps", "xpu", "meta"):
        device = torch.device(name)
        assert ops_backend(device) == "reference"
        assert attention_backend(device, torch.float32, 50, 64)[0] == "sdpa"
    for kind in (MaskedAutoencoderViT, CrossMAE):
        loss_of = fastmae.MAELoss(fresh(kind).to("meta"))
        assert loss_of(pixels.to("meta")).device.type == "meta"
        assert loss_of.model.forward_features(pixels.to("meta")).shape == (3, 17, 32)


def test_the_reference_on_a_cpu(pixels, ids):
    model = fresh()
    expected = model.training_loss(pixels, ids)
    with using(ops="reference", attention="sdpa"):
        torch.testing.assert_close(model.training_loss(pixels, ids), expected)


# --- the table ------------------------------------------------------------------------------------------------------


def test_every_row_of_the_table_is_a_test():
    page = (Path(__file__).parents[2] / "docs" / "loops.md").read_text()
    table = page.partition("| torch's feature |")[2].partition("\n\n")[0]
    rows = [row.split("|")[1].strip() for row in table.splitlines() if row.startswith("| ")]
    tests = re.findall(r"^def test_(\w+)", Path(__file__).read_text(), re.MULTILINE)
    tests += re.findall(r"^def test_(\w+)", (Path(__file__).parent / "test_loss.py").read_text(), re.MULTILINE)
    missing = [row for row in rows if re.sub(r"\W+", "_", row.lower()).strip("_") not in tests]
    assert len(rows) >= 16
    assert not missing
