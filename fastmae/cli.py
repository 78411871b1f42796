"""The command line: argv to a configuration to one function call. It is the only reader of argv, and prints errors
alone."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Sequence
from typing import Any

import tyro

from fastmae.argv import command_of, normalise, split
from fastmae.config import (
    AnomalyConfig,
    BenchAllConfig,
    BenchAttentionConfig,
    BenchCheckpointConfig,
    BenchEndToEndConfig,
    BenchKernelsConfig,
    BenchLoaderConfig,
    BenchQualityConfig,
    BenchStepConfig,
    EstimateConfig,
    ExportConfig,
    FeaturesConfig,
    FinetuneConfig,
    ImputeConfig,
    InfoConfig,
    InpaintConfig,
    PackConfig,
    PretrainConfig,
    ProbeConfig,
    PushConfig,
    ReconstructConfig,
    ReportConfig,
    RunsConfig,
    SearchConfig,
    SegmentConfig,
    ServeConfig,
    SweepConfig,
    UpscaleConfig,
    VerifyConfig,
)
from fastmae.config.load import load_settings, settings_as_words
from fastmae.environment import malformed_variables
from fastmae.errors import UserError
from fastmae.faults import (
    report,
    require_address_space,
    shortage,
    show_traceback,
    tell_launcher,
    threads_reported,
    wants_traceback,
)
from fastmae.flags import flags_of
from fastmae.launch import is_first, read_launch
from fastmae.messages import logger, messages_on_stderr
from fastmae.screen import OutputLostError, complain, hold_standard_files, safe_streams
from fastmae.signals import remembered

# In the order in which the help shows them.
COMMANDS: dict[str, type] = {
    "pretrain": PretrainConfig,
    "finetune": FinetuneConfig,
    "segment": SegmentConfig,
    "upscale": UpscaleConfig,
    "sweep": SweepConfig,
    "probe": ProbeConfig,
    "reconstruct": ReconstructConfig,
    "features": FeaturesConfig,
    "search": SearchConfig,
    "anomaly": AnomalyConfig,
    "inpaint": InpaintConfig,
    "impute": ImputeConfig,
    "export": ExportConfig,
    "push": PushConfig,
    "serve": ServeConfig,
    "report": ReportConfig,
    "verify": VerifyConfig,
    "pack": PackConfig,
    "runs": RunsConfig,
    "info": InfoConfig,
    "estimate": EstimateConfig,
    "bench kernels": BenchKernelsConfig,
    "bench attention": BenchAttentionConfig,
    "bench step": BenchStepConfig,
    "bench loader": BenchLoaderConfig,
    "bench checkpoint": BenchCheckpointConfig,
    "bench end-to-end": BenchEndToEndConfig,
    "bench quality": BenchQualityConfig,
    "bench all": BenchAllConfig,
}
# What ranks cannot share: the first one does it, so that no two write one file.
OF_ONE_RANK = (
    ReconstructConfig, SearchConfig, AnomalyConfig, ImputeConfig, InpaintConfig, PushConfig, ReportConfig,
    RunsConfig, VerifyConfig, PackConfig, EstimateConfig, ServeConfig,
)  # fmt: skip
EXIT_OUTPUT_LOST = 1
EXIT_WRONG_INPUT = 2
EXIT_INTERRUPT = 130
# The commands whose settings --config reads from a file.
TRAININGS = ("pretrain", "finetune", "segment", "upscale")
# Their results are run folders: they go on without a screen, and stop with 75 at a signal, whenever it comes.
LONG = (*TRAININGS, "sweep")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status.

    0; 1 when a benchmark refused a wrong result, data are not all usable, a rank hung, a run could not save, memory ran
    out, what is printed was lost, or for a fault of fastmae; 2 for wrong input; 75 when a signal stopped a run; 130
    when SIGINT ended it.
    """
    hold_standard_files()
    words = sys.argv[1:] if argv is None else list(argv)
    is_long = words[:1] in [[command] for command in LONG]
    command = ["fastmae", *words]
    with safe_streams(must_show=not is_long), contextlib.ExitStack() as stack:
        config = None
        try:
            if is_long:
                stack.enter_context(remembered())
            stack.enter_context(threads_reported(command))
            if asks_for_help(words):
                from fastmae.commands.help import run_help

                return run_help(words, COMMANDS)
            with messages_on_stderr():
                config = parse(words)
                require_place_and_memory()
                return call(config, command)
        except KeyboardInterrupt:
            return EXIT_INTERRUPT
        except (Exception, SystemExit) as error:  # no library may end a run in its own way
            tell_launcher(error)
            return status_of(error, command, config)


def require_place_and_memory() -> None:
    """Refuses what no library can be loaded in, and warns of environment variables that none of them can read.

    Raises:
        UserError: the current folder was deleted.
        MemoryError: the process may not have enough memory.
    """
    try:
        os.getcwd()
    except OSError:
        raise UserError("the current folder is not there any more; change into another one (cd)") from None
    require_address_space()
    if is_first(os.environ):
        for line in malformed_variables():
            logger.warning("%s", line)


