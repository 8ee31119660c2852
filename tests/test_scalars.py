"""The files of figures that a run leaves: valid JSON, whole lines, cut back where the run goes on."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.launching import largest_file
from tidal_dist.errors import UserError
from tidal_dist.history.json_lines import StepLines, read_lines
from tidal_dist.history.scalars import SCALARS, curve, read_scalars, scalars_log

FIGURES = st.dictionaries(st.text(min_size=1).map(lambda s: f"a/{s}"), st.floats(allow_nan=False), max_size=3)


@given(steps=st.lists(FIGURES, max_size=4), cut=st.integers(0, 300))
def test_a_torn_end_costs_only_the_torn_line(tmp_path_factory: pytest.TempPathFactory, steps: list, cut: int) -> None:
    run = tmp_path_factory.mktemp("run")
    log = scalars_log(run, 0)
    for step, values in enumerate(steps, 1):
        log.add(step, values)
    data = (run / SCALARS).read_bytes()
    data = data[: max(0, len(data) - cut)]
    (run / SCALARS).write_bytes(data)
    found = read_scalars(run)
    assert [(s.step, s.values) for s in found] == list(enumerate(steps, 1))[: data.count(b"\n")]


def test_what_is_no_number_for_json_is_valid_json_and_comes_back(tmp_path: Path) -> None:
    scalars_log(tmp_path, 0).add(3, {"train/loss": math.nan, "a": math.inf, "b": -math.inf})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    line = json.loads((tmp_path / SCALARS).read_text(), parse_constant=refuse)
    assert (line["train/loss"], line["a"], line["b"]) == ("nan", "inf", "-inf")
    (found,) = read_scalars(tmp_path)
    assert math.isnan(found.values["train/loss"])
    assert (found.values["a"], found.values["b"]) == (math.inf, -math.inf)


@given(written=st.integers(0, 12), start=st.integers(0, 12), more=st.integers(0, 4))
def test_a_resumed_run_writes_on_after_its_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, written: int, start: int, more: int
) -> None:
    run = tmp_path_factory.mktemp("run")
    log = scalars_log(run, 0)
    for step in range(1, written + 1):
        log.add(step, {"old": 1.0})
    log = scalars_log(run, start)
    for step in range(start + 1, start + 1 + more):
        log.add(step, {"new": 1.0})
    kept = range(1, min(written, start) + 1)
    assert curve(read_scalars(run), "old")[0] == list(kept)
    assert curve(read_scalars(run), "new")[0] == list(range(start + 1, start + 1 + more))


def test_figures_of_one_step_are_one(tmp_path: Path) -> None:
    log = scalars_log(tmp_path, 0)
    log.add(5, {"train/loss": 2.0})
    log.add(5, {"validation/loss": 3.0})
    log.add(6, {"train/loss": 1.0})
    assert [s.values for s in read_scalars(tmp_path)] == [
        {"train/loss": 2.0, "validation/loss": 3.0},
        {"train/loss": 1.0},
    ]
    assert curve(read_scalars(tmp_path), "validation/loss") == ([5], [3.0])


def test_what_a_crash_left_between_lines_is_not_there(tmp_path: Path) -> None:
    log = StepLines(tmp_path / "lines", 0)
    log.add(1, {"a": 1})
    with open(tmp_path / "lines", "ab") as file:
        file.write(b'\0\0\0\n{"step": "2"}\n[3]\n{"step": 4, "a"\n')
    log.add(5, {"a": 5})
    assert [line["step"] for line in read_lines(tmp_path / "lines")] == [1, 5]


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    log = scalars_log(tmp_path, 0)
    log.add(1, {"a": 1.0})
    before = (tmp_path / SCALARS).read_bytes()
    with largest_file(len(before) + 10), pytest.raises(OSError, match="No space left"):
        log.add(2, {"a": 2.0})
    assert (tmp_path / SCALARS).read_bytes() == before
    log.add(3, {"a": 3.0})
    assert [s.step for s in read_scalars(tmp_path)] == [1, 3]


def test_no_file_is_no_figure_and_a_folder_is_an_error(tmp_path: Path) -> None:
    assert read_scalars(tmp_path) == []
    (tmp_path / SCALARS).mkdir()
    with pytest.raises(UserError, match=r"scalars\.jsonl: cannot read .*; move it away"):
        read_scalars(tmp_path)
