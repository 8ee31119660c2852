"""What a run read, told from its folder: the rolling log, `tidal explain` and `tidal audit`."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_pipeline.errors import BadShardError
from data_pipeline.ordering import roll
from data_pipeline.pieces import blocks_of_piece
from data_pipeline.quarantine import QUARANTINE, LeftOutRows, QuarantineRecord
from data_pipeline.rows import RowReader, row_format_of
from tests.launching import tidal_error, tidal_here
from tests.mixed_shards import SUMS, TIDES, prepare_mixed, sums, tides, write_shards
from tidal_dist.errors import UserError
from tidal_dist.history.log import ROLLING_HASH, Line, RollingLog, read_log
from tidal_dist.history.past import open_run

MIX = [{"weights": {SUMS: 0.5, TIDES: 0.5}}, {"from_step": 5, "weights": {SUMS: 0.75, TIDES: 0.25}}]
BATCH = 8


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards and `config.yaml`."""
    folder = tmp_path_factory.mktemp("mixed")
    prepare_mixed(folder, data={"mix": MIX})
    return folder


MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(prepared: Path, tmp_path: Path) -> MakeRun:
    """`make_run(name, steps=..., every=..., left_out={shard: row}, rows_out=(row, row), data={...}, training={...})`:
    the folder of a run with the log that it would have written."""

    def make(
        name: str,
        steps: int = 12,
        every: int = 3,
        left_out: dict[str, int] | None = None,
        rows_out: tuple[int, int] | None = None,
        **sections: dict,
    ) -> Path:
        run = tmp_path / name
        run.mkdir()
        content = yaml.safe_load((prepared / "config.yaml").read_text())
        for section, values in sections.items():
            content[section] |= values
        (run / "config.yaml").write_text(yaml.safe_dump(content))
        past = open_run(run)
        record = QuarantineRecord(past.manifest.hash)
        for shard, row in (left_out or {}).items():
            record = record.with_shards([BadShardError("torn", 0, shard)], row)
        if rows_out:
            record = record.with_rows(LeftOutRows(*rows_out, "the loss is nan"))
        if left_out or rows_out:
            record.write(run)
            past = open_run(run)
        first = Line(0, 0, past.start)
        log, rolled = RollingLog(run, first, first), past.start
        for step in range(1, steps + 1):
            rolled = roll(rolled, past.order, range((step - 1) * past.rows_per_step, step * past.rows_per_step))
            if step % every == 0 or step == steps:
                log.add(Line(step, step * past.rows_per_step, rolled))
        return run

    return make


def explained(run: Path, step: int, *arguments: str) -> list[dict[str, Any]]:
    result = tidal_here("explain", "--run", run, "--step", str(step), "--json", *arguments)
    assert result.returncode == 0, result.stderr.decode()
    return json.loads(result.stdout)["rows"]


def audited(first: Path, second: Path) -> dict[str, Any]:
    result = tidal_here("audit", first, second, "--json")
    report = json.loads(result.stdout)
    assert result.returncode == (0 if report["same"] else 1)
    text = tidal_here("audit", first, second)
    assert text.returncode == result.returncode
    assert ("the same rows" in text.stdout.decode()) == report["same"]
    return report


# --- the log ---


def line_of(step: int) -> Line:
    return Line(step, step * BATCH, f"{step:064x}")


def test_the_log_is_what_was_added(tmp_path: Path) -> None:
    log = RollingLog(tmp_path, line_of(0), line_of(0))
    for step in (3, 6):
        log.add(line_of(step))
    assert read_log(tmp_path) == [line_of(0), line_of(3), line_of(6)]
    assert (tmp_path / ROLLING_HASH).read_text().splitlines()[:2] == ["step\trows\trolling_hash", f"0\t0\t{0:064x}"]


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    log = RollingLog(tmp_path, line_of(0), line_of(0))
    for step in (3, 6, 9):
        log.add(line_of(step))
    RollingLog(tmp_path, line_of(0), line_of(7)).add(line_of(8))
    assert read_log(tmp_path) == [line_of(step) for step in (0, 3, 6, 7, 8)]
    RollingLog(tmp_path, line_of(0), line_of(3))
    assert read_log(tmp_path) == [line_of(0), line_of(3)]
    RollingLog(tmp_path, line_of(0), line_of(0))
    assert read_log(tmp_path) == [line_of(0)]


