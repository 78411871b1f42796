"""Objects of Python as data: they are read by the rules of files, and what cannot be meant is told in one line."""

import contextlib
import io
import os
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils import data as torch_data

from fastmae.data.decode import decode
from fastmae.data.fingerprint import difference, fingerprint
from fastmae.data.objects import as_source, given_parts, is_paths
from fastmae.data.plan import Shards
from fastmae.data.reading import Reading
from fastmae.data.sources import open_train, train_and_val
from fastmae.errors import UserError
from fastmae.facts import PixelFacts
from fastmae.model.presets import mae_vit_tiny_patch4

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (12, 5, 7, 3), dtype=np.uint8)


class Items(torch_data.Dataset):
    """A Dataset that makes sample ``i`` by a function."""

    def __init__(self, length, make, **attributes):
        self.length, self.make = length, make
        vars(self).update(attributes)

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if index >= self.length:
            raise IndexError(index)
        return self.make(index)


def pictures(**attributes):
    return Items(len(COLOUR), lambda i: (Image.fromarray(COLOUR[i]), i % 3), **attributes)


def encoded(image, format="PNG"):
    file = io.BytesIO()
    image.save(file, format)
    return file.getvalue()


# --- pixels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_of_pillow_is_what_its_png_is(mode, channels):
    wide = Image.fromarray(RNG.integers(0, 65536, (9, 8), dtype=np.uint16))
    image = wide if mode == "I;16" else Image.fromarray(COLOUR[0]).convert(mode)
    source = as_source(Items(2, lambda i: image))
    reading = Reading(channels, dtype="uint16" if mode == "I;16" else "uint8")
    expected = decode(encoded(image), reading)
    np.testing.assert_array_equal(decode(source.read(1), reading), expected)
    assert source.kind == "folder"


