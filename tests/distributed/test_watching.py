"""What a run leaves to be watched, and how validation ends it: two real ranks under ZeRO-3."""

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.launching import launched, prepare_sums, scalars
from tidal_dist.history.events import read_events
from tidal_dist.history.generations import read_generations
from tidal_dist.history.scalars import read_scalars

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_sums(tmp_path_factory.mktemp("sums"))


def steps_of(run: Path) -> list[int]:
    return [s.step for s in read_scalars(run)]


def test_a_run_without_gain_ends_early_says_so_and_goes_on_with_more_patience(config: Path) -> None:
    run = config.parent / "early"
    settings = [f"run_dir={run}", "training.steps=12", "validation.every_steps=2", "monitor.report=true"]
    settings += ["validation.early_stop_metric=exact_match", "validation.early_stop_patience=1"]

    # Two ranks and one task. So young a model has no sum right: the first validation is the best.
    launched(config, *settings, "validation.prompts=1")
    assert steps_of(run) == [1, 2, 3, 4]
    assert json.loads((run / "checkpoints/step-00000004/state.json").read_bytes())["provenance"]["step"] == 4
    last = read_events(run)[-1]
    assert (last["event"], last["step"]) == ("finish", 4)
    assert "validation/exact_match has not gained for 1 validations" in last["reason"]
    assert "Finished after 4 of 12 steps: validation/exact_match" in (run / "report.html").read_text("utf-8")
    check_layers(run)

    output = launched(config, "--resume", *settings, "validation.prompts=1")
    assert output.count("to train on, raise validation.early_stop_patience") == 1
    assert steps_of(run) == [1, 2, 3, 4]

    # One validation without a gain is remembered: the second is at step 6. Now three tasks.
    launched(config, "--resume", *settings[:-1], "validation.early_stop_patience=2", "validation.prompts=3")
    assert steps_of(run) == [1, 2, 3, 4, 5, 6]
    assert sorted(scalars(run)["train/loss"]) == [1, 2, 3, 4, 5, 6]
    assert {g.step: len(g.examples) for g in read_generations(run)} == {2: 1, 4: 1, 6: 3}


def check_layers(run: Path) -> None:
    """The gradients of the layers make up the whole gradient, and their histograms are there."""
    for found in read_scalars(run):
        squares = [value**2 for name, value in found.values.items() if name.startswith("gradient_norm/")]
        assert len(squares) == 6  # two layers, two embeddings, norm, output
        assert sum(squares) ** 0.5 == pytest.approx(found.values["train/gradient_norm"], rel=1e-3)
        assert sum(v for name, v in found.values.items() if name.startswith("time_share/")) == pytest.approx(1.0)
        assert 0 < found.values["speed/utilisation"] < 5
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"histograms": 0})
    events.Reload()
    for tag in ("weights/layers.01", "gradients/layers.01", "gradients/output"):
        histograms = events.Histograms(tag)
        assert [h.step for h in histograms] == [2, 4]
        assert histograms[0].histogram_value.sum_squares > 0
