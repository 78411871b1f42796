"""One optimiser step: micro-batches forward and backward, gradients added up, then AdamW.

Nothing here makes the host wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from fastmae import torch_compat
from fastmae.errors import SettingError, install_hint
from fastmae.model.family import MaskedModel, blocks_of
from fastmae.model.mae import MaskedAutoencoderViT
from fastmae.model.vit import Checkpointing, GeluAgain, Mlp
from fastmae.model.weight_copies import WeightCopies
from fastmae.ops.backends import asked_backends

LONGEST_REASON = 200
SHAPES_PER_SIZE = 4
"""The number of token shapes that blocks get for one image size, and one to spare."""


class TrainingLoss(nn.Module):
    """Computes ``model.training_loss`` as a forward pass, which is what torch's wrappers expect.

    A ``judge`` is a module that is trained with the model. It is called with the loss, the predictions, the images, the
    patches that are predicted and the model, and returns the loss in whose gradient it has its say.
    """

    def __init__(
        self,
        model: MaskedModel,
        mask_ratio: float,
        predict_ratio: float | None = None,
        judge: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.model, self.judge = model, judge
        self.mask_ratio, self.predict_ratio = mask_ratio, predict_ratio
        model.find_overrides()  # methods of the class itself may have been replaced since the model was made

    def forward(
        self, images: torch.Tensor, ids_shuffle: torch.Tensor, visible: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Computes the loss. Of ``visible`` [K, 0] the shape alone counts: K patches are visible. So code that is
        compiled for a shape follows. None means as many as the mask ratio says.
        """
        ratio = self.mask_ratio if visible is None else 1 - (visible.shape[0] + 0.5) / ids_shuffle.shape[1]
        if self.judge is None:
            return self.model.training_loss(images, ids_shuffle, ratio, self.predict_ratio)
        loss, pred = self.model.loss_and_prediction(images, ids_shuffle, ratio, self.predict_ratio)
        K = self.model.num_visible(ratio, ids_shuffle.shape[1])
        return self.judge(loss, pred, images, ids_shuffle[:, K : K + pred.shape[1]], self.model)


def prepare(
    loss_of: nn.Module,
    checkpointing: Checkpointing,
    compiling: Literal["off", "block", "model"],
    sizes: int = 1,
    float8: bool = False,
) -> None:
    """Applies --float8, --checkpointing and --compile to the forward and backward pass, in place. Names stay the same.

    The order is fixed: float8, checkpointing, compiling, then the wrapper for several ranks, then the optimiser. So
    compiled code contains the casts, which it fuses, and knows what is computed again; and communication happens
    between compiled regions.

    Raises:
        UserError: torchao is not installed.
    """
    if float8:
        assert isinstance(loss_of, TrainingLoss)
        in_float8(loss_of.model)
    blocks = blocks_of(loss_of)
    for block in blocks:
        block.checkpointing = checkpointing  # type: ignore[assignment]
    if checkpointing == "gelu":
        compute_gelu_again(loss_of, "always")
    elif checkpointing == "none" and isinstance(loss_of, TrainingLoss):
        # What the encoder keeps is kept longest. In the decoder a pass of its own would cost 1 % of a step.
        compute_gelu_again(loss_of.model, "in one pass")
        if isinstance(loss_of.model, MaskedAutoencoderViT):
            compute_gelu_again(loss_of.model.blocks, "on a CPU")
    # Blocks share code, which is compiled once for the encoder, once for the decoder and once for its last block, for
    # each of the ``sizes`` of images. torch gives up after 8 compilations of the same code unless the limit is raised.
    if compiling != "off":
        torch_compat.allow_recompilations(SHAPES_PER_SIZE * (sizes + 1))
        torch_compat.keep_blocks_whole(compiling == "block")
    if compiling == "block":
        for block in blocks or [loss_of]:
            block.compile(fullgraph=True, dynamic=False)
    elif compiling == "model":
        loss_of.compile(fullgraph=True, dynamic=False)


def compute_gelu_again(model: nn.Module, where: GeluAgain) -> None:
    """Lets the MLPs of a model compute GELU again in the backward pass, in place."""
    for part in model.modules():
        if isinstance(part, Mlp):
            part.gelu_again = where


def without_compiling(loss_of: nn.Module) -> None:
    """Undoes the --compile of ``prepare``, in place."""
    for part in loss_of.modules():
        torch_compat.without_compiling(part)