def test_an_image_that_is_opened_and_not_decoded_is_the_bytes_of_its_file(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(COLOUR[0]).save(path)
    assert as_source(Items(1, lambda i: Image.open(path))).read(0) == path.read_bytes()


def channels_first(array):
    return torch.from_numpy(array).permute(2, 0, 1)


@pytest.mark.parametrize(
    ("make", "notes"),
    [
        (lambda i: COLOUR[i], 0),
        (lambda i: torch.from_numpy(COLOUR[i]), 0),
        (lambda i: channels_first(COLOUR[i]), 0),
        (lambda i: COLOUR[i].transpose(2, 0, 1), 0),
        (lambda i: channels_first(COLOUR[i]).float().div(255), 1),
        (lambda i: channels_first(COLOUR[i]) * np.float32(1 / 255), 1),
        (lambda i: COLOUR[i] / 255, 1),
        (lambda i: (channels_first(COLOUR[i]), torch.tensor(1)), 1),
        (lambda i: {"image": COLOUR[i], "id": 7}, 0),
    ],
)
def test_tensors_of_either_layout_and_floats_of_to_tensor_are_the_same_pixels(make, notes):
    source = as_source(Items(len(COLOUR), make))
    for index in range(len(COLOUR)):
        pixels = source.read(index)
        assert pixels.dtype == np.uint8
        np.testing.assert_array_equal(pixels, COLOUR[index])
    assert source.kind == "array"
    assert source.shapes == {(5, 7, 3)}
    told = [note for note in source.stock.notes if "one at a time" not in note]
    assert len(told) == notes


def test_gray_tensors_gain_a_channel():
    assert as_source(Items(2, lambda i: torch.zeros(4, 5))).read(0).shape == (4, 5, 1)
    assert as_source(Items(2, lambda i: torch.zeros(1, 4, 5))).read(0).shape == (4, 5, 1)


def test_other_floats_stay_floats_and_normalised_ones_are_told():
    normalised = torch.randn(4, 3, 8, 8)
    source = as_source(Items(4, lambda i: normalised[i]))
    np.testing.assert_array_equal(source.read(2), normalised[2].permute(1, 2, 0).numpy())
    assert "seem to be normalised already" in source.stock.notes[0]
    halves = as_source(Items(4, lambda i: np.full((8, 8, 3), 0.3 + i / 7, np.float32)))
    assert halves.read(0).dtype == np.float32
    assert len(halves.stock.notes) == 1  # that samples are read one at a time


def test_a_float_image_unlike_the_others_is_refused_and_not_rounded():
    values = np.full((100, 8, 8, 3), 51 / 255, np.float32)
    values[2] = 0.3  # which is not among those that are looked at
    source = as_source(Items(100, lambda i: values[i]))
    assert source.read(0).max() == 51
    with pytest.raises(OSError, match="no k/255"):
        source.read(2)


@pytest.mark.parametrize(
    ("shape", "layout", "read"),
    [((6, 8, 8), "chw", (8, 8, 6)), ((6, 8, 9), "hwc", (6, 8, 9)), ((3, 3, 3), "auto", None)],
)
def test_axes_that_tell_nothing_are_asked_for(shape, layout, read):
    data = Items(2, lambda i: np.zeros(shape, np.uint8))
    with pytest.raises(UserError, match=r"layout: images have shape .* set it to chw or to hwc"):
        as_source(data)
    if read:
        assert as_source(data, layout=layout).read(0).shape == read


def test_an_array_is_what_its_file_is(tmp_path):
    np.save(tmp_path / "a.npy", COLOUR)
    of_file = open_train(str(tmp_path / "a.npy"))
    for data in (COLOUR, torch.from_numpy(COLOUR), torch.from_numpy(COLOUR).permute(0, 3, 1, 2).float() / 255):
        source = as_source(data)
        np.testing.assert_array_equal(source.read(3), of_file.read(3))
        assert difference(fingerprint(source), fingerprint(of_file)) is None
    with_labels = as_source((COLOUR, np.arange(12)))
    assert with_labels.labels.tolist() == list(range(12))


def test_a_list_of_image_files_is_read_as_files_and_folders_are_paths(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path, pixels in zip(paths, COLOUR, strict=False):
        Image.fromarray(pixels).save(path)
    assert not is_paths(paths)
    assert as_source(paths).read(2) == paths[2].read_bytes()
    assert is_paths([tmp_path, paths[0]])
    assert given_parts(tmp_path) is None
    mixed = as_source([str(paths[0]), Image.fromarray(COLOUR[1]), COLOUR[2], paths[0].read_bytes()])
    pixels = [decode(mixed.read(i), Reading(3)) for i in range(4)]
    for found, expected in zip(pixels, COLOUR[[0, 1, 2, 0]], strict=True):
        np.testing.assert_array_equal(found, expected)


# --- what cannot be meant ---------------------------------------------------------------------------------------------


class Stream(torch_data.IterableDataset):
    def __iter__(self):
        yield Image.fromarray(COLOUR[0])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (Stream(), "gives images in its own order alone.*fastmae pack"),
        ((image for image in COLOUR), "gives images in its own order alone"),
        (torch_data.DataLoader(COLOUR), "is a DataLoader; give its dataset"),
        ([], "list holds no images"),
        (7, "is of type int, which is no data set"),
        (Items(3, lambda i: {"id": 7}), "a sample is a dict of id; call the image `image`"),
        (Items(3, lambda i: 1 / 0), r"none of 3 samples .* Dataset Items\[0\] \(ZeroDivisionError: division by zero\)"),
        (Items(3, lambda i: "no such file.png"), "none of 3 samples .*No such file"),
        (Items(3, lambda i: None), "there is no image"),
    ],
)
def test_what_is_no_data_set_is_refused_in_one_line(data, words):
    with pytest.raises(UserError, match=words) as caught:
        as_source(data)
    assert "\n" not in str(caught.value)


def test_a_random_transform_is_refused():
    data = Items(20, lambda i: Image.fromarray(COLOUR[0][:, :: np.random.choice([1, -1])]))
    with pytest.raises(UserError, match=r"is another image when it is read again.*transform=None"):
        as_source(data)


class SharedFile(torch_data.Dataset):
    """Images in one file that is open for all: right in a process, and wrong when threads seek in it in turns."""

    def __init__(self, path):
        self.file = open(path, "rb")  # noqa: SIM115

    def __len__(self):
        return os.fstat(self.file.fileno()).st_size // COLOUR[0].nbytes

    def __getitem__(self, index):
        self.file.seek(index * COLOUR[0].nbytes)
        return np.frombuffer(self.file.read(COLOUR[0].nbytes), np.uint8).reshape(COLOUR[0].shape)


