"""What an experiment is, which programs its results depend on, and the command line."""

import sys
from pathlib import Path
from typing import Any

import pytest

from experiments import sources
from experiments.__main__ import main
from experiments.spec import Experiment, Job, load_experiment, load_set
from tests.experimenting import SPEC, fake_tasks, write_set
from tests.launching import error_lines
from tidal_dist.errors import ConfigError

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "experiments.tasks", fake_tasks())


def loaded(folder: Path, **changes: Any) -> Experiment:
    return load_set(write_set(folder, **changes) / "tiny")[0]


def job_of(folder: Path, variant: str = "tidal", seed: int = 1, **changes: Any) -> Job:
    return next(j for j in loaded(folder, **changes).jobs if (j.variant, j.seed) == (variant, seed))


def base(**sections: dict[str, Any]) -> dict[str, Any]:
    return {name: SPEC["base"].get(name, {}) | sections.get(name, {}) for name in SPEC["base"] | sections}


def test_a_job_for_each_variant_and_seed(tmp_path: Path) -> None:
    jobs = loaded(tmp_path).jobs
    assert [(j.variant, j.seed) for j in jobs] == [(v, s) for v in ("tidal", "wide") for s in (1, 2, 3)]
    assert [j.config.model.width for j in jobs] == [16, 16, 16, 32, 32, 32]
    assert all(j.config.training.seed == j.config.data.seed == j.seed for j in jobs)
    assert jobs[4].name == "sums/wide seed 2"


def test_small_jobs_stand_side_by_side_where_nothing_else_is_said(tmp_path: Path) -> None:
    config = job_of(tmp_path).config
    assert (config.training.zero_stage, config.training.threads_per_rank) == (0, 1)
    assert not config.monitor.report
    said = job_of(tmp_path, base=base(training={"zero_stage": 1}, monitor={"report": True})).config
    assert said.training.zero_stage == 1
    assert said.monitor.report


def test_a_variant_changes_options_and_nothing_of_another(tmp_path: Path) -> None:
    variants = {"tidal": {}, "few": {"options.count": 20, "validation.rows": 2}}
    few, tidal = (job_of(tmp_path, name, variants=variants) for name in ("few", "tidal"))
    assert (few.options, tidal.options) == ({"count": 20}, {"count": 300})
    assert (few.config.validation.rows, tidal.config.validation.rows) == (2, 4)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"titel": "x"}, ["unknown key titel", "did you mean title?"]),
        ({"plot": {"kind": "pie"}}, ["plot.kind='pie'", "'curve'"]),
        ({"plot": {"kind": "bars", "tests": []}}, ["plot.tests"]),
        ({"plot": {"kind": "bars", "variants": ["tydal"]}}, ["plot.variants", "'tydal'", "did you mean tidal?"]),
        ({"seeds": "1, 2"}, ["seeds='1, 2'", "valid list"]),
        ({"seeds": [1, 1]}, ["seeds", "must differ"]),
        ({"reaches": {"value": "high"}}, ["reaches.value='high'"]),
        ({"task": "tiny_sum"}, ["no task 'tiny_sum'", "did you mean tiny_sums?"]),
        ({"options": {"cuont": 1}}, ["variant tidal, options", "unknown key cuont", "did you mean count?"]),
        ({"options": {"count": "1"}}, ["options", "count='1'"]),
        ({"variants": {}}, ["variants"]),
        ({"variants": {"a/b": {}}}, ["'a/b' is no name"]),
        ({"variants": {"v": {"model": {"width": 8}}}}, ["variant v: model: write section.key"]),
        ({"variants": {"v": {"model.widht": 8}}}, ["variant v", "unknown key model.widht", "did you mean width?"]),
        ({"variants": {"v": {"model.width.x": 8}}}, ["variant v", "width is a value (16), not a section"]),
        ({"variants": {"v": {"training.seed": 8}}}, ["variant v", "training.seed is set by the experiment's jobs"]),
        ({"base": base(data={"shards": "x"})}, ["data.shards is set by the experiment's jobs"]),
        ({"base": base() | {"run_dir": "x"}}, ["run_dir is set by the experiment's jobs"]),
        ({"base": base() | {"modle": {}}}, ["unknown key modle", "did you mean model?"]),
        ({"base": {}}, ["data.row_tokens is missing"]),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, changes: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, **changes)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert all(part in message for part in ["sums.yaml", *parts]), message


