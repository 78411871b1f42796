"""What `make demo` runs learns: the defaults alone must do it."""

import json

import pytest
from PIL import Image

from fastmae.cli import main


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_pretraining_on_digits_without_a_single_setting_learns(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["pretrain"]) == 0
    run = tmp_path / "output_dir"
    results = json.loads((run / "probe.json").read_text())
    assert results["after"]["knn"] >= results["before"]["knn"] + 20
    assert results["after"]["knn"] >= 85
    assert results["after"]["linear"] > results["before"]["linear"]
    out = capsys.readouterr().out
    for path in ("output_dir/checkpoint-59.pth", "output_dir/reconstructions/epoch-0059.png"):
        assert path in out
        assert (tmp_path / path).exists()
    assert Image.open(run / "reconstructions" / "epoch-0059.png").format == "PNG"
