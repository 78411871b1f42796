"""The page of `fastmae report` is one file that needs no network. It shows what the folders hold, and escapes all."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from run_folders import write_run

from fastmae.cli import main
from fastmae.errors import UserError
from fastmae.report import page as page_module
from fastmae.report.charts import MOST_POINTS, thinned
from fastmae.report.colours import colour_of
from fastmae.report.figures import FIGURES, Line, points_of
from fastmae.report.page import write_report
from fastmae.report.run_folder import read_run

EVIL = '<script>alert("x")</script>'


class Words(HTMLParser):
    """What a page shows, and its elements."""

    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []
        self.elements: list[tuple[str, dict]] = []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    resumed = {"step": 4, "event": "resumed", "text": f"from {EVIL}", "time": "2026-11-30 10:20:00"}
    write_run(folder / "one", epochs=3, steps=4, blr=1e-3, note=EVIL)
    write_run(folder / "two <b>", epochs=3, steps=4, blr=2e-3, note="\x1b[31mred")
    with open(folder / "two <b>" / "events.jsonl", "a") as file:
        file.write(json.dumps(resumed) + "\n")
    runs = [read_run(folder / "one"), read_run(folder / "two <b>")]
    size = write_report(str(folder / "report.html"), runs)
    text = (folder / "report.html").read_text()
    assert size == len(text.encode())
    return text


@pytest.fixture(scope="module")
def words(two):
    parser = Words()
    parser.feed(two)
    return parser


def test_the_page_needs_nothing_from_elsewhere(two, words):
    for _, attributes in words.elements:
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith(("data:", "#"))
    assert "default-src 'none'" in two
    assert len([tag for tag, _ in words.elements if tag == "script"]) == 1
    assert not re.search(r"url\((?!#)", two)


def test_what_comes_from_run_folders_is_escaped(two, words):
    assert EVIL not in two
    assert "\x1b" not in two
    shown = "".join(words.text)
    for text in ("two <b>", EVIL, "\\x1b[31mred", f"from {EVIL}"):
        assert text in shown


def test_every_chart_has_its_title_axes_and_a_sentence_and_runs_keep_their_colours(two, words):
    shown = "".join(words.text)
    svgs = re.findall(r"<svg.*?</svg>", two, re.DOTALL)
    others = ("test part", "MFU", "Adversary", "λ", "each path")
    of_pretraining = [figure for figure in FIGURES if not any(word in figure.title for word in others)]
    assert len(svgs) == len(of_pretraining) == 10
    for svg, figure in zip(svgs, of_pretraining, strict=True):
        ElementTree.fromstring(svg)
        assert figure.title in shown
        assert figure.how in shown
        assert f">{figure.unit}</text>" in svg
        assert ">epochs</text>" in svg
        assert colour_of(0) in svg
        assert colour_of(1) in svg
        assert "#010203" not in svg
    assert svgs[0].count("currentColor") > 10


def test_overview_differences_events_and_environment_are_told(words):
    shown = " ".join("".join(words.text).split())
    assert "What differs" in shown
    assert "blr0.0010.002 note" in shown
    for text in ("complete", "3 of 3", "30 min 0 s", "52.0 %", "a processor", "after step", "Dotted lines"):
        assert text in shown


def test_the_overview_has_the_accuracies_after_a_training_that_measured_none_in_between(tmp_path):
    folder = write_run(tmp_path / "one", epochs=1, steps=1, change=lambda row: {"step": row["step"]})
    (folder / "probe.json").write_text('{"after": {"knn": 33.33, "linear": 44.44}}')
    write_report(str(tmp_path / "x.html"), [read_run(folder)])
    assert "44.4 %" in (tmp_path / "x.html").read_text()


def test_pictures_are_chosen_by_a_slider(words):
    (slider,) = [attributes for tag, attributes in words.elements if attributes.get("id") == "epoch"]
    assert slider["data-epochs"] == "1,3"
    assert slider["value"] == slider["max"] == "1"
    pictures = [attributes for tag, attributes in words.elements if tag == "img"]
    assert [(one["data-epoch"], "hidden" in one) for one in pictures] == [("1", True), ("3", False)] * 2
    assert all(one["src"].startswith("data:image/png;base64,") for one in pictures)


def test_points_are_what_the_files_say(tmp_path):
    run = read_run(write_run(tmp_path / "one", epochs=2, steps=4))
    assert points_of(run, Line("metrics", "data_wait", times=100), in_epochs=True) == [(1.0, 1.0), (2.0, 1.0)]
    assert points_of(run, Line("metrics", "loss"), in_epochs=False)[:2] == [(1, 1.0), (2, 0.5)]
    assert points_of(run, Line("log", "train_loss"), in_epochs=True) == [(1, 0.25), (2, 0.125)]
    assert points_of(run, Line("log", "train_loss"), in_epochs=False) == [(4, 0.25), (8, 0.125)]
    accuracies = {"before": {"knn": 10, "linear": 20}, "after": {"knn": 30, "linear": 40}}
    (tmp_path / "one" / "probe.json").write_text(json.dumps({**accuracies, "epochs": {"1": {"knn": 15, "linear": 25}}}))
    assert points_of(read_run(tmp_path / "one"), Line("probes", "knn"), in_epochs=True) == [(0, 10), (1, 15), (2, 30)]


def test_a_long_curve_is_drawn_as_means_of_its_pieces():
    points = [(float(x), float(x % 2)) for x in range(10_000)]
    drawn = thinned(points)
    assert MOST_POINTS / 2 < len(drawn) <= MOST_POINTS
    assert all(0.3 < y < 0.7 for _, y in drawn)
    assert thinned(points[:5]) == points[:5]


def test_a_page_stays_small_and_a_damaged_picture_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(page_module, "PICTURE_BYTES", 120_000)
    folder = write_run(tmp_path / "one", epochs=1, steps=1)
    noise = np.random.default_rng(0).integers(0, 255, (300, 400, 3), np.uint8)
    for epoch in range(40):
        (folder / "reconstructions" / f"epoch-{epoch:04d}.png").write_bytes(b"nothing")
    for epoch in (0, 39):
        Image.fromarray(noise).save(folder / "reconstructions" / f"epoch-{epoch:04d}.png")
    shown = page_module._pictures([read_run(folder)])
    assert shown["epochs"] == [1, 40]
    assert shown["lost"][0] == f"{folder}/reconstructions/epoch-0003.png: cannot be read (no picture)"
    assert len(shown["lost"]) == 14
    ((_, uris),) = shown["runs"]
    assert all(uri.startswith("data:image/jpeg") for _, uri in uris)
    assert sum(len(uri) for _, uri in uris) < 120_000 * 4 / 3


def broken_png(path):
    """A picture of several pieces, of which a later one is broken."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 400, 3), np.uint8)).save(file, "PNG")
    data = file.getvalue()
    second = data.index(b"IDAT", data.index(b"IDAT") + 4)
    path.write_bytes(data[:second] + b"\0\xff\0\1" + data[second + 4 :])


