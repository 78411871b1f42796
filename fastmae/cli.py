"""The command line: argv to a configuration to one function call. The only reader of argv."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from fastmae.config import (
    BenchAllConfig,
    BenchAttentionConfig,
    BenchCheckpointConfig,
    BenchConfig,
    BenchEndToEndConfig,
    BenchKernelsConfig,
    BenchLoaderConfig,
    BenchScalingConfig,
    BenchStepConfig,
    InfoConfig,
    PretrainConfig,
    ProbeConfig,
    ReconstructConfig,
    VerifyConfig,
    check_masking,
    chosen_masking,
)
from fastmae.errors import UserError

Command = (
    Annotated[PretrainConfig, tyro.conf.subcommand("pretrain")]
    | Annotated[ProbeConfig, tyro.conf.subcommand("probe")]
    | Annotated[ReconstructConfig, tyro.conf.subcommand("reconstruct")]
    | Annotated[InfoConfig, tyro.conf.subcommand("info")]
    | Annotated[BenchConfig, tyro.conf.subcommand("bench")]
    | Annotated[VerifyConfig, tyro.conf.subcommand("verify")]
)
BENCHMARKS = ("kernels", "attention", "step", "loader", "checkpoint", "scaling", "end-to-end", "all")
EXIT_WRONG_INPUT = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status.

    0; 1 when a benchmark refused a wrong result, data are not all usable or a rank hung; 2 for wrong input; 75 when a
    signal stopped a run.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        command = _parse(words)
        match command:
            case PretrainConfig():
                from fastmae.train.pretrain import pretrain

                return pretrain(command)
            case ProbeConfig():
                _probe(command)
            case ReconstructConfig():
                _reconstruct(command)
            case InfoConfig():
                _info(command)
            case BenchConfig():
                return _bench(command.what, ["fastmae", *words])
            case VerifyConfig():
                from fastmae.data.verify import verify

                return verify(command)
        return 0
    except UserError as error:
        print(f"fastmae: {error}", file=sys.stderr)
        return EXIT_WRONG_INPUT
    except BrokenPipeError:  # whoever reads the output has seen enough, such as `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a disk that fills up, or a folder that loses its permissions, anywhere else in a run
        print(f"fastmae: {error}; free space or mend the permissions, then run the command again", file=sys.stderr)
        return EXIT_WRONG_INPUT
    except KeyboardInterrupt:
        return 130


def _parse(
    argv: list[str],
) -> PretrainConfig | ProbeConfig | ReconstructConfig | InfoConfig | BenchConfig | VerifyConfig:
    """tyro's parse, with its boxed messages folded into the one line that every error of this program is."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            short_names = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
            return tyro.cli(Command, prog="fastmae", args=argv, config=short_names)
    except SystemExit as error:
        if error.code in (0, None):
            raise
        text = _first_section(complaint.getvalue())
        known: tuple[str, ...] = ()
        if argv and argv[0] in ("pretrain", "probe", "reconstruct", "info", "bench", "verify"):
            known = (argv[0],)
            if argv[0] == "bench" and argv[1:] and argv[1] in BENCHMARKS:
                known = (argv[0], argv[1])
        raise UserError(f"{text}; see `{' '.join(['fastmae', *known])} --help`") from None


def _first_section(box: str) -> str:
    """The lines between the title of a boxed message and its first rule, as one."""
    lines = [line.strip("│ ") for line in box.splitlines()[1:]]
    end = next((i for i, line in enumerate(lines) if not line or line[0] in "─╰"), len(lines))
    return " ".join(" ".join(lines[:end]).split()).rstrip(".")


def _probe(config: ProbeConfig) -> None:
    from rich.console import Console
    from rich.table import Table

    from fastmae.data.loader import default_workers
    from fastmae.data.sources import shown, train_and_val
    from fastmae.evaluate.probe import probe
    from fastmae.train.checkpoint import load_model
    from fastmae.train.parallel import choose_device

    model = load_model(config.checkpoint, config.model).to(choose_device(config.device))
    train, test = train_and_val(config.data_path)
    results = probe(
        model,
        train,
        test,
        pool=config.pool,
        k=config.k,
        batch_size=config.batch_size,
        num_workers=config.num_workers or default_workers(),
    )
    if config.json:
        print(json.dumps(results))
        return
    sizes = f"{results['train']} train, {results['test']} test"
    table = Table(title=f"{config.checkpoint} on {shown(config.data_path)}: {sizes}")
    table.add_column("frozen features")
    table.add_column("top-1", justify="right")
    table.add_row(f"k-NN (k = {results['k']}, {results['pool']})", f"{results['knn']:.2f} %")
    table.add_row(f"logistic regression ({results['pool']})", f"{results['linear']:.2f} %")
    Console().print(table)


