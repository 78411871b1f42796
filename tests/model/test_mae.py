"""The public interface of the model: presets, keys, shapes, and what is refused."""

import pytest
import torch

import fastmae
from fastmae.model.presets import PRESETS
from fastmae.model.vit import sincos_positions

OFFICIAL_DEPTH = {"base": 12, "large": 24, "huge": 32}


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return fastmae.mae_vit_tiny_patch4()


@pytest.mark.parametrize("size", OFFICIAL_DEPTH)
def test_official_models_have_the_official_size(size):
    patch = 14 if size == "huge" else 16
    with torch.device("meta"):
        model = getattr(fastmae, f"mae_vit_{size}_patch{patch}")()
    state = model.state_dict()
    decoder = [key for key in state if key.startswith(("decoder_", "mask_token"))]
    assert len(state) - len(decoder) == 6 + 12 * OFFICIAL_DEPTH[size]
    assert len(decoder) == 104
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected_parameters(model)


def expected_parameters(model):
    """Counted from the widths: 12 D² + 13 D a block (4 D wide MLP), and what is around the blocks."""
    D, E = model.cls_token.shape[-1], model.mask_token.shape[-1]
    P = model.patch_size[0] * model.patch_size[1] * model.in_chans
    encoder = len(model.blocks) * (12 * D * D + 13 * D) + (P + 1) * D + D + 2 * D
    decoder = len(model.decoder_blocks) * (12 * E * E + 13 * E) + (D + 1) * E + E + 2 * E + (E + 1) * P
    return encoder + decoder


def test_keys_are_the_official_ones(tiny):
    keys = set(tiny.state_dict())
    block = {"norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}
    expected = {"cls_token", "pos_embed", "mask_token", "decoder_pos_embed"}
    modules = {"patch_embed.proj", "norm", "decoder_embed", "decoder_norm", "decoder_pred"}
    modules |= {f"blocks.{i}.{part}" for i in range(4) for part in block}
    modules |= {f"decoder_blocks.{i}.{part}" for i in range(2) for part in block}
    assert keys == expected | {f"{module}.{leaf}" for module in modules for leaf in ("weight", "bias")}


def test_every_preset_is_importable():
    for name, preset in PRESETS.items():
        assert getattr(fastmae, name) is preset
    assert fastmae.mae_vit_large_patch16 is fastmae.mae_vit_large_patch16_dec512d8b


def test_positions_encode_column_then_row():
    table = sincos_positions(8, (2, 3))
    assert table.shape == (7, 8)
    assert not table[0].any()
    row, column = 1, 2
    angles = [torch.tensor([axis * 10000.0 ** -(i / 2) for i in range(2)]) for axis in (column, row)]
    expected = torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)])
    torch.testing.assert_close(table[1 + row * 3 + column], expected)


def test_initialisation_is_the_official_one():
    torch.manual_seed(0)
    model = fastmae.mae_vit_small_patch16()
    bound = (6 / (384 + 768)) ** 0.5
    weight = model.patch_embed.proj.weight
    assert bound * 0.99 < weight.abs().max() <= bound
    assert abs(model.blocks[0].mlp.fc1.weight.std() / ((6 / (384 + 1536)) ** 0.5 / 3**0.5) - 1) < 0.01
    assert 0.017 < model.cls_token.std() < 0.023
    assert all(not p.any() for n, p in model.named_parameters() if n.endswith("bias"))
    assert all((p == 1).all() for n, p in model.named_parameters() if "norm" in n and n.endswith("weight"))
    assert model.norm.eps == 1e-6


@pytest.mark.parametrize(
    ("decoder_attention", "first_patch_weights", "last_weights", "next_draw"),
    [
        ("self", [-0.011560979, -0.071741067], [-0.109741092, -0.173536092], 0.461805105),
        ("cross", [-0.043543231, -0.081732944], [0.154096022, 0.138731465], 0.948859453),
    ],
)
def test_the_weights_of_a_seed_are_those_of_version_0_1(
    decoder_attention, first_patch_weights, last_weights, next_draw
):
    """The numbers were written down with version 0.1; the next draw tells how many were taken for the weights."""
    torch.manual_seed(0)
    model = fastmae.mae_vit_tiny_patch4(decoder_attention=decoder_attention)
    drawn = torch.rand(1).item()
    assert model.patch_embed.proj.weight[0, 0, 0, :2].tolist() == pytest.approx(first_patch_weights, rel=1e-6)
    assert model.decoder_pred.weight[-1, -2:].tolist() == pytest.approx(last_weights, rel=1e-6)
    assert drawn == pytest.approx(next_draw, rel=1e-6)


