"""How fast is the way of the data, from text to shards and from shards to training, and how even?

Preparing is timed as a whole process on a corpus of the configured text, repeated with some of its words changed from
copy to copy, against the `tokenizers` library's own `encode_batch`, which does less: no blocks, no shards, no rows.
Reading is timed through the training's own stream.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch

from data_pipeline.files import replace_file
from data_pipeline.ordering import Order, rows_of_rank
from data_pipeline.rows import RowReader, row_format_of, write_row_plan
from data_pipeline.run_order import SPLIT
from data_pipeline.shards import DataConfig, Manifest
from data_pipeline.stream import Loading, Share, Stream
from data_pipeline.summary import summarize
from tidal_dist.bench.machine import busy_warning, copy_gb_per_second, describe_machine, in_own_process, machine_line
from tidal_dist.bench.text import copies, texts_of, tokenizer_of, write_corpus
from tidal_dist.config import Config, parse_config

_BASELINE_BYTES = 24_000_000
_ROW_TOKENS = 2048
_BATCH_ROWS = 16
_SHARDS, _RANKS, _FAR_ROW = 100_000, 4096, 10**9


def bench_data(
    config: Config,
    megabytes: int = 1000,
    workers: int = 2,
    stream_seconds: float = 10.0,
    progress: Callable[[str], object] = bool,
) -> dict[str, Any]:
    """Time preparing, reading and planning on `megabytes` MB of text; everything is written to a temporary folder.

    Args:
        config: its corpus, segmentation and tokeniser settings are used.
        workers: processes of the second preparation; the first has one. stream_seconds: of reading.

    Returns:
        prepare: MB/s of the processes' wall and CPU time with one and with `workers` processes, peak memory of the
        largest process in bytes, bytes on disk for each byte of text. baseline: `encode_batch` on one thread.
        ratio: one process's MB of text per CPU second over the baseline's. speedup: of `workers` processes.
        stream: MB/s of one loader process, and the seconds to the first step from row 0 and from row 10^9.
        order: seconds in which 4,096 simulated ranks plan their first step from 100,000 shards.
        rows: how full the recommended rows are. limit: what a copy in memory moves; copy_share: of it, the text that
        one process reads and what it writes; stream's: what the loader hands over. machine. warning: `busy_warning`.

    Raises:
        CorpusError: the corpus has no text.
    """
    with tempfile.TemporaryDirectory(prefix="tidal-bench-", dir=os.environ.get("TMPDIR")) as name:
        folder = Path(name)
        machine = describe_machine()
        progress(f"writing {megabytes} MB of text to {folder}")
        texts = texts_of(config.corpus)
        size = write_corpus(texts, folder / "corpus", megabytes * 10**6)
        tokenizer_of(config).save(folder / "tokenizer.json")
        progress("encode_batch, one thread")
        sample = list(_some(texts, min(_BASELINE_BYTES, size // 4)))
        baseline = _encode_batch(folder / "tokenizer.json", sample, config.tokenizer.single_digits)
        prepared = {}
        for count in sorted({1, workers}):
            progress(f"preparing with {count} processes")
            prepared[count] = _prepare(_bench_config(config, folder, count), folder, size)
        data = _bench_config(config, folder, 1).data
        manifest = Manifest.of(data)
        summary = summarize(manifest, _ROW_TOKENS)
        data = data.model_copy(update={"row_chars": summary["recommended_row_chars"]})
        write_row_plan(manifest, row_format_of(data))
        progress("reading")
        train = summary["splits"][SPLIT]
        stream = in_own_process(_stream, data, stream_seconds)
        copied = in_own_process(copy_gb_per_second, "cpu")
        moved = (1 + train["bytes_per_byte_of_text"]) * prepared[1]["mb_per_second"] / 1e3
        return {
            "name": "data",
            "text_bytes": size,
            "prepare": {str(count): figures for count, figures in prepared.items()},
            "baseline": baseline,
            "ratio": prepared[1]["cpu_mb_per_second"] / baseline["cpu_mb_per_second"],
            "speedup": prepared[1]["seconds"] / prepared[workers]["seconds"],
            "workers": workers,
            "bytes_on_disk_per_byte_of_text": train["bytes_per_byte_of_text"],
            "stream": stream | {"copy_share": stream["handed_over_gb_per_second"] / copied},
            "order": _plan_first_step(),
            "rows": next(row for row in summary["rows"] if row["row_chars"] == data.row_chars),
            "limit": {"copy_gb_per_second": copied},
            "copy_share": moved / copied,
            "machine": machine,
            "warning": busy_warning(machine, []),
        }


def _bench_config(config: Config, folder: Path, workers: int) -> Config:
    """Preparing the copies with the tokeniser that is there."""
    content = config.model_dump()
    content["corpus"] = copies(folder / "corpus").model_dump()
    content["tokenizer"] |= {"path": str(folder / "tokenizer.json")}
    content["data"] |= {"shards": str(folder / "shards"), "row_tokens": _ROW_TOKENS, "row_chars": 4 * _ROW_TOKENS}
    content["data"] |= {"mix": [], "lanes": _BATCH_ROWS}
    content["prepare"] = {"workers": workers}
    return parse_config(content, "the benchmark")


def _prepare(config: Config, folder: Path, size: int) -> dict[str, float]:
    """Run `tidal prepare` as a process and account for it; what worker processes use is not in its CPU time."""
    path, log = folder / "config.yaml", folder / "log"
    replace_file(path, config.to_yaml().encode())
    command = [sys.executable, "-m", "tidal_dist.cli", "prepare", str(path), "--overwrite", "--json"]
    started = time.monotonic()
    with open(log, "wb") as file:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=file)
        _, process.returncode, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - started
    if process.returncode:
        raise RuntimeError(log.read_text()[-2000:])
    cpu = usage.ru_utime + usage.ru_stime
    return {
        "seconds": seconds,
        "mb_per_second": size / seconds / 1e6,
        "cpu_seconds": cpu,
        "cpu_mb_per_second": size / cpu / 1e6,
        "peak_bytes": usage.ru_maxrss * 1024,
    }


_ENCODE_BATCH = """
import json, sys, time
from tokenizers import Tokenizer, pre_tokenizers
tokenizer = Tokenizer.from_file(sys.argv[1])
texts = json.load(sys.stdin)
digits = [pre_tokenizers.Digits(individual_digits=True)] if sys.argv[2] == "True" else []
tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
tokenizer.encode_batch(texts[:2])
size = sum(len(text.encode()) for text in texts)
started, cpu = time.monotonic(), time.process_time()
for start in range(0, len(texts), 64):
    tokenizer.encode_batch(texts[start : start + 64])
