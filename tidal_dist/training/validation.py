"""Validation: loss and bits per byte on held-out rows, and generation by the decoder that users get."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal, get_args

import numpy as np
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
from tidal_dist.generation.decoder import Decoder
from tidal_dist.generation.events import Generation
from tidal_dist.generation.report import trace_lines
from tidal_dist.generation.request import Limits
from tidal_dist.model.likelihood import bits_per_byte, exactly_predicted
from tidal_dist.model.maps import char_scores, recorded_maps
from tidal_dist.model.transformer import TidalTransformer
from tidal_dist.plots.attention import attention_figure
from tidal_dist.plots.canvas import to_png
from tidal_dist.plots.layout import layout_figure
from tidal_dist.plots.loss import loss_figure
from tidal_dist.provenance import StoredText
from tidal_dist.training.engine import all_sum, device, gather_objects

_PICTURED_BLOCKS = 48


Kind = Literal["answer", "next_block", "continuation"]
_SHOWN = {"answer": 8, "next_block": 4, "continuation": 8}  # examples of each kind
_SHOWN_CONTEXT = 160  # characters of a context that are shown
_STORED = 2  # texts of each kind that a checkpoint keeps, so that an export can be seen to write them again


@dataclass(frozen=True)
class Task:
    """A held-out document to continue: `prompt` blocks, and the `reference` that follows there.

    An answer must be written whole, up to `<eos>`; the next block of a text is one block; a continuation is judged by
    its form alone.
    """

    kind: Kind
    prompt: list[str]
    reference: str
    limits: Limits


def generation_tasks(manifest: Manifest, config: ValidationConfig) -> list[Task]:
    """Of the first held-out documents: answers to prompts; of text without a prompt what follows its first half."""

    pieces = (
        reader.document(i)[0]
        for entry in manifest.shards("validation")
        for reader in [ShardReader(manifest.storage, entry)]
        for i in range(entry["documents"])
    )
    shown = list(islice(pieces, config.prompts))
    texts = [piece for piece in shown if not piece.supervised_from]
    continuations = [_continuation(piece, config) for piece in texts[: config.continuations]]
    return [_judged_task(piece, config) for piece in shown] + continuations


def _judged_task(piece: Piece, config: ValidationConfig) -> Task:
    blocks, n = blocks_of_piece(piece), piece.supervised_from
    if n:
        return Task("answer", blocks[:n], "".join(blocks[n:]), Limits(config.max_bytes))
    context, following = _halves(blocks, config)
    return Task("next_block", context, following[0], Limits(config.max_bytes, 1))


def _continuation(piece: Piece, config: ValidationConfig) -> Task:
    context, following = _halves(blocks_of_piece(piece), config)
    reference = "".join(following).encode()[: config.continuation_bytes].decode(errors="ignore")
    return Task("continuation", context, reference, Limits(config.continuation_bytes))


def _halves(blocks: list[str], config: ValidationConfig) -> tuple[list[str], list[str]]:
    n = min(len(blocks) // 2, config.prompt_blocks)
    return blocks[:n], blocks[n:]


@torch.no_grad()
def validation_loss(
    model: Callable[..., torch.Tensor],
    batches: list[Batch],
    any_rank: Callable[[bool], bool],
    byte_lengths: np.ndarray | None = None,
) -> tuple[float, float]:
    """Nats per label and bits per byte over all ranks' batches; every rank has equally many.

    Args:
        byte_lengths: bytes that each id stands for, where labels may be BPE tokens.

    Raises:
        what `any_rank` raises, which all ranks call before each batch.
    """
    nats = labels = chars = 0.0
    for batch in batches:
        any_rank(False)
        nats += float(model(*_on_device(batch)))
        labels += batch.label_count()
        chars += batch.byte_count(byte_lengths)
    nats, labels, chars = all_sum(nats), all_sum(labels), all_sum(chars)
    return nats / max(labels, 1), bits_per_byte(nats, chars)


@torch.no_grad()
def validation_match(
    model: Callable[..., torch.Tensor], batches: list[Batch], any_rank: Callable[[bool], bool]
) -> dict[str, float]:
    """Of the batches' documents those that greedy decoding would write, for models that the decoder does not know.

    Raises:
        what `any_rank` raises, which all ranks call before each batch.
    """
    right = documents = 0.0
    for batch in batches:
        any_rank(False)
        tokens, chars, labels = _on_device(batch)
        found = exactly_predicted(model(tokens, chars), chars.document, labels)
        right, documents = right + found[0], documents + found[1]
    return {"validation/exact_match": all_sum(right) / max(all_sum(documents), 1)}


@torch.no_grad()
def attention_share(model: TidalTransformer, batches: list[Batch]) -> dict[str, float]:
    """Of all pairs of slots of the first batch's rows, those that attention computes, hidden ones included."""
    if not batches:
        return {}
    tokens, chars, _ = _on_device(batches[0])
    prepared, _ = model.prepare(tokens, chars, model.embedding.weight.dtype, None)
    assert not isinstance(prepared, torch.Tensor)
    rows, n_slots = tokens.ids.shape[0], tokens.ids.shape[1] + chars.ids.shape[1]
    return {"validation/attention_share": prepared.computed_pairs() / (rows * n_slots**2)}


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
class Outcome:
    """What became of a task.

    Attributes:
        right: the text is the reference, and an answer ended there. blocks: written, and how many of them would have
            come out ill-formed without a mask. joins: borders between them that cutting the text anew would not set.
        example: the task and its text, for people; none where it is not shown. text: the same for the checkpoint.
    """

    kind: Kind
    right: bool
    blocks: int
    ill_formed_blocks: int
    joins: int
    example: dict[str, Any] | None = None
    text: StoredText | None = None


