# Two commands on a fresh machine (Python 3.11 to 3.13, make, pip): `make demo` and `make test`.
# Both create .venv from requirements.lock on first use and do nothing twice.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: demo test test-slow lint format lock clean help

help:
	@echo "make demo       install, then run the main job on real images (results in demo/)"
	@echo "make test       install, then run the tests"
	@echo "make test-slow  the tests that take minutes"
	@echo "make lint       style, types of imports, layers"
	@echo "make lock       resolve requirements.lock anew from pyproject.toml (needs uv)"

$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else f"Python 3.11 to 3.13 is needed, {sys.executable} is {sys.version.split()[0]}: make PYTHON=python3.12 ...")'
	@echo "== creating $(VENV) and installing the locked versions (several GB on the first use)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --require-hashes --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $(INSTALLED)

demo: $(INSTALLED)
	@echo "== running the demo on real images; everything it makes is in demo/"
	$(BIN)/geomed-mae demo --out demo

test: $(INSTALLED)
	@echo "== running the tests (tests marked slow: make test-slow)"
	$(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock:
	uv pip compile --quiet pyproject.toml --extra test --universal --python-version 3.11 --constraint constraints.txt \
	  --generate-hashes --no-emit-index-url --no-annotate --no-header --output-file requirements.lock

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .import_linter_cache
