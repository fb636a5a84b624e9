# make demo   AdamW and OMADA side by side, from a badly guessed learning rate; two minutes
# make test   all tests
# make check  lint, layout, types and docs; each is a target, too
# make docs   the documentation, into build/site
# Each builds its environment first, in .venv; nothing else has to be installed.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test check lint layout types docs format clean

demo: $(STAMP)
	$(BIN)/mada demo $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile $(ARGS)

check: lint layout types docs

lint: $(STAMP)
	$(BIN)/ruff check .

layout: $(STAMP)
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

# Not --quiet: warnings that are not printed do not count, and --strict would let them pass.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(STAMP): pyproject.toml constraints.txt mada-optax/pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]' -e ./mada-optax
	touch $(STAMP)

clean:
	rm -rf .venv build dist *.egg-info src/*.egg-info mada-optax/src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
