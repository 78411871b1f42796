"""On a GPU: the same masks, the same losses, a run that stops and goes on, and no synchronisation inside a step."""

import numpy as np
import pytest
import torch
from helpers import metrics, small_run

import fastmae
from fastmae.config import FinetuneConfig
from fastmae.ops.random_masking import random_masking
from fastmae.train.average import start_average, update_average
from fastmae.train.classify import finetune
from fastmae.train.optim import make_optimizer
from fastmae.train.precision import choose_precision
from fastmae.train.pretrain import pretrain
from fastmae.train.step import PassGraph, TrainingLoss, prepare, train_step

HAS_FLOAT8 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)


def test_masks_are_the_bits_of_the_cpu():
    draw_ids = torch.tensor([0, 5, 2**62, -1])
    assert torch.equal(random_masking(draw_ids.cuda(), 7, 196).cpu(), random_masking(draw_ids, 7, 196))


@pytest.mark.parametrize("decoder_attention", ["self", "cross"])
def test_loss_and_gradients_are_those_of_the_cpu(decoder_attention):
    torch.manual_seed(0)
    model = fastmae.mae_vit_tiny_patch4(norm_pix_loss=True, decoder_attention=decoder_attention)
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


# --- CUDA graphs ------------------------------------------------------------------------------------------------------


def float_batch(seed, size=16, bad=False):
    """Images as floats, of which one value may not be finite."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(size, 3, 28, 28, generator=generator).cuda()
    if bad:
        images[0, 0, 3, 3] = torch.nan
    return images, random_masking(torch.arange(size).cuda(), seed, 49)


def trained(steps, graph, checkpointing="none", compiling="off", precision="bf16", float8=False):
    """What each step came to, read when all are done, and the weights and moments after them."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model = fastmae.mae_vit_tiny_patch4().cuda()
    loss_of, precise = TrainingLoss(model, 0.75), choose_precision(precision, torch.device("cuda"))
    prepare(loss_of, checkpointing, compiling, float8=float8)
    optimizer, autocast = make_optimizer(model, 1e-3, 0.05), precise.context(torch.device("cuda"))
    with precise.products():
        stepped = [
            train_step(loss_of, optimizer, micro, len(micro), 1e-3, autocast, 0.5, graph=graph) for micro in steps
        ]
    moments = [value for state in optimizer.state.values() for value in state.values()]
    seen = [torch.stack([step.loss, step.grad_norm, step.skipped]) for step in stepped]
    return seen, [tensor.detach().clone() for tensor in [*model.parameters(), *moments]]


def assert_same_bits(got, expected):
    for one, other in zip(got[0] + got[1], expected[0] + expected[1], strict=True):
        assert torch.equal(one.nan_to_num(), other.nan_to_num())


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("accum_iter", [1, 2])
def test_a_graph_gives_the_bits_of_the_steps_without_it(accum_iter, checkpointing, precision):
    """One step is not finite and is skipped; shapes change twice."""
    steps = [[float_batch(10 * step + micro) for micro in range(accum_iter)] for step in range(6)]
    steps[2][-1] = float_batch(0, bad=True)
    steps[4] = [float_batch(40 + micro, size=8) for micro in range(accum_iter)]
    got, expected = (trained(steps, graph, checkpointing, precision=precision) for graph in (PassGraph(), None))
    assert [seen[2].item() for seen in expected[0]] == [0, 0, 1, 0, 0, 0]
    assert_same_bits(got, expected)


@pytest.mark.parametrize("compiling", ["block", "model"])
def test_a_graph_of_compiled_code_gives_its_bits(compiling):
    steps = [[float_batch(step), float_batch(9)] for step in range(4)]
    assert_same_bits(trained(steps, PassGraph(), "selective", compiling), trained(steps, None, "selective", compiling))


