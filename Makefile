# `make` lists the commands. If necessary, a command first creates the virtual environment and installs pinned packages.
#   PYTHON  the interpreter for the environment, 3.10 or newer
#   VENV    the folder of the environment
#   ARGS    arguments that are passed to the command: make train ARGS="model.attention=softmax"

PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=

BIN     := $(VENV)/bin
INSTALL  = $(BIN)/python -m pip install --constraint constraints.txt

# Two processes share the machine in `make test`: waiting threads of one process must not occupy the cores of
# the other process.
export OMP_WAIT_POLICY ?= passive

.PHONY: help train test docs peer-tests sanitize lint format format-check types wheels wheel-check clean

help:           ## list these commands
	@sed -n 's/^\([a-z-]*\):[^#]*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 24

train: $(VENV)/.installed-recipes  ## train the default model on CMUdict and show alpha per head
	$(BIN)/sparse-attn train $(ARGS)

test: $(VENV)/.installed-dev       ## run the tests
	$(BIN)/python -m pytest -n 2 $(ARGS)

docs: $(VENV)/.installed-docs       ## build the documentation into docs/_build/html and check it; ARGS go to sphinx-build
	$(BIN)/python -m sphinx -b html -W --keep-going -q $(ARGS) docs docs/_build/html
	$(BIN)/python scripts/check_site.py

peer-tests: $(VENV)/.installed-dev  ## run the entmax package's own tests on sparse_attn.compat.entmax
	$(BIN)/python scripts/run_peer_tests.py $(ARGS)

sanitize:       ## run the C kernels under the address, undefined-behaviour and thread sanitizers
	scripts/sanitize_kernels.sh

lint: $(VENV)/.installed-dev       ## check the code with ruff
	$(BIN)/ruff check

format: $(VENV)/.installed-dev     ## format the code and apply ruff's safe fixes
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

format-check: $(VENV)/.installed-dev  ## list the files that are not formatted
	$(BIN)/ruff format --check

types: $(VENV)/.installed-dev      ## check the types with mypy
	$(BIN)/mypy

wheels: $(VENV)/.installed-dev     ## build the source distribution and every wheel that this machine can build, into dist/
	scripts/build_wheels.sh $(BIN)/python

wheel-check: $(VENV)/.installed-dev  ## build the wheel, install it into an empty environment and use it there
	scripts/check_wheel.sh $(BIN)/python

clean:          ## remove builds and caches, but not the environment and the runs
	rm -rf build dist docs/_build .mypy_cache .pytest_cache .ruff_cache .hypothesis

# Packages are installed again only if the project's metadata or a pin has changed. `pip` is the last file of a new
# environment, so an environment whose creation was interrupted is created again.
$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

KERNELS := $(wildcard sparse_attn/kernels/cpu/*.[ch]) sparse_attn/kernels/cpu/build.py

$(VENV)/.installed-recipes: pyproject.toml constraints.txt $(KERNELS) | $(BIN)/pip
	$(INSTALL) --editable ".[recipes]"
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt $(KERNELS) | $(BIN)/pip
	$(INSTALL) --editable ".[dev]"
	@touch $@ $(VENV)/.installed-recipes

$(VENV)/.installed-docs: pyproject.toml constraints.txt $(KERNELS) | $(BIN)/pip
	$(INSTALL) --editable ".[docs]"
	@touch $@
