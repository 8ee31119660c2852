"""Who exchanges with whom, so that each meets each: as in a tournament."""


def rounds(n: int) -> list[list[tuple[int, int]]]:
    """Rounds of pairs of 0..n-1: every pair once, everybody at most once a round, n rounds at most.

    One place stays, the others go round it (the circle method).
    """
    places: list[int | None] = [*range(n), *([None] if n % 2 else [])]
    found = []
    for _ in range(len(places) - 1):
        half = len(places) // 2
        pairs = zip(places[:half], reversed(places[half:]), strict=True)
        found.append([(min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None])
        places = [places[0], places[-1], *places[1:-1]]
    return found
