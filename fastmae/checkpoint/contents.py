"""What a file of tensors holds, told by its names and shapes: which kind of model, what is left out, what it is not.

``understand`` takes whatever ``torch.load`` or safetensors gave, wrapped as trainers wrap it, and accounts for every
tensor: it is used under its official name, or counted among what is left out, or it makes the file one that cannot be
meant. This module opens no file and builds no model.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from fastmae.checkpoint.convnext_names import convnext_prefix, to_own_names
from fastmae.checkpoint.huggingface import from_huggingface
from fastmae.config.family import family_of

Kind = Literal["autoencoder", "encoder", "classifier"]

SHOWN_KEYS = 8
_DEEPEST = 6

_IN_A_BLOCK = r"(?:norm1|norm2|norm_kv|attn\.(?:qkv|q|kv|proj)|mlp\.fc[12])\.(?:weight|bias)"
_ENCODER = re.compile(
    rf"cls_token|reg_token|pos_embed|patch_embed\.proj\.(?:weight|bias)|(?:norm|fc_norm)\.(?:weight|bias)|blocks\.\d+\.{_IN_A_BLOCK}"
)
_DECODER = re.compile(
    r"mask_token|decoder_pos_embed|decoder_map_weights|decoder_(?:embed|norm|pred)\.(?:weight|bias)"
    rf"|decoder_blocks\.\d+\.{_IN_A_BLOCK}"
)
# Beside an encoder, for another purpose than features: they are left out, and counted.
_FOR_OTHERS = re.compile(r"(?:head|head_drop|pre_logits|fc|classifier|pooler|masked_embed|mask_token)(?:\..+)?")
# What wrappers of torch put into the names of what they wrap.
_WRAPPERS = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# One of these marks the place of an encoder: the first is official and timm's, the second is transformers'.
_PROJECTIONS = ("patch_embed.proj.weight", "embeddings.patch_embeddings.projection.weight")
# Of two encoders in one file, by the words in their prefixes: the one that such trainers evaluate, and the other one.
_TAKEN = re.compile(r"\b(teacher|target_encoder)\b")
_COPIED = re.compile(r"\b(student|momentum_encoder|\w*ema\w*)\b")

# LayerScale: of DINOv2 and timm, and as CaiT and BEiT call it.
_SCALE = re.compile(r"(blocks\.\d+\.)(ls[12]\.gamma|gamma_[12])")

# What a name tells about a part of a vision transformer that a masked autoencoder does not have.
_FOREIGN_PARTS = {
    r"\bls\d\.|\bgamma_\d": "layer scale of other widths",
    r"rel(ative)?_pos": "relative positions",
    r"dist_token": "distillation token",
    r"[qk]_norm": "normalised queries and keys",
    r"mlp\.w\d|mlp\.fc1_[gx]|mlp\.(?:gate|up|down)_proj|mlp\.weights_": "gated MLPs (SwiGLU)",
    r"rope|inv_freq|periods": "rotary positions",
    r"local_cls_norm|norm_pre|pre_layrnorm|pre_layernorm": "norm before the first block",
    r"storage_tokens": "storage tokens (DINOv3)",
    r"lora_|\.adapter": "adapters, which must be merged first",
    r"parametrizations": "parametrised weights, which must be merged first",
}


class NotMeantError(Exception):
    """The file cannot be meant as a masked autoencoder or its encoder; the message says what it is instead."""


@dataclass(frozen=True)
class Contents:
    """The tensors of a masked autoencoder, of its encoder, or of a classifier, under their official names."""

    kind: Kind
    weights: dict[str, torch.Tensor]
    """What the model is made of. Names that no model has are among them, so that loading refuses them."""
    head: dict[str, torch.Tensor]
    """``head.weight`` [classes, D] and ``head.bias`` of a classifier."""
    optimizer: dict[str, Any] | None
    epoch: int | None
    args: dict[str, Any]
    """The settings of the training, as far as the file says them."""
    is_huggingface: bool
    """Whether the names are those of transformers, so that a config.json may lie beside the file."""
    notes: tuple[str, ...]
    """What was left out or converted, each in a line with a number."""


def understand(content: Any, args: Mapping[str, Any] | None = None) -> Contents:
    """Finds the encoder in what a file holds, and accounts for everything else.

    Containers such as ``{"state_dict": …}`` and prefixes such as ``module.`` are the same to it: all tensors get one
    dotted name, and the encoder is where the projection of the patches is, or the stem of a ConvNeXt. A file of ours
    that names a preset of another family has its own names.

    Args:
        content: the tensors, in containers or not.
        args: the settings that come with them, if they are not in ``content``.

    Raises:
        NotMeantError: no encoder is in it, or several that nothing tells apart.
    """
    container = content if isinstance(content, Mapping) else {}
    args = _args(container) if args is None else args
    tensors = _flat(content)
    if (convnext := convnext_prefix(tensors)) is not None:
        return _of_convnext(tensors, convnext, container, args)
    if family_of(args.get("model")) in ("conv", "mlp"):
        named = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        return Contents("autoencoder", named, {}, *_training(container), dict(args), False, ())
    prefix, is_huggingface, notes = _find_encoder(tensors, content)
    inside = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    beside = _beside(tensors, prefix, is_huggingface)
    if is_huggingface:
        named = {f"vit.{name}": tensor for name, tensor in inside.items()}
        named |= {name: t for name, t in beside.items() if name.startswith(("decoder.", "classifier."))}
        inside, unused = from_huggingface(named)
        taken = {name for name in beside if name in named and name not in unused}
        # transformers' heads are of the class token; the official name makes them the head of such a classifier.
        inside = {re.sub(r"^classifier\.", "head.", name): tensor for name, tensor in inside.items()}
    else:
        unused = []
        official = {_DECODER_NAME.sub("", name): (name, tensor) for name, tensor in beside.items()}
        found = {name: pair for name, pair in official.items() if _DECODER.fullmatch(name) and name not in inside}
        taken = {name for name, _ in found.values()} if "decoder_pred.weight" in found else set()
        inside |= {name: tensor for name, (full, tensor) in found.items() if full in taken}
    if "register_tokens" in inside:  # as DINOv2 calls them
        inside["reg_token"] = inside.pop("register_tokens")
    inside, packed = _with_packed_biases(inside)
    inside, folded = _with_scales_folded(inside)
    weights, head, left = _sorted_out(inside)
    others = [name for name in beside if name not in taken]
    outside = [name for name in tensors if not name.startswith(prefix) and _below(name, prefix, is_huggingface) is None]
    for names, why in (
        (sorted([*left, *unused]), "not used, as no masked autoencoder has them"),
        (sorted([*others, *outside]), "beside the encoder, not used"),
    ):
        if names:
            notes.append(f"{len(names)} tensors {why}: {listed(names, 3)}")
    return Contents(
        kind="autoencoder" if "decoder_pred.weight" in weights else "classifier" if head else "encoder",
        weights=weights,
        head=head,
        optimizer=_training(container)[0],
        epoch=_training(container)[1],
        args=dict(args),
        is_huggingface=is_huggingface,
        notes=(*notes, *packed, *folded),
    )


def _of_convnext(
    tensors: dict[str, torch.Tensor], prefix: str, container: Mapping[Any, Any], args: Mapping[str, Any]
) -> Contents:
    """Accounts for the tensors of a file with a ConvNeXt V2.

    Raises:
        NotMeantError: it is a ConvNeXt without GRN.
    """
    weights, unused = to_own_names(tensors, prefix)
    if "stages.0.blocks.0.mlp.grn.weight" not in weights:
        raise NotMeantError("is a ConvNeXt without GRN, and a masked autoencoder of this family has ConvNeXt V2")
    head: dict[str, torch.Tensor] = {n: weights.pop(n) for n in ("head.weight", "head.bias") if n in weights}
    has_decoder = "decoder_pred.weight" in weights
    if not has_decoder:  # such as a lone mask token
        unused += [name for name in weights if name.startswith(("decoder_", "mask_token"))]
        weights = {name: t for name, t in weights.items() if not name.startswith(("decoder_", "mask_token"))}
    head = {} if has_decoder or len(head) < 2 else head
    count = f"{len(unused)} tensors not used, as no ConvNeXt V2 has them: {listed(sorted(unused), 3)}"
    return Contents(
        "autoencoder" if has_decoder else "classifier" if head else "encoder",
        weights,
        head,
        *_training(container),
        dict(args),
        any("embeddings.patch_embeddings" in name for name in tensors),
        (count,) if unused else (),
    )


def _training(container: Mapping[Any, Any]) -> tuple[dict[str, Any] | None, int | None]:
    """Returns the state of the optimiser and the epoch that are in a training file."""
    optimizer, epoch = container.get("optimizer"), container.get("epoch")
    return optimizer if isinstance(optimizer, dict) else None, epoch if isinstance(epoch, int) else None


def described(weights: Mapping[str, torch.Tensor], head: Mapping[str, torch.Tensor]) -> str:
    """Says what a model is: ``a ViT encoder, 12 blocks of 768, without decoder``."""
    size, architecture = _size_of(weights)
    if "decoder_pred.weight" in weights:
        return f"a masked autoencoder, {size}"
    if head:
        return f"a fine-tuned classifier with {head['head.weight'].shape[0]} classes, {size}, without decoder"
    return f"a {architecture} encoder, {size}, without decoder"


def _size_of(weights: Mapping[str, torch.Tensor]) -> tuple[str, str]:
    """Returns the blocks of an encoder and their width in words, and its architecture."""
    convolved = [t.shape[0] for name, t in weights.items() if re.fullmatch(r"stages\..*\.conv_dw\.weight", name)]
    if convolved:
        return f"{len(convolved)} blocks of {min(convolved)} to {max(convolved)}", "ConvNeXt V2"
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    projection = weights.get("patch_embed.proj.weight")
    return f"{depth} blocks of {0 if projection is None else projection.shape[0]}", "ViT"


def foreign_parts(names: Iterable[str]) -> str:
    """Says which parts that no masked autoencoder has the names of unknown tensors tell of; empty if none is known."""
    joined = " ".join(names)
    return ", ".join(part for pattern, part in _FOREIGN_PARTS.items() if re.search(pattern, joined))


def listed(names: list[str], shown: int = SHOWN_KEYS) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


# --- finding the encoder ----------------------------------------------------------------------------------------------

_DECODER_NAME = re.compile(r"^decoder\.(?=decoder_|mask_token)")


def _flat(content: Any) -> dict[str, torch.Tensor]:
    """Returns all tensors under dotted names without the names of wrappers; optimisers are left out."""

    def walk(value: Any, name: str, depth: int) -> Iterator[tuple[str, torch.Tensor]]:
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, Mapping) and depth < _DEEPEST and "param_groups" not in value:
            for key, inner in value.items():
                yield from walk(inner, f"{name}.{key}" if name else str(key), depth + 1)

    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in walk(content, "", 0):
        plain = _WRAPPERS.sub("", name)
        if plain in tensors:
            raise NotMeantError(f"holds {plain} twice, wrapped and not; save one of them")
        tensors[plain] = tensor
    return tensors


def _find_encoder(tensors: dict[str, torch.Tensor], content: Any) -> tuple[str, bool, list[str]]:
    """Returns the prefix of the encoder's names, whether they are transformers', and what is to be said of the choice.

    Raises:
        NotMeantError: there is none, or there are several.
    """
    places = {
        name.removesuffix(projection): projection == _PROJECTIONS[1]
        for name in tensors
        for projection in _PROJECTIONS
        if name == projection or name.endswith(f".{projection}")
    }
    if not places or any(name.startswith("optimizer.exp_avg.") for name in tensors):
        raise NotMeantError(_what_it_is(tensors, content))

    def rank(prefix: str) -> int:
        return 0 if _TAKEN.search(prefix) else 2 if _COPIED.search(prefix) else 1

    ranked = sorted(places, key=lambda prefix: (rank(prefix), len(prefix)))
    best, *others = ranked
    names = [prefix.rstrip(".") or "the outermost" for prefix in ranked]
    if others and rank(others[0]) == rank(best):
        raise NotMeantError(
            f"holds {len(ranked)} encoders ({', '.join(names)}), and nothing tells which is meant; save one of them"
        )
    notes = [f"holds {len(ranked)} encoders; that of {names[0]} is taken"] if others else []
    return best, places[best], notes


def _beside(tensors: dict[str, torch.Tensor], prefix: str, is_huggingface: bool) -> dict[str, torch.Tensor]:
    """Returns the tensors that stand beside the encoder in the same model, by their names there.

    Such as ``module.decoder_pred.weight`` beside ``module.encoder.cls_token``, or transformers' ``decoder.…`` beside
    ``vit.…``.
    """
    named = ((_below(name, prefix, is_huggingface), tensor) for name, tensor in tensors.items())
    return {name: tensor for name, tensor in named if name is not None}


def _below(name: str, prefix: str, is_huggingface: bool) -> str | None:
    """Returns a tensor's name inside the model whose encoder has the prefix; None in that encoder and in others."""
    if not prefix or name.startswith(prefix):
        return None
    *outer, last = prefix.rstrip(".").split(".")
    parent = "".join(f"{part}." for part in outer)
    is_wrapper = last in _CONTAINERS and not is_huggingface
    return name.removeprefix(parent) if name.startswith(parent) and not is_wrapper else None


