# Every target sets up what it needs in .venv; nothing else has to be installed.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP_INSTALL = -m pip install --quiet --disable-pip-version-check -c constraints.txt
INSTALL = $(BIN)/python $(PIP_INSTALL)

.PHONY: help demo test lint versions wheel docs bench clean

help:  ## say what there is
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/demo.stamp  ## fit eight schools by hand and with AutoIAF, beside NUTS
	$(BIN)/python tutorials/01_guide_by_hand.py

test: lint  ## run lint, types, tests, doctests and tutorials
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

lint: $(VENV)/dev.stamp  ## run ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

versions:  ## run the tests under TORCH=2.15.0, say, and PYTHON=python3.13
	$(PYTHON) -m venv build/versions
	build/versions/bin/python -m pip install --quiet 'torch==$(TORCH)' -e '.[test]'
	OMP_NUM_THREADS=1 build/versions/bin/python -m pytest -n auto --ignore tests/test_site.py

wheel: $(VENV)/dev.stamp  ## build the wheel, and use it in an environment of its own
	rm -rf build dist
	PIP_CONSTRAINT= $(BIN)/python -m build --wheel --outdir dist .
	$(PYTHON) -m venv dist/clean
	dist/clean/bin/python $(PIP_INSTALL) dist/*.whl
	cd dist && clean/bin/python ../tests/newcomer.py

# The tutorials take half an hour as they are, and run again when they have changed.
docs: $(VENV)/docs.stamp  ## build the site in docs/_build/html; SMOKE=1 cuts its tutorials short
	$(BIN)/python -m sphinx -W --keep-going docs docs/_build/html

bench: $(VENV)/bench.stamp  ## measure everything again, in hours
	$(BIN)/python -m benchmarks.front
	$(BIN)/python -m benchmarks.distributions
	$(BIN)/python -m benchmarks.flows
	$(BIN)/python -m benchmarks.features
	$(BIN)/python -m benchmarks.peers
	$(BIN)/python -m benchmarks.guides
	$(BIN)/python -m benchmarks.inverse
	$(BIN)/python -m benchmarks.models
	$(BIN)/python -m benchmarks.posteriors
	$(BIN)/python -m benchmarks.certified
	$(BIN)/python -m benchmarks.multimodal
	$(BIN)/python -m benchmarks.structure --references
	$(BIN)/python -m benchmarks.structure
	$(BIN)/python -m benchmarks.enumeration
	$(BIN)/python -m benchmarks.minibatches --references
	$(BIN)/python -m benchmarks.minibatches
	$(BIN)/python -m benchmarks.gradients
	$(BIN)/python -m benchmarks.svi_step
	$(BIN)/python -m benchmarks.hierarchical
	$(BIN)/python -m benchmarks.distributed
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

clean:  ## remove all that was built
	rm -rf $(VENV) build dist docs/_build docs/tutorials *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
