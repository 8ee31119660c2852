"""The configuration of the mix: which share of the rows each source gives, and from which step on."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import pairwise
from math import gcd, lcm
from typing import Annotated

from pydantic import AfterValidator, Field, field_validator

from data_pipeline.ordering import Stage
from data_pipeline.section import Section

# Weights such as 0.7 and 0.3 become 7 and 3, which a lane takes over 10 turns. Shares are exact after that many turns,
# so a longer round would hardly ever end within a run.
_LONGEST_ROUND = 10_000


class MixStage(Section):
    """A mix of sources."""

    from_step: int = Field(0, ge=0, description="the first step that is mixed so, counted from 0")
    weights: dict[str, float] = Field(min_length=1, description="by source: its share of the rows, relative to others")

    @field_validator("weights")
    @classmethod
    def _weights_are_shares(cls, weights: dict[str, float]) -> dict[str, float]:
        for name, weight in weights.items():
            if not 0 <= weight < float("inf"):
                raise ValueError(f"the weight of {name} must be 0 or more, and finite")
        if not any(weights.values()):
            raise ValueError("at least one weight must be more than 0")
        if (total := sum(whole_weights(weights).values())) > _LONGEST_ROUND:
            raise ValueError(
                f"as whole numbers these weights add up to {total:,}, more than {_LONGEST_ROUND:,}: "
                "round them to fewer digits"
            )
        return weights


def _stages_in_order(mix: list[MixStage]) -> list[MixStage]:
    steps = [stage.from_step for stage in mix]
    if steps and steps[0] != 0:
        raise ValueError(f"the first stage begins at step {steps[0]}; let it begin with from_step: 0")
    for before, after in pairwise(steps):
        if after <= before:
            raise ValueError(f"a stage from step {after} follows one from step {before}; put them in order")
    return mix


Mix = Annotated[list[MixStage], AfterValidator(_stages_in_order)]


def whole_weights(weights: Mapping[str, float]) -> dict[str, int]:
    """The same shares as whole numbers without a common divisor; sources of weight 0 are left out."""
    # By their decimal digits: 0.7 is 7/10, which no binary fraction is.
    exact = {name: Fraction(str(weight)) for name, weight in weights.items() if weight > 0}
    scale = lcm(*(weight.denominator for weight in exact.values()))
    whole = {name: int(weight * scale) for name, weight in exact.items()}
    divisor = gcd(*whole.values())
    return {name: weight // divisor for name, weight in sorted(whole.items())}


def stages_of(mix: Sequence[MixStage], rows_per_step: int) -> tuple[Stage, ...]:
    """The stages of a mix by the rows of a run with that many rows in a step."""
    return tuple(Stage(s.from_step * rows_per_step, tuple(whole_weights(s.weights).items())) for s in mix)
