"""Which chars attend together. Nothing but numbers: the reckoning of FLOPs and memory reads it without torch."""

CHUNK = 128  # queries of one call: fewer keys that none of them sees against fewer, larger calls
LEAST_GROUP = 64  # chars that attend to chars together: fewer cost more for each pair


def group_size(longest_run: int) -> int:
    """Consecutive chars that attend to chars together: to their own slots and the longest run before them."""
    return max(LEAST_GROUP, longest_run)


def char_groups(chars: int, longest_run: int) -> list[tuple[int, int]]:
    """For each group of chars that attend together: how many ask, and to how many chars they attend.

    A row of few chars is one group.
    """
    size = chars if chars <= CHUNK else group_size(longest_run)
    bounds = [(start, min(start + size, chars)) for start in range(0, chars, max(size, 1))]
    return [(stop - start, stop - max(start - longest_run, 0)) for start, stop in bounds]
