"""Hostfiles that are wrong say where; the choice of slots is the deepspeed launcher's."""

from pathlib import Path

import pytest
from deepspeed.launcher.runner import fetch_hostfile, parse_inclusion_exclusion
from hypothesis import given
from hypothesis import strategies as st

from tidal_dist.cluster.hostfile import Host, filter_hosts, hostfile_text, read_hostfile
from tidal_dist.errors import UserError


def written(folder: Path, text: str) -> Path:
    path = folder / "hosts"
    path.write_text(text)
    return path


def test_a_hostfile_is_read_in_its_order(tmp_path: Path) -> None:
    path = written(tmp_path, "# all\n\n  red slots=4   # the first\nblue\tslots=2 max_slots=2\n")
    assert read_hostfile(path) == [Host("red", 4), Host("blue", 2)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "hosts: cannot read (No such file or directory); check --hostfile"),
        ("", "hosts: names no host; write `host slots=8`, one a line"),
        ("# red slots=4\n", "hosts: names no host"),
        ("red slots=4\nblue 4\n", "hosts:2: 'blue 4': write `host slots=8`"),
        ("red slots=four\n", "hosts:1: 'red slots=four': write `host slots=8`"),
        ("red slots=4 blue slots=4\n", "hosts:1: 'red slots=4 blue slots=4': write"),
        ("red slots=0\n", "hosts:1: red has no slots"),
        ("red slots=4\n\nred slots=2\n", "hosts:3: red stands in line 1 already"),
    ],
)
def test_a_wrong_hostfile_says_where(tmp_path: Path, text: str | None, expected: str) -> None:
    path = tmp_path / "hosts" if text is None else written(tmp_path, text)
    with pytest.raises(UserError, match=r"^[^\n]*$") as error:
        read_hostfile(path)
    assert expected in str(error.value)


names = st.sampled_from(["red", "blue", "old", "n-1.local"])


@st.composite
def choices(draw: st.DrawFn) -> tuple[list[Host], str]:
    hosts = [Host(name, draw(st.integers(1, 4))) for name in draw(st.lists(names, min_size=1, unique=True))]
    parts = []
    for host in draw(st.lists(st.sampled_from(hosts), unique=True)):
        slots = draw(st.lists(st.integers(0, host.slots - 1), unique=True))
        parts.append(host.name + (f":{','.join(map(str, slots))}" if slots else ""))
    return hosts, "@".join(parts)


@given(choices(), st.booleans())
def test_the_launcher_would_choose_the_same(choice: tuple[list[Host], str], is_exclusion: bool) -> None:
    hosts, text = choice
    include, exclude = ("", text) if is_exclusion else (text, "")
    theirs = parse_inclusion_exclusion({h.name: h.slots for h in hosts}, include, exclude)
    if not theirs:
        with pytest.raises(UserError, match="no slot is left"):
            filter_hosts(hosts, include, exclude)
        return
    ours = filter_hosts(hosts, include, exclude)
    assert {host.name: list(host.numbers) for host in ours} == dict(theirs)
    assert [host.name for host in ours] == list(theirs)
    assert all(host.slots == len(host.numbers) for host in ours)


def test_the_launcher_reads_what_is_written(tmp_path: Path) -> None:
    path = written(tmp_path, hostfile_text([Host("red", 4), Host("blue", 2, (1, 3))]))
    assert fetch_hostfile(str(path)) == {"red": 4, "blue": 2}
