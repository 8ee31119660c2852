"""Corpus -> tokeniser -> shards with their row plan, in one folder that appears whole."""

import hashlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from data_pipeline.corpus import CorpusConfig, Document, ReadCounts, read_documents
from data_pipeline.errors import CorpusError, ShardError, UserError
from data_pipeline.files import replace_file
from data_pipeline.rows import write_row_plan
from data_pipeline.segmentation import SegmentationConfig
from data_pipeline.shards import SPLITS, DataConfig, Manifest, ShardWriter, write_manifest
from data_pipeline.tokenizer import MixedTokenizer, TokenizerConfig, train_tokenizer


def is_validation(document: Document, fraction: float) -> bool:
    """Whether a document belongs to the validation split: a function of its text alone."""
    digest = hashlib.sha256(f"{document.prompt}\0{document.text}".encode()).digest()
    return int.from_bytes(digest[:8]) < fraction * 2**64


def prepare(
    corpus: CorpusConfig,
    tokenizer_config: TokenizerConfig,
    segmentation: SegmentationConfig,
    data: DataConfig,
    resolved_config: str,
    overwrite: bool = False,
    report: Callable[[str], object] = bool,
) -> Manifest:
    """Write the shards of a corpus.

    Everything is written to a folder beside `data.shards`, which then takes its name: a failure leaves what was
    there before.

    Raises:
        CorpusError, TokenizerError, ShardError: the input is missing or malformed, or shards are already there.
    """
    target = Path(data.shards)
    if target.exists() and not overwrite:
        raise ShardError(f"{target}: already there; remove it, choose another data.shards, or give --overwrite")
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        manifest = _write(partial, corpus, tokenizer_config, segmentation, data, resolved_config, report)
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
    except OSError as error:
        raise UserError(
            f"{target}: cannot write ({error.strerror or error}); free space or choose another folder"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Manifest(target, manifest.content, manifest.hash)


def _write(
    folder: Path,
    corpus: CorpusConfig,
    tokenizer_config: TokenizerConfig,
    segmentation: SegmentationConfig,
    data: DataConfig,
    resolved_config: str,
    report: Callable[[str], object],
) -> Manifest:
    if tokenizer_config.path:
        tokenizer = MixedTokenizer.load(tokenizer_config.path, segmentation)
    else:
        report("training the tokeniser")
        tokenizer = train_tokenizer(_texts(corpus), tokenizer_config, segmentation)
    tokenizer.save(folder / "tokenizer.json")
    replace_file(folder / "config.yaml", resolved_config.encode())
    report(f"tokeniser: {tokenizer.vocab_size} ids; writing shards")
    writers = {split: ShardWriter(folder, split, tokenizer, data.shard_bytes) for split in SPLITS}
    counts = ReadCounts()
    for document in read_documents(corpus, counts):
        writers["validation" if is_validation(document, corpus.validation_fraction) else "train"].write(document)
        if counts.documents % 20_000 == 0:
            report(f"{counts.documents:,} documents")
    splits = {split: writer.close() for split, writer in writers.items()}
    if not splits["train"]:
        raise CorpusError(f"the corpus has no document for training ({asdict(counts)}); check corpus.sources")
    write_manifest(folder, tokenizer, splits, {"read": asdict(counts)})
    manifest = Manifest.load(folder)
    report(f"planning rows of {data.row_tokens} token and {data.row_chars} char slots")
    write_row_plan(manifest, data.row_tokens, data.row_chars)
    return manifest


def _texts(corpus: CorpusConfig) -> Iterator[str]:
    for document in read_documents(corpus, ReadCounts()):
        yield document.prompt
        yield document.text
