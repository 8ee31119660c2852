"""A minute of streaming clients against `tidal serve`: `python -m benchmarks.serve_load [EXPORT]`.

Each client asks, reads its stream to the end, and asks again. Every text is compared with what the same request got
alone, before the load. The server is a process of its own; its clients, in this process, share the machine with it.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import openai
import torch

from tests.builders import document_of, packed, small_model, small_tokenizer
from tests.exporting import write_export_of
from tests.serving import server_process

PROMPTS = ("", "12 + 34 =", "the tide runs out and ", "潮水退去，", "un café ", "x" * 300, "0 1 2 3 4 5 6 7", "déjà\n")
KINDS = [{"temperature": 0.0}, *({"temperature": 1.0, "seed": seed} for seed in (1, 2, 3))]


@dataclass
class Load:
    """What the clients have seen. Seconds, of each text."""

    texts: int = 0
    bytes: int = 0
    other: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    queued: list[float] = field(default_factory=list)
    first_byte: list[float] = field(default_factory=list)
    first_text: list[float] = field(default_factory=list)


def requests(model: str, max_tokens: int) -> list[dict[str, Any]]:
    """Different ones: prompts of all kinds, greedy and sampled."""
    head = {"model": model, "max_tokens": max_tokens, "stream": True}
    return [head | {"prompt": prompt} | kind for prompt, kind in product(PROMPTS, KINDS)]


async def stream(client: openai.AsyncOpenAI, request: dict[str, Any], load: Load) -> str:
    """One request's text."""
    began, parts, first = time.monotonic(), [], None
    async for chunk in await client.completions.create(**request):
        choice = chunk.choices[0]
        parts.append(choice.text)
        if first is None and choice.text:
            first = time.monotonic() - began
        if choice.finish_reason:
            timing = choice.model_extra["timing"]
            load.queued.append(timing["queued_seconds"])
            load.first_byte.append(timing["first_byte_seconds"])
    load.first_text.append(first or time.monotonic() - began)
    return "".join(parts)


async def ask_until(
    end: float,
    number: int,
    client: openai.AsyncOpenAI,
    asked: Sequence[dict[str, Any]],
    expected: list[str],
    load: Load,
) -> None:
    """One client."""
    turn = number
    while time.monotonic() < end:
        which = turn % len(asked)
        turn += 7  # so that neighbours ask different things
        try:
            text = await stream(client, asked[which], load)
        except (openai.OpenAIError, OSError) as error:
            load.errors[f"{error!r} from {error.__cause__!r}"] += 1
            continue
        load.texts += 1
        load.bytes += len(text.encode())
        load.other += text != expected[which]


def memory(pid: int) -> float:
    """Resident, in MB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS:")).split()[1]) / 1024


async def watch(pid: int, end: float, seen: list[float]) -> None:
    """The server's memory, every second."""
    while time.monotonic() < end:
        seen.append(memory(pid))
        await asyncio.sleep(1.0)


async def measure(url: str, pid: int, model: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The load, and what came of it."""
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
    asked = requests(model, arguments.max_tokens)
    alone, load, seen = Load(), Load(), list[float]()
    expected = [await stream(client, request, alone) for request in asked]
    end = time.monotonic() + arguments.seconds
    clients = [ask_until(end, n, client, asked, expected, load) for n in range(arguments.clients)]
    began = time.monotonic()
    await asyncio.gather(watch(pid, end, seen), *clients)
    seconds = time.monotonic() - began
    after = [b - q for q, b in zip(load.queued, load.first_byte, strict=True)]
    return {
        "clients": arguments.clients,
        "seconds": round(seconds, 1),
        "errors": load.errors.total(),
        "kinds_of_errors": dict(load.errors),
        "texts": load.texts,
        "other_than_alone": load.other,
        "bytes_per_second": round(load.bytes / seconds),
        "queued_seconds": spread(load.queued),
        "from_queue_to_first_byte_seconds": spread(after),
        "first_text_at_client_seconds": spread(load.first_text),
        "alone_first_text_at_client_seconds": spread(alone.first_text),
        "resident_mb": {name: round(seen[int(at * (len(seen) - 1))], 1) for name, at in MOMENTS.items()},
    }


MOMENTS = {"start": 0.0, "quarter": 0.25, "middle": 0.5, "end": 1.0}


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median, 95th percentile and the longest."""
    ordered = sorted(seconds)
    at_95 = ordered[min(int(0.95 * len(ordered)), len(ordered) - 1)]
    return {"median": round(statistics.median(ordered), 3), "p95": round(at_95, 3), "longest": round(ordered[-1], 3)}


def write_random_export(out: Path) -> None:
    """An export of random weights, of the size of the demo's."""
    tokenizer = small_tokenizer(16)
    model = small_model(tokenizer, dtype=torch.float32, n_layers=4, width=128, n_heads=4).eval()
    probe = packed([[document_of("the tide 12 + 34", max_block_bytes=16)]], tokenizer, (48, 48))
    write_export_of(out, model, tokenizer, probe, "run_dir: none\n")


def main() -> None:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("export", type=Path, nargs="?", help="an exported folder (default: random weights)")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--batch-size", type=int, default=16)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        export = arguments.export or Path(name) / "export"
        if arguments.export is None:
            write_random_export(export)
        options = ["--batch-size", str(arguments.batch_size), "--model-name", "model"]
        with server_process(export, *options) as (url, process):
            found = asyncio.run(measure(url, process.pid, "model", arguments))
            process.terminate()
            process.wait()
            assert process.stderr is not None
            found["server_said"] = process.stderr.read().splitlines()[1:]  # the first names its address
            print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
