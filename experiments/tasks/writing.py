"""What all tasks share: a corpus of samples, where each sample belongs, and the files they are written to.

A sample is a line of JSON: {"prompt", "answer"} or {"text"}. Where it belongs is a function of the sample alone:

- tests: by the hash of what is tested, a problem or a word; it occurs nowhere else;
- held out: by the pipeline's own rule at `VALIDATION_FRACTION`. A run whose corpus is train.jsonl and held-out.jsonl,
  with that `corpus.validation_fraction`, thus trains on all of the first and validates on all of the second;
- training: all others.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from data_pipeline.documents import Document
from data_pipeline.files import whole_file
from data_pipeline.preparing.sampling import is_validation
from data_pipeline.section import Section
from experiments.places import HELD_OUT, TESTS, TRAIN
from tidal_dist.config import parse_section

VALIDATION_FRACTION = 0.02
_ONE_IN = 10  # problems, words or files is kept for tests

Sample = dict[str, str]
OptionsT = TypeVar("OptionsT", bound=Section)


@dataclass(frozen=True)
class Corpus:
    """What a task writes: samples for training, samples that are held out for validation, and tests by name."""

    train: Iterable[Sample]
    held_out: Iterable[Sample]
    tests: Mapping[str, Iterable[Sample]]


class Task(Protocol):
    """A corpus with tests that can be made."""

    def write(self, folder: Path, options: Mapping[str, Any], seed: int) -> None:
        """Write FOLDER/train.jsonl, FOLDER/held-out.jsonl and FOLDER/tests/NAME.jsonl.

        Every file appears whole or not at all, and train.jsonl after all others: where it is, all are. What is written
        is a function of options, seed and, for tasks over text, the Python that runs this.

        Raises:
            UserError: an option is unknown or wrong, or asks for more than there is; a file cannot be written.
        """


@dataclass(frozen=True)
class ComposedTask(Generic[OptionsT]):
    """A task made of its options' type and a function that composes the corpus from options and seed."""

    name: str
    options: type[OptionsT]
    compose: Callable[[OptionsT, int], Corpus]

    def write(self, folder: Path, options: Mapping[str, Any], seed: int) -> None:
        """See `Task`."""
        corpus = self.compose(parse_section(self.options, dict(options), f"task {self.name}, options"), seed)
        (folder / TRAIN).unlink(missing_ok=True)
        for old in [folder / HELD_OUT, *(folder / TESTS).glob("*.jsonl")]:
            old.unlink(missing_ok=True)
        for name, samples in corpus.tests.items():
            _write_lines(folder / TESTS / f"{name}.jsonl", samples)
        _write_lines(folder / HELD_OUT, corpus.held_out)
        _write_lines(folder / TRAIN, corpus.train)


def is_tested(subject: str) -> bool:
    """Whether a problem, a word or a file is kept for tests."""
    return int.from_bytes(hashlib.sha256(f"test\0{subject}".encode()).digest()[:8]) % _ONE_IN == 0


def is_held_out(sample: Sample) -> bool:
    """Whether a sample validates a run: the pipeline's own rule."""
    text = sample["answer"] if "prompt" in sample else sample["text"]
    return is_validation(Document(text, sample.get("prompt", ""), ("", 0)), VALIDATION_FRACTION)


def _write_lines(path: Path, samples: Iterable[Sample]) -> None:
    with whole_file(path) as file:
        for sample in samples:
            file.write(json.dumps(sample, ensure_ascii=False).encode() + b"\n")
