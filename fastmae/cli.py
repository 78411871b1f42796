"""The command line: argv to a configuration to one function call. The only reader of argv."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from fastmae.config import (
    AnomalyConfig,
    BenchAllConfig,
    BenchAttentionConfig,
    BenchCheckpointConfig,
    BenchConfig,
    BenchEndToEndConfig,
    BenchKernelsConfig,
    BenchLoaderConfig,
    BenchQualityConfig,
    BenchScalingConfig,
    BenchStepConfig,
    ExportConfig,
    FeaturesConfig,
    FinetuneConfig,
    InfoConfig,
    PretrainConfig,
    ProbeConfig,
    ReconstructConfig,
    SearchConfig,
    VerifyConfig,
    check_evaluation,
    check_export,
    chosen_masking,
)
from fastmae.errors import UserError

if TYPE_CHECKING:
    from fastmae.model.mae import MaskedAutoencoderViT

Command = (
    Annotated[PretrainConfig, tyro.conf.subcommand("pretrain")]
    | Annotated[FinetuneConfig, tyro.conf.subcommand("finetune")]
    | Annotated[ProbeConfig, tyro.conf.subcommand("probe")]
    | Annotated[ReconstructConfig, tyro.conf.subcommand("reconstruct")]
    | Annotated[ExportConfig, tyro.conf.subcommand("export")]
    | Annotated[InfoConfig, tyro.conf.subcommand("info")]
    | Annotated[BenchConfig, tyro.conf.subcommand("bench")]
    | Annotated[VerifyConfig, tyro.conf.subcommand("verify")]
    | Annotated[FeaturesConfig, tyro.conf.subcommand("features")]
    | Annotated[SearchConfig, tyro.conf.subcommand("search")]
    | Annotated[AnomalyConfig, tyro.conf.subcommand("anomaly")]
)
COMMANDS = (
    "pretrain", "finetune", "probe", "reconstruct", "export", "info", "bench", "verify", "features", "search",
    "anomaly",
)  # fmt: skip
BENCHMARKS = ("kernels", "attention", "step", "loader", "checkpoint", "quality", "scaling", "end-to-end", "all")
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
            case FinetuneConfig():
                from fastmae.train.finetune import finetune

                return finetune(command)
            case ProbeConfig():
                _probe(command)
            case ReconstructConfig():
                _reconstruct(command)
            case FeaturesConfig():
                _features(command)
            case SearchConfig():
                _search(command)
            case AnomalyConfig():
                _anomaly(command)
            case ExportConfig():
                _export(command)
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


def _parse(argv: list[str]) -> Command:
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
        if argv and argv[0] in COMMANDS:
            known = (argv[0],)
            if argv[0] == "bench" and argv[1:] and argv[1] in BENCHMARKS:
                known = (argv[0], argv[1])
        raise UserError(f"{text}; see `{' '.join(['fastmae', *known])} --help`") from None


def _first_section(box: str) -> str:
    """The lines between the title of a boxed message and its first rule, as one."""
    lines = [line.strip("│ ") for line in box.splitlines()[1:]]
    rules = [not set(line) - set("─╰╯-") for line in lines]  # of hyphens where the terminal has ASCII alone
    begin = rules.index(False) if False in rules else 0
    end = rules.index(True, begin) if True in rules[begin:] else len(lines)
    return " ".join(" ".join(lines[begin:end]).split()).rstrip(".")


def _opened(
    config: ProbeConfig | ReconstructConfig | FeaturesConfig | SearchConfig | AnomalyConfig,
    *,
    needs_decoder: bool = False,
) -> MaskedAutoencoderViT:
    """The frozen model of a command, on its device."""
    from fastmae.checkpoint.save import load_model
    from fastmae.train.parallel import choose_device

    check_evaluation(config)
    device = choose_device(config.device)
    return load_model(config.checkpoint, config.model, needs_decoder=needs_decoder).to(device)


def _workers(config: ProbeConfig | FeaturesConfig | SearchConfig | AnomalyConfig) -> int:
    from fastmae.data.loader import default_workers

    return config.num_workers or default_workers()


def _make_folder(folder: Path) -> None:
    """For what a command will write, so that a wrong name is told before the work and not after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: {folder} cannot be written ({error}); name another folder") from error