def test_a_dataset_is_read_one_at_a_time_unless_threads_are_known_to_be_safe(tmp_path):
    many = RNG.integers(0, 256, (4000, *COLOUR[0].shape), dtype=np.uint8)
    (tmp_path / "images").write_bytes(many.tobytes())
    data = SharedFile(tmp_path / "images")
    source = as_source(data)
    assert "samples are read one at a time, as a Dataset SharedFile may share" in source.stock.notes[0]
    wrong = []

    def read(start):
        wrong.extend(i for i in range(start, 4000, 4) if not np.array_equal(source.read(i), many[i]))

    threads = [threading.Thread(target=read, args=(start,)) for start in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert wrong == []
    data.file.close()
    free = [
        list(COLOUR),
        torch_data.TensorDataset(torch.zeros(4, 3, 8, 8, dtype=torch.uint8)),
        torch_data.Subset(list(COLOUR), [1]),
        Own(),
    ]
    for source in (*map(as_source, free), as_source(pictures(), threads=True)):
        assert isinstance(source.lock, contextlib.nullcontext)
        assert not any("one at a time" in note for note in source.stock.notes)


def test_samples_that_raise_are_unusable_images_and_end_nothing():
    data = Items(100, lambda i: 1 / 0 if i == 1 else Image.fromarray(COLOUR[0]))
    source = as_source(data)
    with pytest.raises(OSError, match="ZeroDivisionError: division by zero"):
        source.read(1)
    assert source.name(1) == "Dataset Items[1]"


# --- labels -----------------------------------------------------------------------------------------------------------


def test_labels_are_those_that_a_dataset_says():
    data = pictures(targets=torch.tensor([i % 3 for i in range(12)]), classes=["ant", "bee", "cat"])
    source = as_source(data)
    assert source.labels.tolist() == [i % 3 for i in range(12)]
    assert source.classes == ("ant", "bee", "cat")
    assert as_source(torch_data.Subset(data, [5, 4])).labels.tolist() == [2, 1]
    both = as_source(torch_data.ConcatDataset([data, data]))
    assert both.labels.tolist() == [i % 3 for i in range(12)] * 2
    tensors = torch_data.TensorDataset(torch.from_numpy(COLOUR).permute(0, 3, 1, 2), torch.arange(12))
    assert as_source(tensors).labels.tolist() == list(range(12))


def test_labels_in_samples_alone_are_read_when_they_are_needed():
    reads = []
    data = Items(100, lambda i: (reads.append(i), (Image.fromarray(COLOUR[0]), ["dog", "cat"][i % 2]))[1])
    assert as_source(data).labels is None
    assert "labels are in the samples alone" in as_source(data).stock.notes[-1]
    source = as_source(data, needs_labels=True)
    assert source.labels.tolist() == [1, 0] * 50
    assert source.classes == ("cat", "dog")


def test_what_a_dataset_says_and_its_samples_do_not_is_no_label():
    data = pictures(targets=[0] * 12)
    assert as_source(data).labels is None
    assert as_source(data, needs_labels=True).labels.tolist() == [i % 3 for i in range(12)]


def test_labels_of_lists_and_given_ones():
    assert as_source([(COLOUR[0], "b"), (COLOUR[1], "a")]).classes == ("a", "b")
    assert as_source([{"image": COLOUR[0], "label": 4}, {"image": COLOUR[1], "label": 2}]).labels.tolist() == [4, 2]
    source = as_source(list(COLOUR), labels=[0, 1] * 6, classes=["x", "y"])
    assert (source.labels.tolist(), source.classes) == ([0, 1] * 6, ("x", "y"))
    with pytest.raises(UserError, match="labels: there are 2 for 12 images"):
        as_source(list(COLOUR), labels=[0, 1])


def test_what_is_no_class_is_no_label():
    boxes = as_source(Items(3, lambda i: (COLOUR[i], {"boxes": []})), needs_labels=True)
    assert boxes.labels is None
    assert "no labels, neither integers nor words" in boxes.stock.notes[-1]
    views = as_source(Items(3, lambda i: (COLOUR[i], COLOUR[i])))
    assert views.labels is None


# --- Hugging Face and sources of one's own ----------------------------------------------------------------------------


def test_a_hugging_face_data_set_gives_the_bytes_that_it_holds():
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"photo": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee"]), "id": datasets.Value("int64")}
    )
    files = [encoded(Image.fromarray(pixels), "JPEG") for pixels in COLOUR]
    rows = {"photo": [{"bytes": one, "path": None} for one in files], "label": [0, 1] * 6, "id": list(range(12))}
    data = datasets.Dataset.from_dict(rows, features=features)
    source = as_source(data.with_format("torch"))
    assert [source.read(i) for i in range(12)] == files
    assert (source.labels.tolist(), source.classes, source.kind) == ([0, 1] * 6, ("ant", "bee"), "folder")
    some = as_source(data.select([5, 2]))
    assert (some.read(0), some.labels.tolist()) == (files[5], [1, 0])
    parts = given_parts(datasets.DatasetDict(train=data, test=data.select([0])))
    assert [len(part) for part in train_and_val(parts)] == [12, 1]
    with pytest.raises(UserError, match="IterableDataset gives images in its own order alone"):
        as_source(data.to_iterable_dataset())


