"""The arrows between the parts run one way (README, "How it is built")."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEAVES = {"errors", "facts", "files", "messages", "philox", "screen", "signals", "torch_compat"}
# Who may import whom; leaves may be imported by all.
ALLOWED = {
    "errors": set(),
    "facts": set(),
    "files": set(),
    "messages": {"screen"},
    "philox": set(),
    "screen": set(),
    "signals": set(),
    "torch_compat": set(),
    "environment": set(),
    "faults": {"environment", "screen"},
    "launch": {"errors"},
    "config": LEAVES | {"launch"},
    "_C": set(),
    "kernels": LEAVES,
    "report": LEAVES | {"config"},
    "sweep": LEAVES | {"config", "launch", "report"},
    "ops": LEAVES | {"_C", "environment", "kernels"},
    "model": LEAVES | {"config", "ops", "data"},
    "data": LEAVES | {"config", "ops"},
    "checkpoint": LEAVES | {"config", "model"},
    "evaluate": LEAVES | {"config", "report", "ops", "model", "data", "checkpoint"},
    "export": LEAVES | {"config", "model", "data", "checkpoint", "evaluate"},
    "serve": LEAVES | {"config", "ops", "model", "data", "checkpoint", "evaluate"},
    "train": LEAVES | {"config", "environment", "launch", "ops", "model", "data", "checkpoint", "evaluate", "report"},
    "benchmarks": LEAVES
    | {"config", "environment", "kernels", "ops", "model", "data", "checkpoint", "evaluate", "train"},
    "estimate": {"errors", "config", "model"},
    "commands": LEAVES
    | {"argv", "flags", "config", "environment", "estimate", "launch", "model", "data", "checkpoint"}
    | {"evaluate", "export", "report", "serve", "sweep", "train", "benchmarks"},
    "flags": set(),
    "argv": {"errors", "flags", "config"},
    "cli": {"environment"}
    | LEAVES - {"facts", "files", "philox", "torch_compat"}
    | {"faults", "launch", "flags", "argv", "config", "commands", "train"},
    "api": {
        "errors",
        "facts",
        "files",
        "messages",
        "config",
        "ops",
        "model",
        "data",
        "checkpoint",
        "evaluate",
        "train",
    },
    "__init__": {"errors", "ops", "model", "data", "checkpoint", "train", "api"},
    "__main__": {"cli", "signals"},
}
BESIDE = {"kernels", "benchmarks"}  # folders beside the package in the repository, installed inside it
FILES = [path for folder in ("fastmae", *sorted(BESIDE)) for path in sorted((ROOT / folder).rglob("*.py"))]


def imports_of(path: Path) -> set[str]:
    """Full names of the fastmae modules that a file imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] == "fastmae"}


def module_of(path: Path) -> str:
    """The name under which a file is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(["fastmae", *parts] if parts[0] in BESIDE else parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in FILES}


def modules_in(path: Path) -> set[str]:
    """The files of fastmae, by their modules' names, that a file imports: at its top, in functions, or for types."""
    names = {name for name in imports_of(path) if not name.startswith("fastmae._C")}  # no file of Python
    return {name if name in MODULES else name.rpartition(".")[0] for name in names}


def part_of(path: Path) -> str:
    relative = path.relative_to(ROOT)
    return relative.parts[0] if relative.parts[0] in BESIDE else relative.parts[1].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_run_one_way(path):
    part = part_of(path)
    for name in imports_of(path):
        target = name.split(".")[1]
        assert target == part or target in ALLOWED[part], f"{path} imports {name}"


# From the bottom to the top. Parts of one line do not know each other.
LEVELS = (
    {"errors", "facts", "files", "philox", "screen", "signals", "torch_compat", "environment", "flags", "_C"},
    {"messages", "faults", "launch"},
    {"config", "kernels"},
    {"argv", "ops", "report"},
    {"data", "sweep"},
    {"model"},
    {"checkpoint", "estimate"},
    {"evaluate"},
    {"export", "serve", "train"},
    {"benchmarks", "api"},
    {"commands", "__init__"},
    {"cli"},
    {"__main__"},
)


def test_the_arrows_that_are_allowed_lead_downward():
    level = {part: number for number, parts in enumerate(LEVELS) for part in parts}
    assert level.keys() == ALLOWED.keys()
    for part, targets in ALLOWED.items():
        assert all(level[target] < level[part] for target in targets - {part}), part


def test_no_files_import_each_other_in_a_circle():
    graph = {name: modules_in(path) - {name} for name, path in MODULES.items()}
    assert sum(map(len, graph.values())) > 300  # the arrows were found at all
    for name, targets in graph.items():
        assert targets <= MODULES.keys(), f"{name} imports {targets - MODULES.keys()}, which is not there"
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_public_names_are_not_for_the_inside(path):
    """``from fastmae import pretrain`` in a file of fastmae would close a circle through ``fastmae/__init__.py``."""
    assert "fastmae" not in modules_in(path), f"{path}: import from the file that defines the name"


# Parts of training do not know each other; each of these composes what stands before it, and the loops compose all.
COMPOSERS = ("run", "batches", "recovery", "pretrain", "finetune")
# Each has a task of the loop in finetune.py.
TASKS = {"classify", "segment", "upscale"}


def test_the_parts_of_training_do_not_know_each_other():
    paths = {path.stem: path for path in (ROOT / "fastmae" / "train").glob("*.py")}
    parts = set(paths) - set(COMPOSERS) - TASKS - {"__init__"}
    basic = {"schedule", "settings", "precision", "step"}  # what a step computes, and when: others speak of it
    for name, path in paths.items():
        known = {name.split(".")[2] for name in imports_of(path) if name.startswith("fastmae.train.")}
        before = parts | set(COMPOSERS[: COMPOSERS.index(name)]) if name in COMPOSERS else basic
        if name in TASKS:
            before = parts | set(COMPOSERS) - {"pretrain"}
        if name == "finetune":
            before -= {"pretrain"}
        assert known - {name} <= before, f"{path} imports {sorted(known - {name} - before)}"


def test_importing_touches_no_device_and_starts_no_thread():
    code = (
        "import threading, fastmae; [getattr(fastmae, name) for name in fastmae.__all__]\n"
        "import torch; print(threading.active_count(), torch.cuda.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=True)
    assert done.stdout.split() == ["1", "False"]


@pytest.mark.parametrize(
    "words", ["", "--help", "--version", "help", "pretrain --epoch 3", "pretrain --epochs x", "no"]
)
def test_questions_and_wrong_words_load_no_torch(words):
    code = f"import sys, fastmae.cli; fastmae.cli.main({words.split()}); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr


def test_benchmarks_are_loaded_only_when_asked_for():
    code = "import sys, fastmae.cli; print([name for name in sys.modules if 'benchmarks' in name])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=True)
    assert done.stdout.split() == ["[]"]


def test_nothing_beside_the_package_is_imported_as_if_it_were_at_the_top():
    for path in ROOT.glob("**/*.py"):
        if ".venv" in path.parts or "build" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] in BESIDE for name in names), path


def test_every_package_is_installed():
    for path in FILES:  # setup.py finds packages by these files, and only these
        assert (path.parent / "__init__.py").exists(), f"{path.parent} would not be in a wheel"


@pytest.mark.parametrize("name", ["pretrain", "finetune"])
def test_each_training_loop_is_one_page(name):
    tree = ast.parse((ROOT / "fastmae" / "train" / f"{name}.py").read_text())
    (loop,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == f"_{name}"]
    assert loop.end_lineno - loop.lineno + 1 <= 80
