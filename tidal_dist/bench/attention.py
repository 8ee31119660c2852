"""How fast is the attention of the two streams, forward and backward, against dense attention, and against the device?

The baseline is what one would write first: one fused call (`scaled_dot_product_attention`) over N x N with a boolean
mask. Plain causal attention over N positions, through the same call, says what the device's own kernel makes of the
pairs that it computes. Random queries, keys and values; layouts as of a text whose tokens are blocks of one length.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from data_pipeline.layout import Slots, TokenAttention, lay_out_rows, may_see
from data_pipeline.pieces import Piece
from data_pipeline.stream import Batch, batch_of
from data_pipeline.tokenizer import FIRST_TOKEN
from tidal_dist.bench.machine import (
    Limits,
    Made,
    best_limits,
    busy_warning,
    describe_machine,
    dtype_named,
    forget_peak,
    in_turns,
    is_gpu,
    machine_line,
    peak_bytes,
    seconds_of,
    spread,
)
from tidal_dist.config import Config, ModelConfig
from tidal_dist.errors import UserError
from tidal_dist.model.attention import attend, prepare_attention
from tidal_dist.model.scores import Scoring

Way = Literal["two streams", "dense", "causal"]
WAYS: tuple[Way, ...] = ("two streams", "dense", "causal")

SWEPT_TOKENS = 512  # T, while C grows
SWEPT_CHARS = (1024, 2048, 4096, 8192, 16384)
_DOCUMENTS = (1, 4)  # in a row of the configured slots
_PASSES = 3  # a backward pass has twice the products of its forward pass
_COUNTED_AT_ONCE = 256  # queries


@dataclass(frozen=True)
class Shape:
    """A row: T token and C char slots, in so many documents of equal length; longest_run: W, with `<bob>`."""

    tokens: int
    chars: int
    longest_run: int
    documents: int = 1

    @property
    def slots(self) -> int:
        """N."""
        return self.tokens + self.chars

    def batch(self) -> Batch:
        """The row, B = 1: every block is one token, and all have about the same number of bytes.

        Raises:
            UserError: there are fewer chars than blocks, each of which has a `<bob>`, or more than those can hold.
        """
        most = self.tokens * self.longest_run
        if not self.tokens <= self.chars <= most:
            raise UserError(
                f"a row of {self.tokens} tokens: {self.chars} chars do not make as many blocks of at most "
                f"{self.longest_run - 1} bytes; give {self.tokens} to {most} chars (data.row_chars, max_block_bytes)"
            )
        borders = np.linspace(0, self.tokens, self.documents + 1).astype(int)
        runs = np.diff(np.linspace(0, self.chars, self.tokens + 1).astype(int))
        pieces = [_piece(runs[a:b]) for a, b in pairwise(borders)]
        lengths = np.ones(FIRST_TOKEN + 1, np.int32)
        return batch_of(lay_out_rows([pieces], [[0] * len(pieces)], lengths, "mirrored", (self.tokens, self.chars))).to(
            "cpu"
        )


def _piece(runs: np.ndarray) -> Piece:
    """A document of blocks of one token each; runs: their char slots, `<bob>` included."""
    ones = np.ones(len(runs), np.int64)
    return Piece(ones * FIRST_TOKEN, np.zeros(int((runs - 1).sum()), np.uint8), ones, runs - 1)


def visible_pairs(batch: Batch, token_attention: TokenAttention) -> int:
    """Pairs of a row of which the layout's own predicate says that one may see the other."""
    return sum(
        int(
            may_see(
                query.map(lambda a, s=start: a[:, s : s + _COUNTED_AT_ONCE]).queries(), key.keys(), token_attention
            ).sum()
        )
        for query, key in _pairs_of_streams(batch)
        for start in range(0, query.ids.shape[1], _COUNTED_AT_ONCE)
    )


def _pairs_of_streams(batch: Batch) -> list[tuple[Slots, Slots]]:
    """Who may see anything of whom."""
    return [(batch.tokens, batch.tokens), (batch.chars, batch.tokens), (batch.chars, batch.chars)]


def full_mask(batch: Batch, token_attention: TokenAttention) -> torch.Tensor:
    """Who sees whom in a whole row, (B, 1, N, N) bool."""
    streams = batch.tokens, batch.chars
    rows = [torch.cat([may_see(q.queries(), k.keys(), token_attention) for k in streams], dim=2) for q in streams]
    return torch.cat(rows, dim=1)[:, None]


