"""k-NN and the linear probe against a slow count and known answers."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fastmae
from fastmae.data.sources import ArraySource, open_train, train_and_val
from fastmae.errors import UserError
from fastmae.evaluate.features import extract_features
from fastmae.evaluate.knn import knn_accuracy
from fastmae.evaluate.linear_probe import linear_probe_accuracy
from fastmae.evaluate.probe import probe


def test_knn_is_a_slow_weighted_vote():
    torch.manual_seed(0)
    train, test = torch.randn(60, 8), torch.randn(25, 8)
    labels, truth = torch.randint(0, 4, (60,)), torch.randint(0, 4, (25,))
    right = 0
    for feature, label in zip(test, truth.tolist(), strict=True):
        similarity = [F.cosine_similarity(feature, other, dim=0).item() for other in train]
        nearest = sorted(range(60), key=lambda i: -similarity[i])[:7]
        votes = [sum(math.exp(similarity[i] / 0.07) for i in nearest if labels[i] == c) for c in range(4)]
        right += votes.index(max(votes)) == label
    assert knn_accuracy(train, labels, test, truth, k=7) == pytest.approx(100 * right / 25)


def test_knn_with_more_neighbours_than_samples():
    assert knn_accuracy(torch.eye(2), torch.tensor([0, 1]), torch.eye(2), torch.tensor([0, 1]), k=20) == 100


def test_linear_probe_separates_what_is_separable():
    torch.manual_seed(0)
    labels = torch.randint(0, 2, (200,))
    features = torch.randn(200, 5) * torch.tensor([1.0, 1, 1, 1, 1000]) + 3 * labels[:, None] * torch.eye(5)[0]
    accuracy = linear_probe_accuracy(features[:150], labels[:150], features[150:], labels[150:])
    assert accuracy > 85


def test_features_are_the_encoders_whatever_the_batch_size():
    torch.manual_seed(0)
    model = fastmae.mae_vit_tiny_patch4(img_size=16, in_chans=1)
    source = open_train("digits")
    some = ArraySource(source.images[:10], None, "x")
    features = extract_features(model, some, pool="mean", batch_size=3, num_workers=2)
    assert features.shape == (10, 128)
    torch.testing.assert_close(features, extract_features(model, some, pool="mean", batch_size=10, num_workers=1))
    native = ArraySource(np.random.default_rng(0).integers(0, 256, (3, 16, 16, 1), dtype=np.uint8), None, "x")
    tokens = model.forward_features(torch.from_numpy(native.images))
    got = extract_features(model, native, pool="cls", batch_size=3, num_workers=1)
    torch.testing.assert_close(got, tokens[:, 0].detach())


def test_data_without_labels_or_with_one_class_are_refused(blobs):
    model = fastmae.mae_vit_tiny_patch4(img_size=16, in_chans=1)
    train, val = train_and_val(blobs)
    with pytest.raises(UserError, match="no labels"):
        probe(model, ArraySource(train.images, None, "x"), val)
    with pytest.raises(UserError, match="all of one class"):
        probe(model, ArraySource(train.images, np.zeros(len(train), np.int64), "x"), val)
