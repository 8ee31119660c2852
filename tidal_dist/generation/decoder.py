"""Generation block by block: the chars of a block from its end, then its tokens, then the next block.

One pass feeds, for each sequence, either [tokens of the block just finished, <bob>] or the char just chosen.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from data_pipeline.layout import Slots, bos_slot, char_slots, concatenate, padding, stack, token_slots
from data_pipeline.segmentation import off_canonical_joins, segment
from data_pipeline.tokenizer import BOB, EOB, EOS, MixedTokenizer
from tidal_dist.generation.cache import Cache
from tidal_dist.generation.sampling import GREEDY, Sampling, choose
from tidal_dist.generation.utf8 import allowed, block_text
from tidal_dist.model.transformer import TidalTransformer


@dataclass(frozen=True)
class Limits:
    """Where a generation ends, beside `<eos>`: before the text would exceed `max_bytes`, or after `max_blocks`."""

    max_bytes: int = 256
    max_blocks: int | None = None


DEFAULT_LIMITS = Limits()


@dataclass
class Generation:
    """What was generated after one prompt.

    Attributes:
        text: the continuation. blocks: its blocks. finish: "eos" or "length".
        off_canonical_joins: borders that segmenting `text` anew would not set or would add.
        ill_formed_blocks: blocks that would have come out ill-formed if the likeliest id were taken without a mask.
        trace: one entry a block: chars in generation order, text, tokens, positions.
    """

    text: str = ""
    blocks: list[str] = field(default_factory=list)
    finish: str = "length"
    off_canonical_joins: int = 0
    ill_formed_blocks: int = 0
    trace: list[dict[str, Any]] = field(default_factory=list)


class _Sequence:
    """One sequence at work: what it has written and what it feeds to the next pass."""

    def __init__(self, blocks: Sequence[str], decoder: "Decoder", sampling: Sampling, limits: Limits):
        self._decoder, self._limits = decoder, limits
        self.sampling = sampling
        self.generator = torch.Generator().manual_seed(sampling.seed)
        self.result = Generation()
        self.finished = limits.max_blocks == 0
        self._n_blocks, self._n_tokens = 0, 1  # `<bos>` stands before the first block
        self._written = bytearray()
        self._positions: list[int] = []
        self._is_held_back = False  # in the block at hand, from an id that is not allowed
        self._new_tokens: Slots | None = concatenate([bos_slot(), self._take(blocks)])

    def _take(self, blocks: Sequence[str]) -> Slots:
        """Slots of finished blocks, which become context."""
        tokenizer = self._decoder.tokenizer
        encoded = [tokenizer.encode_block(block) for block in blocks]
        ids = np.array([i for block in encoded for i in block], dtype=np.int64)
        slots = token_slots(
            ids,
            np.array([len(block) for block in encoded], dtype=np.int64),
            tokenizer.byte_lengths[ids],
            first_block=self._n_blocks,
            start_pos=self._n_tokens,
        )
        self._n_blocks += len(blocks)
        self._n_tokens += len(ids)
        return slots

    def feed(self) -> tuple[Slots | None, Slots]:
        """The tokens, if any, and the one char that the next pass takes from this sequence."""
        if self.finished:
            return None, padding("char", 1)
        tokens, self._new_tokens = self._new_tokens, None
        c = len(self._written)
        char = char_slots(
            np.array([BOB if c == 0 else self._written[-1]]),
            np.array([c]),
            np.array([self._n_blocks]),
            np.array([self._n_tokens]),
            self._decoder.model.config.char_positions,
        )
        self._positions.append(int(char.position[0]))
        return tokens, char

    def allowed(self) -> np.ndarray:
        """Ids that may come next."""
        return allowed(bytes(self._written), self._decoder.max_block_bytes)

    def take(self, chosen: int, likeliest_is_allowed: bool) -> None:
        """Go on with the id that was chosen."""
        self._is_held_back |= not likeliest_is_allowed
        if chosen < 256:
            self._written.append(chosen)
            return
        assert chosen in (EOB, EOS), "only bytes and end marks are allowed"
        self._finish_block(chosen == EOS)

    def _finish_block(self, is_last: bool) -> None:
        block = block_text(bytes(self._written))
        chars, self._written = bytes(self._written), bytearray()
        positions, self._positions = self._positions, []
        was_held_back, self._is_held_back = self._is_held_back, False
        result = self.result
        if len(result.text.encode()) + len(chars) > self._limits.max_bytes:
            self.finished = True
            return
        result.text += block
        result.blocks.append(block)
        result.ill_formed_blocks += was_held_back
        start_pos = self._n_tokens
        self._new_tokens = tokens = self._take([block])
        result.trace.append(
            {
                "chars": [bytes([c]).decode(errors="backslashreplace") for c in chars],
                "block": block,
                "end": "<eos>" if is_last else "<eob>",
                "tokens": [self._decoder.tokenizer.name(i) for i in tokens.ids],
                "char_positions": positions,
                "token_positions": list(range(start_pos, self._n_tokens)),
            }
        )
        if is_last:
            result.finish = "eos"
        full = self._limits.max_blocks is not None and len(result.blocks) >= self._limits.max_blocks
        self.finished = is_last or full or len(result.text.encode()) >= self._limits.max_bytes


class Decoder:
    """Generates with a model and its tokeniser. Holds no state between calls."""

    def __init__(self, model: TidalTransformer, tokenizer: MixedTokenizer, device: torch.device | str = "cpu"):
        self.model, self.tokenizer, self.device = model, tokenizer, device
        self.max_block_bytes = tokenizer.segmentation.max_block_bytes

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[str | Sequence[str]],
        sampling: Sampling | Sequence[Sampling] = GREEDY,
        limits: Limits = DEFAULT_LIMITS,
        any_unfinished: Callable[[bool], bool] = bool,
    ) -> list[Generation]:
        """Continue every prompt, all in one batch.

        Args:
            prompts: texts, or lists of blocks for a prompt that is already segmented.
            sampling: one for all, or one for each prompt.
            any_unfinished: told whether this process has unfinished sequences, says whether to make another pass.
                Processes that share the model's weights must make equally many.
        """
        samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        sequences = [
            _Sequence(segment(p, self.tokenizer.segmentation) if isinstance(p, str) else p, self, s, limits)
            for p, s in zip(prompts, samplings, strict=True)
        ]
        was_training = self.model.training
        self.model.eval()
        past = Cache()
        while any_unfinished(any(not s.finished for s in sequences)):
            self._advance(sequences, past)
        self.model.train(was_training)
        for s in sequences:
            s.result.off_canonical_joins = off_canonical_joins(s.result.blocks, self.tokenizer.segmentation)
        return [s.result for s in sequences]

    def generate_in_batches(
        self, prompts: Sequence[str], sampling: Sampling, limits: Limits, batch_size: int
    ) -> Iterator[Generation]:
        """Continue any number of prompts, `batch_size` at a time; prompt i samples with `sampling.seed + i`."""
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            samplings = [replace(sampling, seed=sampling.seed + start + i) for i in range(len(batch))]
            yield from self.generate(batch, samplings, limits)

    def _advance(self, sequences: list[_Sequence], past: Cache) -> None:
        """One pass: every unfinished sequence gets its next char."""
        feeds = [s.feed() for s in sequences] or [(None, padding("char", 1))]
        n_tokens = max(len(t.ids) if t is not None else 0 for t, _ in feeds)
        tokens = stack([_fill(t, n_tokens) for t, _ in feeds])
        chars = stack([c for _, c in feeds])
        logits = self.model(self._on_device(tokens), self._on_device(chars), past=past)[:, -1].float().cpu()
        for s, row in zip(sequences, logits, strict=False):
            if not s.finished:
                may_come, likeliest = torch.from_numpy(s.allowed()), int(row.argmax())
                row = row.masked_fill(~may_come, -torch.inf)
                s.take(choose(row, s.sampling, s.generator), bool(may_come[likeliest]))

    def _on_device(self, slots: Slots) -> Slots:
        return slots.map(lambda array: torch.from_numpy(array).to(self.device).long())


def _fill(tokens: Slots | None, count: int) -> Slots:
    """Tokens filled up with padding to `count` slots."""
    if tokens is None:
        return padding("token", count)
    return concatenate([tokens, padding("token", count - len(tokens.ids))])
