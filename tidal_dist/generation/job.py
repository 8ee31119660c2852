"""A request in an engine: what fails of its own ends it alone."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from tidal_dist.generation.events import Generation
from tidal_dist.generation.exchange import Answer, Feed
from tidal_dist.generation.request import Request
from tidal_dist.generation.sequence import Writing


@dataclass(eq=False)
class Job:
    """A request in an engine. `done`: its generation is complete, or it has failed.

    Attributes:
        error: what its constraint, draft or listener raised, which ended it and no other.
    """

    request: Request
    writing: Writing = field(repr=False)
    error: Exception | None = None

    @property
    def generation(self) -> Generation:
        """What has come of it so far.

        Raises:
            `error`, where there is one.
        """
        if self.error is not None:
            raise self.error
        return self.writing.generation

    @property
    def done(self) -> bool:
        """Whether nothing more will come."""
        return self.writing.is_finished or self.error is not None

    def feed(self, most_tokens: int, room: int) -> Feed:
        """See `Writing.feed`; nothing where that fails."""
        return self._fed(lambda: self.writing.feed(most_tokens, room))

    def feed_draft(self, room: int) -> Feed:
        """See `Writing.feed_draft`; nothing where that fails."""
        return self._fed(lambda: self.writing.feed_draft(room))

    def take(self, fed: Feed, answer: Answer) -> None:
        """See `Writing.take`."""
        self._try(lambda: self.writing.take(fed, answer))

    def take_draft(self, logits: np.ndarray) -> None:
        """See `Writing.take_draft`."""
        self._try(lambda: self.writing.take_draft(logits))

    def _fed(self, feed: Callable[[], Feed]) -> Feed:
        fed: list[Feed] = []
        self._try(lambda: fed.append(feed()))
        return fed[0] if fed else Feed(None, [])

    def _try(self, action: Callable[[], None]) -> None:
        if self.error is None:
            try:
                action()
            except Exception as error:
                self.error = error
