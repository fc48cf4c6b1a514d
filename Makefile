PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DOCS := docs/.venv

.PHONY: help setup demo test test-quick test-gpu check docs fmt clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: $(READY)  ## the tested environment in .venv

$(READY): requirements.txt setup.py tools/setup_env.py
	$(PYTHON) tools/setup_env.py $(VENV)
	@touch $@

demo: setup  ## train a small detector by MAN++ and end to end, and compare
	$(BIN)/python tools/demo.py

test: setup  ## the whole test suite
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-quick: setup  ## unit tests and the plain parity tests, to run while editing
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not whole_models" tests/unit tests/parity/test_toy.py

test-gpu: setup  ## GPU tests
	MMMAN_TEST_GPU=1 $(BIN)/python -m pytest tests/gpu

check: setup  ## lint, format and the order of imports, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

docs: $(DOCS)/.ready  ## the documentation in docs/_build; Sphinx has an environment of its own, docs/.venv
	$(DOCS)/bin/sphinx-build --quiet --fail-on-warning --keep-going -b html docs docs/_build
	@echo docs/_build/index.html

$(DOCS)/.ready: docs/requirements.txt $(READY)
	$(BIN)/python -m venv $(DOCS)
	SITE='import site; print(site.getsitepackages()[0])' && \
		$(BIN)/python -c "$$SITE" > "$$($(DOCS)/bin/python -c "$$SITE")/tested_environment.pth"
	$(DOCS)/bin/pip install --quiet --disable-pip-version-check -r docs/requirements.txt
	@touch $@

fmt: setup  ## format and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment; mmcv's built wheel stays in the user's cache
	rm -rf $(VENV) $(DOCS) docs/_build *.egg-info