def test_a_replayed_step_does_not_wait_for_the_gpu():
    device = torch.device("cuda")
    model = fastmae.mae_vit_tiny_patch4().cuda()
    optimizer, graph = make_optimizer(model, 1e-3, 0.05), PassGraph()
    average = start_average(model, None)
    precision, loss_of = choose_precision("auto", device), TrainingLoss(model, 0.75)
    batches = [[float_batch(seed), float_batch(seed + 1)] for seed in range(3)]

    def step(micro):
        stepped = train_step(loss_of, optimizer, micro, 2, 1e-3, precision.context(device), 0.1, graph=graph)
        update_average(average, model, 0.9, stepped.skipped)
        return stepped.skipped

    skipped = [step(batches[0])]
    torch.cuda.set_sync_debug_mode("error")
    try:
        skipped += [step(micro) for micro in batches[1:]]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.stack(skipped).tolist() == [0, 0, 0]


def test_a_run_replays_its_passes(blobs, tmp_path):
    """The images of the loader are those of the steps, and a picture in between is no harm."""
    for name, cuda_graph in (("eager", False), ("graph", True)):
        config = small_run(blobs, tmp_path / name, device="cuda", accum_iter=2, ema=0.9, cuda_graph=cuda_graph)
        assert pretrain(config) == 0
    assert metrics(tmp_path / "graph") == metrics(tmp_path / "eager")


# --- float8 -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not HAS_FLOAT8, reason="the GPU has no float8 products")
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("compiling", ["off", "block", "model"])
def test_float8_trains_as_bf16_does(compiling, checkpointing):
    pytest.importorskip("torchao")
    steps = [[float_batch(0)]] * 10
    losses = [
        torch.stack([seen[0] for seen in trained(steps, None, checkpointing, compiling, float8=float8)[0]])
        for float8 in (False, True)
    ]
    assert not torch.equal(losses[0], losses[1])
    torch.testing.assert_close(losses[1], losses[0], rtol=2e-2, atol=0)


@pytest.mark.skipif(not HAS_FLOAT8, reason="the GPU has no float8 products")
@pytest.mark.parametrize("compiling", ["off", "block"])
def test_a_graph_of_float8_gives_its_bits(compiling):
    pytest.importorskip("torchao")
    steps = [[float_batch(step), float_batch(9)] for step in range(4)]
    got, expected = (trained(steps, graph, compiling=compiling, float8=True) for graph in (PassGraph(), None))
    assert_same_bits(got, expected)


def test_fine_tuning_has_the_losses_of_the_cpu_and_a_graph_those_of_its_steps(blobs, tmp_path):
    recipe = dict(batch_size=8, epochs=1, warmup_epochs=0.5, log_freq=5, blr=4e-2, drop_path=0.2, reprob=0.25)
    kinds = {"cpu": dict(device="cpu"), "gpu": dict(device="cuda"), "graph": dict(device="cuda", cuda_graph=True)}
    for name, kind in kinds.items():
        config = FinetuneConfig(
            data_path=blobs, output_dir=str(tmp_path / name), precision="fp32", mixup=0.8, cutmix=1.0, **recipe, **kind
        )
        assert finetune(config) == 0
    np.testing.assert_allclose(metrics(tmp_path / "gpu"), metrics(tmp_path / "cpu"), rtol=1e-3)
    assert metrics(tmp_path / "graph") == metrics(tmp_path / "gpu")


@pytest.mark.skipif(not HAS_FLOAT8, reason="the GPU has no float8 products")
def test_a_run_in_float8(blobs, tmp_path):
    pytest.importorskip("torchao")
    settings = dict(device="cuda", precision="bf16", compile="block", batch_size=16)
    for name, float8 in (("bf16", False), ("float8", True)):
        assert pretrain(small_run(blobs, tmp_path / name, **settings, float8=float8)) == 0
    np.testing.assert_allclose(metrics(tmp_path / "float8"), metrics(tmp_path / "bf16"), rtol=5e-2)