def _probe(config: ProbeConfig) -> None:
    from rich.console import Console
    from rich.table import Table

    from fastmae.data.sources import shown, train_and_val
    from fastmae.evaluate.features import tell_skipped
    from fastmae.evaluate.probe import probe_in_detail, save_probe

    model = _opened(config)
    if config.output is not None:
        _make_folder(Path(config.output))
    found = probe_in_detail(
        model,
        *train_and_val(config.data_path),
        pool=config.pool,
        ks=config.k,
        linear=config.linear,
        rates=config.blr,
        linear_batch=config.linear_batch,
        batch_size=config.batch_size,
        num_workers=_workers(config),
    )
    results = found.summary()
    tell_skipped(found.skipped)
    sizes = f"{results['train']} train, {results['test']} test"
    title = f"{config.checkpoint} on {shown(config.data_path)}: {sizes}"
    if config.output is not None:
        save_probe(Path(config.output), found, title)
    if config.json:
        print(json.dumps(results))
        return
    table = Table(title=title)
    table.add_column("frozen features")
    table.add_column("top-1", justify="right")
    for k in config.k:
        table.add_row(f"k-NN (k = {k}, {config.pool})", f"{found.accuracy(found.knn[k]):.2f} %")
    how = f"LARS, blr {results['blr']:g}" if config.linear == "lars" else "logistic regression"
    table.add_row(f"{how} ({config.pool})", f"{results['linear']:.2f} %")
    Console().print(table)
    if config.output is not None:
        print(Path(config.output) / "confusion.png")


def _reconstruct(config: ReconstructConfig) -> None:
    import torch

    from fastmae.data.masks import choose_masks, open_masks, shuffled_ids
    from fastmae.data.sources import open_train
    from fastmae.evaluate.reconstruct import (
        about_targets,
        caption,
        central_crops,
        fixed_indices,
        masks_of_pictures,
        reconstruct,
        reconstruct_each,
        save_reconstructions,
    )

    check_evaluation(config)
    file = open_masks(config.masks, config.mask_ratio)
    model = _opened(config, needs_decoder=True)
    source = open_train(config.images)
    indices = fixed_indices(source, config.count)
    made = []
    if config.mask_image:
        masked = masks_of_pictures(config.mask_image, model, source, indices)
        images = central_crops(model, source, indices)
        rows = reconstruct_each(model, images, masked, paste_visible=config.paste_visible)
        made.append((f"masked as {' '.join(config.mask_image)}{about_targets(model)}", rows))
    else:
        images = central_crops(model, source, indices)
        flag = "--sweep" if config.sweep else "--mask_ratio"
        for ratio in config.sweep or (config.mask_ratio if file is None else file.facts.mask_ratio,):
            try:
                visible = model.num_visible(ratio)
            except ValueError as error:
                raise UserError(f"{flag} {ratio}: {error}; choose another ratio") from error
            masks = choose_masks(chosen_masking(config), file, model.grid_size, visible, config.seed)
            ids_shuffle = shuffled_ids(torch.arange(len(images)), masks, images.device)
            rows = reconstruct(model, images, ids_shuffle, mask_ratio=ratio, paste_visible=config.paste_visible)
            made.append((caption(model, ratio), rows))
    save_reconstructions(Path(config.output), made, errors=config.errors)
    print(config.output)


def _features(config: FeaturesConfig) -> None:
    from fastmae.data.sources import open_train, shown, train_and_val
    from fastmae.evaluate.features import check_features_file, extract_features, save_features, tell_skipped

    check_evaluation(config)
    output = Path(config.output)
    check_features_file(output)
    model = _opened(config)
    _make_folder(output.parent)
    if config.split == "val":
        _, source = train_and_val(config.data_path)
    else:
        source = open_train(config.data_path)
    found = extract_features(
        model, source, pool=config.pool, batch_size=config.batch_size, num_workers=_workers(config)
    )
    tell_skipped(found.skipped)
    save_features(output, source, found)
    count, width = found.values.shape
    print(f"{output}: {count} × {width} features of {shown(config.data_path)}")


