"""Jobs to processes to results: so many at a time, each corpus prepared once, what is there already not again."""

import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

from data_pipeline.preparing.locks import exclusive
from experiments.places import CONFIG, CORPUS, DATA, HELD_OUT, LOG, RUN, TRAIN, Places
from experiments.processes import Process, stop_all, wait_a_little, work_command
from experiments.results import Key, Result, standing, write_job
from experiments.sources import commit
from experiments.spec import Job
from tidal_dist.config import Config, CorpusConfig
from tidal_dist.errors import UserError

Say = Callable[[str], None]
Command = Callable[[str, Path], list[str]]
_SHOWN_REFUSALS = 3


@dataclass(frozen=True)
class Planned:
    """A job in its folder. `refused`: why what is there is no result of it."""

    job: Job
    key: Key
    folder: Path
    data: Path
    result: Result | None = None
    refused: str = ""


def plan(jobs: Sequence[Job], places: Places) -> list[Planned]:
    """How far each job is."""
    now = commit()
    planned = []
    for job in jobs:
        key, folder = Key(job.key, places.sources, now), places.job(job)
        found = standing(folder, key)
        planned.append(Planned(job, key, folder, places.data(job), found.result, found.refused))
    return planned


def run(
    jobs: Sequence[Job], places: Places, at_once: int, redo: bool, say: Say, command: Command = work_command
) -> list[str]:
    """Do all jobs that have no result.

    Args:
        at_once: how many processes. redo: throw away what belongs to other sources or another configuration.
        command: what does a piece of work.

    Returns:
        The names of those that failed.

    Raises:
        UserError: there are results of other sources or another configuration, or another process runs jobs here.
    """
    with exclusive(places.lock, str(places.runs)):
        planned = plan(jobs, places)
        if not redo:
            check_refused(planned)
        say(job_table(places.set_name, planned, at_once))
        for each in planned:
            if each.refused:
                say(f"{each.job.name}: {each.refused}; made anew")
                shutil.rmtree(each.folder)
        return _Runner([each for each in planned if not each.result], at_once, say, command).run()


def check_refused(planned: Sequence[Planned]) -> None:
    """Raises UserError, with the way out, where there are results that do not count."""
    refused = [each for each in planned if each.refused]
    if refused:
        shown = [f"{each.job.name}: {each.refused}" for each in refused[:_SHOWN_REFUSALS]]
        more = [f"{len(refused) - len(shown)} more"] if len(refused) > len(shown) else []
        raise UserError(
            f"{len(refused)} of {len(planned)} jobs cannot be counted ({'; '.join(shown + more)}); "
            "give --redo to make these anew, or --runs for another folder"
        )


def job_table(set_name: str, planned: Sequence[Planned], at_once: int) -> str:
    """What is done and what is to do, a line for each variant."""
    done = sum(each.result is not None for each in planned)
    lines = [f"{set_name}: {len(planned)} jobs, {done} done, {len(planned) - done} to do, {at_once} at a time"]
    variants = list(dict.fromkeys((each.job.experiment, each.job.variant) for each in planned))
    widths = [max((len(names[i]) for names in variants), default=0) for i in (0, 1)]
    for names in variants:
        of_it = [each for each in planned if (each.job.experiment, each.job.variant) == names]
        shown = ", ".join(f"{each.job.seed} {_state(each)}" for each in of_it)
        lines.append(f"  {names[0]:{widths[0]}}  {names[1]:{widths[1]}}  seeds: {shown}")
    return "\n".join(lines)


def _state(planned: Planned) -> str:
    if planned.refused:
        return "to redo"
    return "done" if planned.result else "begun" if planned.folder.exists() else "to do"


@dataclass
class _Work:
    """A process at a job, or at the corpus of one."""

    planned: Planned
    process: Process
    prepares: bool


