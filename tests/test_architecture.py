"""Who may import whom, read from the source."""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("data_pipeline", "tidal_dist", "launch", "experiments")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
HEAVY = ("torch", "numpy", "deepspeed", "matplotlib", "pydantic", "datatrove", "fastapi", "webdataset", "tokenizers")
MAY_IMPORT_DEEPSPEED = {"tidal_dist.training.engine"}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def names_imported(module: str, path: Path, nodes: Iterator[ast.AST]) -> set[str]:
    """Dotted names that the import statements among `nodes` ask for; `from a import b` asks for a.b."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            found |= {a.value for a in node.args[:1] if isinstance(a, ast.Constant)}
    return found


@cache
def imports(module: str) -> set[str]:
    """Everything a module imports, inside functions too."""
    return names_imported(module, MODULES[module], ast.walk(tree_of(module)))


@cache
def imports_when_loaded(module: str) -> set[str]:
    """What importing a module imports at once."""

    def outside_functions(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
                continue
            yield child
            yield from outside_functions(child)

    return names_imported(module, MODULES[module], outside_functions(tree_of(module)))


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text("utf-8"))


def within(name: str, *prefixes: str) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def loaded_with(module: str) -> set[str]:
    """All names, ours and others', that importing `module` imports, directly or through our own modules."""
    seen, names, todo = set(), set(), [module]
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        names |= imports_when_loaded(current)
        for name in [*imports_when_loaded(current), current]:
            parts = name.split(".")
            todo += [m for i in range(len(parts)) if (m := ".".join(parts[: i + 1])) in MODULES]
    return names


def offenders(modules: Iterator[str] | list[str], *forbidden: str) -> dict[str, set[str]]:
    found = {m: {name for name in imports(m) if within(name, *forbidden)} for m in modules}
    return {m: names for m, names in found.items() if names}


def modules_in(*packages: str) -> list[str]:
    return [m for m in MODULES if within(m, *packages)]


def test_there_is_something_to_check() -> None:
    assert {"data_pipeline.layout", "tidal_dist.model.transformer", "tidal_dist.training.loop"} <= set(MODULES)
    assert "numpy" in imports("data_pipeline.layout")
    assert "data_pipeline.layout.Slots" in imports("tidal_dist.model.transformer")
    assert "deepspeed" in loaded_with("tidal_dist.training.loop")  # through the engine


def test_data_pipeline_imports_nothing_above_it() -> None:
    assert not offenders(modules_in("data_pipeline"), "tidal_dist", "launch")


def test_torch_in_data_pipeline_is_only_in_the_stream() -> None:
    assert set(offenders(modules_in("data_pipeline"), "torch")) <= {"data_pipeline.stream"}
    assert not offenders(modules_in("data_pipeline"), "deepspeed")


def test_only_few_modules_import_deepspeed() -> None:
    allowed = MAY_IMPORT_DEEPSPEED | set(modules_in("launch"))
    assert set(offenders(list(MODULES), "deepspeed")) <= allowed


@pytest.mark.parametrize(
    "module",
    [
        m
        for m in modules_in(
            "tidal_dist.generation",
            "tidal_dist.model",
            "tidal_dist.doctor",
            "tidal_dist.inspection",
            "tidal_dist.export",
            "data_pipeline",
        )
    ]
    + [
        m
        for m in (
            "tidal_dist",
            "tidal_dist.config",
            "tidal_dist.errors",
            "tidal_dist.cli",
            "tidal_dist.export.package",
            "tidal_dist.loaded",
            "tidal_dist.evaluation.harness",
        )
        if m in MODULES
    ],
)
def test_deepspeed_is_not_needed_to_use_a_model(module: str) -> None:
    assert not {name for name in loaded_with(module) if within(name, "deepspeed")}


def test_the_model_imports_only_what_is_below_it() -> None:
    allowed = ("torch", "tidal_dist.config", "tidal_dist.model", "data_pipeline.layout", "data_pipeline.tokenizer")
    for module in modules_in("tidal_dist.model"):
        others = {name for name in imports(module) if name.split(".")[0] not in sys.stdlib_module_names}
        assert {name for name in others if not within(name, *allowed)} == set(), module


