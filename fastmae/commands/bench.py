"""Runs the benchmark that was asked for; each is loaded only when it is."""

from __future__ import annotations

from fastmae.config import (
    BenchAllConfig,
    BenchAttentionConfig,
    BenchCheckpointConfig,
    BenchEndToEndConfig,
    BenchKernelsConfig,
    BenchLoaderConfig,
    BenchQualityConfig,
    BenchStepConfig,
)


def run_bench(
    config: BenchKernelsConfig
    | BenchAttentionConfig
    | BenchStepConfig
    | BenchLoaderConfig
    | BenchCheckpointConfig
    | BenchQualityConfig
    | BenchEndToEndConfig
    | BenchAllConfig,
    argv: list[str],
) -> int:
    """Runs one benchmark and returns its exit status; ``argv`` is the command that its result keeps."""
    match config:
        case BenchKernelsConfig():
            from fastmae.benchmarks.kernels import bench_kernels

            return bench_kernels(config, argv)
        case BenchAttentionConfig():
            from fastmae.benchmarks.attention import bench_attention

            return bench_attention(config, argv)
        case BenchStepConfig():
            from fastmae.benchmarks.step import bench_step

            return bench_step(config, argv)
        case BenchLoaderConfig():
            from fastmae.benchmarks.loader import bench_loader

            return bench_loader(config, argv)
        case BenchCheckpointConfig():
            from fastmae.benchmarks.checkpoint import bench_checkpoint

            return bench_checkpoint(config, argv)
        case BenchQualityConfig():
            from fastmae.benchmarks.quality import bench_quality

            return bench_quality(config, argv)
        case BenchEndToEndConfig():
            from fastmae.benchmarks.end_to_end import bench_end_to_end

            return bench_end_to_end(config, argv)
        case BenchAllConfig():
            from fastmae.benchmarks.suite import bench_all

            return bench_all(config, argv)