@dataclass
class _Runner:
    """Starts what can be started, looks at what has ended."""

    todo: list[Planned]
    at_once: int
    say: Say
    command: Command
    running: list[_Work] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    seconds: list[tuple[str, float]] = field(default_factory=list)  # of finished jobs, by experiment

    def run(self) -> list[str]:
        """Until nothing is left; the names of those that failed."""
        try:
            while self.todo or self.running:
                while len(self.running) < self.at_once and self._start_one():
                    pass
                wait_a_little()
                for work in list(self.running):
                    if (code := work.process.ended()) is not None:
                        self.running.remove(work)
                        self._finish(work, code)
        finally:
            stop_all(work.process for work in self.running)
        return self.failed

    def _start_one(self) -> bool:
        """Start the first job whose corpus is there, or the preparation of one; whether there was any."""
        in_preparation = {work.planned.data for work in self.running if work.prepares}
        for planned in self.todo:
            if (planned.data / DATA).exists():
                self.todo.remove(planned)
                self._start(planned, prepares=False)
                return True
            if planned.data not in in_preparation:
                self._start(planned, prepares=True)
                return True
        return False

    def _start(self, planned: Planned, prepares: bool) -> None:
        write_job(planned.folder, planned.job, planned.key, planned.data)
        (planned.folder / CONFIG).write_text(_config(planned).to_yaml(), "utf-8")
        log = (planned.data if prepares else planned.folder) / LOG
        process = Process(self.command("data" if prepares else "job", planned.folder), log)
        self.running.append(_Work(planned, process, prepares))

    def _finish(self, work: _Work, code: int) -> None:
        planned = work.planned
        if work.prepares:
            if code:
                waiting = [each for each in self.todo if each.data == planned.data]
                self.todo = [each for each in self.todo if each.data != planned.data]
                for each in waiting:
                    self._fail(each, code, planned.data / LOG)
            return
        found = standing(planned.folder, planned.key)
        if code or not found.result:
            self._fail(planned, code, planned.folder / LOG)
            return
        self.seconds.append((planned.job.experiment, work.process.seconds))
        left = self.todo + [w.planned for w in self.running if not w.prepares]
        end = f"{len(left)} left, about {_duration(self._seconds_left(left))}" if left else "none left"
        self.say(f"{planned.job.name}: {_duration(work.process.seconds)}, {_figures(found.result)}; {end}")

    def _fail(self, planned: Planned, code: int, log: Path) -> None:
        self.failed.append(planned.job.name)
        self.say(f"{planned.job.name}: failed, exit code {code}{_last_error(log)}; see {log}")

    def _seconds_left(self, left: Sequence[Planned]) -> float:
        """By the jobs that have finished, those of the same experiment where there are any."""
        of_all = mean(seconds for _, seconds in self.seconds)
        total = 0.0
        for planned in left:
            alike = [seconds for name, seconds in self.seconds if name == planned.job.experiment]
            total += mean(alike) if alike else of_all
        return total / min(self.at_once, len(left))


def _config(planned: Planned) -> Config:
    """The configuration of a job's run, with its files."""
    from experiments.tasks import VALIDATION_FRACTION

    config, corpus = planned.job.config, planned.data / CORPUS
    files = [{"path": str(corpus / name), "format": "jsonl"} for name in (TRAIN, HELD_OUT)]
    sources = CorpusConfig.model_validate({"sources": files, "validation_fraction": VALIDATION_FRACTION})
    data = config.data.model_copy(update={"shards": str(planned.data / "shards")})
    return config.model_copy(update={"run_dir": str(planned.folder / RUN), "corpus": sources, "data": data})


def _figures(result: Result) -> str:
    """Of each test its main figure, the first few."""
    tests = result.figures["tests"]
    shown = []
    for name, test in list(tests.items())[:4]:
        exact = test.get("exact_match")
        shown.append(f"{name} {exact:.3f}" if exact is not None else f"{name} {test['bits_per_byte']:.4f} bits/byte")
    return ", ".join(shown) + (f" and {len(tests) - 4} more" if len(tests) > 4 else "")


def _last_error(log: Path) -> str:
    with suppress(OSError):
        errors = [line for line in log.read_text("utf-8", "replace").splitlines() if line.startswith("error: ")]
        if errors:
            return f" ({errors[-1].removeprefix('error: ')})"
    return ""


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} h"
