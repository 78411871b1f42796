"""Every private, renamed or otherwise fragile name of torch that fastmae uses, each behind a function of its own.

This is the one file to mend when torch changes. Each function says in which versions its names were seen, and what
happens without them. Nothing is looked up while this file is imported, so that a name that is gone breaks no import.
"""

from __future__ import annotations

import inspect
import logging
import os
import sys
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

F = TypeVar("F", bound=Callable[..., Any])

log = logging.getLogger("fastmae")

# --- operations -------------------------------------------------------------------------------------------------------


def aten_ops(*names: str) -> list[Any]:
    """The default overloads of torch's operations of these names.

    Seen in torch 2.11 to 2.13. A name that torch does not have (any more) is left out.
    """
    packets = (getattr(torch.ops.aten, name, None) for name in names)
    return [packet.default for packet in packets if packet is not None]


def has_onednn_linear() -> bool:
    """Whether ``onednn_linear`` works here. It is tried with a product of 1×1.

    Seen in torch 2.11 to 2.13, where torch's own compiler calls the operation. Without it the answer is False, and
    ``F.linear`` computes the same.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    one = torch.ones(1, 1)
    try:
        return onednn_linear(one, one, None).item() == 1.0
    except (AttributeError, TypeError, RuntimeError):  # renamed, with other arguments, or not for this processor
        return False


def onednn_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``F.linear`` in float32 through oneDNN, to which there is no public way in torch. See ``has_onednn_linear``."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def product_in_float32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Multiplies matrices of bfloat16: float32. On a GPU the result is not rounded to bfloat16 before.

    The argument ``out_dtype`` was seen in torch 2.11 to 2.13, for GPUs alone. Without it the product is cast.
    """
    if a.device.type == "cuda" and "dtype" in torch.ops.aten.mm.overloads():
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()


