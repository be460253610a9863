# make demo   set up, then the whole story on real text (about ten minutes on two cores)
# make test   set up, then the tests
# make check  set up, then ruff format, ruff, mypy and a strict build of the documentation
# make docs   set up, then the documentation in site/

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: setup test demo check docs clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --progress-bar off -c constraints.txt -e '.[test,docs]'
	touch $@

test: setup
	$(BIN)/pytest -n 2 --dist worksteal

demo: setup
	$(BIN)/flexolmo demo

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) --no-print-directory docs

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) runs build dist site
