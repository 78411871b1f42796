"""Checks a data set as a run would read it, and prints what is unusable, where it is and why."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastmae.commands.verify_report import Part, need_report, write_report
from fastmae.config import VerifyConfig, read_as
from fastmae.data.copies import Copies, copies_across, copies_within
from fastmae.data.loader import default_workers
from fastmae.data.pack import changed_shards
from fastmae.data.reading import Reading
from fastmae.data.sources import Source, open_train, open_val, shown, unknown_classes
from fastmae.data.statistics import given_range
from fastmae.data.stock import count_of
from fastmae.data.survey import refuse_dark
from fastmae.data.values import PERCENTS, Values
from fastmae.data.verify import EXAMPLES, Findings, check, choose_reading, damage_of
from fastmae.errors import UserError
from fastmae.screen import open_console, printable

QUIET_SECONDS = 15.0
CHANNELS = 4
"""Of how many channels the values are printed."""


def run_verify(config: VerifyConfig) -> int:
    """Checks both parts of the data and returns the exit status: 0 if every image and every shard is whole, else 1.

    Raises:
        UserError: settings that cannot work, or data that a run would refuse at its start. What only the pixels show is
            said after all else.
    """
    asked = read_as(config)
    if config.report is not None:
        need_report(config.report)
    parts = {"train": open_train(config.data_path, asked)}
    val = open_val(config.data_path, asked)
    if val is not None:
        parts["val"] = val
    reading = choose_reading(config.in_chans, parts, asked)
    shown_range = given_range(config.value_range, reading.in_chans, reading.dtype)
    num_workers = config.num_workers or default_workers()
    damage = [(part, *shard) for part, source in parts.items() for shard in damage_of(source)]
    folders = [Path(path).expanduser() for path in config.data_path]
    damage += [shard for folder in folders for shard in changed_shards(folder)]
    found: list[Part] = []
    with _written(config.output) as write, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")  # of images that it takes all the same
        for where, name, reason in damage:
            write({"part": where, "index": None, "name": name, "reason": reason})
        with _Screen(sum(map(len, parts.values()))) as screen:
            for name, source in parts.items():
                what = f"{shown(config.data_path)}: {count_of(len(source), 'images')} {source.location}"
                screen.print(f"{name:15} {what}")
                unknown = unknown_classes(parts["train"], source) if name == "val" else []
                stock = [("stock", line) for line in [*source.stock.lines(), *unknown]]
                screen.print_facts(stock)
                part = Part(name, what, source, reading, facts=[*stock])
                _check_part(part, num_workers, write, screen)
                screen.print_facts(part.facts[len(stock) :])
                found.append(part)
            how = f"--num_workers {num_workers} --in_chans {reading.in_chans}"
            screen.print(f"speed           {screen.speed():,.0f} images/s with {how}")
            leaks = [*_leaks(*found)] if len(found) == 2 else []
            for line in leaks:
                screen.print(f"{'copies':15} {line}")
            findings = {part.name: part.findings for part in found}
            verdict = _verdict(findings, damage)
            status = _report(screen.print, verdict, findings, damage, config.output)
            if config.report is not None:
                unusable = [f"{where}: {name} {reason}" for where, name, reason in damage]
                write_report(config.report, shown(config.data_path), verdict, found, leaks, unusable, shown_range)
                screen.print(f"shown in {config.report}")
    for part in found:
        refuse_dark(part.findings.survey)
    return status


def _check_part(part: Part, num_workers: int, write: Callable[[dict[str, Any]], None], screen: _Screen) -> None:
    """Checks every image of a part, writes those that are unusable, and adds all that is found to the part."""
    with contextlib.closing(check(part.source, part.reading, num_workers, part.values)) as chunks:
        for chunk in chunks:
            for bad in chunk.examples:
                write({"part": part.name, **dataclasses.asdict(bad)})
            for index, digest in chunk.digests:
                part.digests.add(index, digest)
            part.findings.add(chunk)
            screen.update(chunk)
    part.copies = copies_within(part.digests, EXAMPLES)
    part.facts += [
        *_facts(part.source, part.findings),
        *_values(part.values, part.reading),
        *_stated(part.findings, part.values),
        *_copies(part.source, part.copies),
        *_notes(part.source, part.findings, part.reading),
    ]


class _Screen:
    """A progress bar on a terminal, a line now and then elsewhere."""

    def __init__(self, total: int) -> None:
        self._console = open_console(soft_wrap=True)
        self._total, self._done, self._unusable = total, 0, 0
        self._started = self._printed = time.perf_counter()
        self._bar = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("images, {task.fields[unusable]} unusable, {task.fields[speed]} images/s", markup=False),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("verify", total=total, unusable=0, speed="–")

    def __enter__(self) -> _Screen:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()

    def print(self, line: str) -> None:
        """Prints a line; of names that come from files, what is not printable is escaped."""
        self._console.print(printable(line))

    def print_facts(self, facts: Iterable[tuple[str, str]]) -> None:
        """Prints (name, text) below the line of a part."""
        for name, text in facts:
            self.print(f"  {name:13} {text}")

    def speed(self) -> float:
        """Images a second since the start."""
        return self._done / max(time.perf_counter() - self._started, 1e-9)

    def update(self, chunk: Findings) -> None:
        """Counts images that were checked."""
        self._done += chunk.images
        self._unusable += chunk.unusable
        unusable, speed = f"{self._unusable:,}", f"{self.speed():,.0f}"
        self._bar.update(self._task, completed=self._done, unusable=unusable, speed=speed)
        if not self._console.is_terminal and time.perf_counter() - self._printed > QUIET_SECONDS:
            self._printed = time.perf_counter()
            self.print(f"  {self._done:,} of {self._total:,} images checked, {unusable} unusable, {speed} images/s")


@contextlib.contextmanager
def _written(path: str | None) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Takes a record of what is unusable and writes it at once as a line of JSON, if there is a file to write to."""
    if path is None:
        yield lambda record: None
        return
    try:
        file = open(path, "w", encoding="utf-8", buffering=1)  # noqa: SIM115
    except OSError as error:
        raise UserError(f"--output {path}: cannot be written ({error}); name another file") from error
    with file:
        yield lambda record: print(json.dumps(record), file=file)


