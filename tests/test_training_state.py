"""What a run reads and where it stands, without the engine."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data_pipeline.errors import BadShardError, CorpusError
from data_pipeline.layout import IGNORED
from data_pipeline.ledger import SourceUse
from data_pipeline.quarantine import LeftOutRows, QuarantineRecord
from data_pipeline.shards import DataConfig, Manifest
from data_pipeline.stream import Batch, fixed_batches
from tests.mixed_shards import SUMS, TIDES, prepare_mixed
from tidal_dist.config import Config
from tidal_dist.errors import CheckpointError, ShardError, UserError
from tidal_dist.provenance import Provenance
from tidal_dist.training import checkpoint as ckpt
from tidal_dist.training import commit
from tidal_dist.training.bad_steps import checkpoint_before
from tidal_dist.training.data import RunData, data_scalars, open_data, record_of_bad_shards
from tidal_dist.training.resume import check_model, check_probe, check_shapes
from tidal_dist.training.state import Saver

MIX = [{"weights": {SUMS: 0.5, TIDES: 0.5}}, {"from_step": 8, "weights": {SUMS: 0.25, TIDES: 0.75}}]
STEP, BATCH = 6, 8


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return prepare_mixed(tmp_path_factory.mktemp("mixed"), data={"mix": MIX})[1]


def opened(config: Config, record: QuarantineRecord | None = None, world: int = 1) -> tuple[Manifest, RunData]:
    manifest = Manifest.of(config.data)
    record = record or QuarantineRecord(manifest.hash)
    return manifest, open_data(config, manifest, manifest.tokenizer(), record, (0, world), pin_memory=False)


def saver_of(config: Config) -> Saver:
    manifest, data = opened(config)
    return Saver(config, manifest, data, engine=None, world=1)


def changed(config: Config, folder: Path, **data: Any) -> Config:
    """The configuration with other data settings, and its run in `folder`."""
    sections = config.model_dump()
    return Config.model_validate(sections | {"run_dir": str(folder), "data": sections["data"] | data})


def test_the_probe_is_the_row_with_most_to_say(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the first rows, one; a row may be all prompt."""
    _, data = opened(config)
    assert len(data.probe.labels) == 1

    def without_labels(reader: Any, most: int, size: int, share: tuple[int, int]) -> list[Batch]:
        batches = fixed_batches(reader, most, size, share)
        batches[0].labels.fill_(IGNORED)
        return batches

    monkeypatch.setattr("tidal_dist.training.data.fixed_batches", without_labels)
    assert opened(config)[1].probe.label_count() > 0


def write_state(config: Config, quarantine: dict[str, int] | None = None, step: int = STEP) -> Path:
    """A checkpoint without weights, as a run of this configuration writes it."""
    saver, manifest = saver_of(config), Manifest.of(config.data)
    made = Provenance(
        run=config.run_dir,
        config_hash="",
        step=step,
        rows=step * BATCH,
        rolling_hash="ab" * 32,
        manifest_hash=manifest.hash,
        tokenizer_hash=manifest.content["tokenizer_hash"],
        segmentation_hash=manifest.content["segmentation_hash"],
        precision="fp32",
        probe_loss=1.0,
        metrics={"validation/exact_match": 0.5},
        quarantine=quarantine or {},
    )
    state = ckpt.TrainingState(made, 1, saver._order_hash(step * BATCH), 12.0)
    folder = Path(config.run_dir) / "checkpoints"
    partial, final = commit.partial_folder(folder, step), commit.final_folder(folder, step)
    partial.mkdir(parents=True)
    (partial / ckpt.STATE).write_bytes(state.as_json())
    commit.commit(partial, final, step, [commit.written_file(partial, partial / ckpt.STATE)])
    return final


def empty(config: Config) -> QuarantineRecord:
    return QuarantineRecord(Manifest.of(config.data).hash)


def test_a_run_is_found_where_it_stood(config: Config, tmp_path: Path) -> None:
    ours = changed(config, tmp_path)
    state = saver_of(ours).stand(write_state(ours), empty(ours))
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
    assert saver_of(theirs).stand(checkpoint, empty(theirs)).step == STEP


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
        saver_of(theirs).stand(checkpoint, empty(theirs))


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
        assert saver_of(ours).stand(checkpoint, record).record == record
    else:
        with pytest.raises(CheckpointError, match=r"quarantine\.json: not the record that step-00000006 was trained"):
            saver_of(ours).stand(checkpoint, record)


@pytest.mark.parametrize("name", ["manifest_hash", "tokenizer_hash", "segmentation_hash"])
def test_another_corpus_tokeniser_or_segmentation_is_named(config: Config, tmp_path: Path, name: str) -> None:
    ours = changed(config, tmp_path)
    checkpoint = write_state(ours)
    content = json.loads((checkpoint / ckpt.STATE).read_text())
    content["provenance"][name] = "0" * 64
    (checkpoint / ckpt.STATE).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=rf"step-00000006: {name.replace('_', ' ')} 0000.* there, .* in this run"):
        saver_of(ours).stand(checkpoint, empty(ours))


