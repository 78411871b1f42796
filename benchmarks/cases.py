"""What is timed: every op at the shapes of the presets, on random data, with the fewest bytes it must move.

A case says what goes in, what must come out and how few bytes must move; ``measure`` times it once results are right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F

from fastmae.benchmarks.harness import Samples, Stopwatch, input_sets_for, interleave, sdpa_kernel
from fastmae.errors import UserError
from fastmae.model.family import IMAGENET_MEAN, IMAGENET_STD
from fastmae.model.presets import CONVNEXT_PRESETS, PRESETS
from fastmae.ops.assemble_tokens import assemble_tokens, assemble_tokens_reference
from fastmae.ops.attention import attention, attention_backend, attention_reference
from fastmae.ops.backends import ops_backend
from fastmae.ops.depthwise_visible import depthwise_visible, depthwise_visible_reference, slots_of
from fastmae.ops.gather_patches import gather_patches, gather_patches_reference
from fastmae.ops.grn import grn, grn_reference
from fastmae.ops.linear import describe_linear, linear
from fastmae.ops.masked_mse import masked_mse, masked_mse_reference
from fastmae.ops.random_masking import random_masking, random_masking_reference
from fastmae.ops.scatter_patches import scatter_patches, scatter_patches_reference

MASK_RATIO = 0.75
SEED = 0x1234_5678_9ABC_DEF0
# Largest ‖out − truth‖ / ‖truth‖ by the type of the output: roundings of that type, and for uint8 a few values that lie
# within a rounding of the middle between two grey levels. Numbers of patches have no roundings.
TOLERANCE = {torch.int32: 0.0, torch.uint8: 1e-3, torch.float32: 1e-5, torch.bfloat16: 1e-2}

Tensors = tuple[torch.Tensor, ...]
Function = Callable[..., torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """The sizes of one model."""

    model: str
    grid: tuple[int, int]
    patch: tuple[int, int]
    channels: int
    L: int
    P: int
    K: int
    heads: int
    head_dim: int
    decoder_width: int
    decoder_heads: int

    @property
    def attentions(self) -> tuple[tuple[int, int, int], ...]:
        """(S, heads, head_dim): the encoder while pretraining, the decoder, the encoder on whole images."""
        decoder = self.decoder_heads, self.decoder_width // self.decoder_heads
        encoder = self.heads, self.head_dim
        return (self.K + 1, *encoder), (self.L + 1, *decoder), (self.L + 1, *encoder)


def known_shapes(names: Sequence[str]) -> list[Shapes]:
    """The sizes of presets.

    Raises:
        UserError: one is not known as a vision transformer.
    """
    for name in names:
        if name not in PRESETS:
            raise UserError(f"--models {name}: unknown; one of {', '.join(PRESETS)}")
    return [shapes_of(name) for name in names]


def cases_of(name: str, N: int, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Every op of a preset on N images.

    Raises:
        UserError: it is not known, or of a family without ops of its own.
    """
    if name in CONVNEXT_PRESETS:
        return convnext_cases(name, N, dtype, device)
    (shapes,) = known_shapes([name])
    return all_cases(shapes, N, dtype, device)


def shapes_of(name: str) -> Shapes:
    """The sizes of a preset."""
    with torch.device("meta"):  # no memory for the weights: only their shapes are asked for
        model = PRESETS[name]()
    encoder: Any = model.blocks[0]
    decoder: Any = model.decoder_blocks[0]
    ph, pw = model.patch_size
    return Shapes(
        model=name,
        grid=model.grid_size,
        patch=model.patch_size,
        channels=model.in_chans,
        L=model.num_patches,
        P=ph * pw * model.in_chans,
        K=model.num_visible(MASK_RATIO),
        heads=encoder.attn.num_heads,
        head_dim=model.cls_token.shape[-1] // encoder.attn.num_heads,
        decoder_width=model.mask_token.shape[-1],
        decoder_heads=decoder.attn.num_heads,
    )


@dataclass(frozen=True)
class Inputs:
    """One set of random inputs; ``grad`` is the gradient that arrives at the output, None for a forward pass alone."""

    arguments: Tensors
    grad: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Case:
    """One op at one shape. ``ours`` and ``eager`` take the drawn arguments."""

    op: str
    backward: bool
    model: str
    """The preset that has this shape, or an empty string."""
    sizes: str
    backend: str
    """What runs ours."""
    sdpa: str = ""
    """Of attention: the kernel that torch's takes."""
    draw: Callable[[torch.Generator], Inputs]
    ours: Function
    eager: Function
    """The definition."""
    moved: int
    """The fewest bytes: every input read once, every output written once, nothing in between ever stored."""
    flops: int = 0
    """Of the matrix products that cannot be left out."""
    truth: Function | None = None
    """What is right, of float64 arguments; None: ``eager``."""

    @property
    def name(self) -> str:
        return f"{self.op} fwd+bwd" if self.backward else f"{self.op} fwd"


