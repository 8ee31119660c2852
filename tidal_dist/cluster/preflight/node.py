"""What a host says about itself: this file's text goes there, so that it runs whatever is installed there.

    PYTHON - look REQUEST < node.py      what is there, as one JSON object; see `Request` in run.py
    PYTHON - find FOLDER TOKEN...        which of the tokens that other hosts wrote into the folder are seen here
    PYTHON - forget RUN_DIR TOKEN...     removes them

Standard library only, and nothing newer than Python 3.8. What is being done goes to standard error, so that it is known
where a host hangs. Of variables only names and values that the request asks for are told, of secrets nothing.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

_CHILD_SECONDS = 45
_LIMIT_SECONDS = 90  # nobody may wait any more, and nobody else would end it
_SMI_SECONDS = 15
_TEST_BYTES = 1 << 20
_MIB = 1 << 20
# Every field of the first line is there since years; each of the others is asked for alone, since drivers lack some.
_GPU_FIELDS = ("index", "name", "memory.total", "memory.used", "driver_version")
_GPU_HEALTH = ("ecc.errors.uncorrected.volatile.total", "clocks_throttle_reasons.active", "retired_pages.pending")
_TORCH = """
import json, torch
cuda = torch.cuda.is_available()
print(json.dumps({
    "version": torch.__version__, "cuda": torch.version.cuda, "devices": torch.cuda.device_count(),
    "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else None,
}))
"""


def look(text: str) -> dict[str, Any]:
    """Everything about this host."""
    request = json.loads(text)
    children = {"torch": _child(["-c", _TORCH]), "reads": _child(request["reads"])}
    found: dict[str, Any] = {
        "hostname": socket.gethostname(),
        "python": platform.python_version(),
        "executable": sys.executable,
    }
    for name, part in (
        ("project", lambda: _project(request["script"])),
        ("packages", lambda: {package: _version(package) for package in request["packages"]}),
        ("environment", lambda: _environment(request["variables"], request["secrets"])),
        ("gpus", _gpus),
        ("memory_available", _memory_available),
        ("disks", lambda: _disks(request["run_dir"], request["folders"])),
        ("run_folder", lambda: _run_folder(request["run_dir"], request.get("token"))),
    ):
        _doing(name)
        found[name] = part()
    for name, child in children.items():
        _doing(name)
        found[name] = _answer(child)
    return found


def _doing(what: str) -> None:
    sys.stderr.write(f"doing {what}\n")
    sys.stderr.flush()


def _child(arguments: list[str]) -> subprocess.Popen[str]:
    """Another process of this Python: what is imported there may crash or hang."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.alarm(_CHILD_SECONDS),  # it ends also where nobody is left to end it
    )


def _answer(child: subprocess.Popen[str]) -> dict[str, Any]:
    """The JSON object that a child printed, or {"problem": why there is none}."""
    out, err = child.communicate()
    with suppress(ValueError, IndexError):
        answer = json.loads(out.splitlines()[-1])
        if isinstance(answer, dict):
            return answer
    if child.returncode == -signal.SIGALRM:
        return {"problem": f"not done after {_CHILD_SECONDS} s"}
    last = ([line.strip() for line in err.splitlines() if line.strip()] or [f"exit code {child.returncode}"])[-1]
    return {"problem": last}


def _project(script: str) -> dict[str, Any]:
    """Where the project is that ranks here would import, and the sha256 of its source."""
    hashed, places = hashlib.sha256(), {}
    for package in ("data_pipeline", "tidal_dist"):
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            return {"problem": f"no package {package}"}
        places[package] = root = Path(next(iter(spec.submodule_search_locations)))
        for path in sorted(root.rglob("*.py")):
            hashed.update(f"{package}/{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    if not os.path.exists(script):
        return {"problem": f"no {script}"}
    hashed.update(Path(script).read_bytes())
    return {"version": _version("tidal-dist"), "hash": hashed.hexdigest(), "place": str(places["tidal_dist"].parent)}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _environment(patterns: list[str], secrets: list[str]) -> dict[str, str]:
    def fits(name: str, among: list[str]) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in among)

    return {n: v for n, v in sorted(os.environ.items()) if fits(n, patterns) and not fits(n, secrets)}


