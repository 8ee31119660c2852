"""What every char costs: the supervised text as people read it, in colours. Sizes are in inches, y downwards."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipeline.layout import IGNORED, Slots
from data_pipeline.reading import Written, in_reading_order
from tidal_dist.model.maps import CharScores
from tidal_dist.plots.canvas import (
    BOX,
    MARGIN,
    TITLE,
    WIDTH,
    Line,
    box_width,
    draw_box,
    draw_name,
    draw_title,
    empty_figure,
    lines_of_boxes,
    shown,
)
from tidal_dist.plots.scale import Scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_LINES = 40
_BLOCK_LINE: dict[str, Any] = {"color": "#404040", "linewidth": 1.6, "zorder": 4}
_SMALL = 0.11  # height of a line of small print
_SMALL_FONT = 5.5
_LINE_GAP = 0.1
# One scale for all pictures, so that those of one training can be compared: to guess among 256 bytes costs 5.5 nats.
_SCALE = Scale("OrRd", 6.0, (0.0, 0.1, 0.5, 1.0, 2.0, 4.0, 6.0), gamma=0.5)


def loss_figure(scores: CharScores, chars: Slots, labels: Any, names: Callable[[int], str]) -> "Figure":
    """The supervised text in reading order, line by line, a box for each character and each end mark.

    A box's colour is the loss of all its bytes, in nats. Below it stand the model's first choice and the probability
    of that where it is not the label: of a character of several bytes, for the first one that is written.

    Args:
        scores: of the C chars. chars: Slots of shape (C,), numpy arrays or tensors on the CPU.
        labels: (C,) what each char slot predicts; -100 for nothing.
        names: a readable name of an id (`MixedTokenizer.name`).
    """
    chars, labels = chars.map(np.asarray), np.asarray(labels)
    written = in_reading_order(chars, labels)
    lines = _lines(written, chars)
    drawn = lines[:_MOST_LINES]
    step = BOX + 2 * _SMALL + _LINE_GAP
    figure, axes = empty_figure(WIDTH, TITLE + len(drawn) * step + _SCALE.height + 2 * MARGIN)
    draw_title(axes, MARGIN, MARGIN, "What each char costs", _explanation(scores, labels, len(lines)))
    top = MARGIN + TITLE
    starts = _starts(written, chars)
    colours = _SCALE.colours(np.array([float(scores.nats[w.slots].sum()) for w in written]))
    for line in drawn:
        for i, x, width in line:
            draw_box(axes, MARGIN + x, top, width, shown(written[i].text), colours[i])
            _draw_choice(axes, MARGIN + x + width / 2, top + BOX, _wrong(written[i], scores, labels), scores, names)
            if i in starts:
                axes.plot([MARGIN + x] * 2, [top, top + BOX], **_BLOCK_LINE)
        top += step
    _SCALE.draw(axes, MARGIN, top, "nats of a box; 6 or more have one colour")
    return figure


def _explanation(scores: CharScores, labels: np.ndarray, n_lines: int) -> str:
    supervised = labels != IGNORED
    count = max(int(supervised.sum()), 1)
    nats = float(scores.nats.numpy()[supervised].sum())
    right = (scores.ids[:, 0].numpy() == labels)[supervised].sum() / count
    text = f"{nats:.2f} nats over {supervised.sum():,} labels, {nats / count:.3f} each; the first choice is right for "
    text += f"{right:.1%}, else it stands below"
    return text + (f"; the first {_MOST_LINES} of {n_lines:,} lines" if n_lines > _MOST_LINES else "")


def _lines(written: Sequence[Written], chars: Slots) -> list[Line]:
    """Boxes of each line, which ends where the figure does or with a block that has a line break."""
    starts, breaks, is_broken = _starts(written, chars), set(), False
    for i, w in enumerate(written):
        is_broken = w.text == "\n" or (is_broken and i not in starts)
        if is_broken and i + 1 in starts:
            breaks.add(i)
    return lines_of_boxes([box_width(shown(w.text)) for w in written], starts, 0.0, breaks)


def _starts(written: Sequence[Written], chars: Slots) -> set[int]:
    """Numbers of what a block begins with."""
    blocks = [(int(chars.document[w.slots[0]]), w.block) for w in written]
    return {i for i, block in enumerate(blocks) if i == 0 or block != blocks[i - 1]}


def _wrong(written: Written, scores: CharScores, labels: np.ndarray) -> int | None:
    """The first slot, in the order of writing, whose likeliest id is not the label; None where all are."""
    # Slots count from the block's end, where writing begins.
    return next((slot for slot in sorted(written.slots) if int(scores.ids[slot, 0]) != labels[slot]), None)


def _draw_choice(
    axes: "Axes", middle: float, top: float, slot: int | None, scores: CharScores, names: Callable[[int], str]
) -> None:
    """The likeliest id of a slot and its probability, in small print."""
    if slot is None:
        return
    remarks = shown(names(int(scores.ids[slot, 0]))), f"{float(scores.probabilities[slot, 0]):.0%}"
    for line, remark in enumerate(remarks):
        draw_name(axes, middle, top + (line + 0.5) * _SMALL + 0.01, remark, _SMALL_FONT)
