"""The public ops and the training loss, run by Triton, against their PyTorch. Run by test_kernels.py, and on a GPU by
tests/gpu. What the kernels compute is in the other values_*.py; here is how they are reached."""

import importlib

import pytest
import torch
from device import DEVICE

import fastmae
from fastmae.ops import assemble_tokens, gather_patches, masked_mse, random_masking, scatter_patches
from fastmae.ops.backends import describe_ops, using

N, C, PATCH, SIZE, L, K, D = 2, 3, (4, 4), (12, 8), 6, 2, 16


@pytest.fixture(autouse=True)
def triton_backend():
    with using(ops="triton"):
        yield


def tensors():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (N, *SIZE, C), dtype=torch.uint8, generator=generator).to(DEVICE)
    ids = random_masking(torch.arange(N, device=DEVICE), 3, L)
    mean, std = torch.rand(2, C, generator=generator).to(DEVICE) + 0.1
    pred = torch.randn(N, L - K, 48, generator=generator).to(DEVICE).requires_grad_()
    visible = torch.randn(N, K + 1, D, generator=generator).to(DEVICE).requires_grad_()
    mask_token = torch.randn(D, generator=generator).to(DEVICE).requires_grad_()
    pos_embed = torch.randn(L + 1, D, generator=generator).to(DEVICE)
    return images, ids, mean, std, pred, visible, mask_token, pos_embed


def everything(images, ids, mean, std, pred, visible, mask_token, pos_embed):
    """All five ops, and the gradients of those that have one."""
    patches = gather_patches(images, ids[:, :K], PATCH, mean, std, torch.float32)
    tokens = assemble_tokens(visible, mask_token, pos_embed, ids)
    loss = masked_mse(pred, images, ids[:, K:], PATCH, mean, std, True)
    picture = scatter_patches(pred.detach(), ids[:, K:], (3, 2), PATCH, mean, std, torch.float32)
    gradients = torch.autograd.grad(loss + tokens.square().sum(), (pred, visible, mask_token))
    return patches, tokens, loss, picture, *gradients


def assert_all_close(got, expected):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


def test_the_kernels_run(monkeypatch):
    assert describe_ops(torch.device(DEVICE)).startswith("Triton")
    ran = []
    launchers = ("gather_patches", "assemble_tokens", "masked_mse", "scatter_patches")
    launchers += ("assemble_tokens_backward", "masked_mse_backward")
    for op in launchers:
        module = importlib.import_module(f"fastmae.kernels.{op.removesuffix('_backward')}")
        launch = getattr(module, f"{op}_triton")

        def recorded(*arguments, _op=op, _launch=launch, **more):
            ran.append(_op)
            return _launch(*arguments, **more)

        monkeypatch.setattr(module, f"{op}_triton", recorded)
    got = everything(*tensors())
    assert sorted(ran) == sorted(launchers)
    with using(ops="reference"):
        expected = everything(*tensors())
    assert_all_close(got, expected)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"] if DEVICE == "cuda" else ["aot_eager"])
def test_they_compile_as_one_graph(backend):
    arguments = tensors()

    def forward(*arguments):
        images, ids, mean, std, pred, visible, mask_token, pos_embed = arguments
        patches = gather_patches(images, ids[:, :K], PATCH, mean, std, torch.float32)
        tokens = assemble_tokens(visible, mask_token, pos_embed, ids)
        return patches.sum() + tokens.square().sum() + masked_mse(pred, images, ids[:, K:], PATCH, mean, std, True)

    compiled = torch.compile(forward, fullgraph=True, backend=backend)
    leaves = arguments[4:7]
    gradients = [torch.autograd.grad(function(*arguments), leaves) for function in (forward, compiled)]
    assert_all_close(*gradients)


def test_they_are_well_behaved_torch_ops():
    images, ids, mean, std, pred, visible, mask_token, pos_embed = tensors()
    ops = torch.ops.fastmae
    torch.library.opcheck(ops.gather_patches.default, (images, ids[:, :K], PATCH, mean, std, torch.bfloat16))
    arguments = (pred, images, ids[:, K:], PATCH, mean, std, True, torch.stack([0 * mean, 250 + mean]), 3.0)
    torch.library.opcheck(ops.masked_mse.default, arguments)
    backward_arguments = (*torch.ones(2, device=DEVICE), pred.detach(), *arguments[1:])
    torch.library.opcheck(ops.masked_mse_backward.default, backward_arguments)
    torch.library.opcheck(ops.assemble_tokens.default, (visible, mask_token, pos_embed, ids, torch.float32))
    grad = torch.randn(N, L + 1, D, device=DEVICE)
    torch.library.opcheck(ops.assemble_tokens_backward.default, (grad, K + 1, torch.bfloat16))
    arguments = (pred.detach(), ids[:, K:], (3, 2), PATCH, mean, std, torch.uint8)
    torch.library.opcheck(ops.scatter_patches.default, arguments)


@pytest.mark.parametrize(
    ("autocast", "attention", "tolerance"),
    # bfloat16 has 8 bits and float16 11, and the interpreter truncates to bfloat16 (so no attention in it there).
    [(None, "sdpa", 1e-5), (torch.bfloat16, "sdpa", 2e-2), (torch.float16, "triton", 5e-3)],
)
def test_the_training_loss(autocast, attention, tolerance):
    torch.manual_seed(0)
    model = fastmae.mae_vit_tiny_patch4(img_size=16, depth=1, decoder_depth=2, norm_pix_loss=True).to(DEVICE)
    images = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8, device=DEVICE)
    ids = random_masking(torch.arange(2, device=DEVICE), 0, 16)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def loss_and_gradients():
        with torch.autocast(DEVICE, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            loss = model.training_loss(images, ids)
        return loss.detach(), *torch.autograd.grad(loss, parameters)

    with using(attention=attention):
        got = loss_and_gradients()
    with using(ops="reference", attention="sdpa"):
        expected = loss_and_gradients()
    torch.testing.assert_close(got[0], expected[0], rtol=tolerance, atol=0)
    whole = torch.stack([gradient.norm() for gradient in expected[1:]]).norm()
    for a, b in zip(got[1:], expected[1:], strict=True):
        assert (a - b).norm() <= tolerance * (b.norm() + 0.01 * whole)


def test_ids_out_of_range_are_found_when_debugging():
    images, ids, mean, std, *_ = tensors()
    with using(check_ids=True), pytest.raises(ValueError, match="ids must lie in"):
        gather_patches(images, ids + 1, PATCH, mean, std, torch.float32)


def test_float64_is_computed_by_the_definition():
    images, ids, mean, std, *_ = tensors()
    got = gather_patches(images, ids, PATCH, mean.double(), std.double(), torch.float64)
    with using(ops="reference"):
        assert torch.equal(got, gather_patches(images, ids, PATCH, mean.double(), std.double(), torch.float64))
