"""The few figures that a reader wants first, as text."""

import math
from datetime import UTC, datetime

from tidal_dist.run_report.facts import TIMES, Facts


def state(facts: Facts) -> str:
    """Whether the run has ended, and why; else when anything was last heard of it."""
    steps = f"{facts.step:,} of {facts.config.training.steps:,} steps"
    if facts.end:
        return f"Finished after {steps}" + (f": {facts.end}." if facts.step < facts.config.training.steps else ".")
    if not facts.scalars:
        return f"Begun: {steps}, no figures yet."
    heard = datetime.fromtimestamp(facts.scalars[-1].time, UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f"Not finished: {steps}; its newest figures are of {heard}. It is running, or has been stopped."


def headline(facts: Facts) -> list[tuple[str, str, str]]:
    """What, how much, and a remark."""
    tiles = [
        ("Training loss", _number(facts.last("train/loss")), "nats per label, newest"),
        _best(facts, "Validation loss", "validation/loss"),
        _best(facts, "Bits per byte", "validation/bits_per_byte"),
        _match(facts),
        ("Speed", _with_unit(facts.last("speed/bytes_per_second"), "B/s"), _step_seconds(facts)),
        ("Utilisation", _percent(facts.last("speed/utilisation")), _achieved(facts)),
        ("Training time", f"{sum(facts.seconds().values()) / 3600:,.2f} h", "of the steps that count, pauses included"),
        _data(facts),
        (
            "Started again",
            "once" if len(facts.restarts) == 1 else f"{len(facts.restarts):,} times",
            _from_steps(facts.restarts),
        ),
        (
            "Checkpoints kept",
            f"{len(facts.checkpoints):,}",
            ", ".join(f"step {k.step:,}" for k in facts.checkpoints[-3:]),
        ),
    ]
    return [tile for tile in tiles if tile[1]]


def time_table(facts: Facts) -> list[tuple[str, str, str]]:
    """What the time was spent on, in hours and as a share."""
    seconds = facts.seconds()
    total = sum(seconds.values())
    if not total:
        return []
    return [(TIMES[name], f"{s / 3600:,.3f}", f"{s / total:.1%}") for name, s in seconds.items()]


def as_text(facts: Facts) -> str:
    """The headline for a terminal."""
    return "\n".join(
        [f"{facts.run}: {state(facts)}", *(f"{what}: {value} ({note})" for what, value, note in headline(facts))]
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _with_unit(value: float | None, unit: str) -> str:
    if value is None or not math.isfinite(value):
        return ""
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:,.1f} {prefix}{unit}"
    return f"{value:,.0f} {unit}"


def _best(facts: Facts, what: str, name: str) -> tuple[str, str, str]:
    best = facts.best(name)
    return (
        (what, _number(best[1]), f"best, after step {best[0]:,}; newest {_number(facts.last(name))}")
        if best
        else (what, "", "")
    )


def _match(facts: Facts) -> tuple[str, str, str]:
    best, newest = facts.best(facts.match), _percent(facts.last(facts.match))
    what = facts.match.removeprefix("validation/").replace("_", " ").capitalize()
    return (what, _percent(best[1]), f"best, after step {best[0]:,}; newest {newest}") if best else (what, "", "")


def _step_seconds(facts: Facts) -> str:
    seconds = facts.last("speed/seconds_per_step")
    return "" if seconds is None else f"{seconds:.3f} s a step"


def _achieved(facts: Facts) -> str:
    achieved = facts.last("speed/tflops_per_rank")
    return "" if achieved is None else f"{achieved:.3g} TFLOP/s on each device"


def _data(facts: Facts) -> tuple[str, str, str]:
    sources = facts.sources()
    rows = facts.last("data/rows") or 0.0
    rounds = ", ".join(f"{s.source} {s.epochs:.2f}" for s in sources) if len(sources) > 1 else ""
    note = f"rounds: {rounds}" if rounds else f"{sources[0].epochs:.2f} rounds through the data" if sources else ""
    return "Rows read", f"{rows:,.0f}", note


def _from_steps(steps: list[int]) -> str:
    return "from " + ", ".join(f"step {step:,}" for step in steps[-3:]) if steps else "never interrupted"
