# `make demo` and `make test` set up what they need in .venv; nothing else has to be installed.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint wheel docs bench clean

demo: $(VENV)/demo.stamp
	$(BIN)/python tutorials/01_guide_by_hand.py

test: lint
	$(BIN)/python -m pytest

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The wheel has to work away from the checkout.
wheel: $(VENV)/dev.stamp
	rm -rf build dist
	PIP_CONSTRAINT= $(BIN)/python -m build --wheel --outdir dist .
	$(INSTALL) --no-deps --target dist/alone dist/*.whl
	cd dist && PYTHONPATH=alone ../$(BIN)/python -c \
	  "import pyro_iaf; print(pyro_iaf.__version__, pyro_iaf.__file__); assert 'alone' in pyro_iaf.__file__; \
	  from importlib.resources import files; assert (files('pyro_iaf') / 'carry.cpp').is_file()"

# The site, in docs/_build/html. SMOKE=1 cuts the tutorials short; as they are, they take half an
# hour, and run again when they have changed.
docs: $(VENV)/docs.stamp
	$(BIN)/python -m sphinx -W --keep-going docs docs/_build/html

bench: $(VENV)/bench.stamp
	$(BIN)/python -m benchmarks.distributions
	$(BIN)/python -m benchmarks.flows
	$(BIN)/python -m benchmarks.features
	$(BIN)/python -m benchmarks.peers
	$(BIN)/python -m benchmarks.guides
	$(BIN)/python -m benchmarks.inverse
	$(BIN)/python -m benchmarks.posteriors
	$(BIN)/python -m benchmarks.svi_step
	$(BIN)/python -m benchmarks.hierarchical
	$(BIN)/python -m benchmarks.vae
	$(BIN)/python -m benchmarks.dmm

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo.stamp: setup.cfg constraints.txt | $(VENV)/bin/python
	$(INSTALL) -e '.[plot]'
	touch $@

$(VENV)/dev.stamp: setup.cfg constraints.txt | $(VENV)/bin/python
	$(INSTALL) -e '.[dev]'
	touch $@

$(VENV)/docs.stamp: setup.cfg constraints.txt | $(VENV)/bin/python
	$(INSTALL) -e '.[docs]'
	touch $@

$(VENV)/bench.stamp: setup.cfg constraints.txt | $(VENV)/bin/python
	$(INSTALL) -e '.[benchmarks]'
	touch $@

clean:
	rm -rf $(VENV) build dist docs/_build docs/tutorials *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
