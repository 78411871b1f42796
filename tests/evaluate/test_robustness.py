"""Corruptions and attacks, against written-out references and the limits that they must keep."""

import colorsys
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import small_run
from scipy import stats

import fastmae
from fastmae.cli import main
from fastmae.evaluate.attacks import fgsm, on_pixels, pgd
from fastmae.evaluate.corruptions import KINDS, Corruption, _plasma, _Random, _shot_noise
from fastmae.evaluate.linear_probe import logistic_classifier, logistic_predictions
from fastmae.train.pretrain import pretrain


def photo(side, channels):
    """A picture with edges and slopes, uint8 [side, side, channels]."""
    y, x = np.mgrid[:side, :side] / side
    waves = [np.sin(9 * x + 5 * y * number) for number in range(1, channels + 1)]
    return np.rint(60 * np.stack(waves, axis=2) + 90 + 60 * (x > y)[:, :, None]).astype(np.uint8)


@pytest.mark.parametrize("kind", KINDS)
def test_a_corruption_is_a_function_of_seed_and_number_and_grows_with_the_severity(kind):
    for side, channels in ((24, 1), (24, 3), (70, 3)):
        image = photo(side, channels)
        changed = [Corruption(kind, severity)(image, np.array([7])) for severity in (1, 5)]
        assert all(one.dtype == np.uint8 and one.shape == image.shape for one in changed)
        assert np.array_equal(changed[1], Corruption(kind, 5)(image, np.array([7])))
        mild, hard = (np.abs(one.astype(float) - image).mean() for one in changed)
        assert hard > 0.5
        assert mild < hard or kind == "elastic_transform"  # of which the published constants do not grow
    random = Corruption(kind, 5)(photo(70, 3), np.array([8]))
    fixed = ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression")
    assert np.array_equal(changed[1], random) == (kind in fixed)


def test_noise_has_the_published_strength():
    gray = np.full((90, 90, 3), 128, np.uint8)
    noise = Corruption("gaussian_noise", 1)(gray, np.array([0])) / 255 - 128 / 255
    assert abs(noise.mean()) < 0.002
    assert noise.std() == pytest.approx(0.08, rel=0.03)
    impulses = Corruption("impulse_noise", 2)(gray, np.array([0]))
    assert [(impulses == value).mean() for value in (0, 255)] == pytest.approx([0.03, 0.03], abs=0.005)
    x = np.arange(256).reshape(16, 16, 1) / 255
    draws = _Random(3, 0).uniform(16, 16, 1)
    assert np.array_equal(_shot_noise(x, 12, _Random(3, 0)), stats.poisson.ppf(draws, 12 * x).clip(0) / 12)


def test_blur_keeps_what_has_no_edge_and_brightness_keeps_the_hue():
    plain = np.full((70, 70, 3), (10, 120, 250), np.uint8)
    for kind in ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "contrast", "pixelate", "elastic_transform"):
        assert np.abs(Corruption(kind, 5)(plain, np.array([0])).astype(int) - plain).max() <= 1
    image = photo(70, 3)
    brighter = Corruption("brightness", 2)(image, np.array([0]))
    for row, column in ((3, 9), (60, 20)):
        hue, saturation, value = colorsys.rgb_to_hsv(*image[row, column] / 255)
        expected = colorsys.hsv_to_rgb(hue, saturation, min(1, value + 0.2))
        assert brighter[row, column] == pytest.approx(255 * np.array(expected), abs=0.51)
    x = image / 255
    mean = x.mean(axis=(0, 1))
    np.testing.assert_allclose(
        Corruption("contrast", 1)(image, np.array([0])) / 255, (x - mean) * 0.4 + mean, atol=0.002
    )
    cloud = _plasma(32, 2.0, _Random(0, 0))
    assert (cloud.min(), cloud.max()) == (0, 1)


@pytest.fixture(scope="module")
def attacked():
    torch.manual_seed(0)
    model = fastmae.mae_vit_tiny_patch4(img_size=16, in_chans=1).eval().requires_grad_(False)
    weight = torch.randn(3, 128)
    logits_of = on_pixels(model, lambda images: model.features(images) @ weight.T)
    pixels = torch.rand(6, 1, 16, 16)
    pixels[0, :, :4] = 0
    pixels[1, :, :4] = 1
    return model, logits_of, pixels, logits_of(pixels).argmax(dim=1)


