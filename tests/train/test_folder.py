"""A run folder belongs to one run; nothing in it is lost, overwritten or believed when it is damaged."""

import errno
import fcntl
import json
import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import RUN, assert_same_run, command, metrics, small_run, step_log
from ranks import run_ranks, start_ranks
from safetensors.torch import load_file

from fastmae.api import Run
from fastmae.checkpoint import save as saving
from fastmae.checkpoint.load import load_model
from fastmae.checkpoint.save import checkpoint_size, save_checkpoint, training_tensors
from fastmae.cli import main
from fastmae.data.quarantine import Quarantine
from fastmae.errors import UserError
from fastmae.files import read_rows
from fastmae.model.mae import MaskedAutoencoderViT
from fastmae.train import folder as folders
from fastmae.train import lock as locks
from fastmae.train.folder import look_back, set_aside_official, take_up_probes
from fastmae.train.lock import owned
from fastmae.train.pretrain import pretrain
from fastmae.train.recovery import read_rollbacks
from fastmae.train.schedule import Steps

SHORT = dict(epochs=2, checkpoint_freq=4, save_freq=1)


@pytest.fixture(scope="module")
def finished(blobs, tmp_path_factory) -> Path:
    """18 steps, with checkpoints after 16 and 18, and official files of both epochs."""
    run = tmp_path_factory.mktemp("finished") / "run"
    assert pretrain(small_run(blobs, run, **SHORT)) == 0
    return run


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def again(blobs, run) -> Callable[..., int]:
    """The command line of the run once more, with changes; returns the exit status."""

    def train(**changes: object) -> int:
        settings = {**RUN, **SHORT, "data_path": blobs, "output_dir": str(run), "resume": "auto", **changes}
        return main(["pretrain", *(word for name, value in settings.items() for word in (f"--{name}", str(value)))])

    return train


