"""Does a discriminator make masked patches sharper, and what does that cost in squared error?

    python -m fastmae.benchmarks.adversarial --data photographs --seeds 0 1 2 --output benchmarks/results

For every seed one plain run is trained to its end; from its weights and moments after half of the epochs, runs with
``--adversarial WEIGHT`` go on, which is what such a run is: until its discriminator begins it is the same bits. On
images that were never trained on, with the same masks for all, three numbers compare the predicted patches with the
original ones:

* **squared error**: the mean over pixels, of values from 0 to 1;
* **gradients**: how far the histogram of gradient magnitudes (differences of neighbours within a patch, in grey levels)
  is from that of the originals, as an earth mover's distance: a blurred patch has too many small ones;
* **spectrum**: the mean difference of the log power spectra, averaged over patches and over rings of equal frequency,
  in decibels, whatever its sign.

The photographs are crops of seven that come with scikit-learn and scikit-image: four to train on, three to measure.
Needs scikit-image.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.table import Table

from fastmae.benchmarks.harness import console, machine_name, table, write_result
from fastmae.checkpoint.load import load_model
from fastmae.config import PretrainConfig
from fastmae.data.sources import train_and_val
from fastmae.evaluate.pictures import grid_picture
from fastmae.evaluate.reconstruct import fixed_images, reconstruct
from fastmae.ops import random_masking
from fastmae.train.adversary import TOLD
from fastmae.train.pretrain import pretrain

TRAINED_ON = ("china.jpg", "coffee.png", "rocket.jpg", "motorcycle_left.png")
MEASURED_ON = ("astronaut.png", "chelsea.png", "flower.jpg")
SIDE, SHRUNK = 32, 3
"""Of a crop, in pixels, and how many pixels of a photograph become one."""
MASK_RATIO, MASK_SEED = 0.75, 1
MEASURED = 384
NUMBERS = ("squared_error", "gradients", "spectrum")
MOST_ERROR = 1.1
"""How many times the squared error of a plain run a useful weight may cost."""
PICTURED = 10


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What was measured."""

    data: str
    seeds: tuple[int, ...]
    weights: tuple[float, ...]
    epochs: int
    crops: int
    batch_size: int
    blr: float
    r1: float
    regulariser: str


