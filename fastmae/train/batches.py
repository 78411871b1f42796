"""The batches of a run: which images each step trains on, decoded ahead of need and turned into inputs of the loss."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator
from contextlib import closing

import numpy as np

from fastmae.data.loader import Batch, View
from fastmae.data.plan import EpochPlan, plan_epoch
from fastmae.data.sources import Source
from fastmae.facts import Shares
from fastmae.train.run import Run, load, say_changed
from fastmae.train.step import MicroBatch


class BatchStream:
    """The micro-batches of this rank, for any steps of a run and as often as they are asked for.

    The stream keeps no position, so a resumed run and a step that is computed again get the same batches. Every batch
    is entered into the log of the run (loading times), its quarantine (unusable images) and its changed images.

    Args:
        run: says which rank this is, and how many micro-steps and decoding threads there are.
        source: the images.
        seed: decides the order of the images.
        crops: the number of images that are decoded for one micro-batch.
        view_of: maps an epoch to the view of its images: their size, and how they are cropped and flipped.
        to_inputs: turns a batch into the tensors that the loss takes.
        image_decoder: the decoder of plain JPEGs, as ``choose_decoder`` names it.
        shares: what an epoch draws of each path that was joined; None: every image once.
    """

    def __init__(
        self,
        run: Run,
        source: Source,
        *,
        seed: int,
        crops: int,
        view_of: Callable[[int], View],
        to_inputs: Callable[[Batch], MicroBatch],
        image_decoder: str = "threads",
        shares: Shares | None = None,
    ) -> None:
        self._run, self._source, self._seed, self._crops = run, source, seed, crops
        self._view_of, self._to_inputs, self._image_decoder = view_of, to_inputs, image_decoder
        self._shares = shares
        self._newest_plan: EpochPlan | None = None
        self._dali_failures = 0

    def steps(self, first: int, end: int) -> Generator[tuple[int, Iterator[MicroBatch]]]:
        """Yields the steps from ``first`` to ``end`` − 1, each with its micro-batches.

        All micro-batches of a step must be taken before the next step is asked for. Closing the generator ends the
        decoding threads. They also end, and start anew, where the view changes, which happens a few times in a run.
        """
        per_epoch = self._run.steps.per_epoch
        first_end = (first // per_epoch + 1) * per_epoch - 1
        epochs = range(first // per_epoch, -(-end // per_epoch))
        try:
            for view, group in itertools.groupby(epochs, self._view_of):
                with_view = list(group)
                steps = range(max(first, with_view[0] * per_epoch), min(end, (with_view[-1] + 1) * per_epoch))
                requests = itertools.chain.from_iterable(map(self.requests, steps))
                with closing(load(self._run, self._source, requests, view, self._image_decoder)) as batches:
                    for step in steps:
                        yield step, self._micro_batches(batches)
                        if step == first_end:
                            say_changed(self._run)
        finally:
            if self._dali_failures:
                number = self._dali_failures
                self._run.say(f"decoding        batches that DALI failed on and the threads decoded instead: {number}")

    def at(self, step: int) -> Iterator[MicroBatch]:
        """Yields the micro-batches of one step."""
        with closing(self.steps(step, step + 1)) as steps:
            for _, micro_batches in steps:
                yield from micro_batches

    def requests(self, step: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns (indices, draw_ids), int64 [crops] each, of the micro-batches of a step."""
        epoch, index = self._run.steps.epoch_and_index(step)
        accum_iter = self._run.config.accum_iter
        plan = self._plan(epoch)
        return [plan.batch(index * accum_iter + micro) for micro in range(accum_iter)]

    def names(self, step: int, count: int) -> list[str]:
        """Returns the names of the first ``count`` images of a step."""
        indices = np.concatenate([indices for indices, _ in self.requests(step)])
        return [self._source.name(index) for index in indices[:count].tolist()]

    def _micro_batches(self, batches: Iterator[Batch]) -> Iterator[MicroBatch]:
        for _ in range(self._run.config.accum_iter):
            batch = next(batches)
            self._run.log.loading.add(batch)
            self._run.quarantine.add(batch.skipped, good=len(batch.images))
            self._run.changed.add(batch.changed, read=len(batch.images))
            if batch.redone:
                self._dali_failures += 1
                if self._dali_failures == 1:
                    why = f"DALI failed on a batch, which the threads decoded instead: {batch.redone}"
                    self._run.say(f"decoding        {why}")
            yield self._to_inputs(batch)

    def _plan(self, epoch: int) -> EpochPlan:
        """Returns the plan of an epoch. The newest one is kept, as it holds the order of the whole data set."""
        if self._newest_plan is None or self._newest_plan.epoch != epoch:
            context, source = self._run.context, self._source
            self._newest_plan = plan_epoch(
                self._seed, epoch, len(source), self._crops, context.rank, context.size, source.shards, self._shares
            )
        return self._newest_plan
