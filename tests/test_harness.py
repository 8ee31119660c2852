"""lm-evaluation-harness asks the model: likelihoods, documents, texts; offline, with tasks made of local files."""

import json
import math
import os
import re
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")
import lm_eval.__main__ as harness_command
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

import tidal_dist
from tidal_dist.errors import UserError
from tidal_dist.evaluation.__main__ import main
from tidal_dist.evaluation.harness import TidalLM
from tidal_dist.loaded import Tidal

PROBLEMS = [
    {"question": "12 + 34 =", "answer": " 46", "choices": [" 46", " 47", " 5"], "right": 0},
    {"question": "7 + 8 =", "answer": " 15", "choices": [" 14", " 15", " 6"], "right": 1},
    {"question": "the tide", "answer": " comes in", "choices": [" comes in", " 15", " goes out"], "right": 0},
]
TASKS = {
    "tide_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{right}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    },
    "tide_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}{{answer}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "tide_answer": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "generation_kwargs": {"until": [";", "\n"], "max_gen_toks": 8},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def tidal(small_export: Path) -> Tidal:
    return tidal_dist.load(small_export, "cpu")


@pytest.fixture(scope="module")
def lm(tidal: Tidal) -> TidalLM:
    return TidalLM(tidal, batch_size=2)


def asked(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]  # type: ignore[arg-type]


class TestLikelihood:
    def test_is_the_score_of_each_pair_in_their_order(self, tidal: Tidal, lm: TidalLM):
        pairs = [(p["question"], choice) for p in PROBLEMS for choice in p["choices"]]
        found = lm.loglikelihood(asked("loglikelihood", *pairs))
        expected = [tidal.score(*pair) for pair in pairs]
        assert [nats for nats, _ in found] == pytest.approx([s.logprob for s in expected], rel=1e-5)
        assert [greedy for _, greedy in found] == [s.is_greedy for s in expected]

    def test_white_space_at_the_contexts_end_goes_to_the_continuation(self, tidal: Tidal, lm: TidalLM):
        ((found, _),) = lm.loglikelihood(asked("loglikelihood", ("12 + 34 = ", "46")))
        assert found == pytest.approx(tidal.score("12 + 34 =", " 46").logprob, rel=1e-5)

    def test_ends_and_window_are_those_asked_for(self, tidal: Tidal):
        text = " the tide runs out" * 6
        narrow = TidalLM(tidal, ends=True, window_tokens=24, window_chars=40)
        ((found, _),) = narrow.loglikelihood(asked("loglikelihood", ("12", text)))
        assert found != pytest.approx(tidal.score("12", text, ends=True).logprob, rel=1e-5)
        wide = TidalLM(tidal, ends=True)
        ((found, _),) = wide.loglikelihood(asked("loglikelihood", ("12", text)))
        assert found == pytest.approx(tidal.score("12", text, ends=True).logprob, rel=1e-5)

    def test_of_a_document_ends_with_it(self, tidal: Tidal, lm: TidalLM):
        texts = ["the tide runs out", "潮水退去 👍🏽", ""]
        found = lm.loglikelihood_rolling(asked("loglikelihood_rolling", *((text,) for text in texts)))
        expected = [tidal.score("", text, ends=True).logprob for text in texts]
        assert found == pytest.approx(expected, rel=1e-5)
        assert found[2] == 0.0


class TestGenerating:
    def test_texts_are_those_of_the_model_up_to_a_stop_string(self, tidal: Tidal, lm: TidalLM):
        wanted = [(p["question"], {"until": ["t", ""], "max_gen_toks": 5}) for p in PROBLEMS]
        found = lm.generate_until(asked("generate_until", *wanted))
        assert found == [tidal.generate(q, stop=["t"], max_bytes=20).text for q, _ in wanted]

    def test_sampling_arguments_are_taken_and_each_request_draws_anew(self, tidal: Tidal, lm: TidalLM):
        kwargs = {"until": [], "max_gen_toks": 5, "do_sample": True, "temperature": 1.5, "top_p": 0.9, "seed": 3}
        found = lm.generate_until(asked("generate_until", ("12", kwargs), ("12", kwargs)))
        alone = [tidal.generate("12", temperature=1.5, top_p=0.9, seed=seed, max_bytes=20).text for seed in (3, 4)]
        assert found == alone
        assert found[0] != found[1]

    def test_an_unknown_argument_is_named(self, lm: TidalLM, caplog: pytest.LogCaptureFixture):
        lm.generate_until(asked("generate_until", ("12", {"until": [], "max_gen_toks": 2, "num_beams": 4})))
        assert "num_beams" in caplog.text


class TestOpening:
    def test_the_registry_and_the_entry_point_lead_to_the_model(self):
        project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
        module, _, name = project["entry-points"]["lm_eval.models"]["tidal"].partition(":")
        assert getattr(import_module(module), name) is TidalLM is get_model("tidal")

    def test_model_args_win_over_what_the_command_line_says_besides(self, small_export: Path):
        besides = {"batch_size": 1, "device": "cuda:99", "max_batch_size": None}
        lm = TidalLM.create_from_arg_string(f"pretrained={small_export},device=cpu,batch_size=3", besides)
        assert (str(lm.device), lm.batch_size) == ("cpu", 3)
        assert lm.tokenizer_name.startswith("tidal-")
        assert lm.get_model_info()["model_step"] == 1

    @pytest.mark.parametrize(
        ("arguments", "reason"),
        [
            ({"devise": "cpu"}, "no devise; there are pretrained, device"),
            ({"pretrained": ""}, "pretrained=EXPORT"),
            ({"pretrained": "nowhere"}, "no config.json"),
            ({"batch_size": "many"}, "batch_size many"),
            ({"window_chars": 8}, "needs 2 and 9"),
        ],
    )
    def test_what_is_wrong_is_said_in_a_line(self, small_export: Path, arguments: dict[str, Any], reason: str):
        with pytest.raises(UserError, match=re.escape(reason)):
            TidalLM.create_from_arg_obj({"pretrained": str(small_export), "device": "cpu", **arguments})

    def test_the_command_ends_with_that_line(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
        monkeypatch.setattr(harness_command, "cli_evaluate", lambda: TidalLM("nowhere", "cpu"))
        assert main() == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith("error: nowhere: no config.json")


@pytest.mark.slow
def test_the_harness_runs_tasks_of_local_files(tidal: Tidal, small_export: Path, tmp_path: Path):
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(problem) for problem in PROBLEMS))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}}}
    for name, task in TASKS.items():
        # JSON is YAML.
        (tmp_path / f"{name}.yaml").write_text(json.dumps({"task": name, "test_split": "test", **data, **task}))
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    command = [sys.executable, "-m", "tidal_dist.evaluation", "--model", "tidal", "--tasks", ",".join(TASKS)]
    options = ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "out.json"), "--batch_size", "8"]
    model = ["--model_args", f"pretrained={small_export},device=cpu"]
    done = subprocess.run([*command, *options, *model], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(next(tmp_path.glob("out*.json")).read_text())["results"]
    scored = [[tidal.score(p["question"], c).logprob for c in p["choices"]] for p in PROBLEMS]
    right = [max(range(3), key=nats.__getitem__) == p["right"] for nats, p in zip(scored, PROBLEMS, strict=True)]
    assert results["tide_choice"]["acc,none"] == pytest.approx(sum(right) / len(right))
    texts = [p["question"] + p["answer"] for p in PROBLEMS]
    nats = -sum(tidal.score("", text, ends=True).logprob for text in texts)
    bits = nats / (math.log(2) * sum(len(text.encode()) for text in texts))
    assert results["tide_text"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-4)
    written = [tidal.generate(p["question"], stop=[";", "\n"], max_bytes=32).text for p in PROBLEMS]
    matches = [text == p["answer"] for text, p in zip(written, PROBLEMS, strict=True)]
    assert results["tide_answer"]["exact_match,none"] == pytest.approx(sum(matches) / len(matches))
