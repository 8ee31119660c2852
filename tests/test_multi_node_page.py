"""The figures of docs/multi-node.md are what `tidal plan` says."""

import re

import pytest

from tests.launching import ROOT
from tidal_dist.config import load_config
from tidal_dist.gpus import gpu_named
from tidal_dist.plan import plan
from tidal_dist.planning.cluster import Assumptions, Cluster

PAGE = (ROOT / "docs" / "multi-node.md").read_text("utf-8")
GB_PER_SECOND = {"8 x 400G": 50, "8 x 200G": 25, "200G": 3.125, "100G": 1.5625, "25G": 0.390625}
HPZ, WEIGHTS, GRADIENTS = (
    f"deepspeed.zero_optimization.{name}"
    for name in ("zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_gradients")
)
WAYS = {
    "ZeRO-3": [f"{HPZ}=1"],
    "ZeRO-3, hpZ": [f"{HPZ}=8"],
    "the same, weights quantised": [f"{HPZ}=8", f"{WEIGHTS}=true"],
    "the same, gradients too (ZeRO++)": [f"{HPZ}=8", f"{WEIGHTS}=true", f"{GRADIENTS}=true"],
    "ZeRO-2": ["training.zero_stage=2", f"{HPZ}=1"],
    "ZeRO-1": ["training.zero_stage=1", f"{HPZ}=1"],
}
TABLES = re.findall(r"\| `(configs/\S+)`, (\d+) x 8 \| GB a GPU \| (.*) \|\n.*\n((?:\|.*\n)+)", PAGE)


@pytest.mark.parametrize(("config_file", "nodes", "networks", "rows"), TABLES, ids=[t[0] for t in TABLES])
def test_a_table_is_what_is_planned(config_file: str, nodes: str, networks: str, rows: str) -> None:
    cells = {name: rest for name, *rest in (line.strip("| ").split(" | ") for line in rows.splitlines())}
    assert list(cells) == list(WAYS)
    for name, (memory, *steps) in cells.items():
        config = load_config(ROOT / config_file, WAYS[name])
        plans = [
            plan(config, Cluster(int(nodes), 8, gpu_named("h100")), Assumptions(network_gb_per_second=GB_PER_SECOND[n]))
            for n in networks.split(" | ")
        ]
        assert memory == f"{plans[0].memory_bytes / 1e9:.0f}" + ("" if plans[0].fits else ": too much"), name
        if plans[0].fits:
            assert steps == [f"{p.step_seconds:.2f} s, {p.utilisation:.0%}" for p in plans], name


def test_there_are_tables() -> None:
    assert [t[0] for t in TABLES] == ["configs/7b.yaml", "configs/30b.yaml"]


def test_one_machine() -> None:
    config = load_config(ROOT / "configs" / "7b.yaml", ["training.accumulation_steps=128"])
    assert f"{plan(config, Cluster(1, 8, gpu_named('h100')), Assumptions()).step_seconds:.0f} s" == "64 s"
    assert "takes 64 s for the step of `configs/7b.yaml`" in PAGE
