"""k-NN, linear probes and what is reported of them, against slow loops and answers that are known."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same_run, small_run
from PIL import Image
from ranks import run_ranks
from torch import nn

import fastmae
from fastmae.data.plan import holdout
from fastmae.data.sources import ArraySource, FolderSource, open_train, train_and_val
from fastmae.errors import UserError
from fastmae.evaluate import knn, linear_probe
from fastmae.evaluate.features import extract_features
from fastmae.evaluate.knn import knn_predictions, nearest
from fastmae.evaluate.linear_probe import lars_predictions, logistic_predictions, train_heads
from fastmae.evaluate.probe import probe, probe_in_detail, save_probe
from fastmae.philox import STREAM_ORDER, permutation_numpy
from fastmae.train.pretrain import pretrain


def separable(classes=3, n=300):
    """Features of blobs that overlap a little, one axis a thousand times as long as the others."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % classes
    centres = 3 * torch.eye(classes, 5)
    features = torch.randn(n, 5, generator=generator) + centres[labels]
    return features * torch.tensor([1.0, 1, 1, 1, 1000]), labels


def test_knn_is_a_slow_weighted_vote_for_every_k():
    torch.manual_seed(0)
    train, test = torch.randn(60, 8), torch.randn(25, 8)
    labels = torch.randint(0, 4, (60,))
    predictions = knn_predictions(train, labels, test, (1, 7))
    for k in (1, 7):
        expected = []
        for feature in test:
            similarity = [F.cosine_similarity(feature, other, dim=0).item() for other in train]
            near = sorted(range(60), key=lambda i: -similarity[i])[:k]
            votes = [sum(math.exp(similarity[i] / 0.07) for i in near if labels[i] == c) for c in range(4)]
            expected.append(votes.index(max(votes)))
        assert predictions[k].tolist() == expected


def test_neighbours_do_not_depend_on_how_the_table_is_cut(monkeypatch):
    torch.manual_seed(0)
    train, queries = torch.randn(50, 6), torch.randn(23, 6)
    values, indices = nearest(train, queries, 9)
    whole = (queries @ train.T).topk(9, dim=1)
    torch.testing.assert_close(values, whole.values)
    assert torch.equal(indices, whole.indices)
    monkeypatch.setattr(knn, "QUERIES", 4)
    monkeypatch.setattr(knn, "CANDIDATES", 7)  # fewer than are asked for
    again = nearest(train, queries, 9)
    torch.testing.assert_close(again[0], values)
    assert torch.equal(again[1], indices)


def test_more_neighbours_than_samples_means_all_samples():
    assert knn_predictions(torch.eye(2), torch.tensor([0, 1]), torch.eye(2), [20])[20].tolist() == [0, 1]


def test_logistic_regression_separates_what_is_separable():
    features, labels = separable()
    predictions = logistic_predictions(features[:200], labels[:200], features[200:])
    assert (predictions == labels[200:]).double().mean() > 0.85


