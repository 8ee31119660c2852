"""Shards of two sources, and the configuration of a tiny run on them."""

from collections.abc import Iterator
from pathlib import Path

import yaml

from data_pipeline.arithmetic import training_problems
from data_pipeline.corpus import Document
from data_pipeline.rows import row_format_of, write_row_plan
from data_pipeline.shards import Manifest, ShardWriter, write_manifest
from data_pipeline.tokenizer import MixedTokenizer
from tests.builders import small_tokenizer
from tidal_dist.config import Config, load_config

SUMS, TIDES = "sums", "tides"
TIDE_BLOCKS = 14


def sums(count: int, seed: int = 1) -> Iterator[Document]:
    """Sums, line by line of a file."""
    for line, (prompt, answer) in enumerate(training_problems(count, seed=seed), 1):
        yield Document(answer, prompt, ("corpus/sums.jsonl", line))


def tides(count: int) -> Iterator[Document]:
    """Texts, each a file of its own; every fifth is longer than a row."""
    for number in range(count):
        text = f"{number} the tide runs out 潮水 and the tide comes in"
        yield Document(text * (4 if number % 5 == 0 else 1), "", (f"corpus/tides/{number:03d}.txt", 0))


def write_shards(folder: Path, seed: int = 1) -> Manifest:
    """Shards of both sources, four or more of each, in `folder`."""
    tokenizer: MixedTokenizer = small_tokenizer()
    folder.mkdir(parents=True)
    tokenizer.save(folder / "tokenizer.json")
    entries: dict[str, list[dict]] = {"train": [], "validation": []}
    for split, n_sums, n_tides in (("train", 700, 40), ("validation", 20, 2)):
        for name, documents in ((SUMS, sums(n_sums, seed)), (TIDES, tides(n_tides))):
            writer = ShardWriter(folder, split, tokenizer, 1000, prefix=name, source=name)
            for document in documents:
                writer.write(document)
            entries[split] += writer.close()
    write_manifest(folder, tokenizer, entries, {}, {})
    return Manifest.load(folder)


def write_mixed_config(folder: Path, **sections: dict) -> Path:
    """A configuration of a tiny run on `folder/shards`, with `folder` for everything; `sections` go over it."""
    content: dict = {
        "run_dir": str(folder / "run"),
        "corpus": {"sources": [{"path": "corpus/sums.jsonl", "format": "jsonl"}]},
        "segmentation": {"max_block_bytes": 8},
        "data": {"shards": str(folder / "shards"), "row_tokens": 48, "row_chars": 64, "lanes": 4, "workers": 0},
        "model": {"n_layers": 1, "width": 16, "n_heads": 2},
        "training": {
            "steps": 12,
            "batch_rows": 8,
            "learning_rate": 3e-3,
            "warmup_steps": 2,
            "log_every_steps": 3,
            "save_every_steps": 4,
            "activation_checkpointing": False,
        },
        "validation": {"every_steps": 100, "rows": 4, "prompts": 2, "max_bytes": 8},
    }
    for section, values in sections.items():
        content[section] = content.get(section, {}) | values
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def prepare_mixed(folder: Path, **sections: dict) -> tuple[Path, Config]:
    """Shards with their row plan, and the configuration: its file, and itself."""
    manifest = write_shards(folder / "shards")
    path = write_mixed_config(folder, **sections)
    config = load_config(path)
    write_row_plan(manifest, row_format_of(config.data))
    return path, config
