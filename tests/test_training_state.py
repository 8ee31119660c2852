"""What a run reads and where it stands, without the engine."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import BadShardError, CorpusError
from data_pipeline.ledger import SourceUse
from data_pipeline.quarantine import QuarantineRecord
from data_pipeline.shards import DataConfig, Manifest
from tests.mixed_shards import SUMS, TIDES, prepare_mixed
from tidal_dist.config import Config
from tidal_dist.errors import CheckpointError, ShardError, UserError
from tidal_dist.provenance import Provenance
from tidal_dist.training import checkpoint as ckpt
from tidal_dist.training.data import RunData, data_scalars, open_data, record_of_bad_shards
from tidal_dist.training.monitor import Pace
from tidal_dist.training.state import Saver

MIX = [{"weights": {SUMS: 0.5, TIDES: 0.5}}, {"from_step": 8, "weights": {SUMS: 0.25, TIDES: 0.75}}]
STEP, BATCH = 6, 8


class FakeEngine:
    """Loads nothing."""

    def load_checkpoint(self, *_: Any, **__: Any) -> tuple[str, dict]:
        return "loaded", {}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return prepare_mixed(tmp_path_factory.mktemp("mixed"), data={"mix": MIX})[1]


def opened(config: Config, record: QuarantineRecord | None = None, world: int = 1) -> tuple[Manifest, RunData]:
    manifest = Manifest.of(config.data)
    record = record or QuarantineRecord(manifest.hash)
    return manifest, open_data(config, manifest, manifest.tokenizer(), record, (0, world), pin_memory=False)


def saver_of(config: Config) -> Saver:
    manifest, data = opened(config)
    return Saver(config, manifest, data, FakeEngine(), world=1)


def changed(config: Config, folder: Path, **data: Any) -> Config:
    """The configuration with other data settings, and its run in `folder`."""
    sections = config.model_dump()
    return Config.model_validate(sections | {"run_dir": str(folder), "data": sections["data"] | data})


def write_state(config: Config, quarantine: dict[str, int] | None = None) -> Path:
    """A checkpoint of step 6 without weights, as a run of this configuration writes it."""
    saver, manifest = saver_of(config), Manifest.of(config.data)
    made = Provenance(
        run=config.run_dir,
        config_hash="",
        step=STEP,
        rows=STEP * BATCH,
        rolling_hash="ab" * 32,
        manifest_hash=manifest.hash,
        tokenizer_hash=manifest.content["tokenizer_hash"],
        segmentation_hash=manifest.content["segmentation_hash"],
        precision="fp32",
        probe_loss=1.0,
        metrics={"validation/exact_match": 0.5},
        quarantine=quarantine or {},
    )
    state = ckpt.TrainingState(made, 1, saver._order_hash(STEP * BATCH), 12.0)
    checkpoint = Path(config.run_dir) / "checkpoints" / f"step-{STEP:08d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / ckpt.STATE).write_text(json.dumps(asdict(state)))
    return checkpoint


def empty(config: Config) -> QuarantineRecord:
    return QuarantineRecord(Manifest.of(config.data).hash)


def test_a_run_is_found_where_it_stood(config: Config, tmp_path: Path) -> None:
    ours = changed(config, tmp_path)
    state = saver_of(ours).load(write_state(ours), empty(ours))
    assert (state.step, state.rolling_hash, state.metrics) == (STEP, "ab" * 32, {"validation/exact_match": 0.5})


@pytest.mark.parametrize(
    "data",
    [
        {"mix": MIX[:1]},
        {"mix": [*MIX, {"from_step": 10, "weights": {SUMS: 1}}]},
        {"mix": [MIX[0], {"from_step": STEP, "weights": {TIDES: 1}}]},
        {"workers": 3, "prefetch_steps": 2, "on_bad_shard": "quarantine"},
    ],
)
def test_a_mix_may_change_where_the_run_has_not_come_yet(config: Config, tmp_path: Path, data: dict) -> None:
    checkpoint = write_state(changed(config, tmp_path))
    theirs = changed(config, tmp_path, **data)
    assert saver_of(theirs).load(checkpoint, empty(theirs)).step == STEP


@pytest.mark.parametrize(
    "data",
    [
        {"mix": []},
        {"mix": [{"weights": {SUMS: 0.6, TIDES: 0.4}}]},
        {"mix": [MIX[0], {"from_step": STEP - 1, "weights": {TIDES: 1}}]},
        {"seed": 2},
        {"lanes": 2},
    ],
)
def test_what_was_read_cannot_change(config: Config, tmp_path: Path, data: dict) -> None:
    checkpoint = write_state(changed(config, tmp_path))
    theirs = changed(config, tmp_path, **data)
    with pytest.raises(CheckpointError, match=r": order hash "):
        saver_of(theirs).load(checkpoint, empty(theirs))


@pytest.mark.parametrize(
    ("recorded", "trained_with", "fits"),
    [
        ({"a": 40}, {"a": 40}, True),
        ({"a": STEP * BATCH}, {}, True),  # the next step could not be read, after the checkpoint
        ({}, {"a": 40}, False),
        ({"a": 32}, {"a": 40}, False),
        ({"a": 40}, {}, False),
    ],
)
def test_the_record_must_be_that_of_the_checkpoint(
    config: Config, tmp_path: Path, recorded: dict[str, int], trained_with: dict[str, int], fits: bool
) -> None:
    ours = changed(config, tmp_path)
    checkpoint, record = write_state(ours, trained_with), empty(ours)
    for name, row in recorded.items():
        record = record.with_shards([BadShardError("", 0, name)], row)
    if fits:
        assert saver_of(ours).load(checkpoint, record).record == record
    else:
        with pytest.raises(CheckpointError, match=r"quarantine\.json: not the record that step-00000006 was trained"):
            saver_of(ours).load(checkpoint, record)


def test_older_checkpoints_have_no_quarantine(config: Config, tmp_path: Path) -> None:
    ours = changed(config, tmp_path)
    checkpoint = write_state(ours)
    content = json.loads((checkpoint / ckpt.STATE).read_text())
    del content["provenance"]["quarantine"]
    (checkpoint / ckpt.STATE).write_text(json.dumps(content))
    assert saver_of(ours).load(checkpoint, empty(ours)).step == STEP


@pytest.mark.parametrize(
    ("data", "world", "expected"),
    [
        (
            {"mix": [{"weights": {"songs": 1, SUMS: 1}}]},
            1,
            r"data\.mix\.0\.weights: no source songs; .* has sums, tides",
        ),
        ({"lanes": 3}, 2, r"data\.lanes=3 is not a multiple of 2 ranks"),
        ({"lanes": 3}, 1, r"training\.batch_rows=8 is not a multiple of data\.lanes=3"),
    ],
)
def test_configurations_that_do_not_fit_the_shards(
    config: Config, tmp_path: Path, data: dict, world: int, expected: str
) -> None:
    with pytest.raises(ShardError, match=expected):
        opened(changed(config, tmp_path, **data), world=world)


def test_a_source_that_is_too_small_for_the_lanes(config: Config, tmp_path: Path) -> None:
    sections = changed(config, tmp_path, lanes=128).model_dump()
    sections["training"]["batch_rows"] = 128
    with pytest.raises(
        ShardError, match=r"source tides of the training split has \d+ rows, fewer than data\.lanes=128"
    ):
        opened(Config.model_validate(sections))


def test_the_stream_leaves_out_what_is_recorded(config: Config) -> None:
    manifest = Manifest.of(config.data)
    record = QuarantineRecord(manifest.hash).with_shards([BadShardError("", 0, "train/tides-000001")], 24)
    _, data = opened(config, record)
    index = [entry["name"] for entry in manifest.shards("train")].index("train/tides-000001")
    assert [(q.shard, q.from_row) for q in data.stream.order.quarantines] == [(index, 24)]
    _, other = opened(config)
    assert other.stream.order.quarantines == ()
    other.leave_out(record)
    assert other.stream.order == data.stream.order


def bad(name: str) -> BadShardError:
    return BadShardError(f"/shards/{name}.tar: torn", 3, name)


def data_config(**changes: Any) -> DataConfig:
    return DataConfig(shards="shards", row_tokens=8, row_chars=8, **changes)


def test_ranks_agree_on_bad_shards() -> None:
    """Whichever rank says what, in whatever order."""
    policy = data_config(on_bad_shard="quarantine")
    first = record_of_bad_shards([None, bad("b"), None, bad("a"), bad("b")], QuarantineRecord("h"), 48, policy)
    assert first == record_of_bad_shards([bad("a"), bad("b")], QuarantineRecord("h"), 48, policy)
    assert [(s.name, s.from_row) for s in first.shards] == [("a", 48), ("b", 48)]
    second = record_of_bad_shards([bad("c"), bad("a")], first, 64, policy)
    assert [(s.name, s.from_row) for s in second.shards] == [("a", 48), ("b", 48), ("c", 64)]


def test_bad_shards_stop_a_run_that_does_not_quarantine() -> None:
    with pytest.raises(ShardError, match=r"^/shards/b\.tar: torn; then resume, or go on without b: data\.on_bad_shard"):
        record_of_bad_shards([None, bad("b")], QuarantineRecord(""), 48, data_config())


def test_other_problems_stop_every_run() -> None:
    with pytest.raises(CorpusError, match="something else"):
        record_of_bad_shards(
            [bad("a"), CorpusError("something else")], QuarantineRecord(""), 48, data_config(on_bad_shard="quarantine")
        )


def test_too_many_bad_shards_are_the_disk() -> None:
    policy = data_config(on_bad_shard="quarantine", max_quarantined_shards=2)
    record = record_of_bad_shards([bad("a"), bad("b")], QuarantineRecord(""), 48, policy)
    assert record_of_bad_shards([bad("a")], record, 64, policy) == record
    with pytest.raises(UserError, match=r"with it 3 shards cannot be read, more than data\.max_quarantined_shards=2"):
        record_of_bad_shards([bad("c")], record, 64, policy)


def test_tensorboard_shows_each_source() -> None:
    uses = [SourceUse("a", 10, 0.5, 0, 0), SourceUse("b", 30, 2.5, 18, 4)]
    assert data_scalars(uses, 1) == {
        "data/quarantined_shards": 1,
        "data/empty_rows": 4,
        "data/a/rows": 10,
        "data/a/epochs": 0.5,
        "data/a/repeats": 0,
        "data/b/rows": 30,
        "data/b/epochs": 2.5,
        "data/b/repeats": 18,
    }
    assert data_scalars(uses[:1], 0)["data/epochs"] == 0.5


def test_pace_counts_what_training_takes(monkeypatch: pytest.MonkeyPatch, config: Config) -> None:
    now = [100.0]
    monkeypatch.setattr("tidal_dist.training.monitor.time.monotonic", lambda: now[0])
    (batch,) = next(opened(config)[1].stream).batches
    pace = Pace(world=2)
    for _ in range(2):
        with pace.waiting():
            now[0] += 1.0
        now[0] += 3.0
        pace.add([batch])
        with pace.pausing():
            now[0] += 50.0
    figures = pace.restart()
    assert figures["speed/seconds_per_step"] == 4.0
    assert figures["speed/data_wait_share"] == 0.25
    assert figures["speed/bytes_per_second"] == 2 * 2 * batch.byte_count() / 8.0
    assert figures["speed/tokens_per_second"] == 2 * 2 * batch.token_count() / 8.0
    now[0] += 2.0
    pace.add([batch])
    assert pace.restart()["speed/seconds_per_step"] == 2.0
