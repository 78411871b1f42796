"""Opening a checkpoint to use its model: no optimiser, no run, no other rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fastmae.checkpoint.manifest import LOOKS, MANIFEST, BadCheckpointError, find_checkpoint, read_manifest
from fastmae.checkpoint.official import holds_file, model_of_file, read_official, report_remarks, spec_of_file
from fastmae.checkpoint.restore import load_checkpoint
from fastmae.config.model import ModelSpec
from fastmae.errors import SettingError, UserError
from fastmae.model.build import build_model
from fastmae.model.classifier import Classifier, classifier_of, tune
from fastmae.model.mae import MaskedAutoencoderViT

M = TypeVar("M", MaskedAutoencoderViT, Classifier)


@dataclass(frozen=True)
class Opened:
    """A checkpoint as it is used after training."""

    model: MaskedAutoencoderViT
    """It is on the CPU and in evaluation mode."""
    settings: dict[str, Any]
    """The settings of the run, as far as they are known; ``model``, ``input_size`` and ``in_chans`` always are."""
    has_decoder: bool
    """Whether the decoder was in the checkpoint; otherwise it is a fresh one."""


def load_model(
    checkpoint: str | Path, model: str | None = None, *, needs_decoder: bool = False
) -> MaskedAutoencoderViT:
    """Returns the model of a checkpoint, on the CPU, in evaluation mode.

    Args:
        checkpoint: a run folder (its newest intact checkpoint counts), a ``step-NNNNNNNN`` folder, a .pth, a
            .safetensors, or a folder of transformers.
        model: the preset, for a file that does not name its own.
        needs_decoder: whether a file with the encoder alone is refused.

    Raises:
        UserError: nothing there, not intact, or not a masked autoencoder.
    """
    opened = open_checkpoint(checkpoint, model)
    if needs_decoder and not opened.has_decoder:
        raise UserError(f"{checkpoint}: holds the encoder alone; reconstruction needs a file with its decoder")
    return opened.model


def open_checkpoint(checkpoint: str | Path, preset: str | None = None) -> Opened:
    """Opens a checkpoint as ``load_model`` does, and returns what else it says."""
    path = Path(checkpoint)
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint; give a run folder, one of its checkpoints or an official file")
    if holds_file(path):
        file = read_official(path)
        report_remarks(file)
        settings = {**file.args, **spec_of_file(file, preset).as_json()}
        return Opened(model_of_file(file, preset).eval(), settings, file.has_decoder)
    model, settings = _of_newest(path, _autoencoder)
    return Opened(model.eval(), settings, True)


def load_classifier(checkpoint: str | Path) -> Classifier:
    """Returns the classifier of a fine-tuned run, on the CPU, in evaluation mode.

    Args:
        checkpoint: a run folder of finetune (its newest intact checkpoint counts), or one of its checkpoints.

    Raises:
        UserError: nothing there, not intact, or not a classifier.
    """
    return _of_newest(Path(checkpoint), _classifier)[0].eval()


def _autoencoder(path: Path, manifest: dict[str, Any]) -> MaskedAutoencoderViT:
    if "nb_classes" in manifest["settings"]:
        raise BadCheckpointError("is of a fine-tuned classifier, not of a masked autoencoder")
    model = build_model(ModelSpec.from_json(manifest["settings"]))
    load_checkpoint(path, manifest, model)
    return model


def _classifier(path: Path, manifest: dict[str, Any]) -> Classifier:
    settings = manifest["settings"]
    if "nb_classes" not in settings:
        raise BadCheckpointError("is of a masked autoencoder, not of a fine-tuned classifier")
    encoder = build_model(ModelSpec.from_json(settings))
    model = classifier_of(encoder, settings["nb_classes"], global_pool=settings["global_pool"])
    tune(model, settings["tune"], settings["lora_rank"])
    load_checkpoint(path, manifest, model)
    return model


def _of_newest(path: Path, build: Callable[[Path, dict[str, Any]], M]) -> tuple[M, dict[str, Any]]:
    """Builds the model of a checkpoint, or of the newest intact one of a run folder. Returns its settings, too.

    Training may go on in the folder and delete a checkpoint while it is read; then the newer one is taken.

    Raises:
        UserError: none is intact, or it is not such a model.
    """
    looks = 0
    while True:
        checkpoint, looks = path, looks + 1
        try:
            checkpoint, manifest = _verified(path)
            return build(checkpoint, manifest), manifest["settings"]
        except (BadCheckpointError, KeyError, TypeError, ValueError, SettingError) as error:
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
