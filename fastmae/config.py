"""Every setting of every command: typed, documented, frozen, and checked before anything loads.

It is the list of flags as well: fastmae/cli.py makes them from these fields and their docstrings. A setting that is
None is filled in from the data by ``resolve``, and what was chosen is written into the run folder.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar, get_args

import tyro

from fastmae.errors import UserError

T = TypeVar("T")

BenchOp = Literal[
    "random_masking", "gather_patches", "scatter_patches", "assemble_tokens", "masked_mse", "attention", "linear"
]  # fmt: skip
Masking = Literal["random", "block", "grid", "file"]
ExportFormat = Literal["official", "timm", "hf", "onnx", "torch-export"]
Pool = Literal["mean", "cls", "both"]
AnomalyPool = Literal["tokens", "mean", "cls", "both"]
LinearProbe = Literal["logistic", "lars"]
FULL_SHUFFLE = "a full shuffle"
PUBLISHED_RATIO = 0.75
PROBE_RATES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
PROBE_BATCH = 16_384
BenchSwitch = Literal[
    "bf16", "bf16-residual", "tf32", "checkpointing-selective", "checkpointing-full", "compile-block", "compile-model",
    "float8", "cuda-graph", "clip-grad", "ema", "fsdp", "hsdp", "reduce-bf16", "cross",
]  # fmt: skip
BenchPeer = Literal["published", "strong", "strong-compiled", "transformers", "transformers-compiled", "timm"]
BENCH_OPS: tuple[BenchOp, ...] = get_args(BenchOp)
BenchPart = Literal[
    "kernels", "attention", "loader", "step", "batch-sizes", "input-sizes", "ranks", "end-to-end"
]  # fmt: skip
BENCH_PARTS: tuple[BenchPart, ...] = get_args(BenchPart)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Pretrain a masked autoencoder. Flags of the published script have their published names and meanings."""

    data_path: str | tuple[str, ...] = "digits"
    """`digits` (built in), a folder of images (DATA_PATH/train/CLASS/*.JPEG, or flat), .tar or .parquet shards (a file,
    a folder, or a pattern such as 'part-{000..146}.tar'), or a .npy, .npz, IDX or CIFAR file or folder. Several are
    taken one after another."""
    output_dir: str = "./output_dir"
    """The run folder: checkpoints, log.txt, metrics.jsonl, config.json, reconstructions."""
    model: str | None = None
    """A preset, such as mae_vit_large_patch16 (the default for images over 64 pixels) or mae_vit_tiny_patch4 (the
    default for smaller ones)."""
    input_size: tuple[int, ...] | None = None
    """Side of the training crops in pixels, or height and width. Default: 224; for tiny_patch4 the images' own size."""
    start_size: tuple[int, ...] | None = None
    """Side of the crops of the first epochs, or height and width; it grows to input_size in steps of whole patches.
    Default: input_size from the beginning, as published."""
    grow_epochs: int | None = None
    """With start_size, the number of epochs before crops have input_size. Default: 80 % of the epochs."""
    mask_ratio: float = PUBLISHED_RATIO
    """Share of the patches that is masked. --masks says it itself: any value but the default must then be the same."""
    masking: Masking | None = None
    """Which patches: any at random, as published; rectangles (block); all but one of every 2×2 (grid); those that
    --masks says (file). Default: random, with --masks file."""
    masks: str = ""
    """A .npy file of masks, bool or uint8 [B, rows, columns] of patches with 1 where masked, of which every draw takes
    one at random."""
    norm_pix_loss: bool = False
    """Predict pixels normalised by the mean and variance of their patch."""
    decoder_attention: Literal["self", "cross"] = "self"
    """What the decoder predicts a patch from: all other tokens, as published (self), or what the encoder saw alone
    (cross, as CrossMAE). They are different models."""
    decoder_depth: int | None = None
    """Blocks of the decoder. Default: those of the model."""
    predict_ratio: float | None = None
    """With --decoder_attention cross: predict this share of all patches, drawn from the masked ones. Default: all that
    are masked."""

    batch_size: int = 64
    """Images a rank and micro-step; the global batch is batch_size · accum_iter · ranks."""
    epochs: int | None = None
    """Default: 400, as published; 60 for the built-in digits."""
    accum_iter: int = 1
    """Micro-steps whose gradients are added up before the optimiser steps."""
    lr: float | None = None
    """Absolute learning rate. Default: blr · global batch / 256."""
    blr: float | None = None
    """Learning rate for a global batch of 256. Default: 1e-3, as published; 3e-3 for the built-in digits."""
    min_lr: float = 0.0
    """Learning rate at the end of the cosine."""
    clip_grad: float | None = None
    """Largest norm of the gradient over all parameters; a longer one is scaled down. Default: any, as published."""
    ema: float | None = None
    """Keep a moving average of the weights, of which a step leaves this share as it was, such as 0.9999, and write it
    as checkpoint-EPOCH-ema.pth. Default: none, as published."""
    warmup_epochs: float | None = None
    """Epochs of linear warm-up. Default: 40, as published; a tenth of the epochs for the built-in digits."""
    weight_decay: float = 0.05
    """On parameters of two or more dimensions, the class token and the mask token."""

    crop_scale: tuple[float, float] | None = None
    """Smallest and largest share of an image's area that a crop takes. Default: 0.2 1; for the digits 0.7 1."""
    flip: bool | None = None
    """Flip half of the crops horizontally. Default: for colour images."""
    in_chans: int | None = None
    """Channels of the model: 1 turns colour into gray, 3 repeats gray. Default: those of the data."""
    mean: tuple[float, ...] | None = None
    """A number a channel in [0, 1]. Default: ImageNet's for colour folders, otherwise measured on the data."""
    std: tuple[float, ...] | None = None
    """A number a channel in [0, 1]; as for mean."""

    device: str | None = None
    """cpu, cuda or cuda:N. Default: cuda where there is one."""
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"
    """bf16 is autocast over float32 weights; tf32 (a GPU) rounds the factors of float32 products. auto: bf16 on
    a GPU that has it, otherwise fp32."""
    residual: Literal["fp32", "bf16"] = "fp32"
    """Format of the tokens between blocks under --precision bf16; bf16 is half the memory, rounded in every block."""
    checkpointing: Literal["none", "selective", "full"] = "none"
    """What blocks compute again in the backward pass to save memory: nothing; all but matrix products and attention;
    everything. The results are the same bits."""
    compile: Literal["off", "block", "model"] = "off"
    """torch.compile of each block, or of the whole loss. The first step takes minutes; a CPU needs a C++ compiler."""
    float8: bool = False
    """Matrix products of the blocks in float8 (torchao, the extra `float8`), on a GPU that has it (compute capability
    8.9 and up), with --precision bf16 and --compile."""
    cuda_graph: bool = False
    """Launch forward and backward pass as one CUDA graph, without Python between its kernels. One rank, a GPU."""
    ops: Literal["auto", "triton", "native", "reference"] = "auto"
    """Masking, gathering, assembling and the loss: Triton kernels (a GPU), C++ (a CPU), or the PyTorch that defines
    them. auto: what is made for the device."""
    attention: Literal["auto", "sdpa", "xformers", "triton"] = "auto"
    """sdpa is torch's own choice. auto: the fastest in the table that `fastmae bench attention --write` measures, sdpa
    for what is not in it."""
    parallel: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    """How several ranks share the weights: each has all (DistributedDataParallel), each has a piece (FSDP2), or groups
    of ranks have all together."""
    shard_size: int | None = None
    """Ranks that hold one copy of the weights together under --parallel hsdp. Default: those of a machine."""
    reduce: Literal["fp32", "bf16"] = "fp32"
    """In which format gradients travel between ranks; bf16 is half the traffic, rounded."""
    seed: int = 0
    """Of weights, order, crops, flips and masks."""
    num_workers: int | None = None
    """Decoding threads a rank. Default: the cores that this process may use, at most 10."""
    pin_mem: bool = True
    """Copy batches to a GPU from page-locked memory."""
    decoder: Literal["auto", "pool", "dali-cpu", "dali-gpu"] = "auto"
    """Of plain JPEGs: threads of this process, or NVIDIA DALI (the extra `dali`) on the CPU or the GPU; the pool takes
    all else. auto: pool, until DALI on a GPU has been measured."""
    keep_last: bool = False
    """Fill the last partial batch of an epoch up from the epoch's beginning instead of dropping it, as published."""
    repeated_masks: int = 1
    """Rows of a batch that share a decoded crop, each with masks of its own: less to decode, less variety. An epoch has
    as many times the steps."""
    cache: Literal["none", "ram"] = "none"
    """ram: keep images in memory after they were first read, decoded if all of them fit. The results are the same."""
    cache_gb: float | None = None
    """What --cache ram may take, in GiB a rank. Default: half of the memory that is available, shared
    by the ranks of the machine."""
    max_corrupt: float = 0.01
    """Largest share of unusable images before the run stops; 20 of them are always tolerated."""

    max_skipped: int = 20
    """Steps in a row with a loss or gradient that is not finite before the run goes back to its newest checkpoint and
    on with other data; if that happens there once more, it stops."""
    hang_timeout: float | None = 1800.0
    """Seconds without a finished step after which a process shows the stacks of its threads and ends; 0 for never."""

    resume: str = ""
    """`auto` continues output_dir's newest intact checkpoint, or starts if there is none; or a run folder, one of its
    checkpoints, an official .pth or .safetensors file, or a folder of transformers."""
    start_epoch: int = 0
    """Epoch to start at; a resumed checkpoint overrules it."""
    save_freq: int = 20
    """Epochs between official-format checkpoint-EPOCH.pth files (their weights beside them as .safetensors) and
    reconstruction pictures."""
    checkpoint_freq: int | None = None
    """Optimiser steps between resumable checkpoints. Default: the fewest whole epochs of at least 300 steps."""
    keep: int = 2
    """How many of the newest resumable checkpoints stay."""
    keep_every: int | None = None
    """Also keep, for ever, the resumable checkpoints at multiples of this many times checkpoint_freq."""
    async_save: bool = True
    """Write resumable checkpoints while training goes on, from a copy in the host's memory."""

    log_freq: int = 20
    """Optimiser steps between reads of the losses; each step's loss is logged all the same."""
    log_dir: str | None = None
    """Also write TensorBoard files here (needs the extra `track`)."""
    wandb: str | None = None
    """Also log to this project of Weights & Biases (needs the extra `wandb`)."""
    profile: int | None = None
    """Trace so many steps, after 5 others, into OUTPUT_DIR/profile."""
    probe: bool | None = None
    """Measure k-NN and linear-probe accuracy before and after. Default: where labels exist, up to 20,000 images."""
    probe_freq: int | None = None
    """Also measure them every so many epochs, on up to 20,000 images of each part. Default: never."""


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Fine-tune a pretrained encoder on labelled images. Flags of the published script have their published names."""

    finetune: str = ""
    """What to begin with: a run folder of pretrain, one of its checkpoints, or a file with an encoder. Empty: random
    weights, to compare with."""
    data_path: str | tuple[str, ...] = "digits"
    """Labelled data, as for pretrain; its train part is learnt, its val or test part is scored (without one, a fifth is
    held out)."""
    output_dir: str = "./output_dir"
    """The run folder: checkpoints, log.txt, metrics.jsonl, config.json."""
    model: str | None = None
    """The preset, for a --finetune that does not say, or without one; vit_large_patch16 is mae_vit_large_patch16."""
    input_size: tuple[int, ...] | None = None
    """Side of the images in pixels, or height and width. Default: that of --finetune. Positions are interpolated."""
    nb_classes: int | None = None
    """Default: as many as the labels have."""
    tune: str = "full"
    """What is trained: full; linear (the head and the norm before it); last-K (those and the last K blocks); lora
    (those and updates of low rank of every block's attention)."""
    lora_rank: int = 8
    """With --tune lora, the rank of the updates."""
    global_pool: bool = True
    """Classify the mean of the patch tokens, as published; --cls_token turns it off."""
    cls_token: bool = False
    """Classify the class token instead."""

    batch_size: int = 64
    """Images a rank and micro-step; the global batch is batch_size · accum_iter · ranks, 1024 as published."""
    epochs: int | None = None
    """Default: as published, 100 for encoders up to the width of ViT-B, otherwise 50; 20 for the built-in digits."""
    accum_iter: int = 1
    """Micro-steps whose gradients are added up before the optimiser steps."""
    lr: float | None = None
    """Absolute learning rate, of the head. Default: blr · global batch / 256."""
    blr: float | None = None
    """Learning rate for a global batch of 256. Default: as published, 5e-4 up to ViT-B, otherwise 1e-3; 1e-2 for the
    built-in digits."""
    layer_decay: float | None = None
    """What a layer's learning rate is of that of the layer above. Default: as published, 0.65 up to ViT-B, otherwise
    0.75."""
    min_lr: float = 1e-6
    """Learning rate at the end of the cosine."""
    warmup_epochs: float = 5.0
    """Epochs of linear warm-up."""
    weight_decay: float = 0.05
    """On parameters of two or more dimensions but for the class token and the positions."""
    clip_grad: float | None = None
    """Largest norm of the gradient over all parameters; a longer one is scaled down. Default: any, as published."""
    drop_path: float | None = None
    """Chance that a branch of the last block is left out of a sample; it grows from 0 with depth. Default: as
    published, 0.1 up to ViT-B, 0.2 for ViT-L, 0.3 for ViT-H; 0 where not all is tuned."""

    crop_scale: tuple[float, float] | None = None
    """Smallest and largest share of an image's area that a crop takes. Default: 0.08 1; for the digits 0.7 1."""
    flip: bool | None = None
    """Flip half of the crops horizontally. Default: for colour images."""
    aa: str | None = None
    """RandAugment, as rand-mMAGNITUDE[-nNUMBER][-mstdDEVIATION]-inc1, or empty for none. Default: as published,
    rand-m9-mstd0.5-inc1, for image files; none for arrays and the digits."""
    reprob: float | None = None
    """Chance of an image to lose a rectangle to noise (random erasing). Default: 0.25; for the digits 0."""
    smoothing: float = 0.1
    """Share of a label that is spread over all classes."""
    mixup: float | None = None
    """α of mixup's Beta distribution, 0 for none. Default: 0.8; for the digits 0."""
    cutmix: float | None = None
    """α of cutmix's, 0 for none. Default: 1; for the digits 0."""
    mixup_switch_prob: float = 0.5
    """With both, the chance of a pair of images to be cut rather than blended."""

    device: str | None = None
    """cpu, cuda or cuda:N. Default: cuda where there is one."""
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"
    """As for pretrain, and so are the flags from here on."""
    checkpointing: Literal["none", "selective", "full"] = "none"
    """What blocks compute again in the backward pass to save memory."""
    compile: Literal["off", "block", "model"] = "off"
    """torch.compile of each block, or of the whole loss."""
    ops: Literal["auto", "triton", "native", "reference"] = "auto"
    """Triton kernels (a GPU), C++ (a CPU), or the PyTorch that defines them."""
    attention: Literal["auto", "sdpa", "xformers", "triton"] = "auto"
    """Which backend of attention."""
    parallel: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    """How several ranks share the weights."""
    shard_size: int | None = None
    """Ranks that hold one copy of the weights together under --parallel hsdp. Default: those of a machine."""
    reduce: Literal["fp32", "bf16"] = "fp32"
    """In which format gradients travel between ranks."""
    seed: int = 0
    """Of the head, order, crops and every augmentation."""
    num_workers: int | None = None
    """Decoding threads a rank. Default: the cores that this process may use, at most 10."""
    pin_mem: bool = True
    """Copy batches to a GPU from page-locked memory."""
    max_corrupt: float = 0.01
    """Largest share of unusable images before the run stops; 20 of them are always tolerated."""

    max_skipped: int = 20
    """Steps in a row with a loss or gradient that is not finite before the run stops."""
    hang_timeout: float | None = 1800.0
    """Seconds without a finished step after which a process shows the stacks of its threads and ends; 0 for never."""
    resume: str = ""
    """`auto` continues output_dir's newest intact checkpoint, or starts if there is none; or a run folder of finetune
    or one of its checkpoints."""
    save_freq: int = 20
    """Epochs between checkpoint-EPOCH.pth files (their weights beside them as .safetensors)."""
    test_freq: int = 1
    """Epochs between tests on the val part; the last epoch is always tested."""
    checkpoint_freq: int | None = None
    """Optimiser steps between resumable checkpoints. Default: the fewest whole epochs of at least 300 steps."""
    keep: int = 2
    """How many of the newest resumable checkpoints stay."""
    async_save: bool = True
    """Write resumable checkpoints while training goes on, from a copy in the host's memory."""
    log_freq: int = 20
    """Optimiser steps between reads of the losses; each step's loss is logged all the same."""
    log_dir: str | None = None
    """Also write TensorBoard files here (needs the extra `track`)."""
    wandb: str | None = None
    """Also log to this project of Weights & Biases (needs the extra `wandb`)."""


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Measure frozen features: weighted k-NN and a linear classifier on the data's labels."""

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A run folder, one of its checkpoints, an official .pth or .safetensors file, or a folder of transformers."""
    data_path: str | tuple[str, ...] = "digits"
    """Labelled data; its train part fits, its val or test part is scored (without one, a fifth is held out). Several
    are taken one after another."""
    pool: Pool = "mean"
    """The mean of the patch tokens, the class token (on which pretraining puts no loss), or both side by side."""
    k: tuple[int, ...] = (20,)
    """Neighbours of the k-NN; several numbers cost little more than the largest."""
    linear: LinearProbe = "logistic"
    """Logistic regression, for data of up to some ten thousand images; or the published probe (lars): LARS, BatchNorm
    without affine, 90 epochs, on features of central crops."""
    blr: tuple[float, ...] = PROBE_RATES
    """With --linear lars: learning rates for a batch of 256, trained at once. Of several, the best on a held-out fifth
    of the train part is taken; the published one is 0.1."""
    linear_batch: int = PROBE_BATCH
    """With --linear lars: features a step, at most all; 16384 is published, fewer make more steps of small data."""
    batch_size: int = 256
    """Images a forward pass."""
    device: str | None = None
    """cpu, cuda or cuda:N. Default: cuda where there is one."""
    num_workers: int | None = None
    """Decoding threads. Default: the cores that this process may use, at most 10."""
    model: str | None = None
    """The preset, for a checkpoint that does not say."""
    output: str | None = None
    """A folder for a table of classes and confusion matrices, too: probe.json and confusion.png."""
    json: bool = False
    """Print one line of JSON instead of a table."""


@dataclass(frozen=True, kw_only=True)
class ReconstructConfig:
    """Draw originals, masked images and reconstructions side by side."""

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """With its decoder: a run folder, one of its checkpoints, an official .pth or .safetensors file, or a folder of
    transformers."""
    images: str | tuple[str, ...] = "digits"
    """Image files, or any data that --data_path of pretrain accepts."""
    output: str = "grid.png"
    """The picture to write."""
    count: int = 8
    """How many of the images, evenly spaced."""
    mask_ratio: float = PUBLISHED_RATIO
    """Share of the patches that is masked. As for pretrain, so are the next two."""
    masking: Masking | None = None
    """random, block, grid or file. Default: random, with --masks file."""
    masks: str = ""
    """A .npy file of masks."""
    mask_image: tuple[str, ...] = ()
    """Pictures of the masks instead: one for all images or one an image, of its size, white where it is masked. Every
    patch that white touches is."""
    paste_visible: bool = True
    """Show visible patches as they are. Otherwise as predicted, which no loss asks for."""
    errors: bool = False
    """A row of absolute errors, too."""
    sweep: tuple[float, ...] = ()
    """Mask ratios instead: two rows for each, or with an --output that ends in .gif a frame for each."""
    seed: int = 0
    """Of the masks."""
    device: str | None = None
    """cpu, cuda or cuda:N. Default: cuda where there is one."""
    model: str | None = None
    """The preset, for a checkpoint that does not say."""


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """Write frozen features with the names and labels of their images."""

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A run folder, one of its checkpoints, an official .pth or .safetensors file, or a folder of transformers."""
    data_path: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """One or several, of every kind that --data_path of pretrain takes."""
    output: str
    """A file that ends in .npz, or in .parquet (needs the extra `parquet`)."""
    split: Literal["train", "val"] = "train"
    """Which part, of data that have parts; a fifth of others is held out as val."""
    pool: Pool = "mean"
    """The mean of the patch tokens, the class token, or both side by side."""
    batch_size: int = 256
    """Images a forward pass."""
    device: str | None = None
    """cpu, cuda or cuda:N. Default: cuda where there is one."""
    num_workers: int | None = None
    """Decoding threads. Default: the cores that this process may use, at most 10."""
    model: str | None = None
    """The preset, for a checkpoint that does not say."""


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Find the images that are nearest to others by the cosine of their features."""

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A run folder, one of its checkpoints, an official .pth or .safetensors file, or a folder of transformers."""
    queries: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="QUERY")]
    """Image files, or any data that --data_path of pretrain accepts."""
    data_path: str | tuple[str, ...] = "digits"
    """Where to search: of data that have parts, the train part."""
    k: int = 5
    """How many images for a query; the query itself does not count."""
    count: int = 8
    """How many of the queries, evenly spaced."""
    output: str = "search.png"
    """The picture to write."""
    pool: Pool = "mean"
    """The mean of the patch tokens, the class token, or both side by side."""
    batch_size: int = 256
    """Images a forward pass."""
    device: str | None = None
    """cpu, cuda or cuda:N. Default: cuda where there is one."""
    num_workers: int | None = None
    """Decoding threads. Default: the cores that this process may use, at most 10."""
    model: str | None = None
    """The preset, for a checkpoint that does not say."""
    json: bool = False
    """Print one line of JSON instead of a table."""


