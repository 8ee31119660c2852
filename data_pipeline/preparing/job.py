"""A preparation on disk: its work folder, its settings, and its tasks, which every process reads from there.

.NAME.partial/           beside the shards' folder NAME, on the same file system
  lock                   held by the process that drives the preparation
  job.json               settings and tasks; without it the folder counts for nothing
  inputs/00000.json      the files of each task
  config.yaml            the resolved configuration
  receipts/ locks/ progress/ errors/ scratch/    of each task, by stage
  logs/                  datatrove's, by stage
  between-KEY/           what stages hand to later ones
  shards/                becomes NAME
  published.json         written just before it does
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data_pipeline.corpus import CorpusConfig, SourceFile
from data_pipeline.errors import UserError
from data_pipeline.files import replace_file, sha256_of
from data_pipeline.rows import RowFormat
from data_pipeline.segmentation import SegmentationConfig, segmentation_hash
from data_pipeline.shards import FORMAT as SHARD_FORMAT
from data_pipeline.shards import DataConfig
from data_pipeline.tokenizer import TokenizerConfig

_FORMAT = 2
_JOB = "job.json"
_LOCK = "lock"
_PUBLISHED = "published.json"


def settings_of(
    corpus: CorpusConfig,
    tokenizer: TokenizerConfig,
    segmentation: SegmentationConfig,
    data: DataConfig,
    task_bytes: int,
) -> dict[str, Any]:
    """All that the result depends on, beside the corpus files and the programs."""
    given = {"tokenizer_sha256": sha256_of(Path(tokenizer.path))} if tokenizer.path and _is_file(tokenizer.path) else {}
    return {
        "corpus": corpus.model_dump(mode="json"),
        "segmentation": segmentation.model_dump(mode="json"),
        "tokenizer": tokenizer.model_dump(mode="json"),
        "data": data.model_dump(mode="json", include={"shard_bytes", "row_tokens", "row_chars", "overlap_tokens"}),
        "prepare": {"task_bytes": task_bytes},
        "formats": {"job": _FORMAT, "shards": SHARD_FORMAT, "segmentation": segmentation_hash(segmentation)},
    } | given


def _is_file(path: str) -> bool:
    return os.path.isfile(path)


def into_tasks(files: Sequence[SourceFile], task_bytes: int) -> list[list[SourceFile]]:
    """Files in tasks of about `task_bytes`, in their order: a task never mixes sources or divides a file."""
    tasks: list[list[SourceFile]] = []
    size = 0
    for file in files:
        if not tasks or tasks[-1][0].source != file.source or size + file.bytes > task_bytes:
            tasks.append([])
            size = 0
        tasks[-1].append(file)
        size += file.bytes
    return tasks


@dataclass(frozen=True)
class Job:
    """A preparation, as its work folder describes it."""

    folder: Path
    content: dict[str, Any]

    @classmethod
    def load(cls, folder: Path) -> "Job | None":
        """The preparation that a work folder holds; None where there is none."""
        try:
            content = json.loads((folder / _JOB).read_bytes())
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None
        return cls(folder, content) if content.get("format") == _FORMAT else None

    @classmethod
    def write(
        cls,
        folder: Path,
        target: Path,
        settings: dict[str, Any],
        tasks: Sequence[Sequence[SourceFile]],
        resolved_config: str,
        overwrite: bool,
    ) -> "Job":
        """Describe a preparation in its work folder; `job.json` last."""
        shutil.rmtree(folder / "inputs", ignore_errors=True)
        (folder / "inputs").mkdir(parents=True)
        for number, files in enumerate(tasks):  # without an fsync each: every start writes them anew
            (folder / "inputs" / f"{number:05d}.json").write_text(json.dumps(_identity(files)))
        replace_file(folder / "config.yaml", resolved_config.encode())
        content = {
            "format": _FORMAT,
            "settings": settings,
            "key": key_of(settings, tasks),
            "target": str(target),
            "overwrite": overwrite,
            "directory": os.getcwd(),
            "tasks": [{"source": files[0].source, "bytes": sum(f.bytes for f in files)} for files in tasks],
        }
        replace_file(folder / _JOB, json.dumps(content).encode())
        return cls(folder, content)

    @property
    def shards(self) -> Path:
        """The folder of shards that is being made."""
        return self.folder / "shards"

    @property
    def between(self) -> Path:
        """The folder of what stages hand to later ones. Other corpus files have another, so that nothing mixes."""
        return self.folder / f"between-{self.content['key']}"

    @property
    def target(self) -> Path:
        """What that folder will be called."""
        return Path(self.content["target"])

    @property
    def tasks(self) -> list[dict[str, int]]:
        """Source and input bytes of each task."""
        return self.content["tasks"]

    @property
    def input_bytes(self) -> int:
        """The size of the corpus files."""
        return sum(task["bytes"] for task in self.tasks)

    @cached_property
    def corpus(self) -> CorpusConfig:
        """The corpus."""
        return CorpusConfig.model_validate_json(json.dumps(self.content["settings"]["corpus"]))

    @cached_property
    def segmentation(self) -> SegmentationConfig:
        """How text is cut."""
        return SegmentationConfig.model_validate(self.content["settings"]["segmentation"])

    @cached_property
    def tokenizer(self) -> TokenizerConfig:
        """Which tokeniser is used, or how it is trained."""
        return TokenizerConfig.model_validate(self.content["settings"]["tokenizer"])

    @property
    def shard_bytes(self) -> int:
        """Text of a shard."""
        return self.content["settings"]["data"]["shard_bytes"]

    @property
    def row_format(self) -> RowFormat:
        """The rows that are planned."""
        data = self.content["settings"]["data"]
        return RowFormat(data["row_tokens"], data["row_chars"], overlap_tokens=data["overlap_tokens"])

    @cached_property
    def settings_hash(self) -> str:
        """Hash of the settings: results of tasks under equal settings and inputs are equal."""
        return hash_of(self.content["settings"])

    def identity(self, task: int) -> list[list[Any]]:
        """The files of a task, with what shows whether one has changed."""
        return json.loads((self.folder / "inputs" / f"{task:05d}.json").read_bytes())

    def files(self, task: int) -> list[SourceFile]:
        """The files of a task."""
        return [SourceFile(path, source, size) for path, source, size, _ in self.identity(task)]

    def all_files(self) -> Iterator[SourceFile]:
        """The files of the corpus, in order."""
        for task in range(len(self.tasks)):
            yield from self.files(task)

    def path(self, kind: str, stage: str, task: int, suffix: str = "") -> Path:
        """Where a task's receipt, lock, progress or scratch folder is."""
        return self.folder / kind / stage / f"{task:05d}{suffix}"

    def check_settings(self, settings: dict[str, Any]) -> None:
        """Compare the settings with those of a new start.

        Raises:
            UserError: they differ.
        """
        ours, theirs = (dict(_flat(s)) for s in (self.content["settings"], settings))
        changed = [key for key in ours | theirs if ours.get(key) != theirs.get(key)]
        if changed:
            what = "; ".join(f"{key} was {_short(ours.get(key))}, is {_short(theirs.get(key))}" for key in changed[:3])
            raise UserError(
                f"{self.folder}: an unfinished preparation with other settings ({what}); give --restart to discard it, "
                f"or go back to its settings"
            )

    def publish(self) -> None:
        """Give the finished shards their name. May be repeated after it was interrupted.

        Raises:
            UserError: something else has the name.
        """
        if not self.shards.exists():
            return
        manifest = sha256_of(self.shards / "manifest.json")
        replace_file(self.folder / _PUBLISHED, json.dumps({"manifest": manifest}).encode())
        if self.target.exists():
            if not self.content["overwrite"]:
                raise UserError(
                    f"{self.target}: appeared while its shards were prepared; remove it, or give --overwrite"
                )
            shutil.rmtree(self.folder / "replaced", ignore_errors=True)
            self.target.rename(self.folder / "replaced")
        self.shards.rename(self.target)


