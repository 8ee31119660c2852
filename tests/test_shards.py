import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from data_pipeline import shards
from data_pipeline.corpus import CorpusConfig, Document, ReadCounts, SourceConfig, read_documents
from data_pipeline.errors import ShardError, TokenizerError, UserError
from data_pipeline.ordering import RowAddress
from data_pipeline.packing import RowPlan
from data_pipeline.pieces import reverse_block
from data_pipeline.preparing.sampling import is_validation
from data_pipeline.rows import RowFormat, RowReader, read_row_plan, write_row_plan
from data_pipeline.segmentation import SegmentationConfig, segment, segmentation_hash
from data_pipeline.shard_reader import ShardReader
from data_pipeline.shards import SPLITS, Manifest
from data_pipeline.storage import Storage
from data_pipeline.tokenizer import MixedTokenizer, TokenizerConfig, train_tokenizer
from tests.conftest import TEXTS, Prepare

FRACTION = 0.2  # the tiny corpus's validation_fraction


def documents_of(corpus: CorpusConfig, split: str) -> list[Document]:
    documents = read_documents(corpus, ReadCounts())
    return [d for d in documents if is_validation(d, FRACTION) == (split == "validation")]


def every_document(manifest: Manifest, split: str) -> Iterator[tuple[ShardReader, int]]:
    for entry in manifest.shards(split):
        reader = ShardReader(manifest.storage, entry)
        yield from ((reader, i) for i in range(entry["documents"]))


def blocks_of(chars: np.ndarray, block_bytes: np.ndarray) -> list[str]:
    ends = np.cumsum(block_bytes, dtype=np.int64)
    return [reverse_block(chars[e - n : e].tobytes()).decode() for e, n in zip(ends, block_bytes, strict=True)]


def contents(folder: Path) -> dict[str, str]:
    """The hash of every file of a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def error_of(call: Callable[[], object], kind: type[UserError] = ShardError) -> str:
    """The message of the one-line error that `call` raises."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


@pytest.fixture
def copied(manifest: Manifest, tmp_path: Path) -> Manifest:
    """Shards that a test may break."""
    return Manifest.load(shutil.copytree(manifest.folder, tmp_path / "copy"))


def jsonl_corpus(path: Path, lines: list[Any], **settings: Any) -> CorpusConfig:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return CorpusConfig(sources=[SourceConfig(path=str(path), format="jsonl")], **settings)


def planned_rows(manifest: Manifest, row_tokens: int, row_chars: int) -> dict[str, list[int]]:
    plan = read_row_plan(manifest, RowFormat(row_tokens, row_chars))
    return {split: [shard["rows"] for shard in shards] for split, shards in plan.items()}


def plan_folder(manifest: Manifest, row_tokens: int, row_chars: int) -> Path:
    return manifest.folder / RowFormat(row_tokens, row_chars).plan_name


# What is written


def test_the_manifest_counts_right(manifest: Manifest, corpus: CorpusConfig, tokenizer: MixedTokenizer) -> None:
    tokenizer = manifest.tokenizer()
    assert manifest.hash == hashlib.sha256((manifest.folder / "manifest.json").read_bytes()).hexdigest()
    assert manifest.content["tokenizer_hash"] == tokenizer.hash
    assert manifest.content["segmentation_hash"] == segmentation_hash(SegmentationConfig())
    documents = 120 + 6 * len(TEXTS) + 2
    counts = ReadCounts(files=4, records=documents + 1, documents=documents, empty=1)
    assert manifest.content["read"] == asdict(counts)
    for split in SPLITS:
        documents = documents_of(corpus, split)
        prompts, answers = (
            [segment(text, SegmentationConfig()) for text in texts]
            for texts in ([d.prompt for d in documents], [d.text for d in documents])
        )
        whole = [block for pair in zip(prompts, answers, strict=True) for blocks in pair for block in blocks]
        totals = manifest.content["splits"][split]
        assert totals["documents"] == len(documents) > 10
        assert totals["blocks"] == len(whole)
        assert totals["tokens"] == sum(len(tokenizer.encode_block(block)) for block in whole)
        assert totals["text_bytes"] == sum(len((d.prompt + d.text).encode()) for d in documents)
        assert totals["supervised_bytes"] == sum(len(d.text.encode()) for d in documents)
        for key in ("documents", "blocks", "tokens", "text_bytes", "supervised_bytes", "bytes"):
            assert totals[key] == sum(entry[key] for entry in manifest.shards(split))


