"""The fully connected masked autoencoder: its loss against a written-out one, what is hidden, what is missing."""

import itertools
import math

import numpy as np
import pytest
import torch

from fastmae.config.model import ModelSpec
from fastmae.facts import UINT8, PixelFacts
from fastmae.model.build import build_model, settings_of
from fastmae.model.mlp import MLPMAE
from fastmae.ops.bernoulli_masking import bernoulli_masking, expected_masked

FLOATS = PixelFacts(dtype="float32")
D, N, RATIO = 6, 10, 0.4
MEAN, STD = (3.0, -2.0, 0.1, 0.5, 40.0, 0.0), (2.0, 1.0, 0.3, 0.2, 10.0, 1.0)


def model_of(**kwargs):
    torch.manual_seed(0)
    settings = {"widths": (5, 3), "mean": MEAN, "std": STD, "pixels": FLOATS} | kwargs
    return MLPMAE((1, 1), D, **settings)


def table(missing=True, dtype=torch.float32):
    numbers = np.random.default_rng(0).normal(MEAN, STD, (N, D))
    if missing:
        numbers[[0, 1, 1, 5], [2, 0, 3, 5]] = np.nan
    return torch.tensor(numbers, dtype=dtype)[:, None, None, :]


def masks():
    return bernoulli_masking(torch.arange(N), 0, D, RATIO)


def plain_loss(state, x, masked, fill, loss, loss_on):
    """The loss as the documentation has it, row by row, in plain numbers [N, D] and weights by name."""
    mean, std = (torch.tensor(numbers).to(x.dtype) for numbers in (MEAN, STD))  # float32, as the model has them
    instead = {"mean": mean, "zero": torch.zeros_like(mean)}[fill]
    total = torch.zeros((), dtype=x.dtype)
    for row, hides in zip(x, masked, strict=True):
        missing = row.isnan()
        hidden = hides | missing
        h = torch.cat([(torch.where(hidden, instead, row) - mean) / std, hidden.to(x.dtype)])
        for part in ("encoder", "decoder"):
            for number, layer in enumerate((0, 2)):
                weight, bias = state[f"{part}.{layer}.weight"], state[f"{part}.{layer}.bias"]
                h = weight @ (h * (1 + torch.erf(h / math.sqrt(2))) / 2 if number else h) + bias
        for feature in range(D):
            if missing[feature] or not (hides[feature] or loss_on == "all"):
                continue
            if loss == "mse":
                total = total + (h[feature] - (row[feature] - mean[feature]) / std[feature]) ** 2
            else:
                share = row[feature].clamp(0, 1)
                total = total - share * h[feature].sigmoid().log() - (1 - share) * (-h[feature]).sigmoid().log()
    return total / (len(x) * (D if loss_on == "all" else expected_masked(D, RATIO)))


@pytest.mark.parametrize("fill", ["mean", "zero"])
@pytest.mark.parametrize("loss", ["mse", "bce"])
@pytest.mark.parametrize("loss_on", ["masked", "all"])
def test_loss_and_gradients_in_float64_are_those_of_the_written_out_loss(fill, loss, loss_on):
    model = model_of(fill=fill, loss=loss, loss_on=loss_on).double()
    images, masked = table(dtype=torch.float64), masks()
    found, pred = model.loss_and_prediction(images, masked, RATIO)
    found.backward()
    state = {name: tensor.detach().clone().requires_grad_() for name, tensor in model.state_dict().items()}
    expected = plain_loss(state, images.flatten(1), masked, fill, loss, loss_on)
    expected.backward()
    assert pred.shape == (N, D, 1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, state[name].grad, rtol=1e-9, atol=1e-13)
        assert parameter.grad.abs().max() > 0


@pytest.mark.parametrize("loss_on", ["masked", "all"])
def test_the_loss_of_two_ranks_is_the_mean_of_theirs_however_many_targets_they_have(loss_on):
    model, images, masked = model_of(loss_on=loss_on), table(), masks()
    halves = [model.training_loss(images[part], masked[part], RATIO) for part in (slice(0, 5), slice(5, 10))]
    torch.testing.assert_close(sum(halves) / 2, model.training_loss(images, masked, RATIO), rtol=1e-6, atol=0)
    targets = (masked & ~images.flatten(1).isnan()).sum(dim=1)
    assert targets[:5].sum() != targets[5:].sum()


def test_the_loss_of_complete_rows_is_on_average_the_mean_error_of_a_masked_number():
    model, images = model_of(), table(missing=False)
    losses, errors = [], []
    for number in range(400):
        masked = bernoulli_masking(torch.arange(N) + number * N, 0, D, RATIO)
        loss, pred = model.loss_and_prediction(images, masked, RATIO)
        losses.append(loss.item())
        errors.append((pred[:, :, 0] - model.rows(images).numbers)[masked].square())
    assert np.mean(losses) == pytest.approx(torch.cat(errors).mean().item(), rel=0.02)


@pytest.mark.parametrize("fill", ["mean", "zero", "noise"])
def test_nothing_that_is_hidden_is_seen(fill):
    model, images, masked = model_of(fill=fill), table(), masks()
    changed = images.clone().flatten(1)
    changed[masked] += 100
    changed[masked & torch.eye(N, D, dtype=torch.bool)] = math.nan
    changed = changed.view_as(images)
    assert torch.equal(model.predict(images, masked), model.predict(changed, masked))
    assert not torch.equal(model.predict(images, masked), model.predict(images + 1, masked))


