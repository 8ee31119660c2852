"""`tidal bench train` and `attention` measure what they say. No assertion on how fast anything is."""

from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.layout import may_see
from data_pipeline.pieces import Piece, piece_of_text
from data_pipeline.tokenizer import BOS, EOS, OUTPUT_VOCABULARY, PAD
from tests.builders import small_tokenizer
from tests.launching import ROOT
from tidal_dist.bench import attention, machine, train
from tidal_dist.bench.attention import Attention, Shape, full_mask, swept_shapes, visible_pairs
from tidal_dist.bench.pictures import picture
from tidal_dist.bench.run import format_table
from tidal_dist.bench.steps import Conditions, Plain, Training, TwoStreams
from tidal_dist.bench.text import plain_ids, plain_rows
from tidal_dist.config import Config, ModelConfig, load_config, parse_config
from tidal_dist.errors import ConfigError, UserError
from tidal_dist.plots.canvas import to_png

TEXT = "The tide 来了, and 12 + 34 = 46 people see it. Twice a day, -22 or not, the sea goes out. "
TOKENIZER = small_tokenizer()
MODEL = ModelConfig(n_layers=2, width=16, n_heads=2)
SHAPE = (48, 128)


class Here(machine.OwnProcess):
    """What `OwnProcess` does, in this process: starting another takes seconds."""

    def __init__(self, make: Any, *arguments: Any):
        self._made_here = make(*arguments)

    def wait(self) -> None:
        """It is made."""

    def __call__(self, method: str, *arguments: Any) -> Any:
        return getattr(self._made_here, method)(*arguments)

    def __exit__(self, *_: object) -> None:
        """There is no process."""


@pytest.fixture(scope="module")
def here() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        for module in (machine, train):
            patch.setattr(module, "OwnProcess", Here)
        patch.setattr(machine, "measured_tflops", lambda *_: 0.1)
        patch.setattr(machine, "_COPY_BYTES", {"cpu": 2**16})
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text(TEXT * 20)
    return parse_config(
        {
            "run_dir": "unused",
            "corpus": {"sources": [{"path": str(path), "format": "text"}]},
            "tokenizer": {"vocab_size": 280},
            "data": {"shards": "unused", "row_tokens": SHAPE[0], "row_chars": SHAPE[1]},
            "model": {"n_layers": 4, "width": 16, "n_heads": 2},
            "training": {"steps": 1, "batch_rows": 1, "learning_rate": 1e-3},
        },
        "test",
    )


def pieces() -> list[list[Piece]]:
    return [[piece_of_text("", text, TOKENIZER)] for text in ("the tide 来了 46", "12 + 34 = 46")]


def test_plain_ids_are_the_text_in_reading_order() -> None:
    (piece,), _ = pieces()
    as_bytes, as_tokens = plain_ids(piece, "bytes"), plain_ids(piece, "tokens")
    for ids in (as_bytes, as_tokens):
        assert (ids[0], ids[-1]) == (BOS, EOS)
        assert TOKENIZER.decode(ids.tolist()) == "the tide 来了 46"
    assert as_bytes.max() < OUTPUT_VOCABULARY < as_tokens.max()


def test_plain_rows_are_padded_or_cut() -> None:
    rows = plain_rows(pieces(), "bytes")
    assert rows.shape == (2, 2 + len("the tide 来了 46".encode()))
    assert rows[1].tolist() == [BOS, *b"12 + 34 = 46", EOS, *[PAD] * (rows.shape[1] - 14)]
    cut = plain_rows(pieces(), "bytes", width=10)
    assert cut.tolist()[0] == [BOS, *b"the tide "]
    assert cut.shape == (2, 10)
    repeated = plain_rows(pieces(), "bytes", width=40)
    text = rows[0].tolist() + rows[1].tolist()[:14]
    assert repeated.flatten().tolist() == (text * 3)[:80]


def test_figures_of_both_kinds_agree_on_the_text() -> None:
    ours = TwoStreams(MODEL, pieces(), SHAPE, TOKENIZER.byte_lengths, 8).figures()
    tokens = Plain(MODEL, pieces(), "tokens", TOKENIZER.vocab_size, TOKENIZER.byte_lengths).figures()
    plain = Plain(MODEL, pieces(), "bytes", OUTPUT_VOCABULARY, TOKENIZER.byte_lengths).figures()
    size = len("the tide 来了 4612 + 34 = 46".encode())
    assert ours["bytes"] == tokens["bytes"] == plain["bytes"] == size
    assert plain["labels"] == size + 2
    assert ours["positions"] == 2 * sum(SHAPE)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["two streams", "plain"])