@dataclass(frozen=True, kw_only=True)
class AnomalyConfig:
    """Score images by how little they are like normal ones: distance of features, and error of reconstruction."""

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """With its decoder: a run folder, one of its checkpoints, an official .pth or .safetensors file, or a folder of
    transformers."""
    data_path: str | tuple[str, ...] = "digits"
    """Normal images: of data that have parts, the train part."""
    test_path: str | tuple[str, ...] | None = None
    """Images to score. Default: the val or test part of data_path (without one, a fifth is held out)."""
    left_out: str | None = None
    """A class of labelled data (the name of its folder, or its number) that is taken out of the normal images."""
    k: int = 1
    """The distance is the mean of those to so many nearest normal images."""
    pool: AnomalyPool = "tokens"
    """What is compared: patch tokens, each with those of its place, for images of things that lie alike; or of other
    images the mean of the patch tokens, the class token, or both side by side."""
    mask_ratio: float = PUBLISHED_RATIO
    """Share of the patches that is masked at a time."""
    rounds: int = 4
    """How often each patch is masked, at least, with different others."""
    seed: int = 0
    """Of the masks."""
    count: int = 8
    """How many heat maps: of the images with the largest distance."""
    output: str = "anomaly"
    """A folder for every score (scores.json) and heat maps (anomaly.png)."""
    batch_size: int = 256
    """Images a forward pass."""
    device: str | None = None
    """cpu, cuda or cuda:N. Default: cuda where there is one."""
    num_workers: int | None = None
    """Decoding threads. Default: the cores that this process may use, at most 10."""
    model: str | None = None
    """The preset, for a checkpoint that does not say."""
    json: bool = False
    """Print one line of JSON instead of a table."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a pretrained model in a form that other tools read."""

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A run folder, one of its checkpoints, an official .pth or .safetensors file, or a folder of transformers."""
    to: ExportFormat
    """official: .pth or .safetensors with the published names. timm: a state dict for its vit_*_patch*_224.mae. hf: a
    folder for transformers' ViTMAEForPreTraining, or ViTModel for the encoder. onnx, torch-export: the encoder as a
    program (.onnx, .pt2)."""
    output: str
    """The file to write, or the folder for hf."""
    part: Literal["encoder", "full"] | None = None
    """Without or with the decoder. Default: with it, where the checkpoint has one and the format is official or hf."""
    variant: Literal["fp32", "fp16", "bf16", "int8"] = "fp32"
    """Of a program's numbers: float32; fp16; bf16 (torch-export alone); int8 matrices (onnx alone)."""
    input: Literal["float", "uint8"] = "float"
    """What a program takes: normalised float32 [N, C, H, W], or uint8 [N, H, W, C] that it normalises itself."""
    check: str | tuple[str, ...] | None = None
    """Labelled data, such as `digits`, on which a program's features and speed are compared with fastmae's."""
    model: str | None = None
    """The preset, for a checkpoint that does not say."""


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Read and decode every image as a run would, and name what it could not use. Exit status 1 if there is any."""

    data_path: tuple[str, ...]
    """One or several, of every kind that --data_path of pretrain takes; their val parts are checked too."""
    in_chans: int | None = None
    """Channels of the model to be trained. Default: as pretrain chooses, those of the data."""
    num_workers: int | None = None
    """Decoding threads. Default: the cores that this process may use, at most 10."""
    output: str | None = None
    """A file for all that is unusable: JSON lines of part, index, name and reason."""


@dataclass(frozen=True, kw_only=True)
class InfoConfig:
    """Show versions, devices, and which backend of what would be used and why."""

    json: bool = False
    """Print one line of JSON instead of a table."""


@dataclass(frozen=True, kw_only=True)
class BenchKernelsConfig:
    """Time the ops and attention beside eager PyTorch and torch.compile; no time is given to a wrong result."""

    models: tuple[str, ...] = ("mae_vit_base_patch16", "mae_vit_large_patch16", "mae_vit_huge_patch14")
    """Presets whose shapes are timed."""
    only: tuple[BenchOp, ...] = BENCH_OPS
    """Which of the ops."""
    batch_size: int | None = None
    """Images a call. Default: 32 on a CPU, 256 on a GPU."""
    device: str | None = None
    """cpu, cuda or cuda:N. Default: cuda where there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of tokens and predictions, as autocast makes them. auto: bf16 on a GPU that has it, otherwise fp32."""
    compile: bool = True
    """Time torch.compile of the eager reference as well; compiling takes up to a minute a case on a CPU."""
    rounds: int = 15
    """Samples a contestant; contestants take turns."""
    sample_ms: float = 20.0
    """Calls are repeated until a sample takes this many milliseconds."""
    graph: bool = True
    """On a GPU: replay calls from a CUDA graph, so that Python's launches are not timed."""
    output: str | None = None
    """A folder for every sample (JSON) and a picture (PNG; needs the extra `bench`)."""


