"""Which measurement is made on how much: each bench by its name, in full or quick."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_pipeline.tokenizer import FIRST_TOKEN, TokenizerConfig
from tidal_dist.bench import attention, data, generate, layout, train
from tidal_dist.bench.attention import SWEPT_CHARS
from tidal_dist.bench.machine import busy_warning, describe_machine, dtype_named
from tidal_dist.bench.steps import Conditions
from tidal_dist.bench.text import tokenizer_of
from tidal_dist.config import Config

BENCHES = ("layout", "attention", "train", "data", "generate")
_QUICK_SAMPLE_BYTES = 2_000_000  # of text train the tokeniser


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        blocks: of the document of `layout`. written_blocks, dictated_bytes: by `generate`. megabytes: of text
            for `data`. stream_seconds: of its reading. rows: of a step of `train`. row_megabytes: of text for those.
            rounds: of `train` and `attention`.
        swept_chars: C of `attention` at fixed T. most_dense: slots up to which it has its baseline.
    """

    blocks: int = 1024
    written_blocks: int = 500
    dictated_bytes: int = 1500
    megabytes: int = 1000
    stream_seconds: float = 10.0
    rows: int = 2
    row_megabytes: int = 4
    rounds: int = 5
    swept_chars: tuple[int, ...] = SWEPT_CHARS
    most_dense: int = 20_000


QUICK = Sizes(
    blocks=128,
    written_blocks=40,
    dictated_bytes=150,
    megabytes=8,
    stream_seconds=1.0,
    rows=1,
    row_megabytes=1,
    rounds=2,
    swept_chars=SWEPT_CHARS[:3],
    most_dense=5_000,
)


@dataclass(frozen=True)
class Asked:
    """What is measured, and how.

    Attributes:
        conditions: device, precision and so on; `layout` and `data` are measured on the CPU always.
        profile: file for a trace of a step of `train`.
    """

    config: Config
    sizes: Sizes
    conditions: Conditions
    profile: Path | None = None
    progress: Callable[[str], object] = bool


def run_bench(name: str, asked: Asked) -> dict[str, Any]:
    """The result of one bench."""
    config, sizes, conditions = asked.config, asked.sizes, asked.conditions
    if name == "layout":
        return layout.bench_layout(config, sizes.blocks)
    if name == "data":
        return data.bench_data(config, sizes.megabytes, stream_seconds=sizes.stream_seconds, progress=asked.progress)
    if name == "train":
        return train.bench_train(
            config, sizes.rows, sizes.rounds, sizes.row_megabytes, conditions, asked.profile, asked.progress
        )
    if name == "attention":
        swept, others = attention.swept_shapes(config, sizes.swept_chars), attention.configured_shapes(config)
        how = conditions.device, conditions.dtype, sizes.most_dense
        return attention.bench_attention(config.model, swept, others, sizes.rounds, *how)
    warning = busy_warning(describe_machine(), [])
    result = generate.bench_generate(
        config.model,
        FIRST_TOKEN + config.tokenizer.vocab_size,
        sizes.written_blocks,
        device=conditions.device,
        dtype=dtype_named(conditions.dtype),
        compiled=conditions.compiled,
        dictated_bytes=sizes.dictated_bytes,
    )
    return {"warning": warning} | result


def run_all(asked: Asked, quick: bool) -> dict[str, dict[str, Any]]:
    """The results of all benches by their names, over one tokeniser."""
    with tempfile.TemporaryDirectory(prefix="tidal-bench-") as folder:
        config = asked.config
        if config.tokenizer.path is None:
            asked.progress("training a tokeniser")
            sample = {"sample_bytes": min(_QUICK_SAMPLE_BYTES, config.tokenizer.sample_bytes)} if quick else {}
            trained = config.model_copy(update={"tokenizer": config.tokenizer.model_copy(update=sample)})
            path = Path(folder) / "tokenizer.json"
            tokenizer_of(trained).save(path)
            known = TokenizerConfig(**(config.tokenizer.model_dump() | {"path": str(path)}))
            asked = replace(asked, config=config.model_copy(update={"tokenizer": known}))
        results = {}
        for name in BENCHES:
            asked.progress(f"bench {name}")
            results[name] = run_bench(name, asked)
        return results


def format_table(result: dict[str, Any]) -> str:
    """A result as lines to read, the warning last."""
    tables = {
        "layout": layout.format_table,
        "attention": attention.format_table,
        "train": train.format_table,
        "data": data.format_table,
        "generate": generate.format_table,
    }
    warning = result.get("warning")
    return tables[result["name"]](result) + (f"\n{warning}" if warning else "")