@pytest.mark.parametrize("kept", range(1, 70))
def test_a_line_that_was_cut_off_is_not_there(tmp_path: Path, kept: int) -> None:
    log = RollingLog(tmp_path, line_of(0), line_of(0))
    log.add(line_of(3))
    whole = (tmp_path / ROLLING_HASH).read_bytes()
    log.add(line_of(6))
    (tmp_path / ROLLING_HASH).write_bytes((tmp_path / ROLLING_HASH).read_bytes()[: len(whole) + kept])
    assert read_log(tmp_path) == [line_of(0), line_of(3)]
    RollingLog(tmp_path, line_of(0), line_of(3)).add(line_of(4))
    assert read_log(tmp_path) == [line_of(0), line_of(3), line_of(4)]


@pytest.mark.parametrize("text", ["3\t24\n", "x\t24\t" + "0" * 64 + "\n", "3\t24\tabc\n", "\n", "\xff\n"])
def test_a_spoilt_log_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / ROLLING_HASH).write_text(f"step\trows\trolling_hash\n{text}", "latin-1")
    with pytest.raises(UserError, match=ROLLING_HASH):
        read_log(tmp_path)


# --- explain ---


def test_explain_names_every_document(make_run: MakeRun) -> None:
    """Every piece is the stretch of the document that file, line and offset name; the rows are those of training."""
    run = make_run("run")
    past = open_run(run)
    reader = RowReader(past.manifest, "train", past.manifest.tokenizer(), row_format_of(past.config.data), 1)
    texts = {("corpus/sums.jsonl", d.origin[1]): (d.prompt, d.text) for d in sums(700)}
    texts |= {d.origin: (d.prompt, d.text) for d in tides(40)}
    sources, cut = set(), 0
    for step in (1, 5, 6, 12):
        rows = explained(run, step, "--full")
        assert [row["g"] for row in rows] == list(range((step - 1) * BATCH, step * BATCH))
        for row in rows:
            address = past.order.locate(row["g"])
            assert (row["epoch"], row["row"], row["source"]) == (address.epoch, address.row, address.source)
            assert row["shard"].startswith(f"train/{row['source']}-")
            assert (row["lane"], row["rank"], row["left_out"]) == (row["g"] % 4, None, False)
            for piece, stored in zip(row["pieces"], reader.pieces(address), strict=True):
                prompt, text = texts[piece["file"], piece["line"]]
                whole = (prompt + text).encode()
                found = (piece["prompt"] + piece["text"]).encode()
                assert whole[piece["first_byte"] :].startswith(found)
                assert "".join(blocks_of_piece(stored)).encode() == found
                assert piece["end_block"] - piece["first_block"] == len(blocks_of_piece(stored))
                assert prompt.endswith(piece["prompt"]) or not prompt
                cut += found != whole
            sources.add(row["source"])
    assert sources == {SUMS, TIDES}
    assert cut > 0  # some documents were longer than a row


def test_explain_by_rank(make_run: MakeRun) -> None:
    run = make_run("run")
    everything = explained(run, 3, "--ranks", "2")
    assert [row["rank"] for row in everything] == [0, 1] * 4
    for rank in (0, 1):
        assert explained(run, 3, "--ranks", "2", "--rank", str(rank)) == everything[rank::2]
    text = tidal_here("explain", "--run", run, "--step", "3", "--ranks", "2").stdout.decode()
    assert sum(line.startswith("row ") for line in text.splitlines()) == BATCH
    for row in everything:
        assert f"row {row['g']}  lane {row['lane']}  rank {row['rank']}  source {row['source']}" in text
        assert all(f"  {piece['file']}" in text for piece in row["pieces"])


