"""The settings that finetune, segment and upscale have in common: a pretrained encoder gets a head and is trained."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from fastmae.config.family import family_of
from fastmae.config.training import TrainingConfig, check_training
from fastmae.config.values import meant, need, need_at_least_one, need_size, need_statistics


@dataclass(frozen=True, kw_only=True)
class TuningConfig(TrainingConfig):
    """The settings of a training that begins with a pretrained encoder, whatever its head learns."""

    # Data.
    data_path: str | tuple[str, ...] | None = None  # type: ignore[assignment]
    """The data to train on, of which another part is tested on."""
    output_dir: str = "./output_dir"
    """The run folder, into which checkpoints, log.txt, metrics.jsonl and config.yaml are written."""

    # Model.
    finetune: str = ""
    """The pretrained encoder: a run folder of pretrain, one of its checkpoints, or a file with an encoder. Default:
    random weights, for comparison."""
    model: str | None = None
    """The name of the encoder's preset, if --finetune does not say it or is not given. The names of the official script
    are accepted: vit_large_patch16 is mae_vit_large_patch16."""
    input_size: tuple[int, ...] | None = None
    """Side of the images in pixels, or their height and width; position embeddings are interpolated to it. Default:
    that of the pretrained encoder."""
    patch_size: tuple[int, ...] | None = None
    """Side of a patch in pixels, or its height and width. Default: the encoder's; without --finetune, the preset's."""
    mean: tuple[float, ...] | None = None
    """What pixels are normalised by: one number per channel, as a share of the value range. Default: as the encoder
    says."""
    std: tuple[float, ...] | None = None
    """As mean. Default: as for mean."""
    tune: str = "full"
    """What is trained: everything (full); the head and the norm before it (linear); these and the last K blocks
    (last-K, such as last-2); or these and low-rank updates of the attention of every block (lora)."""
    lora_rank: int = 8
    """With --tune lora, the rank of the updates."""
    drop_path: float | None = None
    """Stochastic depth: the probability with which a branch of the last block is skipped for an image. It grows from 0
    with the depth of the block."""

    # Optimisation.
    layer_decay: float | None = None
    """The learning rate of a layer, as a share of that of the layer above."""
    min_lr: float = 1e-6
    """Learning rate at the end of the cosine schedule."""
    weight_decay: float = 0.05
    """Weight decay of AdamW. Parameters of one dimension, the class token and the position embeddings have none."""
    seed: int = 0
    """The number from which everything random follows: the head, the order of the images, crops and every
    augmentation."""

    # Speed and memory.
    autotune: Literal["auto", "off"] | None = None
    """Which code computes matrix products and attention on a CPU: what is fastest in a measurement of some seconds,
    which is kept for the next run (auto), or always PyTorch's own (off). Default: auto; a run that goes on keeps what
    it has, and with this flag it chooses anew. On a GPU nothing is measured. `--tune auto`
    and `--tune off` mean this, too."""

    # Saving, resuming, logging.
    resume: str = ""
    """`auto` continues from the newest intact checkpoint in output_dir, or starts if no run is there. `anew` starts and
    moves what an earlier run left there into a folder. Otherwise what to continue from: a run folder of
    finetune, or one of its checkpoints."""
    test_freq: int = 1
    """Epochs between two tests on the val part. The last epoch is always tested."""


def meant_by_tune(config: TuningConfig) -> None:
    """Takes ``--tune auto`` and ``--tune off``, as pretrain has them, as what --autotune says, in place.

    Raises:
        SettingError: --autotune says something else.
    """
    if meant("tune", config.tune, ("autotune",)) == "autotune":
        need(config, config.autotune in (None, config.tune), "tune", f"left out with --autotune={config.autotune}")
        object.__setattr__(config, "autotune", config.tune)
        object.__setattr__(config, "tune", "full")


def check_tuning(config: TuningConfig) -> None:
    """Refuses settings that cannot work, whatever the head, the data and the encoder.

    Raises:
        SettingError: naming the setting, its value and what it must be.
    """
    check_training(config)
    need_size(config, "patch_size")
    need_statistics(config)
    needed = partial(need, config)
    tunes = re.fullmatch(r"full|linear|lora|last-[1-9]\d*", config.tune) is not None
    needed(tunes, "tune", "full, linear, lora or last-K, such as last-2")
    need_at_least_one(config, "test_freq", "lora_rank")
    decay = config.layer_decay
    needed(decay is None or 0 < decay <= 1, "layer_decay", "above 0 and at most 1")
    needed(config.drop_path is None or 0 <= config.drop_path < 1, "drop_path", "at least 0 and below 1")
    check_gelu(config, config.model)


def check_gelu(config: Any, model: str | None) -> None:
    """Refuses ``--checkpointing gelu`` for models whose blocks cannot compute GELU again by itself.

    Raises:
        SettingError: naming what their blocks can.
    """
    can = family_of(model) == "vit" or config.checkpointing != "gelu"
    need(config, can, "checkpointing", f"none, selective or full for {model}; gelu is for mae_vit_*")
