"""What a person watches while training."""

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from tests.launching import largest_file
from tidal_dist.config import load_config
from tidal_dist.history.generations import read_generations
from tidal_dist.history.scalars import read_scalars
from tidal_dist.training.monitor import RESULTS, Monitor, flat_settings


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / "tensorboard"))
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
    monitor.histograms(1, "a", {"b": np.zeros(3)})
    monitor.generations(1, [], "")
    monitor.settings({"a": 1}, ["b"])
    monitor.flush()
    monitor.close()
    assert capsys.readouterr().err == ""
    assert not (tmp_path / "none").exists()


def write_all(monitor: Monitor, steps: range, mark: float) -> None:
    """A point, a text, a picture and a histogram of every step."""
    for step in steps:
        monitor.scalars(step, {"loss": mark})
        monitor.text(step, "text", f"{mark}")
        monitor.image(step, "picture", png_of(np.full((2, 2, 3), int(mark), dtype=np.uint8)))
        monitor.histograms(step, "weights", {"layer": np.full(5, mark)})
        monitor.generations(step, [{"text": f"{mark}"}], f"{mark}")


def png_of(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="png")
    return file.getvalue()


def test_nothing_stale_and_nothing_missing_after_a_resume(tmp_path: Path) -> None:
    first = Monitor(tmp_path, 0, 0, 10)
    write_all(first, range(1, 8), 10.0)
    first.close()
    resumed = Monitor(tmp_path, 0, 4, 10)  # the last checkpoint was that of step 4
    write_all(resumed, range(6, 8), 1.0)  # at other steps than before
    resumed.close()
    events = EventAccumulator(
        str(tmp_path / "tensorboard"), size_guidance={"images": 0, "histograms": 0, "tensors": 0, "scalars": 0},
        purge_orphaned_data=False,  # as TensorBoard's server, whose readers do not heed it
    )  # fmt: skip
    events.Reload()
    expected = [(1, 10.0), (2, 10.0), (3, 10.0), (4, 10.0), (6, 1.0), (7, 1.0)]
    assert [(e.step, e.value) for e in events.Scalars("loss")] == expected
    assert [(e.step, e.histogram_value.max) for e in events.Histograms("weights/layer")] == expected
    for tag in ("text/text_summary", "validation/generated/text_summary"):
        found = [(e.step, float(e.tensor_proto.string_val[0])) for e in events.Tensors(tag)]
        assert found == expected, tag
    pixels = [
        (e.step, float(np.asarray(Image.open(io.BytesIO(e.encoded_image_string)))[0, 0, 0]))
        for e in events.Images("picture")
    ]
    assert pixels == expected
    assert [(s.step, s.values["loss"]) for s in read_scalars(tmp_path)] == expected
    assert [(g.step, float(g.examples[0]["text"])) for g in read_generations(tmp_path)] == expected


def test_a_run_that_starts_anew_leaves_nothing_of_the_one_before(tmp_path: Path) -> None:
    for _ in range(2):
        monitor = Monitor(tmp_path, 0, 0, 10)
        monitor.settings({"training.steps": 3}, ["train/loss"])
        write_all(monitor, range(1, 3), 1.0)
        monitor.close()
    assert [step for step, _ in scalars(tmp_path, "loss")] == [1, 2]
    assert [s.step for s in read_scalars(tmp_path)] == [1, 2]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


def test_what_was_flushed_outlives_a_kill(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path, 0, 0, 10)
    write_all(monitor, range(1, 4), 1.0)
    monitor.flush()
    for file in (tmp_path / "tensorboard").iterdir():  # what a killed process would leave
        left = tmp_path / "killed" / "tensorboard" / file.name
        left.parent.mkdir(parents=True)
        left.write_bytes(file.read_bytes() + b"\x10\x00\x00")
    monitor.close()
    resumed = Monitor(tmp_path / "killed", 0, 3, 10)
    resumed.scalars(4, {"loss": 2.0})
    resumed.close()
    assert [step for step, _ in scalars(tmp_path / "killed", "loss")] == [1, 2, 3, 4]


def test_settings_stay_in_the_run_and_outlive_a_resume(tmp_path: Path) -> None:
    config = load_config(Path(__file__).parents[1] / "configs" / "demo.yaml")
    monitor = Monitor(tmp_path, 0, 0, 10)
    monitor.settings(flat_settings(config), RESULTS)
    write_all(monitor, range(1, 4), 1.0)
    monitor.close()
    Monitor(tmp_path, 0, 2, 10).close()
    assert not [path for path in (tmp_path / "tensorboard").iterdir() if path.is_dir()]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    data = events.SummaryMetadata("_hparams_/session_start_info").plugin_data
    settings = HParamsPluginData.FromString(data.content).session_start_info.hparams
    assert settings["training.learning_rate"].number_value == config.training.learning_rate
    assert settings["model.encoding"].string_value == "rope"
    assert "_hparams_/experiment" in events.Tags()["tensors"] or events.SummaryMetadata("_hparams_/experiment")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # the writer's own thread
def test_a_full_disk_costs_points_and_not_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monitor = Monitor(tmp_path, 0, 0, 10)
    monitor.scalars(1, {"loss": 1.0})
    monitor.flush()
    with largest_file(max(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) + 20):
        write_all(monitor, range(2, 5), 2.0)
        monitor.flush()
    monitor.scalars(5, {"loss": 5.0})
    monitor.close()
    for written in ([s.step for s in read_scalars(tmp_path)], [step for step, _ in scalars(tmp_path, "loss")]):
        assert (written[0], written[-1]) == (1, 5)
    assert capsys.readouterr().err.count("cannot write what is watched") == 1


def test_a_picture_keeps_its_pixels(tmp_path: Path) -> None:
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    monitor = Monitor(tmp_path, 0, 0, 10)
    monitor.image(5, "picture", png_of(pixels))
    monitor.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (event,) = events.Images("picture")
    assert event.step == 5
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(event.encoded_image_string))), pixels)
