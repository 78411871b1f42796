"""A fresh model from what decides its architecture."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastmae.config.family import PRESET_OF_FAMILY, TAKEN_BY, Family, family_of, phrase_of
from fastmae.config.images import pixel_settings, read_as
from fastmae.config.model import ModelSpec
from fastmae.errors import SettingError, UserError
from fastmae.model.classifier import Classifier
from fastmae.model.classifier import classifier_of as vit_classifier_of
from fastmae.model.conv import ConvMAE
from fastmae.model.convnext import ConvNeXtMAE
from fastmae.model.convnext_classifier import ConvNeXtClassifier, convnext_classifier_of
from fastmae.model.family import MaskedModel
from fastmae.model.mae import MaskedAutoencoderViT
from fastmae.model.mlp import MLPMAE
from fastmae.model.presets import CONVNEXT_PRESETS, MODELS, PRESETS
from fastmae.model.sizes import PRESET_SIZES, beyond_preset, full_shape, sizes_of


def build_model(spec: ModelSpec) -> MaskedModel:
    """Returns a fresh model.

    Raises:
        SettingError: an unknown preset, or sizes that do not fit each other.
    """
    if is_phrase(spec.model):
        problem = "was given in Python; make such a model and give it as model, its weights are loaded into it"
        raise SettingError("model", spec.model, problem)
    family = family_of(spec.model)
    known = [*PRESETS, *CONVNEXT_PRESETS, *(PRESET_OF_FAMILY[one] for one in _MAKERS if one != "convnext")]
    if spec.model not in known:
        near = difflib.get_close_matches(spec.model, known, 1)
        hint = f"; did you mean {near[0]}?" if near else ";"
        raise SettingError("model", spec.model, f"unknown{hint} one of {', '.join(known)}")
    try:
        model = _make_vit(spec) if family == "vit" else _MAKERS[family](spec)
    except ValueError as error:
        flags = "--input_size, --patch_size" if family in TAKEN_BY["patch_size"] else "--input_size"
        raise SettingError("model", spec.model, f"{error}; choose another {flags} or --model") from error
    model.read_as = read_as(spec)
    return model


def _make_vit(spec: ModelSpec) -> MaskedModel:
    return PRESETS[spec.model](
        **_images(spec),
        decoder_attention=spec.decoder_attention,
        **({} if spec.patch_size is None else {"patch_size": spec.patch_size}),
        **full_shape(spec.model, spec),
    )


def _make_conv(spec: ModelSpec) -> MaskedModel:
    names = ("patch_size", "widths", "latent_dim", "mask_unit", "fill", "loss", "loss_on")
    return ConvMAE(**_images(spec), **_given(spec, names))


def _make_mlp(spec: ModelSpec) -> MaskedModel:
    return MLPMAE(**_images(spec), **_given(spec, ("widths", "fill", "loss", "loss_on")))


def _given(spec: ModelSpec, names: Sequence[str]) -> dict[str, Any]:
    """Returns the settings that are not left to the model."""
    return {name: getattr(spec, name) for name in names if getattr(spec, name) is not None}


def _make_convnext(spec: ModelSpec) -> MaskedModel:
    return CONVNEXT_PRESETS[spec.model](**_images(spec))


def _images(spec: ModelSpec) -> dict[str, Any]:
    """Returns the arguments that all families take."""
    names = ("in_chans", "norm_pix_loss", "mean", "std", "pixels")
    return {"img_size": spec.input_size, **{name: getattr(spec, name) for name in names}}


_MAKERS: dict[Family, Callable[[ModelSpec], MaskedModel]] = {
    "convnext": _make_convnext,
    "conv": _make_conv,
    "mlp": _make_mlp,
}
"""What makes the models of the other families, which have a function each."""


AnyClassifier = Classifier | ConvNeXtClassifier
"""What the loop of fine-tuning trains."""


def classifier_of(
    model: MaskedModel, num_classes: int, *, img_size: tuple[int, int] | None = None, global_pool: bool = True
) -> AnyClassifier:
    """Makes a classifier with a copy of the encoder of a model; its head is new.

    Args:
        model: a vision transformer or a ConvNeXt V2.
        num_classes: the number of logits.
        img_size: (height, width) of its images; by default the model's.
        global_pool: classify the mean of all patches, as ConvNeXt V2 always does; otherwise the class token.

    Raises:
        ValueError: ``img_size`` is not a multiple of the patch.
        UserError: the model is of another family, or there is no class token.
    """
    if isinstance(model, ConvNeXtMAE):
        if not global_pool:
            raise SettingError("cls_token", problem="a ConvNeXt V2 has no class token; leave it out")
        return convnext_classifier_of(model, num_classes, img_size=img_size)
    require_classifier(model)
    assert isinstance(model, MaskedAutoencoderViT)
    return vit_classifier_of(model, num_classes, img_size=img_size, global_pool=global_pool)


def require_classifier(model: MaskedModel) -> None:
    """Refuses models of which ``classifier_of`` makes no classifier.

    Raises:
        UserError: the model is no vision transformer and no ConvNeXt V2.
    """
    if not isinstance(model, MaskedAutoencoderViT | ConvNeXtMAE):
        preset = PRESET_OF_FAMILY[model.family]
        raise UserError(
            f"{preset} cannot be fine-tuned; classify its frozen features with `fastmae probe`, or export it to "
            "torch-export or onnx and train a classifier on that"
        )


def is_phrase(name: str) -> bool:
    """Tells whether the name of a preset is the phrase that stands for a model that no preset makes."""
    return name.startswith("<")


def settings_of(model: MaskedModel) -> dict[str, Any]:
    """Returns the settings of a run that trains a model, as far as the model decides them.

    Their ``model`` is the preset by which ``build_model`` makes one like it, or a phrase where none does
    (``phrase_of``).
    """
    images = dict(
        input_size=model.img_size,
        patch_size=model.patch_size,
        in_chans=model.in_chans,
        mean=tuple(model.mean.tolist()),
        std=tuple(model.std.tolist()),
        norm_pix_loss=model.norm_pix_loss,
        decoder_attention=model.decoder_attention,
        **{name: value for name, value in pixel_settings(model.pixels).items() if value not in (None, "uint8")},
    )
    images = {name: value for name, value in images.items() if model.family in TAKEN_BY.get(name, (model.family,))}
    own = model.own_settings
    if own and _makes(images | own, model):
        return images | own
    if isinstance(model, MaskedAutoencoderViT) and type(model) in MODELS.values():
        shape = sizes_of(model).shape
        others = [{n: v for n, v in beyond_preset(preset, shape).items() if v is not None} for preset in PRESET_SIZES]
        preset, fewest = min(zip(PRESET_SIZES, others, strict=True), key=lambda pair: len(pair[1]))
        settings = images | {"model": preset} | fewest
        if _makes(settings, model):
            return settings
    return images | own | {"model": phrase_of(model)}


def _makes(settings: dict[str, Any], model: MaskedModel) -> bool:
    """Tells whether settings make a model like this one: the same modules, sizes and names of weights."""
    try:
        with torch.device("meta"):
            other = build_model(ModelSpec(**settings))
    except SettingError:
        return False
    shapes = [{name: tensor.shape for name, tensor in one.state_dict().items()} for one in (model, other)]
    return shapes[0] == shapes[1] and model.sizes == other.sizes and repr(model) == repr(other)
