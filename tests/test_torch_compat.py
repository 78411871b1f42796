"""Names of torch that are private or fragile: they stand in one file, and fastmae lives without those that it can."""

import ast
import subprocess
import sys
import types
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fastmae import torch_compat

ROOT = Path(__file__).parents[1]
COMPAT = ROOT / "fastmae" / "torch_compat.py"
FILES = [path for folder in ("fastmae", "kernels", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]
# Not private by their spelling, but changed between versions, or unknown to torch's documentation.
FRAGILE = {
    "CheckpointException",
    "DefaultStager",
    "HuggingFaceStorageReader",
    "HuggingFaceStorageWriter",
    "StagingOptions",
    "TensorStorageMetadata",
    "assume_constant_result",
    "bf16_compress_hook",
    "broadcast_buffers",
    "cache_size_limit",
    "forward_sync_buffers",
    "found_inf",
    "recompile_limit",
}
# Private names that other files may use, with the reason.
EXCEPTIONS: dict[tuple[str, str], str] = {}


def is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def dotted(node: ast.expr) -> str | None:
    """``a.b.c`` of an expression that is nothing but names and dots."""
    if isinstance(node, ast.Attribute):
        owner = dotted(node.value)
        return None if owner is None else f"{owner}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else None


def torch_names(text: str) -> Iterator[str]:
    """Full names of torch that a file uses: imported, reached by dots, or asked for by a string."""
    tree = ast.parse(text)
    aliases = {"torch": "torch"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "torch":
                    yield alias.name
                    aliases[alias.asname or "torch"] = alias.name if alias.asname else "torch"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            for alias in node.names:
                yield f"{node.module}.{alias.name}"
                aliases[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        asks = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        if asks and node.func.id in ("getattr", "hasattr", "setattr") and isinstance(node.args[1], ast.Constant):
            node = ast.Attribute(node.args[0], node.args[1].value)
        name = dotted(node) if isinstance(node, ast.Attribute) else None
        first, _, rest = (name or "").partition(".")
        if first in aliases:
            yield f"{aliases[first]}.{rest}"


def words(text: str) -> set[str]:
    """Names, attributes, arguments and strings of a file."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        found |= {getattr(node, field, None) for field in ("id", "attr", "arg", "name", "value")} - {None}
    return {word for word in found if isinstance(word, str)}


def test_the_scan_sees_every_way_to_a_private_name():
    ways = {
        "import torch._dynamo": "torch._dynamo",
        "import torch\ntorch._dynamo.reset()": "torch._dynamo.reset",
        "from torch._dynamo.exc import Unsupported": "torch._dynamo.exc.Unsupported",
        "import torch.distributed as dist\ndist._verify()": "torch.distributed._verify",
        "from torch import cuda\ncuda.memory._snapshot()": "torch.cuda.memory._snapshot",
        "import torch\nhasattr(torch.ops.mkldnn, '_linear')": "torch.ops.mkldnn._linear",
        "import torch\ntorch.ops.aten._scaled_mm.default": "torch.ops.aten._scaled_mm.default",
    }
    for text, name in ways.items():
        assert name in {name for name in torch_names(text) if is_private(name)}, text
    assert not [name for name in torch_names("import torch\ntorch.nn.Linear.__init__") if is_private(name)]


@pytest.mark.parametrize("where", [str(path.relative_to(ROOT)) for path in FILES if path != COMPAT])
def test_private_and_fragile_names_stand_in_one_file(where):
    text = (ROOT / where).read_text()
    private = {name for name in torch_names(text) if is_private(name)}
    private -= {name for file, name in EXCEPTIONS if file == where}
    assert not private, f"{where} uses {private}: give fastmae/torch_compat.py a function for it"
    assert not words(text) & FRAGILE, f"{where}: give fastmae/torch_compat.py a function for it"


WITHOUT = """
import sys
# torch names the operations itself, and would fail before us.
import torch, torch._dynamo, torch.distributed.fsdp, torch.distributed.tensor, torch.utils.flop_counter

GONE = {
    torch.ops.aten: [
        "_scaled_mm",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    ],
    torch.ops.mkldnn: ["_linear_pointwise"],
}
find = type(torch.ops.aten).__getattr__

def found(self, name):
    if name in GONE.get(self, ()):
        raise AttributeError(f"no operation {name}")
    return find(self, name)

for space, names in GONE.items():
    for name in names:
        vars(space).pop(name, None)
type(torch.ops.aten).__getattr__ = found
for name in ("_record_memory_history", "_dump_snapshot"):
    delattr(torch.cuda.memory, name)
del torch._dynamo.exc.TorchDynamoException
sys.modules["torch.distributed.checkpoint.staging"] = None

import fastmae.train.pretrain, fastmae.train.classify
from fastmae import mae_vit_tiny_patch4, ops, torch_compat
from fastmae.model.vit import EXPENSIVE
from fastmae.ops.backends import using
from fastmae.ops.linear import ONEDNN

assert not ONEDNN and torch_compat.copier_to_cpu() is None and torch_compat.compile_errors() == ()
torch_compat.record_memory_history(1)
model = mae_vit_tiny_patch4(img_size=16)
for block in [*model.blocks, *model.decoder_blocks]:
    block.checkpointing = "selective"
images = torch.zeros(2, 16, 16, 3, dtype=torch.uint8)
with using(attention="cpu"):  # torch's own has the names that are gone
    loss = model.training_loss(images, ops.random_masking(torch.arange(2), seed=0, num_patches=16), mask_ratio=0.75)
    loss.backward()
print(len(EXPENSIVE), bool(loss.isfinite()))
"""


def test_fastmae_is_imported_and_trains_without_the_names_that_torch_may_drop():
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["6", "True"]


def test_operations_that_torch_does_not_have_are_left_out():
    assert torch_compat.aten_ops("mm", "no_such_operation") == [torch.ops.aten.mm.default]


def test_a_constant_is_marked_as_torch_marks_it():
    def ours() -> int:
        return 1

    def theirs() -> int:
        return 1

    assert vars(torch_compat.constant_when_compiled(ours)) == vars(torch.compiler.assume_constant_result(theirs))


def test_more_recompilations_are_allowed_and_never_fewer(monkeypatch):
    from torch._dynamo import config

    before = config.recompile_limit
    try:
        torch_compat.allow_recompilations(before + 3)
        assert config.recompile_limit == before + 3
        torch_compat.allow_recompilations(1)
        assert config.recompile_limit == before + 3
    finally:
        config.recompile_limit = before
    without = types.SimpleNamespace()
    monkeypatch.setattr(torch._dynamo, "config", without)
    torch_compat.allow_recompilations(1)
    assert not vars(without)


@pytest.mark.parametrize(
    ("known", "option"),
    [
        (["module", "broadcast_buffers"], {"broadcast_buffers": False}),
        (["module", "broadcast_buffers", "forward_sync_buffers"], {"forward_sync_buffers": False}),
        (["module"], {}),
    ],
)
def test_buffers_stay_local_under_either_name_of_the_option(monkeypatch, known, option):
    monkeypatch.setattr(torch_compat.inspect, "signature", lambda _: type("", (), {"parameters": known}))
    assert torch_compat.keep_buffers_local() == option


def test_ranks_wait_long_for_each_other_where_torch_lets_them(monkeypatch):
    seen = []
    monkeypatch.setattr(dist.distributed_c10d, "_set_pg_timeout", seen.append)
    torch_compat.wait_long_for_ranks(timedelta(days=2))
    assert seen == [timedelta(days=2)]
    monkeypatch.delattr(dist.distributed_c10d, "_set_pg_timeout")
    torch_compat.wait_long_for_ranks(timedelta(days=2))


def test_transforms_backward_passes_and_replicas_are_told_where_torch_tells_of_them(monkeypatch):
    told: list[bool] = []
    torch.func.vmap(lambda x: told.append(torch_compat.is_transforming()) or x)(torch.zeros(2))
    with torch.autograd.forward_ad.dual_level():
        told.append(torch_compat.is_transforming())
    x = torch.zeros(1, requires_grad=True)
    x.register_hook(lambda gradient: told.append(torch_compat.is_in_backward()))
    x.sum().backward()
    assert told == [True, True, True]
    assert not torch_compat.is_transforming()
    assert not torch_compat.is_in_backward()
    assert torch_compat.is_replica(torch.nn.Identity()._replicate_for_data_parallel())
    assert not torch_compat.is_replica(torch.nn.Identity())
    with torch.autograd.forward_ad.dual_level(), monkeypatch.context() as without:
        without.delattr(torch._C, "_are_functorch_transforms_active")
        without.delattr(torch._C, "_current_graph_task_id")
        assert torch_compat.is_transforming()
        without.delattr(torch.autograd.forward_ad, "_current_level")
        assert not torch_compat.is_transforming()
        assert not torch_compat.is_in_backward()
        without.undo()


def test_without_a_history_of_memory_it_is_said(monkeypatch, tmp_path):
    for name in ("_record_memory_history", "_dump_snapshot"):
        monkeypatch.delattr(torch.cuda.memory, name)
    torch_compat.record_memory_history(100)
    torch_compat.record_memory_history(None)
    with pytest.raises(RuntimeError, match="records no history of memory"):
        torch_compat.write_memory_snapshot(tmp_path / "memory.pickle")


def test_tensors_are_copied_again_where_torch_empties_its_stager_after_each_use(monkeypatch):
    """As torch 2.11 does, with which a second checkpoint of a run failed."""
    from torch.distributed.checkpoint import staging

    class Once:
        def __init__(self, options):
            self.used = False

        def stage(self, tensors):
            if self.used:
                raise KeyError(type)
            self.used = True
            return {name: tensor.clone() for name, tensor in tensors.items()}

    monkeypatch.setattr(staging, "DefaultStager", Once)
    copied = torch_compat.copier_to_cpu()
    for value in (1.0, 2.0):
        assert copied({"a": torch.tensor(value)})["a"] == value
