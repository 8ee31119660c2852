"""The report as one HTML page for people who did not run it: pictures are inside, nothing is fetched."""

import base64
import html
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from data_pipeline.files import replace_file
from tidal_dist.history.generations import Generations
from tidal_dist.plots.curves import to_svg
from tidal_dist.run_report.charts import CHARTS
from tidal_dist.run_report.facts import Facts, gather
from tidal_dist.run_report.headline import headline, state, time_table

REPORT = "report.html"
_MOST_ROWS = 200  # of a table


def write_report(run: Path, path: Path) -> Facts:
    """Write the page of a run, whole or not at all; what it tells.

    Raises:
        UserError: the folder is no run, or the page cannot be written.
    """
    facts = gather(run)
    replace_file(path, as_html(facts).encode())
    return facts


def as_html(facts: Facts) -> str:
    """The page."""
    sections = [
        _tiles(facts),
        _section("Curves", _charts(facts), "Dotted lines mark where the run was started again from a checkpoint."),
        _section("What it writes", _generations(facts)),
        _section("Where the time went", _table(["", "hours", "share"], time_table(facts))),
        _section("Data", _data(facts)),
        _section("Life of the run", _events(facts)),
        _section("Checkpoints", _checkpoints(facts)),
        _section(
            "Configuration",
            f"<details><summary>all settings</summary><pre>{_e(facts.config.to_yaml())}</pre></details>",
        ),
    ]
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    name = _e(facts.run.resolve().name)
    return _PAGE.format(title=name, state=_e(state(facts)), lead=_lead(facts), now=now, body="\n".join(sections))


def _e(value: Any) -> str:
    return html.escape(str(value))


def _lead(facts: Facts) -> str:
    model, training, data = facts.config.model, facts.config.training, facts.config.data
    return (
        "A training of a TidalTransformer: a language model that writes text block by block (a word, a number), "
        f"each block character by character from its end. Its {model.n_layers} layers of width {model.width} are "
        f"trained in {training.steps:,} steps of {training.batch_rows:,} rows; a row holds {data.row_tokens:,} "
        f"tokens of context and {data.row_chars:,} characters to write."
    )


def _tiles(facts: Facts) -> str:
    tiles = "".join(
        f'<div class="tile"><div class="what">{_e(what)}</div><div class="value">{_e(value)}</div>'
        f'<div class="note">{_e(note)}</div></div>'
        for what, value, note in headline(facts)
    )
    return f'<div class="tiles">{tiles}</div>'


def _section(title: str, content: str, note: str = "") -> str:
    remark = f"<p class=note>{_e(note)}</p>" if note else ""
    return f"<h2>{_e(title)}</h2>{remark}{content}"


def _charts(facts: Facts) -> str:
    drawn = ((chart, chart.draw(facts)) for chart in CHARTS)
    figures = [
        f"<figure><figcaption><b>{_e(chart.title)}.</b> {_e(chart.meaning)}</figcaption>"
        f'<img alt="{_e(chart.title)}" src="data:image/svg+xml;base64,{_base64(to_svg(figure))}"></figure>'
        for chart, figure in drawn
        if figure is not None
    ]
    return f'<div class="charts">{"".join(figures)}</div>' if figures else "<p>No figures yet.</p>"


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]], foot: str = "") -> str:
    rows = list(rows)
    if not rows:
        return "<p>None.</p>"
    shown = rows[:_MOST_ROWS]
    cells = "".join("<tr>" + "".join(f"<td>{_e(cell)}" for cell in row) for row in shown)
    more = f"<p class=note>… and {len(rows) - len(shown):,} more.</p>" if len(rows) > len(shown) else ""
    return f"<table><tr>{''.join(f'<th>{_e(h)}' for h in head)}{cells}</table>{more}{foot}"


def _data(facts: Facts) -> str:
    sources = [(s.source, f"{s.rows:,.0f}", f"{s.epochs:.3f}", f"{s.repeats:,.0f}") for s in facts.sources()]
    empty = facts.last("data/empty_rows")
    notes = [f"{empty:,.0f} of these rows were left empty."] if empty else []
    if facts.read:
        notes.append(
            f"After {facts.read.rows:,} rows the rolling hash is {facts.read.rolling_hash[:16]}…: another run that "
            "shows the same after as many rows has read just the same."
        )
    parts = [_table(["source", "rows read", "rounds (epochs)", "rows read again"], sources)]
    parts += [f"<p>{_e(note)}</p>" for note in notes]
    for kind, records in facts.left_out.items():
        head = list(dict.fromkeys(key for record in records for key in record))
        rows = [[record.get(key, "") for key in head] for record in records]
        parts.append(f"<h3>Left out: {_e(kind)}</h3>" + _table([h.replace("_", " ") for h in head], rows))
    if not facts.left_out:
        parts.append("<p>No shard or row was left out.</p>")
    return "".join(parts)


