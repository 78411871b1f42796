"""The settings of impute."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fastmae.config.shared import Data, Device, ForwardBatch, Json, ReadingConfig, WithDecoder, check_reading
from fastmae.config.values import coerce, need, need_at_least_one, need_seed


@dataclass(frozen=True, kw_only=True)
class ImputeConfig(ReadingConfig):
    """Fill the missing cells of a table with what a model of vectors (mae_mlp) predicts, and write it as it was read:
    the same columns in the same order and types, every other cell untouched."""

    checkpoint: WithDecoder
    data_path: Data = None
    """The table: a .csv, .csv.gz, .tsv, .parquet or .npy file, whose columns are matched by name. Default: the data of
    the run."""
    output: str
    """The file to write; it ends as the table does."""
    check: float | None = None
    """Hide this share of the known cells first, and print how far predictions are from them. If the model was trained
    on the same rows it has seen these cells, so that others come out a little worse. Default: nothing is checked."""
    report: str | None = None
    """A file for the counts, and for the errors of each column with --check (JSON)."""
    seed: int = 0
    """The number from which it follows which cells --check hides, and what each prediction does not see."""
    passes: int = 32
    """A cell gets the mean of this many predictions, each of which sees another four fifths of the known cells. 1: of
    one that sees all of them, which is faster and a little worse."""
    batch_size: ForwardBatch = 4096
    device: Device = None
    json: Json = False

    def __post_init__(self) -> None:
        coerce(self)
        check_reading(self)
        need_at_least_one(self, "batch_size", "passes")
        need_seed(self)
        same = self.report is not None and Path(self.report).absolute() == Path(self.output).absolute()
        need(self, not same, "report", "another file than --output")
        need(self, self.check is None or 0 < self.check < 1, "check", "a share above 0 and below 1")
