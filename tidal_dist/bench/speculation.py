"""How many passes does a draft save on real source code, and on text that repeats?

The text is dictated: what a model has learnt decides what it writes, not how well a look-up in the text guesses it.
"""

import json
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.pieces import reverse_block
from data_pipeline.segmentation import segment
from data_pipeline.tokenizer import EOB, OUTPUT_VOCABULARY, MixedTokenizer
from tidal_dist.errors import UserError
from tidal_dist.generation.draft import Draft, LookUp
from tidal_dist.generation.engine import Engine
from tidal_dist.generation.events import Generation
from tidal_dist.generation.request import Limits, Request
from tidal_dist.model.transformer import TidalTransformer

SOURCES = ("argparse.py", "tarfile.py", "typing.py")  # of Python's standard library
_PROMPT_BYTES = 6000
_SAME_LOGPROB = 1e-3  # nats of a whole text in float32, relative: a pass of other shape sums in another order


@dataclass(frozen=True)
class Dictated:
    """Holds a text to given blocks."""

    blocks: Sequence[str]

    def start(self) -> int:
        """The number of the block at hand."""
        return 0

    def allowed(self, state: int, written: bytes, room: int) -> np.ndarray:
        """The block's next char, or its end mark."""
        del room
        block = reverse_block(self.blocks[state].encode())
        mask = np.zeros(OUTPUT_VOCABULARY, dtype=bool)
        mask[block[len(written)] if len(written) < len(block) else EOB] = True
        return mask

    def after(self, state: int, block: bytes) -> int:
        """The next block."""
        del block
        return state + 1


def bench_speculation(
    model: TidalTransformer, tokenizer: MixedTokenizer, device: str, written_bytes: int = 1500
) -> dict[str, Any]:
    """For each text passes and seconds a byte without a draft and with `LookUp`, and the share of drafts accepted.

    Raises:
        UserError: a draft changed a text, which is a bug.
    """
    texts = {"json lines": _records()}
    library = Path(sysconfig.get_paths()["stdlib"])
    for name in SOURCES:
        if (library / name).exists():
            texts[name] = (library / name).read_text(encoding="utf-8")
    return {name: _measured(name, text, model, tokenizer, device, written_bytes) for name, text in texts.items()}


def _records() -> str:
    """Text that repeats, but not word by word."""
    rows = [{"id": i, "name": f"user {i * 37 % 101}", "active": i % 3 == 0} for i in range(300)]
    return "".join(json.dumps(row) + "\n" for row in rows)


def _measured(
    name: str, text: str, model: TidalTransformer, tokenizer: MixedTokenizer, device: str, written_bytes: int
) -> dict[str, Any]:
    blocks = segment(text, tokenizer.segmentation)
    ends = np.cumsum([len(block.encode()) for block in blocks])
    first, last = np.searchsorted(ends, [_PROMPT_BYTES, _PROMPT_BYTES + written_bytes])
    written = blocks[first:last]
    limits = Limits(max_bytes=sum(len(block.encode()) for block in written), max_blocks=len(written))
    request = Request(blocks[:first], limits=limits, constraint=Dictated(written))
    plain, seconds = _written(request, model, tokenizer, device, None)
    drafted, drafted_seconds = _written(request, model, tokenizer, device, LookUp())
    if drafted != plain or abs(drafted.logprob - plain.logprob) > _SAME_LOGPROB * abs(plain.logprob):
        raise UserError(f"{name}: a draft changed what was written; please report it")
    return {
        "bytes": limits.max_bytes,
        "passes_per_byte": plain.passes / limits.max_bytes,
        "passes_per_byte_with_draft": drafted.passes / limits.max_bytes,
        "share_of_passes": drafted.passes / plain.passes,
        "share_of_seconds": drafted_seconds / seconds,
        "accepted": drafted.accepted,
        "drafted": drafted.drafted,
    }


def _written(
    request: Request, model: TidalTransformer, tokenizer: MixedTokenizer, device: str, draft: Draft | None
) -> tuple[Generation, float]:
    """A generation, and its seconds beyond the prompt's; on a GPU after one that recorded all graphs."""
    engine = Engine(model, tokenizer, device, 1, draft)
    for _ in range(2 if device.startswith("cuda") else 1):
        job = engine.submit(request)
        while not job.writing.has_read_prompt:
            engine.step()
        start = time.perf_counter()
        while engine.has_work:
            engine.step()
    return job.generation, time.perf_counter() - start


def format_speculation(result: dict[str, Any]) -> list[str]:
    """A line for each text."""
    return [
        f"draft, {name}: {r['passes_per_byte_with_draft']:.2f} passes a byte, without it {r['passes_per_byte']:.2f}: "
        f"{r['share_of_passes']:.0%} of the passes, {r['share_of_seconds']:.0%} of the time; "
        f"{r['accepted']:,} of {r['drafted']:,} drafted chars accepted"
        for name, r in result.items()
    ]
