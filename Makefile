# make demo   AdamW and OMADA side by side, from a badly guessed learning rate; three minutes on two cores
# make test   all tests
# make check  lint, layout, layers, types and docs; each is a target, too
# make docs   the documentation, into build/site
# make release   sdist and wheel, into dist/: built, checked, installed into empty environments, tested there
# Each builds its environment first, in .venv (4 GB, some minutes); nothing else has to be installed.

PYTHON ?= python3
# Empty on a Python for which some of these versions do not exist: make CONSTRAINTS= test
CONSTRAINTS ?= -c constraints.txt
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test check lint layout layers types docs release format clean

demo: $(STAMP)
	$(BIN)/mada demo $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile $(ARGS)

check: lint layout layers types docs

lint: $(STAMP)
	$(BIN)/ruff check .

layout: $(STAMP)
	$(BIN)/ruff format --check .

layers: $(STAMP)
	PYTHONPATH=src $(BIN)/lint-imports --no-cache

types: $(STAMP)
	$(BIN)/mypy

# Not --quiet: warnings that are not printed do not count, and --strict would let them pass.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

release: $(STAMP)
	$(BIN)/python .ci/package.py

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(STAMP): pyproject.toml constraints.txt mada-optax/pyproject.toml
	@echo 'Installing into .venv: 4 GB, some minutes.'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS) -e '.[dev]' -e ./mada-optax
	touch $(STAMP)

clean:
	rm -rf .venv build dist *.egg-info src/*.egg-info mada-optax/src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
