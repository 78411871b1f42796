"""What a model answers: features, similar images, reconstructions and classes of a batch of images. No HTTP here."""

from __future__ import annotations

import io
import zipfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from fastmae.checkpoint.load import load_segmenter, open_checkpoint, with_head
from fastmae.config.serve import ServeConfig
from fastmae.data.masks import choose_masks, shuffled_ids, visible_first
from fastmae.data.reading import Reading
from fastmae.errors import SettingError, UserError
from fastmae.evaluate.features import has_mark, mark_of
from fastmae.evaluate.inpaint import Inpainting, inpaint_picture
from fastmae.evaluate.knn import TEMPERATURE, nearest
from fastmae.evaluate.pictures import as_rgb
from fastmae.evaluate.reconstruct import reconstruct
from fastmae.evaluate.segment import map_picture, overlay, segment_picture, shown_pixels
from fastmae.facts import exact_ratio
from fastmae.messages import logger
from fastmae.model.build import AnyClassifier
from fastmae.model.family import MaskedModel
from fastmae.model.segmenter import Segmenter

Task = Literal["embed", "search", "classify", "segment", "reconstruct", "inpaint"]
NEIGHBOURS = 20
"""How many of the nearest images of an index vote for a class."""
ROWS = ("original", "masked", "reconstructed")


@dataclass(frozen=True)
class Ask:
    """One image, and what is asked of it."""

    task: Task
    pixels: np.ndarray
    """[H, W, C], as the model takes them; of ``segment`` of any size."""
    k: int = 5
    """How many images or classes are answered."""
    mask_ratio: float | None = None
    """Share of the patches that is masked. Default: the usual one of the model."""
    seed: int = 0
    """From which the mask follows."""
    mask: np.ndarray | None = None
    """For ``inpaint``: bool [rows, columns] of patches, true where they are predicted; or with ``show="whole"`` bool
    [H, W] of pixels."""
    show: str = "all"
    """Which pictures of a reconstruction are answered: one of ``ROWS``, or all side by side. Of ``segment`` the ``map``
    of classes, or an ``overlay``. Of ``inpaint`` the ``whole`` picture as well."""
    rounds: int = Inpainting.rounds
    """Predictions that are averaged for a whole picture."""


@dataclass(frozen=True)
class Index:
    """Features of known images, in which similar ones are found."""

    features: torch.Tensor
    """float32 [n, D], of length 1."""
    names: np.ndarray
    classes: np.ndarray | None
    """The name of each image's class, if the images have labels."""


def open_index(path: str, mark: torch.Tensor) -> Index:
    """Opens a file of ``fastmae features``.

    Args:
        mark: of the model, float32 [D], as ``mark_of`` gives it. A file of an earlier version has none, and a line says
            so.

    Raises:
        SettingError: the file cannot be read, or holds features of another length or of another model.
    """
    try:
        with np.load(Path(path).expanduser(), allow_pickle=False) as file:
            values, names = file["features"], file["names"]
            classes = file["classes"].astype(str) if "classes" in file.files else None
            theirs = file["mark"] if "mark" in file.files else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        what = getattr(error, "strerror", None) or "damaged, or of another kind"
        problem = f"cannot be read ({what}); give an .npz that `fastmae features` wrote"
        raise SettingError("index", path, problem) from error
    if values.ndim != 2 or len(values) == 0 or len(values) != len(names):
        raise SettingError("index", path, "holds no features of images; make it by `fastmae features`")
    again = "make it again by `fastmae features`, with this model and the same --pool"
    if values.shape[1] != len(mark):
        problem = f"holds features of {values.shape[1]} numbers, the model gives {len(mark)}; {again}"
        raise SettingError("index", path, problem)
    if theirs is None:
        logger.warning("%s: does not say of which model it is, so that nobody can check it; better %s", path, again)
    elif not has_mark(mark, theirs):
        raise SettingError("index", path, f"holds features of another model or another --pool; {again}")
    return Index(F.normalize(torch.from_numpy(values).float(), dim=1), names.astype(str), classes)