seconds, cpu = time.monotonic() - started, time.process_time() - cpu
print(json.dumps({"seconds": seconds, "mb_per_second": size / seconds / 1e6, "cpu_mb_per_second": size / cpu / 1e6}))
"""


def _encode_batch(tokenizer: Path, texts: list[str], single_digits: bool) -> dict[str, float]:
    """The library's own pre-tokeniser (GPT-2's regex) and merges, on one thread, in batches of 64 documents."""
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", _ENCODE_BATCH, str(tokenizer), str(single_digits)],
        input=json.dumps(texts),
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    return json.loads(result.stdout)


def _some(texts: list[str], size: int) -> Iterator[str]:
    for text in texts:
        yield text
        size -= len(text)
        if size < 0:
            return


def _stream(data: DataConfig, least_seconds: float) -> dict[str, float]:
    """What one loader process delivers, and how long the first step takes near the start of a run and far from it."""
    manifest = Manifest.of(data)
    reader = RowReader(manifest, SPLIT, manifest.tokenizer(), row_format_of(data), data.seed)
    order, share = Order(reader.shard_rows, data.lanes, data.seed), Share(_BATCH_ROWS, 2, 0, 1)
    torch.set_num_threads(1)  # this process only receives: its threads would take the loader's core
    stream = Stream(reader, order, share, manifest.hash, Loading(workers=1))
    next(stream)  # starts the process
    started, text_bytes, steps, handed_over = time.monotonic(), 0, 0, 0
    while time.monotonic() - started < least_seconds:
        batches = next(stream).batches
        text_bytes += sum(batch.byte_count() for batch in batches)
        handed_over += sum(t.nbytes for batch in batches for t in batch.tensors())
        steps += 1
    seconds = time.monotonic() - started
    far = _FAR_ROW // _BATCH_ROWS * _BATCH_ROWS
    return {
        "mb_per_second": text_bytes / seconds / 1e6,
        "handed_over_gb_per_second": handed_over / seconds / 1e9,
        "steps": steps,
        "row_chars": data.row_chars,
        "first_step_seconds": _first_step(manifest, data, share, 0),
        "first_step_seconds_at_row_10^9": _first_step(manifest, data, share, far),
    }


def _first_step(manifest: Manifest, data: DataConfig, share: Share, rows: int) -> float:
    """Seconds from nothing but the manifest to the first step after `rows` rows; the median of five."""
    found = []
    for _ in range(5):
        started = time.monotonic()
        reader = RowReader(manifest, SPLIT, manifest.tokenizer(), row_format_of(data), data.seed)
        stream = Stream(reader, Order(reader.shard_rows, data.lanes, data.seed), share, manifest.hash)
        stream.load_state_dict(stream.state_dict() | {"rows": rows})
        next(stream)
        found.append(time.monotonic() - started)
    return median(found)


def _plan_first_step() -> dict[str, float]:
    """Every simulated rank locates its rows of the first step by itself, as in a run of that many machines."""
    shard_rows = tuple(3000 + shard * 7919 % 1000 for shard in range(_SHARDS))
    started = time.monotonic()
    order = Order(shard_rows, _RANKS, seed=1)
    rows = [order.locate(g) for rank in range(_RANKS) for g in rows_of_rank(0, _RANKS, rank, _RANKS)]
    first = time.monotonic() - started
    far = Order(shard_rows, _RANKS, seed=1)
    started = time.monotonic()
    far.locate(_FAR_ROW)
    return {"ranks": len(rows), "shards": _SHARDS, "seconds": first, "seconds_at_row_10^9": time.monotonic() - started}


def format_table(result: dict[str, Any]) -> str:
    """What `bench_data` returned, as a few lines to read."""
    baseline, stream, order, rows = (result[key] for key in ("baseline", "stream", "order", "rows"))
    lines = [
        f"{result['text_bytes'] / 1e6:,.0f} MB of text",
        f"{'':28}{'MB/s':>8}{'MB/CPU s':>10}{'seconds':>9}{'peak MiB':>10}",
        f"{'encode_batch, one thread':28}{baseline['mb_per_second']:8.1f}{baseline['cpu_mb_per_second']:10.1f}"
        f"{baseline['seconds']:9.1f}",
    ]
    for count, found in result["prepare"].items():
        own = f"{found['cpu_mb_per_second']:10.1f}" if count == "1" else f"{'':10}"
        peak = f"{found['peak_bytes'] / 2**20:10.0f}" if count == "1" else ""
        lines.append(
            f"{f'prepare, {count} processes':28}{found['mb_per_second']:8.1f}{own}{found['seconds']:9.1f}{peak}"
        )
    return "\n".join(
        [
            *lines,
            f"prepare is {result['ratio']:.1f} times encode_batch; {result['workers']} processes are "
            f"{result['speedup']:.2f} times one; {result['bytes_on_disk_per_byte_of_text']:.2f} bytes on disk a byte",
            f"one loader process delivers {stream['mb_per_second']:.1f} MB/s of text",
            f"rows of {rows['row_tokens']:,} x {rows['row_chars']:,}: chars {rows['char_fill']:.1%} filled, "
            f"tokens {rows['token_fill']:.1%}",
            f"first step after {stream['first_step_seconds']:.3f} s, at row 10^9 after "
            f"{stream['first_step_seconds_at_row_10^9']:.3f} s",
            f"{order['ranks']:,} ranks plan their first step from {order['shards']:,} shards in "
            f"{order['seconds']:.2f} s; row 10^9 alone in {order['seconds_at_row_10^9']:.2f} s",
            f"a copy in memory moves {result['limit']['copy_gb_per_second']:,.0f} GB/s: preparing reads and writes "
            f"{result['copy_share']:.2%} of that, the loader hands over {stream['copy_share']:.2%}",
            machine_line(result["machine"]),
        ]
    )
