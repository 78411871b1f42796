"""What goes wrong is skipped, gone back from, ended or reported; what is right is not touched by any of it."""

import io
import itertools
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from helpers import assert_same_run, command, metrics, run, small_run
from torch import nn

from fastmae.errors import UserError
from fastmae.messages import messages_on_stderr
from fastmae.signals import EXIT_INTERRUPTED
from fastmae.train.health import LossSpikes, Watchdog
from fastmae.train.parallel import restart_hazard
from fastmae.train.pretrain import pretrain
from fastmae.train.recovery import data_seed, find_not_finite, read_rollbacks, write_rollbacks
from fastmae.train.step import TrainingLoss

DISTURBED = Path(__file__).with_name("disturbed.py")


def disturbed(words: list[str], *what: str, max_restarts: int = 0) -> list[str]:
    """The command line ``words`` on two ranks under torchrun, disturbed as tests/train/disturbed.py says."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", f"--max-restarts={max_restarts}"]
    return [sys.executable, *launcher, str(DISTURBED), *what, "--", *words[3:]]


def rows(output_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


# --- hangs ------------------------------------------------------------------------------------------------------------


def test_ranks_go_back_together_from_a_loss_that_one_has_and_each_reports_its_stack_when_one_hangs(blobs, tmp_path):
    """Rank 1's losses 13 to 15 are bad: steps 13 and 14, and once more when the reason is looked for."""
    words = command(blobs, tmp_path / "run", batch_size=4, max_skipped=2, hang_timeout=6)
    ended = run(disturbed(words, "nan:1:13", "sleep:1:22"))
    assert "at step 13 nor at the 1 after it, first the loss, in the batch with" in ended.stderr
    assert "at step 13 nor at the 1 after it, from another rank's batch" in ended.stderr
    assert ended.stderr.count("going back to step 7") == 2
    # The last numbers that were read are those of the fifth step after going back.
    assert [row["step"] for row in rows(tmp_path / "run") if row["loss"] is not None] == list(range(1, 13))

    assert ended.returncode != 0
    for rank, where in ((1, "in sleep_for_ever"), (0, "in train_step")):
        report = (tmp_path / "run" / f"hang-{rank}.txt").read_text()
        for line in (f"rank {rank} finished no step for 6 s", "in _pretrain", where):
            assert line in report
            assert line in ended.stderr