def run(function: Function, inputs: Inputs) -> Tensors:
    """The output, and with a backward pass the gradients of all arguments that ask for one."""
    if inputs.grad is None:
        with torch.no_grad():
            return (function(*inputs.arguments),)
    out = function(*inputs.arguments)
    wanted = [argument for argument in inputs.arguments if argument.requires_grad]
    return out.detach(), *torch.autograd.grad(out, wanted, inputs.grad)


def disagreement(outputs: Tensors, truths: Tensors) -> tuple[float, float]:
    """(relative error, its tolerance) of the output that is worst beside its tolerance."""
    found = []
    for out, truth in zip(outputs, truths, strict=True):
        error = math.inf
        if out.shape == truth.shape:
            difference = (out.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-300)
            error = float(difference.nan_to_num(nan=math.inf))
        found.append((error, TOLERANCE[out.dtype]))
    return max(found, key=lambda pair: pair[0] - pair[1])


def true_result(case: Case, inputs: Inputs) -> Tensors:
    """What the definition gives in float64."""
    arguments = tuple(
        argument.detach().double().requires_grad_(argument.requires_grad) if argument.is_floating_point() else argument
        for argument in inputs.arguments
    )
    return run(case.truth or case.eager, Inputs(arguments, None if inputs.grad is None else inputs.grad.double()))


# --- the cases -----------------------------------------------------------------------------------------------------


