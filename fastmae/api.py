"""The functions of ``import fastmae`` that begin a run or compute features. They load torch when they are called."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from fastmae.config import FinetuneConfig, PretrainConfig
from fastmae.config.load import make_config
from fastmae.errors import SettingError, UserError
from fastmae.files import read_rows
from fastmae.messages import logger

if TYPE_CHECKING:
    import numpy as np
    import torch

    from fastmae.evaluate.features import Features
    from fastmae.model.classifier import Classifier
    from fastmae.model.mae import MaskedAutoencoderViT
    from fastmae.ops.choices import Choices

DataPath = str | PathLike[str] | Sequence[str | PathLike[str]]
Config = TypeVar("Config", PretrainConfig, FinetuneConfig)
POOLS = ("mean", "cls", "both", "tokens")


@dataclasses.dataclass(frozen=True)
class Run:
    """A training that ended, and what it left in its folder."""

    folder: Path
    """The ``output_dir``, with checkpoints, ``metrics.jsonl``, ``log.txt`` and the settings."""
    status: int
    """0 if the run is done; 75 if a signal stopped it, so that ``resume="auto"`` continues it."""
    is_classifier: bool
    """Whether ``finetune`` made it."""

    @cached_property
    def model(self) -> MaskedAutoencoderViT | Classifier:
        """The model of the newest intact checkpoint, on the CPU, in evaluation mode. It is read once, when asked for.

        After ``pretrain`` it is the masked autoencoder; after ``finetune`` the classifier, which turns uint8 images
        [N, H, W, C] into logits [N, classes].

        Raises:
            UserError: the folder holds no intact checkpoint.
        """
        from fastmae.checkpoint.load import load_classifier, load_model

        return load_classifier(self.folder) if self.is_classifier else load_model(self.folder)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows of ``metrics.jsonl``: one for each optimiser step, with its step, loss and learning rate."""
        path = self.folder / "metrics.jsonl"
        rows, damaged = read_rows(path)
        if damaged:
            logger.warning("%s: %d of its lines are damaged and passed over", path, damaged)
        return rows


def pretrain(
    data_path: DataPath, *, output_dir: str | PathLike[str], config: str | PathLike[str] | None = None, **settings: Any
) -> Run:
    """Pretrains a masked autoencoder on images, as ``fastmae pretrain`` does.

    ``fastmae.train.pretrain.pretrain`` is the form that takes a configuration.

    Args:
        data_path: images as ``--data_path`` takes them (a folder, shards, arrays, ``"digits"``), or several of them.
        output_dir: the run folder.
        config: a YAML, TOML or JSON file of settings, or a run folder; arguments override it.
        settings: the flags of ``fastmae pretrain`` by their names, such as ``model="mae_vit_base_patch16"``,
            ``input_size=96`` (pixels), ``epochs=100``, ``blr=1.5e-4``, ``resume="auto"``. What is left out gets its
            default from the data.

    Returns:
        The run, once it is done or stopped by a signal.

    Raises:
        UserError: a setting, the data or a checkpoint cannot work. The message names the argument.
    """
    given = {"data_path": data_path, "output_dir": output_dir, **settings}
    configuration = make_config(PretrainConfig, given, config)
    from fastmae.train.pretrain import pretrain as run_pretraining

    return Run(Path(configuration.output_dir), run_pretraining(configuration), is_classifier=False)


def finetune(
    data_path: DataPath,
    *,
    output_dir: str | PathLike[str],
    finetune: str | PathLike[str] = "",
    config: str | PathLike[str] | None = None,
    **settings: Any,
) -> Run:
    """Fine-tunes a pretrained encoder on labelled images, as ``fastmae finetune`` does.

    Args:
        data_path: labelled images as ``--data_path`` takes them, or several of them.
        output_dir: the run folder.
        finetune: the pretrained encoder: a run folder of ``pretrain``, one of its checkpoints, or a file with an
            encoder. Random weights if it is left out.
        config: a YAML, TOML or JSON file of settings, or a run folder; arguments override it.
        settings: the flags of ``fastmae finetune`` by their names, such as ``epochs=50`` or ``tune="lora"``.

    Returns:
        The run, once it is done or stopped by a signal. Its ``model`` is the classifier.

    Raises:
        UserError: a setting, the data or a checkpoint cannot work. The message names the argument.
    """
    given = {"data_path": data_path, "output_dir": output_dir, **settings}
    configuration = make_config(FinetuneConfig, given | ({"finetune": finetune} if finetune else {}), config)
    from fastmae.train.finetune import finetune as run_finetuning

    return Run(Path(configuration.output_dir), run_finetuning(configuration), is_classifier=True)


