"""The stages of a preparation: clean files and duplicates (if they are dropped), tokeniser, shards, finish."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from data_pipeline.corpus import read_files, source_name
from data_pipeline.documents import BadRecords, Document, ReadCounts, SideFile, count_reason
from data_pipeline.encoding import BatchEncoder
from data_pipeline.errors import CorpusError, UserError
from data_pipeline.files import replace_file, sha256_of
from data_pipeline.preparing.assignment import Assignment, Stage
from data_pipeline.preparing.corpus_hashes import CORPUS, as_list, hash_files
from data_pipeline.preparing.job import Job
from data_pipeline.preparing.receipts import Receipt
from data_pipeline.preparing.sampling import Part, Sampled, is_validation, sample_texts
from data_pipeline.rows import plan_shard, write_row_plan
from data_pipeline.segmentation import SegmentationConfig
from data_pipeline.shards import COUNTS, SPLITS, Manifest, ShardWriter, read_lengths, write_manifest
from data_pipeline.storage import Storage
from data_pipeline.tokenizer import MixedTokenizer, train_tokenizer

_CONFIG, _TOKENIZER = "config.yaml", "tokenizer.json"
_BAD, _FILTERED = _SIDE_FOLDERS = ("bad-records/", "filtered/")


def stages_of(job: Job) -> list[Stage]:
    """The stages of a preparation, in their order."""
    every = range(len(job.tasks))
    return [
        *_cleaning(job),
        Stage(
            "tokenizer",
            "tokeniser",
            1,
            _make_tokenizer,
            reads=lambda _: None if job.tokenizer.path else [job.identity(task) for task in every],
            needs=lambda _: _needed(job, None),
        ),
        Stage(
            "shards",
            "shards",
            len(every),
            _write_shards,
            reads=job.identity,
            needs=lambda task: [*_needed(job, task), ("tokenizer", 0)],
            reads_corpus=True,
        ),
        Stage(
            "finish",
            "manifest and row plan",
            1,
            _finish,
            reads=lambda _: sha256_of(job.folder / _CONFIG),
            needs=lambda _: _all_before_finish(job),
            afterwards=Job.publish,
        ),
    ]


def _cleaning(job: Job) -> list[Stage]:
    if not job.corpus.dedup.wanted:
        return []
    from data_pipeline.preparing import dedup

    clean = Stage("clean", "reading and filtering", len(job.tasks), _clean, reads=job.identity, reads_corpus=True)
    return [clean, *dedup.stages_of(job)]


def _needed(job: Job, task: int | None) -> list[tuple[str, int]]:
    """What must be done before the documents of a task, or of all, can be read."""
    if not job.corpus.dedup.wanted:
        return []
    from data_pipeline.preparing import dedup

    return dedup.needed_by_all(job) if task is None else dedup.needed(job, task)


def _all_before_finish(job: Job) -> list[tuple[str, int]]:
    names = ["clean", "shards"] if job.corpus.dedup.wanted else ["shards"]
    return [("tokenizer", 0), *((name, task) for name in names for task in range(len(job.tasks)))]


def _clean(given: Assignment) -> dict[str, Any]:
    from data_pipeline.preparing.clean import write_clean

    counts = ReadCounts()
    with _read(given, counts) as documents:
        write_clean(given.watch.documents(documents), given.between / "clean", given.task)
    return {"read": asdict(counts), "files": hash_files(given.job.files(given.task))}


@contextmanager
def _read(given: Assignment, counts: ReadCounts) -> Iterator[Iterator[Document]]:
    """The documents of a task's files; malformed and refused records go into side files."""
    name = f"{given.task:05d}.jsonl"
    bad, filtered = BadRecords(given.shards / _BAD / name), SideFile(given.shards / _FILTERED / name)
    with bad, filtered:
        yield read_files(given.job.corpus, given.job.files(given.task), counts, bad, filtered)