@dataclass(frozen=True, kw_only=True)
class BenchAttentionConfig:
    """Time the backends of attention, forward and backward, and keep the fastest for each shape."""

    models: tuple[str, ...] = ("mae_vit_base_patch16", "mae_vit_large_patch16", "mae_vit_huge_patch14")
    """Presets whose shapes are timed: the encoder's with a quarter of the tokens and with all, the decoder's."""
    shapes: tuple[str, ...] = ()
    """Shapes to time instead, as TOKENSxHEADSxHEAD_DIM, such as 50x12x64."""
    batch_size: int | None = None
    """Images a call. Default: 8 on a CPU, 256 on a GPU."""
    device: str | None = None
    """cpu, cuda or cuda:N. Default: cuda where there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of queries, keys and values. auto: bf16 on a GPU that has it, otherwise fp32."""
    rounds: int = 15
    """Samples a contestant; contestants take turns."""
    sample_ms: float = 20.0
    """Calls are repeated until a sample takes this many milliseconds."""
    graph: bool = True
    """On a GPU: replay calls from a CUDA graph, so that Python's launches are not timed."""
    write: tuple[str, ...] | None = None
    """Enter the winners in the table that `--attention auto` looks in: yours, or the file that is named here."""
    output: str | None = None
    """A folder for every sample (JSON)."""


