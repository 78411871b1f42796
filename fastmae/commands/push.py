"""``fastmae push``: writes a folder for the hub, checks it with transformers, and uploads it where that is asked."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from pathlib import Path
from typing import Any

from fastmae.checkpoint.load import Opened, open_checkpoint
from fastmae.checkpoint.manifest import is_step_name, newest_first
from fastmae.config import PushConfig
from fastmae.errors import SettingError, UserError, in_one_line, install_hint
from fastmae.export.atomic import written_aside
from fastmae.export.card import model_card, training_facts
from fastmae.export.official import Part
from fastmae.export.opened_hf import TOLERANCE, architecture_of, difference
from fastmae.export.run import save_for_transformers
from fastmae.messages import logger
from fastmae.report.compare import row_of
from fastmae.report.pictures import read_picture
from fastmae.report.run_folder import RunRecord, is_run, read_run
from fastmae.screen import say

FACTS = "training.json"
PICTURE = "reconstructions.png"
OF_AN_EPOCH = re.compile(r"checkpoint-(0|[1-9][0-9]*)(?:-ema)?\.(?:pth|safetensors)", re.ASCII)
"""The official files of a run."""
FIGURES = {
    "linear": "linear probe of the frozen encoder, on held-out images (%)",
    "knn": "k-NN by features of the frozen encoder, on held-out images (%)",
    "test_acc1": "accuracy of the classifier on the test part (%)",
    "held_out_loss": "loss of images that were held out",
    "train_loss": "training loss of the last epoch",
}
VERSIONS = ("fastmae", "torch")


def run_push(config: PushConfig) -> int:
    """Writes the folder, and uploads it with ``--repo``.

    Raises:
        UserError: transformers has no class for the model, it computes something else, or the hub does not take it.
    """
    if config.repo is not None and importlib.util.find_spec("huggingface_hub") is None:
        raise UserError(f"--repo: needs huggingface_hub; {install_hint('hub')}")
    opened, folder = open_checkpoint(config.checkpoint, config), Path(config.output)
    part, why = _part(config, opened)
    run, is_newest = _run_of(Path(config.checkpoint))
    with written_aside(folder, "DEST") as aside:
        try:
            save_for_transformers(aside, opened, part, opened.head)
        except SettingError as error:
            if error.name != "to":
                raise
            raise UserError(f"{config.checkpoint}: {error.problem}, a flag of `fastmae export`") from error
        checked = _checked(aside, opened, part)
        _describe(aside, config, opened, part, run if is_newest else None)
    what = "classifier" if opened.head else "encoder and decoder" if part == "full" else "encoder"
    say(f"{folder}: the {what} for {architecture_of(opened, part)}{why}, with its card (README.md)")
    say(checked)
    if run is not None and not is_newest:
        say(f"figures         none, and no picture: what {run.folder} says of itself is of later weights")
    if config.license is None:
        say("licence         none is named; give --license, or choose one in README.md, before you share it")
    if config.repo is not None:
        _upload(folder, config.repo, config.private)
    return 0


def _part(config: PushConfig, opened: Opened) -> tuple[Part, str]:
    """Returns which part is written, and why it is not all."""
    if config.part is not None:
        if config.part == "full" and not opened.has_decoder:
            raise SettingError("part", "full", f"{config.checkpoint} holds the encoder alone; leave --part out")
        return config.part, ""
    model = opened.model
    if opened.head or not opened.has_decoder:
        return "encoder", ""
    is_square = model.img_size[0] == model.img_size[1] and model.patch_size[0] == model.patch_size[1]
    if model.decoder_attention == "cross" or model.family != "vit" or not is_square:
        return "encoder", " (transformers has no class for its decoder)"
    return "full", ""


def _run_of(checkpoint: Path) -> tuple[RunRecord | None, bool]:
    """Returns the run of which a checkpoint is, None for a file from elsewhere; and whether it is the run's newest, of
    which the figures of the run are.
    """
    if is_run(checkpoint):
        return read_run(checkpoint), True
    is_step, official = is_step_name(checkpoint.name), OF_AN_EPOCH.fullmatch(checkpoint.name)
    folder = checkpoint.parent.parent if is_step else checkpoint.parent
    if not (is_step or official) or not is_run(folder):
        return None, False
    run = read_run(folder)
    if official:
        return run, bool(run.epochs) and int(official[1]) == run.epochs[-1]["epoch"]
    return run, checkpoint.name in [path.name for path in newest_first(folder)[:1]]


def _checked(folder: Path, opened: Opened, part: Part) -> str:
    """Compares the folder with the model, and returns a line about it.

    Raises:
        UserError: it is not the same model.
    """
    if importlib.util.find_spec("transformers") is None:
        return "check           transformers is not installed, so nothing was compared"
    try:
        share = difference(folder, opened, part)
    except ValueError as error:
        problem = f"{architecture_of(opened, part)} does not take this model ({in_one_line(str(error))})"
        raise UserError(f"{problem}; export it with `fastmae export`") from error
    if not share <= TOLERANCE:
        problem = (
            f"transformers' {architecture_of(opened, part)} computes something else (by {share:.1e} of the largest)"
        )
        raise UserError(f"{problem}; nothing was written: export it with `fastmae export`")
    return f"check           loaded by transformers with every tensor; its results differ by {share:.1e} of the largest"


def _describe(folder: Path, config: PushConfig, opened: Opened, part: Part, run: RunRecord | None) -> None:
    """Writes the card, the facts and the picture."""
    facts = training_facts(opened.settings)
    row: dict[str, Any] = {} if run is None else row_of(run)
    figures = {name: row[name] for name in FIGURES if row.get(name) is not None}
    said = run.starts[-1].get("versions") if run is not None and run.starts else None
    versions = {name: str(said[name]) for name in VERSIONS if name in said} if isinstance(said, dict) else {}
    picture = None
    if run is not None and run.reconstructions:
        try:
            data, _ = read_picture(run.reconstructions[max(run.reconstructions)])
        except ValueError as error:
            logger.warning("%s, and left out", error)
        else:
            (folder / PICTURE).write_bytes(data)
            picture = PICTURE
    told = {"settings": facts, "figures": figures, "versions": versions}
    (folder / FACTS).write_text(json.dumps(told, indent=2) + "\n")
    card = model_card(
        config.name or Path(config.output).resolve().name,
        opened,
        part,
        architecture_of(opened, part),
        config.license,
        facts,
        {FIGURES[name]: value for name, value in figures.items()},
        versions,
        picture,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def _upload(folder: Path, repo: str, private: bool) -> None:
    """Uploads a folder to the hub.

    Raises:
        UserError: the hub does not answer, or does not take it.
    """
    from huggingface_hub import HfApi

    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    api = HfApi(endpoint=endpoint)
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Add model by fastmae")
    except Exception as error:  # of the hub, of the network, of a missing token: none of them is a fault of fastmae
        reason = re.sub(r"hf_\w+", "hf_…", in_one_line(" ".join(f"{type(error).__name__}: {error}".split())))
        problem = f"{endpoint} did not take it ({reason})"
        raise UserError(f"--repo {repo}: {problem}; it is in {folder}: `hf upload {repo} {folder}`") from error
    say(f"uploaded        {commit.commit_url}")
