"""Sound files as log-mel spectrograms, as AudioMAE takes them (Huang et al. 2022, section 3.1, arXiv 2207.06405).

16 kHz, Hann windows of 25 ms every 10 ms, 128 mel bands: an image of one row per window ("frame") and one column per
band. The numbers are those of Kaldi's filter banks, as `torchaudio.compliance.kaldi.fbank` and the feature extractor of
AST in transformers compute them. soundfile (the extra `audio`) reads the files.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math

import numpy as np
import torch
import torch.nn.functional as F

from fastmae.data.images import FolderSource
from fastmae.data.reading import MAX_PIXELS, BadImageError
from fastmae.facts import ReadAs

RATE = 16_000
WINDOW, HOP, FFT = 400, 160, 512
BANDS = 128
LOWEST = 20.0
"""Hz, the lower end of the lowest band; the upper end of the highest is half of the rate."""
PREEMPHASIS = 0.97
FLOOR = torch.finfo(torch.float32).eps
"""The smallest energy of a band, so that its logarithm exists."""
MAX_SAMPLES = 1 << 27
LOOKED_AT = 16
AUDIOSET_MEAN, AUDIOSET_STD = -4.2677393, 2 * 4.5689974
"""Of the logarithms over AudioSet; AudioMAE divides by twice their deviation."""


def pixels(data: bytes, read_as: ReadAs) -> np.ndarray:
    """Returns the spectrogram of a sound file: float32 [frames or more, 128, 1].

    Channels are averaged, other rates are resampled to 16 kHz, and a shorter sound is followed by zeros.

    Args:
        data: the bytes of the file.
        read_as: its ``spectrogram`` is the least number of frames, of 10 ms each.

    Raises:
        BadImageError: no sound, one of less than a window of 25 ms or of hours, or soundfile is missing.
    """
    waveform, rate = _waveform(data)
    if rate != RATE:
        waveform = _resampled(waveform, rate)
    if len(waveform) < WINDOW:
        raise BadImageError(f"a sound of {1000 * len(waveform) / RATE:.3g} ms; a frame needs 25 ms")
    energies = log_mel(torch.from_numpy(waveform))
    return F.pad(energies, (0, 0, 0, max(0, (read_as.spectrogram or 0) - len(energies)))).numpy()[..., None]


def conversions(sounds: FolderSource, frames: int) -> tuple[str, ...]:
    """Returns a sentence about what is converted of a few evenly spaced sounds, by their headers; none without any.

    Args:
        sounds: the files.
        frames: the number of frames of the model.
    """
    rates = channels = short = looked = 0
    for index in np.linspace(0, len(sounds) - 1, min(len(sounds), LOOKED_AT)).astype(int).tolist():
        with contextlib.suppress(Exception):  # what cannot be read is said by whatever reads it
            import soundfile

            about = soundfile.info(io.BytesIO(sounds.read(index)))
            looked += 1
            rates += about.samplerate != RATE
            channels += about.channels > 1
            short += about.duration < (HOP * (frames - 1) + WINDOW) / RATE
    kinds = (
        (rates, "are resampled to 16 kHz"),
        (channels, "have their channels averaged"),
        (short, f"are shorter than {frames} frames and followed by zeros"),
    )
    told = "; ".join(f"{count} {what}" for count, what in kinds if count)
    return (f"of {looked} sounds sampled {told}",) if told else ()


def _waveform(data: bytes) -> tuple[np.ndarray, int]:
    """Returns the samples float32 [n], in [-1, 1], and their rate in Hz."""
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: without its C library
        raise BadImageError("a sound file, which needs soundfile; run pip install 'fastmae[audio]'") from error
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            if not 0 < file.frames * file.channels <= MAX_SAMPLES:
                raise BadImageError(f"{file.frames} × {file.channels} samples; at most {MAX_SAMPLES} are read at once")
            if file.frames * RATE / file.samplerate / HOP * BANDS > MAX_PIXELS:
                hours = file.frames / file.samplerate / 3600
                raise BadImageError(f"a sound of {hours:.1f} hours; cut it into pieces of at most 3 hours")
            samples, rate = file.read(dtype="float32", always_2d=True), file.samplerate
    except (soundfile.SoundFileError, RuntimeError, ValueError, TypeError) as error:
        if isinstance(error, BadImageError):
            raise
        raise BadImageError(f"no sound that soundfile reads: {' '.join(str(error).split())}") from error
    if not np.isfinite(samples).all():
        raise BadImageError("a sound with samples that are not finite")
    return samples[:, 0].copy() if samples.shape[1] == 1 else samples.mean(axis=1, dtype=np.float32), rate


def _resampled(waveform: np.ndarray, rate: int) -> np.ndarray:
    from scipy.signal import resample_poly

    if not 1000 <= rate <= 1_000_000:
        raise BadImageError(f"a sound of {rate} samples a second; 1,000 to 1,000,000 are read")
    divisor = math.gcd(RATE, rate)
    return np.asarray(resample_poly(waveform, RATE // divisor, rate // divisor), np.float32)


def log_mel(waveform: torch.Tensor) -> torch.Tensor:
    """Returns the natural logarithms of the energies in the mel bands: [1 + (n − 400) // 160, 128].

    Every frame loses its mean, is pre-emphasised (x[i] − 0.97 x[i−1]) and multiplied by a symmetric Hann window; its
    power spectrum of 512 points is summed by triangles on the mel scale.

    Args:
        waveform: float32 or float64 [n], n ≥ 400, at 16 kHz; its dtype is that of the arithmetic and the result.
    """
    frames = waveform.unfold(0, WINDOW, HOP)
    frames = frames - frames.mean(dim=1, keepdim=True)
    before = torch.cat([frames[:, :1], frames[:, :-1]], dim=1)
    window, triangles = (table.to(waveform) for table in _window_and_triangles())
    spectrum = torch.view_as_real(torch.fft.rfft((frames - PREEMPHASIS * before) * window, n=FFT))
    power = spectrum.square().sum(dim=-1)
    return (power @ triangles).clamp_min(FLOOR).log()


@functools.cache
def _window_and_triangles() -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the window float64 [400], and the weights of the frequencies in the bands float64 [257, 128].

    A triangle rises and falls linearly in mel, mel(f) = 1127 ln(1 + f / 700), and the corners are equally far apart.
    """

    def mel(hertz: torch.Tensor) -> torch.Tensor:
        return 1127 * torch.log1p(hertz / 700)

    ends = mel(torch.tensor([LOWEST, RATE / 2], dtype=torch.float64))
    corners = torch.linspace(float(ends[0]), float(ends[1]), BANDS + 2, dtype=torch.float64)
    at = mel(torch.arange(FFT // 2 + 1, dtype=torch.float64) * (RATE / FFT))[:, None]
    left, top, right = corners[:-2], corners[1:-1], corners[2:]
    triangles = torch.minimum((at - left) / (top - left), (right - at) / (right - top)).clamp_min(0)
    triangles[-1] = 0  # Kaldi leaves the highest frequency out
    window = torch.hann_window(WINDOW, periodic=False, dtype=torch.float64)
    return window, triangles
