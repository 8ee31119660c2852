"""Validation: loss and bits per byte on held-out rows, and generation by the decoder that users get."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

import torch

from data_pipeline.layout import Piece, blocks_of_piece
from data_pipeline.shard_reader import ShardReader
from data_pipeline.shards import Manifest
from data_pipeline.stream import Batch
from data_pipeline.tokenizer import MixedTokenizer
from tidal_dist.config import ValidationConfig
from tidal_dist.generation.decoder import Decoder, Limits
from tidal_dist.model.transformer import TidalTransformer
from tidal_dist.training.engine import all_sum, any_rank, device, gather_objects


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
        for reader in [ShardReader(manifest.folder, entry)]
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


def bits_per_byte(nats: float, text_bytes: float) -> float:
    """sum(nats, end marks included) / (ln 2 * bytes)."""
    return nats / (math.log(2) * max(text_bytes, 1))


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
