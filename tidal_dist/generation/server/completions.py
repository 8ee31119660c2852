"""A completion from its request to its last byte, whole or in pieces."""

import json
import random
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any

from data_pipeline.tokenizer import MixedTokenizer
from tidal_dist.generation.events import Block, Char, Text
from tidal_dist.generation.request import DEFAULT_LIMITS, Constraint, Limits, Request
from tidal_dist.generation.sampling import SAMPLING_NAMES, Sampling
from tidal_dist.generation.server import answers
from tidal_dist.generation.server.errors import ApiError, stopping, timed_out
from tidal_dist.generation.server.schema import MAX_SEED, CompletionRequest
from tidal_dist.generation.server.settings import ServerSettings
from tidal_dist.generation.server.stream import Event, Finished, Judged, Stream


def check_limits(asked: CompletionRequest, settings: ServerSettings) -> None:
    """Compare a request with what the server allows.

    Raises:
        ApiError: 404 for another model, 400 for too much of something.
    """
    if asked.model != settings.model:
        message = f"no model {asked.model[:100]!r} here; this server has {settings.model!r}"
        raise ApiError(404, message, "model", "model_not_found")
    longest = max(len(prompt.encode()) for prompt in asked.prompt)
    if longest > settings.max_prompt_bytes:
        message = f"prompt: {longest:,} bytes; at most {settings.max_prompt_bytes:,}; shorten it"
        raise ApiError(400, message, "prompt", "context_length_exceeded")
    if (asked.max_tokens or 0) > settings.max_bytes_limit:
        message = f"max_tokens: {asked.max_tokens:,}; at most {settings.max_bytes_limit:,} bytes here"
        raise ApiError(400, message, "max_tokens", "max_tokens_exceeded")
    if len(asked.prompt) * asked.n > settings.max_texts:
        message = f"n: {len(asked.prompt)} prompts times {asked.n} are more than the {settings.max_texts} texts allowed"
        raise ApiError(400, message, "n", "too_many_texts")


def engine_requests(asked: CompletionRequest, constraint: Constraint | None, settings: ServerSettings) -> list[Request]:
    """Each prompt's n texts. Text i of all samples with `seed + i`."""
    stop = tuple(asked.stop)
    if asked.max_tokens == 0:
        limits = Limits(max_blocks=0)
    else:
        limits = Limits(asked.max_tokens or min(DEFAULT_LIMITS.max_bytes, settings.max_bytes_limit), stop=stop)
    seed = random.randrange(2**32) if asked.seed is None else asked.seed
    prompts = [prompt for prompt in asked.prompt for _ in range(asked.n)]
    return [
        Request(prompt, _sampling(asked, (seed + i) % (MAX_SEED + 1)), limits, constraint, asked.logprobs or 0)
        for i, prompt in enumerate(prompts)
    ]


def _sampling(asked: CompletionRequest, seed: int) -> Sampling:
    return Sampling(**{name: getattr(asked, name) for name in SAMPLING_NAMES} | {"seed": seed})


class _Text:
    """One of an answer's texts, behind its prompt where that is echoed, as far as it is shown."""

    def __init__(self, index: int, alternatives: int | None, tokenizer: MixedTokenizer):
        self._index, self._prompt, self._shown = index, "", ""
        self._logprobs = None if alternatives is None else answers.Logprobs(tokenizer, alternatives)

    def begin_with(self, prompt: str, blocks: Iterable[Sequence[Char]] = ()) -> None:
        """Echo a prompt, and keep its blocks' log-probabilities for when it is shown."""
        self._prompt = prompt
        for chars in blocks:
            self.take_up(chars)

    def take_up(self, chars: Sequence[Char]) -> None:
        """Keep a finished block's log-probabilities for when its text is shown."""
        if self._logprobs is not None:
            self._logprobs.add(chars)

    def show(self, text: str, finish: str | None = None) -> dict[str, Any]:
        """The next piece, as one of OpenAI's choices. `finish`: the engine's word, where it is the last."""
        self._shown += text
        logprobs = None if self._logprobs is None else self._logprobs.take(text)
        return answers.choice(self._index, text, logprobs, finish)

    def show_prompt(self) -> dict[str, Any]:
        """The first piece, where the prompt is echoed."""
        return self.show(self._prompt)

    def show_rest(self, finished: Finished, stream: Stream) -> dict[str, Any]:
        """The last piece: what of the text has not been shown."""
        last = self.show((self._prompt + finished.generation.text)[len(self._shown) :], finished.finish)
        return last | {"timing": answers.timing(stream.accepted, stream.begun.get(self._index))}


