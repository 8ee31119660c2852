"""How much faster is one pass over a document than one sample per prefix, the seed's way?

Both ways compute the same loss and the same gradients of the same document with the same weights: once as two streams
in one pass, once as one sample per block, [<bos>, tokens of all earlier blocks, <bob>, reversed bytes]. Each way runs
in a process of its own, so that neither sees the other's memory. On the CPU, in float32, without activation
checkpointing.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, Literal

import numpy as np
import torch

from data_pipeline.corpus import CorpusConfig, ReadCounts, read_documents
from data_pipeline.layout import Slots, lay_out, pack
from data_pipeline.pieces import Piece, piece_of_blocks
from data_pipeline.segmentation import SegmentationConfig, segment
from data_pipeline.stream import Batch, batch_of_rows
from tidal_dist.bench.machine import (
    Limits,
    best_limits,
    busy_warning,
    describe_machine,
    forget_peak,
    in_own_process,
    machine_line,
    peak_bytes,
    spread,
)
from tidal_dist.bench.text import tokenizer_of
from tidal_dist.config import Config, ModelConfig
from tidal_dist.errors import CorpusError
from tidal_dist.flops import row_flops
from tidal_dist.model.transformer import TidalTransformer

Way = Literal["one pass", "per-prefix samples"]

# Slots, padding included, of one batch of the per-prefix way, which is about as fast with a quarter of them and slower
# with twice as many. A longer sample is a batch of its own.
_BATCH_SLOTS = 4096
# The sums of nats, and the norms of the gradients, differ by rounding only.
_LOSS_TOLERANCE = 1e-4
_GRADIENT_TOLERANCE = 1e-3
_WARM_UP_BLOCKS = 8
_ENOUGH_SECONDS = 30.0  # a way that has been timed for so long is not repeated


def bench_layout(config: Config, blocks: int = 1024, repeats: int = 3, seed: int = 1) -> dict[str, Any]:
    """Time one training step (forward and backward) on the first `blocks` blocks of the corpus, both ways.

    Args:
        config: its corpus, segmentation, tokeniser and model are used; a tokeniser without a path is trained.
        blocks: blocks of the one document, at least 1.
        repeats: timed steps of each way; a way that takes more than half a minute has fewer.
        seed: of the weights.

    Returns:
        ratio: the baseline's median seconds over ours. ours, baseline: see `_measure`. blocks, tokens, chars: size of
        the document, chars without marks. parameters. limit: see `Limits`; utilisation: share of its FLOPs that one
        pass reaches. machine. warning: see `busy_warning`. config: the model's. name.

    Raises:
        CorpusError: the corpus has fewer blocks.
        RuntimeError: the two ways do not compute the same loss or gradients, so that comparing them means nothing.
    """
    tokenizer = tokenizer_of(config)
    piece = piece_of_blocks(_first_blocks(config.corpus, config.segmentation, blocks), tokenizer)
    task = _Task("one pass", config.model, config.segmentation.max_block_bytes, tokenizer.byte_lengths, piece, seed)
    machine = describe_machine()
    ours = in_own_process(_measure, task, repeats)
    baseline = in_own_process(_measure, replace(task, way="per-prefix samples"), repeats)
    _check_agreement(ours, baseline)
    limit = best_limits([ours.pop("limit"), baseline.pop("limit")])
    model = config.model.model_copy(update={"draft_layers": None})  # whose head has a part in training mode alone
    flops = row_flops(model, ours["row_tokens"], ours["row_chars"], task.max_block_bytes).training
    return {
        "name": "layout",
        "ratio": baseline["seconds"] / ours["seconds"],
        "ours": ours,
        "baseline": baseline,
        "blocks": blocks,
        "tokens": len(piece.tokens),
        "chars": len(piece.chars),
        "parameters": sum(p.numel() for p in task.model().parameters()),
        "limit": limit,
        "utilisation": flops / ours["seconds"] / 1e12 / limit["tflops"],
        "machine": machine,
        "warning": busy_warning(machine, [spread(way["seconds_all"]) for way in (ours, baseline)]),
        "config": config.model.model_dump(),
    }


def format_table(result: dict[str, Any]) -> str:
    """What `bench_layout` returned, as a few lines to read."""
    lines = [
        f"{result['blocks']:,} blocks ({result['tokens']:,} tokens, {result['chars']:,} bytes), "
        f"{result['parameters']:,} parameters",
        f"{'':20}{'seconds':>10}{'cpu s':>10}{'steps':>7}{'peak MiB':>10}{'batches':>9}{'slots':>11}{'nats':>13}",
    ]
    for way in (result["ours"], result["baseline"]):
        lines.append(
            f"{way['name']:20}{way['seconds']:10.3f}{way['cpu_seconds']:10.3f}{way['repeats']:7}"
            f"{way['peak_bytes'] / 2**20:10.0f}{way['batches']:9}{way['slots']:11,}{way['loss']:13.2f}"
        )
    lines.append(f"one pass is {result['ratio']:.1f} times faster")
    peak = result["limit"]["tflops"] * 1e3
    lines.append(f"it reaches {result['utilisation']:.0%} of the {peak:,.0f} GFLOP/s of a large matrix product")
    lines.append(machine_line(result["machine"]))
    return "\n".join(lines)


def _first_blocks(corpus: CorpusConfig, segmentation: SegmentationConfig, count: int) -> list[str]:
    """The first `count` blocks of the corpus, its documents laid end to end."""
    blocks: list[str] = []
    for document in read_documents(corpus, ReadCounts()):
        blocks += segment(document.prompt + document.text, segmentation)
        if len(blocks) >= count:
            return blocks[:count]
    raise CorpusError(f"the corpus has {len(blocks)} blocks, the bench needs {count}; use fewer blocks or more text")


@dataclass(frozen=True)
class _Task:
    """Everything that a measuring process needs to know."""

    way: Way
    config: ModelConfig
    max_block_bytes: int
    byte_lengths: np.ndarray
    piece: Piece
    seed: int

    def model(self) -> TidalTransformer:
        """The model, with the same weights in every process, and no dropout: the two ways must agree."""
        torch.manual_seed(self.seed)
        return TidalTransformer(self.config, len(self.byte_lengths), self.max_block_bytes).eval()

    def batches(self, piece: Piece) -> list[Batch]:
        """All batches of one step on `piece`."""
        if self.way == "one pass":
            return [batch_of_rows([lay_out(piece, self.byte_lengths, self.config.char_positions)])]
        samples = [lay_out(prefix, self.byte_lengths, self.config.char_positions) for prefix in _prefixes(piece)]
        return [_padded_batch(group) for group in _groups_of_like_length(samples)]


def _prefixes(piece: Piece) -> Iterator[Piece]:
    """The samples of the seed's way: for each block, the blocks before it as context and its own bytes to predict."""
    token_ends, byte_ends = np.cumsum(piece.block_tokens), np.cumsum(piece.block_bytes)
    n_blocks = len(piece.block_tokens)
    for k in range(n_blocks):
        yield Piece(
            tokens=piece.tokens[: token_ends[k]],
            chars=piece.chars[: byte_ends[k]],
            block_tokens=piece.block_tokens[: k + 1],
            block_bytes=piece.block_bytes[: k + 1],
            supervised_from=k,
            ends_document=piece.ends_document and k == n_blocks - 1,
        )


