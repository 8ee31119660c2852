"""What a shard folder holds, as four charts: lengths of documents and blocks, sources, how full rows are."""

from typing import TYPE_CHECKING, Any

from data_pipeline.summary import FULL

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOUR, _OTHER = "#3b6fb6", "#d1662f"


def shards_figure(summary: dict[str, Any]) -> "Figure":
    """The charts of a summary (`data_pipeline.summary.summarize`)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    documents, blocks, sources, rows = figure.subplots(2, 2).flat
    _bars(documents, summary["documents"], "documents by length", "bytes, at most")
    _bars(blocks, summary["blocks"], "blocks by length", "bytes")
    names, shares = list(summary["sources"]), [s["share_of_text"] for s in summary["sources"].values()]
    sources.barh([name or "(all)" for name in names], shares, color=_COLOUR)
    sources.set_xlim(0, 1)
    sources.set_title("share of the text by source")
    _draw_rows(rows, summary)
    figure.suptitle(summary["shards"])
    return figure


def _bars(axes: "Axes", histogram: dict[int, int], title: str, unit: str) -> None:
    axes.bar([f"{length:,}" for length in histogram], list(histogram.values()), color=_COLOUR)
    axes.set_title(title)
    axes.set_xlabel(unit)
    axes.tick_params(axis="x", rotation=90, labelsize=7)


def _draw_rows(axes: "Axes", summary: dict[str, Any]) -> None:
    rows = summary["rows"]
    if rows:
        chars = [row["row_chars"] for row in rows]
        axes.plot(chars, [row["char_fill"] for row in rows], "o-", color=_COLOUR, label="char slots")
        axes.plot(chars, [row["token_fill"] for row in rows], "o-", color=_OTHER, label="token slots")
        axes.axhline(FULL, color="#888888", linewidth=0.8, linestyle="--")
        axes.axvline(summary["recommended_row_chars"], color="#888888", linewidth=0.8)
        axes.legend()
        axes.set_xlabel(f"char slots C of rows of {rows[0]['row_tokens']:,} token slots")
    axes.set_title("share of the slots that is filled")