# Around a model, not a part of one: what stands beside them is no decoder of theirs.
_CONTAINERS = (
    "model", "module", "state_dict", "model_state", "model_state_dict", "teacher", "student", "ema", "model_ema",
    "state_dict_ema", "net", "network", "weights", "params",
)  # fmt: skip


# --- naming what is no encoder ----------------------------------------------------------------------------------------


def _what_it_is(tensors: dict[str, torch.Tensor], content: Any) -> str:
    """Says what a file is that holds no encoder of a ViT."""
    container = content if isinstance(content, Mapping) else {}
    named = " ".join(tensors)
    why = "it is not a checkpoint of a masked autoencoder"
    if any(name.startswith("optimizer.exp_avg.") for name in tensors):
        return f"is one rank's part of a checkpoint; give the folder that it lies in ({why})"
    if {"state", "param_groups"} <= container.keys():
        return f"is the state of an optimiser; give the file with the model ({why})"
    if not tensors:
        held = f"; it holds {listed([str(key) for key in container])}" if container else ""
        return f"holds no model{held}; give a file with the keys of the published checkpoints"
    families = {
        r"conv_proj\.|encoder_layer_0": "a ViT of torchvision",
        r"visual\.conv1|visual\.transformer": "a CLIP",
        r"(^| )(\w+\.)*layer1\.0\.conv1": "a ResNet",
        r"relative_position_bias_table": "a Swin transformer",
        r"stages\.0\.": "a ConvNeXt",
        r"(^| )(\w+\.)*decoder_pred\.": "a decoder without its encoder",
    }
    family = next((f"is {kind}: " for pattern, kind in families.items() if re.search(pattern, named)), "")
    if "pytorch-lightning_version" in container:
        family = family or "is a Lightning checkpoint of another model: "
    if isinstance(content, torch.Tensor):
        return f"is a single tensor; {why}"
    count = f"{len(tensors)} tensors such as {', '.join(list(tensors)[:3])}"
    return f"{family}has no patch_embed.proj.weight among {count}; {why}"


