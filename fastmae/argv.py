"""The words of a command line, before tyro makes values of them.

Every spelling of a flag becomes one: dashes and underscores, ``--flag``, ``--no_flag`` and ``--flag False``, the names
of earlier versions. Whatever tyro would refuse in a box of its own is refused here, in one line, with the nearest name
that exists. It knows flags from their classes alone, and loads neither data nor torch.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fastmae.config.values import OLD_NAMES, OLD_VALUES, meant
from fastmae.errors import UserError
from fastmae.flags import REQUIRED, Flag

NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d+)(e[-+]?\d+)?|[-+]?(inf|nan)", re.IGNORECASE)
WORDS_FOR_BOOL = {"true": True, "false": False}

# Names that come to mind first, where the flag is called something that is not near in letters.
MEANT = {
    "amp": "precision", "dataset": "data_path", "image_size": "input_size", "img_size": "input_size",
    "learning_rate": "lr", "output": "output_dir", "workers": "num_workers",
}  # fmt: skip

# Flags of the official scripts that say to a process who it is: the number of values of each.
OF_LAUNCHERS = {"world_size": 1, "local_rank": 1, "dist_url": 1, "dist_on_itp": 0}
# Flags of the official fine-tuning script that fastmae does not have: the values that say what fastmae does anyway
# ("" is none), and what to do instead of any other.
ONLY_OFFICIAL = {
    "eval": ((), "fine-tuning tests every --test_freq epochs and after the last one; the results are in log.txt"),
    "dist_eval": (("", "True"), "leave it out; all ranks share the test"),
    "color_jitter": (("None",), "leave it out; --aa rand-m9-mstd0.5-inc1 changes colours"),
    "remode": (("pixel",), "leave it out; an erased rectangle is filled with noise"),
    "recount": (("1",), "leave it out; one rectangle of an image is erased"),
    "resplit": ((), "leave it out; there is one view per image"),
    "cutmix_minmax": (("None",), "leave it out; --cutmix draws the size of the rectangle"),
    "mixup_prob": (("1", "1.0"), "leave it out; every pair is mixed when --mixup or --cutmix is above 0"),
    "mixup_mode": (("batch",), "leave it out; the images of a batch are mixed with each other"),
    "start_epoch": (("0",), "leave it out; --resume continues at the epoch of the checkpoint"),
}


@dataclass(frozen=True)
class Given:
    """A flag as it was given: its spelling, its name with underscores, and the words behind it."""

    spelling: str
    name: str
    values: tuple[str, ...]

    def words(self) -> list[str]:
        """Returns the words that it was given by; one value is joined to the flag, as it may begin with dashes."""
        return [f"{self.spelling}={self.values[0]}"] if len(self.values) == 1 else [self.spelling, *self.values]


def command_of(words: Sequence[str], commands: Iterable[str]) -> str:
    """Returns the command that a command line begins with: one word, or two for benchmarks.

    Raises:
        UserError: there is no such command.
    """
    known = list(commands)
    for command in (words[0], " ".join(words[:2])):
        if command in known:
            return command
    if list(words[:2]) == ["bench", "scaling"]:
        raise UserError("bench scaling: use `fastmae estimate` instead; see `fastmae estimate --help`")
    is_bench = words[0] == "bench"
    what, page = ("benchmark", "`fastmae bench --help`") if is_bench else ("command", "`fastmae --help`")
    names = {name.split()[is_bench] for name in known if name.startswith("bench ") or not is_bench}
    if list(words) == ["bench"]:
        raise UserError(f"bench: must be followed by one of {', '.join(sorted(names))}; see {page}")
    word = words[1] if is_bench else words[0]
    if word.startswith("-"):
        raise UserError(
            f"{word}: a {what} comes before flags, such as {'step' if is_bench else 'pretrain'}; see {page}"
        )
    raise UserError(f"{word}: no such {what}{did_you_mean(word, sorted(names)) or ';'} see {page}")


def split(words: Sequence[str]) -> tuple[list[str], list[Given]]:
    """Returns the words before the first flag, and the flags with the words behind each."""
    first = next((index for index, word in enumerate(words) if word.startswith("--")), len(words))
    flags: list[Given] = []
    for word in words[first:]:
        if word.startswith("--"):
            spelling, equals, value = word.partition("=")
            flags.append(Given(spelling, spelling[2:].replace("-", "_"), (value,) if equals else ()))
        else:
            flags[-1] = Given(flags[-1].spelling, flags[-1].name, (*flags[-1].values, word))
    return list(words[:first]), flags


def normalise(words: Sequence[str], flags: Sequence[Flag], command: str) -> tuple[list[str], list[str]]:
    """Returns the words in the one spelling that tyro takes, and the flags of launchers, which are not used.

    Raises:
        UserError: a flag that does not exist, or a value that it cannot have.
    """
    positionals, given = split(words)
    by_name = {flag.name: flag for flag in flags if flag.metavar is None}
    normal: list[str] = []
    unused: list[str] = []
    seen = set()
    for one in given:
        name, switch = _known_name(one.name, by_name)
        if name is None:
            rest = _take_official(one, command, unused)
            if rest is None:
                raise UserError(f"{one.spelling}: no such flag{_meant(one.name, by_name)}")
            positionals += rest
            continue
        name = meant(name, " ".join(one.values), by_name)
        flag = by_name[name]
        seen.add(name)
        values, rest = _values_of(flag, one, has_positionals=any(f.metavar for f in flags))
        positionals += rest
        if flag.kind is bool:
            normal += _bool_words(flag, one, values, switch)
        else:
            checked = [_checked(flag, one, value) for value in values]
            normal += [f"--{name}={checked[0]}"] if len(checked) == 1 else [f"--{name}", *checked]
    arguments = [flag for flag in flags if flag.metavar]
    positionals, rest_words = _take_rest(positionals, len(arguments), by_name, seen)
    normal += rest_words
    _check_positionals(positionals, arguments)
    for name, flag in by_name.items():
        if flag.default is REQUIRED and name not in seen:
            raise UserError(f"--{name}: must be given")
    return positionals + normal, unused


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """Returns ``; did you mean …?`` with what is nearest to a word, or nothing."""
    near = difflib.get_close_matches(word, list(known), 1, 0.6)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def _meant(name: str, by_name: dict[str, Flag]) -> str:
    if MEANT.get(name) in by_name:
        return f"; did you mean --{MEANT[name]}?"
    switches = [f"no_{flag.name}" for flag in by_name.values() if flag.kind is bool]
    return did_you_mean(name, [*by_name, *switches], "--")


def _known_name(name: str, by_name: dict[str, Flag]) -> tuple[str | None, bool]:
    """Returns the name of the setting that a flag sets, and whether the flag turns it on rather than off."""
    for candidate in (name, OLD_NAMES.get(name, "")):
        if candidate in by_name:
            return candidate, True
    if name.startswith("no_") and name[3:] in by_name and by_name[name[3:]].kind is bool:
        return name[3:], False
    return None, True


def _values_of(flag: Flag, given: Given, *, has_positionals: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the values of a flag, and the words behind them, which are positional arguments."""
    most = len(given.values) if flag.most is None else flag.most
    if flag.kind is bool and given.values and not _is_bool(given.values[0], flag):
        if not has_positionals:
            raise UserError(f"{given.spelling} {given.values[0]}: must be True or False, or have no value")
        most = 0
    values, rest = given.values[:most], given.values[most:]
    if len(values) < flag.least or (rest and not has_positionals):
        shown = " ".join((given.spelling, *given.values))
        raise UserError(f"{shown}: must have {_count(flag)}")
    return values, rest


