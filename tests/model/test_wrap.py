"""wrap: a masked autoencoder trains a timm model's own parameters."""

import pytest
import torch
from torch import nn

import fastmae
from fastmae.errors import UserError
from fastmae.model.sizes import sizes_of
from fastmae.model.wrap import wrap

WIDTH, SIDE, PATCH = 32, 24, 6


class TimmBlock(nn.Module):
    """A block with the names of timm's."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, eps=1e-6), nn.LayerNorm(WIDTH, eps=1e-6)
        self.attn = nn.Module()
        self.attn.num_heads = 2
        self.attn.qkv, self.attn.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Module()
        self.mlp.fc1, self.mlp.act, self.mlp.fc2 = nn.Linear(WIDTH, 48), nn.GELU(), nn.Linear(48, WIDTH)

    def forward(self, x):
        N, S, D = x.shape
        q, k, v = self.attn.qkv(self.norm1(x)).reshape(N, S, 3, 2, D // 2).permute(2, 0, 3, 1, 4)
        mixed = ((q @ k.transpose(2, 3)) / (D // 2) ** 0.5).softmax(dim=3) @ v
        x = x + self.attn.proj(mixed.transpose(1, 2).reshape(N, S, D))
        return x + self.mlp.fc2(self.mlp.act(self.mlp.fc1(self.norm2(x))))


class TimmLike(nn.Module):
    """A vision transformer with the names of timm's, as far as an encoder goes."""

    def __init__(self, class_token=True, registers=0, no_embed_class=False, final_norm=True):
        super().__init__()
        torch.manual_seed(0)
        self.patch_embed = nn.Module()
        self.patch_embed.img_size = (SIDE, SIDE)
        self.patch_embed.proj = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH)) if class_token else None
        self.reg_token = nn.Parameter(torch.randn(1, registers, WIDTH)) if registers else None
        self.no_embed_class = no_embed_class
        rows = (SIDE // PATCH) ** 2 + (0 if no_embed_class else class_token + registers)
        self.pos_embed = nn.Parameter(torch.randn(1, rows, WIDTH))
        self.blocks = nn.Sequential(TimmBlock(), TimmBlock())
        self.norm = nn.LayerNorm(WIDTH, eps=1e-6) if final_norm else nn.Identity()
        self.fc_norm = nn.Identity() if final_norm else nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 5)
        self.pos_drop = nn.Dropout(0.0)

    def forward_features(self, x):
        x = self.patch_embed.proj(x).flatten(2).transpose(1, 2)
        prefix = [token for token in (self.cls_token, self.reg_token) if token is not None]
        if self.no_embed_class:
            x = x + self.pos_embed
        x = torch.cat([*(token.expand(len(x), -1, -1) for token in prefix), x], dim=1)
        if not self.no_embed_class:
            x = x + self.pos_embed
        return self.norm(self.blocks(x))


FORMS = {
    "class token": {},
    "registers": dict(registers=3),
    "registers without positions": dict(registers=3, no_embed_class=True),
    "no class token": dict(class_token=False, final_norm=False),
    "registers alone": dict(class_token=False, registers=2, no_embed_class=True),
}