@dataclass(frozen=True, kw_only=True)
class BenchStepConfig:
    """Time a training step beside other implementations, and ours with one switch of pretrain each, once their losses
    agree. Under torchrun by all ranks, of which the slowest counts."""

    model: str = "mae_vit_base_patch16"
    """A preset."""
    input_size: int | None = None
    """Side of the images in pixels. Default: the model's."""
    batch_size: int = 8
    """Images a rank and step."""
    device: str | None = None
    """cpu, cuda or cuda:N. Default: cuda where there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    """bf16 is autocast over float32 weights. auto: bf16 on a GPU that has it, otherwise fp32."""
    peers: tuple[BenchPeer, ...] = ("published", "strong", "transformers", "timm")
    """Whom to time as well: the published formulation in its own loop (published), with torch's attention and a fused
    optimiser (strong), of timm's blocks (timm), and transformers' ViTMAE; those with -compiled through torch.compile,
    which takes minutes on a CPU. `--peers` alone is nobody."""
    switches: tuple[BenchSwitch, ...] = ()
    """Time our step with each of these as well; fsdp, hsdp and reduce-bf16 need several ranks. Compiling takes minutes
    on a CPU."""
    phases: bool = False
    """Say where the time goes: forward, backward, optimiser, and communication where there are several ranks."""
    rounds: int = 7
    """Steps a contestant; contestants take turns."""
    output: str | None = None
    """A folder for every sample (JSON)."""


@dataclass(frozen=True, kw_only=True)
class BenchLoaderConfig:
    """Time loading, from files to crops, beside the published pipeline; no time is given to wrong images."""

    data_path: tuple[str, ...] | None = None
    """Image files, each as one --data_path of pretrain takes them, such as a folder and the same images in tar shards.
    Default: made in a temporary folder, 500×375 pixels and about 110 KB each."""
    kinds: tuple[Literal["folder", "tar", "parquet"], ...] | None = None
    """As what images are made. Default: the same ones as all three."""
    files: int | None = None
    """How many images are made. Default: 1000."""
    decoders: tuple[Literal["pool", "dali-cpu", "dali-gpu"], ...] = ("pool", "dali-cpu", "dali-gpu")
    """Which, beside the pool."""
    input_size: int = 224
    """Side of the crops in pixels."""
    batch_size: int = 64
    """Images a batch."""
    batches: int = 8
    """Batches a sample, rounded up to a multiple of num_workers: the published pipeline's processes make one each."""
    num_workers: int | None = None
    """Decoding threads, and the published pipeline's processes. Default: the cores that this process may use, at most
    10."""
    device: str | None = None
    """cpu, cuda or cuda:N. Default: cuda where there is one."""
    rounds: int = 7
    """Samples a contestant; contestants take turns."""
    output: str | None = None
    """A folder for every sample (JSON)."""


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


