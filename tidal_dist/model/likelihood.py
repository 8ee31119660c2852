"""How the likelihood of a text is reported."""

import math


def bits_per_byte(nats: float, text_bytes: float) -> float:
    """sum(nats, end marks included) / (ln 2 * bytes)."""
    return nats / (math.log(2) * max(text_bytes, 1))
