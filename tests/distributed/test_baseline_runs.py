"""Baselines in the real loop: ZeRO-3, two ranks, the same rows; what they know; what refuses them."""

from pathlib import Path

import pytest

from data_pipeline.pieces import blocks_of_piece
from data_pipeline.shard_reader import ShardReader
from data_pipeline.shards import Manifest
from experiments.evaluate import evaluate, open_trained
from experiments.samples import samples
from tests.launching import launched, prepare_sums, scalars, tidal_error
from tidal_dist.history.log import read_log

pytestmark = pytest.mark.slow

BASELINES = {
    "forward": ["model.char_order=forward"],
    "bytes": ["model.writes=bytes", "model.places=false", "model.char_positions=forward"],
    "tokens": ["model.writes=tokens", "model.places=false", "model.char_positions=forward"],
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_sums(tmp_path_factory.mktemp("sums"))


def held_out(run: Path) -> list[tuple[str, str]]:
    """The documents of the validation split, as texts."""
    manifest = Manifest.of(open_trained(run).config.data)
    found = []
    for entry in manifest.shards("validation"):
        reader = ShardReader(manifest.storage, entry)
        for i in range(entry["documents"]):
            piece = reader.document(i)[0]
            blocks, n = blocks_of_piece(piece), piece.supervised_from
            found.append(("".join(blocks[:n]), "".join(blocks[n:])))
    return found


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_is_trained_validated_and_measured(config: Path, name: str) -> None:
    run = config.parent / name
    launched(config, f"run_dir={run}", "validation.rows=1000", *BASELINES[name])
    found = scalars(run)
    losses = [value for _, value in sorted(found["train/loss"].items())]
    assert losses[-1] < losses[0]
    figures = evaluate(open_trained(run), {"held out": held_out(run)})["tests"]["held out"]
    assert figures["bits_per_byte"] == pytest.approx(found["validation/bits_per_byte"][6], rel=1e-5)
    assert figures["exact_match"] == pytest.approx(found["validation/exact_match"][6])
    for command in (["export", run, config.parent / "out"], ["doctor", run, "--data", config.parent / "shards"]):
        assert "a baseline (model." in tidal_error(*command)


def test_all_read_the_same_rows(config: Path) -> None:
    assert len({tuple(read_log(config.parent / name)) for name in BASELINES}) == 1


@pytest.mark.parametrize("name", ["bytes", "tokens"])
def test_a_plain_decoder_writes(config: Path, name: str) -> None:
    text = "the tide runs out and the tide comes in"
    (shown,) = samples(open_trained(config.parent / name), [("", text)])
    assert (shown["context"] + shown["reference"]).endswith(text)
    assert shown["text"]
