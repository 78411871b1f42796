"""A pytest plugin: the tests import the C++ ops from the build that FASTMAE_SANITIZED names. See `make test-native`."""

import ctypes
import importlib.util
import os
import sys
from pathlib import Path

(path,) = Path(os.environ["FASTMAE_SANITIZED"]).glob("_C.*.so")
spec = importlib.util.spec_from_file_location("fastmae._C", path)
assert spec is not None
assert spec.loader is not None
sanitized = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sanitized)
assert sanitized.sanitized, f"{path} is an ordinary build"
assert hasattr(ctypes.CDLL(None), "__asan_report_load1"), "the sanitizer's library is not loaded"
sys.modules["fastmae._C"] = sanitized


def pytest_sessionfinish() -> None:
    from fastmae.ops import cpu

    assert cpu._C is sanitized, "the tests ran against another build"


def pytest_report_header() -> str:
    return f"fastmae._C: sanitised, {path}"
