"""A pretraining to which something happens in the middle of a step: torchrun runs this in place of ``-m fastmae``.

    disturbed.py WHAT:RANK:CALL … -- the words of the command line

On ``RANK``, when the loss is computed for the ``CALL``-th time, the process is killed (``kill``) or sleeps for ever
(``sleep``); or that loss and the two after it are not numbers (``nan``). Once: not after torchrun has restarted it.
"""

import os
import signal
import sys
import time

from fastmae.cli import main
from fastmae.train.step import TrainingLoss

end = sys.argv.index("--")
disturbances = [word.split(":") for word in sys.argv[1:end]]
mine = {what: int(call) for what, rank, call in disturbances if rank == os.environ["RANK"]}
if os.environ["TORCHELASTIC_RESTART_COUNT"] != "0":
    mine = {}
calls = 0
undisturbed = TrainingLoss.forward


def forward(self, images, ids_shuffle):
    global calls
    calls += 1
    loss = undisturbed(self, images, ids_shuffle)
    if calls == mine.get("kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    if calls == mine.get("sleep"):
        sleep_for_ever()
    return loss * float("nan") if 0 <= calls - mine.get("nan", calls + 1) < 3 else loss


def sleep_for_ever():
    while True:
        time.sleep(1)


TrainingLoss.forward = forward
sys.exit(main(sys.argv[end + 1 :]))
