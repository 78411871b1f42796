"""Images that do not look like what the models take are told once, or refused; nothing is said of those that do."""

import math
import warnings
from functools import partial

import pytest
import torch

from fastmae.facts import PixelFacts
from fastmae.model.classifier import classifier_of
from fastmae.model.mae import MaskedAutoencoderViT
from fastmae.model.pixels import check_images, normalised
from fastmae.model.reference import ReferenceMAE


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


# --- pixels of three types --------------------------------------------------------------------------------------------

RANGES = {
    "uint16": PixelFacts(dtype="uint16", low=(100.0, -5.0), high=(4000.0, 70_000.0), nodata=7.0),
    "float32": PixelFacts(dtype="float32", low=(-1024.0, 250.0), high=(3071.0, 310.0)),
}


def model_of(pixels, in_chans=2, **settings):
    torch.manual_seed(0)
    return MaskedAutoencoderViT(
        img_size=(16, 24), patch_size=8, in_chans=in_chans, embed_dim=16, depth=1, num_heads=2, decoder_embed_dim=16,
        decoder_depth=1, decoder_num_heads=2, mean=[0.4] * in_chans, std=[0.3] * in_chans, pixels=pixels,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6), **settings,
    )  # fmt: skip


def raw_images(pixels):
    """Images [4, 16, 24, 2] across the range, and where their 6 patches have a missing pixel."""
    generator = torch.Generator().manual_seed(1)
    share = torch.rand(4, 16, 24, 2, generator=generator, dtype=torch.float64)
    low, high = torch.tensor([pixels.low, pixels.high], dtype=torch.float64)
    images = low + share * (high - low)
    images = images.clamp(8, 65535).round().to(torch.uint16) if pixels.dtype == "uint16" else images.float()
    missing = torch.zeros(4, 6, dtype=torch.bool)
    for n, y, x, patch in ((0, 1, 20, 2), (2, 15, 0, 3), (3, 8, 8, 4)):
        images[n, y, x, n % 2] = 7 if pixels.dtype == "uint16" else math.nan
        missing[n, patch] = True
    return images, missing


@pytest.mark.parametrize("norm_pix_loss", [False, True])
@pytest.mark.parametrize("dtype", RANGES)
def test_loss_and_gradients_of_wide_pixels_are_those_of_the_reference(dtype, norm_pix_loss):
    """No further from float64 than the reference in float32, plus roundings; it gets no patch with missing pixels."""
    pixels = RANGES[dtype]
    images, missing = raw_images(pixels)
    ids = torch.rand(4, 6, generator=torch.Generator().manual_seed(2)).argsort(dim=1)
    ours = model_of(pixels, norm_pix_loss=norm_pix_loss)
    low, high = torch.tensor([pixels.low, pixels.high], dtype=torch.float64)
    floats = ((images.double() - low) / (high - low) - 0.4) / 0.3
    absent = (images.double() == 7) | images.double().isnan()
    floats = floats.masked_fill(absent, 0).permute(0, 3, 1, 2)

    def by_reference(compute):
        model = ReferenceMAE((16, 24), (8, 8), 2, 16, 1, 2, 16, 1, 2, norm_pix_loss=norm_pix_loss).to(compute)
        model.load_state_dict(ours.state_dict())
        _, pred, mask = model(floats.to(compute), ids, 0.5)
        target = model.patchify(floats.to(compute))
        if norm_pix_loss:
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        mask = mask.masked_fill(missing, 0)
        loss = ((pred - target).square().mean(-1) * mask).sum() / mask.sum()
        loss.backward()
        return loss.detach(), {name: one.grad for name, one in model.named_parameters() if one.grad is not None}

    (truth, true_gradients), (same, same_gradients) = by_reference(torch.float64), by_reference(torch.float32)
    loss = ours.training_loss(images, ids, 0.5)
    loss.backward()
    assert abs(loss.double() - truth) <= abs(same - truth) + 1e-6 * truth
    torch.testing.assert_close(ours(images, 0.5, ids_shuffle=ids)[0], loss)
    whole = torch.stack([one.norm() for one in true_gradients.values()]).norm()
    for name, one in ours.named_parameters():
        if name in true_gradients:
            allowed = (same_gradients[name] - true_gradients[name]).norm() + 2e-6 * (
                true_gradients[name].norm() + whole
            )
            assert (one.grad - true_gradients[name]).norm() <= allowed, name


