"""The page about a run: it needs nothing else, and is written whatever the folder lacks."""

import base64
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.launching import tidal_error, tidal_here, write_config
from tidal_dist.config import load_config
from tidal_dist.history.events import Events
from tidal_dist.history.generations import generations_log
from tidal_dist.history.log import ROLLING_HASH
from tidal_dist.history.scalars import scalars_log
from tidal_dist.plots.curves import Curve, curves_figure, to_svg
from tidal_dist.provenance import Provenance
from tidal_dist.run_report import facts as reading
from tidal_dist.run_report.facts import gather
from tidal_dist.run_report.headline import headline, state
from tidal_dist.run_report.page import as_html
from tidal_dist.training import checkpoint as ckpt

NASTY = "<script>alert('潮')</script> & \"so\" on http://example.org/x"


class Page(HTMLParser):
    """Every tag with its attributes, and the text outside of tags."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def pictures(self) -> dict[str, str]:
        found = {}
        for tag, attributes in self.tags:
            if tag == "img":
                head, _, data = str(attributes["src"]).partition(",")
                assert head == "data:image/svg+xml;base64"
                found[str(attributes["alt"])] = base64.b64decode(data).decode()
        return found


def figures(step: int) -> dict[str, float]:
    return {
        "train/loss": math.nan if step == 7 else 6.0 / step,
        "train/gradient_norm": math.inf if step == 7 else 1.0 / step,
        "train/learning_rate": 1e-3,
        "gradient_norm/layers.00": 0.5,
        "speed/bytes_per_second": 2.5e6,
        "speed/seconds_per_step": 2.0,
        "speed/utilisation": 0.415,
        "speed/tflops_per_rank": 410.0,
        "time/forward": 0.5,
        "time/backward": 1.0,
        "time/data": 0.5,
        "time/validation": 1.0,
        "data/code/rows": 8.0 * step,
        "data/code/epochs": 0.1 * step,
        "data/code/repeats": 0.0,
        "data/web/rows": 2.0 * step,
        "data/web/epochs": 0.3 * step,
        "data/web/repeats": 1.0,
        "data/rows": 10.0 * step,
        "data/empty_rows": 3.0,
    }


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run of 10 steps that was resumed after step 6 and ended early."""
    config = load_config(write_config(tmp_path, training={"steps": 12}))
    run = Path(config.run_dir)
    run.mkdir()
    (run / "config.yaml").write_text(config.to_yaml())
    log = scalars_log(run, 0)
    for step in range(1, 11):
        log.add(step, figures(step))
    written = generations_log(run, 0)
    for step, match in ((3, 0.25), (6, 0.75), (9, 0.5)):
        log.add(
            step, {"validation/exact_match": match, "validation/bits_per_byte": 3 - step / 10, "validation/loss": 2}
        )
        example = {"kind": "answer", "prompt": f"{step} + 1 =", "text": NASTY, "reference": " 5", "right": step == 6}
        written.add(step, {"examples": [example | {"finish": "eos", "trace": ["  <bob> 5 <eos>"]}]})
    events = Events(run, writes=True)
    events.add("start", 0, ranks=2)
    events.add("resume", 6, ranks=4, skipped=NASTY)
    events.add("bad_step", 7, reason="loss is not finite")
    events.add("finish", 10, reason="no gain for 3 validations")
    (run / ROLLING_HASH).write_text(f"step\trows\trolling_hash\n10\t100\t{'ab' * 32}\n")
    shards = [{"name": "web-000001.tar", "from_row": 40, "reason": f"torn {NASTY}"}]
    (run / "quarantine.json").write_text(json.dumps({"format": 1, "manifest_hash": "cd", "shards": shards, "rows": []}))
    _make_checkpoint(run / "checkpoints" / "step-00000006", monkeypatch)
    return run


def _make_checkpoint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(bytes(2_500_000))
    (folder.parent / "best.json").write_text(json.dumps({"checkpoint": folder.name}))
    made = Provenance("r", "c", 6, 60, "h", "m", "t", "s", "fp32", 1.0, {"validation/loss": 1.23456})
    monkeypatch.setattr(reading, "complete_checkpoints", lambda _: [folder])
    monkeypatch.setattr(reading.ckpt, "load_state", lambda _: ckpt.TrainingState(made, 2, "o", 1.0))


