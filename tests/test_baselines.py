"""Baselines: plain decoders and blocks written forward, laid out of the same rows as the model's own."""

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.baselines import (
    in_reading_order,
    lay_out_forward_rows,
    lay_out_plain,
    lay_out_plain_rows,
    plain_shape,
)
from data_pipeline.layout import IGNORED, NO_PLACE, LaidOut, lay_out_rows, may_see
from data_pipeline.packing import DocumentLengths, plan_rows
from data_pipeline.pieces import Piece, piece_of_blocks, piece_of_text
from data_pipeline.rows import RowFormat, lay_out_as
from data_pipeline.stream import Batch, batch_of
from data_pipeline.tokenizer import BOB, BOS, EOB, EOS
from tests.builders import small_model, small_tokenizer
from tidal_dist.config import ModelConfig, load_config
from tidal_dist.errors import ConfigError
from tidal_dist.gpus import gpu_named
from tidal_dist.model.likelihood import exactly_predicted
from tidal_dist.plan import plan
from tidal_dist.planning.cluster import Assumptions, Cluster

TOKENIZER = small_tokenizer()
PLAIN: dict[str, Any] = {"places": False, "char_positions": "forward"}
BLOCKS = st.lists(st.sampled_from([" tide", "12", " +", " 345", "the", "潮水", ".", " é"]), min_size=1, max_size=6)


@st.composite
def pieces(draw: st.DrawFn) -> Piece:
    blocks = draw(BLOCKS)
    return piece_of_blocks(blocks, TOKENIZER, draw(st.integers(0, len(blocks) - 1)), draw(st.booleans()))


def batch(laid_out: LaidOut) -> Batch:
    return batch_of(laid_out).to("cpu")


class TestForwardBlocks:
    def test_a_run_is_the_block_as_one_reads_it(self) -> None:
        piece = piece_of_text("12 + 34 =", " 46", TOKENIZER)
        _, chars, labels = lay_out_forward_rows([[piece]], [[0]], TOKENIZER.byte_lengths, "forward", (12, 5))
        assert chars.ids[0].tolist()[:4] == [BOB, *b" 46"]
        assert labels[0].tolist() == [*b" 46", EOS, IGNORED]
        assert chars.place[0].tolist() == [1, 2, 3, 4, NO_PLACE]

    @given(st.lists(pieces(), min_size=1, max_size=3), st.integers(0, 5))
    def test_only_the_direction_differs(self, row: list[Piece], shift: int) -> None:
        arguments = [row], [[shift] * len(row)], TOKENIZER.byte_lengths, "mirrored", (90, 160)
        forward, own = lay_out_forward_rows(*arguments), lay_out_rows(*arguments)
        for name in ("document", "block", "index", "start_pos", "position", "place"):
            assert np.array_equal(getattr(forward[1], name), getattr(own[1], name))
        for name in ("ids", "document", "block", "index", "start_pos", "position"):
            assert np.array_equal(getattr(forward[0], name), getattr(own[0], name))
        ends = np.isin(own[2], [EOB, EOS])
        assert np.array_equal(forward[2][ends], own[2][ends])
        assert sorted(forward[2][0]) == sorted(own[2][0])

    @given(st.lists(pieces(), min_size=1, max_size=3), st.integers(0, 5))
    def test_places_of_tokens_count_bytes_from_the_start_of_their_block(self, row: list[Piece], shift: int) -> None:
        arguments = [row], [[shift] * len(row)], TOKENIZER.byte_lengths, "mirrored", (90, 160)
        found = lay_out_forward_rows(*arguments)[0].place[0]
        expected = []
        for piece in row:
            blocks = np.split(piece.tokens, np.cumsum(piece.block_tokens)[:-1])[:-1]
            lengths = [TOKENIZER.byte_lengths[block].tolist() for block in blocks]
            expected += [NO_PLACE, *(1 + shift + n for of in lengths for n in accumulate([0, *of[:-1]]))]
        assert found.tolist() == expected + [NO_PLACE] * (90 - len(expected))

    @given(pieces())
    def test_reading_order_twice_is_the_piece(self, piece: Piece) -> None:
        assert np.array_equal(in_reading_order(in_reading_order(piece)).chars, piece.chars)