def test_several_rates_are_what_each_is_alone_and_what_a_plain_lars_loop_gives():
    """At rates that are not too high: LARS' steps stay long near an optimum, and then rounding is amplified."""
    features, labels = separable()
    rates, batch = (1.0, 3.0), 128
    together = train_heads(features, labels, rates, classes=3, batch_size=batch)
    for number, rate in enumerate(rates):
        alone = train_heads(features, labels, [rate], classes=3, batch_size=batch)
        torch.testing.assert_close(together.weight[number], alone.weight[0], rtol=1e-4, atol=1e-6)

    norm, head = nn.BatchNorm1d(5, affine=False, eps=1e-6), nn.Linear(5, 3)
    nn.init.trunc_normal_(head.weight, std=0.01, generator=torch.Generator().manual_seed(0))
    nn.init.zeros_(head.bias)
    momenta = [torch.zeros_like(parameter) for parameter in head.parameters()]
    for epoch in range(90):
        order = permutation_numpy(0, STREAM_ORDER, epoch, 300)
        for i in range(2):
            progress = epoch + i / 2
            cosine = 0.5 * (1 + math.cos(math.pi * (progress - 10) / 80))
            lr = 3.0 * batch / 256 * (progress / 10 if progress < 10 else cosine)
            rows = order[i * batch : (i + 1) * batch]
            head.zero_grad()
            F.cross_entropy(head(norm(features[rows])), labels[rows]).backward()
            for parameter, momentum in zip(head.parameters(), momenta, strict=True):
                step = parameter.grad
                if parameter.ndim > 1:
                    step = step * (1e-3 * parameter.detach().norm() / step.norm())
                momentum.mul_(0.9).add_(step)
                parameter.data -= lr * momentum
    torch.testing.assert_close(together.weight[1], head.weight.detach(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(together.bias[1], head.bias.detach(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(together.norm.running_var, norm.running_var)


def test_the_rate_is_chosen_without_the_test_part(monkeypatch):
    features, labels = separable()
    asked = []

    def noted(some, its_labels, rates, **options):
        asked.append((len(some), tuple(rates)))
        return train_heads(some, its_labels, rates, **options)

    monkeypatch.setattr(linear_probe, "train_heads", noted)
    predictions, rate, scores = lars_predictions(features[:200], labels[:200], features[200:], (1e-4, 30.0), 16_384)
    assert asked == [(len(holdout(200)[0]), (1e-4, 30.0)), (200, (30.0,))]
    assert rate == 30.0
    assert scores[30.0] > 85 > scores[1e-4]
    assert (predictions == labels[200:]).double().mean() > 0.85


def test_features_are_the_encoders_whatever_the_batch_size():
    torch.manual_seed(0)
    model = fastmae.mae_vit_tiny_patch4(img_size=16, in_chans=1)
    some = ArraySource(open_train("digits").images[:10], None, "x")
    features = extract_features(model, some, pool="mean", batch_size=3, num_workers=2).values
    assert features.shape == (10, 128)
    whole = extract_features(model, some, pool="mean", batch_size=10, num_workers=1).values
    torch.testing.assert_close(features, whole)
    native = ArraySource(np.random.default_rng(0).integers(0, 256, (3, 16, 16, 1), dtype=np.uint8), None, "x")
    tokens = model.forward_features(torch.from_numpy(native.images)).detach()
    both = torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1)
    for pool, expected in (("cls", tokens[:, 0]), ("both", both), ("tokens", tokens[:, 1:].flatten(1))):
        torch.testing.assert_close(
            extract_features(model, native, pool=pool, batch_size=3, num_workers=1).values, expected
        )


def test_an_unusable_image_is_skipped_with_its_label(image_folder, tmp_path):
    bad = image_folder / "train" / "n01" / "3.JPEG"
    bad.write_bytes(b"not a picture")
    model = fastmae.mae_vit_tiny_patch4(img_size=16)
    train, test = train_and_val(str(image_folder))
    features = extract_features(model, train, pool="mean", batch_size=5, num_workers=2)
    assert [image.name for image in features.skipped] == [str(bad)]
    assert len(features.values) == len(features.indices) == 23
    assert str(bad) not in [train.name(index) for index in features.indices.tolist()]
    detail = dict(pool="mean", ks=(3,), linear="logistic", batch_size=8, num_workers=1)
    assert probe_in_detail(model, train, test, **detail).summary()["train"] == 23


def test_class_folders_are_matched_by_name_and_tables_add_up(image_folder, tmp_path):
    """The val part lacks the first class, so its own numbers begin with the second."""
    model = fastmae.mae_vit_tiny_patch4(img_size=16)
    train, test = train_and_val(str(image_folder))
    second = [path for path in test.paths if "n02" in path]
    alone = FolderSource(tuple(second), np.zeros(len(second), np.int64), ("n02",))
    result = probe_in_detail(model, train, alone, pool="mean", ks=(1, 5), linear="lars", batch_size=8, num_workers=1)
    assert result.classes == ("n01", "n02")
    assert result.truth.tolist() == [1] * 4
    save_probe(tmp_path / "out", result, "title")
    written = json.loads((tmp_path / "out" / "probe.json").read_text())
    table = np.array(written["confusion"]["linear"])
    assert table.sum(axis=1).tolist() == [0, 4]
    assert written["linear"] == 100 * table[1, 1] / 4 == written["classes"][1]["linear_recall"]
    assert written["classes"][0]["linear_recall"] is None
    assert written["knn_of"].keys() == {"1", "5"}
    assert written["linear_by"] == "lars"
    assert Image.open(tmp_path / "out" / "confusion.png").format == "PNG"


def test_data_without_labels_or_with_one_class_are_refused(blobs):
    model = fastmae.mae_vit_tiny_patch4(img_size=16, in_chans=1)
    train, val = train_and_val(blobs)
    with pytest.raises(UserError, match="no labels"):
        probe(model, ArraySource(train.images, None, "x"), val)
    with pytest.raises(UserError, match="all of one class"):
        probe(model, ArraySource(train.images, np.zeros(len(train), np.int64), "x"), val)


def test_probing_between_epochs_changes_no_bit_and_goes_on_when_resumed(blobs, tmp_path):
    """9 steps an epoch; stopped by the end of its epochs after 2, resumed for the third and fourth."""
    assert pretrain(small_run(blobs, tmp_path / "plain", epochs=4)) == 0
    assert pretrain(small_run(blobs, tmp_path / "run", epochs=4, probe_freq=2)) == 0
    assert_same_run(tmp_path / "run", tmp_path / "plain")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    by_epoch = json.loads((tmp_path / "run" / "probe.json").read_text())["epochs"]
    assert {row["step"]: (row["knn"], row["linear"]) for row in rows if "knn" in row} == {
        9 * int(epochs): (one["knn"], one["linear"]) for epochs, one in by_epoch.items()
    }
    assert by_epoch.keys() == {"2", "4"}
    assert by_epoch["4"] == probe_of(tmp_path / "run", blobs)

    before = tmp_path / "run" / "checkpoints" / "step-00000036"
    (before / "manifest.json").write_text("damaged")
    assert pretrain(small_run(blobs, tmp_path / "run", epochs=4, probe_freq=2, resume="auto")) == 0
    assert_same_run(tmp_path / "run", tmp_path / "plain")
    assert json.loads((tmp_path / "run" / "probe.json").read_text())["epochs"] == by_epoch


def probe_of(run, blobs):
    from fastmae.checkpoint.load import load_model

    return probe(load_model(str(run)), *train_and_val(blobs))


def test_several_ranks_that_share_weights_probe_as_one(blobs, tmp_path):
    options = dict(epochs=1, probe_freq=1, batch_size=4, parallel="fsdp")
    run_ranks(2, small_run(blobs, tmp_path / "run", **options))
    report = json.loads((tmp_path / "run" / "probe.json").read_text())["epochs"]["1"]
    assert report == probe_of(tmp_path / "run", blobs)


@pytest.fixture(scope="module")
def finished(blobs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe") / "run"
    assert pretrain(small_run(blobs, folder, epochs=1)) == 0
    return folder


WRONG = {
    "too many neighbours": (
        ["probe", "{run}", "--data_path", "{blobs}", "--k", "500"],
        "--k 500: must be at most the 72",
    ),
    "no neighbours": (["probe", "{run}", "--k", "0"], "--k 0: must be at least 1"),
    "no number of neighbours": (["probe", "{run}", "--k"], "--k"),
    "no workers": (["probe", "{run}", "--num_workers", "0"], "--num_workers 0"),
    "a rate without lars": (["probe", "{run}", "--blr", "0.1"], "given together with --linear lars"),
    "a negative rate": (["probe", "{run}", "--linear", "lars", "--blr", "-1"], "--blr -1.0"),
    "a batch of one": (["probe", "{run}", "--linear", "lars", "--linear_batch", "1"], "--linear_batch 1"),
    "output under a file": (["probe", "{run}", "--data_path", "{blobs}", "--output", "{blobs}/x"], "--output"),
    "one class": (["probe", "{run}", "--data_path", "{tmp}/one.npz"], "all of one class"),
    "probe_freq 0": (["pretrain", "--probe_freq", "0"], "--probe_freq 0"),
    "probe_freq without labels": (["pretrain", "--data_path", "{tmp}/plain.npy", "--probe_freq", "1"], "has no labels"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line_and_status_2(case, finished, blobs, tmp_path, refusal):
    np.save(tmp_path / "plain.npy", np.zeros((30, 16, 16), np.uint8))
    np.savez(tmp_path / "one.npz", images=np.zeros((30, 16, 16), np.uint8), labels=np.zeros(30, np.int64))
    words, expected = WRONG[case]
    words = [word.format(run=finished, blobs=blobs, tmp=tmp_path) for word in words]
    if words[0] == "pretrain":
        words += ["--output_dir", str(tmp_path / "out"), "--batch_size", "8"]
    line = refusal(words)
    assert expected in line
    assert not (tmp_path / "out").exists()
