"""What a measurement is made on, what that can do at most, and how one is made: timed, in turns, in its own process."""

import ctypes
import os
import platform
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, suppress
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch

from tidal_dist.training.pace import measured_tflops

_WIDEST = 16_384  # columns of a matrix product
_COPY_BYTES = {"cpu": 2**27, "cuda": 2**30}
_BUSY_SPREAD = 1.3  # the slowest repeat over the median
_BUSY_LOAD = 0.5  # of the cores, before the measurement
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def describe_machine(device: str = "cpu") -> dict[str, Any]:
    """The machine and the software that decide how fast a measurement is, for a report.

    Returns:
        cpu: its model name. gpu: the device's, where it is one. cores: those that this process may use. threads: of
        torch. torch, python, platform: versions. load: processes that ran or waited in the last minute, on average,
        before the measurement.
    """
    gpu = {"gpu": torch.cuda.get_device_name(device)} if is_gpu(device) else {}
    return gpu | {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "load": round(os.getloadavg()[0], 2),
    }


def machine_line(machine: dict[str, Any]) -> str:
    """`describe_machine`'s result as the last line of a table."""
    gpu = f"{machine['gpu']}; " if "gpu" in machine else ""
    return (
        f"{gpu}{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, load {machine['load']} before"
        f"; torch {machine['torch']}, Python {machine['python']}"
    )


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def is_gpu(device: str) -> bool:
    """Whether the device works beside the host, which has to wait for it."""
    return device.startswith("cuda")


def dtype_named(name: str) -> torch.dtype:
    """The type of numbers that a command line calls `fp32` or `bf16`."""
    return _DTYPES[name]


def wait_for(device: str) -> None:
    """Wait until the device has done what it was asked for."""
    if is_gpu(device):
        torch.cuda.synchronize(device)


def seconds_of(function: Callable[[], object], device: str) -> tuple[float, float]:
    """Wall seconds of a call and all that it asked the device for, and the CPU seconds of all threads meanwhile."""
    wait_for(device)
    started, cpu = time.perf_counter(), time.process_time()
    function()
    wait_for(device)
    return time.perf_counter() - started, time.process_time() - cpu


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, least and most of repeats, how many, and all of them."""
    found = {"median": median(values), "min": min(values), "max": max(values)}
    return found | {"repeats": len(values), "all": list(values)}


def busy_warning(machine: dict[str, Any], spreads: Sequence[dict[str, Any]]) -> str | None:
    """A line where other work disturbed the measurement: repeats differ, or the machine was loaded before."""
    worst = max((s["max"] / s["median"] for s in spreads), default=1.0)
    reasons = [f"the slowest repeat took {worst:.2f} times the median"] if worst > _BUSY_SPREAD else []
    if machine["load"] > _BUSY_LOAD * machine["cores"]:
        reasons.append(f"load {machine['load']} on {machine['cores']} cores before")
    if not reasons:
        return None
    return f"warning: a busy machine ({'; '.join(reasons)}): trust ratios more than seconds, and measure again"


def copy_gb_per_second(device: str) -> float:
    """Bytes read and written a second by a large copy; of the fastest of some."""
    source = torch.ones(_COPY_BYTES["cuda" if is_gpu(device) else "cpu"], dtype=torch.uint8, device=device)
    target = source.clone()
    seconds = min(seconds_of(lambda: target.copy_(source), device)[0] for _ in range(3))
    return 2 * len(source) / seconds / 1e9


class Limits:
    """What the device can do at most, measured where and when the rest is."""

    def __init__(self, device: str, dtype: torch.dtype):
        self._device, self._dtype = device, dtype

    def run(self) -> dict[str, float]:
        """tflops: of a large matrix product. copy_gb_per_second: bytes read and written by a large copy."""
        tflops = measured_tflops(torch.device(self._device), self._dtype, _WIDEST)
        return {"tflops": tflops, "copy_gb_per_second": copy_gb_per_second(self._device)}

    def report(self) -> None:
        """There is nothing beside."""


def best_limits(measured: Sequence[dict[str, float]]) -> dict[str, float]:
    """The most that was seen: on a busy machine single measurements fall short."""
    return {name: max(m[name] for m in measured) for name in measured[0]}


_object: Any = None  # in a process of `OwnProcess`: what lives there


def _make(make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    global _object
    _object = make(*arguments)


def _call(method: str, arguments: tuple[Any, ...]) -> Any:
    return getattr(_object, method)(*arguments)


class OwnProcess:
    """An object in a fresh process of its own, so that neither time nor memory is another's."""

    def __init__(self, make: Callable[..., Any], *arguments: Any):
        self._pool = ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn"))
        self._made = self._pool.submit(_make, make, arguments)

    def wait(self) -> None:
        """Wait until the object is made; what was raised there is raised here."""
        self._made.result()

    def __call__(self, method: str, *arguments: Any) -> Any:
        """Call a method there; what it returns."""
        self.wait()
        return self._pool.submit(_call, method, arguments).result()

    def __enter__(self) -> "OwnProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a fresh process."""
    with OwnProcess(_Function, function) as process:
        return process("call", *arguments)


class _Function:
    def __init__(self, function: Callable[..., Any]):
        self.call = function


Made = tuple[Any, ...]  # a function that makes an object with `run` and `report`, and its arguments


def in_turns(made: dict[str, Made], rounds: int, together: bool) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """Call `run` of several objects, each in its own process, one after the other, round after round.

    A machine whose speed drifts then drifts for all of them alike, and a round's ratios still mean something.

    Args:
        made: how each object is made, by name.
        together: keep all of them alive; else one at a time, with all its rounds, where a device holds no more.

    Returns:
        What `run` returned each time, and what `report` returns at the end, by name.
    """
    runs: dict[str, list[Any]] = {name: [] for name in made}
    reports: dict[str, Any] = {}
    for names in [list(made)] if together else [[name] for name in made]:
        with ExitStack() as stack:
            processes = {n: stack.enter_context(OwnProcess(*made[n])) for n in names}
            for process in processes.values():  # they start side by side, but none while another is measured
                process.wait()
            for _ in range(rounds):
                for name in names:
                    runs[name].append(processes[name]("run"))
            reports |= {name: processes[name]("report") for name in names}
    return runs, reports


def forget_peak(device: str) -> int:
    """Begin anew to watch for the peak of memory (`peak_bytes`); bytes that are held now."""
    if is_gpu(device):
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    # Elsewhere than on Linux with glibc, or where it is not allowed: the peak is that since the process began.
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # else what is free again stays resident, and would be used again unseen
        Path("/proc/self/clear_refs").write_text("5")
    return resident_bytes()[0]


def peak_bytes(device: str) -> int:
    """The most memory held since `forget_peak`: of the device, or resident where that is the host."""
    return torch.cuda.max_memory_allocated(device) if is_gpu(device) else resident_bytes()[1]


def resident_bytes() -> tuple[int, int]:
    """Resident memory of this process, now and at its peak."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # not Linux: the peak so far stands for what is held now
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak, peak
    # Not ru_maxrss: on Linux a spawned process inherits the peak of the process that started it.
    fields = dict(line.split(":", 1) for line in status.splitlines())
    now, peak = (int(fields[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))
    return now, peak
