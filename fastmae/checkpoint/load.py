"""Opening a checkpoint to use its model: no optimiser, no run, no other rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from fastmae.checkpoint.contents import Kind, described
from fastmae.checkpoint.manifest import LOOKS, MANIFEST, BadCheckpointError, find_checkpoint, read_manifest
from fastmae.checkpoint.official import (
    OfficialFile,
    check_channels,
    check_heads,
    holds_file,
    model_of_file,
    read_official,
    report,
    report_remarks,
    spec_of_file,
)
from fastmae.checkpoint.positions import for_grid, read_table
from fastmae.checkpoint.restore import load_checkpoint
from fastmae.config.images import images_of_model, read_as
from fastmae.config.model import ModelSpec
from fastmae.config.shared import ReadingConfig
from fastmae.errors import SettingError, UserError
from fastmae.facts import BUILT_IN_TABLES
from fastmae.model.build import AnyClassifier, build_model, classifier_of
from fastmae.model.classifier import merge_lora, tune
from fastmae.model.family import MaskedModel
from fastmae.model.mae import MaskedAutoencoderViT
from fastmae.model.pixels import register_pixels
from fastmae.model.presets import PRESETS
from fastmae.model.segmenter import Segmenter, segmenter_of
from fastmae.model.upscaler import Upscaler, upscaler_of
from fastmae.model.vit import patch_grid

T = TypeVar("T")
Family = TypeVar("Family", bound=MaskedModel)


@dataclass(frozen=True)
class Opened:
    """A checkpoint as it is used after training."""

    model: MaskedModel
    """It is on the CPU and in evaluation mode."""
    settings: dict[str, Any]
    """The settings of the run, as far as they are known; ``model``, ``input_size`` and ``in_chans`` always are."""
    has_decoder: bool
    """Whether the decoder was in the checkpoint; otherwise it is a fresh one."""
    kind: Kind = "autoencoder"
    head: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    """Of a classifier: ``head.weight`` [classes, D] and ``head.bias``."""

    @property
    def what(self) -> str:
        """What the checkpoint holds, in words."""
        weights = self.model.state_dict()
        encoder = {name: tensor for name, tensor in weights.items() if not name.startswith("decoder_")}
        return described(weights if self.has_decoder else encoder, self.head)


def load_model(
    checkpoint: str | Path,
    model: str | MaskedModel | None = None,
    *,
    needs_decoder: bool = False,
    input_size: int | Sequence[int] | None = None,
    num_heads: int | None = None,
    norm_pix_loss: bool | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
) -> MaskedModel:
    """Returns the model of a checkpoint, on the CPU, in evaluation mode.

    What a file does not say is taken from its tensors, or by default with a warning. Of a fine-tuned classifier the
    model is the encoder, without the head.

    Args:
        checkpoint: a run folder (its newest intact checkpoint counts), a ``step-NNNNNNNN`` folder, a .pth, a
            .safetensors, or a folder of transformers.
        model: the preset, for a file that does not name its own; or a model of your own class, into which the weights
            of a run folder or a checkpoint of it are loaded, and which is returned.
        needs_decoder: whether a file with the encoder alone is refused.
        input_size: side of the images in pixels, or (height, width). For another size than the checkpoint's, positions
            are computed or interpolated.
        num_heads: heads of the encoder, for a file that does not say them.
        norm_pix_loss: whether the decoder predicts normalised pixels.
        mean, std: what uint8 images are normalised by: one number per channel, in units of [0, 1].

    Raises:
        UserError: nothing there, not intact, or not a masked autoencoder.
    """
    settings: dict[str, Any] = dict(
        input_size=input_size, num_heads=num_heads, norm_pix_loss=norm_pix_loss, mean=mean, std=std
    )
    if isinstance(model, MaskedModel):
        for name, value in settings.items():
            if value is not None:
                raise SettingError(name, value, "is decided by the model that is given; leave it out")
        return load_weights(checkpoint, model).eval()
    opened = open_checkpoint(checkpoint, ReadingConfig(model=model, **settings))
    if needs_decoder and not opened.has_decoder:
        raise UserError(lacks_decoder(checkpoint, opened))
    return opened.model


def load_weights(checkpoint: str | Path, model: Family) -> Family:
    """Loads the weights of a checkpoint, or of the newest intact one of a run folder, into a model, and returns it.

    From then on the model reads and normalises images as that run did, too: these are not among its weights.

    Raises:
        UserError: nothing there, not intact, or of another architecture.
    """
    path = Path(checkpoint)
    if not path.exists() or holds_file(path):
        raise UserError(f"{path}: no run folder nor a checkpoint of one, of which a model of your own gets its weights")

    def load(found: Path, manifest: dict[str, Any]) -> None:
        load_checkpoint(found, model)
        _read_as_in(manifest["settings"], model)

    _of_newest(path, load)
    return model


def _read_as_in(settings: dict[str, Any], model: MaskedModel) -> None:
    """Lets a model read and normalise images as the settings of a run say."""
    spec, device = ModelSpec.from_json(settings), model.mean.device
    mean, std = spec.mean or tuple(model.mean.tolist()), spec.std or tuple(model.std.tolist())
    register_pixels(model, spec.in_chans, mean, std, spec.pixels)
    model.to(device)
    model.read_as = read_as(spec)


def lacks_decoder(checkpoint: str | Path, opened: Opened) -> str:
    """Says why a checkpoint without a decoder cannot reconstruct."""
    held = "is" if opened.kind == "classifier" else "holds the encoder alone:"
    return f"{checkpoint}: {held} {opened.what}; reconstruction needs a file with its decoder"


def open_checkpoint(
    checkpoint: str | Path,
    given: ReadingConfig | None = None,
    *,
    resize: bool = True,
    weights_alone: bool = False,
    uses_head: bool = False,
) -> Opened:
    """Opens a checkpoint as ``load_model`` does, and returns what else it says.

    Args:
        given: what is known of the checkpoint besides, and the size that is wanted.
        resize: make the model one of the wanted size. Otherwise ``given.input_size`` only tells the grid of positions
            that do not tell it themselves.
        weights_alone: how pixels are normalised and predicted is decided elsewhere, so that it is no matter if a file
            does not say it.
        uses_head: the head of a segmenter or an upscaler is opened as well, by ``load_segmenter`` or
            ``load_upscaler``, so that no line says that it is left out.
    """
    path, given = Path(checkpoint), given or ReadingConfig()
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint; give a run folder, one of its checkpoints or an official file")
    if holds_file(path):
        file = read_official(path)
        report_remarks(file)
        opened = _opened_file(file, given, weights_alone)
    else:
        opened = _of_newest(path, lambda found, manifest: _opened_run(found, manifest, given, uses_head))
    if resize and given.input_size is not None:
        _resize(path, opened, (given.input_size[0], given.input_size[-1]))
    opened.model.eval()
    return opened


def own_data(checkpoint: str | Path, settings: dict[str, Any], name: str = "data_path") -> str | tuple[str, ...]:
    """Returns the data that a model was trained on, where none were given, and says so.

    Args:
        settings: those of the checkpoint.
        name: of the setting that was not given.

    Raises:
        SettingError: the checkpoint does not say its data, or they are gone.
    """
    said = settings.get("data_path")
    paths = [said] if isinstance(said, str) else said
    if not isinstance(paths, list | tuple) or not paths or not all(isinstance(path, str) for path in paths):
        raise SettingError(name, problem=f"must be given, as {checkpoint} does not say its data")
    for path in paths:
        if path not in ("digits", *BUILT_IN_TABLES) and "{" not in path and not Path(path).expanduser().exists():
            raise SettingError(name, problem=f"must be given, as the data of {checkpoint} are not at {path} any more")
    report(Path(checkpoint), [f"no data were given; those of its run are taken: {' '.join(paths)}"])
    return paths[0] if len(paths) == 1 else tuple(paths)


def read_settings(checkpoint: str | Path) -> dict[str, Any]:
    """Returns the settings that a checkpoint says, without a model.

    Raises:
        UserError: nothing there, or not intact.
    """
    path = Path(checkpoint)
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint; give a run folder, one of its checkpoints or an official file")
    if holds_file(path):
        return read_official(path).args
    return _of_newest(path, lambda _, manifest: manifest["settings"])


def load_classifier(checkpoint: str | Path) -> AnyClassifier:
    """Returns a fine-tuned classifier, on the CPU, in evaluation mode.

    Args:
        checkpoint: a run folder of finetune (its newest intact checkpoint counts), one of its checkpoints, or a file of
            a classifier with the official or transformers' names.

    Raises:
        UserError: nothing there, not intact, or not a classifier.
    """
    path = Path(checkpoint)
    if not path.exists() or not holds_file(path):
        return _of_newest(path, _classifier_of_run).eval()
    opened = open_checkpoint(path)
    if not opened.head:
        raise UserError(f"{path}: is {opened.what}, not a fine-tuned classifier; give another checkpoint")
    return with_head(opened)


def with_head(opened: Opened) -> AnyClassifier:
    """Returns the classifier that a checkpoint with a head holds, in evaluation mode."""
    has_pooled_norm = opened.model.fc_norm is not None
    model = classifier_of(opened.model, opened.head["head.weight"].shape[0], global_pool=has_pooled_norm)
    model.load_state_dict(opened.head, strict=False)
    return model.eval()


# --- run folders ------------------------------------------------------------------------------------------------------


def _of_newest(path: Path, build: Callable[[Path, dict[str, Any]], T]) -> T:
    """Builds something of a checkpoint and its manifest, or of the newest intact checkpoint of a run folder.

    Training may go on in the folder and delete a checkpoint while it is read; then the newer one is taken.

    Raises:
        UserError: none is intact, or it is not what it must be.
    """
    looks = 0
    while True:
        checkpoint, looks = path, looks + 1
        try:
            checkpoint, manifest = _verified(path)
            return build(checkpoint, manifest)
        except (BadCheckpointError, KeyError, TypeError, ValueError) as error:
            is_deleted = not checkpoint.exists()
            if is_deleted and checkpoint != path and looks < LOOKS:
                continue
            what = "was deleted while it was read, as training goes on" if is_deleted else error
            raise UserError(f"{checkpoint}: {what}; give another checkpoint") from error


def _verified(path: Path) -> tuple[Path, dict[str, Any]]:
    """Returns a checkpoint, or the newest intact one of a run folder, with its manifest.

    Raises:
        BadCheckpointError: none is intact.
    """
    if (path / MANIFEST).exists():
        return path, read_manifest(path)
    newest = find_checkpoint(path)
    if newest.path is None:
        raise BadCheckpointError(f"no intact checkpoint ({'; '.join(newest.refused) or 'none at all'})")
    return newest.path, newest.manifest


def _opened_run(path: Path, manifest: dict[str, Any], given: ReadingConfig, uses_head: bool) -> Opened:
    """Opens a checkpoint of pretrain or of finetune at its own size; ``given`` overrides how pixels are normalised."""
    settings = manifest["settings"]
    named = PRESETS.get(given.model or "", given.model)
    if given.model is not None and named != PRESETS.get(settings["model"], settings["model"]):
        raise SettingError("model", given.model, f"{path} is of {settings['model']}, as its settings say; leave it out")
    if "segmenter_head" in settings or "scale" in settings:
        return _encoder_of_dense(path, settings, uses_head)
    if "nb_classes" in settings:
        return _opened_file(_file_of_classifier(path, manifest), given)
    chosen = {name: getattr(given, name) for name in ("norm_pix_loss", "mean", "std")}
    check_channels(path, settings["in_chans"], given)
    images = images_of_model(given, settings, settings["in_chans"])
    model = _fresh({**settings, **{name: value for name, value in chosen.items() if value is not None}, **images})
    if isinstance(model, MaskedAutoencoderViT):
        check_heads(path, model.cls_token.shape[2] // model.head_dims[0], given)
    load_checkpoint(path, model)
    return Opened(model, settings, True)


def _fresh(settings: dict[str, Any]) -> MaskedModel:
    try:
        return build_model(ModelSpec.from_json(settings))
    except SettingError as error:
        raise BadCheckpointError(str(error)) from error


def _classifier_of_run(path: Path, manifest: dict[str, Any]) -> AnyClassifier:
    settings = manifest["settings"]
    if "nb_classes" not in settings:
        raise BadCheckpointError("is of a masked autoencoder, not of a fine-tuned classifier")
    model = classifier_of(_fresh(settings), settings["nb_classes"], global_pool=settings["global_pool"])
    tune(model, settings["tune"], settings["lora_rank"])
    load_checkpoint(path, model)
    return model


def _file_of_classifier(path: Path, manifest: dict[str, Any]) -> OfficialFile:
    """Returns a fine-tuned run's checkpoint as the official file that the run writes, updates of low rank merged."""
    weights = merge_lora(dict(_classifier_of_run(path, manifest).state_dict()))
    return OfficialFile(path, weights, None, None, manifest["settings"], kind="classifier")


