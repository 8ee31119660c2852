"""When validation gains nothing any more: the run ends before its last step."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from tidal_dist.errors import ConfigError
from tidal_dist.settings import ValidationConfig

_SIGN = {"bits_per_byte": -1.0, "exact_match": 1.0}  # times which more is better


@dataclass
class EarlyStop:
    """How many validations in a row have brought no gain. Its state goes on with a resumed run.

    Attributes:
        best: of the metric so far. best_step: where. without_gain: validations since.
    """

    config: ValidationConfig
    best: float | None = None
    best_step: int = 0
    without_gain: int = 0

    @classmethod
    def resumed(cls, config: ValidationConfig, state: dict[str, Any]) -> "EarlyStop":
        """Where `state` stood; anew where that watched another metric."""
        kept = dict(state)
        is_same = kept.pop("metric", None) == config.early_stop_metric
        return cls(config, **kept) if is_same else cls(config)

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        kept = {name: value for name, value in asdict(self).items() if name != "config"}
        return {"metric": self.config.early_stop_metric} | kept

    @property
    def reason(self) -> str:
        """Why the run ends, or ""."""
        patience, metric = self.config.early_stop_patience, self.config.early_stop_metric
        if patience is None or self.without_gain < patience:
            return ""
        since = f"{self.best:.4f} after step {self.best_step}" if self.best is not None else "it was never finite"
        return f"validation/{metric} has not gained for {self.without_gain} validations ({since})"

    def judge(self, step: int, metrics: dict[str, float]) -> None:
        """Take up a validation. What is no finite number is no gain."""
        value = metrics[f"validation/{self.config.early_stop_metric}"]
        sign = _SIGN[self.config.early_stop_metric]
        if math.isfinite(value) and (self.best is None or sign * value > sign * self.best):
            self.best, self.best_step, self.without_gain = value, step, 0
        else:
            self.without_gain += 1


def check_early_stop(config: ValidationConfig, held_out: bool, answers: bool) -> None:
    """Check that what is to be watched is measured.

    Args:
        held_out: whether there is a validation split. answers: whether documents of it have a prompt and an answer.

    Raises:
        ConfigError: it is not.
    """
    if config.early_stop_patience is None:
        return
    if not held_out:
        raise ConfigError("validation.early_stop_patience: no document is held out; set corpus.validation_fraction")
    if config.early_stop_metric == "exact_match" and not answers:
        raise ConfigError(
            "validation.early_stop_metric=exact_match: no held-out document has a prompt and an answer; "
            "take bits_per_byte"
        )
