"""Sounds as spectrograms: the numbers of others, every length and rate, and what is no sound."""

import io
import warnings

import numpy as np
import pytest
import soundfile
import torch
from helpers import small_run

from fastmae.checkpoint.load import load_model, open_checkpoint
from fastmae.data.formats import sound
from fastmae.data.plan import crop_draws
from fastmae.data.reading import BadImageError, Reading
from fastmae.data.sample import View, load_sample
from fastmae.data.sources import describe, open_train
from fastmae.errors import UserError
from fastmae.facts import ReadAs
from fastmae.train.pretrain import pretrain

RATE = 16_000


def tone(seconds, rate=RATE, hertz=440.0, seed=0):
    time = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(seed).normal(size=len(time))
    return (0.3 * np.sin(2 * np.pi * hertz * time) + 0.02 * noise).astype(np.float32)


def file_of(samples, rate=RATE, format="WAV", subtype=None):
    target = io.BytesIO()
    soundfile.write(target, samples, rate, format=format, subtype=subtype)
    return target.getvalue()


def of_transformers(waveform):
    """As the feature extractor of AST sets the functions of transformers, which compute in float64."""
    from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of 128 triangles are narrower than a frequency, for Kaldi as well
        filters = mel_filter_bank(
            num_frequency_bins=257, num_mel_filters=128, min_frequency=20, max_frequency=8000, sampling_rate=RATE,
            norm=None, mel_scale="kaldi", triangularize_in_mel_space=True,
        )  # fmt: skip
    return spectrogram(
        waveform, window_function(400, "hann", periodic=False), frame_length=400, hop_length=160, fft_length=512,
        power=2.0, center=False, preemphasis=0.97, mel_filters=filters, log_mel="log",
        mel_floor=1.192092955078125e-07, remove_dc_offset=True,
    ).T  # fmt: skip


def test_the_numbers_are_those_of_transformers():
    waveform = tone(2.0)
    expected = of_transformers(waveform)
    exact = sound.log_mel(torch.from_numpy(waveform).double()).numpy()
    assert exact.shape == expected.shape == (198, 128)
    assert np.abs(exact - expected).max() < 1e-5
    single = sound.log_mel(torch.from_numpy(waveform)).numpy()
    assert np.abs(single - expected).max() < 5e-3  # float32, of the faintest bands
    assert np.abs(single - expected).mean() < 1e-5


def test_silence_has_the_floor_and_short_sounds_are_followed_by_zeros():
    pixels = sound.pixels(file_of(np.zeros(RATE, np.float32)), ReadAs(spectrogram=128))
    assert pixels.shape == (128, 128, 1)
    assert pixels.dtype == np.float32
    assert np.unique(pixels[:98]) == pytest.approx(np.log(np.finfo(np.float32).eps))
    assert not pixels[98:].any()
    assert sound.pixels(file_of(tone(2.0)), ReadAs(spectrogram=128)).shape == (198, 128, 1)


@pytest.mark.parametrize(("format", "subtype", "error"), [("FLAC", "PCM_24", 1e-3), ("WAV", "PCM_16", 0.5)])
def test_every_format_gives_the_same_sound(format, subtype, error):
    expected = sound.pixels(file_of(tone(1.0), subtype="FLOAT"), ReadAs(spectrogram=16))
    pixels = sound.pixels(file_of(tone(1.0), format=format, subtype=subtype), ReadAs(spectrogram=16))
    assert np.abs(pixels - expected).max() < error


def test_other_rates_and_channels_become_one_channel_of_16_khz():
    expected = sound.pixels(file_of(tone(1.0, hertz=1000.0)), ReadAs(spectrogram=16))
    fast = tone(1.0, 48_000, 1000.0)
    pixels = sound.pixels(file_of(np.stack([fast, fast], axis=1), 48_000), ReadAs(spectrogram=16))
    assert pixels.shape == expected.shape
    assert pixels[..., 0].mean(axis=0).argmax() == expected[..., 0].mean(axis=0).argmax()


