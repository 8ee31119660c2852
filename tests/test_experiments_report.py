"""Results become tables, pictures and JSON; what is missing, or of something else, is never passed over in silence."""

import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from matplotlib.collections import PolyCollection

from experiments import report as reporting
from experiments.outcomes import Outcome, Spread, collect
from experiments.pictures import figure_of
from experiments.places import Places
from experiments.results import MOST_POINTS, Key, Result, as_bytes, thin, write_result
from experiments.spec import Experiment, Reaches, load_set
from experiments.tables import as_markdown
from tests.experimenting import fake_tasks, write_set
from tests.quick_work import result_of
from tests.test_plots import size_of
from tidal_dist.errors import UserError

SOURCES = "sources"
PAGE = "# Results\n\nbefore\n\n<!-- experiments:tiny -->\nold\n<!-- /experiments:tiny -->\n\nafter\n"
MATCHES = {1: 0.7, 2: 0.8, 3: 0.9}
Change = Callable[[dict[str, Any]], None]


@pytest.fixture(autouse=True)
def _fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "experiments.tasks", fake_tasks())
    monkeypatch.setattr(reporting, "sources_hash", lambda: SOURCES)


class Scene:
    """The tiny set in a folder, with results that nobody had to train for."""

    def __init__(self, folder: Path, **changes: Any):
        self.folder, self.runs, self.docs = folder, folder / "runs", folder / "docs"
        write_set(folder, **changes)
        self.docs.mkdir(exist_ok=True)
        (self.docs / "RESULTS.md").write_text(PAGE)

    @property
    def experiment(self) -> Experiment:
        return load_set(self.folder / "tiny")[0]

    @property
    def places(self) -> Places:
        return Places(self.runs, "tiny", SOURCES)

    def write(self, *seeds: int, sources: str = SOURCES, change: Change = bool) -> None:
        """Results of these seeds, those of `wide` a third as good."""
        for job in self.experiment.jobs:
            if job.seed in seeds:
                match = MATCHES[job.seed] / (1 if job.variant == "tidal" else 3)
                content = result_of({"config": job.key, "sources": sources, "commit": "abc1234"}, match)
                change(content)
                write_result(self.places.job(job), Result.of_json(content))

    def outcome(self) -> Outcome:
        return collect(self.experiment, self.places, self.docs / "results/tiny/sums.json")

    def report(self, incomplete: bool = False) -> str:
        reporting.report(self.folder, "tiny", self.runs, self.docs, incomplete)
        return (self.docs / "RESULTS.md").read_text("utf-8")


def cells(markdown: str) -> dict[str, list[str]]:
    """The first table: its rows by their first cell."""
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in markdown.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in rows}


def by_variant(markdown: str, variant: str) -> dict[str, str]:
    """A variant's cells by their headings, whichever way the table lies."""
    table = cells(markdown)
    if variant in table:
        return dict(zip(table["variant"], table[variant], strict=True))
    column = table["variant"].index(variant)
    return {heading: row[column] for heading, row in table.items() if heading != "---"}


def test_the_page_has_means_and_deviations_and_keeps_the_rest(tmp_path: Path) -> None:
    scene = Scene(tmp_path, reaches={"value": 0.75})
    scene.write(1, 2, 3)
    page = scene.report()
    assert page.startswith("# Results\n\nbefore\n\n<!-- experiments:tiny -->\n")
    assert page.endswith("<!-- /experiments:tiny -->\n\nafter\n")
    assert "old" not in page
    tidal, wide = by_variant(page, "tidal"), by_variant(page, "wide")
    assert tidal["length-2, exact match"] == "0.800 ± 0.100"
    assert tidal["length-10, exact match"] == "0.400 ± 0.050"
    assert tidal["text, bits per byte"] == "2.000 ± 0.000"
    assert (tidal["seeds"], tidal["parameters"]) == ("3", "1,000")
    assert (tidal["training FLOPs"], tidal["training bytes"]) == ("2.00e+12", "5,000")
    assert tidal["steps to exact match 0.75"] == "100 (2 of 3 seeds)"
    assert tidal["different samples seen by then, about"] == "375 (2 of 3 seeds)"
    assert wide["steps to exact match 0.75"] == "not reached"
    assert "2026-01-02; a CPU, 2 cores, no GPU; torch 2, Python 3; commit abc1234; 9 minutes of jobs" in page
    assert "`python -m experiments run tiny`" in page
    assert "](results/tiny/sums.png)" in page
    assert scene.report() == page
    assert size_of((tmp_path / "docs/results/tiny/sums.png").read_bytes())[0] == 1120


