from collections import defaultdict
from dataclasses import astuple
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from data_pipeline.errors import ShardError
from data_pipeline.packing import DocumentLengths, RowPlan, plan_rows
from data_pipeline.pieces import slot_counts

Block = tuple[int, int]  # (tokens, bytes)
LengthsOfDocument = tuple[list[Block], int]  # blocks, of which the first few are the prompt

blocks = st.integers(1, 12).flatmap(lambda size: st.tuples(st.integers(1, size), st.just(size)))
documents = st.lists(
    st.lists(blocks, min_size=1, max_size=20).flatmap(
        lambda blocks: st.tuples(st.just(blocks), st.integers(0, len(blocks) - 1))
    ),
    max_size=8,
)
row_tokens, row_chars = st.integers(2, 60), st.integers(13, 80)


def lengths_of(documents: list[LengthsOfDocument]) -> DocumentLengths:
    all_blocks = [block for blocks, _ in documents for block in blocks]
    return DocumentLengths(
        document_blocks=np.array([len(blocks) for blocks, _ in documents], np.uint32),
        prompt_blocks=np.array([prompt for _, prompt in documents], np.uint32),
        block_tokens=np.array([tokens for tokens, _ in all_blocks], np.uint8),
        block_bytes=np.array([size for _, size in all_blocks], np.uint8),
    )


def slots(document: LengthsOfDocument, first: int, end: int) -> tuple[int, int]:
    """Token and char slots of a piece, by definition: <bos>, all tokens but the last block's; a mark per block."""
    blocks, prompt = document
    return (
        1 + sum(tokens for tokens, _ in blocks[first : end - 1]),
        sum(size + 1 for _, size in blocks[max(first, prompt) : end]),
    )


def pieces_of(plan: RowPlan) -> dict[int, list[tuple[int, int]]]:
    pieces = defaultdict(list)
    for row in range(plan.rows):
        for document, first, end in plan.pieces(row):
            pieces[document].append((first, end))
    return {document: sorted(found) for document, found in pieces.items()}


@given(documents, row_tokens, row_chars)
def test_every_supervised_block_is_in_exactly_one_piece(
    documents: list[LengthsOfDocument], row_tokens: int, row_chars: int
) -> None:
    pieces = pieces_of(plan_rows(lengths_of(documents), row_tokens, row_chars, "shard"))
    assert sorted(pieces) == list(range(len(documents)))
    for i, (blocks, prompt) in enumerate(documents):
        assert pieces[i][0][0] <= prompt
        assert pieces[i][-1][1] == len(blocks)
        supervised = [b for first, end in pieces[i] for b in range(max(first, prompt), end)]
        assert supervised == list(range(prompt, len(blocks)))
        # Every piece supervises something: a row is never spent on a prompt alone.
        assert all(end > max(first, prompt) for first, end in pieces[i])


@given(documents, row_tokens, row_chars)
def test_every_row_fits(documents: list[LengthsOfDocument], row_tokens: int, row_chars: int) -> None:
    plan = plan_rows(lengths_of(documents), row_tokens, row_chars, "shard")
    for row in range(plan.rows):
        counts = [slots(documents[document], first, end) for document, first, end in plan.pieces(row)]
        assert counts  # no row is empty
        assert sum(t for t, _ in counts) <= row_tokens
        assert sum(c for _, c in counts) <= row_chars


@given(documents, row_tokens, row_chars)
def test_a_short_document_is_whole_and_keeps_its_prompt(
    documents: list[LengthsOfDocument], row_tokens: int, row_chars: int
) -> None:
    pieces = pieces_of(plan_rows(lengths_of(documents), row_tokens, row_chars, "shard"))
    for i, document in enumerate(documents):
        t, c = slots(document, 0, len(document[0]))
        if t <= row_tokens and c <= row_chars:
            assert pieces[i] == [(0, len(document[0]))]


@given(documents, row_tokens, row_chars)
def test_a_long_prompt_keeps_its_end(documents: list[LengthsOfDocument], row_tokens: int, row_chars: int) -> None:
    pieces = pieces_of(plan_rows(lengths_of(documents), row_tokens, row_chars, "shard"))
    for i, (blocks, prompt) in enumerate(documents):
        if len(pieces[i]) == 1 and pieces[i][0][0] == 0:
            continue
        first = pieces[i][0][0]
        kept = sum(tokens for tokens, _ in blocks[first:prompt])
        assert kept <= row_tokens // 2
        if first:  # one block more would not fit in the half
            assert kept + blocks[first - 1][0] > row_tokens // 2


@pytest.mark.slow
@given(documents, row_tokens, row_chars)
def test_a_long_document_is_cut_no_more_than_needed(
    documents: list[LengthsOfDocument], row_tokens: int, row_chars: int
) -> None:
    pieces = pieces_of(plan_rows(lengths_of(documents), row_tokens, row_chars, "shard"))
    for i, document in enumerate(documents):
        for first, end in pieces[i][:-1]:
            t, c = slots(document, first, end + 1)
            assert t > row_tokens or c > row_chars


@pytest.mark.slow
@given(documents, row_tokens, st.integers(2, 10))
def test_a_block_that_does_not_fit(documents: list[LengthsOfDocument], row_tokens: int, row_chars: int) -> None:
    too_long = [
        i for i, (blocks, prompt) in enumerate(documents) if any(size + 1 > row_chars for _, size in blocks[prompt:])
    ]
    assume(too_long)
    largest = max(size for _, size in documents[too_long[0]][0][documents[too_long[0]][1] :])
    with pytest.raises(ShardError) as caught:
        plan_rows(lengths_of(documents), row_tokens, row_chars, "train/shard-000007")
    message = str(caught.value)
    assert "train/shard-000007: " in message
    assert f"document {too_long[0]} " in message
    assert f"data.row_chars={row_chars}" in message
    assert f"at least {largest + 1}" in message
    assert len(message.splitlines()) == 1


