"""Compiles one regular expression, in a process of its own that is bounded in memory and time.

A short pattern can stand for an automaton of billions of states, and the library that builds it neither counts them nor
gives up; while it builds, nothing else of its process runs. So it builds where it can be stopped: standard input holds
the pattern, standard output becomes `outlines_core`'s automaton over bytes, standard error says what went wrong.

Output: 32-bit integers: the start, the number of final states, the final states, and for each transition its state,
byte and next state.
"""

import sys
from array import array

MEMORY_BYTES = 2**30
BAD_PATTERN, TOO_LARGE = 3, 4  # exit codes


def main() -> int:
    """Read a pattern, write its automaton; the exit code."""
    _bound_memory()
    code, automaton, reason = answer(sys.stdin.buffer.read(), int(sys.argv[1]))
    sys.stdout.buffer.write(automaton)
    sys.stderr.write(reason)
    return code


def answer(pattern: bytes, max_states: int) -> tuple[int, bytes, str]:
    """The exit code, the automaton, and what is wrong with the pattern."""
    try:
        numbers = compile_pattern(pattern.decode(), max_states)
    except ValueError as error:
        return BAD_PATTERN, b"", " ".join(str(error).split())
    return (0 if numbers else TOO_LARGE), numbers.tobytes(), ""


def compile_pattern(pattern: str, max_states: int) -> array:
    """The automaton as laid out above; nothing where it has more than `max_states` states.

    Raises:
        ValueError: the pattern is wrong, or of a kind that no automaton has.
    """
    from outlines_core import Index, Vocabulary

    vocabulary = Vocabulary(256, {bytes([b]): [b] for b in range(256)})
    # The match must end where the text ends, or `a|ab` would stop at `a`. The byte before it is no part of the text:
    # without one the library refuses patterns that match the empty text.
    index = Index(rf"\x00(?:{pattern})\z", vocabulary)
    transitions, finals = index.get_transitions(), index.get_final_states()
    if len(transitions) > max_states:
        return array("i")
    start = transitions.pop(index.get_initial_state())[0]
    numbers = array("i", [start, len(finals), *finals])
    for state, following in transitions.items():
        for byte, target in following.items():
            if byte < 256:  # 256 is the library's end of the text
                numbers.extend((state, byte, target))
    return numbers


def _bound_memory() -> None:
    try:
        import resource
    except ImportError:  # not on Windows
        return
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))


if __name__ == "__main__":
    sys.exit(main())