@dataclass(frozen=True)
class Service:
    """A frozen model and what it needs to answer."""

    config: ServeConfig
    model: MaskedModel
    has_decoder: bool
    classifier: AnyClassifier | None
    class_names: tuple[str, ...]
    """Of the classifier; empty where its run had numbers alone."""
    index: Index | None
    segmenter: Segmenter | None = None

    @property
    def tasks(self) -> tuple[Task, ...]:
        """What can be asked."""
        found: list[Task] = ["embed"]
        found += ["search"] if self.index is not None else []
        found += ["classify"] if self.classifier is not None or self._index_has_classes else []
        found += ["segment"] if self.segmenter is not None else []
        found += ["reconstruct", "inpaint"] if self.has_decoder else []
        return tuple(found)

    @property
    def _index_has_classes(self) -> bool:
        return self.index is not None and self.index.classes is not None

    @property
    def reading(self) -> Reading:
        """How uploads become pixels."""
        return self.model.reading

    @property
    def about(self) -> dict[str, Any]:
        """The model in numbers, for people."""
        return {
            "model": type(self.model).__name__,
            "family": self.model.family,
            "image_size": list(self.model.img_size),
            "patch_size": list(self.model.patch_size),
            "channels": self.model.in_chans,
            "features": self.model.feature_dim * (2 if self.config.pool == "both" else 1),
            "pool": self.config.pool,
            "tasks": list(self.tasks),
            "classes_of_pixels": [] if self.segmenter is None else list(self.class_names),
            "images_in_index": 0 if self.index is None else len(self.index.names),
        }

    def why_not(self, task: Task) -> str:
        """Says what would be needed for a task that cannot be asked."""
        if task in ("reconstruct", "inpaint"):
            return "the checkpoint has no decoder; serve the run of pretraining"
        if task == "search":
            return "no index was given; start fastmae serve with --index FEATURES.npz"
        if task == "segment":
            return "the checkpoint is no segmenter; serve a run of fastmae segment"
        return "the checkpoint is no classifier; serve a run of finetune, or give an --index with labels"

    def visible(self, ratio: float | None) -> int:
        """Returns how many patches a mask ratio leaves visible.

        Raises:
            ValueError: none, or all.
        """
        return self.model.num_visible(self.model.usual_ratio if ratio is None else ratio)

    @torch.inference_mode()
    def answer(self, asks: Sequence[Ask]) -> list[Any]:
        """Answers a batch, in its order; what is asked alike is computed together.

        An answer is a dict for JSON, or the bytes of a PNG.
        """
        together: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        for number, ask in enumerate(asks):
            if ask.show == "whole":
                together["whole",].append(number)
                continue
            ratio = ask.mask_ratio if ask.mask is None else exact_ratio(int((~ask.mask).sum()), ask.mask.size)
            by_features = ask.task in ("embed", "search") or (ask.task == "classify" and self.classifier is None)
            together[("features",) if by_features else (ask.task, ratio)].append(number)
        answers: list[Any] = [None] * len(asks)
        for (kind, *_), numbers in together.items():
            alike = [asks[number] for number in numbers]
            if kind in ("segment", "whole"):  # pictures of any size, one after another
                for number, ask in zip(numbers, alike, strict=True):
                    answers[number] = self._segmented(ask) if kind == "segment" else self._filled(ask)
                continue
            images = torch.from_numpy(np.stack([ask.pixels for ask in alike])).to(self.model.device)
            compute = {"features": self._by_features, "classify": self._classes}.get(kind, self._pictures)
            for number, answer in zip(numbers, compute(alike, images), strict=True):
                answers[number] = answer
        return answers

    def _by_features(self, asks: Sequence[Ask], images: torch.Tensor) -> list[Any]:
        """Answers what follows from features alone."""
        features = self.model.features(images, self.config.pool).float().cpu()
        answers = []
        for ask, row in zip(asks, features, strict=True):
            if ask.task == "embed":
                answers.append({"pool": self.config.pool, "features": row.tolist()})
            elif ask.task == "search":
                answers.append({"found": self._found(row, ask.k)})
            else:
                answers.append(self._vote(row, ask.k))
        return answers

    def _found(self, feature: torch.Tensor, k: int) -> list[dict[str, Any]]:
        assert self.index is not None
        cosines, rows = nearest(self.index.features, F.normalize(feature[None], dim=1), min(k, len(self.index.names)))
        found = []
        for cosine, row in zip(cosines[0].tolist(), rows[0].tolist(), strict=True):
            match: dict[str, Any] = {"name": str(self.index.names[row]), "cosine": round(cosine, 4)}
            if self.index.classes is not None:
                match["class"] = str(self.index.classes[row])
            found.append(match)
        return found

    def _vote(self, feature: torch.Tensor, k: int) -> dict[str, Any]:
        """Lets the nearest images of the index vote, as the k-NN probe does: weights exp(cosine / 0.07)."""
        assert self.index is not None
        assert self.index.classes is not None
        near = min(NEIGHBOURS, len(self.index.names))
        cosines, rows = nearest(self.index.features, F.normalize(feature[None], dim=1), near)
        weights = (cosines[0] / TEMPERATURE).softmax(0).tolist()
        votes: dict[str, float] = defaultdict(float)
        for weight, row in zip(weights, rows[0].tolist(), strict=True):
            votes[str(self.index.classes[row])] += weight
        best = sorted(votes.items(), key=lambda vote: -vote[1])[:k]
        return {"by": f"{near} nearest images", "classes": [{"class": name, "share": round(v, 4)} for name, v in best]}

    def _classes(self, asks: Sequence[Ask], images: torch.Tensor) -> list[Any]:
        """Answers the most probable classes of a classifier."""
        assert self.classifier is not None
        shares = self.classifier(images).float().softmax(dim=1).cpu()
        answers = []
        for ask, row in zip(asks, shares, strict=True):
            values, numbers = row.topk(min(ask.k, len(row)))
            classes = [
                {"class": self.class_names[n] if self.class_names else str(n), "share": round(value, 4)}
                for value, n in zip(values.tolist(), numbers.tolist(), strict=True)
            ]
            answers.append({"by": "classifier", "classes": classes})
        return answers

    def _segmented(self, ask: Ask) -> bytes:
        """Answers the class of each pixel of a picture of any size, as ``fastmae segment --predict`` writes it."""
        assert self.segmenter is not None
        classes = segment_picture(self.segmenter, ask.pixels)
        if ask.show == "map":
            return _as_png(map_picture(classes, self.segmenter.num_classes))
        return _as_png(Image.fromarray(overlay(shown_pixels(ask.pixels), classes, self.segmenter.num_classes)))

    def _filled(self, ask: Ask) -> bytes:
        """Answers a picture of any size with its holes filled, as ``fastmae inpaint`` does; other pixels keep their
        bits.

        Raises:
            UserError: a hole leaves nothing visible around it.
        """
        assert ask.mask is not None
        ratio = self.model.usual_ratio if ask.mask_ratio is None else ask.mask_ratio
        filled = inpaint_picture(self.model, ask.pixels, ask.mask, Inpainting(ratio, ask.rounds, seed=ask.seed))
        return _as_png(Image.fromarray(filled[..., 0] if filled.shape[2] == 1 else filled))

    def _pictures(self, asks: Sequence[Ask], images: torch.Tensor) -> list[bytes]:
        """Answers reconstructions of images that have as many masked patches, each with a mask of its own."""
        orders = []
        for ask in asks:
            if ask.mask is not None:
                orders.append(torch.from_numpy(visible_first(ask.mask[None])))
                continue
            masks = choose_masks("random", None, self.model.grid_size, self.visible(ask.mask_ratio), ask.seed)
            orders.append(shuffled_ids(torch.zeros(1, dtype=torch.int64), masks, torch.device("cpu")))
        visible = self.visible(asks[0].mask_ratio) if asks[0].mask is None else int((~asks[0].mask).sum())
        ratio = exact_ratio(visible, self.model.num_patches)
        rows = reconstruct(self.model, images, torch.cat(orders).to(images.device), mask_ratio=ratio)
        return [_png(ask, [row[n].cpu().numpy() for row in rows]) for n, ask in enumerate(asks)]


