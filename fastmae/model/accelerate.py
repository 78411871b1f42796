"""accelerate: somebody else's masked autoencoder computes its training loss as ours does, in place.

``transformers.ViTMAEForPreTraining`` (versions 4 and 5) and models in the layout of the official one keep their class,
their parameters (the same objects), names, state dict, configuration and outputs; only ``model.forward`` is another.
It computes with a ``MaskedAutoencoderViT`` that has the model's own parameters: what is visible is gathered before it
is embedded, and the decoder keeps the shuffled order. Masks are drawn by the model's own ``random_masking``.

Whatever this cannot do exactly is left to the model's own code, and said once: hooks and adapters inside the model,
dropout while training, another activation, hidden states or attentions in the output, other sizes of images.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from fastmae.errors import UserError, in_one_line
from fastmae.messages import logger
from fastmae.model.calls import calls_of
from fastmae.model.mae import MaskedAutoencoderViT
from fastmae.model.vit import Block, Mlp, autocast_dtype, has_hooks
from fastmae.ops import tuning
from fastmae.ops.allocator import keep_freed_memory
from fastmae.ops.backends import asked_backends, set_backends
from fastmae.ops.linear import Linear
from fastmae.torch_compat import is_exporting

TOLERANCE = 1e-3
"""Relative, of losses and predictions on random images: more than rounding, with TF32 too, and less than a mistake."""
CHECKED_IMAGES = 2
# Arguments that have no effect on what is computed.
WITHOUT_EFFECT = ("num_items_in_batch",)


class OtherModelError(Exception):
    """A model has something that is not computed here; the message names it."""


# --- what a model consists of -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockParts:
    """The layers of a block."""

    norm1: nn.LayerNorm
    qkv: tuple[nn.Linear, ...]
    """One layer, or those of queries, keys and values."""
    proj: nn.Linear
    norm2: nn.LayerNorm
    fc1: nn.Linear
    fc2: nn.Linear
    heads: int


@dataclass(frozen=True)
class Parts:
    """The layers and parameters of a masked autoencoder, whatever it calls them."""

    img_size: tuple[int, int]
    patch_embed: nn.Conv2d
    cls_token: nn.Parameter
    pos_embed: nn.Parameter
    blocks: tuple[BlockParts, ...]
    norm: nn.LayerNorm
    decoder_embed: nn.Linear
    mask_token: nn.Parameter
    decoder_pos_embed: nn.Parameter
    decoder_blocks: tuple[BlockParts, ...]
    decoder_norm: nn.LayerNorm
    decoder_pred: nn.Linear


def part_of(model: nn.Module, path: str, kind: type | None = None) -> Any:
    """Returns what a model has at a dotted path, of a ``kind`` if one is given.

    Raises:
        OtherModelError: it has nothing there, or something else.
    """
    found: Any = model
    for name in path.split("."):
        found = found[int(name)] if name.isdigit() else getattr(found, name, None)
        if found is None:
            raise OtherModelError(f"{type(model).__name__} has no {path}")
    # A LayerNorm may have a name of its own, but a linear layer of another type computes something else.
    is_kind = isinstance(found, kind or object) if kind is not nn.Linear else type(found) in (nn.Linear, Linear)
    if not is_kind:
        raise OtherModelError(f"{path} is a {type(found).__name__}, not a {kind and kind.__name__}")
    return found


BLOCK = {
    "norm1": "norm1",
    "qkv": ("attn.qkv",),
    "proj": "attn.proj",
    "norm2": "norm2",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}
# Of transformers, versions 5 and 4.
BLOCK_5 = {
    "norm1": "layernorm_before",
    "qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    "proj": "attention.o_proj",
    "norm2": "layernorm_after",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}
BLOCK_4 = BLOCK_5 | {
    "qkv": ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    "proj": "attention.output.dense",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
}


def block_parts(model: nn.Module, path: str, names: dict[str, Any], heads: int) -> BlockParts:
    """Returns the layers of the block at a dotted path, by their names in it."""
    norms = {name: part_of(model, f"{path}.{names[name]}", nn.LayerNorm) for name in ("norm1", "norm2")}
    linear = {name: part_of(model, f"{path}.{names[name]}", nn.Linear) for name in ("proj", "fc1", "fc2")}
    qkv = tuple(part_of(model, f"{path}.{name}", nn.Linear) for name in names["qkv"])
    if sum(layer.out_features for layer in qkv) != 3 * linear["proj"].out_features:
        raise OtherModelError(f"the heads of {path} are not as wide together as its tokens")
    if len({layer.bias is None for layer in qkv}) > 1:
        raise OtherModelError(f"only some of queries, keys and values of {path} have a bias")
    return BlockParts(qkv=qkv, heads=heads, **norms, **linear)


def official_parts(model: nn.Module) -> Parts:
    """Finds the parts of a model in the official layout."""
    part_of(model, "random_masking")
    proj = part_of(model, "patch_embed.proj", nn.Conv2d)
    stacks: dict[str, Any] = {}
    for stack in ("blocks", "decoder_blocks"):
        stacks[stack] = tuple(
            timm_block_parts(model, f"{stack}.{number}") for number in range(len(part_of(model, stack)))
        )
    return Parts(
        img_size=_size_in_pixels(model, proj),
        patch_embed=proj,
        **{name: part_of(model, name, nn.Parameter) for name in ("cls_token", "pos_embed", "mask_token")},
        decoder_pos_embed=part_of(model, "decoder_pos_embed", nn.Parameter),
        **{name: part_of(model, name, nn.LayerNorm) for name in ("norm", "decoder_norm")},
        **{name: part_of(model, name, nn.Linear) for name in ("decoder_embed", "decoder_pred")},
        **stacks,
    )


def timm_block_parts(model: nn.Module, path: str) -> BlockParts:
    """Returns the layers of a block in timm's layout, which is also the official one.

    Raises:
        OtherModelError: it has other layers, or another activation. Near ones, such as GELU by tanh, differ so little
            that a comparison of tokens could miss them.
    """
    block, attention = part_of(model, path), part_of(model, f"{path}.attn")
    heads = getattr(attention, "num_heads", getattr(block, "num_heads", None))
    if not isinstance(heads, int):
        raise OtherModelError(f"{path}.attn does not say its num_heads")
    parts = block_parts(model, path, BLOCK, heads)
    for name, layer in block.mlp.named_children():
        kind = type(layer).__name__
        is_gelu = kind == "GELU" and getattr(layer, "approximate", "none") == "none"
        if layer not in (parts.fc1, parts.fc2) and not (is_gelu or isinstance(layer, nn.Identity) or "Drop" in kind):
            raise OtherModelError(f"{path}.mlp.{name} is a {layer}, not an exact GELU".replace("\n", " "))
    return parts


def _size_in_pixels(model: Any, proj: Any) -> tuple[int, int]:
    """Returns the (height, width) of images, as the patch embedding says it, or else those of a square of patches."""
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if isinstance(size, int):
        return size, size
    if size is not None:
        return int(size[0]), int(size[1])
    side = round((model.pos_embed.shape[1] - 1) ** 0.5)
    return side * proj.kernel_size[0], side * proj.kernel_size[1]


def vitmae_parts(model: Any) -> Parts:
    """Finds the parts of a ``ViTMAEForPreTraining`` of transformers."""
    config = model.config
    if config.hidden_act != "gelu":
        raise OtherModelError(f"the activation is {config.hidden_act}, not gelu")
    size = config.image_size
    is_version_5 = hasattr(model.vit, "layers")
    encoder, names = ("vit.layers", BLOCK_5) if is_version_5 else ("vit.encoder.layer", BLOCK_4)
    stacks: dict[str, Any] = {}
    for path, name, heads in (
        (encoder, "blocks", config.num_attention_heads),
        ("decoder.decoder_layers", "decoder_blocks", config.decoder_num_attention_heads),
    ):
        stack = part_of(model, path)
        stacks[name] = tuple(block_parts(model, f"{path}.{number}", names, heads) for number in range(len(stack)))
    return Parts(
        img_size=(size, size) if isinstance(size, int) else tuple(size),
        patch_embed=part_of(model, "vit.embeddings.patch_embeddings.projection", nn.Conv2d),
        cls_token=part_of(model, "vit.embeddings.cls_token", nn.Parameter),
        pos_embed=part_of(model, "vit.embeddings.position_embeddings", nn.Parameter),
        norm=part_of(model, "vit.layernorm", nn.LayerNorm),
        decoder_embed=part_of(model, "decoder.decoder_embed", nn.Linear),
        mask_token=part_of(model, "decoder.mask_token", nn.Parameter),
        decoder_pos_embed=part_of(model, "decoder.decoder_pos_embed", nn.Parameter),
        decoder_norm=part_of(model, "decoder.decoder_norm", nn.LayerNorm),
        decoder_pred=part_of(model, "decoder.decoder_pred", nn.Linear),
        **stacks,
    )


# --- a model of ours with its parameters ------------------------------------------------------------------------------


class _Shadow:
    """A ``MaskedAutoencoderViT`` that has the parameters of another model, which it does not own."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        proj, blocks = parts.patch_embed, (*parts.blocks, *parts.decoder_blocks)
        if proj.stride != proj.kernel_size or proj.padding != (0, 0) or proj.groups != 1 or proj.dilation != (1, 1):
            raise OtherModelError("patches overlap")
        if not parts.blocks or not parts.decoder_blocks:
            raise OtherModelError("it has no blocks")
        with torch.device("meta"):  # nothing is drawn or allocated
            self.model = MaskedAutoencoderViT(
                img_size=parts.img_size,
                patch_size=proj.kernel_size,  # type: ignore[arg-type]
                in_chans=proj.in_channels,
                embed_dim=parts.cls_token.shape[2],
                depth=0,
                num_heads=parts.blocks[0].heads,
                decoder_embed_dim=parts.mask_token.shape[2],
                decoder_depth=1,
                decoder_num_heads=parts.decoder_blocks[0].heads,
            )
        model = self.model
        share(model.patch_embed.proj, proj)
        for name in ("cls_token", "pos_embed", "mask_token", "decoder_pos_embed"):
            ours, theirs = getattr(model, name), getattr(parts, name)
            if ours.shape != theirs.shape:
                raise OtherModelError(f"{name} has the shape {list(theirs.shape)}, not {list(ours.shape)}")
            setattr(model, name, theirs)
        model.blocks = nn.ModuleList(shared_block(block, "on a CPU") for block in parts.blocks)
        model.decoder_blocks = nn.ModuleList(shared_block(block, "in one pass") for block in parts.decoder_blocks)
        model.norm, model.decoder_norm = shared_norm(parts.norm), shared_norm(parts.decoder_norm)
        model.decoder_embed = shared_linear(parts.decoder_embed)
        model.decoder_pred = shared_linear(parts.decoder_pred)
        model._has_checked_images = True  # the other model takes whatever numbers images have, without a word
        self._thirds = [
            (ours.attn.qkv, theirs.qkv)
            for ours, theirs in zip((*model.blocks, *model.decoder_blocks), blocks, strict=True)
            if len(theirs.qkv) > 1
        ]
        self.parameters = {id(parameter) for parameter in model.parameters()}
        self.parameters |= {id(p) for _, layers in self._thirds for layer in layers for p in layer.parameters()}

    @contextmanager
    def packed(self, keep: bool) -> Iterator[None]:
        """Packs the weights of queries, keys and values, which costs a copy of them a step, and saves two products.

        They may be needed again in the backward pass, so that they are left there if ``keep``.
        """
        for qkv, layers in self._thirds:
            qkv.weight = torch.cat([layer.weight for layer in layers])
            qkv.bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
        try:
            yield
        finally:
            for qkv, _ in self._thirds if not keep else ():
                qkv.weight = qkv.bias = None

    def move_to(self, device: torch.device) -> None:
        """Takes what normalises images, which are normalised already, to the device of the parameters."""
        if self.model._zeros.device != device:
            zeros = torch.zeros(self.model.in_chans, device=device)
            self.model.mean = self.model._zeros = zeros
            self.model.std = self.model._ones = torch.ones_like(zeros)


