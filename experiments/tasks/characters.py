"""What one has to see the letters of a word for: spelling, reversing, counting, editing, rhyme.

    spell carry =              ->   c a r r y
    reverse carry =            ->  yrrac
    count r in carry =         ->  2
    insert x at 3 in carry =   ->  caxrry
    delete r from carry =      ->  cay
    end of carry =             ->  rry
    does carry rhyme marry =   ->  yes

One word in ten, by its hash, is kept for tests: training has it in no problem of any kind. The test of a kind has
words of the library's text; another, KIND-made, has made words.
"""

import random
import string
from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal

from pydantic import Field

from experiments.tasks.problems import ProblemOptions, Problems, Stream, corpus_of
from experiments.tasks.words import ENDING, LONGEST, SHORTEST, Words, made_words, real_words
from experiments.tasks.writing import ComposedTask, Corpus, Sample

Kind = Literal["spelling", "reversal", "counting", "editing", "rhyme"]

_NEAR_SHARE = 0.5  # of words that do not rhyme: they end in the same letter at least
_NEAR_DRAWS = 50


class SingleOptions(ProblemOptions):
    """A corpus of one kind of problems."""

    made_share: float = Field(0.5, ge=0.0, le=1.0, description="of training's problems about made words")
    max_letters: int = Field(LONGEST, ge=SHORTEST, le=LONGEST, description="of a word")
    made_tests: bool = Field(True, description="tests of made words too")


class CharactersOptions(SingleOptions):
    """A corpus of several kinds, equally many of each."""

    kinds: list[Kind] = Field(["spelling", "reversal", "counting", "editing", "rhyme"], min_length=1)


def _spelling(words: Words, rng: random.Random) -> Sample:
    word = words.draw(rng)
    return _sample(f"spell {word}", " ".join(word))


def _reversal(words: Words, rng: random.Random) -> Sample:
    word = words.draw(rng)
    return _sample(f"reverse {word}", word[::-1])


def _counting(words: Words, rng: random.Random) -> Sample:
    """The letter is one of the word's in four cases of five, the rarer numbers as often as the word allows."""
    word = words.draw(rng)
    numbers = sorted({word.count(letter) for letter in word})
    wanted = rng.choice(numbers)
    inside = sorted({letter for letter in word if word.count(letter) == wanted})
    letter = rng.choice(inside if rng.random() < 0.8 else string.ascii_lowercase)
    return _sample(f"count {letter} in {word}", str(word.count(letter)))


def _editing(words: Words, rng: random.Random) -> Sample:
    word = words.draw(rng)
    if rng.random() < 0.5:
        letter, at = rng.choice(string.ascii_lowercase), rng.randint(1, len(word) + 1)
        return _sample(f"insert {letter} at {at} in {word}", word[: at - 1] + letter + word[at - 1 :])
    letter = rng.choice(word)
    return _sample(f"delete {letter} from {word}", word.replace(letter, ""))


def _rhyme(words: Words, rng: random.Random) -> Sample:
    """A third asks for the ending; of the rest half are yes."""
    word = words.draw(rng)
    if rng.random() < 1 / 3:
        return _sample(f"end of {word}", word[-ENDING:])
    other = words.rhyme(word, rng) if rng.random() < 0.5 else None
    other = other or _other(word, words, rng)
    return _sample(f"does {word} rhyme {other}", "yes" if other[-ENDING:] == word[-ENDING:] else "no")


def _other(word: str, words: Words, rng: random.Random) -> str:
    """Some other word, often one with the same last letter."""
    drawn = [words.draw(rng) for _ in range(_NEAR_DRAWS if rng.random() < _NEAR_SHARE else 1)]
    return next((w for w in drawn if w[-1] == word[-1] and w != word), drawn[0])


def _sample(question: str, answer: str) -> Sample:
    return {"prompt": f"{question} =", "answer": f" {answer}"}


_KINDS: dict[Kind, Callable[[Words, random.Random], Sample]] = {
    "spelling": _spelling,
    "reversal": _reversal,
    "counting": _counting,
    "editing": _editing,
    "rhyme": _rhyme,
}


def _problems(kinds: list[Kind], options: SingleOptions) -> Problems:
    longest = options.max_letters
    real, made = real_words(True, longest), made_words(True, longest)
    tests: dict[str, Stream] = {kind: partial(_asked, [kind], [real], [1.0]) for kind in kinds}
    if options.made_tests:
        tests |= {f"{kind}-made": partial(_asked, [kind], [made], [1.0]) for kind in kinds}
    lists, weights = (
        [real_words(False, longest), made_words(False, longest)],
        [1 - options.made_share, options.made_share],
    )
    return Problems(partial(_asked, kinds, lists, weights), tests)


def _asked(kinds: list[Kind], lists: list[Words], weights: list[float], rng: random.Random) -> Iterator[Sample]:
    """Endless problems of these kinds about words of these lists."""
    while True:
        (words,) = rng.choices(lists, weights)
        yield _KINDS[rng.choice(kinds)](words, rng)


def _mixed(options: CharactersOptions, seed: int) -> Corpus:
    return corpus_of("characters", _problems(options.kinds, options), options, seed)


def _single(kind: Kind) -> ComposedTask[SingleOptions]:
    def compose(options: SingleOptions, seed: int) -> Corpus:
        return corpus_of(kind, _problems([kind], options), options, seed)

    return ComposedTask(kind, SingleOptions, compose)


CHARACTERS = ComposedTask("characters", CharactersOptions, _mixed)
SINGLE_KINDS: dict[str, ComposedTask[SingleOptions]] = {kind: _single(kind) for kind in _KINDS}
