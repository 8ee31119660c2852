"""The curves of the report: which figures are drawn together, and what each picture means to a newcomer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tidal_dist.plots.curves import Axis, areas_figure, curves_figure, parts
from tidal_dist.run_report.facts import TIMES, Facts

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Chart:
    """A picture of the page: title, what it means, and how it is drawn; None where there is nothing to draw."""

    title: str
    meaning: str
    draw: "Callable[[Facts], Figure | None]"


def _lines(unit: str, axis: Axis = "free", **names: str) -> "Callable[[Facts], Figure | None]":
    """Draws figures, each by its name in the legend and its name in TensorBoard."""

    def draw(facts: Facts) -> "Figure | None":
        found = parts({name.replace("__", "-").replace("_", " "): facts.curve(tag) for name, tag in names.items()})
        return curves_figure(found, unit, facts.restarts, axis) if found else None

    return draw


def _by_layer(facts: Facts) -> "Figure | None":
    tags = sorted({tag for s in facts.scalars for tag in s.values if tag.startswith("gradient_norm/")})
    shown = tags[:: -(-len(tags) // 8) or 1]
    found = parts({tag.partition("/")[2]: facts.curve(tag) for tag in shown})
    return curves_figure(found, "norm", facts.restarts, "logarithmic") if found else None


def _times(facts: Facts) -> "Figure | None":
    # Validation and checkpoints fall on single steps: what every step pays is shown here, those two in the table.
    shown = {TIMES[name]: facts.curve(f"time/{name}") for name in TIMES if name not in ("validation", "checkpoint")}
    every_step = parts(shown)
    return areas_figure(every_step, "seconds per step", facts.restarts) if every_step else None


def _epochs(facts: Facts) -> "Figure | None":
    found = parts({source.source: facts.curve(f"{source.tag}/epochs") for source in facts.sources()})
    return curves_figure(found, "epochs", facts.restarts, "zero") if found else None


CHARTS = (
    Chart(
        "Loss",
        "How surprised the model is by each character that it should write, in nats; 5.5 is guessing among 256 "
        "bytes. Lower is better. Validation is text that is never trained on: where it rises while training falls, "
        "the model learns by heart.",
        _lines("nats per label", training="train/loss", validation="validation/loss"),
    ),
    Chart(
        "Bits per byte",
        "The same on validation text, in bits for each byte of it, which compares models of any tokeniser. Lower "
        "is better.",
        _lines("bits per byte", validation="validation/bits_per_byte"),
    ),
    Chart(
        "What it writes",
        "Shares of 1. Exact match: answers that are right to the last character. Next block: words of held-out "
        "text that it continues with just the word that stands there. Ill-formed: blocks that would not have been "
        "text if decoding had not held the model back; it should fall to 0.",
        _lines(
            "share",
            "share",
            exact_match="validation/exact_match",
            next_block="validation/next_block_match",
            ill__formed_blocks="validation/ill_formed_blocks",
        ),
    ),
    Chart(
        "Off-canonical joins",
        "How often, per block, the model ends a block where cutting its text anew would not: a context that "
        "training never shows. It should fall to nearly 0.",
        _lines("per block", "zero", joins="validation/off_canonical_joins_per_block"),
    ),
    Chart(
        "Gradient norm",
        "How strongly a step wants to change the weights, before clipping. It should be quiet after the warm-up; a "
        "spike that the loss follows is a sign of too high a learning rate or of bad data.",
        _lines("norm", "logarithmic", gradient_norm="train/gradient_norm"),
    ),
    Chart(
        "Gradient norm by layer",
        "The same, of some layers: one that leaves the others is where trouble begins.",
        _by_layer,
    ),
    Chart(
        "Learning rate",
        "What the schedule asks for: warm-up, then decay.",
        _lines("rate", learning_rate="train/learning_rate"),
    ),
    Chart(
        "Speed",
        "Bytes of text that are learned from, each second, over all processes together.",
        _lines("bytes per second", "zero", bytes_per_second="speed/bytes_per_second"),
    ),
    Chart(
        "Utilisation",
        "Share of what the device can do at most that goes into the model's own arithmetic; recomputing counts for "
        "nothing.",
        _lines("share of the peak", "zero", utilisation="speed/utilisation"),
    ),
    Chart(
        "Where a step's time goes",
        "Forward, backward and optimizer are the work. All else is waiting.",
        _times,
    ),
    Chart(
        "Memory",
        "Of the first process: resident on the host, and the peaks on its device.",
        _lines(
            "GiB",
            "zero",
            host="memory/host_resident_gib",
            device_in_use="memory/device_allocated_peak_gib",
            device_set_aside="memory/device_reserved_peak_gib",
        ),
    ),
    Chart("Rounds through the data", "1 is when every row of a source has been read once.", _epochs),
)
