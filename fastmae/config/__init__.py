"""Every setting of every command: typed, documented, frozen, and checked when a configuration is made. There is a file
per command; values.py checks types, training.py has what pretrain and finetune share, groups.py the groups of the help,
load.py reads settings from files and writes a run's.

The fields are the list of flags as well: the command line is made of them and their docstrings. A setting that is None
is filled in from the data by ``resolve``, and what was chosen is written into the run folder.
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
    Beside,
    FeaturesConfig,
    LinearProbe,
    Pool,
    ProbeConfig,
    ReconstructConfig,
    Reduction,
    SearchConfig,
    check_evaluation,
)
from fastmae.config.export import (
    ExportConfig,
    ExportFormat,
    check_export,
)
from fastmae.config.few import (
    SEEDS,
    amounts_of,
    check_few,
    seeds_of,
)
from fastmae.config.finetune import (
    FIXED_IN_A_FINETUNING,
    OFFICIAL_FINETUNING_WARMUP,
    FinetuneConfig,
    ResolvedFinetuneConfig,
    check_finetune,
    resolve_finetune,
)
from fastmae.config.images import (
    IMAGE_SETTINGS,
    ImagesConfig,
    check_images,
    chosen_other_types,
    images_given,
    images_of_model,
    must_measure,
    pixel_facts,
    pixel_settings,
    read_as,
)
from fastmae.config.impute import (
    ImputeConfig,
)
from fastmae.config.info import (
    InfoConfig,
)
from fastmae.config.inpaint import (
    InpaintConfig,
)
from fastmae.config.masking import (
    PUBLISHED_RATIO,
    Masking,
    MaskingConfig,
    check_masking,
    chosen_masking,
    chosen_ratio,
)
from fastmae.config.model import (
    ModelSpec,
)
from fastmae.config.pack import (
    PackConfig,
)
from fastmae.config.pretrain import (
    FIXED_IN_A_RUN,
    OF_ADVERSARY,
    OFFICIAL_WARMUP,
    PROBE_LIMIT,
    SMALL_MODEL,
    SMALL_SIDE,
    UNLESS_SAVED,
    PretrainConfig,
    ResolvedConfig,
    check_pretrain,
    resolve,
)
from fastmae.config.push import (
    PushConfig,
)
from fastmae.config.quality import (
    BenchQualityConfig,
    check_quality,
    pretraining,
)
from fastmae.config.report import (
    ReportConfig,
)
from fastmae.config.runs import (
    RunsConfig,
)
from fastmae.config.segment import (
    FIXED_IN_A_SEGMENTATION,
    ResolvedSegmentConfig,
    SegmentConfig,
    check_segment,
    resolve_segment,
)
from fastmae.config.serve import (
    ServeConfig,
)
from fastmae.config.sweep import (
    SweepConfig,
)
from fastmae.config.training import (
    LEFT_OPEN,
    PER_RANK,
    TOLD_IF_CHANGED,
    TrainingConfig,
    check_training,
)
from fastmae.config.trainings import (
    TRAININGS,
    AnyResolved,
    AnyTuned,
    Resolved,
    Training,
    command_of,
)
from fastmae.config.tuning import (
    TuningConfig,
)
from fastmae.config.upscale import (
    FIXED_IN_AN_UPSCALING,
    ResolvedUpscaleConfig,
    UpscaleConfig,
    check_upscale,
    resolve_upscale,
)
from fastmae.config.verify import (
    VerifyConfig,
    check_verify,
)