def load_segmenter(checkpoint: str | Path) -> Segmenter:
    """Returns a model that gives every pixel a class, on the CPU, in evaluation mode.

    Args:
        checkpoint: a run folder of segment (its newest intact checkpoint counts), or one of its checkpoints.

    Raises:
        UserError: nothing there, not intact, or not of segment.
    """
    return _with_dense_head(checkpoint, "segment", "segmenter_head", _segmenter_of)


def load_upscaler(checkpoint: str | Path) -> Upscaler:
    """Returns a model that makes images larger, on the CPU, in evaluation mode.

    Args:
        checkpoint: a run folder of upscale (its newest intact checkpoint counts), or one of its checkpoints.

    Raises:
        UserError: nothing there, not intact, or not of upscale.
    """
    return _with_dense_head(checkpoint, "upscale", "scale", _upscaler_of)


def _segmenter_of(mae: MaskedAutoencoderViT, settings: dict[str, Any]) -> Segmenter:
    return segmenter_of(mae, settings["num_classes"], settings["segmenter_head"])


def _upscaler_of(mae: MaskedAutoencoderViT, settings: dict[str, Any]) -> Upscaler:
    return upscaler_of(mae, settings["scale"])


def _with_dense_head(
    checkpoint: str | Path, command: str, named_by: str, make: Callable[[MaskedAutoencoderViT, dict[str, Any]], Any]
) -> Any:
    """Opens a model with a head for every pixel, which ``make`` makes and of which the setting ``named_by`` tells."""
    path = Path(checkpoint)
    if path.exists() and holds_file(path):
        raise UserError(f"{path}: no run folder of {command} nor a checkpoint of one; give such a one")

    def opened(found: Path, manifest: dict[str, Any]) -> Any:
        settings = manifest["settings"]
        if named_by not in settings:
            raise BadCheckpointError(f"is of {_kind_of(settings)}, not of fastmae {command}")
        return _dense_of_run(found, settings, make)

    return _of_newest(path, opened).eval()


