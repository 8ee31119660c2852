"""The thread that owns the engine, and what an event loop sees of it.

The loop hands commands over through a queue, on which the thread sleeps while it has nothing to write; the thread hands
back what a pass has brought in one call to the loop. Nobody polls.
"""

import asyncio
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from queue import Empty, SimpleQueue
from threading import Thread

from tidal_dist.errors import UserError
from tidal_dist.generation.engine import Engine
from tidal_dist.generation.events import Block, Char, Text
from tidal_dist.generation.request import Request
from tidal_dist.generation.server.errors import ApiError, broken, queue_full, stopping
from tidal_dist.generation.server.metrics import Metrics
from tidal_dist.generation.server.stream import Begun, Event, Failed, Finished, Stream

_Outbox = list[tuple[Stream, int, Event]]


class Worker:
    """Feeds an engine from a thread of its own. All public methods belong to the event loop."""

    def __init__(self, engine: Engine, metrics: Metrics, max_texts: int):
        self._metrics, self._max_texts = metrics, max_texts
        self._writing = _Writing(engine, metrics, self._tell)
        self._thread = Thread(target=self._writing.run, args=(self._bury,), name="generation", daemon=True)
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
        self._writing.commands.put(self._writing.end)
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

    def submit(self, requests: Sequence[Request], seconds: float, wants_chars: bool = False) -> Stream:
        """Take up the texts of a request, all or none; what is not finished after so many seconds ends there.

        Raises:
            ApiError: as `check_open`.
        """
        self.check_open(len(requests))
        stream = Stream(requests, wants_chars, lambda s: self._writing.commands.put(partial(self._writing.leave, s)))
        stream.timer = asyncio.get_running_loop().call_later(seconds, stream.cancel, "timeout")
        self._streams.add(stream)
        self._writing.commands.put(partial(self._writing.enter, stream))
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

    def _tell(self, outbox: _Outbox) -> None:
        """Called by the thread."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._deliver, outbox)

    def _bury(self) -> None:
        """Called by the thread, last."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._refuse_the_rest)

    def _deliver(self, outbox: _Outbox) -> None:
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


class _Writing:
    """What the thread does."""

    def __init__(self, engine: Engine, metrics: Metrics, tell: Callable[[_Outbox], None]):
        self.commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._engine, self._metrics, self._tell = engine, metrics, tell
        self._streams: set[Stream] = set()
        self._outbox: _Outbox = []
        self._is_ending = False
        self._pass_began = 0.0

    def run(self, bury: Callable[[], None]) -> None:
        """Obey and write until told to end, or until the engine fails."""
        try:
            while not self._is_ending:
                self._obey()
                self._write()
        except Exception:
            traceback.print_exc(file=sys.stderr)
        finally:
            bury()

    def _write(self) -> None:
        if self._engine.has_work:
            self._pass_began = time.monotonic()
            self._engine.step()
            self._metrics.passes.inc()
        for stream in list(self._streams):
            self._see_who_is_done(stream)
        if self._outbox:
            outbox, self._outbox = self._outbox, []
            self._tell(outbox)

    def _obey(self) -> None:
        """Do what was commanded; sleep where there is nothing else to do."""
        if not self._engine.has_work:
            self.commands.get()()
        for command in self.left_commands():
            command()

    def left_commands(self) -> list[Callable[[], None]]:
        """What was commanded and not yet done."""
        commands = []
        while True:
            try:
                commands.append(self.commands.get_nowait())
            except Empty:
                return commands

    def end(self) -> None:
        """Command: end."""
        self._is_ending = True

    def enter(self, stream: Stream) -> None:
        """Command: take up a request's texts."""
        self._streams.add(stream)
        try:
            for index, request in enumerate(stream.requests):
                stream.jobs[index] = self._engine.submit(request, partial(self._hear, stream, index))
        except Exception as error:
            self._fail(stream, error)

    def leave(self, stream: Stream) -> None:
        """Command: let go of a request's texts."""
        for job in stream.jobs.values():
            if not job.done:
                self._engine.cancel(job)

    def _fail(self, stream: Stream, error: Exception) -> None:
        if not isinstance(error, UserError):
            traceback.print_exception(error, file=sys.stderr)
        told = ApiError(422, str(error)) if isinstance(error, UserError) else broken()
        self.leave(stream)
        stream.jobs.clear()
        self._streams.discard(stream)
        self._outbox += [(stream, index, Failed(told)) for index in range(len(stream.requests))]

    def _hear(self, stream: Stream, index: int, event: Char | Block | Text) -> None:
        if not isinstance(event, Char):
            self._outbox.append((stream, index, event))
            return
        if index not in stream.heard:
            stream.heard.add(index)
            self._outbox.append((stream, index, Begun(self._pass_began, time.monotonic())))
        if event.id < 256:
            self._metrics.bytes.inc()
        if stream.wants_chars:
            self._outbox.append((stream, index, event))

    def _see_who_is_done(self, stream: Stream) -> None:
        for index, job in list(stream.jobs.items()):
            if job.done:
                del stream.jobs[index]
                finish: str = job.generation.finish
                if finish == "cancelled" and stream.cancelled_for:
                    finish = stream.cancelled_for
                self._outbox.append((stream, index, Finished(job.generation, finish)))
        if not stream.jobs:
            self._streams.discard(stream)
