"""What is shown of a document, as lists: the object of `--json`, and what the tables are made of."""

import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from data_pipeline.layout import Slots
from data_pipeline.pieces import blocks_of_piece
from data_pipeline.reading import in_reading_order
from tidal_dist.inspection.document import Shown
from tidal_dist.inspection.reading import Reading, Shares
from tidal_dist.model.likelihood import bits_per_byte

_COLUMNS = ("block", "index", "start_pos", "position", "place")
Names = Callable[[int], str]
Table = dict[str, list[Any]]


def as_object(shown: Shown, names: Names, reading: Reading | None) -> dict[str, Any]:
    """Title, blocks and streams; with a reading also scores, characters in reading order, loss and attention."""
    labels = {"label": [names(int(label)) for label in shown.labels]}
    report: dict[str, Any] = {
        "title": shown.title,
        "where": shown.where,
        "blocks": _blocks(shown),
        "tokens": _stream(shown.tokens, names, {}),
        "chars": _stream(shown.chars, names, labels),
    }
    if reading is not None:
        report["chars"] |= _scores(reading, names)
        nats = report["chars"]["nats"]
        report["characters"] = _characters(shown, nats)
        report["loss"] = _loss(nats, int(shown.piece.block_bytes[shown.piece.supervised_from :].sum()))
        report["attention"] = {f.name: [getattr(s, f.name) for s in reading.shares] for f in fields(Shares)}
    return report


def without_nan(value: Any) -> Any:
    """The same lists and objects with None for every number that JSON does not know."""
    if isinstance(value, dict):
        return {key: without_nan(v) for key, v in value.items()}
    if isinstance(value, list):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _characters(shown: Shown, nats: Sequence[float]) -> Table:
    """The supervised text in reading order, each character with the nats of its bytes, each block's end mark before it.

    Args:
        nats: (C,) of every char, in the order of the char stream.
    """
    written = in_reading_order(shown.chars, shown.labels)
    return {
        "text": [w.text for w in written],
        "block": [w.block for w in written],
        "is_end": [w.is_end for w in written],
        "nats": [sum(nats[slot] for slot in w.slots) for w in written],
    }


def _blocks(shown: Shown) -> Table:
    piece = shown.piece
    texts = blocks_of_piece(piece)
    return {
        "index": list(range(len(texts))),
        "text": texts,
        "tokens": piece.block_tokens.tolist(),
        "bytes": piece.block_bytes.tolist(),
        "part": ["prompt" if i < piece.supervised_from else "supervised" for i in range(len(texts))],
    }


def _stream(slots: Slots, names: Names, extra: Table) -> Table:
    return {"name": [names(int(i)) for i in slots.ids]} | extra | {c: getattr(slots, c).tolist() for c in _COLUMNS}


def _scores(reading: Reading, names: Names) -> Table:
    scores = reading.scores
    return {
        "nats": scores.nats.tolist(),
        "p": scores.p.tolist(),
        "alternatives": [[names(i) for i in ids] for ids in scores.ids.tolist()],
        "alternatives_p": scores.probabilities.tolist(),
    }


def _loss(nats: Sequence[float], text_bytes: int) -> dict[str, float]:
    total = sum(nats)
    return {
        "nats": total,
        "labels": len(nats),
        "text_bytes": text_bytes,
        "bits_per_byte": bits_per_byte(total, text_bytes),
    }