def _reconstruct(config: ReconstructConfig) -> None:
    import torch

    from fastmae.data.masks import choose_masks, open_masks, shuffled_ids
    from fastmae.data.sources import open_train
    from fastmae.evaluate.reconstruct import caption, fixed_images, reconstruct, save_grid
    from fastmae.train.checkpoint import load_model
    from fastmae.train.parallel import choose_device

    check_masking(config)
    file = open_masks(config.masks, config.mask_ratio)
    ratio = config.mask_ratio if file is None else file.facts.mask_ratio
    model = load_model(config.checkpoint, config.model, needs_decoder=True).to(choose_device(config.device))
    try:
        visible = model.num_visible(ratio)
    except ValueError as error:
        raise UserError(f"--mask_ratio {ratio}: {error}; choose another ratio") from error
    masks = choose_masks(chosen_masking(config), file, model.grid_size, visible, config.seed)
    images = fixed_images(model, open_train(config.images), config.count)
    ids_shuffle = shuffled_ids(torch.arange(len(images)), masks, images.device)
    save_grid(Path(config.output), reconstruct(model, images, ids_shuffle, mask_ratio=ratio), caption(model, ratio))
    print(config.output)


def _info(config: InfoConfig) -> None:
    from rich.console import Console
    from rich.table import Table

    from fastmae.data.loader import choose_decoder, describe_decoder
    from fastmae.environment import hardware, versions
    from fastmae.train.parallel import choose_device
    from fastmae.train.precision import choose_precision
    from fastmae.train.pretrain import chosen_backends

    device = choose_device(None)
    shapes = {"encoder": (50, 64), "decoder": (197, 32)}  # of ViT-B/16 and ViT-L/16 with three quarters masked
    decoding = describe_decoder(*choose_decoder("auto", device, None, in_chans=3))
    backends = chosen_backends(device, choose_precision("auto", device), shapes, decoding)
    sections = {"versions": versions(), "hardware": hardware(), "backends": backends}
    if config.json:
        print(json.dumps(sections))
        return
    table = Table(show_header=False)
    for section, entries in sections.items():
        table.add_row(f"[bold]{section}", "")
        for name, value in entries.items():
            table.add_row(name, ", ".join(value) or "none" if isinstance(value, list) else str(value))
    Console().print(table)


def _bench(
    config: BenchKernelsConfig
    | BenchAttentionConfig
    | BenchStepConfig
    | BenchLoaderConfig
    | BenchCheckpointConfig
    | BenchScalingConfig
    | BenchEndToEndConfig
    | BenchAllConfig,
    words: list[str],
) -> int:
    match config:
        case BenchKernelsConfig():
            from fastmae.benchmarks.kernels import bench_kernels

            return bench_kernels(config, words)
        case BenchAttentionConfig():
            from fastmae.benchmarks.attention import bench_attention

            return bench_attention(config, words)
        case BenchStepConfig():
            from fastmae.benchmarks.step import bench_step

            return bench_step(config, words)
        case BenchLoaderConfig():
            from fastmae.benchmarks.loader import bench_loader

            return bench_loader(config, words)
        case BenchCheckpointConfig():
            from fastmae.benchmarks.checkpoint import bench_checkpoint

            return bench_checkpoint(config, words)
        case BenchScalingConfig():
            from fastmae.benchmarks.scaling import bench_scaling

            return bench_scaling(config, words)
        case BenchEndToEndConfig():
            from fastmae.benchmarks.end_to_end import bench_end_to_end

            return bench_end_to_end(config, words)
        case BenchAllConfig():
            from fastmae.benchmarks.suite import bench_all

            return bench_all(config, words)