def test_explain_shortens_texts_unless_told_otherwise(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tidal_dist.history.explain._SHORT", 3)
    run = make_run("run")
    for row, whole in zip(explained(run, 1), explained(run, 1, "--full"), strict=True):
        for piece, full in zip(row["pieces"], whole["pieces"], strict=True):
            text = full["text"]
            assert piece["text"] == (text if len(text) <= 3 else f"{text[:3]}… ({len(text)} characters)")


def test_explain_shows_what_was_left_out(make_run: MakeRun) -> None:
    plain = make_run("plain")
    g, shard = next((row["g"], row["shard"]) for row in explained(plain, 4) if row["source"] == TIDES)
    run = make_run("run", left_out={shard: g})
    found = [row for step in (3, 4, 5) for row in explained(run, step)]
    expected = [row for step in (3, 4, 5) for row in explained(plain, step)]
    for row, full in zip(found, expected, strict=True):
        out = row["g"] >= g and row["shard"] == shard
        why = "its shard could not be read"
        assert row == (full | {"left_out": True, "why_left_out": why, "pieces": []} if out else full)
    assert f"left empty: {why}" in tidal_here("explain", "--run", run, "--step", "4").stdout.decode()


def test_explain_shows_why_rows_were_left_out_and_what_they_held(make_run: MakeRun) -> None:
    plain, run = make_run("plain"), make_run("run", rows_out=(3 * BATCH, 4 * BATCH))
    for row, full in zip(explained(run, 4), explained(plain, 4), strict=True):
        assert row == full | {"left_out": True, "why_left_out": "the loss is nan"}
        assert row["pieces"]
    assert explained(run, 3) == explained(plain, 3)
    assert explained(run, 5) == explained(plain, 5)
    assert tidal_here("explain", "--run", run, "--step", "4").stdout.decode().count("left empty: the loss is nan") == 8


def test_explain_needs_no_log_and_finds_shards_that_moved(make_run: MakeRun, prepared: Path, tmp_path: Path) -> None:
    run = make_run("run")
    expected = explained(run, 2)
    (run / ROLLING_HASH).unlink()
    shutil.copytree(prepared / "shards", tmp_path / "moved")
    content = yaml.safe_load((run / "config.yaml").read_text())
    content["data"]["shards"] = str(tmp_path / "gone")
    (run / "config.yaml").write_text(yaml.safe_dump(content))
    assert "no manifest.json" in tidal_error("explain", "--run", run, "--step", "2")
    assert explained(run, 2, "--data", str(tmp_path / "moved")) == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--run", "nowhere", "--step", "1"], "nowhere: no config.yaml, so no run"),
        (["--run", "RUN", "--step", "0"], "--step 0: "),
        (["--run", "RUN", "--step", "13"], "has the steps 1..12"),
        (["--run", "RUN", "--step", "1", "--rank", "0"], "no checkpoint that says how many there were; give --ranks"),
        (["--run", "RUN", "--step", "1", "--rank", "2", "--ranks", "2"], "--rank 2: the run had the ranks 0..1"),
        (["--run", "RUN", "--step", "1", "--rank", "-1", "--ranks", "2"], "--rank -1: "),
        (["--run", "RUN", "--step", "1", "--ranks", "3"], "--ranks 3: the run's 4 lanes"),
        (["--run", "RUN", "--step", "1", "--ranks", "0"], "--ranks 0: must be at least 1"),
        (["--run", "RUN", "--step", "1", "--data", "OTHERS"], "not the shards that"),
    ],
)
def test_mistakes_get_one_line(make_run: MakeRun, tmp_path: Path, arguments: list[str], expected: str) -> None:
    places = {"RUN": str(make_run("run")), "OTHERS": str(tmp_path / "others" / "shards")}
    if "OTHERS" in arguments:
        prepare_mixed_with_seed_2(tmp_path / "others")
    assert expected in tidal_error("explain", *(places.get(a, a) for a in arguments))


