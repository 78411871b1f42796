"""What 16 bits are worth: the same pretraining on images of 12 bits as they are, and on their upper 8 bits.

    python -m fastmae.benchmarks.wide_pixels --seeds 0 1 2 --epochs 25

The images are like crops of soft tissue from a CT: nearly one level, with noise and a faint texture whose direction is
the class. Its amplitude is 4 of 4,096 levels; a level of the upper 8 bits is 16 of them. Values are stored in the upper
12 of 16 bits, which is the best case for 8 bits. Both runs predict normalised patches.

It prints, for each seed and type of pixels: the accuracy of logistic regression and of k-NN on frozen features, and the
squared error of predicted patches from those of the 12-bit images, both normalised (15/16 is what a constant has, as
the variance of the 16 pixels of a patch is unbiased).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch

from fastmae.checkpoint.load import load_model
from fastmae.config import PretrainConfig
from fastmae.data.arrays import ArraySource
from fastmae.evaluate.probe import probe
from fastmae.evaluate.reconstruct import central_crops
from fastmae.model.family import MaskedModel
from fastmae.ops import gather_patches, random_masking
from fastmae.ops.masked_mse import patch_statistics
from fastmae.train.pretrain import pretrain

SIDE, TRAIN, TEST = 32, 600, 400
AMPLITUDE, NOISE = 4.0, 1.0
"""In levels of 12 bits."""
TISSUE, SPREAD = 1060, 20
PERIODS = 4
"""Of the texture, along the width or along the height; which of them is the class."""
MASK_RATIO = 0.75


def slices(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Makes images uint16 [count, SIDE, SIDE, 1] with 12 bits in the upper bits, and labels int64 [count]."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    images = np.empty((count, SIDE, SIDE, 1), np.uint16)
    for image, label in zip(images, labels, strict=True):
        waves = np.sin(2 * np.pi * (PERIODS * (x if label else y) + random.uniform()))
        levels = TISSUE + random.uniform(-SPREAD, SPREAD) + AMPLITUDE * waves + random.normal(0, NOISE, y.shape)
        image[..., 0] = levels.round().clip(0, 4095).astype(np.uint16) << 4
    return images, labels


@torch.no_grad()
def error(model: MaskedModel, test: ArraySource, truth: torch.Tensor) -> float:
    """Returns the mean squared error of predicted masked patches from those of ``truth`` [N, H, W, 1], normalised."""
    indices = np.arange(len(test))
    images = central_crops(model, test, indices)
    ids_shuffle = random_masking(torch.from_numpy(indices), 0, model.num_patches)
    masked = ids_shuffle[:, model.num_visible(MASK_RATIO) :]
    pred = model.predict(images, ids_shuffle, MASK_RATIO)
    pred = pred.gather(1, masked.long()[:, :, None].expand(-1, -1, pred.shape[2]))
    zero, one = torch.zeros(1), torch.ones(1)
    target = gather_patches(truth.float() / 16, masked, model.patch_size, zero, one, torch.float32)
    average, deviation = patch_statistics(target)
    return float((pred - (target - average) / deviation).square().mean())


def compare(seed: int, epochs: int) -> list[dict[str, float | str]]:
    """Pretrains with both types of pixels from one seed, and measures both."""
    train, test = slices(TRAIN, 2 * seed), slices(TEST, 2 * seed + 1)
    rows: list[dict[str, float | str]] = []
    with tempfile.TemporaryDirectory() as folder:
        data = str(Path(folder) / "slices.npz")
        np.savez(data, images=train[0], labels=train[1])
        for pixel_type in ("uint16", "uint8"):
            run = str(Path(folder) / pixel_type)
            config = PretrainConfig(
                data_path=data, output_dir=run, pixel_type=pixel_type, model="mae_vit_tiny_patch4", epochs=epochs,
                batch_size=25, blr=1e-2, warmup_epochs=epochs / 10, norm_pix_loss=True, mask_ratio=MASK_RATIO,
                crop_scale=(0.7, 1.0), flip=True, probe=False, tune="off", device="cpu", num_workers=1, seed=seed,
            )  # fmt: skip
            assert pretrain(config) == 0
            model = load_model(run)
            parts = [ArraySource(images, labels, "slices", kind="array") for images, labels in (train, test)]
            accuracies = probe(model, *parts, num_workers=1)
            squared = error(model, parts[1], torch.from_numpy(test[0].astype(np.int32)))
            rows.append({"seed": seed, "pixels": pixel_type, "linear": accuracies["linear"], "knn": accuracies["knn"],
                         "error": round(squared, 4)})  # fmt: skip
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=25)
    given = parser.parse_args()
    for seed in given.seeds:
        for row in compare(seed, given.epochs):
            print(json.dumps(row), flush=True)