def share(ours: nn.Module, theirs: nn.Module) -> None:
    """Gives one module the weight and the bias of another."""
    ours.weight, ours.bias = theirs.weight, theirs.bias


def shared_linear(theirs: nn.Linear) -> Linear:
    """Returns a linear layer of ours with another's parameters."""
    ours = Linear(theirs.in_features, theirs.out_features, bias=theirs.bias is not None, device="meta")
    share(ours, theirs)
    return ours


def shared_norm(theirs: nn.LayerNorm) -> nn.LayerNorm:
    """Returns a LayerNorm with another's parameters."""
    ours = nn.LayerNorm(theirs.normalized_shape, eps=theirs.eps, elementwise_affine=False)
    share(ours, theirs)
    return ours


def shared_block(theirs: BlockParts, gelu_again: Any) -> Block:
    """Returns a block of ours with another's parameters; without those of queries, keys and values if it has three."""
    with torch.device("meta"):
        ours = Block(theirs.proj.out_features, theirs.heads, 1.0, nn.LayerNorm)
        ours.mlp = Mlp(theirs.fc1.in_features, theirs.fc1.out_features)
    ours.norm1, ours.norm2 = shared_norm(theirs.norm1), shared_norm(theirs.norm2)
    ours.attn.proj = shared_linear(theirs.proj)
    ours.mlp.fc1, ours.mlp.fc2 = shared_linear(theirs.fc1), shared_linear(theirs.fc2)
    ours.mlp.gelu_again = gelu_again
    if len(theirs.qkv) == 1:
        ours.attn.qkv = shared_linear(theirs.qkv[0])
    else:
        del ours.attn.qkv.weight, ours.attn.qkv.bias  # plain tensors take their place
        ours.attn.qkv.weight = ours.attn.qkv.bias = None  # type: ignore[assignment]
    return ours


