"""Pictures of reconstructions show what their titles say."""

import numpy as np
import pytest
import torch
from helpers import small_run
from PIL import Image

import fastmae
from fastmae.cli import main
from fastmae.data.loader import View
from fastmae.data.reading import Reading
from fastmae.data.sources import open_train
from fastmae.errors import UserError
from fastmae.evaluate.reconstruct import (
    caption,
    covering_ids,
    error_row,
    fixed_images,
    masks_of_pictures,
    reconstruct,
    reconstruct_complete,
    reconstruct_each,
    save_grid,
    touched,
)
from fastmae.ops import random_masking
from fastmae.train.pretrain import pretrain


@pytest.mark.parametrize("norm_pix", [False, True])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_visible_patches_stay_and_masked_ones_are_grayed_and_predicted(channels, norm_pix):
    torch.manual_seed(0)
    model = fastmae.mae_vit_tiny_patch4(img_size=(8, 16), in_chans=channels, norm_pix_loss=norm_pix).eval()
    images = torch.randint(0, 256, (3, 8, 16, channels), dtype=torch.uint8)
    ids = random_masking(torch.arange(3), 4, 8)
    original, masked, reconstructed = reconstruct(model, images, ids, mask_ratio=0.5)
    visible = torch.zeros(3, 8, dtype=torch.bool).scatter_(1, ids[:, :4].long(), True)
    visible = visible.view(3, 2, 1, 4, 1).expand(3, 2, 4, 4, 4).reshape(3, 8, 16)
    assert torch.equal(original, images)
    assert torch.equal(masked[visible], images[visible])
    assert (masked[~visible].float() - 127.5).abs().max() <= 1
    assert torch.equal(reconstructed[visible], images[visible])
    _, pred, _ = model(images, 0.5, ids_shuffle=ids)
    patch = int(ids[1, 5])  # a masked one of image 1
    target = model.patchify(images.permute(0, 3, 1, 2).float() / 255)[1, patch]
    expected = pred[1, patch] * model.std.repeat(16) + model.mean.repeat(16)
    if norm_pix:
        normalised = (target - model.mean.repeat(16)) / model.std.repeat(16)
        expected = pred[1, patch] * (normalised.var() + 1e-6).sqrt() + normalised.mean()
        expected = expected * model.std.repeat(16) + model.mean.repeat(16)
    got = model.patchify(reconstructed.permute(0, 3, 1, 2))[1, patch]
    assert ((expected * 255).clamp(0, 255) - got).abs().max() <= 0.51


def test_the_grid_is_a_png_that_says_how_it_was_made(tmp_path):
    model = fastmae.mae_vit_tiny_patch4(img_size=16, in_chans=1, norm_pix_loss=True)
    images = fixed_images(model, open_train("digits"), 4)
    assert images.shape == (4, 16, 16, 1)
    path = tmp_path / "deep" / "grid.png"
    ids = random_masking(torch.arange(4), 0, 16)
    save_grid(path, reconstruct(model, images, ids, mask_ratio=0.75), caption(model, 0.75))
    picture = Image.open(path)
    assert picture.format == "PNG"
    assert picture.height > 3 * 90
    assert "norm_pix" in caption(model, 0.75)
    assert "75%" in caption(model, 0.75)
    with pytest.raises(UserError, match="cannot be written"):
        save_grid(path / "under-a-file.png", (images,) * 3, "")


def test_without_pasting_visible_patches_are_predictions_too():
    torch.manual_seed(0)
    model = fastmae.mae_vit_tiny_patch4(img_size=16, in_chans=1).eval()
    images = torch.randint(0, 256, (2, 16, 16, 1), dtype=torch.uint8)
    ids = random_masking(torch.arange(2), 4, 16)
    pasted = reconstruct(model, images, ids, mask_ratio=0.5)[2]
    predicted = reconstruct(model, images, ids, mask_ratio=0.5, paste_visible=False)[2]
    _, pred, _ = model(images, 0.5, ids_shuffle=ids)
    expected = model.unpatchify((pred * model.std + model.mean) * 255).permute(0, 2, 3, 1)
    assert (expected.clamp(0, 255) - predicted).abs().max() <= 0.51
    differs = model.patchify((pasted != predicted).permute(0, 3, 1, 2)).any(dim=2)
    assert differs.gather(1, ids[:, :8].long()).all()
    assert not differs.gather(1, ids[:, 8:].long()).any()


