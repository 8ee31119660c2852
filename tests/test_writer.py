"""Writing a checkpoint beside the training, by the threads of several ranks, without the ranks."""

import errno
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from tidal_dist.training import commit, writer
from tidal_dist.training.digest import Digest, partial_digest
from tidal_dist.training.writer import Copied, Finishing, HostSlice, Outcome, Target, Writing, announce, write_object

WEIGHT = torch.arange(10.0)


def target_of(folder: Path, ranks: int, timeout: float = 20.0) -> Target:
    target = Target(commit.partial_folder(folder, 4), commit.final_folder(folder, 4), 4, ranks, timeout)
    target.partial.mkdir(parents=True)
    for rank in range(ranks):
        announce(target.partial, rank)
    return target


def part(rank: int, ranks: int) -> Copied:
    """What rank `rank` writes: its share of one parameter."""
    own = WEIGHT.chunk(ranks)[rank]
    start = sum(len(c) for c in WEIGHT.chunk(ranks)[:rank])
    return Copied([(f"rank_{rank}.pt", {"weight": own})], [HostSlice("w", start, (own, own + 1, own + 2))])


def files(digests: dict[str, Digest]) -> dict[str, bytes]:
    return {"state.json": json.dumps(digests).encode()}


def save(target: Target, only: tuple[int, ...] = (0, 1, 2), after: Any = lambda: None) -> list[Outcome]:
    """The outcomes of the ranks, each writing in its thread."""
    writings = [
        Writing(target, rank, part(rank, target.ranks), Finishing(files, after) if rank == 0 else None) for rank in only
    ]
    for writing in reversed(writings):
        writing.start()
    return [writing.wait() for writing in writings]


def fail_on(monkeypatch: pytest.MonkeyPatch, name: str, error: OSError) -> None:
    """The disk refuses the content of files called `name`."""
    real = writer.write_object

    def write(path: Path, value: Any) -> commit.WrittenFile:
        if path.name != name:
            return real(path, value)

        class Full:
            def write(self, _: Any) -> int:
                raise error

        hashed = writer._HashedFile(Full())
        with pytest.raises(RuntimeError) as raised:
            torch.save(value, hashed)  # type: ignore[arg-type]
        raise hashed.error or raised.value

    monkeypatch.setattr(writer, "write_object", write)


def test_all_ranks_parts_make_one_checkpoint(tmp_path: Path) -> None:
    called = []
    first, *others = save(target_of(tmp_path, 3), after=lambda: called.append("after"))
    assert first.is_committed
    assert [o.error for o in (first, *others)] == [None] * 3
    (checkpoint,) = commit.complete_checkpoints(tmp_path)
    assert sorted(p.name for p in checkpoint.iterdir()) == [
        "COMMIT",
        "rank_0.pt",
        "rank_1.pt",
        "rank_2.pt",
        "state.json",
    ]
    assert commit.content_problem(checkpoint, (0, 1)) is None
    assert first.bytes == sum(p.stat().st_size for p in checkpoint.iterdir() if p.name != "COMMIT")
    weights = [torch.load(checkpoint / f"rank_{rank}.pt")["weight"] for rank in range(3)]
    assert torch.equal(torch.cat(weights), WEIGHT)
    expected = [int(partial_digest(WEIGHT + n, 0)) for n in range(3)]
    assert json.loads((checkpoint / "state.json").read_bytes()) == {"w": expected}
    assert called == ["after"]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_a_rank_whose_disk_is_full_leaves_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    fail_on(monkeypatch, f"rank_{rank}.pt", OSError(errno.ENOSPC, "No space left on device"))
    first, *_ = save(target_of(tmp_path, 3))
    assert not first.is_committed
    assert first.error == "No space left on device"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_disk_that_is_full_at_the_end_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(writer, "commit", refuse)
    first, *_ = save(target_of(tmp_path, 2), only=(0, 1))
    assert (first.is_committed, first.error) == (False, "Disk quota exceeded")
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_whose_mark_cannot_be_written_stays(tmp_path: Path) -> None:
    def refuse() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (first,) = save(target_of(tmp_path, 1), only=(0,), after=refuse)
    assert (first.is_committed, first.error) == (True, "No space left on device")
    assert len(commit.complete_checkpoints(tmp_path)) == 1


@pytest.mark.slow
def test_a_rank_that_stays_silent_is_named(tmp_path: Path) -> None:
    (first,) = save(target_of(tmp_path, 2, timeout=0.2), only=(0,))
    assert first.error == "rank 1 has not written its part within 0 s"
    assert list(tmp_path.iterdir()) == []


def test_training_may_change_the_weights_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is what was copied, however late."""
    go, real = threading.Event(), writer.write_object

    def late(path: Path, value: Any) -> commit.WrittenFile:
        assert go.wait(20)
        return real(path, value)

    monkeypatch.setattr(writer, "write_object", late)
    writing = Writing(target_of(tmp_path, 1), 0, part(0, 1), Finishing(files, lambda: None))
    writing.start()
    assert not writing.is_done()
    assert commit.complete_checkpoints(tmp_path) == []
    go.set()
    assert writing.wait().is_committed
    assert writing.is_done()


def test_an_object_is_hashed_as_it_is_written(tmp_path: Path) -> None:
    value = {"weights": torch.randn(100_000), "text": "x"}
    written = write_object(tmp_path / "a.pt", value)
    assert written == commit.written_file(tmp_path, tmp_path / "a.pt")
    assert torch.equal(torch.load(tmp_path / "a.pt", mmap=True)["weights"], value["weights"])