def all_cases(shapes: Shapes, N: int, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Every op on N images; ``dtype`` is that of tokens and predictions (autocast's), parameters are float32."""
    yield masking_case(shapes, N, device)
    yield gather_case(shapes, N, dtype, device)
    yield scatter_case(shapes, N, dtype, device)
    for backward in (False, True):
        yield assemble_case(shapes, N, dtype, device, backward)
    for backward in (False, True):
        yield mse_case(shapes, N, dtype, device, backward)
    # As a pretraining step computes it: in the encoder on visible patches, and in the decoder.
    for shape in shapes.attentions[:2]:
        for backward in (False, True):
            yield attention_case(shape, N, dtype, device, backward, shapes.model)
    if device.type == "cpu":  # elsewhere it is torch's own
        for tokens, width in ((shapes.K + 1, shapes.heads * shapes.head_dim), (shapes.L + 1, shapes.decoder_width)):
            for inputs, outputs in ((width, 4 * width), (4 * width, width)):
                for backward in (False, True):
                    yield linear_case(shapes.model, N * tokens, inputs, outputs, dtype, device, backward)


def convnext_cases(name: str, N: int, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """What the visible cells of a ConvNeXt V2 go through between the products, in each of its stages."""
    with torch.device("meta"):
        model: Any = CONVNEXT_PRESETS[name]()
    K = model.num_visible(model.usual_ratio)
    for stage, width in enumerate(model.dims):
        for backward in (False, True):
            yield depthwise_case(name, (N, K, 8 >> stage, width), model.grid_size, dtype, device, backward)
        for backward in (False, True):
            yield grn_case(name, (N, K * (8 >> stage) ** 2, 4 * width), dtype, device, backward)


def depthwise_case(
    model: str,
    shape: tuple[int, int, int, int],
    grid: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    backward: bool,
) -> Case:
    """The convolution of K cells of s×s positions of C channels of each image, for (N, K, s, C)."""
    N, K, s, C = shape

    def draw(generator: torch.Generator) -> Inputs:
        def numbers(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device)

        x, grad = numbers(N, K, s, s, C).to(dtype), numbers(N, K, s, s, C).to(dtype) if backward else None
        order = torch.rand(N, grid[0] * grid[1], generator=generator, device=device).argsort(dim=1)
        weights = [tensor.requires_grad_(backward) for tensor in (numbers(C, 1, 7, 7) / 7, numbers(C))]
        return Inputs((x.requires_grad_(backward), slots_of(order[:, :K], grid), *weights), grad)

    cells = N * K * s * s * C * dtype.itemsize
    others = 4 * N * grid[0] * grid[1] + 4 * 50 * C  # int32 slots, float32 weights and biases
    return Case(
        op="depthwise_visible", backward=backward, model=model, sizes=f"N {N}, K {K} of {s}×{s}, C {C}",
        backend=ops_backend(device, dtype), draw=draw, ours=depthwise_visible, eager=depthwise_visible_reference,
        # cells read and written; backward: their gradients read and written, the cells read again
        moved=(2 + 3 * backward) * cells + others + backward * 4 * 50 * C,
    )  # fmt: skip


def grn_case(model: str, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, backward: bool) -> Case:
    """Global response normalisation of P positions of D channels of each image, for (N, P, D)."""
    N, P, D = shape

    def draw(generator: torch.Generator) -> Inputs:
        def numbers(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device)

        x, grad = numbers(*shape).to(dtype), numbers(*shape).to(dtype) if backward else None
        leaves = [tensor.requires_grad_(backward) for tensor in (x, numbers(D), numbers(D))]
        return Inputs(tuple(leaves), grad)

    def eager(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """The definition rounds factors to the dtype of x, and so the gradients of weights; ours does not."""
        return grn_reference(x.float() if x.dtype == torch.bfloat16 else x, weight, bias).to(x.dtype)

    rows = N * P * D * dtype.itemsize
    return Case(
        op="grn", backward=backward, model=model, sizes=f"N {N}, P {P}, D {D}",
        backend="cpu" if ops_backend(device, dtype) == "cpu" else "torch", draw=draw, ours=grn, eager=eager,
        # the rows read twice, as all of an image come before the first result, and written; backward: both read twice
        moved=(3 + 5 * backward) * rows + (2 + 2 * backward) * 4 * D,
    )  # fmt: skip


def masking_case(shapes: Shapes, N: int, device: torch.device) -> Case:
    L = shapes.L

    def draw(generator: torch.Generator) -> Inputs:
        return Inputs((torch.randint(0, 2**62, (N,), generator=generator, device=device),))

    def of(function: Callable[[torch.Tensor, int, int], torch.Tensor]) -> Function:
        return lambda draw_ids: function(draw_ids, SEED, L)

    return Case(
        op="random_masking", backward=False, model=shapes.model, sizes=f"N {N}, L {L}", backend=ops_backend(device),
        draw=draw, ours=of(random_masking), eager=of(random_masking_reference),
        moved=8 * N + 4 * N * L,  # an int64 draw read, L int32 numbers written an image
    )  # fmt: skip


def gather_case(shapes: Shapes, N: int, dtype: torch.dtype, device: torch.device) -> Case:
    K, P = shapes.K, shapes.P
    mean, std = _statistics(shapes.channels, device)

    def draw(generator: torch.Generator) -> Inputs:
        return Inputs((_images(generator, shapes, N), _ids(generator, shapes, N)[:, :K]))

    def of(function: Function, dtype: torch.dtype) -> Function:
        return lambda images, ids: function(images, ids, shapes.patch, mean, std, dtype)

    return Case(
        op="gather_patches", backward=False, model=shapes.model, sizes=f"N {N}, K {K}, P {P}",
        backend=ops_backend(device, dtype), draw=draw, ours=of(gather_patches, dtype),
        eager=of(gather_patches_reference, dtype), truth=of(gather_patches_reference, torch.float64),
        # int32 numbers, visible uint8 pixels and the channels' float32 mean and std read; patches written
        moved=4 * N * K + N * K * P + 8 * shapes.channels + N * K * P * dtype.itemsize,
    )  # fmt: skip


def scatter_case(shapes: Shapes, N: int, dtype: torch.dtype, device: torch.device) -> Case:
    L, M, P = shapes.L, shapes.L - shapes.K, shapes.P
    mean, std = _statistics(shapes.channels, device)

    def draw(generator: torch.Generator) -> Inputs:
        patches = torch.randn(N, M, P, generator=generator, device=device).to(dtype)
        return Inputs((patches, _ids(generator, shapes, N)[:, shapes.K :]))

    def of(function: Function) -> Function:
        return lambda patches, ids: function(patches, ids, shapes.grid, shapes.patch, mean, std, torch.uint8)

    return Case(
        op="scatter_patches", backward=False, model=shapes.model, sizes=f"N {N}, M {M}, P {P}",
        backend=ops_backend(device, dtype), draw=draw, ours=of(scatter_patches), eager=of(scatter_patches_reference),
        # int32 numbers, patches and the channels' float32 mean and std read; whole uint8 images written
        moved=4 * N * M + N * M * P * dtype.itemsize + 8 * shapes.channels + N * L * P,
    )  # fmt: skip


def assemble_case(shapes: Shapes, N: int, dtype: torch.dtype, device: torch.device, backward: bool) -> Case:
    L, T, D = shapes.L, shapes.K + 1, shapes.decoder_width

    def draw(generator: torch.Generator) -> Inputs:
        visible = torch.randn(N, T, D, generator=generator, device=device).to(dtype).requires_grad_(backward)
        mask_token = torch.randn(D, generator=generator, device=device).requires_grad_(backward)
        pos_embed = torch.randn(L + 1, D, generator=generator, device=device)
        grad = torch.randn(N, L + 1, D, generator=generator, device=device) if backward else None
        return Inputs((visible, mask_token, pos_embed, _ids(generator, shapes, N)), grad)

    # visible tokens, float32 mask token and positions, and int32 numbers read; float32 tokens written
    moved = N * T * D * dtype.itemsize + 4 * D + 4 * (L + 1) * D + 4 * N * L + 4 * N * (L + 1) * D
    if backward:  # the float32 gradient read; those of the visible tokens and of the mask token written
        moved += 4 * N * (L + 1) * D + N * T * D * dtype.itemsize + 4 * D
    return Case(
        op="assemble_tokens", backward=backward, model=shapes.model, sizes=f"N {N}, K {shapes.K}, L {L}, D {D}",
        backend=ops_backend(device, dtype), draw=draw, ours=assemble_tokens, eager=assemble_tokens_reference,
        moved=moved,
    )  # fmt: skip


def mse_case(shapes: Shapes, N: int, dtype: torch.dtype, device: torch.device, backward: bool) -> Case:
    M, P = shapes.L - shapes.K, shapes.P
    mean, std = _statistics(shapes.channels, device)

    def draw(generator: torch.Generator) -> Inputs:
        pred = torch.randn(N, M, P, generator=generator, device=device).to(dtype).requires_grad_(backward)
        ids = _ids(generator, shapes, N)[:, shapes.K :]
        grad = torch.ones((), device=device) if backward else None
        return Inputs((pred, _images(generator, shapes, N), ids), grad)

    def of(function: Function) -> Function:
        return lambda pred, images, ids: function(pred, images, ids, shapes.patch, mean, std, True)

    # predictions, masked uint8 pixels, int32 numbers, and the channels' float32 mean and std read; the loss written
    moved = N * M * P * dtype.itemsize + N * M * P + 4 * N * M + 8 * shapes.channels + 4
    if backward:  # the float32 gradient of the loss read; that of the predictions written
        moved += 4 + N * M * P * dtype.itemsize
    return Case(
        op="masked_mse", backward=backward, model=shapes.model, sizes=f"N {N}, M {M}, P {P}",
        backend=ops_backend(device, dtype), draw=draw, ours=of(masked_mse), eager=of(masked_mse_reference),
        moved=moved,
    )  # fmt: skip


def attention_case(
    shape: tuple[int, int, int], N: int, dtype: torch.dtype, device: torch.device, backward: bool, model: str = ""
) -> Case:
    """Self-attention of (S, heads, head_dim) on N sequences."""
    S, H, D = shape
    try:
        backend, _ = attention_backend(device, dtype, S, D)
    except ValueError as error:  # a damaged table of measurements
        raise UserError(str(error)) from error

    def draw(generator: torch.Generator) -> Inputs:
        packed = torch.randn(N, S, 3, H, D, generator=generator, device=device).to(dtype).requires_grad_(backward)
        grad = torch.randn(N, S, H, D, generator=generator, device=device).to(dtype) if backward else None
        return Inputs((packed,), grad)

    matrix = N * S * H * D * dtype.itemsize
    return Case(
        op="attention", backward=backward, model=model, sizes=f"N {N}, S {S}, {H} heads of {D}", backend=backend,
        sdpa=sdpa_kernel(shape, N, dtype, device), draw=draw, ours=attention, eager=attention_reference,
        # queries, keys and values read, the output written; backward: the same three read again, for they cannot wait
        # on the chip until the output's gradient arrives, that gradient read, three gradients written
        moved=(4 + 7 * backward) * matrix,
        # 2 products forward; 5 backward: the scores once more, since they are not stored, and 4 for the gradients
        flops=(2 + 5 * backward) * 2 * N * H * S * S * D,
    )  # fmt: skip


def linear_case(
    model: str, rows: int, inputs: int, outputs: int, dtype: torch.dtype, device: torch.device, backward: bool
) -> Case:
    """A linear map of ``rows`` tokens, as in an MLP. Weights are of the tokens' dtype, as autocast makes them."""

    def draw(generator: torch.Generator) -> Inputs:
        def numbers(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        arguments = numbers(rows, inputs), numbers(outputs, inputs) / inputs**0.5, numbers(outputs)
        grad = numbers(rows, outputs) if backward else None
        return Inputs(tuple(argument.requires_grad_(backward) for argument in arguments), grad)

    x, y, weight, bias = rows * inputs, rows * outputs, outputs * inputs, outputs
    return Case(
        op="linear", backward=backward, model=model, sizes=f"{rows} rows, {inputs} → {outputs}",
        backend=describe_linear(device, dtype), draw=draw, ours=linear, eager=F.linear,
        # tokens, weight, bias read, output written; backward: its gradient, tokens, weight read, three gradients made
        moved=(x + weight + bias + y + backward * (y + 2 * x + 2 * weight + bias)) * dtype.itemsize,
        flops=(1 + 2 * backward) * 2 * rows * inputs * outputs,
    )  # fmt: skip


def _images(generator: torch.Generator, shapes: Shapes, N: int) -> torch.Tensor:
    """Random uint8 images [N, H, W, C]."""
    (gh, gw), (ph, pw) = shapes.grid, shapes.patch
    shape = (N, gh * ph, gw * pw, shapes.channels)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator, device=generator.device)


def _ids(generator: torch.Generator, shapes: Shapes, N: int) -> torch.Tensor:
    """A random permutation of the patches for each image, int32 [N, L]."""
    return torch.rand(N, shapes.L, generator=generator, device=generator.device).argsort(dim=1).int()


def _statistics(channels: int, device: torch.device) -> Tensors:
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ((0.5,) * channels, (0.25,) * channels)
    return torch.tensor(mean, device=device), torch.tensor(std, device=device)


# --- from a case to its times ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The times of a case, or the reasons why there are none."""

    case: Case
    input_sets: int
    errors: dict[str, tuple[float, float]]
    """(relative error, tolerance) by implementation, of its worst output."""
    skipped: dict[str, str]
    """Why an implementation was not timed."""
    refused: str | None = None
    """Why none of them was timed."""
    seconds: Samples = field(default_factory=dict)

    @property
    def wrong(self) -> bool:
        return any(not error <= tolerance for error, tolerance in self.errors.values())


def measure(
    case: Case, implementations: Mapping[str, Function], watch: Stopwatch, *, optional: Collection[str] = ()
) -> Measured:
    """Times ``implementations`` if their results are right.

    If one is wrong, none is timed, and an exception is raised again; but those that are ``optional`` are skipped
    instead, with the reason.
    """
    generator = torch.Generator(watch.device).manual_seed(0)
    sets = [case.draw(generator) for _ in range(input_sets_for(case.moved, watch.device))]
    truth = true_result(case, sets[0])
    errors, skipped, wrong = {}, {}, []
    for name, function in implementations.items():
        try:
            errors[name] = error, tolerance = disagreement(run(function, sets[0]), truth)
        except Exception as problem:
            if name not in optional:
                raise
            skipped[name] = f"cannot run: {(str(problem).strip() or repr(problem)).splitlines()[0]}"
            continue
        if not error <= tolerance:
            error_text = f"off by {error:.1e}, allowed {tolerance:.0e}"
            if name in optional:
                skipped[name] = f"wrong: {error_text}"
            else:
                wrong.append(f"{name} is {error_text}")
    measured = Measured(case=case, input_sets=len(sets), errors=errors, skipped=skipped)
    if wrong:
        return replace(measured, refused="; ".join(wrong))
    calls = {
        name: lambda i, function=function: run(function, sets[i])
        for name, function in implementations.items()
        if name not in skipped
    }
    return replace(measured, seconds=interleave(calls, watch, len(sets)))


def as_json(measured: Measured) -> dict[str, Any]:
    """Everything, with every sample."""
    case = measured.case
    return {
        "op": case.op,
        "backward": case.backward,
        "model": case.model,
        "sizes": case.sizes,
        "backend": case.backend,
        "sdpa": case.sdpa,
        "bytes": case.moved,
        "flops": case.flops,
        "input_sets": measured.input_sets,
        "errors": measured.errors,
        "skipped": measured.skipped,
        "refused": measured.refused,
        "seconds": measured.seconds,
    }
