import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline import block_table
from data_pipeline.block_table import BlockTable
from tests.test_segmentation import PIECES

# Blocks of every length around the words of 8 bytes, such that many begin with another, or end in zeros.
blocks = st.one_of(
    st.text(min_size=1, max_size=24),
    st.sampled_from(PIECES),
    st.builds(lambda c, n: c * n, st.sampled_from(["a", "\x00", "é", "🙂"]), st.integers(1, 40)),
).map(str.encode)
lists = st.lists(blocks, max_size=30)


def laid_out(blocks: list[bytes]) -> tuple[bytes, np.ndarray]:
    sizes = np.array([len(block) for block in blocks], dtype=np.int64)
    return b"".join(blocks), np.cumsum(sizes) - sizes


def table_of(blocks: list[bytes]) -> BlockTable:
    table = BlockTable()
    table.add(*laid_out(blocks))
    return table


@given(lists, lists, lists)
def test_a_block_has_the_number_under_which_it_was_added(
    first: list[bytes], second: list[bytes], strangers: list[bytes]
) -> None:
    table, numbers = BlockTable(), dict[bytes, int]()
    for added in (first, second):
        new = [block for block in dict.fromkeys(added) if block not in numbers]
        numbers |= {block: len(numbers) + 1 + i for i, block in enumerate(new)}
        table.add(*laid_out(new))
    assert len(table) == len(numbers)
    wanted = [*strangers, *first, *second[::-1]]
    assert table.find(*laid_out(wanted)).tolist() == [numbers.get(block, 0) for block in wanted]


def test_runs_have_different_hashes() -> None:
    runs = [c * n for c in (b"\0", b" ", b"x", b"\xc3\xa9") for n in range(1, 256 // len(c))]
    assert table_of(runs).find(*laid_out(runs)).tolist() == list(range(1, len(runs) + 1))


@pytest.mark.parametrize("size", [*range(1, 34), 63, 64, 65, 247, 248, 254, 255])
def test_every_length(size: int) -> None:
    longer = [b"x" * n for n in range(1, 256)]
    table = table_of([block for block in longer if len(block) != size])
    missing = [b"x" * size, b"y" + b"x" * (size - 1), *(b"x" * (size - 1) + end for end in (b"y", b"\0", b"\x7f"))]
    assert table.find(*laid_out(missing)).tolist() == [0] * 5
    assert table.find(*laid_out(longer)).tolist() == [n - (n > size) if n != size else 0 for n in range(1, 256)]


def test_it_grows() -> None:
    many = [f"{i}".encode() for i in range(30_000)] + [f"a longer block {i}".encode() for i in range(30_000)]
    table = BlockTable()
    small = table.nbytes
    for i in range(0, len(many), 7000):
        table.add(*laid_out(many[i : i + 7000]))
    assert table.find(*laid_out(many[::-1])).tolist() == list(range(len(many), 0, -1))
    assert 16 * len(many) < table.nbytes - small < 100 * len(many)


@given(lists)
def test_hashes_that_coincide_mislead_nobody(added: list[bytes]) -> None:
    """Blocks of several words that all share one hash: the first one is found, the others are not there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_table, "_mix", lambda hashes, _: hashes * np.uint64(0))
        different = list(dict.fromkeys(added))
        found = table_of(different).find(*laid_out(different)).tolist()
    for number, block in enumerate(different, 1):
        assert found[number - 1] in ((number,) if len(block) < 8 else (number, 0))


@pytest.mark.parametrize("short", [bytes([c]) for c in b"abcdefgh"])
def test_a_long_block_never_has_the_hash_of_a_short_one(short: bytes) -> None:
    product = np.uint64((int.from_bytes(short.ljust(8, b"\xff"), "little") * int(block_table._ODD)) % (1 << 64))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_table, "_mix", lambda hashes, _: hashes * np.uint64(0) + product)
        for added in ([short, b"a long block"], [b"a long block", short]):
            assert table_of(added).find(*laid_out(added)).tolist() == [1, 2]


def test_short_and_long_blocks_that_share_a_slot() -> None:
    """One slot is home to all: linear probing tells them apart, words included."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockTable, "_first_slot", lambda _, hashes: np.full(len(hashes), 4090))
        added = [b"a" * n for n in range(1, 40)]
        assert table_of(added).find(*laid_out([*added, b"b"])).tolist() == [*range(1, 40), 0]