# --- the forward pass -------------------------------------------------------------------------------------------------


def accelerate(model: nn.Module, *, tune: bool = False, predictions: bool = True) -> nn.Module:
    """Makes the training of somebody else's masked autoencoder faster, in place, with the same results up to rounding.

    Parameters (the same objects), names, state dict, configuration, masks for a seed, losses and outputs stay as they
    are, and so do ``save_pretrained``, ``train`` and ``eval``. Only ``model.forward`` is replaced, and ``del
    model.forward`` undoes it. Call it before Accelerate or PEFT gets the model; for an optimiser, DDP and a Trainer it
    does not matter. ``nn.DataParallel`` cannot copy such a model: several GPUs need a process each (torchrun).

    The model's own code computes what this cannot do exactly, and that is said once: hooks inside the model, layers
    that were replaced (LoRA) or sharded (FSDP), dropout while training, another activation than GELU, attentions,
    hidden states, ``interpolate_pos_encoding``, trained positions, gradients to images, weights in half precision.

    Args:
        model: a ``transformers.ViTMAEForPreTraining``, or a model with the names and shapes of the official
            ``MaskedAutoencoderViT``, its ``random_masking`` and its ``forward(imgs, mask_ratio)``. Its loss and its
            predictions for two random images are compared with what will be computed instead.
        tune: on a CPU, measure at the first training step which implementations are fastest here for such a batch,
            as ``fastmae.tune`` does, and use them in this process from then on; and let the process keep the memory
            that a step frees for the next one, as a run does.
        predictions: whether the predictions of training steps (``logits``, or ``pred``) are asked for. Without them,
            the end of the decoder runs on masked patches alone, and training steps return None in their place;
            evaluation returns them in any case.

    Returns:
        The model itself.

    Raises:
        UserError: it is another model, or (not one of transformers) it computes something else.
    """
    is_vitmae = any(kind.__name__ == "ViTMAEForPreTraining" for kind in type(model).__mro__)
    if isinstance(model, MaskedAutoencoderViT):
        raise UserError("accelerate: the model is fastmae's own; fastmae.MAELoss(model) is its fast training step")
    own = vars(model).get("forward")
    if own is not None and not (isinstance(own, partial) and own.func is _forward):
        raise UserError("accelerate: somebody has replaced model.forward; call accelerate before that")
    state = _State(is_vitmae, tune, predictions)
    try:
        state.shadow_of(model)
    except OtherModelError as why:
        if not is_vitmae:
            wanted = "a transformers.ViTMAEForPreTraining or a model in the layout of the official MaskedAutoencoderViT"
            raise UserError(f"accelerate: {why}; it takes {wanted}") from why
        state.leave(str(why))
    forward = partial(_forward, model, state)
    forward.__signature__ = inspect.signature(partial(type(model).forward, model))  # type: ignore[attr-defined]
    model.forward = forward
    return model