@dataclass(frozen=True, kw_only=True)
class BenchEndToEndConfig:
    """Time training from JPEG files: our loader and step, beside our step alone and the published loop with its
    pipeline, once their losses agree."""

    model: str = "mae_vit_base_patch16"
    """A preset."""
    data_path: str | None = None
    """Image files. Default: made in a temporary folder, 500×375 pixels and about 110 KB each."""
    files: int | None = None
    """How many images are made. Default: 256, or 4 batches if that is more."""
    batch_size: int | None = None
    """Images a step. Default: 8 on a CPU, 256 on a GPU."""
    steps: int | None = None
    """Steps a sample, rounded up to a multiple of num_workers: the published pipeline's processes make a batch each.
    Default: 4 on a CPU, 50 on a GPU."""
    num_workers: int | None = None
    """Decoding threads, and the published pipeline's processes. Default: the cores that this process may use, at most
    10."""
    decoder: Literal["pool", "dali-cpu", "dali-gpu"] = "pool"
    """Ours, of plain JPEGs."""
    device: str | None = None
    """cpu, cuda or cuda:N. Default: cuda where there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16 is autocast over float32 weights. auto: bf16 on a GPU that has it, otherwise fp32."""
    compile: Literal["off", "block", "model"] = "off"
    """Of our step, as for pretrain."""
    rounds: int = 7
    """Samples a contestant; contestants take turns."""
    output: str | None = None
    """A folder for every sample (JSON)."""


@dataclass(frozen=True, kw_only=True)
class BenchAllConfig:
    """Measure this machine's ceilings and everything that the other benchmarks measure, into one JSON and one report
    (HTML). Each part is a command of its own; one that cannot run here is named, and the rest goes on."""

    output: str
    """A folder for all samples (JSON) and report.html."""
    model: str = "mae_vit_base_patch16"
    """A preset."""
    only: tuple[BenchPart, ...] = BENCH_PARTS
    """Which parts; the ceilings are always measured."""
    batch_sizes: tuple[int, ...] | None = None
    """Images a step, one timing of the step each. The middle one is that of all other parts. Default: 4 8 16 on a CPU,
    64 128 256 on a GPU."""
    input_sizes: tuple[int, ...] | None = None
    """Sides of the images in pixels, one timing of the step each. Default: about 0.7, 1 and 1.3 times the model's."""
    ranks: tuple[int, ...] | None = None
    """Numbers of ranks on this machine, one timing of the step each. Default: 1, 2, 4 … up to the GPUs; on a CPU 1 and
    2, if there are two cores."""
    peers: tuple[BenchPeer, ...] = ("published", "strong", "transformers", "timm")
    """Whom to time beside our step, as for bench step."""
    switches: tuple[BenchSwitch, ...] = ()
    """Switches of our step to time as well, as for bench step."""
    device: str | None = None
    """cpu or cuda. Default: cuda where there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16 is autocast over float32 weights. auto: bf16 on a GPU that has it, otherwise fp32."""
    rounds: int | None = None
    """Samples a contestant, of every part. Default: each part's own, 7 or 15; 3 with --quick."""
    quick: bool = False
    """A first look: few and short samples, nothing compiled, one kind of files, peers in one timing of the step."""


@dataclass(frozen=True, kw_only=True)
class BenchCheckpointConfig:
    """Time what saving a checkpoint costs training, in the background and at once; and its check when a run goes on."""

    model: str = "mae_vit_small_patch16"
    """A preset."""
    batch_size: int = 64
    """Images a step."""
    device: str | None = None
    """cpu, cuda or cuda:N. Default: cuda where there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16 is autocast over float32 weights. auto: bf16 on a GPU that has it, otherwise fp32."""
    rounds: int = 5
    """Samples of each, in turns."""
    folder: str | None = None
    """Where checkpoints are written for a moment: on the disk of a run. Default: the system's temporary folder."""
    output: str | None = None
    """A folder for every sample (JSON)."""


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Measure speed on this machine."""

    what: (
        Annotated[BenchKernelsConfig, tyro.conf.subcommand("kernels")]
        | Annotated[BenchAttentionConfig, tyro.conf.subcommand("attention")]
        | Annotated[BenchStepConfig, tyro.conf.subcommand("step")]
        | Annotated[BenchLoaderConfig, tyro.conf.subcommand("loader")]
        | Annotated[BenchCheckpointConfig, tyro.conf.subcommand("checkpoint")]
        | Annotated[BenchScalingConfig, tyro.conf.subcommand("scaling")]
        | Annotated[BenchEndToEndConfig, tyro.conf.subcommand("end-to-end")]
        | Annotated[BenchAllConfig, tyro.conf.subcommand("all")]
    )


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """What the defaults depend on."""

    kind: str
    """`digits`, `array`, or `folder`: image files, wherever they lie."""
    channels: int
    size: tuple[int, int] | None
    """(height, width) of the images in pixels; None where they differ."""
    labelled: bool
    length: int
    order: str = FULL_SHUFFLE
    """What an epoch's order depends on besides the seed."""
    found: str = ""
    """Where the images lie, for people."""


