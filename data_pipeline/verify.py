"""What is wrong with a shard folder: every file compared with what was recorded when it was written."""

import io
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipeline.errors import ShardError
from data_pipeline.rows import PLAN, RowFormat
from data_pipeline.shards import MANIFEST, Manifest, read_index, seal
from data_pipeline.storage import Storage


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong: with which file, what, and what to do."""

    file: str
    what: str
    remedy: str


@dataclass(frozen=True)
class Recorded:
    """A file as it was when it was written."""

    name: str
    size: int
    sha256: str


_AGAIN = "copy it here anew, or prepare the shards anew"
_PLAN_AGAIN = "remove its folder and run `tidal plan-rows`"


def verify(storage: Storage, progress: Callable[[int, int], object] = lambda _done, _of: None) -> list[Fault]:
    """Compare every file of a shard folder; the faults, in the order of the files.

    Args:
        progress: called with the files done and their number.

    Raises:
        ShardError: there is no manifest, or it cannot be read, so that nothing else can be compared.
    """
    manifest = Manifest.load(storage)
    faults = list(_manifest_faults(manifest))
    if any(fault.file == MANIFEST for fault in faults):
        return faults  # what it says of the other files means nothing then
    shard_files = list(_shard_files(manifest))
    present = set(storage.files())
    plans, plan_faults = _plan_files(manifest, present)
    expected = [(r, _AGAIN) for r in shard_files] + [(r, _PLAN_AGAIN) for r in plans]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done, found in enumerate(pool.map(lambda e: _file_faults(manifest, e[0], e[1], present), expected), 1):
            faults += found
            progress(done, len(expected))
    known = {recorded.name for recorded, _ in expected} | {MANIFEST, f"{MANIFEST}.sha256"}
    known |= {name for name in present if name.startswith("rows-") and name.endswith(f"/{PLAN}")}
    faults += plan_faults
    faults += [Fault(name, "foreign: the manifest does not know it", "remove it") for name in sorted(present - known)]
    return sorted(faults, key=lambda fault: fault.file)


def _manifest_faults(manifest: Manifest) -> Iterator[Fault]:
    name = f"{MANIFEST}.sha256"
    try:
        recorded = manifest.storage.read(name)
    except OSError:
        yield Fault(name, "missing, so the manifest itself cannot be checked", _AGAIN)
        return
    if recorded != seal(manifest.hash):
        yield Fault(MANIFEST, "its content is not what was written (sha256 differs)", _AGAIN)


def _shard_files(manifest: Manifest) -> Iterator[Recorded]:
    for name, recorded in manifest.content["files"].items():
        yield Recorded(name, recorded["size"], recorded["sha256"])
    for split in manifest.content["splits"]:
        for entry in manifest.shards(split):
            yield Recorded(f"{entry['name']}.tar", entry["bytes"], entry["sha256"])
            yield Recorded(f"{entry['name']}.index.npz", entry["index_bytes"], entry["index_sha256"])


def _plan_files(manifest: Manifest, present: set[str]) -> tuple[list[Recorded], list[Fault]]:
    """The files of all row plans that are there, and what is wrong with their lists."""
    files: list[Recorded] = []
    faults: list[Fault] = []
    for folder in sorted({name.split("/")[0] for name in present if name.startswith("rows-") and "/" in name}):
        name = f"{folder}/{PLAN}"
        try:
            content = json.loads(manifest.storage.read(name))
            entries = {split: content["shards"][split] for split in manifest.content["splits"]}
            files += [
                Recorded(f"{folder}/{e['name']}.npz", e["size"], e["sha256"]) for s in entries.values() for e in s
            ]
            found = _differences_of_plan(manifest, folder, content, entries)
        except (OSError, ValueError, KeyError, TypeError) as error:
            found = f"not a row plan ({error!r})"
        if found:
            faults.append(Fault(name, found, _PLAN_AGAIN))
    return files, faults


def _differences_of_plan(manifest: Manifest, folder: str, content: dict, entries: dict[str, list[dict]]) -> str:
    if content["manifest"] != manifest.hash:
        return "belongs to other shards"
    sizes = {name: content[name] for name in ("row_tokens", "row_chars", "overlap_tokens")}
    if folder != RowFormat(**sizes).plan_name:
        return "is of rows of another size"
    for split, plans in entries.items():
        if [plan["name"] for plan in plans] != [entry["name"] for entry in manifest.shards(split)]:
            return f"does not list the shards of {split}"
        for plan in plans:
            if wrong := _differences_of_rows(manifest.storage, folder, plan):
                return wrong
    return ""


def _differences_of_rows(storage: Storage, folder: str, plan: dict[str, Any]) -> str:
    """Whether the list says of a shard's rows what its plan holds; a plan that is broken is a fault of its own."""
    try:
        with np.load(io.BytesIO(storage.read(f"{folder}/{plan['name']}.npz")), allow_pickle=False) as arrays:
            found = {
                "rows": len(arrays["row_ends"]),
                "token_slots": int(arrays["token_slots"].sum(dtype=np.int64)),
                "char_slots": int(arrays["char_slots"].sum(dtype=np.int64)),
            }
    except Exception:  # whatever a broken archive raises
        return ""
    wrong = [f"{key} {plan[key]} instead of {value}" for key, value in found.items() if plan[key] != value]
    return f"says of {plan['name']}: {', '.join(wrong)}" if wrong else ""


def _file_faults(manifest: Manifest, recorded: Recorded, remedy: str, present: set[str]) -> list[Fault]:
    name = recorded.name
    if name not in present:
        return [Fault(name, "missing", remedy)]
    try:
        size, sha256 = manifest.storage.size_and_sha256(name)
    except OSError as error:
        return [Fault(name, f"cannot read ({error.strerror or error})", remedy)]
    if size != recorded.size:
        kind = "truncated" if size < recorded.size else "too long"
        return [Fault(name, f"{kind}: {size:,} bytes instead of {recorded.size:,}", remedy)]
    if sha256 != recorded.sha256:
        where = _where_it_differs(manifest, name) if name.endswith(".tar") else ""
        return [Fault(name, f"its content is not what was written (sha256 differs{where})", remedy)]
    return []


def _where_it_differs(manifest: Manifest, name: str) -> str:
    """The documents of a tar whose bytes differ, as far as its index can tell."""
    from data_pipeline.shard_reader import ShardReader

    entry = next(e for s in manifest.content["splits"] for e in manifest.shards(s) if f"{e['name']}.tar" == name)
    try:
        reader = ShardReader(manifest.storage, entry)
        ends = np.cumsum(read_index(manifest.storage, entry, ("member_documents",))["member_documents"]).tolist()
    except ShardError:
        return ""
    bad = []
    for start, end in zip([0, *ends], ends, strict=False):
        try:
            reader.origin(start)
        except ShardError:
            bad.append(f"{start}..{end - 1}")
    return f", documents {', '.join(bad)}" if bad else ", outside the documents"
