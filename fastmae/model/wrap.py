"""wrap: a masked autoencoder around a vision transformer of timm, with which it shares its parameters.

So what is trained is the timm model itself. A class token or none, registers, and learnt positions with or without rows
for these are computed as timm does; whatever else an encoder has is refused by name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastmae.errors import UserError
from fastmae.model.accelerate import (
    TOLERANCE,
    OtherModelError,
    drops,
    part_of,
    share,
    shared_block,
    shared_norm,
    timm_block_parts,
)
from fastmae.model.mae import MaskedAutoencoderViT

# What stands behind the encoder's tokens, and is not trained by masks.
BEHIND = ("head", "head_dist", "fc_norm", "attn_pool")
# Attributes of a vision transformer of timm that change its tokens, unless they are None or do nothing.
OTHERS = ("rope", "norm_pre", "patch_drop", "pos_drop", "patch_embed.norm")


class WrappedMAE(MaskedAutoencoderViT):
    """A masked autoencoder whose encoder has a timm model's parameters, and its tokens before those of patches.

    Its ``pos_embed`` may have rows for all of these, for the class token, or for none. Without a class token the mean
    of the visible tokens takes its place in the decoder; ``cls_token`` is zeros then and takes no part.
    """

    has_class_token = True
    has_fixed_positions = False  # the encoder's own, which may be learnt

    @property
    def prefix_tokens(self) -> int:
        """How many tokens come before those of the patches in the encoder."""
        return self.has_class_token + (0 if self.reg_token is None else self.reg_token.shape[1])

    def _prefix_positions(self) -> int:
        """Returns how many rows of ``pos_embed`` are before those of the patches."""
        return self.pos_embed.shape[1] - self.num_patches

    def _positions(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        patches = self.pos_embed[:, self._prefix_positions() :]
        return torch.cat([torch.zeros_like(patches[:, :1]), patches], dim=1), self.decoder_pos_embed

    def _with_prefix(self, x: torch.Tensor, pos_embed: torch.Tensor) -> torch.Tensor:
        own: list[torch.Tensor] = [self.cls_token] if self.has_class_token else []
        own += [] if self.reg_token is None else [self.reg_token]
        if not own:
            return self._residual(x)
        prefix, rows = torch.cat(own, dim=1), self._prefix_positions()
        if rows:
            prefix = torch.cat([prefix[:, :rows] + self.pos_embed[:, :rows], prefix[:, rows:]], dim=1)
        return self._residual(torch.cat([prefix.expand(x.shape[0], -1, -1), x], dim=1))

    def _without_registers(self, tokens: torch.Tensor) -> torch.Tensor:
        patches = tokens[:, self.prefix_tokens :]
        first = tokens[:, :1] if self.has_class_token else patches.mean(dim=1, keepdim=True)
        return torch.cat([first, patches], dim=1)


def wrap(
    encoder: nn.Module, *, decoder: tuple[int, int, int] = (512, 8, 16), norm_pix_loss: bool = False, **settings: Any
) -> MaskedAutoencoderViT:
    """Makes a masked autoencoder of a vision transformer of timm, which is trained in place.

    The encoder's parameters are the timm model's (the same objects), so that ``encoder`` is pretrained when the masked
    autoencoder has been trained; its head is not touched. Tokens of two random images are compared.

    Args:
        encoder: a ``timm.models.VisionTransformer``, or another model with its names: with or without a class token and
            registers, positions learnt or fixed.
        decoder: width, depth and number of heads of the decoder, which is new.
        norm_pix_loss, settings: as ``MaskedAutoencoderViT`` has them, such as ``mean`` and ``std``, by default those of
            the encoder's ``pretrained_cfg``.

    Returns:
        A masked autoencoder for ``fastmae.MAELoss`` and ``training_loss``. Move it to a device as usual; both models
        move. Without a class token, take the mean of its patch tokens for features.

    Raises:
        UserError: the encoder has something that is not computed here (rotary positions, LayerScale, SwiGLU, norms of
            queries and keys, dropout, another activation than exact GELU), or computes something else.
    """
    try:
        model = _wrapped(encoder, decoder, norm_pix_loss, settings)
    except OtherModelError as why:
        raise UserError(f"wrap: {why}; it takes a vision transformer with the names and parts of timm's") from why
    _compare(encoder, model)
    return model


def _wrapped(encoder: Any, decoder: tuple[int, int, int], norm_pix_loss: bool, settings: dict[str, Any]) -> WrappedMAE:
    """Returns a model with a new decoder and the encoder's parameters."""
    for name in OTHERS:
        found: Any = encoder
        for step in name.split("."):
            found = getattr(found, step, None)
        if found is not None and not isinstance(found, nn.Identity) and not _does_nothing(found):
            raise OtherModelError(f"{name} ({type(found).__name__}) is not computed here")
    for name, module in encoder.named_modules():
        if drops(module):
            raise OtherModelError(f"{name} leaves out something at random (dropout)")
    proj = part_of(encoder, "patch_embed.proj", nn.Conv2d)
    size = part_of(encoder, "patch_embed.img_size")
    blocks = [timm_block_parts(encoder, f"blocks.{number}") for number in range(len(part_of(encoder, "blocks")))]
    positions = part_of(encoder, "pos_embed", nn.Parameter)
    usual = getattr(encoder, "pretrained_cfg", None) or {}
    settings = {
        name: usual[name] for name in ("mean", "std") if len(usual.get(name, ())) == proj.in_channels
    } | settings
    width, depth, heads = decoder
    model = WrappedMAE(
        img_size=size,
        patch_size=proj.kernel_size,
        in_chans=proj.in_channels,
        embed_dim=proj.out_channels,
        depth=0,
        num_heads=blocks[0].heads,
        decoder_embed_dim=width,
        decoder_depth=depth,
        decoder_num_heads=heads,
        norm_pix_loss=norm_pix_loss,
        **settings,
    )
    share(model.patch_embed.proj, proj)
    model.has_class_token = getattr(encoder, "cls_token", None) is not None
    if model.has_class_token:
        model.cls_token = encoder.cls_token
    else:
        model.cls_token = nn.Parameter(torch.zeros_like(model.cls_token), requires_grad=False)
    model.reg_token = getattr(encoder, "reg_token", None)
    model.pos_embed = positions
    if model._prefix_positions() not in (0, 1, model.prefix_tokens) or model._prefix_positions() > model.prefix_tokens:
        raise OtherModelError(f"pos_embed has {positions.shape[1]} rows for {model.num_patches} patches")
    model.blocks = nn.ModuleList(shared_block(block, "on a CPU") for block in blocks)
    norm = part_of(encoder, "norm")
    model.norm = nn.Identity() if isinstance(norm, nn.Identity) else shared_norm(part_of(encoder, "norm", nn.LayerNorm))
    known = {id(parameter) for parameter in model.parameters()}
    for name, parameter in encoder.named_parameters():
        if id(parameter) not in known and name.split(".")[0] not in BEHIND:
            raise OtherModelError(f"{name} is a parameter that is not computed here")
    return model.to(proj.weight.device)


def _does_nothing(module: Any) -> bool:
    """Whether it is dropout of nothing."""
    return "Drop" in type(module).__name__ and not drops(module)


@torch.no_grad()
def _compare(encoder: Any, model: WrappedMAE) -> None:
    """Compares the tokens of random images.

    Raises:
        UserError: they are others.
    """
    weight = model.patch_embed.proj.weight
    images = torch.randn(2, model.in_chans, *model.img_size, generator=torch.Generator().manual_seed(0)).to(weight)
    modes = [(module, module.training) for module in encoder.modules()]
    model._has_checked_images = True
    try:
        theirs, ours = encoder.eval().forward_features(images), model.forward_features(images)
    finally:
        for module, training in modes:
            module.training = training
        del model._has_checked_images
    same = theirs.shape == ours.shape and (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max()
    if not same:
        raise UserError("wrap: the encoder computes other tokens than a plain vision transformer with its parameters")
