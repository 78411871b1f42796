"""Fine-tuned classifiers are exported whole, and read again they give the same logits."""

import json

import pytest
import torch

from fastmae.checkpoint.load import load_classifier, load_model, open_checkpoint
from fastmae.cli import main
from fastmae.export.encoder import Encoder
from fastmae.model.classifier import Classifier

NAMES = ["cat", "dog", "owl"]


@pytest.fixture(scope="module", params=["mean", "class token"])
def classifier(request, tmp_path_factory):
    """A classifier, and its file as the official script of fine-tuning writes it."""
    torch.manual_seed(0)
    is_pooled = request.param == "mean"
    model = Classifier(
        (16, 16), (4, 4), 3, 128, 4, 4, 3, mean=[0.1] * 3, std=[0.3] * 3, global_pool=is_pooled
    ).eval()  # fmt: skip
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    path = tmp_path_factory.mktemp("classifier") / "checkpoint-9.pth"
    args = {"model": "mae_vit_tiny_patch4", "input_size": 16, "mean": [0.1] * 3, "std": [0.3] * 3, "nb_classes": 3}
    torch.save({"model": model.state_dict(), "args": args | {"class_names": NAMES, "data_path": "/secret"}}, path)
    return model, path


@pytest.fixture
def images():
    return torch.randint(0, 256, (4, 16, 16, 3), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


def refuses_transformers(model, form):
    return form == "hf" and model.global_pool


@pytest.mark.parametrize("form", ["official", "official safetensors", "timm", "hf"])
def test_a_classifier_is_exported_and_read_again_with_the_same_logits(classifier, form, images, tmp_path, capsys):
    model, path = classifier
    output = tmp_path / {"official safetensors": "a.safetensors", "hf": "folder"}.get(form, "a.pth")
    status = main(["export", str(path), "--to", form.split()[0], "--output", str(output)])
    if refuses_transformers(model, form):
        assert status == 2
        assert "has no norm after the mean of the tokens" in capsys.readouterr().err
        return
    assert status == 0
    assert f"{output}: the classifier of 3 classes, as {form.split()[0]} has it" in capsys.readouterr().out
    found = load_classifier(output)
    if form == "timm":  # whose files do not say what pixels are normalised by
        found.mean.copy_(model.mean)
        found.std.copy_(model.std)
    assert torch.equal(found(images), model(images))
    settings = open_checkpoint(output).settings
    assert "data_path" not in settings
    if form == "hf":
        assert json.loads((output / "config.json").read_text())["id2label"] == {"0": "cat", "1": "dog", "2": "owl"}
    elif form != "timm":
        assert list(settings["class_names"]) == NAMES


def test_features_of_a_classifier_are_what_its_head_sees(classifier, images):
    model, path = classifier
    encoder = load_model(path)
    features = encoder.pool_tokens(encoder.forward_features(images), model.pool)
    torch.testing.assert_close(features @ model.head.weight.T + model.head.bias, model(images))


def test_the_program_of_a_classifier_computes_its_logits(classifier, images):
    model, path = classifier
    opened = open_checkpoint(path)
    program = Encoder(opened.model, torch.float32, raw=True, head=opened.head)
    torch.testing.assert_close(program(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_an_exported_program_of_a_classifier_gives_logits(classifier, images, tmp_path, capsys):
    model, path = classifier
    output = tmp_path / "a.pt2"
    assert main(["export", str(path), "--to", "torch-export", "--input", "uint8", "--output", str(output)]) == 0
    assert "the classifier of 3 classes, fp32" in capsys.readouterr().out
    torch.testing.assert_close(torch.export.load(output).module()(images), model(images), rtol=1e-4, atol=1e-5)


def test_the_encoder_alone_is_exported_where_it_is_asked_for(classifier, tmp_path, capsys):
    _, path = classifier
    words = ["--to", "timm", "--part", "encoder", "--output", str(tmp_path / "a.pth")]
    assert main(["export", str(path), *words]) == 0
    assert "the encoder, as timm" in capsys.readouterr().out
    opened = open_checkpoint(tmp_path / "a.pth")
    assert (opened.kind, opened.head) == ("encoder", {})
    words = ["--to", "torch-export", "--check", "digits", "--output", str(tmp_path / "a.pt2")]
    assert main(["export", str(path), *words]) == 2
    assert "--check: compares features; give --part encoder with it" in capsys.readouterr().err
