"""What a trained model knows: exact match and bits per byte on test sets, the same way for every model.

Exact match is of greedy decoding: a document counts where the likeliest id is the right one for each label, the end
mark included. That is what greedy decoding writes (`exactly_predicted`), and needs one pass.

B rows, T token slots, C char slots.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from data_pipeline.baselines import Writes
from data_pipeline.layout import IGNORED
from data_pipeline.packing import batches_alike, cut_document
from data_pipeline.pieces import Piece, piece_of_blocks, slot_counts
from data_pipeline.rows import RowReader, lay_out_as
from data_pipeline.run_order import SPLIT
from data_pipeline.segmentation import segment
from data_pipeline.shards import Manifest
from data_pipeline.stream import Batch, batch_of, fixed_batches
from data_pipeline.tokenizer import MixedTokenizer
from tidal_dist.config import Config, load_config
from tidal_dist.export.consolidate import consolidated_weights, find_checkpoint
from tidal_dist.export.package import model_of_weights
from tidal_dist.flops import row_flops
from tidal_dist.model.likelihood import bits_per_byte, exactly_predicted
from tidal_dist.model.transformer import TidalTransformer
from tidal_dist.rows import row_format
from tidal_dist.training import checkpoint as ckpt

Document = tuple[str, str]  # (prompt, answer); a text has no prompt
_BATCH_SLOTS = 16_384
_SAMPLED_ROWS = 512  # of the training, to count the bytes of


@dataclass(frozen=True)
class Trained:
    """A model as its run left it, on the CPU, in evaluation mode."""

    model: TidalTransformer
    config: Config
    tokenizer: MixedTokenizer


def open_trained(run: Path) -> Trained:
    """The last checkpoint of a run.

    Raises:
        CheckpointError: there is none that is complete.
    """
    checkpoint = find_checkpoint(run, "last")
    config = load_config(checkpoint / ckpt.CONFIG)
    tokenizer = MixedTokenizer.load(checkpoint / ckpt.TOKENIZER, config.segmentation)
    return Trained(model_of_weights(config.model, tokenizer, consolidated_weights(checkpoint)), config, tokenizer)


def evaluate(trained: Trained, tests: Mapping[str, Sequence[Document]]) -> dict[str, Any]:
    """What a model knows of each test set, and what its training has cost.

    Args:
        tests: documents by the name of their set; those of a set all have a prompt, or none has.

    Returns:
        parameters. steps. training_flops: model FLOPs (`tidal_dist.flops`). training_bytes: supervised bytes, reckoned
        from the first rows. tests: by name `exact_match` (None for texts without a prompt), `bits_per_byte`, `count`.
    """
    config, tokenizer = trained.config, trained.tokenizer
    reader = training_reader(config, tokenizer)
    row = row_flops(
        config.model,
        *reader.shape,
        config.segmentation.max_block_bytes,
        output_size=trained.model.output.out_features,
    )
    rows = config.training.steps * config.training.batch_rows
    return {
        "parameters": sum(p.numel() for p in trained.model.parameters()),
        "steps": config.training.steps,
        "training_flops": float(row.training * rows),
        "training_bytes": round(_bytes_of_a_row(reader, tokenizer) * rows),
        "tests": {name: measure(trained, documents) for name, documents in tests.items()},
    }


def training_reader(config: Config, tokenizer: MixedTokenizer) -> RowReader:
    """The training's own reader of its rows."""
    return RowReader(Manifest.of(config.data), SPLIT, tokenizer, row_format(config), config.data.seed)


def _bytes_of_a_row(reader: RowReader, tokenizer: MixedTokenizer) -> float:
    """Supervised bytes of a row, on average."""
    batches = fixed_batches(reader, _SAMPLED_ROWS, 32, (0, 1))
    rows = min(_SAMPLED_ROWS, sum(reader.shard_rows))
    return sum(batch.byte_count(tokenizer.byte_lengths) for batch in batches) / max(rows, 1)


@torch.inference_mode()
def measure(trained: Trained, documents: Sequence[Document]) -> dict[str, Any]:
    """Exact match, bits per byte and number of documents, each laid out alone."""
    pieces = [piece for prompt, text in documents for piece in pieces_of(prompt, text, trained)]
    nats = text_bytes = 0.0
    right = count = 0
    shapes = [_shape(piece, trained.config.model.writes) for piece in pieces]
    for numbers in batches_alike(shapes, _BATCH_SLOTS):
        batch = lay_out_alone([pieces[i] for i in numbers], trained)
        logits = trained.model(batch.tokens, batch.chars)
        supervised = batch.labels != IGNORED
        nats += float(F.cross_entropy(logits[supervised].float(), batch.labels[supervised], reduction="sum"))
        text_bytes += batch.byte_count(trained.tokenizer.byte_lengths)
        found = exactly_predicted(logits, batch.chars.document, batch.labels)
        right, count = right + found[0], count + found[1]
    is_answered = all(prompt for prompt, _ in documents)
    return {
        "exact_match": right / max(count, 1) if is_answered else None,
        "bits_per_byte": bits_per_byte(nats, text_bytes),
        "count": len(documents),
    }


def pieces_of(prompt: str, text: str, trained: Trained) -> Iterator[Piece]:
    """A document as blocks; a text that is longer than a row of the training, cut as training would cut it."""
    data, tokenizer = trained.config.data, trained.tokenizer
    before = segment(prompt, tokenizer.segmentation)
    blocks = [*before, *segment(text, tokenizer.segmentation)]
    whole = piece_of_blocks(blocks, tokenizer, len(before))
    t, c = slot_counts(whole.block_tokens, whole.block_bytes, len(before))
    if prompt or (t <= data.row_tokens and c <= data.row_chars):
        yield whole
        return
    sizes = data.row_tokens, data.row_chars, data.overlap_tokens
    for first, supervised, end in cut_document(whole.block_tokens, whole.block_bytes, 0, *sizes):
        yield piece_of_blocks(blocks[first:end], tokenizer, supervised - first, end == len(blocks))


def _shape(piece: Piece, writes: Writes) -> tuple[int, int]:
    if writes == "blocks":
        return slot_counts(piece.block_tokens, piece.block_bytes, piece.supervised_from)
    return 1, 1 + len(piece.tokens if writes == "tokens" else piece.chars)


def lay_out_alone(pieces: Sequence[Piece], trained: Trained) -> Batch:
    """A batch of rows of one piece each, as the model's training lays them out."""
    config = trained.config
    shapes = [_shape(piece, config.model.writes) for piece in pieces]
    shape = max(t for t, _ in shapes), max(c for _, c in shapes)
    rows = [[piece] for piece in pieces]
    return batch_of(lay_out_as(row_format(config), rows, [[0]] * len(rows), trained.tokenizer.byte_lengths, shape)).to(
        "cpu"
    )