@pytest.mark.parametrize("form", FORMS)
def test_tokens_are_timms_and_a_step_trains_its_own_parameters(form):
    encoder = TimmLike(**FORMS[form])
    model = wrap(encoder, decoder=(16, 1, 2))
    images = torch.randn(3, 3, SIDE, SIDE)
    torch.testing.assert_close(model.forward_features(images), encoder.forward_features(images))
    own = {id(parameter) for parameter in model.parameters()}
    behind = ("head.", "fc_norm.")
    assert all((id(p) in own) != name.startswith(behind) for name, p in encoder.named_parameters())
    before = {name: p.detach().clone() for name, p in encoder.named_parameters()}
    loss_of = fastmae.MAELoss(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_of(images).backward()
    optimizer.step()
    for name, parameter in encoder.named_parameters():
        assert parameter.equal(before[name]) == name.startswith(behind), name
    with torch.no_grad():
        torch.testing.assert_close(model.forward_features(images), encoder.forward_features(images))


@pytest.mark.parametrize("form", FORMS)
def test_the_fast_loss_is_that_of_the_official_steps(form):
    model = wrap(TimmLike(**FORMS[form]), decoder=(16, 2, 2), norm_pix_loss=True)
    images = torch.randn(3, 3, SIDE, SIDE)
    order = torch.rand(3, 16).argsort(dim=1)
    fast = model.training_loss(images, order, 0.75)
    loss, pred, mask = model(images, 0.75, ids_shuffle=order)
    torch.testing.assert_close(fast, loss)
    torch.testing.assert_close(model.forward_loss(images, pred, mask), loss)


def with_layer_scale(encoder):
    encoder.blocks[1].ls1 = nn.Module()
    encoder.blocks[1].ls1.gamma = nn.Parameter(torch.ones(WIDTH))


def with_rope(encoder):
    encoder.rope = nn.Module()


def with_swiglu(encoder):
    encoder.blocks[0].mlp = nn.ModuleDict({"w12": nn.Linear(WIDTH, 96), "w3": nn.Linear(48, WIDTH)})


def with_a_norm_before(encoder):
    encoder.norm_pre = nn.LayerNorm(WIDTH)


def with_dropout(encoder):
    encoder.pos_drop.p = 0.1


def with_patches_dropped(encoder):
    class PatchDropout(nn.Module):
        def __init__(self):
            super().__init__()
            self.prob = 0.5

    encoder.patch_drop = PatchDropout()


def with_another_activation(encoder):
    encoder.blocks[1].mlp.act = nn.GELU(approximate="tanh")


def with_parallel_branches(encoder):
    del encoder.blocks[0].attn


def with_another_forward(encoder):
    encoder.blocks[0].forward = lambda x: x


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (with_layer_scale, "blocks.1.ls1.gamma is a parameter that is not computed here"),
        (with_rope, "rope (Module) is not computed here"),
        (with_swiglu, "no blocks.0.mlp.fc1"),
        (with_a_norm_before, "norm_pre (LayerNorm)"),
        (with_dropout, "pos_drop"),
        (with_patches_dropped, "patch_drop"),
        (with_another_activation, "blocks.1.mlp.act is a GELU(approximate='tanh'), not an exact GELU"),
        (with_parallel_branches, "no blocks.0.attn"),
        (with_another_forward, "computes other tokens"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(change, problem):
    encoder = TimmLike()
    change(encoder)
    with pytest.raises(UserError) as refused:
        wrap(encoder)
    assert problem in str(refused.value)
    assert "\n" not in str(refused.value)


def test_features_of_an_encoder_without_class_token_are_of_patches_alone():
    model = wrap(TimmLike(**FORMS["registers alone"]), decoder=(16, 1, 2))
    tokens = model.forward_features(torch.randn(2, 3, SIDE, SIDE))
    assert torch.equal(model.pool_tokens(tokens), tokens[:, 2:].mean(dim=1))
    for pool in ("cls", "both"):
        with pytest.raises(ValueError, match="has no class token; take mean or tokens"):
            model.pool_tokens(tokens, pool)
    assert sizes_of(model).registers == 2
    assert sizes_of(wrap(TimmLike(**FORMS["no class token"]), decoder=(16, 1, 2))).registers == 0


def test_pixels_are_normalised_as_the_encoder_was_pretrained():
    encoder = TimmLike()
    encoder.pretrained_cfg = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.5, 0.5)}
    assert wrap(encoder, decoder=(16, 1, 2)).mean.tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert wrap(encoder, decoder=(16, 1, 2), mean=(0.0, 0.0, 0.0)).mean.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_tiny_patch16_224", dict(reg_tokens=4)),
        ("vit_tiny_patch16_224", dict(reg_tokens=4, no_embed_class=True)),
        ("vit_tiny_patch16_224", dict(class_token=False, global_pool="avg")),
        ("vit_base_patch16_siglip_224", {}),
    ],
)
def test_timm_models_have_the_same_tokens(name, settings):
    timm = pytest.importorskip("timm")
    encoder = timm.create_model(name, depth=2, **settings)
    model = wrap(encoder, decoder=(32, 1, 2))
    images = torch.randn(2, 3, *model.img_size)
    with torch.no_grad():
        torch.testing.assert_close(
            model.forward_features(images), encoder.eval().forward_features(images), rtol=1e-3, atol=1e-4
        )
    fastmae.MAELoss(model)(images).backward()
    assert encoder.blocks[1].mlp.fc2.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "vit_wee_patch16_reg1_gap_256"])
def test_timm_models_with_more_are_refused(name):
    timm = pytest.importorskip("timm")
    with pytest.raises(UserError, match=r"rope|ls1\.gamma"):
        wrap(timm.create_model(name, depth=1))
