"""FCMAE of ConvNeXt V2: the same numbers as a dense model with masks, and nothing of what is masked."""

from __future__ import annotations

import pytest
import torch

from fastmae.model.convnext import ConvNeXtMAE
from fastmae.model.convnext_classifier import convnext_classifier_of
from fastmae.model.reference_convnext import ReferenceFCMAE

SIZES = dict(depths=(1, 2, 1, 1), dims=(8, 12, 16, 20), decoder_embed_dim=24)
IMAGE = (96, 160)
L = 15


def _model(norm_pix_loss: bool = True, **sizes) -> ConvNeXtMAE:
    torch.manual_seed(0)
    model = ConvNeXtMAE(IMAGE, 3, norm_pix_loss=norm_pix_loss, **{**SIZES, **sizes})
    with torch.no_grad():  # GRN and biases begin at zero, which would hide them
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def _reference(model: ConvNeXtMAE) -> ReferenceFCMAE:
    other = ReferenceFCMAE(3, model.depths, model.dims, model.norm_pix_loss, model.mask_token.shape[2])
    other.load_state_dict(model.state_dict())
    return other


def _batch(N: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(N, 3, *IMAGE, dtype=torch.float64), torch.rand(N, L).argsort(dim=1)


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_loss_and_gradients_are_those_of_the_dense_model_in_float64(norm_pix_loss):
    model = _model(norm_pix_loss).double()
    reference = _reference(model).double()
    images, ids = _batch()
    loss = model.training_loss(images, ids, 0.6)
    expected, pred, _ = reference(images, ids, 0.6)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(model.predict(images, ids, 0.6), pred, rtol=1e-9, atol=1e-10)
    theirs = dict(reference.named_parameters())
    assert {*theirs} == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, name
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-7, atol=1e-12, msg=name)


def test_in_float32_it_is_as_near_to_the_truth_as_the_dense_model():
    """These widths are computed by the kernels, which float64 and narrow models are not."""
    model = _model(depths=(2, 1, 1, 1), dims=(16, 20, 40, 64), decoder_embed_dim=32)
    reference = _reference(model)
    images, ids = _batch()

    def results(of, call, dtype):
        loss = call(of.to(dtype), images.to(dtype))
        names, parameters = zip(*of.named_parameters(), strict=True)
        return loss.detach().double(), dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))

    loss, gradients = results(model, lambda of, images: of.training_loss(images, ids, 0.6), torch.float32)
    same_loss, same = results(reference, lambda of, images: of(images, ids, 0.6)[0], torch.float32)
    true_loss, truth = results(reference, lambda of, images: of(images, ids, 0.6)[0], torch.float64)
    assert abs(loss - true_loss) <= abs(same_loss - true_loss) + 1e-6 * true_loss
    errors = []
    for name, right in truth.items():
        ours, theirs = ((one[name].double() - right).norm() / right.norm() for one in (gradients, same))
        assert ours <= 2 * theirs + 1e-6, name
        errors.append((ours, theirs))
    # The dense model's own errors are around 5e-7, its largest 1.2e-6: no float32 gradient is nearer to another one.
    ours, theirs = torch.tensor(errors).T
    assert ours.median() <= 1.3 * theirs.median()
    assert ours.max() <= 1.5 * theirs.max()


def test_in_bf16_loss_and_gradients_are_near_those_of_float32():
    model = _model(depths=(2, 1, 1, 1), dims=(16, 20, 40, 64), decoder_embed_dim=32)
    images, ids = _batch()
    names, parameters = zip(*model.named_parameters(), strict=True)
    loss = model.training_loss(images.float(), ids, 0.6)
    expected = torch.autograd.grad(loss, parameters)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model.training_loss(images.float(), ids, 0.6)
    gradients = torch.autograd.grad(rounded, parameters)
    assert 0 < abs(rounded - loss) < 1e-2 * loss
    for name, one, other in zip(names, gradients, expected, strict=True):
        assert one.dtype == torch.float32, name
        assert (one - other).norm() < 0.15 * other.norm(), name


