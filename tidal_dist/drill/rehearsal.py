"""The parts of a rehearsal, in their order: train, kill, resume, resume elsewhere, export, probe."""

import random
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import UserError
from data_pipeline.shards import Manifest
from tidal_dist.cluster.placement import Placement, share_of
from tidal_dist.config import Config
from tidal_dist.drill.compare import compare_loading, compare_losses, compare_tensors, first_difference
from tidal_dist.drill.evidence import newest_step, recorded_losses, rolling_hashes, tensor_digests
from tidal_dist.drill.report import Report
from tidal_dist.history.events import read_events
from tidal_dist.launching import Launch, training_command
from tidal_dist.training import checkpoint as ckpt
from tidal_dist.training.commit import complete_checkpoints

_POLL_SECONDS = 0.02
_SAVES = 3  # in the undisturbed run: one before the kill, one to resume from elsewhere, one to compare with
_GENERATED_BLOCKS = 8
LEAST_STEPS = 6


@dataclass(frozen=True)
class Plan:
    """What is rehearsed.

    Attributes:
        config_file, overrides: of the real job. config: what they say.
        placement: of its ranks. other: of the second resume; none: nothing fits.
        steps: of the runs. seed: of what is random. keep: leave the folder there.
        timeout_minutes: a launch that takes longer has failed.
    """

    config_file: str
    overrides: list[str]
    config: Config
    placement: Placement
    other: Placement | None
    steps: int
    seed: int
    keep: bool
    timeout_minutes: float


class PartFailed(Exception):
    """A part did not come to its end; the message says why."""


def rehearse(plan: Plan, say: Callable[[str], None]) -> Report:
    """Run every part beside the real run's folder, which is not touched.

    Raises:
        UserError: shards are missing or do not fit, or the folder cannot be made: nothing was started.
    """
    Manifest.of(plan.config.data)
    share_of(plan.config, plan.placement.ranks).check(plan.config.data.lanes)
    run = Path(plan.config.run_dir)
    try:
        run.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{run.name}-drill-", dir=run.parent))
    except OSError as error:
        raise UserError(
            f"{run.parent}: cannot write ({error.strerror}); the rehearsal needs a place beside run_dir"
        ) from None
    say(f"rehearsal in {folder}, seed {plan.seed}")
    report = Report(plan.seed, plan.placement.ranks)
    rehearsal = _Rehearsal(plan, folder, report, say)
    try:
        rehearsal.run()
    finally:
        if plan.keep or not report.go:
            report.folder = str(folder)
        else:
            shutil.rmtree(folder)
    return report


