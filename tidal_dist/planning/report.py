"""A plan as people read it, and as one JSON object."""

from dataclasses import asdict
from typing import Any

from tidal_dist.plan import Plan
from tidal_dist.planning.changes import Change

_DAY_SECONDS = 86_400
_GB = 1e9
_SHOWN_CHANGES = 6


def as_object(
    made: Plan, suggestions: list[Change], training_steps: int, gpu_hour_price: float | None
) -> dict[str, Any]:
    """The plan as one JSON object; bytes, seconds, FLOPs."""
    rows_a_day = made.rows.step * _DAY_SECONDS / made.step_seconds
    gpu_hours = made.cluster.ranks * 24
    return {
        "cluster": {
            "nodes": made.cluster.nodes,
            "gpus_per_node": made.cluster.gpus_per_node,
            "gpus": made.cluster.ranks,
            "gpu": asdict(made.cluster.gpu),
        },
        "precision": made.precision,
        "zero": asdict(made.zero),
        "rows": asdict(made.rows),
        "content_of_a_row": asdict(made.content),
        "parameters": asdict(made.parameters) | {"total": made.parameters.total},
        "flops": {
            "forward_of_a_row": made.flops.forward,
            "forward_of_a_row_by_part": made.flops.parts(),
            "visible_forward_of_a_row": made.flops.visible_forward,
            "model_of_a_step": made.flops.training * made.rows.step,
            "hardware_of_a_step": made.hardware_flops * made.cluster.ranks,
            "model_for_each_byte": made.flops.training / max(made.content.text_bytes, 1),
        },
        "memory": made.memory()
        | {"total": made.memory_bytes, "gpu": made.cluster.gpu.memory_gb * 1e9, "fits": made.fits},
        "host_memory_of_a_node": made.states.host * made.cluster.gpus_per_node,
        "communication": [asdict(c) | {"seconds": c.seconds(made.cluster, made.assumed)} for c in made.collectives],
        "time_of_a_step": {
            "compute": made.compute_seconds,
            "optimizer": made.optimizer_seconds,
            "communication": made.communication_seconds,
            "communication_not_hidden": made.exposed_seconds,
            "total": made.step_seconds,
        },
        "utilisation": made.utilisation,
        "each_day": {
            "steps": _DAY_SECONDS / made.step_seconds,
            "tokens": rows_a_day * made.content.tokens,
            "bytes": rows_a_day * made.content.text_bytes,
            "gpu_hours": gpu_hours,
            "cost": None if gpu_hour_price is None else gpu_hours * gpu_hour_price,
        },
        "whole_run": {
            "steps": training_steps,
            "days": training_steps * made.step_seconds / _DAY_SECONDS,
            "bytes": training_steps * made.rows.step * made.content.text_bytes,
        },
        "changes": [asdict(change) for change in suggestions],
        "assumptions": asdict(made.assumed),
    }


def as_text(made: Plan, suggestions: list[Change], training_steps: int, gpu_hour_price: float | None) -> str:
    """Tables: model, memory, communication, time, what a day brings; whether it fits; what is assumed."""
    lines = [*_model_lines(made), "", *_memory_lines(made), "", *_step_lines(made), ""]
    lines += [*_day_lines(made, training_steps, gpu_hour_price), "", *_verdict_lines(made, suggestions), "", "assumed:"]
    lines += [f"  {line}" for line in made.assumed.as_text()]
    lines.append(f"  content of a row: {made.content.source}")
    lines.append("  no figure here was measured on a GPU; docs/plan.md says how the memory compares with small runs")
    return "\n".join(lines)


def summary(made: Plan) -> str:
    """The plan in a few figures."""
    rows_a_day = made.rows.step * _DAY_SECONDS / made.step_seconds
    return (
        f"{made.parameters.total:,} parameters, {made.memory_bytes / _GB:.0f} of {made.cluster.gpu.memory_gb:g} GB a "
        f"GPU, {made.step_seconds:.2f} s a step, MFU {made.utilisation:.0%}, "
        f"{rows_a_day * made.content.tokens / _GB:.1f} G tokens and {rows_a_day * made.content.text_bytes / _GB:.0f} "
        "GB of text a day"
    )