def _gpus() -> dict[str, Any]:
    """{"gpus": [...]} as nvidia-smi knows them, [] where there is none, or {"problem": why it does not say}."""
    if shutil.which("nvidia-smi") is None:
        return {"gpus": []}
    try:
        gpus = [dict(zip(_GPU_FIELDS, line)) for line in _smi(_GPU_FIELDS)]  # noqa: B905 - not in Python 3.8
        for field in _GPU_HEALTH:
            with suppress(ValueError):
                for gpu, (value,) in zip(gpus, _smi((field,))):  # noqa: B905
                    gpu[field] = value
        return {"gpus": gpus}
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        return {"problem": " ".join(str(error).split())}


def _smi(fields: tuple[str, ...]) -> list[list[str]]:
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=_SMI_SECONDS)
    lines = [[word.strip() for word in line] for line in csv.reader(done.stdout.splitlines()) if line]
    if done.returncode or any(len(line) != len(fields) for line in lines):
        raise ValueError((done.stdout.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    return lines


def _memory_available() -> int | None:
    """Bytes of memory that can be had without swapping, within the limit of the container."""
    found = []
    with suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")))
    with suppress(OSError, ValueError):
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        found.append(max(limit - used, 0))
    return min(found, default=None)


def _existing(folder: str) -> Path:
    """The folder, or the nearest one above it that is there."""
    path = Path(os.path.abspath(folder))
    return next(p for p in (path, *path.parents) if p.is_dir())


def _disks(run_dir: str, folders: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Free bytes by what a disk is for. folders: that others know of; caches are those of this host's environment."""
    home = os.path.expanduser("~")
    wanted = {
        "run folder": run_dir,
        "compiled operators": os.environ.get("TORCH_EXTENSIONS_DIR", f"{home}/.cache/torch_extensions"),
        "compiled kernels": os.environ.get("TRITON_CACHE_DIR", f"{home}/.triton"),
        "temporary files": os.environ.get("TMPDIR", "/tmp"),
        "shared memory": "/dev/shm",
    }
    wanted.update(folders)
    found: dict[str, dict[str, Any]] = {}
    for what, folder in wanted.items():
        _doing(f"disk {folder}")
        try:
            there = _existing(folder)
            found[what] = {"folder": folder, "free": shutil.disk_usage(there).free}
            if what != "run folder" and not os.access(there, os.W_OK):
                found[what]["problem"] = "cannot be written"
        except OSError as error:
            found[what] = {"folder": folder, "problem": error.strerror}
    return found


def _run_folder(run_dir: str, token: str | None) -> dict[str, Any]:
    """Whether files can be written where the run will write; leaves one there if a token is to be found by others."""
    there = _existing(run_dir)
    path = there / (token or f".preflight-{socket.gethostname()}-{os.getpid()}")
    try:
        with open(path, "wb") as file:
            file.write(b"\0" * _TEST_BYTES)
            file.flush()
            os.fsync(file.fileno())
            file.truncate(0)
    except OSError as error:
        with suppress(OSError):
            path.unlink()
        return {"folder": str(there), "problem": error.strerror}
    if token is None:
        path.unlink()
    return {"folder": str(there)}


def find(folder: str, *tokens: str) -> dict[str, Any]:
    """Which of the files are seen here: {"seen": [...]}."""
    return {"seen": [token for token in tokens if os.path.exists(os.path.join(folder, token))]}


def forget(run_dir: str, *tokens: str) -> dict[str, Any]:
    """Remove the files."""
    for token in tokens:
        with suppress(OSError):
            (_existing(run_dir) / token).unlink()
    return {}


if __name__ == "__main__":
    signal.alarm(_LIMIT_SECONDS)
    # Ranks are started as files, which do not find what lies in the working folder.
    sys.path[:] = [place for place in sys.path if place]
    tasks: dict[str, Callable[..., dict[str, Any]]] = {"look": look, "find": find, "forget": forget}
    print(json.dumps(tasks[sys.argv[1]](*sys.argv[2:])))
