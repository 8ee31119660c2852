from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Prepare

from data_pipeline.errors import ShardError
from data_pipeline.layout import IGNORED, NO_PLACE, Slots
from data_pipeline.ordering import Order, RowAddress
from data_pipeline.rows import RowFormat, RowReader, roll
from data_pipeline.shards import Manifest
from data_pipeline.stream import Batch, Share, StepDataset, fixed_batches, load_steps

LANES = 8
ROWS_PER_STEP = 16
SHIFT = 20


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


def arrays_of(batch: Batch) -> list[torch.Tensor]:
    return [*batch.tokens.arrays().values(), *batch.chars.arrays().values(), batch.labels]


def same(first: list[list[Batch]], second: list[list[Batch]]) -> bool:
    """Whether two runs of steps hold equal batches in the same order."""
    flat = [[a for step in steps for batch in step for a in arrays_of(batch)] for steps in (first, second)]
    shapes = [[len(step) for step in steps] for steps in (first, second)]
    return shapes[0] == shapes[1] and all(torch.equal(a, b) for a, b in zip(*flat, strict=True))


def rows_of(batches: list[Batch]) -> Counter[bytes]:
    """The content of every row, as a multiset."""
    rows: Counter[bytes] = Counter()
    for batch in batches:
        for i in range(len(batch.labels)):
            rows[b"".join(array[i].numpy().tobytes() for array in arrays_of(batch))] += 1
    return rows


def steps_per_epoch(order: Order) -> int:
    return order.rows_per_epoch // ROWS_PER_STEP


def test_the_order_is_worth_testing(order: Order) -> None:
    assert order.rows_per_epoch % ROWS_PER_STEP == LANES
    assert sum(order.shard_rows) - order.rows_per_epoch == 3
    assert len(order.shard_rows) > 2
    assert steps_per_epoch(order) > 4


def test_shapes(reader: RowReader, order: Order) -> None:
    first, second = dataset(reader, order, micro_batches=2).step(0)
    for batch in (first, second):
        assert all(array.shape == (8, 48) for array in batch.tokens.arrays().values())
        assert all(array.shape == (8, 96) for array in batch.chars.arrays().values())
        assert batch.labels.shape == (8, 96)
        assert all(array.dtype == torch.int64 for array in arrays_of(batch))
        assert batch.label_count() == int((batch.labels >= 0).sum()) > 0


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores is the point
@pytest.mark.parametrize("first_step", [0, 3])
def test_workers_do_not_change_the_batches(reader: RowReader, order: Order, first_step: int) -> None:
    count = steps_per_epoch(order) + 3
    runs = [
        list(islice(load_steps(dataset(reader, order, first_step=first_step), workers, pin_memory=False), count))
        for workers in (0, 1, 3)
    ]
    assert same(runs[0], runs[1])
    assert same(runs[0], runs[2])
    assert len(runs[0]) == count
    assert not same(runs[0][:-1], runs[0][1:])


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_is_skipping(reader: RowReader, order: Order, workers: int) -> None:
    """Also where the epoch ends, and in the middle of the next."""
    border = steps_per_epoch(order)
    whole = list(islice(dataset(reader, order), 2 * border))
    for k in (1, border - 1, border, border + 1, border + 2):
        resumed = load_steps(dataset(reader, order, first_step=k), workers, pin_memory=False)
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
        shares = [rank.step(step) for rank in ranks]
        assert all(len(share) == micro_batches for share in shares)
        assert {len(b.labels) for share in shares for b in share} == {ROWS_PER_STEP // world // micro_batches}
        assert sum((rows_of(share) for share in shares), Counter()) == rows_of(single.step(step))


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
    (batch,) = dataset(reader, order).step(3)
    for i in range(ROWS_PER_STEP):
        tokens, chars, labels = reader.row(order.locate(first + i), first + i)
        expected = [*tokens.arrays().values(), *chars.arrays().values(), labels]
        for found, wanted in zip(arrays_of(batch), expected, strict=True):
            np.testing.assert_array_equal(found[i], wanted)


def test_no_shift_without_place_shift(manifest: Manifest, order: Order) -> None:
    reader = reader_of(manifest, place_shift=0)
    for g in range(20):
        assert set(row_shifts(reader, order, g).values()) == {0}


def test_validation_has_no_shift(manifest: Manifest) -> None:
    shifted, plain = (
        fixed_batches(reader_of(manifest, "validation", place_shift=s), 99, 4, (0, 1)) for s in (SHIFT, 0)
    )
    assert same([shifted], [plain])


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
        StepDataset(reader, order, share, 0)
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
        StepDataset(reader, Order((3, 4), LANES, seed=1), Share(16, 1, 0, 1), 0)


def test_the_rolling_hash_depends_on_the_rows_alone(order: Order) -> None:
    """Two runs saw the same data if and only if it agrees, whatever their steps."""
    n = order.rows_per_epoch + 40
    by_size = {}
    for rows_per_step in (n, 8, 1):
        rolled = ""
        for start in range(0, n, rows_per_step):
            rolled = roll(rolled, order, range(start, min(start + rows_per_step, n)))
        by_size[rows_per_step] = rolled
    assert len(set(by_size.values())) == 1


def test_every_row_has_its_own_identity(order: Order) -> None:
    rolled = {roll("", order, range(g, g + 1)) for g in range(order.rows_per_epoch)}
    assert len(rolled) == order.rows_per_epoch


def test_the_rolling_hash_tells_rows_apart(order: Order) -> None:
    other = Order(order.shard_rows, LANES, seed=2)
    hashes = {
        roll("", order, range(16)),
        roll("", order, range(15)),
        roll("", order, range(1, 17)),
        roll("", other, range(16)),
        roll(roll("", order, range(16)), order, range(16, 32)),
        roll(roll("", other, range(16)), order, range(16, 32)),
        roll("", order, range(16, 32)),
    }
    assert len(hashes) == 7
    assert roll("", order, range(16)) == roll("", Order(order.shard_rows, LANES, seed=1), range(16))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_torn_shard_is_one_line_whoever_reads_it(prepare_corpus: Prepare, tmp_path: Path, workers: int) -> None:
    manifest = prepare_corpus(tmp_path / "shards")
    reader = RowReader(manifest, "train", manifest.tokenizer(), RowFormat(48, 96), seed=1)
    order = Order(reader.shard_rows, 2, seed=1)
    shard = next((tmp_path / "shards" / "train").glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-100])
    steps = load_steps(StepDataset(reader, order, Share(2, 1, 0, 1), 0), workers, pin_memory=False)
    with pytest.raises(ShardError) as caught:
        next(steps)
    assert str(caught.value).startswith(f"{shard}: ")
    assert "Traceback" not in str(caught.value)