def test_the_attacked_logits_are_those_of_8_bits(attacked):
    model = attacked[0]
    images = torch.randint(0, 256, (3, 16, 16, 1), dtype=torch.uint8)
    weight = torch.eye(128)
    own = on_pixels(model, lambda floats: model.features(floats) @ weight)
    torch.testing.assert_close(own(images.permute(0, 3, 1, 2) / 255), model.features(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("radius", [1 / 255, 8 / 255])
def test_attacks_stay_in_the_ball_and_the_range_and_pgd_does_more_damage_than_fgsm(attacked, radius):
    _, logits_of, pixels, labels = attacked
    losses = [F.cross_entropy(logits_of(pixels), labels, reduction="none")]
    once, often = fgsm(logits_of, pixels, labels, radius), pgd(logits_of, pixels, labels, radius, ids=np.arange(6))
    for changed in (once, often):
        assert (changed - pixels).abs().max() <= radius + 1e-7
        assert changed.min() >= 0
        assert changed.max() <= 1
        losses.append(F.cross_entropy(logits_of(changed), labels, reduction="none"))
    assert losses[0].mean() < losses[1].mean() < losses[2].mean()
    assert (losses[1] <= losses[2] + 1e-6).all()
    alone = pgd(logits_of, pixels[2:3], labels[2:3], radius, ids=np.array([2]))
    torch.testing.assert_close(alone, often[2:3], rtol=0, atol=2 * radius / 20)


def test_attacks_are_the_written_out_loops(attacked):
    """By hand on a classifier whose gradient is known: linear logits w · x, of which a step's direction never turns."""
    weight, pixels = (
        torch.tensor([[1.0, -2.0, 0.5], [-1.0, 1.0, 2.0]]),
        torch.tensor([[0.5, 0.2, 0.995]]).view(1, 3, 1, 1),
    )
    logits_of = lambda x: x.flatten(1) @ weight.T  # noqa: E731
    for attack in (fgsm, lambda *args: pgd(*args, ids=np.arange(1))):
        found = attack(logits_of, pixels, torch.tensor([0]), 0.01).flatten()
        assert found.tolist() == pytest.approx([0.49, 0.21, 1.0])  # away from class 0: sign of w1 − w0, cut to 1


def test_the_differentiable_classifier_predicts_as_logistic_regression():
    generator = torch.Generator().manual_seed(1)
    for classes in (2, 4):
        features, labels = torch.randn(80, 5, generator=generator), torch.arange(80) % classes
        features[:, 0] += labels
        linear = logistic_classifier(features, labels, classes + 1)
        assert torch.equal(linear(features).argmax(dim=1), logistic_predictions(features, labels, features))


@pytest.fixture(scope="module")
def run(blobs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("robust") / "run"
    assert pretrain(small_run(blobs, folder, epochs=1)) == 0
    return folder


def test_the_command_tells_every_kind_and_every_attack(run, blobs, tmp_path, capsys):
    words = ["probe", str(run), "--data_path", str(blobs), "--corruptions", "--severity", "5", "--attacks", "fgsm"]
    assert main([*words, "--radius", "64", "--output", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "jpeg compression" in shown
    assert "frost, which is made of photographs" in shown
    found = json.loads((tmp_path / "out" / "robustness.json").read_text())
    assert found["corruptions"]["constants"] == "CIFAR-10-C"
    for name in ("knn", "linear"):
        kinds = found["corruptions"][name]["kinds"]
        assert tuple(kinds) == KINDS
        assert found["corruptions"][name]["mean"] == pytest.approx(
            np.mean([one["mean"] for one in kinds.values()]), abs=0.01
        )
    clean = json.loads((tmp_path / "out" / "probe.json").read_text())
    assert found["corruptions"]["clean"] == {"knn": clean["knn"], "linear": clean["linear"]}
    assert found["attacks"]["linear"]["clean"] == clean["linear"]
    assert found["attacks"]["linear"]["fgsm"]["64"] <= clean["linear"]


WRONG = {
    "no severity": (["--corruptions", "--severity", "0"], "--severity 0: must be 1 to 5"),
    "too severe": (["--corruptions", "--severity", "6"], "--severity 6: must be 1 to 5"),
    "severity of nothing": (["--severity", "3"], "given together with --corruptions"),
    "no radius": (["--attacks", "pgd", "--radius", "0"], "--radius 0.0: must be above 0 and at most 255"),
    "radius of nothing": (["--radius", "2"], "given together with --attacks"),
    "another attack": (["--attacks", "cw"], "--attacks"),
    "with few labels": (["--attacks", "pgd", "--shots", "1"], "left out with --corruptions or --attacks"),
    "another classifier": (["--corruptions", "--linear", "lars"], "logistic with --corruptions or --attacks"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line_and_status_2(case, run, refusal):
    words, expected = WRONG[case]
    assert expected in refusal(["probe", str(run), *words])
