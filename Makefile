# make demo   train a small GPT with MADA on text that is always there
# make test   all tests
# make check  lint, format, types, documentation
# make docs   the documentation, into build/site
# Each builds its environment first, in .venv; nothing else has to be installed.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

.PHONY: demo test check docs format clean

demo: $(STAMP)
	$(BIN)/mada train $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile $(ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(MKDOCS)

docs: $(STAMP)
	$(MKDOCS)

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

clean:
	rm -rf .venv build dist *.egg-info src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
