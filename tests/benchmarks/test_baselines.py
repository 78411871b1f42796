"""Peers are the published masked autoencoder: the same loss and gradients, whatever they are made of."""

import importlib
from functools import partial

import pytest
import torch
from torch import nn

from fastmae.benchmarks.baselines.official import official_like
from fastmae.benchmarks.baselines.strong import strong_like
from fastmae.benchmarks.baselines.timm_blocks import timm_like
from fastmae.errors import UserError
from fastmae.model.mae import MaskedAutoencoderViT
from fastmae.ops.random_masking import random_masking

SIZES = dict(embed_dim=48, depth=3, num_heads=3, decoder_embed_dim=32, decoder_depth=2, decoder_num_heads=2)


def with_timm(model):
    pytest.importorskip("timm.models.vision_transformer", exc_type=ImportError)
    return timm_like(model)


@pytest.mark.parametrize("like", [official_like, strong_like, with_timm])
@pytest.mark.parametrize("norm_pix", [False, True])
@pytest.mark.parametrize(("size", "patch", "ratio"), [((32, 32), (4, 4), 4.0), ((24, 40), (4, 8), 2.0)])
def test_a_peer_has_our_loss_and_gradients(like, norm_pix, size, patch, ratio):
    torch.manual_seed(0)
    settings = dict(SIZES, mlp_ratio=ratio, norm_pix_loss=norm_pix, norm_layer=partial(nn.LayerNorm, eps=1e-6))
    ours = MaskedAutoencoderViT(size, patch, **settings)
    images = torch.randn(4, 3, *size)
    ids_shuffle = random_masking(torch.arange(4), 3, ours.num_patches)
    peer = like(ours)
    loss, other = ours.training_loss(images, ids_shuffle), peer(images, ids_shuffle.long())[0]
    torch.testing.assert_close(other, loss, rtol=1e-6, atol=0)
    loss.backward()
    other.backward()
    gradients = {name: p.grad for name, p in peer.named_parameters() if p.requires_grad}
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("error", [ImportError("no timm"), RuntimeError("operator torchvision::nms does not exist")])
def test_a_timm_that_cannot_be_imported_is_one_line(error, monkeypatch):
    def fail(name):
        raise error

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(UserError, match=f"timm cannot be imported .{error}") as caught:
        timm_like(None)
    assert "\n" not in str(caught.value)
