"""Steps in pinned memory. Skipped where there is no GPU."""

from itertools import islice
from pathlib import Path

import pytest
import torch

from data_pipeline.ordering import Share
from data_pipeline.quarantine import QuarantineRecord
from data_pipeline.rows import RowReader, row_format_of
from data_pipeline.run_order import run_order
from data_pipeline.shards import Manifest
from data_pipeline.stream import Loading, Stream
from tests.mixed_shards import prepare_mixed

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("workers", [0, 1])
def test_pinned_steps_are_the_same_steps(tmp_path: Path, workers: int) -> None:
    _, config = prepare_mixed(tmp_path)
    manifest, data = Manifest.of(config.data), config.data
    reader = RowReader(manifest, "train", manifest.tokenizer(), row_format_of(data), data.seed)
    order = run_order(manifest, reader.shard_rows, data, 8, QuarantineRecord(manifest.hash))
    plain, pinned = (
        list(islice(Stream(reader, order, Share(8, 2, 0, 1), manifest.hash, loading), 5))
        for loading in (Loading(), Loading(workers, 2, pin_memory=True))
    )
    for first, second in zip(plain, pinned, strict=True):
        assert first.identity_sum == second.identity_sum
        for one, other in zip(first.batches, second.batches, strict=True):
            assert all(tensor.is_pinned() for tensor in other.tensors())
            moved = zip(one.to("cuda").tensors(), other.to("cuda").tensors(), strict=True)
            assert all(torch.equal(a, b) for a, b in moved)
