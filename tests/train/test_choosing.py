"""What computes a run's products and attention: chosen when it begins, and kept from then on."""

import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from helpers import command, final_state, metrics, small_run
from ranks import run_ranks, start_ranks

from fastmae.checkpoint.manifest import MANIFEST, manifest_text
from fastmae.checkpoint.restore import Restored
from fastmae.cli import main
from fastmae.config import FIXED_IN_A_FINETUNING, FIXED_IN_A_RUN, FinetuneConfig, PretrainConfig
from fastmae.environment import processor
from fastmae.errors import UserError
from fastmae.ops.backends import asked_backends, using
from fastmae.ops.choices import OF_0_1, TORCHS_OWN, Choice, Choices
from fastmae.train import choosing
from fastmae.train import finetune as finetune_module
from fastmae.train import pretrain as pretrain_module
from fastmae.train.choosing import choose
from fastmae.train.classify import finetune
from fastmae.train.precision import Precision, choose_precision
from fastmae.train.pretrain import pretrain
from fastmae.train.recovery import run_attempts
from fastmae.train.settings import describe_backends

EPOCH = dict(epochs=1, checkpoint_freq=3, keep=9)  # 9 steps
SHORT = dict(**EPOCH, warmup_epochs=0.5)
MEASURED = Choices(
    "measured",
    (
        Choice("linear_forward", (64, 64, 64), "float32", "onednn", 1.25),
        Choice("linear_input", (64, 64, 64), "float32", "onednn", 1.5),
        Choice("attention", (16, 16, 32), "float32", "cpu", 2.0),
    ),
)
HERE = replace(MEASURED, processor=processor())
ELSEWHERE = replace(MEASURED, processor="Some other processor")
LACKING = "attention 'cpu-dot', which needs AVX512-BF16"
FP32 = Precision("fp32", "exact", None)


def measuring(monkeypatch, choices, asked=None):
    """Lets a run find ``choices`` to be the fastest, and notes in ``asked`` whether it may take what is known."""

    def found(*_, anew, **__):
        if asked is not None:
            asked.append(anew)
        return choices

    for module in (pretrain_module, finetune_module):
        monkeypatch.setattr(module, "measured", found)


