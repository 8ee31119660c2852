"""Generation: cached decoding equals teacher forcing, prompts do not touch each other, and all text is UTF-8."""

import random
from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from data_pipeline.layout import lay_out, pack
from data_pipeline.pieces import piece_of_blocks
from data_pipeline.segmentation import off_canonical_joins, segment
from data_pipeline.stream import batch_of_rows
from data_pipeline.tokenizer import EOB, EOS, OUTPUT_VOCABULARY
from tests.builders import small_model, small_tokenizer
from tidal_dist.generation.decoder import Decoder
from tidal_dist.generation.engine import Engine
from tidal_dist.generation.events import Generation
from tidal_dist.generation.request import Limits, Request
from tidal_dist.generation.sampling import GREEDY, Sampling, choose, keep
from tidal_dist.generation.utf8 import allowed, block_text
from tidal_dist.model.transformer import TidalTransformer

TOKENIZER = small_tokenizer()
MAX_BLOCK_BYTES = TOKENIZER.segmentation.max_block_bytes
PROMPTS = ["", "12 + 34 =", "un café 潮水退去 👍🏽 tid", "naïve "]
UNSEEN = "ⵣⴰ 𝄞 \x00\x7f ﷺ Ω\u202e \U0010ffff"
COMBINATIONS = list(
    product(["rope", "alibi", "none"], ["mirrored", "forward"], ["block", "causal"], [3, 1, 2], [True, False])
)


def lively_model(seed: int = 0, dtype: torch.dtype = torch.float64, **settings: object) -> TidalTransformer:
    """A random model that is sure of itself, and ends blocks of all lengths."""
    model = small_model(TOKENIZER, seed, dtype, **settings)
    with torch.no_grad():
        model.output.weight *= 2.0
        model.output.weight[EOB] *= 3.0
        model.output.weight[EOS] = 0.8 * model.output.weight[EOB]  # neither mark shuts the other out
    return model


def blocks_of(prompt: str) -> list[str]:
    return segment(prompt, TOKENIZER.segmentation)


