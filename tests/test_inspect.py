"""One document as the model sees it: what training reads, what a model says of it, and how a terminal shows it."""

import contextlib
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from data_pipeline.layout import Slots, alone
from data_pipeline.ordering import RowAddress
from data_pipeline.rows import RowFormat, RowReader
from data_pipeline.shards import Manifest
from data_pipeline.stream import batch_of_rows
from tests.builders import document_of, packed, small_model, small_tokenizer
from tests.exporting import write_export_of, write_small_export
from tests.launching import prepare_sums, tidal_error, tidal_here
from tidal_dist.cli import main
from tidal_dist.inspection.document import Shown, Source, given_text, open_source, stored_document
from tidal_dist.inspection.reading import read
from tidal_dist.inspection.report import as_object, without_nan
from tidal_dist.inspection.text import as_text

FITTING = "12 + 34 = 46"
LONG = " ".join(f"{n} + {n} = {2 * n}" for n in range(10, 30))


def write_config(config: Path, out: Path, corpus: str, **data: int) -> Path:
    """Another corpus and other rows than those of `config`; the folder of the shards."""
    content = yaml.safe_load(config.read_text())
    out.mkdir()
    (out / "corpus.jsonl").write_text(corpus)
    content["corpus"]["sources"][0]["path"] = str(out / "corpus.jsonl")
    content["data"] |= {"shards": str(out / "shards"), **data}
    (out / "config.yaml").write_text(yaml.safe_dump(content))
    assert tidal_here("prepare", out / "config.yaml").returncode == 0
    return out / "shards"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`sums`: shards of sums, several of them; `long`: shards whose documents are cut; `other`: an unrelated export."""
    folder = tmp_path_factory.mktemp("inspect")
    config = prepare_sums(folder / "sums", count=600)
    records = [{"prompt": f"document {n}:", "answer": f" {n} {LONG}"} for n in range(12)] + [{"text": FITTING}]
    write_config(config, folder / "long", "".join(json.dumps(r) + "\n" for r in records))
    write_small_export(folder / "other")
    return folder


@pytest.fixture(scope="module")
def sums(folder: Path) -> Path:
    return folder / "sums" / "shards"


@pytest.fixture(scope="module")
def long(folder: Path) -> Path:
    return folder / "long" / "shards"


@pytest.fixture
def readable() -> Source:
    """A source of the small tokeniser and a model of random weights."""
    model = small_model(small_tokenizer(), dtype=torch.float32).eval()
    return Source(small_tokenizer(), "mirrored", "block", model, None)


def assert_same(found: Shown, expected: tuple[Slots, Slots, np.ndarray]) -> None:
    for ours, theirs in zip((found.tokens, found.chars), expected[:2], strict=True):
        for name, array in ours.arrays().items():
            np.testing.assert_array_equal(array, theirs.arrays()[name], name)
    np.testing.assert_array_equal(found.labels, expected[2])


def rows_of_training(shards: Path, split: str, number: int) -> list[tuple[Slots, Slots, np.ndarray]]:
    """A document's pieces, in the order of their first blocks, cut out of the rows that training reads."""
    manifest = Manifest.load(shards)
    reader = RowReader(manifest, split, manifest.tokenizer(), RowFormat(48, 40), seed=1)
    counts = [entry["documents"] for entry in manifest.shards(split)]
    shard = next(i for i in range(len(counts)) if number < sum(counts[: i + 1]))
    within = number - sum(counts[:shard])
    found = []
    for row in range(reader.shard_rows[shard]):
        plan = reader._open(shard)[1]
        for place, (document, first, _) in enumerate(plan.pieces(row), 1):
            if document == within:
                found.append((first, alone(reader.row(RowAddress(0, shard, row), None), place)))
    return [piece for _, piece in sorted(found, key=lambda pair: pair[0])]


@pytest.mark.parametrize(("split", "number"), [("train", 0), ("train", -1), ("train", 261), ("validation", 3)])
def test_a_document_is_what_training_reads(sums: Path, split: str, number: int) -> None:
    source = open_source(sums, None)
    entries = Manifest.load(sums).shards(split)
    assert split == "validation" or len(entries) > 1
    number %= sum(entry["documents"] for entry in entries)
    (expected,) = rows_of_training(sums, split, number)
    assert_same(stored_document(source, split, number, None), expected)
    assert_same(stored_document(source, split, number, 0), expected)


def test_pieces_are_what_training_cuts(long: Path) -> None:
    source = open_source(long, None)
    expected = rows_of_training(long, "train", 2)
    assert len(expected) > 3
    for piece, row in enumerate(expected):
        assert_same(stored_document(source, "train", 2, piece), row)


