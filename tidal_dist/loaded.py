"""An exported model in a Python program: generate, stream, score."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import count
from pathlib import Path
from threading import Lock
from typing import Any, TypedDict, Unpack, overload

import torch

from tidal_dist.devices import available_device
from tidal_dist.errors import UserError
from tidal_dist.export.package import Exported, load_export
from tidal_dist.export.tensor_files import DTYPES
from tidal_dist.generation.constraint import constraint_of
from tidal_dist.generation.draft import draft_named
from tidal_dist.generation.engine import DEFAULT_BATCH_SIZE, Engine
from tidal_dist.generation.events import Event, Generation, Text
from tidal_dist.generation.prompts import check_prompt
from tidal_dist.generation.request import Limits, Request, requests_of
from tidal_dist.generation.sampling import SAMPLING_NAMES, Sampling
from tidal_dist.generation.scores import Score
from tidal_dist.generation.scoring import score

_GPU_TURN = Lock()  # of all models: while one records a pass, nothing else in the process may use a GPU


class Options(TypedDict, total=False):
    """How to continue a prompt; what is left out has the default of `Sampling`, `Limits` or none.

    max_bytes: a block with which the text would exceed them is dropped (256). max_blocks: the text ends after so many.
    stop: a string, or several, before the first of which the text ends.
    temperature: 0 takes the likeliest char each time (0); others draw. top_k, top_p, min_p: draw from the likeliest.
    repetition_penalty: makes blocks that the text has already less likely, if above 1.
    seed: equal seeds draw equal texts (0).
    regex: an expression that the whole continuation matches. choice: texts of which it is one. Either needs room:
        where `max_bytes` ends the text first, `finish` is "length".
    logprobs: so many of the likeliest alternatives are reported with each char.
    draft: "lookup" or "model": the same text in fewer passes, see docs/generation.md.
    """

    max_bytes: int
    max_blocks: int | None
    stop: str | Sequence[str]
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int
    regex: str | None
    choice: Sequence[str] | None
    logprobs: int
    draft: str | None


class Tidal:
    """An exported model, ready to write and to judge text.

    Several threads may use one at once: each call keeps what it computes to itself. On a GPU they take turns.

    Attributes:
        model: in evaluation mode, on `device`. tokenizer: its tokeniser. provenance: what it was trained on.
    """

    def __init__(self, exported: Exported, device: str = "cpu"):
        self.model, self.tokenizer, self.provenance = exported.model, exported.tokenizer, exported.provenance
        self.device = device
        self._turn = _turn_on(device)
        self._engines_kept = 1 if _is_gpu(device) else 0
        self._idle: dict[str | None, list[Engine]] = {}  # by their draft, with the passes that they have recorded

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.model.parameters())
        return f"<Tidal: {count:,} parameters of step {self.provenance.step}, on {self.device}>"

    @overload
    def generate(  # type: ignore[overload-overlap]
        self, prompts: str, *, n: None = None, **options: Unpack[Options]
    ) -> Generation: ...
    @overload
    def generate(self, prompts: str, *, n: int, **options: Unpack[Options]) -> list[Generation]: ...
    @overload
    def generate(
        self, prompts: Sequence[str], *, n: int | None = None, **options: Unpack[Options]
    ) -> list[Generation]: ...
    def generate(
        self, prompts: str | Sequence[str], *, n: int | None = None, **options: Unpack[Options]
    ) -> Generation | list[Generation]:
        """Continue a prompt, or several side by side; each gets what it would get alone.

        A `Generation` has `.text`, `.finish` ("eos", "length" or "stop"), `.blocks`, `.logprob` and `.details`: how
        each block was written, char by char.

        Args:
            prompts: a text, or several.
            n: continuations of each prompt, for which a temperature above 0 makes sense; all of the first prompt come
                first. Continuation k of all draws with seed + k.
            options: see `Options`.

        Returns:
            one generation for one prompt without `n`, else a list.

        Raises:
            UserError: an option or a prompt is wrong.
        """
        if n is not None and n < 1:
            raise UserError(f"n {n}: must be at least 1")
        given = [prompts] if isinstance(prompts, str) else list(prompts)
        requests = list(self.requests([prompt for prompt in given for _ in range(n or 1)], **options))
        with self._lent_engine(options.get("draft")) as engine, self._turn:
            generations = list(engine.run(requests))
        return generations[0] if isinstance(prompts, str) and n is None else generations

    @overload
    def stream(self, prompt: str, **options: Unpack[Options]) -> Iterator[str]: ...
    @overload
    def stream(self, prompt: str, *, events: bool, **options: Unpack[Options]) -> Iterator[Event]: ...
    def stream(self, prompt: str, *, events: bool = False, **options: Unpack[Options]) -> Iterator[Any]:
        """Continue a prompt, and hand the text out piece by piece: `for piece in tidal.stream("The"): ...`.

        A piece is a block or more: a block is written from its end, so there is nothing to show before it is whole; and
        what may turn out to begin a stop string waits. Joined, the pieces are `generate(...).text`.

        Args:
            events: instead of text, all that happens: each `Char` as it is written, each finished `Block`, and each
                `Text` that may be shown.
        """
        (request,) = self.requests([prompt], **options)
        happened = self._events(request, options.get("draft"))
        return happened if events else (event.text for event in happened if isinstance(event, Text))

    def _events(self, request: Request, draft: str | None) -> Iterator[Event]:
        events: list[Event] = []
        with self._lent_engine(draft) as engine:
            job = engine.submit(request, events.append)
            while not job.done:
                with self._turn:
                    engine.step()
                yield from events
                events.clear()
            if job.error is not None:
                raise job.error

    @overload
    def score(self, context: str, continuation: str, *, ends: bool = False) -> Score: ...
    @overload
    def score(self, context: Sequence[tuple[str, str]], *, ends: bool = False) -> list[Score]: ...
    def score(
        self, context: str | Sequence[tuple[str, str]], continuation: str | None = None, *, ends: bool = False
    ) -> Score | list[Score]:
        """How likely the model finds a text after a context: `tidal.score("12 + 34 =", " 46").logprob`.

        The likelihood is that of the text's blocks, their end marks included. A `Score` has `.logprob` (nats),
        `.bits_per_byte`, `.is_greedy` and `.blocks` with the logprob of every char.

        Args:
            context: what stands before the text, perhaps nothing; or a list of pairs (context, text).
            ends: judge the text as one that ends there; otherwise it may go on after its last block.

        Raises:
            UserError: a text is not UTF-8.
        """
        if not isinstance(context, str):
            return self._scores(context, ends)
        if continuation is None:
            raise UserError("score takes a context and a continuation, or a list of such pairs")
        return self._scores([(context, continuation)], ends)[0]

    def _scores(self, pairs: Sequence[tuple[str, str]], ends: bool) -> list[Score]:
        with self._turn:
            return score(self.model, self.tokenizer, self.device, pairs, ends)

    def engine(self, batch_size: int = DEFAULT_BATCH_SIZE, draft: str | None = None) -> Engine:
        """An engine without work, of one's own. On a GPU, no other thread may use the model while it makes a pass."""
        return Engine(self.model, self.tokenizer, self.device, batch_size, draft_named(draft, self.model.config))

    @contextmanager
    def _lent_engine(self, draft: str | None) -> Iterator[Engine]:
        """An engine for one call. One that failed, or whose text was left unfinished, is not used again."""
        idle = self._idle.setdefault(draft, [])
        try:
            engine = idle.pop()
        except IndexError:
            engine = self.engine(draft=draft)
        yield engine
        if len(idle) < self._engines_kept:
            idle.append(engine)

    def requests(self, prompts: Sequence[str], **options: Unpack[Options]) -> Iterator[Request]:
        """A request for each prompt; the k-th draws with seed + k.

        Raises:
            UserError: an option or a prompt is wrong.
        """
        unknown = sorted(set(options) - set(Options.__annotations__))
        if unknown:
            raise UserError(f"{unknown[0]}: no such option; there are {', '.join(Options.__annotations__)}")
        draft_named(options.get("draft"), self.model.config)
        stop = options.get("stop", ())
        sampling = Sampling(**{name: options[name] for name in SAMPLING_NAMES if name in options})  # type: ignore[literal-required]
        limits = Limits(
            options.get("max_bytes", Limits.max_bytes),
            options.get("max_blocks"),
            (stop,) if isinstance(stop, str) else tuple(stop),
        )
        most = self.tokenizer.segmentation.max_block_bytes
        constraint = constraint_of(options.get("regex"), options.get("choice"), most)
        like = Request("", sampling, limits, constraint, options.get("logprobs", 0))
        yield from requests_of(map(_checked, prompts, count()), like)


def _is_gpu(device: str) -> bool:
    return torch.device(device).type == "cuda"


def _turn_on(device: str) -> AbstractContextManager[Any]:
    return _GPU_TURN if _is_gpu(device) else nullcontext()


def _checked(prompt: Any, number: int) -> str:
    if not isinstance(prompt, str):
        raise UserError(f"prompt {number}: a {type(prompt).__name__}; give a text")
    return check_prompt(prompt, f"prompt {number}")


def open_export(path: str | Path, device: str, dtype: str | torch.dtype | None) -> Tidal:
    """What `tidal_dist.load` does."""
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise UserError(f"dtype {dtype}: choose from {', '.join(DTYPES)}")
    found = available_device(device, "device")
    exported = load_export(path, DTYPES[dtype] if isinstance(dtype, str) else dtype)
    with _turn_on(found):
        exported.model.to(found)
    return Tidal(exported, found)