def extract_features(
    model: MaskedAutoencoderViT | str | PathLike[str],
    data: DataPath | np.ndarray | torch.Tensor,
    *,
    pool: Literal["mean", "cls", "both", "tokens"] = "mean",
    split: Literal["train", "val"] = "train",
    batch_size: int = 256,
    num_workers: int | None = None,
) -> Features:
    """Computes the features of images with a frozen encoder, without gradients.

    Image files are resized and cropped as in the official evaluation, arrays are resized as a whole.

    Args:
        model: a masked autoencoder, whose device is used; or what ``load_model`` opens.
        data: images as ``--data_path`` takes them, or an array or tensor [N, H, W] or [N, H, W, C] of pixels (uint8
            in [0, 255]).
        pool: ``mean`` of the patch tokens (D numbers per image), the class token (``cls``, D numbers), ``both``
            (2·D), or all patch tokens one after another (``tokens``, L·D).
        split: which part of the data is used; an array has none.
        batch_size: images per forward pass.
        num_workers: threads that read and decode images. Default: one per core, at most 10.

    Returns:
        ``values`` float32 [n, D] on the model's device, the ``indices`` int64 [n] of the images among those that were
        given, and the ``skipped`` ones, which could not be read, with reasons.

    Raises:
        UserError: a wrong argument, or data or a checkpoint that cannot be opened.
    """
    for name, value, allowed in (("pool", pool, POOLS), ("split", split, ("train", "val"))):
        if value not in allowed:
            raise SettingError(name, value, f"must be one of {', '.join(allowed)}")
    for name, number in (("batch_size", batch_size), ("num_workers", num_workers)):
        if number is not None and number < 1:
            raise SettingError(name, number, "must be at least 1")
    import numpy as np
    import torch

    from fastmae.checkpoint.load import load_model
    from fastmae.data.arrays import array_source
    from fastmae.data.loader import default_workers
    from fastmae.data.sources import Source, open_train, train_and_val
    from fastmae.evaluate import features

    source: Source
    encoder = load_model(Path(model)) if isinstance(model, str | PathLike) else model
    if isinstance(data, torch.Tensor):
        data = data.detach().cpu().numpy()
    if isinstance(data, np.ndarray):
        try:
            source = array_source(data, None, "the array")
        except UserError as error:
            raise SettingError("data", problem=str(error)) from error
    else:
        paths = str(data) if isinstance(data, str | PathLike) else [str(path) for path in data]
        images = encoder.read_as
        source = open_train(paths, images) if split == "train" else train_and_val(paths, images)[1]
    workers = num_workers or default_workers()
    return features.extract_features(encoder, source, pool=pool, batch_size=batch_size, num_workers=workers)


def tune(
    model: MaskedAutoencoderViT | Classifier,
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

    from fastmae.model.calls import calls_of
    from fastmae.model.classifier import Classifier
    from fastmae.model.mae import MaskedAutoencoderViT
    from fastmae.ops.backends import asked_backends, set_backends
    from fastmae.ops.tuning import measured

    if not isinstance(model, MaskedAutoencoderViT | Classifier):
        raise SettingError("model", type(model).__name__, "must be a masked autoencoder or a classifier of fastmae")
    device = next(model.parameters()).device
    if device.type != "cpu":
        raise SettingError("model", problem=f"is on {device}; choices are measured for the CPU alone")
    if type(batch_size) is not int or batch_size < 1:
        raise SettingError("batch_size", batch_size, "must be an integer of at least 1")
    if precision not in ("fp32", "bf16"):
        raise SettingError("precision", precision, "must be fp32 or bf16")
    if isinstance(model, MaskedAutoencoderViT):
        try:
            model.num_visible(mask_ratio)
        except (TypeError, ValueError) as error:
            raise SettingError("mask_ratio", mask_ratio, str(error)) from error
    calls = calls_of(model, batch_size, mask_ratio)
    choices = measured(calls, torch.bfloat16 if precision == "bf16" else torch.float32, anew=anew)
    set_backends(dataclasses.replace(asked_backends(), choices=choices))
    return choices