Sample = tuple[Slots, Slots, np.ndarray]


def _groups_of_like_length(samples: list[Sample]) -> Iterator[list[Sample]]:
    """The samples, shortest first, in groups that fill `_BATCH_SLOTS` slots, padding included."""
    group: list[Sample] = []
    for sample in sorted(samples, key=_slot_counts):
        longer = [*group, sample]
        if group and len(longer) * sum(np.max([_slot_counts(s) for s in longer], axis=0)) > _BATCH_SLOTS:
            yield group
            longer = [sample]
        group = longer
    yield group


def _slot_counts(sample: Sample) -> tuple[int, int]:
    tokens, chars, _ = sample
    return len(tokens.ids), len(chars.ids)


def _padded_batch(samples: list[Sample]) -> Batch:
    """One row per sample, padded to the longest of them."""
    row_tokens, row_chars = (int(n) for n in np.max([_slot_counts(s) for s in samples], axis=0))
    return batch_of_rows([pack([sample], row_tokens, row_chars) for sample in samples])


def _measure(task: _Task, repeats: int) -> dict[str, Any]:
    """Time steps of one way, in a fresh process.

    Returns:
        name; seconds: median of seconds_all, the timed steps, `repeats` of them; cpu_seconds: median over the steps of
        the time that all threads computed, which a busy machine changes less; peak_bytes: memory of a step beyond what
        the process held before it (weights and batches); loss: sum of nats; gradient_norm; batches, slots, labels: of
        one step, slots with padding; row_tokens, row_chars: slots of a row of the first batch; limit: see `Limits`.
    """
    model = task.model()
    batches = task.batches(task.piece)
    _step(model, task.batches(next(_prefixes(task.piece), task.piece)))
    before = forget_peak("cpu")
    seconds: list[float] = []
    cpu_seconds: list[float] = []
    while not seconds or (len(seconds) < repeats and sum(seconds) < _ENOUGH_SECONDS):
        model.zero_grad()
        start, cpu_start = time.perf_counter(), time.process_time()
        loss = _step(model, batches)
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    peak = peak_bytes("cpu")
    gradients = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    return {
        "name": task.way,
        "seconds": median(seconds),
        "seconds_all": seconds,
        "cpu_seconds": median(cpu_seconds),
        "repeats": len(seconds),
        "peak_bytes": peak - before,
        "loss": loss,
        "gradient_norm": float(torch.stack(gradients).norm()),
        "batches": len(batches),
        "slots": sum(batch.tokens.ids.numel() + batch.chars.ids.numel() for batch in batches),
        "labels": sum(batch.label_count() for batch in batches),
        "row_tokens": batches[0].tokens.ids.shape[1],
        "row_chars": batches[0].chars.ids.shape[1],
        "limit": Limits("cpu", torch.float32).run(),
    }


def _step(model: TidalTransformer, batches: list[Batch]) -> float:
    """Forward and backward over all batches, gradients accumulated; the sum of nats."""
    total = 0.0
    for batch in batches:
        loss = model(batch.tokens, batch.chars, batch.labels)
        loss.backward()
        total += loss.item()
    return total


def _check_agreement(ours: dict[str, Any], baseline: dict[str, Any]) -> None:
    for what, tolerance in (("labels", 0.0), ("loss", _LOSS_TOLERANCE), ("gradient_norm", _GRADIENT_TOLERANCE)):
        if not math.isclose(ours[what], baseline[what], rel_tol=tolerance):
            raise RuntimeError(
                f"one pass and per-prefix samples disagree on {what}: {ours[what]!r} and {baseline[what]!r}; "
                "a comparison of their speed means nothing"
            )