class _State:
    """What ``accelerate`` keeps for a model. A copy of the model begins with nothing but the settings."""

    def __init__(self, is_vitmae: bool, tune: bool, predictions: bool) -> None:
        self.is_vitmae, self.tune, self.predictions = is_vitmae, tune, predictions
        self._shadow: _Shadow | None = None
        self._seen: tuple[int, ...] = ()
        self._alive: list[nn.Module] = []
        self._problem: str | None = None
        self._said: set[str] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        return _State, (self.is_vitmae, self.tune, self.predictions)

    def leave(self, why: str) -> None:
        """Says once that the model's own code computes."""
        if why not in self._said:
            self._said.add(why)
            logger.warning("accelerate: the model's own code computes this (%s)", why)

    def shadow_of(self, model: nn.Module) -> _Shadow:
        """Returns the model of ours with the parameters that a model has now. It was compared when it was made.

        Raises:
            OtherModelError: it has something that is not computed here.
        """
        if model.training and getattr(getattr(model, "config", None), "attention_probs_dropout_prob", 0) > 0:
            raise OtherModelError("dropout of attention")
        seen: list[int] = []
        modules = list(model.modules())
        for module in modules:
            if module is not model and (_hooks_matter(module) or _has_another_forward(module)):
                raise OtherModelError(f"hooks on {_name_of(module, model)}, or another forward")
            if module.training and drops(module):
                raise OtherModelError(f"dropout in {_name_of(module, model) or 'the model'}")
            seen.append(id(module))
            seen += map(id, module._parameters.values())
        if self._shadow is None or self._seen != tuple(seen):
            self._shadow, self._seen = None, ()
            shadow = _Shadow(vitmae_parts(model) if self.is_vitmae else official_parts(model))
            for name, parameter in model.named_parameters():
                if id(parameter) not in shadow.parameters:
                    raise OtherModelError(f"{name} is a parameter that a masked autoencoder does not have")
                if type(parameter) is not nn.Parameter or parameter.is_meta:
                    raise OtherModelError(f"{name} is sharded, or not on a device")
            # They stay alive, so that no other object gets the id of one.
            self._shadow, self._seen, self._alive, self._problem = shadow, tuple(seen), modules, None
            self._problem = _difference(model, self)
        if self._problem is not None:
            raise OtherModelError(self._problem)
        return self._shadow


