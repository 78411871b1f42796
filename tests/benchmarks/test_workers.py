"""Functions in processes of their own: what they answer, how they end, and what of it is seen."""

import multiprocessing
import os

import pytest

from fastmae.benchmarks.harness import GoneError, in_own_process

# What the process gives first, and how it answers: it evaluates what it is asked.
ALIVE = "__import__('os').getpid(), eval"


def test_answers_come_from_another_process_which_ends_with_the_block():
    before = set(multiprocessing.active_children())
    with in_own_process(eval, ALIVE) as (one, ask_one), in_own_process(eval, ALIVE) as (other, ask_other):
        assert len({os.getpid(), one, other}) == 3
        ask_one("globals().update(kept=1)")
        assert ask_one("kept + 1") == 2
        assert ask_other("'kept' in globals()") is False
    assert set(multiprocessing.active_children()) == before


def test_processes_end_when_the_block_fails():
    before = set(multiprocessing.active_children())
    with pytest.raises(KeyboardInterrupt), in_own_process(eval, ALIVE):
        raise KeyboardInterrupt
    assert set(multiprocessing.active_children()) == before


@pytest.mark.parametrize(
    ("dying", "expected"),
    [
        ("__import__('os').kill(__import__('os').getpid(), 9)", "killed by SIGKILL, as the system does where memory"),
        ("__import__('os').abort()", "killed by SIGABRT$"),
        ("__import__('os')._exit(3)", "exit status 3: it said nothing"),
        ("1 / 0", "exit status 1: ZeroDivisionError: division by zero"),
        ("__import__('torch').empty(1 << 50)", "^.*can't allocate memory"),
        ("__import__('no_such_package')", "^No module named 'no_such_package'$"),
    ],
)
def test_how_a_process_ended_is_said_in_one_line(dying, expected, capfd):
    with in_own_process(eval, ALIVE) as (_, ask):
        assert ask("1 + 1") == 2
        with pytest.raises(GoneError, match=expected) as caught:
            ask(dying)
        assert "\n" not in str(caught.value)
    assert ("Traceback" in capfd.readouterr().err) == ("1 / 0" in dying)


def test_a_process_that_cannot_begin_says_why():
    with (
        pytest.raises(GoneError, match="No module named 'no_such_package'"),
        in_own_process(__import__, "no_such_package"),
    ):
        pytest.fail("it has not begun")


def test_notices_of_libraries_are_kept_from_the_screen(capfd):
    with in_own_process(eval, ALIVE) as (_, ask):
        assert ask("__import__('os').write(2, b'a notice')") == 8
        ask("print('a warning', file=__import__('sys').stderr)")
    assert capfd.readouterr().err == ""