def prepare_mixed_with_seed_2(folder: Path) -> None:
    from data_pipeline.rows import write_row_plan
    from tidal_dist.config import load_config

    manifest = write_shards(folder / "shards", seed=2)
    config = load_config(folder.parent / "run" / "config.yaml")
    write_row_plan(manifest, row_format_of(config.data))


def test_explain_of_a_torn_shard_names_it(make_run: MakeRun, prepared: Path, tmp_path: Path) -> None:
    run = make_run("run")
    shutil.copytree(prepared / "shards", tmp_path / "copy")
    shard = explained(run, 1)[0]["shard"]
    (tmp_path / "copy" / f"{shard}.tar").write_bytes(b"")
    assert f"{shard}.tar: 0 bytes" in tidal_error("explain", "--run", run, "--step", "1", "--data", tmp_path / "copy")


# --- audit ---


def test_the_same_run_twice(make_run: MakeRun) -> None:
    report = audited(make_run("a"), make_run("b", every=5))
    assert (report["same"], report["rows_compared"]) == (True, 96)


def test_runs_of_other_batches_and_lengths_are_compared_by_rows(make_run: MakeRun) -> None:
    """Without a mix, whose stages begin with a step, the batch does not matter."""
    alone = {"mix": []}
    first = make_run("a", steps=10, every=3, data=alone)
    second = make_run("b", steps=7, every=2, data=alone, training={"batch_rows": 12})
    report = audited(first, second)
    assert (report["same"], report["rows_compared"]) == (True, 80)


@pytest.mark.parametrize("every", [1, 5, 12])
@pytest.mark.parametrize("from_step", [1, 3, 5, 11])
def test_a_mix_that_changes_is_found_to_the_step(make_run: MakeRun, from_step: int, every: int) -> None:
    stages = [{"weights": {SUMS: 1}}, {"from_step": from_step, "weights": {TIDES: 1}}]
    first = make_run("a", every=every, data={"mix": stages})
    second = make_run("b", every=3, data={"mix": stages[:1]})
    report = audited(first, second)
    assert not report["same"]
    assert report["pinned"]
    assert report["same_rows"] == from_step * BATCH
    assert report["first_different_step"] == [from_step + 1] * 2
    assert list(report["settings"]) == ["data.mix"]
    assert [held.split("-")[0] for held in report["held"]] == [f"train/{TIDES}", f"train/{SUMS}"]