def test_an_interpreter_that_is_stuck_is_ended_too(tmp_path):
    """``re`` holds the interpreter while it matches, so no thread of Python's can run."""
    code = (
        "import re\n"
        "from pathlib import Path\n"
        "from fastmae.train import health\n"
        "health.HANG_GRACE, health.LONGEST_STOP = 0.5, 0.0\n"
        "with health.Watchdog(1.0, Path('hang.txt'), 'rank 0'):\n"
        "    re.match('(a|aa)*b', 'a' * 80)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert ended.returncode == 1
    assert "Timeout" in ended.stderr
    assert "line 6 in <module>" in ended.stderr


def test_time_in_which_the_process_was_stopped_is_not_the_runs(tmp_path):
    """Stopped for 3 times the time-out, and once more after it was continued; then it hangs, and is ended."""
    code = (
        "import os, time\n"
        "from pathlib import Path\n"
        "from fastmae.train import health\n"
        "health.HANG_GRACE = 0.2\n"
        "with health.Watchdog(0.3, Path('hang.txt'), 'rank 0'):\n"
        "    for stop in range(2):\n"
        "        os.system(f'(sleep 1; kill -CONT {os.getpid()}) & kill -STOP {os.getpid()}')\n"
        "        print('continued', flush=True)\n"
        "    time.sleep(60)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert ended.stdout.split() == ["continued"] * 2
    assert ended.returncode == 1
    assert "rank 0 finished no step for 0.3 s" in (tmp_path / "hang.txt").read_text()
    assert "in <module>" in ended.stderr


def test_a_watchdog_ends_with_the_run_and_none_is_made_for_zero(tmp_path):
    """With 5 beats in its time no test run is ended, nor a second after the last."""
    for timeout in (0.5, 0.0, None):
        before = threading.active_count()
        with Watchdog(timeout, tmp_path / "hang.txt", "rank 0") as watchdog:
            assert threading.active_count() == before + bool(timeout)
            for _ in range(10 if timeout else 1):
                time.sleep(0.1)
                watchdog.beat()
        assert threading.active_count() == before
    time.sleep(1)
    assert not (tmp_path / "hang.txt").exists()


# --- restarts ---------------------------------------------------------------------------------------------------------


def test_torchrun_restarts_after_one_rank_was_killed_and_the_run_ends_as_if_undisturbed(blobs, tmp_path, monkeypatch):
    """Killed in the middle of step 12; the newest checkpoint is that of step 7."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # docs/large-runs.md says why
    assert pretrain(small_run(blobs, tmp_path / "undisturbed", epochs=2)) == 0
    words = command(blobs, tmp_path / "run", batch_size=4, epochs=2, resume="auto")
    ended = run(disturbed(words, "kill:1:12", max_restarts=1))
    assert ended.returncode == 0, ended.stderr
    assert "after step 7" in ended.stdout
    assert "restarts  " not in ended.stdout
    found, expected = metrics(tmp_path / "run"), metrics(tmp_path / "undisturbed")
    assert [row[:2] for row in found] == [row[:2] for row in expected]
    assert [row[2] for row in found] == pytest.approx([row[2] for row in expected], rel=1e-5)
    assert len((tmp_path / "run" / "environment.jsonl").read_text().splitlines()) == 2


def test_restarts_that_may_fail_are_announced(monkeypatch):
    for restarts, shared, hazardous in (("3", "True", True), ("3", "False", False), ("0", "True", False)):
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", shared)
        assert (restart_hazard() is not None) == hazardous


# --- losses that are not finite ---------------------------------------------------------------------------------------

SKIPPING = dict(keep=9, max_skipped=3)


@pytest.fixture(scope="module")
def undisturbed(blobs, tmp_path_factory) -> tuple[Path, list[bytes]]:
    """36 steps, with checkpoints after 7, 14, 21 …, and the masks of each step's batch, by which it is known again."""
    folder, masks = tmp_path_factory.mktemp("undisturbed") / "run", []

    def remember(self, images, ids_shuffle, real=TrainingLoss.forward):
        masks.append(ids_shuffle.numpy().tobytes())
        return real(self, images, ids_shuffle)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingLoss, "forward", remember)
        assert pretrain(small_run(blobs, folder, **SKIPPING)) == 0
    assert len(masks) == 36
    return folder, masks


def poison(monkeypatch: pytest.MonkeyPatch, bad: list[bytes], gradient_alone: bool = False) -> None:
    """Makes the loss, or its gradient alone, of the batches with these masks not a number, whenever they come."""

    def forward(self, images, ids_shuffle, real=TrainingLoss.forward):
        loss = real(self, images, ids_shuffle)
        if ids_shuffle.numpy().tobytes() not in bad:
            return loss
        return loss + (0 * self.model.cls_token.sum()).sqrt() if gradient_alone else loss * math.nan

    monkeypatch.setattr(TrainingLoss, "forward", forward)


@pytest.mark.parametrize("gradient_alone", [False, True])
def test_a_few_bad_steps_are_skipped_and_counted_and_change_nothing_before_them(
    blobs, tmp_path, undisturbed, monkeypatch, capsys, gradient_alone
):
    folder, masks = undisturbed
    poison(monkeypatch, [masks[10], masks[11]], gradient_alone)
    assert pretrain(small_run(blobs, tmp_path / "run", **SKIPPING)) == 0
    found, expected = rows(tmp_path / "run"), rows(folder)
    assert [row["step"] for row in found if row.get("skipped")] == [11, 12]
    assert [row["loss"] is None for row in found[9:13]] == [False, not gradient_alone, not gradient_alone, False]
    assert [row["grad_norm"] is None for row in found[9:13]] == [False, True, True, False]
    assert [row["loss"] for row in found[:10]] == [row["loss"] for row in expected[:10]]
    assert found[20]["loss"] != expected[20]["loss"]
    assert "2 of the last" in capsys.readouterr().out
    epoch = json.loads((tmp_path / "run" / "log.txt").read_text().splitlines()[1])
    assert epoch["train_loss"] == pytest.approx(statistics.mean(row["loss"] for row in [found[9], *found[12:18]]))
    assert not (tmp_path / "run" / "rollbacks.json").exists()


def test_a_signal_while_steps_are_skipped_leaves_the_checkpoint_before_them(
    blobs, tmp_path, undisturbed, monkeypatch, capsys
):
    poison(monkeypatch, undisturbed[1][10:12])
    with monkeypatch.context() as patch:

        def forward(self, images, ids_shuffle, real=TrainingLoss.forward):
            if ids_shuffle.numpy().tobytes() == undisturbed[1][11]:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(self, images, ids_shuffle)

        patch.setattr(TrainingLoss, "forward", forward)
        assert pretrain(small_run(blobs, tmp_path, **SKIPPING)) == EXIT_INTERRUPTED
    assert "after step 12, which was skipped, so an earlier one is saved" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000007"]
    assert pretrain(small_run(blobs, tmp_path, **SKIPPING, resume="auto")) == 0
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 37))
    assert [row["step"] for row in rows(tmp_path) if row.get("skipped")] == [11, 12]
    assert metrics(tmp_path)[:10] == metrics(undisturbed[0])[:10]


