"""What somebody changes in a model counts in training: overridden methods, hooks, wrapped and parametrised layers."""

import copy
import types

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from fastmae.model.mae import MaskedAutoencoderViT
from fastmae.model.presets import mae_vit_tiny_patch4
from fastmae.ops.random_masking import random_masking
from fastmae.train.step import TrainingLoss

SIZES = dict(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2)
SIZES |= dict(decoder_embed_dim=16, decoder_depth=2, decoder_num_heads=2)


@pytest.fixture
def batch():
    images = torch.randint(0, 256, (3, 16, 16, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    return images, random_masking(torch.arange(3), 0, 16)


def fresh(kind=MaskedAutoencoderViT, **changes):
    torch.manual_seed(0)
    return kind(**SIZES, **changes)


class OtherLoss(MaskedAutoencoderViT):
    """The official way to train with another loss."""

    def forward_loss(self, imgs, pred, mask):
        assert imgs.shape[1:] == (3, 16, 16)
        assert imgs.dtype == torch.float32
        return 2 * super().forward_loss(imgs, pred, mask)


class OtherDecoder(MaskedAutoencoderViT):
    """A decoder that is not ours."""

    def forward_decoder(self, x, ids_restore):
        return 0 * super().forward_decoder(x, ids_restore)


class OtherEncoder(MaskedAutoencoderViT):
    """An encoder that draws its masks by itself, as official code does."""

    def forward_encoder(self, imgs, mask_ratio=0.75):
        return super().forward_encoder(imgs, mask_ratio)


class OtherPatches(MaskedAutoencoderViT):
    """Targets that are not the pixels."""

    def patchify(self, imgs):
        return 0 * super().patchify(imgs)


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_an_overridden_loss_is_called_in_training(batch, norm_pix_loss):
    ours, theirs = fresh(norm_pix_loss=norm_pix_loss), fresh(OtherLoss, norm_pix_loss=norm_pix_loss)
    expected, found = (TrainingLoss(model, 0.75)(*batch) for model in (ours, theirs))
    torch.testing.assert_close(found, 2 * expected)
    (2 * expected).backward()
    found.backward()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(theirs(batch[0], 0.75, ids_shuffle=batch[1])[0], found)


def test_an_overridden_decoder_and_other_targets_count(batch):
    images = fresh()._normalised(batch[0])
    zero = fresh(OtherDecoder).training_loss(*batch)
    mask = torch.ones(3, 16).scatter(1, batch[1][:, :4].long(), 0)
    torch.testing.assert_close(zero, fresh().forward_loss(images, torch.zeros(3, 16, 48), mask))
    _, pred, mask = fresh()(batch[0], ids_shuffle=batch[1])
    patches = fresh(OtherPatches).training_loss(*batch)
    torch.testing.assert_close(patches, (pred.square().mean(dim=-1) * mask).sum() / mask.sum())


def test_an_encoder_that_takes_no_masks_works_alone_and_is_refused_in_training(batch):
    model = fresh(OtherEncoder)
    assert model(batch[0])[0] > 0
    with pytest.raises(TypeError, match=r"OtherEncoder.forward_encoder must take the argument ids_shuffle"):
        model.training_loss(*batch)


def test_what_the_official_steps_do_not_know_is_refused(batch):
    model = fresh(OtherLoss)
    with pytest.raises(ValueError, match="forward_loss predicts all masked patches"):
        model.training_loss(*batch, predict_ratio=0.25)
    model.allow_sizes([(8, 8)])
    with pytest.raises(ValueError, match="forward_loss takes images of"):
        model.training_loss(batch[0][:, :8, :8], random_masking(torch.arange(3), 0, 4))


def test_methods_that_are_set_later_count_too(batch, monkeypatch):
    def nine(self, imgs, pred, mask):
        return 9 + 0 * pred.sum()

    model = fresh()
    model.forward_loss = types.MethodType(nine, model)
    assert model.training_loss(*batch) == 9
    model = fresh()
    monkeypatch.setattr(MaskedAutoencoderViT, "forward_loss", nine)
    assert TrainingLoss(model, 0.75)(*batch) == 9


def test_our_own_classes_keep_the_short_way():
    assert fresh().overridden == ()
    assert mae_vit_tiny_patch4(decoder_attention="cross").overridden == ()


def test_hooks_on_any_module_fire_in_training(batch):
    model = fresh()
    expected = model.training_loss(*batch)
    fired = set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda module, inputs, output, name=name: fired.add(name))
    torch.testing.assert_close(model.training_loss(*batch), expected)
    containers = {name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    assert {name for name, _ in model.named_modules()} - containers == fired


class Adapter(nn.Module):
    """A layer around another one, which shows the other one's weight as its own, as adapters do."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    @property
    def weight(self):
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

    def forward(self, x):
        return 3 * self.base(x)


@pytest.mark.parametrize(
    "where", ["patch_embed.proj", "blocks.0.attn.qkv", "decoder_blocks.1.attn.qkv", "decoder_pred"]
)
def test_wrapped_and_parametrised_layers_count(batch, where):
    """The layer three times as strong, by a wrapper, by a parametrisation and by its weights, is the same loss."""
    plain = fresh()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    scaled, wrapped, parametrised = (copy.deepcopy(plain) for _ in range(3))
    layer = scaled.get_submodule(where)
    layer.weight.data *= 3
    layer.bias.data *= 3
    wrapped.set_submodule(where, Adapter(wrapped.get_submodule(where)))
    for name in ("weight", "bias"):
        parametrize.register_parametrization(parametrised.get_submodule(where), name, Times3())
    expected = scaled.training_loss(*batch)
    assert not torch.isclose(expected, plain.training_loss(*batch))
    torch.testing.assert_close(wrapped.training_loss(*batch), expected)
    torch.testing.assert_close(parametrised.training_loss(*batch), expected)


class Times3(nn.Module):
    """A parametrisation."""

    def forward(self, weight):
        return 3 * weight


@pytest.mark.parametrize("frozen", ["blocks", "decoder", "mask_token", ""])
def test_frozen_parts_and_learnt_positions_have_the_gradients_of_the_official_steps(batch, frozen):
    ours, theirs = fresh(), fresh()
    for model in (ours, theirs):
        model.pos_embed.requires_grad_(not frozen)
        model.decoder_pos_embed.requires_grad_(not frozen)
        for name, parameter in model.named_parameters():
            if frozen and name.startswith(frozen):
                parameter.requires_grad_(False)
    ours.training_loss(*batch).backward()
    theirs(batch[0], ids_shuffle=batch[1])[0].backward()
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None) == (not one.requires_grad), name
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_learnt_positions_of_the_decoder_move_the_loss_as_the_official_steps_say(batch):
    """One step along the gradient of the decoder's positions, against the difference of the losses."""
    model = fresh().double()
    model.decoder_pos_embed.requires_grad_(True)
    images = model._normalised(batch[0]).double()
    loss = model.training_loss(images, batch[1])
    loss.backward()
    direction = model.decoder_pos_embed.grad.clone()
    assert direction.abs().sum() > 0
    with torch.no_grad():
        model.decoder_pos_embed += 1e-6 * direction
        change = model.training_loss(images, batch[1]) - loss
    torch.testing.assert_close(change, 1e-6 * direction.square().sum(), rtol=1e-3, atol=0)