class TestPlainDecoders:
    @pytest.mark.parametrize("unit", ["tokens", "bytes"])
    def test_units_follow_each_other_and_prompts_carry_no_loss(self, unit: str) -> None:
        piece = piece_of_text("12 + 34 =", " 46", TOKENIZER)
        prompt, text = ([*b"12 + 34 ="], [*b" 46"])
        if unit == "tokens":
            prompt, text = TOKENIZER.encode("12 + 34 ="), TOKENIZER.encode(" 46")
        tokens, chars, labels = lay_out_plain(piece, unit)
        assert tokens.ids.tolist() == [BOS]
        assert chars.ids.tolist() == [BOB, *prompt, *text]
        assert labels.tolist() == [*[IGNORED] * len(prompt), *text, EOS]
        assert chars.position.tolist() == [*range(1, len(labels) + 1)]

    @given(pieces())
    def test_bytes_are_the_text(self, piece: Piece) -> None:
        text = b"".join(
            part[::-1].tobytes() for part in np.split(piece.chars, np.cumsum(piece.block_bytes)[:-1]) if len(part)
        )
        assert lay_out_plain(piece, "bytes")[1].ids[1:].tolist() == [*text]

    @given(pieces(), st.sampled_from(["tokens", "bytes"]))
    def test_each_sees_bos_and_all_before_it(self, piece: Piece, unit: str) -> None:
        tokens, chars, _ = lay_out_plain(piece, unit)
        n = len(chars.ids)
        assert np.array_equal(may_see(chars.queries(), chars.keys(), "block"), np.tri(n, dtype=bool))
        assert may_see(chars.queries(), tokens.keys(), "block").all()

    @given(st.lists(pieces(), min_size=1, max_size=12), st.sampled_from(["tokens", "bytes"]))
    def test_rows_of_a_plan_fit_and_hold_its_labels(self, documents: list[Piece], unit: str) -> None:
        lengths = DocumentLengths(
            document_blocks=np.array([len(p.block_tokens) for p in documents]),
            prompt_blocks=np.array([p.supervised_from for p in documents]),
            block_tokens=np.concatenate([p.block_tokens for p in documents]),
            block_bytes=np.concatenate([p.block_bytes for p in documents]),
        )
        plan = plan_rows(lengths, 40, 60, "a test")
        rows = [[documents[n] for n, _, _ in plan.pieces(row)] for row in range(plan.rows)]
        shape = plain_shape([plan], unit)
        tokens, chars, _ = lay_out_plain_rows(rows, unit, shape)
        assert (tokens.ids.shape[1], chars.ids.shape[1]) == shape
        assert (tokens.document > 0).sum() == len(documents)
        assert (chars.document > 0).sum() == sum(1 + len(p.tokens if unit == "tokens" else p.chars) for p in documents)

    @pytest.mark.parametrize("encoding", ["rope", "alibi", "none"])
    @pytest.mark.parametrize("attention", ["split", "dense"])
    def test_a_packed_row_computes_what_each_document_does_alone(self, encoding: str, attention: str) -> None:
        row = [piece_of_text("", "the tide runs out and in " * n, TOKENIZER) for n in (1, 4, 2)]
        model = small_model(TOKENIZER, writes="tokens", encoding=encoding, **PLAIN)
        model.attention = attention
        together = batch(lay_out_plain_rows([row], "tokens", (3, 200)))
        logits = model(together.tokens, together.chars)[0]
        for number, piece in enumerate(row, 1):
            alone = batch(lay_out_plain_rows([[piece]], "tokens", (1, 1 + len(piece.tokens))))
            found = logits[together.chars.document[0] == number]
            torch.testing.assert_close(found, model(alone.tokens, alone.chars)[0], rtol=0, atol=1e-10)

    def test_nothing_later_changes_what_is_predicted(self) -> None:
        model = small_model(TOKENIZER, writes="bytes", **PLAIN)
        a, b = (piece_of_text("", f"the tide runs {end}", TOKENIZER) for end in ("out", "in!"))
        logits = []
        for piece in (a, b):
            alone = batch(lay_out_plain_rows([[piece]], "bytes", (1, 20)))
            logits.append(model(alone.tokens, alone.chars)[0])
        same = len("the tide runs ") + 1
        assert torch.equal(logits[0][:same], logits[1][:same])
        assert not torch.equal(logits[0][same], logits[1][same])

    def test_tokens_are_chosen_of_the_whole_vocabulary(self) -> None:
        model = small_model(TOKENIZER, writes="tokens", **PLAIN)
        assert model.output.out_features == TOKENIZER.vocab_size
        assert small_model(TOKENIZER, writes="bytes", **PLAIN).output.out_features == 261

    @pytest.mark.parametrize(
        ("settings", "named"),
        [
            ({"places": True, "char_positions": "forward"}, "places: false"),
            ({"places": False}, "char_positions: forward"),
            ({**PLAIN, "char_layers": 1}, "no char_layers"),
            ({**PLAIN, "char_order": "forward"}, "char_order: reversed"),
            ({**PLAIN, "handoff": True}, "handoff: false"),
        ],
    )
    def test_what_a_plain_decoder_has_not_is_refused(self, settings: dict[str, Any], named: str) -> None:
        with pytest.raises(ValueError, match="a plain decoder") as error:
            ModelConfig(n_layers=2, width=8, n_heads=2, writes="bytes", **settings)
        assert named in str(error.value)


