"""Prose with typos: documentation strings of the standard library, clean or nearly so in training, less so in tests."""

import random
import string
from collections.abc import Iterable, Iterator

from pydantic import Field

from data_pipeline.section import Section
from experiments.tasks.library import docstrings, samples_of, samples_up_to, shuffled_texts
from experiments.tasks.writing import ComposedTask, Corpus, is_held_out


class NoiseOptions(Section):
    """How much text with how many typos; sizes are bytes of text."""

    train_bytes: int | None = Field(None, ge=1, description="of the text to train on; none: all")
    train_typos: float = Field(0.0, ge=0.0, le=1.0, description="share of letters with a typo in training")
    test_typos: list[float] = Field([0.0, 0.05, 0.1, 0.2], min_length=1, description="the same, a test each")
    held_out_bytes: int = Field(100_000, ge=1, description="of the text that is held out, at most")
    test_bytes: int = Field(40_000, ge=1, description="of each test; all have the same text")


def with_typos(text: str, share: float, rng: random.Random) -> str:
    """The text with typos at that share of its letters: dropped, doubled, changed, or swapped with the next."""
    if not share:
        return text
    out: list[str] = []
    letters = iter(text)
    for letter in letters:
        if not letter.isascii() or not letter.isalpha() or rng.random() >= share:
            out.append(letter)
            continue
        kind = rng.randrange(4)
        if kind == 1:
            out += [letter, letter]
        elif kind == 2:
            out.append(rng.choice(string.ascii_lowercase))
        elif kind == 3:
            out += [next(letters, ""), letter]
    return "".join(out)


def prose(seed: int) -> tuple[list[str], list[str]]:
    """Documentation strings to train on, and those of other files, which training has none of, for tests."""
    train = list(docstrings(shuffled_texts(False, seed)))
    known = set(train)
    return train, [text for text in docstrings(shuffled_texts(True, seed)) if text not in known]


def _compose(options: NoiseOptions, seed: int) -> Corpus:
    train, tested = prose(seed)

    def trained(held_out: bool) -> Iterator[str]:
        noisy = _noisy(train, options.train_typos, seed)
        return (text for text in noisy if is_held_out({"text": text}) == held_out)

    text = [s["text"] for s in samples_of(tested, options.test_bytes, "task noise, tests")]
    tests = {
        f"typos-{round(100 * share)}": [{"text": noisy} for noisy in _noisy(text, share, seed)]
        for share in options.test_typos
    }
    return Corpus(
        samples_of(trained(False), options.train_bytes, "task noise, training"),
        samples_up_to(trained(True), options.held_out_bytes),
        tests,
    )


def _noisy(texts: Iterable[str], share: float, seed: int) -> Iterator[str]:
    rng = random.Random(f"typos {share} {seed}")
    return (noisy for text in texts if (noisy := with_typos(text, share, rng)))


NOISE = ComposedTask("noise", NoiseOptions, _compose)