def test_the_oracle_shares_nothing_with_what_it_judges() -> None:
    ours = {name for name in imports("tidal_dist.doctor.oracle") if within(name, *PACKAGES)}
    assert {name for name in ours if not within(name, "data_pipeline.tokenizer", "tidal_dist.config")} == set()


def test_generation_imports_nothing_of_training() -> None:
    above = [f"tidal_dist.{name}" for name in ("training", "doctor", "bench", "cli")]
    assert not offenders(modules_in("tidal_dist.generation"), *above)


def test_only_the_server_needs_what_serving_needs() -> None:
    others = [m for m in MODULES if not within(m, "tidal_dist.generation.server")]
    assert not offenders(others, "fastapi", "starlette", "uvicorn", "prometheus_client")
    started = {m for m in others if any(within(n, "tidal_dist.generation.server") for n in imports_when_loaded(m))}
    assert started == set()


def test_inspection_computes_no_more_than_a_pass() -> None:
    above = [f"tidal_dist.{name}" for name in ("generation", "doctor", "bench", "cli", "training.engine")]
    assert not offenders(modules_in("tidal_dist.inspection"), *above)


def test_training_generates_only_in_validation() -> None:
    assert set(offenders(modules_in("tidal_dist.training"), "tidal_dist.generation")) <= {
        "tidal_dist.training.validation"
    }


def test_entry_points_are_imported_by_nobody() -> None:
    assert not offenders(list(MODULES), "launch", "tidal_dist.cli")


def test_experiments_stand_on_top() -> None:
    others = [module for module in MODULES if not within(module, "experiments")]
    assert not offenders(others, "experiments")
    assert not offenders(modules_in("experiments"), "deepspeed")


@pytest.mark.skipif("tidal_dist.cli" not in MODULES, reason="no command line yet")
def test_the_command_line_starts_light() -> None:
    """`tidal --help` answers at once: what is heavy is imported inside the commands."""
    assert not {name for name in loaded_with("tidal_dist.cli") if within(name, *HEAVY)}


def test_no_file_without_a_subject() -> None:
    assert not [path for path in FILES if path.name in ("utils.py", "helpers.py", "util.py", "common.py", "misc.py")]


def is_definition(node: ast.stmt, defined: set[str]) -> bool:
    """Whether a top-level statement only defines something: importing it changes nothing outside the module."""
    if isinstance(node, ast.Import | ast.ImportFrom | ast.Assign | ast.AnnAssign | ast.ClassDef):
        return True
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return True
    if isinstance(node, ast.If):
        test = ast.unparse(node.test)
        return test == "__name__ == '__main__'" or test.endswith("TYPE_CHECKING")
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return True
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        # A class of the module may be completed by a call of its own method.
        return ast.unparse(node.value.func).split(".")[0] in defined
    return isinstance(node, ast.Try) and all(isinstance(n, ast.Import | ast.ImportFrom) for n in node.body)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_importing_has_no_effects(module: str) -> None:
    body = tree_of(module).body
    classes = {node.name for node in body if isinstance(node, ast.ClassDef)}
    assert [ast.unparse(node) for node in body if not is_definition(node, classes)] == []


@pytest.mark.parametrize("module", sorted(m for m, path in MODULES.items() if path.name == "__init__.py"))
def test_an_init_file_only_says_what_the_package_is(module: str) -> None:
    tree = tree_of(module)
    assert ast.get_docstring(tree)
    for node in tree.body[1:]:
        assert isinstance(node, ast.Import | ast.ImportFrom | ast.Assign), ast.unparse(node)
        if isinstance(node, ast.Assign):
            assert ast.unparse(node.targets[0]) in ("__all__", "__version__")


@pytest.mark.parametrize("folder", ["distributed", "hosts"])
def test_all_tests_that_start_launchers_are_slow(folder: str) -> None:
    """`make check` does not even import them."""
    found = {path.name: path.read_text() for path in (ROOT / "tests" / folder).glob("test_*.py")}
    assert found
    assert [name for name, text in found.items() if "pytestmark = " not in text or "pytest.mark.slow" not in text] == []
