"""Filters of documents, all of them datatrove's, by their sections of the configuration.

A filter sees prompt and text as one text. What is here says the parameters, makes sure before the first document that
a filter has what it needs, and counts what it refuses.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from data_pipeline.documents import Document, ReadCounts, SideFile, count_reason, quiet_datatrove, to_datatrove
from data_pipeline.errors import CorpusError
from data_pipeline.section import Section

if TYPE_CHECKING:
    from data_pipeline.corpus import CorpusConfig

# datatrove's filter: a document is kept or not, or not with a reason.
Filter = Callable[[Any], bool | tuple[bool, str]]

_WORDS = "how words and sentences are told apart: a language code such as eng, deu or rus"


class LengthFilter(Section):
    """Refuses short and long documents."""

    kind: Literal["length"]
    min_bytes: int = Field(0, ge=0, description="of prompt and text, in UTF-8")
    max_bytes: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> "LengthFilter":
        if self.max_bytes is not None and self.max_bytes < self.min_bytes:
            raise ValueError(f"max_bytes {self.max_bytes} is less than min_bytes {self.min_bytes}")
        return self

    def build(self) -> Filter:
        """datatrove's filter with these settings."""
        from datatrove.pipeline.filters import LambdaFilter

        return LambdaFilter(self._judge).filter

    def _judge(self, document: Any) -> bool | tuple[bool, str]:
        size = len(document.text.encode())
        if size < self.min_bytes:
            return False, "too_short"
        return (False, "too_long") if self.max_bytes is not None and size > self.max_bytes else True


class LanguageFilter(Section):
    """Keeps documents of some languages, by a fastText model."""

    kind: Literal["language"]
    languages: list[str] | None = Field(None, description="as the model names them; none: any that it is sure of")
    language_threshold: float = Field(0.65, ge=0.0, le=1.0, description="lowest score that counts")
    backend: Literal["ft176", "glotlid"] = Field("ft176", description="lid.176.bin, or GlotLID's model")
    model_path: str | None = Field(None, description="the model's file; none: it is downloaded once")

    def build(self) -> Filter:
        """datatrove's filter with these settings."""
        from datatrove.pipeline.filters import LanguageFilter as Theirs

        theirs = Theirs(self.languages, self.language_threshold, backend=self.backend)
        try:
            if self.model_path is not None:
                from fasttext.FastText import _FastText

                theirs.model._model = _FastText(self.model_path)
            known = {label.split("__")[2] for label in theirs.model.model.get_labels()}
        except Exception as error:  # no such file, no network, a file of another kind
            model = self.model_path or theirs.model.MODEL_URL
            raise ValueError(f"cannot have the model {model} ({error}); set model_path to the model's file") from None
        if unknown := [language for language in self.languages or [] if language not in known]:
            raise ValueError(f"the model does not know the language {unknown[0]!r}")
        return theirs.filter


class GopherQualityFilter(Section):
    """The quality rules of Gopher (2112.11446); none turns a rule off."""

    kind: Literal["gopher_quality"]
    min_doc_words: int | None = 50
    max_doc_words: int | None = 100_000
    min_avg_word_length: int | None = 3
    max_avg_word_length: int | None = 10
    max_symbol_word_ratio: float | None = 0.1
    max_bullet_lines_ratio: float | None = 0.9
    max_ellipsis_lines_ratio: float | None = 0.3
    max_non_alpha_words_ratio: float | None = Field(0.8, description="least share of words with a letter")
    min_stop_words: int | None = 2
    stop_words: list[str] | None = Field(None, description="none: eight English ones")
    language: str = Field("eng", description=_WORDS)

    def build(self) -> Filter:
        """datatrove's filter with these settings."""
        from datatrove.pipeline.filters import GopherQualityFilter as Theirs

        _check_words(self.language)
        return Theirs(**_parameters(self)).filter


class GopherRepetitionFilter(Section):
    """The repetition rules of Gopher (2112.11446); none turns a rule off."""

    kind: Literal["gopher_repetition"]
    dup_line_frac: float | None = 0.3
    dup_para_frac: float | None = 0.3
    dup_line_char_frac: float | None = 0.2
    dup_para_char_frac: float | None = 0.2
    top_n_grams: dict[int, float] = Field(
        {2: 0.2, 3: 0.18, 4: 0.16}, description="share of the characters that the most frequent n-gram may have, by n"
    )
    dup_n_grams: dict[int, float] = Field(
        {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10},
        description="share of the characters that repeated n-grams may have, by n",
    )
    language: str = Field("eng", description=_WORDS)

    def build(self) -> Filter:
        """datatrove's filter with these settings."""
        from datatrove.pipeline.filters import GopherRepetitionFilter as Theirs

        _check_words(self.language)
        n_grams = {name: tuple(getattr(self, name).items()) for name in ("top_n_grams", "dup_n_grams")}
        return Theirs(**_parameters(self) | n_grams).filter


class C4Filter(Section):
    """The quality rules of C4 (1910.10683), which judge lines, and a document by its good lines."""

    kind: Literal["c4"]
    remove_lines: bool = Field(
        False, description="documents without a prompt lose their bad lines, as in C4; they are counted as edited"
    )
    split_paragraph: bool = Field(True, description="judge lines; false: sentences")
    remove_citations: bool = True
    filter_no_terminal_punct: bool = True
    min_num_sentences: int = Field(5, description="-1 turns the rule off, here and below")
    min_words_per_line: int = 3
    max_word_length: int = 1000
    filter_lorem_ipsum: bool = True
    filter_javascript: bool = True
    filter_curly_bracket: bool = True
    filter_policy: bool = True
    language: str = Field("eng", description=_WORDS)

    def build(self) -> Filter:
        """datatrove's filter with these settings."""
        from datatrove.pipeline.filters import C4QualityFilter as Theirs

        _check_words(self.language)
        return Theirs(**_parameters(self, "remove_lines")).filter