def test_a_step_trains(kind: str, dtype: str) -> None:
    lengths = TOKENIZER.byte_lengths
    way = (
        TwoStreams(MODEL, pieces(), SHAPE, lengths, 8)
        if kind == "two streams"
        else Plain(MODEL, pieces(), "tokens", TOKENIZER.vocab_size, lengths)
    )
    training = Training(way, Conditions(dtype=dtype, recompute_every_layers=1))
    moved = training._optimizer._moved[-1]
    assert moved.dtype == torch.float32
    before = moved.clone()
    assert min(training.run()) >= 0
    assert not torch.equal(moved, before)
    assert torch.equal(moved.to(training._optimizer._weights[-1].dtype), training._optimizer._weights[-1])
    assert training.report()["parameters"] == sum(p.numel() for p in training._model.parameters())


def test_turns_are_taken_round_by_round(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Way:
        def __init__(self, name: str):
            self.name = name

        def run(self) -> int:
            calls.append(self.name)
            return len(calls)

        def report(self) -> str:
            return self.name.upper()

    monkeypatch.setattr(machine, "OwnProcess", Here)
    made = {"a": (Way, "a"), "b": (Way, "b")}
    assert machine.in_turns(made, 2, together=True) == ({"a": [1, 3], "b": [2, 4]}, {"a": "A", "b": "B"})
    calls.clear()
    machine.in_turns(made, 2, together=False)
    assert calls == ["a", "a", "b", "b"]


def test_a_busy_machine_is_told_from_a_quiet_one() -> None:
    quiet, busy = {"load": 0.2, "cores": 2}, {"load": 1.2, "cores": 2}
    even, uneven = machine.spread([1.0, 1.1, 1.05]), machine.spread([1.0, 1.1, 2.0])
    assert (even["median"], even["min"], even["max"], even["repeats"]) == (1.05, 1.0, 1.1, 3)
    assert machine.busy_warning(quiet, [even]) is None
    assert "the slowest repeat took 1.82 times" in str(machine.busy_warning(quiet, [even, uneven]))
    assert "load 1.2 on 2 cores" in str(machine.busy_warning(busy, [even]))


@pytest.mark.parametrize("documents", [1, 3])
def test_visible_pairs_are_those_of_the_predicate(documents: int) -> None:
    batch = Shape(24, 70, longest_run=9, documents=documents).batch()
    assert batch.tokens.ids.shape, batch.chars.ids.shape == ((1, 24), (1, 70))
    assert batch.chars.document.max() == documents
    mask = full_mask(batch, "block")
    assert visible_pairs(batch, "block") == int(mask.sum())
    assert not mask[0, 0, :24, 24:].any()
    query, key = batch.chars.at((0, slice(60, 61))), batch.chars.at((0, slice(55, 60)))
    assert mask[0, 0, 84, 79:84].tolist() == may_see(query.queries(), key.keys(), "block")[0].tolist()


@pytest.mark.parametrize("chars", [23, 24 * 9 + 1])
def test_chars_that_make_no_such_blocks_are_refused(chars: int) -> None:
    with pytest.raises(UserError, match="give 24 to 216 chars"):
        Shape(24, chars, longest_run=9).batch()


def test_all_ways_but_causal_attend_alike() -> None:
    shape = Shape(24, 70, longest_run=9, documents=2)
    torch.manual_seed(0)
    qkv = torch.randn(3, 1, 2, shape.slots, 8).unbind()
    ours, dense = (
        Attention(way, [shape], MODEL, "cpu", "fp32")._forward(way, shape, MODEL, torch.float32)(*qkv)
        for way in ("two streams", "dense")
    )
    torch.testing.assert_close(ours, dense)


@pytest.fixture(scope="module")
def attended(here: None) -> dict[str, Any]:
    del here
    swept, others = [Shape(24, chars, 9) for chars in (48, 96, 192)], [Shape(16, 48, 9, 2)]
    return attention.bench_attention(MODEL, swept, others, rounds=2, most_dense=150)


def test_attention_has_its_figures(attended: dict[str, Any]) -> None:
    shapes = attended["shapes"]
    assert [s["chars"] for s in shapes] == [48, 96, 192, 48]
    assert ["dense" in s["ways"] for s in shapes] == [True, True, False, True]
    first, ours = shapes[0], shapes[0]["ways"]["two streams"]
    assert ours["tflops"] == pytest.approx(12 * 16 * first["visible_pairs"] / ours["seconds"]["median"] / 1e12)
    assert ours["utilisation"] == pytest.approx(ours["tflops"] / 0.1)
    assert first["faster"] == first["ways"]["dense"]["seconds"]["median"] / ours["seconds"]["median"]
    assert all(s["visible_share"] <= s["computed_share"] <= 1 for s in shapes)
    least = [s["ways"]["two streams"]["seconds"]["min"] for s in shapes[:3]]
    assert attended["growth"] == pytest.approx(np.log(least[2] / least[0]) / np.log(4))
    assert "the time grows with C" in format_table(attended)
    assert to_png(picture(attended)).startswith(b"\x89PNG")


def test_swept_rows_stop_where_blocks_are_full() -> None:
    config = load_config(ROOT / "configs" / "stdlib.yaml", ["segmentation.max_block_bytes=8"])
    assert [s.chars for s in swept_shapes(config)] == [1024, 2048, 4096]


@pytest.fixture(scope="module")
def trained(here: None, config: Config, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    del here
    trace = tmp_path_factory.mktemp("trace") / "trace.json"
    result = train.bench_train(config, rows=2, rounds=2, megabytes=1, profile=trace)
    assert "traceEvents" in trace.read_text()
    return result


@pytest.mark.slow
def test_train_has_its_figures(trained: dict[str, Any]) -> None:
    ways = trained["ways"]
    assert [name for name in ways if name.startswith("two")] == [f"two streams, {m} char layers" for m in (4, 2, 1)]
    ours, same, plain, tokens = (
        ways[name] for name in ("two streams, 4 char layers", train.SAME_POSITIONS, train.BYTES, train.TOKENS)
    )
    assert ours["positions"] == same["positions"] == 2 * sum(SHAPE)
    assert ours["bytes"] == plain["bytes"] == tokens["bytes"]
    for way in (plain, tokens):
        assert way["parameters"] == pytest.approx(ours["parameters"], rel=0.1)
    assert ours["utilisation"] == pytest.approx(ours["flops"] / ours["seconds"]["median"] / 1e12 / 0.1)
    rounds = zip(ours["seconds"]["all"], same["seconds"]["all"], strict=True)
    assert trained["to_plain"]["all"] == [a / b for a, b in rounds]
    assert [d["char_layers"] for d in trained["depths"]] == [4, 2, 1]
    assert trained["depths"][0]["flops_per_byte"] > trained["depths"][1]["flops_per_byte"]
    assert 0 <= trained["data_wait_share"] < 1
    assert sum(entry["share"] for entry in trained["profile"]) <= 1
    assert "times a plain decoder with as many positions" in format_table(trained)
    assert to_png(picture(trained)).startswith(b"\x89PNG")


def test_a_vocabulary_that_leaves_nothing_for_layers_is_an_error(config: Config) -> None:
    one_head = config.model.model_copy(update={"n_heads": 1})
    large = TwoStreams(one_head, pieces(), SHAPE, np.ones(100_000, np.int64), 8)
    small = TwoStreams(config.model, pieces(), SHAPE, TOKENIZER.byte_lengths, 8)
    assert set(train._plain_ways(small)) == {train.SAME_POSITIONS, train.BYTES, train.TOKENS}
    with pytest.raises(ConfigError, match="use a smaller vocabulary"):
        train._plain_ways(large)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["layout", "--profile", "trace.json"], "--profile goes with `tidal bench train`"),
        (["data", "--rows", "2"], "--rows goes with `tidal bench train`"),
        (["layout", "--device", "cpu"], "--device goes with `tidal bench train or attention or generate`"),
        (["train", "--rows", "0"], "--rows 0: must be at least 1"),
        (["train", "--profile", "nowhere/trace.json"], "--profile nowhere/trace.json: nowhere is no folder"),
        (["all", "--plots", "nowhere"], "--plots nowhere: nowhere is no folder"),
        (["attention", "--device", "cuda:77"], "--device cuda:77: not available"),
        (["train", "--config", "nowhere.yaml"], "nowhere.yaml: no such configuration file"),
    ],
)
def test_a_mistake_gets_one_line(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    from tidal_dist.cli import main

    assert main(["bench", *arguments]) == 2
    message = capsys.readouterr().err
    assert expected in message
    assert message.count("\n") == 1
