"""datatrove's filters by configuration: what they refuse, what they need, what is counted."""

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datatrove.pipeline.filters as theirs
import fasttext
import numpy as np
import pytest
from pydantic import ValidationError

from data_pipeline import filters
from data_pipeline.corpus import CorpusConfig, Document, ReadCounts, list_files, read_files
from data_pipeline.documents import BadRecords, SideFile
from data_pipeline.errors import CorpusError
from data_pipeline.filters import apply_filters, build_filters

# datatrove asks tldextract for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:The 'registered_domain' property is deprecated:DeprecationWarning")

PROSE = (
    "The tide is what the sea does when the moon and the sun pull at it, and people have kept tables of it for long. "
    "A harbour that lies dry in the morning may have ships in it by noon, which strangers find hard to believe. "
    "Those who live there know the hours by heart and plan their work around them. "
    "Nobody that I have met would build a house below the line where the sea has been. "
    "When a storm comes with the flood, the water stands in the streets and everyone helps to carry the sand. "
)


def config_of(*sections: dict[str, Any], **settings: Any) -> CorpusConfig:
    source = {"path": "a", "format": "jsonl"}
    return CorpusConfig.model_validate({"sources": [source], "filters": list(sections)} | settings)


def documents_of(*texts: str | tuple[str, str], url: str = "") -> list[Document]:
    pairs = [("", t) if isinstance(t, str) else t for t in texts]
    return [Document(text, prompt, ("f", n), "s", url) for n, (prompt, text) in enumerate(pairs, 1)]


def fail(document: Document, why: str) -> None:
    raise AssertionError(f"{document}: {why}")


def kept(config: CorpusConfig, documents: list[Document]) -> tuple[list[Document], ReadCounts]:
    counts = ReadCounts()
    return list(apply_filters(config, iter(documents), counts, None, fail)), counts


def error_of(*sections: dict[str, Any]) -> str:
    """The error that stands before the first document is taken."""

    def documents() -> Iterator[Document]:
        raise AssertionError
        yield

    with pytest.raises(CorpusError) as caught:
        list(apply_filters(config_of(*sections), documents(), ReadCounts(), None, fail))
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def test_without_filters_documents_pass_as_they_are() -> None:
    documents = documents_of("a", ("p", "b"))
    assert kept(config_of(), documents) == (documents, ReadCounts())


def test_length_counts_bytes_of_prompt_and_text() -> None:
    documents = documents_of("潮", ("潮", "a"), ("潮", "汐a"), "long enough")
    found, counts = kept(config_of({"kind": "length", "min_bytes": 4, "max_bytes": 7}), documents)
    assert found == documents[1:3]
    assert counts.filtered == {"length: too_short": 1, "length: too_long": 1}


def test_the_split_into_prompt_and_text_stays() -> None:
    documents = documents_of((LINES, "And so on."), (LINES[:100], LINES[100:]))
    sections = [{"kind": k} for k in ("gopher_quality", "gopher_repetition", "c4", "fineweb")]
    assert kept(config_of(*sections), documents) == (documents, ReadCounts())


LINES = PROSE.replace(". ", ".\n")
NO_LINE_RULES = {f"dup_{n}_frac": None for n in ("line", "para", "line_char", "para_char")}


@pytest.mark.parametrize(
    ("section", "good", "refused", "reason"),
    [
        ({"kind": "gopher_quality"}, PROSE, "Too short for anything.", "gopher_short_doc"),
        ({"kind": "gopher_quality", "max_doc_words": 95}, PROSE[:300], PROSE, "gopher_long_doc"),
        ({"kind": "gopher_quality", "stop_words": ["tide", "moon"]}, PROSE, LINES[120:], "gopher_enough_stop_words"),
        ({"kind": "gopher_repetition"}, LINES, "the tide comes in\n" * 20, "dup_line_frac"),
        (
            {"kind": "gopher_repetition", "top_n_grams": {2: 0.1}} | NO_LINE_RULES,
            PROSE,
            "a tide " * 30 + PROSE,
            "top_2_gram",
        ),
        ({"kind": "c4"}, LINES, LINES + "{ x = 1; } is code, not prose.", "curly_bracket"),
        ({"kind": "c4"}, LINES, "One sentence only, of some words.", "too_few_sentences"),
        ({"kind": "fineweb"}, LINES, "no end of a sentence here\nnor here\n" * 5, "line_punct_ratio"),
        ({"kind": "fineweb", "stop_chars": ["!"]}, LINES.replace(".", "!"), LINES, "line_punct_ratio"),
    ],
)
def test_quality(section: dict[str, Any], good: str, refused: str, reason: str) -> None:
    found, counts = kept(config_of(section), documents_of(good, refused))
    assert (found, counts.filtered) == (documents_of(good), {f"{section['kind']}: {reason}": 1})


def test_the_first_to_refuse_is_counted() -> None:
    config = config_of({"kind": "length", "min_bytes": 50}, {"kind": "gopher_quality"})
    _, counts = kept(config, documents_of("short", "Longer than that, but not by so many words at all.", PROSE))
    assert counts.filtered == {"length: too_short": 1, "gopher_quality: gopher_short_doc": 1}


