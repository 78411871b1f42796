"""Parts of a data set by their names: which folder or shard is to train on, to validate on or to test on."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

Part = Literal["train", "val", "test"]

_WORDS: dict[str, Part] = {
    **dict.fromkeys(("train", "training", "trn"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "validate", "dev", "eval", "evaluation"), "val"),
    **dict.fromkeys(("test", "testing", "tst"), "test"),
}  # fmt: skip
# Words that say nothing of the part, alone or joined to its word: train_images, TestSet, val_split.
_FILLER = r"(?:data|dataset|set|split|part|folder|images?|imgs?|photos?|pictures?|pics?)"
_JOINED = re.compile(f"{_FILLER}?({'|'.join(_WORDS)}){_FILLER}?")


def read_part(name: str) -> tuple[Part, tuple[str, ...]] | None:
    """Returns the part that a name says, in any case, and its further words; None if it says none or several.

    "Train" and "val2017" have no further words, "ILSVRC2012_img_train" has "ilsvrc". "trainval" says no part.
    """
    words = re.findall("[a-z]+", name.lower())
    found = {match[1] for word in words if (match := _JOINED.fullmatch(word))}
    if len(found) != 1:
        return None
    others = (word for word in words if not _JOINED.fullmatch(word) and not re.fullmatch(_FILLER, word))
    return _WORDS[found.pop()], tuple(others)


def parts_among(names: Iterable[str]) -> dict[Part, list[str]]:
    """Returns which of some folders that lie side by side are parts: their names, sorted, by part.

    A name with further words is taken for a part only if another one with the same words is a part to train on, or, if
    it is one to train on, to evaluate on: "bullet_train" alone is no part, "sar_train" beside "sar_test" is.
    """
    read = {name: said for name in sorted(names) if (said := read_part(name)) is not None}
    parts: dict[Part, list[str]] = {}
    for name, (part, words) in read.items():
        others = {part for part, same in read.values() if same == words}
        if not words or ("train" in others and len(others) > 1):
            parts.setdefault(part, []).append(name)
    return parts


def shard_part(name: str) -> Part | None:
    """Returns the part to evaluate on that a shard's name says: "val" for "cats-val-0001.tar"; otherwise None.

    Of several words the last one counts, as "test-set-train-0001.tar" is to train on.
    """
    said = [_WORDS[word] for word in re.findall("[a-z]+", name.lower()) if word in _WORDS]
    return said[-1] if said and said[-1] != "train" else None