def _png(ask: Ask, pictures: Sequence[np.ndarray]) -> bytes:
    shown = pictures if ask.show == "all" else [pictures[ROWS.index(ask.show)]]
    return _as_png(Image.fromarray(np.concatenate([as_rgb(picture) for picture in shown], axis=1)))


def _as_png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def open_service(config: ServeConfig) -> Service:
    """Opens the checkpoint and the index, on the device of the settings, or on a GPU if this process has one.

    Raises:
        UserError: a checkpoint or an index that cannot be served.
    """
    device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    opened = open_checkpoint(config.checkpoint, config, uses_head=True)
    model = opened.model.to(device)
    if not model.has_pictures:
        raise UserError(f"{config.checkpoint}: a model of rows of a table; fastmae serve answers about images")
    if config.pool not in model.pools:
        problem = f"must be {' or '.join(model.pools)} for {type(model).__name__}"
        raise SettingError("pool", config.pool, problem)
    mark = mark_of(model, config.pool) if config.index is not None else None
    index = None if config.index is None or mark is None else open_index(config.index, mark)
    classifier = with_head(opened).to(device) if opened.head else None  # of the size and pixels of the model
    names = tuple(map(str, opened.settings.get("class_names") or ()))
    segmenter = None
    if "segmenter_head" in opened.settings:
        _need_own_pixels(config)
        segmenter, names = load_segmenter(config.checkpoint).to(device), tuple(opened.settings.get("classes") or ())
    return Service(config, model, opened.has_decoder, classifier, names, index, segmenter)


def _need_own_pixels(config: ServeConfig) -> None:
    """Refuses other pixels than those that a segmenter learnt from.

    Raises:
        SettingError: naming the setting.
    """
    for name in ("input_size", "mean", "std"):
        if getattr(config, name) is not None:
            raise SettingError(name, getattr(config, name), "must be left out for a run of segment, which has its own")
