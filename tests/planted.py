"""Training with rows that spoil it, started on every rank like `launch/train.py`.

PLANTED holds a JSON object: the chars of a row, as text, to what the row does: "nan" makes its loss NaN, "gradient"
only the gradients that leave it, "spike" makes both a thousand times as large.
"""

import functools
import json
import os
import sys
from typing import Any

import torch

from data_pipeline.layout import Slots
from launch.train import main
from tidal_dist.model.transformer import TidalTransformer

FACTORS = {"nan": float("nan"), "spike": 1000.0}


def chars_as_text(chars: torch.Tensor) -> str:
    """The chars (C,) of a row as PLANTED names them."""
    return " ".join(map(str, chars.tolist()))


def spoil(planted: dict[str, str]) -> None:
    """Have every model's forward pass do what is planted."""
    forward = TidalTransformer.forward

    @functools.wraps(forward)
    def spoilt(
        model: TidalTransformer, tokens: Slots, chars: Slots, labels: torch.Tensor | None = None, **rest: Any
    ) -> torch.Tensor:
        result = forward(model, tokens, chars, labels, **rest)
        for i, row in enumerate(chars.ids):
            kind = planted.get(chars_as_text(row))
            if kind in FACTORS:
                factor = torch.ones_like(result)
                factor[... if labels is not None else i] = FACTORS[kind]
                result = result * factor
            elif kind == "gradient" and result.requires_grad:
                result.register_hook(lambda gradient: gradient * float("nan"))
        return result

    TidalTransformer.forward = spoilt  # type: ignore[method-assign]


if __name__ == "__main__":
    spoil(json.loads(os.environ["PLANTED"]))
    exit_code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