def test_byte_counts_are_those_of_the_text() -> None:
    piece = piece_of_text("12 + 34 =", " the tide 潮水", TOKENIZER)
    size = len(" the tide 潮水".encode())
    for writes in ("blocks", "tokens", "bytes"):
        laid_out = lay_out_as(RowFormat(20, 60, writes=writes), [[piece]], [[0]], TOKENIZER.byte_lengths, (20, 60))
        assert batch(laid_out).byte_count(TOKENIZER.byte_lengths) == size


def rows_of(texts: Sequence[Sequence[tuple[str, str]]]) -> list[list[Piece]]:
    return [[piece_of_text(*document, TOKENIZER) for document in row] for row in texts]


def test_exactly_predicted_counts_documents_whose_every_label_is_the_likeliest() -> None:
    rows = rows_of([[("1 +", " 2"), ("2 +", " 3")], [("3 +", " 45")]])
    laid_out = batch(lay_out_rows(rows, [[0, 0], [0]], TOKENIZER.byte_lengths, "mirrored", (12, 9)))
    perfect = F.one_hot(laid_out.labels.clamp_min(0), 261).double()
    documents = laid_out.chars.document
    assert exactly_predicted(perfect, documents, laid_out.labels) == (3, 3)
    for slot, row in ((0, 0), (2, 0), (3, 1)):
        spoilt = perfect.clone()
        spoilt[row, slot] = 0
        spoilt[row, slot, EOB] = 1
        assert exactly_predicted(spoilt, documents, laid_out.labels) == (2, 3)
    unsupervised = perfect.clone()
    unsupervised[laid_out.labels == IGNORED] = 0
    assert exactly_predicted(unsupervised, documents, laid_out.labels) == (3, 3)


def test_a_baseline_is_not_planned() -> None:
    config = load_config(Path(__file__).parents[1] / "configs" / "demo.yaml", ["model.char_order=forward"])
    with pytest.raises(ConfigError, match="a baseline"):
        plan(config, Cluster(1, 1, gpu_named("h100")), Assumptions())
