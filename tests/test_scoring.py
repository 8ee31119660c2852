"""Scoring: the likelihood of a text is that of the plain per-block reference, of the decoder, and of training."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.packing import DocumentLengths, plan_rows
from data_pipeline.pieces import piece_of_blocks
from data_pipeline.segmentation import segment
from data_pipeline.tokenizer import EOB, EOS
from tests.builders import document_of, packed, small_model, small_tokenizer
from tidal_dist.doctor.oracle import Document, logits, loss, samples
from tidal_dist.errors import UserError
from tidal_dist.generation.decoder import Decoder
from tidal_dist.generation.request import Limits
from tidal_dist.generation.scores import Score
from tidal_dist.generation.scoring import Text, Window, score
from tidal_dist.model.likelihood import bits_per_byte

TOKENIZER = small_tokenizer()
MODELS = [
    small_model(TOKENIZER, seed=1),
    small_model(TOKENIZER, seed=2, encoding="alibi", char_layers=1, token_attention="causal", char_positions="forward"),
]
MODEL = MODELS[0]
PAIRS = [
    ("12 + 34 =", " 46"),
    ("", "un café déjà vu"),
    ("the tide runs out and", " the tide comes in 👍🏽"),
    ("潮水", "退去，潮水又来。"),
    ("a", "b"),
]


def scores(pairs: Sequence[tuple[Text, Text]], ends: bool = False, model=MODEL, **options) -> list[Score]:
    return score(model, TOKENIZER, "cpu", pairs, ends, **options)


def reference(context: str, text: str, model) -> float:
    """Nats by the plain per-block way, the last block in `<eos>`."""
    return -loss(document_of(text, context), TOKENIZER, model.config, model.state_dict()).item()


@pytest.mark.parametrize("model", MODELS)
def test_a_whole_text_has_the_likelihood_of_the_per_block_reference(model):
    for (context, text), found in zip(PAIRS, scores(PAIRS, ends=True, model=model), strict=True):
        assert found.logprob == pytest.approx(reference(context, text, model), abs=1e-9)
        assert [b.text for b in found.blocks] == segment(text, TOKENIZER.segmentation)
        assert found.bytes == len(text.encode())


def test_where_a_text_may_go_on_its_last_block_ends_in_either_mark():
    whole, open_ended = scores(PAIRS, ends=True), scores(PAIRS)
    for (context, text), a, b in zip(PAIRS, whole, open_ended, strict=True):
        *_, last = samples(document_of(text, context), TOKENIZER, MODEL.config)
        marks = logits(last, MODEL.config, MODEL.state_dict()).log_softmax(-1)[-1, [EOB, EOS]]
        assert b.blocks[-1].logprobs[-1] == pytest.approx(marks.logsumexp(0).item(), abs=1e-9)
        assert a.blocks[-1].logprobs[-1] == pytest.approx(marks[1].item(), abs=1e-9)
        assert a.blocks[-1].logprobs[:-1] == pytest.approx(b.blocks[-1].logprobs[:-1], abs=1e-9)
        assert [x.logprob for x in a.blocks[:-1]] == pytest.approx([x.logprob for x in b.blocks[:-1]], abs=1e-9)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from(PAIRS), min_size=1, max_size=6), st.integers(8, 300), st.booleans())
def test_a_batch_gives_each_pair_what_it_gets_alone(pairs: list[tuple[str, str]], batch_slots: int, ends: bool):
    together = scores(pairs, ends, batch_slots=batch_slots)
    for pair, found in zip(pairs, together, strict=True):
        (alone,) = scores([pair], ends)
        assert found.is_greedy == alone.is_greedy
        assert [b.logprob for b in found.blocks] == pytest.approx([b.logprob for b in alone.blocks], abs=1e-9)


def test_bits_per_byte_are_those_of_validation_on_packed_rows():
    documents = [document_of(text, context) for context, text in PAIRS]
    batch = packed([documents[:3], documents[3:]], TOKENIZER, (96, 96))
    with torch.no_grad():
        nats = MODEL(batch.tokens, batch.chars, batch.labels).item()
    found = scores(PAIRS, ends=True)
    total = replace(found[0], blocks=tuple(block for each in found for block in each.blocks))
    assert total.bits_per_byte == pytest.approx(bits_per_byte(nats, batch.byte_count()), abs=1e-9)


class TestWindow:
    TEXT = "12 + 34 = 46; the tide runs out, 潮水退去 and the tide comes in. " * 4

    @pytest.mark.parametrize("context", ["", "7 + 8 = 15; " * 12])
    def test_long_texts_are_cut_as_training_cuts_them(self, context: str):
        window = Window(40, 60)
        blocks, prompt = segment(self.TEXT, TOKENIZER.segmentation), segment(context, TOKENIZER.segmentation)
        piece = piece_of_blocks([*prompt, *blocks], TOKENIZER, len(prompt))
        counts = (np.array([len(piece.block_tokens)]), np.array([len(prompt)]))
        lengths = DocumentLengths(*counts, piece.block_tokens, piece.block_bytes)
        plan = plan_rows(lengths, window.tokens, window.chars, "a test", window.tokens // 2)
        together, expected = [*prompt, *blocks], 0.0
        addresses = [address for row in range(plan.rows) for address in plan.addresses(row)]
        for a in addresses:
            start = a.supervised_block
            own = Document(
                tuple(together[a.first_block : start]),
                tuple(together[start : a.end_block]),
                a.end_block == len(together),
            )
            expected -= loss(own, TOKENIZER, MODEL.config, MODEL.state_dict()).item()
        (found,) = scores([(context, self.TEXT)], ends=True, window=window)
        assert len(addresses) > 3
        assert [b.text for b in found.blocks] == blocks
        assert found.logprob == pytest.approx(expected, abs=1e-8)

    def test_a_window_too_small_for_a_block_is_refused(self):
        with pytest.raises(UserError, match="needs 2 and 9"):
            scores(PAIRS, window=Window(16, 8))


def sure_model():
    model = small_model(TOKENIZER, seed=4)
    with torch.no_grad():
        model.output.weight *= 2.0
        model.output.weight[EOB] *= 3.0
        model.output.weight[EOS] = 0.8 * model.output.weight[EOB] + 0.2 * model.output.weight[65]
    return model


class TestGreedy:
    def test_what_the_decoder_writes_is_greedy_and_as_likely_as_it_reports(self):
        model = sure_model()
        prompts = [context for context, _ in PAIRS]
        written = Decoder(model, TOKENIZER).generate(prompts, limits=Limits(max_bytes=40))
        assert {g.finish for g in written} == {"eos", "length"}
        for prompt, g in zip(prompts, written, strict=True):
            (found,) = scores([(prompt, g.blocks)], ends=g.finish == "eos", model=model)
            assert found.is_greedy
            expected = [char.logprob for block in g.details for char in block.chars]
            got = [nats for block in found.blocks for nats in block.logprobs]
            assert got[:-1] == pytest.approx(expected[:-1], abs=1e-5)
            if g.finish == "eos":
                assert found.logprob == pytest.approx(g.logprob, abs=1e-5)
            else:
                assert got[-1] >= expected[-1] - 1e-5, "either mark is at least as likely as one"

    def test_other_text_and_another_end_are_not(self):
        model = sure_model()
        (g,) = Decoder(model, TOKENIZER).generate(["12 + 34 ="], limits=Limits(max_bytes=40))
        *rest, last = g.blocks
        other = [*rest[:-1], "x", last]
        assert [s.is_greedy for s in scores([("12 + 34 =", g.blocks), ("12 + 34 =", other)], model=model)] == [
            True,
            False,
        ]
        assert not scores([("12 + 34 =", g.blocks[:-1])], ends=True, model=model)[0].is_greedy


class TestInput:
    def test_no_pairs_and_no_text(self):
        assert scores([]) == []
        (found,) = scores([("12 +", "")])
        assert (found.logprob, found.is_greedy, found.bytes) == (0.0, True, 0)

    @pytest.mark.parametrize(
        ("pair", "reason"),
        [
            (("a", "\ud800"), "pair 0: the text is not"),
            (("a", ["x" * 9]), "longer than 8"),
            (([""], "a"), "empty"),
        ],
    )
    def test_bad_texts_are_named(self, pair: tuple[Text, Text], reason: str):
        with pytest.raises(UserError, match=reason):
            scores([pair])

    def test_the_mode_of_the_model_stays_and_dropout_is_off(self):
        model = small_model(TOKENIZER, dropout=0.5).train()
        assert scores(PAIRS, model=model) == scores(PAIRS, model=model)
        assert model.training
