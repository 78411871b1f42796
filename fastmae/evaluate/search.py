"""The images of a source that are nearest to others by the cosine of their features."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from fastmae.data.sources import Source
from fastmae.errors import UserError
from fastmae.evaluate.features import Features, classes_of
from fastmae.evaluate.knn import nearest
from fastmae.evaluate.pictures import grid_picture, save_png
from fastmae.evaluate.reconstruct import central_crops
from fastmae.model.mae import MaskedAutoencoderViT


def engine(device: torch.device) -> str:
    """Who compares features: faiss where it is installed and they lie in the host's memory, otherwise torch.

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
    """(cosines, indices) [m, k] of the ``k`` of ``among`` [n, D] that are nearest to ``queries`` [m, D], falling."""
    among, queries = F.normalize(among, dim=1), F.normalize(queries, dim=1)
    if by == "torch":
        return nearest(among, queries, k)
    from faiss import IndexFlatIP

    index = IndexFlatIP(among.shape[1])
    index.add(among.numpy())
    cosines, indices = index.search(queries.numpy(), k)
    return torch.from_numpy(cosines), torch.from_numpy(indices)


def search(
    queries: Source, asked: Features, source: Source, held: Features, *, k: int, by: str
) -> list[dict[str, Any]]:
    """For each query {query, index, found}: found lists ``k`` images, {name, index, cosine, class}, nearest first.

    An image of the same name as the query is the query itself and not among them.

    Args:
        queries, source: what the features ``asked`` and ``held`` are of.
        by: as ``engine`` says.

    Raises:
        UserError: there are not ``k`` others.
    """
    cosines, places = most_similar(held.values, asked.values, min(k + 1, len(held.values)), by)
    results = []
    for query, row, near in zip(asked.indices.tolist(), cosines.tolist(), places.tolist(), strict=True):
        name, indices = queries.name(query), held.indices[near]
        classes = classes_of(source, indices)
        found = []
        for place, (index, cosine) in enumerate(zip(indices.tolist(), row, strict=True)):
            if source.name(index) == name:
                continue
            one = {"name": source.name(index), "index": index, "cosine": round(cosine, 4)}
            found.append(one if classes is None else one | {"class": str(classes[place])})
        if len(found) < k:
            raise UserError(f"--k {k}: there are only {len(found)} images besides {name}; ask for fewer")
        results.append({"query": name, "index": query, "found": found[:k]})
    return results


def save_search(
    path: Path, model: MaskedAutoencoderViT, queries: Source, source: Source, results: Sequence[dict[str, Any]]
) -> None:
    """Draws a row a query: itself, then what was found, with cosines and classes.

    Raises:
        UserError: the file cannot be written.
    """
    first = central_crops(model, queries, np.array([one["index"] for one in results])).cpu().numpy()
    rows, captions = [], []
    for image, one in zip(first, results, strict=True):
        near = central_crops(model, source, np.array([match["index"] for match in one["found"]])).cpu().numpy()
        rows.append([image, *near])
        found = [" ".join([f"{match['cosine']:.3f}", match.get("class", "")]).strip() for match in one["found"]]
        captions.append(["query", *found])
    save_png(path, grid_picture(rows, "queries, and the nearest images with their cosines", captions=captions))
