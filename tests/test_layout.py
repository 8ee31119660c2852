"""The two streams, their labels, positions, places and who sees whom, against the design spelled out by hand."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.layout import (
    IGNORED,
    Slots,
    alone,
    char_slots,
    lay_out,
    lay_out_rows,
    may_see,
    pack,
    place_count,
    token_slots,
)
from data_pipeline.pieces import beginning, blocks_of_piece, piece_of_blocks, reverse_block, slot_counts
from data_pipeline.segmentation import segment
from data_pipeline.tokenizer import BOB, BOS, EOB, EOS, PAD
from tests.builders import document_of, packed, small_tokenizer

TOKENIZER = small_tokenizer()
LENGTHS = TOKENIZER.byte_lengths
BLOCKS = ["12", " +", " 34", " =", " 46"]
CHAR_POSITIONS = ["mirrored", "forward"]

texts = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("a1 -+é潮👍")), min_size=1)
blocks_of_text = texts.map(lambda text: segment(text, TOKENIZER.segmentation))


def shown(ids: Any) -> list[str]:
    """Ids by name; chars and tokens as their text."""
    return [TOKENIZER.name(int(i)) for i in ids]


class TestWorkedExample:
    """`12 + 34 = 46`, of section 2 of the design."""

    def test_blocks_are_those_of_the_example(self):
        assert segment("12 + 34 = 46", TOKENIZER.segmentation) == BLOCKS
        assert segment("12 + 34 =", TOKENIZER.segmentation) == BLOCKS[:4]

    @pytest.mark.parametrize("supervised_from", [0, 4])
    def test_token_stream(self, supervised_from: int):
        piece = piece_of_blocks(BLOCKS, TOKENIZER, supervised_from)
        tokens, _, _ = lay_out(piece, LENGTHS, "mirrored")
        assert tokens.stream == "token"
        assert shown(tokens.ids) == ["<bos>", "1", "2", " +", " ", "3", "4", " ="]
        assert tokens.document.tolist() == [1] * 8
        assert tokens.block.tolist() == [-1, 0, 0, 1, 2, 2, 2, 3]
        assert tokens.index.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
        assert tokens.position.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
        assert tokens.start_pos.tolist() == [0, 1, 1, 3, 4, 4, 4, 7]
        assert tokens.place.tolist() == [0, 2, 1, 1, 3, 2, 1, 1]

    @pytest.mark.parametrize(
        ("char_positions", "positions"),
        [
            ("mirrored", [[1, 0, -1], [3, 2, 1], [4, 3, 2, 1], [7, 6, 5], [8, 7, 6, 5]]),
            ("forward", [[1, 2, 3], [3, 4, 5], [4, 5, 6, 7], [7, 8, 9], [8, 9, 10, 11]]),
        ],
    )
    @pytest.mark.parametrize("supervised_from", [0, 4])
    def test_char_stream(self, char_positions: str, positions: list[list[int]], supervised_from: int):
        _, chars, labels = lay_out(piece_of_blocks(BLOCKS, TOKENIZER, supervised_from), LENGTHS, char_positions)
        runs = [
            # input, labels, start_pos
            (["<bob>", "2", "1"], ["2", "1", "<eob>"], 1),
            (["<bob>", "+", " "], ["+", " ", "<eob>"], 3),
            (["<bob>", "4", "3", " "], ["4", "3", " ", "<eob>"], 4),
            (["<bob>", "=", " "], ["=", " ", "<eob>"], 7),
            (["<bob>", "6", "4", " "], ["6", "4", " ", "<eos>"], 8),
        ][supervised_from:]
        assert chars.stream == "char"
        assert shown(chars.ids) == [name for ids, _, _ in runs for name in ids]
        assert shown(labels) == [name for _, out, _ in runs for name in out]
        assert chars.start_pos.tolist() == [start for ids, _, start in runs for _ in ids]
        assert chars.index.tolist() == [c for ids, _, _ in runs for c in range(len(ids))]
        assert chars.place.tolist() == [c + 1 for ids, _, _ in runs for c in range(len(ids))]
        assert chars.block.tolist() == [b for b, (ids, _, _) in enumerate(runs, supervised_from) for _ in ids]
        assert chars.position.tolist() == [p for run in positions[supervised_from:] for p in run]
        assert chars.document.tolist() == [1] * len(chars.ids)

    def test_ids_of_chars_are_bytes_and_of_tokens_are_not(self):
        tokens, chars, labels = lay_out(piece_of_blocks(BLOCKS[:1], TOKENIZER), LENGTHS, "mirrored")
        assert tokens.ids.tolist() == [BOS]  # nothing reads the tokens of the last block
        assert chars.ids.tolist() == [BOB, 0x32, 0x31]
        assert labels.tolist() == [0x32, 0x31, EOS]
        assert all(i >= 261 for i in TOKENIZER.encode_block("12"))

    def test_piece_that_does_not_end_its_document_ends_in_eob(self):
        _, _, labels = lay_out(piece_of_blocks(BLOCKS, TOKENIZER, 4, ends_document=False), LENGTHS, "mirrored")
        assert shown(labels) == ["6", "4", " ", "<eob>"]

    def test_multi_byte_characters_are_reversed_as_bytes(self):
        _, chars, labels = lay_out(piece_of_blocks(["潮é"], TOKENIZER), LENGTHS, "mirrored")
        assert chars.ids.tolist() == [BOB, 0xA9, 0xC3, 0xAE, 0xBD, 0xE6]
        assert labels.tolist() == [0xA9, 0xC3, 0xAE, 0xBD, 0xE6, EOS]

    def test_place_of_a_token_is_that_of_its_last_byte(self):
        # " the" as one token, then as " t" + "he", then with a character cut in two.
        one = token_slots(np.array([300]), np.array([1]), np.array([4]), first_block=0, start_pos=1)
        two = token_slots(np.array([300, 301]), np.array([2]), np.array([2, 2]), first_block=0, start_pos=1)
        cut = token_slots(np.array([9, 9, 9]), np.array([1, 2]), np.array([5, 1, 2]), first_block=0, start_pos=1)
        assert one.place.tolist() == [1]
        assert two.place.tolist() == [3, 1]
        assert cut.place.tolist() == [1, 3, 1]


def seen_by_the_rules(query: dict[str, int], key: dict[str, int], kinds: tuple[str, str], token_attention: str) -> bool:
    """Section 3 of the design, one pair at a time. Document 0 is padding."""
    if query["document"] != key["document"] or query["document"] == 0:
        return False
    if kinds == ("token", "token"):
        if token_attention == "block":
            return key["block"] <= query["block"]
        return key["index"] <= query["index"]
    if kinds == ("char", "token"):
        return key["index"] < query["start_pos"]
    if kinds == ("char", "char"):
        return key["block"] == query["block"] and key["index"] <= query["index"]
    return False


def slots_one_by_one(slots: Slots) -> list[dict[str, int]]:
    """The slots of one row as records."""
    arrays = slots.arrays()
    return [{name: int(array[i]) for name, array in arrays.items()} for i in range(len(slots.ids))]


@pytest.mark.parametrize("token_attention", ["block", "causal"])
def test_may_see_equals_the_rules_on_packed_rows(token_attention: str):
    rows = [
        [document_of("12 + 34 = 46"), document_of(" 潮水", prompt="un café"), document_of("a")],
        [document_of("naïve 👍🏽 b", prompt="12 +")],
    ]
    batch = packed(rows, TOKENIZER, (24, 36))
    assert (batch.tokens.document == 0).any(dim=1).all(), "no padding"
    assert (batch.chars.document == 0).any(dim=1).all(), "no padding"
    for query in (batch.tokens, batch.chars):
        for key in (batch.tokens, batch.chars):
            visible = may_see(query.queries(), key.keys(), token_attention)
            for row in range(len(rows)):
                expected = [
                    [seen_by_the_rules(q, k, (query.stream, key.stream), token_attention) for k in keys]
                    for keys in [slots_one_by_one(key.map(lambda a, row=row: a[row]))]
                    for q in slots_one_by_one(query.map(lambda a, row=row: a[row]))
                ]
                assert visible[row].tolist() == expected, (query.stream, key.stream, row)


@dataclass
class Run:
    """One run of the char stream: the slots of one block."""

    ids: list[int]
    labels: list[int]


def runs_of(chars: Slots, labels: np.ndarray) -> list[Run]:
    starts = [*np.flatnonzero(chars.ids == BOB).tolist(), len(chars.ids)]
    return [Run(chars.ids[a:b].tolist(), labels[a:b].tolist()) for a, b in pairwise(starts)]


@st.composite
def documents(draw: st.DrawFn) -> tuple[list[str], int]:
    """Blocks, and the first supervised one."""
    blocks = draw(blocks_of_text)
    return blocks, draw(st.integers(0, len(blocks) - 1))


@given(documents(), st.booleans(), st.sampled_from(CHAR_POSITIONS))
def test_every_supervised_byte_and_end_mark_is_labelled_once(
    document: tuple[list[str], int], ends: bool, char_positions: str
):
    blocks, supervised_from = document
    piece = piece_of_blocks(blocks, TOKENIZER, supervised_from, ends)
    tokens, chars, labels = lay_out(piece, LENGTHS, char_positions)
    runs = runs_of(chars, labels)
    assert len(runs) == len(blocks) - supervised_from
    for block, run in zip(blocks[supervised_from:], runs, strict=True):
        # The labels are the input, one char on: the first char too is a label.
        assert run.labels[:-1] == run.ids[1:]
        assert bytes(reversed(run.labels[:-1])).decode() == block
    assert [run.labels[-1] for run in runs[:-1]] == [EOB] * (len(runs) - 1)
    assert runs[-1].labels[-1] == (EOS if ends else EOB)
    assert slot_counts(piece.block_tokens, piece.block_bytes, supervised_from) == (len(tokens.ids), len(chars.ids))
    assert tokens.ids[0] == BOS
    assert TOKENIZER.decode(tokens.ids) == "".join(blocks[:-1])


@given(documents(), st.sampled_from(CHAR_POSITIONS))
def test_positions_are_indices_and_start_pos_counts_the_tokens_before(document: tuple[list[str], int], how: str):
    blocks, supervised_from = document
    tokens, chars, _ = lay_out(piece_of_blocks(blocks, TOKENIZER, supervised_from), LENGTHS, how)
    assert tokens.position.tolist() == list(range(len(tokens.ids)))
    sign = 1 if how == "forward" else -1
    for block, index, start, position in zip(
        chars.block.tolist(), chars.index.tolist(), chars.start_pos.tolist(), chars.position.tolist(), strict=True
    ):
        assert start == 1 + sum(len(TOKENIZER.encode_block(b)) for b in blocks[:block])
        assert position == start + sign * index


@given(documents(), st.integers(0, 9))
def test_places_count_from_the_end_of_the_block(document: tuple[list[str], int], shift: int):
    blocks, supervised_from = document
    tokens, chars, labels = lay_out(piece_of_blocks(blocks, TOKENIZER, supervised_from), LENGTHS, "mirrored", shift)
    assert tokens.place[0] == 0, "<bos> has none, shifted or not"
    for b, block in enumerate(blocks[:-1]):
        ids, places = tokens.ids[tokens.block == b], tokens.place[tokens.block == b]
        data = b"".join(TOKENIZER.token_bytes(i) for i in ids)
        assert data == block.encode()
        for k, place in enumerate(places.tolist()):
            after = b"".join(TOKENIZER.token_bytes(i) for i in ids[k + 1 :])
            assert place == len(after) + 1 + shift
    for b, block in enumerate(blocks):
        places = chars.place[chars.block == b]
        for place, label in zip(places.tolist(), labels[chars.block == b].tolist(), strict=True):
            # The place is that of the byte predicted; the end mark stands before the block's first byte.
            assert label in (EOB, EOS) or block.encode()[-(place - shift)] == label
        assert places.tolist() == list(range(1 + shift, len(places) + 1 + shift))
    limit = place_count(TOKENIZER.segmentation.max_block_bytes, shift)
    assert max(tokens.place.max(), chars.place.max()) < limit


def test_place_count_is_exact_for_the_longest_block():
    _, chars, _ = lay_out(piece_of_blocks(["12345678"], TOKENIZER), LENGTHS, "mirrored", place_shift=3)
    assert place_count(8, 3) == chars.place.max() + 1


@given(documents(), st.data(), st.sampled_from(CHAR_POSITIONS))
def test_streams_do_not_depend_on_what_follows(document: tuple[list[str], int], data: st.DataObject, how: str):
    blocks, supervised_from = document
    end = data.draw(st.integers(supervised_from + 1, len(blocks)), label="blocks of the prefix")
    whole = lay_out(piece_of_blocks(blocks, TOKENIZER, supervised_from), LENGTHS, how)
    prefix = lay_out(piece_of_blocks(blocks[:end], TOKENIZER, supervised_from), LENGTHS, how)
    for ours, theirs in zip(prefix[:2], whole[:2], strict=True):
        for name, array in ours.arrays().items():
            assert array.tolist() == getattr(theirs, name)[: len(array)].tolist(), name
    assert prefix[2][:-1].tolist() == whole[2][: len(prefix[2]) - 1].tolist()


@given(st.binary())
def test_reversing_twice_is_the_identity(data: bytes):
    assert reverse_block(reverse_block(data)) == data
    assert reverse_block(data) == bytes(reversed(data))


@settings(max_examples=30)
@given(st.lists(documents(), min_size=1, max_size=4), st.integers(0, 5), st.integers(0, 5))
def test_packing_lays_documents_end_to_end_and_pads(
    parts: list[tuple[list[str], int]], free_tokens: int, free_chars: int
):
    laid_out = [lay_out(piece_of_blocks(blocks, TOKENIZER, s), LENGTHS, "mirrored") for blocks, s in parts]
    used_tokens = sum(len(t.ids) for t, _, _ in laid_out)
    used_chars = sum(len(c.ids) for _, c, _ in laid_out)
    tokens, chars, labels = pack(laid_out, used_tokens + free_tokens, used_chars + free_chars)
    for stream, row, used, free in ((0, tokens, used_tokens, free_tokens), (1, chars, used_chars, free_chars)):
        numbers = [n for n, part in enumerate(laid_out, 1) for _ in part[stream].ids]
        assert row.document.tolist() == numbers + [0] * free
        assert row.ids[used:].tolist() == [PAD] * free
        assert row.place[used:].tolist() == [0] * free
        for name in ("ids", "block", "index", "start_pos", "position", "place"):
            expected = np.concatenate([getattr(part[stream], name) for part in laid_out])
            assert getattr(row, name)[:used].tolist() == expected.tolist(), name
    assert labels.tolist() == [i for _, _, y in laid_out for i in y] + [IGNORED] * free_chars


@settings(max_examples=60)
@given(
    st.lists(st.lists(st.tuples(documents(), st.booleans(), st.integers(0, 9)), max_size=3), min_size=1, max_size=4),
    st.sampled_from(CHAR_POSITIONS),
)
def test_rows_at_once_are_the_rows_one_by_one(rows: list[list[tuple[tuple[list[str], int], bool, int]]], how: str):
    pieces = [[piece_of_blocks(blocks, TOKENIZER, s, ends) for (blocks, s), ends, _ in row] for row in rows]
    shifts = [[shift for _, _, shift in row] for row in rows]
    laid_out = [
        [lay_out(piece, LENGTHS, how, shift) for piece, shift in zip(*row, strict=True)]
        for row in zip(pieces, shifts, strict=True)
    ]
    shape = tuple(2 + max(sum(len(part[i].ids) for part in row) for row in laid_out) for i in (0, 1))
    tokens, chars, labels = lay_out_rows(pieces, shifts, LENGTHS, how, shape)
    assert tokens.ids.shape == (len(rows), shape[0])
    assert chars.ids.shape == labels.shape == (len(rows), shape[1])
    for i, row in enumerate(laid_out):
        if not row:
            assert not tokens.document[i].any()
            assert not chars.document[i].any()
            assert (labels[i] == IGNORED).all()
            continue
        one = pack(row, *shape)
        for ours, theirs in zip((tokens.at(i), chars.at(i)), one[:2], strict=True):
            for name, array in ours.arrays().items():
                assert array.tolist() == getattr(theirs, name).tolist(), name
                assert array.dtype == np.int32, name
        assert labels[i].tolist() == one[2].tolist()


@settings(max_examples=30)
@given(st.lists(documents(), min_size=1, max_size=4))
def test_a_document_of_a_row_alone_is_as_it_was_laid_out(parts: list[tuple[list[str], int]]):
    laid_out = [lay_out(piece_of_blocks(blocks, TOKENIZER, s), LENGTHS, "mirrored") for blocks, s in parts]
    shape = [sum(len(part[i].ids) for part in laid_out) + 3 for i in (0, 1)]
    row = pack(laid_out, *shape)
    for number, part in enumerate(laid_out, 1):
        found = alone(row, number)
        assert found[2].tolist() == part[2].tolist()
        for ours, theirs in zip(found[:2], part[:2], strict=True):
            assert {n: a.tolist() for n, a in ours.arrays().items()} == {
                n: a.tolist() for n, a in theirs.arrays().items()
            }


@given(blocks_of_text, st.integers(1, 8))
def test_the_beginning_of_a_piece_is_the_piece_of_its_first_blocks(blocks: list[str], end: int):
    cut = beginning(piece_of_blocks(blocks, TOKENIZER), end)
    expected = piece_of_blocks(blocks[:end], TOKENIZER, ends_document=end >= len(blocks))
    assert blocks_of_piece(cut) == blocks[:end]
    assert cut.ends_document == expected.ends_document
    assert cut.tokens.tolist() == expected.tokens.tolist()
    assert cut.block_tokens.tolist() == expected.block_tokens.tolist()


@pytest.mark.parametrize("blocks", [["a", " b"], []])
def test_shift_leaves_padding_without_place(blocks: list[str]):
    pieces, shifts = ([[piece_of_blocks(blocks, TOKENIZER)]], [[4]]) if blocks else ([[]], [[]])
    tokens, chars, _ = lay_out_rows(pieces, shifts, LENGTHS, "mirrored", (9, 9))
    for slots in (tokens, chars):
        empty = slots.document == 0
        assert empty.any()
        assert slots.place[empty].tolist() == [0] * int(empty.sum())


def test_char_slots_work_on_scalars_of_a_block_at_hand():
    slots = char_slots(np.array([BOB]), np.array([0]), np.array([2]), np.array([7]), "mirrored")
    assert {name: int(array[0]) for name, array in slots.arrays().items()} == {
        "ids": BOB,
        "document": 1,
        "block": 2,
        "index": 0,
        "start_pos": 7,
        "position": 7,
        "place": 1,
    }
