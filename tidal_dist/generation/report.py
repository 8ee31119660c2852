"""A generation as an object or as text."""

from typing import Any

from data_pipeline.tokenizer import char_name
from tidal_dist.generation.events import Block, Generation


def as_object(prompt: str, result: Generation, with_trace: bool, with_alternatives: bool = False) -> dict[str, Any]:
    """What `--json` prints for one prompt; with alternatives, its log-probability and those of likely chars too."""
    report: dict[str, Any] = {
        "prompt": prompt,
        "text": result.text,
        "blocks": result.blocks,
        "finish": result.finish,
        "off_canonical_joins": result.off_canonical_joins,
        **{name: getattr(result, name) for name in ("passes", "drafted", "accepted", "draft_passes")},
    }
    if with_alternatives:
        trace = [block.as_trace() | {"alternatives": _alternatives(block)} for block in result.details]
        return report | {"logprob": round(result.logprob, 4), "trace": trace}
    return report | {"trace": result.trace} if with_trace else report


def _alternatives(block: Block) -> list[list[tuple[str, float]]]:
    """For each char, its end mark last, the likeliest with their log-probabilities."""
    return [[(char_name(i), round(logprob, 4)) for i, logprob in char.alternatives] for char in block.chars]


def as_text(prompt: str, result: Generation, with_trace: bool) -> str:
    """The prompt with its continuation; with a trace, one line a block before it."""
    lines = trace_lines(result) if with_trace else []
    return "\n".join([*lines, prompt + result.text])


def trace_lines(result: Generation) -> list[str]:
    """How each block was written: its chars, its text, its tokens, and where they stand."""
    return [_trace_line(entry) for entry in result.trace]


def _trace_line(entry: dict[str, Any]) -> str:
    written = " ".join(repr(c)[1:-1].replace(" ", "␣") for c in entry["chars"])
    tokens = " ".join(repr(t)[1:-1].replace(" ", "␣") for t in entry["tokens"])
    first, last = entry["token_positions"][0], entry["token_positions"][-1]
    places = f"{first}" if first == last else f"{first}..{last}"
    positions = f"{entry['char_positions'][0]}..{entry['char_positions'][-1]}"
    return f"  <bob> {written} {entry['end']} at {positions}  ->  {entry['block']!r}  ->  tokens [{tokens}] at {places}"
