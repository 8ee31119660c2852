"""How fast is a training step of the two-stream model, against plain decoders, and against the device's peak?

A step is forward, backward and fused AdamW, of the models alone: no DeepSpeed, no other ranks. Baselines, in the same
run and in turns with ours: a plain decoder with the same layers and the same number of positions, and plain decoders
of equal parameters over the bytes and over the BPE tokens of the same text. Weights are random: how long a step takes
does not depend on what the model has learnt.
"""

import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

from data_pipeline.tokenizer import OUTPUT_VOCABULARY
from tidal_dist.bench.machine import (
    Limits,
    Made,
    OwnProcess,
    best_limits,
    busy_warning,
    describe_machine,
    dtype_named,
    in_turns,
    is_gpu,
    machine_line,
    spread,
)
from tidal_dist.bench.steps import Conditions, FedTraining, Plain, Training, TwoStreams
from tidal_dist.bench.text import first_rows, write_shards
from tidal_dist.config import Config
from tidal_dist.errors import ConfigError
from tidal_dist.model.plain import of_equal_size
from tidal_dist.planning.parameters import parameters

SAME_POSITIONS, BYTES, TOKENS = (
    "plain, as many positions",
    "plain bytes, as many parameters",
    "plain BPE, as many parameters",
)
_MOST_DATA_WAIT = 0.01  # of a step


def bench_train(
    config: Config,
    rows: int = 2,
    rounds: int = 5,
    megabytes: int = 4,
    conditions: Conditions | None = None,
    profile: Path | None = None,
    progress: Callable[[str], object] = bool,
) -> dict[str, Any]:
    """Time steps on `rows` rows of the configured slots, `rounds` times.

    Args:
        config: its corpus, segmentation, tokeniser, rows and model are used.
        megabytes: text that is prepared for the rows. conditions: device, precision and so on.
        profile: file for a Chrome trace of a two-stream step.

    Returns:
        ways: for each model its parameters, positions, bytes, labels and model FLOPs of a step, seconds (`spread`),
        positions and bytes a second, utilisation (of the largest matrix product's rate), memory. to_plain: seconds of
        two streams over those of a plain decoder with the same layers and positions; the median of the rounds' ratios.
        depths: FLOPs and seconds for a byte of text by char layers, and seconds beside both plain decoders'.
        data_wait_share: of a step fed by one loader process. limit: see `Limits`. profile: if asked for. And what they
        are from.

    Raises:
        ConfigError: the embeddings of a plain decoder alone have more parameters than the model.
        CorpusError: the text does not fill the rows.
    """
    conditions = conditions or Conditions()
    machine = describe_machine(conditions.device)
    with tempfile.TemporaryDirectory(prefix="tidal-bench-") as name:
        progress(f"writing shards of {megabytes} MB of text")
        manifest, data, tokenizer = write_shards(config, Path(name), megabytes * 10**6, lanes=rows)
        pieces = first_rows(manifest, data, tokenizer, rows)
        shape = (data.row_tokens, data.row_chars)
        lengths, longest = tokenizer.byte_lengths, config.segmentation.max_block_bytes
        whole = replace(TwoStreams(config.model, pieces, shape, lengths, longest), config=_deep(config))
        ways: dict[str, TwoStreams | Plain] = {
            _name_of(m): replace(whole, config=_deep(config, m)) for m in _depths(config)
        }
        ways |= _plain_ways(whole)
        made: dict[str, Made] = {name: (Training, way, conditions) for name, way in ways.items()}
        made["limits"] = (Limits, conditions.device, dtype_named(conditions.dtype))
        made["fed"] = (FedTraining, whole, conditions, data)
        progress(f"{rounds} rounds of {len(ways)} models")
        runs, reports = in_turns(made, rounds, together=not is_gpu(conditions.device))
        profiled = None
        if profile:
            with OwnProcess(Training, whole, conditions) as process:
                profiled = process("profile", profile)
    limit = best_limits(runs.pop("limits"))
    waits = runs.pop("fed")
    figures = {name: _figures(way, runs[name], reports[name], limit["tflops"]) for name, way in ways.items()}
    full = _name_of(config.model.n_layers)
    wait = median(waited / seconds for waited, seconds in waits)
    return {
        "name": "train",
        "ways": figures,
        "to_plain": _ratio(runs[full], runs[SAME_POSITIONS]),
        "depths": [_depth(m, figures) for m in _depths(config)],
        "data_wait_share": wait,
        "rows": rows,
        "row_tokens": shape[0],
        "row_chars": shape[1],
        "limit": limit,
        "profile": profiled,
        "conditions": asdict(conditions),
        "machine": machine,
        "warning": busy_warning(machine, [way["seconds"] for way in figures.values()]),
        "config": config.model.model_dump(),
    }


