"""The command line as users call it: texts, JSON on standard output alone, one line for a mistake."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launching import prepare_sums, tidal, tidal_error, tidal_here


def generate(small_export: Path, *arguments: str, stdin: bytes = b"") -> list[dict]:
    result = tidal_here("generate", small_export, "--json", "--max-bytes", "12", *arguments, stdin=stdin)
    assert result.returncode == 0, result.stderr.decode()
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_help_imports_nothing_heavy() -> None:
    heavy = ("torch", "numpy", "pydantic", "deepspeed")
    code = f"import sys, tidal_dist.cli; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout.strip() == b"[]"


@pytest.mark.slow
def test_prompts_of_every_kind(small_export: Path) -> None:
    prompts = ["12 + 34 =", "", "never seen: Ωmega 潮 👍🏽", "ends in a wor"]
    arguments = [
        "generate",
        str(small_export),
        "--json",
        "--max-bytes",
        "12",
        *(a for p in prompts for a in ("--prompt", p)),
    ]
    found = [json.loads(line) for line in tidal(*arguments).stdout.splitlines()]
    assert [r["prompt"] for r in found] == prompts
    for record in found:
        assert isinstance(record["text"], str)
        assert "".join(record["blocks"]) == record["text"]
        assert record["finish"] in ("eos", "length")
        assert len(record["text"].encode()) <= 12


def test_prompts_from_files_and_standard_input(small_export: Path, tmp_path: Path) -> None:
    lines, records = tmp_path / "lines.txt", tmp_path / "prompts.jsonl"
    lines.write_text("12 + 34 =\n\n潮\n")
    records.write_text('{"prompt": "12 + 34 ="}\n{"prompt": ""}\n\n{"prompt": "潮", "id": 3}\n')
    expected = generate(small_export, "--prompt", "12 + 34 =", "--prompt", "", "--prompt", "潮")
    assert generate(small_export, "--input", str(lines)) == expected
    assert generate(small_export, "--input", str(records)) == expected
    assert generate(small_export, "--input", "-", stdin=lines.read_bytes()) == expected
    assert generate(small_export, stdin=records.read_bytes()) == expected


def test_sampling_is_reproducible_whatever_the_batch(small_export: Path) -> None:
    sampled = ["--temperature", "1.5", "--top-k", "40", "--top-p", "0.95", "--seed", "7"]
    stdin = b"a\nb\nc\nd\n"
    found = generate(small_export, *sampled, stdin=stdin)
    assert generate(small_export, *sampled, "--batch-size", "1", stdin=stdin) == found
    assert generate(small_export, *sampled[:-1], "8", stdin=stdin) != found


def test_trace_shows_each_block(small_export: Path) -> None:
    record = generate(small_export, "--trace", "--prompt", "12 + 34 =")[0]
    assert [entry["block"] for entry in record["trace"]] == record["blocks"]
    entry = record["trace"][0]
    assert len(entry["chars"]) == len(entry["block"].encode())
    assert entry["char_positions"] == [entry["token_positions"][0] - c for c in range(len(entry["chars"]) + 1)]
    text = tidal_here("generate", small_export, "--trace", "--max-bytes", "12", "--prompt", "12 + 34 =").stdout.decode()
    assert "<bob>" in text
    assert text.splitlines()[-1] == "12 + 34 =" + record["text"]


def test_inspect_and_plot(small_export: Path, tmp_path: Path) -> None:
    picture = tmp_path / "layout.png"
    result = tidal_here("inspect", small_export, "--prompt", "12 + 34 =", "--text", " 46", "--plot", picture, "--json")
    report = json.loads(result.stdout)
    assert report["chars"]["name"] == ["<bob>", "6", "4", " "]
    assert report["chars"]["label"] == ["6", "4", " ", "<eos>"]
    assert report["chars"]["place"] == [1, 2, 3, 4]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "<bob>" in tidal_here("inspect", small_export, "--text", "a b").stdout.decode()


def test_verify(small_export: Path) -> None:
    assert json.loads(tidal_here("verify", small_export, "--json").stdout)["probe_loss"] > 0


def test_prepare_plans_and_refuses_to_overwrite(tmp_path: Path) -> None:
    config = prepare_sums(tmp_path)
    assert "already there" in tidal_error("prepare", config)
    result = tidal_here("plan-rows", config, "data.row_tokens=64", "data.row_chars=64", "--json")
    assert json.loads(result.stdout)["rows"]["train"] > 0
    assert "which does not fit in data.row_chars=4" in tidal_error("plan-rows", config, "data.row_chars=4")
    (tmp_path / "corpus.jsonl").write_text('{"prompt": "1 + 1 =", "answer": " 2"}\n{"prompt": "1 + 1 ="}\n')
    message = tidal_error("prepare", config, "--overwrite")
    assert f"{tmp_path}/corpus.jsonl:2: needs the fields" in message
    assert (tmp_path / "shards" / "manifest.json").exists()
    # What is finished, the tokeniser here, is kept for the next start.
    assert sorted(p.name for p in tmp_path.iterdir()) == [".shards.partial", "config.yaml", "corpus.jsonl", "shards"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["prepare", "nowhere.yaml"], "nowhere.yaml: no such configuration file"),
        (["prepare", "configs/demo.yaml", "trainig.steps=1"], "unknown key trainig; did you mean training?"),
        (["prepare", "configs/demo.yaml", "model.width=wide"], "model.width='wide': "),
        (["export", "nowhere", "OUT"], "nowhere: neither a checkpoint nor a run"),
        (["generate", "nowhere", "--prompt", "a"], "nowhere: no config.json, so no exported model"),
        (["generate", "EXPORT", "--prompt", "a", "--temperature", "-1"], "--temperature -1: must be at least 0"),
        (["generate", "EXPORT", "--prompt", "a", "--top-p", "0"], "--top-p 0: must be between"),
        (["generate", "EXPORT", "--prompt", "a", "--max-bytes", "0"], "--max-bytes 0: must be at least 1"),
        (["generate", "EXPORT", "--prompt", "a", "--device", "cuda:77"], "--device cuda:77: not available"),
        (["generate", "EXPORT", "--prompt", "\udcff"], "--prompt: the prompt is not UTF-8"),
        (["generate", "EXPORT", "--input", "nowhere.txt"], "nowhere.txt: cannot read"),
        (["inspect", "EXPORT", "--text", ""], "--text is empty"),
        (["verify", "nowhere"], "nowhere: no config.json"),
        (["bench", "layout", "--blocks", "0"], "--blocks 0: must be at least 2"),
    ],
)
def test_a_mistake_gets_one_line(small_export: Path, tmp_path: Path, arguments: list[str], expected: str) -> None:
    places = {"EXPORT": str(small_export), "OUT": str(tmp_path / "out")}
    assert expected in tidal_error(*(places.get(a, a) for a in arguments))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("stdin", "expected"),
    [
        (b"caf\xe9\n", "standard input: not UTF-8 at byte 3"),
        (b'{"prompt": "a"}\n{"text": "b"}\n', 'standard input:2: needs a JSON object with a string "prompt"'),
        (b'{"prompt": "a"}\n{"prompt": "\\ud800"}\n', "standard input:2: the prompt is not UTF-8"),
    ],
)
def test_a_mistake_in_standard_input(small_export: Path, stdin: bytes, expected: str) -> None:
    assert expected in tidal_error("generate", small_export, stdin=stdin)


@pytest.mark.slow
def test_an_interrupted_reader_is_no_error(small_export: Path) -> None:
    command = [sys.executable, "-m", "tidal_dist.cli", "generate", str(small_export)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=Path(__file__).parent.parent
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    process.stdin.write(b"a\n" * 200)
    process.stdin.close()
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert process.poll() == 141
    assert b"Traceback" not in process.stderr.read()


def test_overrides_may_stand_behind_options(tmp_path: Path) -> None:
    """argparse alone takes them only where they follow the configuration."""
    for order in (["--overwrite", "data.shards=/x"], ["data.shards=/x", "--overwrite"]):
        message = tidal_error("prepare", tmp_path / "no.yaml", *order)
        assert "no such configuration file" in message
    for wrong in (["--overwrite", "data.shards"], ["--shards=3"]):
        with pytest.raises(SystemExit) as caught:
            tidal_here("prepare", tmp_path / "no.yaml", *wrong)
        assert caught.value.code == 2
    with pytest.raises(SystemExit):
        tidal_here("audit", "a", "b", "data.shards=/x")
