"""The fast segmentation is the plain one: `segment`, on every text, in any company, in parts of any size."""

import sys
from itertools import accumulate, pairwise

import numpy as np
import pytest
import regex
from hypothesis import example, given
from hypothesis import strategies as st

from data_pipeline.boundaries import block_starts, parts_in_blocks
from data_pipeline.segmentation import CHARACTER_CLASSES, SegmentationConfig, segment
from tests.test_segmentation import PIECES, texts

DEFAULT = SegmentationConfig()
TIGHT = SegmentationConfig(max_block_bytes=4, max_unspaced_chars=5)  # bytes end a block before characters do
configs = st.builds(SegmentationConfig, max_block_bytes=st.integers(4, 255), max_unspaced_chars=st.integers(1, 5))
tight_configs = st.builds(SegmentationConfig, max_block_bytes=st.integers(4, 12), max_unspaced_chars=st.integers(1, 5))
# What signs, leading spaces and runs turn on, often next to each other.
neighbours = st.lists(
    st.sampled_from(("-", "5", "𝟙", "a", "é", "中", "ไ", " ", "\t", "\u3000", ".", "🙂")), max_size=40
)
any_text = st.one_of(texts, neighbours.map("".join))
batches = st.lists(any_text, max_size=6)


def plain(batch: list[str], config: SegmentationConfig) -> list[bytes]:
    return [block.encode() for text in batch for block in segment(text, config)]


def laid_end_to_end(batch: list[str]) -> tuple[bytes, np.ndarray]:
    sizes = [len(text.encode()) for text in batch]
    return "".join(batch).encode(), np.array([0, *accumulate(sizes)][: len(batch)], dtype=np.int64)


def cut(data: bytes, starts: np.ndarray) -> list[bytes]:
    return [data[start:end] for start, end in pairwise([*starts.tolist(), len(data)])]


def fast(batch: list[str], config: SegmentationConfig) -> list[bytes]:
    data, text_starts = laid_end_to_end(batch)
    return cut(data, block_starts(data, text_starts, config))


def in_parts(batch: list[str], config: SegmentationConfig, part_bytes: int) -> list[list[bytes]]:
    data, text_starts = laid_end_to_end(batch)
    return [cut(part, starts) for part, starts in parts_in_blocks(data, text_starts, config, part_bytes)]


def joined(parts: list[list[bytes]]) -> list[bytes]:
    return [block for part in parts for block in part]


def characters() -> list[str]:
    """Every character that can be written as UTF-8."""
    return [chr(i) for i in range(sys.maxunicode + 1) if not 0xD800 <= i <= 0xDFFF]


def in_every_company(character: str) -> str:
    """The character before and behind each class of character, twice in a row, at the start and at the end."""
    c = character
    return f"{c}a{c} {c}{c}-{c}1{c}中{c}.{c}\t{c}-1 {c} -1{c}-1  {c}"


@given(batches, st.one_of(configs, tight_configs))
@example(["12", "-3", "a", "-5", "", " ", "x"], DEFAULT)
def test_the_blocks_are_those_of_the_definition(batch: list[str], config: SegmentationConfig) -> None:
    assert fast(batch, config) == plain(batch, config)


@given(batches, st.one_of(configs, tight_configs), st.integers(1, 60))
@example(["a-5--5-5"], DEFAULT, 3)
@example(["-𝟙-𝟙-𝟙"], TIGHT, 4)
@example(["中" * 20], TIGHT, 8)
@example(["a" * 50, "", "", "b"], DEFAULT, 1)
def test_parts_change_nothing(batch: list[str], config: SegmentationConfig, part_bytes: int) -> None:
    parts = in_parts(batch, config, part_bytes)
    assert joined(parts) == plain(batch, config)
    assert all(parts)


@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=4), st.integers(1, 40), configs, st.integers(1, 300))
def test_long_runs(pieces: list[str], times: int, config: SegmentationConfig, part_bytes: int) -> None:
    text = "".join(piece * times for piece in pieces)
    assert fast([text], config) == plain([text], config)
    assert joined(in_parts([text], config, part_bytes)) == plain([text], config)


@pytest.mark.parametrize(
    "piece", ["x", "é", "中", "𝟙", " ", "\u3000", "-5", "--5", "-5-.", "5-", "a-", " -", "中 ", "\u0301", "-", "🙂"]
)
@pytest.mark.parametrize("config", [DEFAULT, TIGHT, SegmentationConfig(max_block_bytes=7, max_unspaced_chars=5)])
def test_parts_are_of_the_size_that_was_asked_for(piece: str, config: SegmentationConfig) -> None:
    """Every text soon has a border at which it can be cut, so that memory is bounded whatever it is."""
    text, part_bytes = piece * 2000, 600
    parts = in_parts([text], config, part_bytes)
    assert joined(parts) == plain([text], config)
    sizes = [sum(map(len, part)) for part in parts]
    assert max(sizes) <= part_bytes
    assert min(sizes[:-1]) > part_bytes - 300


def test_a_part_grows_where_no_border_is_certain() -> None:
    """Unspaced script by 1,000 characters: cuts by bytes inside them are no place to begin anew."""
    config = SegmentationConfig(max_block_bytes=10, max_unspaced_chars=1000)
    text = "中" * 2500
    parts = in_parts([text], config, 100)
    assert joined(parts) == plain([text], config)
    assert [sum(map(len, part)) for part in parts] == [3000, 3000, 1500]


def test_every_character_is_of_one_class() -> None:
    """Counted over all code points, so that no class can lack, or share, a character."""
    everything = "".join(map(chr, range(sys.maxunicode + 1)))
    found = [regex.subn(pattern, "", everything, flags=regex.VERSION1) for pattern in CHARACTER_CLASSES.values()]
    assert sum(count for _, count in found) == len(everything)


def test_characters_where_the_class_changes() -> None:
    everything = characters()
    text = "".join(everything)
    chosen = {*range(0, len(text), 97)}
    for pattern in CHARACTER_CLASSES.values():
        for run in regex.finditer(f"{pattern}+", text, regex.VERSION1):
            chosen |= {run.start(), run.end() - 1}
    batch = [in_every_company(everything[i]) for i in sorted(chosen)]
    assert fast(batch, DEFAULT) == plain(batch, DEFAULT)


@pytest.mark.slow
def test_every_character() -> None:
    everything = characters()
    for i in range(0, len(everything), 1 << 16):
        batch = [f"a{c}{c} {c}-1" for c in everything[i : i + (1 << 16)]]
        assert fast(batch, DEFAULT) == plain(batch, DEFAULT)


def test_no_text() -> None:
    assert block_starts(b"", np.array([], dtype=np.int64), DEFAULT).tolist() == []
    assert block_starts(b"", np.array([0, 0]), DEFAULT).tolist() == []
    assert list(parts_in_blocks(b"", np.array([0, 0]), DEFAULT, 100)) == []