def test_what_only_has_a_pictures_name_is_told(tmp_path, caplog):
    folder = write_run(tmp_path / "one", epochs=1, steps=1)
    damages = [broken_png, os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")]
    paths = [folder / "reconstructions" / f"epoch-{epoch:04d}.png" for epoch in range(1, 5)]
    for damage, path in zip(damages, paths, strict=True):
        damage(path)
    write_report(str(tmp_path / "x.html"), [read_run(folder)])
    text = (tmp_path / "x.html").read_text()
    for message, path in zip(caplog.messages, paths, strict=True):
        assert message.startswith(f"{path}: cannot be read (")
        assert f"{path}: cannot be read (" in text
    assert 'data-epochs="1"' in text


def test_a_run_that_has_only_begun_has_a_page(tmp_path, capsys):
    folder = write_run(tmp_path / "one", epochs=2, steps=2, done=0)
    (folder / "metrics.jsonl").write_text('{"step": 1, "epo')
    assert main(["report", str(folder), "--output", str(tmp_path / "x.html")]) == 0
    assert "There are no numbers to draw yet" in (tmp_path / "x.html").read_text()
    assert capsys.readouterr().out.splitlines() == [
        f"{folder}: metrics.jsonl: 1 damaged line",
        f"{tmp_path}/x.html: 1 run, 0.0 MB",
    ]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["{tmp}"], "is no run folder"),
        (["{run}", "--output", "{tmp}/none/x.html"], "--output"),
        (["{run}", "--output", "x.txt"], "--output x.txt: must be a name that ends in .html"),
        ([], "RUN"),
    ],
)
def test_what_cannot_be_is_told_in_a_line(tmp_path, capsys, words, line):
    run = write_run(tmp_path / "run", epochs=1, steps=1)
    assert main(["report", *(word.format(tmp=tmp_path, run=run) for word in words)]) == 2
    assert line in capsys.readouterr().err


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "fastmae.report.figures", raising=False)
    monkeypatch.delitem(sys.modules, "fastmae.report.charts", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"not installed; pip install 'fastmae\[report\]'"):
        write_report(str(tmp_path / "x.html"), [read_run(write_run(tmp_path / "run", epochs=1, steps=1))])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
def test_the_slider_moves_through_the_pictures_in_a_browser(two, tmp_path):
    move = "slider.value = 0; slider.dispatchEvent(new Event('input'));"
    moved = re.sub(r"<meta http-equiv.*?>", "", two).replace("\n</script>", f"\n{move}</script>")
    (tmp_path / "moved.html").write_text(moved)
    command = ["chromium", "--headless", "--no-sandbox", "--dump-dom", f"file://{tmp_path}/moved.html"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    parser = Words()
    parser.feed(done.stdout)
    pictures = [attributes for tag, attributes in parser.elements if tag == "img"]
    assert [(one["data-epoch"], "hidden" in one) for one in pictures] == [("1", False), ("3", True)] * 2