def test_it_says_where_a_document_comes_from(folder: Path, sums: Path) -> None:
    report = json.loads(tidal_here("inspect", sums, "--document", "5", "--json").stdout)
    where = report["where"]
    record = json.loads(Path(where["file"]).read_text().splitlines()[where["line"] - 1])
    assert "".join(report["blocks"]["text"]) == record["prompt"] + record["answer"]
    parts = dict(zip(report["blocks"]["text"], report["blocks"]["part"], strict=True))
    assert parts[" ="] == "prompt"
    assert parts[record["answer"]] == "supervised"
    text = tidal_here("inspect", sums, "--document", "5").stdout.decode()
    assert f"{folder / 'sums' / 'corpus.jsonl'}:{where['line']}" in text.splitlines()[0]
    assert report["title"] == text.splitlines()[0]


def test_a_long_document_asks_for_a_piece(long: Path) -> None:
    pieces = len(rows_of_training(long, "train", 2))
    message = tidal_error("inspect", long, "--document", "2")
    assert re.search(r"takes \d+ token slots and \d+ char slots, a row holds 48 and 40", message)
    assert message.endswith(f"into {pieces} pieces; choose one with --piece 0..{pieces - 1}")
    assert f"pieces 0..{pieces - 1}; choose one" in tidal_error("inspect", long, "--document", "2", "--piece", "99")
    text = tidal_here("inspect", long, "--document", "2", "--piece", "1").stdout.decode()
    assert f"piece 1 of 0..{pieces - 1}: blocks " in text.splitlines()[0]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["SUMS"], "give either --document N, of a shard folder, or --text T"),
        (["SUMS", "--document", "0", "--text", "a"], "give either --document N"),
        (["SUMS", "--document", "-1"], "--document -1: must be at least 0"),
        (["SUMS", "--document", "0", "--piece", "-1"], "--piece -1: must be at least 0"),
        (["SUMS", "--document", "0", "--piece", "1"], "--piece 1: training cuts train document 0 into"),
        (["SUMS", "--document", "99999"], "--document 99999: train has the documents 0.."),
        (["SUMS", "--document", "0", "--prompt", "a"], "--prompt goes with --text"),
        (["SUMS", "--text", "a", "--piece", "0"], "--piece goes with --document"),
        (["SUMS", "--text", "a", "--split", "train"], "--split goes with --document"),
        (["SUMS", "--text", ""], "--text is empty"),
        (["SUMS", "--text", "\udcff"], "--text: the prompt is not UTF-8"),
        (["SUMS", "--document", "0", "--model", "OTHER"], "the shards were made with another tokeniser"),
        (["SUMS", "--document", "0", "--model", "nowhere"], "nowhere: no config.json, so no exported model"),
        (["OTHER", "--document", "0"], "--document needs shards"),
        (["OTHER", "--text", "a", "--model", "OTHER"], "is an export and brings its own model; leave --model out"),
        (["nowhere", "--text", "a"], "nowhere: neither shards (no manifest.json) nor an export (no config.json)"),
    ],
)
def test_a_mistake_gets_one_line(folder: Path, sums: Path, arguments: list[str], expected: str) -> None:
    places = {"SUMS": str(sums), "OTHER": str(folder / "other")}
    assert expected in tidal_error("inspect", *(places.get(a, a) for a in arguments))


def test_an_empty_split(folder: Path, tmp_path: Path) -> None:
    shards = write_config(folder / "sums" / "config.yaml", tmp_path / "one", '{"text": "12 + 34 = 46"}\n')
    empty = next(s for s, content in Manifest.load(shards).content["splits"].items() if not content["documents"])
    assert f"the {empty} split is empty" in tidal_error("inspect", shards, "--document", "0", "--split", empty)


def test_a_model_of_the_shards_reads_a_document(sums: Path, tmp_path: Path) -> None:
    tokenizer = Manifest.load(sums).tokenizer()
    probe = packed([[document_of("12 + 34")]], tokenizer, (48, 48))
    write_export_of(tmp_path / "export", small_model(tokenizer, dtype=torch.float32), tokenizer, probe, "")
    result = tidal_here("inspect", sums, "--document", "4", "--model", tmp_path / "export", "--json")
    report = json.loads(result.stdout)
    assert len(report["chars"]["nats"]) == len(report["chars"]["label"])
    assert len(report["attention"]["own"]) == 3 * 2


def test_nats_add_up_to_the_loss(readable: Source) -> None:
    shown = given_text(readable, "12 + 34 =", " 46, 潮水 café")
    reading = read(readable.model, shown)
    batch = batch_of_rows([(shown.tokens, shown.chars, shown.labels)])
    with torch.no_grad():
        loss = float(readable.model(batch.tokens, batch.chars, batch.labels))
    report = as_object(shown, readable.tokenizer.name, reading)
    assert report["loss"]["nats"] == pytest.approx(loss, rel=1e-5)
    assert sum(report["characters"]["nats"]) == pytest.approx(loss, rel=1e-5)
    size = len(" 46, 潮水 café".encode())
    assert report["loss"]["bits_per_byte"] == pytest.approx(loss / np.log(2) / size, rel=1e-5)


