"""A generation as an object or as text."""

from typing import Any

from tidal_dist.generation.events import Generation


def as_object(prompt: str, result: Generation, with_trace: bool) -> dict[str, Any]:
    """What `--json` prints for one prompt."""
    report: dict[str, Any] = {
        "prompt": prompt,
        "text": result.text,
        "blocks": result.blocks,
        "finish": result.finish,
        "off_canonical_joins": result.off_canonical_joins,
    }
    return report | {"trace": result.trace} if with_trace else report


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
