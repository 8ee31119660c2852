"""How much text a row holds: from the row plan of the shards where there is one, else by stated ratios."""

import json
from dataclasses import dataclass

from data_pipeline.errors import UserError
from data_pipeline.rows import has_row_plan, read_row_plan, row_format_of
from data_pipeline.shards import MANIFEST, Manifest
from data_pipeline.tokenizer import FIRST_TOKEN
from tidal_dist.config import Config

# Rows as docs/data.md recommends them: C filled to 97 %, T then to 80 %. The source of Python's standard library has
# 4.3 bytes a block, and each block takes one char slot more than it has bytes.
_CHAR_FILL, _TOKEN_FILL, _BYTES_PER_CHAR_SLOT = 0.97, 0.80, 0.81


@dataclass(frozen=True)
class RowContent:
    """What a row of the corpus holds on average, and how large the vocabulary is.

    Attributes:
        tokens, labels: filled token slots and supervised chars. text_bytes: bytes of text.
        vocab_size: chars and specials included. source: where the figures come from.
    """

    tokens: float
    labels: float
    text_bytes: float
    vocab_size: int
    source: str


def row_content(config: Config) -> RowContent:
    """The content of the rows that the configuration asks for.

    Raises:
        UserError: there are shards, and they cannot be read.
    """
    manifest = _manifest(config)
    data, row_format = config.data, row_format_of(config.data)
    if manifest is None or not has_row_plan(manifest, row_format):
        vocab_size = manifest.tokenizer().vocab_size if manifest else FIRST_TOKEN + _bpe_tokens(config)
        chars = data.row_chars * _CHAR_FILL
        return RowContent(
            data.row_tokens * _TOKEN_FILL,
            chars,
            chars * _BYTES_PER_CHAR_SLOT,
            vocab_size,
            f"assumed: {_CHAR_FILL:.0%} of the char slots and {_TOKEN_FILL:.0%} of the token slots filled, "
            f"{_BYTES_PER_CHAR_SLOT} bytes a char slot (no row plan of {data.row_tokens} x {data.row_chars} at "
            f"{data.shards})",
        )
    entries = read_row_plan(manifest, row_format)["train"]
    rows = max(sum(entry["rows"] for entry in entries), 1)
    tokens, chars = (sum(entry[key] for entry in entries) / rows for key in ("token_slots", "char_slots"))
    text = sum(entry["supervised_bytes"] for entry in manifest.shards("train")) / rows
    return RowContent(tokens, chars, text, manifest.tokenizer().vocab_size, f"the row plan of {manifest.where}")


def _manifest(config: Config) -> Manifest | None:
    """The shards' manifest, where the shards are at hand; a plan does not go and look on a network."""
    if "://" in config.data.shards:
        return None
    try:
        return Manifest.of(config.data)
    except UserError as error:
        if f"no {MANIFEST}" in str(error):
            return None
        raise


def _bpe_tokens(config: Config) -> int:
    """Entries of the BPE: those that it is trained to, or those of the file."""
    if config.tokenizer.path is None:
        return config.tokenizer.vocab_size
    try:
        with open(config.tokenizer.path, encoding="utf-8") as file:
            return len(json.load(file)["model"]["vocab"])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"tokenizer.path={config.tokenizer.path}: cannot read its vocabulary ({error})") from None
