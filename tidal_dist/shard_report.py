"""What `tidal shards` prints."""

from typing import Any

from data_pipeline.summary import FULL
from data_pipeline.verify import Fault

_BAR = 40  # letters of the longest bar


def faults_as_text(folder: str, faults: list[Fault]) -> str:
    """A line for each fault, or one line that there is none."""
    if not faults:
        return f"{folder}: every file is as it was written"
    lines = [f"{fault.file}: {fault.what}; {fault.remedy}" for fault in faults]
    return "\n".join([*lines, f"{folder}: {len(faults)} faults"])


def summary_as_text(summary: dict[str, Any]) -> str:
    """A summary (`data_pipeline.summary.summarize`) as tables and bars."""
    lines = [f"{summary['shards']} (manifest {summary['manifest_hash'][:12]})", ""]
    lines.append(
        f"{'split':12}{'shards':>8}{'documents':>13}{'blocks':>15}{'tokens':>15}{'text bytes':>17}{'on disk':>9}"
    )
    for split, counts in summary["splits"].items():
        lines.append(_counts_line(split, counts))
    lines += ["", f"{'source':12}{'share of the training text':>28}"]
    for source, counts in summary["sources"].items():
        lines.append(f"{source or '(all)':12}{counts['share_of_text']:28.1%}")
    coverage = summary["coverage"]
    lines += [
        "",
        f"tokeniser: {coverage['bytes_per_token']:.2f} bytes a token, "
        f"{coverage['tokens_per_block']:.2f} tokens a block, "
        f"{coverage['one_token_blocks']:.1%} of the blocks are one token",
        "",
        "documents by length in bytes",
        *_bars(summary["documents"], "up to "),
        "",
        "blocks by length in bytes",
        *_bars(summary["blocks"], ""),
    ]
    return "\n".join([*lines, *_rows(summary)])


def _counts_line(split: str, counts: dict[str, Any]) -> str:
    return (
        f"{split:12}{counts['shards']:8,}{counts['documents']:13,}{counts['blocks']:15,}{counts['tokens']:15,}"
        f"{counts['text_bytes']:17,}{counts['bytes_per_byte_of_text']:9.2f}"
    )


def _bars(histogram: dict[int, int], prefix: str) -> list[str]:
    most = max(histogram.values(), default=1)
    return [
        f"{prefix + format(n, ','):>16}{count:13,} {'#' * -(-count * _BAR // most)}" for n, count in histogram.items()
    ]


def _rows(summary: dict[str, Any]) -> list[str]:
    rows = summary["rows"]
    if not rows:
        return []
    lines = [
        "",
        f"rows of T = {rows[0]['row_tokens']:,}",
        f"{'C':>8}{'C / T':>8}{'chars filled':>14}{'tokens filled':>15}",
    ]
    for row in rows:
        best = "  <- recommended" if row["row_chars"] == summary["recommended_row_chars"] else ""
        ratio = row["row_chars"] / row["row_tokens"]
        lines.append(f"{row['row_chars']:8,}{ratio:8.2f}{row['char_fill']:14.1%}{row['token_fill']:15.1%}{best}")
    if not any(row["char_fill"] >= FULL for row in rows):
        lines.append(f"no C fills {FULL:.0%} of its slots: the documents differ too much in chars for each token")
    return lines
