"""The last resort: whatever reaches the command line is one line, an exit status, and a file with what is known."""

import errno
import json
import resource
import threading
from types import SimpleNamespace

import pytest

from fastmae.cli import main
from fastmae.commands import info as info_command
from fastmae.environment import malformed_variables
from fastmae.errors import UserError
from fastmae.faults import require_address_space, shortage
from fastmae.train import pretrain as pretraining


@pytest.fixture
def fail(monkeypatch, tmp_path, capsys):
    """Runs a command that fails with an error; returns its status, and what it shows on stderr."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def fail_with(error, words=("info",)):
        def raises(config):
            raise error

        monkeypatch.setattr(info_command, "run_info", raises)
        monkeypatch.setattr(pretraining, "pretrain", raises)
        status = main(list(words))
        return status, capsys.readouterr().err

    return fail_with


def recursion() -> RecursionError:
    def deeper(number):
        return deeper(number + 1) + 1

    with pytest.raises(RecursionError) as raised:
        deeper(0)
    return raised.value


FAULTS = [
    AttributeError("'NoneType' object has no attribute 'shape'"),
    ValueError("two\nlines \x1b[31mred\udcff"),
    UnicodeEncodeError("ascii", "é", 0, 1, "ordinal not in range"),
    SystemExit("a library wanted to end"),
    OSError("no number and no file"),
    recursion(),
    AssertionError(),
]


@pytest.mark.parametrize("error", FAULTS, ids=lambda error: type(error).__name__)
def test_an_error_that_nobody_expected_is_a_line_and_a_file_with_the_traceback(fail, tmp_path, error):
    status, err = fail(error)
    assert status == 1
    assert err.count("\n") == 1
    assert err.startswith(f"fastmae: {type(error).__name__}")
    assert "this is a fault of fastmae: please report it with" in err
    assert "\x1b" not in err
    (path,) = tmp_path.rglob("traceback-0-0.txt")
    assert str(path) in err
    text = path.read_text()
    for part in ("command     fastmae info\n", "in raises", "torch ", "python "):
        assert part in text


def test_the_file_lies_in_the_run_folder_and_none_takes_the_place_of_another(fail, tmp_path):
    words = ["pretrain", "--output_dir", str(tmp_path)]
    for _ in range(2):
        assert fail(KeyError("x"), words)[0] == 1
    assert {path.name for path in tmp_path.iterdir()} == {"traceback-0-0.txt", "traceback-0-1.txt"}


def test_without_a_place_for_the_file_the_traceback_is_shown(fail, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    status, err = fail(KeyError("x"))
    assert status == 1
    assert "in raises" in err
    assert "please report it with the traceback above" in err


def test_other_ends_keep_their_statuses_and_write_no_file(fail, tmp_path):
    assert fail(KeyboardInterrupt()) == (130, "")
    assert fail(UserError("mend it")) == (2, "fastmae: mend it\n")
    status, err = fail(OSError(errno.EACCES, "Permission denied", "file"))
    assert (status, err.count("\n")) == (2, 1)
    assert "mend the permissions" in err
    assert not list(tmp_path.iterdir())


def test_developers_see_tracebacks(fail, monkeypatch):
    monkeypatch.setenv("FASTMAE_TRACEBACK", "1")
    for error in (UserError("mend it"), KeyError("x")):
        assert "in raises" in fail(error)[1]


def test_torchrun_gets_the_reason(fail, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    _, err = fail(KeyError("the reason"))
    assert err.startswith("fastmae: rank 3: KeyError: 'the reason'; ")
    assert "the reason" in json.loads((tmp_path / "error.json").read_text())["message"]["message"]


def test_a_thread_that_dies_is_a_line_and_a_file(monkeypatch, tmp_path, capsys):
    def in_a_thread(config):
        thread = threading.Thread(target=lambda: {}["x"], name="writer")
        thread.start()
        thread.join()
        return 0

    monkeypatch.setattr(info_command, "run_info", in_a_thread)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert main(["info"]) == 0
    err = capsys.readouterr().err
    (path,) = tmp_path.rglob("traceback-0-0.txt")
    assert err == f"fastmae: the thread writer ended by KeyError: 'x'; the traceback is in {path}\n"


SHORTAGES = [
    (MemoryError(), "memory ran out (MemoryError); lower --batch_size"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"), "lower --batch_size"),
    (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), "lower --batch_size"),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), "memory ran out"),
    (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "raise the limit"),
    (RuntimeError("can't start new thread"), "`ulimit -u`"),
    (OSError(errno.EMFILE, "Too many open files", "a.jpg"), "`ulimit -n`"),
    (RuntimeError("unable to open shared memory object </torch_1>"), "enlarge /dev/shm"),
]


@pytest.mark.parametrize(("error", "words"), SHORTAGES, ids=lambda given: type(given).__name__)
def test_a_machine_that_lacks_something_is_no_fault_and_the_line_names_the_remedy(fail, error, words):
    status, err = fail(error, ["pretrain"])
    assert (status, err.count("\n")) == (1, 1)
    assert words in err
    assert "fault of fastmae" not in err


def test_a_folder_that_was_deleted_is_a_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert main(["info"]) == 2
    assert capsys.readouterr().err == (
        "fastmae: the current folder is not there any more; change into another one (cd)\n"
    )


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("OMP_NUM_THREADS", "abc", "is no number of threads"),
        ("OMP_NUM_THREADS", "-2", "is no number of threads"),
        ("OMP_NUM_THREADS", "4", ""),
        ("OMP_NUM_THREADS", "4,2", ""),
        ("CUDA_VISIBLE_DEVICES", "zz", "names no GPUs"),
        ("CUDA_VISIBLE_DEVICES", "0;1", "names no GPUs"),
        ("CUDA_VISIBLE_DEVICES", "0,1", ""),
        ("CUDA_VISIBLE_DEVICES", "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6,MIG-GPU-89/1/0", ""),
        ("CUDA_VISIBLE_DEVICES", "", ""),
        ("CUDA_VISIBLE_DEVICES", "-1", ""),
    ],
)
def test_a_variable_that_libraries_cannot_read_is_a_line(monkeypatch, name, value, words):
    for other in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, value)
    lines = malformed_variables()
    assert len(lines) == bool(words)
    assert all(line.startswith(f"{name}={value}: {words}") for line in lines)


def test_only_settings_that_the_command_has_are_to_be_lowered():
    line = shortage(MemoryError("no room"), SimpleNamespace(batch_size=8, cache="none"))
    assert line == "memory ran out (MemoryError: no room); lower --batch_size (raise --accum_iter instead)"
    assert "--cache_gb" in (shortage(MemoryError(), SimpleNamespace(cache="ram")) or "")
    assert shortage(ValueError("memory is not the matter")) is None


def test_a_limit_in_which_nothing_can_be_loaded_is_refused_before_it_is_tried(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (900 << 20, 900 << 20))
    with pytest.raises(MemoryError, match=r"`ulimit -v` is 0\.9 GB"):
        require_address_space()
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY,) * 2)
    require_address_space()
