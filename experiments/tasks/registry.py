"""All tasks by name."""

from experiments.tasks.arithmetic import DIFFERENCES, MANY_OPERANDS, MULTIPLICATION, SUMS
from experiments.tasks.characters import CHARACTERS, SINGLE_KINDS
from experiments.tasks.noise import NOISE
from experiments.tasks.scripts import SCRIPTS
from experiments.tasks.source import SOURCE
from experiments.tasks.writing import Task

TASKS: dict[str, Task] = {
    "sums": SUMS,
    "differences": DIFFERENCES,
    "many_operands": MANY_OPERANDS,
    "multiplication": MULTIPLICATION,
    "characters": CHARACTERS,
    **SINGLE_KINDS,
    "noise": NOISE,
    "scripts": SCRIPTS,
    "source": SOURCE,
}
