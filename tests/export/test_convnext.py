"""Encoders of ConvNeXt V2 in other tools: what they compute is what fastmae computes, read again the same bits."""

import copy

import pytest
import torch

from fastmae.checkpoint.load import load_classifier, open_checkpoint
from fastmae.cli import main
from fastmae.export.convnext import save_transformers_convnext
from fastmae.export.encoder import Encoder
from fastmae.export.onnx import opened_onnx, save_onnx
from fastmae.export.program import opened_program, save_program
from fastmae.model.convnext import ConvNeXtMAE
from fastmae.model.convnext_classifier import convnext_classifier_of
from fastmae.model.sizes import CONVNEXT_SIZES

SMALL = dict(depths=(1, 1, 1, 1), dims=(8, 12, 16, 20), decoder_embed_dim=16)
NAMES = ["cat", "dog", "owl"]
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


@pytest.mark.slow
def test_onnx_gives_the_same_positions_for_any_number_of_images(small, tmp_path):
    save_onnx(tmp_path / "a.onnx", small, "fp32", True)
    encode = opened_onnx(tmp_path / "a.onnx")
    for count in (1, 3):
        images = torch.randint(0, 256, (count, 64, 96, 3), dtype=torch.uint8)
        with torch.no_grad():
            torch.testing.assert_close(encode(images), small.forward_features(images), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_command_compares_a_program_with_the_model(trained, image_folder, tmp_path, capsys):
    _, path = trained
    words = ["export", str(path), "--to", "onnx", "--output", str(tmp_path / "a.onnx"), "--check", str(image_folder)]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "k-NN" in said
    assert "images/s" in said


# --- classifiers ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A fine-tuned classifier, and its file as fine-tuning writes it."""
    torch.manual_seed(0)
    model = convnext_classifier_of(made(**ATTO), 3).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    path = tmp_path_factory.mktemp("classifier") / "checkpoint-9.pth"
    args = {"model": "mae_convnextv2_atto", "input_size": [64, 96], "in_chans": 3, "nb_classes": 3}
    args |= {"mean": [0.4] * 3, "std": [0.2] * 3, "class_names": NAMES, "data_path": "/secret"}
    torch.save({"model": model.state_dict(), "args": args}, path)
    return model, path


@pytest.mark.parametrize("form", ["official", "timm", "hf"])
def test_a_classifier_is_exported_and_read_again_with_the_same_logits(classifier, form, tmp_path, capsys):
    model, path = classifier
    output = tmp_path / {"hf": "folder", "timm": "a.safetensors"}.get(form, "a.pth")
    assert main(["export", str(path), "--to", form, "--output", str(output)]) == 0
    assert f"{output}: the classifier of 3 classes, as {form} has it" in capsys.readouterr().out
    found = load_classifier(output)
    if form == "timm":  # whose files do not say the size of images, nor what normalises them
        weights = found.state_dict()
        found = copy.deepcopy(model)
        for parameter in found.parameters():
            parameter.data.zero_()
        found.load_state_dict(weights)
    pixels = torch.randint(0, 256, (4, 64, 96, 3), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(found(pixels), model(pixels))
    if form == "hf":
        from transformers import ConvNextV2ForImageClassification

        theirs = ConvNextV2ForImageClassification.from_pretrained(output).eval()
        images = torch.randn(4, 3, 64, 96)
        with torch.no_grad():
            torch.testing.assert_close(theirs(images).logits, model(images), rtol=1e-4, atol=1e-4)
        assert theirs.config.id2label == {0: "cat", 1: "dog", 2: "owl"}


@pytest.mark.slow
def test_onnx_of_a_classifier_gives_its_logits(classifier, tmp_path):
    model, path = classifier
    assert main(["export", str(path), "--to", "onnx", "--output", str(tmp_path / "a.onnx"), "--input", "uint8"]) == 0
    images = torch.randint(0, 256, (2, 64, 96, 3), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(opened_onnx(tmp_path / "a.onnx")(images), model(images), rtol=1e-4, atol=1e-4)


def test_a_file_of_timm_says_what_is_wrong_with_it_in_one_line(trained, tmp_path, capsys):
    _, path = trained
    content = torch.load(path, weights_only=True)
    content["model"].pop("stages.0.blocks.1.conv_dw.weight")
    torch.save(content, tmp_path / "a.pth")
    assert main(["features", str(tmp_path / "a.pth"), "--data_path", "digits", "--device", "cpu"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
