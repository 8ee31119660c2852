"""Rows about hosts as machines: clock, GPUs, memory, disks, and the files that all must see."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import median_low
from typing import Any

from tidal_dist.cluster.preflight.rows import Facts, Row, Status, gigabytes, usual

_CLOCK_WARN_SECONDS, _CLOCK_FAIL_SECONDS = 1.0, 30.0
_MIB = 1 << 20
_USED_MIB = 1024  # a GPU that shows more than a context's worth is in use
# Bits of NVIDIA's reasons for lower clocks that mean trouble; the others are idling, settings and power caps.
_SLOWED = {0x8: "hardware slowdown", 0x20: "too hot", 0x40: "too hot (hardware)", 0x80: "power brake"}
_LEAST_BYTES = {"compiled operators": 1e9, "compiled kernels": 1e9, "temporary files": 1e9, "shared memory": 1e9}


@dataclass(frozen=True)
class Clock:
    """A host's clock. seconds: before ours. uncertainty: half the time that asking took, in seconds."""

    seconds: float
    uncertainty: float


def clock_rows(clocks: Mapping[str, Clock]) -> Iterator[Row]:
    """Ours is right unless most hosts say otherwise."""
    offsets = [clock.seconds for clock in clocks.values()]
    agree = sum(abs(offset) < _CLOCK_FAIL_SECONDS for offset in offsets)
    reference = 0.0 if 2 * agree >= len(offsets) else median_low(offsets)
    for host, clock in clocks.items():
        offset = clock.seconds - reference
        surely = abs(offset) - clock.uncertainty
        text = f"{offset:+.1f} s (within {clock.uncertainty:.1f} s)"
        if surely < _CLOCK_WARN_SECONDS:
            yield Row(host, "clock", "ok", text)
        else:
            status: Status = "fail" if surely >= _CLOCK_FAIL_SECONDS else "warn"
            yield Row(host, "clock", status, f"{text} from most hosts", "have chrony or ntpd set it there")


def gpu_rows(facts: Facts, slots: Mapping[str, int]) -> Iterator[Row]:
    """Number, kind, driver and health of GPUs; none anywhere is a training on CPUs."""
    found = {host: fact["gpus"] for host, fact in facts.items()}
    known = {host: gpus["gpus"] for host, gpus in found.items() if "gpus" in gpus}
    kinds = {host: tuple((gpu["name"], gpu["driver_version"]) for gpu in gpus[:1]) for host, gpus in known.items()}
    for host, gpus in found.items():
        if problem := gpus.get("problem"):
            yield Row(host, "gpus", "fail", f"nvidia-smi: {problem}", "look at the driver there (dmesg), or reboot")
        elif not any(known.values()):
            yield Row(host, "gpus", "ok", "none: ranks compute on CPUs")
        else:
            yield from _gpu_rows(host, known[host], kinds[host], usual(kinds), slots[host])


def _gpu_rows(
    host: str, gpus: list[dict[str, str]], kind: tuple[Any, ...], most: tuple[Any, ...], slots: int
) -> Iterator[Row]:
    if len(gpus) < slots:
        text, remedy = f"{len(gpus)} GPUs for {slots} slots", f"write slots={len(gpus)}, or look why some are missing"
        yield Row(host, "gpus", "fail", text, remedy)
    elif kind != most:
        text = f"{_named(kind)}; on most hosts {_named(most)}"
        yield Row(host, "gpus", "warn", text, "the slowest GPU sets the pace; install the same driver everywhere")
    else:
        text = f"{len(gpus)} x {_named(kind)}, {int(gpus[0]['memory.total']) * _MIB / 1e9:.0f} GB"
        yield Row(host, "gpus", "ok", text)
    for gpu in gpus:
        yield from _health_rows(host, gpu)


def _named(kind: tuple[tuple[str, str], ...]) -> str:
    return f"{kind[0][0]}, driver {kind[0][1]}" if kind else "no GPU"