def test_the_manifest_knows_every_file(manifest: Manifest) -> None:
    entries = [entry for split in SPLITS for entry in manifest.shards(split)]
    assert len(manifest.shards("train")) > 2
    for entry in entries:
        tar, index = manifest.folder / f"{entry['name']}.tar", manifest.folder / f"{entry['name']}.index.npz"
        assert tar.stat().st_size == entry["bytes"]
        assert hashlib.sha256(tar.read_bytes()).hexdigest() == entry["sha256"]
        assert hashlib.sha256(index.read_bytes()).hexdigest() == entry["index_sha256"]
    plan = {f"rows-48x96/{entry['name']}.npz" for entry in entries} | {"rows-48x96/plan.json"}
    data = {f"{entry['name']}{end}" for entry in entries for end in (".tar", ".index.npz")}
    assert set(contents(manifest.folder)) == plan | data | {
        "manifest.json",
        "manifest.json.sha256",
        "tokenizer.json",
        "config.yaml",
        "corpus.sha256",
    }
    assert (manifest.folder / "config.yaml").read_text() == "resolved: true\n"


@pytest.mark.parametrize("split", SPLITS)
def test_the_reader_gives_every_document_back(manifest: Manifest, corpus: CorpusConfig, split: str) -> None:
    tokenizer = manifest.tokenizer()
    expected = documents_of(corpus, split)
    found = list(every_document(manifest, split))
    assert len(found) == len(expected)
    for (reader, i), document in zip(found, expected, strict=True):
        piece, origin = reader.document(i)
        prompt, answer = (segment(text, SegmentationConfig()) for text in (document.prompt, document.text))
        assert blocks_of(piece.chars, piece.block_bytes) == prompt + answer
        assert piece.supervised_from == len(prompt)
        assert piece.ends_document
        assert origin == document.origin
        assert piece.tokens.tolist() == [t for block in prompt + answer for t in tokenizer.encode_block(block)]
        assert piece.block_tokens.tolist() == [len(tokenizer.encode_block(block)) for block in prompt + answer]


def test_the_reader_cuts_pieces_out_of_a_document(manifest: Manifest) -> None:
    reader, i = max(every_document(manifest, "train"), key=lambda found: len(found[0].document(found[1])[0].chars))
    whole, _ = reader.document(i)
    blocks, n = blocks_of(whole.chars, whole.block_bytes), len(whole.block_bytes)
    for first, end in ((0, 1), (3, 9), (n - 2, n), (5, n - 1)):
        piece = reader.piece(i, first, end)
        assert blocks_of(piece.chars, piece.block_bytes) == blocks[first:end]
        assert piece.ends_document == (end == n)
        assert piece.supervised_from == 0
    prompted = next((r, d) for r, d in every_document(manifest, "train") if r.document(d)[0].supervised_from > 2)
    assert (
        prompted[0].piece(prompted[1], 2, 4).supervised_from == prompted[0].document(prompted[1])[0].supervised_from - 2
    )


@pytest.mark.parametrize("split", SPLITS)
def test_webdataset_reads_the_tars_without_our_code(manifest: Manifest, corpus: CorpusConfig, split: str) -> None:
    texts, origins, members = [], [], 0
    for entry in manifest.shards(split):
        path = str(manifest.folder / f"{entry['name']}.tar")
        for sample in webdataset.WebDataset(path, shardshuffle=False).decode():
            members += 1
            blocks = iter(blocks_of(sample["chars.npy"], sample["block_bytes.npy"]))
            documents = zip(sample["document_blocks.npy"], sample["prompt_blocks.npy"], strict=True)
            for n, prompt in documents:
                own = [next(blocks) for _ in range(n)]
                texts.append(("".join(own[:prompt]), "".join(own[prompt:])))
            assert next(blocks, None) is None
            origins += zip(
                [sample["files.json"][f] for f in sample["origin_file.npy"]], sample["origin_line.npy"], strict=True
            )
    expected = documents_of(corpus, split)
    assert texts == [(d.prompt, d.text) for d in expected]
    assert origins == [d.origin for d in expected]
    assert members > len(manifest.shards(split))