class _Rehearsal:
    """The parts at work on one folder and one report."""

    def __init__(self, plan: Plan, folder: Path, report: Report, say: Callable[[str], None]):
        self.plan, self.folder, self.report, self.say = plan, folder, report, say
        self.random = random.Random(plan.seed)
        self.save_every = plan.steps // _SAVES
        self.straight, self.struck = folder / "undisturbed", folder / "killed"

    def run(self) -> None:
        """All parts; the report tells what they found."""
        for part in (self.undisturbed, self.killed, self.resumed, self.elsewhere, self.exported, self.probed):
            name = part.__name__
            started = time.monotonic()
            try:
                part()
            except (PartFailed, UserError) as error:
                self.report.failed[name] = " ".join(str(error).split())
                if name != "elsewhere":  # on which no other part depends
                    return
            finally:
                self.report.parts[name] = round(time.monotonic() - started, 1)

    def undisturbed(self) -> None:
        """The run that the others are compared with."""
        self._finish("undisturbed", self.straight, self.plan.placement)
        self.losses, self.hashes = recorded_losses(self.straight), rolling_hashes(self.straight)
        self.tensors = tensor_digests(self._last_checkpoint(self.straight))
        found = f"{len(self.losses)} losses, {len(self.hashes) - 1} hashes, {len(self.tensors)} tensors and numbers"
        steps = list(range(1, self.plan.steps + 1))
        holds = sorted(self.losses) == steps and sorted(self.hashes) == [0, *steps]
        self.report.add("undisturbed run", f"{self.plan.steps} steps, each written down", found, holds)

    def killed(self) -> None:
        """The same, and SIGKILL of a rank of this host after a step, a save at least behind it."""
        after = self.random.randint(self.save_every, self.plan.steps - 2)
        with self._launch("killed", self.struck, self.plan.placement) as launch:
            seconds_per_step = self._wait_for_step(launch, after)
            time.sleep(self.random.random() * seconds_per_step)
            ranks = sorted(launch.ranks())
            if not ranks:
                raise PartFailed(
                    "no rank runs on this host, or the run was over; start on one of the hosts, with more --steps"
                )
            rank = self.random.choice(ranks)
            launch.kill_rank(rank)
            self.say(f"killed rank {rank} after step {after}")
            began = time.monotonic()
            code = self._wait(launch, "killed")
            seconds = time.monotonic() - began
            left = len(launch.processes())
        found = f"exit code {code} after {seconds:.1f} s, {left or 'no'} process left"
        self.report.add(
            f"SIGKILL of rank {rank} after step {after}", "ends with an error", found, code != 0 and not left
        )

    def resumed(self) -> None:
        """The killed run, resumed on the same ranks: nothing may differ from the undisturbed one."""
        start = ckpt.load_state(self._last_checkpoint(self.struck)).provenance.step
        self._finish("resumed", self.struck, self.plan.placement, "--resume")
        add, where = self.report.add, f"resumed on {self.plan.placement.ranks} ranks"
        add(
            f"{where}: step",
            f"from {start}",
            f"from {self._first_step('resumed')}",
            self._first_step("resumed") == start,
        )
        add(f"{where}: loss", "equal, bit for bit", *compare_losses(self.losses, recorded_losses(self.struck)))
        add(f"{where}: rolling hash", "equal", *first_difference(self.hashes, rolling_hashes(self.struck)))
        found = compare_tensors(self.tensors, tensor_digests(self._last_checkpoint(self.struck)))
        add(f"{where}: weights, optimizer", "equal, bit for bit", *found)

    def elsewhere(self) -> None:
        """The undisturbed run, resumed from an earlier checkpoint on another number of ranks."""
        other = self.plan.other
        if other is None:
            self.report.add("resumed on other ranks", "as undisturbed", "no other number of ranks fits", None)
            return
        shutil.rmtree(self._last_checkpoint(self.straight))
        start = ckpt.load_state(self._last_checkpoint(self.straight)).provenance.step
        self._finish("elsewhere", self.straight, other, "--resume")
        add, where = self.report.add, f"resumed on {other.ranks} ranks"
        first = self._first_step("elsewhere")
        add(f"{where}: step", f"from {start}", f"from {first}", first == start)
        add(
            f"{where}: weights, optimizer",
            "checksums as saved",
            *compare_loading(read_events(self.straight), other.ranks),
        )
        add(f"{where}: rolling hash", "equal", *first_difference(self.hashes, rolling_hashes(self.straight)))
        tolerance = (
            1e-4 if ckpt.load_state(self._last_checkpoint(self.straight)).provenance.precision == "fp32" else 0.02
        )
        losses = {step: loss for step, loss in recorded_losses(self.straight).items() if step > start}
        expected = {step: loss for step, loss in self.losses.items() if step > start}
        add(f"{where}: loss", f"within {tolerance:g} of it", *compare_losses(expected, losses, tolerance))

    def exported(self) -> None:
        """The resumed run's last checkpoint as one folder."""
        from tidal_dist.export.consolidate import export

        self.say("export")
        made = export(self.struck, self.folder / "export", "last")
        loss, expected = made["probe_loss_export"], made["probe_loss_checkpoint"]
        self.report.add("export: probe loss", f"{expected:.6f}, as checkpoint", f"{loss:.6f}", True)

    def probed(self) -> None:
        """The export, loaded as users load it."""
        from tidal_dist.export.package import load_export
        from tidal_dist.export.proof import verify_export
        from tidal_dist.generation.decoder import Decoder
        from tidal_dist.generation.request import Limits

        self.say("probe")
        proof = verify_export(self.folder / "export")
        self.report.add(
            "probe: files, loss, texts", "as exported", f"{proof.probe_loss:.6f}, {proof.texts} texts", True
        )
        exported = load_export(self.folder / "export")
        limits = Limits(max_bytes=10_000, max_blocks=_GENERATED_BLOCKS)
        result = Decoder(exported.model, exported.tokenizer).generate([""], limits=limits)[0]
        holds = result.finish == "eos" or len(result.blocks) == _GENERATED_BLOCKS
        expected = f"{_GENERATED_BLOCKS} blocks or an end mark"
        self.report.add("probe: generation", expected, f"{len(result.blocks)} blocks, finish {result.finish}", holds)

    @contextmanager
    def _launch(self, name: str, run: Path, placement: Placement, *arguments: str) -> Iterator[Launch]:
        plan = self.plan
        # The real job's settings but for length and place; each step is written down, so that each can be compared.
        self.say(f"{name}: {plan.steps} steps on {placement.ranks} ranks")
        settings = {
            "run_dir": run,
            "training.steps": plan.steps,
            "training.save_every_steps": self.save_every,
            "training.log_every_steps": 1,
            "training.keep_checkpoints": _SAVES,
            "training.keep_every_steps": "null",
            "training.time_limit_minutes": "null",
            "validation.every_steps": plan.steps,
            "validation.early_stop_patience": "null",
        }
        ours = [f"{key}={value}" for key, value in settings.items()]
        command = training_command(
            plan.config_file, [*arguments, *plan.overrides, *ours], placement.launcher_arguments()
        )
        with open(self._log(name), "w", encoding="utf-8") as log, Launch(command, log) as launch:
            yield launch

    def _finish(self, name: str, run: Path, placement: Placement, *arguments: str) -> None:
        with self._launch(name, run, placement, *arguments) as launch:
            code = self._wait(launch, name)
        if code:
            raise PartFailed(f"exit code {code}: {self._last_words(name)}")

    def _wait(self, launch: Launch, name: str) -> int:
        try:
            return launch.wait(60 * self.plan.timeout_minutes)
        except subprocess.TimeoutExpired:
            raise PartFailed(
                f"not over after {self.plan.timeout_minutes:g} minutes: {self._last_words(name)}"
            ) from None

    def _wait_for_step(self, launch: Launch, step: int) -> float:
        """Until the run has made the step and has a complete checkpoint; seconds of a step so far."""
        deadline = time.monotonic() + 60 * self.plan.timeout_minutes
        seen: list[float] = []
        while launch.process.poll() is None and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
            steps = newest_step(self.struck)
            if steps and not seen:
                seen, first = [time.monotonic()], steps
            if steps >= step and complete_checkpoints(self.struck / "checkpoints"):
                return (time.monotonic() - seen[0]) / max(1, steps - first)
        raise PartFailed(f"ended or stood still before step {step}: {self._last_words('killed')}")

    def _log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def _text_of(self, name: str) -> str:
        return self._log(name).read_text("utf-8", errors="replace")

    def _last_words(self, name: str) -> str:
        """The line of a log that says most about why it ended."""
        lines = [line.strip() for line in self._text_of(name).splitlines() if line.strip()]
        told = [line for line in lines if line.startswith("error:")]
        raised = [line for line in lines if re.search(r"\b\w*(Error|Exception): ", line)]
        return (told or raised[:1] or lines[-1:] or ["it said nothing"])[0]

    def _first_step(self, name: str) -> int | None:
        match = re.search(r"from step (\d+) of", self._text_of(name))
        return int(match[1]) if match else None

    def _last_checkpoint(self, run: Path) -> Path:
        found = complete_checkpoints(run / "checkpoints")
        if not found:
            raise PartFailed(f"{run / 'checkpoints'}: no complete checkpoint")
        return found[-1]
