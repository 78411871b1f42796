"""Prints the help: of fastmae, of benchmarks, and of a command. Everything about a flag is read from its setting."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import textwrap
from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.text import Text

from fastmae.argv import command_of
from fastmae.config.groups import GROUPS, MAIN
from fastmae.flags import REQUIRED, Flag, flags_of
from fastmae.model.sizes import PRESET_SIZES
from fastmae.screen import open_console

GROUPED = ("pretrain", "finetune", "segment", "upscale")
WIDEST = 100
COLUMN = 26
"""Where texts begin."""
LONGEST = 44
"""The largest width of choices that stand behind a flag; longer ones stand in its text."""
PATHS = ("path", "dir", "output", "folder", "config", "finetune", "resume", "masks")
"""How the names of settings end whose values are paths."""
SECTIONS = {
    "Train": ("pretrain", "finetune", "segment", "upscale", "sweep"),
    "Use a trained model": (
        "probe",
        "reconstruct",
        "features",
        "search",
        "anomaly",
        "inpaint",
        "impute",
        "export",
        "push",
        "serve",
    ),
    "Look at runs": ("runs", "report"),
    "Check and measure": ("verify", "pack", "info", "estimate", "bench"),
}
CONFIG = (
    "--config",
    "FILE",
    "Read settings from a YAML, TOML or JSON file, or from a run folder. Flags override them.",
)
BENCH = "Measure speed on this machine, or compare encoders."
EXAMPLES = {
    "pretrain": (
        "fastmae pretrain --output_dir runs/digits",
        "fastmae pretrain --data_path photos --model mae_vit_tiny_patch16 --output_dir runs/photos --resume auto",
        "torchrun --nproc_per_node 8 -m fastmae pretrain --data_path imagenet --batch_size 512",
    ),
    "finetune": ("fastmae finetune --finetune runs/photos --data_path photos --output_dir runs/classifier",),
    "segment": (
        "fastmae segment runs/photos --data_path photos --output_dir runs/segmenter",
        "fastmae segment runs/segmenter --predict holiday.jpg --output_dir maps",
    ),
    "upscale": (
        "fastmae upscale runs/photos --data_path photos --scale 2 --output_dir runs/upscaler",
        "fastmae upscale runs/upscaler --predict holiday.jpg --output_dir larger",
    ),
    "sweep": (
        "fastmae sweep digits.yaml",
        'fastmae sweep imagenet.yaml --trials 50 --launch "torchrun --nproc_per_node 8"',
    ),
    "probe": (
        "fastmae probe runs/digits",
        "fastmae probe runs/digits --shots 1 5 10 --seeds 5",
        "fastmae probe runs/digits --corruptions --attacks pgd",
    ),
    "reconstruct": ("fastmae reconstruct runs/digits --output digits.png",),
    "features": (
        "fastmae features runs/photos photos --output photos.npz",
        "fastmae features runs/photos photos --reduce pca --picture map.png",
    ),
    "search": ("fastmae search runs/photos photos --queries one.jpg",),
    "anomaly": ("fastmae anomaly runs/photos photos --test_path new_photos",),
    "inpaint": ("fastmae inpaint runs/photos photo.png --mask holes.png --output filled.png",),
    "impute": ("fastmae impute runs/table table.csv --output filled.csv",),
    "export": ("fastmae export runs/photos --to timm --output encoder.safetensors",),
    "push": ("fastmae push runs/photos mae-photos --license cc-by-4.0",),
    "serve": (
        "fastmae serve runs/photos",
        "fastmae serve runs/photos --index photos.npz --max_replicas 4",
        "fastmae serve runs/photos --write serve.yaml",
    ),
    "report": ("fastmae report runs/photos runs/photos-2 --output photos.html",),
    "verify": ("fastmae verify --data_path photos",),
    "pack": ("fastmae pack volumes shards",),
    "runs": ("fastmae runs runs", "fastmae runs digits --sort linear"),
    "info": ("fastmae info",),
    "estimate": ("fastmae estimate --gpu h100 --gpus 8 --images 1e6 --epochs 300",),
    "bench step": ("fastmae bench step --model mae_vit_small_patch16",),
}


def run_help(words: Sequence[str], commands: Mapping[str, type]) -> int:
    """Prints the version, or the help that the words ask for, and returns the exit status.

    Raises:
        UserError: help for a command that does not exist.
    """
    console = open_console(soft_wrap=True)
    with console.capture() as captured:
        _print(Page(console), words, commands)
    print(captured.get(), end="", flush=True)
    return 0


def _print(page: Page, words: Sequence[str], commands: Mapping[str, type]) -> None:
    asked = [word for word in words[words[:1] == ["help"] :] if not word.startswith("-")]
    in_full = not {"--help-all", "--help_all"}.isdisjoint(words)
    if words[:1] == ["--version"]:
        page.text(f"fastmae {importlib.metadata.version('fastmae')}")
    elif not asked:
        _print_commands(page, commands)
    elif asked == ["bench"]:
        _print_benchmarks(page, commands)
    else:
        command = command_of(asked, commands)
        _print_command(page, command, commands[command], in_full=in_full)


class Page:
    """Lines of two columns, no wider than the terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._width = max(40, min(console.width, WIDEST))

    def title(self, text: str) -> None:
        """Prints an empty line and a title."""
        self._console.print(Text("\n" + text, "bold"))

    def gap(self) -> None:
        """Prints an empty line."""
        self._console.print()

    def text(self, text: str, indent: int = 0) -> None:
        """Prints a paragraph."""
        for line in _wrap(text, self._width - indent):
            self._console.print(" " * indent + line)

    def code(self, line: str) -> None:
        """Prints a command; a long one goes on in the next line, as a shell takes it."""
        *lines, last = _wrap(line, self._width - 6)
        for index, part in enumerate([*(f"{line} \\" for line in lines), last]):
            self._console.print(Text("  " + "  " * (index > 0) + part, "cyan"))

    def row(self, name: str, values: str, text: str) -> None:
        """Prints a name with what may stand behind it, and its text beside them."""
        left = Text.assemble("  ", (name, "bold cyan"), f" {values}".rstrip())
        lines = _wrap(text, self._width - COLUMN)
        if lines and len(left) < COLUMN - 1:
            left.append(" " * (COLUMN - len(left)) + lines.pop(0))
        self._console.print(left)
        for line in lines:
            self._console.print(" " * COLUMN + line)