@dataclass(frozen=True, kw_only=True)
class MaskFacts:
    """What --masks holds."""

    mask_ratio: float
    found: str
    """What the masks are, for people; the same only if they are the same."""


SMALL_SIDE = 64
SMALL_MODEL = "mae_vit_tiny_patch4"
PROBE_LIMIT = 20_000


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig(PretrainConfig):
    """A PretrainConfig in which nothing is left open; what the run folder keeps."""

    model: str
    input_size: tuple[int, int]
    start_size: tuple[int, int] | None
    """None without growth; then grow_epochs is 0."""
    grow_epochs: int
    masking: Masking
    epochs: int
    lr: float
    blr: float
    warmup_epochs: float
    crop_scale: tuple[float, float]
    flip: bool
    in_chans: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_workers: int
    probe: bool
    global_batch: int
    """batch_size · accum_iter · ranks."""
    dataset_length: int
    order: str
    """What an epoch's order depends on besides the seed."""
    given_masks: str
    """What --masks holds; empty without."""


# What the meaning of "step k" depends on: a run cannot be continued with another value of any of these. The split of
# the global batch into ranks, batches and micro-steps is not among them.
FIXED_IN_A_RUN = (
    "model", "input_size", "in_chans", "norm_pix_loss", "mask_ratio", "mean", "std", "crop_scale", "flip",
    "seed", "global_batch", "dataset_length", "order", "keep_last", "repeated_masks",
    "ema", "masking", "given_masks", "start_size", "grow_epochs", "decoder_attention", "decoder_depth", "predict_ratio",
)  # fmt: skip
# What those were in a checkpoint from before they could be chosen.
UNLESS_SAVED = {
    "order": FULL_SHUFFLE, "keep_last": False, "repeated_masks": 1, "ema": None, "masking": "random", "given_masks": "",
    "start_size": None, "grow_epochs": 0, "decoder_attention": "self", "decoder_depth": None, "predict_ratio": None,
}  # fmt: skip


