"""In which group of ``--help`` each setting of pretrain and finetune is shown, and which ones come first."""

from fastmae.config.family import FAMILY
from fastmae.config.shape import SHAPE

MAIN = (
    "finetune", "data_path", "output_dir", "model", "input_size", "mask_ratio", "tune", "batch_size", "epochs", "blr",
    "device", "resume",
)  # fmt: skip
"""The settings that matter first. Each is in one of the groups as well."""

GROUPS = {
    "data": (
        "data_path", "predict", "data_weights", "root", "image_key", "layout", "axis", "constant_slices",
        "bands", "pages",
        "window", "spectrogram", "columns", "label_column", "in_chans",
        "pixel_type", "other_types", "value_range", "nodata", "mean", "std", "classes", "ignore_index",
        "reduce_zero_label", "crop_scale", "random_scale", "distortion", "flip", "aa", "reprob",
        "mixup", "cutmix", "mixup_switch_prob", "repeated_masks", "held_out", "shots", "label_share", "seeds",
    ),
    "model and masks": (
        "finetune", "model", "segmenter_head", "scale", "init", "input_size", "patch_size", "start_size", "grow_epochs",
        "mask_ratio", "mask_ratio_schedule", "masking", "masks", "norm_pix_loss", "decoder_attention",
        "predict_ratio", *SHAPE,
        *FAMILY, "nb_classes", "global_pool",
        "cls_token", "drop_path",
    ),
    "optimisation": (
        "batch_size", "accum_iter", "epochs", "blr", "lr", "min_lr", "schedule", "warmup_epochs", "layer_decay",
        "weight_decay", "clip_grad", "smoothing", "l2sp", "ema", "seed", "adversarial", "adversarial_start",
        "adversarial_warmup",
        "adversarial_lr", "adversarial_regulariser", "adversarial_r1",
    ),
    "speed and memory": (
        "device", "precision", "residual", "checkpointing", "compile", "tune", "lora_rank", "autotune", "num_workers",
        "image_decoder", "cache", "cache_gb", "pin_mem",
    ),
    "saving and resuming": (
        "output_dir", "resume", "save_freq", "checkpoint_freq", "keep", "keep_every", "async_save",
        "max_failed_saves",
    ),
    "logging": ("log_freq", "log_dir", "wandb", "mlflow", "probe", "probe_freq", "test_freq"),
    "distributed": ("parallel", "shard_size", "reduce", "hang_timeout"),
    "expert": (
        "start_epoch", "keep_last", "max_corrupt", "max_skipped", "ops", "attention", "cuda_graph", "float8", "profile",
    ),
}  # fmt: skip
"""The names of the settings by the title of their group, in the order in which they are shown. Names that a command
does not have are passed over."""
