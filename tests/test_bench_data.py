import pytest

from tests.launching import ROOT
from tidal_dist.bench import data
from tidal_dist.bench.text import write_corpus
from tidal_dist.config import load_config


@pytest.mark.slow
def test_every_figure_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_SHARDS", 2000)
    monkeypatch.setattr(data, "in_own_process", lambda function, *arguments: function(*arguments))  # saves seconds
    monkeypatch.setattr(data, "_BASELINE_BYTES", 1_000_000)
    config = load_config(
        ROOT / "configs" / "stdlib.yaml",
        [
            "corpus.sources=[{path: '{stdlib}/*.py', format: text}]",
            "corpus.on_bad_record=quarantine",
            "tokenizer.sample_bytes=1000000",
        ],
    )
    result = data.bench_data(config, megabytes=3, workers=2, stream_seconds=0.2)
    assert 3e6 <= result["text_bytes"] < 4e6
    one, two = result["prepare"]["1"], result["prepare"]["2"]
    assert result["ratio"] == one["cpu_mb_per_second"] / result["baseline"]["cpu_mb_per_second"]
    assert result["speedup"] == one["seconds"] / two["seconds"]
    assert one["mb_per_second"] == pytest.approx(result["text_bytes"] / one["seconds"] / 1e6)
    assert 50e6 < one["peak_bytes"] < 1e9
    assert 1.5 < result["bytes_on_disk_per_byte_of_text"] < 2.6
    assert result["stream"]["steps"] > 0
    assert result["stream"]["mb_per_second"] > 0
    assert result["order"]["ranks"] == 4096
    assert result["rows"]["char_fill"] >= 0.97
    table = data.format_table(result)
    assert f"{result['ratio']:.1f} times encode_batch" in table
    assert "prepare, 2 processes" in table


def test_copies_differ_and_are_text(tmp_path) -> None:
    """Each copy has words that no other has, so that blocks never stop being new."""
    texts = ["several different identifiers together with something", "another document altogether"]
    size = write_corpus(texts, tmp_path, 500)
    files = sorted(tmp_path.iterdir())
    assert size >= 500
    assert len(files) >= 5
    contents = [path.read_text() for path in files]
    assert contents[0].splitlines()[0] == '{"text": "several different identifiers together with something"}'
    assert all(len(set(contents[i].split()) - set(contents[i - 1].split())) >= 3 for i in range(1, len(files) - 1))