def _count(flag: Flag) -> str:
    if flag.most is None:
        return "at least one value"
    if flag.most == 1:
        return "one value" if flag.least else "at most one value"
    return f"{flag.most} values"


def _is_bool(value: str, flag: Flag) -> bool:
    return value.lower() in WORDS_FOR_BOOL or (flag.takes_none and value == "None")


def _bool_words(flag: Flag, given: Given, values: tuple[str, ...], switch: bool) -> list[str]:
    if values == ("None",):
        return [f"--{flag.name}", "None"]
    if values and not switch:
        raise UserError(f"{given.spelling} {values[0]}: must have no value; write --{flag.name} {values[0]}")
    is_on = WORDS_FOR_BOOL[values[0].lower()] if values else switch
    if flag.takes_none:
        return [f"--{flag.name}", str(is_on)]
    return [f"--{flag.name}" if is_on else f"--no_{flag.name}"]


def _checked(flag: Flag, given: Given, value: str) -> str:
    """Returns the value in the words of today, if the flag can have it."""
    if value not in flag.choices:
        value = OLD_VALUES.get(flag.name, {}).get(value, value)
    if (flag.takes_none and value == "None") or value in flag.words:
        return value
    if flag.choices and value not in flag.choices:
        choices = f"{', '.join(flag.choices[:-1])} or {flag.choices[-1]}" if flag.choices[1:] else flag.choices[0]
        raise UserError(f"{given.spelling} {value}: must be {choices}{did_you_mean(value, flag.choices)}")
    if flag.kind is float and not NUMBER.fullmatch(value):
        raise UserError(f"{given.spelling} {value}: must be a number{''.join(f' or {word}' for word in flag.words)}")
    if flag.kind is int and not re.fullmatch(r"[-+]?\d[\d_]*", value):
        raise UserError(f"{given.spelling} {value}: must be a whole number")
    return value


