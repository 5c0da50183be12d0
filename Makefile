PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
DONE := $(VENV)/.installed

.PHONY: install search test check slow clean

install: $(DONE)

# torch first and pinned: a CPU build where one is at hand, instead of gigabytes of CUDA through a dependency.
$(DONE): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[ray,dev]"
	touch $(DONE)

data/mnist/embedded.json: | $(DONE)
	$(BIN)/python -m ray_jobs.embedded data/mnist

search: install data/mnist/embedded.json
	$(BIN)/python -m ray_jobs.tune search_spaces/mnist.yaml

test: install
	$(BIN)/python -m pytest

slow: install
	$(BIN)/python -m pytest -m slow

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf results data/mnist