def test_the_key_is_of_what_the_result_depends_on(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    assert job.key == job_of(tmp_path, title="Another", plot={"kind": "bars"}, seeds=[1], reaches={"value": 0.9}).key
    others = [
        job_of(tmp_path, "wide"),
        job_of(tmp_path, seed=2),
        job_of(tmp_path, options={"count": 301}),
        job_of(tmp_path, base=base(training={"beta1": 0.8})),
    ]
    assert len({job.key, *(other.key for other in others)}) == 5


def test_variants_share_a_corpus_where_they_can(tmp_path: Path) -> None:
    variants = {"tidal": {}, "wide": {"model.width": 32}, "bytes": {"tokenizer.vocab_size": 265}}
    jobs = {(j.variant, j.seed): j.data_key for j in loaded(tmp_path, variants=variants).jobs}
    assert jobs["tidal", 1] == jobs["wide", 1]
    assert len({jobs["tidal", 1], jobs["tidal", 2], jobs["bytes", 1]}) == 3


@pytest.mark.parametrize("path", sorted(ROOT.glob("experiments/*/*.yaml")), ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_the_shipped_experiments(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "experiments.tasks")
    experiment = load_experiment(path)
    assert len(experiment.spec.seeds) >= 3


def test_comments_do_not_make_other_sources() -> None:
    source = '"""What."""\n\ndef f(x):\n    """Of x."""\n    # why\n    return x + 1  # so\n'
    bare = "def f(x):\n    return x + 1\n"
    assert sources.meaning_of(source) == sources.meaning_of(bare) == bare.rstrip()
    assert sources.meaning_of('x = "# no comment"\n') == 'x = "# no comment"'
    assert sources.meaning_of(source) != sources.meaning_of(source.replace("1", "2"))


def test_sources_are_those_that_results_depend_on(tmp_path: Path) -> None:
    files = {path.relative_to(ROOT).as_posix() for path in sources.source_files(ROOT)}
    assert {"tidal_dist/model/attention.py", "data_pipeline/layout.py", "launch/train.py"} <= files
    assert not [name for name in files if "plots" in name or "doctor" in name or "experiments/tables" in name]
    for name in [*sources._MAKE_RESULTS, *sources._NEVER_IN_A_RESULT]:
        path = tmp_path / name
        path = path if path.suffix else path / "a.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x = 1\n")
    before = sources.sources_hash.__wrapped__(tmp_path)
    (tmp_path / "tidal_dist/plots/a.py").write_text("x = 2\n")
    assert sources.sources_hash.__wrapped__(tmp_path) == before
    (tmp_path / "tidal_dist/a.py").write_text("x = 2\n")
    assert sources.sources_hash.__wrapped__(tmp_path) != before


def test_what_never_makes_a_result_is_there() -> None:
    assert [name for name in sources._NEVER_IN_A_RESULT if not (ROOT / name).exists()] == []


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["run", "tiny", "--variant", "tidel"], ["--variant: no variant 'tidel'", "did you mean tidal?"]),
        (["run", "tiny", "--only", "sum"], ["--only: no experiment 'sum'", "did you mean sums?"]),
        (["run", "tiny", "--jobs", "0"], ["--jobs 0"]),
        (["run", "small"], ["small: no experiments", "sets beside it: tiny"]),
        (["report", "tiny"], ["6 results are missing: sums/tidal seed 1 (no result);", "and 1 more", "--incomplete"]),
        (["report", "tiny", "--incomplete"], ["RESULTS.md: cannot read"]),
    ],
)
def test_a_mistake_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], parts: list[str]
) -> None:
    folders = ["--sets", str(write_set(tmp_path)), "--runs", str(tmp_path / "runs")]
    folders += ["--docs", str(tmp_path)] if arguments[0] == "report" else []
    assert main([*arguments, *folders]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == len(error_lines(said.err)) == 1, said.err
    assert all(part in said.err for part in parts), said.err
