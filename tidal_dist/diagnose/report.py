"""A verdict as an object and as text."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from tidal_dist.diagnose.hearts import Heart
from tidal_dist.diagnose.verdict import Verdict, span

_SHOWN_RANKS = 40
_HEADER = ("rank", "host", "process", "state", "step", "phase", "for", "heard", "s/step", "own s", "x rest")


def as_object(run: Path, verdict: Verdict) -> dict[str, Any]:
    """The verdict with everything that it was reached by."""
    return {
        "run": str(run),
        "status": verdict.status,
        "well": verdict.is_well,
        "culprits": verdict.culprits,
        "missing": verdict.missing,
        "slow": verdict.slow,
        "lines": verdict.lines,
        "ranks": [_rank_as_object(heart, verdict) for heart in verdict.hearts],
    }


def _rank_as_object(heart: Heart, verdict: Verdict) -> dict[str, Any]:
    speed = verdict.speeds.get(heart.beat.rank)
    figures = {
        "state": heart.state,
        "heard_seconds_ago": round(heart.age, 1),
        "idle_seconds": round(heart.idle, 1),
        "phase_seconds": round(heart.in_phase, 1),
        "seconds_per_step": round(heart.beat.seconds_per_step, 6),
        "working_seconds_per_step": round(heart.beat.working, 6),
        "times_the_rest": round(speed.ratio, 3) if speed else None,
    }
    return asdict(heart.beat) | figures


def as_text(run: Path, verdict: Verdict) -> str:
    """What is wrong first, then a table of the ranks, the conspicuous ones first where there are many."""
    lines = [f"{run}: {verdict.status}" + ("" if verdict.is_well else ", needs attention")]
    lines += [f"  {line}" for line in verdict.lines]
    hearts = verdict.hearts
    if len(hearts) > _SHOWN_RANKS:
        odd = {*verdict.culprits, *verdict.slow}
        hearts = sorted(hearts, key=lambda h: (h.beat.rank not in odd, h.beat.rank))[:_SHOWN_RANKS]
    rows = [_HEADER, *(_row(heart, verdict) for heart in hearts)] if hearts else []
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADER))] if rows else []
    lines += ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    if len(verdict.hearts) > len(hearts):
        lines.append(f"... and {len(verdict.hearts) - len(hearts)} ranks more (--json shows all)")
    for heart in hearts:
        if heart.beat.rank in verdict.culprits and heart.beat.stack:
            lines += [f"rank {heart.beat.rank}, innermost call last:", *(f"  {call}" for call in heart.beat.stack)]
    return "\n".join(lines)


def _row(heart: Heart, verdict: Verdict) -> tuple[str, ...]:
    beat, speed = heart.beat, verdict.speeds.get(heart.beat.rank)
    return (
        str(beat.rank),
        beat.host,
        str(beat.pid),
        beat.ended if beat.ended in ("finished", "stopped") else "failed" if beat.ended else heart.state,
        str(beat.step),
        beat.phase,
        span(heart.in_phase),
        f"{span(heart.age)} ago",
        f"{beat.seconds_per_step:.3f}" if beat.steps_measured else "-",
        f"{beat.working:.3f}" if beat.steps_measured else "-",
        f"{speed.ratio:.2f}" if speed else "-",
    )
