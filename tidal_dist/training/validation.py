"""Validation: loss and bits per byte on held-out rows, and generation by the decoder that users get."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

import torch

from data_pipeline.layout import CharPositions, LaidOut, lay_out
from data_pipeline.ordering import RowAddress
from data_pipeline.pieces import Piece, beginning, blocks_of_piece
from data_pipeline.rows import RowReader
from data_pipeline.shard_reader import ShardReader
from data_pipeline.shards import Manifest
from data_pipeline.stream import Batch, batch_of_rows
from data_pipeline.tokenizer import MixedTokenizer
from tidal_dist.config import ValidationConfig
from tidal_dist.generation.decoder import Decoder, Limits
from tidal_dist.model.maps import char_scores, recorded_maps
from tidal_dist.model.transformer import TidalTransformer
from tidal_dist.plots.attention import attention_figure
from tidal_dist.plots.canvas import to_png
from tidal_dist.plots.layout import layout_figure
from tidal_dist.plots.loss import loss_figure
from tidal_dist.training.engine import all_sum, any_rank, device, gather_objects
from tidal_dist.training.loss import bits_per_byte

_PICTURED_BLOCKS = 48


@dataclass(frozen=True)
class Task:
    """A held-out document to continue: `prompt` blocks, and the `reference` that should follow.

    `blocks`: how many blocks to generate; none: up to `<eos>`, which must come.
    """

    prompt: list[str]
    reference: str
    blocks: int | None


def generation_tasks(manifest: Manifest, config: ValidationConfig) -> list[Task]:
    """The first held-out documents: answers to prompts; for text without a prompt, the block after its first half."""

    pieces = (
        reader.document(i)[0]
        for entry in manifest.shards("validation")
        for reader in [ShardReader(manifest.storage, entry)]
        for i in range(entry["documents"])
    )
    return [_task(piece, config.prompt_blocks) for piece in islice(pieces, config.prompts)]


def _task(piece: Piece, prompt_blocks: int) -> Task:
    blocks, n = blocks_of_piece(piece), piece.supervised_from
    if n:
        return Task(blocks[:n], "".join(blocks[n:]), None)
    n = min(len(blocks) // 2, prompt_blocks)
    return Task(blocks[:n], blocks[n], 1)


@torch.no_grad()
def validation_loss(model: Callable[..., torch.Tensor], batches: list[Batch]) -> tuple[float, float]:
    """Nats per label and bits per byte over all ranks' batches; every rank has equally many."""
    nats = labels = chars = 0.0
    for batch in batches:
        nats += float(model(*_on_device(batch)))
        labels += batch.label_count()
        chars += batch.byte_count()
    nats, labels, chars = all_sum(nats), all_sum(labels), all_sum(chars)
    return nats / max(labels, 1), bits_per_byte(nats, chars)


def _on_device(batch: Batch) -> tuple:
    moved = batch.to(device())
    return moved.tokens, moved.chars, moved.labels


def pictured_document(reader: RowReader, tokenizer: MixedTokenizer, char_positions: CharPositions) -> LaidOut:
    """The shortest document of the first held-out row, or its beginning: what is drawn of it fits on a page."""
    piece = min(reader.pieces(RowAddress(0, 0, 0)), key=lambda piece: len(piece.chars))
    shown = beginning(piece, piece.supervised_from + _PICTURED_BLOCKS)
    return lay_out(shown, tokenizer.byte_lengths, char_positions)


def validation_pictures(
    model: TidalTransformer, tokenizer: MixedTokenizer, document: LaidOut, draws: bool
) -> dict[str, bytes]:
    """Pictures of a document: its streams, what it attends to, what each of its chars costs.

    Every rank makes the same pass, since they share the model's weights; those with `draws` false draw nothing.
    """
    tokens, chars, labels = document
    batch = batch_of_rows([(tokens, chars, labels)]).to(device())
    with torch.no_grad(), recorded_maps(model) as maps:
        logits = model(batch.tokens, batch.chars)[0]
    if not draws:
        return {}
    scores = char_scores(logits, batch.labels[0])
    figures = {
        "validation/layout": layout_figure(tokens, chars, labels, tokenizer.name, model.config.token_attention),
        "validation/attention": attention_figure(maps, tokens, chars, tokenizer.name),
        "validation/loss_by_char": loss_figure(scores, chars, labels, tokenizer.name),
    }
    return {name: to_png(figure) for name, figure in figures.items()}


@dataclass(frozen=True)
class GenerationQuality:
    """Validation generation over all ranks: shares of 1, and a few examples as markdown."""

    exact_match: float
    off_canonical_joins_per_block: float
    examples: str


def validation_generation(
    model: TidalTransformer, tokenizer: MixedTokenizer, tasks: list[Task], share: tuple[int, int], max_bytes: int
) -> GenerationQuality:
    """Continue the tasks greedily, dealt to the ranks. share: (rank, world)."""
    rank, world = share
    mine = tasks[rank::world]
    decoder = Decoder(model, tokenizer, device())
    right = joins = blocks = 0
    examples: list[str] = []
    for n_blocks in sorted({t.blocks for t in tasks}, key=str):
        group = [t for t in mine if t.blocks == n_blocks]
        results = decoder.generate(
            [t.prompt for t in group], limits=Limits(max_bytes, n_blocks), any_unfinished=any_rank
        )
        for task, result in zip(group, results, strict=True):
            ended = task.blocks is not None or result.finish == "eos"
            right += ended and result.text == task.reference
            joins += result.off_canonical_joins
            blocks += len(result.blocks)
            examples.append(f"`{''.join(task.prompt)[-60:]!r}` -> `{result.text!r}` (reference `{task.reference!r}`)")
    gathered = gather_objects(examples[:8])
    return GenerationQuality(
        exact_match=all_sum(right) / max(len(tasks), 1),
        off_canonical_joins_per_block=all_sum(joins) / max(all_sum(blocks), 1),
        examples="\n\n".join(e for part in gathered for e in part),
    )
