"""What the project reads on a host: its configuration and some of its shards. Printed as one JSON object.

python -m tidal_dist.cluster.preflight.reads HOST_NUMBER SAMPLE CONFIG [section.key=value ...]
"""

import hashlib
import json
import sys
from collections.abc import Sequence
from typing import Any

from data_pipeline.errors import UserError
from data_pipeline.shard_reader import ShardReader
from data_pipeline.shards import Manifest, read_index
from tidal_dist.config import Config, load_config


def config_hash(config: Config) -> str:
    """The sha256 of the resolved configuration."""
    return hashlib.sha256(config.to_yaml().encode()).hexdigest()


def read(host: int, sample: int, config_file: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The hash of the configuration, and what is wrong with `sample` member groups of shards, if anything is."""
    try:
        config = load_config(config_file, overrides)
    except UserError as error:
        return {"config_problem": str(error)}
    found: dict[str, Any] = {"config": config_hash(config)}
    try:
        manifest = Manifest.of(config.data)
        found["shards"] = manifest.hash
        manifest.tokenizer()
        found |= _checked(manifest, host, sample)
    except UserError as error:
        found["shards_problem"] = str(error)
    return found


def _checked(manifest: Manifest, host: int, sample: int) -> dict[str, int]:
    """Compare members with their recorded hashes, on each host others.

    Raises:
        ShardError: one is missing or not what was written.
    """
    entries = [entry for split in manifest.content["splits"] for entry in manifest.shards(split)]
    checked = min(sample, len(entries))
    for number in range(checked):
        # Even steps through all shards, begun at another one on each host.
        entry = entries[(number * len(entries) // checked + host) % len(entries)]
        documents = read_index(manifest.storage, entry, ("member_documents",))["member_documents"]
        member = (host + number) % len(documents)
        ShardReader(manifest.storage, entry).origin(int(documents[:member].sum()))
    return {"members": checked}


if __name__ == "__main__":
    print(json.dumps(read(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])))