def test_a_member_holds_many_documents(prepare_corpus: Prepare, tmp_path: Path) -> None:
    written = prepare_corpus(tmp_path / "shards")
    entry = written.shards("train")[0]
    tar = str(written.folder / f"{entry['name']}.tar")
    assert len(list(webdataset.WebDataset(tar, shardshuffle=False))) == 1
    assert entry["documents"] > 100


def test_shard_bytes_bounds_a_shard(prepare_corpus: Prepare, tmp_path: Path) -> None:
    """About: a shard ends with the document that fills it."""
    lines = [{"text": f"document number {n} with some words in it"} for n in range(300)]
    limit, longest = 2000, 60
    written = prepare_corpus(
        tmp_path / "shards", jsonl_corpus(tmp_path / "a.jsonl", lines, validation_fraction=0.0), shard_bytes=limit
    )
    assert all(entry["text_bytes"] < limit + longest for entry in written.shards("train"))


def test_preparing_twice_writes_the_same_bytes(prepare_corpus: Prepare, tmp_path: Path) -> None:
    first, second = (prepare_corpus(tmp_path / name, shard_bytes=1000) for name in "ab")
    assert contents(first.folder) == contents(second.folder)
    assert first.hash == second.hash


def test_splits_are_disjoint_and_by_content(prepare_corpus: Prepare, tmp_path: Path) -> None:
    lines = [{"text": f"text {n % 150}"} for n in range(300)] + [
        {"prompt": f"text {n}", "answer": "x"} for n in range(9)
    ]
    written = prepare_corpus(tmp_path / "shards", jsonl_corpus(tmp_path / "a.jsonl", lines, validation_fraction=0.3))
    texts = {
        split: [
            "\0".join(blocks_of(piece.chars, piece.block_bytes))
            for reader, i in every_document(written, split)
            for piece in [reader.document(i)[0]]
        ]
        for split in SPLITS
    }
    assert not set(texts["train"]) & set(texts["validation"])
    assert len(texts["train"]) + len(texts["validation"]) == len(lines)
    assert 0.2 < len(texts["validation"]) / len(lines) < 0.4


def test_the_split_is_a_function_of_the_text() -> None:
    a, b = (Document(f"text {n}", "prompt", ("file", n)) for n in (1, 2))
    moved = Document(a.text, a.prompt, ("elsewhere", 9))
    for fraction in np.linspace(0, 1, 50):
        assert is_validation(a, fraction) == is_validation(moved, fraction)
    assert any(is_validation(a, f) != is_validation(b, f) for f in np.linspace(0, 1, 50))
    assert not is_validation(a, 0.0)
    # What is held out for a small share stays held out for a larger one.
    shares = [is_validation(a, fraction) for fraction in np.linspace(0, 1, 50)]
    assert shares == sorted(shares)


# Row plans


def pieces_by_document(
    manifest: Manifest, row_tokens: int, row_chars: int
) -> dict[tuple[str, int], list[tuple[int, int]]]:
    """The pieces of every document in a stored plan, in order."""
    found: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for split in SPLITS:
        for entry, rows in zip(
            manifest.shards(split), planned_rows(manifest, row_tokens, row_chars)[split], strict=True
        ):
            with np.load(plan_folder(manifest, row_tokens, row_chars) / f"{entry['name']}.npz") as arrays:
                plan = RowPlan(**arrays)
            assert plan.rows == rows
            for row in range(rows):
                for document, first, end in plan.pieces(row):
                    found.setdefault((entry["name"], document), []).append((first, end))
    return {key: sorted(pieces) for key, pieces in found.items()}