def _health_rows(host: str, gpu: Mapping[str, str]) -> Iterator[Row]:
    name = f"GPU {gpu['index']}"
    errors = gpu.get("ecc.errors.uncorrected.volatile.total", "")
    if errors.isdigit() and int(errors):
        text = f"{name}: {errors} memory errors that ECC could not correct"
        yield Row(host, "gpu health", "fail", text, f"drain the host, `nvidia-smi -r -i {gpu['index']}`, and watch it")
    if gpu.get("retired_pages.pending", "").lower() == "yes":
        yield Row(host, "gpu health", "warn", f"{name}: a memory page waits to be retired", "reboot the host")
    try:
        reasons = int(gpu.get("clocks_throttle_reasons.active", "0"), 16)
    except ValueError:
        reasons = 0
    if slowed := [text for bit, text in _SLOWED.items() if reasons & bit]:
        yield Row(
            host, "gpu health", "warn", f"{name} is slowed down: {', '.join(slowed)}", "look at cooling and power"
        )
    used = gpu["memory.used"]
    if used.isdigit() and int(used) > _USED_MIB:
        text = f"{name}: {gigabytes(int(used) * _MIB)} in use already"
        yield Row(host, "gpu health", "warn", text, f"`ssh {host} nvidia-smi`: end what is left of other jobs")


def disk_rows(facts: Facts, checkpoint_bytes: float, keep: int) -> Iterator[Row]:
    """Free space where a run writes. checkpoint_bytes: of one checkpoint; keep: of them stand at most."""
    for host, fact in facts.items():
        low = False
        for what, disk in fact["disks"].items():
            row = _disk_row(host, what, disk, checkpoint_bytes, keep)
            low |= row is not None
            yield from [row] if row else []
        if not low:
            free = min((disk["free"], what) for what, disk in fact["disks"].items())
            yield Row(host, "disks", "ok", f"{gigabytes(free[0])} and more free ({free[1]})")


def _disk_row(host: str, what: str, disk: Mapping[str, Any], checkpoint_bytes: float, keep: int) -> Row | None:
    where = f"{what} ({disk['folder']})"
    if problem := disk.get("problem"):
        return Row(host, "disks", "fail", f"{where}: {problem}", "mount it, or choose another folder")
    free = disk["free"]
    if what != "run folder":
        if free >= _LEAST_BYTES.get(what, 1e9):
            return None
        remedy = (
            "docker: --shm-size=16g" if what == "shared memory" else "free some, or set its variable to another disk"
        )
        return Row(host, "disks", "warn", f"{where}: {gigabytes(free)} free", remedy)
    if free >= keep * checkpoint_bytes:
        return None
    text = f"{where}: {gigabytes(free)} free; a checkpoint takes {gigabytes(checkpoint_bytes)}, {keep} stand at most"
    status: Status = "fail" if free < checkpoint_bytes else "warn"
    return Row(host, "disks", status, text, "free some, or choose another run_dir")


def run_folder_rows(facts: Facts, seen: Mapping[str, list[str]]) -> Iterator[Row]:
    """Whether all hosts write to one folder. seen: by host, which of the files that some hosts left there it sees."""
    views = {host: tuple(sorted(found)) for host, found in seen.items()}
    alike = sum(view == usual(views) for view in views.values())
    for host, fact in facts.items():
        folder = fact["run_folder"]["folder"]
        if problem := fact["run_folder"].get("problem"):
            remedy = "make room, or give the user the right to write there"
            yield Row(host, "run folder", "fail", f"cannot write to {folder} ({problem})", remedy)
        elif len(facts) > 1 and (host not in views or not usual(views)):
            yield Row(host, "run folder", "warn", "not known whether it is shared", "mend the other hosts first")
        elif len(facts) > 1 and views[host] != usual(views):
            text = f"{folder} is another folder there: it does not hold what most hosts see"
            remedy = "mount the same file system on all hosts, or choose a shared run_dir"
            yield Row(host, "run folder", "fail", text, remedy)
        else:
            others = f", seen by {alike} hosts" if len(views) > 1 else ""
            yield Row(host, "run folder", "ok", f"{folder} can be written{others}")


def shard_rows(facts: Facts) -> Iterator[Row]:
    """Whether every host reads the same shards, and those that were sampled are what was written."""
    found = {host: fact["reads"] for host, fact in facts.items() if "config" in fact["reads"]}
    hashes = {host: reads["shards"] for host, reads in found.items() if "shards" in reads}
    remedy = "copy the shards there anew, or mount what the others mount"
    for host, reads in found.items():
        if problem := reads.get("shards_problem"):
            yield Row(host, "shards", "fail", problem, remedy)
        elif reads["shards"] != usual(hashes):
            text = f"other shards: manifest {reads['shards'][:12]}, on most hosts {usual(hashes)[:12]}"
            yield Row(host, "shards", "fail", text, remedy)
        else:
            text = f"manifest {reads['shards'][:12]}, {reads['members']} samples as they were written"
            yield Row(host, "shards", "ok", text)
