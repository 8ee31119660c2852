"""The same text from recorded passes on a GPU as on a CPU. Skipped where there is no GPU."""

import pytest
import torch

from tests.builders import small_model, small_tokenizer
from tidal_dist.generation.draft import ByModel, LookUp
from tidal_dist.generation.engine import Engine
from tidal_dist.generation.passes import Graphs
from tidal_dist.generation.request import Limits, Request, requests_of
from tidal_dist.generation.sampling import Sampling

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

PROMPTS = ["12 + 34 =", "", "潮", "the tide " * 30, "un café déjà vu"] * 3


@pytest.mark.parametrize("draft", [None, LookUp()])
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("settings", [{"encoding": "rope"}, {"encoding": "alibi", "char_layers": 1}])
def test_recorded_passes_write_what_a_cpu_writes(settings: dict, batch_size: int, draft: LookUp | None) -> None:
    tokenizer = small_tokenizer()
    texts = {}
    for device in ("cpu", "cuda"):
        engine = Engine(small_model(tokenizer, **settings).to(device), tokenizer, device, batch_size, draft)
        assert isinstance(engine._run, Graphs) == (device == "cuda")
        requests = requests_of(PROMPTS, Request("", Sampling(temperature=0.7), Limits(40)))
        texts[device] = [g.text for g in engine.run(requests)]
    assert texts["cuda"] == texts["cpu"]


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("settings", [{"draft_layers": 2}, {"encoding": "alibi", "char_layers": 2, "draft_layers": 1}])
def test_recorded_drafts_write_what_a_cpu_writes(settings: dict, batch_size: int) -> None:
    tokenizer, texts = small_tokenizer(), []
    for device, draft in (("cpu", None), ("cuda", ByModel())):
        engine = Engine(small_model(tokenizer, **settings).to(device), tokenizer, device, batch_size, draft)
        generations = list(engine.run(requests_of(PROMPTS, Request("", Sampling(temperature=0.7), Limits(40)))))
        texts.append([g.text for g in generations])
    assert texts[1] == texts[0]
    assert sum(g.draft_passes for g in generations) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recorded_passes_answer_like_passes_as_they_come(dtype: torch.dtype) -> None:
    tokenizer = small_tokenizer()
    logprobs = {}
    for records_passes in (True, False):
        model = small_model(tokenizer, dtype=dtype).cuda()
        engine = Engine(model, tokenizer, "cuda", 4, records_passes=records_passes)
        generations = list(engine.run(requests_of(PROMPTS, Request("", limits=Limits(24)))))
        logprobs[records_passes] = [(g.text, g.logprob) for g in generations]
    for (text, logprob), (other_text, other_logprob) in zip(*logprobs.values(), strict=True):
        assert text == other_text
        assert logprob == pytest.approx(other_logprob, rel=0.02 if dtype == torch.bfloat16 else 1e-4)
