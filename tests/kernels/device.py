"""Where the values_*.py files run: on the CPU in Triton's interpreter, on the GPU otherwise."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


def run_values(*files: Path, **environment: str) -> None:
    """Runs the tests of values_*.py in a process of their own: Triton decides at import whether it interprets."""
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, files)]
    clean = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        words, env={**clean, **environment}, capture_output=True, text=True, cwd=HERE.parents[1], timeout=500
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "passed" in done.stdout
