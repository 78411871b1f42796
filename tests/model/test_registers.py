"""Registers are tokens of the encoder alone: the loss is that of the plain formulation, and features leave them out."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastmae.model.classifier import classifier_of, tune
from fastmae.model.cross import CrossMAE
from fastmae.model.flops import flops_per_image
from fastmae.model.mae import MaskedAutoencoderViT
from fastmae.model.reference import ReferenceMAE
from fastmae.model.sizes import sizes_of
from fastmae.ops import random_masking
from fastmae.train.optim import layer_decay_groups

SIZES = dict(embed_dim=48, depth=3, num_heads=3, decoder_embed_dim=32, decoder_depth=2, decoder_num_heads=2)
SHAPE = dict(img_size=(24, 40), patch_size=(4, 8), in_chans=3, **SIZES)
REGISTERS, N, L = 3, 4, 30


def with_registers(kind=MaskedAutoencoderViT, registers=REGISTERS, **changes):
    torch.manual_seed(0)
    return kind(norm_layer=partial(nn.LayerNorm, eps=1e-6), registers=registers, **{**SHAPE, **changes})


def batch(dtype=torch.float32):
    images = torch.randn(N, 3, 24, 40, dtype=dtype, generator=torch.Generator().manual_seed(1))
    return images, random_masking(torch.arange(N), 3, L)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def test_loss_and_gradients_are_those_of_the_plain_formulation():
    ours = with_registers().double()
    reference = ReferenceMAE(**SHAPE, registers=REGISTERS).double()
    reference.load_state_dict(ours.state_dict(), strict=True)
    images, ids = batch(torch.float64)
    true_loss, true_pred, _ = reference(images, ids.long())
    truth = gradients(reference, true_loss)
    loss, pred, _ = ours(images, ids_shuffle=ids)
    torch.testing.assert_close(pred, true_pred)
    for found in (loss, ours.training_loss(images, ids)):
        torch.testing.assert_close(found, true_loss, rtol=1e-12, atol=0)
        for name, gradient in gradients(ours, found).items():
            torch.testing.assert_close(gradient, truth[name], rtol=1e-10, atol=1e-12)
    assert truth["reg_token"].abs().min() > 0


def test_a_cross_decoder_does_not_see_them():
    model = with_registers(CrossMAE).double()
    images, ids = batch(torch.float64)
    latent, _, _ = model.forward_encoder(images, ids_shuffle=ids)
    assert latent.shape == (2, N, 1 + 7, 48)
    loss, fast = model(images, ids_shuffle=ids)[0], model.training_loss(images, ids)
    torch.testing.assert_close(loss, fast, rtol=1e-12, atol=0)
    assert gradients(model, fast)["reg_token"].abs().min() > 0


def test_tokens_are_the_class_token_then_registers_then_patches():
    model = with_registers()
    images, ids = batch()
    tokens = model.forward_features(images)
    assert model.prefix_tokens == 1 + REGISTERS
    assert tokens.shape == (N, 1 + REGISTERS + L, 48)
    embedded = model._embed(images, torch.arange(L).expand(N, -1))
    assert torch.equal(embedded[:, 0], (model.cls_token + model.pos_embed[:, :1]).expand(N, -1, -1)[:, 0])
    assert torch.equal(embedded[:, 1 : 1 + REGISTERS], model.reg_token.expand(N, -1, -1))
    patches = tokens[:, model.prefix_tokens :]
    assert torch.equal(model.pool_tokens(tokens), patches.mean(dim=1))
    assert torch.equal(model.pool_tokens(tokens, "tokens"), patches.flatten(1))
    assert torch.equal(model.pool_tokens(tokens, "cls"), tokens[:, 0])
    assert model.forward_encoder(images, ids_shuffle=ids)[0].shape == (N, 1 + 7, 48)


def test_other_weights_begin_as_without_registers_and_keys_follow_the_class_token():
    without, model = with_registers(registers=0), with_registers()
    state = model.state_dict()
    assert list(state)[:3] == ["cls_token", "reg_token", "pos_embed"]
    assert state.pop("reg_token").std() == pytest.approx(0.02, rel=0.2)
    assert "reg_token" not in without.state_dict()
    assert without.prefix_tokens == 1
    for name, tensor in without.state_dict().items():
        assert torch.equal(tensor, state[name])


@pytest.mark.parametrize("kind", [MaskedAutoencoderViT, CrossMAE])
def test_they_are_counted(kind):
    model = with_registers(kind)
    if kind is MaskedAutoencoderViT:
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        assert sizes_of(model).parameters == trained
    images, ids = batch()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.training_loss(images, ids)
    assert N * flops_per_image(model, 0.75) == counter.get_total_flops()
    assert model.attention_shapes(0.75)["encoder"] == (1 + REGISTERS + 7, 16)


@pytest.mark.parametrize("global_pool", [True, False])
def test_a_classifier_keeps_them(global_pool):
    mae = with_registers()
    model = classifier_of(mae, 5, global_pool=global_pool)
    seen = {}
    model.blocks[-1].register_forward_hook(lambda block, inputs, output: seen.update(tokens=output))
    images, _ = batch()
    logits = model(images)
    assert torch.equal(model.reg_token, mae.reg_token)
    torch.testing.assert_close(mae.norm(seen["tokens"]), mae.forward_features(images), rtol=1e-6, atol=1e-6)
    patches = seen["tokens"][:, 1 + REGISTERS :].mean(dim=1)
    features = model.fc_norm(patches) if global_pool else mae.forward_features(images)[:, 0]
    torch.testing.assert_close(logits, model.head(features), rtol=1e-6, atol=1e-6)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(images)
    assert N * sum(product.flops for product in model.products()) == counter.get_total_flops()


def test_fine_tuning_treats_them_as_the_class_token():
    model = classifier_of(with_registers(), 5)
    groups = layer_decay_groups(model, 0.05, 0.5)
    group = next(group for group in groups if any(p is model.reg_token for p in group["params"]))
    assert any(p is model.cls_token for p in group["params"])
    assert group["weight_decay"] == 0.0
    tune(model, "linear")
    assert not model.reg_token.requires_grad
