"""What `tidal prepare` reports: finished shards, or how far they are."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.rows import read_row_plan, row_format_of

if TYPE_CHECKING:
    from data_pipeline.prepare import Prepared, StageStatus
    from data_pipeline.shards import DataConfig


def as_object(prepared: "Prepared", data: "DataConfig") -> dict[str, Any]:
    """The figures of finished shards."""
    manifest = prepared.manifest
    plan = read_row_plan(manifest, row_format_of(data))
    splits = {
        split: {key: value for key, value in content.items() if key != "shards"}
        | {"shards": len(content["shards"]), "rows": sum(shard["rows"] for shard in plan[split])}
        for split, content in manifest.content["splits"].items()
    }
    told = ("read", "duplicates", "sources", "tokenizer", "coverage")
    return {
        "shards": str(manifest.folder),
        "manifest_hash": manifest.hash,
        "splits": splits,
        "tasks": prepared.tasks,
    } | {key: manifest.content[key] for key in told}


def as_text(report: Mapping[str, Any]) -> str:
    """The same for people."""
    lines = [f"{report['shards']}:"]
    lines += [f"  {split}: {_figures(figures)}" for split, figures in report["splits"].items()]
    if len(report["sources"]) > 1:
        shown = ("documents", "text_bytes", "tokens", "shards")
        lines += [
            f"  source {name}: {_figures({key: figures[key] for key in shown})}"
            for name, figures in report["sources"].items()
        ]
    lines.append(f"  read: {_figures(report['read'])}")
    if report["duplicates"]:
        lines.append(f"  duplicates dropped: {_figures(report['duplicates'])}")
    coverage = report["coverage"]
    lines.append(
        f"  tokeniser: {report['tokenizer']['vocab_size']:,} ids, {coverage['bytes_per_token']:.2f} bytes per token, "
        f"{coverage['tokens_per_block']:.2f} tokens per block, {coverage['one_token_blocks']:.1%} of blocks one token"
    )
    done, kept = (sum(stage[key] for stage in report["tasks"].values()) for key in ("done", "kept"))
    lines.append(f"  tasks: {done:,} done, {kept:,} kept from before")
    return "\n".join(lines)


def _figures(figures: Mapping[str, Any]) -> str:
    """`1,234 documents, 5 text bytes, ...`; reasons in brackets, and of what may be missing only what is there."""
    parts = []
    for key, value in figures.items():
        name = key.replace("_", " ")
        if isinstance(value, Mapping):
            if value:
                reasons = ", ".join(f"{count:,} {reason}" for reason, count in value.items())
                parts.append(f"{sum(value.values()):,} {name} ({reasons})")
        else:
            parts.append(f"{value:,} {name}")
    return ", ".join(parts)


def status_as_object(
    folder: Path, stages: Mapping[str, "StageStatus"], jobs: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """How far a preparation is.

    Args:
        folder: the work folder. jobs: those of Slurm, by stage.
    """
    return {
        "unfinished": str(folder) if stages else None,
        "stages": {name: vars(stage) for name, stage in stages.items()},
        "jobs": dict(jobs or {}),
    }


def status_as_text(report: Mapping[str, Any]) -> str:
    """The same for people."""
    if not report["unfinished"]:
        return "no unfinished preparation"
    lines = [f"{report['unfinished']}: unfinished, logs in {report['unfinished']}/logs"]
    for name, stage in report["stages"].items():
        job = f", job {report['jobs'][name]}" if name in report["jobs"] else ""
        lines.append(f"  {name}: {stage['done']:,} of {stage['tasks']:,} tasks{job}")
        lines += [f"    task {task}: {error}" for task, error in stage["errors"].items()]
    return "\n".join(lines)
