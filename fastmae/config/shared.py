"""The flags that several commands with a frozen model, or several benchmarks, have: their types, texts and checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from fastmae.config.images import ImagesConfig, check_images
from fastmae.config.values import coerce, need_at_least_one, need_size, need_statistics

Device = Annotated[str | None, arg(help="cpu, cuda or cuda:N. Default: cuda where there is a GPU, otherwise cpu.")]

# Of a frozen model.
Checkpoint = Annotated[
    str,
    Positional,
    arg(
        metavar="CHECKPOINT",
        help=(
            "The model: a run folder, one of its checkpoints, an official .pth or .safetensors file, or a folder of "
            "transformers."
        ),
    ),
]
WithDecoder = Annotated[
    str,
    Positional,
    arg(
        metavar="CHECKPOINT",
        help=(
            "The model with its decoder: a run folder, one of its checkpoints, an official .pth or .safetensors file, "
            "or a folder of transformers."
        ),
    ),
]


@dataclass(frozen=True)
class Rest:
    """Makes a flag take the words behind the positional arguments as well, as in ``fastmae probe RUN DATA``."""

    shown: str
    """What stands for the words in the help."""
    otherwise: str = ""
    """The setting that takes these words if the flag itself is given, as they meant it in version 0.1."""


Data = Annotated[str | tuple[str, ...] | None, Rest("DATA")]
Preset = Annotated[str | None, arg(help="The name of the preset, if the checkpoint does not say it.")]
ForwardBatch = Annotated[int, arg(help="Images per forward pass.")]
Workers = Annotated[
    int | None,
    arg(help="Threads that decode images. Default: the number of cores that this process may use, at most 10."),
]
Json = Annotated[bool, arg(help="Print one line of JSON instead of a table.")]


@dataclass(frozen=True, kw_only=True)
class ReadingConfig(ImagesConfig):
    """How a checkpoint is read: what its file may not say, and what is taken otherwise than it says."""

    model: Preset = None
    input_size: tuple[int, ...] | None = None
    """Side of the images in pixels, or their height and width. Default: as the checkpoint says, or the grid of its
    positions. If it says another size, the positions are computed or interpolated for this one."""
    norm_pix_loss: bool | None = None
    """Whether the decoder was trained to predict normalised pixels. Default: as the checkpoint says; otherwise no, and
    a line says so."""
    num_heads: int | None = None
    """Heads of the encoder's attention, which tensors do not tell. Default: as the checkpoint says; otherwise those of
    the preset with its width, or of 64 numbers each, and a line says so."""
    mean: tuple[float, ...] | None = None
    """What pixels are normalised by: one number per channel, as a share of the value range. Default: as the checkpoint
    says; otherwise ImageNet's for 3 channels, 0.5 for any other number, and a line says so."""
    std: tuple[float, ...] | None = None
    """As mean. Default: as for mean, with 0.25 in place of 0.5."""

    def __post_init__(self) -> None:
        coerce(self)
        check_reading(self)


def check_reading(config: ReadingConfig) -> None:
    """Refuses what cannot be said of any checkpoint.

    Raises:
        SettingError: naming the setting, its value and what it must be.
    """
    need_size(config, "input_size")
    need_at_least_one(config, "num_heads")
    need_statistics(config)
    check_images(config)


# Of benchmarks.
Rounds = Annotated[int, arg(help="Samples of each implementation; implementations take turns.")]
SampleMs = Annotated[float, arg(help="Calls are repeated until a sample takes this many milliseconds.")]
Graph = Annotated[bool, arg(help="On a GPU: replay calls from a CUDA graph, so that Python's launches are not timed.")]
Samples = Annotated[str | None, arg(help="A folder for every sample (JSON).")]
BenchPrecision = Annotated[
    Literal["auto", "fp32", "bf16"],
    arg(help="bf16 is autocast over float32 weights. auto: bf16 on a GPU that has it, otherwise fp32."),
]
LoadingWorkers = Annotated[
    int | None,
    arg(
        help=(
            "Decoding threads, and the official pipeline's processes. Default: the cores that this process may use, at"
            " most 10."
        )
    ),
]
