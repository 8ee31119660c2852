"""How fast training is, and where the time goes."""

import itertools
import time
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from data_pipeline.stream import Batch
from tidal_dist.config import load_config
from tidal_dist.flops import row_flops
from tidal_dist.training.pace import Pace, Work, host_memory, measured_tflops
from tidal_dist.training.phases import Phase, Phases

BATCH = cast(Batch, SimpleNamespace(byte_count=lambda _: 100, token_count=lambda: 50))


class Clock:
    def __init__(self, patch: pytest.MonkeyPatch):
        self.now = 100.0
        patch.setattr("tidal_dist.training.phases.time.monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def spend(clock: Clock, phases: Phases, **seconds: float) -> None:
    for phase, duration in seconds.items():
        with phases(cast(Phase, phase)):
            clock.now += duration


def test_the_split_of_a_step_adds_up_and_pauses_are_no_training(clock: Clock) -> None:
    phases = Phases(lambda: None)
    clock.now += 1000.0  # before the first step
    pace = Pace(2, phases, Work(8e12, 10.0))
    for _ in range(2):
        spend(clock, phases, data=1.0, agree=0.5, forward=0.5, backward=1.5, optimizer=0.25)
        clock.now += 0.25
        pace.add([BATCH])
        spend(clock, phases, validation=10.0, checkpoint=2.0)
    figures = pace.take()
    assert figures["speed/seconds_per_step"] == 4.0
    assert figures["speed/data_wait_share"] == 0.25
    assert figures["speed/bytes_per_second"] == 2 * 2 * 100 / 8.0
    assert figures["speed/tokens_per_second"] == 2 * 2 * 50 / 8.0
    times = {name: value for name, value in figures.items() if name.startswith("time/")}
    assert times == {
        "time/data": 1.0,
        "time/agree": 0.5,
        "time/forward": 0.5,
        "time/backward": 1.5,
        "time/optimizer": 0.25,
        "time/other": 0.25,
        "time/validation": 10.0,
        "time/checkpoint": 2.0,
    }
    assert sum(v for name, v in figures.items() if name.startswith("time_share/")) == pytest.approx(1.0)
    assert figures["time_share/validation"] == 10.0 / 16.0
    assert figures["speed/tflops_per_rank"] == 2.0
    assert figures["speed/utilisation"] == 0.2


def test_counting_starts_anew(clock: Clock) -> None:
    phases = Phases(lambda: None)
    pace = Pace(1, phases, Work(1e12, 2.0))
    spend(clock, phases, forward=5.0)
    pace.add([BATCH])
    pace.take()
    spend(clock, phases, forward=2.0)
    pace.add([BATCH])
    figures = pace.take()
    assert figures["speed/seconds_per_step"] == 2.0
    assert figures["speed/tflops_per_rank"] == 0.5
    assert figures["speed/utilisation"] == 0.25


def test_measured_steps_tell_forward_from_backward(clock: Clock) -> None:
    """Where a device works behind the calls, the backward pass waits for both; measured steps wait after each."""
    work = [0.0]

    def synchronize() -> None:
        clock.now += work.pop() if work else 0.0

    phases = Phases(synchronize)
    phases.take()
    spend(clock, phases, forward=0.0, backward=4.0)  # not measured: 1 of the 4 is the forward pass
    phases.measured = True
    with phases("forward"):
        work.append(1.0)
    with phases("backward"):
        work.append(3.0)
    phases.measured = False
    taken = phases.take()
    assert taken["forward"] == pytest.approx(2.0)
    assert taken["backward"] == pytest.approx(6.0)


def test_a_phase_inside_another_has_its_time_alone(clock: Clock) -> None:
    phases = Phases(lambda: None)
    with phases("validation"):
        clock.now += 1.0
        spend(clock, phases, agree=5.0)
        clock.now += 1.0
    taken = phases.take()
    assert (taken["validation"], taken["agree"]) == (2.0, 5.0)


def test_work_is_that_of_the_rows_of_a_rank() -> None:
    config = load_config(Path(__file__).parents[1] / "configs" / "demo.yaml")
    row = row_flops(config.model, 72, 40, config.segmentation.max_block_bytes).training
    assert Work.of(config, 2, 3.5, (72, 40)) == Work(row * 16 / 2, 3.5)


def test_a_slow_device_is_not_given_a_large_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some CPUs have no instructions for bf16: there a product of 1,024 columns takes seconds."""
    monkeypatch.setattr(time, "perf_counter", itertools.count().__next__)
    assert measured_tflops(torch.device("cpu"), torch.bfloat16) == pytest.approx(2 * 256**3 / 1e12)


def test_a_device_without_a_data_sheet_is_measured() -> None:
    assert 0 < measured_tflops(torch.device("cpu"), torch.float32) < 100
    assert 0.01 < host_memory()["memory/host_resident_gib"] < 100
