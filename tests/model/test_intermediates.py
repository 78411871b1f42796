"""The tokens after each block, the weights of attention, and pooled tokens, against the plain formulation."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from fastmae.model.classifier import classifier_of
from fastmae.model.cross import CrossMAE
from fastmae.model.mae import MaskedAutoencoderViT
from fastmae.model.reference import ReferenceBlock

SIZES = dict(img_size=(16, 24), patch_size=4, embed_dim=32, depth=3, num_heads=2)
SIZES |= dict(decoder_embed_dim=16, decoder_depth=2, decoder_num_heads=2, norm_layer=partial(nn.LayerNorm, eps=1e-6))
KINDS = ("mae", "cross", "registers", "class token", "mean")


@pytest.fixture(params=KINDS)
def model(request):
    torch.manual_seed(0)
    settings = SIZES | (dict(registers=3) if request.param == "registers" else {})
    model = (CrossMAE if request.param == "cross" else MaskedAutoencoderViT)(**settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    if request.param in ("class token", "mean"):
        return classifier_of(model, 5, global_pool=request.param == "mean")
    return model


@pytest.fixture
def images():
    return torch.randint(0, 256, (2, 16, 24, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def by_hand(model, images):
    """The tokens after each block, and the weights of attention in it, by matrix products."""
    x, tokens, weights = model._embed_all(images), [], []
    for block in model.blocks:
        plain = ReferenceBlock(32, 2, 4.0)
        plain.load_state_dict(block.state_dict())
        N, S, D = x.shape
        q, k, _ = plain.attn["qkv"](plain.norm1(x)).view(N, S, 3, 2, D // 2).unbind(2)
        scores = torch.stack([q[:, :, h] @ k[:, :, h].mT for h in range(2)], dim=1) / 4  # the root of Dh = 16
        weights.append(scores.exp() / scores.exp().sum(dim=3, keepdim=True))
        x = plain(x)
        tokens.append(x)
    return tokens, weights


@pytest.mark.parametrize(("indices", "numbers"), [(None, [0, 1, 2]), (2, [1, 2]), ([0, -1], [0, 2]), ((1,), [1])])
def test_intermediates_are_the_tokens_after_the_blocks(model, images, indices, numbers):
    expected, _ = by_hand(model, images)
    last, found = model.forward_intermediates(images, indices=indices, output_fmt="NLC", return_prefix_tokens=True)
    torch.testing.assert_close(last, model.forward_features(images))
    assert len(found) == len(numbers)
    for (patches, prefix), number in zip(found, numbers, strict=True):
        torch.testing.assert_close(torch.cat([prefix, patches], dim=1), expected[number], rtol=1e-4, atol=1e-5)
        assert prefix.shape == (2, model.prefix_tokens, 32)


def test_maps_have_the_shape_of_the_image(model, images):
    (of_sequence,) = model.forward_intermediates(images, 1, output_fmt="NLC", intermediates_only=True)
    (of_maps,) = model.forward_intermediates(images, 1, intermediates_only=True)
    assert of_maps.shape == (2, 32, 4, 6)
    assert torch.equal(of_maps[1, :, 2, 5], of_sequence[1, 2 * 6 + 5])


def test_the_last_norm_is_applied_when_asked_for(model, images):
    (plain,) = model.forward_intermediates(images, [0], output_fmt="NLC", intermediates_only=True)
    (normed,) = model.forward_intermediates(images, [0], norm=True, output_fmt="NLC", intermediates_only=True)
    norm = getattr(model, "norm", nn.Identity())
    assert torch.equal(normed, norm(plain))


def test_what_comes_after_the_last_one_is_left_out_when_asked_for(model, images):
    model.blocks[2].forward = None
    last, _ = model.forward_intermediates(images, [1], stop_early=True)
    (found,) = model.forward_intermediates(images, [1], stop_early=True, norm=True, output_fmt="NLC")[1]
    assert torch.equal(last[:, model.prefix_tokens :], found)


def test_gradients_flow_through_intermediates_and_maps(model, images):
    (found,) = model.forward_intermediates(images, [1], intermediates_only=True)
    (weights,) = model.attention_maps(images, [1])
    (found.sum() + weights[..., 0].sum()).backward()
    assert model.blocks[0].mlp.fc1.weight.grad.abs().sum() > 0
    assert model.blocks[1].attn.qkv.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(("blocks", "numbers"), [(None, [0, 1, 2]), (1, [2]), ([-3, 1], [0, 1])])
def test_attention_maps_are_the_softmax(model, images, blocks, numbers):
    _, expected = by_hand(model, images)
    found = model.attention_maps(images, blocks)
    assert len(found) == len(numbers)
    for weights, number in zip(found, numbers, strict=True):
        torch.testing.assert_close(weights, expected[number], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(weights.sum(dim=3), torch.ones_like(weights[..., 0]))


def test_attention_maps_are_float32_under_autocast_and_float64_in_float64(model, images):
    (exact,) = model.attention_maps(images, 1)
    with torch.autocast("cpu", torch.bfloat16):
        (weights,) = model.attention_maps(images, 1)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(dim=3), torch.ones_like(weights[..., 0]))
    torch.testing.assert_close(weights, exact, rtol=0.1, atol=0.01)
    assert model.double().attention_maps(images, 1)[0].dtype == torch.float64


def test_blocks_of_another_kind_are_refused_by_number(model, images):
    model.blocks[1] = nn.Identity()
    with pytest.raises(TypeError, match=r"block 1 is a Identity without attn\.qkv"):
        model.attention_maps(images)
    assert len(model.attention_maps(images, [0, 2])) == 2


@pytest.mark.parametrize("wrong", [0, 4, [], [3], [-4]])
def test_blocks_that_there_are_not_are_refused(model, images, wrong):
    with pytest.raises(ValueError, match="indices must"):
        model.forward_intermediates(images, wrong)
    with pytest.raises(ValueError, match="blocks must"):
        model.attention_maps(images, wrong)
    with pytest.raises(ValueError, match="output_fmt must be one of NCHW, NLC, got 'NHWC'"):
        model.forward_intermediates(images, output_fmt="NHWC")


def test_pooled_tokens_have_the_words_of_features(model, images):
    tokens = model.forward_features(images)
    patches = tokens[:, model.prefix_tokens :]
    fc_norm = getattr(model, "fc_norm", None) or nn.Identity()
    assert torch.equal(model.pool_tokens(tokens), fc_norm(patches.mean(dim=1)))
    assert torch.equal(model.pool_tokens(tokens, "cls"), tokens[:, 0])
    assert torch.equal(model.pool_tokens(tokens, "both")[:, 32:], model.pool_tokens(tokens, "mean"))
    assert model.pool_tokens(tokens, "tokens").shape == (2, 24 * 32)
    with pytest.raises(ValueError, match="pool must be one of mean, cls, both, tokens, got 'max'"):
        model.pool_tokens(tokens, "max")


def test_a_classifier_classifies_its_pooled_tokens(images):
    torch.manual_seed(0)
    for global_pool in (True, False):
        model = classifier_of(MaskedAutoencoderViT(**SIZES), 5, global_pool=global_pool)
        tokens = model.forward_features(images)
        assert torch.equal(model.head(model.pool_tokens(tokens, model.pool)), model(images))


def test_other_sizes_have_maps_of_their_own_grid(images):
    model = MaskedAutoencoderViT(**SIZES)
    model.allow_sizes([(8, 16)])
    (found,) = model.forward_intermediates(images[:, :8, :16], 1, intermediates_only=True)
    assert found.shape == (2, 32, 2, 4)
    assert model.attention_maps(images[:, :8, :16], 1)[0].shape == (2, 2, 9, 9)
