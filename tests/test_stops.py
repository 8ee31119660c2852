"""What of a text may turn out to begin a stop string."""

from hypothesis import given
from hypothesis import strategies as st

from tests.test_engine import generations_of
from tests.test_generation import lively_model
from tidal_dist.generation.request import Limits, Request, requests_of
from tidal_dist.generation.sampling import Sampling
from tidal_dist.generation.stops import Ending


def by_trying_all(text: str, stop: str) -> int:
    """The definition: the longest beginning of the stop string, short of all of it, with which the text ends."""
    return next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)


@given(st.text("ab", min_size=1, max_size=9), st.lists(st.text("ab", max_size=9), max_size=9))
def test_it_is_what_trying_all_lengths_finds(stop: str, pieces: list[str]) -> None:
    ending = Ending(stop)
    for n, piece in enumerate(pieces, 1):
        ending.read(piece)
        assert ending.length == by_trying_all("".join(pieces[:n]), stop)


class Counted(str):
    """Counts how often something is taken out of it."""

    taken = 0

    def __getitem__(self, key: object) -> str:
        self.taken += 1
        return super().__getitem__(key)  # type: ignore[index]


def test_a_long_stop_string_costs_no_more_than_the_text_is_long() -> None:
    stop = Counted("潮" * 10_000)
    requests = requests_of(["12 + 34 ="] * 8, Request("", Sampling(1.0), Limits(60, stop=(stop,))))
    blocks = [block for generation in generations_of(lively_model(3), list(requests)) for block in generation.blocks]
    assert len(blocks) > 8
    assert stop.taken <= 4 * len("".join(blocks))