def _make_tokenizer(given: Assignment) -> dict[str, Any]:
    """Train it on a sample, or take the given one."""
    job, config, sampled = given.job, given.job.tokenizer, Sampled()
    if config.path:
        tokenizer = MixedTokenizer.load(config.path, job.segmentation)
    else:
        fraction = job.corpus.validation_fraction
        texts = sample_texts(_parts(job), config.sample_bytes, fraction, sampled)
        tokenizer = train_tokenizer(texts, config, job.segmentation)
    tokenizer.save(given.shards / _TOKENIZER)
    return {"vocab_size": tokenizer.vocab_size} | ({} if config.path else {"sample": asdict(sampled)})


def _parts(job: Job) -> list[Part]:
    """The corpus as the sample sees it: files, or the clean files of the tasks."""
    if not job.corpus.dedup.wanted:
        return [Part(f.bytes, partial(read_files, job.corpus, [f], ReadCounts())) for f in job.all_files()]
    return [Part(content["bytes"], partial(_unique, job, task, {})) for task, content in enumerate(job.tasks)]


def _unique(job: Job, task: int, dropped: dict[str, int]) -> Iterator[Document]:
    from data_pipeline.preparing.clean import documents_of
    from data_pipeline.preparing.dedup import unique_records

    for record in unique_records(job, task, dropped):
        yield from documents_of(record)


def _write_shards(given: Assignment) -> dict[str, Any]:
    job, storage = given.job, Storage(given.shards)
    counts, dropped = ReadCounts(), dict[str, int]()
    with _read(given, counts) as documents:
        entries = _written(given, _unique(job, given.task, dropped) if job.corpus.dedup.wanted else documents)
    plans = {}
    for entry in (entry for split in SPLITS for entry in entries[split]):
        lengths = read_lengths(storage, entry)
        plans[entry["name"]] = plan_shard(storage, entry["name"], lengths, job.row_format)
    files = [] if job.corpus.dedup.wanted else hash_files(job.files(given.task))  # by who reads them
    return {"read": asdict(counts), "files": files, "dropped": dropped, "entries": entries, "plans": plans}


@lru_cache(maxsize=1)
def _loaded(path: Path, _sha256: str, segmentation: SegmentationConfig) -> tuple[MixedTokenizer, BatchEncoder]:
    """The tokeniser, and an encoder that keeps the blocks it has met for the next task of this process."""
    tokenizer = MixedTokenizer.load(path, segmentation)
    return tokenizer, BatchEncoder(tokenizer)


def _written(given: Assignment, documents: Iterable[Document]) -> dict[str, list[dict[str, Any]]]:
    """The entries of the shards of a task, by split."""
    job, task = given.job, given.task
    tokenizer, encoder = _loaded(job.shards / _TOKENIZER, sha256_of(job.shards / _TOKENIZER), job.segmentation)
    source, prefix = source_name(job.corpus, job.tasks[task]["source"]), f"{task:05d}"
    writers = {
        split: ShardWriter(given.shards, split, tokenizer, job.shard_bytes, prefix, source, encoder) for split in SPLITS
    }
    for document in given.watch.documents(documents):
        held_out = is_validation(document, job.corpus.validation_fraction)
        writers["validation" if held_out else "train"].write(document)
    return {split: writer.close() for split, writer in writers.items()}


def _finish(given: Assignment) -> dict[str, Any]:
    """Compare the files with the receipts, remove what belongs to none, and describe the rest."""
    job, folder = given.job, given.shards
    receipts = {(name, t): _receipt(job, name, t) for name, t in _all_before_finish(job)}
    _remove_strays(job, receipts.values())
    shards = [receipts["shards", t].result for t in range(len(job.tasks))]
    splits = {split: [entry for result in shards for entry in result["entries"][split]] for split in SPLITS}
    reader = "clean" if job.corpus.dedup.wanted else "shards"
    reads = [receipts[reader, t].result["read"] for t in range(len(job.tasks))]
    _check_training(splits["train"], _total(reads))
    replace_file(folder / _CONFIG, (job.folder / _CONFIG).read_bytes())
    replace_file(folder / _TOKENIZER, (job.shards / _TOKENIZER).read_bytes())
    lines = [line for task in range(len(job.tasks)) for line in receipts[reader, task].result["files"]]
    replace_file(folder / CORPUS, as_list(lines))
    extra = {
        "read": asdict(_total(reads)),
        "duplicates": _summed(result["dropped"] for result in shards),
        "sources": _sources(job, splits, reads),
        "tokenizer": receipts["tokenizer", 0].result,
        "coverage": _coverage([entry for split in SPLITS for entry in splits[split]]),
    }
    tokenizer = MixedTokenizer.load(folder / _TOKENIZER, job.segmentation)
    write_manifest(folder, tokenizer, splits, _files(given, receipts.values()), extra)
    plans = {name: plan for result in shards for name, plan in result["plans"].items()}
    write_row_plan(Manifest.load(folder), job.row_format, plans)
    return {}