def test_c4_removes_lines_only_if_told_to() -> None:
    text = PROSE.strip() + "\nClick here\n" + "It says so in three more words than that.\n"
    documents = documents_of(text, ("", PROSE.strip()), (text, " An answer."))
    assert kept(config_of({"kind": "c4"}), documents) == (documents, ReadCounts())
    found, counts = kept(
        config_of({"kind": "c4", "remove_lines": True}, {"kind": "length", "max_bytes": 10**6}), documents
    )
    assert found[0].text == text.replace("Click here\n", "").strip()
    assert found[1:] == documents[1:]
    assert counts.edited_by_filters == 1


@pytest.mark.parametrize(
    ("section", "url", "reason"),
    [
        ({"extra_domains": ["bad-one.com"]}, "http://bad-one.com/x", "url: domain"),
        ({"extra_domains": ["www.so-so.co.uk"]}, "http://www.so-so.co.uk/", "url: subdomain"),
        ({"extra_urls": ["http://a.example/b"]}, "http://a.example/b", "url: url"),
        ({"banned_words": ["casino"]}, "http://a.example/casino/b", "url: hard_blacklisted"),
        ({"banned_subwords": ["casin"]}, "http://a.example/mycasino", "url: blacklisted_subword"),
        ({"soft_banned_words": ["win", "prize"]}, "http://a.example/win/prize", "url: soft_blacklisted"),
    ],
)
def test_urls(section: dict[str, Any], url: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the result depends on the network"))
    config = config_of({"kind": "url", "use_integrated_lists": False} | section)
    documents = [
        *documents_of("no url"),
        *documents_of("good", url="http://good.example/"),
        *documents_of("x", url=url),
    ]
    found, counts = kept(config, documents)
    assert [d.text for d in found] == ["no url", "good"]
    assert counts.filtered == {reason: 1}


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fastText model that tells two languages apart by a few words."""
    folder = tmp_path_factory.mktemp("lid")
    words = {"en": ["the", "people", "and", "there"], "fr": ["les", "gens", "et", "voici"]}
    lines = [f"__label__{language} {word}" for language, known in words.items() for word in known * 5]
    (folder / "lines.txt").write_text("\n".join(lines), "utf-8")
    while True:
        try:  # training starts from memory that nobody has set, so that it fails at times
            model = fasttext.train_supervised(str(folder / "lines.txt"), dim=2, epoch=1, lr=1e-9, thread=1, verbose=0)
            break
        except RuntimeError:
            continue
    labels = [label.removeprefix("__label__") for label in model.get_labels()]
    rows = np.zeros((len(model.get_words()), 2), np.float32)
    for language, known in words.items():
        rows[[model.get_word_id(word) for word in known], labels.index(language)] = 1.0
    model.set_matrices(rows, 20 * np.eye(2, dtype=np.float32))
    model.save_model(str(folder / "lid.bin"))
    return folder / "lid.bin"


def test_languages(language_model: Path) -> None:
    section = {"kind": "language", "model_path": str(language_model)}
    documents = documents_of(
        "the people are here\nand there", "les gens sont ici\net voici la marée", ("voici", " la maison")
    )
    found, counts = kept(config_of(section | {"languages": ["fr"]}), documents)
    assert found == documents[1:]
    assert counts.filtered == {"language": 1}
    assert kept(config_of(section), documents)[0] == documents
    unsure = documents_of("the gens", "the people et")
    assert kept(config_of(section), unsure)[0] == unsure[1:]
    assert kept(config_of(section | {"language_threshold": 0.4}), unsure)[0] == unsure
    assert "the model does not know the language 'eng'" in error_of(section | {"languages": ["eng"]})


def test_a_model_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text").write_text("not a model\n")
    for path in (tmp_path / "no.bin", tmp_path / "text"):
        message = error_of({"kind": "length"}, {"kind": "language", "model_path": str(path)})
        assert message.startswith(f"corpus.filters.1 (language): cannot have the model {path} (")
        assert message.endswith("set model_path to the model's file")

    def offline(*_: Any, **__: Any) -> str:
        raise OSError("Name or service\nnot known")

    monkeypatch.setattr("datatrove.utils.lid.cached_asset_path_or_download", offline)
    message = error_of({"kind": "language"})
    assert "lid.176.bin (Name or service not known); set model_path to the model's file" in message


@pytest.mark.parametrize("kind", ["gopher_quality", "gopher_repetition", "c4", "fineweb"])
def test_words_that_cannot_be_told_apart(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"corpus.filters.0 ({kind}): cannot tell the words of 'klingon' apart" in error_of(
        {"kind": kind, "language": "klingon"}
    )

    def missing(*_: Any) -> None:
        raise ImportError("Please install `spacy` to use en word tokenizer (`pip install spacy`).")

    monkeypatch.setattr("datatrove.utils.word_tokenizers.load_word_tokenizer", missing)
    assert "cannot tell the words of 'eng' apart: Please install `spacy`" in error_of({"kind": kind})


@pytest.mark.parametrize(
    ("section", "cls", "ours", "differ"),
    [
        (filters.LanguageFilter, theirs.LanguageFilter, {"model_path"}, {"label_only", "keep_top_pairs_threshold"}),
        (filters.GopherQualityFilter, theirs.GopherQualityFilter, set(), set()),
        (filters.GopherRepetitionFilter, theirs.GopherRepetitionFilter, set(), set()),
        (filters.C4Filter, theirs.C4QualityFilter, {"remove_lines"}, set()),
        (filters.FineWebFilter, theirs.FineWebQualityFilter, set(), set()),
        (filters.UrlFilter, theirs.URLFilter, set(), set()),
    ],
)
def test_parameters_and_defaults_are_those_of_datatrove(
    section: Any, cls: Any, ours: set[str], differ: set[str]
) -> None:
    parameters = dict(inspect.signature(cls.__init__).parameters)
    expected = {n: p.default for n, p in parameters.items() if n not in {"self", "exclusion_writer"} | differ}
    fields = section.model_fields.keys() - {"kind"} - ours
    assert fields == expected.keys()
    kind = {"kind": section.model_fields["kind"].annotation.__args__[0]}
    found = section.model_validate(kind).model_dump(include=fields)
    plain = {
        k: tuple(v.items()) if isinstance(v, dict) else v or None if isinstance(v, list) else v
        for k, v in found.items()
    }
    assert plain == expected


@pytest.mark.parametrize(
    ("section", "part"),
    [
        ({"kind": "no"}, "does not match any of the expected tags"),
        ({"min_bytes": 1}, "Unable to extract tag"),
        ({"kind": "length", "min_bytes": 5, "max_bytes": 4}, "max_bytes 4 is less than min_bytes 5"),
        ({"kind": "length", "languages": ["en"]}, "Extra inputs are not permitted"),
        ({"kind": "fineweb", "short_line_thr": "0.5"}, "valid number"),
        ({"kind": "gopher_repetition", "top_n_grams": [[2, 0.1]]}, "valid dictionary"),
    ],
)
def test_sections_are_checked(section: dict[str, Any], part: str) -> None:
    with pytest.raises(ValidationError, match=part):
        config_of(section)


def write_records(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text, "url": "u"}) + "\n" for text in texts), "utf-8")


def test_what_is_refused_is_kept_beside_if_asked_for(tmp_path: Path) -> None:
    write_records(tmp_path / "a.jsonl", ["long enough", "no", "", "long too"])
    for keep in (True, False):
        sources = [{"path": str(tmp_path / "a.jsonl"), "format": "jsonl", "name": "s"}]
        config = config_of({"kind": "length", "min_bytes": 5}, sources=sources, keep_filtered=keep)
        counts, side = ReadCounts(), tmp_path / f"filtered-{keep}.jsonl"
        with SideFile(side) as file:
            documents = list(read_files(config, list_files(config), counts, None, file))
        assert [d.text for d in documents] == ["long enough", "long too"]
        assert counts == ReadCounts(files=1, records=4, documents=2, empty=1, filtered={"length: too_short": 1})
        assert counts.unaccounted == 0
        assert side.exists() == keep
    (line,) = [json.loads(line) for line in (tmp_path / "filtered-True.jsonl").read_text("utf-8").splitlines()]
    assert line == {
        "file": str(tmp_path / "a.jsonl"),
        "line": 2,
        "source": "s",
        "url": "u",
        "reason": "length: too_short",
        "prompt": "",
        "text": "no",
    }


def test_a_document_that_breaks_a_filter_is_a_bad_record(tmp_path: Path) -> None:
    """A rule that is turned off lets documents through that the next rule divides by."""
    write_records(tmp_path / "a.jsonl", [" \n ", PROSE])
    sources = [{"path": str(tmp_path / "a.jsonl"), "format": "jsonl"}]
    section = {
        "kind": "gopher_quality",
        "min_doc_words": None,
        "min_avg_word_length": None,
        "max_avg_word_length": None,
    }
    config = config_of(section, sources=sources)
    with pytest.warns(RuntimeWarning), pytest.raises(CorpusError, match=r"a\.jsonl:1: a filter failed \(ZeroDivision"):
        list(read_files(config, list_files(config), ReadCounts()))
    config, counts = config_of(section, sources=sources, on_bad_record="quarantine"), ReadCounts()
    with pytest.warns(RuntimeWarning), BadRecords(tmp_path / "bad.jsonl") as bad:
        assert len(list(read_files(config, list_files(config), counts, bad))) == 1
    assert counts.bad_records == {"filter_failed": 1}
    assert json.loads((tmp_path / "bad.jsonl").read_text())["record"] == " \n "


def test_filters_are_silent(capfd: pytest.CaptureFixture[str]) -> None:
    build_filters(config_of(*({"kind": k} for k in ("gopher_quality", "c4", "fineweb", "length"))).filters)
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_datatroves_own_lists(capfd: pytest.CaptureFixture[str]) -> None:
    found, counts = kept(config_of({"kind": "url"}), documents_of("x", url="http://xvideos.com/a"))
    assert (found, counts.filtered) == ([], {"url: domain": 1})
    assert capfd.readouterr() == ("", "")
