"""Verdicts, and how they are told: text, JSON, HTML."""

import html
import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from tidal_dist.inspection.report import without_nan

SUSPECTS = {
    1: "positions, block order",
    2: "re-tokenising",
    3: "attention, encodings, cache",
    4: "preprocessing",
    5: "control flow of generation",
    6: "loss falls, text is bad",
    7: "saving, loading",
    8: "inference code, precision",
    9: "batches, packing, ranks",
    10: "labels, loss, gradients",
}


@dataclass(frozen=True)
class Finding:
    """What a check measured: it holds where `figure` <= `bound`.

    Attributes:
        unit: what the figure counts or measures. where: of a failure: document, block, position and both values.
        more: further figures, for reading.
    """

    figure: float
    bound: float
    unit: str
    where: str = ""
    more: str = ""


@dataclass(frozen=True)
class Check:
    """A check with its verdict. `remedy`: what to do if it fails."""

    suspect: int
    name: str
    verdict: Literal["holds", "fails", "not run"]
    figure: float
    bound: float
    unit: str
    where: str
    more: str
    remedy: str


@dataclass(frozen=True)
class Report:
    """All checks, in the order in which one may cause the failure of those after it."""

    path: str
    shards: str
    split: str
    checks: list[Check]
    notes: list[str]
    seconds: float

    @property
    def holds(self) -> bool:
        """Whether every check was run and holds."""
        return all(check.verdict == "holds" for check in self.checks)

    @property
    def culprit(self) -> Check | None:
        """The first check that fails: those after it may fail only because of it.

        A check that could not be made is one only where no other fails: what broke it has been measured elsewhere.
        """
        failing = [check for check in self.checks if check.verdict == "fails"]
        return next((check for check in failing if not math.isnan(check.figure)), failing[0] if failing else None)

    def as_object(self) -> dict[str, Any]:
        """What `--json` prints; figures that are no finite number are null."""
        checks = [without_nan(asdict(check)) for check in self.checks]
        suspects = [
            {"number": n, "name": name, "verdict": self.verdict(n), "checks": [c for c in checks if c["suspect"] == n]}
            for n, name in SUSPECTS.items()
        ]
        culprit = self.culprit
        return {
            "path": self.path,
            "shards": self.shards,
            "split": self.split,
            "holds": self.holds,
            "suspect": culprit.suspect if culprit else None,
            "check": culprit.name if culprit else None,
            "suspects": suspects,
            "notes": self.notes,
            "seconds": round(self.seconds, 2),
        }

    def verdict(self, suspect: int) -> str:
        """Of a whole group: "fails" if any check does, "not run" if any was not, else "holds"."""
        verdicts = {check.verdict for check in self.checks if check.suspect == suspect}
        return next((v for v in ("fails", "not run") if v in verdicts), "holds")

    def as_text(self) -> str:
        """A table of all checks, then the culprit: where, and what to do; one line where they could not be run."""
        culprit = self.culprit
        if culprit is not None and any(check.verdict == "not run" for check in self.checks):
            name = f"suspect {culprit.suspect}, {SUSPECTS[culprit.suspect]}: {culprit.name}"
            return f"{name}: {culprit.where}; {culprit.remedy} ({'; '.join(self.notes)})"
        lines = [f"{self.path} on {self.shards} ({self.split}), {self.seconds:.1f} s"]
        for n, name in SUSPECTS.items():
            lines.append(f"{n:>2}  {name}: {self.verdict(n)}")
            lines += [_line(check) for check in self.checks if check.suspect == n]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes), *self._conclusion()])

    def _conclusion(self) -> list[str]:
        culprit = self.culprit
        if culprit is None:
            return ["all checks hold"]
        lines = [
            f"suspect {culprit.suspect}, {SUSPECTS[culprit.suspect]}: {culprit.name}",
            f"  where: {culprit.where}",
            f"  what to do: {culprit.remedy}",
        ]
        others = sorted({c.suspect for c in self.checks if c.verdict == "fails"} - {culprit.suspect})
        if others:
            lines.append(f"  failing too, perhaps because of it: suspects {', '.join(map(str, others))}")
        return lines

    def as_html(self, pictures: dict[str, str]) -> str:
        """One page that needs nothing else. pictures: caption -> PNG in base64."""
        rows = "".join(_table_rows(self, n) for n in SUSPECTS)
        head = html.escape(f"{self.path} on {self.shards}")
        state = "good" if self.holds else "bad"
        conclusion = "<br>".join(html.escape(line.strip()) for line in [*self.notes, *self._conclusion()])
        images = "".join(
            f'<figure><img src="data:image/png;base64,{data}"><figcaption>{html.escape(caption)}</figcaption></figure>'
            for caption, data in pictures.items()
        )
        return _PAGE.format(head=head, state=state, conclusion=conclusion, rows=rows, images=images)


_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>tidal doctor</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; color: #202020 }}
table {{ border-collapse: collapse; width: 100% }}
td, th {{ border-bottom: 1px solid #ddd; padding: .3em .6em; text-align: left; vertical-align: top }}
th {{ background: #f4f4f4 }} .number {{ text-align: right; font-family: monospace; white-space: nowrap }}
.holds, .good {{ color: #1a7f37 }} .fails, .bad {{ color: #cf222e; font-weight: bold }} .not {{ color: #9a6700 }}
.conclusion {{ padding: .8em 1em; background: #f6f8fa; border-left: .4em solid }} img {{ max-width: 100% }}
small {{ color: #666 }} figure {{ margin: 2em 0 }}
</style>
<h1>tidal doctor</h1><p>{head}</p><p class="conclusion {state}">{conclusion}</p>
<table><tr><th>check<th>verdict<th class="number">figure<th class="number">bound<th>measured</tr>{rows}</table>
{images}</html>
"""


def _table_rows(report: Report, suspect: int) -> str:
    verdict = report.verdict(suspect)
    title = f'<tr><th colspan="5">{suspect}. {html.escape(SUSPECTS[suspect])}: <span class="{verdict}">{verdict}</span>'
    rows = [title]
    for check in report.checks:
        if check.suspect == suspect:
            text = [check.unit, check.more, *([check.where, check.remedy] if check.verdict == "fails" else [])]
            cells = "<br>".join(html.escape(t) for t in text if t)
            rows.append(
                f'<tr><td>{html.escape(check.name)}<td class="{check.verdict}">{check.verdict}'
                f'<td class="number">{check.figure:.3g}<td class="number">{check.bound:.3g}<td><small>{cells}</small>'
            )
    return "</tr>".join(rows)


def _line(check: Check) -> str:
    mark = "ok" if check.verdict == "holds" else "FAILS"
    line = f"      {mark:5} {check.name}: {check.figure:.3g} {check.unit} (bound {check.bound:.3g})"
    return f"{line}; {check.more}" if check.more else line
