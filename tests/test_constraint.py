"""Constraints: a text held to a pattern although its blocks are written from their ends. Brute force is the judge."""

import random
import re
import tracemalloc
from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from data_pipeline.tokenizer import EOB, EOS, OUTPUT_VOCABULARY
from tidal_dist.errors import UserError
from tidal_dist.generation import automaton
from tidal_dist.generation.automaton import MAX_STATES, automaton_of_pattern
from tidal_dist.generation.constraint import Constraint, choice_constraint, regex_constraint
from tidal_dist.generation.pattern_compiler import answer
from tidal_dist.generation.utf8 import allowed as well_formed

ALPHABET = ["a", "b", "é", "潮", "👍"]
LONGEST = 4  # characters of the patterns' texts, so that all can be tried
ALL_TEXTS = ["".join(t) for n in range(1, LONGEST + 1) for t in product(ALPHABET, repeat=n)]
OWN_PROCESS = automaton._answer_of_own_process
SUMS = r"-?(0|[1-9][0-9]{0,2})( \+ [0-9]+)*"


@pytest.fixture(autouse=True, scope="module")
def compiled_here() -> Iterator[None]:
    """Patterns are compiled in this process: a process for each would take longer than all else."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(automaton, "_answer_of_own_process", lambda pattern: answer(pattern, MAX_STATES))
        yield


def patterns() -> st.SearchStrategy[tuple[str, int]]:
    """Regular expressions of finitely many texts, and the most characters that they have."""
    leaves = st.sampled_from([*ALPHABET, "[aé潮]", "[^a]", "[é-👍]", "."]).map(lambda p: (p, 1))

    def larger(inner: st.SearchStrategy[tuple[str, int]]) -> st.SearchStrategy[tuple[str, int]]:
        return st.one_of(
            st.tuples(inner, inner).map(lambda p: (p[0][0] + p[1][0], p[0][1] + p[1][1])),
            st.tuples(inner, inner).map(lambda p: (f"(?:{p[0][0]}|{p[1][0]})", max(p[0][1], p[1][1]))),
            inner.map(lambda p: (f"(?:{p[0]})?", p[1])),
            inner.map(lambda p: (f"(?:{p[0]}){{1,2}}?", 2 * p[1])),
        )

    return st.recursive(leaves, larger, max_leaves=6).filter(lambda p: p[1] <= LONGEST)


def expected_ids(texts: list[bytes], before: bytes, written: bytes, max_block_bytes: int) -> set[int]:
    """Ids that may come next, by trying all texts. `before`: finished blocks; `written`: in the order of generation."""
    end = written[::-1]
    ids = set()
    for text in texts:
        if not text.startswith(before):
            continue
        after = text[len(before) :]
        if written and after == end:
            ids.add(EOS)
        if written and after.startswith(end) and len(after) > len(end):
            ids.add(EOB)
        for stop in range(len(end) + 1, min(len(after), max_block_bytes) + 1):
            block = after[:stop]
            if block.endswith(end) and (stop == len(after) or not 0x80 <= after[stop] < 0xC0):
                ids.add(block[stop - len(end) - 1])
    return ids


def walk(constraint: Constraint, rng: random.Random, max_block_bytes: int, max_chars: int = 60) -> tuple[str, bool]:
    """A random text that the constraint and UTF-8 allow, and whether it ended."""
    state, text, written = constraint.start(), b"", b""
    for _ in range(max_chars):
        mask = constraint.allowed(state, written, max_block_bytes - len(written))
        options = np.flatnonzero(mask & well_formed(written, max_block_bytes)).tolist()
        assert options, f"dead end after {text!r}, {written!r}"
        chosen = rng.choice([i for i in options if i >= 256] or options if rng.random() < 0.4 else options)
        if chosen < 256:
            written += bytes([chosen])
            continue
        block, written = written[::-1], b""
        state, text = constraint.after(state, block), text + block
        if chosen == EOS:
            return text.decode(), True
    return text.decode(), False


@settings(max_examples=40, deadline=None)
@given(patterns(), st.integers(4, 7), st.randoms(use_true_random=False))
def test_masks_are_those_of_brute_force(pattern: tuple[str, int], max_block_bytes: int, rng: random.Random):
    texts = [text.encode() for text in ALL_TEXTS if re.fullmatch(pattern[0], text)]
    # `.` and `[^a]` allow characters outside the alphabet: those are left out of the comparison.
    known = {b for text in ALL_TEXTS[: len(ALPHABET)] for b in text.encode()} | {EOB, EOS}
    is_closed = not re.search(r"\.|\^|-", pattern[0])
    constraint = regex_constraint(pattern[0], max_block_bytes)
    state, before, written = constraint.start(), b"", b""
    for _ in range(30):
        mask = constraint.allowed(state, written, max_block_bytes - len(written))
        found, expected = set(np.flatnonzero(mask).tolist()), expected_ids(texts, before, written, max_block_bytes)
        assert expected <= found
        if is_closed:
            assert found == expected
        assert not any(mask & ~well_formed(written, max_block_bytes)), "not UTF-8"
        chosen = rng.choice(sorted(expected & known))
        if chosen == EOS:
            return
        if chosen == EOB:
            state, before, written = constraint.after(state, written[::-1]), before + written[::-1], b""
        else:
            written += bytes([chosen])


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([SUMS, "a|ab", r"\w+", "(é|潮)*👍", r".+", r"(?i)straße", "^[^a-z]{2,9}$", "a+?|b*"]),
    st.integers(4, 9),
    st.randoms(use_true_random=False),
)
def test_every_walk_finishes_in_a_text_that_matches(pattern: str, max_block_bytes: int, rng: random.Random):
    text, ended = walk(regex_constraint(pattern, max_block_bytes), rng, max_block_bytes)
    if ended:
        # Which characters are letters and digits depends on the version of Unicode.
        assert re.fullmatch(pattern, text) or (not text.isascii() and "\\w" in pattern)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text("ab1é潮 .*", min_size=1, max_size=6), min_size=1, max_size=6), st.integers(4, 9), st.data())
def test_a_choice_is_written_in_any_blocks_and_nothing_else_is(choices: list[str], max_block_bytes: int, data):
    constraint = choice_constraint(choices, max_block_bytes)
    text, ended = walk(constraint, data.draw(st.randoms(use_true_random=False)), max_block_bytes)
    assert ended
    assert text in choices
    wanted = data.draw(st.sampled_from(choices))
    state = constraint.start()
    while wanted:
        n = data.draw(st.integers(1, len(wanted)))
        block = wanted[:n].encode()
        assume(len(block) <= max_block_bytes)
        wanted = wanted[n:]
        for c in range(len(block)):
            written = block[::-1][:c]
            assert constraint.allowed(state, written, max_block_bytes - c)[block[::-1][c]]
        assert constraint.allowed(state, block[::-1], max_block_bytes - len(block))[EOB if wanted else EOS]
        state = constraint.after(state, block)


def test_a_block_may_end_where_the_text_may_both_end_and_go_on():
    constraint = choice_constraint(["1", "12"], 8)
    assert set(np.flatnonzero(constraint.allowed(constraint.start(), b"", 8))) == {ord("1"), ord("2")}
    assert set(np.flatnonzero(constraint.allowed(constraint.start(), b"1", 7))) == {EOB, EOS}
    assert set(np.flatnonzero(constraint.allowed(constraint.start(), b"2", 7))) == {ord("1")}
    after = constraint.after(constraint.start(), b"1")
    assert set(np.flatnonzero(constraint.allowed(after, b"2", 7))) == {EOS}, "an empty block would have to follow"


def test_no_byte_that_does_not_fit_into_the_block():
    constraint = regex_constraint("[a-f]{3}潮|x", 8)
    assert constraint.allowed(constraint.start(), b"", 8).shape == (OUTPUT_VOCABULARY,)
    assert constraint.allowed(constraint.start(), b"", 8)[ord("x")]
    last = "潮".encode()[-1]
    assert constraint.allowed(constraint.start(), b"", 6)[last], "abc and the character are 6 bytes"
    assert not constraint.allowed(constraint.start(), b"", 5)[last]
    assert not constraint.allowed(constraint.start(), b"", 0).any()


class TestBadPatterns:
    @pytest.mark.parametrize(
        ("pattern", "reason"),
        [
            ("(", "missing )"),
            ("a)|(b", "unbalanced"),
            (r"a\b", "word boundar"),
            (r"(a)\1", "leave out"),
            ("(?=a)a", "leave out"),
            ("b(^a)", "leave out"),
            ("", "only the empty"),
            ("a{0}", "only the empty"),
            (r"\w{40}", f"more than {MAX_STATES} states"),
            ("\ud800", "surrogates"),
        ],
    )
    def test_one_line_says_why(self, pattern: str, reason: str):
        with pytest.raises(UserError, match=re.escape(reason)) as raised:
            automaton_of_pattern(pattern)
        assert "\n" not in str(raised.value)

    def test_no_choices_too_many_or_ill_formed_ones(self):
        for choices, reason in (([], "no text"), ([""], "empty"), (["\ud800"], "UTF-8")):
            with pytest.raises(UserError, match=reason):
                choice_constraint(choices, 8)
        with pytest.raises(UserError, match="more than"):
            choice_constraint([f"{i:05} is a number" for i in range(2000)], 8)

    def test_one_choice_that_is_far_too_long_takes_no_memory(self):
        tracemalloc.start()
        with pytest.raises(UserError, match="more than"):
            choice_constraint(["x" * 20_000], 8)  # all its beginnings are 200 MB
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 100_000_000


def test_patterns_are_compiled_where_they_can_be_stopped(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(automaton, "_answer_of_own_process", OWN_PROCESS)
    assert automaton_of_pattern("a|aé").following.shape[0] == 5
    with pytest.raises(UserError, match="leave out look-around"):
        automaton_of_pattern(r"own\b")
    monkeypatch.setattr(automaton, "COMPILE_SECONDS", 0.3)
    with pytest.raises(UserError, match="make it simpler"):
        automaton_of_pattern("(a|b)*a(a|b){40}")
