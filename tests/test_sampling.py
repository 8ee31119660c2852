"""The tokeniser's text: from all over the corpus, never held-out, and a function of the corpus alone."""

from collections.abc import Iterator
from itertools import pairwise

import pytest

from data_pipeline.documents import Document
from data_pipeline.preparing.sampling import Part, Sampled, _fair_share, is_validation, sample_texts


def part(name: str, documents: int, opened: list[str] | None = None, size: int | None = None) -> Part:
    """A part of documents of 100 bytes."""

    def read() -> Iterator[Document]:
        if opened is not None:
            opened.append(name)
        for i in range(documents):
            yield Document(f"{name} {i} ".ljust(100, "."), "", (name, i))

    return Part(documents * 100 if size is None else size, read)


def sample(parts: list[Part], max_bytes: int, fraction: float = 0.0) -> tuple[list[str], Sampled]:
    sampled = Sampled()
    return list(sample_texts(parts, max_bytes, fraction, sampled)), sampled


def test_a_small_corpus_is_taken_whole() -> None:
    texts, sampled = sample([part("a", 3), part("b", 4)], 10_000)
    assert len(texts) == 7
    assert sampled == Sampled(bytes=700, documents=7, parts=2)


@pytest.mark.parametrize("max_bytes", [5_000, 100_001, 300_000])
def test_the_cap_holds(max_bytes: int) -> None:
    texts, sampled = sample([part(n, 4000) for n in "abcd"], max_bytes)
    assert max_bytes - 4 < sum(len(t.encode()) for t in texts) <= max_bytes
    assert sampled.bytes == sum(len(t.encode()) for t in texts)


def test_every_part_gives_a_fair_share() -> None:
    texts, _ = sample([part("small", 200), *(part(n, 5000) for n in ("x", "y", "z"))], 200_000)
    given = {name: sum(t.startswith(name) for t in texts) for name in ("small", "x", "y", "z")}
    assert given == {"small": 200, "x": 600, "y": 600, "z": 600}


def test_a_part_gives_more_than_its_start() -> None:
    texts, _ = sample([part("a", 10_000)], 100_000)
    numbers = [int(t.split()[1]) for t in texts]
    assert len(numbers) == 1000
    assert max(numbers) >= 1990
    assert max(b - a for a, b in pairwise(numbers)) <= 3


def test_of_many_parts_only_some_are_opened() -> None:
    """Spread over all of them."""
    opened: list[str] = []
    sample([part(f"{n}", 1000, opened) for n in range(1000)], 200_000)
    assert len(opened) == 13
    numbers = sorted(map(int, opened))
    assert max(b - a for a, b in zip([0, *numbers], [*numbers, 1000], strict=True)) < 150


def test_held_out_documents_train_nothing() -> None:
    texts, _ = sample([part("a", 500), part("b", 500)], 10**6, fraction=0.3)
    assert 500 < len(texts) < 900
    assert not [t for t in texts if is_validation(Document(t, "", ("", 0)), 0.3)]


def test_prompts_count_and_characters_stay_whole() -> None:
    documents = [Document("潮汐" * 50, "提示" * 10, ("a", i)) for i in range(9)]
    texts, sampled = sample([Part(10**6, lambda: documents)], 1000)
    assert 996 < sum(len(t.encode()) for t in texts) <= 1000
    assert set("".join(texts)) == set("潮汐提示")
    assert sampled.documents < len(documents)


def test_the_same_sample_every_time() -> None:
    parts = [part(n, 3000) for n in "abc"]
    assert sample(parts, 100_000, 0.1) == sample(parts, 100_000, 0.1)


@pytest.mark.parametrize(
    ("sizes", "total", "share"),
    [([10, 20, 30], 100, 100), ([10, 20, 30], 60, 60), ([10, 100, 100], 60, 25), ([5], 3, 3), ([7, 7], 10, 5)],
)
def test_fair_shares(sizes: list[int], total: int, share: int) -> None:
    assert _fair_share(sizes, total) == share
    assert sum(min(size, share) for size in sizes) >= min(total, sum(sizes))