def test_a_prompt_block_may_be_longer_than_a_rows_chars() -> None:
    """Prompts take no char slots."""
    plan = plan_rows(lengths_of([([(3, 40), (1, 2)], 1)]), 8, 4, "shard")
    assert pieces_of(plan) == {0: [(0, 2)]}


@given(documents, row_tokens, row_chars, st.integers(0, 40))
def test_overlap_repeats_context_without_supervision(
    documents: list[LengthsOfDocument], row_tokens: int, row_chars: int, overlap: int
) -> None:
    plan = plan_rows(lengths_of(documents), row_tokens, row_chars, "shard", overlap)
    found = defaultdict(list)
    for row in range(plan.rows):
        addresses = plan.addresses(row)
        for a in addresses:
            found[a.document].append((a.first_block, a.supervised_block, a.end_block))
        counts = [slots((documents[a.document][0], a.supervised_block), a.first_block, a.end_block) for a in addresses]
        assert sum(t for t, _ in counts) <= row_tokens
        assert sum(c for _, c in counts) <= row_chars
    for i, (blocks, prompt) in enumerate(documents):
        pieces = sorted(found[i])
        # Every supervised block carries loss exactly once, with or without overlap.
        assert [b for _, supervised, end in pieces for b in range(supervised, end)] == list(range(prompt, len(blocks)))
        for (_, _, end), (first, supervised, _) in pairwise(pieces):
            assert first <= supervised == end
            repeated = sum(tokens for tokens, _ in blocks[first:supervised])
            assert repeated <= min(overlap, row_tokens // 2)
            if first:
                assert repeated + blocks[first - 1][0] > min(overlap, row_tokens // 2)


@pytest.mark.slow
@given(documents, row_tokens, row_chars)
def test_addresses_are_stretches_of_the_shards_arrays(
    documents: list[LengthsOfDocument], row_tokens: int, row_chars: int
) -> None:
    lengths = lengths_of(documents)
    plan = plan_rows(lengths, row_tokens, row_chars, "shard")
    starts = np.cumsum(lengths.document_blocks) - lengths.document_blocks
    for address in (address for row in range(plan.rows) for address in plan.addresses(row)):
        first, end = (int(starts[address.document]) + b for b in (address.first_block, address.end_block))
        assert address.block_start == first
        assert address.token_start == lengths.block_tokens[:first].sum()
        assert address.byte_start == lengths.block_bytes[:first].sum()
        assert address.tokens == lengths.block_tokens[first:end].sum()
        assert address.bytes == lengths.block_bytes[first:end].sum()


def test_a_block_of_more_tokens_than_a_row() -> None:
    """A piece's last block takes no token slots, so it fits alone."""
    plan = plan_rows(lengths_of([([(1, 1), (9, 9), (9, 9), (1, 1)], 0)]), 4, 20, "shard")
    assert pieces_of(plan) == {0: [(0, 2), (2, 3), (3, 4)]}


def test_no_documents() -> None:
    assert plan_rows(lengths_of([]), 8, 16, "shard").rows == 0


def realistic(rng: np.random.Generator, count: int, mean_blocks: float, prompts: bool) -> DocumentLengths:
    """Documents of log-normal length; words of 1 to 12 bytes at about 4 bytes a token."""
    document_blocks = np.clip(rng.lognormal(np.log(mean_blocks), 1.0, count), 2, 5000).astype(np.uint32)
    total = int(document_blocks.sum())
    block_bytes = np.clip(rng.geometric(0.2, total), 1, 32)
    return DocumentLengths(
        document_blocks=document_blocks,
        prompt_blocks=(document_blocks // 2 if prompts else document_blocks * 0).astype(np.uint32),
        block_tokens=(-(-block_bytes // 4)).astype(np.uint8),
        block_bytes=block_bytes.astype(np.uint8),
    )


@pytest.mark.parametrize(
    ("mean_blocks", "prompts", "row_tokens", "row_chars"),
    [
        (8, True, 128, 512),
        (8, True, 512, 512),
        (60, False, 512, 2048),
        (60, False, 512, 1024),
        (400, False, 512, 2048),
        (400, False, 1024, 8192),
        (2000, True, 1024, 4096),
    ],
)
def test_rows_are_full(mean_blocks: float, prompts: bool, row_tokens: int, row_chars: int) -> None:
    """The slots that run out first are at least nine tenths used."""
    lengths = realistic(np.random.default_rng(1), int(120_000 / mean_blocks), mean_blocks, prompts)
    plan = plan_rows(lengths, row_tokens, row_chars, "shard")
    starts = np.cumsum(lengths.document_blocks) - lengths.document_blocks
    used = np.zeros(2)
    for document, first, end in zip(plan.document, plan.first_block, plan.end_block, strict=True):
        start = int(starts[document])
        prompt = max(int(lengths.prompt_blocks[document]) - int(first), 0)
        piece = slice(start + int(first), start + int(end))
        used += slot_counts(lengths.block_tokens[piece], lengths.block_bytes[piece], prompt)
    assert max(used / plan.rows / (row_tokens, row_chars)) >= 0.9


@pytest.mark.slow
@given(documents, row_tokens, row_chars)
def test_planning_is_a_function(documents: list[LengthsOfDocument], row_tokens: int, row_chars: int) -> None:
    first, second = (plan_rows(lengths_of(documents), row_tokens, row_chars, "shard") for _ in range(2))
    for a, b in zip(astuple(first), astuple(second), strict=True):
        np.testing.assert_array_equal(a, b)