def test_alternatives_are_sorted_and_shares_add_up(readable: Source) -> None:
    shown = given_text(readable, "12 +", " 34")
    report = as_object(shown, readable.tokenizer.name, read(readable.model, shown))
    for found, p in zip(report["chars"]["alternatives_p"], report["chars"]["p"], strict=True):
        assert found == sorted(found, reverse=True)
        assert len(found) == 3
        assert p <= found[0] + 1e-6
    shares = report["attention"]
    assert shares["layer"] == [0, 0, 1, 1, 2, 2]
    for parts in zip(shares["bos"], shares["last"], shares["others"], shares["own"], strict=True):
        assert sum(parts) == pytest.approx(1, abs=1e-5)
        assert min(parts) > 0


def test_the_last_token_before_the_first_block_is_bos(readable: Source) -> None:
    shown = given_text(readable, "", "12")
    assert {(s.last, s.others) for s in read(readable.model, shown).shares} == {(0.0, 0.0)}


def test_layers_without_chars_have_no_shares() -> None:
    model = small_model(small_tokenizer(), dtype=torch.float32, char_layers=1).eval()
    source = Source(small_tokenizer(), "mirrored", "block", model, None)
    assert [(s.layer, s.head) for s in read(model, given_text(source, "12", " 34")).shares] == [(2, 0), (2, 1)]


def test_the_text_is_in_reading_order(readable: Source) -> None:
    shown = given_text(readable, "12 =", " 潮水é")
    report = as_object(shown, readable.tokenizer.name, read(readable.model, shown))
    characters, nats = report["characters"], report["chars"]["nats"]
    inner = [text for text, is_end in zip(characters["text"], characters["is_end"], strict=True) if not is_end]
    assert "".join(inner) == " 潮水é"
    assert characters["text"][0] in ("<eob>", "<eos>")
    runs = np.flatnonzero(np.array(report["chars"]["index"]) == 0).tolist()
    # The last block ends in é, whose two bytes are written first.
    assert characters["nats"][-1] == pytest.approx(sum(nats[runs[-1] : runs[-1] + 2]))
    text = as_text(report, colour=False)
    assert re.search(r"^12 =⏎ .*é$", text, flags=re.MULTILINE)


def test_digits_stand_under_their_characters(readable: Source) -> None:
    shown = given_text(readable, "1", " 潮a\nb\x1b")
    report = as_object(shown, readable.tokenizer.name, None)
    report |= {"loss": {"nats": 1.0, "labels": 1, "text_bytes": 1, "bits_per_byte": 1.0}}
    report["attention"] = {name: [] for name in ("layer", "head", "bos", "last", "others", "own")}
    texts = ["<eos>", " ", "潮", "a", "\n", "b", "\x1b"]
    nats = [0.0, 0.2, 5.0, 0.6, float("nan"), 1.5, 2.5]
    report["characters"] = {"text": texts, "is_end": [i == 0 for i in range(7)], "nats": nats}
    lines = as_text(report, colour=False).splitlines()
    start = lines.index("loss") + 1
    assert lines[start : start + 4] == ["1■ 潮a↵", " .15525", "b\\x1b", "34444"]
    coloured = as_text(report, colour=True)
    assert "1\x1b[38;5;16;48;5;194m■\x1b[0m" in coloured
    assert coloured.count("\x1b[38;5;16") == coloured.count("\x1b[0m")
    assert json.loads(json.dumps(without_nan(report)))["characters"]["nats"][4] is None


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "no_color", "coloured"),
    [(Terminal, None, True), (Terminal, "", True), (Terminal, "1", False), (io.StringIO, None, False)],
)
def test_colours_only_on_a_terminal(
    folder: Path, monkeypatch: pytest.MonkeyPatch, stream: type[io.StringIO], no_color: str | None, coloured: bool
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color is not None:
        monkeypatch.setenv("NO_COLOR", no_color)
    with contextlib.redirect_stdout(stream()) as out:
        assert main(["inspect", str(folder / "other"), "--text", "12 + 34"]) == 0
    assert ("\x1b[" in out.getvalue()) == coloured
    assert "bits per byte" in out.getvalue()


@pytest.mark.slow
def test_pictures_lie_side_by_side(folder: Path, sums: Path, tmp_path: Path) -> None:
    result = tidal_here("inspect", sums, "--document", "0", "--plot", tmp_path / "alone.png")
    assert result.stderr.decode().splitlines() == [f"wrote {tmp_path}/alone.png"]
    result = tidal_here("inspect", folder / "other", "--text", "12 + 34", "--plot", tmp_path / "out.png")
    names = ["out.png", "out-attention.png", "out-loss.png"]
    assert result.stderr.decode().splitlines() == [f"wrote {tmp_path / name}" for name in names]
    assert {p.name for p in tmp_path.iterdir()} == {"alone.png", *names}
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in tmp_path.iterdir())


def test_a_picture_that_cannot_be_written(sums: Path, tmp_path: Path) -> None:
    assert f"{tmp_path}: cannot write" in tidal_error("inspect", sums, "--text", "a", "--plot", tmp_path)