def _wrap(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_on_hyphens=False)


def _summary(config: type) -> str:
    """Returns the first sentence of what a command does."""
    return " ".join((inspect.getdoc(config) or "").split()).partition(". ")[0].rstrip(".") + "."


def _print_commands(page: Page, commands: Mapping[str, type]) -> None:
    page.text("fastmae trains masked autoencoders (MAE) on your images: fast, exact and resumable.")
    page.title("Usage")
    page.code("fastmae COMMAND [--flag value ...]")
    for title, names in SECTIONS.items():
        page.title(title)
        for name in names:
            if name in commands:
                page.row(name, "", _summary(commands[name]))
            elif name == "bench":
                page.row(name, "", BENCH)
    page.title("Begin")
    page.code("fastmae pretrain --output_dir runs/digits")
    page.text("trains a small model on built-in images in a few minutes, on a CPU too.", 4)
    page.title("More")
    page.row("fastmae COMMAND --help", "", "shows the flags of a command")
    page.row("fastmae --version", "", "shows the version")


def _print_benchmarks(page: Page, commands: Mapping[str, type]) -> None:
    page.text(BENCH)
    page.title("Usage")
    page.code("fastmae bench BENCHMARK [--flag value ...]")
    page.title("Benchmarks")
    for name, config in commands.items():
        if name.startswith("bench "):
            page.row(name.removeprefix("bench "), "", _summary(config))
    page.gap()
    page.text("`fastmae bench BENCHMARK --help` shows the flags of one.")


