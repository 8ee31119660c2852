"""The standard library's source: whole files to train on, passages of other files as the test."""

from pydantic import Field

from data_pipeline.section import Section
from experiments.tasks.library import samples_of, samples_up_to, shuffled_texts, spread_passages
from experiments.tasks.writing import ComposedTask, Corpus, is_held_out


class SourceOptions(Section):
    """How much of it; sizes are bytes of text and overshot by the last file or passage."""

    train_bytes: int | None = Field(None, ge=1, description="of the files to train on; none: all")
    held_out_bytes: int = Field(200_000, ge=1, description="of the files that are held out, at most")
    test_bytes: int = Field(60_000, ge=1, description="of the test, from all over its files")
    passage_bytes: int = Field(1500, ge=100, description="of a document of the test, about")


def _compose(options: SourceOptions, seed: int) -> Corpus:
    known = shuffled_texts(False, seed)
    seen = set(known)  # some files are copies
    unseen = [text for text in shuffled_texts(True, seed) if text not in seen]
    return Corpus(
        samples_of((t for t in known if not is_held_out({"text": t})), options.train_bytes, "task source, training"),
        samples_up_to((t for t in known if is_held_out({"text": t})), options.held_out_bytes),
        {"source": samples_of(spread_passages(unseen, options.passage_bytes), options.test_bytes, "task source, test")},
    )


SOURCE = ComposedTask("source", SourceOptions, _compose)
