"""What the server's paths ask: completions and scores of one model."""

import asyncio
import time
from collections.abc import Callable

from data_pipeline.tokenizer import MixedTokenizer
from tidal_dist.errors import UserError
from tidal_dist.generation.constraint import constraint_of
from tidal_dist.generation.engine import Engine
from tidal_dist.generation.request import Constraint
from tidal_dist.generation.server.completions import Completion, check_limits, engine_requests
from tidal_dist.generation.server.errors import ApiError, timed_out
from tidal_dist.generation.server.metrics import Metrics
from tidal_dist.generation.server.schema import CompletionRequest
from tidal_dist.generation.server.settings import ServerSettings
from tidal_dist.generation.server.worker import Worker


class Service:
    """One model, served. Belongs to the event loop."""

    def __init__(self, make_engine: Callable[[], Engine], tokenizer: MixedTokenizer, settings: ServerSettings):
        """A service without work.

        Args:
            make_engine: a new engine of the model, at the start and after a pass that failed.
        """
        self.settings, self.metrics = settings, Metrics()
        self.worker = Worker(make_engine, self.metrics, settings.max_texts)
        self.started = int(time.time())
        self._tokenizer = tokenizer
        self._held_texts = 0  # whose constraint is being made

    async def complete(self, asked: CompletionRequest) -> Completion:
        """Begin to answer.

        Raises:
            ApiError: it asks for too much (400, 404, 422), or not now (429, 503).
        """
        check_limits(asked, self.settings)
        texts = len(asked.prompt) * asked.n
        self.worker.check_open(texts + self._held_texts)
        self._held_texts += texts
        try:
            constraint = await self._constraint(asked)
        finally:
            self._held_texts -= texts
        stream = self.worker.submit(
            engine_requests(asked, constraint, self.settings),
            self.settings.timeout_seconds,
            wants_chars=asked.stream and asked.trace,
            judges_prompts=asked.judges_prompt,
        )
        return Completion(asked, stream, self._tokenizer, self.settings)

    def close_soon(self) -> None:
        """Take nothing up any more; for a signal's handler, so on the loop's own time."""
        self.worker.close_soon(self.settings.grace_seconds)

    async def _constraint(self, asked: CompletionRequest) -> Constraint | None:
        """What the texts are held to. An expression can take seconds, in a thread that is not waited for any longer."""
        if asked.regex is None and asked.choice is None:
            return None
        most = self._tokenizer.segmentation.max_block_bytes
        try:
            async with asyncio.timeout(self.settings.timeout_seconds):
                return await asyncio.to_thread(constraint_of, asked.regex, asked.choice, most)
        except TimeoutError:
            raise timed_out(self.settings.timeout_seconds) from None
        except UserError as error:
            field = "regex" if asked.choice is None else "choice"
            raise ApiError(422, f"{field}: {error}", field) from None
