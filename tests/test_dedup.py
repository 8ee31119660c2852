"""Duplicates: which records go, that the first stays, and that the counts add up."""

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.corpus import CorpusConfig, SourceConfig
from data_pipeline.documents import ReadCounts
from data_pipeline.duplicates import DedupConfig, MinHashConfig
from data_pipeline.pieces import blocks_of_piece
from data_pipeline.prepare import Prepared, run
from data_pipeline.shard_reader import ShardReader
from data_pipeline.shards import SPLITS
from tests.preparing import contents, redone, request_for

WORDS = ("tide", "moon", "shore", "wave", "sand", "wind", "gull", "rock", "foam", "salt", "boat", "sail", "rope", "fog")


def sentence(seed: int, words: int = 40) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def write(folder: Path, *files: Iterable[dict[str, Any]]) -> None:
    (folder / "texts").mkdir()
    for number, records in enumerate(files):
        (folder / "texts" / f"{number}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def prepared(folder: Path, dedup: DedupConfig, **changes: Any) -> Prepared:
    source = SourceConfig(path=str(folder / "texts"), format="jsonl")
    corpus = CorpusConfig(sources=[source], validation_fraction=0.3, dedup=dedup, chat_template="{role}: {content}\n")
    return run(request_for(folder, corpus, task_bytes=1, **changes))


def documents(shards: Prepared) -> list[tuple[str, str, int]]:
    """Text, file name and line of every document, in the corpus's order."""
    found = []
    for split in SPLITS:
        for entry in shards.manifest.shards(split):
            reader = ShardReader(shards.manifest.storage, entry)
            for i in range(entry["documents"]):
                piece, (file, line) = reader.document(i)
                found.append(("".join(blocks_of_piece(piece)), Path(file).name, line))
    return sorted(found, key=lambda d: d[1:])


def check_sums(shards: Prepared) -> dict[str, int]:
    """Everything that was read is in the shards or a counted duplicate; the duplicates."""
    content = shards.manifest.content
    counts = ReadCounts(**content["read"])
    assert counts.unaccounted == 0
    written = sum(split["documents"] for split in content["splits"].values())
    assert counts.documents == written + sum(content["duplicates"].values())
    return content["duplicates"]


def test_the_same_text(tmp_path: Path) -> None:
    write(
        tmp_path,
        [{"text": "a"}, {"text": "b"}, {"text": "a"}],
        [{"text": "c"}, {"prompt": "a", "answer": "b"}, {"text": "b"}],
        [{"prompt": "a", "answer": "b"}, {"text": "ab"}, {"text": "a"}, {"text": "d"}],
    )
    shards = prepared(tmp_path, DedupConfig(text=True))
    assert [d[1:] for d in documents(shards)] == [
        ("0.jsonl", 1),
        ("0.jsonl", 2),
        ("1.jsonl", 1),
        ("1.jsonl", 2),
        ("2.jsonl", 2),
        ("2.jsonl", 4),
    ]
    assert check_sums(shards) == {"text": 4}


def test_the_same_url(tmp_path: Path) -> None:
    write(
        tmp_path,
        [{"text": "no address"}, {"text": "first", "url": "http://a"}, {"text": "again", "url": "http://a"}],
        [{"text": "other", "url": "http://b"}, {"text": "no address"}, {"text": "late", "url": "http://a"}],
    )
    shards = prepared(tmp_path, DedupConfig(url=True))
    assert [d[0] for d in documents(shards)] == ["no address", "first", "other", "no address"]
    assert check_sums(shards) == {"url": 2}


def test_nearly_the_same_text(tmp_path: Path) -> None:
    originals = [sentence(seed) for seed in range(12)]
    near = [f"{text.upper()}! 17" for text in originals[:5]]
    short = [{"text": "too short"}] * 2
    write(tmp_path, [{"text": t} for t in originals], [{"text": t} for t in near], short)
    shards = prepared(tmp_path, DedupConfig(minhash=MinHashConfig()))
    texts = [d[0] for d in documents(shards)]
    assert texts.count("too short") == 2
    assert sorted(t.lower().removesuffix("! 17") for t in texts if t != "too short") == sorted(originals)
    assert check_sums(shards) == {"minhash": 5}


def test_a_chat_stays_or_goes_as_a_whole(tmp_path: Path) -> None:
    def chat(*turns: str) -> dict[str, Any]:
        roles = ["user", "assistant"] * len(turns)
        return {"messages": [{"role": r, "content": c} for r, c in zip(roles, turns, strict=False)]}

    long = chat("hello", sentence(1), "and then?", sentence(2), "more", sentence(3))
    write(tmp_path, [long, chat("hello", "you")], [chat("hello", "you"), long, chat("bye", "you")])
    for dedup in (DedupConfig(text=True), DedupConfig(minhash=MinHashConfig(run_words=2))):
        shards = prepared(tmp_path, dedup, overwrite=True)
        lines = [d[1:] for d in documents(shards)]
        assert lines.count(("0.jsonl", 1)) + lines.count(("1.jsonl", 2)) == 3
        assert ("1.jsonl", 3) in lines
    assert len(lines) == 3 + 2


@pytest.mark.slow
def test_all_kinds_after_each_other(tmp_path: Path) -> None:
    """What one kind drops is not there for the next; a task may be left without a record."""
    write(
        tmp_path,
        [{"text": sentence(1), "url": "http://a"}, {"text": sentence(2), "url": "http://b"}],
        [{"text": sentence(3), "url": "http://a"}, {"text": sentence(2), "url": "http://c"}],
        [{"text": sentence(3)}, {"text": sentence(2) + ".", "url": "http://d"}],
        [{"text": sentence(1), "url": "http://a"}],
        [{"text": ""}],
    )
    shards = prepared(tmp_path, DedupConfig(url=True, text=True, minhash=MinHashConfig()))
    texts = [d[0].rstrip(".") for d in documents(shards)]
    assert sorted(texts) == sorted([sentence(1), sentence(2), sentence(3)])
    assert check_sums(shards) == {"url": 2, "text": 1, "minhash": 1}
    found = contents(shards.manifest.folder)
    everything = DedupConfig(url=True, text=True, minhash=MinHashConfig())
    assert contents(prepared(tmp_path, everything, overwrite=True).manifest.folder) == found


def test_nothing_to_drop(tmp_path: Path) -> None:
    write(tmp_path, [{"text": sentence(n)} for n in range(5)])
    shards = prepared(tmp_path, DedupConfig(url=True, text=True, minhash=MinHashConfig()))
    assert check_sums(shards) == {"url": 0, "text": 0, "minhash": 0}
    assert len(documents(shards)) == 5


@pytest.mark.slow
def test_more_finders_find_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(1)
    write(tmp_path, *([{"text": f"{rng.randrange(40)}"} for _ in range(20)] for _ in range(5)))
    found = []
    for tasks_per_finder in (16, 1):
        monkeypatch.setattr("data_pipeline.preparing.dedup._TASKS_PER_FINDER", tasks_per_finder)
        shards = prepared(tmp_path, DedupConfig(text=True), overwrite=True)
        assert redone(shards)["text-duplicates"] == (1 if tasks_per_finder == 16 else 5)
        texts = [d[0] for d in documents(shards)]
        assert len(texts) == len(set(texts))
        found.append(contents(shards.manifest.folder))
    assert found[0] == found[1]
