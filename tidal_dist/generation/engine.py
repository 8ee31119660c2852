"""Continuous batching: sequences enter, are written side by side, and leave when they are done.

One pass feeds each sequence either [tokens of the block just finished, <bob>] or the char just chosen, and behind it,
with a draft, what is expected next. B sequences of a pass, T token and C char slots of each.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial

import numpy as np
import torch

from data_pipeline.errors import UserError
from data_pipeline.tokenizer import MixedTokenizer
from tidal_dist.devices import free_memory, is_small, one_thread
from tidal_dist.generation.cache import Cache, Glance
from tidal_dist.generation.draft import ByModel, Draft
from tidal_dist.generation.drafting import Drafting
from tidal_dist.generation.events import Generation
from tidal_dist.generation.exchange import Feed, answers
from tidal_dist.generation.job import Job
from tidal_dist.generation.passes import Eager, Graphs, PassInputs, are_few, fill, parts
from tidal_dist.generation.request import Request
from tidal_dist.generation.sequence import Listener, Writing
from tidal_dist.model.transformer import TidalTransformer

DEFAULT_BATCH_SIZE = 16
_PROMPT_TOKENS = 512  # tokens of a prompt that a pass takes from a sequence
_MASK_SLOTS = 2**25  # of a pass's mask: where there are many keys, a pass takes fewer tokens of a prompt
_FEW_TOKENS = 16  # more are fed apart from the sequences that are being written, which would be padded to as many
_DRAFTED_CHARS = 32  # chars that a pass takes from a sequence with a draft


class Engine:
    """Generates with a model and its tokeniser, any number of requests side by side. One thread may use it."""

    def __init__(
        self,
        model: TidalTransformer,
        tokenizer: MixedTokenizer,
        device: torch.device | str = "cpu",
        batch_size: int = DEFAULT_BATCH_SIZE,
        draft: Draft | None = None,
        shares_weights: bool = False,
        records_passes: bool = True,
        cache_bytes: int | None = None,
    ):
        """An engine without work.

        Args:
            batch_size: sequences that are written at a time; others wait.
            draft: how to guess what comes next, which changes the number of passes and not the text.
            shares_weights: other processes hold parts of the weights, so that each pass has to call every layer.
            cache_bytes: most that prompts may take of keys and values; none: half of what is free now.
            records_passes: on a GPU, as graphs, which is faster; then the model is not called at each pass.

        Raises:
            UserError: the draft is the model's, and that has no draft head.
        """
        self.model, self.tokenizer, self.device = model, tokenizer, torch.device(device)
        self.batch_size, self.draft = batch_size, draft
        self.jobs: list[Job] = []  # being written, in the order of the cache's rows
        self.jobs_of_pass: list[Job] = []  # those of the last pass
        self._waiting: deque[Job] = deque()
        self._most_chars = _DRAFTED_CHARS if draft else 1
        longest_run = tokenizer.segmentation.max_block_bytes + 1
        self._longest_run = longest_run
        room = 2 * longest_run + 2 * self._most_chars if draft else longest_run
        self._cache = Cache(room, not shares_weights, is_drafted=isinstance(draft, ByModel))
        self._cache_bytes = free_memory(str(self.device)) // 2 if cache_bytes is None else cache_bytes
        is_recorded = records_passes and not shares_weights and self.device.type == "cuda"
        runner = Graphs if is_recorded else Eager
        self._run: Eager | Graphs = runner(partial(model, past=self._cache), self._cache, self.device)
        self._is_turn_of_prompts = True
        self._is_small = self.device.type == "cpu" and not shares_weights and is_small(model)
        self._drafting: Drafting | None = None
        if isinstance(draft, ByModel):
            draft.check(model.config)
            drafts = runner(partial(model.draft, past=Glance(self._cache)), self._cache, self.device)
            self._drafting = Drafting(drafts, self._cache, model.config.char_positions, self._is_small)

    def submit(self, request: Request, listener: Listener | None = None) -> Job:
        """Take up a request; `listener` is told of its chars, blocks and text as they come.

        Raises:
            UserError: the prompt is too long for the memory.
        """
        positions = self.model.config.char_positions
        job = Job(request, Writing(request, self.tokenizer, positions, listener, self.draft))
        tokens = job.writing.prompt_tokens
        if (needed := self._bytes_of(1, tokens)) > self._cache_bytes:
            raise UserError(
                f"a prompt of {tokens:,} tokens needs {needed / 1e9:.1f} GB for keys and values on {self.device}, "
                f"{self._cache_bytes / 1e9:.1f} GB are there for them: shorten it, or use a device with more memory"
            )
        if not job.done:
            self._waiting.append(job)
        return job

    def cancel(self, job: Job) -> None:
        """End a request with what it has."""
        if not job.done:
            job.writing.cancel()

    @property
    def has_work(self) -> bool:
        """Whether a request is not done."""
        return any(not job.done for job in (*self.jobs, *self._waiting))

    def run(self, requests: Iterable[Request]) -> Iterator[Generation]:
        """Continue requests; the generations in their order, each as soon as those before it are done.

        Raises:
            as `Job.generation`, in the turn of one that has failed.
        """
        pending, source = deque[Job](), iter(requests)
        while True:
            while len(pending) - sum(job.done for job in pending) < 2 * self.batch_size:
                request = next(source, None)
                if request is None:
                    break
                pending.append(self.submit(request))
            while pending and pending[0].done:
                yield pending.popleft().generation
            if not pending:
                return
            self.step()

    @torch.inference_mode()
    def step(self) -> None:
        """One pass of the model, after those of its draft head where that drafts; without work too, since processes
        that share weights make equally many.

        An exception of the pass is raised; one that concerns a single request ends this alone, see `Job.error`.
        """
        self._leave_and_enter()
        was_training = self.model.training
        if was_training:  # to go through all modules takes as long as a small model's pass
            self.model.eval()
        rows = self._rows_of_pass()
        jobs = self.jobs_of_pass = self.jobs[rows]
        keys = _PROMPT_TOKENS + max((job.writing.cached_tokens for job in jobs), default=0)
        most_tokens = min(_PROMPT_TOKENS, _FEW_TOKENS + _MASK_SLOTS // (keys * max(len(jobs), 1)))
        rooms = [self._room(job.writing) for job in jobs]
        if self._drafting:
            self._drafting.draft(rows, jobs, rooms)
        feeds = [job.feed(most_tokens, room) for job, room in zip(jobs, rooms, strict=True)]
        with one_thread(self._is_small and are_few(feeds)):
            logits = self._pass(rows, [job.writing for job in jobs], feeds)
        for job, fed, answer in zip(jobs, feeds, answers(logits), strict=False):
            job.take(fed, answer)
        if was_training:
            self.model.train()

    def _leave_and_enter(self) -> None:
        for row in reversed(range(len(self.jobs))):
            if self.jobs[row].done:
                if self._is_followed(self.jobs[row]):
                    self.jobs[row] = self._waiting.popleft()
                    self.jobs[row].writing.skip_prompt()
                    continue
                last = self.jobs.pop()
                if row < len(self.jobs):
                    if last.writing.cached_tokens:  # else it was in no pass yet, and may have no row there
                        self._cache.copy(len(self.jobs), row)
                    self.jobs[row] = last
        self._cache.release(self._longest())
        held = list[Job]()
        while self._waiting and len(self.jobs) + len(held) < self.batch_size:
            job = self._waiting.popleft()
            if job.done:
                continue
            source = self._row_of_prompt(job)
            if source is not None and not self.jobs[source].writing.has_read_prompt:
                held.append(job)
                continue
            if not self._fits(job):  # in rows as long as it takes; when others leave, it will
                self._waiting.appendleft(job)
                break
            self.jobs.append(job)
            if source is not None:
                self._cache.reserve(len(self.jobs), job.writing.prompt_tokens)
                self._cache.copy(source, len(self.jobs) - 1)
                job.writing.skip_prompt()
        self._waiting.extendleft(reversed(held))

    def _fits(self, job: Job) -> bool:
        longest = max(self._longest(), job.writing.prompt_tokens)
        return not self.jobs or self._bytes_of(len(self.jobs) + 1, longest) <= self._cache_bytes

    def _longest(self) -> int:
        """Tokens of the longest of the sequences that are in."""
        return max((job.writing.cached_tokens + job.writing.tokens_to_feed for job in self.jobs), default=0)

    def _bytes_of(self, rows: int, tokens: int) -> int:
        """What a cache of so many sequences and tokens takes, keys and values alone."""
        config, number = self.model.config, self.model.output.weight.element_size()
        return rows * (tokens + self._cache.char_capacity) * 2 * config.n_layers * config.width * number

    def _row_of_prompt(self, job: Job) -> int | None:
        """Of the sequences one with the same prompt, where it is long: it has been read, or is to be read once."""
        return next((row for row, other in enumerate(self.jobs) if _have_long_prompt(job, other)), None)

    def _is_followed(self, job: Job) -> bool:
        """Whether the next in the queue can do with what a sequence that leaves has read."""
        while self._waiting and self._waiting[0].done:
            self._waiting.popleft()
        return bool(self._waiting) and job.writing.has_read_prompt and _have_long_prompt(self._waiting[0], job)

    def _rows_of_pass(self) -> slice:
        """All sequences; but where prompts are long, those from the first such on and those before it in turn."""
        long = [job.writing.tokens_to_feed > _FEW_TOKENS for job in self.jobs]
        first = long.index(True) if any(long) else 0
        self._is_turn_of_prompts = first == 0 or not self._is_turn_of_prompts
        return slice(first, len(self.jobs)) if self._is_turn_of_prompts else slice(0, first)

    def _room(self, writing: Writing) -> int:
        """Chars that a pass may take from a sequence, so that there is always room for the rest of its block."""
        free = self._cache.char_capacity - self._longest_run - writing.cached_chars
        return max(min(self._most_chars, free), 1)

    def _pass(self, rows: slice, writings: list[Writing], feeds: list[Feed]) -> np.ndarray:
        """The model's answers, (B, C, V), to what is fed."""
        fed = [(0 if f.tokens is None else len(f.tokens), len(f.chars)) for f in feeds] or [(0, 1)]
        most_tokens, most_chars = map(max, zip(*fed, strict=True))
        shape = b, t, _ = self._run.shape_of((len(fed), most_tokens, max(most_chars, 1)))
        counts = np.zeros((2, b), np.int64)
        for row, writing in enumerate(writings):
            counts[:, row] = writing.cached_tokens, writing.cached_chars
        kept_chars = counts[1].copy()
        counts[:, : len(fed)] += np.array(fed).T
        longest = max(int(counts[0].max()), 1)
        rows = slice(rows.start, rows.start + b)
        self._cache.reserve(rows.stop, longest)
        inputs = PassInputs.of_shape(rows, shape, longest)
        slots, targets, counts_of_pass = parts(inputs.flat, shape)
        counts_of_pass[:] = counts
        fill(slots, t, feeds, self.model.config.char_positions)
        targets[:] = self._cache.targets(rows, slots, t, kept_chars)
        return self._run(inputs).float().cpu().numpy()


def _have_long_prompt(one: Job, other: Job) -> bool:
    """Whether two requests have one prompt, which takes more than a pass of a char to read."""
    tokens = one.writing.prompt_tokens
    return tokens == other.writing.prompt_tokens > _FEW_TOKENS and one.request.prompt == other.request.prompt
