"""Encoders of ConvNeXt V2 in other tools: what they compute is what fastmae computes, read again the same bits."""

import pytest
import torch

from fastmae.checkpoint.load import open_checkpoint
from fastmae.cli import main
from fastmae.export.convnext import save_transformers_convnext
from fastmae.export.encoder import Encoder
from fastmae.export.program import opened_program, save_program
from fastmae.model.convnext import ConvNeXtMAE
from fastmae.model.sizes import CONVNEXT_SIZES

SMALL = dict(depths=(1, 1, 1, 1), dims=(8, 12, 16, 20), decoder_embed_dim=16)
ATTO = CONVNEXT_SIZES["mae_convnextv2_atto"]


def made(**sizes):
    """GRN and biases begin at zero, where mistakes could hide."""
    torch.manual_seed(0)
    model = ConvNeXtMAE((64, 96), 3, mean=[0.4] * 3, std=[0.2] * 3, **sizes)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


def encoder_of(model):
    return {name: t for name, t in model.state_dict().items() if not name.startswith(("decoder_", "mask_token"))}


@pytest.fixture(scope="module")
def small():
    return made(**SMALL)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint in the published form."""
    model = made(**ATTO)
    path = tmp_path_factory.mktemp("convnext") / "checkpoint-3.pth"
    args = {"model": "mae_convnextv2_atto", "input_size": [64, 96], "in_chans": 3}
    torch.save({"model": model.state_dict(), "args": {**args, "mean": [0.4] * 3, "std": [0.2] * 3}}, path)
    return model, path


def test_transformers_opens_every_weight_and_gives_the_same_features(small, tmp_path):
    from transformers import ConvNextV2Model

    save_transformers_convnext(tmp_path / "folder", small)
    theirs, report = ConvNextV2Model.from_pretrained(tmp_path / "folder", output_loading_info=True)
    assert not [names for names in report.values() if names]
    images = torch.randn(3, 3, 64, 96)
    with torch.no_grad():
        found = theirs.eval()(pixel_values=images)
        torch.testing.assert_close(found.pooler_output, small.features(images), rtol=0, atol=1e-5)
        tokens = found.last_hidden_state.flatten(2).mT
        torch.testing.assert_close(tokens, small.forward_features(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["official", "timm", "hf"])
def test_what_is_exported_and_read_again_is_the_same_bits(trained, form, tmp_path):
    model, path = trained
    output = tmp_path / {"hf": "folder", "timm": "a.safetensors"}.get(form, "a.pth")
    assert main(["export", str(path), "--to", form, "--output", str(output)]) == 0
    opened = open_checkpoint(str(output))
    assert isinstance(opened.model, ConvNeXtMAE)
    assert opened.has_decoder == (form == "official")
    found = opened.model.state_dict()
    wanted = model.state_dict() if form == "official" else encoder_of(model)
    for name, tensor in wanted.items():
        if form != "timm" or name not in ("mean", "std"):  # whose files are weights and no more
            assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("raw", [False, True])
def test_torchs_own_operations_give_the_same_positions(small, raw):
    images = torch.randint(0, 256, (2, 64, 96, 3), dtype=torch.uint8) if raw else torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        found = Encoder(small, torch.float32, raw)(images)
        torch.testing.assert_close(found, small.forward_features(images), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_program_gives_the_same_positions_for_any_number_of_images(small, tmp_path):
    save_program(tmp_path / "a.pt2", small, "fp32", False)
    encode = opened_program(tmp_path / "a.pt2")
    for count in (1, 2, 5):
        images = torch.randn(count, 3, 64, 96)
        with torch.no_grad():
            torch.testing.assert_close(encode(images), small.forward_features(images), rtol=1e-5, atol=1e-5)


def test_a_file_of_timm_says_what_is_wrong_with_it_in_one_line(trained, tmp_path, capsys):
    _, path = trained
    content = torch.load(path, weights_only=True)
    content["model"].pop("stages.0.blocks.1.conv_dw.weight")
    torch.save(content, tmp_path / "a.pth")
    assert main(["features", str(tmp_path / "a.pth"), "--data_path", "digits", "--device", "cpu"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
