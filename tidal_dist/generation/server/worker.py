"""What an event loop sees of the generation thread.

The loop hands commands over through a queue, on which the thread sleeps while it has nothing to write; the thread hands
back what a pass has brought in one call to the loop. Nobody polls.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import partial
from threading import Thread

from tidal_dist.generation.engine import Engine
from tidal_dist.generation.request import Request
from tidal_dist.generation.server.errors import broken, queue_full, stopping
from tidal_dist.generation.server.metrics import Metrics
from tidal_dist.generation.server.stream import Begun, Failed, Finished, Stream
from tidal_dist.generation.server.writer import Outbox, Writer


class Worker:
    """Has texts written in a thread of its own. All public methods belong to the event loop."""

    def __init__(self, make_engine: Callable[[], Engine], metrics: Metrics, max_texts: int):
        self._metrics, self._max_texts = metrics, max_texts
        self._writer = Writer(make_engine, metrics, self._tell)
        self._thread = Thread(target=self._writer.run, args=(self._bury,), name="generation", daemon=True)
        self._streams: set[Stream] = set()
        self._is_closed = self._is_dead = False
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Start the thread, which answers to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self, seconds: float) -> None:
        """End the thread after its present pass; wait so long for it."""
        self._is_closed = True
        self._writer.commands.put(self._writer.end)
        await asyncio.to_thread(self._thread.join, seconds)

    @property
    def is_alive(self) -> bool:
        """Whether texts can be written."""
        return self._thread.is_alive() and not self._is_dead

    @property
    def texts(self) -> int:
        """How many are under way."""
        return sum(len(stream.unfinished) for stream in self._streams)

    def check_open(self, texts: int = 0) -> None:
        """See that so many texts can be taken up now.

        Raises:
            ApiError: there is no room (429), or the server is stopping or broken (503).
        """
        if self._is_closed:
            raise stopping()
        if not self.is_alive:
            raise broken()
        if self.texts + texts > self._max_texts:
            raise queue_full(self.texts, self._max_texts)

    def submit(
        self, requests: Sequence[Request], seconds: float, wants_chars: bool = False, judges_prompts: bool = False
    ) -> Stream:
        """Take up the texts of a request, all or none; what is not finished after so many seconds ends there.

        Args:
            wants_chars: each `Char` is told as it is written. judges_prompts: so is, first, how likely each prompt is.

        Raises:
            ApiError: as `check_open`.
        """
        self.check_open(len(requests))
        stream = Stream(
            requests, lambda s: self._writer.commands.put(partial(self._writer.leave, s)), wants_chars, judges_prompts
        )
        stream.timer = asyncio.get_running_loop().call_later(seconds, stream.cancel, "timeout")
        self._streams.add(stream)
        self._writer.commands.put(partial(self._writer.enter, stream))
        self._show()
        return stream

    def close_soon(self, grace_seconds: float) -> None:
        """Take nothing up any more, let go of what waits, and after the grace of what is being written.

        May be called by a signal's handler.
        """
        self._is_closed = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._close, grace_seconds)

    def _close(self, grace_seconds: float) -> None:
        assert self._loop is not None
        self._end_all([stream for stream in self._streams if not stream.begun])
        self._loop.call_later(grace_seconds, lambda: self._end_all(list(self._streams)))

    @staticmethod
    def _end_all(streams: Sequence[Stream]) -> None:
        for stream in streams:
            stream.cancel("shutdown")

    def _tell(self, outbox: Outbox) -> None:
        """Called by the thread."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._deliver, outbox)

    def _bury(self) -> None:
        """Called by the thread, last."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._refuse_the_rest)

    def _deliver(self, outbox: Outbox) -> None:
        for stream, index, event in outbox:
            if isinstance(event, Begun):
                stream.begun[index] = event
                self._metrics.queue_seconds.observe(event.entered - stream.accepted)
                self._metrics.first_byte_seconds.observe(event.written - stream.accepted)
            elif isinstance(event, Finished | Failed):
                stream.unfinished.discard(index)
                if not stream.unfinished:
                    self._let_go(stream)
            stream.put(index, event)
        self._show()

    def _let_go(self, stream: Stream) -> None:
        if stream in self._streams:
            self._streams.discard(stream)
            self._metrics.request_seconds.observe(time.monotonic() - stream.accepted)
        if stream.timer is not None:
            stream.timer.cancel()

    def _refuse_the_rest(self) -> None:
        """No command is obeyed any more: whoever waits for one is told."""
        self._is_dead = True
        error = stopping() if self._is_closed else broken()
        for stream in list(self._streams):
            self._deliver([(stream, index, Failed(error)) for index in sorted(stream.unfinished)])

    def _show(self) -> None:
        running = sum(len(stream.begun.keys() & stream.unfinished) for stream in self._streams)
        self._metrics.running.set(running)
        self._metrics.waiting.set(self.texts - running)
