"""On a GPU: the same masks, the same losses, a run that stops and goes on, and no synchronisation inside a step."""

import numpy as np
import pytest
import torch
from helpers import metrics, small_run

import fastmae
from fastmae.ops.random_masking import random_masking
from fastmae.train.average import start_average, update_average
from fastmae.train.optim import make_optimizer
from fastmae.train.precision import choose_precision
from fastmae.train.pretrain import pretrain
from fastmae.train.step import TrainingLoss, prepare, train_step


def test_masks_are_the_bits_of_the_cpu():
    draw_ids = torch.tensor([0, 5, 2**62, -1])
    assert torch.equal(random_masking(draw_ids.cuda(), 7, 196).cpu(), random_masking(draw_ids, 7, 196))


def test_loss_and_gradients_are_those_of_the_cpu():
    torch.manual_seed(0)
    model = fastmae.mae_vit_tiny_patch4(norm_pix_loss=True)
    images = torch.randint(0, 256, (8, 28, 28, 3), dtype=torch.uint8)
    ids = random_masking(torch.arange(8), 0, 49)
    loss = model.training_loss(images, ids)
    loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    model.cuda()
    on_gpu = model.training_loss(images.cuda(), ids.cuda())
    on_gpu.backward()
    torch.testing.assert_close(on_gpu.cpu(), loss, rtol=1e-5, atol=0)
    whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for name, gradient in expected.items():
        error = (model.get_parameter(name).grad.cpu() - gradient).norm()
        assert error <= 1e-4 * gradient.norm() + 1e-6 * whole, name


def test_a_run_in_fp32_has_the_losses_of_the_cpu(blobs, tmp_path):
    assert pretrain(small_run(blobs, tmp_path / "cpu", precision="fp32")) == 0
    assert pretrain(small_run(blobs, tmp_path / "gpu", precision="fp32", device="cuda")) == 0
    np.testing.assert_allclose(metrics(tmp_path / "gpu"), metrics(tmp_path / "cpu"), rtol=1e-3)


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_a_step_does_not_wait_for_the_gpu(checkpointing):
    device = torch.device("cuda")
    model = fastmae.mae_vit_tiny_patch4().cuda()
    optimizer = make_optimizer(model, 1e-3, 0.05)
    images = torch.randint(0, 256, (8, 28, 28, 3), dtype=torch.uint8, device=device)
    batch = [(images, random_masking(torch.arange(8), 0, 49).to(device))]
    loss_of, precision = TrainingLoss(model, 0.75), choose_precision("auto", device)
    prepare(loss_of, checkpointing, "off")
    average = start_average(model, None)
    settings = loss_of, optimizer, batch, 1, 1e-3, precision.context(device), 0.1
    train_step(*settings)
    torch.cuda.set_sync_debug_mode("error")
    try:
        stepped = train_step(*settings)
        update_average(average, model, 0.9, stepped.skipped)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert stepped.skipped == 0


@pytest.mark.parametrize("compiling", ["off", "block", "model"])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_compiling_and_checkpointing_change_no_loss(checkpointing, compiling):
    torch.compiler.reset()
    losses = []
    for switches in (("none", "off"), (checkpointing, compiling)):
        torch.manual_seed(0)
        loss_of = TrainingLoss(fastmae.mae_vit_tiny_patch4().cuda(), 0.75)
        prepare(loss_of, *switches)
        images = torch.randint(0, 256, (8, 28, 28, 3), dtype=torch.uint8).cuda()
        batch = [(images, random_masking(torch.arange(8), 0, 49).cuda())]
        optimizer, autocast = make_optimizer(loss_of, 1e-3, 0.05), torch.autocast("cuda", enabled=False)
        losses.append([train_step(loss_of, optimizer, batch, 1, 1e-3, autocast).loss for _ in range(3)])
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)


def test_a_step_that_is_not_finite_changes_nothing():
    model = fastmae.mae_vit_tiny_patch4().cuda()
    optimizer, loss_of = make_optimizer(model, 1e-3, 0.05), TrainingLoss(model, 0.75)
    images = torch.randint(0, 256, (8, 28, 28, 3), dtype=torch.uint8).cuda()
    batch = [(images, random_masking(torch.arange(8), 0, 49).cuda())]
    settings = loss_of, optimizer, batch, 1, 1e-3, torch.autocast("cuda", enabled=False)
    train_step(*settings)
    moments = [value for state in optimizer.state.values() for value in state.values()]
    bias = model.decoder_pred.bias.detach().clone()
    before = [tensor.detach().clone() for tensor in [*model.parameters(), *moments]]
    hook = model.decoder_norm.register_forward_hook(lambda _, __, out: out * torch.nan)
    assert train_step(*settings).skipped == 1
    hook.remove()
    assert all(torch.equal(*pair) for pair in zip([*model.parameters(), *moments], before, strict=True))
    assert train_step(*settings).skipped == 0
    assert not torch.equal(model.decoder_pred.bias, bias)


def test_tf32_is_another_rounding_for_the_run_alone():
    precision = choose_precision("tf32", torch.device("cuda"))
    a, b = torch.randn(2, 256, 256, device="cuda")
    exact = a @ b
    with precision.products():
        rounded = a @ b
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=1e-2, atol=0.1)
    assert torch.equal(a @ b, exact)
