"""The settings of push."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from fastmae.config.shared import Checkpoint, ReadingConfig, check_reading
from fastmae.config.values import coerce, need

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class PushConfig(ReadingConfig):
    """Write a model for sharing: a folder that transformers loads, with a model card, training facts and a picture.
    It is uploaded only with --repo."""

    checkpoint: Checkpoint
    output: Annotated[str, Positional, arg(metavar="DEST", help="The folder to write. It must be new, or empty.")]
    part: Literal["encoder", "full"] | None = None
    """The encoder alone, or the decoder as well. Default: both, where the checkpoint has a decoder and transformers a
    class for it."""
    name: str | None = None
    """The name of the model in its card. Default: that of the folder."""
    license: str | None = None
    """The licence of the weights as the hub names it, such as mit or cc-by-nc-4.0. Default: none; the card says so."""
    repo: str | None = None
    """Upload to this repository of the Hugging Face hub (USER/NAME), which is made if it is not there. The token is the
    one of `hf auth login` or of HF_TOKEN; HF_ENDPOINT names another hub."""
    private: bool = False
    """With --repo, make the repository a private one."""

    def __post_init__(self) -> None:
        coerce(self)
        check_reading(self)
        need(self, self.output != "", "output", "the name of a folder")
        holds = self.license is None or re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", self.license) is not None
        need(self, holds, "license", "an identifier in small letters, such as mit, apache-2.0 or cc-by-nc-4.0")
        need(self, self.repo is None or _REPO.fullmatch(self.repo) is not None, "repo", "USER/NAME")
        need(self, not self.private or self.repo is not None, "private", "given together with --repo")
        for name in ("pixel_type", "value_range"):
            is_open = getattr(self, name) in ("auto", ("auto",))
            need(self, not is_open, name, "other than auto, as this looks at no data")
