"""Training steps of the two-stream model and of plain decoders, as objects that a process of their own measures."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from data_pipeline.layout import IGNORED, lay_out_rows
from data_pipeline.ordering import Order, Share
from data_pipeline.pieces import Piece
from data_pipeline.rows import RowReader, row_format_of
from data_pipeline.run_order import SPLIT
from data_pipeline.shards import DataConfig, Manifest
from data_pipeline.stream import Batch, Loading, Stream, batch_of
from data_pipeline.tokenizer import OUTPUT_VOCABULARY
from tidal_dist.bench.machine import dtype_named, forget_peak, is_gpu, peak_bytes, seconds_of
from tidal_dist.bench.text import Unit, plain_rows
from tidal_dist.config import ModelConfig
from tidal_dist.flops import row_flops
from tidal_dist.model.attention import Kernel
from tidal_dist.model.compiled import compile_layers
from tidal_dist.model.plain import PlainDecoder, next_ids, plain_flops
from tidal_dist.model.transformer import TidalTransformer

_WARM_UP_STEPS = 2  # the optimizer makes its moments in the first; a compiler works in both
_PROFILED = 12  # operations that are named, those that take most of the time


@dataclass(frozen=True)
class Conditions:
    """How all models of a bench are trained.

    Attributes:
        device, dtype: by name; with bf16 the optimizer has weights and moments in float32, as in mixed precision.
        attention: kernel of the two streams. compiled: layers are compiled.
        recompute_every_layers: of every k layers one is computed again; 0: none.
    """

    device: str = "cpu"
    dtype: str = "fp32"
    attention: Kernel = "auto"
    compiled: bool = False
    recompute_every_layers: int = 0

    def ready(self, make: Callable[..., nn.Module]) -> nn.Module:
        """A model on the device, with its activation checkpointing, in training."""
        torch.manual_seed(1)
        again: dict[str, Any] = {}
        if self.recompute_every_layers:
            again["checkpoint"] = partial(checkpoint, use_reentrant=False)
            again["checkpoint_every_layers"] = self.recompute_every_layers
        with torch.device(self.device):
            model = make(**again).to(dtype_named(self.dtype)).train()
        if self.compiled and isinstance(model, TidalTransformer):
            compile_layers(model)
        elif self.compiled:
            for layer in model.get_submodule("layers").children():
                layer.compile()
        return model


@dataclass(frozen=True)
class TwoStreams:
    """The two-stream model on rows of `shape` (T, C) slots."""

    config: ModelConfig
    rows: list[list[Piece]]
    shape: tuple[int, int]
    byte_lengths: np.ndarray
    max_block_bytes: int

    def model(self, conditions: Conditions) -> nn.Module:
        """The model."""
        sizes = len(self.byte_lengths), self.max_block_bytes
        return conditions.ready(partial(TidalTransformer, self.config, *sizes, attention=conditions.attention))

    def inputs(self, device: str) -> tuple[Any, ...]:
        """What the model is called with."""
        shifts = [[0] * len(row) for row in self.rows]
        lengths = self.byte_lengths.astype(np.int32)
        batch = batch_of(lay_out_rows(self.rows, shifts, lengths, self.config.char_positions, self.shape))
        return _arguments(batch.to(device))

    def figures(self) -> dict[str, int]:
        """Of a step: positions, padding included; bytes of text; labels; model FLOPs."""
        size = sum(len(piece.chars) for row in self.rows for piece in row)
        labels = size + sum(len(piece.block_bytes) for row in self.rows for piece in row)
        each = row_flops(self.config, *self.shape, self.max_block_bytes)
        positions = len(self.rows) * sum(self.shape)
        return {"positions": positions, "bytes": size, "labels": labels, "flops": each.training * len(self.rows)}


def _arguments(batch: Batch) -> tuple[Any, ...]:
    return batch.tokens, batch.chars, batch.labels


@dataclass(frozen=True)
class Plain:
    """A plain decoder over the bytes or the BPE tokens of rows of text; width: see `plain_rows`."""

    config: ModelConfig
    rows: list[list[Piece]]
    unit: Unit
    vocab_size: int
    byte_lengths: np.ndarray
    width: int | None = None

    @property
    def output_size(self) -> int:
        """Ids to choose from."""
        return OUTPUT_VOCABULARY if self.unit == "bytes" else self.vocab_size

    def model(self, conditions: Conditions) -> nn.Module:
        """The model."""
        return conditions.ready(partial(PlainDecoder, self.config, self.vocab_size, self.output_size))

    def ids(self) -> torch.Tensor:
        """(B, N)."""
        return plain_rows(self.rows, self.unit, self.width)

    def inputs(self, device: str) -> tuple[Any, ...]:
        """What the model is called with."""
        ids = self.ids()
        return ids.to(device), next_ids(ids).to(device)

    def figures(self) -> dict[str, int]:
        """Of a step: positions, padding included; bytes of text; labels; model FLOPs."""
        ids = self.ids()
        labels = int((next_ids(ids) != IGNORED).sum())
        forward = len(ids) * plain_flops(self.config, ids.shape[1], self.output_size)
        size = int(self.byte_lengths[ids.numpy()].sum())
        return {"positions": ids.numel(), "bytes": size, "labels": labels, "flops": 3 * forward}


class _AdamW:
    """Fused AdamW; over float32 copies where the weights have fewer bits."""

    def __init__(self, model: nn.Module):
        self._weights: list[torch.Tensor] = list(model.parameters())
        self._is_mixed = self._weights[0].dtype != torch.float32
        self._moved = [p.detach().float() for p in self._weights] if self._is_mixed else self._weights
        self._inner = torch.optim.AdamW(self._moved, lr=1e-5, fused=True)

    def step(self) -> None:
        """Move the weights by their gradients, and forget those."""
        if self._is_mixed:
            for copy, weight in zip(self._moved, self._weights, strict=True):
                copy.grad = None if weight.grad is None else weight.grad.float()
                weight.grad = None
        self._inner.step()
        self._inner.zero_grad()
        if self._is_mixed:
            with torch.no_grad():
                torch._foreach_copy_(self._weights, self._moved)


class Training:
    """A model that is trained on the same rows again and again."""

    def __init__(self, way: TwoStreams | Plain, conditions: Conditions):
        self._device = conditions.device
        self._model = way.model(conditions)
        self._optimizer = _AdamW(self._model)
        self._inputs = way.inputs(self._device)
        self._labels = way.figures()["labels"]
        # Before the first step: what is free again behind it stays resident on a host.
        self._held = forget_peak(self._device)
        for _ in range(_WARM_UP_STEPS):
            self._step()

    def run(self) -> tuple[float, float]:
        """One step: wall and CPU seconds."""
        return seconds_of(self._step, self._device)

    def report(self) -> dict[str, int]:
        """Parameters; bytes held before the first step; the most held beyond, gradients and moments included."""
        parameters = sum(p.numel() for p in self._model.parameters())
        peak = peak_bytes(self._device) - self._held
        return {"parameters": parameters, "held_bytes": self._held, "peak_bytes": peak}

    def profile(self, trace: Path) -> list[dict[str, Any]]:
        """Write a Chrome trace of a step; the operations that take most of its time, and their shares."""
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_gpu(self._device) else [])]
        with profile(activities=activities) as profiler:
            self.run()
        profiler.export_chrome_trace(str(trace))
        own = "self_device_time_total" if is_gpu(self._device) else "self_cpu_time_total"
        found = {event.key: getattr(event, own) for event in profiler.key_averages()}
        total = sum(found.values())
        largest = sorted(found, key=lambda key: -found[key])[:_PROFILED]
        return [{"operation": key, "share": found[key] / total} for key in largest]

    def _step(self) -> None:
        (self._model(*self._inputs) / self._labels).backward()
        self._optimizer.step()

    def step_on(self, batch: Batch) -> None:
        """A step on a batch of the loader."""
        self._inputs = _arguments(batch.to(self._device))
        self._step()


class FedTraining:
    """A two-stream model that is trained on what one loader process reads from shards."""

    def __init__(self, way: TwoStreams, conditions: Conditions, data: DataConfig):
        self._training, self._device = Training(way, conditions), conditions.device
        manifest = Manifest.of(data)
        reader = RowReader(manifest, SPLIT, manifest.tokenizer(), row_format_of(data), data.seed)
        order, share = Order(reader.shard_rows, data.lanes, data.seed), Share(len(way.rows), 1, 0, 1)
        loading = Loading(workers=1, pin_memory=is_gpu(self._device))
        self._stream = Stream(reader, order, share, manifest.hash, loading)
        next(self._stream)  # starts the process

    def run(self) -> tuple[float, float]:
        """One step: seconds that it waited for its batch, seconds in all."""
        started = perf_counter()
        batch = next(self._stream).batches[0]
        waited = perf_counter() - started
        seconds, _ = seconds_of(partial(self._training.step_on, batch), self._device)
        return waited, waited + seconds

    def report(self) -> None:
        """There is nothing beside."""