def _model_lines(made: Plan) -> list[str]:
    cluster, rows, counted = made.cluster, made.rows, made.parameters
    gpu, content = cluster.gpu, made.content
    passes = f"{rows.passes} passes of {rows.micro}" if rows.passes > 1 else "one pass"
    return [
        f"{cluster.nodes} x {cluster.gpus_per_node} {gpu.name} ({gpu.memory_gb:g} GB, {made.peak_flops / 1e12:g} "
        f"TFLOPS dense in {made.precision}), ZeRO-{made.zero.stage}"
        + (f", hpZ over {made.zero.hpz} ranks" if made.zero.hpz > 1 else ""),
        f"parameters      {counted.total:,}: {counted.n_layers} layers of {counted.layer:,}, embeddings "
        f"{counted.embeddings:,}, others {counted.others:,}",
        f"a step          {rows.step:,} rows, {rows.rank:,} a GPU in {passes}; "
        f"{rows.step * content.text_bytes / 1e6:,.1f} MB of text, {rows.step * content.tokens / 1e6:,.2f} M tokens",
        f"FLOPs           {made.flops.training * rows.step:.3g} a step, "
        f"{made.flops.training / max(content.text_bytes, 1):.3g} a byte (model; computed: "
        f"{made.hardware_flops * cluster.ranks / (made.flops.training * rows.step):.2f} times)",
    ]


def _memory_lines(made: Plan) -> list[str]:
    parts = made.memory()
    lines = ["memory of a GPU          GB"]
    lines += [f"  {name:21s}{size / _GB:8.2f}" for name, size in parts.items() if size >= 5e6]
    lines.append(f"  {'together':21s}{made.memory_bytes / _GB:8.2f} of {made.cluster.gpu.memory_gb:g}")
    if made.states.host:
        where = " and ".join(sorted({made.zero.optimizer_on, made.zero.weights_on} - {"none"}))
        lines.append(f"  offloaded to {where}: {made.states.host * made.cluster.gpus_per_node / _GB:.1f} GB a node")
    return lines


def _step_lines(made: Plan) -> list[str]:
    lines = ["communication of a step    link GB   network GB   calls   seconds   (of each GPU)"]
    for c in made.collectives:
        lines.append(
            f"  {c.name:23s}{c.link_bytes / _GB:9.2f}{c.network_bytes / _GB:13.2f}{c.count:8,d}"
            f"{c.seconds(made.cluster, made.assumed):10.4f}"
        )
    if not made.collectives:
        lines.append("  none")
    return [
        *lines,
        "",
        f"seconds of a step {made.step_seconds:.3f}: computing {made.compute_seconds:.3f}, optimizer "
        f"{made.optimizer_seconds:.4f}, communication {made.communication_seconds:.3f} of which "
        f"{made.exposed_seconds:.3f} not hidden; utilisation (MFU) {made.utilisation:.1%}",
    ]


def _day_lines(made: Plan, training_steps: int, gpu_hour_price: float | None) -> list[str]:
    steps = _DAY_SECONDS / made.step_seconds
    rows, content = steps * made.rows.step, made.content
    days = training_steps / steps
    gpu_hours = 24 * made.cluster.ranks
    cost = "" if gpu_hour_price is None else f", {gpu_hours * gpu_hour_price:,.0f} at {gpu_hour_price:g} a GPU hour"
    whole = "" if gpu_hour_price is None else f", cost {days * gpu_hours * gpu_hour_price:,.0f}"
    return [
        f"a day           {steps:,.0f} steps, {rows * content.tokens / 1e9:,.2f} G tokens, "
        f"{rows * content.text_bytes / 1e9:,.2f} GB of text, {gpu_hours:,} GPU hours{cost}",
        f"the run         {training_steps:,} steps in {days:,.2f} days, "
        f"{training_steps * made.rows.step * content.text_bytes / 1e9:,.2f} GB of text{whole}",
    ]


def _verdict_lines(made: Plan, suggestions: list[Change]) -> list[str]:
    if made.fits:
        return [f"it fits: {made.cluster.gpu.memory_gb - made.memory_bytes / _GB:.1f} GB to spare on each GPU"]
    lines = [f"IT DOES NOT FIT: {made.memory_bytes / _GB - made.cluster.gpu.memory_gb:.1f} GB too much on each GPU"]
    if suggestions:
        lines.append("what would change that, each alone (GB of a GPU, seconds of a step):")
    for c in suggestions[:_SHOWN_CHANGES]:
        mark = "fits" if c.fits else "not enough"
        lines.append(f"  {c.text:64s}{c.memory_bytes / _GB:9.1f}{c.step_seconds:9.3f}  {mark}")
    return lines
