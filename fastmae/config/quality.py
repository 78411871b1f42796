"""The settings of bench quality."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from fastmae.config.evaluate import LinearProbe, Pool
from fastmae.config.masking import PUBLISHED_RATIO
from fastmae.config.pretrain import PretrainConfig, check_pretrain
from fastmae.config.shared import Device
from fastmae.config.values import coerce
from fastmae.errors import UserError

# What the two trainings have in common, under pretrain's names and with its defaults.
SHARED = (
    "data_path", "model", "input_size", "mask_ratio", "norm_pix_loss", "batch_size", "epochs", "blr", "warmup_epochs",
    "weight_decay", "crop_scale", "flip", "device", "precision",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class BenchQualityConfig:
    """Pretrain with fastmae and with the official loop, several seeds each, and compare the accuracy of the encoders.
    Labelled data, one process."""

    data_path: str | tuple[str, ...] = "digits"
    """Labelled data, as for pretrain. Both train on the train part; k-NN and linear probe are fitted on it and scored
    on the val or test part (without one, on a fifth that is held out of the probes, but seen in pretraining)."""
    model: str | None = None
    """The name of a preset. Default: by the size of the images, as for pretrain."""
    input_size: tuple[int, ...] | None = None
    """Side of the crops in pixels, or height and width. Default: as for pretrain."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One training of each kind per seed; at least two, as the spread is what the difference is compared with."""
    mask_ratio: float = PUBLISHED_RATIO
    """Share of the patches that is masked."""
    norm_pix_loss: bool = False
    """Predict pixels normalised by the mean and variance of their patch."""
    batch_size: int = 64
    """Images per step."""
    epochs: int | None = None
    """Passes over the data. Default: 400, as in the official script; 60 for the built-in digits."""
    blr: float | None = None
    """Learning rate for a batch of 256. Default: 1e-3, as in the official script; 3e-3 for the built-in digits."""
    warmup_epochs: float | None = None
    """Epochs of linear warm-up. Default: 40, as in the official script; of up to 40 epochs, and for the built-in
    digits, a tenth."""
    weight_decay: float = 0.05
    """Weight decay of parameters of two or more dimensions, the class token and the mask token."""
    crop_scale: tuple[float, float] | None = None
    """Smallest and largest share of an image's area that a crop takes. Default: 0.2 1; for the digits 0.7 1."""
    flip: bool | None = None
    """Flip half of the crops horizontally. Default: for colour images only."""
    device: Device = None
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16 is autocast over float32 weights. auto: bf16 on a GPU that has it, otherwise fp32."""
    num_workers: int = 0
    """Processes that load for the official loop; small arrays are loaded fastest without any. Ours has its threads."""
    pool: Pool = "mean"
    """What the features are: the mean of the patch tokens, the class token, or both side by side."""
    k: int = 20
    """Neighbours of the k-NN."""
    linear: LinearProbe = "logistic"
    """The linear probe: logistic regression, or that of the paper (lars), which is for large data."""
    output: str | None = None
    """A folder for every seed's figures (JSON)."""

    def __post_init__(self) -> None:
        coerce(self)


def pretraining(config: BenchQualityConfig, seed: int, output_dir: str) -> PretrainConfig:
    """Our side of the comparison, with the settings that a user would give."""
    shared = {flag: value for flag, value in asdict(config).items() if flag in SHARED}
    return PretrainConfig(**shared, seed=seed, output_dir=output_dir, probe=False)


def check_quality(config: BenchQualityConfig) -> None:
    """Refuses settings that cannot work, whatever the data.

    Raises:
        UserError: naming the flag, its value and what it must be.
    """
    shown = " ".join(map(str, config.seeds))
    if len(config.seeds) < 2 or len(set(config.seeds)) < len(config.seeds):
        raise UserError(f"--seeds {shown}: must be at least two, each once")
    for seed in config.seeds:
        if not 0 <= seed < 2**63:
            raise UserError(f"--seeds {shown}: must be in [0, 2**63)")
    if config.k < 1:
        raise UserError(f"--k {config.k}: must be at least 1")
    if config.num_workers < 0:
        raise UserError(f"--num_workers {config.num_workers}: must be 0 or more")
    check_pretrain(pretraining(config, config.seeds[0], ""))
