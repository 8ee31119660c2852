"""Where the seconds between the start of a process and its first step go."""

import time

import psutil


class Startup:
    """The parts of a start, one after the other; the first, `import`, ends where this is made."""

    def __init__(self) -> None:
        self._last = _process_age()
        self.seconds = {"import": self._last}
        self.is_over = False

    def done(self, part: str) -> None:
        """`part` began where the one before it ended, and ends here."""
        now = _process_age()
        self.seconds[part] = now - self._last
        self._last = now

    def first_step(self) -> str:
        """Ends the last part, a step's; a line that says where the time went."""
        self.done("step")
        self.is_over = True
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self.seconds.items())
        return f"first step {self._last:.1f} s after the process began: {parts}"


def _process_age() -> float:
    """Seconds since this process began."""
    return time.time() - psutil.Process().create_time()
