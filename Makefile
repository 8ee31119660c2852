# `make demo` and `make test` are all a newcomer needs: Python >= 3.11 and, for DeepSpeed, a C++ compiler.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
# A process on each core, with one thread, since most tests are too small for more. All of the two folders is slow.
FAST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --ignore tests/distributed --ignore tests/hosts
# Twice as many as two cores, since launches mostly wait. Each file in one process, in this order: what takes long comes first.
SLOW := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder -m slow \
	tests/distributed tests/hosts tests

# So that modules and tests are compiled once, and not by each of the hundreds of processes that tests start.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-hosts soak results-small check clean

demo: $(INSTALLED)
	$(BIN)/python -m launch.demo

test: check
	$(SLOW)

# Launches over two hosts on this machine, made of namespaces: as root, with iproute2, openssh-server and pdsh, and with
# openmpi-bin, mpich, slurmctld, slurmd and slurm-client where these launchers are to be seen too. -rs: what is missing.
test-hosts: $(INSTALLED)
	$(BIN)/python -m pytest -rs tests/hosts

# A training killed a hundred times, which must lose nothing; half an hour and more.
soak: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/kill_soak.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/kill_soak.py --elastic --kills 30

# What the model is good for, measured: the tables and pictures of docs/RESULTS.md, within an hour on two cores.
results-small: $(INSTALLED)
	$(BIN)/python -m experiments run small && $(BIN)/python -m experiments report small

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(FAST) -m "not slow"

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt \
		--editable '.[train,data,ray,serve,constraints,eval,dev]'
	touch $@

clean:
	rm -rf runs/demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