@pytest.fixture(scope="module")
def rolled_back(blobs, tmp_path_factory, undisturbed) -> tuple[Path, str]:
    """A run whose steps from 16 on failed, so that it went back to step 14; and what it printed."""
    output_dir, printed = tmp_path_factory.mktemp("rolled_back") / "run", io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        redirect_stdout(printed),
        redirect_stderr(printed),
        messages_on_stderr(),
    ):
        poison(patch, undisturbed[1][15:])
        assert pretrain(small_run(blobs, output_dir, **SKIPPING)) == 0
    return output_dir, printed.getvalue()


def test_after_too_many_in_a_row_the_run_goes_back_and_on_with_other_data(rolled_back, undisturbed):
    output_dir, printed = rolled_back
    found, expected = rows(output_dir), rows(undisturbed[0])
    assert [row["step"] for row in found] == list(range(1, 37))
    assert [row["loss"] for row in found[:14]] == [row["loss"] for row in expected[:14]]
    assert all(mine["loss"] != other["loss"] for mine, other in zip(found[14:], expected[14:], strict=True))
    assert not any("skipped" in row for row in found)
    assert json.loads((output_dir / "rollbacks.json").read_text()) == [14]
    assert "not finite at step 16 nor at the 2 after it, first the loss, in the batch with " in printed
    assert printed.count("x_train[") == 8
    assert "going back to step 14" in printed
    assert "other data      after step 14" in printed


def test_what_comes_after_going_back_is_resumed_exactly(blobs, tmp_path, rolled_back):
    """From the checkpoint that it went back to; from a later one; and from a later one in another folder."""
    output_dir, _ = rolled_back
    for newest in (14, 28):
        shutil.copytree(output_dir, tmp_path / f"from{newest}")
        for path in (tmp_path / f"from{newest}" / "checkpoints").iterdir():
            if int(path.name[-8:]) > newest:
                shutil.rmtree(path)
        assert pretrain(small_run(blobs, tmp_path / f"from{newest}", **SKIPPING, resume="auto")) == 0
        assert_same_run(tmp_path / f"from{newest}", output_dir)
    elsewhere = str(output_dir / "checkpoints" / "step-00000028")
    assert pretrain(small_run(blobs, tmp_path / "elsewhere", **SKIPPING, resume=elsewhere)) == 0
    assert metrics(tmp_path / "elsewhere") == metrics(output_dir)[28:]


def test_a_run_with_a_discriminator_goes_back_with_both_sides(blobs, tmp_path, undisturbed):
    """What it does from the checkpoint on is what a run does that is resumed there: weights and moments of both."""
    own = dict(adversarial=0.5, adversarial_start=1.0, adversarial_warmup=0.5)
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, undisturbed[1][15:])
        assert pretrain(small_run(blobs, tmp_path / "run", **SKIPPING, **own)) == 0
    assert json.loads((tmp_path / "run" / "rollbacks.json").read_text()) == [14]
    assert all("discriminator_loss" in row for row in rows(tmp_path / "run")[9:])
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    for path in (tmp_path / "again" / "checkpoints").iterdir():
        if int(path.name[-8:]) > 14:
            shutil.rmtree(path)
    assert pretrain(small_run(blobs, tmp_path / "again", **SKIPPING, **own, resume="auto")) == 0
    assert_same_run(tmp_path / "again", tmp_path / "run")


def test_going_back_to_a_checkpoint_before_the_detour_leaves_it(blobs, tmp_path, rolled_back, undisturbed):
    output_dir = tmp_path / "run"
    shutil.copytree(rolled_back[0], output_dir)
    older = str(output_dir / "checkpoints" / "step-00000007")
    assert pretrain(small_run(blobs, output_dir, **SKIPPING, resume=older)) == 0
    assert metrics(output_dir) == metrics(undisturbed[0])


