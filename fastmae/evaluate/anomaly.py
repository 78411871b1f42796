"""Scores of how unlike normal images an image is: the distance of its features, and the error of its reconstruction."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastmae.config import AnomalyPool
from fastmae.data.loader import Skipped
from fastmae.data.sources import Source, Subset, class_names, classes_of, columns_of
from fastmae.errors import SettingError, UserError
from fastmae.evaluate.features import Features, extract_features, usable_batches
from fastmae.evaluate.knn import nearest
from fastmae.evaluate.pictures import coloured, grid_picture, save_png
from fastmae.evaluate.reconstruct import about_pixels, central_crops, covering_ids, drawn
from fastmae.files import write_text
from fastmae.model.family import MaskedModel
from fastmae.model.mlp import MLPMAE
from fastmae.model.pixels import pixels_of, without_missing
from fastmae.ops import gather_patches, random_masking
from fastmae.ops.masked_mse import patch_statistics

CELLS = 3
"""Of how many columns with the largest errors scores.json tells."""
MAX_FEATURE_BYTES = 8 * 2**30


@dataclass(frozen=True)
class Anomalies:
    """Scores of the usable images of a source. A higher score means a less normal image."""

    indices: np.ndarray
    """int64 [m]: the numbers of the images in their source."""
    distance: torch.Tensor
    """[m]: the distance of the features, averaged over the k nearest normal images."""
    error: torch.Tensor
    """[m]: the error of the reconstruction, which is the mean of ``maps``; 0 if no patch is without missing pixels."""
    maps: torch.Tensor
    """[m, rows, columns]: the squared error of each patch while it is masked, averaged over masks; NaN of patches with
    missing pixels."""
    skipped: tuple[Skipped, ...]


def without_class(source: Source, left_out: str) -> Source:
    """Returns a labelled source without the class ``left_out``.

    Raises:
        SettingError: the source has no labels, no such class, or no other class.
    """
    classes = classes_of(source, np.arange(len(source)))
    if classes is None:
        raise SettingError("left_out", left_out, f"images such as {source.name(0)} have no labels; leave it out")
    indices = np.flatnonzero(classes != left_out)
    if len(indices) == len(source):
        names = np.unique(classes)
        some = ", ".join(names[:10].tolist()) + (" …" if len(names) > 10 else "")
        raise SettingError("left_out", left_out, f"no such class; there are {some}")
    if len(indices) == 0:
        raise SettingError("left_out", left_out, "all images are of that class, so none would be normal")
    return Subset(source, indices)


def are_anomalous(normal: Source, test: Source, indices: np.ndarray) -> np.ndarray | None:
    """Tells which samples of ``test`` belong to a class that no normal image has: bool [m].

    Returns None if either source has no labels, or one has class folders and the other numbers.
    """
    normal_classes = classes_of(normal, np.arange(len(normal)))
    classes = classes_of(test, indices)
    if normal_classes is None or classes is None or (class_names(normal) is None) != (class_names(test) is None):
        return None
    return ~np.isin(classes, normal_classes)


@torch.no_grad()
def patch_errors(
    model: MaskedModel,
    images: torch.Tensor,
    draw_ids: torch.Tensor,
    *,
    mask_ratio: float,
    rounds: int,
    seed: int,
) -> torch.Tensor:
    """Computes the squared error of each patch while it is masked: float32 [N, rows, columns].

    It is averaged over pixels and masks. A round goes through a random order of the patches in groups of the size of a
    mask, so that each patch is masked at least once per round. The targets are those of the model's loss: with
    norm_pix_loss, patches without their mean and contrast. A patch with a missing pixel has NaN.

    Args:
        images: pixels [N, H, W, C].
        draw_ids: int64 [N] on the CPU; together with ``seed`` they determine the masks.
    """
    L, K = model.num_patches, model.num_visible(mask_ratio)
    N = len(images)
    pixels, mean, std, value_range, nodata = pixels_of(model, images)
    total = torch.zeros(N, L, device=images.device)
    count = torch.zeros_like(total)
    for ids_shuffle in covering_ids(draw_ids, rounds, seed, L, K, images.device):
        masked = ids_shuffle[:, K:].contiguous()
        pred = model.predict(images, ids_shuffle, mask_ratio).float()
        pred = pred.gather(1, masked.long()[:, :, None].expand(-1, -1, pred.shape[2]))
        target = gather_patches(pixels, masked, model.patch_size, mean, std, torch.float32, value_range, nodata)
        if model.norm_pix_loss:
            average, deviation = patch_statistics(target)
            target = (target - average) / deviation
        error = (pred - target).square().mean(dim=2)
        total.scatter_add_(1, masked.long(), error)
        count.scatter_add_(1, masked.long(), torch.ones_like(error))
    is_whole = without_missing(model, images, torch.ones_like(total)) > 0
    return torch.where(is_whole, total / count, math.nan).view(N, *model.grid_size)


@torch.no_grad()
def cell_errors(
    model: MLPMAE, images: torch.Tensor, draw_ids: torch.Tensor, *, mask_ratio: float, rounds: int, seed: int
) -> torch.Tensor:
    """Computes the squared error of each number of a row while it is hidden, standardised: float32 [N, 1, D].

    As ``patch_errors``, with numbers in place of patches: in each round every one is hidden at least once, together
    with others. A missing number has NaN.
    """
    N, D = len(images), model.num_patches
    M = min(D - 1, max(1, round(mask_ratio * D)))
    numbers, missing = model.rows(images)
    total = torch.zeros_like(numbers, dtype=torch.float32)
    count = torch.zeros_like(total)
    for number in range(rounds):
        order = random_masking((draw_ids * rounds + number).to(images.device), seed, D).long()
        for group in range(math.ceil(D / M)):
            hidden = torch.zeros_like(total, dtype=torch.bool)
            hidden.scatter_(1, order.roll(-group * M, dims=1)[:, :M], True)
            pred = model.predict(images, hidden, mask_ratio)[..., 0].float()
            total += (pred - numbers).square().masked_fill(~hidden, 0)
            count += hidden
    errors = total / count
    return (errors if missing is None else errors.masked_fill(missing, math.nan)).view(N, *model.grid_size)


def find_anomalies(
    model: MaskedModel,
    normal: Source,
    test: Source,
    *,
    pool: AnomalyPool,
    k: int,
    mask_ratio: float,
    rounds: int,
    seed: int,
    batch_size: int,
    num_workers: int,
) -> Anomalies:
    """Scores every usable image of ``test``.

    Raises:
        SettingError: there are fewer normal images than ``k``, their features would not fit into memory, or the mask
            ratio leaves no patch visible or masked.
        UserError: features are not finite, as numbers are too large.
    """
    if k > len(normal):
        raise SettingError("k", k, f"must be at most the {len(normal)} normal images")
    try:
        model.num_visible(mask_ratio)
    except ValueError as error:
        raise SettingError("mask_ratio", mask_ratio, f"{error}; choose another ratio") from error
    width = model.feature_dim * (model.num_patches if pool == "tokens" else 1 + (pool == "both"))
    if 4 * width * len(normal) > MAX_FEATURE_BYTES:
        size = f"{4 * width * len(normal) / 2**30:.0f} GiB of features"
        problem = f"{len(normal)} normal images make {size}; use --pool=mean, or fewer images"
        raise SettingError("pool", pool, problem)

    def features(source: Source) -> Features:
        return extract_features(model, source, pool=pool, batch_size=batch_size, num_workers=num_workers)

    normal_features, test_features = features(normal), features(test)
    for found, source in ((normal_features, normal), (test_features, test)):
        wrong = np.flatnonzero(~found.values.isfinite().all(dim=1).cpu().numpy())
        if len(wrong):
            name = source.name(int(found.indices[wrong[0]]))
            raise UserError(f"{name}: the model computes no finite features ({len(wrong)} such in all); leave it out")
    k = min(k, len(normal_features.values))
    closeness, _ = nearest(normal_features.values, test_features.values, k, lambda a, b: -torch.cdist(a, b))
    batches = usable_batches(model, test, batch_size=batch_size, num_workers=num_workers)
    errors: Any = cell_errors if isinstance(model, MLPMAE) else patch_errors
    maps = torch.cat([
        errors(model, images, torch.from_numpy(indices), mask_ratio=mask_ratio, rounds=rounds, seed=seed)
        for indices, images, _ in batches
        if len(indices)
    ])  # fmt: skip
    distance = -closeness.mean(dim=1)
    skipped = normal_features.skipped + test_features.skipped
    return Anomalies(test_features.indices, distance, maps.nanmean(dim=(1, 2)).nan_to_num(0.0), maps, skipped)


def auroc(scores: torch.Tensor, anomalous: np.ndarray) -> float:
    """Computes the chance that an anomalous image has a higher score than a normal one; ties count half.

    Args:
        scores: floating [m].
        anomalous: bool [m], of both kinds.
    """
    from sklearn.metrics import roc_auc_score

    return round(float(roc_auc_score(anomalous, scores.cpu().numpy())), 4)


def summarise(anomalies: Anomalies, anomalous: np.ndarray | None) -> dict[str, Any]:
    """Returns {images, anomalous, auroc_distance, auroc_error}, without the last two if all images are of one kind."""
    if anomalous is None:
        return {"images": len(anomalies.indices)}
    counts = {"images": len(anomalous), "anomalous": int(anomalous.sum())}
    if anomalous.all() or not anomalous.any():
        return counts
    areas = {"auroc_distance": auroc(anomalies.distance, anomalous), "auroc_error": auroc(anomalies.error, anomalous)}
    return counts | areas


def save_anomalies(
    folder: Path,
    model: MaskedModel,
    test: Source,
    anomalies: Anomalies,
    anomalous: np.ndarray | None,
    summary: dict[str, Any],
    count: int,
) -> None:
    """Writes scores.json, the largest distance first, and anomaly.png: the first ``count`` of them with heat maps.

    Rows of a table have no picture; scores.json names the columns with the largest errors of each.

    Raises:
        UserError: the files cannot be written.
    """
    ranked = anomalies.distance.argsort(descending=True, stable=True).tolist()
    columns = columns_of(test)
    scores = [
        {
            "name": test.name(int(anomalies.indices[row])),
            "distance": round(float(anomalies.distance[row]), 6),
            "error": round(float(anomalies.error[row]), 6),
        }
        | ({} if anomalous is None else {"anomalous": bool(anomalous[row])})
        | ({} if columns is None else {"cells": _largest(columns, anomalies.maps[row].flatten())})
        for row in ranked
    ]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "scores.json", json.dumps({**summary, "scores": scores}, indent=1))
    except OSError as error:
        problem = f"cannot be written ({error}); name another folder"
        raise SettingError("folder", str(folder), problem, flag="--output") from error
    if not model.has_pictures:
        return
    shown = ranked[:count]
    images = list(drawn(model, central_crops(model, test, anomalies.indices[shown])).cpu().numpy())
    captions = [f"{scores[n]['distance']:.2f}{_mark(anomalous, row)}" for n, row in enumerate(shown)]
    heat, hottest = _heat(anomalies.maps, shown, model.patch_size)
    title = f"largest distances; below, errors of reconstruction (white: {hottest:.2g}){about_pixels(model)}"
    save_png(folder / "anomaly.png", grid_picture([images, heat], title, captions=[captions, [""] * len(shown)]))


def _largest(columns: Sequence[str], errors: torch.Tensor) -> dict[str, float]:
    """Returns the columns of a row with the largest errors, and these."""
    order = errors.nan_to_num(-1.0).argsort(descending=True, stable=True)[:CELLS].tolist()
    return {columns[at]: round(float(errors[at]), 4) for at in order if not errors[at].isnan()}


def _mark(anomalous: np.ndarray | None, row: int) -> str:
    """Returns what the caption of an image adds to its score."""
    return "" if anomalous is None else " anomalous" if anomalous[row] else " normal"


def _heat(maps: torch.Tensor, shown: Sequence[int], patch_size: tuple[int, int]) -> tuple[list[np.ndarray], float]:
    """Draws heat maps uint8 [H, W, 3] of some images; also returns the error that is white, which 1 % exceed."""
    hottest = max(float(np.nan_to_num(np.nanquantile(maps.cpu().numpy(), 0.99))), 1e-6)
    large = maps[list(shown)].repeat_interleave(patch_size[0], dim=1).repeat_interleave(patch_size[1], dim=2)
    return list(coloured((large / hottest).cpu().numpy())), hottest