class FineWebFilter(Section):
    """The quality rules of FineWeb (2406.17557)."""

    kind: Literal["fineweb"]
    line_punct_thr: float = 0.12
    line_punct_exclude_zero: bool = False
    stop_chars: list[str] | None = Field(None, description="ends of a sentence; none: those of all scripts")
    short_line_thr: float = 0.67
    short_line_length: int = 30
    char_duplicates_ratio: float = 0.01
    new_line_ratio: float = 0.3
    language: str = Field("eng", description=_WORDS)

    def build(self) -> Filter:
        """datatrove's filter with these settings."""
        from datatrove.pipeline.filters import FineWebQualityFilter as Theirs

        _check_words(self.language)
        stop_chars = {"stop_chars": tuple(self.stop_chars) if self.stop_chars is not None else None}
        return Theirs(**_parameters(self) | stop_chars).filter


class UrlFilter(Section):
    """Refuses documents by their URL; those without one are kept."""

    kind: Literal["url"]
    soft_word_threshold: int = 2
    extra_domains: list[str] = Field(default_factory=list, description="domains and subdomains that are refused")
    extra_urls: list[str] = Field(default_factory=list, description="whole URLs that are refused")
    banned_words: list[str] = Field(default_factory=list, description="words of a URL, any of which is refused")
    banned_subwords: list[str] = Field(default_factory=list, description="the same, inside other words too")
    soft_banned_words: list[str] = Field(
        default_factory=list, description="words of which soft_word_threshold together are refused"
    )
    use_integrated_lists: bool = Field(True, description="datatrove's own lists of adult sites and words as well")

    def build(self) -> Filter:
        """datatrove's filter with these settings."""
        from datatrove.pipeline.filters import URLFilter as Theirs
        from tldextract import TLDExtract

        theirs = Theirs(**_parameters(self))
        # Its own list of domain endings, so that the result does not depend on what can be downloaded today.
        theirs.tldextractor = TLDExtract(suffix_list_urls=(), cache_dir=None)
        theirs.download_data()  # unpacks the lists that datatrove brings along
        return lambda document: theirs.filter(document) if document.metadata["url"] else True


FilterConfig = Annotated[
    LengthFilter | LanguageFilter | GopherQualityFilter | GopherRepetitionFilter | C4Filter | FineWebFilter | UrlFilter,
    Field(discriminator="kind"),
]


def _parameters(section: Section, *ours: str) -> dict[str, Any]:
    return section.model_dump(exclude={"kind", *ours})


def _check_words(language: str) -> None:
    """Make sure that the words of a language can be told apart here: some need a package or a model."""
    from datatrove.utils.word_tokenizers import load_word_tokenizer

    try:
        tokenizer = load_word_tokenizer(language)
        tokenizer.word_tokenize("Words. Sentences.")
        tokenizer.span_tokenize("Words. Sentences.")
    except Exception as error:  # a package that is missing, a model that cannot be downloaded
        raise ValueError(f"cannot tell the words of {language!r} apart: {error}") from None


def build_filters(sections: Sequence[FilterConfig]) -> list[Filter]:
    """The filters, ready to be used.

    Raises:
        CorpusError: one lacks what it needs: a package, a model that cannot be downloaded.
    """
    built = []
    for number, section in enumerate(sections):
        try:
            quiet_datatrove()
            built.append(section.build())
        except Exception as error:  # packages, files, downloads: datatrove raises what they raise
            what = " ".join(str(error).split())
            raise CorpusError(f"corpus.filters.{number} ({section.kind}): {what}") from None
    return built


def apply_filters(
    config: "CorpusConfig",
    documents: Iterator[Document],
    counts: ReadCounts,
    side_file: SideFile | None,
    failed: Callable[[Document, str], None],
) -> Iterator[Document]:
    """The documents that every filter keeps, their split into prompt and text untouched.

    Args:
        counts: what is refused is added to it, by filter and reason.
        side_file: where it is copied if `keep_filtered` says so.
        failed: called with a document that a filter broke down over, and why.

    Raises:
        CorpusError: a filter lacks what it needs, before the first document is taken.
    """
    if not config.filters:
        yield from documents
        return
    filters = list(zip(config.filters, build_filters(config.filters), strict=True))
    for document in documents:
        try:
            reason, kept = _judge(document, filters)
        except Exception as error:  # what breaks datatrove's filters is the document: no words, no lines
            failed(document, f"{type(error).__name__}: {' '.join(str(error).split())}")
            continue
        if reason is None:
            counts.edited_by_filters += kept is not document
            yield kept
            continue
        count_reason(counts.filtered, reason)
        if side_file is not None and config.keep_filtered:
            file, line = document.origin
            where = {"file": file, "line": line, "source": document.source, "url": document.url}
            side_file.write(where | {"reason": reason, "prompt": document.prompt, "text": document.text})


def _judge(document: Document, filters: list[tuple[Any, Filter]]) -> tuple[str | None, Document]:
    """Why a document is refused, or none, and the document as the filters leave it."""
    theirs = to_datatrove(document)
    for section, judge in filters:
        before = theirs.text
        verdict = judge(theirs)
        kept, reason = verdict if isinstance(verdict, tuple) else (verdict, None)
        if not kept:
            return f"{section.kind}: {reason}" if reason else section.kind, document
        if theirs.text != before:
            if document.prompt or not section.remove_lines:
                theirs.text = before
            else:
                document = replace(document, text=theirs.text)
    return None, document
