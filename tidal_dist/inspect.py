"""One document as the model sees it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.layout import CharPositions, Slots, TokenAttention, lay_out, piece_of_text
from data_pipeline.shards import MANIFEST, Manifest
from data_pipeline.tokenizer import MixedTokenizer
from tidal_dist.config import load_config
from tidal_dist.export.package import load_export


def load_for_inspection(source: Path) -> tuple[MixedTokenizer, CharPositions, TokenAttention]:
    """Tokeniser, char positions and token attention of an export or of shards (as their configuration has them).

    Raises:
        UserError: the folder is neither.
    """
    if (source / MANIFEST).exists():
        model = load_config(source / "config.yaml").model
        return Manifest.load(source).tokenizer(), model.char_positions, model.token_attention
    exported = load_export(source)
    return exported.tokenizer, exported.model.config.char_positions, exported.model.config.token_attention


def streams(
    prompt: str, text: str, tokenizer: MixedTokenizer, char_positions: CharPositions
) -> tuple[Slots, Slots, np.ndarray]:
    """Token stream, char stream and labels of one document."""
    return lay_out(piece_of_text(prompt, text, tokenizer), tokenizer.byte_lengths, char_positions)


def streams_as_text(
    tokens: Slots, chars: Slots, labels: np.ndarray, name: Callable[[int], str]
) -> tuple[dict[str, Any], str]:
    """The two streams as an object of lists, and as two tables."""
    columns = ("block", "index", "start_pos", "position", "place")

    def table(slots: Slots, extra: dict[str, list[str]]) -> dict[str, list[Any]]:
        ids = {"name": [name(int(i)) for i in slots.ids]}
        return ids | extra | {c: [int(v) for v in getattr(slots, c)] for c in columns}

    report = {"tokens": table(tokens, {}), "chars": table(chars, {"label": [name(int(i)) for i in labels]})}
    return report, "\n\n".join(_as_table(stream, content) for stream, content in report.items())


def _as_table(title: str, content: dict[str, list[Any]]) -> str:
    rows = [list(content), *([_cell(v) for v in row] for row in zip(*content.values(), strict=True))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([f"{title} ({len(rows) - 1})", *lines])


def _cell(value: Any) -> str:
    return repr(value)[1:-1].replace(" ", "␣") if isinstance(value, str) else str(value)
