"""What a shard folder holds: counts, sizes, lengths, the mix of sources, and the rows that suit it."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from data_pipeline.packing import DocumentLengths, plan_rows
from data_pipeline.shards import COUNTS, SPLITS, Manifest

FULL = 0.97  # share of the char slots that the recommended rows fill
_SAMPLE_BLOCKS = 4_000_000  # of the documents that lengths and rows are measured on
_DEFAULT_ROW_TOKENS = 2048
# C / T that are tried, as shares of the corpus's own char slots for each token slot.
_SHARES = (0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2)


@dataclass(frozen=True)
class RowFill:
    """Rows of T x C slots, and which shares of them the sampled documents fill."""

    row_tokens: int
    row_chars: int
    token_fill: float
    char_fill: float


def summarize(manifest: Manifest, row_tokens: int | None = None) -> dict[str, Any]:
    """Counts and sizes from the manifest; lengths and rows from the index of a sample of the training shards.

    Args:
        row_tokens: T, for which the best C is looked for; none: that of the configuration in the folder, or 2,048.

    Returns:
        splits: counts, bytes on disk for each byte of text. sources: share of the text of each. coverage: bytes per
        token and so on. documents, blocks: histograms as {upper bound of the length in bytes: count}. rows: shares of
        slots that are filled, by C. recommended_row_chars: the largest C whose slots are filled to `FULL`.

    Raises:
        ShardError: an index is missing or not what was written.
    """
    sample = _sample(manifest)
    rows = fills(sample, row_tokens or _DEFAULT_ROW_TOKENS)
    best = _best(rows)
    starts = np.concatenate([[0], np.cumsum(sample.document_blocks, dtype=np.int64)])
    ends = np.concatenate([[0], np.cumsum(sample.block_bytes, dtype=np.int64)])
    return {
        "shards": manifest.where,
        "manifest_hash": manifest.hash,
        "splits": {split: _counts(manifest.shards(split)) for split in SPLITS},
        "sources": _sources(manifest),
        "coverage": coverage([entry for split in SPLITS for entry in manifest.shards(split)]),
        "documents": _histogram(np.diff(ends[starts]), by_powers=True),
        "blocks": _histogram(sample.block_bytes, by_powers=False),
        "rows": [asdict(row) for row in rows],
        "recommended_row_chars": best.row_chars if best else None,
    }


def coverage(entries: list[dict[str, Any]]) -> dict[str, float]:
    """How a tokeniser meets a corpus, over the entries of all its shards."""
    text, tokens, blocks, whole = (
        sum(entry[key] for entry in entries) for key in ("text_bytes", "tokens", "blocks", "one_token_blocks")
    )
    return {
        "bytes_per_token": text / max(tokens, 1),
        "tokens_per_block": tokens / max(blocks, 1),
        "one_token_blocks": whole / max(blocks, 1),
    }


def fills(lengths: DocumentLengths, row_tokens: int) -> list[RowFill]:
    """What rows of `row_tokens` token slots hold of these documents, by several numbers of char slots, in order.

    They are close where the largest C lies that is filled to `FULL`.
    """
    if not len(lengths.block_bytes):
        return []
    chars, tokens = int(lengths.block_bytes.sum(dtype=np.int64)) + len(lengths.block_bytes), lengths.block_tokens.sum()
    step = 64 if row_tokens >= 256 else 1
    least = int(lengths.block_bytes.max()) + 1
    sizes = {max(round(row_tokens * share * chars / int(tokens) / step) * step, least) for share in _SHARES}
    found = _fills(lengths, row_tokens, sorted(sizes))
    best = _best(found)
    larger = [row.row_chars for row in found if best is not None and row.row_chars > best.row_chars]
    if best is not None and best.char_fill >= FULL and larger:
        found += _fills(lengths, row_tokens, range(best.row_chars + step, larger[0], step))
    return sorted(found, key=lambda row: row.row_chars)


def _best(rows: list[RowFill]) -> RowFill | None:
    """The largest C that is filled to `FULL`; if none is, the fullest."""
    full = [row for row in rows if row.char_fill >= FULL]
    return max(full, key=lambda row: row.row_chars) if full else max(rows, key=lambda row: row.char_fill, default=None)


def _fills(lengths: DocumentLengths, row_tokens: int, sizes: Iterable[int]) -> list[RowFill]:
    found = []
    for row_chars in sizes:
        plan = plan_rows(lengths, row_tokens, row_chars, "sample")
        slots = (plan.token_slots.sum(dtype=np.int64), plan.char_slots.sum(dtype=np.int64))
        shares = (float(n / plan.rows / size) for n, size in zip(slots, (row_tokens, row_chars), strict=True))
        found.append(RowFill(row_tokens, row_chars, *shares))
    return found


def _sample(manifest: Manifest) -> DocumentLengths:
    """Lengths of the first training documents, `_SAMPLE_BLOCKS` blocks at most, from shards spread over the split."""
    entries = manifest.shards("train")
    parts: list[DocumentLengths] = []
    left = _SAMPLE_BLOCKS
    wanted = max(1, _SAMPLE_BLOCKS // max(max((e["blocks"] for e in entries), default=1), 1) + 1)
    for entry in entries[:: max(1, len(entries) // wanted)]:
        if left <= 0:
            break
        lengths = manifest.lengths(entry)
        ends = np.cumsum(lengths.document_blocks, dtype=np.int64)
        documents = max(1, int(np.searchsorted(ends, left, side="right")))
        blocks = int(ends[documents - 1])
        parts.append(
            DocumentLengths(
                lengths.document_blocks[:documents],
                lengths.prompt_blocks[:documents],
                lengths.block_tokens[:blocks],
                lengths.block_bytes[:blocks],
            )
        )
        left -= blocks
    names = ("document_blocks", "prompt_blocks", "block_tokens", "block_bytes")
    return DocumentLengths(*(np.concatenate([np.empty(0, np.uint8), *(getattr(p, n) for p in parts)]) for n in names))


def _counts(entries: list[dict[str, Any]]) -> dict[str, Any]:
    counts = {key: sum(entry[key] for entry in entries) for key in COUNTS} | {"shards": len(entries)}
    on_disk = counts["bytes"] + counts["index_bytes"]
    return counts | {"bytes_per_byte_of_text": on_disk / max(counts["text_bytes"], 1)}


def _sources(manifest: Manifest) -> dict[str, dict[str, Any]]:
    entries = manifest.shards("train")
    text = sum(entry["text_bytes"] for entry in entries)
    found = {}
    for source in dict.fromkeys(entry["source"] for entry in entries):
        counts = _counts([entry for entry in entries if entry["source"] == source])
        found[source] = counts | {"share_of_text": counts["text_bytes"] / max(text, 1)}
    return found


def _histogram(lengths: np.ndarray, by_powers: bool) -> dict[int, int]:
    """Counts by length: up to 1, 2, 4, 8 ... or of every length."""
    if not len(lengths):
        return {}
    bounds = np.ceil(np.log2(np.maximum(lengths, 1))).astype(int) if by_powers else lengths.astype(int)
    values, counts = np.unique(bounds, return_counts=True)
    keys = [2**v if by_powers else v for v in values.tolist()]
    return dict(zip(keys, counts.tolist(), strict=True))
