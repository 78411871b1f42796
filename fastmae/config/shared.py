"""The types and texts of flags that several commands with a frozen model, or several benchmarks, have."""

from __future__ import annotations

from typing import Annotated, Literal

from tyro.conf import Positional, arg

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
Preset = Annotated[str | None, arg(help="The name of the preset, if the checkpoint does not say it.")]
ForwardBatch = Annotated[int, arg(help="Images per forward pass.")]
Workers = Annotated[
    int | None,
    arg(help="Threads that decode images. Default: the number of cores that this process may use, at most 10."),
]
Json = Annotated[bool, arg(help="Print one line of JSON instead of a table.")]

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
