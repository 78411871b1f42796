"""The command line: argv to a configuration to one function call. The only reader of argv."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from fastmae.config import (
    AnomalyConfig,
    BenchConfig,
    EstimateConfig,
    ExportConfig,
    FeaturesConfig,
    FinetuneConfig,
    InfoConfig,
    PretrainConfig,
    ProbeConfig,
    ReconstructConfig,
    SearchConfig,
    VerifyConfig,
)
from fastmae.errors import UserError

Command = (
    Annotated[PretrainConfig, tyro.conf.subcommand("pretrain")]
    | Annotated[FinetuneConfig, tyro.conf.subcommand("finetune")]
    | Annotated[ProbeConfig, tyro.conf.subcommand("probe")]
    | Annotated[ReconstructConfig, tyro.conf.subcommand("reconstruct")]
    | Annotated[ExportConfig, tyro.conf.subcommand("export")]
    | Annotated[InfoConfig, tyro.conf.subcommand("info")]
    | Annotated[BenchConfig, tyro.conf.subcommand("bench")]
    | Annotated[EstimateConfig, tyro.conf.subcommand("estimate")]
    | Annotated[VerifyConfig, tyro.conf.subcommand("verify")]
    | Annotated[FeaturesConfig, tyro.conf.subcommand("features")]
    | Annotated[SearchConfig, tyro.conf.subcommand("search")]
    | Annotated[AnomalyConfig, tyro.conf.subcommand("anomaly")]
)
COMMANDS = (
    "pretrain", "finetune", "probe", "reconstruct", "export", "info", "bench", "verify", "features", "search",
    "anomaly", "estimate",
)  # fmt: skip
BENCHMARKS = ("kernels", "attention", "step", "loader", "checkpoint", "quality", "end-to-end", "all")
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
                from fastmae.commands.probe import run_probe

                run_probe(command)
            case ReconstructConfig():
                from fastmae.commands.reconstruct import run_reconstruct

                run_reconstruct(command)
            case FeaturesConfig():
                from fastmae.commands.features import run_features

                run_features(command)
            case SearchConfig():
                from fastmae.commands.search import run_search

                run_search(command)
            case AnomalyConfig():
                from fastmae.commands.anomaly import run_anomaly

                run_anomaly(command)
            case ExportConfig():
                from fastmae.commands.export import run_export

                run_export(command)
            case InfoConfig():
                from fastmae.commands.info import run_info

                run_info(command)
            case EstimateConfig():
                from fastmae.commands.estimate import run_estimate

                run_estimate(command)
            case BenchConfig():
                from fastmae.commands.bench import run_bench

                return run_bench(command.what, ["fastmae", *words])
            case VerifyConfig():
                from fastmae.commands.verify import run_verify

                return run_verify(command)
        return 0
    except UserError as error:
        print(f"fastmae: {error.as_on_the_command_line()}", file=sys.stderr)
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
    if argv[:2] == ["bench", "scaling"]:
        raise UserError("bench scaling: use `fastmae estimate` instead; see `fastmae estimate --help`")
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
