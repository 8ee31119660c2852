"""Answers as OpenAI's clients read them: completions, their chunks, log-probabilities, and the tide itself."""

import time
import uuid
from collections import deque
from collections.abc import Sequence
from typing import Any

from data_pipeline.tokenizer import MixedTokenizer
from tidal_dist.generation.events import Block, Char
from tidal_dist.generation.server.stream import Begun

FINISH_REASONS = {"eos": "stop", "stop": "stop"}  # all others: "length", the nearest that OpenAI has


def head(model: str) -> dict[str, Any]:
    """What an answer and all its chunks begin with."""
    return {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": model,
    }


def finish_reason(finish: str) -> str:
    """OpenAI's word for how a text ended."""
    return FINISH_REASONS.get(finish, "length")


def char_name(tokenizer: MixedTokenizer, char: int) -> str:
    """A char as a string of its own: ASCII as it is, other bytes as OpenAI has them (`bytes:\\xe6`), marks by name."""
    if char < 0x80:
        return chr(char)
    return f"bytes:\\x{char:02x}" if char < 0x100 else tokenizer.name(char)


def char_object(tokenizer: MixedTokenizer, char: Char) -> dict[str, Any]:
    """A char of the tide."""
    likeliest = {char_name(tokenizer, i): logprob for i, logprob in char.alternatives}
    return {"id": char.id, "char": char_name(tokenizer, char.id), "logprob": char.logprob, "top": likeliest}


def event_object(tokenizer: MixedTokenizer, event: Char | Block) -> dict[str, Any]:
    """What has just happened in the tide."""
    if isinstance(event, Char):
        return {"event": "char"} | char_object(tokenizer, event)
    return {"event": "block"} | block_object(tokenizer, event)


def block_object(tokenizer: MixedTokenizer, block: Block, with_chars: bool = False) -> dict[str, Any]:
    """A finished block of the tide: its text, its tokens, where they stand; its chars as they were generated."""
    chars = {"chars": [char_object(tokenizer, char) for char in block.chars]} if with_chars else {}
    return {
        "text": block.text,
        "tokens": [
            {"id": i, "text": name, "bytes": int(tokenizer.byte_lengths[i])}
            for i, name in zip(block.tokens, block.token_names, strict=True)
        ],
        "start_pos": block.start_pos,
        "char_positions": list(block.char_positions),
        "logprob": block.logprob,
    } | chars


class Logprobs:
    """OpenAI's `logprobs` of a text, block by block, while pieces of it are shown.

    One entry a byte, in reading order. A block's end mark, which has no text, stands before the block that it ends,
    as it was written from its end: so the entries of a whole text add up to its log-probability.
    """

    def __init__(self, tokenizer: MixedTokenizer, alternatives: int, offset: int = 0):
        self._tokenizer, self._alternatives, self._offset = tokenizer, alternatives, offset
        self._pending: deque[Char] = deque()

    def add(self, chars: Sequence[Char]) -> None:
        """Take up a finished block's chars, as generated."""
        self._pending.extend(reversed(chars))

    def take(self, text: str) -> dict[str, Any]:
        """The entries of the next piece of the text."""
        found: list[tuple[Char, int]] = []
        for character in text:
            missing = len(character.encode())
            while missing:
                char = self._pending.popleft()
                missing -= char.id < 0x100
                found.append((char, self._offset))
            self._offset += 1
        return self._object(found)

    def _object(self, found: Sequence[tuple[Char, int]]) -> dict[str, Any]:
        return {
            "tokens": [char_name(self._tokenizer, char.id) for char, _ in found],
            "token_logprobs": [char.logprob for char, _ in found],
            "top_logprobs": [self._likeliest(char) for char, _ in found] if self._alternatives else None,
            "text_offset": [offset for _, offset in found],
        }

    def _likeliest(self, char: Char) -> dict[str, float]:
        chosen = {char_name(self._tokenizer, i): logprob for i, logprob in char.alternatives[: self._alternatives]}
        return chosen | {char_name(self._tokenizer, char.id): char.logprob}


def choice(index: int, text: str, logprobs: dict[str, Any] | None, finish: str | None) -> dict[str, Any]:
    """One of the texts, or a piece of it. `finish`: the engine's word, None while there is more to come."""
    return {
        "index": index,
        "text": text,
        "logprobs": logprobs,
        "finish_reason": None if finish is None else finish_reason(finish),
    } | ({} if finish is None else {"finish": finish})


def timing(accepted: float, begun: Begun | None) -> dict[str, float | None]:
    """How long a text waited for its first pass, and for its first byte."""
    return {
        "queued_seconds": None if begun is None else begun.entered - accepted,
        "first_byte_seconds": None if begun is None else begun.written - accepted,
    }


def usage(prompt_bytes: int, written_bytes: int) -> dict[str, int]:
    """OpenAI's `usage`; a token here is a byte."""
    return {
        "prompt_tokens": prompt_bytes,
        "completion_tokens": written_bytes,
        "total_tokens": prompt_bytes + written_bytes,
    }