def test_a_shard_left_out_is_found_to_the_row(make_run: MakeRun) -> None:
    first = make_run("a")
    g, shard = next((r["g"], r["shard"]) for step in range(6, 12) for r in explained(first, step))
    report = audited(first, make_run("b", left_out={shard: g}))
    assert report["same_rows"] == g
    assert report["first_different_step"] == [g // BATCH + 1] * 2
    assert report["settings"] == {"left out": [{}, {shard: g}]}
    assert report["held"][1] == f"{report['held'][0]}, left empty"


def test_rows_left_out_are_found(make_run: MakeRun) -> None:
    report = audited(make_run("a"), make_run("b", rows_out=(5 * BATCH, 7 * BATCH)))
    assert report["same_rows"] == 5 * BATCH
    assert report["settings"] == {"rows left out": [[], [[5 * BATCH, 7 * BATCH]]]}
    assert report["held"][1] == f"{report['held'][0]}, left empty"


def test_another_seed_differs_from_the_first_step(make_run: MakeRun) -> None:
    report = audited(make_run("a"), make_run("b", data={"seed": 2}))
    assert report["first_different_step"] == [1, 1]
    assert report["settings"] == {"data.seed": [1, 2]}


def test_another_row_plan_differs_from_the_first_step(make_run: MakeRun, prepared: Path) -> None:
    first = make_run("a")
    result = tidal_here("plan-rows", prepared / "config.yaml", "data.row_chars=65")
    assert result.returncode == 0, result.stderr.decode()
    report = audited(first, make_run("b", data={"row_chars": 65}))
    assert (report["same_rows"], report["first_different_step"]) == (0, [1, 1])
    assert list(report["settings"]) == ["data.row_chars"]


def test_logs_alone_are_compared_where_the_shards_are_gone(make_run: MakeRun, tmp_path: Path) -> None:
    stages = [{"weights": {SUMS: 1}}, {"from_step": 7, "weights": {TIDES: 1}}]
    first, second = make_run("a", data={"mix": stages}), make_run("b", every=6, data={"mix": stages[:1]})
    assert audited(first, second)["same_rows"] == 7 * BATCH
    content = yaml.safe_load((second / "config.yaml").read_text())
    content["data"]["shards"] = str(tmp_path / "gone")
    (second / "config.yaml").write_text(yaml.safe_dump(content))
    report = audited(first, second)
    assert (report["same_rows"], report["differs_by_row"], report["pinned"]) == (6 * BATCH, 12 * BATCH, False)
    assert "no manifest.json" in report["runs"][1]["note"]
    assert audited(first, first)["same"]


def test_a_folder_that_was_changed_afterwards(make_run: MakeRun) -> None:
    first, second = make_run("a"), make_run("b", data={"seed": 2})
    shutil.copy(first / "config.yaml", second / "config.yaml")
    report = audited(first, second)
    assert (report["same"], report["pinned"], report["settings"]) == (False, False, {})
    assert "one of them was changed" in tidal_here("audit", first, second).stdout.decode()


def test_audit_needs_two_logs(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("run")
    other = make_run("other")
    (other / ROLLING_HASH).unlink()
    assert "no rolling_hash.tsv" in tidal_error("audit", run, other)
    assert "no config.yaml" in tidal_error("audit", tmp_path, run)


# --- the quarantine record ---


def bad(name: str) -> BadShardError:
    return BadShardError(f"{name}.tar: torn", 3, name)


def test_the_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    record = QuarantineRecord("a hash").with_shards([bad("train/b"), bad("train/a")], 48)
    record.write(tmp_path)
    assert QuarantineRecord.load(tmp_path, "a hash") == record
    assert [(s.name, s.from_row, s.reason) for s in record.shards] == [
        ("train/a", 48, "train/a.tar: torn"),
        ("train/b", 48, "train/b.tar: torn"),
    ]
    assert QuarantineRecord.load(tmp_path / "nowhere", "a hash") == QuarantineRecord("a hash")
    assert [(q.shard, q.from_row) for q in record.in_order(["train/b", "train/c", "train/a"])] == [(2, 48), (0, 48)]


def test_an_earlier_row_replaces_a_later_one() -> None:
    record = QuarantineRecord("").with_shards([bad("a")], 48)
    assert record.with_shards([bad("a")], 80) == record
    assert record.with_shards([bad("a")], 16).before(99) == {"a": 16}
    assert record.with_shards([bad("b")], 80).before(64) == {"a": 48}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"format": 1, "manifest_hash": "of others", "shards": []}, "recorded with other shards"),
        ({"format": 2, "manifest_hash": "h", "shards": []}, "format 2"),
        ({"format": 1, "manifest_hash": "h"}, "lacks shards"),
        ({"format": 1, "manifest_hash": "h", "shards": [{"name": "a"}]}, "not a record of shards"),
        (
            {"format": 1, "manifest_hash": "h", "shards": [], "rows": [{"from_row": 8}]},
            "not a record of shards and rows",
        ),
        ([], "format None"),
    ],
)
def test_records_that_do_not_fit(tmp_path: Path, content: object, expected: str) -> None:
    (tmp_path / QUARANTINE).write_text(json.dumps(content))
    with pytest.raises(UserError, match=expected) as caught:
        QuarantineRecord.load(tmp_path, "h")
    assert str(caught.value).startswith(str(tmp_path / QUARANTINE))


def test_a_record_of_a_shard_that_is_not_there() -> None:
    with pytest.raises(UserError, match="no shard train/a"):
        QuarantineRecord("").with_shards([bad("train/a")], 48).in_order(["train/b"])
