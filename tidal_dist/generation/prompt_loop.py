"""`tidal generate` on a terminal: a line is a prompt, and its continuation is shown while it is written."""

import contextlib
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from data_pipeline.errors import one_line
from tidal_dist.errors import UserError
from tidal_dist.generation.engine import Engine
from tidal_dist.generation.prompts import check_prompt
from tidal_dist.generation.report import trace_lines
from tidal_dist.generation.request import Request, requests_of
from tidal_dist.generation.tide_line import TideLine, visible

_HISTORY_LINES = 1000
_ASK = "tide> "
HELP = """\
A line is a prompt; what follows it is written block by block, each from its end.
  /seed N          of the random numbers        /temperature X   0 is greedy
  /top-p X         the likeliest of this share  /max-bytes N     longest continuation
  /trace           show how each block was written, or no longer
  /help  /quit     (// begins a prompt with a slash)
Ctrl-C stops what is being written; Ctrl-D leaves."""


class _Leave(Exception):
    """The user wants to leave."""


class PromptLoop:
    """Reads prompts and commands until the user leaves.

    Args:
        make_engine: a new engine of the model, at the start and where a pass was broken off.
        request: whose prompt is replaced by each line. texts: how many for each prompt; they count on from the seed.
    """

    def __init__(
        self,
        make_engine: Callable[[], Engine],
        request: Request,
        texts: int,
        shows_trace: bool,
        stream: TextIO,
        has_colour: bool,
    ):
        self._make_engine, self._engine = make_engine, make_engine()
        self._request, self._texts, self._shows_trace = request, texts, shows_trace
        self._stream, self._has_colour = stream, has_colour

    def run(self) -> None:
        """Until Ctrl-D or `/quit`."""
        self._say("A line is a prompt; /help says more; Ctrl-D leaves.")
        with _history() as remember:
            while True:
                try:
                    self._obey(_read_line(remember))
                except UserError as error:
                    self._say(f"error: {error}")
                except RuntimeError as error:  # PyTorch's, as where memory is short
                    self._say(f"\nerror: {visible(one_line(error), is_line=True)}; a shorter prompt may do")
                except KeyboardInterrupt:
                    self._say("")
                except (EOFError, _Leave):
                    break
        self._say("")

    def _obey(self, line: str) -> None:
        if line.startswith("//"):
            line = line[1:]
        elif line.startswith("/"):
            name, _, value = line.partition(" ")
            self._command(name, value)
            return
        elif not line:
            return
        for request in requests_of([check_prompt(line, "the prompt")] * self._texts, self._request):
            if not self._write(request):
                break

    def _command(self, name: str, value: str) -> None:
        commands: dict[str, Callable[[str], None]] = {
            "/trace": lambda _: self._toggle_trace(),
            "/seed": lambda v: self._set("sampling", "seed", int, v),
            "/temperature": lambda v: self._set("sampling", "temperature", float, v),
            "/top-p": lambda v: self._set("sampling", "top_p", float, v),
            "/max-bytes": lambda v: self._set("limits", "max_bytes", int, v),
            "/help": lambda _: self._say(HELP),
            "/quit": lambda _: _leave(),
        }
        if name not in commands:
            raise UserError(f"{visible(name, is_line=True)}: no such command; /help lists them")
        commands[name](value.strip())

    def _toggle_trace(self) -> None:
        self._shows_trace = not self._shows_trace
        self._say(f"trace: {'on' if self._shows_trace else 'off'}")

    def _set(self, part: str, field: str, kind: Callable[[str], Any], value: str) -> None:
        settings: Any = getattr(self._request, part)
        if value:
            try:
                settings = replace(settings, **{field: kind(value)})
            except ValueError:
                raise UserError(f"{field} {visible(value, is_line=True)}: must be a number") from None
            self._request = replace(self._request, **{part: settings})
        self._say(f"{field}: {getattr(settings, field)}")

    def _write(self, request: Request) -> bool:
        """Show a generation while it is written; whether it was let finish."""
        line = TideLine(self._stream, _width, os.environ.get("TERM", "dumb") != "dumb", self._has_colour)
        line.begin(str(request.prompt))
        job = self._engine.submit(request, line.hear)
        try:
            with _interrupts() as is_interrupted:
                while not job.done:
                    self._engine.step()
                    if is_interrupted():
                        self._engine.cancel(job)
        except BaseException:  # amid a pass: the text is not to go on beside the next one
            self._engine = self._make_engine()
            raise
        notes = {"cancelled": "stopped", "length": f"{request.limits.max_bytes} bytes are the longest"}
        line.end(notes.get(job.generation.finish, ""))
        if self._shows_trace:
            self._say("\n".join(trace_lines(job.generation)))
        return job.generation.finish != "cancelled"

    def _say(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


def _leave() -> None:
    raise _Leave


def _width() -> int:
    return max(shutil.get_terminal_size().columns, 8)


def _read_line(remember: Callable[[], None]) -> str:
    try:
        line = input(_ASK)
    except UnicodeDecodeError:
        raise UserError("the prompt is not UTF-8; mend it") from None
    remember()
    return line


@contextlib.contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed since; it is heard between two passes. Pressed again, it interrupts a pass."""
    heard: list[int] = []

    def hear(number: int, _: Any) -> None:
        if heard:
            raise KeyboardInterrupt
        heard.append(number)

    before = signal.signal(signal.SIGINT, hear)
    try:
        yield lambda: bool(heard)
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _history() -> Iterator[Callable[[], None]]:
    """Lines of this and earlier sessions, with the arrow keys, where Python has readline.

    What is yielded notes the newest line in the file at once. A file that cannot be read or written is done without.
    """
    try:
        import readline
    except ImportError:
        yield lambda: None
        return
    file = history_file()
    with contextlib.suppress(OSError):
        readline.read_history_file(file)
    readline.set_history_length(_HISTORY_LINES)

    def remember() -> None:
        with contextlib.suppress(OSError):
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            readline.write_history_file(file)

    yield remember


def history_file() -> Path:
    """Where lines are kept: in the XDG state folder."""
    state = os.environ.get("XDG_STATE_HOME", "")
    folder = Path(state) if state.startswith("/") else Path.home() / ".local" / "state"
    return folder / "tidal" / "history"
