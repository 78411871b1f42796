"""Right command lines with words changed, lost, repeated and added: each ends in a status, and in a line if refused."""

import os
import random
import signal

import pytest
from helpers import small_run, soak

from fastmae.cli import COMMANDS, main
from fastmae.flags import flags_of
from fastmae.train.pretrain import pretrain

COUNT = soak(4, 80)
"""Command lines of each kind."""
LONGEST = 20
"""Seconds after which a command is told to stop, as by Ctrl-C."""
SHORT = ["--batch_size", "8", "--epochs", "1", "--warmup_epochs", "0", "--device", "cpu"]
RIGHT = {
    "pretrain": ["pretrain", "--data_path", "DATA", "--output_dir", "OUT", "--probe", "False", *SHORT],
    "resumed": ["pretrain", "--data_path", "DATA", "--output_dir", "RUN", "--resume", "auto", *SHORT],
    "from a file": ["pretrain", "--config", "RUN", "--output_dir", "OUT", "--resume", ""],
    "finetune": ["finetune", "--finetune", "RUN", "--data_path", "DATA", "--output_dir", "OUT", *SHORT],
    "probe": ["probe", "RUN", "--data_path", "DATA", "--device", "cpu"],
    "reconstruct": ["reconstruct", "RUN", "--data_path", "DATA", "--output", "OUT.png", "--device", "cpu"],
    "features": ["features", "RUN", "DATA", "--output", "OUT.npz", "--device", "cpu"],
    "search": ["search", "RUN", "DATA", "--data_path", "DATA", "--device", "cpu"],
    "anomaly": ["anomaly", "RUN", "--data_path", "DATA", "--test_path", "DATA", "--device", "cpu"],
    "export": ["export", "RUN", "--to", "timm", "--output", "OUT.safetensors"],
    "verify": ["verify", "--data_path", "DATA"],
    "info": ["info", "--json"],
    "estimate": ["estimate", "--gpu", "h100", "--images", "1e6", "--epochs", "300"],
}
VALUES = [
    "", " ", "-1", "0", "1", "0.5", "3", "65537", "2147483647", "9007199254740993", "-9223372036854775809", "1e400",
    "nan", "-inf", "1e-400", "None", "True", "False", "auto", "a word", "[old]", "[/]", "\x1b[31mred", "é", "\udce9",
    "x" * 5000, "-", "--", "=", "--=", "*", "nothing/here", "/dev/null", "/dev/full", "/proc/self/mem", "{", "{}", "%s",
    "1 2", "1,2", "0x10", "١", "DATA", "RUN", "OUT",
]  # fmt: skip
# Flags that make right commands take long: code that is compiled, other packages, large models, many threads.
SLOW = ("compile", "float8", "model", "num_workers", "profile", "log_with", "lora_rank", "parallel", "dist_url")


@pytest.fixture(scope="module")
def finished(blobs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert pretrain(small_run(blobs, folder, epochs=1)) == 0
    return folder


def changed(words, dice):
    """The words of a command with one to three of them changed, lost, repeated or added."""
    words = list(words)
    flags = [flag for flag in flags_of(COMMANDS[words[0]]) if flag.name not in SLOW]
    for _ in range(dice.randint(1, 3)):
        place = dice.randrange(1, len(words) + 1)
        kind = dice.randrange(6)
        if kind == 0 and len(words) > 1:
            del words[dice.randrange(1, len(words))]
        elif kind == 1 and len(words) > 1:
            words[dice.randrange(1, len(words))] = dice.choice(VALUES)
        elif kind == 2:
            words[place:place] = words[1 : dice.randrange(1, len(words) + 1)]
        elif kind == 3:
            words.insert(place, dice.choice([*VALUES, f"--{dice.choice(flags).name}"]))
        else:
            flag = dice.choice(flags)
            value = dice.choice([*flag.choices, *VALUES])
            words += [f"--{flag.name}={value}"] if kind == 4 else [f"--{flag.name}", value]
    return words


@pytest.mark.parametrize("kind", RIGHT)
def test_a_command_at_random_ends_in_a_status_and_in_a_line_where_it_is_refused(
    kind, blobs, finished, tmp_path, monkeypatch, capfd, record_property
):
    monkeypatch.chdir(tmp_path)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    refused = 0
    for number in range(COUNT):
        dice = random.Random(f"{kind} {number}")
        real = {"DATA": blobs, "RUN": str(finished), "OUT": f"out-{number}"}
        words = changed(RIGHT[kind], dice)
        words = [next((word.replace(name, real[name]) for name in real if name in word), word) for word in words]
        signal.alarm(LONGEST)
        try:
            status = main(words)
        except BaseException as error:
            error.add_note(f"command {number}: {words}")
            raise
        finally:
            signal.alarm(0)
        said = capfd.readouterr().err
        assert status in (0, 1, 2, 75, 130), f"command {number}: {words} ended with {status}"
        assert "fault of fastmae" not in said, f"command {number}: {words} said {said}"
        assert "Traceback" not in said, f"command {number}: {words} said {said}"
        if status == 2:
            refused += 1
            last = said.splitlines()[-1]
            assert last.startswith("fastmae: "), f"command {number}: {words} said {said}"
            assert last.isprintable(), f"command {number}: {words} said {said!r}"
    record_property("command lines at random", COUNT)
    record_property("of them refused", refused)