def _print_command(page: Page, command: str, config: type, *, in_full: bool) -> None:
    flags = flags_of(config)
    arguments = [flag for flag in flags if flag.metavar is not None]
    required = [flag for flag in flags if flag.metavar is None and flag.default is REQUIRED]
    page.text(" ".join((inspect.getdoc(config) or "").split()))
    page.title("Usage")
    words = [
        *(f"{flag.metavar}{' ...' * (flag.most is None)}" for flag in arguments),
        *(f"[{flag.rest} ...]" for flag in flags if flag.rest),
        *(f"--{flag.name} {_type(flag)}" for flag in required),
    ]
    page.code(" ".join(("fastmae", command, *words, "[--flag value ...]")))
    if command in EXAMPLES:
        page.title("Examples" if len(EXAMPLES[command]) > 1 else "Example")
        for example in EXAMPLES[command]:
            page.code(example)
    if arguments:
        page.title("Arguments")
        for flag in arguments:
            page.row(f"{flag.metavar}{' ...' * (flag.most is None)}", "", flag.text)
        for flag in flags:
            if flag.rest is not None:
                page.row(f"{flag.rest} ...", "", f"The same as --{flag.name}.")
    optional = [_with_presets(flag, command) for flag in flags if flag.metavar is None]
    if command not in GROUPED:
        _print_flags(page, "Flags", optional)
        return
    by_name = {flag.name: flag for flag in optional}
    groups = {title: [by_name[name] for name in names if name in by_name] for title, names in GROUPS.items()}
    if in_full:
        page.title("Settings from a file")
        page.row(*CONFIG)
        for title, group in groups.items():
            _print_flags(page, _capitalised(title), group)
        return
    _print_flags(page, "The flags that matter first", [by_name[name] for name in MAIN if name in by_name])
    page.row(*CONFIG)
    page.title("All other flags")
    for title, group in groups.items():
        names = " ".join(f"--{flag.name}" for flag in group if flag.name not in MAIN)
        page.row(_capitalised(title), "", names)
    page.gap()
    page.text(f"`fastmae {command} --help-all` describes every flag.")


def _with_presets(flag: Flag, command: str) -> Flag:
    """Returns the flag with the names of all presets in its text, where one is to be chosen."""
    if flag.name == "model" and command in (*GROUPED, "estimate"):
        return dataclasses.replace(flag, text=f"{flag.text} Presets: {', '.join(PRESET_SIZES)}.")
    return flag


def _print_flags(page: Page, title: str, flags: Iterable[Flag]) -> None:
    page.title(title)
    for flag in flags:
        page.row(*_name_and_values(flag), _text(flag))


def _text(flag: Flag) -> str:
    is_long = len("|".join(flag.choices)) > LONGEST
    choices = f"CHOICE is {', '.join(flag.choices[:-1])} or {flag.choices[-1]}." if is_long else ""
    return " ".join(part for part in (flag.text, choices, _default(flag)) if part)


def _name_and_values(flag: Flag) -> tuple[str, str]:
    if flag.kind is bool:
        can_be_off = flag.takes_none or flag.default is True
        return (f"--{flag.name}, --no_{flag.name}" if can_be_off else f"--{flag.name}"), ""
    return f"--{flag.name}", _values(flag)


def _values(flag: Flag) -> str:
    """Returns what stands for the values of a flag: their choices, if they are short, or their type."""
    shown = "|".join(flag.choices)
    if not 0 < len(shown) <= LONGEST:
        shown = "CHOICE" if flag.choices else "|".join((*flag.words, _type(flag)))
    return f"{shown} ..." if flag.most is None else " ".join([shown] * flag.most)


def _type(flag: Flag) -> str:
    if flag.kind is str:
        return "PATH" if flag.name.endswith(PATHS) else "TEXT"
    return "INT" if flag.kind is int else "FLOAT"


def _default(flag: Flag) -> str:
    """Returns the sentence about the default, where there is one and the text does not have it."""
    if flag.default is REQUIRED:
        return "Must be given."
    has_none = flag.default is None or flag.default is False or flag.default in ("", ())
    if has_none or "Default:" in flag.text:
        return ""
    if flag.default == flag.choices and flag.most is None:
        return "Default: all."
    values = flag.default if isinstance(flag.default, tuple) else (flag.default,)
    return f"Default: {' '.join(map(_shown, values))}."


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _capitalised(title: str) -> str:
    return title[:1].upper() + title[1:]
