"""A run's losses do not depend on who computes the ops, and the run folder says who did."""

import json

import numpy as np
import pytest
from helpers import metrics, small_run

from fastmae.errors import UserError
from fastmae.ops.backends import Backends, asked_backends
from fastmae.train.pretrain import pretrain


def test_cpp_and_pytorch_train_alike(blobs, tmp_path):
    for name, flags in (("auto", {}), ("reference", {"ops": "reference", "attention": "sdpa"})):
        assert pretrain(small_run(blobs, tmp_path / name, epochs=2, **flags)) == 0
        assert asked_backends() == Backends(), "the choice outlived the run"
    np.testing.assert_allclose(metrics(tmp_path / "auto"), metrics(tmp_path / "reference"), rtol=1e-5)
    starts = [json.loads((tmp_path / name / "environment.jsonl").read_text()) for name in ("auto", "reference")]
    auto, reference = (start["backends"] for start in starts)
    assert auto["ops"].startswith("C++ (")
    assert reference["ops"] == "PyTorch, asked for"
    assert reference["attention"].startswith("encoder: sdpa (")
    assert "; decoder: sdpa (" in reference["attention"]


@pytest.mark.parametrize("flags", [{"ops": "triton"}, {"attention": "triton"}, {"attention": "xformers"}])
def test_what_a_cpu_cannot_run_is_refused_before_anything_is_written(flags, blobs, tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    (name, value), *_ = flags.items()
    with pytest.raises(UserError, match=f"--{name} {value}"):
        pretrain(small_run(blobs, tmp_path / "run", **flags))
    assert not (tmp_path / "run").exists()