def everything(folder: Path) -> dict[str, bytes]:
    """The content of every file below a folder, by its path there."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- whose it is ------------------------------------------------------------------------------------------------------


def test_a_second_process_is_refused_in_one_line_that_names_the_first(run, again, capsys, monkeypatch):
    monkeypatch.setattr(locks, "PATIENCE", 0)
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    before = everything(run)
    with owned(run):
        assert again(epochs=3) == 2
    (line,) = capsys.readouterr().err.splitlines()
    holder = f"process {os.getpid()} on {os.uname().nodename}"
    assert line.startswith(f"fastmae: --output_dir {run}: is in use by {holder}, ")
    assert "job 4711 of SLURM, since 20" in line
    assert line.endswith("wait for it, end it, or name another folder")
    assert everything(run) == {**before, "run.lock": b""}
    assert again(epochs=3) == 0


def test_readers_take_no_lock(run):
    with owned(run):
        assert isinstance(load_model(run), MaskedAutoencoderViT)


def test_a_forked_child_that_lives_on_does_not_hold_the_folder(run, monkeypatch):
    monkeypatch.setattr(locks, "PATIENCE", 0)
    wake, told = os.pipe(), os.pipe()
    with owned(run):
        child = os.fork()
        if child == 0:
            os.write(told[1], b"x")
            os.read(wake[0], 1)
            os._exit(0)
        os.read(told[0], 1)
        with pytest.raises(UserError, match="is in use"), owned(run):
            raise AssertionError
    try:
        with owned(run):
            pass
    finally:
        os.write(wake[1], b"x")
        os.waitpid(child, 0)


def test_a_lock_on_a_file_that_was_removed_keeps_somebody_out_all_the_same(run, monkeypatch):
    monkeypatch.setattr(locks, "PATIENCE", 0)
    take, removed = fcntl.flock, []

    def removed_meanwhile(descriptor: int, operation: int) -> None:
        take(descriptor, operation)
        if not removed:
            removed.append((run / "run.lock").unlink())

    monkeypatch.setattr(fcntl, "flock", removed_meanwhile)
    with owned(run):
        assert json.loads((run / "run.lock").read_text())["pid"] == os.getpid()
        with pytest.raises(UserError, match="is in use"), owned(run):
            raise AssertionError


def test_a_lock_of_another_machine_that_was_not_given_back_is_told(run, capsys):
    holder = {"host": "node7", "pid": 12, "job": None, "since": "2026-11-30 10:12:05 UTC"}
    (run / "run.lock").write_text(json.dumps(holder))
    with owned(run):
        (line,) = capsys.readouterr().err.splitlines()
    assert "process 12 on node7, since 2026-11-30 10:12:05 UTC has not ended as it should" in line
    (run / "run.lock").write_text(json.dumps({**holder, "host": os.uname().nodename}))
    with owned(run):
        assert capsys.readouterr().err == "", "the kernel knows of the processes of this machine"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_told_and_used(run, monkeypatch, capsys, number):
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with owned(run):
        (line,) = capsys.readouterr().err.splitlines()
    assert f"{run}: the file system has no locks" in line


@pytest.mark.slow
def test_two_ranks_are_refused_together_while_another_process_trains_and_train_once_it_was_killed(run, blobs):
    """The other process is stopped in the middle of a step, as a job is that its launcher has forgotten."""
    longer = partial(small_run, blobs, run, epochs=30, checkpoint_freq=9, save_freq=30, resume="auto")
    (first,) = start_ranks(1, longer())
    while "step ends" not in first.journal():
        assert first.process.is_alive(), first.finish()
        first.process.join(0.01)
    os.kill(first.process.pid, signal.SIGSTOP)
    ended = [rank.finish() for rank in start_ranks(2, partial(main, [*command(blobs, run, resume="auto")[3:]]))]
    assert [status for status, _ in ended] == [2, 2], ended
    (line,) = [line for _, err in ended for line in err.splitlines()]  # one rank says it for all
    assert f"is in use by process {first.process.pid} on " in line
    first.process.kill()
    assert first.finish()[0] == -signal.SIGKILL
    run_ranks(2, longer(batch_size=4, epochs=4))
    assert [row[0] for row in metrics(run)] == list(range(1, 37))


def test_a_command_that_is_refused_before_it_writes_leaves_no_folder(tmp_path, blobs, refusal):
    words = ["--data_path", blobs, "--output_dir", str(tmp_path / "new" / "run"), "--batch_size", "1000"]
    refusal(["pretrain", *words])
    assert list(tmp_path.iterdir()) == []


# --- what an earlier run left -----------------------------------------------------------------------------------------


def test_history_without_a_checkpoint_is_refused_with_all_ways_out(run, again, capsys):
    shutil.rmtree(run / "checkpoints")
    before = everything(run)
    assert again(seed=5) == 2
    (line,) = capsys.readouterr().err.splitlines()
    for words in ("saved.json", "checkpoint-1.pth and 3 more", "steps 1 to 18 in metrics.jsonl", f"{run}/checkpoints,"):
        assert words in line
    for way in (f"--resume {run}/checkpoint-1.pth", "--resume anew", "--output_dir"):
        assert way in line
    assert everything(run) == {**before, "run.lock": b""}


@pytest.mark.parametrize(
    ("left", "named"),
    [
        ("saved.json", "saved.json tells"),
        ("checkpoint-0.pth", "checkpoint-0.pth"),
        ("metrics.jsonl", "steps 1 to 18 in"),
        ("log.txt", "epoch 1 in log.txt"),
        ("probe.json", "accuracies after training in probe.json"),
    ],
)
def test_each_trace_of_a_checkpoint_is_history_by_itself(run, again, capsys, left, named):
    probes = {"before": {"knn": 1.0, "linear": 2.0}, "after": {"knn": 1.0, "linear": 2.0}}
    (run / "probe.json").write_text(json.dumps(probes))
    for path in list(run.iterdir()):
        if path.name != left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert again() == 2
    assert named in capsys.readouterr().err


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again_and_keeps_its_lines(
    run, again, finished, capsys
):
    for path in list(run.iterdir()):
        if path.name.startswith("checkpoint") or path.name == "saved.json":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    lines = (finished / "metrics.jsonl").read_bytes().splitlines(keepends=True)[:6]
    (run / "metrics.jsonl").write_bytes(b"".join(lines) + b'{"step": 7, "epo')
    (run / "log.txt").unlink()
    assert again() == 0
    said = capsys.readouterr().out
    assert (
        "set aside       6 lines after step 0 and 1 damaged line of metrics.jsonl, in superseded-metrics.jsonl" in said
    )
    assert (run / "superseded-metrics.jsonl").read_bytes() == b"".join(lines) + b'{"step": 7, "epo\n'
    assert_same_run(run, finished)


@pytest.mark.parametrize(("between", "begins"), [(9, True), (4, False)])
def test_an_official_file_tells_of_a_checkpoint_where_two_were_due_before_it(tmp_path, capsys, between, begins):
    """A run of epochs of 9 steps; the first checkpoint may still have been written while the second was due."""
    (tmp_path / "checkpoint-0.pth").write_text("of epoch 0")
    if begins:
        assert look_back(tmp_path, "auto", Steps(9, 27, between), 0, takes_files=True) == "auto"
        assert (tmp_path / "superseded-checkpoint-0.pth").read_text() == "of epoch 0"
        assert "kept from the run that begins again, under this name" in capsys.readouterr().err
    else:
        with pytest.raises(UserError, match=r"holds a run \(checkpoint-0.pth\), but no checkpoint to go on from"):
            look_back(tmp_path, "auto", Steps(9, 27, between), 0, takes_files=True)


def test_official_files_of_a_rolled_back_run_of_0_1_are_kept_where_it_begins_again(run, again, finished, capsys):
    """0.1 had no saved.json, and a run that it rolled back to step 0 has official files without a checkpoint."""
    shutil.rmtree(run / "checkpoints")
    for name in ("saved.json", "metrics.jsonl", "log.txt"):
        (run / name).unlink()
    (run / "rollbacks.json").write_text("[]")
    assert again() == 0
    assert f"{run}/superseded-checkpoint-0.pth: kept from the run that begins again" in capsys.readouterr().err
    assert (run / "superseded-checkpoint-0.pth").read_bytes() == (finished / "checkpoint-0.pth").read_bytes()


def test_a_log_that_begins_later_than_the_run_would_is_of_another_beginning(run, again, capsys):
    for path in list(run.iterdir()):
        if path.name != "metrics.jsonl":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(lines[5])
    assert again() == 2
    assert "steps 6 to 6 in metrics.jsonl" in capsys.readouterr().err


def test_without_resume_a_folder_with_anything_of_a_run_is_refused_and_nothing_is_changed(run, again, capsys):
    (run / "mine.txt").write_text("mine")
    for name in sorted(os.listdir(run)):
        if name in ("checkpoints", "metrics.jsonl", "log.txt", "checkpoint-1.safetensors", "saved.json"):
            only = run.with_name(f"only {name}")
            only.mkdir()
            (run / name).rename(only / name)
            before = everything(only)
            assert again(resume="", output_dir=str(only)) == 2
            assert f"holds a run already ({name}); continue it with --resume auto, begin anew with" in (
                capsys.readouterr().err
            )
            assert everything(only) == {**before, "run.lock": b""}


def test_anew_moves_all_of_the_run_and_nothing_else_into_a_folder_with_a_number(run, again, finished, capsys):
    (run / "mine.txt").write_text("mine")
    (run / "checkpoint-best.pth").write_text("mine")
    (run / "earlier-1").mkdir()
    earlier = everything(finished)
    assert again(resume="anew") == 0
    assert f"what the earlier run left is in {run}/earlier-2 (" in capsys.readouterr().err
    assert everything(run / "earlier-2") == {name: data for name, data in earlier.items() if name != "run.lock"}
    assert (run / "mine.txt").read_text() == (run / "checkpoint-best.pth").read_text() == "mine"
    assert_same_run(run, finished)


@pytest.mark.parametrize("variable", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_anew_begins_anew_once_and_goes_on_when_the_command_is_repeated_for_it(run, monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    before = everything(run)
    assert look_back(run, "anew", Steps(9, 27, 4), 0, takes_files=True) == "auto"
    monkeypatch.setenv(variable, "0")
    assert everything(run) == before
    assert look_back(run, "anew", Steps(9, 27, 4), 0, takes_files=True) == ""
    assert sorted(os.listdir(run)) == ["earlier-1", "run.lock"]


def test_names_that_are_only_alike_are_not_of_a_run(tmp_path):
    names = (
        "checkpoint-best.pth", "checkpoint-01.pth", "checkpoint-1.pth.bak", "checkpoint-٣.pth", "checkpoint--1.pth",
        "metrics.jsonl.old", "my-log.txt", "log.txt~", "quarantine-x.jsonl", "hang-.txt", "superseded-mine.txt",
        f"checkpoint-{'9' * 200}x.pth", "Saved.json", "earlier-mine",
    )  # fmt: skip
    for name in names:
        (tmp_path / name).write_text("mine")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-100").mkdir()
    for resume in ("", "auto"):
        assert look_back(tmp_path, resume, Steps(9, 27, 4), 0, takes_files=True) == resume
    assert set_aside_official(tmp_path, 0) == []
    assert {path.name for path in tmp_path.iterdir()} == {*names, "checkpoints"}


def test_going_back_on_purpose_keeps_lines_and_official_files_of_the_later_course(run, again, finished, capsys):
    older = run / "checkpoints" / "step-00000016"
    epochs = {name: (run / name).read_bytes() for name in ("checkpoint-1.pth", "checkpoint-1.safetensors")}
    assert again(resume=str(older), weight_decay=0.5) == 0
    said = capsys.readouterr().out
    assert "set aside       2 lines after step 16 of metrics.jsonl, in superseded-metrics.jsonl" in said
    assert "set aside       1 line after epoch 0 of log.txt, in superseded-log.txt" in said
    for name, content in epochs.items():
        assert (run / f"superseded-{name}").read_bytes() == content
        assert f"{run}/superseded-{name}" in said
    rows = (finished / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    assert (run / "superseded-metrics.jsonl").read_bytes() == b"".join(rows[16:])
    assert [row[0] for row in metrics(run)] == list(range(1, 19))


# --- the end ----------------------------------------------------------------------------------------------------------


def test_a_run_that_is_complete_resumes_to_one_line_and_writes_an_official_file_that_had_no_room(
    run, again, finished, capsys
):
    for path in (*run.glob("checkpoint-1.*"), run / "reconstructions" / "epoch-0001.png"):
        path.unlink()
    assert again() == 0
    said = capsys.readouterr().out
    newest = run / "checkpoints" / "step-00000018"
    assert f"complete        2 epochs are done ({newest}); raise --epochs to train on" in said
    assert said.splitlines()[-1] == f"checkpoint      {run}/checkpoint-1.pth"
    name = "checkpoint-1.safetensors"
    assert load_file(run / name).keys() == load_file(finished / name).keys()
    assert all(map(torch.equal, load_file(run / name).values(), load_file(finished / name).values()))
    assert (run / "reconstructions" / "epoch-0001.png").exists()
    assert_same_run(run, finished)


def test_a_run_that_is_complete_with_fewer_epochs_names_only_what_is_there(run, again, capsys):
    for path in run.glob("checkpoint-0.*"):
        path.unlink()
    shutil.rmtree(run / "reconstructions")
    assert again(epochs=1) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == f"checkpoint      {run}/checkpoints/step-00000018"
    assert "reconstruction" not in said


@pytest.mark.parametrize("name", ["checkpoint-1.pth", "checkpoints/step-00000018"])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_file_at_the_end_of_the_run_is_refused(run, again, capsys, tmp_path, name, elsewhere):
    folder = tmp_path / "elsewhere" if elsewhere else run
    assert again(resume=str(run / name), output_dir=str(folder)) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"--resume {run / name}: begins after step 18, and --epochs 2 are 18 steps; raise --epochs" in line
    assert not elsewhere or not folder.exists()


# --- damage -----------------------------------------------------------------------------------------------------------

FILES = (
    "config.json", "config.yaml", "environment.jsonl", "metrics.jsonl", "log.txt", "probe.json", "rollbacks.json",
    "quarantine.jsonl", "saved.json", "run.lock", "superseded-metrics.jsonl", "hang-0.txt",
    "checkpoint-1.pth", "checkpoint-1.safetensors", "checkpoints", "reconstructions", "profile",
)  # fmt: skip
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) * 2 // 3],
    "flipped": lambda data: bytes(byte ^ 0x55 for byte in data[:40]) + data[40:],
    "zeros": lambda data: data[:10] + bytes(200) + data[10:],
    "no UTF-8": lambda data: b"\xff\xfe\x80" + data,
    "another type": lambda data: b'"a text"\n',
    "wrong values": lambda data: b'{"step": "x", "epoch": [], "index": null, "before": 3, "after": {}, "epochs": 5}\n',
    "numbers beyond all bounds": lambda data: b'{"step": 1' + b"0" * 5000 + b', "epoch": 1e999}\n',
    "deep": lambda data: b"[" * 100_000,
}


def furnish(run: Path) -> None:
    """Adds the files that a run may have, and takes its last checkpoint."""
    probe = {"knn": 50.0, "linear": 60.0}
    (run / "probe.json").write_text(json.dumps({"before": probe, "epochs": {"1": probe}}))
    (run / "rollbacks.json").write_text("[]")
    (run / "quarantine.jsonl").write_text('{"index": 3, "name": "x", "reason": "y"}\n')
    (run / "superseded-metrics.jsonl").write_text('{"step": 1}\n')
    (run / "hang-0.txt").write_text("stacks")
    (run / "profile").mkdir()
    shutil.rmtree(run / "checkpoints" / "step-00000018")


def damage(path: Path, kind: str) -> None:
    is_folder = path.is_dir()
    data = b"" if is_folder else path.read_bytes()
    shutil.rmtree(path) if is_folder else path.unlink()
    if kind == "a folder":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a file":
        path.write_text("")
    else:
        path.write_bytes(DAMAGES[kind](data))


def kinds_of(path: Path) -> list[str]:
    return ["a file"] if path.is_dir() else [*DAMAGES, "a folder", "a pipe"]


def assert_told(name: str, kind: str, refusal: UserError | None, told: str) -> None:
    what = f"{name}, {kind}: {refusal or told!r}"
    if refusal is not None:
        assert name in str(refusal), what
        assert "\n" not in str(refusal), what
    if kind in ("a folder", "a pipe", "a file"):
        assert refusal is not None, what
    elif name in ("quarantine.jsonl", "probe.json", "metrics.jsonl", "log.txt") and kind not in ("empty", "zeros"):
        assert refusal or name in told, what
    elif name == "rollbacks.json":
        assert refusal, what
    assert len(((refusal and str(refusal)) or told).splitlines()) <= 1, what


@pytest.fixture(scope="module")
def small(finished, tmp_path_factory) -> Path:
    """What a run leaves, without tensors."""
    run, heavy = tmp_path_factory.mktemp("small") / "run", ("*.safetensors", "*.pth", "*.png")
    shutil.copytree(finished, run, ignore=shutil.ignore_patterns(*heavy))
    for name in ("checkpoint-1.pth", "checkpoint-1.safetensors"):
        (run / name).write_text("not looked into")
    furnish(run)
    return run


@pytest.mark.parametrize("name", FILES)
def test_damage_to_a_file_of_a_run_is_one_line_or_tolerated_with_a_line_before_the_first_step(
    small, tmp_path, capsys, name
):
    """What an attempt reads of the run folder, in its order, up to the first step."""
    for kind in kinds_of(small / name):
        run, said, refusal = Path(shutil.copytree(small, tmp_path / kind)), [], None
        damage(run / name, kind)
        try:
            with owned(run):
                assert look_back(run, "auto", Steps(9, 27, 4), 0, takes_files=True) == "auto"
                take_up_probes(run, goes_on=True)
                assert read_rollbacks(run, 16, None) == []
                listed = len(Quarantine(run / "quarantine.jsonl"))
                step_log(run, said).resume(16, 1, None)
                rows, logged = read_rows(run / "metrics.jsonl"), read_rows(run / "log.txt")
        except UserError as error:
            refusal = error
        else:
            assert rows[1] == logged[1] == 0
            assert len(rows[0]) == 16 or name == "metrics.jsonl"
            assert len(logged[0]) == 1 or name == "log.txt"
            assert listed == 1 or name == "quarantine.jsonl"
        assert_told(name, kind, refusal, capsys.readouterr().err + "".join(line for line in said if name in line))


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_run_with_a_damaged_file_is_refused_or_goes_on_and_is_read_all_the_same(
    run, blobs, tmp_path, capsys, name, record_property
):
    furnish(run)
    model = load_model(run)
    record_property("damaged files of run folders", len(kinds_of(run / name)))
    for kind in kinds_of(run / name):
        copy, refusal = Path(shutil.copytree(run, tmp_path / kind)), None
        damage(copy / name, kind)
        try:
            assert pretrain(small_run(blobs, copy, **SHORT, resume="auto")) == 0
        except UserError as error:
            refusal = error
        captured = capsys.readouterr()
        assert_told(name, kind, refusal, captured.err + "".join(x for x in captured.out.splitlines() if name in x))
        if name != "checkpoints":
            assert len(list(load_model(copy).parameters())) == len(list(model.parameters()))


def test_a_torn_line_is_ended_before_the_next_is_added_in_every_log(run, again):
    """A kill cuts a line anywhere; what is written after it must be whole, and what was before it, too."""
    for name in ("environment.jsonl", "events.jsonl", "metrics.jsonl", "log.txt", "quarantine.jsonl"):
        with open(run / name, "a") as file:
            file.write('{"index": 5, "step": 19, "epo')
    assert again(epochs=3) == 0
    assert [row[0] for row in metrics(run)] == list(range(1, 28))
    assert [json.loads(line)["epoch"] for line in (run / "log.txt").read_text().splitlines()] == [0, 1, 2]
    starts = (run / "environment.jsonl").read_text().splitlines()
    assert [line.endswith("}") for line in starts] == [True, False, True]


def test_a_run_in_python_tells_of_its_steps_whatever_happened_to_the_log(run, finished, capsys):
    whole = Run(finished, 0, is_classifier=False).metrics
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b'\xff\n[3]\n{"step": 19, "ep')
    assert Run(run, 0, is_classifier=False).metrics == whole
    assert "metrics.jsonl: 3 of its lines are damaged and passed over" in capsys.readouterr().err


def test_accuracies_after_a_training_that_goes_on_are_not_those_after_it(tmp_path, capsys):
    probe = {"knn": 12.5, "linear": 23.5}
    (tmp_path / "probe.json").write_text(json.dumps({"before": probe, "after": probe}))
    take_up_probes(tmp_path, goes_on=False)
    assert json.loads((tmp_path / "probe.json").read_text()) == {"before": probe, "after": probe}
    take_up_probes(tmp_path, goes_on=True)
    assert json.loads((tmp_path / "superseded-probe.json").read_text()) == {"before": probe, "after": probe}
    assert json.loads((tmp_path / "probe.json").read_text()) == {"before": probe}
    assert "has the accuracies after a training that now goes on" in capsys.readouterr().err


# --- room, and saves that fail ----------------------------------------------------------------------------------------


def test_free_space_is_compared_with_the_size_of_a_checkpoint_before_the_first_step(
    run, again, tmp_path, monkeypatch, capsys
):
    model = load_model(run)
    optimizer = torch.optim.AdamW(model.parameters())
    written = save_checkpoint(tmp_path / "other", 1, training_tensors(model, optimizer), {})
    on_disk = sum(path.stat().st_size for path in written.glob("*.safetensors"))
    size = checkpoint_size(model, with_average=False)
    assert size == pytest.approx(on_disk, rel=0.05)

    def free(number: float) -> None:
        usage = SimpleNamespace(total=100 * size, free=int(number * size))
        monkeypatch.setattr(folders.shutil, "disk_usage", lambda path: usage)

    free(0.9)
    assert again(epochs=3) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "has no room: 0.0" in line
    assert line.endswith("free space, or name another")
    free(2.5)
    assert again(output_dir=str(tmp_path / "new")) == 0
    assert "3 should fit: free space, or saving will fail" in capsys.readouterr().err
    free(1.5)
    assert again(epochs=3) == 0
    assert capsys.readouterr().err == "", "two of the three are there already"
    free(0)
    assert again(epochs=3) == 0, "a complete run needs no room"


def test_a_run_that_cannot_save_ends_after_so_many_failures_in_a_row(run, again, monkeypatch, capsys):
    real, calls = saving.write_text, []

    def fails(path: Path, text: str) -> None:
        """The second and the fourth save succeed, and none after them."""
        if path.name == "manifest.json":
            calls.append(path)
            if len(calls) not in (2, 4):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        real(path, text)

    monkeypatch.setattr(saving, "write_text", fails)
    assert again(epochs=3, max_failed_saves=2, checkpoint_freq=1) == 1
    *told, last = capsys.readouterr().err.splitlines()
    assert len(told) == 3
    assert all(line.endswith("; the run goes on and tries again") for line in told)
    assert "2 saves in a row failed, so the run ends (--max_failed_saves); checkpoint " in last
    assert os.strerror(errno.ENOSPC) in last
    assert last.endswith("then continue with --resume auto")
    assert metrics(run)[-1][0] == 24, "the last save that may fail is waited for"
    monkeypatch.undo()
    assert again(epochs=3) == 0
    assert [row[0] for row in metrics(run)] == list(range(1, 28))