def teacher_forced(model: TidalTransformer, prompt: str, generation: Generation) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (C, V) and labels (C,) of what was generated, in one pass without a cache."""
    before = blocks_of(prompt)
    piece = piece_of_blocks(
        before + generation.blocks, TOKENIZER, len(before), ends_document=generation.finish == "eos"
    )
    laid_out = lay_out(piece, TOKENIZER.byte_lengths, model.config.char_positions)
    batch = batch_of_rows([pack([laid_out], len(laid_out[0].ids), len(laid_out[1].ids))])
    with torch.no_grad():
        return model.eval()(batch.tokens, batch.chars)[0], batch.labels[0]


def generate_with_logits(
    model: TidalTransformer, prompts: Sequence[str], sampling: Sampling | list[Sampling], limits: Limits
) -> tuple[list[Generation], list[torch.Tensor]]:
    """Generations, and for each prompt the logits of every char as the cached passes computed them."""
    engine = Engine(model, TOKENIZER, batch_size=len(prompts))
    each = [sampling] * len(prompts) if isinstance(sampling, Sampling) else sampling
    jobs = [engine.submit(Request(p, s, limits)) for p, s in zip(prompts, each, strict=True)]
    logits: list[list[torch.Tensor]] = [[] for _ in prompts]

    def record(_: object, inputs: tuple, output: torch.Tensor) -> None:
        for row, job in enumerate(engine.jobs_of_pass):
            if inputs[1].document[row, -1]:
                logits[jobs.index(job)].append(output[row, -1])

    hook = model.register_forward_hook(record)
    while engine.has_work:
        engine.step()
    hook.remove()
    return [job.generation for job in jobs], [torch.stack(rows) for rows in logits]


def samplings(prompts: Sequence[str], temperature: float = 1.0) -> list[Sampling]:
    return [Sampling(temperature=temperature, seed=seed) for seed in range(len(prompts))]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(COMBINATIONS)))
def test_cached_passes_equal_one_uncached_pass(number: int):
    encoding, char_positions, token_attention, char_layers, handoff = COMBINATIONS[number]
    model = lively_model(
        number,
        encoding=encoding,
        char_positions=char_positions,
        token_attention=token_attention,
        char_layers=char_layers,
        handoff=handoff,
        places=number // 5 % 2 == 0,
        mlp=("swiglu", "gelu")[number // 7 % 2],
    )
    prompts = PROMPTS * 2
    generations, cached = generate_with_logits(model, prompts, samplings(prompts), Limits(max_bytes=24))
    assert max(len(g.blocks) for g in generations) > 1
    for prompt, generation, logits in zip(prompts, generations, cached, strict=True):
        if generation.blocks:
            expected, _ = teacher_forced(model, prompt, generation)
            torch.testing.assert_close(logits[: len(expected)], expected, rtol=0.0, atol=1e-9)


@pytest.mark.parametrize("encoding", ["rope", "alibi", "none"])
def test_cached_passes_equal_one_uncached_pass_in_float32(encoding: str):
    model = lively_model(3, torch.float32, encoding=encoding, char_layers=2)
    generations, cached = generate_with_logits(model, PROMPTS, samplings(PROMPTS), Limits(max_bytes=24))
    for prompt, generation, logits in zip(PROMPTS, generations, cached, strict=True):
        expected, _ = teacher_forced(model, prompt, generation)
        torch.testing.assert_close(logits[: len(expected)], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_greedy_choice_is_the_teacher_forced_argmax_end_marks_included(seed: int):
    model = lively_model(seed, n_layers=2, encoding=("rope", "alibi")[seed % 2])
    prompts = [*PROMPTS, UNSEEN]
    generations = Decoder(model, TOKENIZER).generate(prompts, GREEDY, Limits(max_bytes=32))
    assert len({g.text for g in generations}) > 1
    for prompt, generation in zip(prompts, generations, strict=True):
        assert generation.blocks
        logits, labels = teacher_forced(model, prompt, generation)
        written = b""
        for row, label in zip(logits.float(), labels.tolist(), strict=True):
            candidates = np.flatnonzero(allowed(written, MAX_BLOCK_BYTES)).tolist()
            assert label == max(candidates, key=lambda i, row=row: row[i].item())
            written = b"" if label in (EOB, EOS) else written + bytes([label])


def test_logits_of_a_prompt_of_unseen_characters_are_cached_alike():
    model = lively_model(1)
    (generation,), (cached,) = generate_with_logits(model, [UNSEEN], samplings([UNSEEN]), Limits(max_bytes=24))
    expected, _ = teacher_forced(model, UNSEEN, generation)
    torch.testing.assert_close(cached[: len(expected)], expected, rtol=0.0, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("handoff", [True, False])
def test_prompts_in_a_batch_get_what_they_get_alone(temperature: float, handoff: bool):
    model = lively_model(5, char_layers=2, handoff=handoff, encoding="alibi" if handoff else "rope")
    decoder, limits = Decoder(model, TOKENIZER), Limits(max_bytes=30)
    prompts = [*PROMPTS, UNSEEN, "12 + 34 ="]
    together = decoder.generate(prompts, samplings(prompts, temperature), limits)
    for i, prompt in enumerate(prompts):
        (alone,) = decoder.generate([prompt], samplings(prompts, temperature)[i], limits)
        assert alone == together[i]
    lengths = {len(g.trace) for g in together}
    assert len(lengths) > 1, "all prompts took equally many passes"
    same_prompt = together[1].text == together[-1].text
    assert same_prompt == (temperature == 0.0)


def test_prompt_may_come_as_blocks_and_no_prompts_are_no_work():
    decoder = Decoder(lively_model(2), TOKENIZER)
    text, blocks = decoder.generate(["12 + 34 =", blocks_of("12 + 34 =")], limits=Limits(max_bytes=12))
    assert text == blocks
    assert decoder.generate([]) == []


def test_generation_leaves_the_mode_of_the_model_as_it_was():
    model = lively_model(2, dropout=0.5)
    decoder = Decoder(model.train(), TOKENIZER)
    first, second = (decoder.generate(["12"], limits=Limits(max_bytes=12)) for _ in range(2))
    assert first == second, "dropout was on"
    assert model.training


@pytest.mark.parametrize("seed", range(6))
def test_random_text_is_utf8_in_blocks_of_lawful_length(seed: int):
    model = small_model(TOKENIZER, seed, torch.float32, n_layers=1)
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(16)]
    generations = Decoder(model, TOKENIZER).generate(
        prompts, [Sampling(temperature=2.0, seed=100 * seed + i) for i in range(len(prompts))], Limits(max_bytes=64)
    )
    assert any(ord(character) > 127 for g in generations for character in g.text)
    for g in generations:
        assert "\ufffd" not in g.text
        assert "".join(g.blocks) == g.text
        assert all(0 < len(block.encode()) <= MAX_BLOCK_BYTES for block in g.blocks)


def test_trace_tells_chars_tokens_and_positions_of_the_layout():
    model = lively_model(4)
    prompt = "12 + 34 ="
    (g,) = Decoder(model, TOKENIZER).generate([prompt], Sampling(temperature=1.0, seed=3), Limits(max_bytes=40))
    piece = piece_of_blocks([*blocks_of(prompt), *g.blocks], TOKENIZER, len(blocks_of(prompt)))
    tokens, chars, _ = lay_out(piece, TOKENIZER.byte_lengths, "mirrored")
    assert [p for entry in g.trace for p in entry["char_positions"]] == chars.position.tolist()
    positions = [p for entry in g.trace[:-1] for p in entry["token_positions"]]
    assert positions == tokens.position[tokens.block >= len(blocks_of(prompt))].tolist()
    for entry, block in zip(g.trace, g.blocks, strict=True):
        assert entry["block"] == block
        assert len(entry["chars"]) == len(block.encode())
        assert entry["tokens"] == [TOKENIZER.name(i) for i in TOKENIZER.encode_block(block)]
    assert [entry["end"] for entry in g.trace[:-1]] == ["<eob>"] * (len(g.trace) - 1)


class TestLimits:
    @pytest.mark.parametrize("max_bytes", [1, 5, 8, 9, 20])
    def test_text_is_never_longer_than_max_bytes(self, max_bytes: int):
        decoder = Decoder(lively_model(6), TOKENIZER)
        for g in decoder.generate(PROMPTS, samplings(PROMPTS), Limits(max_bytes=max_bytes)):
            assert len(g.text.encode()) <= max_bytes
            assert len(g.trace) == len(g.blocks)

    def test_shorter_limit_gives_a_prefix(self):
        decoder = Decoder(lively_model(6), TOKENIZER)
        short, long = (decoder.generate(PROMPTS, samplings(PROMPTS), Limits(max_bytes=n)) for n in (12, 40))
        for a, b in zip(short, long, strict=True):
            assert b.blocks[: len(a.blocks)] == a.blocks

    @pytest.mark.parametrize("max_blocks", [0, 1, 3])
    def test_never_more_than_max_blocks(self, max_blocks: int):
        decoder = Decoder(lively_model(6), TOKENIZER)
        generations = decoder.generate(PROMPTS, samplings(PROMPTS), Limits(max_bytes=100, max_blocks=max_blocks))
        for g in generations:
            assert len(g.blocks) == max_blocks or (g.finish == "eos" and len(g.blocks) < max_blocks)

    def test_finish_is_eos_just_where_the_last_block_ended_so(self):
        decoder = Decoder(lively_model(7), TOKENIZER)
        prompts = PROMPTS * 4
        generations = decoder.generate(prompts, samplings(prompts), Limits(max_bytes=40))
        ended = [bool(g.trace) and g.trace[-1]["end"] == "<eos>" for g in generations]
        assert [g.finish == "eos" for g in generations] == ended
        assert len(set(ended)) == 2, "only one way to finish was seen"


class TestOffCanonicalJoins:
    @pytest.mark.parametrize(
        ("blocks", "joins"),
        [
            ([], 0),
            (["ab", " cd"], 0),
            ([" ab", "cd"], 1),  # a border too many
            (["ab cd"], 1),  # one too few
            (["ab c", "d"], 2),  # one moved
            (["a", "b", "c"], 2),
            (["-", "22"], 1),
            (["潮水", "退去"], 0),
            (["潮", "水退", "去"], 3),
        ],
    )
    def test_counts_borders(self, blocks: list[str], joins: int):
        assert off_canonical_joins(blocks, TOKENIZER.segmentation) == joins

    @given(st.text(st.sampled_from("ab1 -潮é")))
    def test_segmented_text_has_none(self, text: str):
        assert off_canonical_joins(blocks_of(text), TOKENIZER.segmentation) == 0

    def test_generation_reports_those_of_its_blocks(self):
        generations = Decoder(lively_model(8), TOKENIZER).generate(PROMPTS, samplings(PROMPTS), Limits(max_bytes=40))
        for g in generations:
            assert g.off_canonical_joins == off_canonical_joins(g.blocks, TOKENIZER.segmentation)
        assert any(g.off_canonical_joins for g in generations)


def bytes_by_brute_force() -> dict[bytes, dict[int, int]]:
    """Continuation bytes written so far -> byte that may follow -> bytes the shortest such character still takes.

    The continuation bytes of no influence, those behind the second byte, are taken from the ends of their range.
    """
    follows: dict[bytes, dict[int, int]] = {}
    free = [0x80, 0xBF]
    encodings = [bytes([lead]) for lead in range(0x80)]
    for lead, second in product(range(0x80, 0x100), range(0x80, 0x100)):
        encodings += [bytes([lead, second, *rest]) for n in range(3) for rest in product(free, repeat=n)]
    for encoding in encodings:
        try:
            character = encoding.decode()
        except UnicodeDecodeError:
            continue
        if len(character) == 1:
            backwards = encoding[::-1]
            for i, byte in enumerate(backwards):
                options = follows.setdefault(backwards[:i], {})
                options[byte] = min(options.get(byte, 4), len(backwards) - i)
    return follows


class TestAllowed:
    @pytest.mark.slow
    def test_equals_brute_force_over_all_characters(self):
        free = {0x80, 0xBF}
        for pending, options in bytes_by_brute_force().items():
            for before, room in product([b"", b"a", "é".encode()[::-1]], range(6)):
                written = before + pending
                if pending and room < min(options.values()):
                    continue  # the steps before do not lead here
                mask = allowed(written, len(written) + room)
                assert mask.shape == (OUTPUT_VOCABULARY,)
                assert mask[[EOB, EOS]].all() == mask[[EOB, EOS]].any() == (bool(written) and not pending)
                assert not mask[256:EOS].any()
                for byte in range(256):
                    if 0x80 <= byte < 0xC0 and len(pending) < 3 and not set(pending) <= free:
                        continue  # the brute force has no characters for it
                    assert mask[byte] == (options.get(byte, 9) <= room), (written, byte, room)

    @given(st.integers(4, 12), st.randoms(use_true_random=False), st.booleans())
    def test_every_walk_ends_in_a_well_formed_block(self, max_bytes: int, rng: random.Random, prefers_bytes: bool):
        written = b""
        while True:
            options = np.flatnonzero(allowed(written, max_bytes)).tolist()
            assert options, f"dead end after {written!r}"
            if prefers_bytes:
                options = [i for i in options if i < 256] or options
            chosen = rng.choice(options)
            if chosen >= 256:
                break
            written += bytes([chosen])
        assert chosen in (EOB, EOS)
        assert 0 < len(written) <= max_bytes
        assert written[::-1].decode() == block_text(written)
        if prefers_bytes:
            assert len(written) == max_bytes

    @given(st.text(min_size=1, max_size=12), st.integers(0, 3))
    @example("\U0010ffff\U00010000", 0)
    @example("\ud7ff\ue000\u0800\uffff", 0)
    @example("\x00\x7f\x80\u07ff", 0)
    def test_every_block_that_fits_can_be_written(self, text: str, room: int):
        data = text.encode()[::-1]
        max_bytes = len(data) + room
        for i, byte in enumerate(data):
            assert allowed(data[:i], max_bytes)[byte], f"byte {i} of {data!r}"
        assert allowed(data, max_bytes)[[EOB, EOS]].all()
        assert block_text(data) == text


logits_lists = st.lists(st.integers(-800, 800).map(lambda i: i / 100), min_size=2, max_size=20, unique=True)


def kept(logits: np.ndarray) -> set[int]:
    return set(np.flatnonzero(np.isfinite(logits)).tolist())


def nucleus(logits: np.ndarray, ids: set[int], p: float) -> set[int]:
    """The fewest of the likeliest of `ids` whose probabilities, among `ids`, reach p."""
    weights = {i: float(np.exp(logits[i])) for i in ids}
    chosen: set[int] = set()
    reached = 0.0
    for i in sorted(ids, key=lambda i: -weights[i]):
        if chosen and reached >= p:
            break
        chosen.add(i)
        reached += weights[i] / sum(weights.values())
        assume(abs(reached - p) > 1e-4)  # on the edge, rounding decides
    return chosen


class TestSampling:
    @given(logits_lists, st.integers(0, 25))
    def test_top_k_keeps_the_k_likeliest_as_they_were(self, values: list[float], k: int):
        logits = np.array(values)
        result = keep(logits, k, 1.0, 0.0)
        expected = sorted(range(len(values)), key=lambda i: -values[i])[: k or None]
        assert kept(result) == set(expected)
        assert result[expected].tolist() == logits[expected].tolist()

    @given(logits_lists, st.integers(0, 25), st.floats(0.01, 0.99))
    def test_top_p_keeps_the_nucleus_of_the_top_k(self, values: list[float], k: int, p: float):
        logits = np.array(values)
        result = keep(logits, k, p, 0.0)
        expected = nucleus(logits, kept(keep(logits, k, 1.0, 0.0)), p)
        assert kept(result) == expected
        assert result[sorted(expected)].tolist() == logits[sorted(expected)].tolist()

    @given(logits_lists)
    def test_smallest_nucleus_is_the_likeliest(self, values: list[float]):
        assert kept(keep(np.array(values), 0, 1e-9, 0.0)) == {int(np.argmax(values))}

    @given(logits_lists, st.data())
    def test_excluded_ids_are_never_kept_nor_chosen(self, values: list[float], data: st.DataObject):
        excluded = data.draw(st.sets(st.integers(0, len(values) - 1), max_size=len(values) - 1))
        logits = np.array(values)
        logits[list(excluded)] = -np.inf
        sampling = Sampling(
            temperature=data.draw(st.sampled_from([0.0, 0.5, 2.0, 50.0])),
            top_k=data.draw(st.integers(0, 25)),
            top_p=data.draw(st.sampled_from([0.1, 0.9, 1.0])),
        )
        generator = np.random.default_rng(1)
        assert not {choose(logits, sampling, generator) for _ in range(20)} & excluded

    @given(logits_lists)
    def test_temperature_0_is_the_argmax_and_draws_nothing(self, values: list[float]):
        generator = np.random.default_rng(1)
        before = generator.bit_generator.state
        assert choose(np.array(values), Sampling(top_k=3, top_p=0.5), generator) == int(np.argmax(values))
        assert generator.bit_generator.state == before

    @settings(max_examples=20)
    @given(logits_lists, st.integers(0, 2**40))
    def test_equal_seeds_choose_alike(self, values: list[float], seed: int):
        sampling = Sampling(temperature=1.5, top_k=5, top_p=0.9, seed=seed)
        first, second = (np.random.default_rng(seed) for _ in range(2))
        logits = np.array(values)
        assert [choose(logits, sampling, first) for _ in range(9)] == [
            choose(logits, sampling, second) for _ in range(9)
        ]

    @pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
    def test_frequencies_are_those_of_the_softmax(self, temperature: float):
        logits = np.array([1.0, 0.0, -1.0, -np.inf])
        generator = np.random.default_rng(0)
        draws = [choose(logits, Sampling(temperature=temperature), generator) for _ in range(4000)]
        weights = np.exp(logits / temperature)
        np.testing.assert_allclose(np.bincount(draws, minlength=4) / len(draws), weights / weights.sum(), atol=0.03)
