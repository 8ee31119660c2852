"""Preparing: whole or not at all, what is finished is kept, and nothing disappears."""

import io
import json
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import prepare
from data_pipeline.corpus import CorpusConfig, SourceConfig, SourceFile
from data_pipeline.errors import CorpusError, ShardError, UserError
from data_pipeline.files import sha256_of
from data_pipeline.prepare import Request, run, status
from data_pipeline.preparing import progress, stages
from data_pipeline.preparing.assignment import Assignment
from data_pipeline.preparing.executors import PrepareConfig, local_workers
from data_pipeline.preparing.job import Job, into_tasks
from data_pipeline.preparing.locks import exclusive
from data_pipeline.preparing.tasks import Task
from data_pipeline.shards import Manifest
from data_pipeline.verify import verify
from tests.conftest import Prepare
from tests.launching import tidal_here
from tests.preparing import FILES, config_file, contents, fails, redone, request_for, write_texts


@pytest.fixture
def request_(tmp_path: Path) -> Request:
    """Shards of a few files, with a given tokeniser, so that tasks depend on nothing but their own file."""
    return request_for(write_texts(tmp_path / "texts").parent)


def replaced(request: Request, **changes: Any) -> Request:
    return Request(**vars(request) | changes)


def stop(*_: object) -> Any:
    raise KeyboardInterrupt