@pytest.mark.parametrize("multiply", [0.0, 1.25])
def test_drop_path_multiplies_the_branch_of_each_image(multiply):
    """Beside blocks that are written out: x + mask · branch, of each image its own mask."""
    classifier = convnext_classifier_of(_model().double(), 3).double()
    reference = _reference(_model()).double()
    reference.load_state_dict({n: t for n, t in classifier.state_dict().items()}, strict=False)
    images, _ = _batch()
    mask = torch.ones(len(classifier.blocks), 2, len(images), dtype=torch.float64)
    mask[1, 0, 0] = mask[3, 0, 2] = mask[4, 0, 1] = multiply
    found = classifier(images, mask)

    x = reference.stem(images)
    seen = torch.ones(len(images), 1, 1, 1, dtype=torch.float64)
    blocks = iter(mask[:, 0])
    for stage in reference.stages:
        x = stage["downsample"](x)
        for block in stage["blocks"]:
            x = x + next(blocks)[:, None, None, None] * (block(x, seen) - x)
    pooled = torch.nn.functional.layer_norm(x.mean(dim=(2, 3)), (20,), eps=1e-6)
    pooled = pooled * classifier.fc_norm.weight + classifier.fc_norm.bias
    torch.testing.assert_close(found, pooled @ classifier.head.weight.T + classifier.head.bias, rtol=1e-9, atol=1e-10)
    assert not torch.allclose(found, classifier(images))


def test_20_steps_of_adamw_are_those_of_a_plain_loop():
    model = _model()
    reference = _reference(model)
    pairs = [(one, torch.optim.AdamW(one.parameters(), lr=1e-3, betas=(0.9, 0.95))) for one in (model, reference)]
    for step in range(20):
        torch.manual_seed(step)
        images, ids = torch.randn(2, 3, *IMAGE), torch.rand(2, L).argsort(dim=1)
        losses = []
        for one, optimizer in pairs:
            loss = model.training_loss(images, ids, 0.6) if one is model else reference(images, ids, 0.6)[0]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)


def test_masked_pixels_change_no_bit_of_the_encoder():
    model = _model()
    images, ids = _batch()
    images = images.float()
    K = model.num_visible(0.6)
    latent = model.encode(images, ids[:, :K])
    patches = model.patchify(images)
    for row in range(len(images)):
        patches[row, ids[row, K:]] = 1e6 * torch.randn_like(patches[row, ids[row, K:]])
    changed = model.unpatchify(patches)
    assert not torch.equal(changed, images)
    assert torch.equal(model.encode(changed, ids[:, :K]), latent)


def test_in_evaluation_all_positions_count():
    model = _model().double()
    images, _ = _batch()
    seen = torch.ones(len(images), 1, IMAGE[0] // 32, IMAGE[1] // 32, dtype=torch.float64)
    expected = _reference(model).double().encode(images, seen).flatten(2).mT
    torch.testing.assert_close(model.forward_features(images), expected, rtol=1e-9, atol=1e-10)
    pooled = torch.nn.functional.layer_norm(expected.mean(dim=1), (20,), eps=1e-6)
    torch.testing.assert_close(model.features(images), pooled, rtol=1e-9, atol=1e-10)


def test_cells_in_any_order_give_their_own_latents():
    model = _model().double()
    images, ids = _batch()
    K = model.num_visible(0.6)
    order = torch.randperm(K)
    latent = model.encode(images, ids[:, :K])
    torch.testing.assert_close(model.encode(images, ids[:, :K][:, order]), latent[:, order], rtol=1e-9, atol=1e-10)


def test_other_sizes_of_images_need_no_other_weights():
    model = _model().double()
    model.allow_sizes([(64, 96)])
    torch.manual_seed(2)
    images, ids = torch.randn(2, 3, 64, 96, dtype=torch.float64), torch.rand(2, 6).argsort(dim=1)
    expected, *_ = _reference(model).double()(images, ids, 0.6)
    torch.testing.assert_close(model.training_loss(images, ids, 0.6), expected, rtol=1e-10, atol=0)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="100"):
        ConvNeXtMAE((96, 100), **SIZES)
    with pytest.raises(ValueError, match="four stages"):
        ConvNeXtMAE(96, depths=(1, 1), dims=(8, 8))
    with pytest.raises(ValueError, match="predict_ratio"):
        _model().training_loss(*_batch(), 0.6, predict_ratio=0.2)
