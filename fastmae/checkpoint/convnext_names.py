"""The names that files give to the weights of a ConvNeXt V2: timm's, transformers', the published ones, and ours.

Ours are timm's for the encoder, with matrices in place of 1×1 convolutions; ``fc_norm`` and ``head`` are a classifier's
norm and last layer, as in a vision transformer. The published pretraining files (FCMAE) hold the kernels of a sparse
convolution, [positions, in, out] or [positions, channels], whose positions run down the columns.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

import torch

_IN_A_BLOCK = {"dwconv": "conv_dw", "layernorm": "norm", "pwconv1": "mlp.fc1", "grn": "mlp.grn", "pwconv2": "mlp.fc2"}
_LEAVES = {"gamma": "weight", "beta": "bias", "kernel": "weight"}
_BLOCK = r"(?P<part>dwconv|conv_dw|norm|layernorm|mlp\.fc1|pwconv1|mlp\.grn|grn|mlp\.fc2|pwconv2)"
_LEAF = r"(?P<leaf>weight|bias|gamma|beta|kernel)"
_PATTERNS = [
    (re.compile(rf"{pattern}\.{_LEAF}"), ours)
    for pattern, ours in (
        (
            rf"(?:encoder\.)?stages\.(?P<a>\d)\.(?:blocks\.|layers\.)?(?P<b>\d+)\.{_BLOCK}",
            "stages.{a}.blocks.{b}.{part}",
        ),
        (
            r"(?:encoder\.)?stages\.(?P<a>\d)\.(?:downsample|downsampling_layer)\.(?P<b>[01])",
            "stages.{a}.downsample.{b}",
        ),
        (r"(?:encoder\.)?downsample_layers\.0\.(?P<b>[01])", "stem.{b}"),
        (r"(?:encoder\.)?downsample_layers\.(?P<a>[123])\.(?P<b>[01])", "stages.{a}.downsample.{b}"),
        (r"stem\.(?P<b>[01])", "stem.{b}"),
        (r"embeddings\.patch_embeddings", "stem.0"),
        (r"embeddings\.layernorm", "stem.1"),
        (r"(?:head\.norm|norm|layernorm|fc_norm)", "fc_norm"),
        (r"(?:head\.fc|head|classifier)", "head"),
        (rf"(?:decoder|decoder_blocks)\.(?P<b>\d+)\.{_BLOCK}", "decoder_blocks.{b}.{part}"),
        (r"(?:proj|decoder_embed)", "decoder_embed"),
        (r"(?:pred|decoder_pred)", "decoder_pred"),
    )
]
_FOUND = re.compile(
    r"(?P<prefix>|.+?\.)(?:stem\.0|downsample_layers\.0\.0|embeddings\.patch_embeddings)\.weight"
)  # of the stem, which every ConvNeXt has
_FIRST_BLOCK = re.compile(r"stages\.0\.(?:blocks\.|layers\.)?0\.(?:conv_dw|dwconv)\.(?:weight|kernel)$")
_IN_TRANSFORMERS = {
    "stem.0": "embeddings.patch_embeddings",
    "stem.1": "embeddings.layernorm",
    "fc_norm": "layernorm",
    "head": "classifier",
}


def convnext_prefix(names: Iterable[str]) -> str | None:
    """Returns what the names of a ConvNeXt's weights begin with, such as ``convnextv2.``; None if there is none."""
    names = list(names)
    if not any(_FIRST_BLOCK.search(name) for name in names):
        return None
    found = next((match["prefix"] for name in names if (match := _FOUND.fullmatch(name))), None)
    return None if found is None else found.removesuffix("encoder.")


def to_own_names(tensors: Mapping[str, torch.Tensor], prefix: str) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Returns the weights of a ConvNeXt V2 under our names, and the names of the tensors that it has no use for.

    Args:
        tensors: everything that a file holds, under dotted names.
        prefix: of ``convnext_prefix``. What stands beside it, such as ``classifier``, counts as well.
    """
    weights, unused = {}, []
    for name, tensor in tensors.items():
        plain = re.sub(r"\.(?:ln|linear)(?=\.\w+$)", "", name.removeprefix(prefix))
        if plain == "mask_token":
            weights["mask_token"] = tensor.reshape(1, 1, -1)
        elif (own := _own_name(plain)) is not None:
            weights[own] = _as_ours(own, tensor, is_sparse=plain.endswith(".kernel"))
        else:
            unused.append(name)
    return weights, unused


def _own_name(name: str) -> str | None:
    for pattern, ours in _PATTERNS:
        if match := pattern.fullmatch(name):
            parts = match.groupdict()
            if "part" in parts:
                parts["part"] = _IN_A_BLOCK.get(parts["part"], parts["part"])
            return f"{ours.format(**parts)}.{_LEAVES.get(parts['leaf'], parts['leaf'])}"
    return None


def _as_ours(name: str, tensor: torch.Tensor, is_sparse: bool) -> torch.Tensor:
    """Returns a tensor in the shape that ours has: biases and GRN in one dimension, 1×1 convolutions as matrices."""
    if is_sparse:
        side = math.isqrt(tensor.shape[0])
        by_place = tensor.reshape(side, side, *tensor.shape[1:]).transpose(0, 1)  # [row, column, ...]
        if by_place.ndim == 3:
            return by_place.permute(2, 0, 1)[:, None].contiguous()
        return by_place.permute(3, 2, 0, 1).contiguous()
    if name.endswith(".bias") or ".grn." in name:
        return tensor.reshape(-1)
    is_matrix = name.endswith(
        ("fc1.weight", "fc2.weight", "decoder_embed.weight", "decoder_pred.weight", "head.weight")
    )
    return tensor.flatten(1) if is_matrix and tensor.shape[2:].numel() == 1 else tensor


def to_timm(weights: Mapping[str, torch.Tensor], as_convolutions: bool) -> dict[str, torch.Tensor]:
    """Returns the weights of an encoder, or of a classifier, under timm's names.

    ``as_convolutions``: the matrices of the MLPs are 1×1 convolutions, as in timm's four smallest models.
    """
    renamed = {}
    for name, tensor in weights.items():
        name = re.sub(r"^fc_norm\.", "head.norm.", re.sub(r"^head\.", "head.fc.", name))
        if as_convolutions and name.endswith(("mlp.fc1.weight", "mlp.fc2.weight")):
            tensor = tensor[:, :, None, None]
        renamed[name] = tensor.contiguous()
    return renamed


def to_transformers(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the weights of an encoder under the names of ``ConvNextV2Model``; of a classifier, with ``head``, under
    those of ``ConvNextV2ForImageClassification``."""
    renamed = {}
    theirs = {ours: part for part, ours in _IN_A_BLOCK.items()}
    before = "convnextv2." if "head.weight" in weights else ""
    for name, tensor in weights.items():
        module, _, leaf = name.rpartition(".")
        if module in _IN_TRANSFORMERS:
            module = _IN_TRANSFORMERS[module]
        elif match := re.fullmatch(r"stages\.(\d)\.downsample\.([01])", module):
            module = f"encoder.stages.{match[1]}.downsampling_layer.{match[2]}"
        elif match := re.fullmatch(r"stages\.(\d)\.blocks\.(\d+)\.(.+)", module):
            module = f"encoder.stages.{match[1]}.layers.{match[2]}.{theirs[match[3]]}"
        if ".grn" in module:
            tensor = tensor.reshape(1, 1, 1, -1)
        renamed[f"{'' if module == 'classifier' else before}{module}.{leaf}"] = tensor.contiguous()
    return renamed
