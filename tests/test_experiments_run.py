"""Jobs become results: each once, also after failures, interrupts, and changes of what they depend on."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from data_pipeline.preparing.locks import exclusive
from experiments.places import Places
from experiments.results import Key, standing
from experiments.runner import run
from experiments.spec import load_set
from tests.experimenting import fake_tasks, work, write_set
from tidal_dist.errors import UserError

QUICK = work(Path(__file__).with_name("quick_work.py"))


@pytest.fixture(autouse=True)
def _tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "experiments.tasks", fake_tasks())


class Scene:
    """The tiny set in a folder, run without training."""

    def __init__(self, folder: Path):
        self.folder, self.runs, self.lines = folder, folder / "runs", list[str]()

    def run(
        self, sources: str = "sources", redo: bool = False, say: Callable[[str], None] | None = None, **changes: Any
    ) -> list[str]:
        self.lines.clear()
        jobs = load_set(write_set(self.folder, **changes) / "tiny")[0].jobs
        return run(jobs, Places(self.runs, "tiny", sources), 2, redo, say or self.lines.append, QUICK)

    def calls(self) -> list[str]:
        path = self.runs / "tiny" / "calls.txt"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return sorted(lines)

    def results(self) -> list[str]:
        return sorted(
            p.relative_to(self.runs / "tiny" / "sums").parent.as_posix() for p in self.runs.rglob("result.json")
        )


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


EVERY = [f"{variant}/seed-{seed}" for variant in ("tidal", "wide") for seed in (1, 2, 3)]


def test_every_job_is_done_once_and_each_corpus_prepared_once(scene: Scene) -> None:
    assert scene.run() == []
    assert scene.results() == EVERY
    calls = scene.calls()
    assert [c for c in calls if c.startswith("data")] == [f"data sums/tidal seed {n}" for n in (1, 2, 3)]
    assert len(calls) == 9
    assert scene.lines[0].splitlines()[0] == "tiny: 6 jobs, 0 done, 6 to do, 2 at a time"
    assert all(f"length-2 0.{n}00" in "".join(scene.lines) for n in (1, 2, 3))
    assert scene.lines[-1].endswith("; none left")
    assert len(scene.lines) == 7
    assert scene.run() == []
    assert scene.lines == [
        "tiny: 6 jobs, 6 done, 0 to do, 2 at a time\n"
        "  sums  tidal  seeds: 1 done, 2 done, 3 done\n"
        "  sums  wide   seeds: 1 done, 2 done, 3 done"
    ]
    assert scene.calls() == []


def test_a_failed_job_is_a_line_and_the_others_go_on(scene: Scene) -> None:
    variants: dict[str, Any] = {"tidal": {"options.behave": "job fails"}, "wide": {}}
    assert sorted(scene.run(variants=variants)) == [f"sums/tidal seed {n}" for n in (1, 2, 3)]
    assert scene.results() == EVERY[3:]
    failure = next(line for line in scene.lines if line.startswith("sums/tidal seed 1"))
    log = scene.runs / "tiny/sums/tidal/seed-1/log.txt"
    assert failure == f"sums/tidal seed 1: failed, exit code 2 (it is a test); see {log}"
    scene.calls()
    scene.run(variants=variants)
    assert scene.calls() == [f"job sums/tidal seed {n}" for n in (1, 2, 3)]


def test_jobs_whose_corpus_fails_fail(scene: Scene) -> None:
    variants: dict[str, Any] = {"tidal": {"options.behave": "data fails"}, "wide": {}}
    assert sorted(scene.run(variants=variants)) == [f"sums/tidal seed {n}" for n in (1, 2, 3)]
    assert scene.results() == EVERY[3:]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"sources": "others"}, "made with other sources (commit "),
        ({"options": {"count": 299}}, "made with another configuration"),
    ],
)
def test_a_result_of_something_else_is_refused_until_told(scene: Scene, change: dict[str, Any], reason: str) -> None:
    scene.run()
    before = (scene.runs / "tiny/sums/tidal/seed-1/result.json").read_text()
    scene.calls()
    with pytest.raises(UserError) as caught:
        scene.run(**change)
    assert f"6 of 6 jobs cannot be counted (sums/tidal seed 1: {reason}" in str(caught.value)
    assert "--redo" in str(caught.value)
    assert scene.calls() == []
    assert (scene.runs / "tiny/sums/tidal/seed-1/result.json").read_text() == before
    assert scene.run(redo=True, **change) == []
    assert len(scene.calls()) == 9
    assert (scene.runs / "tiny/sums/tidal/seed-1/result.json").read_text() != before


def test_redo_keeps_what_counts(scene: Scene) -> None:
    scene.run()
    scene.calls()
    variants: dict[str, Any] = {"tidal": {}, "wide": {"model.width": 64}}
    assert scene.run(redo=True, variants=variants) == []
    assert scene.calls() == [f"job sums/wide seed {n}" for n in (1, 2, 3)]


def test_what_was_begun_with_other_sources_is_not_gone_on_with(scene: Scene) -> None:
    scene.run(variants={"tidal": {"options.behave": "job fails"}})
    with pytest.raises(UserError, match=r"sums/tidal seed 1: begun with other sources"):
        scene.run(sources="others", variants={"tidal": {"options.behave": "job fails"}})


@pytest.mark.parametrize("torn", ["", "{", "[]", '{"format": 0}', '{"format": 1, "key": {"config": "x"}}'])
def test_a_result_that_cannot_be_read_does_not_count(tmp_path: Path, torn: str) -> None:
    (tmp_path / "result.json").write_text(torn)
    found = standing(tmp_path, Key("config", "sources"))
    assert found.result is None
    assert "cannot be read" in found.refused


def test_an_interrupt_leaves_no_process(scene: Scene) -> None:
    """One job waits for ever; when the others are done, the interrupt comes."""
    variants: dict[str, Any] = {"slow": {"options.behave": "waits"}, "tidal": {}}

    def interrupt(line: str) -> None:
        if "none left" not in line and line.startswith("sums/tidal"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scene.run(say=interrupt, variants=variants, seeds=[1])
    alive = [p for p in psutil.process_iter() if str(scene.runs) in " ".join(_arguments(p))]
    assert alive == []
    with exclusive(scene.runs / "lock", "runs"):
        pass


def _arguments(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_two_do_not_run_in_one_folder(scene: Scene) -> None:
    with exclusive(scene.runs / "lock", "runs"), pytest.raises(UserError, match="is at it"):
        scene.run()


def test_the_key_of_a_result_is_written_before_it_is_begun(scene: Scene) -> None:
    scene.run(variants={"tidal": {"options.behave": "job fails"}}, seeds=[4])
    job = json.loads((scene.runs / "tiny/sums/tidal/seed-4/job.json").read_text())
    assert (job["key"]["sources"], job["seed"], job["options"]["count"]) == ("sources", 4, 300)
