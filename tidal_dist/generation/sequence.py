"""One sequence at work: what it has written, what it feeds to the next pass, what it makes of the answer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from data_pipeline.layout import CharPositions, bos_slot, char_position, token_slots
from data_pipeline.pieces import reverse_block
from data_pipeline.segmentation import off_canonical_joins, segment
from data_pipeline.tokenizer import BOB, EOB, EOS, MixedTokenizer
from tidal_dist.generation.cache import side_by_side, slots_of
from tidal_dist.generation.draft import Draft, Expected
from tidal_dist.generation.events import Block, Char, Event, Generation, Text
from tidal_dist.generation.exchange import Answer, CharInput, Feed
from tidal_dist.generation.repetition import WrittenBlocks
from tidal_dist.generation.request import Request
from tidal_dist.generation.sampling import choose, penalised
from tidal_dist.generation.stops import Ending
from tidal_dist.generation.utf8 import allowed, block_text

Listener = Callable[[Event], None]


@dataclass
class _Block:
    """The block at hand: its bytes as written, last byte first, and what was chosen for them."""

    written: bytearray = field(default_factory=bytearray)
    chars: list[Char] = field(default_factory=list)
    is_held_back: bool = False  # from an id that is not allowed


class Writing:
    """A request at work.

    Attributes:
        generation: what has come of it. is_finished: nothing is left to do.
        cached_tokens: tokens whose keys and values stay. cached_chars: chars that do. prompt_tokens: `<bos>` and the
            prompt's.
    """

    def __init__(
        self,
        request: Request,
        tokenizer: MixedTokenizer,
        char_positions: CharPositions,
        listener: Listener | None = None,
        draft: Draft | None = None,
    ):
        self.request, self.generation = request, Generation()
        self.is_finished = request.limits.max_blocks == 0
        self.cached_tokens = self.cached_chars = 0
        self._tokenizer, self._char_positions = tokenizer, char_positions
        self._tell: Listener = listener or (lambda _: None)
        self._random = np.random.default_rng(request.sampling.seed)
        self._state = request.constraint.start() if request.constraint else None
        self._n_blocks, self._n_tokens, self._shown, self._n_bytes = 0, 1, 0, 0  # `<bos>` is there already
        self._block = _Block()
        self._endings = list(map(Ending, request.limits.stop))
        prompt = request.prompt
        blocks = segment(prompt, tokenizer.segmentation) if isinstance(prompt, str) else prompt
        self._draft = draft.begin(blocks) if draft else None
        self._seen = WrittenBlocks(blocks) if request.sampling.repetition_penalty != 1.0 else None
        self._new_tokens: np.ndarray | None = np.concatenate([side_by_side(bos_slot()), self._take(blocks)])
        self.prompt_tokens = len(self._new_tokens)

    @property
    def tokens_to_feed(self) -> int:
        """Tokens that have to be fed before the next char can be chosen."""
        return 0 if self._new_tokens is None else len(self._new_tokens)

    @property
    def has_read_prompt(self) -> bool:
        """Whether the whole prompt is in the cache."""
        return self.cached_tokens >= self.prompt_tokens

    def skip_prompt(self) -> None:
        """Take the prompt for read: its keys and values came from a sequence that has read the same."""
        self._new_tokens, self.cached_tokens = None, self.prompt_tokens

    def _take(self, blocks: Sequence[str]) -> np.ndarray:
        """Slots (t, F) of finished blocks, which become context."""
        slots = self._slots_of(blocks, self._n_blocks, self._n_tokens)
        self._n_blocks += len(blocks)
        self._n_tokens += len(slots)
        return slots

    def _slots_of(self, blocks: Sequence[str], first_block: int, start_pos: int) -> np.ndarray:
        encoded = [self._tokenizer.encode_block(block) for block in blocks]
        ids = np.array([i for block in encoded for i in block], dtype=np.int64)
        sizes = np.array([len(block) for block in encoded], dtype=np.int64)
        lengths = self._tokenizer.byte_lengths[ids]
        return side_by_side(token_slots(ids, sizes, lengths, first_block=first_block, start_pos=start_pos))

    def feed(self, most_tokens: int, room: int) -> Feed:
        """What the next pass takes from this sequence.

        Args:
            most_tokens: where more have to be fed, so many come without a char, at the border of a block.
            room: chars that the pass may take from it, at least 1.
        """
        tokens, self._new_tokens = self._new_tokens, None
        if tokens is not None and len(tokens) > most_tokens:
            cut = self._border(tokens, most_tokens)
            self._new_tokens = tokens[cut:]
            return Feed(tokens[:cut], [])
        chars = [self._next_char()]
        return self._with_draft(tokens, chars, room) if self._draft and room > 1 else Feed(tokens, chars)

    @staticmethod
    def _border(tokens: np.ndarray, most: int) -> int:
        """Where to cut tokens, before `most`: a block is fed whole, since its tokens see each other."""
        block = slots_of("token", tokens).block
        starts = np.flatnonzero(np.diff(block[: most + 1])) + 1
        return int(starts[-1]) if len(starts) else int(np.searchsorted(block, block[0], side="right"))

    def _next_char(self) -> CharInput:
        written = self._block.written
        c = len(written)
        return (written[-1] if c else BOB), c, self._n_blocks, self._n_tokens

    def _with_draft(self, tokens: np.ndarray | None, chars: list[CharInput], room: int) -> Feed:
        """Behind the next char those that the draft expects, and the tokens of blocks that it expects whole."""
        assert self._draft is not None
        parts, drafted_tokens = [] if tokens is None else [tokens], []
        block, start_pos, last = self._n_blocks, self._n_tokens, b""
        for number, expected in enumerate(self._draft.propose(bytes(self._block.written))):
            if number:
                slots = self._slots_of([block_text(last)], block, start_pos)
                parts.append(slots)
                drafted_tokens.append(len(slots))
                block, start_pos = block + 1, start_pos + len(slots)
                chars.append((BOB, 0, block, start_pos))
            done = 0 if number else len(self._block.written)
            chars += [(id_, c, block, start_pos) for c, id_ in enumerate(expected[done:], done + 1)]
            last = expected
            if len(chars) + 2 > room:  # a block more takes `<bob>` and a byte
                break
        del chars[room:]
        return Feed(np.concatenate(parts) if parts else None, chars, drafted_tokens)

    def feed_draft(self, room: int) -> Feed:
        """The block at hand, `<bob>` first, as far as it is written and drafted; nothing where it is to go no further.

        Args:
            room: chars that the pass that checks the draft may take.
        """
        written = bytes(self._block.written)
        if not written or self.is_finished:
            return Feed(None, [])
        assert isinstance(self._draft, Expected)
        expected = self._draft.begun_with(written)
        most = min(len(written) + room - 1, self._tokenizer.segmentation.max_block_bytes)
        if self._draft.is_whole or len(expected) >= most:
            return Feed(None, [])
        return Feed(None, [(id_, c, self._n_blocks, self._n_tokens) for c, id_ in enumerate([BOB, *expected])])

    def take_draft(self, logits: np.ndarray) -> None:
        """Expect next what is likeliest by logits (V,) of the ids that may come."""
        assert isinstance(self._draft, Expected)
        self.generation.draft_passes += 1
        may_come = self._allowed(self._draft.block)
        self._draft.expect(int(np.where(may_come, logits, -np.inf).argmax()))

    def take(self, fed: Feed, answer: Answer) -> None:
        """Go on with the model's answer to the n chars that were fed."""
        self.generation.passes += 1
        self.generation.drafted += max(len(fed.chars) - 1, 0)
        self.cached_tokens += (0 if fed.tokens is None else len(fed.tokens)) - sum(fed.drafted_tokens)
        number, drafted_tokens = 0, iter(fed.drafted_tokens)
        for number in range(1, len(fed.chars) + 1):
            self._write(self._choose(answer, number - 1))
            if self.is_finished or number == len(fed.chars) or fed.chars[number] != self._next_char():
                break
            self.generation.accepted += 1
            if fed.chars[number][0] == BOB:  # the tokens of the finished block were fed too
                self._new_tokens = None
                self.cached_tokens += next(drafted_tokens)
        self.cached_chars = self.cached_chars + number if self._block.written else 0

    def _allowed(self, written: bytes) -> np.ndarray:
        """Ids that may come when so much of the block at hand is written, (V,) bool."""
        most = self._tokenizer.segmentation.max_block_bytes
        may_come = allowed(written, most)
        constraint = self.request.constraint
        return may_come & constraint.allowed(self._state, written, most - len(written)) if constraint else may_come

    def _choose(self, answer: Answer, number: int) -> Char:
        """The next char by the answer to char `number` of those that were fed."""
        sampling, row = self.request.sampling, answer.logits[number]
        may_come = self._allowed(bytes(self._block.written))
        likeliest, total = answer.likeliest[number], answer.totals[number]
        self._block.is_held_back |= not may_come[likeliest]
        if sampling.temperature == 0.0 and not self._seen and may_come[likeliest]:
            chosen = likeliest
        else:
            scores = row
            if self._seen:
                repeating = self._seen.next_ids(bytes(self._block.written))
                scores = penalised(row, repeating, sampling.repetition_penalty)
            chosen = choose(np.where(may_come, scores, -np.inf), sampling, self._random)
        count = self.request.alternatives
        ids = np.argsort(-row, kind="stable")[:count].tolist() if count else ()
        return Char(chosen, float(row[chosen]) - total, tuple((i, float(row[i]) - total) for i in ids))

    def _write(self, char: Char) -> None:
        self._block.chars.append(char)
        self._tell(char)
        if char.id < 256:
            self._block.written.append(char.id)
            return
        assert char.id in (EOB, EOS), "only bytes and end marks are allowed"
        self._finish_block(char.id == EOS)

    def _finish_block(self, is_last: bool) -> None:
        done, self._block = self._block, _Block()
        limits, generation = self.request.limits, self.generation
        if self._n_bytes + len(done.written) > limits.max_bytes:
            self._finish("length")
            return
        block = self._as_context(done)
        generation.details.append(block)
        generation.ill_formed_blocks += done.is_held_back
        generation.text += block.text
        self._n_bytes += len(done.written)
        self._tell(block)
        if self.request.constraint:
            self._state = self.request.constraint.after(self._state, reverse_block(bytes(done.written)))
        for reader in (self._draft, self._seen):
            if reader:
                reader.add(block.text)
        for ending in self._endings:
            ending.read(block.text)
        is_full = limits.max_blocks is not None and len(generation.details) >= limits.max_blocks
        if self._stops():
            self._finish("stop")
        elif is_last or is_full or self._n_bytes >= limits.max_bytes:
            self._finish("eos" if is_last else "length")
        else:
            held_back = max((ending.length for ending in self._endings), default=0)
            self._show(len(generation.text) - held_back)

    def _as_context(self, done: _Block) -> Block:
        """Turn a block round; its tokens are fed next."""
        text, start_pos = block_text(bytes(done.written)), self._n_tokens
        self._new_tokens = self._take([text])
        ids = tuple(slots_of("token", self._new_tokens).ids.tolist())
        names = tuple(map(self._tokenizer.name, ids))
        positions = tuple(char_position(start_pos, c, self._char_positions) for c in range(len(done.written) + 1))
        return Block(text, tuple(done.chars), ids, names, start_pos, positions)

    def _stops(self) -> bool:
        """Whether the text now holds a stop string, before which it is cut."""
        generation, stop = self.generation, self.request.limits.stop
        found = [at for s in stop if (at := generation.text.find(s, max(self._shown - len(s), 0))) >= 0]
        if found:
            generation.text = generation.text[: min(found)]
        return bool(found)

    def _show(self, end: int) -> None:
        if end > self._shown:
            self._tell(Text(self.generation.text[self._shown : end]))
            self._shown = end

    def _finish(self, reason: str) -> None:
        self.is_finished = True
        self.generation.finish = reason
        self._show(len(self.generation.text))
        joins = off_canonical_joins(self.generation.blocks, self._tokenizer.segmentation)
        self.generation.off_canonical_joins = joins

    def cancel(self) -> None:
        """End here, with the text so far."""
        if not self.is_finished:
            self._finish("cancelled")
