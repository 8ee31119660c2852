"""One, two and four real processes, each reading its share as training does, make the same steps."""

import hashlib
import json
from itertools import islice
from pathlib import Path

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from data_pipeline.errors import BadShardError
from data_pipeline.ordering import Share, advance
from data_pipeline.quarantine import QuarantineRecord
from data_pipeline.rows import RowReader, row_format_of
from data_pipeline.run_order import run_order, start_hash
from data_pipeline.shards import Manifest
from data_pipeline.stream import Batch, Loading, Stream
from tests.mixed_shards import SUMS, TIDES, prepare_mixed
from tidal_dist.config import Config, load_config
from tidal_dist.launching import free_port

pytestmark = pytest.mark.slow

STEPS = 40  # past the end of an epoch of both sources, and past a change of the mix
MIX = [{"weights": {SUMS: 0.5, TIDES: 0.5}}, {"from_step": 11, "weights": {SUMS: 0.8, TIDES: 0.2}}]


def open_stream(config: Config, share: Share, loading: Loading) -> tuple[Stream, str]:
    """The stream of one rank, and the rolling hash before it."""
    data = config.data
    manifest = Manifest.of(data)
    reader = RowReader(manifest, "train", manifest.tokenizer(), row_format_of(data, place_shift=5), data.seed)
    record = QuarantineRecord(manifest.hash)
    order = run_order(manifest, reader.shard_rows, data, share.rows_per_step, record)
    return Stream(reader, order, share, manifest.hash, loading), start_hash(manifest, reader.shard_rows, data)


def digests(batches: list[Batch]) -> list[str]:
    """A hash of everything in each row."""
    return [
        hashlib.sha256(b"".join(tensor[i].numpy().tobytes() for tensor in batch.tensors())).hexdigest()
        for batch in batches
        for i in range(len(batch.labels))
    ]


def read_share(rank: int, world: int, workers: int, micro_batches: int, config_file: str, port: int, out: str) -> None:
    """What a rank of a training does, without the training; rank 0 writes down what all ranks read."""
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    config = load_config(config_file)
    stream, rolling_hash = open_stream(
        config, Share(config.training.batch_rows, micro_batches, rank, world), Loading(workers)
    )
    steps = []
    for step in islice(stream, STEPS):
        rolling_hash = advance(rolling_hash, step.identity_sum)
        gathered: list[list[str]] = [[] for _ in range(world)]
        dist.all_gather_object(gathered, digests(step.batches))
        steps.append((sorted(digest for part in gathered for digest in part), rolling_hash))
    if rank == 0:
        Path(out).write_text(json.dumps([steps, stream.state_dict()["rows"]]))
    dist.barrier()
    dist.destroy_process_group()


def test_worlds_of_real_processes_read_the_same_steps(tmp_path: Path) -> None:
    config_file, config = prepare_mixed(tmp_path, data={"mix": MIX})
    found = []
    for world, workers, micro_batches in ((1, 0, 1), (2, 1, 2), (4, 3, 1)):
        out = tmp_path / f"{world}.json"
        arguments = (world, workers, micro_batches, str(config_file), free_port(), str(out))
        mp.start_processes(read_share, arguments, nprocs=world, start_method="fork")
        found.append(json.loads(out.read_text()))
    assert found[0] == found[1] == found[2]
    steps, rows = found[0]
    assert rows == STEPS * config.training.batch_rows
    assert len({json.dumps(digests) for digests, _ in steps}) == STEPS
    assert {len(digests) for digests, _ in steps} == {config.training.batch_rows}


def fail_on_rank_1(rank: int, world: int, port: int, folder: str) -> None:
    from tidal_dist.training import engine

    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)

    def action() -> str:
        if rank == 1:
            raise BadShardError("train/a.tar: torn", 3, "train/a")
        return "done"

    try:
        engine.together(action)
    except BadShardError as error:
        Path(folder, f"{rank}").write_text(f"{error} {error.shard} {error.name}")
    assert engine.from_first_rank(lambda: f"rank {rank}") == "rank 0"
    dist.destroy_process_group()


def test_a_problem_of_one_rank_is_raised_on_all(tmp_path: Path) -> None:
    mp.start_processes(fail_on_rank_1, (2, free_port(), str(tmp_path)), nprocs=2, start_method="fork")
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["train/a.tar: torn 3 train/a"] * 2
