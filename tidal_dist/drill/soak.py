"""A run killed again and again, resumed each time, and compared with the same run undisturbed."""

import random
import re
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from tidal_dist.drill.compare import compare_losses, compare_tensors, first_difference
from tidal_dist.drill.evidence import newest_step, recorded_losses, rolling_hashes, tensor_digests
from tidal_dist.errors import UserError
from tidal_dist.history.log import ROLLING_HASH
from tidal_dist.launching import Launch, command_on_this_machine
from tidal_dist.training.commit import complete_checkpoints, step_of

Moment = Literal["start", "step", "save", "validation"]
# What a kill aims at; where it hits is seen afterwards.
_AIMS: dict[Moment, int] = {"start": 15, "step": 30, "save": 40, "validation": 15}
_POLL_SECONDS = 0.01
_LAUNCH_SECONDS = 600.0
_STEPS_PER_KILL, _STEPS_AFTER = 6, 12
_FIRST_STEP = re.compile(r"first step ([\d.]+) s after the process began: (.*)")


@dataclass(frozen=True)
class Plan:
    """What is killed.

    Attributes:
        config_file, overrides: of a small run whose shards are there; folder: of its runs and logs.
        kills: how many. ranks: chosen from at each start. seed: of all that is random.
        minutes: in which all kills must have happened.
        save_every, validate_every: steps.
    """

    config_file: str
    overrides: list[str]
    folder: Path
    kills: int
    ranks: tuple[int, ...] = (2,)
    seed: int = 1
    minutes: float = 120.0
    save_every: int = 3
    validate_every: int = 12

    @property
    def steps(self) -> int:
        """Of the run: more than the kills leave time for."""
        return self.kills * _STEPS_PER_KILL + _STEPS_AFTER


@dataclass(frozen=True)
class Kill:
    """One kill: of `victim` ("all", or a rank) in `phase`, after `step` steps, of which a restart repeats `lost`.

    Attributes:
        aimed: at what. ranks: of the launch. background: whether it saved in the background.
    """

    aimed: Moment
    phase: Moment
    victim: str
    step: int
    lost: int
    ranks: int
    background: bool


@dataclass
class Report:
    """What a soak saw.

    Attributes:
        starts: seconds of each start that came to a step, by part, `launcher` being what comes before the process.
        checks: what was compared: as expected or not, and in words. failed: why the soak ended before its end.
    """

    steps: int
    seconds: float = 0.0
    kills: list[Kill] = field(default_factory=list)
    starts: list[dict[str, float]] = field(default_factory=list)
    checks: dict[str, tuple[bool, str]] = field(default_factory=dict)
    failed: str | None = None

    @property
    def holds(self) -> bool:
        """Whether nothing was lost but steps since the last checkpoint."""
        return self.failed is None and all(holds for holds, _ in self.checks.values())

    def as_object(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self) | {"holds": self.holds, "start_seconds": self.median_start()}

    def median_start(self) -> dict[str, float]:
        """Median seconds of each part of a start."""
        parts = self.starts[0] if self.starts else {}
        return {part: round(statistics.median(start[part] for start in self.starts), 2) for part in parts}

    def as_text(self) -> str:
        """For a person."""
        lost = [kill.lost for kill in self.kills]
        lines = [
            f"{len(self.kills)} kills in {self.seconds:.0f} s over {self.steps} steps",
            "moments: " + _counts(kill.phase for kill in self.kills),
            "victims: " + _counts("all" if kill.victim == "all" else "one rank" for kill in self.kills),
            "ranks: " + _counts(str(kill.ranks) for kill in self.kills),
            f"steps made again: {sum(lost)}, at most {max(lost, default=0)} after a kill",
            "start, median seconds: " + ", ".join(f"{part} {s:.1f}" for part, s in self.median_start().items()),
            *(f"{'ok   ' if holds else 'FAILS'} {what}: {found}" for what, (holds, found) in self.checks.items()),
        ]
        return "\n".join([*lines, *([f"FAILS {self.failed}"] if self.failed else [])])


def _counts(names: Any) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(Counter(names).items()))


class SoakFailed(Exception):
    """A start did not come to where it should; the message says which."""


