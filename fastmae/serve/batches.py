"""Batches of what waits: requests that come while others are computed are computed together afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastmae.serve.answers import Ask

Compute = Callable[[Sequence[Ask]], list[Any]]


@dataclass(frozen=True)
class _Waiting:
    ask: Ask
    answer: asyncio.Future[Any]
    since: float
    """Seconds of ``time.monotonic``."""


def in_batches(
    compute: Compute, most: int, wait: float, observe: Callable[[int], None] = lambda count: None
) -> Callable[[Ask], Awaitable[Any]]:
    """Returns a function of one ask that computes all asks that wait together, in a thread, a batch after the other.

    A batch is gathered when the one before is done, not when its first ask comes, so that it holds whatever waits.
    (``serve.batch`` of Ray gathers before, so that without a wait it computes each alone.) Who asks again when a batch
    is answered takes a moment, so the next batch waits for as many as the last one held: who is alone waits for nobody.
    If a batch fails, each of its asks is computed alone, so that one takes no other with it.

    Args:
        compute: answers a batch, in its order.
        most: asks in a batch.
        wait: seconds that the first ask of a batch waits for others, at most, counted from when it came.
        observe: is told the size of each batch.
    """
    waiting: deque[_Waiting] = deque()
    full = asyncio.Event()
    worker: asyncio.Task[None] | None = None
    wanted = 1  # as many as were computed together the last time

    async def work() -> None:
        nonlocal worker, wanted
        try:
            while waiting:
                left = waiting[0].since + wait - time.monotonic()
                if left > 0 and len(waiting) < wanted:
                    full.clear()
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(full.wait(), left)
                batch = [waiting.popleft() for _ in range(min(most, len(waiting)))]
                wanted = len(batch)
                await compute_batch([one for one in batch if not one.answer.done()])  # the others were given up
        finally:
            worker = None

    async def compute_batch(batch: list[_Waiting]) -> None:
        if not batch:
            return
        observe(len(batch))
        try:
            answers = await asyncio.to_thread(compute, [one.ask for one in batch])
        except Exception as error:
            if len(batch) > 1:
                for one in batch:
                    await compute_batch([one])
            elif not batch[0].answer.done():
                batch[0].answer.set_exception(error)
            return
        for one, answer in zip(batch, answers, strict=True):
            if not one.answer.done():
                one.answer.set_result(answer)

    async def answer(ask: Ask) -> Any:
        nonlocal worker
        one = _Waiting(ask, asyncio.get_running_loop().create_future(), time.monotonic())
        waiting.append(one)
        if len(waiting) >= wanted:
            full.set()
        if worker is None:
            worker = asyncio.create_task(work())
        return await one.answer

    return answer
