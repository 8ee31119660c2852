"""Sets of tiny experiments with a task of their own; run as a script, what works at their jobs.

python tests/experimenting.py data|job FOLDER    as experiments.work does
python tests/experimenting.py run SETS RUNS      the set `tiny`; its first training kills the process that runs it
"""

import copy
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from data_pipeline.arithmetic import training_problems
from data_pipeline.documents import Document
from data_pipeline.preparing.sampling import is_validation
from data_pipeline.section import Section

SCRIPT = Path(__file__)
DYING = SCRIPT.with_name("dying_train.py")
FRACTION = 0.1

SPEC: dict[str, Any] = {
    "title": "Sums, tiny",
    "asks": "Does it run?",
    "task": "tiny_sums",
    "options": {"count": 300},
    "base": {
        "tokenizer": {"vocab_size": 270, "sample_bytes": 10_000},
        "data": {"row_tokens": 48, "row_chars": 40, "lanes": 4},
        "model": {"n_layers": 1, "width": 16, "n_heads": 2},
        "training": {
            "steps": 6,
            "batch_rows": 4,
            "learning_rate": 3e-3,
            "warmup_steps": 2,
            "log_every_steps": 1,
            "save_every_steps": 3,
            "save_in_background": False,
        },
        "validation": {"every_steps": 3, "rows": 4, "prompts": 2, "max_bytes": 4},
    },
    "variants": {"tidal": {}, "wide": {"model.width": 32}},
    "seeds": [1, 2, 3],
    "plot": {"kind": "curve"},
}


class TinyOptions(Section):
    count: int
    behave: str = ""  # of quick_work.py


class TinySums:
    """A task: prompts and answers, two of them in a test."""

    options = TinyOptions

    def write(self, folder: Path, options: Mapping[str, Any], seed: int) -> None:
        lines: dict[str, list[str]] = {"train": [], "held-out": [], "tests/short": []}
        for i, (prompt, answer) in enumerate(training_problems(options["count"], seed=seed)):
            held_out = is_validation(Document(answer, prompt, ("", 0)), FRACTION)
            name = "held-out" if held_out else "tests/short" if i < 4 else "train"
            lines[name].append(json.dumps({"prompt": prompt, "answer": answer}) + "\n")
        (folder / "tests").mkdir(parents=True)
        for name in reversed(lines):
            (folder / f"{name}.jsonl").write_text("".join(lines[name]))


def fake_tasks() -> ModuleType:
    module = ModuleType("experiments.tasks")
    module.__dict__.update(TASKS={"tiny_sums": TinySums()}, VALIDATION_FRACTION=FRACTION)
    return module


def write_set(folder: Path, name: str = "tiny", experiment: str = "sums", **changes: Any) -> Path:
    """`SPEC` with changes as a set's experiment; the folder of sets."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(copy.deepcopy(SPEC) | changes, sort_keys=False)
    (folder / name / f"{experiment}.yaml").write_text(text)
    return folder


def work(script: Path = SCRIPT) -> Any:
    """What `experiments.runner.run` takes as its command."""
    return lambda what, folder: [sys.executable, str(script), what, str(folder)]


def main(what: str, *arguments: str) -> int:
    sys.modules["experiments.tasks"] = fake_tasks()
    from experiments import runner
    from experiments import work as real
    from experiments.places import Places
    from experiments.spec import load_set

    if what != "run":
        return real.main([what, *arguments])
    jobs = load_set(Path(arguments[0]) / "tiny")[0].jobs
    return len(runner.run(jobs, Places(Path(arguments[1]), "tiny", "sources"), 1, False, print, work(DYING)))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
