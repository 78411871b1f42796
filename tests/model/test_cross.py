"""The cross-attention decoder equals its plain formulation, decodes each patch by itself, and costs what is counted."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fastmae
from fastmae.model.cross import CrossMAE
from fastmae.model.flops import flops_per_image
from fastmae.model.reference import ReferenceMAE
from fastmae.ops import random_masking
from fastmae.train.step import TrainingLoss, prepare

SIZES = dict(embed_dim=48, depth=3, num_heads=3, decoder_embed_dim=32, decoder_depth=2, decoder_num_heads=2)
N = 4


def cross_model(dtype=torch.float32, size=(24, 40), patch=(4, 8), norm_pix=False, **sizes):
    """30 patches, 7 of them visible at the published ratio."""
    torch.manual_seed(0)
    settings = dict(img_size=size, patch_size=patch, norm_pix_loss=norm_pix, **{**SIZES, **sizes})
    model = CrossMAE(norm_layer=lambda width: nn.LayerNorm(width, eps=1e-6), **settings)
    for parameter in model.parameters():  # biases and norms start at 0 and 1, where mistakes could hide
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn_like(parameter)
    return model.to(dtype)


def batch(model, dtype=torch.float32):
    images = torch.randn(N, 3, *model.img_size, dtype=dtype, generator=torch.Generator().manual_seed(1))
    return images, random_masking(torch.arange(N), 3, model.num_patches)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def plain_loss(model, images, ids_shuffle, mask_ratio, predicted):
    """Patch after patch and head after head, from the weights by their names alone.

    The encoder is that of the reference; the decoder is as docs/cross-attention.md says.
    """
    weights = dict(model.named_parameters())
    encoder = ReferenceMAE(model.img_size, model.patch_size, 3, **SIZES).to(images.dtype)

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def block_of_encoder(x, i):
        own = {name.removeprefix(f"blocks.{i}."): p for name, p in weights.items() if name.startswith(f"blocks.{i}.")}
        return torch.func.functional_call(encoder.blocks[i], own, (x,))

    patches = encoder.patchify(images)
    rows = weights["patch_embed.proj.weight"].permute(0, 2, 3, 1).flatten(1)
    heads, width = 2, SIZES["decoder_embed_dim"] // 2
    losses = []
    for image, ids in zip(patches, ids_shuffle.long(), strict=True):
        K = int(len(ids) * (1 - mask_ratio))
        visible = image[ids[:K]] @ rows.T + weights["patch_embed.proj.bias"] + weights["pos_embed"][0, 1:][ids[:K]]
        x = torch.cat([weights["cls_token"][0] + weights["pos_embed"][0, :1], visible])[None]
        maps = [x]
        for i in range(SIZES["depth"]):
            maps.append(x := block_of_encoder(x, i))
        maps[-1] = norm(x, "norm")
        for patch in ids[K : K + predicted]:
            token = weights["mask_token"][0, 0] + weights["decoder_pos_embed"][0, 1 + patch]
            for i in range(SIZES["decoder_depth"]):
                name = f"decoder_blocks.{i}"
                shares = weights["decoder_map_weights"][i]
                read = sum(share * tokens[0] for share, tokens in zip(shares, maps, strict=True))
                keys, values = linear(norm(read, f"{name}.norm_kv"), f"{name}.attn.kv").chunk(2, dim=-1)
                query = linear(norm(token, f"{name}.norm1"), f"{name}.attn.q")
                mixed = []
                for head in range(heads):
                    own = slice(head * width, (head + 1) * width)
                    attends = (keys[:, own] @ query[own] / width**0.5).softmax(dim=0)
                    mixed.append(attends @ values[:, own])
                token = token + linear(torch.cat(mixed), f"{name}.attn.proj")
                hidden = nn.functional.gelu(linear(norm(token, f"{name}.norm2"), f"{name}.mlp.fc1"))
                token = token + linear(hidden, f"{name}.mlp.fc2")
            target = image[patch]
            if model.norm_pix_loss:
                target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
            losses.append((linear(norm(token, "decoder_norm"), "decoder_pred") - target).square().mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize(
    ("norm_pix", "predict_ratio", "predicted"), [(True, None, 23), (False, 0.25, 7), (True, 0.04, 1)]
)
def test_loss_and_gradients_are_those_of_the_plain_formulation(norm_pix, predict_ratio, predicted):
    model = cross_model(torch.float64, norm_pix=norm_pix)
    images, ids = batch(model, torch.float64)
    loss, truth = model.training_loss(images, ids, 0.75, predict_ratio), plain_loss(model, images, ids, 0.75, predicted)
    assert abs(loss / truth - 1) < 1e-12
    got, expected = gradients(model, loss), gradients(model, truth)
    # A key's bias has no influence on a softmax, so its gradient is nothing but rounding: the floor is for it.
    floor = 1e-13 * torch.stack([g.norm() for g in expected.values()]).norm()
    for name, gradient in expected.items():
        assert gradient.abs().sum() > 0, f"{name} gets no gradient"
        assert (got[name] - gradient).norm() <= 1e-11 * gradient.norm() + floor, name


def test_the_official_interface_gives_the_loss_of_all_masked_patches():
    model = cross_model(torch.float64)
    images, ids = batch(model, torch.float64)
    loss, pred, mask = model(images, ids_shuffle=ids)
    torch.testing.assert_close(loss, model.training_loss(images, ids), rtol=1e-12, atol=0)
    error = (pred - model.patchify(images)).square().mean(dim=-1)
    torch.testing.assert_close(loss, (error * mask).sum() / mask.sum(), rtol=1e-12, atol=0)


def test_a_patch_is_decoded_alike_whatever_else_is():
    """So a loss of some patches is an unbiased estimate of the loss of all, and teaches each the same."""
    model = cross_model(torch.float64)
    images, ids = batch(model, torch.float64)
    K = model.num_visible(0.75)
    latent, _, ids_restore = model.forward_encoder(images, ids_shuffle=ids)
    every = model.forward_decoder(latent, ids_restore)
    for chosen in (slice(K, K + 5), slice(K + 3, None), slice(0, 2)):  # visible ones, too
        among = torch.cat([ids[:, :K], ids[:, chosen]], dim=1)
        some = model._decode(latent, model.decoder_pos_embed, among, start=K + 1)
        expected = every.gather(1, ids[:, chosen, None].long().expand(-1, -1, every.shape[2]))
        torch.testing.assert_close(some, expected, rtol=1e-12, atol=1e-13)


def test_the_patches_that_are_predicted_are_any_of_the_masked_ones():
    """They come first among the masked ones of random masks, which list them in random order."""
    draws, L, K, M = 6000, 30, 7, 7
    ids = random_masking(torch.arange(draws), 5, L)[:, K : K + M]
    share = torch.bincount(ids.flatten().long(), minlength=L) / draws
    spread = (M / L * (1 - M / L) / draws) ** 0.5
    assert ((share - M / L).abs() < 4 * spread).all()


def test_parameters_are_named_and_initialised():
    torch.manual_seed(0)
    model = fastmae.mae_vit_tiny_patch4(decoder_attention="cross")
    published = set(fastmae.mae_vit_tiny_patch4().state_dict())
    parts = ("attn.qkv", "attn.q", "attn.kv", "norm_kv")
    names = {f"decoder_blocks.{i}.{part}.{leaf}" for i in range(2) for part in parts for leaf in ("weight", "bias")}
    others = names | {"decoder_map_weights", "decoder_embed.weight", "decoder_embed.bias"}
    assert set(model.state_dict()) ^ published == others
    assert model.decoder_map_weights.shape == (2, 1 + 4)
    bound = (6 / (2 + 5)) ** 0.5
    assert bound / 2 < model.decoder_map_weights.abs().max() <= bound
    kv = model.decoder_blocks[0].attn.kv.weight
    assert kv.shape == (2 * 96, 128)
    assert 0.99 * (6 / (2 * 96 + 128)) ** 0.5 < kv.abs().max() <= (6 / (2 * 96 + 128)) ** 0.5


@pytest.mark.parametrize("residual", [False, True])
def test_bf16_autocast_stays_close(residual):
    model = fastmae.mae_vit_tiny_patch4(decoder_attention="cross")
    model.autocast_residual = residual
    images = torch.randint(0, 256, (8, 28, 28, 3), dtype=torch.uint8)
    ids = random_masking(torch.arange(8), 0, 49)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.training_loss(images, ids, 0.75, 0.5)
    assert loss.dtype == torch.float32
    assert abs(loss / model.training_loss(images, ids, 0.75, 0.5) - 1) < 0.02


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_what_is_computed_again_has_the_same_bits(checkpointing):
    results = []
    for kind in ("none", checkpointing):
        loss_of = TrainingLoss(model := cross_model(), 0.75, 0.5)
        prepare(loss_of, kind, "off")
        loss = loss_of(*batch(model))
        results.append((loss.detach(), gradients(model, loss)))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(results[1][1][name], gradient) for name, gradient in results[0][1].items())


@pytest.mark.parametrize(("compiling", "graphs"), [("block", 2), ("model", 1)])
def test_compiled_is_the_same_and_compiled_once(monkeypatch, compiling, graphs):
    """The encoder's blocks share a graph, the decoder's another."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter, compile_anything = CompileCounterWithBackend("aot_eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **rest: compile_anything(*args, **rest, backend=counter))
    torch.compiler.reset()
    model = cross_model(depth=2)
    loss = model.training_loss(*batch(model), 0.75, 0.5)
    expected = gradients(model, loss)
    loss_of = TrainingLoss(model, 0.75, 0.5)
    prepare(loss_of, "selective", compiling)
    for _ in range(2):
        got = loss_of(*batch(model))
        torch.testing.assert_close(got, loss, rtol=1e-6, atol=0)
    assert counter.frame_count == graphs
    for name, gradient in gradients(model, got).items():
        assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm() + 1e-8, name
    torch.compiler.reset()


