"""What the generation thread does: it owns the engine, and obeys an event loop's commands between passes.

A pass that fails takes the requests with it whose texts were in the engine's cache. The others go on in a new engine,
if that can make a pass; if it cannot, the thread ends. A text that fails takes its request with it, and no other.
"""

import gc
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from queue import Empty, SimpleQueue

from data_pipeline.errors import one_line
from tidal_dist.errors import UserError
from tidal_dist.generation.engine import Engine
from tidal_dist.generation.events import Block, Char, Text
from tidal_dist.generation.request import Limits, Request
from tidal_dist.generation.scoring import Scoring
from tidal_dist.generation.server.errors import ApiError, pass_failed, text_failed
from tidal_dist.generation.server.metrics import Metrics
from tidal_dist.generation.server.stream import Begun, Event, Failed, Finished, Judged, Stream

Outbox = list[tuple[Stream, int, Event]]
_SCORED_SLOTS = 4096  # of tokens and chars in a pass, so that those who are being written for do not wait long
_PROBE = Request("", limits=Limits(max_bytes=1, max_blocks=1))


class _Broken(Exception):
    """No pass can be made any more."""


class Writer:
    """Writes the texts of streams. All methods but `left_commands` belong to the thread.

    Attributes:
        commands: for the thread, which sleeps on them while it has nothing to write.
    """

    def __init__(self, make_engine: Callable[[], Engine], metrics: Metrics, tell: Callable[[Outbox], None]):
        self.commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._make_engine, self._metrics, self._tell = make_engine, metrics, tell
        self._engine = make_engine()
        self._streams: dict[Stream, None] = {}  # whose texts the engine has, in the order in which they came
        self._scorings: dict[Stream, Scoring] = {}  # whose prompts are to be scored before that
        self._outbox: Outbox = []
        self._is_ending = False
        self._pass_began = 0.0

    def run(self, bury: Callable[[], None]) -> None:
        """Obey and write until told to end, or until no pass can be made any more."""
        try:
            while not self._is_ending:
                self._obey()
                self._write()
        except _Broken as error:
            _log(str(error))
        except Exception:
            traceback.print_exc(file=sys.stderr)
        finally:
            bury()

    def _obey(self) -> None:
        """Do what was commanded; sleep where there is nothing else to do."""
        if not self._engine.has_work and not self._scorings:
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

    def _write(self) -> None:
        if self._scorings:
            self._score()
        failure = self._try(self._engine.step) if self._engine.has_work else None
        for stream in list(self._streams):
            self._see_who_is_done(stream)
        if failure is not None:
            self._start_anew(failure)
        self._hand_over()

    def _hand_over(self) -> None:
        if self._outbox:
            outbox, self._outbox = self._outbox, []
            self._tell(outbox)

    def _try(self, make_pass: Callable[[], None]) -> "_Failure | None":
        """Make a pass. The exception of one that fails holds what the pass has allocated, and so is let go here."""
        self._pass_began = time.monotonic()
        try:
            make_pass()
        except Exception as error:
            self._metrics.failed_passes.inc()
            return _Failure(error)
        self._metrics.passes.inc()
        return None

    def _score(self) -> None:
        """A pass over the prompts of the request whose turn it is."""
        stream = next(iter(self._scorings))
        scoring = self._scorings.pop(stream)
        failure = None if scoring.is_done else self._try(scoring.step)
        if failure is not None:
            self._drop([stream], failure)
            self._probed_engine()
        elif not scoring.is_done:
            self._scorings[stream] = scoring
        else:
            found = dict(zip(_prompts(stream), scoring.scores(), strict=True))
            for index, request in enumerate(stream.requests):
                blocks = tuple(block.chars for block in found[str(request.prompt)].blocks)
                self._outbox.append((stream, index, Judged(blocks)))
            self._submit(stream, range(len(stream.requests)))

    def _start_anew(self, failure: "_Failure") -> None:
        """A pass of the engine has failed: tell those whose texts were in its cache; the others go on in a new one."""
        lost = set(self._engine.jobs)
        struck = [stream for stream in self._streams if not lost.isdisjoint(stream.jobs.values())]
        self._drop(struck or list(self._streams), failure)  # somebody, so that it does not fail again for ever
        self._engine = self._probed_engine()
        for stream in list(self._streams):
            self._submit(stream, list(stream.jobs))

    def _probed_engine(self) -> Engine:
        """A new engine that has made a pass.

        Raises:
            _Broken: it cannot.
        """
        gc.collect()
        engine = self._make_engine()
        probe = engine.submit(_PROBE)
        failure = self._try(engine.step)
        if failure is not None:
            raise _Broken(f"a new engine fails too, so nothing can be written; restart the server: {failure.text}")
        engine.cancel(probe)
        return engine

    def _drop(self, streams: list[Stream], failure: "_Failure") -> None:
        _log(f"a pass has failed, and with it {len(streams)} of the requests: {failure.text}")
        for stream in streams:
            self._refuse(stream, pass_failed(failure.kind))
        self._hand_over()

    def end(self) -> None:
        """Command: end."""
        self._is_ending = True

    def enter(self, stream: Stream) -> None:
        """Command: take up a request's texts."""
        if not stream.judges_prompts:
            self._submit(stream, range(len(stream.requests)))
            return
        engine, pairs = self._engine, [("", prompt) for prompt in _prompts(stream)]
        try:
            scoring = Scoring(
                engine.model,
                engine.tokenizer,
                engine.device,
                pairs,
                batch_slots=_SCORED_SLOTS,
                alternatives=stream.requests[0].alternatives,
            )
        except Exception as error:
            self._refuse_for(stream, error)
        else:
            self._scorings[stream] = scoring

    def leave(self, stream: Stream) -> None:
        """Command: let go of a request's texts."""
        if self._scorings.pop(stream, None) is not None:  # its texts have to end too
            self._submit(stream, range(len(stream.requests)))
        for job in stream.jobs.values():
            if not job.done:
                self._engine.cancel(job)

    def _submit(self, stream: Stream, indices: "range | list[int]") -> None:
        """Give texts to the engine."""
        self._streams[stream] = None
        try:
            for index in indices:
                stream.jobs[index] = self._engine.submit(stream.requests[index], partial(self._hear, stream, index))
        except Exception as error:
            self._refuse_for(stream, error)

    def _refuse_for(self, stream: Stream, error: Exception) -> None:
        """What a request asks for cannot be begun."""
        if isinstance(error, UserError):
            self._refuse(stream, ApiError(422, str(error)))
        else:
            self._drop([stream], _Failure(error))

    def _refuse(self, stream: Stream, error: ApiError) -> None:
        self.leave(stream)
        stream.jobs.clear()
        self._streams.pop(stream, None)
        self._outbox += [(stream, index, Failed(error)) for index in range(len(stream.requests))]

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
            if job.error is not None:
                failure = _Failure(job.error)
                _log(f"a text of a request has failed: {failure.text}")
                self._refuse(stream, text_failed(failure.kind))
                return
            if job.done:
                del stream.jobs[index]
                finish: str = job.generation.finish
                self._metrics.drafted.inc(job.generation.drafted)
                self._metrics.accepted.inc(job.generation.accepted)
                if finish == "cancelled" and stream.cancelled_for:
                    finish = stream.cancelled_for
                self._outbox.append((stream, index, Finished(job.generation, finish)))
        if not stream.jobs:
            self._streams.pop(stream)


class _Failure:
    """What is kept of a failed pass's exception: its kind, and a line about it and where it was raised."""

    def __init__(self, error: Exception):
        self.kind = type(error).__name__
        where = traceback.extract_tb(error.__traceback__)[-1]
        self.text = f"{self.kind}: {one_line(error)} ({where.filename}:{where.lineno})"


def _prompts(stream: Stream) -> list[str]:
    """The different ones."""
    return list(dict.fromkeys(str(request.prompt) for request in stream.requests))


def _log(line: str) -> None:
    print(f"tidal serve: {line}", file=sys.stderr, flush=True)
