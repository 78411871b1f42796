"""fastmae: a fast, exact, resumable trainer for masked autoencoders (MAE, He et al. 2021).

These are the public names. Each is loaded when it is first used, so that ``import fastmae`` loads no torch, touches no
device and starts no thread.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastmae import ops
    from fastmae.api import (
        Run,
        extract_features,
        feature_map,
        finetune,
        impute,
        inpaint,
        pretrain,
        probe,
        segment,
        tune,
        upscale,
    )
    from fastmae.checkpoint.load import load_model
    from fastmae.data.objects import as_source
    from fastmae.data.preprocess import Preprocessing
    from fastmae.data.sources import Source
    from fastmae.errors import UserError
    from fastmae.model.accelerate import accelerate
    from fastmae.model.conv import ConvMAE
    from fastmae.model.convnext import ConvNeXtMAE
    from fastmae.model.loss import MAELoss
    from fastmae.model.mae import MaskedAutoencoderViT
    from fastmae.model.masks import ids_from_mask
    from fastmae.model.mlp import MLPMAE
    from fastmae.model.presets import (
        mae_vit_base_patch8,
        mae_vit_base_patch16,
        mae_vit_base_patch16_dec512d8b,
        mae_vit_giant_patch14,
        mae_vit_huge_patch14,
        mae_vit_huge_patch14_dec512d8b,
        mae_vit_large_patch16,
        mae_vit_large_patch16_dec512d8b,
        mae_vit_small_patch8,
        mae_vit_small_patch16,
        mae_vit_so400m_patch14,
        mae_vit_tiny_patch4,
        mae_vit_tiny_patch16,
    )
    from fastmae.model.wrap import wrap
    from fastmae.train.given import StepInfo

    __version__: str

__all__ = [
    "MLPMAE",
    "ConvMAE",
    "ConvNeXtMAE",
    "MAELoss",
    "MaskedAutoencoderViT",
    "Preprocessing",
    "Run",
    "Source",
    "StepInfo",
    "UserError",
    "__version__",
    "accelerate",
    "as_source",
    "extract_features",
    "feature_map",
    "finetune",
    "ids_from_mask",
    "impute",
    "inpaint",
    "load_model",
    "mae_vit_base_patch8",
    "mae_vit_base_patch16",
    "mae_vit_base_patch16_dec512d8b",
    "mae_vit_giant_patch14",
    "mae_vit_huge_patch14",
    "mae_vit_huge_patch14_dec512d8b",
    "mae_vit_large_patch16",
    "mae_vit_large_patch16_dec512d8b",
    "mae_vit_small_patch8",
    "mae_vit_small_patch16",
    "mae_vit_so400m_patch14",
    "mae_vit_tiny_patch4",
    "mae_vit_tiny_patch16",
    "ops",
    "pretrain",
    "probe",
    "segment",
    "tune",
    "upscale",
    "wrap",
]

_HOME = {
    "ConvMAE": "fastmae.model.conv",
    "ConvNeXtMAE": "fastmae.model.convnext",
    "MAELoss": "fastmae.model.loss",
    "MLPMAE": "fastmae.model.mlp",
    "MaskedAutoencoderViT": "fastmae.model.mae",
    "Preprocessing": "fastmae.data.preprocess",
    "Run": "fastmae.api",
    "Source": "fastmae.data.sources",
    "StepInfo": "fastmae.train.given",
    "UserError": "fastmae.errors",
    "as_source": "fastmae.data.objects",
    "accelerate": "fastmae.model.accelerate",
    "extract_features": "fastmae.api",
    "feature_map": "fastmae.api",
    "finetune": "fastmae.api",
    "ids_from_mask": "fastmae.model.masks",
    "impute": "fastmae.api",
    "inpaint": "fastmae.api",
    "load_model": "fastmae.checkpoint.load",
    "pretrain": "fastmae.api",
    "probe": "fastmae.api",
    "segment": "fastmae.api",
    "upscale": "fastmae.api",
    "tune": "fastmae.api",
    "wrap": "fastmae.model.wrap",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'fastmae' has no attribute {name!r}")
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("fastmae")
    elif name == "ops":
        value = import_module("fastmae.ops")
    else:
        value = getattr(import_module(_HOME.get(name, "fastmae.model.presets")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
