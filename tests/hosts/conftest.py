"""Two hosts on this machine, for the tests of this folder."""

from collections.abc import Iterator

import pytest

from tests.hosts.cluster import Cluster, two_hosts
from tests.hosts.namespaces import obstacle


@pytest.fixture(scope="session")
def standing_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if problem := obstacle():
        pytest.skip(problem)
    with two_hosts(tmp_path_factory.mktemp("cluster") / "hosts") as cluster:
        yield cluster


@pytest.fixture
def cluster(standing_cluster: Cluster) -> Iterator[Cluster]:
    """`alpha` and `beta`, on which nothing runs; made once, put in order after each test."""
    yield standing_cluster
    standing_cluster.reset()
