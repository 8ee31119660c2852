import re
from pathlib import Path

import pytest

from data_pipeline.pieces import piece_of_blocks
from data_pipeline.segmentation import SegmentationConfig
from data_pipeline.tokenizer import TokenizerConfig, train_tokenizer
from tidal_dist.bench import layout as bench
from tidal_dist.config import Config, ModelConfig, load_config, parse_config
from tidal_dist.errors import CorpusError

TEXT = "The tide 来了, and 12 + 34 = 46 people see it. Twice a day, -22 or not, the sea goes out. "


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text(TEXT)
    return parse_config(
        {
            "run_dir": "unused",
            "corpus": {"sources": [{"path": str(path), "format": "text"}]},
            "tokenizer": {"vocab_size": 280},
            "data": {"shards": "unused", "row_tokens": 64, "row_chars": 64},
            "model": {"n_layers": 2, "width": 16, "n_heads": 2, "dropout": 0.5},
            "training": {"steps": 1, "batch_rows": 1, "learning_rate": 1e-3},
        },
        "test",
    )


@pytest.fixture(scope="module")
def result(config: Config) -> dict:
    return bench.bench_layout(config, blocks=24, repeats=2)


@pytest.mark.slow
def test_both_ways_compute_the_same_step(result: dict) -> None:
    ours, baseline = result["ours"], result["baseline"]
    assert ours["loss"] == pytest.approx(baseline["loss"], rel=1e-5)
    assert ours["gradient_norm"] == pytest.approx(baseline["gradient_norm"], rel=1e-4)
    assert ours["labels"] == baseline["labels"] == result["chars"] + 24


def test_the_result_has_the_documented_fields(result: dict, config: Config) -> None:
    assert result["name"] == "layout"
    assert result["blocks"] == 24
    assert result["parameters"] > 0
    assert result["config"] == config.model.model_dump()
    assert {"cpu", "cores", "threads", "torch", "python", "platform"} <= set(result["machine"])
    for way, name in (("ours", "one pass"), ("baseline", "per-prefix samples")):
        measured = result[way]
        assert measured["name"] == name
        assert len(measured["seconds_all"]) == measured["repeats"] == 2
        assert min(measured["seconds_all"]) <= measured["seconds"] <= max(measured["seconds_all"])
        assert measured["cpu_seconds"] > 0
        assert measured["peak_bytes"] >= 0


def test_the_ratio_is_the_baseline_over_ours(result: dict) -> None:
    assert result["ratio"] == result["baseline"]["seconds"] / result["ours"]["seconds"]


def test_the_table_names_both_ways_and_the_ratio(result: dict) -> None:
    table = bench.format_table(result)
    assert re.search(r"^one pass  ", table, re.M)
    assert re.search(r"^per-prefix samples  ", table, re.M)
    assert f"{result['ratio']:.1f} times faster" in table


def test_ways_that_disagree_are_not_compared(result: dict) -> None:
    wrong = result["baseline"] | {"loss": result["baseline"]["loss"] * 1.001}
    with pytest.raises(RuntimeError, match="disagree on loss"):
        bench._check_agreement(result["ours"], wrong)


def test_a_corpus_that_is_too_short_is_an_error(config: Config) -> None:
    with pytest.raises(CorpusError, match="use fewer blocks"):
        bench.bench_layout(config, blocks=10_000)


def test_the_baseline_has_one_sample_per_block_and_little_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_BATCH_SLOTS", 100)
    segmentation = SegmentationConfig()
    tokenizer = train_tokenizer([TEXT], TokenizerConfig(vocab_size=280), segmentation)
    piece = piece_of_blocks(["a", " tide", " 12", " ", "来了", "!"], tokenizer)
    model = ModelConfig(n_layers=1, width=16, n_heads=2)
    task = bench._Task("per-prefix samples", model, 32, tokenizer.byte_lengths, piece, seed=1)
    batches = task.batches(piece)
    assert sum(len(batch.labels) for batch in batches) == 6
    assert len(batches) > 1
    for batch in batches:
        slots = batch.tokens.ids.numel() + batch.chars.ids.numel()
        assert slots <= 100 or len(batch.labels) == 1
        assert (batch.tokens.document != 0).any(dim=0).all()
        assert (batch.chars.document != 0).any(dim=0).all()


def test_the_standard_library_config_is_complete() -> None:
    config = load_config(Path(__file__).parent.parent / "configs" / "stdlib.yaml")
    assert config.data.row_chars > config.segmentation.max_block_bytes
    assert config.training.batch_rows % config.data.lanes == 0