@pytest.mark.parametrize("dtype", RANGES)
def test_wide_pixels_are_the_same_in_every_form_and_way(dtype):
    pixels = RANGES[dtype]
    images, missing = raw_images(pixels)
    ids = torch.rand(4, 6, generator=torch.Generator().manual_seed(2)).argsort(dim=1)
    model = model_of(pixels)
    assert not {"value_range", "mean", "std"} & model.state_dict().keys()
    floats = normalised(model, images)
    assert floats.isfinite().all()
    torch.testing.assert_close(model.forward_features(images), model.forward_features(floats))
    classifier = classifier_of(model, 3)
    classifier.head.weight.data.normal_()
    torch.testing.assert_close(classifier(images), classifier(floats))
    whole = torch.ones(4, 6)
    pred = torch.randn(4, 6, 128)
    loss = model.forward_loss(images, pred, whole)
    torch.testing.assert_close(loss, model.forward_loss(floats, pred, whole.masked_fill(missing, 0)))
    assert model.forward_loss(images, pred, missing.float()) == 0

    class OtherLoss(MaskedAutoencoderViT):
        def forward_loss(self, imgs, pred, mask):
            return 2 * super().forward_loss(imgs, pred, mask)

    expected = model.training_loss(images, ids, 0.5)
    if dtype == "float32":
        compiled = torch.compile(model.training_loss, backend="eager", fullgraph=True)
        assert torch.equal(compiled(images, ids, 0.5), expected)
    model.__class__ = OtherLoss
    model.find_overrides()
    torch.testing.assert_close(model.training_loss(images, ids, 0.5), 2 * expected)


def test_casting_a_model_leaves_its_range():
    pixels = PixelFacts(dtype="float32", low=(273.15,), high=(280.0,))
    model = model_of(pixels, in_chans=1).bfloat16()
    assert model.value_range.tolist() == torch.tensor([[273.15], [280.0]]).tolist()
    assert classifier_of(model, 2).half().value_range.dtype == torch.float32


def test_float_pixels_are_told_from_normalised_images_by_their_shape():
    square = MaskedAutoencoderViT(
        img_size=16, patch_size=8, in_chans=16, embed_dim=16, depth=1, num_heads=2, decoder_embed_dim=16,
        decoder_depth=1, decoder_num_heads=2, pixels=PixelFacts(dtype="float32"),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"may be pixels \[N, H, W, C\] or normalised \[N, C, H, W\]"):
        square(torch.zeros(2, 16, 16, 16))
    model = model_of(RANGES["float32"])
    with pytest.raises(ValueError, match=r"float images .* must have shape"):
        model(torch.zeros(2, 16, 24, 3))


def test_pixels_of_another_type_are_refused():
    wide, narrow = model_of(RANGES["uint16"]), model_of(PixelFacts())
    with pytest.raises(TypeError, match=r"must be uint16 \[N, H, W, C\], or float .*, not torch.uint8"):
        wide(torch.zeros(2, 16, 24, 2, dtype=torch.uint8))
    with pytest.raises(TypeError, match=r"must be uint8 .* not torch.uint16"):
        narrow(torch.zeros(2, 16, 24, 2, dtype=torch.uint16))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (dict(low=(0.0,)), "low needs 2 numbers"),
        (dict(low=(0.0, 300.0)), "low must be below high, both finite float32 numbers, got 300 and 255"),
        (dict(high=(math.inf, 1.0)), "both finite"),
        (dict(low=(1e9, 0.0), high=(1e9 + 1, 1.0)), r"got 1e\+09 and 1e\+09"),
        (dict(low=(math.nan, 1.0)), "low must be below high"),
    ],
)
def test_a_wrong_range_is_refused_in_one_line(wrong, words):
    with pytest.raises(ValueError, match=words) as caught:
        model_of(PixelFacts(**wrong))
    assert "\n" not in str(caught.value)
