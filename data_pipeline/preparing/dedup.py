"""Deduplication: the corpus is read and filtered once into clean files, then datatrove's steps find what to drop.

Its unit is the record: the documents of one chat stay or go together. Of records that are alike by URL or text, the
first in the corpus stays; of nearly alike ones, any one, but always the same one.

    clean                    a task for each of the corpus
    url-signatures           the same tasks; then url-duplicates, a task for some of the hashes
    text-signatures          the same, of what the URLs leave; then text-duplicates
    minhash-signatures       the same, of what those leave; then minhash-buckets, a task each; then minhash-clusters
"""

import resource
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, Literal

from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import exact_dedup, minhash
from datatrove.utils.word_tokenizers import WordTokenizer

from data_pipeline.documents import quiet_datatrove
from data_pipeline.preparing.assignment import Assignment, Stage
from data_pipeline.preparing.clean import Record, document_count, read_clean, task_of
from data_pipeline.preparing.job import Job
from data_pipeline.segmentation import SegmentationConfig, segment

Kind = Literal["url", "text", "minhash"]
_TASKS_PER_FINDER = 16
_MOST_FINDERS = 512
_HIGHEST_PRIORITY = 65_535
_STAGES: dict[Kind, tuple[str, ...]] = {
    "url": ("url-signatures", "url-duplicates"),
    "text": ("text-signatures", "text-duplicates"),
    "minhash": ("minhash-signatures", "minhash-buckets", "minhash-clusters"),
}


def kinds_of(job: Job) -> list[Kind]:
    """The kinds of duplicates that are dropped, in their order."""
    wanted = job.corpus.dedup
    return [kind for kind in _STAGES if getattr(wanted, kind)]


def stages_of(job: Job) -> list[Stage]:
    """The stages that find duplicates; they come after the stage `clean`."""
    stages: list[Stage] = []
    for kind in kinds_of(job):
        signatures, find, *cluster = _STAGES[kind]
        title, tasks, finders = f"duplicates by {kind}", len(job.tasks), _finders(job, kind)
        sign, seek = partial(_sign, kind), partial(_find, kind)
        needed = partial(_needed_before, job, kind)
        stages.append(Stage(signatures, f"{title}: signatures", tasks, sign, needs=needed, reads_corpus=True))
        stages.append(Stage(find, f"{title}: matches", finders, seek, needs=partial(_all_of, signatures, tasks)))
        for name in cluster:
            stages.append(Stage(name, f"{title}: clusters", 1, _cluster, needs=partial(_all_of, find, finders)))
    return stages


def _all_of(stage: str, tasks: int, _: int) -> list[tuple[str, int]]:
    return [(stage, task) for task in range(tasks)]


def needed(job: Job, task: int) -> list[tuple[str, int]]:
    """The tasks that must be done before the unique records of a task can be read."""
    return _needed_before(job, None, task)


def needed_by_all(job: Job) -> list[tuple[str, int]]:
    """The tasks that must be done before the unique records of every task can be read."""
    return [*(("clean", task) for task in range(len(job.tasks))), *needed(job, 0)[1:]]


def _needed_before(job: Job, kind: Kind | None, task: int) -> list[tuple[str, int]]:
    found = [("clean", task)]
    for earlier in kinds_of(job):
        if earlier == kind:
            break
        last = _STAGES[earlier][-1]
        found += [(last, f) for f in range(1 if earlier == "minhash" else _finders(job, earlier))]
    return found


def _finders(job: Job, kind: Kind) -> int:
    if kind == "minhash":
        return _minhash_config(job).num_buckets
    return min(-(-len(job.tasks) // _TASKS_PER_FINDER), _MOST_FINDERS)


def unique_records(job: Job, task: int, dropped: dict[str, int], before: Kind | None = None) -> Iterator[Record]:
    """The records of a task's clean file without duplicates.

    Args:
        dropped: documents of each kind of duplicate; what is dropped is added. before: only kinds before this one.
    """
    quiet_datatrove()
    records = read_clean(job.between / "clean", task)
    for kind in kinds_of(job):
        if kind == before:
            break
        records = _filtered(job, kind, task, records, dropped)
    return records


def _filtered(job: Job, kind: Kind, task: int, records: Iterable[Record], dropped: dict[str, int]) -> Iterator[Record]:
    folder = job.between / _STAGES[kind][-1]
    folder.mkdir(parents=True, exist_ok=True)  # where there are no duplicates there is no file
    step = (
        minhash.MinhashDedupFilter(str(folder))
        if kind == "minhash"
        else exact_dedup.ExactDedupFilter(str(folder), _exact_config(kind))
    )
    dropped.setdefault(kind, 0)

    def counted(records: Iterable[Record], sign: int) -> Iterator[Record]:
        for record in records:
            dropped[kind] += sign * document_count(record)
            yield record

    return counted(step.run(counted(records, 1), task, len(job.tasks)), -1)


def _sign(kind: Kind, given: Assignment) -> dict[str, Any]:
    job, folder = given.job, str(given.between / _STAGES[kind][0])
    step: PipelineStep
    if kind == "minhash":
        words = _Blocks(job.segmentation)
        step = minhash.MinhashDedupSignature(folder, _minhash_config(job), words)
    else:
        step = exact_dedup.ExactDedupSignature(folder, _exact_config(kind), _finders(job, kind))
    records = unique_records(job, given.task, {}, before=kind)
    step.run(given.watch.records(records), given.task, len(job.tasks))
    return {}


def _find(kind: Kind, given: Assignment) -> dict[str, Any]:
    signatures, find, *_ = _STAGES[kind]
    folders = str(given.job.between / signatures), str(given.between / find)
    step: PipelineStep
    if kind == "minhash":
        step = minhash.MinhashDedupBuckets(*folders, config=_minhash_config(given.job))
    else:
        step = exact_dedup.ExactFindDedups(*folders, config=_exact_config(kind))
    _allow_open_files()
    step.run(None, given.task, _finders(given.job, kind))
    return {}


def _cluster(given: Assignment) -> dict[str, Any]:
    _, find, cluster = _STAGES["minhash"]
    folders = str(given.job.between / find), str(given.between / cluster)
    minhash.MinhashDedupCluster(*folders, config=_minhash_config(given.job)).run(None, given.task, 1)
    return {}


def _minhash_config(job: Job) -> minhash.MinhashConfig:
    ours = job.corpus.dedup.minhash
    assert ours is not None
    return minhash.MinhashConfig(ours.run_words, ours.buckets, ours.hashes_per_bucket, ours.seed)


def _exact_config(kind: Kind) -> exact_dedup.ExactDedupConfig:
    return exact_dedup.ExactDedupConfig(_url if kind == "url" else _text, _priority)


def _url(record: Record) -> str:
    return record.metadata["url"] or f"\0{record.id}"


def _text(record: Record) -> str:
    return f"{record.metadata['prompt_chars']}\0{record.text}"


def _priority(record: Record) -> int:
    """Higher for earlier records, which stay."""
    return max(_HIGHEST_PRIORITY - task_of(record), 1)


class _Blocks(WordTokenizer):
    """Blocks as the words of a text: they exist in every script, and need no model of a language."""

    def __init__(self, config: SegmentationConfig):
        super().__init__()
        self._config = config

    def word_tokenize(self, text: str) -> list[str]:
        return [block.strip() for block in segment(text, self._config) if block.strip()]

    def sent_tokenize(self, text: str) -> list[str]:
        raise NotImplementedError

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        raise NotImplementedError


def _allow_open_files() -> None:
    """A task that compares the signatures of all others has a file of each open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