def validation_generation(
    model: TidalTransformer,
    tokenizer: MixedTokenizer,
    tasks: list[Task],
    share: tuple[int, int],
    any_rank: Callable[[bool], bool],
) -> list[Outcome]:
    """Continue the tasks greedily, dealt to the ranks; the outcomes of all, on every rank.

    Every rank makes as many passes as the one with the longest work, with or without work of its own.

    Args:
        share: (rank, world).

    Raises:
        what `any_rank` raises, which all ranks call before each pass.
    """
    rank, world = share
    decoder = Decoder(model, tokenizer, device())
    outcomes: list[Outcome] = []
    for kind in get_args(Kind):
        group = [task for task in tasks if task.kind == kind]
        if not group:  # on no rank
            continue
        mine = range(rank, len(group), world)
        prompts, limits = [group[i].prompt for i in mine], group[0].limits
        results = decoder.generate(prompts, limits=limits, any_unfinished=any_rank)
        for i, result in zip(mine, results, strict=True):
            outcome = _outcome(group[i], result, is_shown=i < _SHOWN[kind])
            outcomes.append(replace(outcome, text=_stored(group[i], result)) if i < _STORED else outcome)
    return [outcome for of_rank in gather_objects(outcomes) for outcome in of_rank]


def _outcome(task: Task, result: Generation, is_shown: bool) -> Outcome:
    ended = task.kind != "answer" or result.finish == "eos"
    right = ended and result.text == task.reference
    example = {
        "kind": task.kind,
        "prompt": "".join(task.prompt)[-_SHOWN_CONTEXT:],
        "text": result.text,
        "reference": task.reference,
        "right": None if task.kind == "continuation" else right,
        "finish": result.finish,
        "trace": trace_lines(result),
    }
    blocks = len(result.blocks)
    return Outcome(
        task.kind, right, blocks, result.ill_formed_blocks, result.off_canonical_joins, example if is_shown else None
    )


def _stored(task: Task, result: Generation) -> StoredText:
    limits = task.limits
    text = StoredText(list(task.prompt), list(result.blocks), result.finish, limits.max_bytes, limits.max_blocks)
    return text.shortened()


def generation_metrics(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Shares of 1, each only where there is something that it is a share of.

    Exact match is of prompts with an answer; the match of the next block, of texts; ill-formed blocks and off-canonical
    joins per block, of what is written freely: answers and continuations.
    """
    metrics = {}
    for kind, name in (("answer", "exact_match"), ("next_block", "next_block_match")):
        if judged := [o.right for o in outcomes if o.kind == kind]:
            metrics[f"validation/{name}"] = sum(judged) / len(judged)
    free = [o for o in outcomes if o.kind != "next_block"]
    if free:
        blocks = max(sum(o.blocks for o in free), 1)
        metrics["validation/ill_formed_blocks"] = sum(o.ill_formed_blocks for o in free) / blocks
        metrics["validation/off_canonical_joins_per_block"] = sum(o.joins for o in free) / blocks
    return metrics


def generation_quality(metrics: Mapping[str, float]) -> float:
    """What the best checkpoint is chosen by: exact match or else the match of the next block, then bits per byte."""
    if not metrics:
        return -math.inf
    match = metrics.get("validation/exact_match", metrics.get("validation/next_block_match", 0.0))
    return match - 1e-6 * metrics["validation/bits_per_byte"]


def as_markdown(examples: Sequence[Mapping[str, Any]]) -> str:
    """Examples for TensorBoard, each with its trace."""
    return "\n\n".join(_example_as_markdown(example) for example in examples)


def _example_as_markdown(example: Mapping[str, Any]) -> str:
    verdict = {True: "right", False: "wrong", None: "continuation"}[example["right"]]
    lines = [f"{example['prompt']!r}", f"-> {example['text']!r}", f"   {example['reference']!r} is there", ""]
    return "\n".join([f"**{verdict}**", "", *(f"    {line}" for line in [*lines, *example["trace"]])])
