"""RankMe and the deviation of features are what their definitions say."""

import math

import numpy as np
import pytest
import torch

import fastmae
from fastmae.data.arrays import ArraySource
from fastmae.evaluate import spread
from fastmae.evaluate.features import extract_features
from fastmae.evaluate.spread import feature_spread, feature_std, rankme


def test_rankme_is_the_exponential_of_the_entropy_of_the_singular_values():
    features = torch.from_numpy(np.random.default_rng(0).normal(size=(50, 12))).float()
    shares = np.linalg.svd(features.double().numpy(), compute_uv=False)
    shares = shares / shares.sum() + 1e-7
    assert rankme(features) == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)), rel=1e-12)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_rankme_of_equally_long_orthogonal_directions_is_their_number(rank):
    assert rankme(torch.eye(8)[:rank].repeat(5, 1)) == pytest.approx(rank, rel=1e-4)


def test_a_collapse_is_rank_one_without_deviation():
    same = torch.randn(1, 16, generator=torch.Generator().manual_seed(0)).expand(40, -1)
    assert rankme(same) == pytest.approx(1, rel=1e-4)
    assert feature_std(same) == pytest.approx(0, abs=1e-7)
    assert rankme(torch.zeros(4, 4)) == pytest.approx(1, rel=1e-4)
    assert feature_std(torch.zeros(4, 4)) == 0


def test_the_deviation_is_that_of_directions_and_one_if_they_are_spread_evenly():
    values = np.random.default_rng(0).normal(size=(4000, 24))
    directions = values / np.linalg.norm(values, axis=1, keepdims=True)
    longer = torch.from_numpy(values * np.linspace(1, 9, 4000)[:, None])
    assert feature_std(longer) == pytest.approx(directions.std(axis=0).mean() * math.sqrt(24), rel=1e-12)
    assert feature_std(longer) == pytest.approx(1, abs=0.01)


def test_a_source_is_measured_by_the_features_that_a_probe_sees(monkeypatch):
    images = np.random.default_rng(0).integers(0, 255, (30, 16, 16, 1), np.uint8)
    model, source = fastmae.mae_vit_tiny_patch4(img_size=16, in_chans=1), ArraySource(images, None, "x")
    features = extract_features(model, source, pool="mean", batch_size=7, num_workers=1).values
    assert feature_spread(model, source, batch_size=7) == {
        "rankme": rankme(features),
        "feature_std": feature_std(features),
    }
    monkeypatch.setattr(spread, "MOST_IMAGES", 10)
    every_third = features[np.linspace(0, 29, 10).astype(int)]
    assert feature_spread(model, source, batch_size=7)["rankme"] == pytest.approx(rankme(every_third), rel=1e-6)