def soak(plan: Plan, say: Callable[[str], None]) -> Report:
    """Run undisturbed, then killed `plan.kills` times, and compare."""
    report, began = Report(plan.steps), time.monotonic()
    try:
        _Soak(plan, report, say).run()
    except (SoakFailed, UserError) as error:
        report.failed = " ".join(str(error).split())
    report.seconds = round(time.monotonic() - began, 1)
    return report


class _Soak:
    def __init__(self, plan: Plan, report: Report, say: Callable[[str], None]):
        self.plan, self.report, self.say = plan, report, say
        self.random = random.Random(plan.seed)
        self.straight, self.struck = plan.folder / "undisturbed", plan.folder / "killed"
        self.launches, self.old_log = 0, 0
        self.start_seconds = 0.0

    def run(self) -> None:
        self.say(f"undisturbed: {self.plan.steps} steps")
        began = time.monotonic()
        with self._launch(self.straight, self.plan.ranks[0], background=False) as launch:
            self._wait(launch, lambda: newest_step(self.straight) > 0)
            self.start_seconds = time.monotonic() - began
            self._end(launch)
        self.losses, self.hashes = recorded_losses(self.straight), rolling_hashes(self.straight)
        while len(self.report.kills) < self.plan.kills:
            if time.monotonic() - began > 60 * self.plan.minutes:
                raise SoakFailed(f"only {len(self.report.kills)} kills in {self.plan.minutes:g} minutes")
            self._start_and_kill()
        self.say("the rest, undisturbed")
        with self._launch(self.struck, self.random.choice(self.plan.ranks), background=True) as launch:
            self._end(launch)
        self._note_start(None)
        self._compare()

    def _start_and_kill(self) -> None:
        ranks, background = self.random.choice(self.plan.ranks), self.random.random() < 0.5
        aim = self.random.choices(list(_AIMS), list(_AIMS.values()))[0]
        start, began = self._resumable(), time.monotonic()
        with self._launch(self.struck, ranks, background) as launch:
            seen = self._wait_for(aim, launch, start, began)
            step, phase = newest_step(self.struck), self._phase(start)
            victim = self.random.choice(["all", *map(str, range(ranks))])
            if launch.process.poll() is not None:
                raise SoakFailed(f"start {self.launches} ended by itself: {self._last_words()}")
            if victim != "all" and int(victim) not in launch.ranks():
                victim = "all"  # the launcher has not come to its ranks yet
            if victim == "all":
                launch.kill()
            else:
                launch.kill_rank(int(victim))
                self._wait(launch, lambda: launch.process.poll() is not None, may_end=True)
        self._note_start(seen - began if seen else None)
        lost = max(0, step - self._resumable())  # it may have saved between the look and the kill
        kill = Kill(aim, phase, victim, step, lost, ranks, background)
        self.report.kills.append(kill)
        number = len(self.report.kills)
        self.say(f"{number}: {victim} of {ranks} in {phase} after step {step}, {kill.lost} steps to make again")

    def _wait_for(self, aim: Moment, launch: Launch, start: int, began: float) -> float | None:
        """Until the moment to kill; when the first step was seen."""
        if aim == "start":
            until = began + self.random.random() * self.start_seconds
            self._wait(launch, lambda: time.monotonic() > until)
            return None
        # However fast steps are, there are some left for each of the kills to come.
        last = _STEPS_PER_KILL * (len(self.report.kills) + 1)
        self._wait(launch, lambda: self._step() > start or start >= last)
        seen, wished = time.monotonic(), min(start + self.random.randint(1, 2 * self.plan.save_every + 2), last)
        self._wait(launch, lambda: self._step() >= wished)
        # What is aimed at may have begun and ended between two looks; then the next one is waited for.
        self._wait(launch, lambda: aim in ("step", self._phase(start)) or self._step() >= last)
        until = time.monotonic() + self.random.random() * {"step": 0.2, "save": 0.15, "validation": 1.5}[aim]
        self._wait(launch, lambda: time.monotonic() > until or self._step() > last)
        return seen

    def _phase(self, start: int) -> Moment:
        """What the killed run is doing, as its files tell."""
        step, folder = self._step(), self.struck / "checkpoints"
        if step <= start:
            return "start"
        if any(folder.glob(".step-*.partial")):
            return "save"
        is_validated = step % self.plan.validate_every == 0 or step == self.plan.steps
        return "validation" if is_validated and self._resumable() < step else "step"

    def _step(self) -> int:
        """Steps that the newest launch has come to; 0 while the log is still that of the launch before."""
        return newest_step(self.struck) if self._log_number() != self.old_log else 0

    def _log_number(self) -> int:
        """Of the file: a launch that goes on replaces it, without the steps that it makes again."""
        try:
            return (self.struck / ROLLING_HASH).stat().st_ino
        except FileNotFoundError:
            return 0

    def _resumable(self) -> int:
        """The step of the newest checkpoint; 0: there is none."""
        found = complete_checkpoints(self.struck / "checkpoints")
        return step_of(found[-1]) if found else 0

    def _launch(self, run: Path, ranks: int, background: bool) -> Launch:
        self.launches += 1
        self.old_log = self._log_number()
        settings = {
            "run_dir": run,
            "training.steps": self.plan.steps,
            "training.save_every_steps": self.plan.save_every,
            "training.save_in_background": str(background).lower(),
            "training.log_every_steps": 1,
            "validation.every_steps": self.plan.validate_every,
        }
        resume = ["--resume"] if run == self.struck and self._resumable() else []
        arguments = [*resume, *self.plan.overrides, *(f"{key}={value}" for key, value in settings.items())]
        self.plan.folder.mkdir(parents=True, exist_ok=True)
        with open(self._log(), "w", encoding="utf-8") as log:
            return Launch(command_on_this_machine(self.plan.config_file, arguments, ranks), log)

    def _wait(self, launch: Launch, reached: Callable[[], bool], may_end: bool = False) -> None:
        deadline = time.monotonic() + _LAUNCH_SECONDS
        while not reached():
            if launch.process.poll() is not None and not may_end:
                raise SoakFailed(f"start {self.launches} ended by itself: {self._last_words()}")
            if time.monotonic() > deadline:
                raise SoakFailed(f"start {self.launches} stood still: {self._last_words()}")
            time.sleep(_POLL_SECONDS)

    def _end(self, launch: Launch) -> None:
        try:
            code = launch.wait(_LAUNCH_SECONDS + self.plan.steps)
        except subprocess.TimeoutExpired:
            raise SoakFailed(f"start {self.launches} did not end: {self._last_words()}") from None
        if code:
            raise SoakFailed(f"start {self.launches} ended with exit code {code}: {self._last_words()}")

    def _note_start(self, until_first_step: float | None) -> None:
        """Keep what the last launch said of its start. until_first_step: seconds from the launcher's start on."""
        match = _FIRST_STEP.search(self._log().read_text("utf-8", errors="replace"))
        if match and until_first_step is not None:
            parts = {name: float(seconds) for name, seconds in (part.split(" ") for part in match[2].split(", "))}
            self.report.starts.append({"launcher": until_first_step - float(match[1]), **parts})

    def _log(self) -> Path:
        return self.plan.folder / f"start-{self.launches:03d}.log"

    def _last_words(self) -> str:
        lines = [line.strip() for line in self._log().read_text("utf-8", errors="replace").splitlines() if line.strip()]
        told = [line for line in lines if line.startswith("error:") or re.search(r"\b\w*(Error|Exception): ", line)]
        return f"{self._log()}: {(told[:1] or lines[-1:] or ['it said nothing'])[0]}"

    def _compare(self) -> None:
        """The killed run at its end against the undisturbed one."""
        checks = self.report.checks
        same_ranks = len(set(self.plan.ranks)) == 1
        found, holds = first_difference(self.hashes, rolling_hashes(self.struck))
        checks["rolling hash"] = holds, found
        found, holds = compare_losses(self.losses, recorded_losses(self.struck), 0.0 if same_ranks else 1e-3)
        checks["loss of every step"] = holds, found
        if same_ranks:
            ours, theirs = (
                tensor_digests(complete_checkpoints(run / "checkpoints")[-1]) for run in (self.straight, self.struck)
            )
            found, holds = compare_tensors(ours, theirs)
            checks["weights and optimizer"] = holds, found
