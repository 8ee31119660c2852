"""The ranks of a launch on several hosts, as seen and reached from the one where `tidal launch` runs.

The launcher does not notice everything: pdsh waits for hosts whose ranks hang in a collective with one that is gone.
So what the launchers on the hosts write is read, and heartbeats that have fallen silent are asked about on their host.
"""

import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tidal_dist.cluster.asking import ask, ask_each
from tidal_dist.cluster.attempt import say
from tidal_dist.cluster.failures import Death, account, culprit, death_in, how
from tidal_dist.cluster.placement import Placement
from tidal_dist.cluster.transport import Transport
from tidal_dist.diagnose.hearts import Heart, read_hearts
from tidal_dist.launching import TRAIN
from tidal_dist.training.heartbeat import mark_ended

_ASK_SECONDS = 5.0
_KILL_SECONDS = 3.0
_GRACE_SECONDS = 3.0  # in which ranks that lose contact say so, and the launchers end by themselves
_AGAIN_SECONDS = 2.0
_HEARTS_SECONDS = 3.0


class RanksOfHosts:
    """Those of one attempt.

    Args:
        launch: what their environment has as `environment.LAUNCH_ID`. run: the run's folder.
        output: what the launcher writes, from here on. script: what the ranks run.
    """

    by_command = False

    def __init__(
        self,
        transport: Transport,
        launch: str,
        placement: Placement,
        run: Path,
        output: Path,
        script: Path = TRAIN,
    ):
        self._transport, self._launch, self._placement, self._run = transport, launch, placement, run
        self._script = script
        self._output = open(output, "rb")  # noqa: SIM115 (until the attempt has ended)
        self._output.seek(0, 2)
        self._unfinished = b""
        self._deaths: list[Death] = []
        self._died_at = self._asked_at = self._hearts_at = 0.0
        self._heard: dict[str, dict[int, int]] = {host: {} for host in placement.hosts}
        self._is_asked_to_stop = False
        self._before = {h.beat.rank: h.beat.started for h in read_hearts(run)}

    def look(self, launcher: int) -> None:  # noqa: ARG002 (nothing of it is below the launcher here)
        """Show what the launcher has written, and see who has died."""
        found = [death for line in self._new_lines() if (death := death_in(line))]
        now = time.monotonic()
        if not found and now - self._hearts_at > _HEARTS_SECONDS:
            self._hearts_at = now
            found = list(self._silent())
        if found and not self._deaths:
            self._died_at = now
        self._deaths += found

    def hand_on(self, signals: Sequence[signal.Signals]) -> None:
        """Give each rank what it has not been given; hosts are asked again until all ranks have been found."""
        self._is_asked_to_stop = bool(signals)
        for count, received in enumerate(signals, 1):
            due = [host for host, slots in self._placement.hosts.items() if self._told(host, count) < len(slots)]
            is_new = not any(count in self._heard[host].values() for host in self._heard)
            if due and (is_new or time.monotonic() - self._asked_at > _AGAIN_SECONDS):
                self._tell(due, received, count)

    def _told(self, host: str, count: int) -> int:
        return sum(heard >= count for heard in self._heard[host].values())

    def _tell(self, hosts: list[str], received: signal.Signals, count: int) -> None:
        self._asked_at = time.monotonic()
        tasks: dict[str, list[object]] = {
            host: [
                "stop",
                self._launch,
                self._script,
                int(received),
                *(p for p, n in self._heard[host].items() if n >= count),
            ]
            for host in hosts
        }
        for answer in ask_each(self._transport, tasks, _ASK_SECONDS):
            self._heard[answer.host] |= dict.fromkeys(answer.found.get("signalled", []), count)

    def are_living(self) -> bool:
        """Whether ranks are left is seen at the end, where they have time to end by themselves."""
        return False

    def failed(self) -> int | None:
        """The exit code of the rank that has ended, some seconds after it has."""
        if not self._deaths or time.monotonic() - self._died_at < _GRACE_SECONDS:
            return None
        death, _ = culprit(self._deaths, self._placement, self._run)
        return 1 if death.code is None else death.code

    def end(self, patience: float) -> None:
        """Kill what is left of the launch on all hosts, and say who was to blame."""
        began = time.monotonic()
        patience = 0.0 if self._deaths else patience
        task = ["kill", self._launch, patience, _KILL_SECONDS]
        limit = patience + _KILL_SECONDS + _ASK_SECONDS
        answers = ask(self._transport, list(self._placement.hosts), task, limit)
        seconds = time.monotonic() - began
        self._deaths += [death for line in self._new_lines() if (death := death_in(line))]
        self._output.close()
        if self._deaths and not self._is_asked_to_stop:
            for line in account(self._deaths, self._placement, self._run):
                say(line)
        if self._deaths:
            self._mark_ended({a.host for a in answers if a.found.get("left") == []})
        if killed := sum(answer.found.get("killed", 0) for answer in answers):
            say(f"killed {killed} processes on {len(answers)} hosts in {seconds:.1f} s")
        for answer in answers:
            if answer.problem:
                say(f"{answer.problem}; what runs there may go on until its ranks miss the others")
            elif answer.found["left"]:
                say(f"{answer.host}: processes {answer.found['left']} cannot be killed; a disk or driver may hang")

    def _mark_ended(self, hosts: set[str]) -> None:
        """Have the heartbeats tell: nobody need wait whether they go on, as a job in the same folder would."""
        death, rank = culprit(self._deaths, self._placement, self._run)
        for heart in read_hearts(self._run):
            beat = heart.beat
            if not beat.ended and self._is_of_attempt(heart) and self._placement.host_of(beat.rank) in hosts:
                mark_ended(self._run, beat.rank, how(death) if beat.rank == rank else "lost ranks: ended with them")

    def _new_lines(self) -> Iterator[str]:
        content = self._output.read()
        if content:
            sys.stdout.flush()
            sys.stdout.buffer.write(content)
            sys.stdout.buffer.flush()
        *lines, self._unfinished = (self._unfinished + content).split(b"\n")
        yield from (line.decode(errors="replace") for line in lines)

    def _silent(self) -> Iterator[Death]:
        """Ranks of this attempt whose heartbeat has stopped, and whose host says, or cannot say, that they are gone."""
        hearts = [h for h in read_hearts(self._run) if h.state in ("silent", "gone") and self._is_of_attempt(h)]
        by_host: dict[str, list[Heart]] = {}
        for heart in hearts:
            by_host.setdefault(self._placement.host_of(heart.beat.rank), []).append(heart)
        if not by_host:
            return
        tasks = {host: ["living", *(h.beat.pid for h in silent)] for host, silent in by_host.items()}
        for answer in ask_each(self._transport, tasks, _ASK_SECONDS):
            for heart in by_host[answer.host]:
                if answer.problem or heart.beat.pid not in answer.found["living"]:
                    text = f"is lost ({answer.problem})" if answer.problem else "has ended without a word"
                    yield Death(answer.host, heart.beat.rank, None, f"{text} in {heart.beat.phase}")

    def _is_of_attempt(self, heart: Heart) -> bool:
        beat = heart.beat
        return beat.rank < self._placement.ranks and self._before.get(beat.rank) != beat.started