def test_the_second_time_at_the_same_checkpoint_the_run_stops_and_says_why(blobs, tmp_path, monkeypatch, capfd):
    calls = itertools.count(1)

    def forward(self, images, ids_shuffle, real=TrainingLoss.forward):
        return real(self, images, ids_shuffle) * (math.nan if next(calls) > 15 else 1)

    monkeypatch.setattr(TrainingLoss, "forward", forward)
    with pytest.raises(
        UserError, match=r"at step 15 nor at the 3 after it.*the loss.*x_train.*after step 14, too.*--blr"
    ):
        pretrain(small_run(blobs, tmp_path, **SKIPPING))
    assert "going back to step 14" in capfd.readouterr().err
    assert max((tmp_path / "checkpoints").iterdir()).name == "step-00000014"
    assert [row["step"] for row in rows(tmp_path) if "skipped" not in row] == list(range(1, 15))


def test_a_run_from_a_published_file_does_not_go_back_to_random_weights(blobs, tmp_path, undisturbed, monkeypatch):
    monkeypatch.setattr(TrainingLoss, "forward", lambda self, *batch: self.model.cls_token.sum() * math.nan)
    published = str(undisturbed[0] / "checkpoint-0.pth")
    with pytest.raises(UserError, match=f"at step 10 nor at the 2 after.* no checkpoint was saved since {published}"):
        pretrain(small_run(blobs, tmp_path, **{**SKIPPING, "log_freq": 4}, resume=published))
    assert not (tmp_path / "rollbacks.json").exists()


@pytest.mark.parametrize("place", ["the output of 1.0", "the gradient of 0.weight", "the loss", None])
def test_the_first_place_that_is_not_finite_is_named(place):
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.Linear(2, 2)))
    inputs = torch.ones(1, 2)
    if place == "the output of 1.0":
        model[1][0] = nn.Threshold(100.0, math.inf)
    elif place == "the gradient of 0.weight":
        model[0].weight.register_hook(lambda gradient: gradient * math.nan)

    def losses():
        yield model(inputs).sum() * (math.nan if place == "the loss" else 1)

    if place is None:
        assert "nothing that could be found" in find_not_finite(model, losses, lambda flag: flag)
        assert find_not_finite(model, losses, lambda flag: True) is None
    else:
        assert find_not_finite(model, losses, lambda flag: flag) == place
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model[0]._forward_hooks


def test_rollbacks_change_the_data_and_damaged_ones_are_refused(tmp_path):
    seeds = [data_seed(seed, rollbacks) for seed in (0, 1, 2**63 - 1) for rollbacks in range(100)]
    assert len(set(seeds)) == 300
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert data_seed(7, 0) == 7
    assert read_rollbacks(tmp_path, 10, None) == []
    write_rollbacks(tmp_path, [3, 8, 12])
    assert read_rollbacks(tmp_path, 10, None) == [3, 8]
    for damage in ("[3, 8", "{}", '["a"]'):
        (tmp_path / "rollbacks.json").write_text(damage)
        with pytest.raises(UserError, match="cannot be read"):
            read_rollbacks(tmp_path, 10, None)


def test_rollbacks_of_version_0_1_count(tmp_path):
    (tmp_path / "detours.json").write_text("[3, 8, 12]")
    assert read_rollbacks(tmp_path, 10, None) == [3, 8]
    write_rollbacks(tmp_path, [3, 8, 9])
    assert read_rollbacks(tmp_path, 10, None) == [3, 8, 9], "the newer file counts, which has the older ones too"


# --- spikes -----------------------------------------------------------------------------------------------------------


def test_a_spike_is_told_from_noise_and_from_what_is_not_a_number():
    spikes, generator = LossSpikes(), torch.Generator().manual_seed(0)
    noise = torch.randn(1000, generator=generator, dtype=torch.float64).mul(0.01).add(1).tolist()
    assert [spikes.score(loss) for loss in noise] == [None] * 1000
    recent = noise[-200:]
    middle = statistics.median(recent)
    deviation = statistics.median(abs(loss - middle) for loss in recent) / 0.6745
    assert spikes.score(math.nan) is None
    assert spikes.score(0.1) is None, "a loss that falls is no spike"
    assert spikes.score(1.2) == pytest.approx((1.2 - middle) / deviation, rel=0.05)
    assert spikes.score(1.2) is not None, "one spike does not hide the next"
    assert LossSpikes().score(1e9) is None, "too little is known at the beginning"


@pytest.mark.parametrize(
    ("flag", "value"), [("max_skipped", 0), ("hang_timeout", -1.0), ("hang_timeout", math.inf), ("profile", 0)]
)
def test_settings_that_cannot_work_are_refused(blobs, tmp_path, flag, value):
    with pytest.raises(UserError, match=f"^{flag}={value}: must be"):
        small_run(blobs, tmp_path, **{flag: value})
