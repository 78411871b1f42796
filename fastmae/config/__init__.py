"""Every setting of every command: typed, documented, frozen, and checked before anything loads. A file a command.

They are the list of flags as well: fastmae/cli.py makes them from these fields, their docstrings, and the texts in
shared.py of those that several commands have. A setting that is None is filled in from the data by ``resolve``, and
what was chosen is written into the run folder.
"""

# ruff: noqa: F401 (these are the names that others import)

from fastmae.config.bench import (
    BENCH_OPS,
    BENCH_PARTS,
    BENCH_SWITCHES,
    BenchAllConfig,
    BenchAttentionConfig,
    BenchBaseline,
    BenchCheckpointConfig,
    BenchEndToEndConfig,
    BenchKernelsConfig,
    BenchLoaderConfig,
    BenchOp,
    BenchPart,
    BenchStepConfig,
    check_bench,
)
from fastmae.config.estimate import (
    EstimateConfig,
    check_estimate,
)
from fastmae.config.evaluate import (
    PROBE_BATCH,
    PROBE_RATES,
    AnomalyConfig,
    AnomalyPool,
    FeaturesConfig,
    LinearProbe,
    Pool,
    ProbeConfig,
    ReconstructConfig,
    SearchConfig,
    check_evaluation,
)
from fastmae.config.export import (
    ExportConfig,
    ExportFormat,
    check_export,
)
from fastmae.config.finetune import (
    FIXED_IN_A_FINETUNING,
    FinetuneConfig,
    ResolvedFinetuneConfig,
    check_finetune,
    resolve_finetune,
)
from fastmae.config.info import (
    InfoConfig,
)
from fastmae.config.masking import (
    PUBLISHED_RATIO,
    Masking,
    check_masking,
    chosen_masking,
)
from fastmae.config.pretrain import (
    FIXED_IN_A_RUN,
    PROBE_LIMIT,
    SMALL_MODEL,
    SMALL_SIDE,
    UNLESS_SAVED,
    PretrainConfig,
    ResolvedConfig,
    check_pretrain,
    resolve,
)
from fastmae.config.quality import (
    BenchQualityConfig,
    check_quality,
    pretraining,
)
from fastmae.config.verify import (
    VerifyConfig,
    check_verify,
)
