"""The same numbers on a GPU as on a CPU. Skipped where there is no GPU."""

import pytest
import torch

from tests.builders import document_of, packed, small_model, small_tokenizer
from tidal_dist.generation.decoder import Decoder
from tidal_dist.generation.request import Limits

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SETTINGS = [
    {"encoding": "rope"},
    {"encoding": "alibi", "char_positions": "forward"},
    {"encoding": "none", "char_layers": 1},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_loss_and_gradients(settings: dict) -> None:
    tokenizer = small_tokenizer()
    documents = [document_of("the tide runs out 潮水 12 + 34 " * 3), document_of(" 46", prompt="12 + 34 =")]
    batch = packed([documents], tokenizer, (160, 320))
    found = {}
    for device in ("cpu", "cuda"):
        model = small_model(tokenizer, **settings).to(device)
        moved = batch.to(device)
        loss = model(moved.tokens, moved.chars, moved.labels)
        loss.backward()
        found[device] = [loss.item(), *(p.grad.norm().item() for p in model.parameters())]
    assert found["cuda"] == pytest.approx(found["cpu"], rel=1e-9)


@pytest.mark.parametrize("settings", SETTINGS)
def test_greedy_text(settings: dict) -> None:
    tokenizer = small_tokenizer()
    texts = {}
    for device in ("cpu", "cuda"):
        decoder = Decoder(small_model(tokenizer, **settings).to(device), tokenizer, device)
        texts[device] = [r.text for r in decoder.generate(["12 + 34 =", "", "潮"], limits=Limits(24))]
    assert texts["cuda"] == texts["cpu"]
