"""Gradients before the optimizer step, and a step that is discarded, under every stage of ZeRO: two real ranks."""

import json
from typing import Any

import pytest

from tests.launching import launch, prepare_sums
from tests.stages import CASES

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    config = prepare_sums(tmp_path_factory.mktemp("sums"), 3000)
    process = launch(config, script="tests/stages.py", timeout=280)
    assert process.returncode == 0, process.stdout[-3000:]
    return json.loads((config.parent / "run" / "found.json").read_bytes())


@pytest.mark.parametrize("case", CASES)
def test_ranks_own_the_gradient_once_between_them(found: dict[str, Any], case: str) -> None:
    """Their slices, laid end to end, are the gradient that plain PyTorch computes of the whole batch."""
    result, exact = found[case], "fp32" in case
    assert result["same names"]
    assert result["gradient error"] < (1e-5 if exact else 0.02)
    assert result["norm"] == pytest.approx(result["expected norm"], rel=1e-5 if exact else 0.02)
    assert result["norm by name"] == pytest.approx(result["norm"], rel=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_one_rank_with_gradients_that_are_not_finite_is_seen_by_all(found: dict[str, Any], case: str) -> None:
    """Where the loss is finite too; and a spike on one rank is as large as it is."""
    result = found[case]
    assert 0 < result["loss beside NaN gradients"] < 10
    assert result["norm of NaN"] == "nan"
    assert result["spike"] > 100 * result["norm"]


@pytest.mark.parametrize("case", CASES)
def test_a_discarded_step_leaves_no_trace(found: dict[str, Any], case: str) -> None:
    """Weights, moments and counters are the same to the bit, and so are they after the step that follows."""
    result = found[case]
    assert result["before"] == result["after"] == result["after NaN"]
    assert result["went on"] == result["without"]
    assert result["went on"] != result["before"]


def test_nothing_is_compiled_again(found: dict[str, Any]) -> None:
    """After the first steps; and every method of a layer is one graph."""
    graphs = [result["graphs"] for result in found.values()]
    assert all(g["all"] == g["first"] and g["breaks"] == 0 for g in graphs)
    counts = {case: g["all"] for case, g in zip(found, graphs, strict=True)}
    assert counts["3 bf16 offload"] == 0
    assert counts["1 bf16 compiled"] == 4  # project and finish, of the last layer and of the others
    assert counts["3 fp32 compiled"] == 4 + 8  # a second time in all, without gradients: what is computed again later
