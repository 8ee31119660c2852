"""Words: those of the standard library's own text, and made ones that sound like them; a part is kept for tests."""

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

from experiments.tasks.library import docstrings, library
from experiments.tasks.writing import is_tested

SHORTEST, LONGEST = 4, 10  # letters of a word
ENDING = 3  # letters by which words rhyme

_MADE = 20_000
_WORD = re.compile(r"(?<![A-Za-z0-9_'])[A-Z]?[a-z]+(?![A-Za-z0-9_'])")
_LEAST_OCCURRENCES = 3  # what occurs less often is mostly no word
# Consonants and the vowels behind them; the last syllable takes the consonants at the end too.
_SYLLABLE = re.compile(r"[^aeiouy]*[aeiouy]+(?:[^aeiouy]+$)?")


@dataclass(frozen=True)
class Words:
    """A list of words to draw from."""

    words: Sequence[str]

    def draw(self, rng: random.Random) -> str:
        """A word."""
        return rng.choice(self.words)

    def rhyme(self, word: str, rng: random.Random) -> str | None:
        """Another word with the same ending; none: there is no other."""
        others = [other for other in self._by_ending.get(word[-ENDING:], []) if other != word]
        return rng.choice(others) if others else None

    @cached_property
    def _by_ending(self) -> Mapping[str, list[str]]:
        found = defaultdict(list)
        for word in self.words:
            found[word[-ENDING:]].append(word)
        return found


@cache
def real_words(tested: bool, longest: int = LONGEST) -> Words:
    """Words of the library's documentation strings of so many letters at most, in alphabetical order."""
    return _kept(_all_words(), tested, longest)


@cache
def made_words(tested: bool, longest: int = LONGEST) -> Words:
    """Words that nobody uses, of the syllables of those that are used, as often as these occur in them."""
    return _kept(_all_made(), tested, longest)


def _kept(words: Iterable[str], tested: bool, longest: int) -> Words:
    return Words([word for word in words if len(word) <= longest and is_tested(word) == tested])


@cache
def _all_made() -> list[str]:
    known, rng = set(_all_words()), random.Random("made words")
    syllables = [s for word in _all_words() for s in _SYLLABLE.findall(word)]
    made: dict[str, None] = {}
    while len(made) < _MADE:
        word = "".join(rng.choice(syllables) for _ in range(rng.choice((2, 2, 3))))
        if _is_fit(word) and word not in known:
            made[word] = None
    return list(made)


@cache
def _all_words() -> list[str]:
    counts: Counter[str] = Counter()
    for text in docstrings(library().values()):
        counts.update(word.lower() for word in _WORD.findall(text))
    return sorted(word for word, count in counts.items() if count >= _LEAST_OCCURRENCES and _is_fit(word))


def _is_fit(word: str) -> bool:
    # Of a word of one letter alone nothing would be left when that is deleted.
    return SHORTEST <= len(word) <= LONGEST and len(set(word)) > 1
