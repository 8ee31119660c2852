"""Text -> blocks: a pure function of the text and `SegmentationConfig`.

A block is a word, a whole number with its sign, a run of punctuation (each with the space before it), a run of
white space, or a few characters of a script that is written without spaces. The blocks, joined, are the text.
"""

import hashlib
from functools import lru_cache
from itertools import accumulate

import regex
from pydantic import Field

from data_pipeline.section import Section

# Raised whenever the rules below change what they cut: it is part of the segmentation hash.
RULES_VERSION = 1

# U+30FC and U+FF70 lengthen a Kana vowel but belong to no one script.
_UNSPACED = (
    r"\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\u30fc\uff70"
    r"\p{Script=Thai}\p{Script=Lao}\p{Script=Khmer}\p{Script=Myanmar}"
)
_UNSPACED_LETTER = rf"[[{_UNSPACED}]&&[\p{{L}}\p{{M}}]]"
_WORD_LETTER = rf"[[\p{{L}}\p{{M}}]--[{_UNSPACED}]]"
_SIGN = r"(?<![\p{L}\p{M}\p{N}])-(?=\p{N})"
_OTHER = r"[^\s\p{L}\p{M}\p{N}]"
# What the rules below tell apart. Every character is of exactly one of these classes.
CHARACTER_CLASSES = {
    "white": r"\s",
    "unspaced": _UNSPACED_LETTER,
    "word": _WORD_LETTER,
    "number": r"\p{N}",
    "other": _OTHER,
}


class SegmentationConfig(Section):
    """How text is cut into blocks."""

    max_block_bytes: int = Field(32, ge=4, le=255, description="no block is longer, in UTF-8 bytes")
    max_unspaced_chars: int = Field(
        2, ge=1, description="block length in scripts written without spaces, in characters"
    )


@lru_cache(maxsize=8)
def _pattern(max_unspaced_chars: int) -> regex.Pattern[str]:
    return regex.compile(
        rf" ?{_WORD_LETTER}+"
        rf"|{_UNSPACED_LETTER}{{1,{max_unspaced_chars}}}"
        rf"| ?(?:{_SIGN})?\p{{N}}+"
        rf"| ?(?:(?!{_SIGN}){_OTHER})+"
        # White space leaves its last space to the block that takes a leading space.
        rf"|\s+(?= (?!{_UNSPACED_LETTER})\S)"
        r"|\s+",
        regex.VERSION1,
    )


def segment(text: str, config: SegmentationConfig) -> list[str]:
    """Cut `text` into its blocks. Their concatenation is `text`; no block is empty or longer than the limit."""
    blocks: list[str] = []
    for piece in _pattern(config.max_unspaced_chars).findall(text):
        if len(piece) * 4 <= config.max_block_bytes or len(piece.encode()) <= config.max_block_bytes:
            blocks.append(piece)
        else:
            blocks.extend(_cut(piece, config.max_block_bytes))
    return blocks


def _cut(piece: str, max_bytes: int) -> list[str]:
    """Cut `piece` greedily from its start into parts of at most `max_bytes`, never inside a character."""
    parts, start, size = [], 0, 0
    for i, character in enumerate(piece):
        n = len(character.encode())
        if size + n > max_bytes:
            parts.append(piece[start:i])
            start, size = i, 0
        size += n
    return [*parts, piece[start:]]


def off_canonical_joins(blocks: list[str], config: SegmentationConfig) -> int:
    """Count the borders where `blocks` and the segmentation of their joined text differ.

    Zero means that training would have cut the text in the same way. A border counts once, whether it was
    written where none belongs or is missing where one does.
    """

    def borders(parts: list[str]) -> set[int]:
        return set(accumulate(len(part) for part in parts))

    return len(borders(blocks) ^ borders(segment("".join(blocks), config)))


def segmentation_hash(config: SegmentationConfig) -> str:
    """Hash of the rules and their settings: equal hashes cut every text alike."""
    rules = (RULES_VERSION, _pattern(config.max_unspaced_chars).pattern, config.max_block_bytes)
    return hashlib.sha256(repr(rules).encode()).hexdigest()
