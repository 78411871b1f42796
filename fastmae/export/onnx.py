"""The encoder as an ONNX model: float32, float16, or int8 matrices quantised as onnxruntime does it."""

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

from fastmae.errors import UserError, install_hint
from fastmae.export.official import numbers
from fastmae.export.place import written_aside
from fastmae.export.program import encoder_and_images
from fastmae.model.mae import MaskedAutoencoderViT

VARIANTS = ("fp32", "fp16", "int8")


def save_onnx(path: Path, model: MaskedAutoencoderViT, variant: str, uint8: bool) -> None:
    """Writes a model with the input ``images`` and the output ``tokens``, both with a free first axis.

    How images are made ready stands in its metadata. Weights of over 2 GB, which an ONNX file cannot hold, lie beside
    it in ``NAME.data``.

    Args:
        path: of the .onnx.
        model: whose encoder it is.
        variant: one of ``VARIANTS``. int8: weights of matrices are int8 with a scale a column, and what they are
            multiplied with becomes uint8 at run time; all else is float32.
        uint8: as in ``Encoder``.

    Raises:
        UserError: a package is missing, or the file system refused.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        _needs(package)
    graph = _graph(model, "fp32" if variant == "int8" else variant, uint8)
    form = "uint8 [N, H, W, C]" if uint8 else "float32 [N, C, H, W], normalised with mean and std of pixels in [0, 1]"
    facts = {"images": form, "input_size": model.img_size, "mean": numbers(model.mean), "std": numbers(model.std)}
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


def opened_onnx(path: Path) -> Any:
    """The model in onnxruntime on the CPU, as a function from a batch of images to tokens; threads are torch's.

    Raises:
        UserError: onnxruntime is missing.
    """
    runtime = _needs("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["tokens"], {"images": images.contiguous().numpy()})[0])


def _graph(model: MaskedAutoencoderViT, variant: str, uint8: bool) -> Any:
    encoder, images = encoder_and_images(model, variant, uint8)
    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["tokens"]}
    free = {"images": {0: "batch"}}
    with _quiet(), torch.no_grad():
        return torch.onnx.export(encoder, (images,), **names, dynamic_shapes=free, verbose=False)


def _needs(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"--to onnx: {package} is not installed; {install_hint('export')}") from error


@contextlib.contextmanager
def _float32_beside(aside: Path) -> Any:
    """A path for what int8 is made of, and its weights; nothing is left there."""
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
    """Without the remarks of exporters and quantisers, which are for their authors."""
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