def test_rows_are_planned_anew_without_the_tars(copied: Manifest) -> None:
    tars = {path: path.read_bytes() for path in copied.folder.rglob("*.tar")}
    for path in tars:
        path.unlink()
    write_row_plan(copied, RowFormat(20, 40))
    assert planned_rows(copied, 48, 96)["train"] < planned_rows(copied, 20, 40)["train"]
    for pieces in pieces_by_document(copied, 20, 40).values():
        assert all(a[1] == b[0] for a, b in pairwise(pieces))
    for path, data in tars.items():
        path.write_bytes(data)
    reader = RowReader(copied, "train", copied.tokenizer(), RowFormat(20, 40), seed=1)
    tokens, chars, labels = reader.row(RowAddress(0, 0, 0), None)
    assert tokens.ids.shape == (20,)
    assert chars.ids.shape == labels.shape == (40,)


def test_the_rows_hold_every_supervised_byte(manifest: Manifest) -> None:
    reader = RowReader(manifest, "train", manifest.tokenizer(), RowFormat(48, 96), seed=1)
    rows = [reader.pieces(RowAddress(0, shard, row)) for shard, n in enumerate(reader.shard_rows) for row in range(n)]
    supervised = sum(int(p.block_bytes[p.supervised_from :].sum()) for pieces in rows for p in pieces)
    assert supervised == manifest.content["splits"]["train"]["supervised_bytes"]
    assert sum(p.ends_document for pieces in rows for p in pieces) == manifest.content["splits"]["train"]["documents"]


def test_a_plan_for_a_row_too_short(copied: Manifest) -> None:
    message = error_of(lambda: write_row_plan(copied, RowFormat(20, 10)))
    assert "train/0000" in message
    assert "data.row_chars=10" in message
    assert "no row plan for 20x10" in error_of(lambda: planned_rows(copied, 20, 10))


def test_no_plan(manifest: Manifest) -> None:
    assert "no row plan for 33x77 slots" in error_of(lambda: planned_rows(manifest, 33, 77))


def test_a_plan_of_other_shards(copied: Manifest, prepare_corpus: Prepare, tmp_path: Path) -> None:
    other = prepare_corpus(tmp_path / "other", jsonl_corpus(tmp_path / "a.jsonl", [{"text": "x y z"}] * 9))
    shutil.rmtree(plan_folder(copied, 48, 96))
    shutil.copytree(plan_folder(other, 48, 96), plan_folder(copied, 48, 96))
    assert "belongs to other shards" in error_of(lambda: planned_rows(copied, 48, 96))


def open_rows(manifest: Manifest) -> None:
    reader = RowReader(manifest, "train", manifest.tokenizer(), RowFormat(48, 96), seed=1)
    for row in range(reader.shard_rows[0]):
        reader.row(RowAddress(0, 0, row), None)


@pytest.mark.parametrize("damage", ["torn", "empty", "missing"])
def test_a_broken_row_plan(copied: Manifest, damage: str) -> None:
    path = plan_folder(copied, 48, 96) / f"{copied.shards('train')[0]['name']}.npz"
    break_file(path, damage)
    assert str(path) in error_of(lambda: open_rows(copied))


def test_a_flipped_bit_in_a_row_plan(copied: Manifest) -> None:
    """Wherever it is: an error, or, where the archive does not need the byte, the same rows."""
    path = plan_folder(copied, 48, 96) / f"{copied.shards('train')[0]['name']}.npz"
    tokenizer = copied.tokenizer()

    def rows() -> list[list[int]]:
        reader = RowReader(copied, "train", tokenizer, RowFormat(48, 96), seed=1)
        return [
            [len(piece.chars) for piece in reader.pieces(RowAddress(0, 0, row))] for row in range(reader.shard_rows[0])
        ]

    data, right = path.read_bytes(), rows()
    errors = 0
    for i in range(0, len(data), 11):
        path.write_bytes(data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :])
        try:
            assert rows() == right, f"byte {i}"
        except ShardError:
            errors += 1
    assert errors > 20


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_broken_plan_file(copied: Manifest, content: str) -> None:
    path = plan_folder(copied, 48, 96) / "plan.json"
    path.write_text(content)
    assert str(path) in error_of(lambda: planned_rows(copied, 48, 96))


