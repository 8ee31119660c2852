"""What `tidal launch --requeue` tells the scheduler that has started it."""

from pathlib import Path

import pytest

from tests.launching import tidal_here, write_config
from tests.supervising import STEPS, complete_checkpoint
from tidal_dist.cluster import supervisor


@pytest.mark.parametrize(
    ("option", "step", "code", "expected"),
    [([], 2, 0, 0), (["--requeue"], 2, 0, 3), (["--requeue"], STEPS, 0, 0), (["--requeue"], 2, 1, 1)],
)
def test_a_stop_is_not_the_end(
    option: list[str], step: int, code: int, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path, training={"steps": STEPS})
    complete_checkpoint(tmp_path / "run", step)
    (tmp_path / "hostfile").write_text("node1 slots=1\n")
    monkeypatch.setattr(supervisor, "supervise", lambda *_: code)
    assert tidal_here("launch", config, "--hostfile", tmp_path / "hostfile", *option).returncode == expected
