"""Logs of ranks that are killed, abort, write without Python, or may not write."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launching import ROOT, environment
from tidal_dist.cluster.logs import last_lines, log_file

HOST = os.uname().nodename
STARTED = r"=== \d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4}: rank 3 of 4 starts on \S+, process \d+"


def rank(run: Path, action: str) -> subprocess.CompletedProcess[str]:
    """A process that keeps its log and then does something."""
    code = "import os, signal, sys\nfrom pathlib import Path\nfrom tidal_dist.cluster.logs import keep_log\n"
    code += f"print('before')\nkeep_log(Path(sys.argv[1]))\n{action}"
    ours = environment() | {"RANK": "3", "WORLD_SIZE": "4"}
    return subprocess.run([sys.executable, "-c", code, run], env=ours, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("action", "code"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        ("os.abort()", -signal.SIGABRT),
        ("os._exit(7)", 7),
    ],
)
def test_the_last_words_are_there_and_went_on_too(tmp_path: Path, action: str, code: int) -> None:
    spoken = "os.write(1, b'out\\n'); os.write(2, b'err\\n'); os.system('echo other'); os.write(1, b'last')\n"
    result = rank(tmp_path / "run", spoken + action)
    assert result.returncode == code
    assert result.stdout == "before\nout\nother\nlast"
    assert result.stderr == "err\n"
    text = log_file(tmp_path / "run", 3, HOST).read_text()
    # What came on the two ways at the same moment may stand in either order.
    assert re.fullmatch(rf"{STARTED}\nout\nother\nlast", text.replace("err\n", "", 1))
    assert text.count("err\n") == 1


def test_starts_follow_each_other(tmp_path: Path) -> None:
    for word in ("one", "two"):
        rank(tmp_path, f"print('{word}', flush=True)\nprint()")
    text = log_file(tmp_path, 3, HOST).read_text()
    assert re.fullmatch(rf"{STARTED}\none\n\n{STARTED}\ntwo\n\n", text)
    assert last_lines(log_file(tmp_path, 3, HOST), 5) == ["two"]
    assert last_lines(tmp_path / "none", 5) == []


def test_who_ends_in_order_waits_until_all_is_written(tmp_path: Path) -> None:
    """So whoever waits for it may read its output, be it a file that has no end."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"x" * 4096)
    os.set_blocking(writer, True)
    code = "import sys; from pathlib import Path; from tidal_dist.cluster.logs import keep_log\n"
    code += "settle = keep_log(Path(sys.argv[1])); print('last'); settle()"
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    with subprocess.Popen(command, env=environment(), cwd=ROOT, stdout=writer) as process:
        os.close(writer)
        time.sleep(1.0)
        assert process.poll() is None
        with open(reader, "rb") as output:
            assert output.read().lstrip(b"x") == b"last\n"
    assert process.returncode == 0
    assert last_lines(log_file(tmp_path / "run", 0, HOST), 5) == ["last"]


def test_what_has_kept_a_duplicate_is_not_waited_for(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from tidal_dist.cluster import logs; logs._SETTLE_SECONDS = 60.0\n"
    )
    code += "settle = logs.keep_log(Path(sys.argv[1])); os.dup(2); settle(); print('end')"
    command = [sys.executable, "-c", code, tmp_path / "run"]
    assert subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, timeout=30).stdout == b"end\n"


def test_a_folder_that_cannot_be_written_costs_a_line(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    result = rank(tmp_path / "run", "print('goes on')")
    assert result.returncode == 0
    assert result.stdout == "before\ngoes on\n"
    assert re.fullmatch(r"\S+rank-00003-\S+\.log: cannot write \(Not a directory\); no log .* kept\n", result.stderr)


def test_a_full_disk_and_a_reader_that_is_gone_disturb_nobody(tmp_path: Path) -> None:
    """The file may not grow any more; then nobody reads where the output went before."""
    code = "import os, resource\nfrom tidal_dist.cluster.logs import _divert\n"
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)); _divert(os.open('log', os.O_CREAT | os.O_WRONLY))\n"
    code += "print('x' * 200_000); print('end')"
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment(), cwd=tmp_path, capture_output=True, text=True
    )
    assert (result.returncode, result.stdout) == (0, "x" * 200_000 + "\nend\n")
    shell = f"{sys.executable} -c 'import sys; from pathlib import Path; from tidal_dist.cluster.logs import keep_log\n"
    shell += 'keep_log(Path(sys.argv[1])); [print("y" * 99, flush=True) for _ in range(5000)]; sys.exit(9)'
    command = f"{shell}' {tmp_path / 'gone'} | true; exit ${{PIPESTATUS[0]}}"
    assert subprocess.run(["bash", "-c", command], env=environment(), cwd=ROOT).returncode == 9
    assert log_file(tmp_path / "gone", 0, HOST).read_text().count("y" * 99 + "\n") == 5000