def test_patchify_and_unpatchify_are_inverses():
    model = fastmae.mae_vit_tiny_patch4(img_size=(8, 24), patch_size=(4, 8), in_chans=5)
    images = torch.randn(2, 5, 8, 24)
    patches = model.patchify(images)
    assert patches.shape == (2, 6, 160)
    assert torch.equal(patches[1, 4].view(4, 8, 5), images[1, :, 4:8, 8:16].permute(1, 2, 0))
    assert torch.equal(model.unpatchify(patches), images)


def test_parts_compose_to_the_whole(tiny):
    images = torch.randn(2, 3, 28, 28)
    torch.manual_seed(5)
    loss, pred, mask = tiny(images, 0.6)
    torch.manual_seed(5)
    latent, mask2, ids_restore = tiny.forward_encoder(images, 0.6)
    assert latent.shape == (2, 1 + 19, 128)
    assert torch.equal(mask, mask2)
    assert mask.sum(dim=1).tolist() == [30.0, 30.0]
    assert torch.equal(tiny.forward_decoder(latent, ids_restore), pred)
    error = (pred - tiny.patchify(images)).square().mean(dim=-1)
    torch.testing.assert_close(loss, (error * mask).sum() / mask.sum())


def test_masks_without_ids_come_from_torchs_generator(tiny):
    """As in the published model: the same generator state, the same masks."""
    images = torch.randn(2, 3, 28, 28)
    torch.manual_seed(9)
    mask = tiny(images)[2]
    torch.manual_seed(9)
    noise = torch.rand(2, 49)
    kept = noise.argsort(dim=1)[:, :12]
    assert torch.equal(mask, torch.ones(2, 49).scatter_(1, kept, 0.0))


def test_features_of_a_whole_image_do_not_depend_on_a_mask(tiny):
    images = torch.randint(0, 256, (2, 28, 28, 3), dtype=torch.uint8)
    tokens = tiny.forward_features(images)
    assert tokens.shape == (2, 50, 128)
    shuffled = torch.stack([torch.randperm(49) for _ in range(2)])
    torch.testing.assert_close(tiny._encode(images, shuffled)[:, 0], tokens[:, 0], rtol=1e-4, atol=1e-5)


def test_bf16_autocast_stays_close(tiny):
    images = torch.randint(0, 256, (8, 28, 28, 3), dtype=torch.uint8)
    ids = fastmae.ops.random_masking(torch.arange(8), 0, 49)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = tiny.training_loss(images, ids)
    assert loss.dtype == torch.float32
    assert abs(loss / tiny.training_loss(images, ids) - 1) < 0.02


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(img_size=30), "multiple of a patch"),
        (dict(img_size=(28, 30)), "multiple of a patch"),
        (dict(embed_dim=130, num_heads=13), "multiple of 4"),
        (dict(num_heads=3), "number of heads"),
        (dict(decoder_depth=0), "decoder"),
        (dict(mean=[0.5]), "mean needs 3"),
        (dict(std=[0.5, 0.5, 0]), "std must be positive"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        fastmae.mae_vit_tiny_patch4(**settings)


@pytest.mark.parametrize(
    ("images", "mask_ratio", "words"),
    [
        (torch.zeros(2, 3, 32, 32), 0.75, "must have shape"),
        (torch.zeros(2, 28, 28, 3), 0.75, "must have shape"),
        (torch.zeros(2, 3, 28, 28, dtype=torch.uint8), 0.75, "must have shape"),
        (torch.zeros(2, 3, 28, 28), 0.0, "mask ratio"),
        (torch.zeros(2, 3, 28, 28), 0.99, "mask ratio"),
    ],
)
def test_wrong_images_and_ratios_are_refused(tiny, images, mask_ratio, words):
    with pytest.raises(ValueError, match=words):
        tiny(images, mask_ratio)


def test_wrong_ids_are_refused(tiny):
    with pytest.raises(ValueError, match="ids_shuffle"):
        tiny(torch.zeros(2, 3, 28, 28), ids_shuffle=torch.zeros(2, 48, dtype=torch.int64))


def test_training_loss_compiles_as_one_graph(tiny):
    images = torch.randint(0, 256, (4, 28, 28, 3), dtype=torch.uint8)
    ids = fastmae.ops.random_masking(torch.arange(4), 0, 49)
    compiled = torch.compile(tiny.training_loss, fullgraph=True, backend="aot_eager")
    losses = [loss_of(images, ids) for loss_of in (tiny.training_loss, compiled)]
    assert losses[0] == losses[1]
    parameters = [p for p in tiny.parameters() if p.requires_grad]
    eager, traced = (torch.autograd.grad(loss, parameters) for loss in losses)
    assert all(torch.equal(a, b) for a, b in zip(eager, traced, strict=True))