def _take_rest(words: list[str], count: int, by_name: dict[str, Flag], seen: set[str]) -> tuple[list[str], list[str]]:
    """Returns the words of the ``count`` positional arguments, and those behind them as values of the flag for them."""
    flag = next((flag for flag in by_name.values() if flag.rest), None)
    behind = [] if flag is None else words[count:]
    if flag is None or not behind or any(word.startswith("-") for word in behind):
        return words, []
    name = flag.rest_otherwise if flag.name in seen and flag.rest_otherwise else flag.name
    if name in seen:
        raise UserError(f"{behind[0]}: one argument too many; {flag.rest} is given by --{name} already")
    return words[:count], [f"--{name}={behind[0]}"] if len(behind) == 1 else [f"--{name}", *behind]


def _check_positionals(words: Sequence[str], flags: Sequence[Flag]) -> None:
    dashed = next((word for word in words if word.startswith("-") and not NUMBER.fullmatch(word)), None)
    if dashed is not None:
        raise UserError(f"{dashed}: no such flag; flags begin with two dashes")
    if len(words) < len(flags):
        missing = flags[len(words)]
        raise UserError(f"{missing.metavar}: {'must name at least one' if missing.most is None else 'must be given'}")
    if flags and flags[-1].most is None:
        return
    if len(words) > len(flags):
        raise UserError(
            f"{words[len(flags)]}: one argument too many; a value follows its flag, as in --data_path photos"
        )


def _take_official(given: Given, command: str, unused: list[str]) -> tuple[str, ...] | None:
    """Takes a flag of the official scripts that is no setting, and returns the words behind it; None for any other.

    Flags of launchers are added to ``unused``.

    Raises:
        UserError: the flag asks for what fastmae does not do.
    """
    if command not in ("pretrain", "finetune"):
        return None
    if given.name in OF_LAUNCHERS:
        unused.append(given.spelling)
        return given.values[OF_LAUNCHERS[given.name] :]
    if command == "finetune" and given.name in ONLY_OFFICIAL:
        agreed, advice = ONLY_OFFICIAL[given.name]
        if (given.values or ("",))[0] not in agreed:
            shown = " ".join((given.spelling, *given.values[:1]))
            raise UserError(f"{shown}: the official script's flag is not one of fastmae's; {advice}")
        return given.values[1:]
    return None