def in_float8(model: nn.Module, emulate: bool = False) -> None:
    """Lets torchao compute the products of the encoder's blocks, forward and backward, in float8, in place.

    Weights stay in float32 and keep their names. Every factor is scaled by its largest value just before its product
    (torchao's recipe ``tensorwise``, its fastest), so nothing has to be saved. Layers of the encoder's blocks are taken
    whose sizes are multiples of 16. The decoder is left alone: it is so narrow that casting its tokens, twice a
    product, would cost about what float8 saves.

    Args:
        model: the model on its device, before it is compiled, sharded or given to an optimiser.
        emulate: round as float8 does, but compute in float32, for devices without float8.

    Raises:
        UserError: torchao is not installed.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise SettingError("float8", problem=f"torchao cannot be loaded ({error}); {install_hint('float8')}") from error

    def fits(module: nn.Module, name: str) -> bool:
        assert isinstance(module, nn.Linear)
        return name.startswith("blocks.") and module.in_features % 16 == module.out_features % 16 == 0

    convert_to_float8_training(model, module_filter_fn=fits, config=Float8LinearConfig(emulate=emulate))


Pass = Callable[..., torch.Tensor]
MicroBatch = tuple[torch.Tensor, ...]
WARM_UPS = 3


class PassGraph:
    """The forward and backward pass of a micro-batch as a CUDA graph, which is captured once and then replayed.

    A replay repeats the captured kernels at the same addresses. Therefore:

    * Each micro-batch is copied into the tensors that the first one was copied into.
    * Weights and gradients must stay at their addresses: the optimiser changes weights in place, and gradients are set
      to zero, not to None. (Capturing needs gradients that are None, so that the backward pass allocates them inside
      the graph's memory; existing ones are put back afterwards.)
    * A micro-batch of another shape is captured anew, and the memory of the former graph is freed first.
    """

    def __init__(self) -> None:
        self._inputs: list[torch.Tensor] = []
        self._replay: Callable[[], torch.Tensor] | None = None

    def __call__(self, run: Pass, parameters: Sequence[nn.Parameter], *inputs: torch.Tensor) -> torch.Tensor:
        """Does what ``run(*inputs)`` does: adds to the gradients of ``parameters`` and returns the loss."""
        if self._replay is None or [(t.shape, t.dtype) for t in inputs] != [(t.shape, t.dtype) for t in self._inputs]:
            self._replay = None  # frees its memory before the next one needs as much
            self._inputs = [tensor.clone() for tensor in inputs]
            self._replay = self._captured(partial(run, *self._inputs), parameters, inputs[0].device)
        for held, tensor in zip(self._inputs, inputs, strict=True):
            held.copy_(tensor)
        return self._replay().clone()  # the next replay overwrites it

    def _captured(
        self, run: Callable[[], torch.Tensor], parameters: Sequence[nn.Parameter], device: torch.device
    ) -> Callable[[], torch.Tensor]:
        """Returns ``run`` as a graph, which adds to the ``.grad`` that parameters have from now on."""
        before = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        stream = _warm_up(run, device)
        for parameter, gradient in zip(parameters, before, strict=True):
            if gradient is not None:
                parameter.grad = gradient
            elif parameter.grad is not None:
                parameter.grad.zero_()
        return _recorded(run, stream)


def _warm_up(run: Callable[[], torch.Tensor], device: torch.device) -> torch.cuda.Stream:
    """Runs what happens only at first, such as compiling, and must not be captured.

    Returns the side stream that it used, for the capture: autograd remembers on which stream a gradient was made.
    """
    side, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            run()
    current.wait_stream(side)
    return side


def _recorded(run: Callable[[], torch.Tensor], stream: torch.cuda.Stream) -> Callable[[], torch.Tensor]:
    """Captures what ``run`` launches, without executing it. The function returned executes it into the same tensor."""
    graph = torch.cuda.CUDAGraph()
    # thread_local: DALI's threads may allocate meanwhile.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        result = run()

    def replay() -> torch.Tensor:
        graph.replay()
        return result

    return replay


def require_graph(device: torch.device, ranks: int) -> None:
    """Refuses --cuda_graph where it cannot work.

    Raises:
        UserError: the device is no GPU, or there are several ranks, whose communication is not captured.
    """
    if device.type != "cuda":
        raise SettingError("cuda_graph", problem=f"the device is {device}, which has no CUDA graphs; leave it out")
    if ranks > 1:
        raise SettingError("cuda_graph", problem=f"is for one rank, and there are {ranks}; use --compile instead")


class Sides(NamedTuple):
    """What a step changes where something is trained beside the model, with gradients of the same backward pass."""

    optimizer: torch.optim.Optimizer
    """That of the model, fused."""
    rival: torch.optim.Optimizer
    """That of the other, fused."""
    told: Callable[[], dict[str, torch.Tensor]]
    """Returns numbers of the step for its line in the log: scalars on the device."""


@dataclass(frozen=True)
class StepResult:
    """The result of a step: scalars on the device, which may not be computed yet."""

    loss: torch.Tensor
    """The mean loss of this rank's micro-batches, finite or not."""
    grad_norm: torch.Tensor
    """The norm of the mean gradient of all ranks, before it was clipped."""
    skipped: torch.Tensor
    """1.0 if a loss or gradient of any rank was not finite, so that nothing was changed on any; otherwise 0.0."""
    told: dict[str, torch.Tensor] = field(default_factory=dict)
    """Further numbers of this rank by name, such as the loss of a discriminator."""


def without_sync(loss_of: nn.Module, is_last: bool) -> AbstractContextManager:
    """Returns a region whose backward pass adds gradients up on this rank alone, except for the last micro-batch."""
    if isinstance(loss_of, FSDPModule):
        loss_of.set_requires_gradient_sync(is_last)
    elif isinstance(loss_of, DistributedDataParallel) and not is_last:
        return loss_of.no_sync()
    return nullcontext()


def train_step(
    loss_of: nn.Module,
    optimizer: torch.optim.Optimizer | Sides,
    micro_batches: Iterable[MicroBatch],
    accum_iter: int,
    lr: float,
    autocast: AbstractContextManager,
    clip_grad: float | None = None,
    mean_over_ranks: Callable[[torch.Tensor], torch.Tensor] = torch.clone,
    graph: PassGraph | None = None,
    copies: WeightCopies | None = None,
) -> StepResult:
    """Takes one step with the mean gradient of the micro-batches, unless it or a loss is not finite.

    Args:
        loss_of: maps the tensors of a micro-batch to a scalar, such as a ``TrainingLoss``, wrapped or not.
        optimizer: a fused optimiser, which can skip a step by itself. The learning rate of its groups is set to ``lr``,
            times the ``lr_scale`` of a group that has one. Of ``Sides`` both do, or skip, the step; the gradient of
            each is measured and clipped by itself.
        micro_batches: ``accum_iter`` tuples of tensors, such as (images, ids_shuffle). They are taken one at a time.
        accum_iter: the number of micro-batches. Ranks exchange gradients with the last one only.
        lr: the learning rate.
        autocast: the region of the forward passes, which may be entered several times.
        clip_grad: the largest norm of the gradient; a larger gradient is scaled down to it. None allows any norm.
        mean_over_ranks: returns the mean of a tensor that every rank has on its device.
        graph: executes the forward and backward passes; the same one in every step of a run.
        copies: the bfloat16 copies of the model's weights, for an ``autocast`` in bfloat16. They are written here, once
            for all micro-batches. Without them every product casts its weight.

    Raises:
        UserError: torch.compile failed.
    """
    optimizers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else [optimizer.optimizer, optimizer.rival]
    for one in optimizers:
        for group in one.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        one.zero_grad(set_to_none=graph is None)
    parameters = [p for group in optimizers[0].param_groups for p in group["params"]]
    if copies is not None:
        copies.write()

    def run(*micro_batch: torch.Tensor) -> torch.Tensor:
        with nullcontext() if copies is None else copies.in_use():
            with autocast:
                loss = loss_of(*micro_batch) / accum_iter
            loss.backward()  # what is computed again needs the copies, too
        return loss.detach()

    total = None
    for index, micro_batch in enumerate(micro_batches):
        is_last = index + 1 == accum_iter
        with without_sync(loss_of, is_last), _compile_errors_in_one_line():
            loss = run(*micro_batch) if graph is None else graph(run, parameters, *micro_batch)
        total = loss if total is None else total + loss
    assert total is not None
    norms = [_clipped(one, clip_grad) for one in optimizers]
    finite = torch.isfinite(total)
    for norm in norms:
        finite = finite & torch.isfinite(norm)
    skipped = (mean_over_ranks((~finite).float()) > 0).float()
    for one in optimizers:
        torch_compat.skip_next_step_if(one, skipped)
        one.step()
    told = {} if isinstance(optimizer, torch.optim.Optimizer) else optimizer.told()
    return StepResult(total, norms[0], skipped, told)


def _clipped(optimizer: torch.optim.Optimizer, clip_grad: float | None) -> torch.Tensor:
    """Returns the norm of the gradient of all that an optimiser changes, and clips it."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = gradient_norm([p.grad for p in parameters])
    if clip_grad is not None:
        clip_grads_with_norm_(parameters, clip_grad, norm)
    return norm


def gradient_norm(gradients: list[Any]) -> torch.Tensor:
    """Returns the norm of all gradients together, float32 [].

    On a CPU by inner products of torch's BLAS: they take half the time of torch's norms and are nearer to the truth.
    Runs of version 0.1 keep its norms, as clipping multiplies by them.
    """
    is_plain = all(type(x) is torch.Tensor and (x.device.type, x.dtype) == ("cpu", torch.float32) for x in gradients)
    if gradients and is_plain and asked_backends().choices.rules != "0.1":
        rows = [gradient.flatten() for gradient in gradients]
        return torch.stack([row.dot(row) for row in rows]).sum().sqrt()
    norm = get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def in_a_line(error: Exception) -> str:
    """Returns what the first line of an error says, and the second if the first only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    shown = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1]) or type(error).__name__
    return shown if len(shown) <= LONGEST_REASON else f"{shown[:LONGEST_REASON]} …"


@contextmanager
def _compile_errors_in_one_line() -> Generator[None]:
    try:
        yield
    except torch_compat.compile_errors() as error:
        problem = (
            f"torch.compile failed ({in_a_line(error)}); on a CPU it needs a C++ compiler while the run starts: "
            "install one (g++), or use --compile=off"
        )
        raise SettingError("compile", problem=problem) from error
