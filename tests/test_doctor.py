"""The doctor as users call it: verdicts, exit codes, pages, and one line for what cannot be examined."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.doctoring import configuration, prepare_shards, write_corpus, write_random_export
from tests.launching import tidal_error, tidal_here
from tidal_dist.doctor import subject
from tidal_dist.doctor.report import SUSPECTS, Check, Report

SMALL = ("--documents", "4", "--blocks", "2", "--rows", "4")


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """An export, its shards, and shards of another corpus whose tokeniser is its own."""
    folder = tmp_path_factory.mktemp("patient")
    corpus = write_corpus(folder / "corpus")
    config = configuration(folder / "shards", corpus)
    prepare_shards(config)
    prepare_shards(configuration(folder / "other", write_corpus(folder / "other_corpus", ("Ελληνικά και русский",))))
    same_tokenizer = str(folder / "shards" / "tokenizer.json")
    prepare_shards(configuration(folder / "cut_otherwise", corpus, same_tokenizer, max_unspaced_chars=1))
    return SimpleNamespace(folder=folder, export=write_random_export(folder / "export", config), config=config)


def examined(patient: SimpleNamespace, *arguments: str | Path) -> dict:
    shards = patient.folder / "shards"
    result = tidal_here("doctor", patient.export, "--data", shards, *SMALL, "--json", *arguments)
    report = json.loads(result.stdout)
    assert result.returncode == (0 if report["holds"] else 1), result.stderr.decode()
    return report


def test_a_sound_model_passes_every_check(patient: SimpleNamespace) -> None:
    report = examined(patient)
    assert report["holds"], [c for s in report["suspects"] for c in s["checks"] if c["verdict"] != "holds"]
    assert [s["number"] for s in report["suspects"]] == list(range(1, 11))
    for suspect in report["suspects"]:
        assert suspect["verdict"] == "holds"
        assert suspect["checks"], suspect["name"]
        for check in suspect["checks"]:
            assert check["figure"] <= check["bound"]
            assert check["unit"]
            assert check["remedy"]
    assert report["suspect"] is None


@pytest.mark.slow
def test_the_text_names_every_suspect_and_check(patient: SimpleNamespace) -> None:
    result = tidal_here("doctor", patient.export, "--data", patient.folder / "shards", *SMALL)
    text = result.stdout.decode()
    assert result.returncode == 0
    assert text.splitlines()[-1] == "all checks hold"
    for number, name in SUSPECTS.items():
        assert f"{number:>2}  {name}: holds" in text
    assert "first choice changed" in text
    assert "exact match" in text
    assert "cut at blocks" in text  # some documents of this corpus are longer than a row


@pytest.mark.slow
def test_the_page_has_pictures_and_needs_nothing_else(patient: SimpleNamespace, tmp_path: Path) -> None:
    examined(patient, "--html", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text("utf-8")
    assert page.count("data:image/png;base64,") == 3
    assert "http" not in page
    assert all(name in page for name in ("exposure gap", "cached equals one pass", "loss over ranks"))


@pytest.mark.parametrize(("shards", "what"), [("other", "one tokeniser"), ("cut_otherwise", "one segmentation")])
def test_shards_of_another_corpus_get_one_line(patient: SimpleNamespace, shards: str, what: str) -> None:
    result = tidal_here("doctor", patient.export, "--data", patient.folder / shards)
    assert result.returncode == 1
    (line,) = result.stdout.decode().splitlines()
    assert line.startswith(f"suspect 4, preprocessing: {what}: ")
    assert str(patient.folder / shards) in line
    report = json.loads(tidal_here("doctor", patient.export, "--data", patient.folder / shards, "--json").stdout)
    assert (report["holds"], report["suspect"], report["check"]) == (False, 4, what)
    assert report["suspects"][0]["verdict"] == "not run"


@pytest.mark.slow
def test_what_cannot_be_examined_gets_one_line(patient: SimpleNamespace, tmp_path: Path) -> None:
    shards, empty = patient.folder / "shards", tmp_path / "empty"
    empty.mkdir()
    assert "neither an export (no config.json) nor a checkpoint" in tidal_error("doctor", empty, "--data", shards)
    assert "no manifest.json, so no shards here" in tidal_error("doctor", patient.export, "--data", empty)
    message = tidal_error("doctor", patient.export, "--data", shards, "--documents", "0")
    assert message.endswith("--documents 0: must be at least 1")
    message = tidal_error("doctor", patient.export, "--data", shards, *SMALL, "--html", tmp_path)
    assert "cannot write" in message


def test_shards_without_documents_get_one_line(patient: SimpleNamespace, tmp_path: Path) -> None:
    manifest = json.loads((patient.folder / "shards" / "manifest.json").read_bytes())
    for split in manifest["splits"].values():
        split["shards"] = []
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert "the shards hold no documents" in tidal_error("doctor", patient.export, "--data", tmp_path)


def test_a_torn_shard_and_other_rows_get_one_line(patient: SimpleNamespace, tmp_path: Path) -> None:
    config = patient.config.model_copy(
        update={"data": patient.config.data.model_copy(update={"shards": str(tmp_path / "s")})}
    )
    manifest = prepare_shards(config)
    torn = tmp_path / "s" / f"{manifest.shards('validation')[0]['name']}.tar"
    torn.write_bytes(torn.read_bytes()[:-1024])
    assert "torn" in tidal_error("doctor", patient.export, "--data", tmp_path / "s")
    next((tmp_path / "s").glob("rows-*/plan.json")).unlink()
    assert "slots; run `tidal plan-rows`" in tidal_error("doctor", patient.export, "--data", tmp_path / "s")


def test_a_model_too_large_for_the_memory_gets_one_line(
    patient: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject, "free_memory", lambda _: 1 << 20)
    message = tidal_error("doctor", patient.export, "--data", patient.folder / "shards")
    assert "the examination needs about 0.5 GB on cpu, 0.0 GB are free; use a device or a machine with more" in message


def test_free_memory_is_a_plausible_number() -> None:
    assert 1 << 28 < subject.free_memory("cpu") < 1 << 50


def test_free_memory_of_a_gpu_counts_what_pytorch_holds_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training holds nearly all of a GPU; what it does not use is there for the validation's texts."""
    for name, value in (("mem_get_info", (100, 1000)), ("memory_reserved", 800), ("memory_allocated", 300)):
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    assert subject.free_memory("cuda") == 100 + 800 - 300


def check(suspect: int, name: str, verdict: str, figure: float = 0.0) -> Check:
    return Check(suspect, name, verdict, figure, 0.0, "things", f"where {name} fails", "", f"mend {name}")  # type: ignore[arg-type]


def test_the_culprit_is_the_first_failure_in_the_order_of_causes() -> None:
    checks = [
        check(4, "a", "holds"),
        check(1, "b", "fails", 2),
        check(5, "c", "fails", float("nan")),
        check(3, "d", "holds"),
    ]
    report = Report("model", "shards", "train", checks, [], 1.0)
    assert report.culprit is not None
    assert (report.culprit.suspect, report.verdict(5), report.verdict(3)) == (1, "fails", "holds")
    text = report.as_text()
    assert "suspect 1, positions, block order: b\n  where: where b fails\n  what to do: mend b" in text
    assert "failing too, perhaps because of it: suspects 5" in text
    assert json.loads(json.dumps(report.as_object(), allow_nan=False))["check"] == "b"
    page = replace(report, path="<model>").as_html({"a <caption>": "AAAA"})
    assert "<model>" not in page
    assert "&lt;caption&gt;" in page
