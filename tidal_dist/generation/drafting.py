"""Drafts by the model's own top layers: what is left of the blocks at hand, for all sequences side by side.

A pass of the draft head takes each block from `<bob>` on, as far as it is written and drafted, and says what is next;
nothing of it stays in the cache. The draft is then checked as one that was looked up: in one pass of all layers.

B sequences of a pass, C char slots of each, V ids of the output vocabulary.
"""

from collections.abc import Sequence

import numpy as np

from data_pipeline.layout import CharPositions
from tidal_dist.devices import one_thread
from tidal_dist.generation.cache import Cache
from tidal_dist.generation.exchange import Feed
from tidal_dist.generation.job import Job
from tidal_dist.generation.passes import Eager, Graphs, PassInputs, are_few, fill, parts


class Drafting:
    """Has the sequences of a pass draft what is left of their blocks.

    Args:
        run: passes of the draft head over `cache`. is_small: the model gains nothing from several threads.
    """

    def __init__(self, run: Eager | Graphs, cache: Cache, char_positions: CharPositions, is_small: bool):
        self._run, self._cache, self._char_positions, self._is_small = run, cache, char_positions, is_small

    def draft(self, rows: slice, jobs: Sequence[Job], rooms: Sequence[int]) -> None:
        """Draft, pass by pass, until every block is expected to end, or as far as it may be checked.

        Args:
            rows: of the cache, those of the jobs. rooms: chars that the pass that checks may take of each.
        """
        while True:
            feeds = [job.feed_draft(room) for job, room in zip(jobs, rooms, strict=True)]
            if not any(fed.chars for fed in feeds):
                return
            with one_thread(self._is_small and are_few(feeds)):
                logits = self._pass(rows, jobs, feeds)
            for job, fed, answer in zip(jobs, feeds, logits, strict=False):
                if fed.chars:
                    job.take_draft(answer[len(fed.chars) - 1])

    def _pass(self, rows: slice, jobs: Sequence[Job], feeds: Sequence[Feed]) -> np.ndarray:
        """The draft head's answers, (B, C, V), to what is fed."""
        shape = b, _, _ = self._run.shape_of((len(feeds), 0, max(len(fed.chars) for fed in feeds)))
        cached = [job.writing.cached_tokens for job in jobs]
        inputs = PassInputs.of_shape(slice(rows.start, rows.start + b), shape, max(cached))
        self._cache.reserve(inputs.rows.stop, inputs.longest)
        slots, _, counts = parts(inputs.flat, shape)
        counts[0, : len(jobs)] = cached
        fill(slots, 0, feeds, self._char_positions)
        return self._run(inputs).float().cpu().numpy()
