"""The settings of estimate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastmae.config.family import FamilySettings, check_family, family_of
from fastmae.config.shape import Shape, check_shape
from fastmae.config.values import coerce, need_at_least_one, need_size
from fastmae.errors import UserError

EstimateGpu = Literal["a100-40", "a100-80", "h100", "h200", "b200", "l4", "rtx4090", "cpu"]


@dataclass(frozen=True, kw_only=True)
class EstimateConfig(Shape, FamilySettings):
    """Estimate speed, hours and memory of a pretraining before it runs. No GPU is needed and none is used."""

    model: str = "mae_vit_base_patch16"
    """A preset."""
    gpu: EstimateGpu = "h200"
    """The kind of GPU; cpu measures this machine for some seconds and estimates a step on its processor."""
    gpus: int = 1
    """How many GPUs, or ranks with --gpu cpu."""
    gpus_per_node: int = 8
    """GPUs per machine."""
    images: float = 1_281_167.0
    """Images of the data set."""
    epochs: int = 800
    """Passes over the data."""
    batch_size: int = 64
    """Images per rank and micro-step, as for pretrain."""
    accum_iter: int = 1
    """Micro-steps per step, as for pretrain."""
    input_size: tuple[int, ...] | None = None
    """Side of the crops in pixels, or their height and width. Default: the model's; 32 for mae_conv,
    28 for mae_mlp, which takes one channel: `1 D` is a table of D columns."""
    patch_size: tuple[int, ...] | None = None
    """As for pretrain."""
    mask_ratio: float | None = None
    """Share of the patches that is masked. Default: that of the model's family, as for pretrain."""
    compile: Literal["auto", "off", "block"] = "auto"
    """As for pretrain; auto is block on a GPU."""
    attention: Literal["auto", "sdpa", "triton"] = "auto"
    """As for pretrain; auto is triton on a GPU where the kernel is predicted to be faster."""
    residual: Literal["fp32", "bf16"] = "fp32"
    """As for pretrain."""
    fused: bool = True
    """Count with the kernels add_layer_norm and gelu and with bf16 copies of weights, as pretrain has them on a GPU, or
    without them, as version 0.1."""
    checkpointing: Literal["none", "gelu", "selective", "full"] = "none"
    """As for pretrain."""
    adversarial: float = 0.0
    """As for pretrain. The step that is shown has the term; of the hours, the epochs before it begins have none."""
    adversarial_start: float | None = None
    """As for pretrain: half of the epochs by default."""
    adversarial_regulariser: Literal["r1", "spectral", "none"] = "r1"
    """As for pretrain."""
    cores: int = 112
    """CPU cores per machine that decode images."""
    json: bool = False
    """Print one JSON object instead of tables."""

    def __post_init__(self) -> None:
        coerce(self)


def check_estimate(config: EstimateConfig) -> None:
    """Refuses numbers that cannot work.

    Raises:
        UserError: naming the flag, its value and what it must be.
    """
    need_at_least_one(
        config, "gpus", "gpus_per_node", "epochs", "batch_size", "accum_iter", "cores"
    )  # fmt: skip
    check_shape(config)
    check_family(config)
    need_size(config, "input_size")
    need_size(config, "patch_size")
    if config.adversarial < 0:
        raise UserError(f"--adversarial {config.adversarial:g}: must be 0 or more")
    if not config.adversarial and (config.adversarial_start is not None or config.adversarial_regulariser != "r1"):
        name = "adversarial_regulariser" if config.adversarial_start is None else "adversarial_start"
        raise UserError(f"--{name} {getattr(config, name)}: must be given together with --adversarial")
    if config.adversarial and family_of(config.model) == "mlp":
        raise UserError(f"--adversarial {config.adversarial:g}: is for images, not for {config.model}; leave it out")
    start = config.adversarial_start
    if start is not None and not 0 <= start < config.epochs:
        raise UserError(f"--adversarial_start {start:g}: must be at least 0, and below the {config.epochs} of --epochs")
    if config.images < 1:
        raise UserError(f"--images {config.images:g}: must be at least 1")
    if config.mask_ratio is not None and not 0 < config.mask_ratio < 1:
        raise UserError(f"--mask_ratio {config.mask_ratio:g}: must be above 0 and below 1")
    if config.gpus > config.gpus_per_node and config.gpus % config.gpus_per_node and config.gpu != "cpu":
        whole = f"up to {config.gpus_per_node} (--gpus_per_node), or a multiple of it"
        raise UserError(f"--gpus {config.gpus}: must be {whole}")