def test_the_page_needs_nothing_else_and_tells_a_stranger_what_became_of_the_run(run: Path, tmp_path: Path) -> None:
    result = tidal_here("report", run, "--html", tmp_path / "page.html")
    assert result.returncode == 0, result.stderr
    html = (tmp_path / "page.html").read_text("utf-8")
    page = Page(html)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object"})
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "data", "action"):
            assert str(attributes.get(name, "data:")).startswith("data:"), (tag, attributes)
    assert "url(" not in html
    assert "@import" not in html
    pictures = page.pictures()
    assert set(pictures) >= {"Loss", "Bits per byte", "What it writes", "Gradient norm", "Utilisation"}
    for svg in pictures.values():
        assert not re.search(r"""(href|src)\s*=\s*["'](?!#)""", svg)
        assert not re.search(r"""url\((?!#)""", svg)
    assert not list(run.glob("report.html"))
    check_what_a_stranger_reads(page)


def check_what_a_stranger_reads(page: Page) -> None:
    for expected in (
        "Finished after 10 of 12 steps: no gain for 3 validations.",
        "75.0%",  # the best exact match
        "best, after step 6; newest 50.0%",
        "2.5 MB/s",
        "41.5%",
        "410 TFLOP/s on each device",
        "rounds: code 1.00, web 3.00",
        "from step 6",
        "web-000001.tar",
        "3 of these rows were left empty",
        "bad step",
        "loss is not finite",
        "At the best validation, after step 6",
        "At the latest validation, after step 9",
        "<bob> 5 <eos>",
        "best generation",
        "1.2346",
        "steps: 12",  # the configuration
        NASTY,
    ):
        assert expected in page.text, expected


def test_the_same_as_an_object(run: Path) -> None:
    result = tidal_here("report", run, "--json")
    found = json.loads(result.stdout, parse_constant=lambda constant: pytest.fail(constant))
    assert (run / "report.html").is_file()
    assert (found["step"], found["steps"], found["ended"]) == (10, 12, "no gain for 3 validations")
    assert found["best"]["validation/exact_match"] == {"step": 6, "value": 0.75}
    assert found["resumed_from_steps"] == [6]
    assert found["seconds"] | {"forward": 5.0, "backward": 10.0, "data": 5.0, "validation": 10.0} == found["seconds"]
    assert [source["source"] for source in found["sources"]] == ["code", "web"]
    assert found["left_out"]["shards"][0]["from_row"] == 40
    assert found["checkpoints"][0]["bytes"] == 2_500_000
    assert [event["event"] for event in found["events"]] == ["start", "resume", "bad_step", "finish"]


def test_a_run_under_way_and_one_that_has_only_begun(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path))
    run = Path(config.run_dir)
    run.mkdir()
    (run / "config.yaml").write_text(config.to_yaml())
    begun = gather(run)
    assert state(begun) == "Begun: 0 of 6 steps, no figures yet."
    assert "No figures yet." in Page(as_html(begun)).text
    assert json.dumps(begun.as_object())
    scalars_log(run, 0).add(2, {"train/loss": 3.0})
    (run / "events.jsonl").write_text(
        '{"time": "2026-11-25T10:00:00+00:00", "step": 0, "event": "start"}\n{"time": "20'
    )
    (run / "generations.jsonl").write_text('{"step": 2, "exam')
    under_way = gather(run)
    assert state(under_way).startswith("Not finished: 2 of 6 steps; its newest figures are of 20")
    assert ("Training loss", "3.0000", "nats per label, newest") in headline(under_way)
    assert set(Page(as_html(under_way)).pictures()) == {"Loss"}


def test_one_source_is_named_all(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path))
    run = Path(config.run_dir)
    run.mkdir()
    (run / "config.yaml").write_text(config.to_yaml())
    scalars_log(run, 0).add(2, {"data/rows": 16, "data/epochs": 0.5, "data/repeats": 2})
    (source,) = gather(run).sources()
    assert (source.source, source.rows, source.epochs, source.repeats) == ("all", 16, 0.5, 2)
    assert set(Page(as_html(gather(run))).pictures()) == {"Rounds through the data"}


def test_long_curves_stay_small() -> None:
    steps = range(1, 100_001)
    svg = to_svg(curves_figure([Curve("loss", steps, [1.0 + math.sin(step / 5000) for step in steps])], "nats"))
    assert len(svg) < 100_000


def test_what_is_no_run_is_an_error(tmp_path: Path) -> None:
    assert "no config.yaml, so no run" in tidal_error("report", tmp_path)
    assert "no config.yaml, so no run" in tidal_error("report", tmp_path / "nowhere", "--html", tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()


def test_a_page_that_cannot_be_written_is_an_error(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot write" in tidal_error("report", run, "--html", tmp_path / "file" / "page.html")