@pytest.mark.parametrize("norm_pix", [False, True])
def test_a_complete_reconstruction_has_each_patch_as_it_is_predicted_while_masked(norm_pix):
    torch.manual_seed(0)
    model = fastmae.mae_vit_tiny_patch4(img_size=(8, 16), in_chans=3, norm_pix_loss=norm_pix).eval()
    images = torch.randint(0, 256, (2, 8, 16, 3), dtype=torch.uint8)
    original, masked, whole = reconstruct_complete(model, images, torch.arange(2), mask_ratio=0.5, rounds=2, seed=3)
    total, count = torch.zeros(2, 8, 48), torch.zeros(2, 8, 1)
    masks = list(covering_ids(torch.arange(2), 2, 3, 8, 4, images.device))
    assert len(masks) == 2 * 2
    for ids in masks:
        _, pred, _ = model(images, 0.5, ids_shuffle=ids)
        for n in range(2):
            for patch in ids[n, 4:].tolist():
                total[n, patch] += pred[n, patch]
                count[n, patch] += 1
    assert (count >= 2).all()
    target = (model.patchify(images.permute(0, 3, 1, 2).float() / 255) - model.mean.repeat(16)) / model.std.repeat(16)
    mean = total / count
    if norm_pix:
        mean = mean * (target.var(dim=2, keepdim=True) + 1e-6).sqrt() + target.mean(dim=2, keepdim=True)
    expected = 255 * (mean * model.std.repeat(16) + model.mean.repeat(16))
    got = model.patchify(whole.permute(0, 3, 1, 2))
    assert (expected.clamp(0, 255) - got).abs().max() <= 0.51
    assert torch.equal(original, images)
    assert torch.equal(masked, reconstruct(model, images, masks[0], mask_ratio=0.5)[1])


def test_masks_of_different_sizes_are_each_images_own():
    torch.manual_seed(0)
    model = fastmae.mae_vit_tiny_patch4(img_size=16, in_chans=1).eval()
    images = torch.randint(0, 256, (3, 16, 16, 1), dtype=torch.uint8)
    masked = np.zeros((3, 4, 4), bool)
    masked[0, 0, 0] = masked[1, 1:3] = True
    masked[2] = True
    masked[2, 3, 3] = False
    original, grayed, reconstructed = reconstruct_each(model, images, masked)
    pixels = torch.from_numpy(masked.repeat(4, axis=1).repeat(4, axis=2))[..., None]
    assert torch.equal(original, images)
    assert torch.equal(grayed[~pixels], images[~pixels])
    assert (grayed[pixels].float() - 127.5).abs().max() <= 1
    assert torch.equal(reconstructed[~pixels], images[~pixels])
    ids = torch.from_numpy(np.argsort(masked[1].reshape(1, -1), axis=1, kind="stable")).int()
    alone = reconstruct(model, images[1:2], ids, mask_ratio=0.5)[2]
    assert torch.equal(reconstructed[1:2], alone)


@pytest.mark.parametrize("shape", [(16, 16), (40, 24), (7, 30), (5, 5)])
def test_a_patch_is_masked_if_white_touches_it(shape):
    """Against the definition: pixel and patch overlap, in the central crop; also where patches end inside pixels."""
    from fastmae.data.plan import central_box

    rng = np.random.default_rng(0)
    view = View((16, 16), Reading(1), central_share=0.875)
    for _ in range(20):
        white = rng.random(shape) < 0.05
        box = central_box(*shape, view.size, view.central_share)
        expected = np.zeros((4, 4), bool)
        for y, x in np.argwhere(white) - (box.top, box.left):
            for row in range(4):
                for column in range(4):
                    down = y < (row + 1) * box.height / 4 and y + 1 > row * box.height / 4
                    across = x < (column + 1) * box.width / 4 and x + 1 > column * box.width / 4
                    is_inside = 0 <= y < box.height and 0 <= x < box.width
                    expected[row, column] |= down and across and is_inside
        assert np.array_equal(touched(white, view, (4, 4)), expected)


def test_errors_are_differences_in_grey_levels():
    first, last = torch.zeros(1, 2, 2, 3, dtype=torch.uint8), torch.zeros(1, 2, 2, 3, dtype=torch.uint8)
    last[0, 0, 0] = torch.tensor([30, 60, 90])
    row, largest = error_row((first, first, last))
    assert largest == 60
    assert row[0, 0, 0].tolist() == [255, 255, 255]
    assert row[0, 1, 1].tolist() == [0, 0, 0]


