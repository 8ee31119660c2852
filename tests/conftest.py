"""A tiny corpus, tokeniser and shards, made once for the whole test session."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

from data_pipeline import shards
from data_pipeline.arithmetic import training_problems
from data_pipeline.corpus import CorpusConfig, SourceConfig
from data_pipeline.prepare import prepare
from data_pipeline.segmentation import SegmentationConfig
from data_pipeline.shards import DataConfig, Manifest
from data_pipeline.tokenizer import MixedTokenizer, TokenizerConfig, train_tokenizer

# The tokenizers library must not start threads in a process that forks loader workers.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Other processes share the machine: a slow example is no failure.
settings.register_profile("tidal", deadline=None, max_examples=100)
settings.load_profile("tidal")

TEXTS = (
    "The quick brown fox jumps over the lazy dog, and 3-2 is 1 while (-2) is -2.",
    "def f(x_1: int) -> str:\n    return f'{x_1 + 22} == {-7}'  # 100%\n",
    "潮汐变换器从块的末尾开始写。今天是2024年5月17日。",
    "日本語のテキスト、カタカナー、ひらがな。",
    "ภาษาไทย ພາສາລາວ ភាសាខ្មែរ မြန်မာဘာသာ",
    "Ünïcödé, Ελληνικά, русский язык, עברית, العربية ٣٤.",
    "👩‍👩‍👧‍👦 family 🇩🇪 flags e\u0301 combining 𝒳\u00a0nbsp\u3000wide\ttab\r\n",
)


@pytest.fixture(scope="session")
def segmentation() -> SegmentationConfig:
    return SegmentationConfig()


@pytest.fixture(scope="session")
def tokenizer(segmentation: SegmentationConfig) -> MixedTokenizer:
    return train_tokenizer(TEXTS[:3] * 3, TokenizerConfig(vocab_size=320), segmentation)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> CorpusConfig:
    """Prompts with answers, texts of many scripts, and plain text files, one of them long."""
    folder = tmp_path_factory.mktemp("corpus")
    records: list[dict[str, str]] = [{"prompt": p, "answer": a} for p, a in training_problems(120, seed=3)]
    records += [{"text": f"{n}: {text}"} for n in range(6) for text in TEXTS]
    (folder / "records.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), "utf-8")
    texts = folder / "texts"
    texts.mkdir()
    (texts / "long.txt").write_text("\n".join(f"{n} {text}" for n in range(8) for text in TEXTS), "utf-8")
    (texts / "short.txt").write_text("one line", "utf-8")
    (texts / "empty.txt").write_text("", "utf-8")
    return CorpusConfig(
        sources=[
            SourceConfig(path=str(folder / "records.jsonl"), format="jsonl"),
            SourceConfig(path=str(texts), format="text"),
        ],
        validation_fraction=0.2,
    )


Prepare = Callable[..., Manifest]


@pytest.fixture(scope="session")
def prepare_corpus(corpus: CorpusConfig) -> Prepare:
    """`prepare(folder, corpus=..., overwrite=..., row_tokens=..., ...)`: shards of the tiny corpus, or of another."""

    def run(folder: Path, corpus: CorpusConfig = corpus, overwrite: bool = False, **changes: int) -> Manifest:
        data = DataConfig(shards=str(folder), **{"row_tokens": 48, "row_chars": 96} | changes)
        # A short sample, so that a bad line further on is met while shards are written.
        tokenizer, segmentation = TokenizerConfig(vocab_size=300, sample_bytes=4000), SegmentationConfig()
        return prepare(corpus, tokenizer, segmentation, data, "resolved: true\n", overwrite)

    return run


@pytest.fixture(scope="session")
def manifest(prepare_corpus: Prepare, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Shards of the tiny corpus: several shards of several members. Tests must not change them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "_MEMBER_DOCUMENTS", 7)  # so that so small a corpus has many members
        return prepare_corpus(tmp_path_factory.mktemp("prepared") / "shards", shard_bytes=1000)


@pytest.fixture(scope="session")
def small_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of a small model with random weights, to read only; the folder's name is `export`."""
    from tests.exporting import write_small_export

    out = tmp_path_factory.mktemp("exported") / "export"
    write_small_export(out)
    return out
