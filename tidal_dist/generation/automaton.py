"""Deterministic automata over the bytes of UTF-8: of a regular expression, or of a list of texts.

n states, k classes of bytes that the automaton does not tell apart.
"""

import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import regex

from tidal_dist.errors import UserError
from tidal_dist.generation import pattern_compiler
from tidal_dist.generation.pattern_compiler import BAD_PATTERN, TOO_LARGE

MAX_STATES = 10_000
COMPILE_SECONDS = 10.0
UNREACHABLE = np.iinfo(np.int32).max
_MERGING_ROUNDS = 64
_SHOWN = 60  # characters of a pattern in a message


@dataclass(frozen=True, eq=False)
class Automaton:
    """An automaton of which every state can still lead to an accepted text.

    Attributes:
        start: the state before any byte.
        following: (n + 1, k) the next state by the byte's class; n, the last, is the state of no way on.
        byte_class: (256,) class of each byte.
        accepting: (n + 1,) whether the text may end there.
    """

    start: int
    following: np.ndarray
    byte_class: np.ndarray
    accepting: np.ndarray

    @property
    def dead(self) -> int:
        """The state of no way on."""
        return len(self.following) - 1

    def after(self, state: int, data: bytes) -> int:
        """The state after `data`."""
        for byte in data:
            state = int(self.following[state, self.byte_class[byte]])
        return state

    def goes_on(self, state: int) -> bool:
        """Whether at least one more byte may come."""
        return bool((self.following[state] != self.dead).any())

    def between_characters(self) -> np.ndarray:
        """(n + 1,) the states at which a character begins or the text ends: no continuation byte follows there."""
        continues = (self.following[:, self.byte_class[0x80:0xC0]] != self.dead).any(axis=1)
        continues[self.dead] = True
        return ~continues

    def distances(self, state: int, furthest: int) -> np.ndarray:
        """(n + 1,) the fewest bytes from `state` to every state; those beyond `furthest` are UNREACHABLE."""
        found = np.full(len(self.following), UNREACHABLE, np.int32)
        frontier = np.array([state])
        for distance in range(furthest + 1):
            found[frontier] = distance
            reached = np.unique(self.following[frontier])
            frontier = reached[(found[reached] == UNREACHABLE) & (reached != self.dead)]
            if not len(frontier):
                break
        return found


@lru_cache(maxsize=64)
def automaton_of_pattern(pattern: str) -> Automaton:
    """The automaton of the texts that a regular expression, in the syntax of Rust's `regex`, matches whole.

    Raises:
        UserError: the pattern is wrong, of a kind that no automaton has, too large, or matches nothing but the empty
            text; or the library is missing.
    """
    shown = repr(pattern if len(pattern) <= _SHOWN else pattern[:_SHOWN] + "...")
    if find_spec("outlines_core") is None:
        raise UserError(
            "a regular expression needs outlines-core; install it with pip install 'tidal-dist[constraints]'"
        )
    try:
        regex.compile(pattern)
        data = pattern.encode()
    except (regex.error, UnicodeEncodeError, RecursionError) as error:
        raise UserError(f"the regular expression {shown} is wrong: {error}; mend it") from None
    numbers = _compile(data.removeprefix(b"^"), shown)  # the whole text must match anyhow
    start, n_finals = numbers[:2].tolist()
    finals, edges = numbers[2 : 2 + n_finals], numbers[2 + n_finals :].reshape(-1, 3)
    return _not_empty(_trimmed(start, edges, finals), f"the regular expression {shown}")


def _compile(pattern: bytes, shown: str) -> np.ndarray:
    code, output, reason = _answer_of_own_process(pattern)
    if code == BAD_PATTERN:
        raise UserError(
            f"the regular expression {shown} cannot be followed byte by byte ({reason}); leave out look-around, back "
            "references, anchors and word boundaries"
        )
    if code != 0:
        raise UserError(f"the regular expression {shown} needs more than {MAX_STATES} states; make it simpler")
    return np.frombuffer(output, np.int32)


def _answer_of_own_process(pattern: bytes) -> tuple[int, bytes, str]:
    command = [sys.executable, "-P", str(Path(pattern_compiler.__file__)), str(MAX_STATES)]
    try:
        done = subprocess.run(command, input=pattern, capture_output=True, timeout=COMPILE_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return TOO_LARGE, b"", ""
    return done.returncode, done.stdout, done.stderr.decode(errors="replace")


def automaton_of_choices(choices: Sequence[str]) -> Automaton:
    """The automaton of a list of texts.

    Raises:
        UserError: there are none, one is no UTF-8, or they are too many.
    """
    try:
        texts = [choice.encode() for choice in choices]
    except UnicodeEncodeError:
        raise UserError("a choice is not UTF-8; mend it") from None
    prefixes = set[bytes]()
    for text in texts:
        prefixes.update(text[:end] for end in range(min(len(text), MAX_STATES) + 1))
        if len(prefixes) > MAX_STATES:
            raise UserError(f"the choices need more than {MAX_STATES} states; give fewer or shorter ones")
    number = {prefix: state for state, prefix in enumerate(sorted(prefixes))}
    edges = np.array([(number[p[:-1]], p[-1], state) for p, state in number.items() if p], np.int64).reshape(-1, 3)
    return _not_empty(_trimmed(0, edges, [number[text] for text in texts]), "the list of choices")


def _trimmed(start: int, edges: np.ndarray, finals: Iterable[int]) -> Automaton:
    """Without states that lead to no accepted text. edges: (e, 3) state, byte, next state, with any numbers."""
    finals = np.array(list(finals), np.int64)
    names = np.unique(np.concatenate([[start], edges[:, 0], edges[:, 2], finals]))
    n = len(names)
    table = np.full((n + 1, 256), n, np.int32)
    sources, targets = (np.searchsorted(names, edges[:, column]) for column in (0, 2))
    table[sources, edges[:, 1]] = targets
    columns, byte_class = np.unique(table, axis=1, return_inverse=True)
    accepting = np.zeros(n + 1, bool)
    accepting[np.searchsorted(names, finals)] = True
    live = accepting.copy()
    while not np.array_equal(more := live | live[columns].any(axis=1), live):
        live = more
    # Dead states, and those that the same texts lead on from, become one; the dead one is the last.
    merged = np.where(live, _merged(columns, accepting), n)
    kept, state = np.unique(merged, return_inverse=True)
    first = int(state[np.searchsorted(names, start)])
    return Automaton(first, state[columns[kept]].astype(np.int32), byte_class.reshape(256), accepting[kept])


def _merged(following: np.ndarray, accepting: np.ndarray) -> np.ndarray:
    """(n + 1,) for each state the first of those that accept the same texts from there on."""
    group = accepting.astype(np.int64)
    for _ in range(_MERGING_ROUNDS):
        before = len(np.unique(group))
        _, first, group = np.unique(
            np.column_stack([group, group[following]]), axis=0, return_index=True, return_inverse=True
        )
        if len(first) == before:
            return first[group.reshape(-1)]
    return np.arange(len(accepting))  # a long chain, in which there is little to merge


def _not_empty(automaton: Automaton, what: str) -> Automaton:
    if not automaton.goes_on(automaton.start):
        raise UserError(f"{what} allows no text, or only the empty one; a block cannot be empty")
    return automaton