class Own:
    """What a source of one's own must have at least."""

    def __len__(self):
        return len(COLOUR)

    def read(self, index):
        return encoded(Image.fromarray(COLOUR[index]))


def test_a_source_of_ones_own_needs_a_length_and_read():
    source = as_source(Own())
    np.testing.assert_array_equal(decode(source.read(3), Reading(3)), COLOUR[3])
    assert (source.kind, source.labels, source.name(3)) == ("folder", None, "Own[3]")


def test_the_fingerprint_of_objects_is_of_their_contents():
    before = fingerprint(as_source(pictures()))
    assert difference(fingerprint(as_source(pictures())), before) is None
    other = COLOUR.copy()
    other[7, 0, 0, 0] ^= 1
    changed = Items(12, lambda i: (Image.fromarray(other[i]), i % 3))
    assert difference(fingerprint(as_source(changed)), before) == "other contents or sizes of image 7"
    labelled = as_source(pictures(targets=[i % 3 for i in range(12)]))
    assert difference(fingerprint(labelled), before) == "other labels or classes"


class Shown(Own):
    """A source that says more than it must."""

    shards = Shards(np.array([0, 6, 12]), window=8)

    def name(self, index):
        return f"tile {index}"


def test_what_a_source_of_ones_own_says_beside_its_images_is_used():
    source = as_source(Shown())
    assert (source.name(3), source.shards) == ("tile 3", Shown.shards)


# --- what was lost or wrong in silence --------------------------------------------------------------------------------


def test_what_somebody_says_of_threads_holds():
    held = [as_source(list(COLOUR), threads=False), as_source(Own(), threads=False)]
    assert not any(isinstance(source.lock, contextlib.nullcontext) for source in held)


def test_labels_are_not_dropped_where_a_source_is_made_of_a_source():
    source = as_source(list(COLOUR))
    assert as_source(source) is source
    with pytest.raises(UserError, match="Objects is a source already"):
        as_source(source, labels=[0, 1] * 6)


def test_paths_and_parts_that_are_not_used_are_told(caplog):
    with pytest.raises(UserError, match="data: photos is a path"):
        as_source("photos")
    with pytest.raises(UserError, match="val: photos is a path"):
        given_parts(list(COLOUR), "photos")
    with pytest.raises(UserError, match="val: list holds no images"):
        given_parts(list(COLOUR), [])
    parts = given_parts({"train": COLOUR, "validation": COLOUR[:2], "test": COLOUR[:3], "more": COLOUR[:4]})
    assert len(parts.val) == 2
    assert "its parts test, more are not used" in caplog.text


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_rows_of_numbers_are_no_labels(kind):
    """Several labels an image, as of faces, with what says them for all."""
    rows = kind([[i % 2, 1] for i in range(12)])
    source = as_source(Items(12, lambda i: (COLOUR[i], rows[i]), targets=rows))
    assert source.labels is None
    assert "no labels" in source.stock.notes[-1]


def test_names_that_do_not_fit_the_numbers_of_classes_are_told():
    source = as_source(list(COLOUR), labels=[1, 2] * 6, classes=["x", "y"])
    assert (source.labels.tolist(), source.classes) == ([1, 2] * 6, ())
    assert "labels go from 1 to 2, and 2 classes have names" in source.stock.notes[-1]


def test_floats_of_two_scales_are_refused():
    levels, others = COLOUR.astype(np.float32) / 255, COLOUR.astype(np.float32) / 254
    with pytest.raises(UserError, match="val: floats of one part are k/255"):
        given_parts(list(others), list(levels))
    assert given_parts(list(levels), list(levels)).val.read(0).dtype == np.uint8
    assert given_parts(list(COLOUR), list(levels)).val.read(0).dtype == np.uint8


def test_an_image_of_zeros_and_ones_among_floats_is_not_taken_for_bits():
    model = mae_vit_tiny_patch4(img_size=8, pixels=PixelFacts(dtype="float32", low=(0.0,) * 3, high=(1.0,) * 3))
    assert model.preprocess(np.ones((8, 8, 3), np.float32)).max() == 1
    bits = mae_vit_tiny_patch4(img_size=8)
    assert bits.preprocess(np.ones((8, 8, 3), np.float32)).max() == 255


def test_a_table_is_no_images():
    pandas = pytest.importorskip("pandas")
    with pytest.raises(UserError, match=r'^data: is a table, which holds no images; give model="mae_mlp" with it$'):
        as_source(pandas.DataFrame({"a": [1.0, 2.0]}))
