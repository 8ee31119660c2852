"""What the README says exists: its folders, its commands, its files."""

import re
import shlex
from pathlib import Path

import pytest

from experiments.__main__ import parser as experiments_parser
from launch.recipes import parser as recipes_parser
from launch.supervise import parser as supervise_parser
from launch.train import parser as train_parser
from tidal_dist.cli import parser as cli_parser

ROOT = Path(__file__).parent.parent
DOCS = (
    "checkpoints",
    "data",
    "deepspeed",
    "drill",
    "evaluation",
    "experiments",
    "generation",
    "guard",
    "multi-node",
    "performance",
    "plan",
    "preflight",
    "serving",
    "survival",
    "watching",
    "why",
)
PAGES = ["README.md", "README.zh-CN.md", *(f"docs/{name}.md" for name in DOCS)]


def commands(page: str) -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / page).read_text("utf-8"), flags=re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line.removeprefix(".venv/bin/") for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_understood(page: str) -> None:
    known = {"tidal": cli_parser().parse_args, "deepspeed": lambda words: train_parser().parse_args(words)}
    for line in commands(page):
        program, *words = shlex.split(line)
        if program == "make":
            assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE), line
        elif program == "deepspeed":
            known[program](words[words.index("launch/train.py") + 1 :])
        elif program == "tidal":
            known[program](words)
        elif words[:2] == ["-m", "launch.supervise"]:
            supervise_parser().parse_known_args(words[2:])
        elif words[:2] == ["-m", "launch.recipes"]:
            recipes_parser().parse_intermixed_args(words[2:])
        elif words[:2] == ["-m", "experiments"]:
            experiments_parser().parse_args(words[2:])
        elif words[:2] == ["-m", "tidal_dist.evaluation"]:
            from lm_eval._cli import HarnessCLI  # takes seconds

            HarnessCLI()._parser.parse_args(["run", *words[2:]])
        elif program == "kubectl":
            assert (ROOT / words[words.index("-f") + 1]).exists(), line
        elif program == "sbatch":
            assert (ROOT / next(word for word in words if not word.startswith("-"))).exists(), line
        else:
            assert program in ("source", "tensorboard"), line


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text("utf-8")):
        assert ((ROOT / page).parent / target).exists(), target


def test_the_tree_is_the_tree() -> None:
    tree = (ROOT / "README.md").read_text("utf-8").split("## The house")[1].split("```")[1]
    for folder, text in re.findall(r"^(\w+)/\s+(.*)$", tree, flags=re.MULTILINE):
        assert (ROOT / folder).is_dir()
        for inner in re.findall(r"\b(\w+(?:\.py|\.yaml|\.md|/))", text):
            assert (ROOT / folder / inner).exists(), inner
