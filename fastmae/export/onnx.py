"""Export of the encoder to ONNX: float32, float16, or int8 matrices as onnxruntime quantises them."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import torch

from fastmae.config import pixel_settings
from fastmae.errors import UserError, install_hint
from fastmae.export.atomic import written_aside
from fastmae.export.encoder import Exported
from fastmae.export.official import numbers
from fastmae.export.program import Head, encoder_and_images
from fastmae.facts import UINT8
from fastmae.model.segmenter import Segmenter

VARIANTS = ("fp32", "fp16", "int8")


def save_onnx(path: Path, model: Exported, variant: str, raw: bool, head: Head = None) -> None:
    """Writes a model with the input ``images`` and the output ``tokens``, both with a free first axis.

    With the ``head`` of a classifier, the output is ``logits`` [N, classes]; of a segmenter [N, classes, H, W].

    The metadata say how images are prepared. Weights of over 2 GB, which an ONNX file cannot hold, are written beside
    it as ``NAME.data``.

    Args:
        path: a path that ends in .onnx.
        model: the model whose encoder is written.
        variant: one of ``VARIANTS``. With int8, the weights of matrices are int8 with one scale per column, and their
            inputs become uint8 at run time; everything else is float32.
        raw: as in ``Encoder``.

    Raises:
        UserError: a package is missing, or the file system refused.
    """
    check_packages()
    graph = _graph(model, "fp32" if variant == "int8" else variant, raw, head)
    shares = "pixels in [0, 1]" if model.value_range is None else "(pixels - low) / (high - low) of value_range"
    normalised = f"float32 [N, C, H, W], normalised with mean and std of {shares}"
    form = f"{model.pixels.dtype} [N, H, W, C]" if raw else normalised
    facts = {"images": form, "input_size": model.img_size, "mean": numbers(model.mean), "std": numbers(model.std)}
    facts |= {} if model.pixels == UINT8 else pixel_settings(model.pixels)
    graph.model.metadata_props.update({name: json.dumps(value) for name, value in facts.items()})
    with written_aside(path) as aside:
        if variant != "int8":
            graph.save(aside)
            return
        quantization = _needs("onnxruntime.quantization")
        with _float32_beside(aside) as float32, _quiet():
            graph.save(float32)
            large = float32.with_name(f"{float32.name}.data").exists()
            # The projection of the patches stays as it is: onnxruntime has no fast convolution in int8.
            quantization.quantize_dynamic(
                float32, aside, op_types_to_quantize=["MatMul"], per_channel=True, use_external_data_format=large
            )


def check_packages() -> None:
    """Refuses to go on without the packages that ``save_onnx`` needs.

    Raises:
        UserError: naming the one that is missing.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        _needs(package)


def opened_onnx(path: Path) -> Any:
    """Opens a model in onnxruntime on the CPU, with as many threads as torch has.

    Returns a function from a batch of images to its only output: tokens, or a classifier's logits.

    Raises:
        UserError: onnxruntime is missing.
    """
    runtime = _needs("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.contiguous().numpy()})[0])


def _graph(model: Exported, variant: str, raw: bool, head: Head) -> Any:
    """Traces the encoder as an ONNX program with a free batch axis."""
    encoder, images = encoder_and_images(model, variant, raw, head)
    return traced(encoder, images, "logits" if head or isinstance(model, Segmenter) else "tokens")


def traced(module: torch.nn.Module, images: torch.Tensor, output: str) -> Any:
    """Traces a module of images as an ONNX program with a free batch axis, whose output has a name."""
    names: dict[str, Any] = {"input_names": ["images"], "output_names": [output]}
    free = {"images": {0: "batch"}}
    with _quiet(), torch.no_grad():
        return torch.onnx.export(module, (images,), **names, dynamic_shapes=free, verbose=False)


def _needs(package: str) -> Any:
    """Imports a package of the extra ``export``."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"ONNX needs {package}, which is not installed; {install_hint('export')}") from error


@contextlib.contextmanager
def _float32_beside(aside: Path) -> Any:
    """Gives a path for the float32 model that int8 is made from; it and its weights are removed at the end."""
    folder = aside.with_name("float32")
    folder.mkdir()
    try:
        yield folder / aside.name
    finally:
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


@contextlib.contextmanager
def _quiet() -> Any:
    """Silences the messages of exporters and quantisers, which are of no use to a user."""
    loggers = [logging.getLogger(), logging.getLogger("torch.onnx"), logging.getLogger("onnxscript")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
