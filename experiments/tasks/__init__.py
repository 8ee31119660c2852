"""Tasks: each writes a corpus and its tests. `TASKS` has them by name."""

from experiments.tasks.registry import TASKS
from experiments.tasks.writing import VALIDATION_FRACTION, Task

__all__ = ["TASKS", "VALIDATION_FRACTION", "Task"]