def stopped_at(where: Any, name: str, request: Request, instead: Callable[..., object] = stop) -> None:
    """Prepare as far as a function, which is replaced by one that interrupts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(where, name, instead)
        with pytest.raises(KeyboardInterrupt):
            run(request)


class Scene:
    """A preparation of which all is done but to publish it, and what it should become; tests may have it again."""

    def __init__(self, folder: Path):
        self.request = request_for(write_texts(folder / "texts").parent)
        run(self.request)
        self.expected = contents(self.request.target)
        shutil.rmtree(self.request.target)
        stopped_at(Job, "publish", self.request)
        self._kept = folder / "kept"
        self.request.folder.rename(self._kept)

    def again(self) -> None:
        for folder in (self.request.target, self.request.folder):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self._kept, self.request.folder)


@pytest.fixture(scope="module")
def only_scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tmp_path_factory.mktemp("scene"))


@pytest.fixture
def scene(only_scene: Scene) -> Scene:
    only_scene.again()
    return only_scene


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


# Whole or not at all


def test_an_existing_folder_is_refused(request_: Request) -> None:
    request_.target.mkdir()
    message = fails(request_, ShardError)
    assert str(request_.target) in message
    assert "--overwrite" in message
    assert not list(request_.target.iterdir())


def test_overwriting_replaces_everything(scene: Scene) -> None:
    scene.request.target.mkdir()
    (scene.request.target / "left-over").touch()
    run(replaced(scene.request, overwrite=True))
    assert contents(scene.request.target) == scene.expected


def test_a_failing_prepare_leaves_the_old_shards(request_: Request) -> None:
    run(request_)
    before = contents(request_.target)
    path = request_.target.parent / "texts" / "3.jsonl"
    path.write_text(path.read_text() + "{torn")
    assert "3.jsonl:61: not JSON" in fails(replaced(request_, overwrite=True), CorpusError)
    assert contents(request_.target) == before


def test_a_url_is_not_a_folder(request_: Request) -> None:
    data = request_.data.model_copy(update={"shards": "s3://bucket/shards"})
    assert "s3://bucket/shards: shards are prepared in a folder" in fails(replaced(request_, data=data), ShardError)


def test_a_folder_that_holds_no_preparation_is_cleared(scene: Scene) -> None:
    (scene.request.folder / "job.json").unlink()
    (scene.request.folder / "shards" / "train" / "00000-000077.tar").touch()
    assert redone(run(scene.request)) == {"tokenizer": 1, "shards": FILES, "finish": 1}
    assert contents(scene.request.target) == scene.expected
    assert not scene.request.folder.exists()


def test_a_disk_that_is_full_at_once(request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(request_.target.parent)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert "No space left on device" in fails(request_)
    assert contents(request_.target.parent) == before
    assert not request_.folder.exists()


@pytest.mark.parametrize(
    ("lines", "fraction"), [([], 0.0), ([{"text": ""}] * 3, 0.0), ([{"text": "all of it held out"}], 1 - 1e-12)]
)
def test_no_document_for_training(
    prepare_corpus: Prepare, tmp_path: Path, lines: list[dict[str, str]], fraction: float
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    corpus = CorpusConfig(sources=[SourceConfig(path=str(path), format="jsonl")], validation_fraction=fraction)
    with pytest.raises(CorpusError, match="no document for training"):
        prepare_corpus(tmp_path / "shards", corpus)
    assert not (tmp_path / "shards").exists()


def test_a_block_too_long_for_a_row(prepare_corpus: Prepare, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"data\.row_chars=9"):
        prepare_corpus(tmp_path / "shards", row_chars=9)
    assert not (tmp_path / "shards").exists()


# Starting again


def test_nothing_is_done_twice(scene: Scene) -> None:
    prepared = run(scene.request)
    kept = {name: tasks["kept"] for name, tasks in prepared.tasks.items()}
    assert kept == {"tokenizer": 1, "shards": FILES, "finish": 1}
    assert redone(prepared) == {}
    assert contents(scene.request.target) == scene.expected
    assert not scene.request.folder.exists()


def test_after_an_error_only_what_is_left_is_done(scene: Scene) -> None:
    folder, path = scene.request.folder, scene.request.target.parent / "texts" / "2.jsonl"
    for kind in ("receipts", "locks"):
        shutil.rmtree(folder / kind / "finish")
        (folder / kind / "shards" / f"00002{'.json' * (kind == 'receipts')}").unlink()
    (folder / "scratch" / "shards" / "00002" / "shards").mkdir(parents=True)
    (folder / "scratch" / "shards" / "00002" / "shards" / "half written").touch()
    assert redone(run(scene.request)) == {"shards": 1, "finish": 1}
    assert contents(scene.request.target) == scene.expected
    assert path.exists()


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("shards/train/00002-000000.tar", flip),
        ("shards/train/00002-000000.index.npz", truncate),
        ("shards/rows-48x96/train/00002-000000.npz", Path.unlink),
        ("receipts/shards/00002.json", flip),
        ("receipts/shards/00002.json", truncate),
    ],
)
def test_only_what_is_damaged_is_done_again(scene: Scene, name: str, damage: Callable[[Path], object]) -> None:
    damage(scene.request.folder / name)
    assert redone(run(scene.request)) == {"shards": 1}
    assert contents(scene.request.target) == scene.expected


def test_a_file_that_nobody_recorded_is_removed(scene: Scene) -> None:
    (scene.request.folder / "shards" / "train" / "00001-000999.tar").touch()
    (scene.request.folder / "shards" / "elsewhere").mkdir()
    flip(scene.request.folder / "receipts/finish/00000.json")
    assert redone(run(scene.request)) == {"finish": 1}
    assert contents(scene.request.target) == scene.expected


def test_what_goes_between_the_stages_is_noticed(scene: Scene, tmp_path: Path) -> None:
    job = Job.load(scene.request.folder)
    assert job is not None
    (job.shards / "train" / "00002-000000.tar").unlink()
    with pytest.raises(UserError, match="what task 2 of shards wrote is not there any more"):
        stages._finish(Assignment(job, 0, tmp_path, progress.Watch(tmp_path / "progress.json")))


def test_a_changed_file_is_no_other_configuration(request_: Request, tmp_path: Path) -> None:
    shutil.copy(run(request_).manifest.folder / "tokenizer.json", tmp_path / "tokenizer.json")
    given = request_.tokenizer.model_copy(update={"path": str(tmp_path / "tokenizer.json")})
    again = replaced(request_, tokenizer=given, overwrite=True)
    path = tmp_path / "texts" / "2.jsonl"
    path.write_text("{torn\n" + path.read_text())
    assert "2.jsonl:1: not JSON" in fails(again, CorpusError)
    shards = status(again)["shards"]
    assert (shards.tasks, shards.done) == (FILES, 2)
    assert "2.jsonl:1: not JSON" in shards.errors[2]
    path.write_text(path.read_text().removeprefix("{torn\n"))
    assert redone(run(again)) == {"shards": FILES - 2, "finish": 1}
    assert status(again) == {}


def test_another_configuration_is_refused(scene: Scene) -> None:
    corpus = scene.request.corpus.model_copy(update={"validation_fraction": 0.5})
    other = replaced(scene.request, corpus=corpus)
    message = fails(other)
    assert "corpus.validation_fraction was 0.2, is 0.5" in message
    assert "--restart" in message
    assert redone(run(replaced(other, restart=True))) == {"tokenizer": 1, "shards": FILES, "finish": 1}


def test_a_kill_while_the_work_folder_is_removed(scene: Scene) -> None:
    stopped_at(prepare, "clear", scene.request)
    assert contents(scene.request.target) == scene.expected
    assert run(scene.request).tasks == {}
    assert contents(scene.request.target) == scene.expected
    assert not scene.request.folder.exists()


def test_a_kill_between_the_old_folder_and_the_new(scene: Scene) -> None:
    scene.request.target.mkdir()
    again, rename = replaced(scene.request, overwrite=True), Path.rename

    def stop_at_the_new(path: Path, to: Path) -> Path:
        return stop() if path == again.folder / "shards" else rename(path, to)

    stopped_at(Path, "rename", again, stop_at_the_new)
    assert not scene.request.target.exists()
    assert redone(run(again)) == {}
    assert contents(scene.request.target) == scene.expected


# Two at once


def test_a_second_preparation_of_the_folder_is_refused(request_: Request) -> None:
    with exclusive(request_.folder / "lock", "the first"):
        message = fails(request_)
    assert message.startswith(f"{request_.target}: process ")
    assert " on " in message


def test_a_second_process_at_a_task_is_refused(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.preparing.tasks._PATIENCE_SECONDS", 0.1)
    with exclusive(scene.request.folder / "locks" / "shards" / "00003", "the first"):
        message = fails(scene.request)
    assert f"{scene.request.folder}: task 3 of shards: process " in message
    assert redone(run(scene.request)) == {}


def test_a_lock_on_a_removed_file_locks_nothing(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with exclusive(path, "the first"):
        path.unlink()
        with (
            exclusive(path, "the second"),
            pytest.raises(UserError, match="the third: process"),
            exclusive(path, "the third"),
        ):
            pass


def test_on_a_cluster_an_error_stops_the_rest(scene: Scene) -> None:
    folder = scene.request.folder
    receipt = folder / "receipts" / "shards" / "00002.json"
    receipt.unlink()
    error = folder / "errors" / "shards" / "00001"
    error.parent.mkdir(parents=True)
    error.write_text("broken")
    Task(folder, "shards", stop_early=True).run(rank=2)
    assert not receipt.exists()
    Task(folder, "shards").run(rank=2)
    assert receipt.exists()


# What is written


def test_tasks_are_of_one_source_and_about_one_size() -> None:
    files = [SourceFile(f"{i}", i // 4, size) for i, size in enumerate([40, 50, 20, 300, 10, 95, 5, 1])]
    tasks = into_tasks(files, 100)
    assert [[f.bytes for f in task] for task in tasks] == [[40, 50], [20], [300], [10], [95, 5], [1]]
    assert into_tasks(files, 10_000) == [files[:4], files[4:]]


def test_a_bug_is_one_line_and_a_traceback_in_the_log(request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.preparing.stages.source_name", lambda *_: 1 / 0)
    message = fails(request_)
    assert "task 0 of shards: ZeroDivisionError: division by zero" in message
    log = Path(message.rpartition("see ")[2])
    assert "Traceback" in log.read_text()


def test_malformed_records_are_kept_aside(request_: Request) -> None:
    path = request_.target.parent / "texts" / "1.jsonl"
    path.write_text("{torn\n" + path.read_text())
    prepared = run(replaced(request_, corpus=request_.corpus.model_copy(update={"on_bad_record": "quarantine"})))
    content = prepared.manifest.content
    assert sum(content["read"]["bad_records"].values()) == 1
    (line,) = (request_.target / "bad-records" / "00001.jsonl").read_text().splitlines()
    assert json.loads(line)["record"] == "{torn\n"
    assert "bad-records/00001.jsonl" in content["files"]
    assert {p.name for p in request_.target.iterdir() if p.is_dir()} == {
        "bad-records",
        "train",
        "validation",
        "rows-48x96",
    }


def test_figures_of_sources_and_coverage_add_up(tmp_path: Path) -> None:
    write_texts(tmp_path / "texts")
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "1 + 1 =", "answer": " 2"}) + "\n")
    sources = [
        SourceConfig(path=str(tmp_path / "texts"), format="jsonl"),
        SourceConfig(name="sums", path=str(tmp_path / "a.jsonl"), format="jsonl"),
    ]
    content = run(request_for(tmp_path, CorpusConfig(sources=sources, validation_fraction=0.2))).manifest.content
    splits, sums = content["splits"].values(), content["sources"]["sums"]
    for key in ("documents", "blocks", "tokens", "text_bytes", "supervised_bytes", "bytes"):
        assert sum(split[key] for split in splits) == sum(source[key] for source in content["sources"].values())
    assert (sums["documents"], sums["supervised_bytes"], sums["shards"], sums["read"]["files"]) == (1, 2, 1, 1)
    totals = {key: sum(split[key] for split in splits) for key in ("blocks", "tokens", "text_bytes")}
    assert content["coverage"]["bytes_per_token"] == pytest.approx(totals["text_bytes"] / totals["tokens"], abs=1e-4)
    assert content["coverage"]["tokens_per_block"] == pytest.approx(totals["tokens"] / totals["blocks"], abs=1e-4)
    assert 0 < content["coverage"]["one_token_blocks"] < 1


@pytest.mark.parametrize("dedup", [{}, {"text": True}])
def test_the_hashes_of_the_corpus_files_are_recorded(tmp_path: Path, dedup: dict[str, bool]) -> None:
    folder = write_texts(tmp_path / "texts")
    (folder / "0.jsonl").rename(folder / "a\\b\nc.jsonl")
    sources = [SourceConfig(path=str(folder), format="jsonl")]
    corpus = CorpusConfig.model_validate({"sources": sources, "validation_fraction": 0.2, "dedup": dedup})
    manifest = run(request_for(tmp_path, corpus)).manifest
    recorded = tmp_path / "shards" / "corpus.sha256"
    checked = subprocess.run(["sha256sum", "--check", recorded], capture_output=True, text=True, check=True)
    assert len(checked.stdout.splitlines()) == FILES
    assert "FAILED" not in checked.stdout
    assert manifest.content["files"]["corpus.sha256"]["sha256"] == sha256_of(recorded)
    assert verify(manifest.storage) == []
    flip(folder / "1.jsonl")
    assert subprocess.run(["sha256sum", "--check", recorded], capture_output=True, check=False).returncode == 1


def test_the_report(tmp_path: Path) -> None:
    write_texts(tmp_path / "texts")
    config = config_file(tmp_path)
    assert "no unfinished preparation" in tidal_here("prepare", config, "--status").stdout.decode()
    result = tidal_here("prepare", config, "--json")
    report, manifest = json.loads(result.stdout), Manifest.load(tmp_path / "shards")
    assert report["tasks"]["shards"] == {"done": FILES, "kept": 0}
    assert report["read"]["documents"] == 60 * FILES
    assert report["coverage"] == manifest.content["coverage"]
    assert report["sources"]["texts"]["documents"] == 60 * FILES
    assert report["splits"]["train"]["rows"] > 10
    text = tidal_here("prepare", config, "--overwrite").stdout.decode()
    assert f"{60 * FILES} records" in text
    assert f"{report['coverage']['bytes_per_token']:.2f} bytes per token" in text
    assert f"tasks: {FILES + 2} done, 0 kept" in text


def test_the_stored_configuration_does_not_depend_on_the_workers(tmp_path: Path) -> None:
    write_texts(tmp_path / "texts")
    stored = []
    for workers in (1, 2):
        config = config_file(tmp_path, prepare={"workers": workers})
        assert tidal_here("prepare", "--overwrite", config, "prepare.task_bytes=100000").returncode == 0
        stored.append((tmp_path / "shards" / "config.yaml").read_bytes())
    assert stored[0] == stored[1]
    assert b"task_bytes: 100000" in stored[0]


# Progress


def test_progress_is_told_in_lines(request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.001)
    lines: list[str] = []
    run(request_, lines.append)
    assert f"shards: {FILES} of {FILES} tasks, {60 * FILES} documents" in "\n".join(lines)


def test_progress_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_LIVE_SECONDS", 0.001)
    board, terminal = progress.Board(tmp_path, [2_000_000, 2_000_000]), io.StringIO()
    progress.Watch(tmp_path / "00000.json").tell("done")
    lines: list[str] = []
    with progress.shown(board, "shards", lines.append, terminal):
        while "1 of 2 tasks" not in terminal.getvalue():
            time.sleep(0.001)
    assert "2.00M/4.00M" in terminal.getvalue()
    (line,) = lines
    assert line.startswith("shards: 1 of 2 tasks, about ")


def test_what_is_left_is_estimated(tmp_path: Path) -> None:
    watches = [progress.Watch(tmp_path / f"{task:05d}.json") for task in range(4)]
    board = progress.Board(tmp_path, [100, 100, 100, 100])
    assert board.look() == progress.Stand()
    watches[0].tell("kept")
    watches[1].tell("done")
    watches[2].tell("failed")
    stand = board.look()
    assert (stand.done, stand.kept, stand.failed) == (1, 1, 1)
    assert (stand.weight, stand.kept_weight) == (200, 100)
    assert "2 of 4 tasks, 1 of them kept" in progress._line(board, "shards", stand, 10.0)


def test_workers_are_no_more_than_the_work_is_worth() -> None:
    assert local_workers(PrepareConfig(), 100, 10_000) == 1
    assert local_workers(PrepareConfig(workers=3), 100, 10_000) == 3
    assert local_workers(PrepareConfig(workers=3), 2, 10_000) == 2