class Completion:
    """One request's answer."""

    def __init__(self, asked: CompletionRequest, stream: Stream, tokenizer: MixedTokenizer, settings: ServerSettings):
        self.stream = stream
        self._asked, self._tokenizer, self._settings = asked, tokenizer, settings
        self._texts = [_Text(i, asked.logprobs, tokenizer) for i in range(len(stream.requests))]
        self._head = answers.head(settings.model)
        self._written_bytes = 0
        self._finishes: list[str] = []
        self._echoes_at_once = asked.echo and not asked.judges_prompt
        if self._echoes_at_once:
            for index, text in enumerate(self._texts):
                text.begin_with(self._prompt(index))

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece.

        Raises:
            ApiError: nothing of it could be written.
        """
        choices: dict[int, dict[str, Any]] = {}
        tides: list[list[dict[str, Any]]] = [[] for _ in self._texts]
        async for index, event in self.stream.events():
            if isinstance(event, Judged):
                self._texts[index].begin_with(self._prompt(index), event.blocks)
            elif isinstance(event, Block):
                self._texts[index].take_up(event.chars)
                tides[index].append(answers.block_object(self._tokenizer, event, with_chars=True))
            elif isinstance(event, Finished):
                self._count(event)
                choices[index] = self._texts[index].show_rest(event, self.stream)
        for index, found in choices.items():
            if self._asked.trace:
                found["tide"] = tides[index]
        ordered = [choices[index] for index in sorted(choices)]
        return self._head | {"choices": ordered, "usage": self._usage()}

    async def pieces(self) -> AsyncIterator[str]:
        """The answer as server-sent events; an error is the last one."""
        try:
            if self._echoes_at_once:
                for text in self._texts:
                    yield self._chunk([text.show_prompt()])
            async for index, event in self.stream.events():
                for piece in self._pieces_of(index, event):
                    yield self._chunk([piece])
            options = self._asked.stream_options
            if options is not None and options.include_usage:
                yield self._chunk([], usage=self._usage())
            yield "data: [DONE]\n\n"
        except ApiError as error:
            yield f"data: {json.dumps(error.as_object())}\n\n"

    def _prompt(self, index: int) -> str:
        return self._asked.prompt[index // self._asked.n]

    def _pieces_of(self, index: int, event: Event) -> list[dict[str, Any]]:
        """What an event adds to the answer."""
        text = self._texts[index]
        if isinstance(event, Finished):
            self._count(event)
            return [text.show_rest(event, self.stream)]
        if isinstance(event, Text):
            return [text.show(event.text)] if event.text else []
        if isinstance(event, Judged):
            text.begin_with(self._prompt(index), event.blocks)
            return [text.show_prompt()]
        if isinstance(event, Block):
            text.take_up(event.chars)
        if not self._asked.trace or not isinstance(event, Block | Char):
            return []
        tide = answers.event_object(self._tokenizer, event)
        return [answers.choice(index, "", None, None) | {"tide": tide}]

    def _count(self, event: Finished) -> None:
        """Note how a text has ended.

        Raises:
            ApiError: it was the last one, and nothing was written because the time was over or the server is stopping.
        """
        self._written_bytes += len(event.generation.text.encode())
        self._finishes.append(event.finish)
        if self.stream.begun or len(self._finishes) < len(self._texts):
            return
        if "timeout" in self._finishes:
            raise timed_out(self._settings.timeout_seconds)
        if "shutdown" in self._finishes:
            raise stopping()

    def _usage(self) -> dict[str, int]:
        return answers.usage(sum(len(p.encode()) for p in self._asked.prompt), self._written_bytes)

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> str:
        return f"data: {json.dumps(self._head | {'choices': choices} | more, ensure_ascii=False)}\n\n"