@pytest.mark.parametrize("fill", ["mean", "zero", "noise"])
def test_a_missing_number_is_hidden_and_no_target(fill):
    """A file may hold anything there: NaN and a value that is said to stand for it are the same."""
    images, masked = table(), masks()
    marked = model_of(fill=fill, pixels=PixelFacts(dtype="float32", nodata=-99.0))
    other = images.nan_to_num(nan=-99.0)
    for ratio_of in (masked, ~masked):
        assert torch.equal(marked.training_loss(images, ratio_of), marked.training_loss(other, ratio_of))
    assert torch.equal(marked.features(images), marked.features(other))
    alone = images.clone()
    alone[..., 1] = math.nan
    gradient = torch.autograd.grad(marked.training_loss(alone, torch.ones_like(masked)), marked.last_layer.bias)[0]
    assert gradient[1] == 0
    assert (gradient[[0, 2, 3, 4, 5]] != 0).all()


def test_a_row_without_any_known_number_has_a_prediction_and_no_loss():
    model = model_of()
    images = torch.full((2, 1, 1, D), math.nan)
    loss, pred = model.loss_and_prediction(images, torch.ones(2, D, dtype=torch.bool), RATIO)
    assert loss == 0
    assert pred.isfinite().all()


def test_noise_is_of_the_mean_and_deviation_of_its_column_and_the_same_each_time():
    model = model_of(fill="noise")
    images = table(missing=False).repeat(500, 1, 1, 1) + torch.randn(500 * N, 1, 1, 1) * 1e-3
    rows, hidden = model.rows(images), torch.zeros(500 * N, D, dtype=torch.bool)
    hidden[:, :3] = True
    noise = model._filling(rows.numbers, hidden)
    assert torch.equal(noise, model._filling(rows.numbers, hidden))
    assert noise[:, :3].mean(dim=0).abs().max() < 0.07
    assert (noise[:, :3].std(dim=0) - 1).abs().max() < 0.07


@pytest.mark.parametrize("loss", ["mse", "bce"])
def test_predictions_are_in_deviations_from_the_mean_whatever_the_loss(loss):
    model = model_of(loss=loss, mean=(0.25,) * D, std=(0.5,) * D)
    with torch.no_grad():
        model.last_layer.weight.zero_()
        model.last_layer.bias.fill_(-0.5)
    expected = -0.5 if loss == "mse" else (1 / (1 + math.exp(0.5)) - 0.25) / 0.5
    torch.testing.assert_close(model.predict(table(), masks()), torch.full((N, D, 1), expected))


def test_images_are_rows_of_their_pixels_and_both_forms_are_the_same():
    model = MLPMAE((3, 2), 2, widths=(4,), mean=(0.2, 0.4), std=(0.1, 0.3), pixels=UINT8)
    images = torch.randint(0, 256, (5, 3, 2, 2), dtype=torch.uint8)
    masked = torch.rand(5, 12) < 0.5
    assert model.rows(images).missing is None
    expected = (images / 255 - torch.tensor((0.2, 0.4))) / torch.tensor((0.1, 0.3))
    torch.testing.assert_close(model.rows(images).numbers, expected.flatten(1), rtol=1e-5, atol=1e-5)
    floats = model._normalised(images)
    torch.testing.assert_close(model.training_loss(images, masked), model.training_loss(floats, masked))
    torch.testing.assert_close(model.features(images), model.features(floats), rtol=1e-4, atol=1e-5)
    assert model.features(images).shape == (5, model.feature_dim) == (5, 4)


def test_its_settings_make_one_like_it():
    model = MLPMAE((3, 2), 2, widths=(4, 3), fill="zero", loss="bce", loss_on="all")
    other = build_model(ModelSpec(**settings_of(model)))
    assert repr(other) == repr(model)
    assert other.own_settings == model.own_settings


def test_its_products_are_those_of_its_layers():
    model = model_of()
    flops = sum(product.flops for product in model.products(RATIO))
    sizes = [*itertools.pairwise([2 * D, 5, 3]), *itertools.pairwise([3, 5, D])]
    assert flops == 2 * sum(a * b for a, b in sizes)


@pytest.mark.parametrize("keeps", ["selective", "full"])
def test_checkpointing_changes_no_gradient(keeps):
    gradients = []
    for checkpointing in ("none", keeps):
        model = model_of()
        for block in (model.encoder, model.decoder):
            block.checkpointing = checkpointing
        model.training_loss(table(), masks(), RATIO).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ({"widths": ()}, "widths"),
        ({"widths": (4, 0)}, "widths"),
        ({"norm_pix_loss": True}, "norm_pix_loss"),
        ({"in_chans": 1, "mean": (0.0,), "std": (1.0,)}, "2 to"),
        ({"mean": (0.0,)}, "mean needs 6 numbers"),
        ({"std": (0.0,) * D}, "std must be positive"),
    ],
)
def test_what_does_not_fit_is_named(wrong, problem):
    settings = {"in_chans": D, "mean": MEAN, "std": STD, "pixels": FLOATS} | wrong
    with pytest.raises(ValueError, match=problem):
        MLPMAE((1, 1), **settings)


def test_what_is_no_row_of_its_width_is_named():
    model = model_of()
    with pytest.raises(ValueError, match=r"must have shape \[N, .*\], got \[10, 1, 1, 5\]"):
        model.features(table()[..., :5])
    with pytest.raises(ValueError, match="predict_ratio"):
        model.loss_and_prediction(table(), masks(), RATIO, 0.2)
    with pytest.raises(ValueError, match="pool must be mean"):
        model.features(table(), "cls")