@pytest.mark.parametrize(("mask_ratio", "predict_ratio"), [(0.75, None), (0.75, 0.25), (0.4, 0.1)])
def test_flops_are_those_that_torch_counts(mask_ratio, predict_ratio):
    model = fastmae.mae_vit_tiny_patch4(img_size=(16, 24), in_chans=1, decoder_attention="cross", decoder_depth=3)
    ids = random_masking(torch.arange(2), 0, model.num_patches)
    images = torch.zeros(2, 16, 24, 1, dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model.training_loss(images, ids, mask_ratio, predict_ratio)
    assert flops_per_image(model, mask_ratio, predict_ratio=predict_ratio) == counter.get_total_flops() / 2


@pytest.mark.parametrize(
    ("preset", "decoder_depth", "predict_ratio", "gigaflops"),
    [("base", 8, None, 15.68), ("base", 12, 0.25, 12.78), ("large", 8, 0.25, 33.52), ("large", 12, 0.5, 38.17)],
)
def test_flops_are_those_of_the_docs(preset, decoder_depth, predict_ratio, gigaflops):
    with torch.device("meta"):
        make = getattr(fastmae, f"mae_vit_{preset}_patch16")
        model = make(decoder_attention="cross", decoder_depth=decoder_depth)
    assert flops_per_image(model, 0.75, predict_ratio=predict_ratio) / 1e9 == pytest.approx(gigaflops, abs=0.005)


def test_attention_is_chosen_by_what_the_decoder_reads():
    model = cross_model()
    assert model.attention_shapes(0.75) == {"encoder": (8, 16), "decoder": (8, 16)}


@pytest.mark.parametrize("predict_ratio", [0.0, 0.03, 0.8, -1.0])
def test_what_cannot_be_predicted_is_refused(predict_ratio):
    model = cross_model()
    with pytest.raises(ValueError, match="predict ratio"):
        model.training_loss(*batch(model), 0.75, predict_ratio)


def test_what_no_such_decoder_has_is_refused():
    with pytest.raises(ValueError, match="takes no predict_ratio"):
        fastmae.mae_vit_tiny_patch4().training_loss(torch.zeros(1, 3, 28, 28), torch.arange(49)[None], 0.75, 0.5)
    with pytest.raises(ValueError, match="decoder_attention must be self or cross, got both"):
        fastmae.mae_vit_tiny_patch4(decoder_attention="both")
    with pytest.raises(ValueError, match="number of heads"):
        fastmae.mae_vit_tiny_patch4(decoder_attention="cross", decoder_num_heads=5)
