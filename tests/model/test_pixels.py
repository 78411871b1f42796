"""Images that do not look like what the models take are told once, or refused; nothing is said of those that do."""

import warnings

import pytest
import torch

from fastmae.model.classifier import classifier_of
from fastmae.model.mae import MaskedAutoencoderViT
from fastmae.model.pixels import check_images


def small_model(in_chans=3):
    return MaskedAutoencoderViT(
        img_size=16, patch_size=8, in_chans=in_chans, embed_dim=16, depth=1, num_heads=2, decoder_embed_dim=16,
        decoder_depth=1, decoder_num_heads=2,
    )  # fmt: skip


def bytes_like(high=255):
    return torch.randint(0, high + 1, (2, 3, 16, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "images", [bytes_like().float(), bytes_like(5).double(), bytes_like().float() / 3, bytes_like() * 200.0 - 1000]
)
def test_float_images_that_are_not_normalised_are_told_once(images):
    model = small_model().to(images.dtype)
    with pytest.warns(UserWarning, match=r"do not look normalised; give \(pixels / 255 - mean\) / std"):
        model(images)
    classifier = classifier_of(small_model(), 2).to(images.dtype)
    with pytest.warns(UserWarning, match="do not look normalised"):
        classifier(images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(images)
        model.forward_features(images)
        classifier(images)


@pytest.mark.parametrize("images", [torch.randn(2, 3, 16, 16) * 3, torch.rand(2, 3, 16, 16), torch.zeros(2, 3, 16, 16)])
def test_nothing_is_said_of_normalised_images(images):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small_model()(images)
        small_model()(bytes_like().permute(0, 2, 3, 1).to(torch.uint8))


def test_whole_numbers_other_than_uint8_are_refused():
    for model in (small_model(), classifier_of(small_model(), 2)):
        with pytest.raises(TypeError, match=r"uint8 .* or float .* not torch\.int64"):
            model(bytes_like())


def test_only_the_first_images_are_looked_at(monkeypatch):
    """A look at the values waits for a GPU."""
    model, looks = small_model(), []
    original = torch.Tensor.aminmax
    monkeypatch.setattr(torch.Tensor, "aminmax", lambda self: (looks.append(1), original(self))[1])
    for _ in range(3):
        model(torch.randn(2, 3, 16, 16))
    assert len(looks) == 1


def test_a_traced_model_has_no_look_in_its_graph():
    model, images = small_model(), bytes_like().float()
    ids = torch.rand(2, 4).argsort(dim=1)
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model.training_loss, backend=keep, fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        compiled(images, ids)
    assert len(graphs) == 1
    assert "aminmax" not in graphs[0].code


def test_images_without_values_do_not_count_as_the_first():
    model = small_model()
    check_images(model, torch.empty(2, 3, 8, 8, device="meta"))
    with pytest.warns(UserWarning, match="do not look normalised"):
        check_images(model, torch.full((2, 3, 8, 8), 255.0))
