"""`tidal prepare` as real processes: killed at any moment, started twice, on a full disk, with a broken file."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.preparing import FILES, config_file, contents, kill, lines_of, start_prepare, write_texts
from tests.ranks import halt

pytestmark = pytest.mark.slow
SEED = 20


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str], float]:
    """A configuration file, the files of its shards, and how long an undisturbed run took, in seconds."""
    folder = tmp_path_factory.mktemp("processes")
    write_texts(folder / "texts", lines=400)
    config = config_file(folder, corpus={"dedup": {"text": True}})
    started = time.monotonic()
    process = start_prepare(config, "prepare.workers=1")
    output, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors
    assert json.loads(output)["splits"]["train"]["documents"] > 100
    return config, contents(folder / "shards"), time.monotonic() - started


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_any_moment(prepared: tuple[Path, dict[str, str], float], workers: int) -> None:
    config, expected, seconds = prepared
    folder, rng = config.parent, random.Random(SEED + workers)
    receipts = folder / ".shards.partial" / "receipts"
    shutil.rmtree(folder / "shards", ignore_errors=True)
    finished: list[int] = []
    while len(finished) < 3:
        process = start_prepare(config, f"prepare.workers={workers}")
        time.sleep(rng.uniform(0.25, 0.6) * seconds)
        kill(process)
        if (folder / "shards").exists():
            break
        finished.append(len(list(receipts.rglob("*.json"))))
    assert finished == sorted(finished), "what was finished was done again"
    if not (folder / "shards").exists():
        process = start_prepare(config, f"prepare.workers={workers}")
        output, errors = process.communicate(timeout=100)
        assert process.returncode == 0, errors
        assert sum(stage["kept"] for stage in json.loads(output)["tasks"].values()) == finished[-1]
    assert contents(folder / "shards") == expected


def test_two_at_once(prepared: tuple[Path, dict[str, str], float]) -> None:
    config, expected, _ = prepared
    shutil.rmtree(config.parent / "shards", ignore_errors=True)
    first = start_prepare(config)
    lock = config.parent / ".shards.partial" / "lock"
    while not (lock.exists() and lock.read_text()):
        time.sleep(0.01)
    halt(first.pid)  # it may not end before the second one has started
    try:
        second = start_prepare(config)
        output, errors = second.communicate(timeout=100)
    finally:
        os.kill(first.pid, signal.SIGCONT)
    assert second.returncode == 2
    [line] = lines_of(errors)
    host = lock.read_text().rpartition(" ")[2]
    assert line.startswith(f"error: {config.parent}/shards: process {first.pid} on {host} since ")
    assert line.endswith(" UTC is at it; wait until it has ended, or stop it")
    assert output == ""
    assert first.wait(timeout=100) == 0
    first.communicate()
    assert contents(config.parent / "shards") == expected


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, which `resize` makes larger."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", folder], check=True)


def resize(disk: Path, kilobytes: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", disk], check=True)


def test_a_disk_that_gets_full(disk: Path, tmp_path: Path) -> None:
    write_texts(tmp_path / "texts", lines=400)
    config = config_file(tmp_path, data={"shards": str(disk / "shards")})
    failures = 0
    for kilobytes in (64, 320, 600):
        resize(disk, kilobytes)
        process = start_prepare(config, "prepare.workers=2")
        output, errors = process.communicate(timeout=60)
        if process.returncode == 0:
            break
        failures += 1
        assert process.returncode == 2, errors
        assert output == ""
        (line,) = [line for line in lines_of(errors) if "what is finished is kept" not in line]
        assert line.startswith(f"error: {disk}/")
        assert "No space left on device" in line
        assert "free space" in line
        assert not (disk / "shards").exists()
        assert [p for p in disk.rglob("*.tmp") if "progress" not in p.parts] == []
    assert failures >= 2
    resize(disk, 20_000)
    assert start_prepare(config).wait(timeout=60) == 0
    after_failures = contents(disk / "shards")
    assert start_prepare(config, "--overwrite").wait(timeout=60) == 0
    assert contents(disk / "shards") == after_failures


def test_an_error_in_a_worker_is_one_line(tmp_path: Path) -> None:
    write_texts(tmp_path / "texts")
    tokenizer = {"path": str(tmp_path / "tokenizer.json")}
    assert start_prepare(config_file(tmp_path)).wait(timeout=60) == 0
    shutil.copy(tmp_path / "shards" / "tokenizer.json", tokenizer["path"])
    path = tmp_path / "texts" / "2.jsonl"
    path.write_text(path.read_text() + "{torn\n")
    process = start_prepare(config_file(tmp_path, tokenizer=tokenizer), "--overwrite", "prepare.workers=2")
    output, errors = process.communicate(timeout=60)
    kept, error = lines_of(errors)
    assert process.returncode == 2
    assert output == ""
    assert error.startswith(f"error: {path}:61: not JSON")
    logs = tmp_path / ".shards.partial" / "logs" / "shards"
    assert kept == f"what is finished is kept in {logs.parents[1]}, with logs in {logs}; start again to go on"
    assert "Traceback" in (logs / "00002.log").read_text()
    assert len(list((tmp_path / ".shards.partial" / "receipts" / "shards").iterdir())) >= FILES - 2


def test_a_worker_that_is_killed(tmp_path: Path) -> None:
    """As the kernel does where memory is short."""
    write_texts(tmp_path / "texts", lines=20_000)
    process = start_prepare(config_file(tmp_path, data={"shard_bytes": 10**7}), "prepare.workers=2")
    lock = tmp_path / ".shards.partial" / "locks" / "shards" / "00001"
    while not (lock.exists() and lock.read_text()):
        assert process.poll() is None
        time.sleep(0.002)
    os.kill(int(lock.read_text().split()[1]), signal.SIGKILL)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (2, "")
    assert "task 1 of shards was killed (exit code -9; out of memory?); start again" in lines_of(errors)[-1]
