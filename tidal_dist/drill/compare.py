"""Two runs compared: what was found, in words, and whether it is as it should be."""

from typing import Any

from tidal_dist.drill.evidence import differences


def compare_losses(expected: dict[int, float], found: dict[int, float], tolerance: float = 0.0) -> tuple[str, bool]:
    """The losses by step; those of a step may differ by `tolerance` of what is expected."""
    missing = sorted(expected.keys() - found.keys())
    if missing:
        return f"steps {', '.join(map(str, missing[:5]))} were not written down", False
    apart = {step: abs(found[step] - loss) / max(abs(loss), 1e-12) for step, loss in expected.items()}
    # Also false for a loss that is not a number.
    wrong = [step for step, relative in sorted(apart.items()) if not relative <= tolerance]
    if wrong:
        step = wrong[0]
        return f"step {step}: {found[step]!r} instead of {expected[step]!r}", False
    if tolerance:
        return f"{len(expected)} steps, at most {max(apart.values(), default=0.0):.1e} apart", True
    return f"{len(expected)} of {len(expected)} steps equal", True


def first_difference(expected: dict[int, str], found: dict[int, str]) -> tuple[str, bool]:
    """The rolling hashes by step."""
    wrong = sorted(differences(expected, found))
    if not wrong:
        return f"{len(expected)} of {len(expected)} equal, {expected[max(expected)][:12]}", True
    step = wrong[0]
    return f"step {step}: {found.get(step, 'none')[:12]} instead of {expected.get(step, 'none')[:12]}", False


def compare_tensors(expected: dict[str, str], found: dict[str, Any]) -> tuple[str, bool]:
    """The digests of checkpoints' tensors."""
    wrong = differences(expected, found)
    if wrong:
        return f"{len(wrong)} of {len(expected)} differ, the first: {wrong[0]}", False
    return f"{len(expected)} of {len(expected)} equal", True


def compare_loading(events: list[dict[str, Any]], ranks: int) -> tuple[str, bool]:
    """What the last resume of a run told of its checkpoint; it goes on only where all checksums are as saved.

    Args:
        events: of the run. ranks: that resumed.
    """
    resumes = [event for event in events if event["event"] == "resume"]
    if not resumes or resumes[-1].get("ranks") != ranks:
        return f"no resume on {ranks} ranks was told of", False
    told = resumes[-1]
    how = f"converted from {told['saved_by_ranks']} ranks" if told["converted"] else "read as they are"
    return f"{how}, as saved; probe loss {told['probe_loss_difference']:.1g} apart", True
