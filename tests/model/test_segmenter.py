"""Segmenters: an encoder and a head that gives every pixel a class."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks

from fastmae.model.classifier import stochastic_depth_mask
from fastmae.model.mae import MaskedAutoencoderViT
from fastmae.model.segmenter import HEADS, IGNORED, SHARP, SegmentationLoss, segmenter_of, taps_of
from fastmae.model.upernet import BatchNorm, upernet_taps

CLASSES = 3


@pytest.fixture
def mae():
    torch.manual_seed(0)
    return MaskedAutoencoderViT(
        (16, 24), (4, 8), 3, 32, 5, 2, 32, 1, 2, norm_layer=partial(torch.nn.LayerNorm, eps=1e-6)
    )


@pytest.fixture
def images():
    return torch.randint(0, 256, (2, 16, 24, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


@pytest.fixture
def maps():
    maps = torch.randint(0, CLASSES, (2, 16, 24), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    maps[0, :5] = IGNORED
    return maps


def plain_logits(model, tokens):
    """The heads, written out: ``tokens`` are those after each block, [N, 1+L, D], not normalised."""
    w, (rows, columns) = dict(model.named_parameters()), model.grid_size
    D = model.cls_token.shape[2]
    levels = [tokens[tap][:, 1:] for tap in model.taps]
    levels[-1] = F.layer_norm(levels[-1], (D,), w["norm.weight"], w["norm.bias"], 1e-6)
    N = len(levels[0])
    if model.segmenter_head == "linear":
        logits = levels[-1] @ w["head.classify.weight"].T + w["head.classify.bias"]
        logits = logits.reshape(N, rows, columns, CLASSES).permute(0, 3, 1, 2)
    else:
        x = 0.0
        for i, level in enumerate(levels):
            level = F.layer_norm(level, (D,), w[f"head.norms.{i}.weight"], w[f"head.norms.{i}.bias"], 1e-6)
            x = x + level @ w[f"head.levels_in.{i}.weight"].T + w[f"head.levels_in.{i}.bias"]
        x = F.gelu(x.reshape(N, rows, columns, -1).permute(0, 3, 1, 2))
        x = F.gelu(F.conv2d(x, w["head.around.weight"], w["head.around.bias"], padding=1)).permute(0, 2, 3, 1)
        x = x @ w["head.refine.weight"].T + w["head.refine.bias"]
        fh, fw = model.patch_size[0] // 2, model.patch_size[1] // 2
        fine = x.new_zeros(N, SHARP, rows * fh, columns * fw)
        for i in range(fh):
            for j in range(fw):
                fine[:, :, i::fh, j::fw] = x[..., i * fw + j :: fh * fw].permute(0, 3, 1, 2)
        logits = F.conv2d(F.gelu(fine), w["head.classify.weight"], w["head.classify.bias"], padding=1)
    return F.interpolate(logits, size=model.img_size, mode="bilinear", align_corners=False)


def plain_loss(model, images, maps):
    """Cross-entropy over the labelled pixels, divided by the number of all pixels."""
    x, tokens = model._embed_all(images), []
    for block in model.blocks:
        x = block(x)
        tokens.append(x)
    logits = plain_logits(model, tokens).permute(0, 2, 3, 1).reshape(-1, CLASSES)
    labels = maps.reshape(-1).long()
    known = labels != IGNORED
    return -logits[known].log_softmax(1)[torch.arange(int(known.sum())), labels[known]].sum() / labels.numel()


OURS = ("linear", "pyramid")  # UPerNet is compared with that of transformers


@pytest.mark.parametrize("head", OURS)
def test_the_loss_and_its_gradients_are_those_of_a_plain_reference(mae, images, maps, head):
    model = segmenter_of(mae, CLASSES, head).double()
    loss = SegmentationLoss(model)(images, maps)
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    expected = plain_loss(model, images, maps)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for (name, _), mine, plain in zip(
        model.named_parameters(),
        gradients,
        torch.autograd.grad(expected, list(model.parameters()), allow_unused=True),
        strict=True,
    ):
        assert mine is not None, f"{name} is not trained"
        torch.testing.assert_close(mine, plain, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("head", HEADS)
def test_the_encoder_is_that_of_the_masked_autoencoder(mae, images, head):
    model = segmenter_of(mae, CLASSES, head)
    for name, tensor in mae.state_dict().items():
        if not name.startswith(("decoder_", "mask_token", *(("norm.",) if head == "upernet" else ()))):
            assert torch.equal(model.state_dict()[name], tensor), name
    _, theirs = mae.forward_intermediates(images, list(model.taps), norm=False, output_fmt="NLC")
    ours = model.levels(images)
    for mine, other in zip(ours[:-1], theirs[:-1], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
    last = theirs[-1] if head == "upernet" else mae.norm(theirs[-1])
    torch.testing.assert_close(ours[-1], last, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head", OURS)
def test_twenty_steps_are_those_of_a_plain_loop(mae, images, maps, head):
    model, plain = (segmenter_of(mae, CLASSES, head).double() for _ in range(2))
    plain.load_state_dict(model.state_dict())
    loss_of = SegmentationLoss(model)
    optimizers = [torch.optim.AdamW(one.parameters(), lr=1e-3, weight_decay=0.05) for one in (model, plain)]
    for _ in range(20):
        for optimizer, compute in zip(
            optimizers, (lambda: loss_of(images, maps), lambda: plain_loss(plain, images, maps)), strict=True
        ):
            optimizer.zero_grad()
            compute().backward()
            optimizer.step()
    torch.testing.assert_close(loss_of(images, maps), plain_loss(plain, images, maps), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("size", [(16, 24), (32, 16)])
def test_every_pixel_has_logits_at_any_size_of_whole_patches(mae, head, size):
    model = segmenter_of(mae, CLASSES, head, img_size=size).eval()
    assert model(torch.zeros(1, *size, 3, dtype=torch.uint8)).shape == (1, CLASSES, *size)
    with pytest.raises(ValueError, match="multiple"):
        segmenter_of(mae, CLASSES, head, img_size=(15, 24))


def test_large_sums_have_no_subnormal_gradients(mae, images, maps):
    # GELU'(x) of x from -13.1 to -14.4 is a subnormal float32, with which processors compute very slowly.
    model = segmenter_of(mae, CLASSES)
    with torch.no_grad():
        model.head.around.bias.copy_(torch.linspace(-60, 20, len(model.head.around.bias)))
    sums = []

    def note(module, inputs, out):
        out.retain_grad()
        sums.append(out)

    model.head.around.register_forward_hook(note)
    SegmentationLoss(model)(images, maps).backward()
    gradient = sums[0].grad.abs()
    assert (sums[0] < -13).any()
    assert (gradient > 0).any()
    assert not ((gradient > 0) & (gradient < torch.finfo(torch.float32).tiny)).any()


def test_the_loss_of_a_batch_is_the_mean_of_its_parts_whatever_is_ignored(mae, images, maps):
    loss_of = SegmentationLoss(segmenter_of(mae, CLASSES).double())
    halves = [loss_of(images[i : i + 1], maps[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(sum(halves) / 2, loss_of(images, maps))
    assert loss_of(images, torch.full_like(maps, IGNORED)) == 0


def test_branches_are_skipped_as_in_a_classifier(mae, images, maps):
    model = segmenter_of(mae, CLASSES).double()
    mask = stochastic_depth_mask(0, torch.arange(2).numpy(), 0.9, len(model.blocks)).double()
    ones = torch.ones_like(mask)
    loss_of = SegmentationLoss(model)
    assert torch.equal(loss_of(images, maps, ones), loss_of(images, maps))
    assert not torch.equal(loss_of(images, maps, mask), loss_of(images, maps))


@pytest.mark.parametrize(
    ("depth", "levels", "taps"), [(12, 4, (2, 5, 8, 11)), (24, 4, (5, 11, 17, 23)), (4, 1, (3,)), (2, 4, (0, 0, 0, 1))]
)
def test_levels_are_evenly_spaced(depth, levels, taps):
    assert taps_of(depth, levels) == taps


def test_layers_and_products_are_named_for_the_optimiser_and_the_count(mae):
    model = segmenter_of(mae, CLASSES, "pyramid")
    assert {model.layer_of(name) for name, _ in model.named_parameters()} == set(range(len(model.blocks) + 2))
    assert model.layer_of("head.refine.weight") == model.last_layer
    products = model.products()
    assert sum(one.name.startswith("head") for one in products) == 7
    assert all(one.flops > 0 for one in products)


@pytest.mark.parametrize("training", [False, True])
def test_upernet_is_that_of_transformers(mae, training):
    """Its decoder and auxiliary head, with the statistics of a batch and with those that were kept."""
    transformers = pytest.importorskip("transformers")
    stages = [f"stage{number}" for number in range(1, 5)]
    sizes = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32)
    backbone = transformers.BeitConfig(**sizes, out_features=stages)
    config = transformers.UperNetConfig(backbone_config=backbone, num_labels=CLASSES)
    other = transformers.UperNetForSemanticSegmentation(config).double().train(training)
    head = segmenter_of(mae, CLASSES, "upernet").double().train(training).head
    weights = head.state_dict()
    for part, prefix in ((other.decode_head, ""), (other.auxiliary_head, "auxiliary_head.")):
        part.load_state_dict({name: weights[prefix + name] for name in part.state_dict()}, strict=True)
    tokens = [torch.randn(2, 16, 32, dtype=torch.float64) for _ in range(4)]
    maps = [one.mT.unflatten(2, (4, 4)) for one in tokens]
    levels = copy.deepcopy(head.fpn)(maps)
    assert [x.shape[2] for x in levels] == [16, 8, 4, 2]
    torch.testing.assert_close(head(tokens, (4, 4)), other.decode_head(levels), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(head.auxiliary(tokens, (4, 4)), other.auxiliary_head(maps), rtol=1e-10, atol=1e-12)


def test_upernet_needs_a_grid_that_can_be_halved(mae):
    with pytest.raises(ValueError, match="2 rows and 2 columns"):
        segmenter_of(mae, CLASSES, "upernet", img_size=(4, 24))


def test_statistics_that_are_not_finite_are_not_kept():
    norm, plain = BatchNorm(3), torch.nn.BatchNorm2d(3)
    x = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(norm(x), plain(x))
    norm(x.where(x < 1, torch.nan))
    for name, kept in plain.state_dict().items():
        torch.testing.assert_close(norm.state_dict()[name], kept, msg=name)


def test_upernet_looks_at_the_published_blocks():
    assert upernet_taps(12) == (3, 5, 7, 11)
    assert upernet_taps(24) == (7, 11, 15, 23)


@pytest.mark.slow
def test_batch_norm_of_two_ranks_is_that_of_their_images_together(tmp_path):
    torch.manual_seed(0)
    x, target = torch.randn(6, 5, 4, 3), torch.randn(6, 5, 4, 3)
    norm = BatchNorm(5)
    whole = x.clone().requires_grad_()
    (norm(whole) * target).sum().backward()
    torch.save((x, target), tmp_path / "inputs.pt")
    run_ranks(2, partial(_half, tmp_path))
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    torch.testing.assert_close(torch.cat([part["x"] for part in parts]), whole.grad)
    torch.testing.assert_close(sum(part["weight"] for part in parts), norm.weight.grad)
    for part in parts:
        torch.testing.assert_close(part["mean"], norm.running_mean)
        torch.testing.assert_close(part["var"], norm.running_var)


def _half(folder):
    """Normalises a half of the images as one of two ranks."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    x, target = (tensor[3 * rank : 3 * rank + 3] for tensor in torch.load(folder / "inputs.pt"))
    x.requires_grad_()
    norm = BatchNorm(5)
    (norm(x) * target).sum().backward()
    kept = {"x": x.grad, "weight": norm.weight.grad, "mean": norm.running_mean, "var": norm.running_var}
    torch.save(kept, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()
    return 0
