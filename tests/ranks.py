"""Starts ranks on this machine as deepspeed's launcher does, without its seconds of imports.

    python tests/ranks.py RANKS PORT SCRIPT ARGUMENT...

When one rank fails the others are sent SIGTERM, and killed if they go on; the exit code is the first failure's.
"""

import os
import signal
import subprocess
import sys
import time

_GRACE_SECONDS = 20.0


def main(ranks: int, port: str, command: list[str]) -> int:
    shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "LOCAL_SIZE": ranks, "MASTER_PORT": port}
    shared |= {"MASTER_ADDR": "127.0.0.1", "CROSS_RANK": 0, "CROSS_SIZE": 1}
    processes = []
    for rank in range(ranks):
        own = {name: str(value) for name, value in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        script, *arguments = command
        line = [sys.executable, "-u", script, f"--local_rank={rank}", *arguments]
        processes.append(subprocess.Popen(line, env=os.environ | own))
    failed = 0
    while left := [process for process in processes if process.poll() is None]:
        failed = next((p.returncode for p in processes if p.returncode), 0)
        if failed:
            _end(left)
        time.sleep(0.05)
    failed = failed or next((p.returncode for p in processes if p.returncode), 0)
    return failed if failed >= 0 else 128 - failed


def _end(processes: list["subprocess.Popen[bytes]"]) -> None:
    for process in processes:
        process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + _GRACE_SECONDS
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in processes:
        process.kill()
        process.wait()


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))
