"""A sweep proposes, prunes and finds the same whether it was killed or not, and refuses a wrong file in one line."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import yaml
from helpers import RUN, environment
from optuna.trial import TrialState

from fastmae.cli import main
from fastmae.commands.sweep import write_table
from fastmae.config import PretrainConfig
from fastmae.config.sweep import load_sweep
from fastmae.errors import UserError
from fastmae.signals import StopSignals
from fastmae.sweep.propose import as_settings, best_of, distributions, importances, propose, pruned_after
from fastmae.sweep.record import JOURNAL, Record, take_lock, trial_folder
from fastmae.sweep.run import run_trials
from fastmae.sweep.train import Outcome, reached, train_in_a_process, words_of

PAGE = Path(__file__).parents[2] / "docs" / "sweeps.md"
GIVEN: dict[str, Any] = {
    "settings": {"epochs": 9, "batch_size": 8},
    "search": {
        "blr": {"low": 1e-4, "high": 1e-2, "log": True},
        "accum_iter": {"low": 1, "high": 5, "step": 2},
        "crop_scale": {"values": [[0.2, 1], [0.5, 1]]},
        "flip": {"values": [True, False, None]},
    },
    "metric": "linear",
    "trials": 5,
    "startup": 3,
    "pruner": {"min_epochs": 1, "factor": 2},
}


def written(folder: Path, **changes: Any) -> str:
    """The file of a sweep."""
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({**GIVEN, **changes}))
    return str(path)


def found(record: Record) -> list[tuple[Any, ...]]:
    """All that a sweep found, without times."""
    return [
        (trial.number, trial.state, trial.params, trial.value, trial.intermediate_values) for trial in record.trials()
    ]


def quiet(*_: Any) -> None:
    """Is told of a trial."""


# --- the file ---------------------------------------------------------------------------------------------------------


def test_a_file_is_read_as_it_says(tmp_path):
    sweep = load_sweep(written(tmp_path))
    assert (sweep.command, sweep.metric, sweep.direction, sweep.trials) == ("pretrain", "linear", "maximize", 5)
    assert sweep.settings == {"epochs": 9, "batch_size": 8, "probe_freq": 1, "probe": False}
    params = propose(sweep, 0, [])
    settings = as_settings(sweep, params)
    assert 1e-4 <= settings["blr"] <= 1e-2
    assert settings["accum_iter"] in (1, 3, 5)
    assert settings["crop_scale"] in ((0.2, 1.0), (0.5, 1.0))
    assert PretrainConfig(**sweep.settings, **settings).epochs == 9
    words = words_of(sweep, settings, tmp_path / "trial-0000")
    assert words[0] == "pretrain"
    assert "--resume=auto" in words


def test_the_last_epoch_is_probed(tmp_path):
    assert load_sweep(written(tmp_path, pruner={"min_epochs": 4})).settings["probe_freq"] == 3
    assert load_sweep(written(tmp_path, pruner=None)).settings["probe_freq"] == 9


def test_a_run_folder_gives_the_settings_that_trials_share(tmp_path):
    (tmp_path / "config.yaml").write_text("epochs: 30\nblr: 0.01\noutput_dir: elsewhere\nresume: auto\n")
    sweep = load_sweep(written(tmp_path, config=str(tmp_path), settings={"epochs": 4}))
    assert sweep.settings["epochs"] == 4
    assert not {"output_dir", "resume"} & set(sweep.settings)


WRONG = {
    "trails: no such key; did you mean trials?": dict(trails=3),
    "command='train': must be pretrain or finetune": dict(command="train"),
    "metric='acc': must be one of linear, knn, held_out_loss, train_loss for pretrain": dict(metric="acc"),
    "direction='minimize': must be maximize, or left out, for linear": dict(direction="minimize"),
    "trials=0: must be a whole number of at least 1": dict(trials=0),
    "trials: must be given": dict(trials=None),
    "seed=0.5: must be a whole number": dict(seed=0.5),
    "settings=3: must hold settings": dict(settings=3),
    "settings.epochs: must be given: how long each trial trains": dict(settings={}),
    "settings.epoch=3: no such setting; did you mean epochs?": dict(settings={"epoch": 3}),
    "settings.epochs=0: must be at least 1": dict(settings={"epochs": 0}),
    "settings.epochs='long': must be a whole number": dict(settings={"epochs": "long"}),
    "settings.resume: is the sweep's; leave it out": dict(settings={"epochs": 9, "resume": "auto"}),
    "settings.batch_size=0: must be at least 1": dict(settings={"epochs": 9, "batch_size": 0}),
    "settings.probe_freq=3: must be at most 1": dict(settings={"epochs": 9, "probe_freq": 3}),
    "search: must name what is searched": dict(search={}),
    "search.blrr: no such setting; did you mean blr?": dict(search={"blrr": {"low": 1, "high": 2}}),
    "search.blr=[1, 2]: must be {low": dict(search={"blr": [1, 2]}),
    "search.blr: must be {low": dict(search={"blr": {"low": 1}}),
    "search.blr.hihg: no such key; did you mean high?": dict(search={"blr": {"low": 1, "hihg": 2}}),
    "search.blr.low=2: must be below high, which is 1": dict(search={"blr": {"low": 2, "high": 1}}),
    "search.blr.low=0: must be positive with log": dict(search={"blr": {"low": 0, "high": 1, "log": True}}),
    "search.blr=-1.0: must be a positive number": dict(search={"blr": {"low": -1, "high": 1}}),
    "search.accum_iter.low=0.5: must be a whole number": dict(search={"accum_iter": {"low": 0.5, "high": 2}}),
    "search.accum_iter.step=3: must divide": dict(search={"accum_iter": {"low": 1, "high": 5, "step": 3}}),
    "search.flip: is no number; give {values": dict(search={"flip": {"low": 0, "high": 1}}),
    "search.flip.values='maybe': must be True or False": dict(search={"flip": {"values": ["maybe"]}}),
    "search.mask_ratio=1.5: must be": dict(search={"mask_ratio": {"values": [0.5, 1.5]}}),
    "search.epochs: must be left out": dict(search={"epochs": {"values": [1, 2]}}),
    "search.mask_ratio: changes what train_loss measures": dict(
        metric="train_loss", search={"mask_ratio": {"values": [0.5, 0.7]}}
    ),
    "search.mask_ratio_schedule: changes what train_loss measures": dict(
        metric="train_loss", search={"mask_ratio_schedule": {"values": [0.5, 0.9]}}
    ),
    "settings.probe_freq=2: must be at most 4, and divide the 9 epochs": dict(
        settings={"epochs": 9, "probe_freq": 2}, pruner={"min_epochs": 4}
    ),
    "pruner=3: must be {min_epochs": dict(pruner=3),
    "pruner.min_epochs: must be given": dict(pruner={}),
    "pruner.min_epochs=9: must be below the 9 epochs": dict(pruner={"min_epochs": 9}),
    "pruner.factor=1: must be a whole number of at least 2": dict(pruner={"min_epochs": 1, "factor": 1}),
}


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_file_is_refused_in_one_line_that_names_the_key(line, tmp_path, refusal):
    path = written(tmp_path, **WRONG[line])
    assert refusal(["sweep", path]).startswith(f"fastmae: {path}: {line}")
    assert [one.name for one in tmp_path.iterdir()] == ["sweep.yaml"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--trails", "3"], "--trails: no such flag; did you mean --trials?"),
        (["--trials", "0"], "--trials 0: must be at least 1"),
        (["--launch", "torchrun '"], "--launch torchrun ': must be words of a shell"),
    ],
)
def test_a_wrong_flag_is_refused(words, line, tmp_path, refusal):
    assert refusal(["sweep", written(tmp_path), *words]).startswith(f"fastmae: {line}")


def test_torchrun_starts_trials_and_not_the_sweep(tmp_path, refusal, monkeypatch):
    for name, value in dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT="1").items():
        monkeypatch.setenv(name, value)
    assert "is one process; start its trials with --launch" in refusal(["sweep", written(tmp_path)])


# --- decisions --------------------------------------------------------------------------------------------------------


def finished(sweep, count):
    """Trials with invented values, as one process would propose them."""
    study = optuna.create_study(direction=sweep.direction)
    for number in range(count):
        params = propose(sweep, number, study.trials)
        value = -abs(math.log(params["blr"] / 2e-3))
        study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions(sweep), value=value))
    return study.trials


def test_proposals_follow_from_the_seed_the_number_and_what_is_recorded(tmp_path):
    sweep = load_sweep(written(tmp_path))
    trials = finished(sweep, 8)
    assert [trial.params for trial in trials] == [trial.params for trial in finished(sweep, 8)]
    assert len({trial.params["blr"] for trial in trials}) == 8
    assert propose(sweep, 8, trials) == propose(sweep, 8, list(trials))
    assert propose(sweep, 8, trials) != propose(sweep, 9, trials)
    other = load_sweep(written(tmp_path, seed=1))
    assert propose(other, 8, trials) != propose(sweep, 8, trials)
    assert best_of(sweep, trials)[0].value == max(trial.value for trial in trials)
    assert max(importances(sweep, trials), key=importances(sweep, trials).__getitem__) == "blr"


@pytest.mark.parametrize("metric", ["linear", "train_loss"])
def test_trials_are_stopped_as_optunas_pruner_stops_them_while_they_run(metric, tmp_path):
    """The decision from what is written is the one that would be taken live, whenever it is taken."""
    changes: dict[str, Any] = dict(metric=metric, settings={"epochs": 9}, pruner={"min_epochs": 2, "factor": 2})
    sweep = load_sweep(written(tmp_path, **changes))
    live = optuna.create_study(
        direction=sweep.direction, pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=2, reduction_factor=2)
    )
    rng, others, decisions = np.random.default_rng(0), [], []
    for _ in range(30):
        curve = {epoch: float(value) for epoch, value in enumerate(rng.normal(size=9), start=1)}
        trial, stopped = live.ask(), None
        for epoch, value in curve.items():
            trial.report(value, epoch)
            if trial.should_prune():
                stopped = epoch
                break
        assert pruned_after(sweep, curve, others) == stopped
        reported = {epoch: value for epoch, value in curve.items() if epoch <= (stopped or epoch)}
        assert pruned_after(sweep, reported, others) == stopped
        others.append(reported)
        decisions.append(stopped)
    assert {None, 2, 4} <= set(decisions)
    assert pruned_after(sweep, {1: 0.0, 2: math.nan}, []) == 2


# --- the record -------------------------------------------------------------------------------------------------------


def test_a_trial_is_recorded_at_once_or_not_at_all_and_a_torn_line_is_ended(tmp_path):
    sweep = load_sweep(written(tmp_path))
    folder = tmp_path / "sweep"
    with Record(folder, sweep).next_trial() as trial:
        assert trial is not None
        before = trial.params
    lines = (folder / JOURNAL).read_bytes()
    assert lines.count(b"CategoricalDistribution") == 2  # one line has all of it
    with open(folder / JOURNAL, "ab") as file:
        file.write(b'{"op_code":4,"worker')
    again = Record(folder, sweep)
    assert (folder / JOURNAL).read_bytes() == lines
    with again.next_trial() as trial:
        assert trial is not None
        assert (trial.number, trial.params, trial.state) == (0, before, TrialState.RUNNING)
        claim = take_lock(trial_folder(folder, trial) / "sweep.lock", wait=False)
        assert claim is None  # it is held
        with Record(folder, sweep).next_trial() as other:  # another process leaves it alone
            assert other is not None
            assert other.number == 1


def test_a_trial_that_another_process_ends_just_now_is_not_trained_again(tmp_path, monkeypatch):
    sweep = load_sweep(written(tmp_path))
    record, other = Record(tmp_path / "sweep", sweep), Record(tmp_path / "sweep", sweep)
    with record.next_trial() as first:
        assert first is not None
    claim = record._claim

    def late(trial):
        if trial.number == 0:
            other.end(first, TrialState.FAIL, None)
        return claim(trial)

    monkeypatch.setattr(record, "_claim", late)
    with record.next_trial() as trial:
        assert trial is not None
        assert trial.number == 1


def test_the_table_is_written_by_one_process_at_a_time(tmp_path, monkeypatch):
    record, written_to = Record(tmp_path / "sweep", load_sweep(written(tmp_path))), []

    def write(path, text):
        assert take_lock(tmp_path / "sweep" / "sweep.lock", wait=False) is None
        written_to.append(path.name)

    monkeypatch.setattr("fastmae.commands.sweep.write_text", write)
    assert write_table(record) == []
    assert written_to == ["trials.csv"]


def test_another_sweep_and_a_damaged_record_are_refused(tmp_path):
    sweep, folder = load_sweep(written(tmp_path)), tmp_path / "sweep"
    Record(folder, sweep)
    Record(folder, load_sweep(written(tmp_path), trials=50))
    with pytest.raises(UserError, match=r"differs in search from the sweep in .*; only trials may change: undo it"):
        Record(folder, load_sweep(written(tmp_path, search={"blr": {"low": 1, "high": 2}})))
    (folder / JOURNAL).write_text("not JSON\n" + (folder / JOURNAL).read_text())
    with pytest.raises(UserError, match=r"journal.log: is damaged \(.*\); restore it, or begin in another folder"):
        Record(folder, sweep)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(UserError, match=r"other: holds notes.txt and no sweep; name another with --output_dir"):
        Record(tmp_path / "other", sweep)


# --- the loop ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path, blobs):
    """A sweep of two trials of two epochs, each of which takes a fraction of a second."""
    settings = {
        **RUN,
        "data_path": blobs,
        "epochs": 2,
        "save_freq": 2,
        "warmup_epochs": 0.0,
        "num_workers": 1,
        "batch_size": 72,
    }
    settings |= {"input_size": [16], "model": "mae_vit_tiny_patch4", "checkpoint_freq": 1}
    changes: dict[str, Any] = dict(metric="train_loss", startup=1, trials=2, settings=settings)
    changes |= dict(search={"blr": {"low": 1e-4, "high": 1e-1, "log": True}})
    return load_sweep(written(tmp_path, **changes))


def train_here(sweep, searched, folder, stop, is_enough):
    """Trains in this process, as the command does in its own."""
    from fastmae.train.pretrain import pretrain

    settings = {**sweep.settings, **searched, "output_dir": str(folder), "resume": "auto"}
    status = pretrain(PretrainConfig(**settings))
    return Outcome(status)


class KilledError(BaseException):
    """Stands for the end of the process."""


def test_a_sweep_that_was_stopped_and_killed_finds_what_one_in_one_piece_finds(tiny, tmp_path, monkeypatch):
    from fastmae.train.pretrain import record_step

    whole, is_done = run_trials(tiny, tmp_path / "whole", train_here, quiet, quiet)
    assert is_done
    assert best_of(tiny, whole.trials())

    folder, calls = tmp_path / "stopped", []

    def stopping(*arguments):
        record_step(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    def disturbed(sweep, searched, folder, stop, is_enough):
        calls.append(folder.name)
        if len(calls) == 1:  # in the middle of a trial: it saves after its first step
            with monkeypatch.context() as patch:
                patch.setattr("fastmae.train.pretrain.record_step", stopping)
                outcome = train_here(sweep, searched, folder, stop, is_enough)
            assert outcome.status == 75
            return outcome
        outcome = train_here(sweep, searched, folder, stop, is_enough)
        if len(calls) == 2:  # trained, but not recorded
            raise KilledError
        return outcome

    _, is_done = run_trials(tiny, folder, disturbed, quiet, quiet)
    assert not is_done
    with pytest.raises(KilledError):
        run_trials(tiny, folder, disturbed, quiet, quiet)
    record, is_done = run_trials(tiny, folder, disturbed, quiet, quiet)
    assert is_done
    assert found(record) == found(whole)
    assert calls == ["trial-0000", "trial-0000", "trial-0000", "trial-0001"]  # the same trial went on
    assert [(trial.number, trial.params) for trial in best_of(tiny, record.trials())] == [
        (trial.number, trial.params) for trial in best_of(tiny, whole.trials())
    ]


def test_a_failed_trial_is_recorded_and_the_sweep_goes_on_but_not_if_the_first_all_fail(tmp_path):
    sweep = load_sweep(written(tmp_path, pruner=None, metric="train_loss", search={"blr": {"low": 1, "high": 2}}))

    def train(sweep, searched, folder, stop, is_enough):
        if folder.name == "trial-0001":
            return Outcome(-9, "killed by SIGKILL")
        loss = None if folder.name == "trial-0002" else 0.5
        (folder / "log.txt").write_text(json.dumps({"train_loss": loss, "epoch": 8}) + "\n")
        return Outcome(0)

    record, _ = run_trials(sweep, tmp_path / "some", train, quiet, quiet)
    assert [trial.state.name for trial in record.trials()] == ["COMPLETE", "FAIL", "FAIL", "COMPLETE", "COMPLETE"]
    assert [trial.user_attrs.get("reason") for trial in record.trials()][1:3] == [
        "killed by SIGKILL", "train_loss was not finite",
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"all of the first 3 trials failed, the last with: no such data$"):
        run_trials(sweep, tmp_path / "all", lambda *_: Outcome(2, "no such data"), quiet, quiet)


def test_what_a_trial_reached_is_read_from_its_run_folder(tmp_path):
    assert reached(tmp_path, "linear") == reached(tmp_path, "test_acc1") == {}
    (tmp_path / "probe.json").write_text('{"epochs": {"10": {"knn": 1, "linear": 2}, "2": {"knn": 3, "linear": 4.5}}}')
    (tmp_path / "log.txt").write_text('{"epoch": 0, "test_acc1": 7}\n{"epoch": 1}\n{"epoch": 3, "test_acc1": 9}\n{"e')
    assert reached(tmp_path, "linear") == {2: 4.5, 10: 2}
    assert reached(tmp_path, "test_acc1") == {1: 7, 4: 9}


@pytest.mark.parametrize(
    ("script", "outcome"),
    [
        ("echo 'fastmae: a b'; echo more; exit 3", Outcome(3, "exit status 3: a b")),
        ("echo last words; kill -9 $$", Outcome(-9, "killed by SIGKILL: last words")),
        ("kill -11 $$", Outcome(-11, "killed by SIGSEGV: rank .")),
        ("trap 'exit 75' TERM; touch $HERE/ready; while :; do sleep 0.01; done", Outcome(75)),
        ("exit 0", Outcome(0)),
    ],
)
def test_a_process_is_started_watched_and_stopped(script, outcome, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("HERE", str(tmp_path))
    (tmp_path / "script").write_text(f'echo "rank $RANK."\n{script}\n')
    train = train_in_a_process(f"sh {tmp_path / 'script'}")
    sweep = load_sweep(written(tmp_path))
    with StopSignals() as stop:
        assert train(sweep, {"blr": 0.5}, tmp_path, stop, (tmp_path / "ready").exists) == outcome
    first, second = (tmp_path / "output.txt").read_text().splitlines()[:2]
    assert re.match(r"\$ sh \S+ -m fastmae pretrain .*--blr=0.5 --output_dir=\S+ --resume=auto$", first)
    assert second == "rank ."


def test_a_signal_to_the_sweep_is_no_failure_of_a_trial_whose_launcher_has_a_status_of_its_own(tmp_path):
    """torchrun ends with status 1 when its ranks were stopped; such a trial goes on later."""
    (tmp_path / "script").write_text("trap 'exit 1' TERM; while :; do sleep 0.01; done")
    with StopSignals() as stop:
        stop.stop("SIGTERM")
        train = train_in_a_process(f"sh {tmp_path / 'script'}")
        assert train(load_sweep(written(tmp_path)), {}, tmp_path, stop, lambda: False) == Outcome(75)


def test_a_launcher_that_is_not_there_is_a_failed_trial(tmp_path):
    with StopSignals() as stop:
        outcome = train_in_a_process("no-such-launcher")(
            load_sweep(written(tmp_path)), {}, tmp_path, stop, lambda: False
        )
    assert outcome == Outcome(2, "no-such-launcher: cannot be started (No such file or directory)")


# --- whole processes --------------------------------------------------------------------------------------------------


def start(path: Path, folder: Path) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "fastmae", "sweep", str(path), "--output_dir", str(folder)]
    return subprocess.Popen(words, cwd="/", env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def wait_for(process, what):
    """Waits until ``what`` is true of a sweep that runs."""
    while not what():
        assert process.poll() is None, process.stdout.read().decode()
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_sweep_of_the_page_finds_the_same_after_kills_in_and_between_trials_and_a_signal(tmp_path):
    """SIGKILL of the sweep in the middle of a trial and right after one, and SIGTERM, against none of them."""
    given = yaml.safe_load(re.search(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)[1])  # type: ignore[index]
    given |= {"trials": 4, "startup": 2, "pruner": {"min_epochs": 1, "factor": 2}}
    given["settings"] |= {"epochs": 3, "device": "cpu", "num_workers": 1}
    path = tmp_path / "digits.yaml"
    path.write_text(yaml.safe_dump(given))
    sweep, whole, killed = load_sweep(str(path)), tmp_path / "whole", tmp_path / "killed"
    process = start(path, whole)
    text = process.communicate()[0].decode()
    assert process.returncode == 0, text
    assert "best            trial" in text

    process = start(path, killed)
    wait_for(process, (killed / "trial-0000" / "metrics.jsonl").exists)  # in the middle of a trial
    process.kill()
    process.communicate()
    process = start(path, killed)
    wait_for(process, (killed / "trial-0001" / "sweep.lock").exists)  # between two
    process.kill()
    process.communicate()
    process = start(path, killed)
    wait_for(process, (killed / "trial-0002" / "metrics.jsonl").exists)
    process.terminate()
    text = process.communicate()[0].decode()
    assert process.returncode == 75, text
    assert text.splitlines()[-1].startswith("stopped         by a signal; continue with: fastmae sweep")
    process = start(path, killed)
    text = process.communicate()[0].decode()
    assert process.returncode == 0, text

    one, other = Record(whole, sweep), Record(killed, sweep)
    assert found(one) == found(other)
    assert best_of(sweep, one.trials())[0].number == best_of(sweep, other.trials())[0].number
    assert main(["sweep", str(path), "--output_dir", str(killed)]) == 0  # there is nothing left to do
