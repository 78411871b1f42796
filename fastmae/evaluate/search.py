"""Search for the images of a source that are nearest to query images, by the cosine of their features."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from fastmae.data.sources import Source, classes_of
from fastmae.errors import SettingError
from fastmae.evaluate.features import Features
from fastmae.evaluate.knn import nearest
from fastmae.evaluate.pictures import grid_picture, save_png
from fastmae.evaluate.reconstruct import about_pixels, central_crops, drawn
from fastmae.model.family import MaskedModel


def engine(device: torch.device) -> str:
    """Chooses what compares features: faiss if it is installed and they lie in the host's memory, otherwise torch.

    Both are exact.
    """
    if device.type != "cpu":
        return "torch"
    try:
        from faiss import IndexFlatIP  # noqa: F401
    except ImportError:
        return "torch"
    return "faiss"


def most_similar(among: torch.Tensor, queries: torch.Tensor, k: int, by: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Finds the ``k`` rows of ``among`` [n, D] nearest to ``queries`` [m, D]: (cosines, indices) [m, k], in order."""
    among, queries = F.normalize(among, dim=1), F.normalize(queries, dim=1)
    if by == "torch":
        return nearest(among, queries, k)
    from faiss import IndexFlatIP

    index = IndexFlatIP(among.shape[1])
    index.add(among.numpy())
    cosines, indices = index.search(queries.numpy(), k)
    return torch.from_numpy(cosines), torch.from_numpy(indices)


def search(
    queries: Source, query_features: Features, source: Source, features: Features, *, k: int, by: str
) -> list[dict[str, Any]]:
    """Returns {query, index, found} per query; found lists ``k`` images {name, index, cosine, class}, nearest first.

    An image with the same name as the query is taken for the query itself and is not listed.

    Args:
        queries: the source of ``query_features``.
        source: the source of ``features``.
        k: images per query.
        by: ``torch`` or ``faiss``, as ``engine`` chooses.

    Raises:
        SettingError: there are fewer than ``k`` other images.
    """
    cosines, rows = most_similar(features.values, query_features.values, min(k + 1, len(features.values)), by)
    results = []
    for query, row_cosines, near in zip(query_features.indices.tolist(), cosines.tolist(), rows.tolist(), strict=True):
        name, indices = queries.name(query), features.indices[near]
        classes = classes_of(source, indices)
        matches = []
        for rank, (index, cosine) in enumerate(zip(indices.tolist(), row_cosines, strict=True)):
            if source.name(index) == name:
                continue
            match = {"name": source.name(index), "index": index, "cosine": round(cosine, 4)}
            matches.append(match if classes is None else match | {"class": str(classes[rank])})
        if len(matches) < k:
            raise SettingError("k", k, f"there are only {len(matches)} images besides {name}; ask for fewer")
        results.append({"query": name, "index": query, "found": matches[:k]})
    return results


def save_search(
    path: Path, model: MaskedModel, queries: Source, source: Source, results: Sequence[dict[str, Any]]
) -> None:
    """Draws one row per query: the query, then its nearest images with cosines and classes.

    Raises:
        UserError: the file cannot be written.
    """
    first = _pictures(model, queries, [result["index"] for result in results])
    rows, captions = [], []
    for image, result in zip(first, results, strict=True):
        near = _pictures(model, source, [match["index"] for match in result["found"]])
        rows.append([image, *near])
        texts = [" ".join([f"{match['cosine']:.3f}", match.get("class", "")]).strip() for match in result["found"]]
        captions.append(["query", *texts])
    title = f"queries, and the nearest images with their cosines{about_pixels(model)}"
    save_png(path, grid_picture(rows, title, captions=captions))


def _pictures(model: MaskedModel, source: Source, indices: list[int]) -> np.ndarray:
    return drawn(model, central_crops(model, source, np.array(indices))).cpu().numpy()
