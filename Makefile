# make demo [DATA=folder]   fit, evaluate and predict on images it draws itself, or on the folder's
#                           train.csv, val.csv and test.csv; CHECKPOINT=file of pretrained encoder weights,
#                           TIME=seconds of fitting per data set
# make test                 the test suite; PYTEST="..." passes arguments on
# make lint                 ruff and mypy
# make clean                remove .venv and what the tools left; runs and their bundles stay
#
# The first call creates .venv and installs; PYTHON=... names another interpreter.

PYTHON ?= python3
DATA ?=
CHECKPOINT ?=
TIME ?=
PYTEST ?=

VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := .ci/constraints.txt
INSTALL := $(BIN)/python -m pip install --constraint $(CONSTRAINTS)
# Stamps: installed again only when what decides the installation has changed.
RUN_STAMP := $(VENV)/.installed-run
TEST_STAMP := $(VENV)/.installed-test

.DELETE_ON_ERROR:
.PHONY: demo test lint clean

demo: $(RUN_STAMP)
	$(BIN)/semseg-automl demo $(if $(DATA),--data "$(DATA)") $(if $(CHECKPOINT),--checkpoint "$(CHECKPOINT)") \
	  $(if $(TIME),--time-limit $(TIME))

# Passive: threads that wait for work sleep instead of spinning, which matters when suite and DataLoader share
# two cores. pytest's exit status 5, no test ran, is a failure like any other.
test: export OMP_WAIT_POLICY = passive
test: $(TEST_STAMP)
	$(BIN)/python -m pytest $(PYTEST)

lint: $(TEST_STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# pip itself, not python: a venv made where ensurepip is missing has an interpreter and no pip.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "semseg-automl needs Python 3.11 or newer; '$(PYTHON)' is older or missing: try make PYTHON=python3.11" >&2; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV)

$(RUN_STAMP): setup.py $(CONSTRAINTS) | $(BIN)/pip
	$(INSTALL) --editable .
	touch $@

$(TEST_STAMP): setup.py $(CONSTRAINTS) | $(BIN)/pip
	$(INSTALL) --editable '.[test]'
	touch $@ $(RUN_STAMP)