def _depths(config: Config) -> list[int]:
    """Char layers that are compared: all, a half, a quarter, an eighth, and those of the configuration."""
    n = config.model.n_layers
    return sorted({max(1, n // part) for part in (1, 2, 4, 8)} | {config.model.char_depth}, reverse=True)


def _deep(config: Config, char_layers: int | None = None) -> Any:
    """The model with so many char layers, with a handoff where they are not all, and without a draft head."""
    return config.model.model_copy(update={"char_layers": char_layers, "handoff": None, "draft_layers": None})


def _name_of(char_layers: int) -> str:
    return f"two streams, {char_layers} char layers"


def _plain_ways(whole: TwoStreams) -> dict[str, Plain]:
    vocabulary = len(whole.byte_lengths)
    size = parameters(whole.config, vocabulary, whole.max_block_bytes).total
    same = Plain(whole.config, whole.rows, "bytes", vocabulary, whole.byte_lengths, sum(whole.shape))
    found = {SAME_POSITIONS: same}
    for name, unit, known in ((BYTES, "bytes", OUTPUT_VOCABULARY), (TOKENS, "tokens", vocabulary)):
        try:
            config = of_equal_size(whole.config, size, known, known)
        except ValueError as error:
            raise ConfigError(f"model: the {name} cannot be built: {error}; use a smaller vocabulary") from None
        found[name] = Plain(config, whole.rows, unit, known, whole.byte_lengths)  # type: ignore[arg-type]
    return found


def _figures(way: Any, runs: list[tuple[float, float]], report: dict[str, int], peak: float) -> dict[str, Any]:
    seconds = spread([wall for wall, _ in runs])
    counts = way.figures()
    tflops = counts["flops"] / seconds["median"] / 1e12
    return (
        counts
        | report
        | {
            "seconds": seconds,
            "cpu_seconds": median(cpu for _, cpu in runs),
            "positions_per_second": counts["positions"] / seconds["median"],
            "bytes_per_second": counts["bytes"] / seconds["median"],
            "tflops": tflops,
            "utilisation": tflops / peak,
            "config": way.config.model_dump(),
        }
    )


def _ratio(ours: list[tuple[float, float]], baseline: list[tuple[float, float]]) -> dict[str, Any]:
    return spread([a / b for (a, _), (b, _) in zip(ours, baseline, strict=True)])


def _depth(char_layers: int, ways: dict[str, dict[str, Any]]) -> dict[str, Any]:
    def per_byte(way: dict[str, Any]) -> float:
        return way["seconds"]["median"] / way["bytes"]

    ours = ways[_name_of(char_layers)]
    return {
        "char_layers": char_layers,
        "flops_per_byte": ours["flops"] / ours["bytes"],
        "seconds_per_byte": per_byte(ours),
        "to_plain_bytes": per_byte(ours) / per_byte(ways[BYTES]),
        "to_plain_bpe": per_byte(ours) / per_byte(ways[TOKENS]),
        "flops_to_plain_bpe": ours["flops"] / ours["bytes"] / (ways[TOKENS]["flops"] / ways[TOKENS]["bytes"]),
    }


def format_table(result: dict[str, Any]) -> str:
    """What `bench_train` returned, as a few lines to read."""
    conditions, limit = result["conditions"], result["limit"]
    lines = [
        f"{result['rows']} rows of {result['row_tokens']:,} x {result['row_chars']:,} slots, {conditions['dtype']}, "
        f"{'compiled, ' if conditions['compiled'] else ''}forward, backward and AdamW",
        f"{'':34}{'parameters':>14}{'positions':>10}{'seconds':>9}{'least':>8}{'most':>8}{'positions/s':>12}"
        f"{'bytes/s':>9}{'MFU':>5}{'peak MiB':>10}",
    ]
    for name, way in result["ways"].items():
        took = way["seconds"]
        lines.append(
            f"{name:34}{way['parameters']:14,}{way['positions']:10,}{took['median']:9.3f}{took['min']:8.3f}"
            f"{took['max']:8.3f}{way['positions_per_second']:12,.0f}{way['bytes_per_second']:9,.0f}"
            f"{way['utilisation']:5.0%}{way['peak_bytes'] / 2**20:10,.0f}"
        )
    ratio = result["to_plain"]
    lines.append(
        f"two streams take {ratio['median']:.2f} times a plain decoder with as many positions "
        f"({ratio['min']:.2f} to {ratio['max']:.2f} over {ratio['repeats']} rounds)"
    )
    lines.append(f"{'char layers':>12}{'MFLOP/byte':>12}{'us/byte':>9}{'to plain bytes':>16}{'to plain BPE':>14}")
    for depth in result["depths"]:
        lines.append(
            f"{depth['char_layers']:12}{depth['flops_per_byte'] / 1e6:12.2f}{depth['seconds_per_byte'] * 1e6:9.1f}"
            f"{depth['to_plain_bytes']:16.2f}{depth['to_plain_bpe']:14.2f}"
        )
    wait = result["data_wait_share"]
    lines.append(f"waiting for data: {wait:.1%} of a step{'' if wait < _MOST_DATA_WAIT else ', which is too much'}")
    lines += [f"{entry['share']:6.1%}  {entry['operation']}" for entry in result["profile"] or []]
    lines.append(
        f"MFU is of {limit['tflops'] * 1e3:,.0f} GFLOP/s of a large matrix product here; a copy moves "
        f"{limit['copy_gb_per_second']:,.0f} GB/s"
    )
    return "\n".join([*lines, machine_line(result["machine"])])