def _facts(source: Source, findings: Findings) -> Iterator[tuple[str, str]]:
    """(name, text) of what is known about a part."""
    yield "size", f"{_bytes(findings.size)}, {_bytes(findings.size / findings.images)} per image"
    if findings.smallest is None or findings.largest is None:
        return
    yield "format", findings.survey.formats()
    if findings.smallest[:3] == findings.largest[:3]:
        yield "pixels", f"{findings.smallest[2]}×{findings.smallest[1]}, all alike"
    else:
        for name, (_, height, width, index) in (("smallest", findings.smallest), ("largest", findings.largest)):
            yield name, f"{width}×{height} pixels, {source.name(abs(index))}"


def _values(values: Values, reading: Reading) -> Iterator[tuple[str, str]]:
    """(name, text) of the values of the pixels: a line of each of the first channels, one of all if they are alike."""
    channels = values.channels()
    if not values.pixels:
        return
    part = "" if values.counted == values.pixels else f" of {_percent(values.counted / values.pixels)} of the pixels"
    at = ", ".join(f"{percent:g}" for percent in PERCENTS)
    count = count_of(len(channels), "channels")
    yield "values", f"{reading.dtype} of {count}: lowest to highest of all, then those at {at} %{part}"
    alike = len(channels) > 1 and len({*channels}) == 1
    for number, channel in enumerate(channels[: 1 if alike else CHANNELS], 1):
        name = "each channel" if alike else f"channel {number}"
        if channel is None:
            yield name, "every pixel is missing"
        else:
            at_percents = ", ".join(f"{value:.6g}" for value in channel.percentiles)
            yield name, f"{channel.low:.6g} to {channel.high:.6g}; {at_percents}"
    if not alike and len(channels) > CHANNELS:
        yield "channels", f"{len(channels) - CHANNELS} more, which --report FILE shows"
    if values.missing:
        share = _percent(values.missing / values.pixels)
        where = count_of(values.with_missing, "images")
        yield "missing", f"{values.missing:,} of {values.pixels:,} pixels ({share}), in {where}"
    elif reading.nodata is not None:
        yield "missing", f"no pixel has the value {reading.nodata:g}"


