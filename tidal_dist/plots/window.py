"""What of a long row a picture of bounded size shows."""

from dataclasses import dataclass

import numpy as np

from data_pipeline.layout import Slots
from data_pipeline.reading import block_starts


@dataclass(frozen=True)
class Window:
    """Consecutive token slots and char slots of a row; `note` says what they leave out, "" for nothing."""

    tokens: slice
    chars: slice
    note: str = ""


def window_of(tokens: Slots, chars: Slots, most_tokens: int, most_chars: int) -> Window:
    """The first chars, in whole blocks unless the first is longer, and the last of the tokens that they see."""
    n_tokens, n_chars = len(tokens.ids), len(chars.ids)
    if n_tokens <= most_tokens and n_chars <= most_chars:
        return Window(slice(0, n_tokens), slice(0, n_chars))
    borders = [*block_starts(chars).tolist(), n_chars]
    end = max([border for border in borders if border <= most_chars], default=0) or min(n_chars, most_chars)
    last = _tokens_seen(tokens, chars.at(end - 1)) if end else min(n_tokens, most_tokens)
    first = max(0, last - most_tokens)
    note = f"chars 1..{end} of {n_chars:,}, tokens {first + 1}..{last} of {n_tokens:,}"
    return Window(slice(first, last), slice(0, end), note)


def _tokens_seen(tokens: Slots, char: Slots) -> int:
    """Slots of a row up to the last token before the block of `char`; all of them for padding, which has no block."""
    seen = np.flatnonzero((tokens.document == char.document) & (tokens.index < char.start_pos))
    return int(seen[-1]) + 1 if len(seen) else len(tokens.ids)
