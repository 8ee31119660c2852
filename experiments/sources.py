"""Which programs made a result: a hash of every source file that it depends on, and the commit.

Comments, docstrings and empty lines do not count, nor does what only shows, watches or serves: a commit that touches
those must not throw away hours of results.
"""

import ast
import hashlib
import io
import subprocess
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]

_MAKE_RESULTS = (
    "data_pipeline",
    "tidal_dist",
    "launch/train.py",
    "experiments/tasks",
    "experiments/evaluate.py",
    "experiments/samples.py",
    "experiments/work.py",
)
_NEVER_IN_A_RESULT = (
    "tidal_dist/bench",
    "tidal_dist/cli.py",
    "tidal_dist/commands",
    "tidal_dist/diagnose",
    "tidal_dist/doctor",
    "tidal_dist/drill",
    "tidal_dist/evaluation",
    "tidal_dist/generation/server",
    "tidal_dist/inspection",
    "tidal_dist/plan.py",
    "tidal_dist/planning",
    "tidal_dist/plots",
    "tidal_dist/run_report",
)


@cache
def sources_hash(root: Path = ROOT) -> str:
    """Hex sha256 of the sources below a folder."""
    digest = hashlib.sha256()
    for path in source_files(root):
        digest.update(f"{path.relative_to(root)}\0{meaning_of(path.read_text('utf-8'))}\0".encode())
    return digest.hexdigest()


def source_files(root: Path) -> list[Path]:
    """The files that a result depends on."""
    given = [root / name for name in _MAKE_RESULTS]
    found = {path for each in given for path in ([each] if each.is_file() else each.rglob("*.py"))}
    return sorted(p for p in found if not any(p.is_relative_to(root / name) for name in _NEVER_IN_A_RESULT))


def meaning_of(source: str) -> str:
    """A Python source without comments, docstrings and empty lines."""
    lines: list[str] = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for first, last in _docstrings(ast.parse(source)):
        lines[first - 1 : last] = [""] * (last - first + 1)
    return "\n".join(line.rstrip() for line in lines if line.strip())


def _docstrings(tree: ast.Module) -> Iterator[tuple[int, int]]:
    """First and last line of each."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and ast.get_docstring(node):
                yield first.lineno, first.end_lineno or first.lineno


def commit(root: Path = ROOT) -> str | None:
    """The commit of the sources, with + where files of them were changed since; none: it is not known."""
    try:
        head = _git(root, "rev-parse", "--short=10", "HEAD").strip()
        return head + ("+" if _git(root, "status", "--porcelain", "--", *_MAKE_RESULTS) else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout
