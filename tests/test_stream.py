import json
import multiprocessing
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from data_pipeline.errors import BadShardError, ShardError
from data_pipeline.layout import IGNORED, NO_PLACE, Slots
from data_pipeline.ordering import EmptyRows, Order, Quarantine, RowAddress, Stage, identity_sum
from data_pipeline.rows import RowFormat, RowReader
from data_pipeline.shards import Manifest
from data_pipeline.stream import Batch, Loading, Share, Step, StepDataset, Stream, fixed_batches
from tests.conftest import Prepare

LANES = 8
ROWS_PER_STEP = 16
SHIFT = 20
ALONE = Share(ROWS_PER_STEP, 1, 0, 1)


def reader_of(manifest: Manifest, split: str = "train", place_shift: int = SHIFT, seed: int = 1) -> RowReader:
    row_format = RowFormat(48, 96, place_shift=place_shift)
    return RowReader(manifest, split, manifest.tokenizer(), row_format, seed)


@pytest.fixture(scope="module")
def reader(manifest: Manifest) -> RowReader:
    return reader_of(manifest)


@pytest.fixture(scope="module")
def order(reader: RowReader) -> Order:
    """Of all rows but a few, so that an epoch ends inside a step and drops three rows."""
    *others, last = reader.shard_rows
    leave_out = (sum(reader.shard_rows) - LANES - 3) % ROWS_PER_STEP
    return Order((*others, last - leave_out), LANES, seed=1)


def dataset(
    reader: RowReader, order: Order, *, rank: int = 0, world: int = 1, micro_batches: int = 1, first_step: int = 0
) -> StepDataset:
    return StepDataset(reader, order, Share(ROWS_PER_STEP, micro_batches, rank, world), first_step)


def stream_of(
    reader: RowReader,
    order: Order,
    workers: int = 0,
    share: Share = ALONE,
    first_step: int = 0,
    loading: Loading | None = None,
) -> Stream:
    stream = Stream(reader, order, share, "a manifest", loading or Loading(workers))
    if first_step:
        rows = first_step * share.rows_per_step
        stream.load_state_dict({"rows": rows, "manifest_hash": "a manifest", "quarantine": {}})
    return stream


def same(first: list[Step], second: list[Step]) -> bool:
    """Whether two runs of steps hold equal batches in the same order."""
    flat = [[a for step in steps for batch in step.batches for a in batch.tensors()] for steps in (first, second)]
    shapes = [[(len(step.batches), step.identity_sum) for step in steps] for steps in (first, second)]
    return shapes[0] == shapes[1] and all(torch.equal(a, b) for a, b in zip(*flat, strict=True))


def rows_of(batches: list[Batch]) -> Counter[bytes]:
    """The content of every row, as a multiset."""
    rows: Counter[bytes] = Counter()
    for batch in batches:
        for i in range(len(batch.labels)):
            rows[b"".join(array[i].numpy().tobytes() for array in batch.tensors())] += 1
    return rows


def steps_per_epoch(order: Order) -> int:
    return order.rows_per_epoch // ROWS_PER_STEP


def test_the_order_is_worth_testing(order: Order) -> None:
    assert order.rows_per_epoch % ROWS_PER_STEP == LANES
    assert sum(order.shard_rows) - order.rows_per_epoch == 3
    assert len(order.shard_rows) > 2
    assert steps_per_epoch(order) > 4


def test_shapes(reader: RowReader, order: Order) -> None:
    first, second = dataset(reader, order, micro_batches=2).step(0).batches
    for batch in (first, second):
        assert all(array.shape == (8, 48) for array in batch.tokens.arrays().values())
        assert all(array.shape == (8, 96) for array in batch.chars.arrays().values())
        assert batch.labels.shape == (8, 96)
        assert all(array.dtype == torch.int32 for array in batch.tensors())
        assert batch.label_count() == int((batch.labels >= 0).sum()) > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores is the point
@pytest.mark.parametrize("first_step", [0, 3])
def test_workers_do_not_change_the_batches(reader: RowReader, order: Order, first_step: int) -> None:
    """However far they read ahead; steps that are kept are not overwritten by later ones."""
    count = 3 * steps_per_epoch(order) + 3
    expected = list(islice(stream_of(reader, order, first_step=first_step), count))
    assert len(expected) == count
    assert not same(expected[:-1], expected[1:])
    for loading in (Loading(1, 1), Loading(1, 4), Loading(3, 2), Loading(2, 1)):
        stream = stream_of(reader, order, loading.workers, first_step=first_step, loading=loading)
        assert same(list(islice(stream, count)), expected)


def test_a_dropped_stream_ends_its_processes(reader: RowReader, order: Order) -> None:
    stream = stream_of(reader, order, workers=2)
    next(stream)
    children = multiprocessing.active_children()
    assert len(children) == 2
    stream.leave_out([])
    next(stream)
    assert not set(children) & set(multiprocessing.active_children())
    del stream
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_is_skipping(reader: RowReader, order: Order, workers: int) -> None:
    """Also where the epoch ends, and in the middle of the next."""
    border = steps_per_epoch(order)
    whole = list(islice(dataset(reader, order), 2 * border))
    for k in (1, border - 1, border, border + 1, border + 2):
        resumed = stream_of(reader, order, workers, first_step=k)
        assert same(list(islice(resumed, len(whole) - k)), whole[k:])


@pytest.mark.parametrize("world", [1, 2, 4, 8])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_every_world_reads_the_same_rows(manifest: Manifest, order: Order, world: int, micro_batches: int) -> None:
    single = dataset(reader_of(manifest), order)
    ranks = [
        dataset(reader_of(manifest), order, rank=rank, world=world, micro_batches=micro_batches)
        for rank in range(world)
    ]
    for step in (0, 1, steps_per_epoch(order), 1000):
        shares = [rank.step(step).batches for rank in ranks]
        assert all(len(share) == micro_batches for share in shares)
        assert {len(b.labels) for share in shares for b in share} == {ROWS_PER_STEP // world // micro_batches}
        assert sum((rows_of(share) for share in shares), Counter()) == rows_of(single.step(step).batches)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 8])
def test_simulated_worlds(manifest: Manifest, world: int) -> None:
    """24 lanes, a mix that changes, over the end of an epoch: whatever the workers and micro-batches of every rank."""
    rows = reader_of(manifest).shard_rows
    sources = tuple("ab"[i % 2] for i in range(len(rows)))
    stages = (Stage(0, (("a", 2), ("b", 1))), Stage(2 * 48, (("a", 1), ("b", 1))))
    order = Order(rows, 24, 1, sources, stages)
    steps, first = 4, sum(rows) // 48
    single = StepDataset(reader_of(manifest), order, Share(48, 1, 0, 1), 0)
    expected = [rows_of(single.step(step).batches) for step in range(first, first + steps)]
    for workers, micro_batches in ((0, 1), (1, 2), (3, 1)):
        found: list[Counter[bytes]] = [Counter() for _ in range(steps)]
        for rank in range(world):
            share = Share(48, micro_batches, rank, world)
            stream = stream_of(reader_of(manifest), order, workers, share, first)
            for step, counted in zip(islice(stream, steps), found, strict=True):
                assert len(step.batches) == micro_batches
                counted.update(rows_of(step.batches))
        assert found == expected


def test_an_epoch_holds_every_row_once(reader: RowReader) -> None:
    order = Order(reader.shard_rows, 1, seed=1)  # one lane drops nothing
    rows = [reader.row(order.locate(g), None) for g in range(order.rows_per_epoch)]
    stored = [reader.row(RowAddress(0, s, r), None) for s, count in enumerate(reader.shard_rows) for r in range(count)]
    assert Counter(chars.ids.tobytes() for _, chars, _ in rows) == Counter(c.ids.tobytes() for _, c, _ in stored)


def shifts(shifted: Slots, plain: Slots) -> dict[int, int]:
    """The shift of places of every document of a row, which all its slots share."""
    found = {}
    has_place = plain.place != NO_PLACE
    np.testing.assert_array_equal(shifted.place[~has_place], NO_PLACE)
    for document in np.unique(plain.document[has_place]):
        mine = has_place & (plain.document == document)
        (shift,) = set((shifted.place[mine] - plain.place[mine]).tolist())
        found[int(document)] = shift
    return found


def row_shifts(reader: RowReader, order: Order, g: int) -> dict[int, int]:
    """The shift of every document of row `g`; tokens and chars of a document have the same."""
    shifted, plain = reader.row(order.locate(g), g), reader.row(order.locate(g), None)
    of_tokens, of_chars = shifts(shifted[0], plain[0]), shifts(shifted[1], plain[1])
    assert of_tokens.items() <= of_chars.items()
    np.testing.assert_array_equal(shifted[2], plain[2])
    for name in ("ids", "document", "block", "index", "start_pos", "position"):
        np.testing.assert_array_equal(getattr(shifted[1], name), getattr(plain[1], name))
    return of_chars


def test_the_shift_of_places_belongs_to_the_row(manifest: Manifest, reader: RowReader, order: Order) -> None:
    found = [row_shifts(reader, order, g) for g in range(order.rows_per_epoch)]
    every = [shift for row in found for shift in row.values()]
    assert min(every) == 0
    assert max(every) == SHIFT
    assert len({tuple(row.values()) for row in found}) > SHIFT  # differs between rows
    assert any(len(set(row.values())) > 1 for row in found)  # and between the documents of a row
    # It does not depend on what was read before.
    fresh = reader_of(manifest)
    for g in (17, 3, 40):
        assert row_shifts(fresh, order, g) == found[g]
    # The same row of the next epoch has another shift, and another seed draws others.
    assert [row_shifts(reader_of(manifest, seed=2), order, g) for g in range(20)] != found[:20]


def test_training_shifts_places(reader: RowReader, order: Order) -> None:
    """Row g of the stream is row g of the order, with the shift of g."""
    first = 3 * ROWS_PER_STEP
    (batch,) = dataset(reader, order).step(3).batches
    for i in range(ROWS_PER_STEP):
        tokens, chars, labels = reader.row(order.locate(first + i), first + i)
        expected = [*tokens.arrays().values(), *chars.arrays().values(), labels]
        for found, wanted in zip(batch.tensors(), expected, strict=True):
            np.testing.assert_array_equal(found[i], wanted)


def test_no_shift_without_place_shift(manifest: Manifest, order: Order) -> None:
    reader = reader_of(manifest, place_shift=0)
    for g in range(20):
        assert set(row_shifts(reader, order, g).values()) == {0}


def test_validation_has_no_shift(manifest: Manifest) -> None:
    shifted, plain = (
        fixed_batches(reader_of(manifest, "validation", place_shift=s), 99, 4, (0, 1)) for s in (SHIFT, 0)
    )
    assert same([Step(shifted, 0)], [Step(plain, 0)])


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize(("max_rows", "rows_per_batch"), [(10**6, 4), (7, 4), (1, 4), (10**6, 1000), (9, 1)])
def test_fixed_batches(reader: RowReader, world: int, max_rows: int, rows_per_batch: int) -> None:
    ranks = [fixed_batches(reader, max_rows, rows_per_batch, (rank, world)) for rank in range(world)]
    assert len({tuple(batch.labels.shape for batch in batches) for batches in ranks}) == 1
    shapes = {batch.labels.shape for batches in ranks for batch in batches}
    assert len(shapes) == 1
    assert shapes.pop()[0] <= rows_per_batch
    expected = [
        reader.row(RowAddress(0, s, r), None) for s, count in enumerate(reader.shard_rows) for r in range(count)
    ][:max_rows]
    found = [
        labels.numpy().tobytes()
        for batches in ranks
        for batch in batches
        for labels in batch.labels
        if (labels != IGNORED).any()
    ]
    assert Counter(found) == Counter(labels.tobytes() for _, _, labels in expected)
    # The rows that fill up hold nothing: no document, no label.
    for batch in (batch for batches in ranks for batch in batches):
        empty = (batch.labels == IGNORED).all(-1)
        assert not batch.tokens.document[empty].any()
        assert not batch.chars.document[empty].any()


def test_fixed_batches_of_an_empty_split(prepare_corpus: Prepare, corpus, tmp_path) -> None:
    nothing_held_out = corpus.model_copy(update={"validation_fraction": 0.0})
    manifest = prepare_corpus(tmp_path / "shards", nothing_held_out)
    assert fixed_batches(reader_of(manifest, "validation"), 10, 4, (0, 2)) == []


@pytest.mark.parametrize(
    ("share", "parts"),
    [
        (Share(16, 1, 0, 3), ["data.lanes=8", "3 ranks"]),
        (Share(16, 1, 0, 16), ["data.lanes=8", "16 ranks"]),
        (Share(12, 1, 0, 4), ["training.batch_rows=12", "data.lanes=8"]),
        (Share(4, 1, 0, 1), ["training.batch_rows=4", "data.lanes=8"]),
        (Share(16, 3, 0, 1), ["training.batch_rows=16", "training.accumulation_steps=3"]),
        (Share(16, 4, 0, 8), ["training.batch_rows=16", "8 ranks", "training.accumulation_steps=4"]),
    ],
)
def test_shares_that_do_not_fit(reader: RowReader, order: Order, share: Share, parts: list[str]) -> None:
    with pytest.raises(ShardError) as caught:
        Stream(reader, order, share, "")
    message = str(caught.value)
    assert all(part in message for part in parts)
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_shares_that_fit(world: int) -> None:
    for rank in range(world):
        for micro_batches in (1, 2):
            Share(16, micro_batches, rank, world).check(LANES)


def test_fewer_rows_than_lanes(reader: RowReader) -> None:
    with pytest.raises(ShardError, match=r"the training split has 7 rows, fewer than data\.lanes=8"):
        Stream(reader, Order((3, 4), LANES, seed=1), ALONE, "")


def test_rank_0_sums_the_rows_of_all_ranks(reader: RowReader, order: Order) -> None:
    steps = [[dataset(reader, order, rank=rank, world=world).step(3) for rank in range(world)] for world in (1, 4)]
    expected = identity_sum({g: order.locate(g) for g in range(3 * ROWS_PER_STEP, 4 * ROWS_PER_STEP)})
    assert [[step.identity_sum for step in ranks] for ranks in steps] == [[expected], [expected, 0, 0, 0]]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_state_is_the_rows_consumed(reader: RowReader, order: Order, workers: int) -> None:
    """Whatever was read ahead; another number of workers, ranks and micro-batches goes on from it."""
    stream = stream_of(reader, order, workers)
    fresh = {"rows": 0, "manifest_hash": "a manifest", "quarantine": {}, "empty_rows": []}
    assert stream.state_dict() == fresh
    before = list(islice(stream, 3))
    state = json.loads(json.dumps(stream.state_dict()))
    assert state == fresh | {"rows": 3 * ROWS_PER_STEP}
    after = list(islice(stream, 3))
    again = stream_of(reader, order)
    again.load_state_dict(state)
    assert same(list(islice(again, 3)), after)
    assert same(before + after, list(islice(stream_of(reader, order), 6)))
    ranks = [stream_of(reader, order, share=Share(ROWS_PER_STEP, 2, rank, 2)) for rank in range(2)]
    for rank in ranks:
        rank.load_state_dict(state)
    assert sum((rows_of(next(rank).batches) for rank in ranks), Counter()) == rows_of(after[0].batches)
    stream.load_state_dict(stream_of(reader, order).state_dict())
    assert same(list(islice(stream, 3)), before)


def test_states_that_do_not_fit(reader: RowReader, order: Order) -> None:
    stream = stream_of(reader, order)
    with pytest.raises(ShardError, match=r"of other shards \(manifest of others, not a manifest\)"):
        stream.load_state_dict({"rows": 16, "manifest_hash": "of others", "quarantine": {}})
    with pytest.raises(ShardError, match=r"after 24 rows, no whole number of steps of training\.batch_rows=16"):
        stream.load_state_dict({"rows": 24, "manifest_hash": "a manifest", "quarantine": {}})