def _hooks_matter(module: nn.Module) -> bool:
    """Whether somebody has put hooks on a module. Those that transformers leaves there to collect outputs are idle."""
    hooks = module._forward_hooks.values()
    if not hooks or not all(str(getattr(hook, "__module__", "")).startswith("transformers.utils.") for hook in hooks):
        return has_hooks(module)
    return bool(module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def _has_another_forward(module: nn.Module) -> bool:
    """Whether somebody has replaced a module's forward. transformers 4 collects outputs so, and puts its own back."""
    found = vars(module).get("forward")
    return found is not None and getattr(found, "__func__", None) is not type(module).forward


def drops(module: nn.Module) -> bool:
    """Whether a module leaves out something at random while it trains: dropout, or stochastic depth."""
    shares = [vars(module).get(name) for name in ("p", "drop_prob", "prob")]  # of torch, of timm's paths and patches
    return "Drop" in type(module).__name__ and any(isinstance(share, int | float) and share > 0 for share in shares)


def _name_of(module: nn.Module, model: nn.Module) -> str:
    return next(name for name, found in model.named_modules() if found is module)


@dataclass(frozen=True)
class _Call:
    """What a call of the model asks for."""

    images: torch.Tensor
    masking: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    mask_ratio: float
    norm_pix_loss: bool
    in_a_tuple: bool = False


def _call_of_vitmae(model: Any, given: dict[str, Any]) -> _Call:
    """Reads the arguments of ``ViTMAEForPreTraining.forward``."""
    given |= given.pop("kwargs", {})
    images, noise, return_dict = (given.pop(name, None) for name in ("pixel_values", "noise", "return_dict"))
    for name, value in given.items():
        if value is not None and value is not False and name not in WITHOUT_EFFECT:
            raise OtherModelError(f"{name} was given")
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(model.config, name, False):
            raise OtherModelError(f"{name} is set in its configuration")
    by_default = getattr(model.config, "return_dict", True)
    in_a_tuple = not (by_default if return_dict is None else return_dict)
    masking = partial(model.vit.embeddings.random_masking, noise=noise)
    return _Call(images, masking, model.config.mask_ratio, model.config.norm_pix_loss, in_a_tuple)


def _call_of_official(model: Any, given: dict[str, Any]) -> _Call:
    """Reads the arguments of the official ``MaskedAutoencoderViT.forward``."""
    images, mask_ratio = given.pop("imgs", None), given.pop("mask_ratio", 0.75)
    if given:
        raise OtherModelError(f"{next(iter(given))} was given")
    masking = partial(model.random_masking, mask_ratio=mask_ratio)
    return _Call(images, masking, mask_ratio, bool(getattr(model, "norm_pix_loss", False)))


def _require_images(images: Any, shadow: _Shadow) -> None:
    """Refuses images for which the model's own code has another answer, or an error.

    Raises:
        OtherModelError: it is to compute them.
        UserError: they are on another device, as in the copies of DataParallel, whose weights nobody can find here.
    """
    ours, weight = shadow.model, shadow.parts.patch_embed.weight
    if torch.jit.is_tracing() or is_exporting():
        raise OtherModelError("a program is being exported")
    if not isinstance(images, torch.Tensor) or images.shape[1:] != (ours.in_chans, *ours.img_size) or not len(images):
        raise OtherModelError(f"images are not [N, {ours.in_chans}, {ours.img_size[0]}, {ours.img_size[1]}]")
    if images.device != weight.device:
        remedy = "move them; in place of nn.DataParallel use DistributedDataParallel (torchrun)"
        raise UserError(f"accelerate: images are on {images.device} and weights on {weight.device}; {remedy}")
    if ours.pos_embed.requires_grad or ours.decoder_pos_embed.requires_grad:
        raise OtherModelError("positions are trained")
    if images.requires_grad:
        raise OtherModelError("images require a gradient")
    if weight.dtype not in (torch.float32, torch.float64) or images.dtype != weight.dtype:
        raise OtherModelError(f"weights are {weight.dtype} and images {images.dtype}, not float32")


def _forward(model: Any, state: _State, *args: Any, **kwargs: Any) -> Any:
    """Computes what ``model.forward(*args, **kwargs)`` did before the model was accelerated."""
    own = type(model).forward
    try:
        shadow = state.shadow_of(model)
        given = dict(inspect.signature(own).bind(model, *args, **kwargs).arguments)
        given.pop("self")
        call = _call_of_vitmae(model, given) if state.is_vitmae else _call_of_official(model, given)
        _require_images(call.images, shadow)
        if not 1 <= int(shadow.model.num_patches * (1 - call.mask_ratio)) < shadow.model.num_patches:
            raise OtherModelError(f"a mask ratio of {call.mask_ratio}")
    except (OtherModelError, TypeError) as why:  # a TypeError is the original's to raise
        if isinstance(why, OtherModelError):
            state.leave(str(why))
        return own(model, *args, **kwargs)
    trains = model.training and torch.is_grad_enabled()
    if state.tune and trains:
        state.tune = False
        _measure(shadow.model, call)
    loss, pred, mask, ids_restore = _loss(model, shadow, call, state.predictions or not trains)
    if not state.is_vitmae:
        return loss, pred, mask
    from transformers.models.vit_mae.modeling_vit_mae import ViTMAEForPreTrainingOutput

    output_type: Any = ViTMAEForPreTrainingOutput
    output = output_type(loss=loss, logits=pred, mask=mask, ids_restore=ids_restore)
    return output.to_tuple() if call.in_a_tuple else output


def _loss(
    model: nn.Module, shadow: _Shadow, call: _Call, predictions: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Returns the loss, predictions [N, L, P] or None, the mask [N, L] and ids_restore [N, L] of a call."""
    ours, images = shadow.model, call.images
    shadow.move_to(images.device)
    ours.norm_pix_loss = call.norm_pix_loss
    again = False
    for theirs, block in zip(_blocks_of(model), (*ours.blocks, *ours.decoder_blocks), strict=True):
        checkpointing = getattr(theirs, "gradient_checkpointing", False) and theirs.training
        block.checkpointing = "full" if checkpointing and torch.is_grad_enabled() else "none"
        again = again or block.checkpointing == "full"
    # It draws the same numbers as for tokens; their width plays no part.
    visible, mask, ids_restore = call.masking(images.new_zeros(len(images), ours.num_patches, 1))
    ids_shuffle, K = ids_restore.argsort(dim=1), visible.shape[1]
    with shadow.packed(keep=again):
        latent = ours._latent(ours._embed(images, ids_shuffle[:, :K]))
        pred = ours._decode(latent, ours.decoder_pos_embed, ids_shuffle, start=1 if predictions else K + 1)
    masked = pred[:, K:] if predictions else pred
    loss = ours._masked_mse(masked, images, ids_shuffle[:, K:])
    if not predictions:
        return loss, None, mask, ids_restore
    return loss, pred.gather(1, ids_restore[:, :, None].expand(-1, -1, pred.shape[2])), mask, ids_restore


def _blocks_of(model: Any) -> list[Any]:
    """Returns the blocks of a model in the order encoder, decoder."""
    if not hasattr(model, "vit"):
        return [*model.blocks, *model.decoder_blocks]
    encoder = model.vit.layers if hasattr(model.vit, "layers") else model.vit.encoder.layer
    return [*encoder, *model.decoder.decoder_layers]


def _measure(ours: MaskedAutoencoderViT, call: _Call) -> None:
    """Measures on a CPU what is fastest for a training step with such a batch, and uses it in this process."""
    device = call.images.device
    dtype = autocast_dtype(device) or call.images.dtype
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        logger.info("accelerate: nothing is measured on %s in %s", device, dtype)
        return
    with torch.autocast("cpu", enabled=False):
        choices = tuning.measured(calls_of(ours, len(call.images), call.mask_ratio), dtype)
    set_backends(replace(asked_backends(), choices=choices))
    keep_freed_memory()
    for line in tuning.describe(choices, dtype):
        logger.info("accelerate: %s", line)


def _difference(model: nn.Module, state: _State) -> str | None:
    """Compares loss and predictions of random images with those of the model's own code: says what differs, or None.

    Both draw the same masks, as torch's generators are put back after each. No generator is seeded: torch.manual_seed
    would seed those of all GPUs.
    """
    shadow = state.shadow_of(model)
    weight = shadow.parts.patch_embed.weight
    modes = [(module, module.training) for module in model.modules()]
    device = weight.device
    forked = [] if device.type == "cpu" else [device]  # that of the CPU is forked in any case
    numbers = torch.Generator().manual_seed(0)
    shape = (CHECKED_IMAGES, shadow.model.in_chans, *shadow.model.img_size)
    images = torch.randn(shape, generator=numbers).to(weight)
    found = []
    try:
        model.eval()
        for forward in (partial(type(model).forward, model), partial(_forward, model, state)):
            kept = torch.random.fork_rng(forked, device_type=device.type)
            with torch.no_grad(), kept, torch.autocast(device.type, enabled=False):
                output = forward(images)
            found.append((output[0], output[1]))
    except (TypeError, ValueError, RuntimeError) as error:
        return f"the model cannot be called: {in_one_line(str(error))}"
    finally:
        for module, training in modes:
            module.training = training
    for what, theirs, ours in zip(("loss", "prediction"), *found, strict=True):
        difference = ((ours - theirs).abs().max() / theirs.abs().max()).item()
        if not difference <= TOLERANCE:
            return f"its {what} for random images differs by {difference:.1g} from that of a masked autoencoder"
    return None
