import json
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.packing import DocumentLengths, plan_rows
from data_pipeline.shards import Manifest
from data_pipeline.summary import FULL, coverage, fills, summarize
from tests.launching import tidal_error, tidal_here


def test_counts_lengths_and_sources(manifest: Manifest) -> None:
    summary = summarize(manifest, 48)
    for split, counts in summary["splits"].items():
        assert counts["documents"] == manifest.content["splits"][split]["documents"]
        assert counts["shards"] == len(manifest.shards(split))
    train = manifest.content["splits"]["train"]
    assert sum(summary["documents"].values()) == train["documents"]
    assert sum(summary["blocks"].values()) == train["blocks"]
    assert sum(length * count for length, count in summary["blocks"].items()) == train["text_bytes"]
    assert sum(source["share_of_text"] for source in summary["sources"].values()) == pytest.approx(1)
    assert {entry["source"] for entry in manifest.shards("train")} == set(summary["sources"])


def test_coverage_is_of_all_shards() -> None:
    one = {"text_bytes": 30, "tokens": 10, "blocks": 8, "one_token_blocks": 6}
    two = {"text_bytes": 10, "tokens": 10, "blocks": 8, "one_token_blocks": 2}
    assert coverage([one, two]) == {"bytes_per_token": 2.0, "tokens_per_block": 1.25, "one_token_blocks": 0.5}


def lengths(seed: int) -> DocumentLengths:
    """300 documents; the share of tokens to bytes differs between them, as in real text."""
    rng = np.random.default_rng(seed)
    document_blocks = np.clip(rng.lognormal(5, 1.2, 300), 2, 5000).astype(np.uint32)
    block_bytes = np.clip(rng.geometric(0.22, document_blocks.sum()), 1, 32)
    density = np.repeat(rng.uniform(2.5, 6, 300), document_blocks)
    block_tokens = np.maximum(1, np.ceil(block_bytes / density))
    zero = np.zeros(300, np.uint32)
    return DocumentLengths(document_blocks, zero, block_tokens.astype(np.uint8), block_bytes.astype(np.uint8))


def test_the_shares_are_those_of_the_plans() -> None:
    found = fills(lengths(1), 512)
    assert len({row.row_chars for row in found}) == len(found) > 8
    for row in found:
        plan = plan_rows(lengths(1), 512, row.row_chars, "shard")
        assert row.char_fill == pytest.approx(plan.char_slots.sum(dtype=np.int64) / plan.rows / row.row_chars)
        assert row.token_fill == pytest.approx(plan.token_slots.sum(dtype=np.int64) / plan.rows / 512)


@pytest.mark.slow
def test_the_recommended_rows_are_full(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Manifest, "lengths", lambda *_: lengths(2))
    for row_tokens in (512, 2048):
        summary = summarize(manifest, row_tokens)
        best = next(row for row in summary["rows"] if row["row_chars"] == summary["recommended_row_chars"])
        assert best["char_fill"] >= FULL
        assert all(row["char_fill"] < FULL for row in summary["rows"] if row["row_chars"] > best["row_chars"])


@pytest.mark.slow
def test_the_command(manifest: Manifest, tmp_path: Path) -> None:
    result = tidal_here("shards", "info", manifest.folder, "--row-tokens", "48", "--plot", tmp_path / "info.png")
    assert result.returncode == 0, result.stderr
    text = result.stdout.decode()
    assert "<- recommended" in text or "no C fills" in text
    assert "bytes a token" in text
    assert (tmp_path / "info.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads(tidal_here("shards", "info", manifest.folder, "--row-tokens", "48", "--json").stdout)
    assert report["rows"][0]["row_tokens"] == 48
    assert "--row-tokens 1" in tidal_error("shards", "info", manifest.folder, "--row-tokens", "1")