def copy_all(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Copies tensors in place, each cast to the dtype of its target; on a GPU in a few launches for all of them.

    Seen in torch 2.11 to 2.13, where FSDP uses it. Without it they are copied one by one.
    """
    foreach_copy = getattr(torch, "_foreach_copy_", None)
    if foreach_copy is not None and targets:
        foreach_copy(targets, sources)
        return
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def is_transforming() -> bool:
    """Tells whether torch.func (grad, vmap, jvp, …) or forward-mode differentiation is active in this thread.

    The names were seen in torch 2.13. Without them, and in what torch.compile traces, the answer is no, and torch says
    which of our operations it cannot differentiate so.
    """
    if torch.compiler.is_compiling():
        return False
    of_func = getattr(torch._C, "_are_functorch_transforms_active", None)
    if of_func is not None and of_func():
        return True
    return getattr(torch.autograd.forward_ad, "_current_level", -1) >= 0


def is_replica(module: nn.Module) -> bool:
    """Tells whether a module is one of the short-lived copies of ``nn.DataParallel``.

    Seen in torch 2.13. Without the name the answer is no.
    """
    return getattr(module, "_is_replica", False)


def is_in_backward() -> bool:
    """Tells whether autograd is executing a backward pass in this thread, where checkpoints are computed again.

    Seen in torch 2.13. Without the name, and in what torch.compile traces, the answer is no.
    """
    current = getattr(torch._C, "_current_graph_task_id", None)
    return current is not None and not torch.compiler.is_compiling() and current() != -1


# --- the compiler -----------------------------------------------------------------------------------------------------


def constant_when_compiled(function: F) -> F:
    """Marks a function whose result torch.compile takes as a constant, instead of tracing the function.

    It does what ``torch.compiler.assume_constant_result`` does in torch 2.11 to 2.13, without loading the compiler,
    which took 1.2 s of CPU time at every start on a Xeon. If the mark gets another name, compiling says that it cannot
    trace the function.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_when_compiled
def is_exporting() -> bool:
    """Tells whether a program is being exported, and not just compiled.

    Inside torch.compile, torch 2.11's own function says yes in either case, so that compiled code would have taken
    torch's operations in place of ours. Called for itself, as here, it is right in torch 2.11 to 2.13.
    """
    return torch.compiler.is_exporting()


def named_cache() -> str | None:
    """Returns the folder for compiled code that $TORCHINDUCTOR_CACHE_DIR names, if somebody other than torch named it.

    torch 2.11 to 2.13 set the variable to ``default_cache_dir()`` when their compiler is loaded. Without that function
    any value is taken for one that somebody named.
    """
    named = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    try:
        from torch._inductor.runtime.cache_dir_utils import default_cache_dir

        own = os.path.abspath(default_cache_dir())
    except ImportError:
        own = ""
    return named if named and named != own else None


def allow_recompilations(count: int) -> None:
    """Lets torch.compile compile one piece of code for up to ``count`` shapes, before which it would give up.

    Seen in torch 2.11 to 2.13. Without the setting nothing happens, and torch.compile gives up after its own number.
    """
    from torch._dynamo import config

    if hasattr(config, "recompile_limit"):
        config.recompile_limit = max(config.recompile_limit, count)


def keep_blocks_whole(whole: bool) -> None:
    """Says whether torch.compile leaves a graph whole inside DistributedDataParallel, or cuts it at the buckets.

    A cut lets gradients travel while others are computed, and costs what would be fused across it. Blocks that are
    compiled one by one need no cuts: their gradients travel between them. Seen in torch 2.11 to 2.13. Without the
    setting torch cuts.
    """
    from torch._dynamo import config

    if hasattr(config, "optimize_ddp"):
        config.optimize_ddp = not whole


def without_compiling(module: nn.Module) -> None:
    """Undoes ``module.compile()``.

    Seen in torch 2.11 to 2.13. Without the name the module stays compiled.
    """
    if getattr(module, "_compiled_call_impl", None) is not None:
        module._compiled_call_impl = None


def compile_errors() -> tuple[type[Exception], ...]:
    """The exceptions by which torch.compile says that it cannot compile.

    Seen in torch 2.11 to 2.13. Without their base class there are none, and an error keeps its many lines. Before the
    compiler is loaded there are none either, so that an ``except`` clause that asks does not load it.
    """
    if "torch._dynamo" not in sys.modules:
        return ()
    try:
        from torch._dynamo.exc import TorchDynamoException
    except ImportError:
        return ()
    return (TorchDynamoException,)


# --- the optimiser ----------------------------------------------------------------------------------------------------


def skip_next_step_if(optimizer: torch.optim.Optimizer, skipped: torch.Tensor) -> None:
    """Makes the next step of a fused optimiser change nothing where ``skipped`` (float32, a scalar) is 1.0.

    Weights, moments and step counts stay as they are, and the host does not wait for the device. torch.amp.GradScaler
    speaks to fused optimisers through the same attribute in torch 2.11 to 2.13. If it gets another name, bad steps are
    taken without a word: tests/train/test_step.py fails then.
    """
    optimizer.found_inf = skipped  # type: ignore[attr-defined]


# --- several ranks ----------------------------------------------------------------------------------------------------


def keep_buffers_local() -> dict[str, bool]:
    """The option by which DistributedDataParallel does not send a model's buffers before every forward pass.

    It is ``forward_sync_buffers`` in torch 2.13 and ``broadcast_buffers`` in 2.11. Without either there is no option:
    constant buffers are sent, which costs time alone.
    """
    known = inspect.signature(nn.parallel.DistributedDataParallel).parameters
    for name in ("forward_sync_buffers", "broadcast_buffers"):
        if name in known:
            return {name: False}
    return {}


def average_gradients_in_bf16(model: nn.parallel.DistributedDataParallel) -> None:
    """Makes DistributedDataParallel send gradients in bfloat16.

    Seen in torch 2.11 to 2.13. Under its own name torch refuses the hook on a CPU, where gloo can do it as well, so
    torch is given a function of another name.
    """
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

    model.register_comm_hook(None, lambda group, bucket: bf16_compress_hook(group, bucket))


def send_in_bf16(weight: torch.Tensor) -> None:
    """Lets FSDP2 exchange the pieces of a weight in bfloat16. What arrives is made float32 again, and so are gradients.

    It is called after ``fully_shard``, before the first forward pass. One format for all parameters of a block, which
    is ``MixedPrecisionPolicy.param_dtype``, would round those of its norms too. Seen in torch 2.13, where FSDP2 looks
    for functions of these two names at the piece that a rank holds. If they get other names, pieces travel in float32.
    """
    assert isinstance(weight, DTensor)
    piece: Any = weight._local_tensor
    rows = -(-weight.shape[0] // weight.device_mesh.size(weight.device_mesh.ndim - 1))  # of the largest piece

    def before(mesh: Any, outer_size: Any, outer_stride: Any, module: Any, policy: Any) -> tuple[Any, None]:
        rounded = piece.to(torch.bfloat16)
        if len(piece) < rows:
            rounded = torch.cat([rounded, rounded.new_zeros(rows - len(piece), *weight.shape[1:])])
        return (rounded,), None

    def after(
        arrived: tuple[torch.Tensor, ...], _: None, dtype: torch.dtype, *, out: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]] | None:
        if out is None:
            whole = arrived[0].to(dtype)
            return whole, (whole,)
        out.data.copy_(arrived[0][: len(out)])  # nothing that a backward pass must know of
        return None

    piece.fsdp_pre_all_gather, piece.fsdp_post_all_gather = before, after


def wait_long_for_ranks(limit: timedelta) -> None:
    """Lets every later exchange of all ranks wait for so long: torch's clock also runs while a process is stopped.

    Seen in torch 2.11 to 2.13. Without the function the time-out stays that of ``init_process_group``.
    """
    set_timeout = getattr(dist.distributed_c10d, "_set_pg_timeout", None)
    if set_timeout is not None:
        set_timeout(limit)


def restarts_on_an_old_store() -> bool:
    """Whether torchrun may restart the ranks beside a store that outlives them (pytorch#135712).

    Seen in torch 2.11 to 2.13. Without these variables of the environment the answer is False.
    """
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    return restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


# --- the memory of a GPU ----------------------------------------------------------------------------------------------


def record_memory_history(events: int | None) -> None:
    """Begins to record the last ``events`` allocations on the GPU; ends that with None.

    Seen in torch 2.11 to 2.13. Without it nothing is recorded, and ``write_memory_snapshot`` says so.
    """
    record = getattr(torch.cuda.memory, "_record_memory_history", None)
    if record is not None and events is None:
        record(enabled=None)
    elif record is not None:
        record(max_entries=events)


def write_memory_snapshot(path: Path) -> None:
    """Writes what ``record_memory_history`` has recorded, for pytorch.org/memory_viz.

    Raises:
        RuntimeError: this torch cannot do it; it was seen in torch 2.11 to 2.13. OSError: the disk refused.
    """
    dump = getattr(torch.cuda.memory, "_dump_snapshot", None)
    if dump is None:
        raise RuntimeError(f"torch {torch.__version__} records no history of memory")
    dump(str(path))


# --- tensors in files, shared by ranks --------------------------------------------------------------------------------
# Nothing else in torch writes and reads sharded tensors without a pickle. Without these names nothing can be saved, and
# what fails is the save, with an ImportError.


class ShardError(Exception):
    """The tensors of a folder could not be written or read by some rank. It is raised on all ranks."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the headers of a folder's files describe it."""

    shape: torch.Size
    numbers: int
    """How many numbers its pieces have together: fewer than the shape's if the piece of a rank is missing."""


def save_shards(folder: Path, tensors: dict[str, torch.Tensor], group: dist.ProcessGroup | None) -> None:
    """Writes one .safetensors per rank. A tensor that several ranks hold is written by one of them.

    Seen in torch 2.11 to 2.13.

    Args:
        folder: it is made, if it is not there.
        tensors: plain ones and DTensors, by name.
        group: the ranks that call this, on a CPU backend; None for a process by itself.

    Raises:
        ShardError: a rank could not write.
    """
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.api import CheckpointException

    _silence_single_process_warning()
    writer = checkpoint.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        checkpoint.save(tensors, storage_writer=writer, process_group=group, no_dist=group is None)
    except CheckpointException as error:
        raise ShardError(str(next(iter(error.failures.values()))[0])) from error


def load_shards(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Reads tensors in place, each rank its own part, whatever the number of ranks that wrote them.

    Seen in torch 2.11 to 2.13. It reads safetensors alone; torch's other readers unpickle what they find.

    Raises:
        ShardError: a rank could not read.
    """
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.api import CheckpointException

    _silence_single_process_warning()
    reader = checkpoint.HuggingFaceStorageReader(str(folder))
    try:
        with _without_its_traceback():
            checkpoint.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    except CheckpointException as error:
        raise ShardError(str(error).splitlines()[-1]) from error


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a folder by name, from the headers of its files.

    Seen in torch 2.11 to 2.13.

    Raises:
        safetensors.SafetensorError: a file is damaged.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    entries: dict[str, Any] = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {
        name: StoredTensor(entry.size, sum(chunk.sizes.numel() for chunk in entry.chunks))
        for name, entry in entries.items()
    }


def copier_to_cpu() -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] | None:
    """A function that copies tensors into memory of the CPU, the same memory at every call.

    Seen in torch 2.11 to 2.13. Without it the result is None, and a checkpoint is written while training waits.
    """
    try:
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
    except ImportError:
        log.warning("this torch has no DefaultStager, so training waits while a checkpoint is written")
        return None

    options = StagingOptions(
        use_pinned_memory=torch.cuda.is_available(),
        use_shared_memory=False,
        use_async_staging=False,
        use_non_blocking_copy=False,
    )
    stager = DefaultStager(options)

    def copied(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        nonlocal stager
        try:
            staged = stager.stage(tensors)
        except KeyError:  # torch 2.11 empties its stager after each use; later versions keep it, with its memory
            stager = DefaultStager(options)
            staged = stager.stage(tensors)
        assert isinstance(staged, dict)
        return staged

    return copied


@contextmanager
def _without_its_traceback() -> Generator[None]:
    """Keeps torch from logging a traceback where files are gone; the error that follows says so in a line.

    Seen in torch 2.11 to 2.13. If torch logs it elsewhere, it is shown again.
    """

    def is_another(record: logging.LogRecord) -> bool:
        return record.module != "state_dict_loader"

    root = logging.getLogger()
    root.addFilter(is_another)
    try:
        yield
    finally:
        root.removeFilter(is_another)


def _silence_single_process_warning() -> None:
    """torch warns each time that one process saves or loads by itself, also if it was told to. If torch changes the
    text, the warning is shown again."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
