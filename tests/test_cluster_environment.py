"""What ranks on other hosts find in their environment."""

import shutil
import subprocess
from argparse import Namespace
from pathlib import Path

import pytest
from deepspeed.launcher.multinode_runner import PDSHRunner
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.launching import write_config
from tidal_dist.cluster import environment as env
from tidal_dist.config import Config, load_config
from tidal_dist.errors import UserError


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config(write_config(tmp_path))


def test_what_ranks_need_is_handed_on_and_has_a_reason(config: Config) -> None:
    here = {"PATH": "/usr/bin", "NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "4", "HOME": "/root", "HF_TOKEN": "secret"}
    found = env.environment_for(config, "eth1", here | {"AWS_REGION": "x", "DS_ENV_FILE": "other"})
    assert found.keys() == {"PATH", "NCCL_DEBUG", "OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"}
    assert found["GLOO_SOCKET_IFNAME"] == found["NCCL_SOCKET_IFNAME"] == "eth1"
    assert found["PATH"].endswith(":/usr/bin")
    assert all(env.reason_for(name) for name in found)
    assert "interface" not in env.environment_for(config, None, here)
    assert env.environment_for(config, "eth1", {"NCCL_SOCKET_IFNAME": "ib0"})["NCCL_SOCKET_IFNAME"] == "ib0"
    assert env.withheld(config, here) == ["HF_TOKEN"]


def test_an_object_store_needs_more(config: Config) -> None:
    here = {"AWS_REGION": "x", "AWS_SECRET_ACCESS_KEY": "secret"}
    remote = config.model_copy(update={"data": config.data.model_copy(update={"shards": "s3://bucket/shards"})})
    assert "AWS_REGION" not in env.environment_for(config, None, here)
    found = env.environment_for(remote, None, here)
    assert found["AWS_REGION"] == "x"
    assert "secret" not in found.values()
    assert env.withheld(remote, here) == ["AWS_SECRET_ACCESS_KEY"]


def test_the_files_that_the_launcher_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    (here / ".deepspeed_env").write_text("A=1\n")
    assert env.env_files({}) == [here / ".deepspeed_env"]
    (home / ".deepspeed_env").write_text("A=2\n")
    assert env.env_files({}) == [home / ".deepspeed_env", here / ".deepspeed_env"]
    assert env.env_files({"DS_ENV_FILE": str(here / ".deepspeed_env")}) == [here / ".deepspeed_env"]


def test_a_users_lines_stay_and_differences_are_told(tmp_path: Path) -> None:
    kept = {"GLOO_SOCKET_IFNAME": "ib0", "WHERE": "$HOME/x"}
    path = tmp_path / "run" / "env"
    env.write_env_file(path, {"GLOO_SOCKET_IFNAME": "eth0", "OTHER": "1"}, kept)
    assert env.read_env_file(path) == {"GLOO_SOCKET_IFNAME": "ib0", "OTHER": "1", "WHERE": "$HOME/x"}
    told = env.differences({"GLOO_SOCKET_IFNAME": "eth0", "OTHER": "1"}, kept)
    assert told == ["GLOO_SOCKET_IFNAME=ib0 as in .deepspeed_env; without that it would be eth0"]


@pytest.mark.parametrize("text", ["A=1\n\nB=2\n", "# a comment\n", "no value\n", "A B=1\n"])
def test_a_file_that_the_launcher_cannot_read(tmp_path: Path, text: str) -> None:
    path = tmp_path / ".deepspeed_env"
    path.write_text(text)
    with pytest.raises(UserError, match=r"\.deepspeed_env:\d: .*: write NAME=value"):
        env.read_env_file(path)


@pytest.mark.skipif(shutil.which("pdsh") is None, reason="pdsh is not installed")
@settings(max_examples=25)
@given(st.text(st.characters(min_codepoint=32, max_codepoint=0x2000, exclude_categories=["C"])))
@example('a "b" $HOME `id` \\ %n 100%')
def test_a_value_arrives_as_it_was(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    """Through the launcher's file, its quotes, pdsh's placeholders and a shell."""
    value, path = text.strip(), tmp_path_factory.getbasetemp() / "value_env"
    env.write_env_file(path, {"VALUE": value})
    runner = PDSHRunner(Namespace(user_args=[], user_script="train.py"), "")
    name, _, read = path.read_text().rstrip("\n").partition("=")
    runner.add_export(name, read)
    exports = f"export {name}={runner.exports[name]}; "
    command = ["pdsh", "-R", "exec", "-N", "-w", "host", "sh", "-c", f"{exports}printenv VALUE"]
    assert subprocess.run(command, capture_output=True, check=True).stdout.decode() == value + "\n"


def test_what_cannot_be_handed_on_is_named(tmp_path: Path) -> None:
    for value in ("two\nlines", " spaces "):
        with pytest.raises(UserError, match="TORCH_X="):
            env.write_env_file(tmp_path / "env", {"TORCH_X": value})
