"""``python -m fastmae`` and the command ``fastmae``. Signals are remembered before anything large is imported."""

import sys
from contextlib import ExitStack

from fastmae.signals import remembered


def main() -> int:
    """Runs the command line and returns its exit status."""
    with ExitStack() as stack:
        try:
            if sys.argv[1:2] in (["pretrain"], ["finetune"]):
                stack.enter_context(remembered())
            from fastmae.cli import main as run

            return run()
        except KeyboardInterrupt:  # while importing
            return 130


if __name__ == "__main__":
    sys.exit(main())
