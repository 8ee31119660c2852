"""The findings as a table for people, and as an object."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from tidal_dist.cluster.preflight.rows import EVERYWHERE, Row
from tidal_dist.cluster.preflight.run import Report

_SHOWN_HOSTS = 3
_UNKNOWN_KEY = "ssh-keyscan"
_MARKS = {"ok": "ok", "warn": "WARN", "fail": "FAIL"}
# Figures that are well are one line for all hosts: of the first kind the least and the most, of the second the least.
_RANGES, _LEAST = ("ssh", "clock"), ("disks", "memory")


def as_object(report: Report) -> dict[str, Any]:
    """For programs."""
    return {
        "go": report.go,
        "hosts": report.hosts,
        "rows": [asdict(row) for row in report.rows],
        "measured": report.measured,
        "written": report.written,
        "seconds": round(report.seconds, 1),
    }


def as_text(report: Report) -> str:
    """For people: rows alike on several hosts are one line; behind them remedies, and the verdict."""
    lines = _table(_merged(report))
    lines += [f"wrote {path}" for path in report.written]
    unknown = [row.host for row in report.failed if row.check == "ssh" and _UNKNOWN_KEY in row.remedy]
    if unknown:
        lines += ["", "host keys to look at, then add:", f"  ssh-keyscan -H {' '.join(unknown)} >> ~/.ssh/known_hosts"]
    warnings = sum(row.status == "warn" for row in report.rows)
    count = f"{len(report.hosts)} hosts, {len(report.failed)} failures, {warnings} warnings, {report.seconds:.0f} s"
    return "\n".join([*lines, "", f"{'go' if report.go else 'no-go'}: {count}"])


def _merged(report: Report) -> list[tuple[str, Row]]:
    """Rows with the hosts that they are about; of figures that are well on many hosts, the worst alone."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in report.rows:
        is_figure = row.check in _RANGES + _LEAST and row.status == "ok"
        key = (row.check, row.status, "" if is_figure else row.what, "" if is_figure else _without(row))
        groups.setdefault(key, []).append(row)
    checks = list(dict.fromkeys(row.check for row in report.rows))
    ordered = sorted(groups.items(), key=lambda item: checks.index(item[0][0]))
    return [(_hosts([row.host for row in rows], report.hosts), _worst(rows)) for _, rows in ordered]


def _without(row: Row) -> str:
    """The remedy with no host in it, so that rows of several hosts are alike."""
    return row.remedy.replace(row.host, "HOST")


def _worst(rows: list[Row]) -> Row:
    """What is said of several rows, which are alike but for their figures."""
    row, whats = rows[0], sorted({row.what for row in rows}, key=_number)
    if len(whats) == 1:
        return Row(row.host, row.check, row.status, row.what, _without(row) if len(rows) > 1 else row.remedy)
    what = f"{whats[0]} .. {whats[-1]}" if row.check in _RANGES else f"{whats[0]}, the least of {len(rows)}"
    return Row(row.host, row.check, row.status, what)


def _number(what: str) -> float:
    """The figure that a text begins with, `12.5 GB` say; 0 where it is none."""
    number, unit, *_ = [*what.split(maxsplit=2), "", ""]
    try:
        return float(number.replace(",", "")) * (1e3 if unit == "GB" else 1.0)
    except ValueError:
        return 0.0


def _hosts(names: list[str], everybody: Sequence[str]) -> str:
    names = list(dict.fromkeys(names))
    if len(everybody) > 1 and set(names) == set(everybody):
        return EVERYWHERE
    if len(names) <= _SHOWN_HOSTS:
        return ", ".join(names)
    return f"{', '.join(names[: _SHOWN_HOSTS - 1])} and {len(names) - _SHOWN_HOSTS + 1} more"


def _table(rows: list[tuple[str, Row]]) -> list[str]:
    head = ("check", "", "hosts", "found")
    cells = [(row.check, _MARKS[row.status], hosts, row.what) for hosts, row in rows]
    widths = [max(len(line[column]) for line in [head, *cells]) for column in range(3)]
    lines = [_line(head, widths)]
    for (_, row), line in zip(rows, cells, strict=True):
        lines.append(_line(line, widths))
        if row.remedy:
            lines.append(f"{'':{widths[0] + widths[1] + 4}}-> {row.remedy}")
    return lines


def _line(cells: tuple[str, str, str, str], widths: list[int]) -> str:
    return "  ".join([*(f"{cell:{width}}" for cell, width in zip(cells, widths, strict=False)), cells[3]]).rstrip()