def resolve(
    config: PretrainConfig,
    facts: DataFacts,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    ranks: int,
    num_workers: int,
    masks: MaskFacts | None = None,
) -> ResolvedConfig:
    """Fills in what was left open, from the data (``facts``, its ``mean`` and ``std``), --masks and the machine."""
    digits = facts.kind == "digits"
    in_chans = config.in_chans or facts.channels
    input_size: tuple[int, ...] = (224, 224)
    model = config.model
    if model is None:
        small = facts.size is not None and max(facts.size) <= SMALL_SIDE
        model = SMALL_MODEL if small else "mae_vit_large_patch16"
    if config.input_size is not None:
        input_size = config.input_size
    elif model == SMALL_MODEL and facts.size is not None:
        # Patches of 4×4, at least 16 of them: the images' own size if it is that large, rounded up to whole patches.
        input_size = tuple(4 * math.ceil(max(side, 16) / 4) for side in facts.size)
    epochs = _given(config.epochs, 60 if digits else 400)
    start_size = config.start_size
    blr = _given(config.blr, 3e-3 if digits else 1e-3)
    global_batch = config.batch_size * config.accum_iter * ranks
    chosen = dict(
        model=model,
        input_size=(input_size[0], input_size[-1]),
        start_size=start_size and (start_size[0], start_size[-1]),
        grow_epochs=_given(config.grow_epochs, max(1, epochs * 4 // 5)) if start_size else 0,
        mask_ratio=config.mask_ratio if masks is None else masks.mask_ratio,
        masking=chosen_masking(config),
        epochs=epochs,
        lr=_given(config.lr, blr * global_batch / 256),
        blr=blr,
        warmup_epochs=_given(config.warmup_epochs, epochs / 10 if digits else 40.0),
        crop_scale=_given(config.crop_scale, (0.7, 1.0) if digits else (0.2, 1.0)),
        flip=_given(config.flip, in_chans == 3),
        in_chans=in_chans,
        mean=_given(config.mean, mean),
        std=_given(config.std, std),
        num_workers=_given(config.num_workers, num_workers),
        probe=_given(config.probe, facts.labelled and facts.length <= PROBE_LIMIT),
        global_batch=global_batch,
        dataset_length=facts.length,
        order=facts.order,
        given_masks="" if masks is None else masks.found,
    )
    return ResolvedConfig(**{**dataclasses.asdict(config), **chosen})


@dataclass(frozen=True, kw_only=True)
class ResolvedFinetuneConfig(FinetuneConfig):
    """A FinetuneConfig in which nothing is left open; what the run folder keeps."""

    model: str
    input_size: tuple[int, int]
    nb_classes: int
    epochs: int
    lr: float
    blr: float
    layer_decay: float
    drop_path: float
    crop_scale: tuple[float, float]
    flip: bool
    aa: str
    reprob: float
    mixup: float
    cutmix: float
    num_workers: int
    in_chans: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    global_batch: int
    """batch_size · accum_iter · ranks."""
    dataset_length: int
    order: str
    """What an epoch's order depends on besides the seed."""


# As FIXED_IN_A_RUN, for fine-tuning.
FIXED_IN_A_FINETUNING = (
    "model", "input_size", "in_chans", "mean", "std", "nb_classes", "global_pool", "tune", "lora_rank", "drop_path",
    "crop_scale", "flip", "aa", "reprob", "smoothing", "mixup", "cutmix", "mixup_switch_prob", "seed", "global_batch",
    "dataset_length", "order",
)  # fmt: skip


def resolve_finetune(
    config: FinetuneConfig,
    facts: DataFacts,
    *,
    model: str,
    width: int,
    img_size: tuple[int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    nb_classes: int,
    ranks: int,
    num_workers: int,
) -> ResolvedFinetuneConfig:
    """Fills in what was left open, from the data (``facts``, ``nb_classes``), the encoder (``model``, the ``width`` of
    its tokens, ``img_size``, ``mean``, ``std``) and the machine.
    """
    digits = facts.kind == "digits"
    # Of ViT-B, ViT-L and ViT-H, as published.
    epochs, blr, layer_decay, drop_path = (
        (100, 5e-4, 0.65, 0.1) if width <= 768 else (50, 1e-3, 0.75, 0.2 if width <= 1024 else 0.3)
    )
    if digits:
        epochs, blr = 20, 1e-2
    if config.tune != "full":
        drop_path = 0.0
    input_size = config.input_size or img_size
    blr = _given(config.blr, blr)
    global_batch = config.batch_size * config.accum_iter * ranks
    chosen = dict(
        model=model,
        input_size=(input_size[0], input_size[-1]),
        nb_classes=nb_classes,
        global_pool=config.global_pool and not config.cls_token,
        epochs=_given(config.epochs, epochs),
        lr=_given(config.lr, blr * global_batch / 256),
        blr=blr,
        layer_decay=_given(config.layer_decay, layer_decay),
        drop_path=_given(config.drop_path, drop_path),
        crop_scale=_given(config.crop_scale, (0.7, 1.0) if digits else (0.08, 1.0)),
        flip=_given(config.flip, len(mean) == 3),
        aa=_given(config.aa, "rand-m9-mstd0.5-inc1" if facts.kind == "folder" and len(mean) in (1, 3) else ""),
        reprob=_given(config.reprob, 0.0 if digits else 0.25),
        mixup=_given(config.mixup, 0.0 if digits else 0.8),
        cutmix=_given(config.cutmix, 0.0 if digits else 1.0),
        num_workers=_given(config.num_workers, num_workers),
        in_chans=len(mean),
        mean=mean,
        std=std,
        global_batch=global_batch,
        dataset_length=facts.length,
        order=facts.order,
    )
    return ResolvedFinetuneConfig(**{**dataclasses.asdict(config), **chosen})


def _given(value: T | None, default: T) -> T:
    return default if value is None else value


def chosen_masking(config: PretrainConfig | ReconstructConfig) -> Masking:
    """What --masking says, or its default."""
    return config.masking or ("file" if config.masks else "random")


def check_masking(config: PretrainConfig | ReconstructConfig) -> None:
    """Refuses what cannot be masked, whatever the data and the model.

    Raises:
        UserError: naming the flag, its value and what it must be.
    """
    ratio, masking = f"--mask_ratio {config.mask_ratio}", f"--masking {config.masking}"
    if not 0 < config.mask_ratio < 1:
        raise UserError(f"{ratio}: must be above 0 and below 1; the published ratio is {PUBLISHED_RATIO}")
    if config.masking == "file" and not config.masks:
        raise UserError(f"{masking}: must be given together with --masks FILE.npy")
    if config.masks and config.masking not in (None, "file"):
        raise UserError(f"{masking}: must be file, or left out, with --masks")
    if config.masking == "grid" and config.mask_ratio != PUBLISHED_RATIO:
        raise UserError(f"{ratio}: must be {PUBLISHED_RATIO} with --masking grid, which keeps one patch of every 2×2")


def check_pretrain(config: PretrainConfig) -> None:
    """Refuses settings that cannot work, whatever the data.

    Raises:
        UserError: naming the flag, its value and what it must be.
    """

    def need(holds: bool, flag: str, expected: str) -> None:
        if not holds:
            value = getattr(config, flag)
            shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
            raise UserError(f"--{flag} {shown}: must be {expected}")

    check_masking(config)
    for flag in ("batch_size", "accum_iter", "save_freq", "log_freq", "keep", "repeated_masks", "max_skipped"):
        need(getattr(config, flag) >= 1, flag, "at least 1")
    divides = config.batch_size % config.repeated_masks == 0
    need(divides, "repeated_masks", f"a divisor of --batch_size {config.batch_size}")
    need(config.cache_gb is None or config.cache == "ram", "cache_gb", "given together with --cache ram")
    need(config.cache_gb is None or 0 < config.cache_gb < math.inf, "cache_gb", "a positive number of GiB")
    for flag in (
        "epochs", "num_workers", "checkpoint_freq", "in_chans", "shard_size", "keep_every", "grow_epochs",
        "decoder_depth", "probe_freq",
    ):  # fmt: skip
        need(getattr(config, flag) is None or getattr(config, flag) >= 1, flag, "at least 1")
    if config.predict_ratio is not None:
        cross, masking = config.decoder_attention == "cross", chosen_masking(config)
        need(cross, "predict_ratio", "given together with --decoder_attention cross")
        need(masking == "random", "predict_ratio", f"left out with --masking {masking}, which lists patches in order")
        share = f"above 0 and at most --mask_ratio {config.mask_ratio}"
        need(0 < config.predict_ratio <= config.mask_ratio, "predict_ratio", share)
    need(config.shard_size is None or config.parallel == "hsdp", "shard_size", "given together with --parallel hsdp")
    for flag in ("lr", "blr", "clip_grad"):
        value = getattr(config, flag)
        need(value is None or (math.isfinite(value) and value > 0), flag, "a positive number")
    for flag in ("min_lr", "weight_decay", "start_epoch", "warmup_epochs"):
        value = getattr(config, flag)
        need(value is None or (math.isfinite(value) and value >= 0), flag, "0 or more")
    if config.epochs is not None:
        need(config.start_epoch < config.epochs, "start_epoch", f"below --epochs {config.epochs}")
    need(0 <= config.seed < 2**63, "seed", "in [0, 2**63)")
    for flag in ("input_size", "start_size"):
        size = getattr(config, flag)
        need(size is None or (len(size) in (1, 2) and min(size) >= 1), flag, "one or two positive numbers of pixels")
    need(config.start_size is None or not config.masks, "start_size", "left out with --masks, which are of one size")
    need(config.grow_epochs is None or config.start_size is not None, "grow_epochs", "given together with --start_size")
    if config.crop_scale is not None:
        low, high = config.crop_scale
        need(0 < low <= high <= 1, "crop_scale", "two numbers with 0 < smallest ≤ largest ≤ 1")
    need(config.profile is None or config.profile >= 1, "profile", "at least 1")
    timeout = config.hang_timeout
    need(timeout is None or (math.isfinite(timeout) and timeout >= 0), "hang_timeout", "0 or more seconds")
    need(config.ema is None or 0 < config.ema < 1, "ema", "above 0 and below 1")
    fits = config.compile != "model" or config.parallel == "ddp"
    need(fits, "compile", f"off or block with --parallel {config.parallel}, which communicates between blocks")
    if config.float8:
        need(config.compile != "off", "compile", "block or model with --float8, which is slower than bf16 without")
        need(config.batch_size % 16 == 0, "batch_size", "a multiple of 16 with --float8, as its products need it")
    need(0 <= config.max_corrupt <= 1, "max_corrupt", "a share between 0 and 1")
    if config.std is not None:
        need(all(s > 0 for s in config.std), "std", "positive")


def check_finetune(config: FinetuneConfig) -> None:
    """Refuses settings that cannot work, whatever the data and the encoder.

    Raises:
        UserError: naming the flag, its value and what it must be.
    """

    def need(holds: bool, flag: str, expected: str) -> None:
        if not holds:
            value = getattr(config, flag)
            shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
            raise UserError(f"--{flag} {shown}: must be {expected}")

    tunes = re.fullmatch(r"full|linear|lora|last-[1-9]\d*", config.tune) is not None
    need(tunes, "tune", "full, linear, lora or last-K, such as last-2")
    for flag in (
        "batch_size", "accum_iter", "save_freq", "test_freq", "log_freq", "keep", "max_skipped", "lora_rank",
    ):  # fmt: skip
        need(getattr(config, flag) >= 1, flag, "at least 1")
    for flag in ("epochs", "num_workers", "checkpoint_freq", "shard_size"):
        need(getattr(config, flag) is None or getattr(config, flag) >= 1, flag, "at least 1")
    need(config.nb_classes is None or config.nb_classes >= 2, "nb_classes", "at least 2")
    need(config.shard_size is None or config.parallel == "hsdp", "shard_size", "given together with --parallel hsdp")
    for flag in ("lr", "blr", "clip_grad"):
        value = getattr(config, flag)
        need(value is None or (math.isfinite(value) and value > 0), flag, "a positive number")
    for flag in ("min_lr", "weight_decay", "warmup_epochs", "mixup", "cutmix"):
        value = getattr(config, flag)
        need(value is None or (math.isfinite(value) and value >= 0), flag, "0 or more")
    decay = config.layer_decay
    need(decay is None or 0 < decay <= 1, "layer_decay", "above 0 and at most 1")
    for flag in ("drop_path", "smoothing"):
        value = getattr(config, flag)
        need(value is None or 0 <= value < 1, flag, "at least 0 and below 1")
    for flag in ("reprob", "mixup_switch_prob", "max_corrupt"):
        value = getattr(config, flag)
        need(value is None or 0 <= value <= 1, flag, "between 0 and 1")
    need(0 <= config.seed < 2**63, "seed", "in [0, 2**63)")
    size = config.input_size
    need(
        size is None or (len(size) in (1, 2) and min(size) >= 1), "input_size", "one or two positive numbers of pixels"
    )
    if config.crop_scale is not None:
        low, high = config.crop_scale
        need(0 < low <= high <= 1, "crop_scale", "two numbers with 0 < smallest ≤ largest ≤ 1")
    timeout = config.hang_timeout
    need(timeout is None or (math.isfinite(timeout) and timeout >= 0), "hang_timeout", "0 or more seconds")
    fits = config.compile != "model" or config.parallel == "ddp"
    need(fits, "compile", f"off or block with --parallel {config.parallel}, which communicates between blocks")


def check_evaluation(config: ProbeConfig | ReconstructConfig | FeaturesConfig | SearchConfig | AnomalyConfig) -> None:
    """Refuses settings that cannot work, whatever the data and the model.

    Raises:
        UserError: naming the flag, its value and what it must be.
    """
    for flag in ("batch_size", "num_workers", "k", "count", "rounds", "linear_batch"):
        values = getattr(config, flag, None)
        for value in values if isinstance(values, tuple) else (values,):
            if value is not None and value < 1:
                raise UserError(f"--{flag} {value}: must be at least 1")
    shown = {"queries": "QUERY", "data_path": "DATA" if isinstance(config, FeaturesConfig) else "--data_path"}
    for flag in ("k", "blr", "data_path", "queries", "images"):
        if getattr(config, flag, True) == ():
            raise UserError(f"{shown.get(flag, f'--{flag}')}: must name at least one")
    if isinstance(config, ProbeConfig):
        for rate in config.blr:
            if not (math.isfinite(rate) and rate > 0):
                raise UserError(f"--blr {rate}: must be a positive number")
        if config.linear != "lars" and (config.blr, config.linear_batch) != (PROBE_RATES, PROBE_BATCH):
            raise UserError("--blr and --linear_batch: must be given together with --linear lars")
        if config.linear_batch == 1:
            raise UserError("--linear_batch 1: must be at least 2, as BatchNorm needs")
    if isinstance(config, AnomalyConfig) and not 0 < config.mask_ratio < 1:
        raise UserError(f"--mask_ratio {config.mask_ratio}: must be above 0 and below 1")
    if isinstance(config, ReconstructConfig):
        _check_reconstruct(config)


def _check_reconstruct(config: ReconstructConfig) -> None:
    check_masking(config)
    others = (config.mask_ratio, config.masking, config.masks) != (PUBLISHED_RATIO, None, "")
    if config.mask_image and (others or config.sweep):
        raise UserError("--mask_image: says which patches; leave --mask_ratio, --masking, --masks and --sweep out")
    if config.sweep and (config.masks or config.masking == "grid" or config.mask_ratio != PUBLISHED_RATIO):
        raise UserError("--sweep: says how many patches; leave --mask_ratio, --masks and --masking grid out")
    for ratio in config.sweep:
        if not 0 < ratio < 1:
            raise UserError(f"--sweep {ratio}: must be above 0 and below 1")
    if config.output.lower().endswith(".gif") and not config.sweep:
        raise UserError(f"--output {config.output}: a film is for --sweep; name a .png")


def check_export(config: ExportConfig) -> None:
    """Refuses what does not go together, whatever the checkpoint.

    Raises:
        UserError: naming the flag, its value and what it must be.
    """
    endings = {"onnx": (".onnx",), "torch-export": (".pt2",), "hf": ()}.get(config.to, (".pth", ".safetensors"))
    if endings and not config.output.endswith(endings):
        raise UserError(f"--output {config.output}: must end in {' or '.join(endings)} with --to {config.to}")
    if config.part == "full" and config.to not in ("official", "hf"):
        raise UserError(f"--part full: must be encoder, or left out, with --to {config.to}")
    is_program = config.to in ("onnx", "torch-export")
    for flag, value, default in (("variant", config.variant, "fp32"), ("input", config.input, "float")):
        if value != default and not is_program:
            raise UserError(f"--{flag} {value}: must be {default}, or left out, with --to {config.to}")
    if config.check is not None and not is_program:
        raise UserError(f"--check: must be left out with --to {config.to}; its numbers are the checkpoint's, unchanged")
    other = {"bf16": "torch-export", "int8": "onnx"}.get(config.variant, config.to)
    if other != config.to:
        raise UserError(f"--variant {config.variant}: must be given together with --to {other}")


def check_verify(config: VerifyConfig) -> None:
    """Refuses numbers that cannot work.

    Raises:
        UserError: naming the flag, its value and what it must be.
    """
    for flag in ("in_chans", "num_workers"):
        value = getattr(config, flag)
        if value is not None and value < 1:
            raise UserError(f"--{flag} {value}: must be at least 1")


def check_bench(
    config: BenchKernelsConfig
    | BenchAttentionConfig
    | BenchStepConfig
    | BenchLoaderConfig
    | BenchCheckpointConfig
    | BenchEndToEndConfig
    | BenchAllConfig,
) -> None:
    """Refuses numbers that cannot work.

    Raises:
        UserError: naming the flag, its value and what it must be.
    """
    for flag in ("batch_size", "rounds", "batches", "files", "input_size", "num_workers", "steps"):
        value = getattr(config, flag, None)
        if value is not None and value < 1:
            raise UserError(f"--{flag} {value}: must be at least 1")
    for flag in ("batch_sizes", "input_sizes", "ranks"):
        for value in getattr(config, flag, None) or ():
            if value < 1:
                raise UserError(f"--{flag} {value}: must be at least 1")
    sample_ms = getattr(config, "sample_ms", 0.0)
    if not (math.isfinite(sample_ms) and sample_ms >= 0):
        raise UserError(f"--sample_ms {sample_ms}: must be 0 or more")
    write = getattr(config, "write", None)
    if write is not None and len(write) > 1:
        raise UserError(f"--write {' '.join(write)}: must be one file, or none for your own table")
    for flag in ("models", "only", "data_path", "kinds", "decoders", "batch_sizes", "input_sizes", "ranks"):
        if getattr(config, flag, True) == ():
            raise UserError(f"--{flag}: must name at least one")
    for flag in ("kinds", "files"):
        if getattr(config, "data_path", None) is not None and getattr(config, flag, None) is not None:
            raise UserError(f"--{flag}: is for images that are made; leave it or --data_path out")


def check_scaling(config: BenchScalingConfig) -> None:
    """Refuses numbers that cannot work.

    Raises:
        UserError: naming the flag, its value and what it must be.
    """
    for flag in ("models", "gpus", "ranks"):
        if not getattr(config, flag):
            raise UserError(f"--{flag}: must name at least one")
    for flag in ("global_batch", "gpu_batch", "epochs", "check_batch", "rounds"):
        if getattr(config, flag) < 1:
            raise UserError(f"--{flag} {getattr(config, flag)}: must be at least 1")
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
