"""How fast does a model generate, against the same model without a cache, one by one, and against memory bandwidth?

Weights are random: how many passes a text takes, and how long a pass is, does not depend on what the model has learnt.
"""

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch

from data_pipeline.layout import lay_out
from data_pipeline.pieces import piece_of_blocks
from data_pipeline.segmentation import SegmentationConfig
from data_pipeline.stream import batch_of_rows
from data_pipeline.tokenizer import MixedTokenizer, TokenizerConfig, train_tokenizer
from tidal_dist.bench.machine import copy_gb_per_second, describe_machine, seconds_of
from tidal_dist.bench.speculation import Dictated, bench_speculation, format_speculation
from tidal_dist.config import ModelConfig
from tidal_dist.generation.draft import ByModel, Draft
from tidal_dist.generation.engine import Engine
from tidal_dist.generation.request import Limits, Request
from tidal_dist.model.compiled import compile_layers
from tidal_dist.model.transformer import TidalTransformer

_TEXT = "the tide runs out and 12 + 34 = 46 comes in again "
_BLOCK = " tide"  # what is written again and again
_WARM_BLOCKS = 8
_NAIVE_POINTS = 8  # prefixes at which decoding without a cache is timed; between them it grows evenly


def bench_generate(
    config: ModelConfig,
    vocab_size: int,
    blocks: int = 500,
    batch: int = 16,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
    dictated_bytes: int = 1500,
) -> dict[str, Any]:
    """Time the generation of `blocks` blocks.

    Args:
        config: of the model; its weights are random. vocab_size: rows of its embedding.
        batch: sequences side by side, against as many one by one. compiled: see `compile_layers`.
        dictated_bytes: of each text that is written with a draft.

    Returns:
        cached_speedup: the seconds that passes without a cache take, over ours. batch_speedup. bandwidth_share: bytes
        of weights that a pass reads, over its seconds, over what a copy on this device moves. speculation: see
            `bench_speculation`. And what they are from.
    """
    tokenizer = train_tokenizer([_TEXT] * 3, TokenizerConfig(vocab_size=300), SegmentationConfig())
    torch.manual_seed(1)
    with torch.device(device):
        model = (
            TidalTransformer(config, max(vocab_size, tokenizer.vocab_size), tokenizer.segmentation.max_block_bytes)
            .to(dtype)
            .eval()
        )
    naive = _naive_seconds(model, tokenizer, device, blocks)
    if compiled:
        compile_layers(model)
    alone = _generate(model, tokenizer, device, 1, blocks)
    many = _generate(model, tokenizer, device, batch, max(blocks // batch, 8))
    drafted = _generate(model, tokenizer, device, 1, blocks, ByModel()) if config.draft_layers else None
    speculation = bench_speculation(model, tokenizer, device, dictated_bytes)
    weights = _bytes_read(model)
    copy = copy_gb_per_second(device) * 1e9
    return {
        "name": "generate",
        "cached_speedup": naive / alone["seconds"],
        "batch_speedup": many["bytes_per_second"] / alone["bytes_per_second"],
        "bandwidth_share": weights / alone["seconds_per_pass"] / copy,
        "alone": alone,
        "batch": many | {"size": batch},
        "speculation": speculation,
        "draft_head": drafted,
        "naive_seconds": naive,
        "weight_bytes_per_pass": weights,
        "copy_bytes_per_second": copy,
        "blocks": blocks,
        "compiled": compiled,
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": torch.cuda.get_device_name() if model.output.weight.is_cuda else "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        "machine": describe_machine(),
        "config": config.model_dump(),
    }


def format_table(result: dict[str, Any]) -> str:
    """What `bench_generate` returned, as a few lines to read."""
    alone, many = result["alone"], result["batch"]
    return "\n".join(
        [
            f"{result['parameters']:,} parameters, {result['dtype']}, {result['device']}; {result['blocks']} blocks",
            f"one sequence: {alone['bytes_per_second']:,.0f} bytes/s, {alone['seconds_per_pass'] * 1e3:.3f} ms a pass",
            f"without a cache: {result['naive_seconds']:.1f} s; with it {alone['seconds']:.2f} s: "
            f"{result['cached_speedup']:.1f} times faster",
            f"{many['size']} sequences: {many['bytes_per_second']:,.0f} bytes/s: "
            f"{result['batch_speedup']:.1f} times one",
            f"weights read: {result['weight_bytes_per_pass'] / alone['seconds_per_pass'] / 1e9:,.0f} GB/s of "
            f"{result['copy_bytes_per_second'] / 1e9:,.0f} GB/s that a copy moves: {result['bandwidth_share']:.0%}",
            *_format_draft_head(alone, result["draft_head"]),
            *format_speculation(result["speculation"]),
        ]
    )


def _format_draft_head(alone: dict[str, float], drafted: dict[str, float] | None) -> list[str]:
    """A line, where there is a draft head: what is dictated leaves it one char to draft, so that all are accepted."""
    if drafted is None:
        return []
    return [
        f"draft head, all its chars accepted: {drafted['passes']:,.0f} passes instead of {alone['passes']:,.0f}, and "
        f"{drafted['draft_passes']:,.0f} of its own: {alone['seconds'] / drafted['seconds']:.1f} times as fast"
    ]


def _generate(
    model: TidalTransformer, tokenizer: MixedTokenizer, device: str, batch: int, blocks: int, draft: Draft | None = None
) -> dict[str, float]:
    """Seconds for `batch` sequences of `blocks` blocks, after a warm-up that on a GPU records all graphs."""
    engine = Engine(model, tokenizer, device, batch, draft)
    warm_up = blocks if torch.device(device).type == "cuda" else min(blocks, _WARM_BLOCKS)
    for count in (warm_up, blocks):
        limits = Limits(max_bytes=len(_BLOCK) * count, max_blocks=count)
        jobs = [
            engine.submit(Request(_TEXT, limits=limits, constraint=Dictated([_BLOCK] * count))) for _ in range(batch)
        ]
        start, passes = time.perf_counter(), 0
        while engine.has_work:
            engine.step()
            passes += 1
        seconds = time.perf_counter() - start
    written = sum(len(job.generation.text) for job in jobs)
    return {
        "seconds": seconds,
        "passes": passes,
        "draft_passes": max(job.generation.draft_passes for job in jobs),
        "seconds_per_pass": seconds / passes,
        "bytes_per_second": written / seconds,
    }


def _naive_seconds(model: TidalTransformer, tokenizer: MixedTokenizer, device: str, blocks: int) -> float:
    """What it takes to compute everything anew for each char, reckoned from passes over prefixes of several lengths."""
    seconds = []
    lengths = np.linspace(1, blocks, _NAIVE_POINTS).astype(int)
    for count in lengths:
        piece = piece_of_blocks([_BLOCK] * int(count), tokenizer, int(count) - 1, ends_document=False)
        tokens, chars, labels = lay_out(piece, tokenizer.byte_lengths, model.config.char_positions)
        batch = batch_of_rows([(tokens, chars, labels)]).to(device)
        seconds.append(_seconds(partial(model, batch.tokens, batch.chars), device))
    return float(np.trapezoid(seconds, lengths)) * (len(_BLOCK) + 1)


@torch.inference_mode()
def _seconds(function: Callable[[], Any], device: str, repeats: int = 3) -> float:
    """Median seconds of a call, after one that is not timed."""
    function()
    return median(seconds_of(function, device)[0] for _ in range(repeats))


def _bytes_read(model: TidalTransformer) -> int:
    """Bytes of weights that a pass without tokens reads: those of the layers that chars pass, and the output."""
    layers = list(model.layers)[-model.config.char_depth :]
    return sum(p.numel() * p.element_size() for m in (*layers, model.norm, model.output) for p in m.parameters())