def _search(config: SearchConfig) -> None:
    from rich.console import Console
    from rich.table import Table

    from fastmae.data.sources import Subset, open_train, shown
    from fastmae.evaluate.features import extract_features, tell_skipped
    from fastmae.evaluate.reconstruct import fixed_indices
    from fastmae.evaluate.search import engine, save_search, search

    model = _opened(config)
    _make_folder(Path(config.output).parent)
    source, queries = open_train(config.data_path), open_train(config.queries)
    queries = Subset(queries, fixed_indices(queries, config.count))
    held, asked = (
        extract_features(model, one, pool=config.pool, batch_size=config.batch_size, num_workers=_workers(config))
        for one in (source, queries)
    )
    tell_skipped(held.skipped + asked.skipped)
    by = engine(held.values.device)
    results = search(queries, asked, source, held, k=config.k, by=by)
    save_search(Path(config.output), model, queries, source, results)
    if config.json:
        print(json.dumps({"by": by, "results": results}))
        return
    table = Table(title=f"nearest of {len(held.values)} images of {shown(config.data_path)}, compared by {by}")
    for column in ("query", "nearest", "class"):
        table.add_column(column, overflow="fold")
    table.add_column("cosine", justify="right")
    for one in results:
        for place, match in enumerate(one["found"]):
            query = "" if place else one["query"]
            table.add_row(query, match["name"], match.get("class", "–"), f"{match['cosine']:.4f}")
        table.add_section()
    Console().print(table)
    print(config.output)


def _anomaly(config: AnomalyConfig) -> None:
    from rich.console import Console
    from rich.table import Table

    from fastmae.data.sources import open_train, shown, train_and_val
    from fastmae.evaluate.anomaly import are_anomalous, find_anomalies, save_anomalies, summarise, without_class
    from fastmae.evaluate.features import tell_skipped

    model = _opened(config, needs_decoder=True)
    _make_folder(Path(config.output))
    if config.test_path is None:
        normal, test = train_and_val(config.data_path)
    else:
        normal, test = open_train(config.data_path), open_train(config.test_path)
    if config.left_out is not None:
        normal = without_class(normal, config.left_out)
    found = find_anomalies(
        model,
        normal,
        test,
        pool=config.pool,
        k=config.k,
        mask_ratio=config.mask_ratio,
        rounds=config.rounds,
        seed=config.seed,
        batch_size=config.batch_size,
        num_workers=_workers(config),
    )
    tell_skipped(found.skipped)
    anomalous = are_anomalous(normal, test, found.indices)
    summary = {"normal": len(normal), "pool": config.pool, **summarise(found, anomalous)}
    save_anomalies(Path(config.output), model, test, found, anomalous, summary, config.count)
    if config.json:
        print(json.dumps(summary))
        return
    counted = f", {summary['anomalous']} of them anomalous" if "anomalous" in summary else ""
    title = f"{summary['images']} images{counted}, beside {len(normal)} normal ones of {shown(config.data_path)}"
    table = Table(title=title)
    table.add_column("score")
    table.add_column("AUROC", justify="right")
    for name, key in ((f"distance ({config.pool}, k = {config.k})", "distance"), ("reconstruction error", "error")):
        area = summary.get(f"auroc_{key}")
        table.add_row(name, "– (no labels of both kinds)" if area is None else f"{area:.4f}")
    Console().print(table)
    print(Path(config.output) / "anomaly.png")


def _export(config: ExportConfig) -> None:
    from rich.console import Console
    from rich.table import Table

    from fastmae.checkpoint.save import open_checkpoint
    from fastmae.data.loader import default_workers
    from fastmae.data.sources import shown
    from fastmae.export.run import export

    check_export(config)
    opened = open_checkpoint(config.checkpoint, config.model)
    line, worth = export(config, opened.model, opened.settings, opened.has_decoder, default_workers())
    print(line)
    if config.check is None:
        return
    table = Table("encoder", title=f"{config.output} on {shown(config.check)}")
    for name in ("largest difference", "k-NN", "logistic regression", "images/s"):
        table.add_column(name, justify="right")
    for name, of_one in worth.items():
        figures = f"{of_one.knn:.2f} %", f"{of_one.linear:.2f} %", f"{of_one.images_per_second:.0f}"
        table.add_row(name, f"{of_one.difference:.1e}", *figures)
    Console().print(table)


def _info(config: InfoConfig) -> None:
    from rich.console import Console
    from rich.table import Table

    from fastmae.data.loader import choose_decoder, describe_decoder
    from fastmae.environment import hardware, versions
    from fastmae.train.parallel import choose_device
    from fastmae.train.precision import choose_precision
    from fastmae.train.run import chosen_backends

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
    | BenchQualityConfig
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
        case BenchQualityConfig():
            from fastmae.benchmarks.quality import bench_quality

            return bench_quality(config, words)
        case BenchScalingConfig():
            from fastmae.benchmarks.scaling import bench_scaling

            return bench_scaling(config, words)
        case BenchEndToEndConfig():
            from fastmae.benchmarks.end_to_end import bench_end_to_end

            return bench_end_to_end(config, words)
        case BenchAllConfig():
            from fastmae.benchmarks.suite import bench_all

            return bench_all(config, words)
