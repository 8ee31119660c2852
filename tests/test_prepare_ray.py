"""`tidal prepare` on a Ray cluster of two nodes, each with its own processes."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.preparing import FILES, config_file, contents, lines_of, start_prepare, write_texts

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "memory": 2_000_000_000, "object_store_memory": 100_000_000, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    try:
        cluster.add_node(**node)
        cluster.wait_for_nodes()
        yield cluster
    finally:
        cluster.shutdown()


def test_the_same_shards_as_on_one_machine(cluster: Any, tmp_path: Path) -> None:
    write_texts(tmp_path / "texts")
    config = config_file(tmp_path)
    on_ray = ["prepare.executor=ray", f"prepare.ray.address={cluster.address}", "prepare.workers=null"]
    process = start_prepare(config, *on_ray)
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert lines_of(errors) == []
    assert json.loads(output)["tasks"]["shards"] == {"done": FILES, "kept": 0}
    found = contents(tmp_path / "shards")
    assert start_prepare(config, "--overwrite").wait(timeout=240) == 0
    assert contents(tmp_path / "shards") == found

    path = tmp_path / "texts" / "2.jsonl"
    path.write_text(path.read_text() + "{torn\n")
    process = start_prepare(config, "--overwrite", *on_ray)
    output, errors = process.communicate(timeout=240)
    assert (process.returncode, output) == (2, "")
    assert lines_of(errors)[-1].startswith(f"error: {path}:61: not JSON")
    assert "Traceback" not in errors
    assert contents(tmp_path / "shards") == found


def test_no_cluster(tmp_path: Path) -> None:
    write_texts(tmp_path / "texts")
    process = start_prepare(config_file(tmp_path), "prepare.executor=ray", "prepare.ray.address=127.0.0.1:1")
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 2
    assert "prepare.ray.address=127.0.0.1:1: no cluster" in errors.splitlines()[-1]