def status_of(error: BaseException, command: Sequence[str], config: Any) -> int:
    """Shows in one line why a command ended, and returns its exit status."""
    if isinstance(error, UserError):
        if error.is_said:
            return EXIT_WRONG_INPUT
        line = error.as_on_the_command_line()
    elif isinstance(error, OutputLostError):
        if error.reader_left:  # it has seen enough, such as `| head`; but 0 of verify means that all is usable
            return EXIT_OUTPUT_LOST if command[1:2] == ["verify"] else 0
        complain(f"{error}, so what was printed is lost; make room, or print into another place")
        return EXIT_OUTPUT_LOST
    elif isinstance(error, OSError) and error.filename is not None and shortage(error) is None:
        # A disk that fills up, or a folder that loses its permissions, anywhere else in a run.
        line = f"{error}; free space or mend the permissions, then run the command again"
    else:
        return report(error, command, config)
    if wants_traceback():
        show_traceback(error)
    complain(line)
    return error.status if isinstance(error, UserError) else EXIT_WRONG_INPUT


def asks_for_help(words: Sequence[str]) -> bool:
    """Whether the words are a question about fastmae: none, ``help``, ``--version``, or ``--help`` anywhere."""
    asking = {"-h", "--help", "--help-all", "--help_all"}
    return not words or words[0] in ("help", "--version") or not asking.isdisjoint(words)


def parse(words: Sequence[str]) -> Any:
    """Returns the configuration that a command line asks for.

    Raises:
        UserError: words that are no command, or that a command does not take.
    """
    command = command_of(words, COMMANDS)
    config = COMMANDS[command]
    rest = list(words[len(command.split()) :])
    if command in TRAININGS:
        rest = _with_file(rest, config)
    try:
        normal, unused = normalise(rest, flags_of(config), command)
    except UserError as error:
        raise UserError(f"{error}{'' if str(error).endswith('?') else ';'} see `fastmae {command} --help`") from None
    if unused and is_first(os.environ):  # otherwise every rank would print it
        text = f"{' and '.join(unused)}: not used; torchrun sets this, as in `torchrun -m fastmae {command} …`"
        complain(text)
    return _values_of(config, normal, command)


def _with_file(words: Sequence[str], config: type) -> list[str]:
    """Returns the words with the settings of the file that ``--config`` names before them, so that flags override it.

    Raises:
        UserError: no file is named, or it holds something else than settings of the command.
    """
    positionals, given = split(words)
    files = [flag.values for flag in given if flag.name == "config"]
    if not files:
        return list(words)
    if len(files) > 1 or len(files[0]) != 1:
        raise UserError("--config: must be given once, with one file of settings or run folder")
    others = [word for flag in given if flag.name != "config" for word in flag.words()]
    return [*positionals, *settings_as_words(load_settings(files[0][0], config), config), *others]


def _values_of(config: type, words: list[str], command: str) -> Any:
    """Makes values of words with tyro. What it still refuses by itself becomes one line, as all errors are."""
    text = io.StringIO()
    try:
        with contextlib.redirect_stderr(text):
            return tyro.cli(config, args=words, config=(tyro.conf.OmitArgPrefixes,))
    except SystemExit:
        box = [line.strip("│ ") for line in text.getvalue().splitlines() if not set(line) & set("╭╰")]
        problem = " ".join(" ".join(box).split()).partition(" ───")[0].rstrip(".")
        raise UserError(f"{problem}; see `fastmae {command} --help`") from None


def call(config: Any, argv: list[str]) -> int:
    """Calls the function of a configuration and returns its exit status. Each is loaded only when it is called."""
    if isinstance(config, OF_ONE_RANK) and (ranks := read_launch(os.environ)).size > 1:
        if ranks.rank > 0:
            return 0
        text = (
            f"{argv[1]}: one process does it; the other {ranks.size - 1} ranks have left, so start it without torchrun"
        )
        logger.warning("%s", text)
    match config:
        case PretrainConfig():
            from fastmae.train.pretrain import pretrain

            return pretrain(config)
        case FinetuneConfig():
            from fastmae.commands.finetune import run_finetune

            return run_finetune(config)
        case SegmentConfig():
            from fastmae.commands.segment import run_segment

            return run_segment(config)
        case UpscaleConfig():
            from fastmae.commands.upscale import run_upscale

            return run_upscale(config)
        case SweepConfig():
            from fastmae.commands.sweep import run_sweep

            return run_sweep(config)
        case ProbeConfig():
            from fastmae.commands.probe import run_probe

            return run_probe(config)
        case ReconstructConfig():
            from fastmae.commands.reconstruct import run_reconstruct

            return run_reconstruct(config)
        case FeaturesConfig():
            from fastmae.commands.features import run_features

            return run_features(config)
        case SearchConfig():
            from fastmae.commands.search import run_search

            return run_search(config)
        case AnomalyConfig():
            from fastmae.commands.anomaly import run_anomaly

            return run_anomaly(config)
        case InpaintConfig():
            from fastmae.commands.inpaint import run_inpaint

            return run_inpaint(config)
        case ImputeConfig():
            from fastmae.commands.impute import run_impute

            return run_impute(config)
        case ExportConfig():
            from fastmae.commands.export import run_export

            return run_export(config)
        case PushConfig():
            from fastmae.commands.push import run_push

            return run_push(config)
        case ServeConfig():
            from fastmae.commands.serve import run_serve

            return run_serve(config)
        case PackConfig():
            from fastmae.commands.pack import run_pack

            return run_pack(config)
        case ReportConfig():
            from fastmae.commands.report import run_report

            return run_report(config)
        case VerifyConfig():
            from fastmae.commands.verify import run_verify

            return run_verify(config)
        case RunsConfig():
            from fastmae.commands.runs import run_runs

            return run_runs(config)
        case EstimateConfig():
            from fastmae.commands.estimate import run_estimate

            return run_estimate(config)
        case InfoConfig():
            from fastmae.commands.info import run_info

            return run_info(config)
        case _:
            from fastmae.commands.bench import run_bench

            return run_bench(config, argv)