@pytest.mark.parametrize(
    ("data", "problem"),
    {
        "nothing": (b"", "no sound that soundfile reads"),
        "no sound": (b"RIFF\0\0\0\0WAVEnonsense" * 9, "no sound that soundfile reads"),
        "20 ms": (file_of(tone(0.02)), "a sound of 20 ms; a frame needs 25 ms"),
        "no samples": (file_of(np.zeros(0, np.float32)), "0 × 1 samples"),
        "not finite": (file_of(np.full(RATE, np.nan, np.float32), subtype="FLOAT"), "not finite"),
        "slow": (file_of(tone(1.0), 8), "a sound of"),
    }.values(),
)
def test_what_is_no_usable_sound_is_one_line(data, problem):
    with pytest.raises(BadImageError, match=problem) as caught:
        sound.pixels(data, ReadAs(spectrogram=16))
    assert "\n" not in str(caught.value)


def test_a_header_that_claims_hours_allocates_nothing():
    data = bytearray(file_of(tone(0.1)))
    data[24:28] = (1).to_bytes(4, "little")  # one sample a second
    with pytest.raises(BadImageError, match="1,000 to 1,000,000 are read"):
        sound.pixels(bytes(data), ReadAs(spectrogram=16))


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sounds")
    for number in range(12):
        place = folder / "train" / ("low" if number % 2 else "high")
        place.mkdir(parents=True, exist_ok=True)
        soundfile.write(place / f"{number}.flac", tone(0.2 + 0.1 * (number % 3), hertz=300 + 900 * (number % 2)), RATE)
    (folder / "train" / "low" / "notes.md").write_text("recorded indoors")
    return folder


def test_a_folder_of_sounds_is_described_and_its_other_files_are_counted(sounds):
    source = open_train(str(sounds), ReadAs(spectrogram=32))
    facts = describe(source, read_as=ReadAs(spectrogram=32))
    assert (len(source), facts.channels, facts.pixels.dtype, facts.labelled) == (12, 1, "float32", True)
    assert source.classes == ("high", "low")
    assert any(".md" in line for line in facts.stock)
    with pytest.raises(UserError, match="spectrogram 1024"):
        open_train(str(sounds))
    assert len(open_train(str(next(sounds.rglob("*.flac"))), ReadAs(spectrogram=32))) == 1


def test_what_is_converted_is_said_with_numbers(tmp_path):
    for number in range(4):
        samples = tone(0.5, 48_000) if number else np.stack([tone(0.2)] * 2, axis=1)
        soundfile.write(tmp_path / f"{number}.wav", samples, 48_000 if number else RATE)
    (line,) = open_train(str(tmp_path), ReadAs(spectrogram=32)).stock.notes
    assert line == (
        "of 4 sounds sampled 3 are resampled to 16 kHz; 1 have their channels averaged; "
        "1 are shorter than 32 frames and followed by zeros"
    )


def test_longer_sounds_are_seen_part_by_part_at_their_own_rate(sounds):
    read_as = ReadAs(spectrogram=16)
    source = open_train(str(sounds), read_as)
    whole = source.read(2)
    view = View((16, 128), Reading(1, dtype="float32", read_as=read_as), seed=0)
    tops = set()
    for draws in crop_draws(0, np.arange(40)):
        out = np.empty((16, 128, 1), np.float32)
        load_sample(source, 2, view, draws, out)
        tops |= {top for top in range(len(whole) - 15) if np.array_equal(out, whole[top : top + 16])}
    assert len(tops) > 5


def test_a_model_is_trained_on_sounds_as_audiomae_normalises_them(sounds, tmp_path):
    run = tmp_path / "run"
    config = small_run(
        str(sounds), run, epochs=1, warmup_epochs=0, batch_size=4, spectrogram=32, patch_size=16,
        model="mae_vit_tiny_patch4",
    )  # fmt: skip
    assert pretrain(config) == 0
    model, settings = load_model(str(run)), open_checkpoint(str(run)).settings
    assert (model.img_size, model.patch_size, model.in_chans) == ((32, 128), (16, 16), 1)
    assert (settings["spectrogram"], settings["crop_scale"], settings["flip"]) == (32, [1, 1], False)
    assert model.mean.tolist() == pytest.approx([-4.2677393])
    assert model.std.tolist() == pytest.approx([2 * 4.5689974])
    assert settings["value_range"] == [0, 1]
