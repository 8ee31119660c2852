"""The pictures of a document: its layout, and with a model the attention and the loss of its chars."""

from collections.abc import Callable
from pathlib import Path

from tidal_dist.inspection.document import Shown, Source
from tidal_dist.inspection.reading import Reading
from tidal_dist.plots.attention import attention_figure
from tidal_dist.plots.canvas import save
from tidal_dist.plots.layout import layout_figure
from tidal_dist.plots.loss import loss_figure


def draw(source: Source, shown: Shown, reading: Reading | None, path: Path, log: Callable[[str], object]) -> None:
    """Write the layout to `path`, and with a reading NAME-attention.png and NAME-loss.png beside it; log each.

    Raises:
        UserError: a file cannot be written.
    """
    names = source.tokenizer.name
    streams = (shown.tokens, shown.chars, shown.labels)
    save(layout_figure(*streams, names, source.token_attention), path)
    log(f"wrote {path}")
    if reading is None:
        return
    attention, loss = (path.with_name(f"{path.stem}-{what}{path.suffix}") for what in ("attention", "loss"))
    save(attention_figure(reading.maps, shown.tokens, shown.chars, names), attention)
    log(f"wrote {attention}")
    save(loss_figure(reading.scores, shown.chars, shown.labels, names), loss)
    log(f"wrote {loss}")