def test_a_clone_without_runs_reports_what_is_published(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.write(1, 2, 3)
    page = scene.report()
    published = (scene.docs / "results/tiny/sums.json").read_text()
    shutil.rmtree(scene.runs)
    assert scene.report() == page
    assert (scene.docs / "results/tiny/sums.json").read_text() == published
    write_set(tmp_path, options={"count": 299})
    with pytest.raises(UserError, match=r"sums/tidal seed 1 \(published with another configuration\)"):
        scene.report()


def test_missing_results_are_named_and_marked(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.write(1, 3)
    with pytest.raises(UserError) as caught:
        scene.report()
    assert "2 results are missing: sums/tidal seed 2 (no result); sums/wide seed 2 (no result); `python" in str(
        caught.value
    )
    assert (scene.docs / "RESULTS.md").read_text() == PAGE
    assert not (scene.docs / "results").exists()
    page = scene.report(incomplete=True)
    assert "**Incomplete.** Missing: sums/tidal seed 2 (no result); sums/wide seed 2 (no result)." in page
    assert by_variant(page, "tidal")["seeds"] == "2"
    content = json.loads((scene.docs / "results/tiny/sums.json").read_text())
    assert content["missing"] == ["sums/tidal seed 2 (no result)", "sums/wide seed 2 (no result)"]
    assert "INCOMPLETE" in texts_of(scene.outcome())


def test_nothing_at_all_is_said_too(tmp_path: Path) -> None:
    page = Scene(tmp_path).report(incomplete=True)
    assert "**Incomplete.**" in page
    assert "|" not in page


def test_results_of_other_sources_are_not_mixed_in(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.write(1, 2)
    scene.write(3, sources="others")
    with pytest.raises(UserError, match=r"sums/tidal seed 3 \(made with other sources \(commit abc1234\)\)"):
        scene.report()
    assert by_variant(scene.report(incomplete=True), "tidal")["length-2, exact match"] == "0.750 ± 0.071"


def test_a_run_that_went_wrong_is_not_averaged_away(tmp_path: Path) -> None:
    scene = Scene(tmp_path, table={"tests": ["length-*"], "metrics": ["exact_match", "bits_per_byte"]})

    def diverged(content: dict[str, Any]) -> None:
        content["figures"]["tests"]["length-2"]["bits_per_byte"] = "nan"
        content["curves"]["bits_per_byte"][1][1] = "inf"

    scene.write(1, 2)
    scene.write(3, change=diverged)
    figures = by_variant(scene.report(), "tidal")
    assert figures["length-2, bits per byte"] == "not finite"
    assert figures["length-10, bits per byte"] == "2.500 ± 0.000"
    assert list(figures)[-4:] == [f"length-{n}, {m}" for n in (2, 10) for m in ("exact match", "bits per byte")]
    json.loads((scene.docs / "results/tiny/sums.json").read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize("page", ["nothing", PAGE + PAGE, "<!-- /experiments:tiny -->\n<!-- experiments:tiny -->"])
def test_a_page_without_its_place_is_left_alone(tmp_path: Path, page: str) -> None:
    scene = Scene(tmp_path)
    scene.write(1, 2, 3)
    (scene.docs / "RESULTS.md").write_text(page)
    with pytest.raises(UserError, match=r"lacks the lines <!-- experiments:tiny -->"):
        scene.report()
    assert not (scene.docs / "results").exists()


def test_a_test_that_does_not_exist_is_named(tmp_path: Path) -> None:
    scene = Scene(tmp_path, plot={"kind": "bars", "tests": ["lenght-*"]})
    scene.write(1)
    with pytest.raises(UserError, match=r"no test 'lenght-\*'; there are: length-2, length-10, text"):
        scene.report(incomplete=True)


def texts_of(outcome: Outcome) -> str:
    figure = figure_of(outcome)
    figure.draw_without_rendering()
    return " ".join(text.get_text() for text in figure.findobj(lambda a: hasattr(a, "get_text")))


def test_curves_have_bands_over_seeds(tmp_path: Path) -> None:
    scene = Scene(tmp_path, plot={"kind": "curve", "x": "bytes"}, reaches={"value": 0.5})
    scene.write(1, 2, 3)
    axes = figure_of(scene.outcome()).axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    assert lines["tidal"].get_xydata().round(6).tolist() == [[2500, 0.4], [5000, 0.8]]
    assert len({line.get_color() for line in lines.values()}) == 3  # two, and the goal's
    band = next(c for c in axes.collections if isinstance(c, PolyCollection))
    heights = {round(y, 6) for path in band.get_paths() for x, y in path.vertices if x == 5000}
    assert heights == {0.7, 0.9}


def test_lines_that_are_drawn_have_colours_of_their_own_however_many_are_not(tmp_path: Path) -> None:
    variants = {name: {"model.width": 16} for name in ("tidal", *"bcdefg", "wide")}
    scene = Scene(tmp_path, variants=variants, plot={"kind": "curve", "variants": ["tidal", "wide"]})
    scene.write(1, 2, 3)
    axes = figure_of(scene.outcome()).axes[0]
    assert [line.get_label() for line in axes.lines] == ["tidal", "wide"]
    assert len({line.get_color() for line in axes.lines}) == 2


def test_over_tests_the_axis_is_their_numbers(tmp_path: Path) -> None:
    plot = {"kind": "by_test", "tests": ["length-*"], "label": "digits", "mark": 6}
    scene = Scene(tmp_path, plot=plot)
    scene.write(1, 2, 3)
    axes = figure_of(scene.outcome()).axes[0]
    assert axes.lines[0].get_xydata().round(6).tolist() == [[2, 0.8], [10, 0.4]]
    assert axes.get_xlabel() == "digits"
    assert "trained" in texts_of(scene.outcome())


def test_tests_without_numbers_stand_side_by_side(tmp_path: Path) -> None:
    scene = Scene(tmp_path, plot={"kind": "by_test", "metric": "bits_per_byte", "variants": ["wide"]})
    scene.write(1, 2, 3)
    axes = figure_of(scene.outcome()).axes[0]
    assert [line.get_label() for line in axes.lines] == ["wide"]
    assert axes.lines[0].get_xydata().tolist() == [[0, 1.5], [1, 2.5], [2, 2]]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["length-2", "length-10", "text"]


def test_bars_are_as_long_as_means(tmp_path: Path) -> None:
    scene = Scene(tmp_path, plot={"kind": "bars", "tests": ["length-2"]})
    scene.write(1, 2, 3)
    axes = figure_of(scene.outcome()).axes[0]
    assert [round(bar.get_width(), 6) for bar in axes.patches] == [0.8, round(0.8 / 3, 6)]
    assert {"0.800", "0.267"} <= set(texts_of(scene.outcome()).split())


def test_a_variant_without_results_is_told_by_a_dash(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.write(1, 2, 3)
    shutil.rmtree(scene.runs / "tiny/sums/wide")
    outcome = scene.outcome()
    assert by_variant(as_markdown(outcome, "p"), "wide")["parameters"] == "–"
    assert "wide" not in texts_of(outcome).split()


def test_curves_are_thinned_and_keep_the_point_that_counts() -> None:
    points = [(step, 1.0 if step >= 777 else 0.0) for step in range(1, 1001)]
    thinned = thin(points, 777)
    assert len(thinned) <= MOST_POINTS
    assert {points[0], points[-1], (777, 1.0)} <= set(thinned)
    assert thin(points[:MOST_POINTS]) == points[:MOST_POINTS]
    steps = [step for step, _ in thinned if step != 777]
    assert max(b - a for a, b in pairwise(steps)) <= 18
    result = Result(Key("c", "s"), {}, {"exact_match": points}, {}, {})
    reaches = Reaches(value=0.99)
    assert result.thinned(reaches).reached(reaches) == result.reached(reaches) == 777


@pytest.mark.parametrize(
    ("documents", "distinct", "step", "seen"),
    [(1000, 1000, 50, 250), (1000, 500, 50, 500 * (1 - 0.75**2)), (1000, 500, 200, 500), (1000, 500, 900, 500)],
)
def test_how_many_different_samples_were_seen(documents: int, distinct: int, step: int, seen: float) -> None:
    data = {"documents": documents, "distinct": distinct, "documents_per_step": 5.0}
    assert Result(Key("c", "s"), {}, {}, data, {}).distinct_until(step) == pytest.approx(seen)


def test_less_is_better_in_bits() -> None:
    assert [Reaches(metric="bits_per_byte", value=2.0).holds(v) for v in (1.9, 2.0, 2.1, math.nan)] == [1, 1, 0, 0]
    assert [Reaches(value=0.9).holds(v) for v in (0.8, 0.9, 1.0)] == [0, 1, 1]


def test_one_seed_has_no_spread() -> None:
    assert Spread.of([]) is None
    assert Spread.of([2.0]) == Spread(2.0, 0.0, 1)
    assert Spread.of([1.0, 3.0]) == Spread(2.0, math.sqrt(2.0), 2)


def test_json_for_people() -> None:
    content = {"a": [[1, 0.5], [2, -1e-07]], "b": ["x", "y"], "c": []}
    text = as_bytes(content).decode()
    assert json.loads(text) == content
    assert re.findall(r"\[.*\]", text) == ["[ 1, 0.5 ]", "[ 2, -1e-07 ]", "[]"]


def test_texts_that_models_write_stand_side_by_side(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.write(1, 2, 3)
    scene.report()
    assert not list((tmp_path / "docs/results/tiny").glob("*.md"))
    shown = {"context": "the tide `runs`", "reference": " out\n", "text": " nan"}
    scene.write(1, 2, 3, change=lambda content: content.update(samples=[shown]))
    scene.report()
    page = (tmp_path / "docs/results/tiny/sums-samples.md").read_text("utf-8")
    assert 'after: `"the tide ˋrunsˋ"`' in page
    assert 'there: `" out\\n"`' in page
    assert '**tidal**: `" nan"`' in page
    assert '**wide**: `" nan"`' in page
