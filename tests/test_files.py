"""Files that appear whole or not at all."""

from pathlib import Path

import pytest

from data_pipeline.errors import UserError
from data_pipeline.files import replace_file, whole_file


def test_a_path_below_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"kept")
    with pytest.raises(UserError, match=r"file/x\.png: cannot write"):
        replace_file(tmp_path / "file" / "x.png", b"data")
    assert (tmp_path / "file").read_bytes() == b"kept"


def test_what_fails_while_writing_leaves_nothing(tmp_path: Path) -> None:
    def write_half() -> None:
        with whole_file(tmp_path / "x") as file:
            file.write(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        write_half()
    assert not list(tmp_path.iterdir())
