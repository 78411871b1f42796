"""On a GPU: the training loss in CUDA graphs and compiled, a batch beyond 32-bit offsets, a tensor left on the CPU."""

import pytest
import torch

import fastmae
from fastmae.ops import gather_patches, masked_mse, random_masking
from fastmae.ops.gather_patches import gather_patches_reference


def model_and_batches():
    torch.manual_seed(0)
    model = fastmae.mae_vit_tiny_patch4(norm_pix_loss=True).cuda()
    images = torch.randint(0, 256, (2, 16, 28, 28, 3), dtype=torch.uint8, device="cuda")
    ids = random_masking(torch.arange(32, device="cuda"), 0, 49).view(2, 16, 49)
    return model, images, ids, [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("bf16", [False, True])
def test_forward_and_backward_replay_in_a_cuda_graph(bf16):
    model, images, ids, parameters = model_and_batches()

    def loss_and_gradients(images, ids):
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=bf16, cache_enabled=False):
            loss = model.training_loss(images, ids)
        return loss, *torch.autograd.grad(loss, parameters)

    static_images, static_ids = images[0].clone(), ids[0].clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            loss_and_gradients(static_images, static_ids)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = loss_and_gradients(static_images, static_ids)
    for batch in (0, 1):
        static_images.copy_(images[batch])
        static_ids.copy_(ids[batch])
        graph.replay()
        for got, expected in zip(replayed, loss_and_gradients(images[batch], ids[batch]), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_the_training_loss_compiles_as_one_graph(mode):
    model, images, ids, parameters = model_and_batches()
    compiled = torch.compile(model.training_loss, fullgraph=True, mode=mode)
    for batch in (0, 1, 0):
        loss, expected = compiled(images[batch], ids[batch]), model.training_loss(images[batch], ids[batch])
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
        gradients = torch.autograd.grad(loss, parameters)
        whole = torch.stack([gradient.norm() for gradient in gradients]).norm()
        for got, plain in zip(gradients, torch.autograd.grad(expected, parameters), strict=True):
            assert (got - plain).norm() <= 1e-4 * plain.norm() + 1e-6 * whole


def test_a_batch_beyond_32_bits():
    images = torch.randint(0, 256, (4096, 448, 448, 3), dtype=torch.uint8, device="cuda")
    ids = torch.tensor([[783, 5]], dtype=torch.int32, device="cuda").expand(4096, -1)
    mean, std = torch.zeros(3, device="cuda"), torch.ones(3, device="cuda")
    got = gather_patches(images, ids, (16, 16), mean, std, torch.bfloat16)
    arguments = images[-1:], ids[-1:], (16, 16), mean, std
    assert torch.equal(got[-1:], gather_patches_reference(*arguments, torch.bfloat16))
    pred = torch.randn(1, 2, 768, device="cuda")
    assert masked_mse(pred, *arguments, True).isfinite()


@pytest.mark.parametrize("dtype", [torch.uint16, torch.float32])
def test_wide_pixels_with_missing_ones_are_as_on_a_cpu(dtype):
    """The patches, the loss and its gradient; a patch with a missing pixel is no target in any of them."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 4096, (8, 64, 48, 3), generator=generator, dtype=torch.int32)
    images[0, 5, 5], images[3, 17:40] = 7, 7
    images, ids = images.to(dtype), random_masking(torch.arange(8), 0, 12)
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.1])
    value_range = torch.tensor([[0.0, 10.0, -5.0], [4095.0, 4000.0, 2000.0]])
    found = []
    for device in ("cpu", "cuda"):
        pixels, order, m, s, ends = (tensor.to(device) for tensor in (images, ids, mean, std, value_range))
        visible = gather_patches(pixels, order[:, :3], (16, 16), m, s, torch.float32, ends, 7.0)
        pred = torch.randn(8, 9, 768, generator=torch.Generator().manual_seed(1)).to(device).requires_grad_()
        loss = masked_mse(pred, pixels, order[:, 3:], (16, 16), m, s, True, ends, 7.0)
        found.append([tensor.cpu() for tensor in (visible, loss.detach(), torch.autograd.grad(loss, pred)[0])])
    for got, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_tensors_on_the_wrong_device_are_named():
    images, ids = torch.zeros(1, 4, 4, 1, dtype=torch.uint8, device="cuda"), torch.zeros(1, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match="ids must be on the device of images"):
        gather_patches(images, ids, (4, 4), torch.zeros(1).cuda(), torch.ones(1).cuda(), torch.float32)
