"""Results to pages: DOCS/results/SET/EXPERIMENT.json and .png, and between two marks of DOCS/RESULTS.md the tables."""

from pathlib import Path

from data_pipeline.files import replace_file
from experiments.outcomes import Outcome, as_json, collect
from experiments.pictures import figure_of
from experiments.places import Places
from experiments.results import as_bytes
from experiments.sources import sources_hash
from experiments.spec import load_set
from experiments.tables import as_markdown, samples_as_markdown
from tidal_dist.errors import UserError
from tidal_dist.plots.canvas import save

PAGE = "RESULTS.md"
_SHOWN_MISSING = 5


def report(sets: Path, set_name: str, runs: Path, docs: Path, incomplete: bool) -> list[Path]:
    """Write all that is published of a set; the files that were written.

    Args:
        incomplete: also where results are missing, which is said there.

    Raises:
        UserError: results are missing, or the page has no place for the tables.
    """
    places, folder = Places(runs.resolve(), set_name, sources_hash()), docs / "results" / set_name
    outcomes = [collect(e, places, folder / f"{e.name}.json") for e in load_set(sets / set_name)]
    if not incomplete:
        _check_complete(outcomes, set_name)
    page = docs / PAGE
    text = _with_tables(page, set_name, _tables(outcomes, set_name))
    written = [path for outcome in outcomes if outcome.all_results for path in _write(outcome, folder, set_name)]
    replace_file(page, text.encode())
    return [*written, page]


def _check_complete(outcomes: list[Outcome], set_name: str) -> None:
    missing = [name for outcome in outcomes for name in outcome.missing]
    if missing:
        more = f"; and {len(missing) - _SHOWN_MISSING} more" if len(missing) > _SHOWN_MISSING else ""
        raise UserError(
            f"{set_name}: {len(missing)} results are missing: {'; '.join(missing[:_SHOWN_MISSING])}{more}; "
            f"`python -m experiments run {set_name}` makes them, --incomplete does without"
        )


def _write(outcome: Outcome, folder: Path, set_name: str) -> list[Path]:
    data, picture, texts = (
        folder / f"{outcome.experiment.name}{ending}" for ending in (".json", ".png", "-samples.md")
    )
    save(figure_of(outcome), picture)
    replace_file(data, as_bytes(as_json(outcome, set_name)))
    if not (page := samples_as_markdown(outcome)):
        return [data, picture]
    replace_file(texts, page.encode())
    return [data, picture, texts]


def _tables(outcomes: list[Outcome], set_name: str) -> str:
    head = (
        f"Made by `python -m experiments run {set_name}` and `python -m experiments report {set_name}`; "
        f"every curve and figure is in `docs/results/{set_name}/`. Training FLOPs and bytes are of one seed."
    )
    each = [as_markdown(outcome, f"results/{set_name}/{outcome.experiment.name}.png") for outcome in outcomes]
    return "\n\n".join([head, *each])


def _with_tables(page: Path, set_name: str, tables: str) -> str:
    """The page with other tables between the marks of a set.

    Raises:
        UserError: it cannot be read, or the marks are not there.
    """
    begin, end = f"<!-- experiments:{set_name} -->", f"<!-- /experiments:{set_name} -->"
    try:
        text = page.read_text("utf-8")
    except OSError as error:
        raise UserError(f"{page}: cannot read ({error.strerror}); --docs gives its folder") from None
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(end) < text.index(begin):
        raise UserError(f"{page}: lacks the lines {begin} and {end}, once each; write them where the tables belong")
    return text[: text.index(begin)] + f"{begin}\n\n{tables}\n\n" + text[text.index(end) :]