def _stated(findings: Findings, values: Values) -> Iterator[tuple[str, str]]:
    """(name, text) of pixels that files state to be missing, and that a run takes for values."""
    if findings.stated:
        share = _percent(findings.stated / values.pixels)
        which = (
            f"{findings.stated:,} of {values.pixels:,} pixels ({share}) have the value that their file states for it"
        )
        yield "missing", f"{which}, and are used all the same; set nodata to it"


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.995 else "almost 100 %" if share < 1 else "100 %"


def _copies(source: Source, copies: Copies) -> Iterator[tuple[str, str]]:
    """(name, text) of images that are copies of another in their part."""
    if copies.count:
        first, copy = copies.pairs[0]
        are = "is an exact copy" if copies.count == 1 else "are exact copies"
        which = f"{count_of(copies.count, 'images')} {are} of another"
        yield "copies", f"{which}, first {source.name(copy)} of {source.name(first)}"


def _leaks(train: Part, val: Part) -> Iterator[str]:
    """What to know of images of val that are in train as well."""
    copies = copies_across(train.digests, val.digests, EXAMPLES)
    if copies.count:
        ours, theirs = copies.pairs[0]
        which = (
            f"{copies.count:,} of {count_of(len(val.source), 'images')} of val {'is' if copies.count == 1 else 'are'}"
        )
        first = f"first {val.source.name(theirs)}, which is {train.source.name(ours)}"
        yield f"{which} in train as well, so what is measured on val is too good; take them out of one part, {first}"


def _notes(source: Source, findings: Findings, reading: Reading) -> Iterator[tuple[str, str]]:
    """(name, text) of what the owner may not expect of images that a run uses."""
    if findings.smallest is None:
        return
    for line in findings.survey.stock(reading).lines():
        yield "note", line
    for note, (count, index) in sorted(findings.notes.items()):
        yield "note", f"{count:,} {note}, first {source.name(index)}"


def _bytes(count: float) -> str:
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} bytes" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def _verdict(findings: dict[str, Findings], damage: list[tuple[str, str, str]]) -> str:
    """Returns how many images are usable, as a sentence."""
    images = sum(part.images for part in findings.values())
    unusable = sum(part.unusable for part in findings.values())
    whole = "the image is usable" if images == 1 else f"all {images:,} images are usable"
    line = f"{images - unusable:,} of {count_of(images, 'images')} are usable" if unusable else whole
    if unusable:
        line += f"; {unusable:,} {'is' if unusable == 1 else 'are'} not"
    if damage:
        kinds = "shard or folder" if len(damage) == 1 else "shards or folders"
        line += f"; {len(damage):,} {kinds} cannot be read whole"
    return line


def _report(
    print_line: Callable[[str], None],
    verdict: str,
    findings: dict[str, Findings],
    damage: list[tuple[str, str, str]],
    output: str | None,
) -> int:
    """Prints the verdict and what is not usable, and returns the exit status."""
    unusable = sum(part.unusable for part in findings.values())
    bad = [f"{part}: {name} {what}" for part, name, what in damage[:EXAMPLES]]
    examples = [(part, example) for part in findings for example in findings[part].examples]
    bad += [f"{part}: {example.name}: {example.reason}" for part, example in examples[:EXAMPLES]]
    print_line(verdict + ":" * bool(bad))
    for text in bad:
        print_line(f"  {text}")
    if len(bad) < unusable + len(damage):
        print_line(f"  and {unusable + len(damage) - len(bad):,} more{'' if output else '; --output FILE lists all'}")
    if bad and output:
        print_line(f"listed in {output}")
    return 1 if bad else 0