def _events(facts: Facts) -> str:
    if not facts.events:
        return "<p>Nothing was recorded.</p>"

    def details(event: dict[str, Any]) -> str:
        return ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in event.items() if k not in ("time", "step", "event"))

    rows = [
        (
            str(e["time"]).replace("T", " ").removesuffix("+00:00"),
            f"{e['step']:,}",
            e["event"].replace("_", " "),
            details(e),
        )
        for e in facts.events
    ]
    return _table(["time (UTC)", "step", "what", "details"], rows)


def _checkpoints(facts: Facts) -> str:
    def metric(metrics: dict[str, float], name: str) -> str:
        return f"{metrics[name]:.4f}" if name in metrics else ""

    names = ("validation/loss", "validation/bits_per_byte", facts.match)
    rows = [
        (f"{k.step:,}", f"{k.bytes / 1e6:,.1f}", *(metric(k.metrics, name) for name in names), ", ".join(k.marks))
        for k in facts.checkpoints
    ]
    head = ["step", "MB", *(name.removeprefix("validation/").replace("_", " ") for name in names), "the best by"]
    return _table(head, rows)


def _generations(facts: Facts) -> str:
    if not facts.generations:
        return "<p>Nothing was generated yet.</p>"
    best, latest = facts.best_generations, facts.generations[-1]
    parts = []
    if best is not None and best.step != latest.step:
        parts.append(_examples(best, f"At the best validation, after step {best.step:,}"))
    return "".join([*parts, _examples(latest, f"At the latest validation, after step {latest.step:,}")])


def _examples(found: Generations, title: str) -> str:
    rows = "".join(map(_example, found.examples)) or "<tr><td>none"
    head = "<tr><th>context<th>the model writes<th>what stands there<th>"
    return f'<h3>{_e(title)}</h3><table class="text">{head}{rows}</table>'


def _example(example: dict[str, Any]) -> str:
    right = example.get("right")
    verdict = "" if right is None else '<span class="good">right</span>' if right else '<span class="bad">wrong</span>'
    trace = "\n".join(example.get("trace", []))
    how = f"<details><summary>how it was written</summary><pre>{_e(trace)}</pre></details>" if trace else ""
    context, text, reference = (_e(example.get(key, "")) for key in ("prompt", "text", "reference"))
    return f"<tr><td><code>{context}</code><td><code>{text}</code>{how}<td><code>{reference}</code><td>{verdict}"


_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}: training report</title>
<meta name="viewport" content="width=device-width">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; color: #202020 }}
h1 {{ margin-bottom: 0 }} h2 {{ margin-top: 2em; border-bottom: 1px solid #ddd }} h3 {{ margin-bottom: .4em }}
table {{ border-collapse: collapse; max-width: 100% }} table.text {{ width: 100%; table-layout: fixed }}
td, th {{ border-bottom: 1px solid #ddd; padding: .3em .8em .3em .3em; text-align: left; vertical-align: top;
  overflow-wrap: anywhere }}
th {{ background: #f4f4f4 }} table.text th:last-child {{ width: 4em }} table.text th:nth-child(2) {{ width: 40% }}
.state {{ padding: .6em 1em; background: #f6f8fa; border-left: .4em solid #3b6fb6 }} .note, summary {{ color: #666 }}
.tiles {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(13em, 1fr)); gap: .8em }}
.tile {{ border: 1px solid #ddd; border-radius: .4em; padding: .6em .8em }}
.tile .what {{ color: #666; font-size: 13px }}
.value {{ font-size: 22px; font-weight: 600 }} .tile .note {{ font-size: 12px }}
.charts {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(30em, 1fr)); gap: 1.5em }}
figure {{ margin: 0; display: flex; flex-direction: column; justify-content: space-between }}
figcaption {{ font-size: 13px; color: #444 }} img {{ width: 100% }}
pre {{ white-space: pre-wrap; font-size: 12px; background: #f6f8fa; padding: .6em }} code {{ white-space: pre-wrap }}
.good {{ color: #1a7f37 }} .bad {{ color: #cf222e }}
</style>
<h1>{title}</h1><p class="note">Training report, written {now}</p>
<p class="state">{state}</p><p>{lead}</p>
{body}
</html>
"""
