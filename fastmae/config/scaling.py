"""The settings of bench scaling, and what it assumes of a cluster."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from fastmae.config.shared import need_at_least_one
from fastmae.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ScalingMachine:
    """What `bench scaling` assumes of a cluster: data sheets and guesses, until they are measured on yours."""

    gpu_flops: float = 989e12
    """Products a second in bf16, of a GPU. NVIDIA's data sheet of the H100 SXM, dense."""
    mfu: float = 0.4
    """Share of gpu_flops that large batches reach, for models whose speed is not given. A guess: 33 to 39 % are
    published for language models in bf16 on the same GPU."""
    gpu_memory: float = 80e9
    """Bytes. Data sheet."""
    gpu_memory_rate: float = 3.35e12
    """Bytes a second from a GPU's memory. Data sheet."""
    launch: float = 8e-6
    """Seconds for which Python and PyTorch prepare one operation. A guess from eager PyTorch; --compile lowers it."""
    sharding: float = 1.5e-3
    """Seconds of Python a block and step that FSDP2 itself takes. A guess; a busy CPU's core took 3 to 6."""
    gpus_a_node: int = 8
    """GPUs a machine."""
    node_rate: float = 450e9
    """Bytes a second that a GPU sends to others of its machine. Data sheet: NVLink 4, 900 GB/s both ways together."""
    network_rate: float = 50e9
    """Bytes a second that a GPU sends to other machines. Data sheet: one 400 Gb/s port each, as in a DGX H100."""
    reached: float = 0.8
    """Share of node_rate and network_rate that collectives reach. A guess."""
    node_latency: float = 3.4e-6
    """Seconds a hop between GPUs of a machine, as NCCL itself assumes for rings over NVLink (protocol Simple)."""
    network_latency: float = 14e-6
    """Seconds a hop between machines, from the same place."""
    host_latency: float = 40e-6
    """Seconds a hop of gloo over TCP, whose ring ranks ask after every step whether to stop. A guess; two ranks of one
    busy CPU took 110 microseconds."""
    cores: int = 112
    """CPU cores a machine that decode. Data sheet of a DGX H100."""
    decoded: float = 500.0
    """JPEGs a second and core, unless --measured has a result of `bench loader`. Near what one of ours gave."""
    image_bytes: float = 110e3
    """Bytes of an image file. ImageNet's average."""
    storage_rate: float = 20e9
    """Bytes a second that all machines together read from, and write to, the shared storage. A guess."""
    staging_rate: float = 20e9
    """Bytes a second from a GPU to the host's memory, for checkpoints. A guess: under half of PCIe 5's data sheet."""
    hash_rate: float = 1e9
    """Bytes a second that one process reads back and hashes (SHA-256) before a checkpoint counts. A guess."""
    gpu_hours: float = 50_700.0
    """Hours that a GPU works between failures that end the run: 419 in 54 days of 16,384 GPUs (Llama 3, table 5)."""
    restart: float = 180.0
    """Seconds from a failure to the first step after it. A guess."""


@dataclass(frozen=True, kw_only=True)
class BenchScalingConfig:
    """Predict speed, memory and losses to failures on many GPUs from what one does; --check compares the same formulas
    with ranks on this machine."""

    models: tuple[str, ...] = ("mae_vit_base_patch16", "mae_vit_large_patch16", "mae_vit_huge_patch14")
    """Presets."""
    gpus: tuple[int, ...] = (8, 64, 1024)
    """How many; beyond a machine, whole machines."""
    global_batch: int = 4096
    """Images a step of all GPUs together; 4096 as published."""
    gpu_batch: int = 64
    """Images a GPU and step, for the table in which the global batch grows with the GPUs."""
    epochs: int = 1600
    """Of 1,281,167 images."""
    images_per_second: tuple[float, ...] | None = None
    """Of one GPU with a large batch, a number a model. Default: from --measured, otherwise predicted from mfu."""
    measured: tuple[str, ...] = ()
    """Results of `bench step`, which for several batch sizes of a model make a curve, and of `bench loader`."""
    reduce: Literal["fp32", "bf16"] = "fp32"
    """In which format gradients travel, as for pretrain."""
    machine: ScalingMachine = ScalingMachine()
    check: bool = False
    """Instead: time ranks of this machine's CPU, a thread each, beside what the formulas make of one rank's step and of
    collectives by themselves."""
    check_model: str = "mae_vit_tiny_patch16"
    """A preset, for --check."""
    check_batch: int = 1
    """Images a rank, for --check; few, so that communication counts."""
    ranks: tuple[int, ...] = (2,)
    """How many, one check after another; more than there are cores get in each other's way."""
    rounds: int = 15
    """Samples of everything that --check times; they take turns."""
    output: str | None = None
    """A folder for inputs and results (JSON)."""


def check_scaling(config: BenchScalingConfig) -> None:
    """Refuses numbers that cannot work.

    Raises:
        UserError: naming the flag, its value and what it must be.
    """
    for flag in ("models", "gpus", "ranks"):
        if not getattr(config, flag):
            raise UserError(f"--{flag}: must name at least one")
    need_at_least_one(config, "global_batch", "gpu_batch", "epochs", "check_batch", "rounds")
    for number in config.ranks:
        if number < 2:
            raise UserError(f"--ranks {number}: must be at least 2; one rank communicates with nobody")
    for name, value in dataclasses.asdict(config.machine).items():
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"--{name} {value}: must be above 0")
    for number in config.gpus:
        if number < 1 or (number > config.machine.gpus_a_node and number % config.machine.gpus_a_node):
            whole = f"up to {config.machine.gpus_a_node} (--gpus_a_node), or a multiple of it"
            raise UserError(f"--gpus {number}: must be {whole}")
    rates = config.images_per_second
    if rates is not None and (len(rates) != len(config.models) or not all(rate > 0 for rate in rates)):
        given = " ".join(map(str, rates))
        raise UserError(f"--images_per_second {given}: must be {len(config.models)} positive numbers, one a model")