@pytest.fixture(scope="module")
def finished(blobs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reconstruct") / "run"
    assert pretrain(small_run(blobs, folder, epochs=1)) == 0
    return str(folder)


def test_a_users_own_masks_a_sweep_a_film_and_errors_are_drawn(finished, image_folder, tmp_path):
    photo = str(image_folder / "val" / "n01" / "0.JPEG")
    white = np.zeros((60, 80), np.uint8)
    white[20:40, 30:50] = 255
    Image.fromarray(white).save(tmp_path / "mask.png")
    white[:, :40], white[:, 40:] = 255, 0
    Image.fromarray(white).save(tmp_path / "rest.png")
    one, rest = str(tmp_path / "mask.png"), str(tmp_path / "rest.png")
    model = fastmae.mae_vit_tiny_patch4(img_size=16)
    both = masks_of_pictures([one, rest], model, open_train((photo, photo)), np.array([0, 1]))
    assert both[0, 1:3, 1:3].all()
    assert both[1, :, :2].all()
    assert both.sum(axis=(1, 2)).tolist() == [4, 8]

    def drawn(*words, name="out.png"):
        path = tmp_path / name
        assert main(["reconstruct", finished, "--images", photo, photo, "--output", str(path), *words]) == 0
        return Image.open(path)

    plain = drawn()
    assert drawn("--mask_image", one, rest).height == plain.height == drawn("--mask_image", one).height
    row = (plain.height - 26) // 3
    assert drawn("--errors", "--no_paste_visible").height == plain.height + row
    assert drawn("--sweep", "0.5", "0.75").height == plain.height + 2 * row
    assert drawn("--complete", "2", "--errors").height == plain.height + row
    film = drawn("--sweep", "0.5", "0.75", "0.9", "--errors", name="out.gif")
    assert (film.format, film.n_frames, film.height) == ("GIF", 3, plain.height + row)


WRONG = {
    "mask of another size": (["--mask_image", "{tmp}/small.png"], "10×10 pixels (height × width) for"),
    "mask that is no picture": (["--mask_image", "{tmp}/notes.png"], "cannot be read"),
    "mask that is not there": (["--mask_image", "{tmp}/nowhere.png"], "cannot be read"),
    "mask of nothing": (["--mask_image", "{tmp}/black.png"], "masks 0 of the 16 patches"),
    "mask of everything": (["--mask_image", "{tmp}/white.png"], "masks 16 of the 16 patches"),
    "three masks for two images": (["--mask_image", *["{tmp}/black.png"] * 3], "3 masks for 2 images"),
    "mask and ratio": (["--mask_image", "{tmp}/black.png", "--mask_ratio", "0.5"], "leave --mask_ratio"),
    "sweep and ratio": (["--sweep", "0.5", "--mask_ratio", "0.5"], "--sweep: says how many"),
    "sweep to all": (["--sweep", "0.5", "1.0"], "--sweep 1.0"),
    "sweep that leaves nothing": (["--sweep", "0.99"], "--sweep 0.99"),
    "complete and a mask": (["--complete", "1", "--mask_image", "{tmp}/black.png"], "--complete 1: has masks"),
    "complete and less than none": (["--complete", "-1"], "--complete -1: must be 0 or more"),
    "film of one": (["--output", "{tmp}/a.gif"], "a film is for --sweep"),
    "no images": (["--count", "0"], "--count 0"),
    "images that are no pictures": (
        ["--images", "{tmp}/notes.png", "--mask_image", "{tmp}/black.png"],
        "cannot be used",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line_and_status_2(case, finished, image_folder, tmp_path, refusal):
    for name, shade, side in (("small", 255, 10), ("black", 0, 60), ("white", 255, 60)):
        Image.new("L", (80 if side == 60 else side, side), shade).save(tmp_path / f"{name}.png")
    (tmp_path / "notes.png").write_text("hello")
    words, expected = WRONG[case]
    photo = str(image_folder / "val" / "n01" / "0.JPEG")
    start = ["reconstruct", finished, "--images", photo, photo, "--output", str(tmp_path / "o.png")]
    line = refusal([*start, *[word.format(tmp=tmp_path) for word in words]])
    assert expected in line
    assert not (tmp_path / "o.png").exists()
