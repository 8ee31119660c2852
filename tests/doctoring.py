"""Patients for the doctor: shards of a small mixed corpus, and exports of random models over them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipeline.arithmetic import training_problems
from data_pipeline.corpus import CorpusConfig, SourceConfig
from data_pipeline.encoding import EncodedDocuments
from data_pipeline.ordering import RowAddress
from data_pipeline.pieces import piece_of_text
from data_pipeline.prepare import prepare
from data_pipeline.rows import RowFormat, RowReader
from data_pipeline.segmentation import SegmentationConfig
from data_pipeline.shards import DataConfig, Manifest
from data_pipeline.stream import batch_of_rows, fixed_batches
from data_pipeline.tokenizer import MixedTokenizer, TokenizerConfig
from tests.builders import small_model
from tests.exporting import write_export_of
from tidal_dist.config import Config, ModelConfig, TrainingConfig, ValidationConfig
from tidal_dist.doctor.evidence import Sizes
from tidal_dist.model.likelihood import bits_per_byte

SIZES = Sizes(documents=4, blocks=2, rows=4)
MORE = Sizes(documents=16, blocks=4, rows=16)
SHAPE = {"n_layers": 2, "width": 16, "n_heads": 2}
_TEXTS = (
    "The quick brown fox jumps over the lazy dog, and the tide comes in.",
    "def f(x):\n    return x + 1  # 3-2 is 1\n",
    "潮汐变换器从块的末尾开始写。",
    "潮水退去，涨潮了 3 米。",
    "naïve café 👩‍🚀👍🏽 Straße",
)
_LONG = "\n".join(f"{n}. {text}" for n in range(2) for text in _TEXTS)  # longer than a row: it is cut
OTHER_TEXTS = ("Ελληνικά και русский язык", "nothing that is also in the first corpus")
_ROWS_AT_A_TIME = 8


def write_corpus(folder: Path, texts: tuple[str, ...] = (*_TEXTS, _LONG)) -> CorpusConfig:
    """Sums with prompts and answers among texts without; every text often enough to be in both splits."""
    folder.mkdir(parents=True)
    records = [{"prompt": p, "answer": a} for p, a in training_problems(40, seed=3)]
    records += [{"text": f"{text} {n}"} for n in range(6) for text in texts]
    records += [{"prompt": text[:6], "answer": f"{text[6:]} {n}"} for n in range(3) for text in texts]
    lines = [json.dumps(r, ensure_ascii=False) + "\n" for r in records]
    (folder / "corpus.jsonl").write_text("".join(lines), "utf-8")
    source = SourceConfig(path=str(folder / "corpus.jsonl"), format="jsonl")
    return CorpusConfig(sources=[source], validation_fraction=0.5)


def configuration(folder: Path, corpus: CorpusConfig, tokenizer: str | None = None, **segmentation: int) -> Config:
    """A training whose shards are `folder`; a row holds several short documents, or a part of a long one.

    Args:
        tokenizer: path of the one to use; none: train one. segmentation: settings that are not the default.
    """
    return Config(
        run_dir=str(folder / "run"),
        corpus=corpus,
        segmentation=SegmentationConfig(**{"max_block_bytes": 12} | segmentation),  # type: ignore[arg-type]
        tokenizer=TokenizerConfig(path=tokenizer, vocab_size=330),
        data=DataConfig(shards=str(folder), row_tokens=64, row_chars=128, workers=0),
        model=ModelConfig(**SHAPE),  # type: ignore[arg-type]
        training=TrainingConfig(steps=6, batch_rows=8, learning_rate=1e-3),
        validation=ValidationConfig(every_steps=3, rows=8),
    )


class PlainEncoder:
    """Encodes documents by the plain definition, one by one, where a bug can be planted in it."""

    def __init__(self, tokenizer: MixedTokenizer):
        self._tokenizer = tokenizer

    def encode(self, prompts: Sequence[str], texts: Sequence[str]) -> EncodedDocuments:
        found = [piece_of_text(prompt, text, self._tokenizer) for prompt, text in zip(prompts, texts, strict=True)]
        return EncodedDocuments(
            chars=np.concatenate([piece.chars for piece in found]),
            tokens=np.concatenate([piece.tokens for piece in found]).astype(np.int32),
            block_tokens=np.concatenate([piece.block_tokens for piece in found]).astype(np.uint8),
            block_bytes=np.concatenate([piece.block_bytes for piece in found]).astype(np.uint8),
            document_blocks=np.array([len(piece.block_bytes) for piece in found], np.uint32),
            prompt_blocks=np.array([piece.supervised_from for piece in found], np.uint32),
        )


def prepare_shards(config: Config) -> Manifest:
    """The shards of a configuration."""
    return prepare(config.corpus, config.tokenizer, config.segmentation, config.data, config.to_yaml())


@torch.no_grad()
def write_random_export(out: Path, config: Config, seed: int = 0, **settings: Any) -> Path:
    """Write an export of a random model over the shards of a configuration, as after its last step; `out`."""
    manifest = Manifest.load(config.data.shards)
    tokenizer = manifest.tokenizer()
    model = small_model(tokenizer, seed, **SHAPE | settings).float().eval()
    config = config.model_copy(update={"model": model.config})
    row_format = RowFormat(config.data.row_tokens, config.data.row_chars, model.config.char_positions)
    held_out, training = (
        RowReader(manifest, split, tokenizer, row_format, config.data.seed) for split in ("validation", "train")
    )
    batches = [b.to("cpu") for b in fixed_batches(held_out, config.validation.rows, _ROWS_AT_A_TIME, (0, 1))]
    nats = sum(float(model(batch.tokens, batch.chars, batch.labels)) for batch in batches)
    write_export_of(
        out,
        model,
        tokenizer,
        batch_of_rows([training.row(RowAddress(0, 0, row), None) for row in range(2)]),
        config.to_yaml(),
        step=config.training.steps,
        manifest_hash=manifest.hash,
        metrics={"validation/bits_per_byte": bits_per_byte(nats, sum(batch.byte_count() for batch in batches))},
    )
    return out