def test_another_model_is_named_with_all_that_differs(config: Config, tmp_path: Path) -> None:
    (tmp_path / ckpt.CONFIG).write_text(config.to_yaml())
    sections = config.model_dump()
    other = sections | {"model": sections["model"] | {"width": 64, "encoding": "alibi", "dropout": 0.5}}
    with pytest.raises(
        CheckpointError, match=r"model\.width 16 there, 64 in this run; model\.encoding rope there, alibi"
    ):
        check_model(tmp_path, Config.model_validate(other))
    check_model(tmp_path, Config.model_validate(sections | {"model": sections["model"] | {"dropout": 0.5}}))


def test_another_shape_is_named(tmp_path: Path) -> None:
    engine = SimpleNamespace(module=torch.nn.Linear(3, 2))
    state = SimpleNamespace(parameters={"weight": {"shape": [2, 3]}, "bias": {"shape": [2]}})
    check_shapes(tmp_path, state, engine)  # type: ignore[arg-type]
    state.parameters["weight"]["shape"] = [3, 3]
    with pytest.raises(CheckpointError, match=r"another model: weight \[3, 3\] there, \[2, 3\] in this run"):
        check_shapes(tmp_path, state, engine)  # type: ignore[arg-type]
    del state.parameters["weight"]
    with pytest.raises(CheckpointError, match=r"weight none there, \[2, 3\] in this run"):
        check_shapes(tmp_path, state, engine)  # type: ignore[arg-type]


def test_a_probe_loss_that_is_not_repeated_is_an_error(config: Config, tmp_path: Path) -> None:
    state = ckpt.load_state(write_state(changed(config, tmp_path)))
    assert check_probe(tmp_path, state, 1.0) == 0.0
    assert check_probe(tmp_path, state, 1.00005) == pytest.approx(5e-5)
    for loss in (1.001, float("nan")):
        with pytest.raises(CheckpointError, match=r"the probe batch's loss is .* here, 1\.000000 was saved"):
            check_probe(tmp_path, state, loss)


@pytest.mark.parametrize(
    ("left_out", "trained_with", "fits"),
    [
        ([(16, 24), (32, 40)], {"rows 16": 24, "rows 32": 40}, True),
        ([(32, 40), (STEP * BATCH, 64)], {"rows 32": 40}, True),  # the next step was bad, after the checkpoint
        ([(32, 64)], {"rows 32": STEP * BATCH}, True),  # the checkpoint was made among steps that are left out
        ([], {"rows 32": 40}, False),
        ([(32, 48)], {"rows 32": 40}, False),
        ([(24, 32)], {}, False),
    ],
)
def test_rows_left_out_must_be_those_of_the_checkpoint(
    config: Config, tmp_path: Path, left_out: list[tuple[int, int]], trained_with: dict[str, int], fits: bool
) -> None:
    ours = changed(config, tmp_path)
    checkpoint, record = write_state(ours, trained_with), empty(ours)
    for rows in left_out:
        record = record.with_rows(LeftOutRows(*rows, "bad"))
    if fits:
        assert saver_of(ours).stand(checkpoint, record).record == record
    else:
        with pytest.raises(CheckpointError, match=r"quarantine\.json: not the record that step-00000006 was trained"):
            saver_of(ours).stand(checkpoint, record)


def test_what_the_guard_keeps_is_found_again(config: Config, tmp_path: Path) -> None:
    ours = changed(config, tmp_path)
    checkpoint = write_state(ours)
    assert saver_of(ours).stand(checkpoint, empty(ours)).guard == {}
    kept = {"norms": [0.1, 1 / 3, 1e-17]}
    content = json.loads((checkpoint / ckpt.STATE).read_text())
    (checkpoint / ckpt.STATE).write_text(json.dumps(content | {"extra": {"guard": kept}}))
    assert saver_of(ours).stand(checkpoint, empty(ours)).guard == kept


@pytest.mark.parametrize(
    ("steps", "before", "expected"), [([2, 4, 6], 6, 4), ([2, 4, 6], 9, 6), ([6], 6, 6), ([], 6, None)]
)
def test_the_checkpoint_to_go_back_to(
    config: Config, tmp_path: Path, steps: list[int], before: int, expected: int | None
) -> None:
    """One from before the last step that was made, if there is one; those after it are gone then."""
    ours = changed(config, tmp_path)
    folder = Path(ours.run_dir) / "checkpoints"
    for step in steps:
        write_state(ours, step=step)
    found = checkpoint_before(folder, before)
    assert (found and found.name) == (expected and f"step-{expected:08d}")
    if expected is not None:
        commit.discard_after(folder, expected)
        assert sorted(path.name for path in folder.iterdir()) == [f"step-{s:08d}" for s in steps if s <= expected]


def test_older_checkpoints_have_no_quarantine(config: Config, tmp_path: Path) -> None:
    ours = changed(config, tmp_path)
    checkpoint = write_state(ours)
    content = json.loads((checkpoint / ckpt.STATE).read_text())
    del content["provenance"]["quarantine"]
    (checkpoint / ckpt.STATE).write_text(json.dumps(content))
    assert saver_of(ours).stand(checkpoint, empty(ours)).step == STEP


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