@pytest.mark.parametrize("world", [1, 2])
def test_rows_left_out_are_empty_from_the_state_on(reader: RowReader, order: Order, world: int) -> None:
    """Those of a step that is consumed do not disturb what is loaded ahead; a replay of them reads empty rows."""
    shares = [Share(ROWS_PER_STEP, 1, rank, world) for rank in range(world)]
    plain = [list(islice(stream_of(reader, order, share=share), 5)) for share in shares]
    bad = [EmptyRows(ROWS_PER_STEP, 2 * ROWS_PER_STEP)]
    for share, whole in zip(shares, plain, strict=True):
        stream = stream_of(reader, order, share=share)
        steps = list(islice(stream, 2))
        stream.was_empty(bad)
        steps += islice(stream, 3)
        assert same(steps, whole)
        replay = stream_of(reader, order, share=share)
        replay.load_state_dict(json.loads(json.dumps(stream.state_dict())) | {"rows": 0})
        again = list(islice(replay, 5))
        assert same(again[:1] + again[2:], whole[:1] + whole[2:])
        assert not any(batch.label_count() or batch.token_count() for batch in again[1].batches)
        if share.rank == 0:
            assert again[1].identity_sum != whole[1].identity_sum


PAIRS = Share(2, 1, 0, 1)


class Torn(NamedTuple):
    """Shards of which one was cut short, its index, and the steps of an epoch as they were before that."""

    reader: RowReader
    order: Order
    shard: int
    whole: list[Step]

    def first_bad_step(self) -> int:
        rows = range(self.order.rows_per_epoch)
        return next(g // 2 for g in rows if self.order.locate(g).shard == self.shard)


@pytest.fixture
def torn(prepare_corpus: Prepare, tmp_path: Path) -> Torn:
    manifest = prepare_corpus(tmp_path / "shards", shard_bytes=1000)
    order = Order(reader_of(manifest).shard_rows, 2, seed=1)
    whole = list(islice(stream_of(reader_of(manifest), order, share=PAIRS), order.rows_per_epoch // 2))
    shard = list(dict.fromkeys(order.locate(g).shard for g in range(order.rows_per_epoch)))[-1]
    path = tmp_path / "shards" / f"{manifest.shards('train')[shard]['name']}.tar"
    path.write_bytes(path.read_bytes()[:-100])
    return Torn(reader_of(manifest), order, shard, whole)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_torn_shard_is_one_line_whoever_reads_it(torn: Torn, workers: int) -> None:
    stream = stream_of(torn.reader, torn.order, workers, share=PAIRS)
    for _ in range(2):  # the step is not consumed: whoever goes on meets the same shard
        with pytest.raises(BadShardError) as caught:
            list(islice(stream, len(torn.whole)))
        assert caught.value.shard == torn.shard
        assert caught.value.name in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
        assert "Traceback" not in str(caught.value)
        assert stream.state_dict()["rows"] == 2 * torn.first_bad_step() > 0


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_goes_on_without_a_torn_shard(torn: Torn, workers: int) -> None:
    """Its rows are empty, and every other row is where it was."""
    first_bad = torn.first_bad_step()
    stream = stream_of(torn.reader, torn.order, workers, share=PAIRS)
    steps = list(islice(stream, first_bad))
    with pytest.raises(BadShardError):
        next(stream)
    stream.leave_out([Quarantine(torn.shard, 2 * first_bad)])
    steps += islice(stream, len(torn.whole) - first_bad)
    for step, (found, expected) in enumerate(zip(steps, torn.whole, strict=True)):
        (batch,), (whole,) = found.batches, expected.batches
        for i in range(2):
            if torn.order.locate(2 * step + i).shard == torn.shard:
                assert not batch.tokens.document[i].any()
                assert not batch.chars.document[i].any()
                assert (batch.labels[i] == IGNORED).all()
            else:
                pairs = zip(batch.tensors(), whole.tensors(), strict=True)
                assert all(torch.equal(ours[i], theirs[i]) for ours, theirs in pairs)
    # The rolling hash tells, from the first empty row on.
    differs = [ours.identity_sum != theirs.identity_sum for ours, theirs in zip(steps, torn.whole, strict=True)]
    assert differs.index(True) == first_bad
    # A replay by the state alone reads the same.
    replay = stream_of(torn.reader, torn.order, share=PAIRS)
    replay.load_state_dict(stream.state_dict() | {"rows": 2 * first_bad})
    assert same(list(islice(replay, len(steps) - first_bad)), steps[first_bad:])