def photographs(path: Path, crops: int) -> None:
    """Writes crops of photographs, uint8 [n, SIDE, SIDE, 3], to train and to measure on, as an .npz."""
    import skimage
    import sklearn

    folders = Path(sklearn.__file__).parent / "datasets" / "images", Path(skimage.__file__).parent / "data"
    random = np.random.default_rng(0)
    parts = {}
    for part, names, count in (("train", TRAINED_ON, crops), ("val", MEASURED_ON, MEASURED)):
        images = []
        for name in names:
            (file,) = [folder / name for folder in folders if (folder / name).exists()]
            photo = Image.open(file).convert("RGB").reduce(SHRUNK)
            for _ in range(-(-count // len(names))):
                top, left = random.integers(photo.height - SIDE + 1), random.integers(photo.width - SIDE + 1)
                images.append(np.asarray(photo)[top : top + SIDE, left : left + SIDE])
        parts[part] = np.stack(images)
    np.savez(path, x_train=parts["train"], x_val=parts["val"])


def patches_of(images: torch.Tensor, masked: torch.Tensor, patch: tuple[int, int]) -> np.ndarray:
    """Returns the masked patches of images uint8 [N, H, W, C] as gray ones, float64 [n, ph, pw], in grey levels."""
    gray = images.double().mean(dim=3)
    cut = gray.unflatten(2, (-1, patch[1])).unflatten(1, (-1, patch[0])).permute(0, 1, 3, 2, 4).flatten(1, 2)
    rows = torch.arange(len(cut))[:, None]
    return cut[rows, masked.long()].flatten(0, 1).numpy()


def gradient_histogram(patches: np.ndarray) -> np.ndarray:
    """Returns the shares of gradient magnitudes of patches, in bins of a grey level."""
    across, down = np.diff(patches, axis=2)[:, :-1], np.diff(patches, axis=1)[:, :, :-1]
    counts, _ = np.histogram(np.hypot(across, down), bins=np.arange(362))
    return counts / counts.sum()


def log_spectrum(patches: np.ndarray) -> np.ndarray:
    """Returns the power of patches by the length of the frequency, as decibels; the mean of a patch has none."""
    power = np.abs(np.fft.fft2(patches)).astype(float) ** 2
    along = [np.fft.fftfreq(side) * side for side in patches.shape[1:]]
    rings = np.hypot(along[0][:, None], along[1][None, :]).round().astype(int)
    mean = power.mean(axis=0)
    return np.array([10 * np.log10(mean[rings == ring].mean() + 1e-12) for ring in range(1, rings.max() + 1)])


def distances(original: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Returns the three numbers of patches in grey levels."""
    apart = np.cumsum(gradient_histogram(predicted)) - np.cumsum(gradient_histogram(original))
    return {
        "squared_error": float(np.square((predicted - original) / 255).mean()),
        "gradients": float(np.abs(apart).sum()),
        "spectrum": float(np.abs(log_spectrum(predicted) - log_spectrum(original)).mean()),
    }


def measured(run: Path, data: str) -> tuple[dict[str, float], list[torch.Tensor]]:
    """Returns the three numbers of a run, and rows of pictures: originals, masked images, reconstructions."""
    model, (_, test) = load_model(run), train_and_val(data)
    images = fixed_images(model, test, MEASURED)
    ids = random_masking(torch.arange(len(images)), MASK_SEED, model.num_patches)
    rows = reconstruct(model, images, ids, mask_ratio=MASK_RATIO)
    masked = ids[:, model.num_visible(MASK_RATIO) :]
    original, _, predicted = (patches_of(row, masked, model.patch_size) for row in rows)
    return distances(original, predicted), [row[:: len(row) // PICTURED][:PICTURED] for row in rows]


def told_by(run: Path) -> dict[str, float]:
    """Returns the means over the last 30 steps of what the log of a run tells of its adversary; nothing if there is
    none."""
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-30:]
    return {name: statistics.mean(row[name] for row in last) for name in TOLD if name in last[-1]}


def runs_of(seed: int, data: str, folder: Path, settings: Settings) -> tuple[list[dict[str, Any]], list[Any]]:
    """Trains all runs of a seed. Returns a row for each weight, 0 first, and rows of pictures."""
    half = settings.epochs // 2
    common: dict[str, Any] = dict(
        data_path=data, model="mae_vit_tiny_patch4", epochs=settings.epochs, batch_size=settings.batch_size,
        blr=settings.blr, mask_ratio=MASK_RATIO, save_freq=half - 1, probe=False, tune="off", device="cpu",
        num_workers=1, seed=seed, warmup_epochs=settings.epochs / 10,
    )  # fmt: skip
    if data != "digits":
        common["crop_scale"] = (1.0, 1.0)
    r1 = settings.r1 if settings.regulariser == "r1" else None
    adversarial: dict[str, Any] = dict(
        resume=str(folder / "0" / f"checkpoint-{half - 1}.pth"), adversarial_start=float(half),
        adversarial_regulariser=settings.regulariser, adversarial_r1=r1,
    )  # fmt: skip
    rows, pictures = [], []
    for weight in (0.0, *settings.weights):
        run, more = folder / f"{weight:g}", {**adversarial, "adversarial": weight} if weight else {}
        assert pretrain(PretrainConfig(output_dir=str(run), **common, **more)) == 0
        numbers, drawn = measured(run, data)
        rows.append({"seed": seed, "weight": weight, **numbers, **told_by(run)})
        pictures += drawn[:2] * (weight == 0) + drawn[2:]
        sys.stderr.write(f"{rows[-1]}\n")
    return rows, pictures


def means_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns for each weight the means over seeds, their deviations, and the means of the ratios to the plain run."""
    plain = {row["seed"]: row for row in rows if row["weight"] == 0}
    means = []
    for weight in sorted({row["weight"] for row in rows}):
        of_weight = [row for row in rows if row["weight"] == weight]
        mean: dict[str, Any] = {"weight": weight}
        for name in NUMBERS:
            values = [row[name] for row in of_weight]
            mean[name] = statistics.mean(values)
            mean[f"{name}_deviation"] = statistics.stdev(values) if len(values) > 1 else 0.0
            mean[f"{name}_times"] = statistics.mean(row[name] / plain[row["seed"]][name] for row in of_weight)
        mean["useful"] = all(
            row["squared_error"] <= MOST_ERROR * plain[row["seed"]]["squared_error"]
            and all(row[name] < plain[row["seed"]][name] for name in NUMBERS[1:])
            for row in of_weight
        )
        means.append(mean)
    return means


def shown(means: list[dict[str, Any]]) -> Table:
    """Returns the means as a table for people."""
    columns = ["weight", "squared error", "times plain", "gradients", "times", "spectrum, dB", "times", "useful"]
    rows = []
    for mean in means:
        cells = [f"{mean['weight']:g}"]
        for name, digits in zip(NUMBERS, (5, 2, 2), strict=True):
            cells.append(f"{mean[name]:.{digits}f} ± {mean[f'{name}_deviation']:.{digits}f}")
            cells.append(f"{mean[f'{name}_times']:.3f}")
        rows.append([*cells, "" if not mean["weight"] else "yes" if mean["useful"] else "no"])
    return table(None, columns, rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", choices=["photographs", "digits"], default="photographs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--weights", type=float, nargs="+", default=[0.1, 0.3, 1.0])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--crops", type=int, default=2000)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--blr", type=float, default=3e-3)
    parser.add_argument("--r1", type=float, default=1.0)
    parser.add_argument("--regulariser", default="r1")
    parser.add_argument("--output")
    given = parser.parse_args()
    output = given.output
    chosen: dict[str, Any] = {name: value for name, value in vars(given).items() if name != "output"}
    settings = Settings(**chosen | {"seeds": tuple(given.seeds), "weights": tuple(given.weights)})
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        data = given.data
        if data == "photographs":
            data = str(Path(folder) / "photographs.npz")
            photographs(Path(data), given.crops)
        for seed in given.seeds:
            found, pictures = runs_of(seed, data, Path(folder) / str(seed), settings)
            rows += found
    means = means_of(rows)
    console().print(shown(means))
    if output:
        name = f"adversarial-{given.data}-{machine_name(torch.device('cpu'))}-{'-'.join(map(str, given.seeds))}"
        write_result(output, name, command=sys.argv, settings=settings, measured={"rows": rows, "means": means})
        names = ["original", "masked", *(f"weight {weight:g}" for weight in (0.0, *given.weights))]
        picture = grid_picture([list(row.numpy()) for row in pictures], f"{given.data}, seed {given.seeds[-1]}", names)
        picture.save(Path(output) / f"{name}.png")
