"""The char stream as people read it."""

import numpy as np
import pytest

from data_pipeline.layout import IGNORED, lay_out, pack
from data_pipeline.pieces import piece_of_text
from data_pipeline.reading import block_starts, columns, in_reading_order
from tests.builders import TEXTS, small_tokenizer

TOKENIZER = small_tokenizer()


def row_of(text: str, prompt: str = "") -> tuple:
    return lay_out(piece_of_text(prompt, text, TOKENIZER), TOKENIZER.byte_lengths, "mirrored")


@pytest.mark.parametrize("text", TEXTS)
def test_the_characters_are_those_of_the_text(text: str) -> None:
    _, chars, labels = row_of(text)
    written = in_reading_order(chars, labels)
    assert [w.text for w in written if not w.is_end] == list(text)
    assert sorted(slot for w in written for slot in w.slots) == list(range(len(labels)))
    for w in written:
        assert {int(chars.block[slot]) for slot in w.slots} == {w.block}
        if not w.is_end:
            assert bytes(int(labels[slot]) for slot in w.slots) == w.text.encode()


def test_an_end_mark_stands_left_of_its_block() -> None:
    _, chars, labels = row_of(" 46 é", "12 =")
    assert [w.text for w in in_reading_order(chars, labels)] == ["<eob>", " ", "4", "6", "<eos>", " ", "é"]


def test_what_has_no_label_is_left_out() -> None:
    row = pack([row_of(" 46"), row_of("7")], 20, 16)
    _, chars, labels = row
    assert [w.text for w in in_reading_order(chars, labels)] == ["<eos>", " ", "4", "6", "<eos>", "7"]
    assert in_reading_order(chars, np.full_like(labels, IGNORED)) == []


def test_blocks_start_where_the_block_or_the_document_changes() -> None:
    tokens, chars, _ = pack([row_of("1", "23"), row_of("4", "5")], 6, 6)
    assert block_starts(tokens).tolist() == [0, 1, 3, 4, 5]  # <bos>, 23, <bos>, 5, padding
    assert block_starts(chars).tolist() == [0, 2, 4]


@pytest.mark.parametrize(("text", "width"), [("", 0), ("abc", 3), ("潮水", 4), ("e\u0301", 1), ("，", 2)])
def test_columns(text: str, width: int) -> None:
    assert columns(text) == width
