"""Text held to a pattern or to a list of choices, although each block is written from its end.

A forward automaton reads the text; a block is read against it backwards. With q the state before the block and s the
bytes written so far, in reading order, the block may still become any x + s that leads on from q. So for every s the
states from which s leads on, to the end of a character, are kept, and a byte may come if one of the states before it
can be reached from q within the bytes that are left. Every byte that is allowed has such a way to finish, so there are
no dead ends.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

from data_pipeline.pieces import reverse_block
from data_pipeline.tokenizer import EOB, EOS, OUTPUT_VOCABULARY
from tidal_dist.errors import UserError
from tidal_dist.generation.automaton import Automaton, automaton_of_choices, automaton_of_pattern
from tidal_dist.generation.request import Constraint


class AutomatonConstraint:
    """A text that an automaton accepts whole. Its states are the automaton's. May be used from several threads."""

    def __init__(self, automaton: Automaton, max_block_bytes: int):
        self._automaton, self._max_block_bytes = automaton, max_block_bytes
        # Masks and sets recur: within a batch, and whenever the text comes back to a state.
        self._mask: Callable[[int, bytes, int], np.ndarray] = lru_cache(4096)(self._compute_mask)
        self._leading_on: Callable[[bytes], np.ndarray] = lru_cache(1024)(self._compute_leading_on)
        self._distances: Callable[[int], np.ndarray] = lru_cache(256)(self._compute_distances)

    def start(self) -> int:
        """The automaton's first state."""
        return self._automaton.start

    def after(self, state: int, block: bytes) -> int:
        """The automaton's state after a block."""
        after = self._automaton.after(state, block)
        assert after != self._automaton.dead, "only what is allowed is written"
        return after

    def allowed(self, state: int, written: bytes, room: int) -> np.ndarray:
        """As in `Constraint`. Never empty where at least 4 bytes may come, or the bytes before it were allowed."""
        return self._mask(state, written, min(room, self._max_block_bytes - len(written)))

    def _compute_mask(self, state: int, written: bytes, room: int) -> np.ndarray:
        automaton = self._automaton
        mask = np.zeros(OUTPUT_VOCABULARY, bool)
        leading_on = self._leading_on(written)
        if room > 0:
            before = np.flatnonzero(self._distances(state) < room)
            by_class: np.ndarray = np.any(leading_on[automaton.following[before]], axis=0)
            mask[:256] = by_class[automaton.byte_class]
        if written and leading_on[state]:
            after = automaton.after(state, reverse_block(written))
            mask[EOS] = automaton.accepting[after]
            mask[EOB] = automaton.goes_on(after)
        mask.flags.writeable = False  # it is kept
        return mask

    def _compute_leading_on(self, written: bytes) -> np.ndarray:
        """(n + 1,) whether the bytes written so far lead on from a state."""
        automaton = self._automaton
        if not written:
            return automaton.between_characters()
        return self._leading_on(written[:-1])[automaton.following[:, automaton.byte_class[written[-1]]]]

    def _compute_distances(self, state: int) -> np.ndarray:
        return self._automaton.distances(state, self._max_block_bytes)


def regex_constraint(pattern: str, max_block_bytes: int) -> Constraint:
    """Text that a regular expression matches whole: the syntax of Rust's `regex`, without look-around and the like.

    Raises:
        UserError: the pattern is wrong, too large, or matches only the empty text.
    """
    return AutomatonConstraint(automaton_of_pattern(pattern), max_block_bytes)


def constraint_of(pattern: str | None, choices: Sequence[str] | None, max_block_bytes: int) -> Constraint | None:
    """Text held to a regular expression or to choices, whichever is given; none where neither is.

    Raises:
        UserError: both are given, or as `regex_constraint` and `choice_constraint`.
    """
    if pattern is not None and choices is not None:
        raise UserError("regex and choice: a text is held to one of them; leave one out")
    if pattern is not None:
        return regex_constraint(pattern, max_block_bytes)
    return None if choices is None else choice_constraint(choices, max_block_bytes)


def choice_constraint(choices: Sequence[str], max_block_bytes: int) -> Constraint:
    """Text that is one of `choices`.

    Raises:
        UserError: there are none, one is no UTF-8, or they are too many.
    """
    return AutomatonConstraint(automaton_of_choices(choices), max_block_bytes)