def _files(given: Assignment, receipts: Iterable[Receipt]) -> dict[str, dict[str, Any]]:
    """Size and sha256 of the files beside the shards, side files included."""
    own = {name: (given.shards / name).stat().st_size for name in (_CONFIG, _TOKENIZER, CORPUS)}
    files = {name: (size, sha256_of(given.shards / name)) for name, size in own.items()}
    for receipt in receipts:
        for path, recorded in receipt.outputs.items():
            name = path.removeprefix("shards/")
            if name.startswith(_SIDE_FOLDERS):
                files[name] = recorded
    return {name: {"size": size, "sha256": sha256} for name, (size, sha256) in files.items()}


def _check_training(entries: list[dict[str, Any]], read: ReadCounts) -> None:
    counts = ", ".join(f"{key} {value}" for key, value in asdict(read).items() if value)
    if not entries:
        raise CorpusError(f"the corpus has no document for training ({counts}); check corpus.sources")
    if not sum(entry["supervised_bytes"] for entry in entries):
        raise CorpusError(f"the corpus has no supervised text for training ({counts}); check corpus.sources")


def _receipt(job: Job, stage: str, task: int) -> Receipt:
    receipt = Receipt.read(job, stage, task)
    # Tasks have compared the hashes of what they kept; what this finds was removed or torn since.
    if receipt is None or not receipt.holds(job.folder, content=False):
        raise UserError(f"{job.folder}: what task {task} of {stage} wrote is not there any more; start again")
    return receipt


def _remove_strays(job: Job, receipts: Iterable[Receipt]) -> None:
    known = {job.folder / name for receipt in receipts for name in receipt.outputs}
    for path in job.shards.rglob("*"):
        if path.is_file() and path not in known:
            path.unlink()
    for path in sorted(job.shards.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def _total(reads: Iterable[Mapping[str, Any]]) -> ReadCounts:
    total = ReadCounts()
    for counts in reads:
        total.add(counts)
    return total


def _summed(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for each in counts:
        for key, count in each.items():
            count_reason(total, key, count)
    return total


def _sources(
    job: Job, splits: Mapping[str, list[dict[str, Any]]], reads: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What each source gave, and what became of its records."""
    found = {}
    for index in range(len(job.corpus.sources)):
        name = source_name(job.corpus, index)
        entries = [entry for split in SPLITS for entry in splits[split] if entry["source"] == name]
        tasks = [task for task, content in enumerate(job.tasks) if content["source"] == index]
        found[name] = {key: sum(entry[key] for entry in entries) for key in COUNTS}
        found[name] |= {"shards": len(entries), "read": asdict(_total(reads[task] for task in tasks))}
    return found


def _coverage(entries: list[dict[str, Any]]) -> dict[str, float]:
    """How well the tokeniser's vocabulary covers the corpus."""
    keys = ("blocks", "tokens", "text_bytes", "one_token_blocks")
    blocks, tokens, text, alone = (sum(entry[key] for entry in entries) for key in keys)
    ratios = {"bytes_per_token": text / tokens, "tokens_per_block": tokens / blocks, "one_token_blocks": alone / blocks}
    return {name: round(ratio, 4) for name, ratio in ratios.items()}