def _kind_of(settings: dict[str, Any]) -> str:
    kinds = {"segmenter_head": "a segmenter", "scale": "an upscaler", "nb_classes": "a fine-tuned classifier"}
    return next((kind for name, kind in kinds.items() if name in settings), "a masked autoencoder")


def _dense_of_run(
    path: Path, settings: dict[str, Any], make: Callable[[MaskedAutoencoderViT, dict[str, Any]], Any]
) -> Any:
    mae = _fresh(settings)
    assert isinstance(mae, MaskedAutoencoderViT)
    model = make(mae, settings)
    tune(model, settings["tune"], settings["lora_rank"])
    load_checkpoint(path, model)
    model.read_as = mae.read_as
    return model


def _encoder_of_dense(path: Path, settings: dict[str, Any], uses_head: bool) -> Opened:
    """Opens the encoder of a segmenter or an upscaler, and says that its head is left out, unless that is opened as
    well."""
    enlarges = "scale" in settings
    make: Callable[[MaskedAutoencoderViT, dict[str, Any]], Any] = _upscaler_of if enlarges else _segmenter_of
    what = f"images {settings['scale']} times as large" if enlarges else f"{settings['num_classes']} classes of pixels"
    weights = merge_lora(dict(_dense_of_run(path, settings, make).state_dict()))
    model = _fresh(settings)
    model.load_state_dict(
        {name: tensor for name, tensor in weights.items() if not name.startswith("head.")}, strict=False
    )
    report(path, [] if uses_head else [f"its head of {what} is left out"])
    return Opened(model, settings, False, kind="encoder")


