"""Scores of anomalies: what they are, and that they find a digit that pretraining has not seen."""

import json

import numpy as np
import pytest
import torch
from helpers import small_run
from PIL import Image

import fastmae
from fastmae.cli import main
from fastmae.data.sources import ArraySource, FolderSource, open_train, train_and_val
from fastmae.evaluate import anomaly, reconstruct
from fastmae.evaluate.anomaly import are_anomalous, auroc, patch_errors, without_class
from fastmae.ops import random_masking
from fastmae.train.pretrain import pretrain


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.75])
@pytest.mark.parametrize("norm_pix", [False, True])
def test_errors_of_patches_are_those_of_the_loss_and_each_is_masked(ratio, norm_pix, monkeypatch):
    torch.manual_seed(0)
    model = fastmae.mae_vit_tiny_patch4(img_size=(8, 20), in_chans=2, norm_pix_loss=norm_pix).eval()
    images = torch.randint(0, 256, (3, 8, 20, 2), dtype=torch.uint8)
    asked = []

    def noted(draw_ids, seed, L):
        asked.append(random_masking(draw_ids, seed, L))
        return asked[-1]

    monkeypatch.setattr(reconstruct, "random_masking", noted)
    K = model.num_visible(ratio)
    with torch.no_grad():
        errors = patch_errors(model, images, torch.arange(3), mask_ratio=ratio, rounds=2, seed=5)
        assert errors.shape == (3, 2, 5)
        total, count = torch.zeros(3, 10), torch.zeros(3, 10)
        for order in asked:
            for start in range(0, 10, 10 - K):
                masked = torch.cat([order, order], dim=1)[:, start : start + 10 - K]
                visible = torch.stack([
                    torch.tensor([patch for patch in range(10) if patch not in row]) for row in masked.tolist()
                ])  # fmt: skip
                ids = torch.cat([visible, masked], dim=1).int()
                for n in range(3):
                    loss, pred, mask = model(images[n : n + 1], ratio, ids_shuffle=ids[n : n + 1])
                    target = model.patchify(images[n : n + 1].permute(0, 3, 1, 2).float() / 255)
                    target = (target - model.mean.repeat(16)) / model.std.repeat(16)
                    if norm_pix:
                        average, variance = target.mean(dim=2, keepdim=True), target.var(dim=2, keepdim=True)
                        target = (target - average) / (variance + 1e-6).sqrt()
                    error = (pred - target).square().mean(dim=2) * mask
                    torch.testing.assert_close(error.sum() / mask.sum(), loss, rtol=1e-4, atol=1e-5)
                    total[n], count[n] = total[n] + error[0], count[n] + mask[0]
    assert len(asked) == 2
    assert count.min() >= 2
    torch.testing.assert_close(errors.flatten(1), total / count, rtol=1e-4, atol=1e-5)


def test_what_is_anomalous_is_of_a_class_that_normal_images_lack(blobs):
    train, val = train_and_val(blobs)
    normal = without_class(train, "1")
    assert sorted(set(normal.labels.tolist())) == [0, 2]
    everything = np.arange(len(val))
    assert are_anomalous(normal, val, everything).tolist() == (val.labels == 1).tolist()
    assert not are_anomalous(train, val, everything).any()
    assert are_anomalous(ArraySource(train.images, None, "x"), val, everything) is None
    good, other = FolderSource(("a",), np.zeros(1, np.int64), ("good",)), np.array([0, 1])
    tested = FolderSource(("b", "c"), other, ("cracked", "good"))
    assert are_anomalous(good, tested, other).tolist() == [True, False]


def test_the_area_is_the_share_of_pairs_in_the_right_order():
    assert auroc(torch.tensor([0.1, 0.5, 0.5, 0.9]), np.array([False, False, True, True])) == 0.875


def test_a_digit_that_pretraining_never_saw_is_told_from_the_others(tmp_path, capsys):
    """By the distance of its tokens; the error of reconstruction needs more pretraining (docs/anomalies.md)."""
    train, val = train_and_val("digits")
    seen = train.labels != 0
    images = dict(x_train=train.images[seen], y_train=train.labels[seen], x_test=val.images, y_test=val.labels)
    np.savez(tmp_path / "nine.npz", **images)
    run, output = tmp_path / "run", tmp_path / "scores"
    assert pretrain(small_run(str(tmp_path / "nine.npz"), run, epochs=1, batch_size=64, blr=3e-3)) == 0
    words = ["anomaly", str(run), "--data_path", "digits", "--left_out", "0", "--rounds", "1", "--json"]
    assert main([*words, "--output", str(output)]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (summary["normal"], summary["images"], summary["anomalous"]) == (1296, 359, 36)
    assert summary["auroc_distance"] > 0.9
    scores = json.loads((output / "scores.json").read_text())["scores"]
    assert len(scores) == 359
    assert [one["distance"] for one in scores] == sorted((one["distance"] for one in scores), reverse=True)
    by_hand = auroc(torch.tensor([one["error"] for one in scores]), np.array([one["anomalous"] for one in scores]))
    assert by_hand == pytest.approx(summary["auroc_error"], abs=1e-3)
    assert Image.open(output / "anomaly.png").format == "PNG"

    np.savez(tmp_path / "new.npz", images=val.images[:9])
    assert main([*words[:4], "--test_path", str(tmp_path / "new.npz"), "--output", str(output), "--pool", "mean"]) == 0
    assert "no labels of both kinds" in capsys.readouterr().out
    assert "anomalous" not in (output / "scores.json").read_text()


def test_the_images_of_a_source_are_scored_whatever_the_batch(blobs):
    torch.manual_seed(0)
    model = fastmae.mae_vit_tiny_patch4(img_size=16, in_chans=1).eval()
    source = open_train(blobs)
    options = dict(k=2, mask_ratio=0.5, rounds=1, seed=0, num_workers=1, pool="tokens")
    one, other = (anomaly.find_anomalies(model, source, source, batch_size=n, **options) for n in (72, 7))
    torch.testing.assert_close(one.maps, other.maps)
    torch.testing.assert_close(one.distance, other.distance, rtol=1e-3, atol=2e-2)
