"""Checkpoint folders: whole or not there, which are resumed from, which are kept."""

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidal_dist.errors import CheckpointError
from tidal_dist.training import commit

DATA = b"weights and moments" * 50


def write(folder: Path, step: int, data: bytes = DATA) -> Path:
    """A committed checkpoint."""
    partial, final = commit.partial_folder(folder, step), commit.final_folder(folder, step)
    partial.mkdir(parents=True)
    for name in ("a.pt", "state.json"):
        (partial / name).write_bytes(data + name.encode())
    commit.commit(partial, final, step, [commit.written_file(partial, path) for path in partial.iterdir()])
    return final


def steps(folder: Path) -> list[int]:
    return [commit.step_of(path) for path in commit.complete_checkpoints(folder)]


def test_a_committed_checkpoint_is_there_and_whole(tmp_path: Path) -> None:
    for step in (9, 10, 100_000_000):
        write(tmp_path, step)
    assert steps(tmp_path) == [9, 10, 100_000_000]
    found, skipped = commit.resumable(tmp_path)
    assert [commit.step_of(path) for path in found] == [100_000_000, 10, 9]
    assert skipped == []
    assert commit.content_problem(found[0], (0, 1)) is None
    assert not list(tmp_path.glob(".*"))


def test_what_is_not_committed_is_not_there(tmp_path: Path) -> None:
    whole = write(tmp_path, 1)
    uncommitted = commit.final_folder(tmp_path, 2)
    uncommitted.mkdir()
    (uncommitted / "state.json").write_bytes(DATA)
    commit.partial_folder(tmp_path, 3).mkdir()
    assert steps(tmp_path) == [1]
    assert commit.resumable(tmp_path) == (
        [whole],
        [commit.Skipped("step-00000002", "no COMMIT, so this is no complete checkpoint")],
    )


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: (path / "a.pt").write_bytes(DATA[:-1]), "a.pt has 949 bytes instead of 954"),
        (lambda path: (path / "a.pt").unlink(), "a.pt is not there"),
        (lambda path: (path / "COMMIT").write_text("{"), "COMMIT: cannot read"),
        (lambda path: (path / "COMMIT").write_text('{"format": 1, "step": 2, "files": [{}]}'), "not as it was written"),
        (lambda path: (path / "COMMIT").write_text('{"format": 9}'), "format 9, this program reads 1"),
    ],
)
def test_what_lacks_bytes_is_skipped_and_says_why(tmp_path: Path, damage, reason: str) -> None:  # type: ignore[no-untyped-def]
    older, newer = write(tmp_path, 1), write(tmp_path, 2)
    damage(newer)
    found, (skipped,) = commit.resumable(tmp_path)
    assert found == [older]
    assert skipped.checkpoint == "step-00000002"
    assert reason in skipped.reason


@settings(max_examples=25)
@given(ranks=st.integers(1, 5), place=st.integers(0, len(DATA) - 1), bit=st.integers(0, 7), name=st.sampled_from("as"))
def test_one_of_the_ranks_finds_a_flipped_bit(
    tmp_path_factory: pytest.TempPathFactory, ranks: int, place: int, bit: int, name: str
) -> None:
    checkpoint = write(tmp_path_factory.mktemp("c"), 1)
    path = checkpoint / {"a": "a.pt", "s": "state.json"}[name]
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)
    problems = [commit.content_problem(checkpoint, (rank, ranks)) for rank in range(ranks)]
    (problem,) = [problem for problem in problems if problem]
    assert problem.startswith(f"{path.name} is not what was written (sha256 ")


@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_kill_at_any_moment_of_a_commit_leaves_one_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_replaced: bool
) -> None:
    """The commit is cut off before each of its renames and syncs in turn."""

    class KilledError(Exception):
        pass

    def cut_off_after(calls: int) -> bool:
        """Whether the commit came to its end; its folder is removed afterwards."""
        left = [calls]

        def counted(function):  # type: ignore[no-untyped-def]
            def call(*arguments):  # type: ignore[no-untyped-def]
                if not left[0]:
                    raise KilledError
                left[0] -= 1
                return function(*arguments)

            return call

        with monkeypatch.context() as patch:
            for name in ("rename", "replace", "fsync"):
                patch.setattr(os, name, counted(getattr(os, name)))
            try:
                write(folder, 2, DATA * 2)
            except KilledError:
                return False
        return True

    calls = 0
    while True:
        folder = tmp_path / f"{calls}"
        write(folder, 1)
        if is_replaced:
            write(folder, 2)  # of an earlier attempt
        ended = cut_off_after(calls)
        assert set(steps(folder)) >= {1}
        for found in commit.resumable(folder)[0]:
            assert commit.content_problem(found, (0, 1)) is None
        commit.clean_up(folder)
        assert not list(folder.glob(".*"))
        if ended:
            assert steps(folder) == [1, 2]
            break
        calls += 1
    assert calls == 7 + is_replaced


def test_newest_multiples_and_best_are_kept(tmp_path: Path) -> None:
    for step in range(1, 13):
        write(tmp_path, step)
        if step == 3:
            commit.mark_best(tmp_path, commit.BEST, commit.final_folder(tmp_path, 3), {"validation/loss": 2.0})
        if step == 7:
            commit.mark_best(tmp_path, commit.BEST_LOSS, commit.final_folder(tmp_path, 7), {"validation/loss": 1.0})
        commit.remove_old(tmp_path, step, keep=2, every_steps=5)
    assert steps(tmp_path) == [3, 5, 7, 10, 11, 12]
    assert commit.best_checkpoint(tmp_path) == commit.final_folder(tmp_path, 3)
    assert commit.best_checkpoint(tmp_path, commit.BEST_LOSS) == commit.final_folder(tmp_path, 7)
    assert not list(tmp_path.glob(".*"))


def test_what_a_run_has_gone_back_from_is_removed_with_its_next_checkpoint(tmp_path: Path) -> None:
    for step in (3, 6, 9):
        write(tmp_path, step)
    (commit.final_folder(tmp_path, 9) / "a.pt").write_bytes(b"torn")
    write(tmp_path, 4)
    commit.remove_old(tmp_path, 4, keep=2, every_steps=None)
    assert steps(tmp_path) == [3, 4]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


@settings(max_examples=25)
@given(st.sets(st.integers(1, 30), min_size=1, max_size=8), st.integers(1, 4), st.none() | st.integers(1, 7))
def test_the_newest_is_never_removed(
    tmp_path_factory: pytest.TempPathFactory, made: set[int], keep: int, every: int | None
) -> None:
    folder = tmp_path_factory.mktemp("c")
    for step in sorted(made):
        write(folder, step)
        commit.remove_old(folder, step, keep, every)
        kept = steps(folder)
        assert kept[-1] == step
        assert set(kept) >= {s for s in made if s <= step and every and s % every == 0}
        assert kept[-keep:] == sorted(s for s in made if s <= step)[-keep:]


def test_a_marker_is_needed(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no COMMIT, so this is no complete checkpoint"):
        commit.committed_files(tmp_path)
    (tmp_path / commit.BEST).write_text('{"checkpoint": "step-00000001"}')
    assert commit.best_checkpoint(tmp_path) is None
