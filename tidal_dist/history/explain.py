"""Which documents each row of a step held, computed again from manifest, seed and step."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipeline.ordering import RowAddress
from data_pipeline.pieces import Piece, blocks_of_piece
from data_pipeline.rows import PieceOrigin, RowReader, row_format_of
from data_pipeline.run_order import SPLIT
from tidal_dist.errors import UserError
from tidal_dist.history.past import PastRun

_SHORT = 100  # characters of a text that are shown


def explain(
    run: PastRun, step: int, rank: int | None = None, ranks: int | None = None, full: bool = False
) -> dict[str, Any]:
    """The rows of step `step`, counted from 1 as in logs and TensorBoard, and the documents in them.

    Args:
        rank: only the rows of this rank. ranks: how many there were; none: as the newest checkpoint says.
        full: give the texts whole.

    Raises:
        UserError: there is no such step or rank. ShardError: a shard cannot be read.
    """
    steps, lanes = run.config.training.steps, run.config.data.lanes
    if not 1 <= step <= steps:
        raise UserError(f"--step {step}: {run.folder} has the steps 1..{steps}")
    ranks = ranks or _ranks_of(run.folder)
    if ranks is not None and lanes % ranks:
        raise UserError(f"--ranks {ranks}: the run's {lanes} lanes (data.lanes) are not a multiple of it")
    if rank is not None and ranks is None:
        raise UserError(f"--rank {rank}: {run.folder} has no checkpoint that says how many there were; give --ranks")
    if rank is not None and ranks is not None and not 0 <= rank < ranks:
        raise UserError(f"--rank {rank}: the run had the ranks 0..{ranks - 1}")
    first = (step - 1) * run.rows_per_step
    rows = list(_rows(run, range(first, first + run.rows_per_step), rank, ranks, full))
    return {"run": str(run.folder), "step": step, "ranks": ranks, "rows": rows}


def as_text(report: dict[str, Any]) -> str:
    """The report of `explain` for a terminal."""
    rows = report["rows"]
    lines = [f"step {report['step']} of {report['run']}: {len(rows)} rows"]
    for row in rows:
        rank = "" if row["rank"] is None else f"  rank {row['rank']}"
        source = f"  source {row['source']}" if row["source"] else ""
        place = f"epoch {row['epoch']}  {row['shard']} row {row['row']}"
        lines.append(f"row {row['g']}  lane {row['lane']}{rank}{source}  {place}")
        if row["left_out"]:
            lines.append(f"  left empty: {row['why_left_out']}")
        for piece in row["pieces"]:
            offset = f" from byte {piece['first_byte']:,}" if piece["first_byte"] else ""
            where = f"{piece['file']}:{piece['line']}" if piece["line"] else piece["file"]
            blocks = f"blocks {piece['first_block']}..{piece['end_block'] - 1}"
            prompt = f"{piece['prompt']!r} -> " if piece["prompt"] else ""
            lines.append(f"  {where}{offset}  {blocks}  {prompt}{piece['text']!r}")
    return "\n".join(lines)


def _ranks_of(folder: Path) -> int | None:
    """How many ranks wrote the newest checkpoint of a run."""
    from tidal_dist.training import checkpoint as ckpt
    from tidal_dist.training.commit import complete_checkpoints

    complete = complete_checkpoints(folder / "checkpoints")
    return ckpt.load_state(complete[-1]).ranks if complete else None


def _rows(run: PastRun, rows: range, rank: int | None, ranks: int | None, full: bool) -> Iterator[dict[str, Any]]:
    data, shards = run.config.data, run.manifest.shards(SPLIT)
    reader = RowReader(run.manifest, SPLIT, run.manifest.tokenizer(), row_format_of(data), data.seed)
    for g in rows:
        lane = g % data.lanes
        its_rank = None if ranks is None else lane % ranks
        if rank not in (None, its_rank):
            continue
        address = run.order.locate(g)
        yield {
            "g": g,
            "lane": lane,
            "rank": its_rank,
            "source": address.source,
            "epoch": address.epoch,
            "shard": shards[address.shard]["name"],
            "row": address.row,
            "left_out": address.quarantined,
            "why_left_out": _why_left_out(run, g) if address.quarantined else "",
            "pieces": [] if run.order.is_unreadable(g, address.shard) else _pieces(reader, address, full),
        }


def _why_left_out(run: PastRun, g: int) -> str:
    return run.record.why_empty(g) or "its shard could not be read"


def _pieces(reader: RowReader, address: RowAddress, full: bool) -> list[dict[str, Any]]:
    pairs = zip(reader.origins(address), reader.pieces(address), strict=True)
    return [_piece(origin, piece, full) for origin, piece in pairs]


def _piece(origin: PieceOrigin, piece: Piece, full: bool) -> dict[str, Any]:
    blocks = blocks_of_piece(piece)
    prompt, text = "".join(blocks[: piece.supervised_from]), "".join(blocks[piece.supervised_from :])
    return origin._asdict() | {
        "prompt": prompt if full else _shortened(prompt),
        "text": text if full else _shortened(text),
    }


def _shortened(text: str) -> str:
    return text if len(text) <= _SHORT else f"{text[:_SHORT]}… ({len(text):,} characters)"
