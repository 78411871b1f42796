"""The functions of ``import fastmae`` that begin a run or use a model. They load torch when they are called."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from fastmae.config import FinetuneConfig, PretrainConfig, ProbeConfig, SegmentConfig, UpscaleConfig
from fastmae.config.family import family_of
from fastmae.config.load import load_settings, make_config
from fastmae.errors import SettingError
from fastmae.facts import ReadAs
from fastmae.files import read_rows
from fastmae.messages import logger

if TYPE_CHECKING:
    from fastmae.data.sources import Parts, Source
    from fastmae.evaluate.features import Features
    from fastmae.evaluate.map import FeatureMap
    from fastmae.model.build import AnyClassifier
    from fastmae.model.family import MaskedModel
    from fastmae.model.segmenter import Segmenter
    from fastmae.model.upscaler import Upscaler
    from fastmae.ops.choices import Choices
    from fastmae.train.given import OnStep

Config = TypeVar("Config", PretrainConfig, FinetuneConfig)
Dense = TypeVar("Dense", SegmentConfig, UpscaleConfig)
POOLS = ("mean", "cls", "both", "tokens")
FOR_PATHS = ("pages", "spectrogram", "root", "image_key", "axis", "constant_slices")
"""Settings that say how files of a path are found and taken apart."""
_LOOP = "copy the loop in fastmae/train/pretrain.py, one page, and change {}"
_DATA = "images are cropped and flipped by (seed, epoch, image); set crop_scale and flip, or change {}"
HOOKS = {
    **dict.fromkeys(("optimizer", "optim"), _LOOP.format("make_optimizer (fastmae/train/optim.py)")),
    **dict.fromkeys(("lr_scheduler", "scheduler"), _LOOP.format("learning_rate_at (fastmae/train/schedule.py)")),
    **dict.fromkeys(
        ("loss_fn", "loss", "criterion"),
        "give a model whose forward_loss is your own, as a subclass of fastmae.MaskedAutoencoderViT",
    ),
    **dict.fromkeys(("on_batch", "before_step"), _LOOP.format("_stream, which makes the batches")),
    **dict.fromkeys(
        ("callbacks", "callback", "hooks", "on_epoch", "on_epoch_end", "on_train_end"),
        "on_step is called with the numbers of every step, and " + _LOOP.format("what else is done there"),
    ),
    **dict.fromkeys(
        ("transform", "transforms", "augment", "augmentation"), _DATA.format("fastmae/data/sample.py: prepared")
    ),
    **dict.fromkeys(
        ("collate_fn", "sampler", "batch_sampler", "shuffle", "dataloader"),
        _LOOP.format("fastmae/train/batches.py, which says which images a step trains on"),
    ),
}
"""What other trainers take and a run does not, as it would not be exact and resumable any more: where to change it."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A training that ended, and what it left in its folder."""

    folder: Path
    """The ``output_dir``, with checkpoints, ``metrics.jsonl``, ``log.txt`` and the settings."""
    status: int
    """0 if the run is done; 75 if a signal or ``on_step`` stopped it, so that ``resume="auto"`` continues it."""
    is_classifier: bool
    """Whether ``finetune`` made it."""
    is_segmenter: bool = False
    """Whether ``segment`` made it."""
    is_upscaler: bool = False
    """Whether ``upscale`` made it."""
    given_model: MaskedModel | None = dataclasses.field(default=None, repr=False)
    """The model that the run was given, which has its weights since it ended."""

    @cached_property
    def model(self) -> MaskedModel | AnyClassifier | Segmenter | Upscaler:
        """The model of the newest intact checkpoint, in evaluation mode: the one that was given, or a new one on the
        CPU. It is read once, when asked for.

        After ``pretrain`` it is the masked autoencoder; after ``finetune`` the classifier, which turns uint8 images
        [N, H, W, C] into logits [N, classes]; after ``segment`` the segmenter, which turns them into logits of every
        pixel [N, classes, H, W]; after ``upscale`` the upscaler, which turns them into normalised images
        [N, C, H · scale, W · scale].

        Raises:
            UserError: the folder holds no intact checkpoint.
        """
        from fastmae.checkpoint.load import load_classifier, load_model, load_segmenter, load_upscaler

        if self.is_segmenter:
            return load_segmenter(self.folder)
        if self.is_upscaler:
            return load_upscaler(self.folder)
        return load_classifier(self.folder) if self.is_classifier else load_model(self.folder, self.given_model)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows of ``metrics.jsonl``: one for each optimiser step, with its step, loss and learning rate.

        ``pandas.DataFrame(run.metrics)`` is a table of them.
        """
        path = self.folder / "metrics.jsonl"
        rows, damaged = read_rows(path)
        if damaged:
            logger.warning("%s: %d of its lines are damaged and passed over", path, damaged)
        return rows


def pretrain(
    data: Any = None,
    *,
    output_dir: str | PathLike[str],
    model: str | MaskedModel | None = None,
    val: Any = None,
    on_step: OnStep | None = None,
    config: str | PathLike[str] | None = None,
    **settings: Any,
) -> Run:
    """Pretrains a masked autoencoder on images, as ``fastmae pretrain`` does.

    Args:
        data: a torch Dataset, a list of paths, bytes, arrays or images of Pillow, an array or a tensor, a Hugging Face
            ``Dataset`` or ``DatasetDict``, or a source of your own (``fastmae.Source``): ``fastmae.as_source`` says
            more. For models of vectors (``mae_mlp``) a DataFrame, a table of pyarrow or an array [N, D]. Or a path, or
            several, as ``--data_path`` takes them: a folder, shards, arrays, ``"digits"``. It may be left out where
            ``config`` names a path.
        output_dir: the run folder.
        model: the name of a preset, or a model: a ``fastmae.MaskedAutoencoderViT``, a model of another family, or a
            subclass of one, which has the defaults of its family. It is trained from the weights that it has, has the
            trained ones when the run ends, and decides the sizes of images.
        val: labelled images for the probe, as ``data``, where that is no path. Default: a fifth of ``data``.
        on_step: a function that is called on the first rank with a ``StepInfo`` for every optimiser step, when numbers
            are read (every ``log_freq`` steps, for all steps since), so that no step waits for it. If it returns
            ``"stop"``, the run saves a checkpoint and ends with status 75.
        config: a YAML, TOML or JSON file of settings, or a run folder; arguments override it.
        settings: the flags of ``fastmae pretrain`` by their names, such as ``input_size=96`` (pixels), ``epochs=100``,
            ``blr=1.5e-4``, ``resume="auto"``. What is left out gets its default from the data.

    Returns:
        The run, once it is done or stopped.

    Raises:
        UserError: a setting, the data or a checkpoint cannot work. The message names the argument.
    """
    _refuse_hooks(settings)
    in_file = {} if config is None else load_settings(config, PretrainConfig)
    probed = {**in_file, **settings}.get("probe") or {**in_file, **settings}.get("probe_freq")
    table = _table_of(model, {**in_file, **settings})
    from fastmae.data.sources import columns_of

    parts, settings = _with_data(data, val, settings, in_file, needs_labels=bool(probed), table=table)
    own = None if model is None or isinstance(model, str) else _trainable(model)
    if own is not None and parts is not None and columns_of(parts.train) is not None:
        settings.setdefault("columns", columns_of(parts.train))  # so that its mean may be in their units
    settings |= {"model": model} if own is None else _settings_of_model(own, settings, in_file)
    if model is None:
        settings.pop("model")
    configuration = make_config(PretrainConfig, {"output_dir": output_dir, **settings}, config)
    from fastmae.train.given import Given
    from fastmae.train.pretrain import pretrain as run_pretraining

    status = run_pretraining(configuration, Given(data=parts, model=own, on_step=on_step))
    folder = Path(configuration.output_dir)
    if own is not None:
        from fastmae.checkpoint.load import load_weights
        from fastmae.checkpoint.manifest import newest_first

        if newest_first(folder):  # none where a signal came before the first step
            load_weights(folder, own)
    return Run(folder, status, is_classifier=False, given_model=own)


def finetune(
    data: Any = None,
    *,
    output_dir: str | PathLike[str],
    finetune: str | PathLike[str] | Run = "",
    val: Any = None,
    on_step: OnStep | None = None,
    config: str | PathLike[str] | None = None,
    **settings: Any,
) -> Run:
    """Fine-tunes a pretrained encoder on labelled images, as ``fastmae finetune`` does.

    Args:
        data: labelled images, as for ``pretrain``.
        output_dir: the run folder.
        finetune: the pretrained encoder: a ``Run`` or its folder, one of its checkpoints, or a file with an encoder.
            Random weights if it is left out.
        val: labelled images to test on, as ``data``, where that is no path. Default: a fifth of ``data``, fixed, which
            is not trained on.
        on_step: as for ``pretrain``.
        config: a YAML, TOML or JSON file of settings, or a run folder; arguments override it.
        settings: the flags of ``fastmae finetune`` by their names, such as ``epochs=50`` or ``tune="lora"``.

    Returns:
        The run, once it is done or stopped. Its ``model`` is the classifier.

    Raises:
        UserError: a setting, the data or a checkpoint cannot work. The message names the argument.
    """
    _refuse_hooks(settings)
    start = finetune.folder if isinstance(finetune, Run) else finetune
    in_file = {} if config is None else load_settings(config, FinetuneConfig)
    has_own = bool(start or in_file.get("finetune"))
    parts, settings = _with_data(data, val, settings, in_file, needs_labels=True, is_needed=not has_own)
    given = {"output_dir": output_dir, **({"finetune": start} if start else {}), **settings}
    configuration = make_config(FinetuneConfig, given, config)
    from fastmae.train.classify import finetune as run_finetuning
    from fastmae.train.given import Given

    status = run_finetuning(configuration, Given(data=parts, on_step=on_step))
    return Run(Path(configuration.output_dir), status, is_classifier=True)


def segment(
    data: str | PathLike[str] | None = None,
    *,
    output_dir: str | PathLike[str],
    finetune: str | PathLike[str] | Run = "",
    on_step: OnStep | None = None,
    config: str | PathLike[str] | None = None,
    **settings: Any,
) -> Run:
    """Teaches a pretrained encoder to say what each pixel shows, as ``fastmae segment`` does.

    Args:
        data: the path of images with label maps, or "shapes". Default: the data of the encoder's run.
        output_dir: the run folder.
        finetune: the pretrained encoder, as for ``finetune``. Random weights if it is left out.
        on_step, config: as for ``finetune``.
        settings: the flags of ``fastmae segment`` by their names, such as ``epochs=50`` or ``tune="linear"``.

    Returns:
        The run, once it is done or stopped. Its ``model`` is the segmenter.

    Raises:
        UserError: a setting, the data or a checkpoint cannot work. The message names the argument.
    """
    configuration = _with_a_head(SegmentConfig, data, output_dir, finetune, config, settings)
    from fastmae.train.given import Given
    from fastmae.train.segment import segment as run_segmentation

    status = run_segmentation(configuration, Given(on_step=on_step))
    return Run(Path(configuration.output_dir), status, is_classifier=False, is_segmenter=True)


def upscale(
    data: str | PathLike[str] | None = None,
    *,
    output_dir: str | PathLike[str],
    finetune: str | PathLike[str] | Run = "",
    on_step: OnStep | None = None,
    config: str | PathLike[str] | None = None,
    **settings: Any,
) -> Run:
    """Teaches a head on a frozen encoder to make images larger, as ``fastmae upscale`` does.

    Args:
        data: the path of images, as ``pretrain`` takes it. Default: the data of the encoder's run.
        output_dir: the run folder.
        finetune: the pretrained encoder, as for ``finetune``. Random weights if it is left out.
        on_step, config: as for ``finetune``.
        settings: the flags of ``fastmae upscale`` by their names, such as ``scale=4`` or ``epochs=50``.

    Returns:
        The run, once it is done or stopped. Its ``model`` is the upscaler.

    Raises:
        UserError: a setting, the data or a checkpoint cannot work. The message names the argument.
    """
    configuration = _with_a_head(UpscaleConfig, data, output_dir, finetune, config, settings)
    from fastmae.train.given import Given
    from fastmae.train.upscale import upscale as run_upscaling

    status = run_upscaling(configuration, Given(on_step=on_step))
    return Run(Path(configuration.output_dir), status, is_classifier=False, is_upscaler=True)


def _with_a_head(
    kind: type[Dense],
    data: str | PathLike[str] | None,
    output_dir: str | PathLike[str],
    finetune: str | PathLike[str] | Run,
    config: str | PathLike[str] | None,
    settings: Mapping[str, Any],
) -> Dense:
    """Returns the settings of a training whose head answers every pixel."""
    _refuse_hooks(settings)
    if settings.get("predict"):
        raise SettingError("predict", problem="is for the command line; in Python call the model of the run")
    start = finetune.folder if isinstance(finetune, Run) else finetune
    given = {"output_dir": output_dir, **({"finetune": start} if start else {}), **settings}
    given |= {} if data is None else {"data_path": str(data)}
    return make_config(kind, given, config)


def probe(
    model: MaskedModel | Run | str | PathLike[str], data: Any = None, *, val: Any = None, **settings: Any
) -> dict[str, Any]:
    """Measures frozen features on labelled images with k-NN and a linear classifier, as ``fastmae probe`` does.

    Args:
        model: a masked autoencoder, whose device is used; a ``Run``; or what ``load_model`` opens.
        data: labelled images to fit the classifiers on, as for ``pretrain``. Default: the data of the run, if paths.
        val: labelled images to score them on. Default: the val part of paths, or a fixed fifth of ``data``.
        settings: the flags of ``fastmae probe`` by their names: ``pool``, ``k``, ``linear``, ``blr``, ``linear_batch``,
            ``batch_size`` and ``num_workers``.

    Returns:
        What the command prints with ``--json``: ``knn`` and ``linear`` in percent, and how they were measured.

    Raises:
        UserError: a wrong argument, no labels, or data or a checkpoint that cannot be opened.
    """
    allowed = ("pool", "k", "linear", "blr", "linear_batch", "batch_size", "num_workers")
    for name in settings:
        if name not in allowed:
            raise SettingError(name, problem=f"no argument of probe, which takes {', '.join(allowed)}")
    config = make_config(ProbeConfig, {"checkpoint": "", **settings})
    from fastmae.checkpoint.load import own_data, read_settings
    from fastmae.data.loader import default_workers
    from fastmae.data.sources import scored_parts
    from fastmae.evaluate.features import report_skipped
    from fastmae.evaluate.probe import probe_in_detail

    encoder = _encoder(model)
    if data is None:
        checkpoint = model.folder if isinstance(model, Run) else model
        if not isinstance(checkpoint, str | PathLike):
            raise SettingError("data", problem="must be given with a model, which does not know its data")
        data = own_data(str(checkpoint), read_settings(str(checkpoint)), "data")
    train, test = scored_parts(_opened(data, val, encoder, needs_labels=True), encoder.read_as)
    result = probe_in_detail(
        encoder,
        train,
        test,
        pool=config.pool,
        ks=config.k,
        linear=config.linear,
        rates=config.blr,
        linear_batch=config.linear_batch,
        batch_size=config.batch_size,
        num_workers=config.num_workers or default_workers(),
    )
    report_skipped(result.skipped)
    return result.summary()


def extract_features(
    model: MaskedModel | Run | str | PathLike[str],
    data: Any,
    *,
    pool: Literal["mean", "cls", "both", "tokens"] = "mean",
    split: Literal["train", "val"] = "train",
    batch_size: int = 256,
    num_workers: int | None = None,
) -> Features:
    """Computes the features of images with a frozen encoder, without gradients.

    Image files are resized and cropped as in the official evaluation, arrays are resized as a whole. For a few images
    ``model.embed`` is shorter.

    Args:
        model: a masked autoencoder, whose device is used; a ``Run``; or what ``load_model`` opens.
        data: images, as for ``pretrain``.
        pool: ``mean`` of the patch tokens (D numbers per image), the class token (``cls``, D numbers), ``both``
            (2·D), or all patch tokens one after another (``tokens``, L·D).
        split: which part of the data is used; without a val part, ``val`` is a fixed fifth, and ``train`` is all.
        batch_size: images per forward pass.
        num_workers: threads that read and decode images. Default: one per core, at most 10.

    Returns:
        ``values`` float32 [n, D] on the model's device, the ``indices`` int64 [n] of the images among those that were
        given, and the ``skipped`` ones, which could not be read, with reasons.

    Raises:
        UserError: a wrong argument, or data or a checkpoint that cannot be opened.
    """
    return _features_of(model, data, pool, split, batch_size, num_workers)[2]


def feature_map(
    model: MaskedModel | Run | str | PathLike[str],
    data: Any,
    *,
    by: Literal["pca", "umap"] = "pca",
    picture: str | PathLike[str] | None = None,
    pool: Literal["mean", "cls", "both", "tokens"] = "mean",
    split: Literal["train", "val"] = "train",
    batch_size: int = 256,
    num_workers: int | None = None,
) -> FeatureMap:
    """Computes the features of images and reduces them to two numbers each, as ``fastmae features --reduce`` does.

    Args:
        model, data, pool, split, batch_size, num_workers: as for ``extract_features``.
        by: ``pca``, or ``umap``, which needs the extra ``umap``.
        picture: a .png to draw: points coloured by class, and thumbnails where they lie. Needs the extra ``report``.

    Returns:
        ``points`` float32 [n, 2], what the ``axes`` are, of PCA the ``explained`` shares of the variance, and the
        ``features``.

    Raises:
        UserError: as of ``extract_features``; a package is missing, or the features make no map.
    """
    from fastmae.evaluate import map as maps

    if by not in ("pca", "umap"):
        raise SettingError("by", by, "must be one of pca, umap")
    maps.check_reduction(by, "by")
    if picture is not None:
        maps.check_picture(picture)
    encoder, source, features = _features_of(model, data, pool, split, batch_size, num_workers)
    found = maps.feature_map(features, by)
    if picture is not None:
        maps.save_map(Path(picture), encoder, source, found, f"{len(found.points)} images ({pool})")
    return found


def _features_of(
    model: Any, data: Any, pool: Any, split: str, batch_size: int, num_workers: int | None
) -> tuple[MaskedModel, Source, Features]:
    """Returns the model, the images and their features."""
    for name, value, allowed in (("pool", pool, POOLS), ("split", split, ("train", "val"))):
        if value not in allowed:
            raise SettingError(name, value, f"must be one of {', '.join(allowed)}")
    for name, number in (("batch_size", batch_size), ("num_workers", num_workers)):
        if number is not None and number < 1:
            raise SettingError(name, number, "must be at least 1")
    from fastmae.data.loader import default_workers
    from fastmae.data.sources import open_train, train_and_val
    from fastmae.evaluate import features

    encoder = _encoder(model)
    opened, images = _opened(data, None, encoder), encoder.read_as
    source = open_train(opened, images) if split == "train" else train_and_val(opened, images)[1]
    workers = num_workers or default_workers()
    found = features.extract_features(encoder, source, pool=pool, batch_size=batch_size, num_workers=workers)
    return encoder, source, found


def impute(
    model: MaskedModel | Run | str | PathLike[str], data: Any, *, passes: int = 32, batch_size: int = 4096
) -> Any:
    """Fills the missing cells of a table with what a model of vectors predicts, as ``fastmae impute`` does with files.

    Args:
        model: of vectors (``mae_mlp``), whose device is used; a ``Run``; or what ``load_model`` opens.
        data: a DataFrame, a table of pyarrow, or an array or a tensor [N, D], NaN or null where a cell is missing.
            Columns are matched by name, those of arrays by their order.
        passes: a cell gets the mean of so many predictions, each of which sees another four fifths of the known cells;
            1 for one that sees all of them.
        batch_size: rows per forward pass.

    Returns:
        A copy with the missing cells filled, in the units and types of the columns: a DataFrame, a table of pyarrow, or
        an array. All other cells are as they were.

    Raises:
        UserError: a wrong argument, a column that is not there, or a checkpoint that cannot be opened.
    """
    for name, number in (("passes", passes), ("batch_size", batch_size)):
        if number < 1:
            raise SettingError(name, number, "must be at least 1")
    from fastmae.data.tables import like, raw_table, table_source
    from fastmae.evaluate.impute import How, missing_filled, require_vectors

    encoder = _encoder(model)
    require_vectors(encoder)
    found = None if isinstance(data, str | PathLike) else raw_table(data)
    if found is None:
        problem = "must be a DataFrame, a table of pyarrow or an array [N, D]; `fastmae impute` fills files"
        raise SettingError("data", data, problem)
    raw, labels = found
    source = table_source(raw, encoder.read_as)
    return like(
        data if labels is None else data[0],
        raw,
        missing_filled(encoder, raw, source, How(passes=passes, batch_size=batch_size)),
    )


def inpaint(
    model: MaskedModel | Run | str | PathLike[str],
    picture: Any,
    hole: Any,
    *,
    mask_ratio: float | None = None,
    rounds: int = 8,
    overlap: float = 0.5,
    seed: int = 0,
) -> Any:
    """Fills the holes of a picture of any size with what a model predicts, as ``fastmae inpaint`` does with files.

    Args:
        model: a masked autoencoder of images, whose device is used; a ``Run``; or what ``load_model`` opens.
        picture: an array [H, W, C] of the type and the channels of the model's pixels.
        hole: an array [H, W], not zero where a pixel is filled.
        mask_ratio: the share of patches of a tile that the model does not see. Default: the usual one of its family.
        rounds: a hole gets the mean of so many predictions, each of which sees other patches.
        overlap: the share of a tile that the next one covers as well, from 0 to below 1.
        seed: the number from which it follows which other patches are hidden.

    Returns:
        A copy, NumPy array [H, W, C]; pixels outside of holes have the same bits.

    Raises:
        UserError: a wrong argument, a checkpoint that cannot be opened, or a hole that hides a whole tile.
    """
    import numpy as np

    from fastmae.evaluate.inpaint import Inpainting, inpaint_picture

    found = _encoder(model)
    if not found.has_pictures:
        raise SettingError("model", found.family, "predicts rows of tables, not pictures; fastmae.impute fills cells")
    if rounds < 1:
        raise SettingError("rounds", rounds, "must be at least 1")
    if not 0 <= overlap < 1:
        raise SettingError("overlap", overlap, "must be from 0 to below 1")
    pixels, where = np.asarray(picture), np.asarray(hole) != 0
    if pixels.ndim != 3 or pixels.shape[2] != found.in_chans or pixels.dtype != found.pixels.dtype:
        needed = f"{found.pixels.dtype} [H, W, {found.in_chans}]"
        raise SettingError("picture", f"{pixels.dtype} {list(pixels.shape)}", f"must be {needed}, as the model reads")
    if where.shape != pixels.shape[:2] or where.all():
        problem = f"must be of shape {list(pixels.shape[:2])}, and zero where a pixel is visible"
        raise SettingError("hole", list(where.shape), problem)
    ratio = found.usual_ratio if mask_ratio is None else mask_ratio
    try:
        found.num_visible(ratio)
    except ValueError as error:
        raise SettingError("mask_ratio", ratio, f"{error}; choose another ratio") from error
    training = found.training
    try:
        return inpaint_picture(found.eval(), pixels, where, Inpainting(ratio, rounds, overlap, seed))
    finally:
        found.train(training)


def tune(
    model: MaskedModel | AnyClassifier,
    batch_size: int,
    *,
    mask_ratio: float = 0.75,
    precision: Literal["fp32", "bf16"] = "fp32",
    anew: bool = False,
) -> Choices:
    """Measures which implementation is fastest on this CPU for a training step, as a run does, and uses it from now on.

    It takes two seconds or about three steps, and a moment where this machine has measured the same before. Without it,
    matrix products and attention on a CPU are PyTorch's own. Call it before ``torch.compile``: a compiled function
    keeps the choice of when it was compiled.

    Args:
        model: what is trained, on the CPU: a masked autoencoder, or the classifier that fine-tunes one.
        batch_size: images of a forward pass.
        mask_ratio: as in ``training_loss``; a classifier has none.
        precision: of the step: ``"bf16"`` is that of ``torch.autocast("cpu", torch.bfloat16)``.
        anew: measure in any case, and not take what was measured before.

    Returns:
        The choice that now holds in this process. Its ``entries`` say for each shape what is taken, and how many times
        as fast it was as PyTorch's own.

    Raises:
        UserError: a wrong argument.
    """
    import torch

    from fastmae.model.build import AnyClassifier
    from fastmae.model.calls import calls_of
    from fastmae.model.family import MaskedModel
    from fastmae.ops.backends import asked_backends, set_backends
    from fastmae.ops.tuning import measured

    if not isinstance(model, MaskedModel | AnyClassifier):
        raise SettingError("model", type(model).__name__, "must be a masked autoencoder or a classifier of fastmae")
    device = next(model.parameters()).device
    if device.type != "cpu":
        raise SettingError("model", problem=f"is on {device}; choices are measured for the CPU alone")
    if type(batch_size) is not int or batch_size < 1:
        raise SettingError("batch_size", batch_size, "must be an integer of at least 1")
    if precision not in ("fp32", "bf16"):
        raise SettingError("precision", precision, "must be fp32 or bf16")
    if isinstance(model, MaskedModel):
        try:
            model.num_visible(mask_ratio)
        except (TypeError, ValueError) as error:
            raise SettingError("mask_ratio", mask_ratio, str(error)) from error
    calls = calls_of(model, batch_size, mask_ratio)
    choices = measured(calls, torch.bfloat16 if precision == "bf16" else torch.float32, anew=anew)
    set_backends(dataclasses.replace(asked_backends(), choices=choices))
    return choices


# --- what is given ----------------------------------------------------------------------------------------------------


def _refuse_hooks(settings: Mapping[str, Any]) -> None:
    """Refuses what would change the training in a way that no checkpoint and no other rank knows of."""
    for name, value in settings.items():
        if name in HOOKS and not (name == "loss" and isinstance(value, str)):  # mse and bce are those of a family
            raise SettingError(name, problem=f"is not taken, as a run must be exact and resumable; {HOOKS[name]}")


def _with_data(
    data: Any,
    val: Any,
    settings: dict[str, Any],
    in_file: Mapping[str, Any],
    *,
    needs_labels: bool,
    is_needed: bool = True,
    table: ReadAs | None = None,
) -> tuple[Parts | None, dict[str, Any]]:
    """Returns objects as sources, and the settings with what stands for them there, or with the paths that are given.

    Args:
        settings: the arguments.
        in_file: the settings of the file, which they override.
        needs_labels: whether samples are read for their labels, where nothing else tells these.
        is_needed: whether nothing else tells the data.
        table: how a table is read; None where none is meant.
    """
    if data is None:
        if val is not None:
            raise SettingError("val", problem="is for objects in Python; give data as well")
        if is_needed and "data_path" not in settings and "data_path" not in in_file:
            raise SettingError("data", problem="must be given: a Dataset, a list, an array, a path or digits")
        return None, settings
    if "data_path" in settings:
        raise SettingError("data_path", settings["data_path"], "is another name of data, which is given as well")
    from fastmae.data.objects import given_parts

    layout: Any = {**in_file, **settings}.get("layout") or "auto"
    parts = given_parts(data, val, layout=layout, needs_labels=needs_labels, table=table)
    for name in FOR_PATHS if parts is not None else ():
        if settings.get(name) is not None:
            raise SettingError(name, settings[name], "is for files that a path names; leave it out, or give their path")
    return parts, {**settings, "data_path": data if parts is None else parts.phrase}


def _table_of(model: Any, settings: Mapping[str, Any]) -> ReadAs | None:
    """Returns how a table in Python is read for a model of vectors; None for a model of images."""
    is_name = model is None or isinstance(model, str)
    family = family_of(model or settings.get("model")) if is_name else getattr(model, "family", "vit")
    if family != "mlp":
        return None
    columns, label, nodata = (settings.get(name) for name in ("columns", "label_column", "nodata"))
    return ReadAs(columns=tuple(columns or ()), label_column=label, nodata=nodata)


def _opened(data: Any, val: Any, encoder: MaskedModel, *, needs_labels: bool = False) -> Any:
    """Returns what ``open_train`` takes."""
    from fastmae.data.objects import given_parts

    table = None if encoder.read_as.columns is None else encoder.read_as
    parts = given_parts(data, val, layout=encoder.read_as.layout, needs_labels=needs_labels, table=table)
    if parts is not None:
        return parts
    return str(data) if isinstance(data, str | PathLike) else [str(path) for path in data]


def _encoder(model: MaskedModel | Run | str | PathLike[str]) -> MaskedModel:
    """Returns the masked autoencoder that an argument means; of a fine-tuning, its encoder."""
    from fastmae.checkpoint.load import load_model
    from fastmae.model.family import MaskedModel

    if isinstance(model, Run):
        return load_model(model.folder, model.given_model)
    if isinstance(model, str | PathLike):
        return load_model(Path(model))
    if not isinstance(model, MaskedModel):
        problem = "must be a masked autoencoder of fastmae, a run, or the path of a checkpoint"
        raise SettingError("model", type(model).__name__, problem)
    return model


def _trainable(model: Any) -> MaskedModel:
    """Returns a model that a run can train.

    Raises:
        SettingError: it is none, or its masks cannot be given.
    """
    from fastmae.model.family import MaskedModel

    name = type(model).__name__
    if not isinstance(model, MaskedModel):
        problem = (
            "is no preset's name and no masked autoencoder of fastmae; give one of these, a subclass of it, or what "
            "fastmae.wrap makes of a timm model; fastmae.accelerate makes transformers' ViTMAE faster in its own loop"
        )
        raise SettingError("model", name, problem)
    if model.draws_masks is not None:
        problem = f"its {model.draws_masks} draws masks of its own; let it take ids_shuffle, as a run gives the masks"
        raise SettingError("model", name, problem)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        problem = "none of its parameters is trained; let some of them have requires_grad"
        raise SettingError("model", name, problem)
    return model


def _settings_of_model(model: MaskedModel, settings: Mapping[str, Any], in_file: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings that a model decides. They override those of a file.

    Raises:
        SettingError: one of those that were given is another.
    """
    from fastmae.model.build import settings_of

    decided = settings_of(model)
    if init := {**in_file, **settings}.get("init"):
        problem = "is for a preset; the model that is given has weights already: init='' keeps them"
        raise SettingError("init", init, problem)
    for name, value in decided.items():
        given = settings.get(name)
        if given is None:
            continue
        if not _is_same(given, value):
            raise SettingError(name, given, f"is {value} of the model that is given; leave it out")
    return decided


def _is_same(given: Any, value: Any) -> bool:
    """Tells whether a setting that was given is what a model decides: one number stands for a pair of it, and a model
    holds numbers in float32."""
    given = given.tolist() if hasattr(given, "tolist") else given
    items, decided = (tuple(one) if isinstance(one, list | tuple) else (one,) for one in (given, value))
    items = items * len(decided) if len(items) == 1 else items
    return len(items) == len(decided) and all(map(_is_near, items, decided))


def _is_near(one: Any, other: Any) -> bool:
    if isinstance(one, int | float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-6)
    return bool(one == other)