class Attention:
    """One way to attend, on all shapes; none stands for one that is left out."""

    def __init__(self, way: Way, shapes: list[Shape | None], model: ModelConfig, device: str, dtype: str):
        self._device = device
        self._found: list[dict[str, Any]] = []
        self._kernel: dict[str, Any] = {}
        self._calls: list[Callable[[], None] | None] = []
        for shape in shapes:
            self._calls.append(self._call(way, shape, model, dtype_named(dtype)) if shape else None)
            self._found += [] if shape else [{}]

    def run(self) -> list[float | None]:
        """Seconds forward and backward, by shape."""
        return [call and seconds_of(call, self._device)[0] for call in self._calls]

    def report(self) -> list[dict[str, Any]]:
        """By shape: bytes that a pass needs beyond inputs and masks; seconds that making those took; of the two streams
        also the kernel, and the pairs that it computes."""
        return self._found

    def _call(self, way: Way, shape: Shape, model: ModelConfig, dtype: torch.dtype) -> Callable[[], None]:
        """A pass, which was made once already."""
        torch.manual_seed(1)
        size = (1, model.n_heads, shape.slots, model.width // model.n_heads)
        qkv = [torch.randn(size, device=self._device, dtype=dtype, requires_grad=True) for _ in range(3)]
        gradient = torch.randn(size, device=self._device, dtype=dtype)
        made: list[Callable[..., torch.Tensor]] = []
        preparing, _ = seconds_of(lambda: made.append(self._forward(way, shape, model, dtype)), self._device)

        def call() -> None:
            made[0](*qkv).backward(gradient)
            for tensor in qkv:
                tensor.grad = None

        held = forget_peak(self._device)
        call()
        measured = {"peak_bytes": peak_bytes(self._device) - held, "prepare_seconds": preparing}
        self._found.append(measured | self._kernel)
        return call

    def _forward(self, way: Way, shape: Shape, model: ModelConfig, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
        if way == "causal":
            return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)
        batch = shape.batch().to(self._device)
        if way == "dense":
            mask = full_mask(batch, model.token_attention)
            return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        scoring = Scoring(model.token_attention, None, dtype, model.width // model.n_heads)
        prepared = prepare_attention(batch.tokens, batch.chars, shape.longest_run, scoring)
        self._kernel = {"kernel": prepared.kernel, "computed_pairs": prepared.computed_pairs()}
        return lambda q, k, v: attend(q, k, v, prepared)


def bench_attention(
    model: ModelConfig,
    swept: list[Shape],
    others: list[Shape],
    rounds: int = 3,
    device: str = "cpu",
    dtype: str = "fp32",
    most_dense: int = 20_000,
) -> dict[str, Any]:
    """Time attention forward and backward on rows of these shapes, each way in its own process, in turns.

    Args:
        model: heads, head width and attention among tokens. swept: rows of the same T. others: rows beside them.
        most_dense: of a shape with more slots N the baseline, whose cost grows with N x N, is left out.

    Returns:
        shapes: for each, the swept ones first, its slots, visible pairs, the shares of N x N that are visible and that
        our kernel computes (what is left is its sparsity), and by way seconds (`spread`), FLOP/s on the
        pairs that are needed, memory; faster: dense attention's seconds over ours; rate_to_causal: our FLOP/s on
        visible pairs over causal attention's on its own; utilisation: over those of a large matrix product.
        growth: the power of C with which our time grows at fixed T. limit: see `Limits`. And what they are from.
    """
    machine = describe_machine(device)
    shapes = [*swept, *others]
    dense = [shape if shape.slots <= most_dense else None for shape in shapes]
    of_way = {way: dense if way == "dense" else shapes for way in WAYS}
    made: dict[str, Made] = {way: (Attention, way, of_way[way], model, device, dtype) for way in WAYS}
    made["limits"] = (Limits, device, dtype_named(dtype))
    runs, reports = in_turns(made, rounds, together=not is_gpu(device))
    limit = best_limits(runs.pop("limits"))
    found = [_figures(i, shape, model, runs, reports, limit["tflops"]) for i, shape in enumerate(shapes)]
    return {
        "name": "attention",
        "shapes": found,
        "swept": len(swept),
        "growth": _growth(found[: len(swept)]),
        "kernel": found[0]["ways"]["two streams"]["kernel"],
        "heads": model.n_heads,
        "head_width": model.width // model.n_heads,
        "dtype": dtype,
        "limit": limit,
        "machine": machine,
        "warning": busy_warning(machine, [f["ways"]["two streams"]["seconds"] for f in found]),
    }


def configured_shapes(config: Config) -> list[Shape]:
    """The configured row, of one document and of several."""
    data, longest = config.data, config.segmentation.max_block_bytes + 1
    return [Shape(data.row_tokens, data.row_chars, longest, documents) for documents in _DOCUMENTS]


def swept_shapes(config: Config, chars: Sequence[int] = SWEPT_CHARS) -> list[Shape]:
    """Rows whose chars grow at fixed T, as far as the blocks of T tokens can hold them."""
    longest = config.segmentation.max_block_bytes + 1
    return [Shape(SWEPT_TOKENS, c, longest) for c in chars if c <= SWEPT_TOKENS * longest]


def _figures(
    index: int, shape: Shape, model: ModelConfig, runs: dict[str, Any], reports: dict[str, Any], peak: float
) -> dict[str, Any]:
    pairs = visible_pairs(shape.batch(), model.token_attention)
    needed = {"two streams": pairs, "dense": pairs, "causal": shape.slots * (shape.slots + 1) // 2}
    ways: dict[str, Any] = {}
    for way, all_rounds in runs.items():
        if all_rounds[0][index] is not None:
            seconds = spread([by_shape[index] for by_shape in all_rounds])
            tflops = _PASSES * 4 * model.width * needed[way] / seconds["median"] / 1e12
            ways[way] = {"seconds": seconds, "tflops": tflops, "utilisation": tflops / peak} | reports[way][index]
    ours, causal = ways["two streams"], ways["causal"]
    dense = ways["dense"]["seconds"]["median"] if "dense" in ways else None
    return asdict(shape) | {
        "slots": shape.slots,
        "visible_pairs": pairs,
        "visible_share": pairs / shape.slots**2,
        "computed_share": ours["computed_pairs"] / shape.slots**2,
        "ways": ways,
        "faster": dense / ours["seconds"]["median"] if dense else None,
        "rate_to_causal": ours["tflops"] / causal["tflops"],
    }


def _growth(found: list[dict[str, Any]]) -> float | None:
    """The power of C that fits the times best: 1 is linear; none of fewer than two shapes."""
    if len(found) < 2:
        return None
    seconds = [f["ways"]["two streams"]["seconds"]["min"] for f in found]
    return float(np.polyfit(np.log([f["chars"] for f in found]), np.log(seconds), 1)[0])


def format_table(result: dict[str, Any]) -> str:
    """What `bench_attention` returned, as a few lines to read."""
    lines = [
        f"attention forward and backward in seconds, {result['heads']} heads of {result['head_width']}, "
        f"{result['dtype']}, kernel: {result['kernel']}",
        f"{'T':>7}{'C':>8}{'documents':>11}{'visible':>9}{'computed':>10}{'two streams':>13}{'dense':>9}{'causal':>9}"
        f"{'faster':>8}{'GFLOP/s':>9}{'of causal':>11}{'of peak':>9}{'MiB':>7}{'dense MiB':>11}",
    ]
    lines += [_line(found) for found in result["shapes"]]
    if result["growth"] is not None:
        lines.append(f"at T = {SWEPT_TOKENS} the time grows with C to the power of {result['growth']:.2f}")
    peak = result["limit"]["tflops"] * 1e3
    lines.append(f"GFLOP/s are on visible pairs; peak: {peak:,.0f} GFLOP/s of a large matrix product here")
    return "\n".join([*lines, machine_line(result["machine"])])


def _line(found: dict[str, Any]) -> str:
    ways, ours = found["ways"], found["ways"]["two streams"]
    seconds = {way: f"{ways[way]['seconds']['median']:.4f}" if way in ways else "-" for way in WAYS}
    faster, memory = "-", "-"
    if "dense" in ways:
        faster, memory = f"{found['faster']:.1f}x", f"{ways['dense']['peak_bytes'] / 2**20:,.0f}"
    return (
        f"{found['tokens']:7,}{found['chars']:8,}{found['documents']:11}{found['visible_share']:9.1%}{found['computed_share']:10.1%}"
        f"{seconds['two streams']:>13}{seconds['dense']:>9}{seconds['causal']:>9}{faster:>8}"
        f"{ours['tflops'] * 1e3:9.1f}{found['rate_to_causal']:11.0%}{ours['utilisation']:9.0%}"
        f"{ours['peak_bytes'] / 2**20:7,.0f}{memory:>11}"
    )