# What is broken


def break_file(path: Path, damage: str) -> None:
    data = path.read_bytes()
    if damage == "torn":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        middle = len(data) // 2
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "part"),
    [("torn", "torn"), ("flipped", "sha256 differs"), ("empty", "torn"), ("missing", "No such file")],
)
def test_a_broken_tar(copied: Manifest, damage: str, part: str) -> None:
    path = copied.folder / f"{copied.shards('train')[0]['name']}.tar"
    break_file(path, damage)
    message = error_of(lambda: open_rows(copied))
    assert str(path) in message
    assert part in message


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        ("torn", "torn"),
        ("flipped", "sha256 differs"),
        ("empty", "torn"),
        ("missing", "No such file"),
    ],
)
def test_a_broken_index(copied: Manifest, damage: str, part: str) -> None:
    path = copied.folder / f"{copied.shards('train')[0]['name']}.index.npz"
    break_file(path, damage)
    message = error_of(lambda: write_row_plan(copied, RowFormat(20, 40)))
    assert str(path) in message
    assert part in message


def test_no_manifest(tmp_path: Path) -> None:
    message = error_of(lambda: Manifest.load(tmp_path / "none"))
    assert str(tmp_path / "none") in message
    assert "no manifest.json" in message


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ('{"format": 1}', "format 1, this program reads 2"),
        ('{"splits": {}}', "format None"),
        ("[]", "format None"),
        ('{"format": 1', "manifest.json: cannot read"),
        ("", "manifest.json: cannot read"),
        ("\x00\x01", "manifest.json: cannot read"),
    ],
)
def test_another_manifest(copied: Manifest, content: str, part: str) -> None:
    path = copied.folder / "manifest.json"
    path.write_text(content)
    message = error_of(lambda: Manifest.load(copied.folder))
    assert str(path) in message
    assert part in message


def test_another_tokeniser_in_the_folder(copied: Manifest) -> None:
    other = train_tokenizer(["quite another text"], TokenizerConfig(vocab_size=260), SegmentationConfig())
    other.save(copied.folder / "tokenizer.json")
    message = error_of(copied.tokenizer)
    assert "another tokeniser" in message
    assert other.hash[:12] in message
    assert copied.content["tokenizer_hash"][:12] in message
    (copied.folder / "tokenizer.json").unlink()
    assert "cannot load the tokeniser" in error_of(copied.tokenizer, TokenizerError)


@pytest.mark.parametrize("change", [{"max_block_bytes": 16}, {"max_unspaced_chars": 1}])
def test_another_segmentation(manifest: Manifest, change: dict[str, int]) -> None:
    path = manifest.folder / "tokenizer.json"
    same = MixedTokenizer.load(path, SegmentationConfig())
    manifest.check(same)
    other = MixedTokenizer.load(path, SegmentationConfig(**change))
    assert "another segmentation" in error_of(lambda: manifest.check(other))


def test_many_tokens_fit_the_token_type(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokenizer: MixedTokenizer
) -> None:
    """Ids beyond 65,535 take a wider type instead of wrapping round."""
    monkeypatch.setattr(tokenizer, "vocab_size", (1 << 16) + 1)
    many = np.array([1 << 16], np.int32), np.array([1])
    monkeypatch.setattr(tokenizer, "encode_blocks", lambda _: many)
    writer = shards.ShardWriter(tmp_path, "train", tokenizer, 1000)
    writer.write(Document("x", "", ("file", 1)))
    (entry,) = writer.close()
    assert ShardReader(Storage(tmp_path), entry).document(0)[0].tokens.tolist() == [1 << 16]


def test_a_plan_has_no_field_that_is_not_stored() -> None:
    names = ["row_ends", "document", "first_block", "end_block", "supervised_block", "block_start", "token_start"]
    names += ["byte_start", "tokens", "bytes", "token_slots", "char_slots"]
    assert [f.name for f in fields(RowPlan)] == names
