"""The prompt loop: what a terminal shows while a text is written, and the program on a real pseudo-terminal."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_pipeline.tokenizer import EOB
from tests.builders import small_tokenizer
from tests.exporting import write_small_export
from tests.ranks import ROOT, environment
from tests.terminal import Terminal
from tests.test_generation import lively_model
from tidal_dist.generation.engine import Engine
from tidal_dist.generation.events import Block, Char, Text
from tidal_dist.generation.prompt_loop import PromptLoop, history_file
from tidal_dist.generation.request import Limits, Request
from tidal_dist.generation.tide_line import TideLine, visible

TOKENIZER = small_tokenizer()


def show(terminal: Terminal, prompt: str, blocks: list[str], is_drawn: bool = True, has_colour: bool = False) -> list:
    """Write a text to a terminal, char by char; its last lines after each char."""
    line, screens = TideLine(terminal, lambda: terminal.width, is_drawn, has_colour), []
    line.begin(prompt)
    for block in blocks:
        data = block.encode()[::-1]
        for byte in data:
            line.hear(Char(byte, -0.1))
            screens.append(terminal.lines())
        line.hear(Char(EOB, -0.1))
        line.hear(Block(block, tuple(Char(b, -0.1) for b in data), (), (), 1, ()))
        line.hear(Text(block))
        screens.append(terminal.lines())
    line.end()
    return screens


def wrapped(text: str, width: int) -> list[str]:
    """How a terminal breaks a text."""
    terminal = Terminal(width, height=40)
    terminal.write(text)
    return terminal.lines()


class TestTideLine:
    def test_a_block_grows_from_its_end_and_stays(self) -> None:
        screens = show(Terminal(40), "12 + 34 =", [" 46", "."])
        assert screens == [
            ["12 + 34 =6"],
            ["12 + 34 =46"],
            ["12 + 34 = 46"],
            ["12 + 34 = 46"],
            *[["12 + 34 = 46."]] * 2,
        ]

    def test_at_the_margin_a_block_is_written_below_and_then_moves_up(self) -> None:
        screens = show(Terminal(12), "0123456789", [" abc"])
        assert screens[:4] == [["0123456789c"], ["0123456789", "bc"], ["0123456789", "abc"], ["0123456789", " abc"]]
        assert screens[4] == ["0123456789 a", "bc"]

    @given(
        st.text(st.sampled_from("ab 潮👍\n\t\u0301é"), max_size=40),
        st.lists(st.text(st.sampled_from("ab 潮👍\né"), min_size=1, max_size=8), max_size=12),
        st.integers(8, 20),
    )
    @example("aaaaaaaa", ["\n", "\na"], 8)
    @settings(max_examples=150)
    def test_whatever_is_written_nothing_is_left_of_how(self, prompt: str, blocks: list[str], width: int) -> None:
        terminal = Terminal(width, height=40)
        show(terminal, prompt, blocks)
        assert terminal.lines() == wrapped(visible(prompt + "".join(blocks)), width)

    def test_on_a_screen_that_scrolls(self) -> None:
        blocks = [f" {n:06d}" for n in range(20)]
        terminal = Terminal(12, height=3)
        show(terminal, "", blocks)
        assert terminal.lines() == wrapped("".join(blocks), 12)[-2:]

    def test_half_a_character_is_shown_as_bytes(self) -> None:
        assert show(Terminal(40), "", ["潮"])[:3] == [["\\xae"], ["\\xbd\\xae"], ["潮"]]

    def test_nothing_that_a_terminal_would_obey(self) -> None:
        terminal = Terminal(60)
        show(terminal, "\x1b[2J", ["\x1b]0;a\x07", "\u202e", "\x9b1A"])
        assert terminal.lines() == ["\\x1b[2J\\x1b]0;a\\x07\\u202e\\x9b1A"]

    def test_colour_and_drawing_only_where_they_belong(self) -> None:
        plain, coloured, dumb = Terminal(20), Terminal(20), Terminal(20)
        show(plain, "a", [" b"])
        show(coloured, "a", [" b"], has_colour=True)
        assert (plain.colour, coloured.colour) == (False, True)
        assert show(dumb, "a", [" bc"], is_drawn=False) == [["a"], ["a"], ["a"], ["a bc"]]


@pytest.fixture
def loop(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Gives lines to a loop over a real engine; what it shows."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("TERM", "dumb")
    make_engine = partial(Engine, lively_model(6, torch.float32), TOKENIZER)

    def run(*lines: str, texts: int = 1) -> str:
        given_lines = iter(lines)

        def read(_: str) -> str:
            line = next(given_lines, None)
            if line is None:
                raise EOFError
            return line

        monkeypatch.setattr("builtins.input", read)
        PromptLoop(run.make_engine, Request("", limits=Limits(20)), texts, False, sys.stdout, False).run()
        return capsys.readouterr().out

    run.make_engine, run.engine = make_engine, make_engine()  # type: ignore[attr-defined]
    return run


def alone(engine: Engine, prompt: str, **sampling: float) -> str:
    from tidal_dist.generation.sampling import Sampling

    return next(engine.run([Request(prompt, Sampling(**sampling), Limits(20))])).text


class TestCommands:
    def test_a_line_is_continued(self, loop) -> None:
        assert visible(f"12 + 34 ={alone(loop.engine, '12 + 34 =')}") in loop("12 + 34 =", "")

    def test_settings_hold_for_what_follows(self, loop) -> None:
        shown = loop("/temperature 1.5", "/seed 7", "/seed", "ab", texts=2)
        assert "temperature: 1.5" in shown
        assert shown.count("seed: 7") == 2
        for seed in (7, 8):
            assert visible(f"ab{alone(loop.engine, 'ab', temperature=1.5, seed=seed)}") in shown

    def test_trace(self, loop) -> None:
        shown = loop("/trace", "ab", "/trace", "ab")
        assert "trace: on" in shown
        assert shown.index("<bob>") < shown.index("trace: off")
        assert "<bob>" not in shown[shown.index("trace: off") :]

    @pytest.mark.parametrize(
        ("line", "expected"),
        [
            ("/seed x", "error: seed x: must be a number"),
            ("/seed -1", "error: seed -1: must be between"),
            ("/top-p 7", "error: top_p 7.0: must be"),
            ("/max-bytes 0", "error: max_bytes 0: must be at least 1"),
            ("/nonsense", "error: /nonsense: no such command; /help lists them"),
            ("/help", "Ctrl-C stops what is being written"),
            ("half \udc80", "error: the prompt: the prompt is not UTF-8"),
            ("//help", "/help"),
        ],
    )
    def test_lines_that_are_no_prompt(self, loop, line: str, expected: str) -> None:
        assert expected in loop(line)

    @pytest.mark.parametrize(
        ("error", "told"),
        [(KeyboardInterrupt(), ""), (torch.OutOfMemoryError("no memory\nfor 3 GiB"), "error: no memory for 3 GiB; a")],
    )
    def test_after_a_pass_that_was_broken_off(self, loop, error: BaseException, told: str) -> None:
        model, passes = loop.engine.model, iter(range(10**6))

        def fail(*_: Any) -> None:
            if next(passes) == 3:
                hook.remove()
                raise error

        hook = model.register_forward_pre_hook(fail)
        shown = loop("ab", "12 + 34 =")
        assert told in shown
        assert shown.rstrip().endswith(visible(f"12 + 34 ={alone(loop.engine, '12 + 34 =')}"))

    def test_quit(self, loop) -> None:
        assert "ab" not in loop("/quit", "ab")

    def test_where_the_history_is(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_STATE_HOME", "/somewhere")
        assert history_file() == Path("/somewhere/tidal/history")
        monkeypatch.setenv("XDG_STATE_HOME", "relative")
        monkeypatch.setenv("HOME", "/home/of/someone")
        assert history_file() == Path("/home/of/someone/.local/state/tidal/history")


class OnTerminal:
    """`tidal generate` as a user has it: a process on a pseudo-terminal."""

    def __init__(self, *arguments: str, state: Path):
        self.fd, inner = pty.openpty()
        command = [sys.executable, "-m", "tidal_dist.cli", "generate", *arguments]
        variables = environment() | {"XDG_STATE_HOME": str(state), "TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
        self.process = subprocess.Popen(
            command, stdin=inner, stdout=inner, stderr=inner, cwd=ROOT, env=variables, start_new_session=True,
            preexec_fn=_take_terminal,
        )  # fmt: skip
        os.close(inner)
        self.shown = ""

    def until(self, pattern: str, seconds: float = 60, again: str = "") -> str:
        """Wait until it shows this; what was shown up to there. again: keys, pressed while it shows nothing."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.shown)):
            assert time.monotonic() < end, self.shown
            if select.select([self.fd], [], [], 0.5)[0]:
                try:
                    self.shown += os.read(self.fd, 65536).decode(errors="replace")
                except OSError:  # it has ended
                    break
            elif again:
                self.keys(again)
        assert found, self.shown
        before, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return before

    def keys(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def end(self) -> int:
        try:
            return self.process.wait(30)
        finally:
            self.process.kill()
            os.close(self.fd)


def _take_terminal() -> None:
    import fcntl
    import termios

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # which tests that run in the background have ignored

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.mark.slow
def test_on_a_real_terminal(tmp_path: Path) -> None:
    write_small_export(tmp_path / "export")
    state = tmp_path / "state"
    here = OnTerminal(str(tmp_path / "export"), "--max-bytes", "100000", state=state)
    here.until("tide> ")
    here.keys("12 + 34 =\n")
    here.until(r"\x1b\[36m")  # a block at hand is being written
    here.keys("\x03")
    here.until(r"\[stopped\]")
    here.until("tide> ")
    here.keys("/max-bytes 12\n")
    here.until("max_bytes: 12")
    here.until("tide> ")
    here.keys("\x1b[A\x1b[A\n")  # the line before the last one, by the history
    assert "12 + 34 =" in here.until(r"\n[^\0]*tide> ")
    here.keys("not sent")
    here.until("not sent")
    here.until("tide> ", again="\x03")  # Python misses one that comes just before it waits for the next key
    here.keys("\x04")
    assert here.end() == 0
    assert (state / "tidal" / "history").read_text().split("\n")[:2] == ["12 + 34 =", "/max-bytes 12"]

    state.chmod(0o500)
    again = OnTerminal(str(tmp_path / "export"), "--max-bytes", "12", state=state)
    again.until("tide> ")
    again.keys("\x1b[A\x1b[A\x1b[A\n")
    assert "12 + 34 =" in again.until(r"\n[^\0]*tide> ")
    again.keys("\x04")
    assert again.end() == 0
