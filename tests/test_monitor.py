"""What a person watches while training."""

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tidal_dist.training.monitor import Monitor


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(e.step, e.value) for e in events.Scalars(name)]


def test_plain_lines_without_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monitor = Monitor(tmp_path, 0, 0, 10)
    monitor.progress(5, {"loss": "1.5"})
    monitor.line("a line")
    monitor.close()
    assert capsys.readouterr().err == "step 5: loss 1.5\na line\n"


def test_a_bar_on_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monitor = Monitor(tmp_path, 0, 0, 10)
    monitor.progress(5, {"loss": "1.5"})
    monitor.close()
    found = capsys.readouterr()
    assert "50%" in found.err
    assert "loss=1.5" in found.err
    assert found.out == ""


def test_other_ranks_are_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monitor = Monitor(tmp_path / "none", 1, 0, 10)
    monitor.progress(5, {"loss": "1.5"})
    monitor.line("a line")
    monitor.scalars(1, {"a": 1.0})
    monitor.text(1, "a", "b")
    monitor.image(1, "a", b"")
    monitor.close()
    assert capsys.readouterr().err == ""
    assert not (tmp_path / "none").exists()


def test_curves_stay_continuous_after_a_resume(tmp_path: Path) -> None:
    first = Monitor(tmp_path, 0, 0, 10)
    for step in range(1, 8):
        first.scalars(step, {"loss": 10.0})
    first.close()
    resumed = Monitor(tmp_path, 0, 4, 10)  # the last checkpoint was that of step 4
    for step in range(5, 9):
        resumed.scalars(step, {"loss": 1.0})
    resumed.close()
    assert [step for step, _ in scalars(tmp_path, "loss")] == list(range(1, 9))


def test_a_picture_keeps_its_pixels(tmp_path: Path) -> None:
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, format="png")
    monitor = Monitor(tmp_path, 0, 0, 10)
    monitor.image(5, "picture", png.getvalue())
    monitor.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (event,) = events.Images("picture")
    assert event.step == 5
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(event.encoded_image_string))), pixels)