def is_published(folder: Path, target: Path) -> bool:
    """Whether the shards of a work folder have their name, so that only the folder itself is left to remove."""
    try:
        manifest = json.loads((folder / _PUBLISHED).read_bytes())["manifest"]
        return not (folder / "shards").exists() and sha256_of(target / "manifest.json") == manifest
    except (OSError, ValueError):
        return False


def lock_of(folder: Path) -> Path:
    """The lock that the process that drives a preparation holds."""
    return folder / _LOCK


def clear(folder: Path) -> None:
    """Empty a work folder of all but the lock; what says that its shards are published goes last."""
    last = (folder / _JOB, folder / _PUBLISHED)
    for path in folder.iterdir():
        if path not in (*last, lock_of(folder)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in last:
        path.unlink(missing_ok=True)


def hash_of(content: Any) -> str:
    """Hex sha256 of something that JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def key_of(settings: dict[str, Any], tasks: Sequence[Sequence[SourceFile]]) -> str:
    """Short hash of the settings and of all files: equal keys give equal shards."""
    return hash_of([settings, [_identity(files) for files in tasks]])[:16]


def _identity(files: Sequence[SourceFile]) -> list[list[Any]]:
    """Files with what shows that one has changed: its size and, on a disk, when it was written, in nanoseconds."""
    return [[f.path, f.source, f.bytes, None if "://" in f.path else os.stat(f.path).st_mtime_ns] for f in files]


def _flat(content: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(content, dict | list) and content:
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, content


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:37]}..."