# --- files ------------------------------------------------------------------------------------------------------------


def _opened_file(file: OfficialFile, given: ReadingConfig, weights_alone: bool = False) -> Opened:
    spec, _, notes = spec_of_file(file, given)
    model = model_of_file(file, given)
    report(file.path, [*notes, *([] if weights_alone else _unsaid(file, given, model))])
    return Opened(model, {**file.args, **spec.as_json()}, file.has_decoder, file.kind, file.head)


def _unsaid(file: OfficialFile, given: ReadingConfig, model: MaskedModel) -> list[str]:
    """Says what neither the file nor anybody says about how pixels are prepared and predicted, and what is taken."""
    names = ["mean", "std", *(["norm_pix_loss"] if file.has_decoder else [])]
    unsaid = [name for name in names if getattr(given, name) is None and file.args.get(name) is None]
    if not unsaid:
        return []
    taken = {
        "mean": " ".join(f"{value:.4g}" for value in model.mean.tolist()),
        "std": " ".join(f"{value:.4g}" for value in model.std.tolist()),
        "norm_pix_loss": str(model.norm_pix_loss),
    }
    values = ", ".join(f"{name} {taken[name]}" for name in unsaid)
    return [f"does not say {', '.join(unsaid)}; taken: {values}; give them if its training had others"]


def _resize(path: Path, opened: Opened, size: tuple[int, int]) -> None:
    """Makes a model one of images of another size, in place. Says so where its positions are other ones."""
    model = opened.model
    if size == model.img_size:
        return
    try:
        grid = patch_grid(size, model.patch_size)
        if not isinstance(model, MaskedAutoencoderViT):
            model.set_size(size)
    except ValueError as error:
        raise SettingError("input_size", size, f"{error}; choose another size") from error
    opened.settings["input_size"] = list(size)
    if not isinstance(model, MaskedAutoencoderViT):
        return
    encoder, decoder = (
        for_grid(read_table(getattr(model, name).detach(), name, model.grid_size), grid)
        for name in ("pos_embed", "decoder_pos_embed")
    )
    model.set_positions(size, encoder.table, decoder.table)
    report(path, encoder.notes)