def not_measuring(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("it was measured")

    for module in (pretrain_module, finetune_module):
        monkeypatch.setattr(module, "measured", refuse)


def in_use(monkeypatch):
    """The choices with which each step of a run is computed."""
    used, take_step = [], pretrain_module.train_step

    def noted(*words, **options):
        used.append(asked_backends().choices)
        return take_step(*words, **options)

    monkeypatch.setattr(pretrain_module, "train_step", noted)
    return used


def saved(run: Path, step: int) -> Choices:
    return Choices.from_json(manifest_of(run, step)["choices"])


def manifest_of(run: Path, step: int) -> dict:
    return json.loads((checkpoint(run, step) / MANIFEST).read_text())


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def change_manifest(run: Path, step: int, **changes) -> None:
    """Writes other entries into a manifest, as its writer would; None takes one out."""
    manifest = {key: value for key, value in (manifest_of(run, step) | changes).items() if key != "sha256"}
    text = manifest_text({key: value for key, value in manifest.items() if value is not None})
    (checkpoint(run, step) / MANIFEST).write_text(text)


@pytest.fixture(scope="module")
def plain(blobs, tmp_path_factory):
    """A run with torch's own."""
    folder = tmp_path_factory.mktemp("plain")
    pretrain(small_run(blobs, folder, **SHORT, tune="off"))
    return folder


@pytest.fixture(scope="module")
def tuned(blobs, tmp_path_factory):
    """A run for which others were measured to be faster, on another processor."""
    folder = tmp_path_factory.mktemp("tuned")
    with pytest.MonkeyPatch.context() as patch:
        measuring(patch, ELSEWHERE)
        pretrain(small_run(blobs, folder, **SHORT, tune="auto"))
    return folder


def test_a_run_that_was_tuned_goes_on_with_the_same_bits_on_another_processor(
    blobs, plain, tuned, tmp_path, capsys, monkeypatch
):
    not_measuring(monkeypatch)
    assert final_state(tuned) != final_state(plain), "the choice changed nothing, so this shows nothing"
    pretrain(small_run(blobs, tmp_path, **SHORT, resume=str(checkpoint(tuned, 3))))
    assert final_state(tmp_path) == final_state(tuned)
    assert metrics(tmp_path) == metrics(tuned)[3:]
    assert saved(tmp_path, 9) == ELSEWHERE
    assert "choice          as the run began, measured on Some other processor; --tune auto" in capsys.readouterr().out


def test_a_run_leaves_the_choices_of_the_process_as_they_were(blobs, tmp_path, monkeypatch):
    used = in_use(monkeypatch)
    measuring(monkeypatch, HERE)
    with using(choices=OF_0_1):
        pretrain(small_run(blobs, tmp_path, **SHORT, tune="auto"))
        assert asked_backends().choices == OF_0_1
    assert used == [HERE] * 9
    assert asked_backends().choices == TORCHS_OWN


def test_a_run_says_what_was_chosen(blobs, tuned, capsys):
    (start,) = [json.loads(line) for line in (tuned / "environment.jsonl").read_text().splitlines()]
    first, *figures = start["backends"]["choice"].splitlines()
    assert first == "the fastest, as measured on this machine"
    assert figures
    assert (tuned / "config.yaml").read_text().endswith("".join(f"# choice: {line}\n" for line in [first, *figures]))


@pytest.mark.parametrize(
    ("flag", "choices", "said"),
    [
        ("auto", MEASURED, "the fastest, as measured on this machine"),
        ("off", TORCHS_OWN, "torch's own, and nothing is measured (--tune off)"),
    ],
)
def test_with_the_flag_a_run_that_goes_on_chooses_anew(
    blobs, plain, tuned, flag, choices, said, tmp_path, monkeypatch, capsys
):
    asked, used = [], in_use(monkeypatch)
    measuring(monkeypatch, MEASURED, asked)
    before = plain if flag == "auto" else tuned
    pretrain(small_run(blobs, tmp_path, **SHORT, resume=str(checkpoint(before, 3)), tune=flag))
    differ = "not what the run began with, so results differ in their last bits from step 4 on"
    assert f"choice          {said}; {differ}\n" in capsys.readouterr().out
    assert asked == [True] * (flag == "auto"), "what was measured before may not be taken"
    assert used == [choices] * 6
    assert saved(tmp_path, 9) == choices


def test_a_choice_that_cannot_run_here_is_refused_in_a_line_that_offers_another(blobs, tuned, tmp_path, monkeypatch):
    monkeypatch.setattr(choosing, "unmet", lambda choices: LACKING)
    resume = str(checkpoint(tuned, 3))
    with pytest.raises(UserError) as refused:
        pretrain(small_run(blobs, tmp_path, **SHORT, resume=resume))
    assert refused.value.as_on_the_command_line() == (
        f"--resume {resume}: computes with {LACKING}; choose anew with --tune auto, with which results "
        "differ in their last bits"
    )


@pytest.mark.parametrize(
    "damage", [{}, [], "fast", {"rules": "measured"}, Choices().as_json() | {"rules": "mine"}], ids=str
)
def test_a_damaged_choice_is_one_line_and_chosen_anew_if_asked(damage, tmp_path):
    restored = Restored(3, None, "RUN/checkpoints/step-00000003", {"choices": damage})
    with using(choices=TORCHS_OWN):
        with pytest.raises(
            UserError, match=r"^resume='RUN/checkpoints/step-00000003': what it computed with"
        ) as refused:
            choose(None, torch.device("cpu"), FP32, restored, lambda anew: MEASURED, bool)
        assert refused.value.as_on_the_command_line().endswith("; choose anew with --tune auto")
        said = choose("auto", torch.device("cpu"), FP32, restored, lambda anew: MEASURED, bool)
        assert asked_backends().choices == MEASURED
    assert "not what the run began with" in said


def test_a_run_of_version_0_1_goes_on_by_its_rules(blobs, plain, tmp_path, monkeypatch, capsys):
    not_measuring(monkeypatch)
    used = in_use(monkeypatch)
    run = tmp_path / "run"
    shutil.copytree(plain, run)
    for step in (3, 6, 9):
        change_manifest(run, step, choices=None)
    pretrain(small_run(blobs, tmp_path / "other", **SHORT, resume=str(checkpoint(run, 3))))
    assert used == [OF_0_1] * 6
    assert saved(tmp_path / "other", 9) == OF_0_1
    said = "by the rules of version 0.1, with which the run began; --tune auto measures what is fastest here"
    assert f"choice          {said}\n" in capsys.readouterr().out


def test_a_new_run_takes_what_is_known_and_keeps_it_after_a_rollback(monkeypatch):
    monkeypatch.delenv("FASTMAE_TUNE")
    asked = []
    fresh, cpu = Restored(0, None, None), torch.device("cpu")

    def measure(anew):
        asked.append(anew)
        return [HERE, MEASURED][len(asked) - 1]

    with using(choices=TORCHS_OWN):
        choose(None, cpu, FP32, fresh, measure, bool)
        assert (asked_backends().choices, asked) == (HERE, [False])
        for autotune in (None, "auto"):  # the next attempt in this process
            assert choose(autotune, cpu, FP32, fresh, measure, bool).startswith("as before the rollback")
            assert (asked_backends().choices, asked) == (HERE, [False])


def test_the_next_attempt_in_a_process_keeps_the_choice(blobs, tmp_path):
    used = []

    def attempt(config, context, stop):
        choose(
            config.tune, context.device, FP32, Restored(0, None, None), lambda anew: [HERE, MEASURED][len(used)], bool
        )
        used.append(asked_backends().choices)
        return None if len(used) < 3 else 0

    with using(choices=OF_0_1):  # which a run does not know
        assert run_attempts(small_run(blobs, tmp_path, tune="auto"), attempt) == 0
    assert used == [HERE] * 3


def test_a_file_of_weights_begins_a_new_run(monkeypatch):
    with using(choices=TORCHS_OWN):
        choose(
            "auto",
            torch.device("cpu"),
            FP32,
            Restored(9, None, "a.pth"),
            lambda anew: HERE if not anew else MEASURED,
            bool,
        )
        assert asked_backends().choices == HERE


def test_nothing_is_measured_where_it_could_change_nothing(monkeypatch):
    monkeypatch.delenv("FASTMAE_TUNE")
    fresh = Restored(0, None, None)

    def refuse(anew):
        raise AssertionError("it was measured")

    for autotune in (None, "auto"):
        with using(choices=TORCHS_OWN, ops="reference"):
            said = choose(autotune, torch.device("cpu"), FP32, fresh, refuse, bool)
            assert said.startswith("torch's own, as --ops reference has no other")
        with using(choices=TORCHS_OWN):
            said = choose(autotune, torch.device("cuda"), Precision("bf16", "", torch.bfloat16), fresh, refuse, bool)
            assert said == "nothing is measured on a GPU, for which --attention auto has a table"
            assert asked_backends().choices == TORCHS_OWN


def test_the_environment_turns_it_off_for_new_runs(monkeypatch):
    fresh, cpu = Restored(0, None, None), torch.device("cpu")
    with using(choices=TORCHS_OWN):
        said = choose(None, cpu, FP32, fresh, lambda anew: HERE, bool)
        assert said.startswith("torch's own, and nothing is measured (FASTMAE_TUNE=off)")
        monkeypatch.setenv("FASTMAE_TUNE", "no")
        with pytest.raises(UserError, match=r"^FASTMAE_TUNE=no: must be auto or off; correct or unset it$"):
            choose(None, cpu, FP32, fresh, lambda anew: HERE, bool)
        goes_on = Restored(3, None, "RUN", {"choices": HERE.as_json()})
        choose(None, cpu, FP32, goes_on, lambda anew: MEASURED, bool)
        assert asked_backends().choices == HERE, "a run that goes on does not ask the environment"


def test_a_measurement_that_fails_is_one_line(blobs, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("no memory\nleft")

    monkeypatch.setattr(pretrain_module, "measured", fails)
    with pytest.raises(UserError) as refused:
        pretrain(small_run(blobs, tmp_path, **SHORT, tune="auto"))
    assert refused.value.as_on_the_command_line() == (
        "--tune: nothing could be measured (RuntimeError: no memory left); give --tune off"
    )


def test_a_rank_whose_processor_lacks_what_rank_0_chose_says_so_and_the_others_end_too(monkeypatch):
    fresh, cpu = Restored(0, None, None), torch.device("cpu")
    with using(choices=TORCHS_OWN), pytest.raises(UserError) as refused:
        choose("auto", cpu, FP32, fresh, lambda anew: HERE, lambda flag: True)
    assert refused.value.is_said
    monkeypatch.setattr(choosing, "unmet", lambda choices: LACKING)
    with using(choices=TORCHS_OWN), pytest.raises(UserError) as refused:
        choose("auto", cpu, FP32, fresh, lambda anew: HERE, bool)
    assert not refused.value.is_said
    assert str(refused.value) == f"tune: rank 0 chose {LACKING}; give tune='off'"


def test_the_choice_is_none_of_the_settings_that_a_run_must_keep():
    assert not {"tune", "choices"} & {*FIXED_IN_A_RUN}
    assert not {"autotune", "choices"} & {*FIXED_IN_A_FINETUNING}


def test_a_fine_tuning_keeps_its_choice_too(blobs, tmp_path, monkeypatch):
    measuring(monkeypatch, HERE)
    config = FinetuneConfig(
        data_path=blobs, output_dir=str(tmp_path / "a"), batch_size=8, device="cpu", **EPOCH, autotune="auto"
    )
    finetune(config)
    not_measuring(monkeypatch)
    goes_on = replace(config, output_dir=str(tmp_path / "b"), resume=str(checkpoint(tmp_path / "a", 3)), autotune=None)
    finetune(goes_on)
    assert saved(tmp_path / "b", 9) == HERE
    assert final_state(tmp_path / "a") == final_state(tmp_path / "b")


@dataclass(frozen=True)
class Disagreeing:
    """A run of which every rank would find something else; a work for ``run_ranks``."""

    config: PretrainConfig

    def __call__(self) -> int:
        rank = int(os.environ["RANK"])
        pretrain_module.measured = lambda *_, **__: [HERE, TORCHS_OWN][rank]
        used, take_step = [], pretrain_module.train_step

        def noted(*words, **options):
            used.append(asked_backends().choices)
            return take_step(*words, **options)

        pretrain_module.train_step = noted
        status = pretrain(self.config)
        assert used == [HERE] * 9, used
        return status


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_all_ranks_compute_with_what_rank_0_measured(blobs, tmp_path, parallel):
    run_ranks(2, Disagreeing(small_run(blobs, tmp_path, **SHORT, batch_size=4, tune="auto", parallel=parallel)))
    assert saved(tmp_path, 9) == HERE


@dataclass(frozen=True)
class Failing:
    """A command whose measurement fails on rank 0."""

    words: tuple[str, ...]

    def __call__(self) -> int:
        def fails(*_, **__):
            raise RuntimeError("no memory left")

        pretrain_module.measured = fails
        return main(list(self.words))


@pytest.mark.slow
def test_a_measurement_that_fails_on_rank_0_ends_all_ranks_in_one_line(blobs, tmp_path):
    words = command(blobs, tmp_path, **SHORT, tune="auto")[3:]
    ended = [rank.finish() for rank in start_ranks(2, Failing(tuple(words)))]
    said = "".join(stderr for _, stderr in ended)
    assert [status for status, _ in ended] == [2, 2], ended
    assert said.count("nothing could be measured") == 1


@pytest.mark.parametrize(
    ("speedup", "said"), [(1.62, "; bf16 would be 1.6 times as fast here"), (1.02, ""), (None, "")]
)
def test_a_run_says_by_how_much_bf16_would_be_faster(speedup, said):
    cpu = torch.device("cpu")
    with using(choices=replace(HERE, bf16_speedup=speedup)):
        by_default = describe_backends(cpu, choose_precision("auto", cpu), {}, "threads")
        assert by_default["precision"] == f"fp32 (exact and reproducible on a CPU){said}"
        for asked in ("fp32", "bf16"):
            told = describe_backends(cpu, choose_precision(asked, cpu), {}, "threads")
            assert told["precision"] == f"{asked} (asked for)"
