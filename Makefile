# Needs Python 3.11 with pip and venv, and make. Everything is installed into .venv; nothing needs root.
# Another interpreter: make PYTHON=python3.12 test

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

# A test run is its own: no cluster, tracking server or leftover token of this machine takes part. Ray's sessions go to a
# folder that is removed afterwards; its path is short because sockets lie below it. One thread a process: small networks
# gain nothing from more, many processes at once lose much, and sums come out the same on every machine. Two files of tests
# run beside each other: half of the time of one is waiting for Ray, and for sites that do not answer; three gain little on two cores.
# Files that take minutes come first, so that both processes end together: those about the whole, then the longest of the others. Every file is
# named once: of a file and its folder pytest keeps the folder, and its order.
PYTEST = sessions=$$(mktemp -d /tmp/headray.XXXX) && trap 'rm -rf "$$sessions"' EXIT && \
	env -u RAY_ADDRESS -u MLFLOW_TRACKING_URI RAY_TMPDIR=$$sessions RAY_AUTH_MODE=disabled \
	RAY_USAGE_STATS_ENABLED=0 RAY_TRAIN_ENABLE_PRINT_PATCH=0 RAY_DATA_DISABLE_PROGRESS_BARS=1 OMP_NUM_THREADS=1 \
	MLFLOW_DISABLE_TELEMETRY=true $(BIN)/python -m pytest --numprocesses 2 --dist loadfile
LONG = $(sort $(wildcard tests/test_*.py)) $(addprefix tests/pipelines/test_, swap.py finetune.py download.py animate.py) \
	$(sort $(wildcard tests/jobs/test_*.py)) tests/models/blender/test_learner.py
SHORT = $(filter-out $(LONG), $(sort $(wildcard tests/*/test_*.py tests/*/*/test_*.py)))

.PHONY: help demo test fast lint format
.DEFAULT_GOAL := help

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /make \1\t/p' $(MAKEFILE_LIST)

demo: $(INSTALLED)  ## the whole path on real pictures, in minutes, without GPU or internet
	$(BIN)/python jobs/demo.py

test: lint  ## lint, then every test this machine can run; says how many it cannot
	$(PYTEST) --durations 20 -m 'not gpu and not soak' --no-loadscope-reorder $(LONG) $(SHORT)

fast: $(INSTALLED)  ## the tests that start nothing and need no files from elsewhere
	$(PYTEST) --numprocesses auto -m 'not slow and not real and not browser and not postgres and not gpu and not soak'

lint: $(INSTALLED)  ## ruff, mypy, and who may import whom
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED)  ## rewrite the code as lint wants it
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

$(INSTALLED): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo 'error: $(PYTHON) not found; install Python 3.11 or name another: make PYTHON=python3.12'; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo 'installing into $(VENV): 8 GB, some minutes, once'
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable '.[dev]' --constraint constraints.txt
	touch $@
