"""`tidal_dist.load`: what a newcomer's Python program gets."""

import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import tidal_dist
from tidal_dist import loaded
from tidal_dist.errors import UserError
from tidal_dist.generation.engine import Engine
from tidal_dist.generation.events import Block, Char, Text
from tidal_dist.loaded import Tidal

PROMPTS = ["", "12 + 34 =", "un café 潮水"]


@pytest.fixture(scope="module")
def tidal(small_export: Path) -> Tidal:
    torch.set_num_threads(1)
    return tidal_dist.load(small_export, device="cpu")


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, tidal_dist; print(tidal_dist.load.__name__, {'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "load set()\n"


class TestGenerate:
    def test_one_prompt_one_generation_several_prompts_a_list(self, tidal: Tidal):
        one = tidal.generate(PROMPTS[1], max_bytes=16)
        assert 0 < len(one.text.encode()) <= 16
        assert tidal.generate([PROMPTS[1]], max_bytes=16) == [one]
        assert tidal.generate(PROMPTS[1], max_bytes=16, n=2) == [one, one]
        assert tidal.generate([]) == []

    def test_continuation_k_draws_with_seed_plus_k(self, tidal: Tidal):
        options = {"max_bytes": 16, "temperature": 1.5, "top_p": 0.95}
        several = tidal.generate(PROMPTS[:2], n=2, seed=7, **options)
        alone = [tidal.generate(PROMPTS[k // 2], seed=7 + k, **options) for k in range(4)]
        assert several == alone
        assert several[0] != several[1]

    def test_limits_stop_and_logprobs(self, tidal: Tidal):
        whole = tidal.generate(PROMPTS[1], max_bytes=24, temperature=1.0, logprobs=3)
        assert all(len(char.alternatives) == 3 for block in whole.details for char in block.chars)
        assert len(tidal.generate(PROMPTS[1], max_blocks=1, temperature=1.0).blocks) == 1
        cut = tidal.generate(PROMPTS[1], max_bytes=24, temperature=1.0, stop=whole.text[1:3])
        assert (cut.text, cut.finish) == (whole.text[: whole.text.find(whole.text[1:3])], "stop")

    @pytest.mark.parametrize("temperature", [0.0, 2.0])
    def test_text_is_held_to_an_expression_or_choices(self, tidal: Tidal, temperature: float):
        pattern = r" -?[1-9][0-9]{0,3}(, (yes|no|vielleicht))?"
        for g in tidal.generate(PROMPTS, temperature=temperature, regex=pattern):
            assert g.finish == "eos"
            assert re.fullmatch(pattern, g.text)
        choice = ["潮", "潮水退去", "yes", "yes, of course it is"]
        for g in tidal.generate(PROMPTS, temperature=temperature, choice=choice):
            assert g.finish == "eos"
            assert g.text in choice
        assert tidal.generate(PROMPTS[1], regex="a{100}", max_bytes=20).finish == "length"


class TestStream:
    def test_pieces_are_the_text(self, tidal: Tidal):
        for stop in ((), ("t", "xyz")):
            options = {"max_bytes": 30, "temperature": 1.0, "seed": 3, "stop": stop}
            whole = tidal.generate(PROMPTS[1], **options)
            pieces = list(tidal.stream(PROMPTS[1], **options))
            assert "".join(pieces) == whole.text
        assert len(pieces) > 1

    def test_events_are_all_that_happens(self, tidal: Tidal):
        whole = tidal.generate(PROMPTS[1], max_bytes=20)
        events = list(tidal.stream(PROMPTS[1], events=True, max_bytes=20))
        assert [e for e in events if isinstance(e, Block)] == whole.details
        assert "".join(e.text for e in events if isinstance(e, Text)) == whole.text
        chars = [e for e in events if isinstance(e, Char)]
        written = [char for block in whole.details for char in block.chars]
        assert chars[: len(written)] == written, "a block that did not fit may have been begun"

    def test_two_streams_side_by_side_do_not_touch(self, tidal: Tidal):
        options = {"max_bytes": 16, "temperature": 1.0}
        expected = [list(tidal.stream(prompt, **options)) for prompt in PROMPTS[:2]]
        found: list[list[str]] = [[], []]
        streams = [tidal.stream(prompt, **options) for prompt in PROMPTS[:2]]
        for _ in range(20):
            for pieces, stream in zip(found, streams, strict=True):
                pieces += [piece] if (piece := next(stream, None)) else []
        assert found == expected


class TestThreads:
    @staticmethod
    def work(tidal: Tidal, k: int) -> tuple:
        options = {"max_bytes": 12, "temperature": 1.0, "seed": k}
        generated = tidal.generate(PROMPTS[k % 3], **options)
        streamed = list(tidal.stream(PROMPTS[k % 3], **options))
        return generated, streamed, tidal.score(PROMPTS[k % 3], " 46; 7")

    @pytest.fixture
    def in_turns(self, small_export: Path, monkeypatch: pytest.MonkeyPatch) -> Tidal:
        """As on a GPU."""
        monkeypatch.setattr(loaded, "_is_gpu", lambda _: True)
        return tidal_dist.load(small_export, device="cpu")

    @pytest.mark.parametrize("takes_turns", [False, True])
    def test_all_get_what_they_get_alone(self, tidal: Tidal, in_turns: Tidal, takes_turns: bool):
        shared = in_turns if takes_turns else tidal
        inside, most = 0, 0

        def enter(*_: Any) -> None:
            nonlocal inside, most
            inside += 1
            most = max(most, inside)
            time.sleep(0.0005)  # so that others come in, if they may

        def leave(*_: Any) -> None:
            nonlocal inside
            inside -= 1

        expected = [self.work(tidal, k) for k in range(8)]
        hooks = [shared.model.register_forward_pre_hook(enter), shared.model.register_forward_hook(leave)]
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(self.work, [shared] * 8, range(8))) == expected
        for hook in hooks:
            hook.remove()
        assert (most == 1) == takes_turns

    def test_a_stream_that_waits_for_its_reader_holds_nobody_up(self, in_turns: Tidal):
        options = {"max_bytes": 24, "temperature": 1.0}
        expected = in_turns.generate(PROMPTS[1], **options).text
        stream = in_turns.stream(PROMPTS[1], **options)
        first = next(stream)
        assert in_turns.generate(PROMPTS[1], **options).text == expected
        assert in_turns.score("12", " + 34").blocks
        assert first + "".join(stream) == expected

    def test_an_engine_is_used_again_only_if_its_text_is_finished(
        self, in_turns: Tidal, monkeypatch: pytest.MonkeyPatch
    ):
        made: list[Engine] = []

        def make(draft: str | None) -> Engine:
            assert draft is None
            made.append(Engine(in_turns.model, in_turns.tokenizer))
            return made[-1]

        monkeypatch.setattr(in_turns, "engine", make)
        texts = [in_turns.generate(PROMPTS[1], max_bytes=12).text for _ in range(3)]
        assert len(made) == len(set(texts)) == 1
        stream = in_turns.stream(PROMPTS[1], max_bytes=12)
        next(stream)
        stream.close()
        assert in_turns.generate(PROMPTS[1], max_bytes=12).text == texts[0]
        assert len(made) == 2


def test_score_takes_one_pair_or_several(tidal: Tidal):
    pairs = [(PROMPTS[1], " 46"), ("", "the tide")]
    several = tidal.score(pairs)
    assert [s.logprob for s in several] == pytest.approx([tidal.score(*pair).logprob for pair in pairs], rel=1e-5)
    assert tidal.score(*pairs[0], ends=True).logprob < several[0].logprob


def test_dtype(small_export: Path):
    tidal = tidal_dist.load(small_export, "cpu", "bf16")
    assert next(tidal.model.parameters()).dtype == torch.bfloat16
    assert tidal.generate("12", max_bytes=8).text
    assert tidal.score("12", " + 34").logprob < 0


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"regex": "("}, "missing )"),
            ({"regex": "a", "choice": ["a"]}, "one of them"),
            ({"choice": []}, "no text"),
            ({"n": 0}, "n 0: must be at least 1"),
            ({"max_bytes": 0}, "max_bytes 0"),
            ({"stop": ""}, "stop"),
            ({"temperature": -1.0}, "temperature"),
            ({"max_byte": 3}, "max_byte: no such option; there are max_bytes"),
        ],
    )
    def test_options_are_checked(self, tidal: Tidal, options: dict, reason: str):
        with pytest.raises(UserError, match=re.escape(reason)):
            tidal.generate("12", **options)
        if "n" not in options:
            with pytest.raises(UserError, match=re.escape(reason)):
                tidal.stream("12", **options)

    def test_prompts_are_checked_and_may_be_empty_or_hold_any_character(self, tidal: Tidal):
        for prompt, reason in (("\ud800", "not UTF-8"), (3, "a int; give a text")):
            with pytest.raises(UserError, match=reason):
                tidal.generate([prompt])
        assert len(tidal.generate(["", "\0", "\n" * 500, "\u202e\ufffd"], max_bytes=8)) == 4
        with pytest.raises(UserError, match="pairs"):
            tidal.score("12")

    def test_what_is_no_export_or_no_device_is_refused_in_a_line(self, tmp_path: Path, small_export: Path):
        for arguments, reason in (
            ((tmp_path,), "no config.json"),
            ((small_export, "cuda:99"), "device cuda:99: not available"),
            ((small_export, "cpu", "int3"), "dtype int3"),
        ):
            with pytest.raises(UserError, match=reason) as raised:
                tidal_dist.load(*arguments)
            assert "\n" not in str(raised.value)
