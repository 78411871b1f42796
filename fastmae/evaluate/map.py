"""Features as points of a plane, by PCA or UMAP, and a picture of them with the images that lie there."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
from PIL import Image

from fastmae.config import Reduction
from fastmae.data.sources import Source, classes_of
from fastmae.errors import SettingError, UserError, install_hint
from fastmae.evaluate.features import Features
from fastmae.evaluate.pictures import as_rgb
from fastmae.evaluate.reconstruct import central_crops, drawn
from fastmae.files import write_whole
from fastmae.model.family import MaskedModel

FEWEST = 3
"""Images of a map: two of them lie on a line."""
NEIGHBOURS = 15
"""Of UMAP, as it is by default: fewer show small groups, more the whole."""
AT_A_TIME = 64
"""Images that are read before they are made small."""


@dataclass(frozen=True)
class FeatureMap:
    """Features, and where they lie in a plane."""

    points: np.ndarray
    """float32 [n, 2], the rows of ``features.values``."""
    by: Reduction
    axes: tuple[str, str]
    """What the two axes are, in words."""
    explained: tuple[float, float] | None
    """The shares of the variance of the features that the two axes have; None of UMAP, whose axes mean nothing."""
    features: Features


def check_reduction(by: Reduction, setting: str = "reduce") -> None:
    """Refuses a way of reducing that is not installed, before any features are computed.

    Raises:
        SettingError: umap-learn is missing.
    """
    if by == "umap":
        try:
            import umap  # noqa: F401
        except ImportError as error:
            problem = f"needs umap-learn, which is not installed; {install_hint('umap')}, or take pca"
            raise SettingError(setting, by, problem) from error


def feature_map(features: Features, by: Reduction = "pca") -> FeatureMap:
    """Reduces features to two numbers each. The same features give the same points.

    Args:
        features: of at least three images.
        by: ``pca``, the two directions in which the features vary most; or ``umap`` (McInnes et al. 2018), which keeps
            neighbours together and needs the extra ``umap``.

    Raises:
        UserError: there are too few images, they have one number each, or are all alike or not finite.
    """
    values = features.values.double().cpu().numpy()
    count, width = values.shape
    if count < FEWEST:
        raise UserError(f"a map needs at least {FEWEST} images, and there are {count}; give more data")
    if width < 2:
        raise UserError("a map needs features of at least 2 numbers, and these have 1; draw them as they are")
    if not np.isfinite(values).all():
        raise UserError("some features are not finite, so there is no map of them; take another checkpoint")
    values -= values.mean(axis=0)  # whose size would hide small differences
    if not values.any():
        raise UserError("all features are alike, so there is no map of them; look at the images and the checkpoint")
    if by == "umap":
        return FeatureMap(_umap(values), by, ("UMAP 1", "UMAP 2"), None, features)
    from sklearn.decomposition import PCA

    pca = PCA(2, svd_solver="covariance_eigh")
    points = pca.fit_transform(values).astype(np.float32)
    first, second = (float(share) for share in pca.explained_variance_ratio_)
    names = (f"principal component {n}: {share:.1%} of the variance" for n, share in ((1, first), (2, second)))
    one, other = names
    return FeatureMap(points, by, (one, other), (first, second), features)


def _umap(values: np.ndarray) -> np.ndarray:
    from umap import UMAP

    neighbours = min(NEIGHBOURS, len(values) - 1)
    init = "spectral" if len(values) > NEIGHBOURS else "random"  # of fewer, there are not enough eigenvectors
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        points = UMAP(n_neighbors=neighbours, init=init, random_state=0, n_jobs=1).fit_transform(values)
    return np.asarray(points, np.float32)


def check_picture(path: str | PathLike[str]) -> None:
    """Refuses to draw a map where that is not possible, before any features are computed.

    Raises:
        SettingError: the name has another ending, or matplotlib is missing.
    """
    if Path(path).suffix.lower() != ".png":
        raise SettingError("picture", str(path), "must end in .png")
    try:
        import fastmae.report.map  # noqa: F401
    except ImportError as error:
        problem = f"needs {error.name}, which is not installed; {install_hint('report')}"
        raise SettingError("picture", problem=problem) from error


def save_map(path: Path, model: MaskedModel, source: Source, found: FeatureMap, title: str) -> None:
    """Draws a map: all points, coloured by class if there are labels, and beside them images where they lie.

    Rows of a table, which are no images, have their names there.

    Args:
        source: of the images.
        title: what the points are.

    Raises:
        UserError: the file cannot be written.
    """
    from fastmae.report import map as drawing

    classes = classes_of(source, found.features.indices)
    labels = None if classes is None else classes.tolist()
    is_table = model.img_size == (1, 1)
    shown = drawing.shown_as_names(found.points) if is_table else drawing.shown_as_pictures(found.points)
    indices = found.features.indices[shown.points]
    names = [source.name(int(index)) for index in indices] if is_table else []
    pictures = [] if is_table else _thumbnails(model, source, indices, drawing.THUMBNAIL)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(
            path,
            lambda file: drawing.save_map(file, found.points, found.axes, title, labels, shown, pictures, names),
        )
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error}); free space or name another file") from error


def _thumbnails(model: MaskedModel, source: Source, indices: np.ndarray, side: int) -> list[np.ndarray]:
    """Reads some images of a source as small pictures: uint8 [h, w, 3], at most ``side`` pixels high and wide."""
    small = []
    for start in range(0, len(indices), AT_A_TIME):
        crops = drawn(model, central_crops(model, source, indices[start : start + AT_A_TIME]))
        for crop in crops.cpu().numpy():
            picture = Image.fromarray(as_rgb(crop))
            picture.thumbnail((side, side))
            small.append(np.asarray(picture))
    return small
