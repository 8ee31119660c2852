"""Well-formed UTF-8 written from its end: which byte may come next.

A character's continuation bytes come before its lead byte. The rules are those of the Unicode Standard, table 3-7.
"""

from functools import lru_cache

import numpy as np

from data_pipeline.pieces import reverse_block
from data_pipeline.tokenizer import EOB, EOS, OUTPUT_VOCABULARY

_LEADS = {1: range(0xC2, 0xE0), 2: range(0xE0, 0xF0), 3: range(0xF0, 0xF5)}


def pending_continuations(written: bytes) -> bytes:
    """The continuation bytes at the end of `written` (a block's bytes so far) that still lack their lead byte."""
    kept = len(written)
    while kept and 0x80 <= written[kept - 1] < 0xC0:
        kept -= 1
    return written[kept:]


def allowed(written: bytes, max_block_bytes: int) -> np.ndarray:
    """Which of the output ids may follow the bytes `written` of a block, (261,) bool.

    Ends only where the characters are complete and the block is not empty; a byte only where the block can still
    be completed within `max_block_bytes`.
    """
    pending = pending_continuations(written)
    room = min(max_block_bytes - len(written), 2)
    return _allowed(len(pending), pending[-1] if pending else 0, room, bool(written))


@lru_cache(maxsize=1024)
def _allowed(pending: int, second: int, room: int, may_end: bool) -> np.ndarray:
    """`second` is the last byte written: it would stand behind the lead byte. `room`: bytes left, 2 or more as 2."""
    mask = np.zeros(OUTPUT_VOCABULARY, dtype=bool)
    if pending == 0:
        mask[:0x80] = room >= 1
        mask[[EOB, EOS]] = may_end
    else:
        for lead in _LEADS[pending]:
            mask[lead] = _is_character(bytes([lead, second]) + b"\x80" * (pending - 1))
    mask[0x80:0xC0] = room >= 2 and pending < 3
    return mask


def _is_character(data: bytes) -> bool:
    try:
        return len(data.decode()) == 1
    except UnicodeDecodeError:
        return False


def block_text(written: bytes) -> str:
    """The text of a finished block; ill-formed bytes become U+FFFD."""
    return reverse_block(written).decode(errors="replace")
