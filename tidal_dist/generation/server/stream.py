"""The texts of one request on their way from the generation thread to the event loop."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from tidal_dist.generation.events import Block, Char, Generation, Text
from tidal_dist.generation.job import Job
from tidal_dist.generation.request import Request
from tidal_dist.generation.server.errors import ApiError


@dataclass(frozen=True)
class Begun:
    """A text has its first char. Times of `time.monotonic`: when the pass began, and when it had ended."""

    entered: float
    written: float


@dataclass(frozen=True)
class Judged:
    """How likely a text's prompt is: each block's chars as they would be generated."""

    blocks: tuple[tuple[Char, ...], ...]


@dataclass(frozen=True)
class Finished:
    """The end of a text. `finish`: that of the generation, or why it was cancelled: "timeout", "shutdown"."""

    generation: Generation
    finish: str


@dataclass(frozen=True)
class Failed:
    """There will be no more of this text."""

    error: ApiError


Event = Judged | Char | Block | Text | Begun | Finished | Failed


class Stream:
    """The texts of one request, as the event loop follows them.

    Attributes:
        accepted: time of `time.monotonic`. begun: by the texts' numbers. unfinished: their numbers.
        timer: cancels the stream when its time is over.
        jobs, heard: the generation thread's: those in the engine, and the texts that have a char.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        cancel: Callable[["Stream"], None],
        wants_chars: bool,
        judges_prompts: bool,
    ):
        self.requests, self.wants_chars, self.judges_prompts = requests, wants_chars, judges_prompts
        self.accepted = time.monotonic()
        self.begun: dict[int, Begun] = {}
        self.unfinished = set(range(len(requests)))
        self.cancelled_for: str | None = None
        self.jobs: dict[int, Job] = {}
        self.heard: set[int] = set()
        self.timer: asyncio.TimerHandle | None = None
        self._cancel = cancel
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """What happens, with the number of the text that it happens to, until all texts are finished.

        Raises:
            ApiError: a text cannot be finished.
        """
        open_texts = len(self.requests)
        while open_texts:
            index, event = await self._events.get()
            if isinstance(event, Failed):
                raise event.error
            open_texts -= isinstance(event, Finished)
            yield index, event

    def put(self, index: int, event: Event) -> None:
        """Let the follower know."""
        self._events.put_nowait((index, event))

    def cancel(self, why: str) -> None:
        """End all texts here; what is written of them stays. Nothing where they have ended already."""
        if self.unfinished and self.cancelled_for is None:
            self.cancelled_for = why
            self._cancel(self)
