"""Holes are filled with predictions, and every other pixel keeps its bits."""

import numpy as np
import pytest
import torch
from PIL import Image

import fastmae
from fastmae.cli import main
from fastmae.errors import UserError
from fastmae.evaluate.inpaint import Inpainting, _continued, inpaint_picture
from fastmae.facts import PixelFacts
from fastmae.model.pixels import register_pixels

HOW = Inpainting(0.75, rounds=2)


def a_model(dtype="uint8", channels=3, **given):
    torch.manual_seed(0)
    model = fastmae.mae_vit_tiny_patch4(img_size=16, in_chans=channels, depth=1, decoder_depth=1, **given)
    ends = ((0.0,) * channels, (1000.0,) * channels) if dtype == "float32" else ((), ())
    mean, std = model.mean.tolist(), model.std.tolist()
    register_pixels(model, channels, mean, std, PixelFacts(dtype=dtype, low=ends[0], high=ends[1]))
    return model.eval()


def a_picture(dtype="uint8", channels=3, size=(37, 29)):
    rng = np.random.default_rng(1)
    return (rng.random((*size, channels)) * (255 if dtype == "uint8" else 1000)).astype(dtype)


def a_hole(size=(37, 29)):
    hole = np.zeros(size, bool)
    hole[10:15, 8:20] = hole[30:, 25:] = True
    return hole


@pytest.mark.parametrize("norm_pix", [False, True])
@pytest.mark.parametrize(("dtype", "channels"), [("uint8", 3), ("uint16", 1), ("float32", 5)])
def test_visible_pixels_keep_their_bits_at_any_depth(dtype, channels, norm_pix):
    model, picture, hole = a_model(dtype, channels, norm_pix_loss=norm_pix), a_picture(dtype, channels), a_hole()
    if dtype == "float32":
        picture[0, 0, 0] = np.nan
    filled = inpaint_picture(model, picture, hole, HOW)
    assert filled.dtype == picture.dtype
    assert filled[~hole].tobytes() == picture[~hole].tobytes()
    assert np.isfinite(filled[hole]).all()
    assert (filled[hole] != picture[hole]).mean() > 0.9


def test_what_the_picture_has_in_a_hole_is_not_looked_at():
    model, picture, hole = a_model(norm_pix_loss=True), a_picture(), a_hole()
    other = picture.copy()
    other[hole] = 255 - other[hole]
    assert np.array_equal(inpaint_picture(model, picture, hole, HOW), inpaint_picture(model, other, hole, HOW))


def test_one_tile_gets_the_predictions_of_the_model():
    model, picture = a_model(), a_picture(size=(16, 16))
    hole = np.zeros((16, 16), bool)
    hole[:, 4:] = True  # of 16 patches 4 are visible, as in training: no other patch is hidden
    filled = inpaint_picture(model, picture, hole, Inpainting(0.75, rounds=1))
    hidden = torch.from_numpy(hole[::4, ::4].reshape(1, -1))
    ids = hidden.int().argsort(dim=1, stable=True).int()
    with torch.no_grad():
        pred = model.predict(torch.from_numpy(picture)[None], ids, 0.75)
    expected = model.unpatchify(pred)[0] * model.std[:, None, None] + model.mean[:, None, None]
    expected = (expected.permute(1, 2, 0) * 255).round().clamp(0, 255).numpy()
    assert np.abs(filled[hole].astype(int) - expected[hole]).max() <= 1


def test_a_picture_smaller_than_a_tile_is_filled_and_keeps_its_size():
    hole = np.zeros((9, 13), bool)
    hole[2:4, 3:6] = True
    filled = inpaint_picture(a_model(), picture := a_picture(size=(9, 13)), hole, HOW)
    assert filled.shape == picture.shape
    assert np.array_equal(filled[~hole], picture[~hole])


def test_a_hole_that_hides_a_tile_is_told():
    hole = np.ones((40, 40), bool)
    hole[0] = False
    with pytest.raises(UserError, match="leaves nothing visible of the 16×16 tile at row"):
        inpaint_picture(a_model(), a_picture(size=(40, 40)), hole, HOW)


def test_unknown_statistics_go_on_from_their_neighbours():
    values = np.tile(np.arange(5.0), (5, 1))
    known = np.ones((5, 5), bool)
    known[2, 2] = known[1, 2] = False
    assert np.abs(_continued(np.where(known, values, 99), known) - values).max() < 1e-6


def test_files_of_every_format_keep_visible_pixels(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fastmae.commands.inpaint.open_checkpoint", lambda *_: Opened)
    np.save(tmp_path / "mask.npy", a_hole())
    for dtype, channels, read, write in [
        ("uint8", 3, "a.png", "b.tif"), ("uint8", 1, "a.png", "b.png"), ("uint16", 1, "a.png", "b.png"),
        ("float32", 1, "a.tif", "b.tif"), ("float32", 5, "a.npy", "b.npy"),
    ]:  # fmt: skip
        Opened.model = a_model(dtype, channels)
        picture = a_picture(dtype, channels)
        picture = picture[..., 0] if channels == 1 else picture
        np.save(tmp_path / read, picture) if read.endswith("npy") else Image.fromarray(picture).save(tmp_path / read)
        words = ["inpaint", "run", str(tmp_path / read), "--mask", str(tmp_path / "mask.npy"), "--device", "cpu"]
        assert main([*words, "--output", str(tmp_path / write)]) == 0, capsys.readouterr().err
        path = tmp_path / write
        filled = np.load(path) if write.endswith("npy") else np.asarray(Image.open(path))
        assert (filled.dtype, filled.shape) == (picture.dtype, picture.shape)
        assert filled[~a_hole()].tobytes() == picture[~a_hole()].tobytes()


class Opened:
    has_decoder = True
    model = None


@pytest.mark.parametrize(
    ("image", "mask", "output", "said"),
    [
        ("a.png", "mask.npy", "b.jpg", "other formats would change visible pixels"),
        ("no.png", "mask.npy", "b.png", "cannot be read"),
        ("a.png", "none.npy", "b.png", "has no pixel that is not zero"),
        ("a.png", "small.npy", "b.png", "is of 3×3 pixels for a picture of 37×29"),
        ("wide.npy", "mask.npy", "b.npy", "wide.npy: cannot be used"),
        ("alpha.png", "mask.npy", "b.png", "has the mode RGBA"),
    ],
)
def test_wrong_input_is_one_line(image, mask, output, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fastmae.commands.inpaint.open_checkpoint", lambda *_: Opened)
    monkeypatch.chdir(tmp_path)
    Opened.model = a_model()
    Image.fromarray(a_picture()).save("a.png")
    Image.fromarray(a_picture(channels=4)).save("alpha.png")
    np.save("wide.npy", a_picture("float32"))
    np.save("mask.npy", a_hole())
    np.save("none.npy", np.zeros((37, 29)))
    np.save("small.npy", np.ones((3, 3)))
    assert main(["inpaint", "run", image, "--mask", mask, "--output", output, "--device", "cpu"]) == 2
    err = capsys.readouterr().err.strip()
    assert said in err
    assert "\n" not in err


def test_in_python_the_array_comes_back_filled():
    model, picture, hole = a_model().train(), a_picture(), a_hole()
    filled = fastmae.inpaint(model, picture, hole, rounds=2)
    assert model.training
    assert np.array_equal(filled, inpaint_picture(model.eval(), picture, hole, HOW))
    with pytest.raises(UserError, match="must be uint8"):
        fastmae.inpaint(model, picture[..., :1], hole)
