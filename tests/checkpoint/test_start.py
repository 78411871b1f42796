"""Beginning with the encoder of a file: which weights a model then has, and what is refused."""

import pytest
import torch

from fastmae.checkpoint.start import begin_with, for_channels, normalised_alike, open_start
from fastmae.config import PretrainConfig
from fastmae.errors import SettingError, UserError
from fastmae.facts import DataFacts
from fastmae.model.mae import MaskedAutoencoderViT
from fastmae.model.presets import mae_vit_tiny_patch4


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    model = mae_vit_tiny_patch4(img_size=16).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn_like(parameter)
    return model


@pytest.fixture
def saved(tmp_path):
    """A function that saves the encoder's weights with changes, and returns the path."""

    def save(model, **changes):
        weights = {n: t for n, t in model.state_dict().items() if not n.startswith(("decoder_", "mask_token"))}
        weights = {name: t for name, t in (weights | changes).items() if t is not None}
        torch.save(weights, tmp_path / "encoder.pth")
        return str(tmp_path / "encoder.pth")

    return save


def begun(path, model=None, *, fixed_positions=False, **given):
    """The model of a pretraining that begins with a file, and the account."""
    flags, start = open_start(PretrainConfig(init=path, **given))
    if model is None:
        model = mae_vit_tiny_patch4(img_size=flags.input_size)
    return model, begin_with(model, start, path, fixed_positions=fixed_positions)


def test_the_encoder_is_that_of_the_file_and_the_decoder_a_fresh_one(encoder, saved):
    images = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    torch.manual_seed(5)
    fresh = mae_vit_tiny_patch4(img_size=16)
    torch.manual_seed(5)
    path = saved(encoder)
    model, account = begun(path, mae_vit_tiny_patch4(img_size=16))
    assert torch.equal(model.forward_features(images), encoder.forward_features(images))
    own = model.state_dict()
    for name, tensor in fresh.state_dict().items():
        if name.startswith(("decoder_", "mask_token")):
            assert torch.equal(own[name], tensor), name
    assert account == [f"start           {path}: 54 tensors of its encoder, and 32 of a fresh decoder"]


def test_a_file_decides_the_shape_where_it_is_not_given(encoder, saved):
    path = saved(encoder)
    flags, _ = open_start(PretrainConfig(init=path))
    assert (flags.model, flags.input_size, flags.patch_size) == ("mae_vit_tiny_patch4", (16, 16), (4, 4))
    assert open_start(PretrainConfig(init=path, input_size=(24, 16)))[0].input_size == (24, 16)


def test_learnt_positions_are_interpolated_for_another_size(encoder, saved):
    learnt = torch.randn(1, 17, 128)
    path = saved(encoder, pos_embed=learnt)
    model, account = begun(path, input_size=(24, 16))
    assert torch.equal(model.pos_embed[:, 0], learnt[:, 0])
    assert model.pos_embed.shape == (1, 1 + 24, 128)
    assert "positions interpolated 4×4 → 6×4" in " ".join(account)
    same, _ = begun(path)
    assert torch.equal(same.pos_embed, learnt)


def test_learnt_positions_are_refused_for_growing_crops(encoder, saved):
    path = saved(encoder, pos_embed=torch.randn(1, 17, 128))
    with pytest.raises(SettingError, match="learnt, which growing crops cannot take"):
        begun(path, fixed_positions=True)
    begun(saved(encoder), fixed_positions=True)
    with pytest.raises(SettingError, match="its positions are of another size, which growing crops cannot take"):
        begun(saved(encoder), fixed_positions=True, input_size=(24, 24))


@pytest.mark.parametrize(("of", "to"), [(3, 1), (3, 2), (3, 4), (3, 9), (1, 3), (4, 3)])
def test_an_image_that_is_alike_on_all_channels_gives_the_same_tokens(of, to):
    weight = torch.randn(8, of, 4, 4, dtype=torch.float64)
    gray = torch.randn(1, 1, 4, 4, dtype=torch.float64)

    def tokens(weight):
        return torch.nn.functional.conv2d(gray.expand(1, weight.shape[1], 4, 4), weight)

    made = for_channels(weight, to)
    assert made.shape == (8, to, 4, 4)
    torch.testing.assert_close(tokens(made), tokens(weight))


def test_a_model_of_other_channels_says_so(encoder, saved):
    model, account = begun(saved(encoder), mae_vit_tiny_patch4(img_size=16, in_chans=1))
    assert torch.equal(model.patch_embed.proj.weight, encoder.patch_embed.proj.weight.sum(1, keepdim=True))
    assert "the patch projection made of 3 channels one of 1" in " ".join(account)


def test_the_encoder_of_a_classifier_has_a_fresh_last_norm(encoder, saved):
    pooled = {
        "fc_norm.weight": torch.rand(128),
        "fc_norm.bias": torch.rand(128),
        "norm.weight": None,
        "norm.bias": None,
    }
    head = {"head.weight": torch.zeros(10, 128), "head.bias": torch.zeros(10)}
    model, account = begun(saved(encoder, **pooled, **head))
    assert bool((model.norm.weight == 1).all())
    said = " ".join(account)
    assert "52 tensors" in said
    assert "norm.bias and norm.weight fresh" in said
    assert "not used: fc_norm.bias, fc_norm.weight" in said


def test_another_shape_is_refused_by_name(encoder, saved):
    path = saved(encoder)
    with pytest.raises(SettingError, match=r"its patches have 4×4 pixels, not 8×8; leave patch_size out"):
        begun(path, mae_vit_tiny_patch4(img_size=16, patch_size=8))
    for name, shape in (("deeper", {"depth": 5}), ("less deep", {"depth": 3}), ("width", {"embed_dim": 64})):
        sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 128, "depth": 4, "num_heads": 4, "decoder_depth": 1}
        with pytest.raises(SettingError, match="leave the model's sizes out"):
            begun(path, MaskedAutoencoderViT(**(sizes | shape))), name


def test_mean_and_std_are_those_that_the_file_says(encoder, tmp_path):
    weights = encoder.state_dict()
    args = {"model": "mae_vit_tiny_patch4", "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    torch.save({"model": weights, "args": args}, tmp_path / "a.pth")
    colour, gray = (DataFacts(kind="folder", length=1, channels=c, size=None, labelled=False) for c in (3, 1))
    flags, start = open_start(PretrainConfig(init=str(tmp_path / "a.pth")))
    assert normalised_alike(flags, start, colour).mean == (0.1, 0.2, 0.3)
    assert normalised_alike(flags, start, gray).mean is None
    given = PretrainConfig(init=str(tmp_path / "a.pth"), mean=(0.5, 0.5, 0.5), std=(1.0, 1.0, 1.0))
    assert normalised_alike(given, start, colour).mean == (0.5, 0.5, 0.5)
    other = mae_vit_tiny_patch4(img_size=28, mean=given.mean, std=[0.4, 0.5, 0.6])
    assert "trained with mean other than this run's" in " ".join(begin_with(other, start, "a", fixed_positions=False))


def test_a_missing_file_is_named():
    with pytest.raises(UserError, match="no such checkpoint"):
        open_start(PretrainConfig(init="nowhere.pth"))