def _args(container: Mapping[str, Any]) -> dict[str, Any]:
    args = container.get("args")
    return args if isinstance(args, dict) else vars(args) if isinstance(args, argparse.Namespace) else {}


# --- names inside a model ---------------------------------------------------------------------------------------------


def _with_packed_biases(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Gives every ``attn.qkv`` its bias: of a ``q_bias`` and a ``v_bias`` (keys have none then), or zeros.

    Both are the same mathematics. Nothing is added if only some blocks lack a bias, which is damage.
    """
    packed = [name.removesuffix("weight") for name in tensors if re.fullmatch(r"blocks\.\d+\.attn\.qkv\.weight", name)]
    without = [prefix for prefix in packed if f"{prefix}bias" not in tensors]
    if not packed or len(without) < len(packed):
        return tensors, []
    result, split = dict(tensors), 0
    for prefix in without:
        width = tensors[f"{prefix}weight"].shape[0] // 3
        thirds = [prefix.replace("qkv.", f"{letter}_bias") for letter in "qv"]
        if all(name in tensors and tensors[name].shape == (width,) for name in thirds):
            q, v = (result.pop(name) for name in thirds)
            result[f"{prefix}bias"] = torch.cat([q, torch.zeros_like(v), v])
            split += 1
        elif not any(name in tensors for name in thirds):
            result[f"{prefix}bias"] = torch.zeros(3 * width)
    if split:
        return result, [f"biases of attn.qkv of {split} blocks are made of q_bias and v_bias, with zeros for the keys"]
    return result, [f"biases of attn.qkv are taken as zeros, as none of {len(packed)} blocks has one"]


def _with_scales_folded(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Multiplies LayerScale into the product that it follows, so that the encoder computes the same without it.

    LayerScale (Touvron et al. 2021, arXiv 2103.17239, section 2) multiplies each of the D numbers that a branch adds to
    the tokens; γ · (W·x + b) = (γW)·x + γb. What does not fit its product keeps its name, which loading then refuses.
    """
    result, folded = dict(tensors), 0
    for name, scale in tensors.items():
        found = _SCALE.fullmatch(name)
        if found is None:
            continue
        product = f"{found[1]}{'attn.proj' if '1' in found[2] else 'mlp.fc2'}"
        weight, bias = tensors.get(f"{product}.weight"), tensors.get(f"{product}.bias")
        if weight is None or weight.ndim != 2 or scale.shape != weight.shape[:1]:
            continue
        del result[name]
        result[f"{product}.weight"] = weight.float() * scale.float()[:, None]
        if bias is not None:
            result[f"{product}.bias"] = bias.float() * scale.float()
        folded += 1
    return result, [f"LayerScale of {folded} branches is multiplied into their last products"] if folded else []


def _sorted_out(
    tensors: dict[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], list[str]]:
    """Returns (weights, with those that nobody knows; the head; the names of what is left out)."""
    weight, bias = tensors.get("head.weight"), tensors.get("head.bias")
    width = tensors["cls_token"].shape[-1] if "cls_token" in tensors else None
    is_head = weight is not None and bias is not None and weight.ndim == 2 and bias.shape == weight.shape[:1]
    is_head = is_head and width in (None, weight.shape[1])  # type: ignore[union-attr]  # DINOv2's reads two vectors
    head = {"head.weight": weight, "head.bias": bias} if is_head else {}
    has_decoder = "decoder_pred.weight" in tensors
    left = []
    weights = {}
    for name, tensor in tensors.items():
        if name in head:
            if has_decoder:
                left.append(name)
        elif _ENCODER.fullmatch(name) or (has_decoder and _DECODER.fullmatch(name)):
            weights[name] = tensor
        elif not has_decoder and (_DECODER.fullmatch(name) or _FOR_OTHERS.fullmatch(name)):
            left.append(name)  # an incomplete decoder, or a head of another kind
        else:
            weights[name] = tensor
    return weights, {} if has_decoder else head, left  # type: ignore[return-value]
